"""Records of measurements: what was run, on what, built how, from which source; one JSON file a run.

    python bench/record.py build/bench/heddle_bench [its arguments]

runs a google-benchmark program, or heddle_cuda_decode, which takes the same options, and records what it reports; of a
run on a GPU also which one, its driver and the compiler of its kernels. A run of everything goes to bench/results; one
with a filter is written only where --into says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from heddle._record import describe, last_level_cache, write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

__all__ = ["RESULTS", "describe", "describe_gpu", "last_level_cache", "write"]


def describe_gpu() -> dict[str, str]:
    """Name and driver of the first GPU, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    name, driver = lines[0].split(", ")
    return {"gpu": name, "driver": driver}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="folder of the record")
    parser.add_argument("program", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)

    partial = any(argument.startswith("--benchmark_filter") for argument in args.arguments)
    into = args.into or (None if partial else RESULTS)
    program = os.path.relpath(args.program.resolve(), ROOT)
    record = describe([program, *args.arguments]) | {"complete": not partial}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        outputs = [f"--benchmark_out={out}", "--benchmark_out_format=json"]
        code = subprocess.run([args.program.resolve(), *args.arguments, *outputs], check=False).returncode
        # It leaves an empty file when the filter matches nothing.
        text = out.read_text() if out.exists() else ""
    if code or not text or into is None:
        return code
    report = json.loads(text)
    # Of the context: the name of the machine is nobody's business, and the program is in the command.
    record["context"] = {k: v for k, v in report["context"].items() if k not in ("host_name", "executable")}
    record["benchmarks"] = report["benchmarks"]
    if any(benchmark["name"].startswith("cuda-") for benchmark in report["benchmarks"]):
        record["device"] |= describe_gpu()
        record["build"]["nvcc"] = report["context"]["nvcc"]
    print(f"recorded in {os.path.relpath(write(record, args.program.name, into))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
