"""Records of measurements: what was run, on what, built how, from which source; one JSON file a run."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import heddle
from heddle import _core

SCHEMA = 1
# The checkout, where the package is used from one.
_ROOT = Path(__file__).resolve().parents[2]


def describe(command: Sequence[str]) -> dict[str, Any]:
    """What every record says besides its figures."""
    settings = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "HEDDLE_ISA") if name in os.environ]
    return {
        "schema": SCHEMA,
        "command": " ".join([*settings, shlex.join(command)]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": _device(),
        "build": {"compiler": _core.compiler, "flags": _flags(), "current": _is_current()},
        "versions": {"heddle": heddle.__version__, "python": platform.python_version(), "numpy": np.__version__},
        "revision": revision(),
    }


def write(record: dict[str, Any], program: str, into: Path) -> Path:
    """Writes into/<program>-<instruction set or GPU>-<day>-<revision>.json and returns its path."""
    revision = record["revision"]
    source = "unknown" if revision is None else revision["commit"][:12] + "-dirty" * revision["dirty"]
    device = record["device"]
    where = device["gpu"].split()[1].lower() if "gpu" in device else device["isa"]  # "NVIDIA H100 80GB HBM3": h100
    path = into / f"{program}-{where}-{record['date'][:10]}-{source}.json"
    into.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is either there with all of the text, or as it was."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not tell."""
    sizes = [32 << 20]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes)


def _device() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), processor)
    return {
        "processor": processor,
        "isa": heddle.host_isa(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": heddle.num_threads(),
        "last_level_cache_mib": last_level_cache() / 2**20,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        # How quiet the machine was when the run began: its 1, 5 and 15 minutes before.
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _flags() -> str | None:
    """How the kernels that run here were compiled; None unless heddle is imported from a build tree."""
    for folder in Path(_core.__file__).resolve().parents:
        with contextlib.suppress(OSError):
            for entry in json.loads((folder / "compile_commands.json").read_text()):
                words = shlex.split(entry["command"])
                if entry["file"].endswith("host/kernels/tile.cpp") and f"-DHEDDLE_ISA={heddle.host_isa()}" in words:
                    return " ".join(w for w in words if w.startswith(("-O", "-m", "-std", "-f")) and "=/" not in w)
    return None


def _is_current() -> bool | None:
    """Whether what runs was built after its sources were last changed; None outside a checkout."""
    folders = [folder for folder in (_ROOT / "cpp", _ROOT / "python" / "bindings") if folder.is_dir()]
    newest = max((file.stat().st_mtime for folder in folders for file in folder.rglob("*.*")), default=None)
    return None if newest is None else newest <= Path(_core.__file__).stat().st_mtime


def revision() -> dict[str, Any] | None:
    """The commit, and whether the tree had changes of its own (records aside); None outside a checkout. HEDDLE_REVISION
    names it (with "-dirty" behind it if so) where a build was brought to, whatever else is there."""
    if named := os.environ.get("HEDDLE_REVISION"):
        return {"commit": named.removesuffix("-dirty"), "dirty": named.endswith("-dirty")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    # An installed package may lie within somebody else's repository.
    if not (_ROOT / "python" / "heddle").is_dir():
        return None
    try:
        changes = git("status", "--porcelain", "--", ".", ":!bench/results")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None
