"""What a model's mask means to heddle.

transformers describes a mask by a function of positions and a 2-D padding mask, and lets each attention implementation
turn the two into what it reads. heddle does causality, sliding windows and padding itself, so nothing of size Sq x Sk
is made for those; any other mask (chunked, packed, blockwise, a caller's own) is materialized and read as a block mask
of 1 x 1 blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import masking_utils

from heddle._errors import HeddleNotImplementedError, refuse

_CAUSAL = masking_utils.causal_mask_function
_BIDIRECTIONAL = masking_utils.bidirectional_mask_function
# Closures of one function share its code object, so this recognizes every sliding_window_overlay(...).
_SLIDING_CODE = masking_utils.sliding_window_overlay(1).__code__
_AND_CODE = masking_utils.and_masks(_CAUSAL).__code__


def heddle_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that heddle's attention function is given, for transformers' AttentionMaskInterface.

    Returns:
        None: plain causal or bidirectional attention, with a sliding window or not.
        bool [B, kv_length]: the same with padding; True marks a real token.
        bool [B, 1, q_length, kv_length]: any other mask, element by element.

    Raises:
        HeddleNotImplementedError: a cache that hands out more keys than it holds (StaticCache).
    """
    parts = set(_parts(mask_function))
    sliding = {part for part in parts if getattr(part, "__code__", None) is _SLIDING_CODE}
    if _BIDIRECTIONAL not in parts and int(q_offset) + q_length != kv_offset + kv_length:
        raise refuse(
            HeddleNotImplementedError,
            "unsupported",
            "past_key_values",
            f"the cache hands out keys up to position {kv_offset + kv_length} where {int(q_offset) + q_length} tokens "
            "exist, as StaticCache does; allowed are DynamicCache and heddle.hf.HeddleCache",
        )

    valid = None
    if attention_mask is not None and not attention_mask.all():
        missing = kv_offset + kv_length - attention_mask.shape[1]
        valid = F.pad(attention_mask.bool(), (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
        valid = None if valid.all() else valid

    native = parts == {_BIDIRECTIONAL} or (parts - sliding == {_CAUSAL} and len(sliding) <= 1)
    # A window counts positions, holes included; heddle removes the holes, so the two agree on contiguous tokens only.
    if native and not (sliding and valid is not None and not _contiguous(valid)):
        return valid
    kwargs["allow_is_causal_skip"] = False
    return masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that masking_utils.and_masks joined."""
    if getattr(mask_function, "__code__", None) is _AND_CODE:
        for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]:
            yield from _parts(part)
    else:
        yield mask_function


def _contiguous(valid: torch.Tensor) -> bool:
    """Whether each row's real tokens are neighbours."""
    starts = valid & ~F.pad(valid, (1, 0))[:, :-1]
    return bool((starts.sum(1) <= 1).all())
