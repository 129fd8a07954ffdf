"""What a model's attention costs, and what to try first: heddle.advise and the command `heddle advise`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heddle import _core
from heddle._errors import HeddleTypeError, HeddleValueError, refuse

FORMATS = ("fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8")


@dataclass(frozen=True)
class Machine:
    """Rates that a machine reaches, not what its name promises.

    Bytes and operations (a multiply-add is two) a second. A rate of 0 is not known: the next wider type's is used in
    its place (fp8 and int8: bf16; bf16: fp32). memory 0: not known, and everything fits. workers: cores or SMs; decode
    is split so that each has work.
    """

    name: str
    bandwidth: float
    fp32: float = 0.0
    bf16: float = 0.0
    int8: float = 0.0
    fp8: float = 0.0
    memory: float = 0.0
    workers: int = 1
    source: str = "given"

    @classmethod
    def named(cls, name: str) -> Machine:
        """A preset of Machine.known(), or "host": this machine, measured in about a second.

        Raises HeddleValueError for a name that does not exist.
        """
        return cls(**_core.machine_from_name(name))

    @classmethod
    def known(cls) -> list[Machine]:
        """The presets. Their rates are measured where `source` says so, else the datasheet's dense peaks."""
        return [cls(**machine) for machine in _core.known_machines()]


@dataclass(frozen=True)
class Cost:
    """Costs of all layers and requests, for one pattern, KV format and phase.

    Every byte is counted once, so `seconds` is that of a perfect overlap and perfect caches: the larger of
    moved_bytes / bandwidth and operations / rate.
    """

    pattern: str
    format: str
    phase: Literal["prefill", "decode"]
    pairs: int
    """(query, key) pairs of one head of one request."""
    density: float
    """pairs over those of dense attention."""
    kv_bytes: float
    """Keys and values of the cache."""
    side_bytes: float
    """Its scales and value norms."""
    score_bytes: float
    """Scores in memory, of one layer: layers reuse them, as they do the next two."""
    workspace_bytes: float
    """Masks, token lists, partial results of splits."""
    activation_bytes: float
    """q, out and the new k and v."""
    total_bytes: float
    """All of them and other_bytes."""
    operations: float
    moved_bytes: float
    """Read and written in this phase."""
    seconds: float
    memory_bound: bool
    """More time goes into bytes than into operations."""
    fits: bool
    """In the machine's memory."""
    max_seq_len: int
    """The longest request that fits."""


@dataclass(frozen=True)
class Advice:
    """What heddle.advise returns. str() of it is the report that `heddle advise` prints."""

    workload: dict[str, Any]
    machine: Machine
    costs: list[Cost]
    """Phase by phase, pattern by pattern, format by format."""
    prefill: Cost
    """What is run today."""
    decode: Cost
    """What is run today: one step."""
    memory: str
    """Whether it fits, and the first thing to try if not."""
    prefill_speed: str
    decode_speed: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [self._headline(), f"{self.machine.name}: {_rates(self.machine)}", f"  ({self.machine.source})"]
        for title, header, rows in self._tables():
            first, *others = (max(map(len, column)) for column in zip(header, *rows, strict=True))
            lines += ["", title]
            for name, *cells in [header, *rows]:
                numbers = (cell.rjust(width) for cell, width in zip(cells, others, strict=True))
                lines.append("  ".join(["", name.ljust(first), *numbers]))
        return "\n".join([*lines, "", *(f"{what}: {text}" for what, text in self._advice())])

    def _headline(self) -> str:
        w = self.workload
        heads = f"{w['num_q_heads']}/{w['num_kv_heads']} heads of {w['head_dim']}"
        work = f"{w['batch']} x {w['seq_len']} tokens in {w['dtype']}"
        return f"{w['num_layers']} layers, {heads}, {work}, {w['format']} cache"

    def _advice(self) -> list[tuple[str, str]]:
        advice = [("Memory", self.memory), ("Prefill", self.prefill_speed), ("Decode", self.decode_speed)]
        return advice if all(cost.fits for cost in self.costs) else [("*", "more than the machine's memory"), *advice]

    def _find(self, phase: str, pattern: str, format: str) -> Cost:
        return next(c for c in self.costs if (c.phase, c.pattern, c.format) == (phase, pattern, format))

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, header, rows): the KV formats with dense attention, then the patterns with today's format."""
        formats = []
        for format in FORMATS:
            prefill, decode = (self._find(phase, "flash", format) for phase in ("prefill", "decode"))
            peak = max(prefill, decode, key=lambda cost: cost.total_bytes)
            formats.append(
                [
                    format,
                    _bytes(decode.kv_bytes),
                    _bytes(decode.side_bytes),
                    _bytes(peak.total_bytes) + ("" if peak.fits else " *"),
                    _count(peak.max_seq_len),
                    _time(prefill.seconds),
                    _time(decode.seconds),
                ]
            )
        today = self.workload["format"]
        patterns = []
        for prefill in (c for c in self.costs if c.phase == "prefill" and c.format == today):
            decode = self._find("decode", prefill.pattern, today)
            patterns.append(
                [
                    prefill.pattern,
                    f"{prefill.density:.2%}",
                    _bytes(prefill.score_bytes),
                    _bytes(prefill.workspace_bytes),
                    _bytes(prefill.total_bytes) + ("" if prefill.fits else " *"),
                    f"{prefill.operations / 1e12:.3g} T",
                    _time(prefill.seconds),
                    _time(decode.seconds),
                ]
            )
        kv_header = ["KV format", "K and V", "scales, norms", "all", "longest request", "prefill", "decode step"]
        pattern_header = ["pattern", "pairs", "scores", "workspace", "all", "operations", "prefill", "decode step"]
        return [
            ("Flash attention, by KV format", kv_header, formats),
            (f"Patterns, with a {today} cache", pattern_header, patterns),
        ]


def advise(
    *,
    seq_len: int,
    num_layers: int | None = None,
    num_q_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    config: Any = None,
    batch: int = 1,
    new_tokens: int = 1,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    causal: bool = True,
    format: str = "bf16",
    partition: int = 1,
    materialized: bool = False,
    window: int | None = 1024,
    n_global: int = 64,
    strided: tuple[int, int] = (1024, 64),
    density: float = 0.25,
    block: int = 128,
    budget: int = 2048,
    other_bytes: float = 0.0,
    machine: str | Machine = "host",
    prefill_target: float = 0.0,
    decode_target: float = 0.0,
) -> Advice:
    """What a model's attention costs in memory and time, with every method and KV format, and what to try first.

    Bytes are exact; pairs of windows, strides and token lists are counted exactly. Times are a roofline: the larger of
    bytes over the machine's bandwidth and operations over its rate.

    Args:
        seq_len: tokens of each request: in prefill, and already there in decode.
        num_layers, num_q_heads, num_kv_heads, head_dim: the model's shape. num_kv_heads defaults to num_q_heads.
        head_dim_v: of the values; head_dim if None.
        config: a transformers config, a mapping, or the path of a config.json, for what of the shape is not given.
        batch: requests at a time.
        new_tokens: query tokens of a decode step.
        dtype: of q and out.
        causal: whether a query sees only the keys up to its own.
        format: the KV format of today: "fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b" or "fp8".
        partition: tokens that a K scale of int8-a covers.
        materialized: whether attention writes its scores to memory today.
        window, n_global: the window pattern: this many keys to the left, and the first n_global.
        strided: (width, stride) of the strided pattern.
        density, block: the block mask: the fraction of pairs that it keeps, and the side of its blocks.
        budget: tokens of the top-k and token-list patterns.
        other_bytes: memory that is taken already: weights, activations of other layers.
        machine: "host" (this one, measured), a name of Machine.known(), or a Machine.
        prefill_target, decode_target: seconds of a prefill and of a step that are fast enough; 0: as fast as can be.

    Returns:
        An Advice: costs of every pattern, format and phase, those of today, and three sentences of advice.

    Raises:
        HeddleValueError: a number or name outside its range, or a shape that neither arguments nor config give.
        HeddleTypeError: an argument of the wrong type.
    """
    shape = {"num_layers": num_layers, "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if config is not None:
        found = _shape_of(config)
        shape = {name: found[name] if value is None else value for name, value in shape.items()}
    if shape["num_kv_heads"] is None:
        shape["num_kv_heads"] = shape["num_q_heads"]
    for name, value in shape.items():
        if value is None:
            raise refuse(HeddleValueError, "value", name, "not given; an integer of 1 and above, or config, is needed")
    if not (isinstance(strided, Sequence) and len(strided) == 2):
        raise refuse(HeddleTypeError, "dtype", "strided", f"{strided!r}; allowed is a pair (width, stride)")
    if isinstance(machine, str):
        machine = Machine.named(machine)
    elif not isinstance(machine, Machine):
        kind = type(machine).__name__
        raise refuse(HeddleTypeError, "dtype", "machine", f"got {kind}; allowed are a name and a heddle.Machine")
    workload = {
        **shape,
        "head_dim_v": shape["head_dim"] if head_dim_v is None else head_dim_v,
        "batch": batch,
        "seq_len": seq_len,
        "new_tokens": new_tokens,
        "dtype": dtype,
        "causal": causal,
        "format": format,
        "partition": partition,
        "materialized": materialized,
        "other_bytes": other_bytes,
    }
    result = _core.advise(
        {
            **workload,
            "window": window,
            "n_global": n_global,
            "width": strided[0],
            "stride": strided[1],
            "density": density,
            "block": block,
            "budget": budget,
            "prefill_target": prefill_target,
            "decode_target": decode_target,
            "machine": dataclasses.asdict(machine),
        }
    )
    return Advice(
        workload=workload,
        machine=machine,
        costs=[Cost(**cost) for cost in result["costs"]],
        prefill=Cost(**result["prefill"]),
        decode=Cost(**result["decode"]),
        memory=result["memory"],
        prefill_speed=result["prefill_speed"],
        decode_speed=result["decode_speed"],
    )


def _shape_of(config: Any) -> dict[str, int | None]:
    """The shape that a transformers config names."""
    if isinstance(config, (str, os.PathLike)):
        try:
            config = json.loads(Path(config).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise refuse(HeddleValueError, "value", "config", f"cannot be read: {error}") from None
    fields = config if isinstance(config, Mapping) else vars(config)
    fields = fields.get("text_config", fields)  # of a model that sees images too
    if not isinstance(fields, Mapping):
        fields = vars(fields)
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    head_dim = fields.get("head_dim")
    if head_dim is None and heads and width:
        head_dim = width // heads
    return {
        "num_layers": fields.get("num_hidden_layers"),
        "num_q_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads"),
        "head_dim": head_dim,
    }


def _scaled(value: float, units: Sequence[str], step: float = 1000.0) -> str:
    unit = 0
    while value >= 0.99995 * step and unit + 1 < len(units):
        value /= step
        unit += 1
    return f"{value:.4g} {units[unit]}"


def _bytes(value: float) -> str:
    return _scaled(value, ["B", "KB", "MB", "GB", "TB", "PB"]) if value else "-"


def _count(value: int) -> str:
    return f"{value:,}" if value < 2**31 - 1 else "any"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _rates(machine: Machine) -> str:
    rates = [f"{_bytes(machine.memory)} of memory"] if machine.memory else []
    rates.append(f"reads {_scaled(machine.bandwidth, ['B/s', 'KB/s', 'MB/s', 'GB/s', 'TB/s'])}")
    for name in ("fp32", "bf16", "int8", "fp8"):
        if rate := getattr(machine, name):
            rates.append(f"{name} {_scaled(rate, ['op/s', 'Kop/s', 'Mop/s', 'Gop/s', 'Top/s', 'Pop/s'])}")
    return ", ".join(rates)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `heddle advise`."""
    model = parser.add_argument_group("model")
    model.add_argument("--config", metavar="FILE", help="a transformers config.json, for what is not given below")
    model.add_argument("--layers", type=int, metavar="N")
    model.add_argument("--heads", type=int, metavar="N", help="query heads")
    model.add_argument("--kv-heads", type=int, metavar="N", help="key and value heads (default: --heads)")
    model.add_argument("--head-dim", type=int, metavar="N")
    model.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    work = parser.add_argument_group("work")
    work.add_argument("--tokens", type=int, required=True, metavar="N", help="tokens of a request")
    work.add_argument("--batch", type=int, default=1, metavar="N", help="requests at a time")
    work.add_argument("--format", choices=FORMATS, default="bf16", help="KV format of today")
    work.add_argument("--materialized", action="store_true", help="attention writes its scores to memory today")
    work.add_argument("--other-gb", type=float, default=0.0, metavar="GB", help="memory taken already, by weights say")
    work.add_argument("--prefill-target", type=float, default=0.0, metavar="S", help="seconds that are fast enough")
    work.add_argument("--decode-target", type=float, default=0.0, metavar="S", help="seconds a step, likewise")
    sparse = parser.add_argument_group("sparse patterns")
    sparse.add_argument("--window", type=int, default=1024, metavar="N", help="keys to the left")
    sparse.add_argument("--globals", type=int, default=64, metavar="N", help="first keys that every query sees")
    sparse.add_argument("--strided", type=int, nargs=2, default=(1024, 64), metavar=("WIDTH", "STRIDE"))
    sparse.add_argument("--density", type=float, default=0.25, metavar="X", help="of the block mask")
    sparse.add_argument("--budget", type=int, default=2048, metavar="N", help="tokens of top-k and of token lists")
    place = parser.add_argument_group("machine")
    names = ", ".join(machine.name for machine in Machine.known())
    place.add_argument("--machine", default="host", metavar="NAME", help=f"host (measured; default), {names}")
    place.add_argument("--memory-gb", type=float, metavar="GB", help="in place of the machine's own; so are these:")
    place.add_argument("--bandwidth-gbs", type=float, metavar="GB/S")
    for name in ("fp32", "bf16", "int8", "fp8"):
        place.add_argument(f"--{name}-gflops", type=float, metavar="GFLOP/S")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """`heddle advise`."""
    given = {name: getattr(args, f"{name}_gflops") for name in ("fp32", "bf16", "int8", "fp8")}
    given |= {"memory": args.memory_gb, "bandwidth": args.bandwidth_gbs}
    machine = Machine.named(args.machine)
    changes = {name: value * 1e9 for name, value in given.items() if value is not None}
    if changes:
        source = f"{', '.join(changes)} given; else {machine.source}"
        machine = dataclasses.replace(machine, source=source, **changes)
    advice = advise(
        config=args.config,
        num_layers=args.layers,
        num_q_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        seq_len=args.tokens,
        batch=args.batch,
        dtype=args.dtype,
        format=args.format,
        materialized=args.materialized,
        window=args.window,
        n_global=args.globals,
        strided=tuple(args.strided),
        density=args.density,
        budget=args.budget,
        other_bytes=args.other_gb * 1e9,
        machine=machine,
        prefill_target=args.prefill_target,
        decode_target=args.decode_target,
    )
    if args.json:
        json.dump(advice.to_dict(), sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        _print(advice)
    return 0


def _print(advice: Advice) -> None:
    """The report on a terminal: tables by rich where it is installed and someone looks, plain text elsewhere."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(advice)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        print(advice)
        return
    console.print(f"[bold]{advice._headline()}[/bold]")
    console.print(f"{advice.machine.name}: {_rates(advice.machine)}\n[dim]{advice.machine.source}[/dim]", markup=True)
    for title, header, rows in advice._tables():
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            too_much = any(cell.endswith(" *") for cell in row)
            today = row[0] in ("flash", advice.workload["format"])
            table.add_row(*row, style="red" if too_much else "bold" if today else None)
        console.print(table)
    for what, text in advice._advice():
        console.print(f"[bold]{what}[/bold]: {text}", soft_wrap=True)
