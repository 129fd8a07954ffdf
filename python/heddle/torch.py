"""heddle as operators of PyTorch: what torch.compile and CUDA graphs take.

Importing this module registers torch.ops.heddle.attention, .decode, .decode_cascade, .append and .merge, with fake
kernels, for tensors of the CPU and of GPUs. The functions here are the ones to call. They have the arguments of
heddle.attention and its like, except that selections are given as plain numbers and tensors, which a compiler can
trace, and a cache as its tensors (tensors_of).

    import heddle.torch

    cache = heddle.torch.tensors_of(heddle.KVCache(..., device="cuda"))

    @torch.compile(fullgraph=True)
    def step(q, k, v, cache, block_table, seq_lens):
        seq_lens = heddle.torch.append(k, v, cache, block_table, seq_lens)
        return heddle.torch.decode(q, cache, block_table, seq_lens), seq_lens

None of them records gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from heddle import _core, select
from heddle._attention import SharedPrefix
from heddle._core import KVCache, Schedule, Selection
from heddle._errors import HeddleValueError, refuse

__all__ = ["CacheTensors", "append", "attention", "decode", "decode_cascade", "merge", "tensors_of"]

Tensor = torch.Tensor
Window = int | tuple[int | None, int | None]

_SELECTION = "str selection, int[] numbers, Tensor[] arrays"
_OPTIONS = (
    "bool causal, int? window_left, int? window_right, float softcap, float? scale, Tensor? sinks, "
    f"{_SELECTION}, bool return_lse, str backend, str schedule, int split_size"
)


class CacheTensors(NamedTuple):
    """The parts of a KVCache, as its properties of the same names describe them."""

    k: Tensor
    v: Tensor
    value_norms: Tensor
    saturation: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    q_scale: Tensor | None
    format: str
    partition: int


def tensors_of(cache: KVCache) -> CacheTensors:
    """The memory of a cache as tensors, which share it.

    A cache with static scales must be calibrated (KVCache.calibrate, with q for "int8-baseline"): a captured call
    cannot look at its data first. Raises HeddleValueError otherwise.
    """
    if not (cache.kv_calibrated and cache.q_calibrated):
        message = f"static scales of format {cache.format!r} are not set; allowed is a cache after calibrate()"
        raise refuse(HeddleValueError, "value", "cache", message)

    def tensor(part: Any) -> Tensor | None:
        if part is None or isinstance(part, Tensor):
            return part
        if part.dtype.name in ("bfloat16", "float8_e4m3fn"):  # dtypes of ml_dtypes, which torch does not read
            return torch.from_numpy(part.view(f"int{8 * part.itemsize}")).view(getattr(torch, part.dtype.name))
        return torch.from_numpy(part)

    parts = (cache.k, cache.v, cache.value_norms, cache.saturation, cache.k_scale, cache.v_scale, cache.q_scale)
    return CacheTensors(*map(tensor, parts), cache.format, cache.partition)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    select_window: tuple[int | None, int | None, int] | None = None,
    strided: tuple[int, int] | None = None,
    block_mask: tuple[Tensor, tuple[int, int]] | None = None,
    tokens: Tensor | tuple[Tensor, Tensor] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    schedule: str = "auto",
    split_size: int = 0,
) -> Any:
    """heddle.attention.

    At most one selection: select_window (left, right, n_global), strided (width, stride), block_mask (mask, block) with
    block = (queries, keys), tokens indices or (indices, lengths). heddle.select says what they mean.
    """
    out, lse = torch.ops.heddle.attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        *_options(causal, window, softcap, scale, sinks, select_window, strided, block_mask, tokens),
        return_lse,
        backend,
        schedule,
        split_size,
    )
    return (out, lse) if return_lse else out


def decode(
    q: Tensor,
    cache: CacheTensors,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    select_window: tuple[int | None, int | None, int] | None = None,
    strided: tuple[int, int] | None = None,
    block_mask: tuple[Tensor, tuple[int, int]] | None = None,
    tokens: Tensor | tuple[Tensor, Tensor] | None = None,
    pages: Tensor | tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    schedule: str = "auto",
    split_size: int = 0,
) -> Any:
    """heddle.decode over the tensors of a cache.

    Selections as for attention(), or pages: a page list, indices or (indices, lengths).
    """
    out, lse = torch.ops.heddle.decode(
        q,
        block_table,
        seq_lens,
        *cache,
        *_options(causal, window, softcap, scale, sinks, select_window, strided, block_mask, tokens, pages),
        return_lse,
        backend,
        schedule,
        split_size,
    )
    return (out, lse) if return_lse else out


def decode_cascade(
    q: Tensor,
    cache: CacheTensors,
    block_table: Tensor,
    seq_lens: Tensor,
    prefixes: Sequence[tuple[Any, ...]],
    *,
    causal: bool = True,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    schedule: str = "auto",
    split_size: int = 0,
) -> Any:
    """heddle.decode_cascade over the tensors of a cache.

    prefixes: a heddle.SharedPrefix, or a tuple of its fields, for each level, with cu_requests a list of numbers or
    None: which requests share what decides the launches, so that it is part of a traced or captured call.
    """
    levels = [SharedPrefix(*prefix) for prefix in prefixes]
    cu_requests = [[0, q.shape[0]] if level.cu_requests is None else list(level.cu_requests) for level in levels]
    out, lse = torch.ops.heddle.decode_cascade(
        q,
        block_table,
        seq_lens,
        *cache,
        [level.block_table for level in levels],
        [level.seq_lens for level in levels],
        [number for numbers in cu_requests for number in numbers],
        [len(numbers) for numbers in cu_requests],
        causal,
        softcap,
        scale,
        sinks,
        return_lse,
        backend,
        schedule,
        split_size,
    )
    return (out, lse) if return_lse else out


def append(
    k: Tensor, v: Tensor, cache: CacheTensors, block_table: Tensor, start: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """KVCache.append into the tensors of a cache. Returns seq_lens."""
    return torch.ops.heddle.append(k, v, block_table, start, cu_seqlens, *cache)


def merge(outs: Tensor, lses: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """heddle.merge of one tensor of outputs and one of their lse."""
    return torch.ops.heddle.merge(outs, lses, backend)


def _options(
    causal: bool,
    window: Window | None,
    softcap: float,
    scale: float | None,
    sinks: Tensor | None,
    select_window: tuple[int | None, int | None, int] | None,
    strided: tuple[int, int] | None,
    block_mask: tuple[Tensor, tuple[int, int]] | None,
    tokens: Tensor | tuple[Tensor, Tensor] | None,
    pages: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Any, ...]:
    """What attention and decode share, as their operators take it. An unbounded side of select_window is -1."""
    kind, numbers, arrays = "", [], []
    if sum(x is not None for x in (select_window, strided, block_mask, tokens, pages)) > 1:
        raise refuse(HeddleValueError, "value", "selection", "several are given; allowed is one")
    if select_window is not None:
        kind, numbers = "window", [-1 if side is None else side for side in select_window]
    elif strided is not None:
        kind, numbers = "strided", list(strided)
    elif block_mask is not None:
        kind, numbers, arrays = "block_mask", list(block_mask[1]), [block_mask[0]]
    else:
        for name, listed in (("tokens", tokens), ("pages", pages)):
            if listed is not None:
                kind, arrays = name, [listed] if isinstance(listed, Tensor) else list(listed)
    left, right = window if isinstance(window, tuple) else (window, None if window is None else 0)
    return causal, left, right, softcap, scale, sinks, kind, numbers, arrays


def _selection(kind: str, numbers: list[int], arrays: list[Tensor]) -> Selection | None:
    if kind == "window":
        left, right = (None if side < 0 else side for side in numbers[:2])
        return select.window(left, right, numbers[2])
    if kind == "strided":
        return select.strided(*numbers)
    if kind == "block_mask":
        return select.block_mask(arrays[0], (numbers[0], numbers[1]))
    if kind == "pages":
        return select.page_list(*arrays)
    return select.tokens(*arrays) if kind == "tokens" else None


class _Options(NamedTuple):
    """The arguments of _OPTIONS."""

    causal: bool
    window_left: int | None
    window_right: int | None
    softcap: float
    scale: float | None
    sinks: Tensor | None
    selection: str
    numbers: list[int]
    arrays: list[Tensor]
    return_lse: bool
    backend: str
    schedule: str
    split_size: int

    def masks(self) -> tuple[Any, ...]:
        unbounded = self.window_left is None and self.window_right is None
        window = None if unbounded else (self.window_left, self.window_right)
        selection = _selection(self.selection, self.numbers, self.arrays)
        return self.causal, window, self.softcap, self.scale, self.sinks, selection


def _results(result: Any, q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Operators always return both; an lse that nobody asked for is empty."""
    return result if return_lse else (result, q.new_empty(0, dtype=torch.float32))


def _like_results(q: Tensor, v: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """What a fake kernel returns for _results."""
    lse = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if return_lse else (0,)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op(
    "heddle::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
)
def _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *options):
    o = _Options(*options)
    schedule = Schedule(o.schedule, o.split_size)
    result = _core.attention(q, k, v, *o.masks(), cu_seqlens_q, cu_seqlens_k, o.return_lse, None, o.backend, schedule)
    return _results(result, q, o.return_lse)


@_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, *options):
    return _like_results(q, v, _Options(*options).return_lse)


_CACHE = "Tensor{} k_pages, Tensor{} v_pages, Tensor{} value_norms, Tensor{} saturation, "
_CACHE += "Tensor{}? k_scale, Tensor{}? v_scale, Tensor? q_scale, str format, int partition"


def _cache(k, v, value_norms, saturation, k_scale, v_scale, q_scale, format, partition):
    scales = {"k_scale": k_scale, "v_scale": v_scale, "q_scale": q_scale}
    return KVCache.over(k, v, value_norms, saturation, **scales, format=format, partition=partition)


@torch.library.custom_op(
    "heddle::decode",
    mutates_args=(),
    schema="(Tensor q, Tensor block_table, Tensor seq_lens, "
    f"{_CACHE.format(*[''] * 6)}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _decode(q, block_table, seq_lens, *rest):
    cache, o = _cache(*rest[:9]), _Options(*rest[9:])
    schedule = Schedule(o.schedule, o.split_size)
    result = _core.decode(
        q, cache, block_table, seq_lens, *o.masks(), None, o.return_lse, False, None, o.backend, schedule, None
    )
    return _results(result, q, o.return_lse)


@_decode.register_fake
def _(q, block_table, seq_lens, k, v, *rest):
    return _like_results(q, v, _Options(*rest[7:]).return_lse)


@torch.library.custom_op(
    "heddle::decode_cascade",
    mutates_args=(),
    schema="(Tensor q, Tensor block_table, Tensor seq_lens, "
    f"{_CACHE.format(*[''] * 6)}, Tensor[] prefix_tables, Tensor[] prefix_lens, int[] cu_requests, int[] sizes, "
    "bool causal, float softcap, float? scale, Tensor? sinks, bool return_lse, str backend, str schedule, "
    "int split_size) -> (Tensor, Tensor)",
)
def _decode_cascade(q, block_table, seq_lens, *rest):
    tables, lens, cu_requests, sizes, *options, return_lse, backend, schedule, split_size = rest[9:]
    numbers = np.split(np.asarray(cu_requests, np.int32), np.cumsum(sizes[:-1]))
    levels = list(zip(tables, lens, numbers, strict=True)) if sizes else []
    schedule = Schedule(schedule, split_size)
    result = _core.decode_cascade(
        q, _cache(*rest[:9]), block_table, seq_lens, levels, *options, return_lse, None, backend, schedule
    )
    return _results(result, q, return_lse)


@_decode_cascade.register_fake
def _(q, block_table, seq_lens, k, v, *rest):
    return _like_results(q, v, return_lse=rest[-4])


@torch.library.custom_op(
    "heddle::append",
    mutates_args=("k_pages", "v_pages", "value_norms", "saturation", "k_scale", "v_scale"),
    schema="(Tensor k, Tensor v, Tensor block_table, Tensor start, Tensor? cu_seqlens, "
    f"{_CACHE.format(*(f'({name}!)' for name in 'abcdef'))}) -> Tensor",
)
def _append(k, v, block_table, start, cu_seqlens, *cache):
    return _cache(*cache).append(k, v, block_table, start, cu_seqlens=cu_seqlens)


@_append.register_fake
def _(k, v, block_table, start, *_):
    return start.new_empty((block_table.shape[0],))


@torch.library.custom_op(
    "heddle::merge", mutates_args=(), schema="(Tensor outs, Tensor lses, str backend) -> (Tensor, Tensor)"
)
def _merge(outs, lses, backend):
    return _core.merge(outs, lses, backend)


@_merge.register_fake
def _(outs, lses, backend):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
