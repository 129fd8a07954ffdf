"""heddle on this processor against PyTorch, against itself and against a read of memory, in one run.

    python bench/host.py                        the whole table, recorded in bench/results
    python bench/host.py --quick                few repeats: minutes less, noise more; not recorded
    python bench/host.py --filter decode        the lines whose name matches a regular expression; not recorded
    python bench/host.py --show RECORD.json     the table of a record
    python bench/host.py --join A.json B.json   one record of several runs with --filter and --into, of one build

The calls that a line compares take turns (A B A B ...), each after one untimed call of its own, so that a slow moment
of the machine falls on all of them. Times are wall-clock; the table has medians, ratios of medians and of minima.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention as sdpa

import heddle
import record as records
from heddle import select

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative error ||a - b|| / ||b|| beyond which two calls do not compute the same thing, by format.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "int8-b": 0.1, "int8-a": 0.1, "fp8": 0.1}

# Alternatives of one peer race for this many rounds; then those this much slower than their best drop out.
TRIAL_ROUNDS = 3
TRIAL_MARGIN = 1.25
# Longer calls bring their own data into the caches, and get no untimed call before each timed one.
WARM_BELOW_SECONDS = 0.25
MAX_ROUNDS = 400


@dataclass(frozen=True)
class Options:
    seconds: float = 1.0  # for each call that takes part in a point
    min_rounds: int = 5
    shrink: int = 1


@dataclass(frozen=True)
class Line:
    """One line of the table: `ours` against `peer`, a call of the point or several of which the fastest counts."""

    name: str
    ours: str
    peer: str
    target: float | None = None
    also: tuple[str, ...] = ()  # calls whose time is told beside


@dataclass
class Call:
    """Something timed. `work` is its operations ("flop") or the bytes it has to read ("byte")."""

    run: Callable[[], Any]
    work: float
    unit: str
    peer: str = ""  # calls of one peer are alternatives
    tolerance: float | None = None  # of the difference from the point's first call


@dataclass(frozen=True)
class Point:
    """Calls that take turns. `prepare` makes their inputs; `lines` say what is compared."""

    name: str
    lines: tuple[Line, ...]
    prepare: Callable[[], dict[str, Call]]
    cold: bool = False  # every timed call begins with its data in memory, not in a cache


# --- what is measured ---


def make_points(shrink: int) -> Iterator[Point]:
    """The whole table, lengths divided by `shrink`."""
    fast_bf16 = heddle.host_isa() in ("avx512_bf16", "amx")  # the levels that have AVX512_BF16 and VNNI
    for dim in (64, 128):
        for causal in (False, True):
            for tokens in (1024, 2048, 4096, 8192):
                length = tokens // shrink
                where = f"{'causal' if causal else 'full'}/d{dim}/s{length}"
                prepare = partial(_prefill, length, dim, causal)
                fp32 = Line(f"prefill/fp32/{where}", "heddle fp32", "PyTorch fp32", 1.0)
                bf16 = Line(f"prefill/bf16/{where}", "heddle bf16", "PyTorch bf16", 2.0 if fast_bf16 else None)
                int8 = Line(
                    f"prefill/int8-b/{where}", "heddle int8-b", "heddle bf16", 1.1 if fast_bf16 else None, ("quantize",)
                )
                yield Point(fp32.name, (fp32,), partial(prepare, "fp32"))
                yield Point(bf16.name, (bf16, int8), partial(prepare, "bf16"))
    for dtype in DTYPES:
        for dim in (64, 128):
            length, width, n_global = 16384 // shrink, 1024 // shrink, 64 // shrink
            name = f"prefill/{dtype}/window{width}+{n_global}/d{dim}/s{length}"
            line = Line(name, "heddle window", "heddle dense", 6.0)
            yield Point(name, (line,), partial(_window, length, dim, dtype, width, n_global))
    for page_size in (16, 64, 128):
        length = 32768 // shrink
        at = {kind: f"decode/{kind}/1x{length}/page{page_size}" for kind in ("fp32", "bf16", "int8-b", "int8-a", "fp8")}
        targets = {"bf16": 1.8, "int8-b": 3.0, "int8-a": 3.0, "fp8": None}
        lines = [
            Line(f"{name}/read", f"heddle {kind}", f"read of {kind}", 0.75 if kind == "fp32" else None)
            for kind, name in at.items()
        ]
        lines += [Line(f"{at[kind]}/fp32", f"heddle {kind}", "heddle fp32", least) for kind, least in targets.items()]
        lines += [Line(f"{at[kind]}/torch", f"heddle {kind}", f"PyTorch {kind}") for kind in DTYPES]
        yield Point(f"decode/1x{length}/page{page_size}", tuple(lines), partial(_decode, length, page_size), cold=True)
    length, samples = 32768 // shrink, 128
    kinds = ("fp32", "bf16", "int8-b", "int8-a", "fp8")
    lines = [
        Line(
            f"sampled/{kind}/1x{length}/page64",
            f"heddle {kind} sampled",
            f"heddle {kind}",
            1.6 if kind != "fp8" else None,
        )
        for kind in kinds
    ]
    yield Point(f"sampled/1x{length}", tuple(lines), partial(_sampled, length, samples, kinds), cold=True)
    yield from _selections(shrink)


def _selections(shrink: int) -> Iterator[Point]:
    """Selection at run time, with the attention over what it selects, against dense attention."""
    scores, k = 131072 // shrink, 2048 // shrink
    line = Line(f"select/fp32/exact top {k}/1x{scores}", "heddle top-k", "PyTorch top-k", 1.0)
    yield Point(line.name, (line,), partial(_top_scores, scores, k))
    length, budget, page_size = 32768 // shrink, 1024 // shrink, 64
    least = {"oam": 1.6, "pages": 4.0, "dsa 8x64": 5.0, "dsa 64x128": None}
    lines = [
        Line(f"select/bf16/{kind} {budget}/1x{length}/page{page_size}", f"heddle {kind}", "heddle dense", target)
        for kind, target in least.items()
    ]
    decode = partial(_selected_decode, length, budget, page_size)
    yield Point(f"select/1x{length}/page{page_size}", tuple(lines), decode, cold=True)
    for tokens in (16384, 65536):
        line = Line(f"select/bf16/stem/d128/s{tokens // shrink}", "heddle stem", "heddle dense", 3.0)
        yield Point(line.name, (line,), partial(_stem, tokens // shrink))


def _prefill(length: int, dim: int, causal: bool, dtype: str) -> dict[str, Call]:
    """8 heads of one request. PyTorch gets its tensors as [B, H, S, D], contiguous and as a view of [B, S, H, D]."""
    heads = 8
    flop = 4.0 * dim * heads * (length * (length + 1) / 2 if causal else length * length)
    q, k, v = (torch.randn(1, length, heads, dim, dtype=DTYPES[dtype]) for _ in range(3))
    views = [x.transpose(1, 2) for x in (q, k, v)]
    calls = {}
    for layout, operands in {"[B,H,S,D]": [x.contiguous() for x in views], "view of [B,S,H,D]": views}.items():
        run = partial(_torch, *operands, is_causal=causal)
        calls[f"PyTorch {dtype} {layout}"] = Call(run, flop, "flop", f"PyTorch {dtype}", TOLERANCES[dtype])
    calls[f"heddle {dtype}"] = Call(
        lambda: heddle.attention(q, k, v, causal=causal), flop, "flop", tolerance=TOLERANCES[dtype]
    )
    if dtype == "bf16":
        # Scheme B: a scale a token for q, one scale each for k and v.
        granularities = ("token", "tensor", "tensor")

        def quantize() -> list[heddle.QuantizedTensor]:
            return [heddle.quantize(x, "int8", how) for x, how in zip((q, k, v), granularities, strict=True)]

        operands = quantize()
        calls["heddle int8-b"] = Call(
            lambda: heddle.attention(*operands, causal=causal), flop, "flop", tolerance=TOLERANCES["int8-b"]
        )
        calls["quantize"] = Call(quantize, q.nbytes + k.nbytes + v.nbytes, "byte")
    return calls


def _torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return sdpa(q, k, v, **options).transpose(1, 2)


def _window(length: int, dim: int, dtype: str, width: int, n_global: int) -> dict[str, Call]:
    """Causal attention to the newest `width` keys and the first `n_global`, and to all of them."""
    heads = 8
    q, k, v = (torch.randn(1, length, heads, dim, dtype=DTYPES[dtype]) for _ in range(3))
    selection = heddle.select.window(width - 1, 0, n_global)
    rows = np.arange(length)
    pairs = np.minimum(rows + 1, width) + np.clip(rows + 1 - width, 0, n_global)
    flop = 4.0 * dim * heads
    return {
        "heddle dense": Call(lambda: heddle.attention(q, k, v, causal=True), flop * length * (length + 1) / 2, "flop"),
        "heddle window": Call(
            lambda: heddle.attention(q, k, v, causal=True, selection=selection), flop * float(pairs.sum()), "flop"
        ),
    }


def _decode(length: int, page_size: int) -> dict[str, Call]:
    """One new token of one request: 32 query heads, 8 KV heads of 128, pages in random order.

    The read is of the cache's own memory, the same bytes at the same addresses. PyTorch reads contiguous keys and
    values; besides its own grouped heads it gets the four query heads of a group as rows of one head, which spares it
    from reading the keys four times.
    """
    q_heads, kv_heads, dim = 32, 8, 128
    group = q_heads // kv_heads
    pages = -(-length // page_size)
    table = torch.randperm(pages, dtype=torch.int32)[None]
    lengths = torch.tensor([length], dtype=torch.int32)
    q, k, v = (torch.randn(1, s, h, dim) for s, h in ((1, q_heads), (length, kv_heads), (length, kv_heads)))

    calls = {}
    for kind, dtype in DTYPES.items():
        keys = {"view of [B,S,H,D]": [x.to(dtype).transpose(1, 2) for x in (k, v)]}
        keys["[B,H,S,D]"] = [x.contiguous() for x in keys["view of [B,S,H,D]"]]
        query = q.to(dtype)
        grouped, folded = query.transpose(1, 2), query.view(1, kv_heads, group, dim)
        for layout, (torch_k, torch_v) in keys.items():
            ways = {
                "folded heads": partial(_folded, folded, torch_k, torch_v),
                "grouped heads": partial(_torch, grouped, torch_k, torch_v, enable_gqa=True),
            }
            for way, run in ways.items():
                calls[f"PyTorch {kind} {way}, {layout}"] = Call(
                    run, 2 * torch_k.nbytes, "byte", f"PyTorch {kind}", TOLERANCES["bf16" if kind == "bf16" else kind]
                )
    for kind in ("fp32", "bf16", "int8-b", "int8-a", "fp8"):
        cache = heddle.KVCache(pages, page_size, kv_heads, dim, format=kind)
        cache.append(k, v, table, torch.zeros(1, dtype=torch.int32))
        query = q if kind == "fp32" else q.bfloat16()
        stored = [torch.from_numpy(x.view(np.int32)).flatten() for x in _arrays_read(cache)]
        read_bytes = float(sum(x.nbytes for x in stored))
        calls[f"heddle {kind}"] = Call(
            partial(heddle.decode, query, cache, table, lengths), read_bytes, "byte", tolerance=TOLERANCES[kind]
        )
        calls[f"read of {kind}"] = Call(partial(_read, stored), read_bytes, "byte")
    return calls


def _sampled(length: int, samples: int, kinds: Sequence[str]) -> dict[str, Call]:
    """The same decode over all values and over those that S2ANTA draws, whose bytes are counted as they were read."""
    q_heads, kv_heads, dim, page_size = 32, 8, 128, 64
    pages = -(-length // page_size)
    table = torch.randperm(pages, dtype=torch.int32)[None]
    lengths = torch.tensor([length], dtype=torch.int32)
    q, k, v = (torch.randn(1, s, h, dim) for s, h in ((1, q_heads), (length, kv_heads), (length, kv_heads)))
    sampling = heddle.Sampling("systematic", samples)
    calls = {}
    for kind in kinds:
        cache = heddle.KVCache(pages, page_size, kv_heads, dim, format=kind)
        cache.append(k, v, table, torch.zeros(1, dtype=torch.int32))
        decode = partial(heddle.decode, q if kind == "fp32" else q.bfloat16(), cache, table, lengths)
        _, (v_rows, _) = decode(sampling=sampling, return_reads=True)
        every = float(sum(x.nbytes for x in _arrays_read(cache)))
        drawn = every - cache.v.nbytes * (1 - v_rows.sum().item() / (length * kv_heads))
        calls[f"heddle {kind}"] = Call(decode, every, "byte", tolerance=TOLERANCES[kind])
        calls[f"heddle {kind} sampled"] = Call(partial(decode, sampling=sampling), drawn, "byte")
    return calls


def _top_scores(length: int, k: int) -> dict[str, Call]:
    """One row of scores. PyTorch gives values and indices, in order of the values or in any."""
    scores = torch.randn(1, 1, length)
    calls = {
        f"PyTorch top-k, sorted={ordered}": Call(
            partial(torch.topk, scores, k, sorted=ordered), scores.nbytes, "byte", "PyTorch top-k"
        )
        for ordered in (True, False)
    }
    return calls | {"heddle top-k": Call(partial(select.top_scores, scores, k), scores.nbytes, "byte")}


def _selected_decode(length: int, budget: int, page_size: int) -> dict[str, Call]:
    """The decode of _decode in bf16, over everything and over `budget` tokens of each KV head, chosen in the same call.

    Bytes are those that a method has to read: K, the page bounds or the index keys, and the rows it selects.
    """
    q_heads, kv_heads, dim = 32, 8, 128
    pages = -(-length // page_size)
    table = torch.randperm(pages, dtype=torch.int32)[None]
    lengths, start = torch.tensor([length], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    call = {"block_table": table, "seq_lens": lengths}
    q = torch.randn(1, 1, q_heads, dim).bfloat16()
    cache = heddle.KVCache(pages, page_size, kv_heads, dim, format="bf16", page_bounds=True)
    cache.append(torch.randn(1, length, kv_heads, dim), torch.randn(1, length, kv_heads, dim), table, start)
    rows = float(4 * budget * kv_heads * dim)  # of K and V

    def attend(choose: Callable[[], heddle.Selection]) -> torch.Tensor:
        return heddle.decode(q, cache, table, lengths, selection=choose())

    by_metric = partial(select.topk, q, cache, budget=budget, metric="oam", **call)
    by_bound = partial(select.pages, q, cache, budget=budget, metric="oam", **call)
    calls = {
        "heddle dense": Call(
            partial(heddle.decode, q, cache, table, lengths), float(cache.k.nbytes + cache.v.nbytes), "byte"
        ),
        "heddle oam": Call(partial(attend, by_metric), cache.k.nbytes + cache.value_norms.nbytes + rows, "byte"),
        "heddle pages": Call(partial(attend, by_bound), cache.page_bounds.nbytes + rows, "byte"),
    }
    for heads, index_dim in ((8, 64), (64, 128)):
        index = heddle.KVCache(pages, page_size, 1, index_dim, head_dim_v=1, format="bf16")
        keys = torch.randn(1, length, 1, index_dim)
        index.append(keys, keys[..., :1], table, start)
        queries, weights = torch.randn(1, 1, heads, index_dim).bfloat16(), torch.randn(1, 1, heads)
        by_index = partial(select.indexer, queries, index, weights, budget, **call)
        calls[f"heddle dsa {heads}x{index_dim}"] = Call(partial(attend, by_index), index.k.nbytes + rows, "byte")
    return calls


def _stem(length: int) -> dict[str, Call]:
    """Causal attention of 4 heads, and over what Stem selects by its own schedule. Operations are of the pairs read."""
    heads, dim = 4, 128
    q, k, v = (torch.randn(1, length, heads, dim).bfloat16() for _ in range(3))
    flop = 4.0 * dim * heads * (length * (length + 1) / 2)

    def stem() -> torch.Tensor:
        return heddle.attention(q, k, v, causal=True, selection=select.stem(q, k, v))

    return {
        "heddle dense": Call(lambda: heddle.attention(q, k, v, causal=True), flop, "flop"),
        "heddle stem": Call(stem, flop * select.stem(q, k, v).density(), "flop"),
    }


def _folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The heads of a group are rows of one: [1, Hkv, group, D] to [1, 1, Hq, D]."""
    return sdpa(q, k, v).reshape(1, 1, -1, q.shape[-1])


def _arrays_read(cache: heddle.KVCache) -> list[np.ndarray]:
    """What a decode reads of a cache: not the value norms, nor a scale that all share."""
    return [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None and x.size > 1]


def _read(arrays: Sequence[torch.Tensor]) -> None:
    for array in arrays:
        array.amax()  # of int32, which keeps pace with memory on every core


# --- how it is measured ---


class Flush:
    """Leaves nothing in the caches of what was used before, by reading: written lines would have to be written back
    inside what is timed next."""

    def __init__(self) -> None:
        # Four times the cache: after less, its replacement policy has kept some.
        self.buffer = torch.ones(4 * records.last_level_cache() // torch.int32.itemsize, dtype=torch.int32)

    def __call__(self) -> None:
        self.buffer.amax()


def check_same(calls: dict[str, Call]) -> dict[str, float]:
    """Runs every call once; the relative difference of each result from the first one's, where there is a tolerance."""
    differences: dict[str, float] = {}
    reference: torch.Tensor | None = None
    for label, call in calls.items():
        result = call.run()
        if call.tolerance is None:
            continue
        result = result.float()
        if reference is None:
            reference = result
        difference = (torch.linalg.vector_norm(result - reference) / torch.linalg.vector_norm(reference)).item()
        if not difference <= call.tolerance:
            raise SystemExit(f"{label} differs from the point's first call by {difference:.2g}: not the same attention")
        differences[label] = difference
    return differences


def take_turns(
    calls: dict[str, Call], options: Options, before: Callable[[], None] | None, tick: Callable[[float], None]
) -> dict[str, list[float]]:
    """Seconds of every call, round by round. `tick` hears of the fraction done."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    racing = dict(calls)
    budget = options.seconds * len(calls)
    started = time.perf_counter()
    for rounds in range(1, MAX_ROUNDS + 1):
        for label, call in racing.items():
            if not times[label] or times[label][-1] < WARM_BELOW_SECONDS:
                call.run()
            if before:
                before()
            start = time.perf_counter()
            call.run()
            times[label].append(time.perf_counter() - start)
        if rounds == TRIAL_ROUNDS:
            racing = {label: call for label, call in racing.items() if not _beaten(label, calls, times)}
        elapsed = time.perf_counter() - started
        tick(min(rounds / options.min_rounds, elapsed / budget, 1.0))
        if rounds >= options.min_rounds and elapsed >= budget:
            break
    return times


def _beaten(label: str, calls: dict[str, Call], times: dict[str, list[float]]) -> bool:
    """Whether an alternative of the same peer is clearly faster."""
    peer = calls[label].peer
    best = min(min(times[other]) for other in calls if other == label or (peer and calls[other].peer == peer))
    return min(times[label]) > TRIAL_MARGIN * best


def measure_point(
    point: Point, lines: Sequence[Line], options: Options, flush: Callable[[], None], tick: Callable[[float], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The point's times, and the lines of the table that they make."""
    torch.manual_seed(0)
    calls = point.prepare()
    wanted = {label for line in lines for label in (line.ours, *line.also, *_alternatives(line.peer, calls))}
    calls = {label: call for label, call in calls.items() if label in wanted}
    with torch.inference_mode():
        differences = check_same(calls)
        times = take_turns(calls, options, flush if point.cold else None, tick)
    timed = {}
    for label, seconds in times.items():
        call, (median, best) = calls[label], (statistics.median(seconds), min(seconds))
        rate = "gflop_per_s" if call.unit == "flop" else "gb_per_s"
        timed[label] = {
            "median_s": round(median, 9),
            "min_s": round(best, 9),
            "quartiles_s": np.quantile(seconds, (0.25, 0.75)).round(9).tolist(),
            "rounds": len(seconds),
            rate: float(f"{call.work / median * 1e-9:.4g}"),
        }
        if label in differences:
            timed[label]["difference"] = float(f"{differences[label]:.2g}")
    results = []
    for line in lines:
        others = _alternatives(line.peer, calls)
        results.append(compare(line, timed[line.ours], {label: timed[label] for label in others}))
        results[-1]["also"] = {label: timed[label]["median_s"] for label in line.also}
    return {"name": point.name, "cold": point.cold, "calls": timed}, results


def _alternatives(peer: str, calls: dict[str, Call]) -> list[str]:
    return [label for label, call in calls.items() if peer in (label, call.peer)]


def compare(line: Line, ours: dict[str, Any], peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A line of the table: ours and the fastest alternative of the peer, by medians; by minima each one's best."""
    label, fastest = min(peers.items(), key=lambda item: item[1]["median_s"])
    ratio = fastest["median_s"] / ours["median_s"]
    told = ("median_s", "min_s", "gflop_per_s", "gb_per_s")
    return {
        "name": line.name,
        "ours": {"label": line.ours, **{key: ours[key] for key in told if key in ours}},
        "against": {"label": label, **{key: fastest[key] for key in told if key in fastest}},
        "ratio_of_medians": ratio,
        "ratio_of_minima": min(peer["min_s"] for peer in peers.values()) / ours["min_s"],
        "target": None if line.target is None else {"at_least": line.target},
        "met": None if line.target is None else ratio >= line.target,
    }


def measure_memory(dtype: str, tokens: int) -> dict[str, Any]:
    """Peak memory of causal attention beyond inputs and output, each library in a process of its own."""
    target = 200e6

    def peak(library: str) -> dict[str, Any]:
        script = Path(__file__).with_name("peak_memory.py")
        command = [sys.executable, script, library, dtype, "--tokens", str(tokens), "--heads", "2"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ours, torch_peak = peak("heddle"), peak("torch")
    ratio = torch_peak["extra_bytes"] / max(1, ours["extra_bytes"])
    return {
        "name": _memory_name(dtype, tokens),
        "ours": {"label": f"heddle {dtype}", **ours},
        "against": {"label": f"PyTorch {dtype}", **torch_peak},
        "ratio_of_medians": ratio,
        "ratio_of_minima": ratio,
        "target": {"at_most_bytes": target},
        "met": ours["extra_bytes"] < target,
        "also": {},
    }


def _memory_name(dtype: str, tokens: int) -> str:
    return f"memory/{dtype}/causal/h2/d128/s{tokens}"


def run(options: Options, wanted: Callable[[str], bool], console: Console) -> dict[str, Any]:
    """{"points": what was timed, "results": the lines of the table}, of the lines whose name is wanted."""
    chosen = [(point, [line for line in point.lines if wanted(line.name)]) for point in make_points(options.shrink)]
    chosen = [(point, lines) for point, lines in chosen if lines]
    tokens = 32768 // options.shrink
    memory = [dtype for dtype in DTYPES if wanted(_memory_name(dtype, tokens))]
    flush = Flush() if any(point.cold for point, _ in chosen) else lambda: None
    points, results = [], []
    percentage = TextColumn("{task.percentage:3.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percentage, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) + len(memory))
        for number, (point, lines) in enumerate(chosen):
            progress.update(task, description=point.name)
            tick = lambda part, number=number: progress.update(task, completed=number + part)  # noqa: E731
            timed, compared = measure_point(point, lines, options, flush, tick)
            points.append(timed)
            results += compared
        for dtype in memory:
            progress.update(task, description=_memory_name(dtype, tokens))
            results.append(measure_memory(dtype, tokens))
            progress.advance(task)
    if options.shrink > 1:  # the targets are of the lengths they name
        results = [result | {"met": None} for result in results]
    return {"points": points, "results": results}


# --- how it is told ---


TITLES = {
    "fp32": "fp32 prefill, 8 heads, against PyTorch's scaled_dot_product_attention",
    "bf16": "bf16 prefill, 8 heads, against PyTorch's scaled_dot_product_attention",
    "int8-b": "INT8 prefill (scheme B; operands quantized before, that time in brackets), 8 heads, against bf16",
    "window": "Causal window and global tokens, 8 heads, against dense causal",
    "decode/read": "Decode of one token, 32/8 heads of 128, cache in memory, against a read of the same bytes",
    "decode/fp32": "The same decode, against an fp32 cache",
    "decode/torch": "The same decode, against PyTorch's scaled_dot_product_attention on contiguous keys and values",
    "sampled": "Decode that draws 128 values a head (systematic), against the same cache read whole",
    "select": "Selection at run time and attention over it, against dense (top-k: of one row, against torch.topk)",
    "memory": "Peak memory beyond inputs and output, causal, 2 heads of 128",
}


def tables(results: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """One table a kind of comparison."""
    for kind, title in TITLES.items():
        members = [result for result in results if _kind(result["name"]) == kind]
        if not members:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("heddle", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("against")
        for name in ("", "ratio", "of minima", "target", "met"):
            table.add_column(name, justify="right", no_wrap=True)
        for result in members:
            table.add_row(*_cells(result))
        yield table


def _kind(name: str) -> str:
    """Its key in TITLES."""
    first, second, third, *_, last = name.split("/")
    if first == "prefill":
        return "window" if third.startswith("window") else second
    return f"{first}/{last}" if first == "decode" else first


def _cells(result: dict[str, Any]) -> list[str]:
    ours, against, target = result["ours"], result["against"], result["target"]
    if "extra_bytes" in ours:
        cells = [f"{ours['extra_bytes'] / 1e6:.1f} MB", "", against["label"], f"{against['extra_bytes'] / 1e6:.1f} MB"]
    else:
        rate = f"{ours['gflop_per_s']:.0f} GFLOP/s" if "gflop_per_s" in ours else f"{ours['gb_per_s']:.1f} GB/s"
        beside = "".join(f" ({_ms(seconds)})" for seconds in result["also"].values())
        cells = [_ms(ours["median_s"]) + beside, rate, against["label"], _ms(against["median_s"])]
    if target is None:
        wish = ""
    elif "at_least" in target:
        wish = f"≥ {target['at_least']:.2f}"
    else:
        wish = f"< {target['at_most_bytes'] / 1e6:.0f} MB"
    met = {None: "", True: "[green]yes[/]", False: "[bold red]no[/]"}[result["met"]]
    ratios = [f"{result[name]:.2f}" for name in ("ratio_of_medians", "ratio_of_minima")]
    return [result["name"], *cells, *ratios, wish, met]


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.{max(0, 2 - int(math.log10(max(ms, 1))))}f} ms"


def show(record: dict[str, Any], console: Console) -> None:
    device, revision = record["device"], record["revision"]
    source = "unknown source" if revision is None else revision["commit"][:12] + " with changes" * revision["dirty"]
    console.print(
        f"{device['processor']}, {device['isa']}, {device['threads']} threads, load {device['load_average'][0]} · "
        f"heddle {source}, {record['build']['compiler']} · torch {device['torch']['version']} "
        f"({device['torch']['isa']}) · {record['date']}",
        highlight=False,
        soft_wrap=True,
    )
    if record["build"]["current"] is False:
        console.print("[bold red]heddle was built before its sources were last changed: run make build first[/]")
    for table in tables(record["results"]):
        console.print()
        console.print(table)
    judged = [result["met"] for result in record["results"] if result["met"] is not None]
    if judged:
        console.print(f"\n{sum(judged)} of {len(judged)} targets met, by medians")


def join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several runs that measured different lines of the table, on one machine with one build; complete if
    no line is missing. The first run's time and load stand for all."""
    for part in parts:
        for key in ("revision", "build", "versions"):
            if part[key] != parts[0][key]:
                raise SystemExit(f"--join: the records differ in {key}: {parts[0][key]} and {part[key]}")
        for key in ("processor", "isa", "threads", "torch"):
            if part["device"][key] != parts[0]["device"][key]:
                raise SystemExit(f"--join: the records differ in device.{key}")
    by_name = {result["name"]: result for part in parts for result in part["results"]}
    names = [line.name for point in make_points(1) for line in point.lines] + [_memory_name(d, 32768) for d in DTYPES]
    if strange := by_name.keys() - set(names):
        raise SystemExit(f"--join: no line of the table is called {sorted(strange)[0]}")
    return parts[0] | {
        "command": f"python bench/host.py ({len(parts)} runs with --filter, joined)",
        "commands": [part["command"] for part in parts],
        "complete": by_name.keys() == set(names),
        "points": [point for part in parts for point in part["points"]],
        "results": [by_name[name] for name in names if name in by_name],
        "seconds": sum(part["seconds"] for part in parts),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats of every line")
    parser.add_argument("--filter", default="", help="regular expression that names of lines are searched for")
    parser.add_argument("--seconds", type=float, help="for each call of a comparison (1; with --quick 0.1)")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this (to 16), to try the script")
    parser.add_argument("--into", type=Path, help="folder of the record (bench/results if everything was measured)")
    parser.add_argument("--show", type=Path, metavar="RECORD", help="print a record's table and stop")
    parser.add_argument("--join", type=Path, nargs="+", metavar="RECORD", help="write one record of several and stop")
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    if not 1 <= args.shrink <= 16:
        parser.error(f"--shrink: {args.shrink}; allowed are 1 to 16")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds: {args.seconds}; allowed are numbers above 0")
    # A table in a log or a file is not folded to the width of a terminal that nobody has.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    if args.show:
        show(json.loads(args.show.read_text()), console)
        return 0
    if args.join:
        record = join([json.loads(path.read_text()) for path in args.join])
        show(record, console)
        console.print(f"recorded in {os.path.relpath(records.write(record, 'host', args.into or records.RESULTS))}")
        return 0

    options = Options(args.seconds or (0.1 if args.quick else 1.0), 2 if args.quick else 5, args.shrink)
    started = time.perf_counter()
    record = records.describe(["python", "bench/host.py", *arguments])
    record["device"]["torch"] = {
        "version": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "threads": torch.get_num_threads(),
    }
    partial_run = args.quick or args.filter or args.shrink > 1
    record["complete"] = not partial_run
    record |= run(options, re.compile(args.filter).search, console)
    if not record["results"]:  # no failure, since heddle_bench beside this may have cases of that name
        print("--filter matches no line of the table", file=sys.stderr)
        return 0
    record["seconds"] = time.perf_counter() - started
    show(record, console)
    into = args.into or (None if partial_run else records.RESULTS)
    if into:
        path = records.write(record, "host", into)
        console.print(f"recorded in {os.path.relpath(path)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
