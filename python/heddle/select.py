"""Which keys a query reads, beyond what `causal` and `window` say.

Each function returns a Selection for the argument `selection` of heddle.attention and heddle.decode. Query i of a
request with Sq queries and Sk keys stands at position p = i + Sk - Sq; a key is read if causal, window and the
selection all allow it.

Patterns are known in advance: window, strided, block_mask, tokens, page_list. The others look at a call's queries and
keys. They take what the call will get, and run on the host:

    q, k, v       as in heddle.attention: arrays or QuantizedTensor, [B, S, H, D], or packed with cu_seqlens_q and
                  cu_seqlens_k. Or k is a heddle.KVCache, with block_table and seq_lens as in heddle.decode and no v.
    causal, window, softcap, scale, sinks   as in that call; causal is True unless said otherwise.

A budget is a count (an int) or a fraction of what a query sees (a float up to 1, rounded up). Above what is there it
keeps everything. Ties go to the lower index. The result depends on the call alone, not on threads.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np

from heddle import _core
from heddle._core import KVCache, QuantizedTensor, Selection
from heddle._errors import HeddleError, HeddleValueError, refuse, rename

__all__ = [
    "Selection",
    "block_mask",
    "block_topk",
    "indexer",
    "mass",
    "page_list",
    "pages",
    "stem",
    "strided",
    "tokens",
    "top_scores",
    "topk",
    "vertical_slash",
    "window",
    "xattention",
]

Window = int | tuple[int | None, int | None]


def window(left: int | None, right: int | None = 0, n_global: int = 0) -> Selection:
    """Keys j with p - left <= j <= p + right, and the first n_global keys (attention sinks, StreamingLLM).

    None is unbounded on that side. Raises HeddleValueError for numbers below 0.
    """
    return _core.select_window(left, right, n_global)


def strided(width: int, stride: int) -> Selection:
    """Keys j with p - j < width or (p - j) mod stride = 0 (Sparse Transformers, arXiv 1904.10509).

    Raises HeddleValueError for a width below 0 or a stride below 1.
    """
    return _core.select_strided(width, stride)


def block_mask(mask: Any, block: int | tuple[int, int] = (128, 128)) -> Selection:
    """The blocks of queries and keys that a mask names.

    Args:
        mask: bool [nQ, nK], [H, nQ, nK] or [B, H, nQ, nK]; H is 1, Hkv or Hq, B is 1 or the batch. nQ and nK are the
            blocks of the longest request, the last one possibly ragged. Read where it lies at every call.
        block: (queries, keys) of a block. Block (I, J) holds the queries I * block[0] and on and the keys
            J * block[1] and on, counted from the first of each request.

    Raises HeddleTypeError for another dtype, HeddleValueError for a wrong rank or block; the call that uses the
    selection checks the shape.
    """
    return _core.select_block_mask(mask, block)


def tokens(indices: Any, lengths: Any = None) -> Selection:
    """Exactly the keys of a list.

    Args:
        indices: int32 [B, Hkv, n], one list for all queries of a request, or [B, Sq, Hkv, n] (packed batches:
            [total_q, Hkv, n]); 1 in place of Hkv is one list for all heads. Ascending, without repeats, padded with -1
            at the end. Read where it lies at every call.
        lengths: int32, the shape of indices without its last axis: how many entries count. Optional.

    Raises HeddleTypeError for another dtype, HeddleValueError for a wrong rank; the call that uses the selection checks
    the entries.
    """
    return _core.select_tokens(indices, lengths)


def page_list(indices: Any, lengths: Any = None) -> Selection:
    """Whole pages of a cache, for heddle.decode: of page p of a request the tokens p * page_size and on that it has.

    Args:
        indices: int32 [B, Hkv, n], or [B, 1, n] for all heads: pages of each request as block_table counts them.
            Ascending, without repeats, padded with -1 at the end. Read where it lies at every call.
        lengths: int32 [B, Hkv] (or [B, 1]): how many entries count. Optional.

    Causality and windows apply to the tokens as they do to a list of them. In heddle.attention
    HeddleNotImplementedError.

    Raises HeddleTypeError for another dtype, HeddleValueError for a wrong rank; the call that uses the selection checks
    the entries.
    """
    return _core.select_page_list(indices, lengths)


def topk(
    q: Any,
    k: Any,
    v: Any = None,
    budget: int | float | None = None,
    metric: Literal["qk", "oam", "loo"] = "qk",
    *,
    n_sink: int = 0,
    n_recent: int = 0,
    beta: float = 0.2,
    norm: Literal["clipped", "log"] = "clipped",
    epsilon: float = 1e-6,
    value_norms: Any = None,
    output: Any = None,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Selection:
    """The tokens with the largest metric, exactly, for each query and KV head.

    With s the score of a token, v its value, p its probability and o the output, the metric is the maximum over the
    query heads of the KV head of

        qk    s
        oam   s + beta * max(0, log |v|)                        the output-aware metric
        loo   p / (1 - p) * |v - o|                             how far dropping the token alone moves the output

    Args:
        q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k: the call, see
            the module. "qk" over arrays needs no v.
        budget: tokens to keep, the always-kept ones among them.
        n_sink, n_recent: the first tokens of the request and the last that a query sees are always kept.
        beta: weight of the value's term.
        norm: "clipped" is max(0, log |v|); "log" is log(|v| + epsilon).
        value_norms: oam over arrays: |v|, float32 [B, Sk, Hkv] (packed: [total_k, Hkv]), if known. A cache keeps them.
        output: loo: o, [B, Sq, Hq, Dv] (packed: [total_q, Hq, Dv]), last step's for example; computed if not given.

    Returns:
        Token lists, int32 [B, Hkv, n] if q has one query a request, else [B, Sq, Hkv, n] (packed: [total_q, Hkv, n]).

    Raises:
        HeddleValueError: a budget of 0 or below n_sink + n_recent, a metric or norm that does not exist, a metric that
            is NaN (the argument is whose NaN it is), and what heddle.attention and heddle.decode refuse.

    Sources: the output-aware metric of Stem (arXiv 2603.06274); leave-one-out follows from the definition of softmax:
    o without j is (o - p_j v_j) / (1 - p_j).
    """
    if v is None and metric == "qk" and not isinstance(k, KVCache):
        v = k
    call = (q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k)
    return _core.select_topk(call, budget, metric, n_sink, n_recent, beta, norm, epsilon, value_norms, output)


def pages(
    q: Any,
    k: Any,
    v: Any = None,
    budget: int | float | None = None,
    metric: Literal["qk", "oam"] = "qk",
    *,
    page_size: int | None = None,
    n_sink: int = 0,
    n_recent: int = 0,
    beta: float = 0.2,
    norm: Literal["clipped", "log"] = "clipped",
    epsilon: float = 1e-6,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Selection:
    """Whole pages of keys, ranked by a bound that no token of the page exceeds: topk() without reading the keys.

    With kmin and kmax the element-wise minimum and maximum of a page's keys, the bound is

        qk    scale * sum_d max(q_d kmin_d, q_d kmax_d)         (softcapped)
        oam   the same + beta * max(0, log max |v|)

    and again the maximum over the query heads of the KV head.

    Args:
        k: a cache made with page_bounds=True, which keeps them; or arrays, for which they are computed.
        page_size: tokens of a page of arrays, counted from each request's first. A cache has its own.
        budget: tokens to keep, rounded up to whole pages.
        n_sink, n_recent: pages that hold one of these first or last tokens are always kept.

    The other arguments, results and errors are those of topk(). Every token of a chosen page is listed.

    Source: Quest (arXiv 2406.10774) for the bound, Stem (arXiv 2603.06274) for the value's term.
    """
    if v is None and metric == "qk" and not isinstance(k, KVCache):
        v = k
    call = (q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k)
    return _core.select_pages(call, budget, metric, page_size, n_sink, n_recent, beta, norm, epsilon)


def stem(
    q: Any,
    k: Any,
    v: Any = None,
    budget: int | float | None = None,
    *,
    block: int = 128,
    stride: int = 8,
    decay: float = 0.7,
    prompt_len: int | None = None,
    n_first: int = 4,
    n_last: int = 4,
    beta: float = 0.2,
    norm: Literal["clipped", "log", "zscore"] = "clipped",
    epsilon: float = 1e-6,
    value_norms: Any = None,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Selection:
    """Stem: blocks for prefill by anti-diagonal scores, output-aware, with budgets that decay with position.

    The score of block (I, J) is the mean over its stride x stride sub-blocks of their anti-diagonal sums of q . k,
    times scale / stride, plus beta times the V term of J. Tokens that a ragged block lacks count as zero. Block row I
    of a prompt of N block rows keeps the

        k(I) = ceil(k_s - k_s (1 - decay) I / N)

    best of the blocks that it sees, the always-kept ones among them.

    Args:
        q, k, v, and the options of the call: see the module. softcap and sinks play no part.
        budget: k_s in blocks, or as a fraction of the n key blocks of the prompt. None is the published schedule: n if
            n < 56, 0.2 n + 30 if n < 160, else 0.1 n + 30.
        block: queries and keys of a block.
        stride: of the anti-diagonals, a divisor of block; 8 and 16 are usual.
        decay: the part of the budget that is left at the prompt's end (mu).
        prompt_len: tokens of the whole prompt, if k is not all of it. Given that, chunks that begin at multiples of
            block select the blocks of a single pass (but not with "zscore", which looks at all keys there are).
        n_first, n_last: the first blocks of the request and the last that a block row sees are always kept, as are
            those that hold its own positions.
        beta, norm, epsilon: the V term is beta times "clipped": max(0, log max |v|); "log": log(max |v| + epsilon); or
            "zscore": max(0, z) of log(max |v| + epsilon) by stride-groups over the head, averaged by block (with beta
            0.2 or 0.3 in public code).
        value_norms: |v| as for topk().

    Returns:
        A block mask, bool [B, Hq, nQ, nK]: a choice for every query head.

    Raises:
        HeddleValueError: as topk(), and for a stride that does not divide block, a decay outside [0, 1], a prompt_len
            below the keys there are.

    Sources: Stem (arXiv 2603.06274); "zscore" is the form of its public code.
    """
    call = (q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k)
    options = (block, stride, decay, prompt_len, n_first, n_last, beta, norm, epsilon, value_norms)
    return _core.select_stem(call, budget, *options)


def block_topk(
    q: Any,
    k: Any,
    v: Any = None,
    budget: int | float | None = None,
    *,
    block: int = 128,
    n_first: int = 0,
    n_last: int = 1,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Selection:
    """The best blocks of each block row by mean-pooled queries times mean-pooled keys.

    budget counts blocks of a row, or is a fraction of those it sees. n_first, n_last, results and errors are those of
    stem(); v is not looked at.
    """
    if v is None and not isinstance(k, KVCache):
        v = k
    call = (q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k)
    return _core.select_block_topk(call, budget, block, n_first, n_last)


def xattention(
    q: Any,
    k: Any,
    v: Any = None,
    threshold: float = 0.9,
    *,
    block: int = 128,
    stride: int = 8,
    n_first: int = 0,
    n_last: int = 1,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Selection:
    """XAttention: the fewest blocks of each block row that hold a part of its mass, estimated on anti-diagonals.

    The anti-diagonal sums of q . k of the stride x stride sub-blocks, times scale / stride, go through a softmax over
    the sub-blocks that a stride-group of queries sees; a block's mass is the sum over its sub-blocks. The always-kept
    blocks come first, then the heaviest until `threshold` of the mass is reached.

    n_first, n_last, results and errors are those of stem(); v is not looked at.

    Source: XAttention (arXiv 2503.16428).
    """
    if v is None and not isinstance(k, KVCache):
        v = k
    call = (q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k)
    return _core.select_xattention(call, threshold, block, stride, n_first, n_last)


def vertical_slash(
    q: Any,
    k: Any,
    v: Any = None,
    vertical: int | float | None = None,
    slash: int | float | None = None,
    *,
    n_queries: int = 64,
    block: int = 128,
    n_first: int = 0,
    n_last: int = 1,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Selection:
    """Vertical-slash by blocks: the block columns and block diagonals that the last queries attend to.

    The probabilities of the last n_queries queries of a request are summed by key block, and by distance in blocks
    between the query's position and the key. The best `vertical` block columns and `slash` block diagonals, counts or
    fractions of the key blocks, are read by all queries.

    n_first, n_last, results and errors are those of stem(); v is not looked at.

    Source: the vertical-slash pattern of MInference (arXiv 2407.02490), there by single columns and diagonals.
    """
    if v is None and not isinstance(k, KVCache):
        v = k
    call = (q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k)
    return _core.select_vertical_slash(call, vertical, slash, n_queries, block, n_first, n_last)


def indexer(
    q_index: Any,
    k_index: Any,
    weights: Any,
    budget: int | float,
    *,
    n_sink: int = 0,
    n_recent: int = 0,
    scale: float = 1.0,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Selection:
    """The tokens that a DSA indexer ranks highest, exactly, for each query.

        I(t, s) = sum_h weights[t, h] * max(0, scale * q_index[t, h] . k_index[s])

    Args:
        q_index: index queries [B, Sq, Hi, Di]; float32, float16, bfloat16, or an INT8 QuantizedTensor.
        k_index: index keys, one a token: [B, Sk, Di] or [B, Sk, 1, Di], of q_index's dtype, or a QuantizedTensor (INT8
            or FP8, of granularity "token" for a scale a token); or a KVCache with one KV head, with block_table and
            seq_lens (its values are not looked at: head_dim_v=1 keeps them small).
        weights: floats [B, Sq, Hi].
        budget, n_sink, n_recent: as for topk().
        causal, window, cu_seqlens_q, cu_seqlens_k: as in the attention that follows; packed arrays drop B and S for
            a total-token axis.

    Returns:
        Token lists for all KV heads: int32 [B, 1, n] if there is one query a request, else [B, Sq, 1, n] (packed:
        [total_q, 1, n]), ascending, padded with -1, with lengths.

    Raises:
        HeddleValueError: as topk(), and for weights of another shape. A score that is NaN names whose NaN it is.

    Source: DeepSeek-V3.2's lightning indexer.
    """
    k = k_index
    if not isinstance(k, KVCache):
        rank, expected = len(getattr(k, "shape", ())), len(getattr(q_index, "shape", ()))
        if rank and rank == expected - 1 and not isinstance(k, QuantizedTensor):
            k = k[..., None, :]
    v = None if isinstance(k, KVCache) else k
    call = (q_index, k, v, block_table, seq_lens, causal, window, 0.0, scale, None, cu_seqlens_q, cu_seqlens_k)
    try:
        return _core.select_indexer(call, weights, budget, n_sink, n_recent)
    except HeddleError as error:
        names = {"q": "q_index", "k": "k_index"}
        raise rename(error, names[error.argument]) if error.argument in names else error from None


def top_scores(
    scores: Any, budget: int | float, *, n_sink: int = 0, n_recent: int = 0, lengths: Any = None
) -> Selection:
    """The tokens with the largest of given scores: for metrics of your own.

    Args:
        scores: float32 [B, Hkv, n], or [B, Sq, Hkv, n] for lists by query.
        budget, n_sink, n_recent: as for topk().
        lengths: int32, the shape of scores without its last axis: how many scores of each row count.

    Returns token lists. Raises HeddleValueError for NaN, and as topk().
    """
    return _core.select_top_scores(scores, budget, n_sink, n_recent, lengths)


def mass(
    selection: Selection,
    q: Any,
    k: Any,
    v: Any = None,
    *,
    block_table: Any = None,
    seq_lens: Any = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    sinks: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
) -> Any:
    """The attention mass that a selection keeps: the sum of the probabilities of what it reads.

    Any selection will do; v is not looked at. Returns float32 [B, Hq, Sq] (packed: [Hq, total_q]), of the kind of q:
    exp(lse of the selected keys - lse of all, sinks included). A query that sees nothing has kept everything, 1.
    """
    from heddle._attention import attention, decode

    options = {"causal": causal, "window": window, "softcap": softcap, "scale": scale, "return_lse": True}
    if isinstance(k, KVCache):
        if v is not None:
            raise refuse(HeddleValueError, "value", "v", "given with a cache; allowed is None")
        operands = (q, k, block_table, seq_lens)
        run = decode
    else:
        operands = (q, k, k if v is None else v)
        run = attention
        options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    _, kept = run(*operands, selection=selection, **options)
    _, everything = run(*operands, sinks=sinks, **options)
    xp = np if isinstance(kept, np.ndarray) else sys.modules["torch"]
    nothing = xp.isneginf(everything)
    return xp.exp(xp.where(nothing, 0.0, kept) - xp.where(nothing, 0.0, everything))
