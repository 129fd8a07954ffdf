"""Which keys a query reads, beyond what `causal` and `window` say.

Each function returns a Selection for the argument `selection` of heddle.attention and heddle.decode. Query i of a
request with Sq queries and Sk keys stands at position p = i + Sk - Sq; a key is read if causal, window and the
selection all allow it.
"""

from __future__ import annotations

from typing import Any

from heddle import _core
from heddle._core import Selection

__all__ = ["Selection", "block_mask", "strided", "tokens", "window"]


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
            [total_q, Hkv, n]); ascending, without repeats, padded with -1 at the end. Read where it lies at every call.
        lengths: int32, the shape of indices without its last axis: how many entries count. Optional.

    Raises HeddleTypeError for another dtype, HeddleValueError for a wrong rank; the call that uses the selection checks
    the entries.
    """
    return _core.select_tokens(indices, lengths)
