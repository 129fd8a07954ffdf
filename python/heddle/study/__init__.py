"""`heddle study`: every selection and sampling method on a language model and a text, in one report."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from heddle._errors import HeddleValueError, refuse
from heddle.demo import add_inputs

__all__ = ["SECTIONS", "add_arguments", "run"]

SECTIONS = {
    "budget": "quality against budget at decode, every method",
    "int8": "the INT8 schemes, layer by layer",
    "sampling": "the sampling methods on synthetic data: bias, variance, bits",
    "dsa": "what a fitted indexer reads: locality, and a reserved cache",
    "blocks": "Stem against the block baselines at prefill",
}
# What --quick changes, of options that are not given.
QUICK = {
    "context": [256, 512],
    "budgets": [32, 128],
    "queries": 32,
    "passages": 1,
    "densities": [0.4],
    "block": 16,
    "seeds": 2000,
    "steps": 56,
    "dsa_budget": 64,
    "fit_steps": 24,
    "fit_queries": 128,
}
_FULL = {
    "context": [4096, 8192],
    "budgets": [32, 64, 128, 256, 512, 1024],
    "queries": 128,
    "passages": 2,
    "densities": [0.2],
    "block": 128,
    "seeds": 4000,
    "steps": 256,
    "dsa_budget": 256,
    "fit_steps": 240,
    "fit_queries": 2048,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `heddle study`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "sections:\n" + "\n".join(f"  {name:<10}{text}" for name, text in SECTIONS.items())

    def default(name: str) -> str:
        full, quick = (" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in (_FULL[name], QUICK[name]))
        return f" (default: {full}; with --quick: {quick})"

    what = parser.add_argument_group("what is read")
    add_inputs(what)
    what.add_argument(
        "--indexer", type=Path, metavar="FILE", help="a fitted indexer; unless given, one is fitted on the text's end"
    )

    run = parser.add_argument_group("what is run")
    run.add_argument("--quick", action="store_true", help="everything small: a minute or two instead of half an hour")
    run.add_argument(
        "--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME", help="only these"
    )
    run.add_argument("--context", type=int, nargs="+", metavar="N", help="tokens of each context" + default("context"))
    run.add_argument("--budgets", type=int, nargs="+", metavar="N", help="keys or samples" + default("budgets"))
    run.add_argument(
        "--queries",
        type=int,
        metavar="N",
        help="tokens at the end of each context that are decoded" + default("queries"),
    )
    run.add_argument("--passages", type=int, metavar="N", help="passages of the text, for budget" + default("passages"))
    run.add_argument(
        "--densities", type=float, nargs="+", metavar="F", help="shares of the pairs, for blocks" + default("densities")
    )
    run.add_argument("--block", type=int, metavar="N", help="tokens of a block" + default("block"))
    run.add_argument("--seeds", type=int, metavar="N", help="seeds of each test of sampling" + default("seeds"))
    run.add_argument("--steps", type=int, metavar="N", help="tokens that dsa decodes" + default("steps"))
    run.add_argument("--dsa-budget", type=int, metavar="K", help="tokens that dsa selects" + default("dsa_budget"))
    run.add_argument("--fit-steps", type=int, metavar="N", help="Adam's, a layer" + default("fit_steps"))
    run.add_argument("--fit-queries", type=int, metavar="N", help="that a layer learns from" + default("fit_queries"))

    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--out",
        type=Path,
        default=Path("heddle-study"),
        metavar="FOLDER",
        help="report.html, the record, and each finished section, which the same command does not run again "
        "(default: heddle-study)",
    )
    out.add_argument("--record", type=Path, metavar="FOLDER", help="where the record goes (default: that of --out)")
    out.add_argument("--fresh", action="store_true", help="run finished sections again")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the findings and writes the report and the record. Returns 0, or 130 after Ctrl-C.

    Raises:
        HeddleValueError: an option out of range, a text, a model or an indexer that cannot be read.
        ModuleNotFoundError: a package of the extra `study` is missing.
    """
    for name, number in (QUICK if args.quick else _FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, number)
    _check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Imported here, so that wrong options are answered at once and --help needs none of the extra's packages.
    from heddle.study._run import study

    return study(args, _command(args))


def _check(args: argparse.Namespace) -> None:
    def refused(name: str, given: object, allowed: str) -> HeddleValueError:
        return refuse(HeddleValueError, "value", "--" + name.replace("_", "-"), f"{given}; allowed are {allowed}")

    if min(args.context) < 128:
        raise refused("context", min(args.context), "128 and above")
    if min(args.budgets) < 16:
        raise refused("budgets", min(args.budgets), "16 and above: 12 keys are always kept")
    if not 2 <= args.queries <= min(args.context) // 2:
        raise refused("queries", args.queries, f"2 to {min(args.context) // 2}, half of the shortest context")
    if not all(0 < density <= 1 for density in args.densities):
        raise refused("densities", args.densities, "numbers above 0, up to 1")
    if args.block < 8 or args.block % 8:
        raise refused("block", args.block, "multiples of 8, Stem's stride")
    if args.seeds < 2000:
        raise refused("seeds", args.seeds, "2000 and above: the tests rest on the normal distribution")
    if args.steps < 50:
        raise refused("steps", args.steps, "50 and above, a window of the working set")
    if args.dsa_budget < 16:
        raise refused("dsa_budget", args.dsa_budget, "16 and above: 12 keys are always kept")
    for name, least in (("passages", 1), ("fit_steps", 1), ("fit_queries", 8)):
        if getattr(args, name) < least:
            raise refused(name, getattr(args, name), f"{least} and above")
    if args.out.exists() and not args.out.is_dir():
        raise refuse(HeddleValueError, "value", "--out", f"{args.out} is no folder")
    for option, path in (("--out", args.out.absolute().parent), ("--record", args.record)):
        if path is not None and not path.is_dir():
            raise refuse(HeddleValueError, "value", option, f"{path}: the directory does not exist")


def _command(args: argparse.Namespace) -> str:
    """The command line that asks for the same: every option that is not at its default."""
    size = QUICK if args.quick else _FULL
    words = ["heddle", "study"] + ["--quick"] * args.quick
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, value in vars(args).items():
        if name in ("quick", "fresh") or value == size.get(name, parser.get_default(name)):
            continue
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
