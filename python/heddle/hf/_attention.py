"""The attention function that transformers' models call, and how it is configured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import heddle
from heddle._errors import HeddleNotImplementedError, HeddleTypeError, HeddleValueError, refuse
from heddle.hf._cache import PagedStates, chunk_attention, packed_attention
from heddle.hf._mask import heddle_mask

LayerSelection = Callable[[int, int], "heddle.Selection | None"]
LayerSampling = Callable[[int, int], "heddle.Sampling | None"]


@dataclasses.dataclass(frozen=True)
class HeddleConfig:
    """What heddle does when a model calls it.

    Attributes:
        selection: which keys are read: a heddle.Selection for every layer, or a function of (layer_idx, number of
            keys) that returns one, or None for dense attention.
        kv_format: quantize q, k and v on the way: a `format` of heddle.attention. It applies wherever contiguous keys
            are read: always without a HeddleCache, in the first prefill with one. Later steps read the cache, in its
            format. On a GPU not in padded batches.
        partition: tokens that share a scale, for kv_format "int8-a".
        smooth: K smoothing, with a kv_format; not on a GPU.
        backend: as for heddle.attention.
        sampling: draw values instead of reading them all: a heddle.Sampling, or a function of (layer_idx, number of
            keys) that returns one or None; it should give each layer and length an offset of its own. It applies
            wherever a HeddleCache is read, so not to the first prefill, and not without one. Requests of a padded batch
            draw alike.
        dtype: what attention is computed in; q, k, v are converted to it, and the output back, while a HeddleCache
            stores keys and values as they come. None: the model's own. GPUs have float16 and bfloat16.
    """

    selection: heddle.Selection | LayerSelection | None = None
    kv_format: str | None = None
    partition: int = 1
    smooth: bool = False
    backend: str | None = None
    sampling: heddle.Sampling | LayerSampling | None = None
    dtype: torch.dtype | None = None


_overrides: ContextVar[dict[str, Any]] = ContextVar("heddle_hf_options", default={})  # noqa: B039 (never mutated)


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Within the block, every registered heddle attention runs with these fields of HeddleConfig changed.

    Blocks nest, and are local to a thread or task. An unknown field raises HeddleTypeError.
    """
    known = {field.name for field in dataclasses.fields(HeddleConfig)}
    for name in changes:
        if name not in known:
            raise refuse(HeddleTypeError, "value", name, f"no such option; allowed are {', '.join(sorted(known))}")
    token = _overrides.set({**_overrides.get(), **changes})
    try:
        yield
    finally:
        _overrides.reset(token)


def register(
    name: str = "heddle",
    *,
    selection: heddle.Selection | LayerSelection | None = None,
    kv_format: str | None = None,
    partition: int = 1,
    smooth: bool = False,
    backend: str | None = None,
    sampling: heddle.Sampling | LayerSampling | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Makes heddle an attention implementation of transformers: `attn_implementation=name`.

    The arguments are the fields of HeddleConfig, the defaults of this name; several names may be registered, each with
    its own. Registering a name again changes it for the models that use it.

    Raises HeddleValueError for a name that belongs to another implementation.
    """
    if name == "eager" or not isinstance(AttentionInterface().get(name, HeddleAttention()), HeddleAttention):
        raise refuse(HeddleValueError, "value", "name", f"{name!r} is another implementation of attention")
    config = HeddleConfig(selection, kv_format, partition, smooth, backend, sampling, dtype)
    AttentionInterface.register(name, HeddleAttention(config))
    AttentionMaskInterface.register(name, heddle_mask)


class HeddleAttention:
    """The function that transformers' attention modules call: see register()."""

    def __init__(self, config: HeddleConfig | None = None) -> None:
        self.config = config or HeddleConfig()

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        is_causal: bool | None = None,
        position_bias: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of one layer.

        Args:
            module: the attention module; its layer_idx and is_causal are read.
            query: [B, Hq, Sq, D], key: [B, Hkv, Sk, D], value: [B, Hkv, Sk, Dv]: any strides, contiguous last axis.
            attention_mask: what heddle_mask returned, or a caller's own mask [B or 1, H or 1, Sq, Sk]: bool, or float
                with 0 where a key is read and its dtype's minimum or -inf where not.
            s_aux: a sink logit per query head.
            The other keywords are transformers' names for what heddle.attention takes.

        Returns:
            (out [B, Sq, Hq, Dv], None): attention weights are never made.

        Raises:
            HeddleNotImplementedError: dropout, position biases, transformers' paged cache, additive masks, gradients.
        """
        for argument, given in (("dropout", dropout), ("position_bias", position_bias), ("cache", cache)):
            if given is not None and not (argument == "dropout" and given == 0.0):
                raise _unsupported(argument, "heddle's attention has no such feature")
        config = dataclasses.replace(self.config, **_overrides.get())
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        selection = config.selection
        if callable(selection):
            selection = selection(getattr(module, "layer_idx", 0), key.shape[2])
        arguments = {
            "causal": causal,
            "window": (sliding_window - 1, 0) if sliding_window is not None and causal else None,
            "softcap": softcap or 0.0,
            "scale": scaling,
            "sinks": s_aux.detach().float() if s_aux is not None else None,
            "selection": selection,
            "backend": config.backend,
        }
        storage = {"format": config.kv_format, "partition": config.partition, "smooth": config.smooth}

        model_dtype = query.dtype
        query = query.transpose(1, 2).to(config.dtype or model_dtype)
        if attention_mask is not None and attention_mask.dim() == 4:
            arguments |= {"causal": False, "window": None, "selection": _element_mask(attention_mask, selection)}
            attention_mask = None
            if isinstance(key, PagedStates):
                raise _unsupported("attention_mask", "an element mask with a HeddleCache; a DynamicCache allows it")
        if isinstance(key, PagedStates):
            sampling = config.sampling
            if callable(sampling):
                sampling = sampling(getattr(module, "layer_idx", 0), key.shape[2])
            out = key.layer.attend(query, attention_mask, arguments, storage, sampling)
            return out.to(model_dtype), None
        if config.sampling is not None:
            raise _unsupported("sampling", "values are drawn from a HeddleCache alone")
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if attention_mask is not None:
            out = packed_attention(query, key, value, attention_mask, **arguments, **storage)
        else:
            out = chunk_attention(query, key, value, **arguments, **storage)
        return out.to(model_dtype), None


def _unsupported(argument: str, message: str) -> heddle.HeddleError:
    return refuse(HeddleNotImplementedError, "unsupported", argument, message)


def _element_mask(mask: torch.Tensor, selection: heddle.Selection | None) -> heddle.Selection:
    """A 4-D mask as a block mask of 1 x 1 blocks."""
    if selection is not None:
        raise _unsupported("selection", "a selection and a model's element mask at once")
    if mask.dtype is not torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min
        if not ((mask == 0) | hidden).all():
            raise _unsupported(
                "attention_mask",
                "an additive bias; allowed are bool masks and floats that are 0 or the dtype's minimum",
            )
        mask = ~hidden
    return heddle.select.block_mask(mask.contiguous(), block=(1, 1))
