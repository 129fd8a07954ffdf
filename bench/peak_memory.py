"""What one causal attention call needs beyond its inputs and its output, in a process of its own.

    python bench/peak_memory.py heddle bf16 --tokens 32768

prints a line of JSON. The figure is the peak of the resident memory over what was resident just before the call, less
the output. It is the process's first call, so the libraries' own first-use allocations count.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import heddle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resident(field: str) -> int:
    """Bytes: VmRSS of now, VmHWM the highest since reset_peak()."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """From here on VmHWM is the peak; what was freed is given back first, since memory in stock is not seen to grow."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["heddle", "torch"])
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()

    # The layout that each library calls its own.
    rows = (args.tokens, args.heads) if args.library == "heddle" else (args.heads, args.tokens)
    q, k, v = (torch.randn(1, *rows, args.head_dim, dtype=DTYPES[args.dtype]) for _ in range(3))
    with torch.inference_mode():
        reset_peak()
        before, start = resident("VmRSS"), time.perf_counter()
        if args.library == "heddle":
            out = heddle.attention(q, k, v, causal=True)
        else:
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
        seconds, peak = time.perf_counter() - start, resident("VmHWM")
    extra = max(0, peak - before - out.nbytes)
    print(json.dumps({"extra_bytes": extra, "io_bytes": 4 * out.nbytes, "seconds": seconds}))


if __name__ == "__main__":
    main()
