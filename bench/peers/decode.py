"""Decode on a GPU: heddle beside FlashAttention-3 and FlashInfer in one run, and beside a cold read of as many bytes.

    python bench/peers/decode.py                       everything, recorded in bench/results
    python bench/peers/decode.py --filter 'h32-8/1x'   the cases whose names match; recorded where --into says

One new token a request, D 128, bf16 queries. heddle and FlashInfer read pages of --page tokens in random order, each in
the layout of its own; FlashAttention-3 reads contiguous keys and values, which it does fastest. Plans are made before:
they serve all layers of a step. The second-level cache is emptied by reading before each call. A "read" is torch.sum
over as many bytes as the keys and values have. Peers that cannot be imported are left out; `bench/peers/fetch.sh`
downloads them. FlashInfer compiles its kernels when they are first used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu import DEVICE, Flush, Report, difference, run_script

import heddle

try:
    from fa3_fwd_interface import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None
try:
    import flashinfer
except ImportError:
    flashinfer = None

DIM = 128
TOLERANCE = 2e-2  # of the difference from a peer's result
K = 1024
SCENARIOS = {
    "1x128K": [128 * K],
    "1x32K": [32 * K],
    "64x4K": [4 * K] * 64,
    "16x32K": [32 * K] * 16,
    "4x128K": [128 * K] * 4,
    "1x128K+31x4K": [128 * K] + [4 * K] * 31,
    "32x128+32x4K": [128] * 32 + [4 * K] * 32,
    "64x512": [512] * 64,
    "4x64K+60x1K": [64 * K] * 4 + [K] * 60,
}
FORMATS = ("bf16", "int8-b", "fp8")


class Batch:
    """A batch's queries, and its keys and values in random pages: [pages, Hkv, page, D] beside the table."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, page: int) -> None:
        self.lengths, self.heads, self.kv_heads, self.page = lengths, heads, kv_heads, page
        self.counts = [-(-n // page) for n in lengths]
        self.order = torch.randperm(sum(self.counts), device=DEVICE).int()
        self.table = torch.zeros(len(lengths), max(self.counts), dtype=torch.int32, device=DEVICE)
        for request, pages in enumerate(self.order.split(self.counts)):
            self.table[request, : len(pages)] = pages
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.q = torch.randn(len(lengths), 1, heads, DIM, device=DEVICE, dtype=torch.bfloat16)
        shape = (len(self.order), kv_heads, page, DIM)
        self.k, self.v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    @property
    def elements(self) -> int:
        return 2 * sum(self.lengths) * self.kv_heads * DIM

    def heddle(self, form: str) -> Callable[[], Any]:
        cache = heddle.KVCache(len(self.order), self.page, self.kv_heads, DIM, format=form, device=DEVICE)
        if form == "bf16":
            cache.k.copy_(self.k)
            cache.v.copy_(self.v)
        else:
            sample = [x[:64].transpose(1, 2).reshape(1, -1, self.kv_heads, DIM) for x in (self.k, self.v)]
            cache.calibrate(*sample)
            for part, scale, x in ((cache.k, cache.k_scale, self.k), (cache.v, cache.v_scale, self.v)):
                if form == "fp8":
                    part.view(torch.uint8).copy_((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
                else:
                    part.copy_((x / scale).round().clamp(-127, 127).to(torch.int8))
        plan = heddle.plan_decode(self.q, cache, self.table, self.seq_lens)
        out = torch.empty_like(self.q)
        return lambda: heddle.decode(self.q, cache, self.table, self.seq_lens, plan=plan, out=out)

    def fa3(self) -> Callable[[], Any]:
        shape = (len(self.lengths), max(self.lengths), self.kv_heads, DIM)
        k, v = (torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        for request, (pages, n) in enumerate(zip(self.order.long().split(self.counts), self.lengths, strict=True)):
            for to, x in ((k, self.k), (v, self.v)):
                to[request, :n] = x[pages].transpose(1, 2).reshape(-1, self.kv_heads, DIM)[:n]
        return lambda: flash_attn_with_kvcache(self.q, k, v, cache_seqlens=self.seq_lens)

    def flashinfer(self, dtype: torch.dtype, workspace: torch.Tensor) -> Callable[[], Any]:
        kv = torch.stack([self.k, self.v], dim=1).transpose(2, 3).contiguous().to(dtype)
        ends = torch.tensor([0, *self.counts], device=DEVICE).cumsum(0).int()
        last = (self.seq_lens - 1) % self.page + 1
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        types = {"q_data_type": torch.bfloat16, "kv_data_type": dtype}
        wrapper.plan(ends, self.order, last, self.heads, self.kv_heads, DIM, self.page, **types)
        q = self.q[:, 0]
        return lambda: wrapper.run(q, kv)


def check(name: str, calls: dict[str, Callable[[], Any]]) -> None:
    """Results in bf16 against each other, those of 8 bits against ours in bf16, more loosely."""
    ours = calls["heddle bf16"]().flatten()
    for call, run in calls.items():
        if call.startswith("read"):
            continue
        result = run()
        error = difference((result[0] if isinstance(result, tuple) else result).flatten(), ours)
        if not error < (TOLERANCE if "8" not in call.replace("bf16", "") else 0.1):
            print(f"{name}: {call} differs by {error:.3g}", flush=True)


def scenarios(report: Report, page: int) -> None:
    flush = Flush()
    memory = torch.zeros(544 << 20, dtype=torch.float32, device=DEVICE)
    workspaces = [torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    for heads, kv_heads in ((32, 8), (64, 8)):
        for scenario, lengths in SCENARIOS.items():
            name = f"decode/h{heads}-{kv_heads}/{scenario}"
            if not report.wants(name):
                continue
            batch = Batch(lengths, heads, kv_heads, page)
            calls: dict[str, Callable[[], Any]] = {f"heddle {form}": batch.heddle(form) for form in FORMATS}
            if flash_attn_with_kvcache is not None:
                calls["FA3"] = batch.fa3()
            try:
                if flashinfer is not None:
                    calls["FlashInfer"] = batch.flashinfer(torch.bfloat16, workspaces[0])
                    calls["FlashInfer fp8"] = batch.flashinfer(torch.float8_e4m3fn, workspaces[1])
            except RuntimeError as error:  # its kernels do not compile
                print(f"{name}: FlashInfer cannot: {str(error)[:200]}", flush=True)
            for form, size in (("bf16", 2), ("8 bits", 1)):
                part = memory[: batch.elements * size // 4]
                calls[f"read {form}"] = lambda part=part: torch.sum(part)
            check(name, calls)
            times = report.measure(name, calls, byte=2.0 * batch.elements, before=flush)
            compare(report, name, times)
            del batch, calls
            torch.cuda.empty_cache()


def compare(report: Report, name: str, times: dict[str, float]) -> None:
    wide, narrow = times["read bf16"], times["read 8 bits"]  # milliseconds
    report.claim(name, "heddle bf16", "read", wide / times["heddle bf16"], 0.97 if wide >= 0.180 else 0.93)
    for peer in ("FA3", "FlashInfer"):
        report.compare(name, times, "heddle bf16", peer, 1.0)
    for form in ("int8-b", "fp8"):
        report.claim(
            name, f"heddle {form}", "read", narrow / times[f"heddle {form}"], 0.95 if narrow >= 0.090 else 0.90
        )
        report.compare(name, times, f"heddle {form}", "FlashInfer fp8", 1.3)
    report.compare(name, times, "heddle int8-b", "heddle bf16", 1.85 if wide >= 0.180 else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=int, default=16, help="tokens of a page")
    packages = ["fa3-fwd", "flashinfer-python"]
    sys.exit(run_script("decode", parser, packages, lambda report, args: scenarios(report, args.page)))
