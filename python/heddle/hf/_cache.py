"""transformers' cache interface over paged heddle.KVCache pools, one a layer."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

import heddle
from heddle._errors import HeddleNotImplementedError, HeddleTypeError, HeddleValueError, refuse

# Of a cache that is made for one call, or a multiple of it; see chunk_attention.
_PAGE_SIZE = 64


def _lacks_formats(q: torch.Tensor) -> bool:
    """Whether heddle.attention has no 8-bit formats where q is, while decode has: on a GPU."""
    return q.is_cuda


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    format: str | None,
    partition: int,
    smooth: bool,
    **arguments: Any,
) -> torch.Tensor:
    """heddle.attention of q [B, Sq, Hq, D] over k [B, Sk, Hkv, D] and v [B, Sk, Hkv, Dv], which become q's dtype.

    Where it lacks the `format`, a cache of it is filled for this call and read. Its scales are those of all tokens, as
    they are in heddle.attention.
    """
    storage = {"format": format, "partition": partition, "smooth": smooth}
    if format is None or not _lacks_formats(q):
        return heddle.attention(q, k.to(q.dtype), v.to(q.dtype), **arguments, **storage)
    if smooth:
        raise refuse(HeddleNotImplementedError, "unsupported", "smooth", "smoothed keys on a GPU; allowed is False")
    layer = HeddleCacheLayer(k.shape[1], format, math.lcm(_PAGE_SIZE, partition), partition, feature_major=False)
    layer.update(k.transpose(1, 2), v.transpose(1, 2))
    return layer.attend(q, None, arguments, storage)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor, *, causal: bool, **arguments: Any
) -> torch.Tensor:
    """heddle.attention on the real tokens of a padded batch, as one packed batch.

    q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]; valid: bool [B, Sk]. With `causal` the queries are the last
    Sq of the Sk tokens, so real queries stay aligned with real keys; the rows of padding queries are 0.
    """
    if arguments["format"] is not None and _lacks_formats(q):
        message = f"{arguments['format']} in a padded batch on a GPU; allowed is None, or a batch without padding"
        raise refuse(HeddleNotImplementedError, "unsupported", "kv_format", message)
    k, v = k.to(q.dtype), v.to(q.dtype)
    q_valid = valid[:, -q.shape[1] :] if causal else valid.new_ones(q.shape[:2])
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    out[q_valid] = heddle.attention(
        q[q_valid],
        k[valid],
        v[valid],
        causal=causal,
        cu_seqlens_q=_cu_seqlens(q_valid),
        cu_seqlens_k=_cu_seqlens(valid),
        **arguments,
    )
    return out


def _cu_seqlens(valid: torch.Tensor) -> torch.Tensor:
    return F.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)


class PagedStates(torch.Tensor):
    """Stands for the keys or values that a HeddleCacheLayer holds: their shape and dtype, no memory.

    Only heddle's attention function can read them; every torch operation on them is refused, so that a model that runs
    another attention implementation cannot go wrong silently.
    """

    layer: HeddleCacheLayer

    @staticmethod
    def __new__(cls, layer: HeddleCacheLayer, fresh: torch.Tensor, length: int) -> PagedStates:
        shape = (*fresh.shape[:2], length, fresh.shape[3])
        states = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=fresh.dtype, device=fresh.device)
        states.layer = layer
        return states

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise refuse(
            HeddleTypeError,
            "unsupported",
            "past_key_values",
            f"a HeddleCache is read by heddle's attention alone, not by {func}; load the model with "
            'attn_implementation="heddle"',
        )

    def __repr__(self) -> str:
        return f"PagedStates(shape={tuple(self.shape)}, dtype={self.dtype})"


class HeddleCacheLayer(CacheLayerMixin):
    """The keys and values of one layer, in a heddle.KVCache that is made when the first tokens come.

    The cache holds real tokens only. Padding counts towards `length`, which is what transformers sees, and not towards
    `seq_lens`, which is what heddle reads.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, max_length: int, format: str, page_size: int, partition: int, feature_major: bool) -> None:
        super().__init__()
        self.max_length = max_length
        self.format = format
        self.page_size = page_size
        self.partition = partition
        self.feature_major = feature_major
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens and the calibrated scales."""
        self.is_initialized = False
        self.kv: heddle.KVCache | None = None
        self.length = 0
        self.valid: torch.Tensor | None = None  # bool [B, length]: real tokens
        self.padded = False  # whether some are not
        self.fresh: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads = key_states.shape[:2]
        pages = -(-self.max_length // self.page_size)
        self.kv = heddle.KVCache(
            batch * pages,
            self.page_size,
            heads,
            key_states.shape[3],
            head_dim_v=value_states.shape[3],
            format=self.format,
            device=str(key_states.device),
            partition=self.partition,
            feature_major=self.feature_major,
        )
        self.block_table = torch.arange(batch * pages, dtype=torch.int32, device=key_states.device).view(batch, pages)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=key_states.device)
        self.valid = torch.ones(batch, 0, dtype=torch.bool, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PagedStates, PagedStates]:
        """Takes the new tokens' keys and values, [B, Hkv, S, D]; attend(), which knows the padding, stores them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.length + key_states.shape[2]
        if length > self.max_length:
            raise refuse(
                HeddleValueError,
                "capacity",
                "max_length",
                f"the HeddleCache holds {self.max_length} tokens, {length} came",
            )
        self.fresh = key_states, value_states
        return PagedStates(self, key_states, length), PagedStates(self, value_states, length)

    def attend(
        self,
        q: torch.Tensor,
        valid: torch.Tensor | None,
        arguments: dict[str, Any],
        storage: dict[str, Any],
        sampling: heddle.Sampling | None = None,
    ) -> torch.Tensor:
        """Stores the tokens that update() took and returns the attention of q [B, Sq, Hq, D] over all tokens.

        valid: bool [B, tokens], or None if there is no padding. The first chunk reads its keys and values as they came,
        quantized as `storage` says; later ones read the cache, as `sampling` says.
        """
        if self.fresh is None:
            raise refuse(
                HeddleValueError, "value", "past_key_values", "attention ran twice on one update of a HeddleCache"
            )
        k, v = (states.transpose(1, 2) for states in self.fresh)
        new = k.shape[1]
        unpadded = valid is None and not self.padded
        if valid is None:
            valid = self.valid.new_ones(len(self.seq_lens), self.length + new)
        new_valid = valid[:, self.length :]
        padded = False
        if not unpadded:  # looking at masks waits for a GPU
            if not torch.equal(valid[:, : self.length], self.valid):
                raise refuse(
                    HeddleValueError,
                    "value",
                    "attention_mask",
                    "other cached tokens are marked as padding than when they came",
                )
            padded = not new_valid.all()
        self.padded = self.padded or padded
        first = self.length == 0

        kept = (k[new_valid], v[new_valid]) if padded else (k, v)
        if first and not self.kv.kv_calibrated:
            self.kv.calibrate(*kept, q[new_valid[:, -q.shape[1] :]] if padded else q)
        self.seq_lens = self.kv.append(
            *kept, self.block_table, self.seq_lens, cu_seqlens=_cu_seqlens(new_valid) if padded else None
        )
        self.length += new
        self.valid = valid
        self.fresh = None

        if first:
            if padded:
                return packed_attention(q, k, v, valid, **arguments, **storage)
            # The cache holds these tokens alone: where it is of the format that attention lacks, it is read.
            here = {"format": self.format, "partition": self.partition, "smooth": False}
            if storage != here or not _lacks_formats(q):
                return chunk_attention(q, k, v, **arguments, **storage)
        arguments = {**arguments, "sampling": sampling}
        if padded:
            out = q.new_zeros(*q.shape[:3], v.shape[-1])
            for b, rows in enumerate(new_valid):
                if rows.any():
                    request = slice(b, b + 1)
                    out[b, rows] = heddle.decode(
                        q[request, rows], self.kv, self.block_table[request], self.seq_lens[request], **arguments
                    )[0]
            return out
        return heddle.decode(q, self.kv, self.block_table, self.seq_lens, **arguments)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens (transformers counts them below 0)."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise refuse(
                HeddleValueError, "value", "tokens_to_remove", f"{tokens_to_remove}; allowed are {-self.length} to 0"
            )
        if self.is_initialized and tokens_to_remove:
            self.length += tokens_to_remove
            self.valid = self.valid[:, : self.length]
            self.seq_lens = self.valid.sum(1).to(torch.int32)

    def _unsupported(self, *args: Any, **kwargs: Any) -> None:
        raise refuse(
            HeddleNotImplementedError,
            "unsupported",
            "past_key_values",
            "a HeddleCache cannot be reordered, repeated or offloaded; beam search needs a DynamicCache",
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = offload = prefetch = _unsupported


class HeddleCache(Cache):
    """Keys and values in paged heddle.KVCache pools, for `past_key_values` of a model that runs heddle's attention.

    Args:
        max_length: tokens that a request can have, padding included; the pools are of this size.
        format: as for heddle.KVCache: "fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b" or "fp8".
        page_size: tokens of a page.
        partition: tokens that share a scale of K, for "int8-a"; divides page_size.
        feature_major: keep the keys by feature too, for Bernoulli scores (heddle.Sampling).

    Greedy and sampled generation, chunked prefill, left- and right-padded batches and assisted generation work. Beam
    search and offloading raise HeddleNotImplementedError; more than max_length tokens HeddleValueError.
    """

    def __init__(
        self,
        max_length: int,
        *,
        format: str = "fp32",
        page_size: int = 64,
        partition: int = 1,
        feature_major: bool = False,
    ) -> None:
        for name, number in (("max_length", max_length), ("page_size", page_size)):
            if not isinstance(number, int) or number < 1:
                raise refuse(HeddleValueError, "value", name, f"{number!r}; allowed are integers of 1 and above")
        self.max_length = max_length
        self.format = format
        super().__init__(
            layer_class_to_replicate=functools.partial(
                HeddleCacheLayer, max_length, format, page_size, partition, feature_major
            )
        )

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token takes in all layers: K, V, their scales and the value norms. 0 before the first tokens."""
        return sum(layer.kv.bytes_per_token for layer in self.layers if layer.is_initialized)

    @property
    def saturated(self) -> int:
        """Values that a static scale has clamped, in all layers."""
        return sum(layer.kv.saturated for layer in self.layers if layer.is_initialized)
