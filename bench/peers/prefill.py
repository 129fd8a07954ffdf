"""Attention of many queries on a GPU: heddle beside FlashAttention-3, cuDNN and FlexAttention in one run.

    python bench/peers/prefill.py                        everything, recorded in bench/results
    python bench/peers/prefill.py --filter 'dense/d128'  the cases whose names match; recorded where --into says

Peers that cannot be imported are left out: FlashAttention-3 is the package fa3-fwd, the others come with PyTorch.
`bench/peers/fetch.sh` downloads what does not.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu import DEVICE, Report, difference, run_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import heddle
from heddle import select

try:
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None

TOLERANCE = 2e-2  # of the difference from a peer's result
BLOCK = 128


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def calls_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Callable[[], Any]]:
    """heddle and the peers on contiguous [B, S, H, D] tensors, checked against each other."""
    calls: dict[str, Callable[[], Any]] = {"heddle": lambda: heddle.attention(q, k, v, causal=causal)}
    if flash_attn_func is not None:
        calls["FA3"] = lambda: flash_attn_func(q, k, v, causal=causal)
    views = [x.transpose(1, 2) for x in (q, k, v)]

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            grouped = q.shape[2] != k.shape[2]
            return scaled_dot_product_attention(*views, is_causal=causal, enable_gqa=grouped)

    calls["cuDNN"] = cudnn
    return calls


def packed_calls(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int
) -> dict[str, Callable[[], Any]]:
    """The schedules of heddle and FlashAttention-3 on a packed causal batch."""
    calls: dict[str, Callable[[], Any]] = {}
    for kind in ("stealing", "static", "tile"):
        options = {"causal": True, "cu_seqlens_q": ends, "cu_seqlens_k": ends, "schedule": kind}
        calls[f"heddle {kind}"] = partial(heddle.attention, q, k, v, **options)
    if flash_attn_varlen_func is not None:
        calls["FA3"] = lambda: flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
    return calls


def check(name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    result = theirs()
    error = difference(ours(), result[0] if isinstance(result, tuple) else result)
    if not error < TOLERANCE:
        raise SystemExit(f"{name}: results differ by {error:.3g}")


def dense(report: Report) -> None:
    # Rows of D elements: 16,384 tokens a call, as many heads as make 2,048 elements of a token.
    shapes = [
        (f"dense/d{d}", 16384 // s, s, h, h, d) for d, h in ((64, 32), (128, 16), (256, 8)) for s in (2048, 8192, 16384)
    ]
    grid = [(*shape, causal) for shape in shapes for causal in (False, True)]
    grid += [("dense/d128", 1, s, 32, 8, 128, True) for s in (32768, 131072)]
    for d, h in ((80, 24), (96, 20), (192, 12)):
        grid += [(f"dims/d{d}", 2, 8192, h, h, d, causal) for causal in (False, True)]
    ratios = []
    for group, batch, tokens, heads, kv_heads, dim, causal in grid:
        name = f"{group}/{'causal' if causal else 'full'}/b{batch}/s{tokens}/h{heads}-{kv_heads}"
        if not report.wants(name):
            continue
        q = normal(batch, tokens, heads, dim)
        k, v = normal(batch, tokens, kv_heads, dim), normal(batch, tokens, kv_heads, dim)
        calls = calls_of(q, k, v, causal)
        if "FA3" in calls:
            check(name, calls["heddle"], calls["FA3"])
        flop = 4.0 * batch * tokens * tokens * heads * dim * (0.5 if causal else 1)
        times = report.measure(name, calls, flop=flop, rounds=6 if tokens > 65536 else None)
        report.compare(name, times, "heddle", "FA3", 0.97 if group.startswith("dense") else 0.95)
        if group.startswith("dense"):
            report.compare(name, times, "heddle", "cuDNN", 1.0)
            if "FA3" in times:
                ratios.append(times["FA3"] / times["heddle"])
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        report.claim(f"dense, geometric mean of {len(ratios)}", "heddle", "FA3", mean, 1.0)


def ragged(report: Report) -> None:
    heads, kv_heads, dim = 32, 8, 128
    draw = random.Random(0)
    batches = {
        "ragged/1x32K+31x1K": [32768] + [1024] * 31,
        "ragged/64 of 64 to 16K": [round(64 * 256 ** draw.random()) for _ in range(64)],
    }
    for name, lengths in batches.items():
        if not report.wants(name):
            continue
        total, longest = sum(lengths), max(lengths)
        q, k, v = normal(total, heads, dim), normal(total, kv_heads, dim), normal(total, kv_heads, dim)
        ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()

        calls = packed_calls(q, k, v, ends, longest)
        if "FA3" in calls:
            check(name, calls["heddle stealing"], calls["FA3"])
        flop = 2.0 * heads * dim * sum(n * n for n in lengths)
        times = report.measure(name, calls, flop=flop)
        report.compare(name, times, "heddle stealing", "heddle tile", None)
        report.compare(name, times, "heddle stealing", "heddle static", None)
        report.compare(name, times, "heddle stealing", "FA3", 1.0)
    worse = max((line.ratio for line in report.lines if line.peer == "heddle tile"), default=None)
    if worse is not None:
        report.claim("ragged, the worse case", "heddle stealing", "heddle tile", worse, 1.3)


def blocks(report: Report) -> None:
    """Random block masks that differ by query head and row, beside dense attention of the same shape."""
    tokens, heads, kv_heads, dim = 32768, 32, 8, 128
    if not report.wants("blocks/"):
        return
    q, k, v = normal(1, tokens, heads, dim), normal(1, tokens, kv_heads, dim), normal(1, tokens, kv_heads, dim)
    n = tokens // BLOCK
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: heddle.attention(q, k, v)}
    true_density = {}
    for percent in (50, 25, 10):
        for per, count in (("kv head", kv_heads), ("query head", heads)):
            mask = torch.rand(1, count, n, n, device=DEVICE) < percent / 100
            true_density[f"{percent} % by {per}"] = float(mask.float().mean())
            selection = select.block_mask(mask, block=(BLOCK, BLOCK))
            calls[f"{percent} % by {per}"] = lambda s=selection: heddle.attention(q, k, v, selection=s)
    times = report.measure("blocks/s32768/h32-8", calls, flop=None, rounds=10, note={"density": true_density})
    for call, density in true_density.items():
        allowed = 1.08 * density * times["dense"] + 0.020
        report.claim(f"blocks/s32768/{call}", "heddle", "1.08 x density x dense + 20 us", allowed / times[call], 1.0)


def window(report: Report) -> None:
    """A causal window with global tokens, beside FlexAttention and our dense rate on the visited tiles."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, dim = 16, 128
    for tokens, width, n_global in ((16384, 1024, 64), (32768, 1024, 64)):
        name = f"window{width}+{n_global}/s{tokens}"
        if not report.wants(name):
            continue
        q, k, v = (normal(1, tokens, heads, dim) for _ in range(3))
        selection = select.window(width - 1, 0, n_global)
        calls: dict[str, Callable[[], Any]] = {
            "heddle": lambda: heddle.attention(q, k, v, causal=True, selection=selection),  # noqa: B023
            "dense": lambda: heddle.attention(q, k, v, causal=True),  # noqa: B023
        }
        compiled = torch.compile(flex_attention)
        views = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (i >= j) & ((i - j < width) | (j < n_global))  # noqa: B023

        mask = create_block_mask(visible, None, None, tokens, tokens, device=DEVICE)
        calls["FlexAttention"] = lambda: compiled(*views, block_mask=mask)  # noqa: B023
        try:
            check(name, calls["heddle"], lambda: compiled(*views, block_mask=mask).transpose(1, 2))  # noqa: B023
        except RuntimeError as error:
            print(f"FlexAttention cannot: {str(error)[:200]}")
        pairs = sum(min(i + 1, width) + max(0, min(n_global, i + 1 - width)) for i in range(tokens))
        tiles = visited_tiles(tokens, width, n_global)
        times = report.measure(
            name, calls, flop=4.0 * pairs * heads * dim, note={"visited_pairs": tiles * BLOCK * BLOCK}
        )
        report.compare(name, times, "heddle", "FlexAttention", 1.5)
        # Rates on tiles: a causal dense call visits those on and below the diagonal.
        n = tokens // BLOCK
        rate, dense_rate = tiles / times["heddle"], n * (n + 1) / 2 / times["dense"]
        report.claim(name, "heddle, visited tiles a second", "dense", rate / dense_rate, 0.85)


def visited_tiles(tokens: int, width: int, n_global: int) -> int:
    """Tiles of 128 x 128 with a visible pair, of a causal window with global tokens."""
    total = 0
    for row in range(tokens // BLOCK):
        first = max(0, row * BLOCK - width + 1) // BLOCK
        total += row + 1 - first + min(first, -(-n_global // BLOCK))
    return total


def worklist(report: Report) -> None:
    """The device time of turning a block mask of 128K tokens and 32 heads into a worklist, from a profile of a call."""
    name = "worklist/s131072/h32"
    if not report.wants(name):
        return
    tokens, heads = 131072, 32
    n = tokens // BLOCK
    mask = torch.zeros(1, heads, n, n, dtype=torch.bool, device=DEVICE)
    mask[..., 0] = True
    q = normal(1, tokens, heads, 128)
    k, v = normal(1, tokens, 8, 128), normal(1, tokens, 8, 128)
    selection = select.block_mask(mask, block=(BLOCK, BLOCK))
    heddle.attention(q, k, v, selection=selection)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(10):
            heddle.attention(q, k, v, selection=selection)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if "worklist" in e.name]
    if not kernels:
        print(f"{name}: no profile of it")
        return
    times = sorted(e.device_time for e in kernels)  # microseconds
    median = times[len(times) // 2]
    print(f"{name}: {median:.1f} us, median of {len(times)}")
    report.points.append({"name": name, "calls": {"heddle": {"median_ms": median / 1e3, "rounds": len(times)}}})
    report.claim(name, "heddle", "5 ms", 5000.0 / median, 1.0)


def ceiling(report: Report) -> None:
    """A large product of the same element type: what the tensor cores reach here."""
    x, y = normal(8192, 8192), normal(8192, 8192)
    report.measure("limit/product of 8192", {"cuBLAS": lambda: x @ y}, flop=2.0 * 8192**3)


def measure(report: Report, _: argparse.Namespace) -> None:
    for section in (ceiling, dense, ragged, blocks, window, worklist):
        try:
            section(report)
        except (RuntimeError, heddle.HeddleError) as error:
            print(f"{section.__name__} ended early: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(run_script("prefill", argparse.ArgumentParser(description=__doc__), ["fa3-fwd"], measure))
