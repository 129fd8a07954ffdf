"""The indexer itself: a few small heads beside each attention layer, and how a model runs with them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

import heddle
from heddle._errors import HeddleNotImplementedError, HeddleValueError, refuse

KEY_FORMATS = ("fp32", "bf16", "int8", "fp8")


class LayerIndexer(torch.nn.Module):
    """I(t, s) = sum_h w_{t,h} ReLU(q_{t,h} . k_s) of one layer, from what comes into its attention.

    q is `heads` vectors of `dim`, k one normalized vector a token, w a number a head, all linear in the hidden state.
    The first `rope_dim` dimensions of q and k are rotated by the model's own angles, every so many of them: a part of
    the frequencies, from the fastest to the slowest.
    """

    def __init__(self, hidden_size: int, heads: int, dim: int, rope_dim: int) -> None:
        super().__init__()
        self.heads, self.dim, self.rope_dim = heads, dim, rope_dim
        self.query = torch.nn.Linear(hidden_size, heads * dim, bias=False)
        self.key = torch.nn.Linear(hidden_size, dim, bias=False)
        self.key_norm = torch.nn.LayerNorm(dim)
        self.weight = torch.nn.Linear(hidden_size, heads)
        torch.nn.init.ones_(self.weight.bias)

    def forward(
        self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, S, heads, dim], k [B, S, dim] and w [B, S, heads] of hidden states [B, S, hidden]."""
        hidden = hidden.float()
        return self.queries(hidden, rope), self.keys(hidden, rope), self.weights(hidden)

    def queries(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        q = self.query(hidden).unflatten(-1, (self.heads, self.dim))
        return self._rotate(q, None if rope is None else tuple(angle[..., None, :] for angle in rope))

    def keys(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        return self._rotate(self.key_norm(self.key(hidden)), rope)

    def weights(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight(hidden) * (self.heads * self.dim) ** -0.5

    def _rotate(self, x: torch.Tensor, rope: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        if rope is None or self.rope_dim == 0:
            return x
        half = self.rope_dim // 2
        cos, sin = (angle.float()[..., : angle.shape[-1] // 2] for angle in rope)
        chosen = torch.linspace(0, cos.shape[-1] - 1, half).round().long()
        cos, sin = cos[..., chosen], sin[..., chosen]
        a, b, rest = x.split((half, half, self.dim - 2 * half), -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class Indexer:
    """Indexers of a model's layers, as fit_indexer() makes them and load() reads them.

    Attributes:
        layers: the LayerIndexer of each layer that has one, by the layer's number.
        hidden_size, heads, dim, rope_dim: their sizes.
        about: what is known of them: the model, the text's hash, how well each layer learnt.
    """

    def __init__(
        self, hidden_size: int, heads: int, dim: int, rope_dim: int, layers: Mapping[int, LayerIndexer], about: dict
    ) -> None:
        self.hidden_size, self.heads, self.dim, self.rope_dim = hidden_size, heads, dim, rope_dim
        self.layers = dict(layers)
        self.about = about

    def __repr__(self) -> str:
        return f"Indexer({len(self.layers)} layers of {self.heads} heads of {self.dim}, {self.about.get('model')})"

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; it gets its name when it is complete. Raises HeddleValueError without its
        directory."""
        from heddle.dsa._file import save

        save(self, path)

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[Watch]:
        """Within the block the indexer follows the model: see Watch.

        Raises HeddleValueError for a model of another size or without these layers.
        """
        if model.config.hidden_size != self.hidden_size:
            message = f"its hidden size is {model.config.hidden_size}; the indexer was made for {self.hidden_size}"
            raise refuse(HeddleValueError, "value", "model", message)
        modules = attention_modules(model)
        if missing := sorted(set(self.layers) - set(modules)):
            message = f"it has no attention layers {missing}, which the indexer is for"
            raise refuse(HeddleValueError, "value", "model", message)
        watch = Watch(self)
        hooks = [
            modules[layer].register_forward_pre_hook(functools.partial(watch._before, layer), with_kwargs=True)
            for layer in self.layers
        ]
        try:
            yield watch
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def selecting(
        self, model: Any, budget: int | float, *, n_sink: int = 0, n_recent: int = 0, key_format: str = "fp32"
    ) -> Iterator[Watch]:
        """Within the block, each layer that has an indexer attends to the `budget` tokens that it ranks highest.

        Prefill and decode alike, over any cache that heddle.hf reads; one sequence after another, each from its
        beginning. The arguments are those of heddle.select.indexer, and key_format one of KEY_FORMATS: what index
        keys are kept in.

        Raises:
            HeddleValueError: a model that does not run heddle's attention (heddle.hf.register), or as watching().
            HeddleNotImplementedError: padding.
        """
        import heddle.hf

        name = model.config._attn_implementation
        if not isinstance(AttentionInterface().get(name), heddle.hf.HeddleAttention):
            message = f"its attention is {name!r}; allowed are those of heddle.hf.register()"
            raise refuse(HeddleValueError, "value", "model", message)
        with self.watching(model) as watch:

            def select(layer: int, length: int) -> heddle.Selection | None:
                if layer not in self.layers:
                    return None
                options = {"n_sink": n_sink, "n_recent": n_recent, "key_format": key_format}
                return watch.select(layer, length, budget, **options)

            with heddle.hf.options(selection=select):
                yield watch


class Watch:
    """An indexer beside a running model: sees what comes into each layer's attention and keeps the index keys.

    In a layer's attention call select(), or store() where it reads everything.
    """

    def __init__(self, indexer: Indexer) -> None:
        self.indexer = indexer
        self._new: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._keys: dict[int, torch.Tensor] = {}

    def _before(self, layer: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("attention_mask") is not None:
            message = "padding or a mask of its own; an indexer runs on whole sequences"
            raise refuse(HeddleNotImplementedError, "unsupported", "attention_mask", message)
        hidden, rope = attention_inputs(args, kwargs)
        with torch.inference_mode():
            self._new[layer] = self.indexer.layers[layer](hidden, rope)

    def store(self, layer: int, length: int) -> torch.Tensor:
        """Keeps the index keys of the tokens that the layer was given; `length` is the number of tokens that there are
        with them. Returns all index keys, [B, length, dim]. Tokens that came again replace those that were there."""
        _, new, _ = self._new[layer]
        before = length - new.shape[1]
        if before == 0:
            self._keys[layer] = new
            return new
        kept = self._keys.get(layer)
        if kept is None or kept.shape[1] < before or kept.shape[0] != new.shape[0]:
            have = 0 if kept is None else kept.shape[1]
            message = f"the indexer saw {have} of the {before} tokens before these: begin the sequence within the block"
            raise refuse(HeddleValueError, "value", "past_key_values", message)
        self._keys[layer] = torch.cat((kept[:, :before], new), 1)
        return self._keys[layer]

    def select(
        self,
        layer: int,
        length: int,
        budget: int | float,
        *,
        n_sink: int = 0,
        n_recent: int = 0,
        key_format: str = "fp32",
        queries: slice = slice(None),
    ) -> heddle.Selection:
        """heddle.select.indexer for what the layer was given, causal, after store(). `queries` picks some, the last
        ones: causality aligns to the end."""
        keys = self.store(layer, length)[:, :, None]
        q, _, weights = self._new[layer]
        q = q[:, queries]
        if key_format == "bf16":
            q, keys = q.bfloat16(), keys.bfloat16()
        elif key_format in ("int8", "fp8"):
            keys = heddle.quantize(keys, key_format, "token")
        elif key_format != "fp32":
            message = f"{key_format!r} does not exist; allowed are {', '.join(KEY_FORMATS)}"
            raise refuse(HeddleValueError, "value", "key_format", message)
        return heddle.select.indexer(q, keys, weights[:, queries], budget, n_sink=n_sink, n_recent=n_recent)


def attention_modules(model: Any) -> dict[int, torch.nn.Module]:
    """A transformers model's attention modules by layer."""
    return {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")}


def attention_inputs(
    args: tuple, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Hidden states and (cos, sin), if there are any, of an attention module's call."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden, kwargs.get("position_embeddings")
