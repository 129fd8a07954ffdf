"""attention(), decode(), decode_cascade() and merge()."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from heddle import _core
from heddle._core import DecodePlan, KVCache, Sampling, Schedule, Selection
from heddle._errors import HeddleTypeError, HeddleValueError, refuse
from heddle._quantize import quantize_operands

Window = int | tuple[int | None, int | None]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    selection: Selection | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    format: str | None = None,
    partition: int = 1,
    smooth: bool = False,
    return_lse: bool = False,
    out: Any = None,
    backend: str | None = None,
    schedule: str | Schedule | None = None,
) -> Any:
    """Attention: softmax(scale * q k^T) v, row by row, without ever holding the scores.

    Arrays may be numpy arrays, torch tensors or anything with __dlpack__; they are read where they lie, whatever their
    strides, as long as the last axis is contiguous. bfloat16 and FP8 numpy arrays are those of ml_dtypes.

    Args:
        q: queries [B, Sq, Hq, D]; float32, float16 or bfloat16 (float64 too with backend="reference"), or a
            QuantizedTensor.
        k: keys [B, Sk, Hkv, D], of q's dtype or a QuantizedTensor. Query head h reads KV head h // (Hq // Hkv).
        v: values [B, Sk, Hkv, Dv], likewise.
        causal: query i sees keys j <= i + Sk - Sq: aligned at the bottom right.
        window: (left, right): keys within [p - left, p + right] of p = i + Sk - Sq; None on a side is unbounded; a
            number w is (w, 0).
        softcap: c > 0 turns every score s into c * tanh(s / c).
        scale: of the scores; 1 / sqrt(D) unless given.
        sinks: float32 [Hq]: a logit per query head that adds exp(sink) to the softmax denominator only.
        selection: from heddle.select: which keys are read, beyond what causal and window say.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]: a packed batch. Request b has the tokens cu_seqlens[b] up to
            cu_seqlens[b + 1] of q [total_q, Hq, D] and of k and v [total_k, Hkv, D].
        format: quantize q, k and v on the way: "int8-baseline" (one scale each), "int8-a" (q and k one for every
            `partition` tokens of a head, v one), "int8-b" (q one a token, k and v one each) or "fp8" (k and v E4M3,
            one scale each, q as it is). The result has q's dtype; an `out` for an int8 format is float32.
        partition: tokens that share a scale, for "int8-a".
        smooth: with a format: subtract each head's mean key before quantizing.
        return_lse: also return lse.
        out: where the result goes: writable, of its shape and dtype, apart from the inputs, without zero strides.
        backend: "host", "reference" (float64, the oracle), "sm90"; None or "auto" takes the first that can, and
            heddle.last_kernel() tells which did.
        schedule: a heddle.Schedule or its kind's name. It changes the time, not the bits.

    Returns:
        out [B, Sq, Hq, Dv] (packed: [total_q, Hq, Dv]), an array of the kind and on the device of q, of q's dtype
        (float32 if q is a QuantizedTensor); with return_lse the pair of it and lse, float32 [B, Hq, Sq] (packed:
        [Hq, total_q]): the natural logarithm of each row's denominator. A row that sees no key gives 0 and lse -inf
        (its sink, with sinks). Rows of a packed batch that cu_seqlens does not reach are 0 (lse -inf) on the CPU, and
        not written on a GPU.

    CUDA tensors: the call is queued on the current stream and waits for nothing. cu_seqlens and token lists lie on the
    same GPU and are not checked, unless heddle.set_validation(True).

    Raises:
        HeddleValueError: shapes, strides, devices or numbers that do not fit; .argument names which.
        HeddleTypeError: a dtype or a kind of object that does not fit.
        HeddleNotImplementedError: a combination that the backend lacks, or a tensor that records gradients.

    Source: the tiled online softmax of FlashAttention (Dao et al., arXiv 2205.14135) over a worklist of key tiles.
    """
    if format is not None:
        if format == "int8-a" and partition != 1 and cu_seqlens_q is not None:
            allowed = "allowed in a packed batch is 1: longer partitions would reach from one request into the next"
            raise refuse(HeddleValueError, "value", "partition", f"{partition!r}; {allowed}")
        quantized = quantize_operands(q, k, v, format, partition, smooth)
        result = attention(
            *quantized,
            causal=causal,
            window=window,
            softcap=softcap,
            scale=scale,
            sinks=sinks,
            selection=selection,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            return_lse=return_lse,
            out=out,
            backend=backend,
            schedule=schedule,
        )
        if out is not None:
            return result
        return (_like(result[0], q), result[1]) if return_lse else _like(result, q)
    return _core.attention(
        q,
        k,
        v,
        causal,
        window,
        softcap,
        scale,
        sinks,
        selection,
        cu_seqlens_q,
        cu_seqlens_k,
        return_lse,
        out,
        backend,
        schedule,
    )


def decode(
    q: Any,
    cache: KVCache,
    block_table: Any,
    seq_lens: Any,
    *,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    selection: Selection | None = None,
    sampling: Sampling | None = None,
    plan: DecodePlan | None = None,
    return_lse: bool = False,
    return_reads: bool = False,
    out: Any = None,
    backend: str | None = None,
    schedule: str | Schedule | None = None,
) -> Any:
    """Attention of a few new tokens of each request over a paged KV cache.

    Args:
        q: [B, Sq, Hq, D], Sq >= 1 (speculative tokens, causal among themselves); float32, float16 or bfloat16.
        cache: holds the keys and values, the new tokens' included (KVCache.append).
        block_table: int32 [B, max_pages]: token t of request b lies in page block_table[b, t // page_size]. Entries
            beyond a request's length may be anything.
        seq_lens: int32 [B]: tokens of each request, the new ones included.
        sampling: a heddle.Sampling: draw rows of V instead of reading all that selection, window and causality leave.
        return_reads: with sampling: also return (v_rows, k_features), int64 [B, Hkv] each: the rows of V and the
            elements of K that were read. What the queries of a KV head share counts once.
        plan: of plan_decode(), for the layers of a model to share; without it a call makes its own.

    The other arguments are those of attention(); positions are those of the request, so query i stands at
    seq_lens[b] - Sq + i.

    Returns:
        out [B, Sq, Hq, Dv] of q's dtype, kind and device; with return_lse also lse, float32 [B, Hq, Sq], exact unless
        scores are Bernoulli's; with return_reads also the pair of counts. A request of length 0 gives 0 and lse -inf.

    With a cache on a GPU, q, block_table and seq_lens lie there too; the call is queued on the current stream, and
    tables and lengths are not checked, unless heddle.set_validation(True).

    Raises:
        HeddleValueError: shapes or numbers that do not fit, lengths beyond the table (code "capacity"), page ids
            outside the cache.
        HeddleTypeError, HeddleNotImplementedError: as attention().
    """
    return _core.decode(
        q,
        cache,
        block_table,
        seq_lens,
        causal,
        window,
        softcap,
        scale,
        sinks,
        selection,
        sampling,
        return_lse,
        return_reads,
        out,
        backend,
        schedule,
        plan,
    )


class SharedPrefix(NamedTuple):
    """A level of shared prefixes for decode_cascade(): requests share the tokens that lie in front of their own.

    block_table: int32 [G, max_pages]: the pages of each of the G prefixes, as in decode().
    seq_lens: int32 [G]: their tokens; 0 shares nothing.
    cu_requests: int32 [G + 1], an array on the CPU or a list: prefix g belongs to the requests cu_requests[g] up to
        cu_requests[g + 1] of the batch. None: G is 1, and all requests share it.
    """

    block_table: Any
    seq_lens: Any
    cu_requests: Any = None


def decode_cascade(
    q: Any,
    cache: KVCache,
    block_table: Any,
    seq_lens: Any,
    prefixes: Sequence[SharedPrefix],
    *,
    causal: bool = True,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
    backend: str | None = None,
    schedule: str | Schedule | None = None,
) -> Any:
    """Decode of requests that share prefixes of their tokens: a prefix is read once for all of its requests.

    The queries of a prefix's requests attend to it as those of a single request, each request attends to its own
    tokens as in decode(), and merge() puts the parts together by their lse, exactly. Parts are of q's dtype.

    Args:
        q: [B, Sq, Hq, D], as decode(); with Sq > 1, requests follow each other in memory as their queries do.
        cache: holds prefixes and the requests' own tokens.
        block_table, seq_lens: as decode(), of each request's own tokens: those behind its prefixes, the new ones
            included.
        prefixes: a SharedPrefix, or a tuple of its fields, for each level: a system prompt for the whole batch, then a
            document for some of its requests. The order does not matter. Without any, this is decode().

    The other arguments are those of decode(). Every query sees all of its prefixes, whatever causal says. So the result
    is decode() over prefixes and own tokens one after the other, as long as seq_lens[b] >= Sq (or Sq is 1). There are
    no windows and no selections: where they begin depends on the request. sinks count once.

    Returns:
        out [B, Sq, Hq, Dv] of q's dtype, kind and device; with return_lse also lse, float32 [B, Hq, Sq].

    With a cache on a GPU only cu_requests lies on the CPU. The call is queued on the current stream: decodes, one for
    each level and run of groups of equal size, and a merge, which is what heddle.last_kernel() names.

    Raises:
        HeddleValueError, HeddleTypeError, HeddleNotImplementedError: as decode(); .argument is "prefixes[i].seq_lens",
            for one.

    Source: Hydragen (Juravsky et al., arXiv 2402.05099); levels as in FlashInfer's cascade (Ye et al., arXiv
    2501.01005).
    """
    levels = [_level(prefix, i, q) for i, prefix in enumerate(prefixes)]
    return _core.decode_cascade(
        q, cache, block_table, seq_lens, levels, causal, softcap, scale, sinks, return_lse, out, backend, schedule
    )


def _level(prefix: Any, i: int, q: Any) -> tuple[Any, Any, Any]:
    if not isinstance(prefix, tuple) or not 2 <= len(prefix) <= 3:
        allowed = "allowed are heddle.SharedPrefix and tuples of (block_table, seq_lens, cu_requests)"
        raise refuse(HeddleTypeError, "dtype", f"prefixes[{i}]", f"got {type(prefix).__name__}; {allowed}")
    table, lens, cu_requests = SharedPrefix(*prefix)
    if cu_requests is None:
        cu_requests = [0, len(q)]
    if isinstance(cu_requests, (list, tuple)):
        cu_requests = np.asarray(cu_requests, np.int32)
    return table, lens, cu_requests


def plan_decode(
    q: Any,
    cache: KVCache,
    block_table: Any,
    seq_lens: Any,
    *,
    causal: bool = True,
    window: Window | None = None,
    selection: Selection | None = None,
    backend: str | None = None,
    schedule: str | Schedule | None = None,
    plan: DecodePlan | None = None,
) -> DecodePlan:
    """Works out who reads which keys, once for all layers of a step.

    The arguments are those of the decode() calls to come; of q only shape, dtype and device count. On a GPU the plan is
    made there, from seq_lens as it is when the current stream gets to it: a captured step plans anew at every replay.
    The CPU plans in decode() itself.

    Args:
        plan: an earlier plan, whose memory is used again. Calls with it must be over.

    Returns:
        The plan, for decode(..., plan=plan) with the same backend, shapes, masks, schedule and array of lengths, one
        call at a time. Graphs that captured it need it alive.

    Raises:
        As decode(). decode() raises HeddleValueError for a plan of another call.
    """
    return _core.plan_decode(q, cache, block_table, seq_lens, causal, window, selection, backend, schedule, plan)


def merge(outs: Any, lses: Any, *, backend: str | None = None) -> tuple[Any, Any]:
    """Merges partial results over disjoint sets of keys.

    m = max lse_p; out = sum exp(lse_p - m) out_p / sum exp(lse_p - m); lse = m + log sum exp(lse_p - m).

    Args:
        outs: P partial outputs as attention() returns them: one array [P, B, S, H, Dv] or [P, total, H, Dv], or a
            sequence of P arrays (which is copied into one).
        lses: their lse, float32 [P, B, H, S] or [P, H, total], or a sequence. A part with lse -inf does not
            contribute, whatever its output holds.
        backend: as for attention().

    Returns:
        (out, lse) of one part's shape and the kind of outs; (0, -inf) where every part has lse -inf.
    """
    return _core.merge(_stacked(outs, "outs"), _stacked(lses, "lses"), backend)


def _stacked(parts: Any, argument: str) -> Any:
    if not isinstance(parts, Sequence):
        return parts
    if not parts:
        raise refuse(HeddleValueError, "shape", argument, "got no parts; allowed are 1 and above")
    stack = np.stack if isinstance(parts[0], np.ndarray) else sys.modules["torch"].stack
    try:
        return stack(parts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refuse(HeddleValueError, "shape", argument, f"parts that do not stack: {error}") from error


def _like(result: Any, q: Any) -> Any:
    """The result in q's dtype, if q's library tells it."""
    dtype = getattr(q, "dtype", result.dtype)
    if result.dtype == dtype:
        return result
    return result.astype(dtype) if isinstance(result, np.ndarray) else result.to(dtype)
