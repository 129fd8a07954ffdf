"""`heddle trace record | analyze | simulate`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heddle._errors import HeddleValueError, refuse
from heddle.advise import Machine
from heddle.demo import add_inputs
from heddle.trace import POLICIES, Analysis, Reservation, Trace, analyze, load, simulate

PLOTS = (".svg", ".png", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three commands and their options."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="record | analyze | simulate")
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    record = commands.add_parser(
        "record", help="a model decodes a text; what each layer selects is written", **defaults
    )
    record.add_argument("out", type=Path, metavar="TRACE", help="the file, Parquet")
    add_inputs(record)
    record.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help="length of the context that is read first"
    )
    record.add_argument("--steps", type=int, default=256, metavar="N", help="tokens of the text that are then decoded")
    record.add_argument("--budget", type=int, default=128, metavar="K", help="tokens that each KV head selects")
    record.add_argument(
        "--method",
        choices=["topk", "indexer"],
        default="topk",
        help="each KV head by its own scores, or all of a layer by its DSA indexer",
    )
    record.add_argument("--metric", choices=["qk", "oam"], default="qk", help="topk: what they are ranked by")
    record.add_argument(
        "--indexer", type=Path, metavar="FILE", help="indexer: what heddle.dsa saved (heddle indexer makes one)"
    )
    record.add_argument("--sink", type=int, default=4, metavar="N", help="first tokens that are always selected")
    record.add_argument("--recent", type=int, default=16, metavar="N", help="last tokens that are always selected")
    record.add_argument("--dense-layers", type=int, default=0, metavar="N", help="first layers that read everything")
    record.add_argument(
        "--format",
        choices=["fp32", "bf16", "fp16", "int8", "fp8"],
        default="bf16",
        help="KV format that sizes are told in",
    )

    for name, text in (
        ("analyze", "how the selected tokens move from step to step, as distributions"),
        ("simulate", "a reserved part of the last-level cache: hit rate, misses a step, slowdown"),
    ):
        command = commands.add_parser(name, help=text, **defaults)
        command.add_argument("trace", type=Path, metavar="TRACE", help="what `heddle trace record` wrote")
        command.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens of a page")
        command.add_argument("--json", type=Path, metavar="FILE", help="everything, JSON")
        command.add_argument(
            "--plot", type=Path, metavar="FILE", help="SVG, PNG or PDF; TRACE.<command>.svg if not given"
        )
        if name == "analyze":
            command.add_argument("--window", type=int, default=50, metavar="N", help="steps of a working set")
            continue
        sizes = command.add_mutually_exclusive_group()
        sizes.add_argument("--mb", type=float, nargs="+", metavar="MB", help="reserved sizes in megabytes")
        sizes.add_argument(
            "--entries", type=int, nargs="+", metavar="N", help="the same in entries: tokens of a KV head"
        )
        command.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
        command.add_argument(
            "--shared", action="store_true", help="one cache for all heads and layers, not equal parts"
        )
        names = ", ".join(machine.name for machine in Machine.known())
        command.add_argument("--machine", default="h100-80gb", metavar="NAME", help=f"host (measured), {names}")
        command.add_argument(
            "--cache-speedup", type=float, default=4.0, metavar="X", help="assumed: cache bandwidth over memory's"
        )
        command.add_argument("--batch", type=int, default=1, metavar="N", help="requests that run together")
        command.add_argument("--weights", action="store_true", help="a step reads the model's weights too, in bf16")


def run(args: argparse.Namespace) -> int:
    """Runs one of them. Returns 0. Raises HeddleValueError for options out of range and files that are no traces."""
    return {"record": _record, "analyze": _analyze, "simulate": _simulate}[args.action](args)


def _record(args: argparse.Namespace) -> int:
    least = {"tokens": 1, "steps": 1, "budget": 1, "sink": 0, "recent": 0, "dense_layers": 0}
    for name, number in least.items():
        if getattr(args, name) < number:
            option = "--" + name.replace("_", "-")
            raise refuse(HeddleValueError, "value", option, f"{getattr(args, name)}; allowed are {number} and above")
    if args.sink + args.recent > args.budget:
        message = f"{args.budget}; allowed are {args.sink + args.recent}, what is always selected, and above"
        raise refuse(HeddleValueError, "value", "--budget", message)
    if (args.method == "indexer") != (args.indexer is not None):
        given = "none" if args.indexer is None else f"{args.indexer} with --method {args.method}"
        raise refuse(HeddleValueError, "value", "--indexer", f"{given}; allowed is a file with --method indexer")
    if not args.out.absolute().parent.is_dir():
        raise refuse(HeddleValueError, "value", "TRACE", f"{args.out}: the directory does not exist")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from heddle.trace._record import record

    trace = load(record(args))
    size = args.out.stat().st_size
    print(f"{len(trace.tokens):,} selected tokens of {trace.steps} steps in {size / 1e6:.1f} MB: {args.out}")
    return 0


def _analyze(args: argparse.Namespace) -> int:
    plot = _outputs(args, "analysis")
    analysis = analyze(load(args.trace), window=args.window, page_size=args.page_size)
    _print_analysis(analysis)
    from heddle.trace._plots import draw_analysis

    draw_analysis(analysis, plot)
    return _written(args, plot, analysis.to_dict())


def _simulate(args: argparse.Namespace) -> int:
    plot = _outputs(args, "simulation")
    trace = load(args.trace)
    sizes = _sizes(args, trace)
    fixed = float(trace.description.get("weight_bytes", 0.0)) if args.weights else 0.0
    machine = Machine.named(args.machine)
    results = simulate(
        trace,
        sizes,
        policies=args.policies,
        page_size=args.page_size,
        shared=args.shared,
        machine=machine,
        cache_speedup=args.cache_speedup,
        batch=args.batch,
        fixed_bytes=fixed,
    )
    _print_simulation(trace, machine, results, args)
    from heddle.trace._plots import draw_simulation

    draw_simulation(results, plot)
    return _written(args, plot, [result.to_dict() for result in results])


def _sizes(args: argparse.Namespace, trace: Trace) -> list[int]:
    """In entries. Unless given: none, halves of the footprint from 1/64 on, and all of it."""
    if args.entries is not None:
        return args.entries
    if args.mb is not None:
        return [round(mb * 1e6 / trace.entry_bytes) for mb in args.mb]
    footprint = trace.footprint()
    return sorted({0, *(footprint >> shift for shift in range(7))})


def _outputs(args: argparse.Namespace, kind: str) -> Path:
    """The plot's file. Refuses what cannot be written before any work is done."""
    plot = args.plot or args.trace.with_name(f"{args.trace.name}.{kind}.svg")
    if plot.suffix not in PLOTS:
        raise refuse(HeddleValueError, "value", "--plot", f"{plot}; allowed endings are {', '.join(PLOTS)}")
    for option, path in (("--plot", plot), ("--json", args.json)):
        # A default plot's directory is the trace's, which load() speaks about.
        if path is not None and not path.absolute().parent.is_dir() and not (option == "--plot" and args.plot is None):
            raise refuse(HeddleValueError, "value", option, f"{path}: the directory does not exist")
    return plot


def _written(args: argparse.Namespace, plot: Path, content: Any) -> int:
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"Figures: {args.json}")
    print(f"Plot: {plot}")
    return 0


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *rest = row
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))


def _print_analysis(analysis: Analysis) -> None:
    layers = f"{len(analysis.layers)} layers of {analysis.kv_heads} KV heads"
    print(f"{analysis.steps} steps, {layers}, k = {analysis.budget}, windows of {analysis.window} steps\n")
    rows = []
    for name, d in analysis.distributions.items():
        cells = [f"{x:.3g}" for x in (d.mean, *(d.quantile(q) for q in (0.05, 0.5, 0.95)))]
        rows.append([name.replace("_", " "), d.unit, *cells, f"{d.count:,}", d.title])
    _table(["", "in", "mean", "5 %", "median", "95 %", "seen", "what"], rows)
    print()


def _print_simulation(trace: Trace, machine: Machine, results: Sequence[Reservation], args: argparse.Namespace) -> None:
    footprint = trace.footprint()
    size = footprint * trace.entry_bytes / 1e6
    print(
        f"{trace.steps} steps, {len(trace.tokens) / trace.steps:,.0f} selected tokens each; footprint {footprint:,} "
        f"entries, {size:.2f} MB\n{machine.name} ({machine.source}); cache assumed {args.cache_speedup:g} times "
        "as fast as memory\n"
    )
    rows = [
        [
            r.policy,
            f"{r.tokens:,}",
            f"{r.megabytes:.2f}",
            f"{100 * r.hit_rate:.1f} %",
            f"{r.misses_per_step:,.1f}",
            f"{r.misses_p95:,.0f}",
            f"{r.fetched_per_step:,.1f}",
            f"{r.slowdown:.2f}",
        ]
        for r in results
    ]
    _table(["", "entries", "MB", "hits", "misses a step", "95 %", "fetched a step", "slowdown"], rows)
    print()
