"""What measurements on a GPU beside peers have in common: taking turns, medians, the record, the table.

Calls that are compared take turns, each behind a pause of the GPU in which the host gets ahead, so that what a launch
costs the host stays out of the figures; times are those of events on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import record as records

PAUSE_CYCLES = 700_000  # about 0.4 ms, longer than the host takes to enqueue a call
DEVICE = "cuda"


@dataclass(frozen=True)
class Line:
    """One line of the table: the time of `peer` over that of `ours`, and the least it should be."""

    name: str
    ours: str
    peer: str
    ratio: float
    target: float | None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio >= self.target


class Flush:
    """Empties the second-level cache by reading: lines that were written would be paid for inside what comes next."""

    def __init__(self, mebibytes: int = 512) -> None:
        self._buffer = torch.zeros(mebibytes << 18, dtype=torch.float32, device=DEVICE)

    def __call__(self) -> None:
        self._buffer.max()


def take_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, before: Callable[[], Any] | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each call, `rounds` of them; `before` runs ahead of each, untimed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in calls.values():
        run()
        run()
    for _ in range(rounds):
        marks = {}
        for name, run in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if before is not None:
                before()
            torch.cuda._sleep(PAUSE_CYCLES)
            begin.record()
            run()
            end.record()
            marks[name] = (begin, end)
        torch.cuda.synchronize()
        for name, (begin, end) in marks.items():
            times[name].append(begin.elapsed_time(end))
    return times


class Report:
    """Points as they are measured, the lines that compare them, and the record of both."""

    def __init__(self, pattern: str = "", rounds: int = 20) -> None:
        self.points: list[dict[str, Any]] = []
        self.lines: list[Line] = []
        self._wanted = re.compile(pattern)
        self._rounds = rounds

    def wants(self, name: str) -> bool:
        return self._wanted.search(name) is not None

    def measure(
        self,
        name: str,
        calls: dict[str, Callable[[], Any]],
        *,
        flop: float | None = None,
        byte: float | None = None,
        rounds: int | None = None,
        before: Callable[[], Any] | None = None,
        note: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """Medians in milliseconds; calls that fail are told, and left out."""
        able = {}
        for call, run in calls.items():
            try:
                run()
                torch.cuda.synchronize()
                able[call] = run
            except Exception as error:
                print(f"{name}: {call} cannot: {type(error).__name__}: {str(error)[:200]}", flush=True)
        figures: dict[str, Any] = {}
        for call, times in take_turns(able, rounds or self._rounds, before).items():
            low, median, high = statistics.quantiles(times, n=4)
            figures[call] = {
                "median_ms": median,
                "min_ms": min(times),
                "quartiles_ms": [low, high],
                "rounds": len(times),
            }
            if flop is not None:
                figures[call]["tflops"] = flop / median / 1e9
            if byte is not None:
                figures[call]["gb_per_s"] = byte / median / 1e6
        self.points.append({"name": name, "flop": flop, "byte": byte, "calls": figures, **(note or {})})
        told = "  ".join(
            f"{call} {f['median_ms'] * 1e3:.1f} us" + (f" ({f['tflops']:.0f} TFLOP/s)" if flop else "")
            for call, f in figures.items()
        )
        print(f"{name:44s} {told}", flush=True)
        return {call: f["median_ms"] for call, f in figures.items()}

    def compare(self, name: str, times: dict[str, float], ours: str, peer: str, target: float | None) -> None:
        if ours in times and peer in times:
            self.lines.append(Line(name, ours, peer, times[peer] / times[ours], target))

    def claim(self, name: str, ours: str, against: str, ratio: float, target: float | None) -> None:
        """A comparison with something that was computed, like a time that a case should take."""
        self.lines.append(Line(name, ours, against, ratio, target))

    def show(self) -> None:
        table = Table("case", "ours", "against", "ratio", "target", "met", box=box.SIMPLE)
        for line in self.lines:
            target = "" if line.target is None else f"{line.target:g}"
            met = {None: "", True: "yes", False: "no"}[line.met]
            table.add_row(line.name, line.ours, line.peer, f"{line.ratio:.3f}", target, met)
        Console(width=140).print(table)

    def write(self, program: str, into: Path, packages: Sequence[str], complete: bool) -> Path:
        record = records.describe([f"bench/peers/{program}.py", *sys.argv[1:]]) | {"complete": complete}
        record["device"] |= describe_gpu()
        record["versions"] |= {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
        record["versions"] |= {package: version_of(package) for package in packages}
        record["points"] = self.points
        record["results"] = [asdict(line) | {"met": line.met} for line in self.lines]
        return records.write(record, f"{program}-peers", into)


def run_script(
    program: str, parser: argparse.ArgumentParser, packages: Sequence[str], measure: Callable[[Report, Any], None]
) -> int:
    """What a script of this folder does: measure(report, its arguments), the table, the record."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--filter", default="", help="regular expression; the cases whose names it finds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--into", type=Path, help="folder of the record")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    report = Report(args.filter, args.rounds)
    measure(report, args)
    report.show()
    into = args.into or (None if args.filter else records.RESULTS)
    if into is not None:
        print(f"recorded in {report.write(program, into, packages, not args.filter)}")
    return 0


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def describe_gpu() -> dict[str, Any]:
    name = torch.cuda.get_device_name()
    driver = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        driver = records.describe_gpu()["driver"]
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": name, "driver": driver, "multiprocessors": properties.multi_processor_count}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """||ours - theirs|| / ||theirs||."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
