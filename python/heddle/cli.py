"""The command `heddle`."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import heddle
from heddle import _core

# name: (module with add_arguments(parser) and run(args), what it does, the extra that brings what it needs)
COMMANDS = {
    "info": ("heddle.cli", "what this installation can do: backends, instruction sets, threads, build", None),
    "advise": ("heddle.advise", "memory and time of a model's attention, and what to try first", None),
    "trace": (
        "heddle.trace._command",
        "which tokens a model selects as it decodes: recorded, analysed, replayed through a reserved cache",
        "demo,trace",
    ),
    "indexer": ("heddle.dsa._command", "fits a DSA indexer to a language model, and saves it", "demo,dsa"),
    "study": (
        "heddle.study",
        "the quality of every selection, sampling and INT8 method on a language model, in one report",
        "study",
    ),
    "demo": ("heddle.demo", "a language model through heddle: dense, sparse and quantized side by side", "demo"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`heddle info` takes none."""


def run(args: argparse.Namespace) -> int:
    """`heddle info`."""
    isas = ", ".join(heddle.available_host_isas())
    rows = {
        "heddle": f"{heddle.__version__} ({_core.compiler}, CUDA {'built in' if _core.with_cuda else 'not built'})",
        "backends": ", ".join(heddle.available_backends()),
        "instruction set": f"{heddle.host_isa()} (of {isas})",
        "threads": str(heddle.num_threads()),
        "python": platform.python_version(),
    }
    for package in ("numpy", "torch", "transformers", "ml_dtypes"):
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="heddle",
        description="Attention for long-context inference.",
        epilog="commands:\n" + "\n".join(f"  {name:<9}{text}" for name, (_, text, _) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"heddle {heddle.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command: heddle <command> --help")
    chosen = parser.parse_args(argv)

    module_name, text, extra = COMMANDS[chosen.command]
    try:
        module = importlib.import_module(module_name)
        command = argparse.ArgumentParser(prog=f"heddle {chosen.command}", description=f"{text[0].upper()}{text[1:]}.")
        module.add_arguments(command)
        return module.run(command.parse_args(chosen.arguments)) or 0
    except heddle.HeddleError as error:
        print(f"heddle {chosen.command}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if extra is None or error.name is None or error.name.partition(".")[0] == "heddle":
            raise
        print(
            f"heddle {chosen.command} needs the package {error.name}: pip install 'heddle-attention[{extra}]'",
            file=sys.stderr,
        )
    return 2
