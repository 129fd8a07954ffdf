"""The model of the study: it runs with whatever attention a section hands it, over caches that the section keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import heddle

_NAME = "heddle-study"
# Rows whose logits are held at once.
_LOGIT_ROWS = 256

# attend(layer, q [1, S, Hq, D], k [1, S, Hkv, D], v [1, S, Hkv, D]) -> [1, S, Hq, D]; k and v of the new tokens alone.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Bench:
    """A model and a text."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        config = model.config
        self.model, self.ids = model, ids
        self.layers = config.num_hidden_layers
        self.q_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.q_heads
        self.attend: Attend | None = None
        AttentionInterface.register(_NAME, self._attention)
        # Causality is the section's business, so no mask is ever made.
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        # So that all calls may leave the scale at its default.
        scale = kwargs.get("scaling")
        if scale is not None and not math.isclose(scale, self.head_dim**-0.5, rel_tol=1e-6):
            q = q * (scale * self.head_dim**0.5)
        return self.attend(module.layer_idx, q, k, v), None

    def run(self, first: int, begin: int, end: int, attend: Attend) -> torch.Tensor:
        """Feeds the tokens begin..end of the passage that starts at token `first` of the text, all at once: the last
        hidden states [end - begin, hidden]."""
        self.model.set_attn_implementation(_NAME)
        self.attend = attend
        tokens = self.ids[None, first + begin : first + end]
        positions = torch.arange(begin, end)[None]
        with torch.inference_mode():
            return self.model.base_model(tokens, position_ids=positions, use_cache=False).last_hidden_state[0]

    def losses(self, hidden: torch.Tensor, first: int, begin: int, every: int = 1) -> np.ndarray:
        """Negative log-likelihood, float64, of the token after each of those that gave these hidden states, or after
        every so manyth of them."""
        targets = self.ids[first + begin + 1 : first + begin + 1 + len(hidden)][::every]
        hidden = hidden[::every]
        nll = []
        with torch.inference_mode():
            for rows, target in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
                logits = self.model.get_output_embeddings()(rows)
                nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        return torch.cat(nll).double().numpy()


class Caches:
    """One paged float32 cache a layer, which forgets what comes after the tokens that a pass begins at."""

    def __init__(self, bench: Bench, length: int, page_size: int = 16) -> None:
        pages = -(-length // page_size)
        sizes = (pages, page_size, bench.kv_heads, bench.head_dim)
        self.layers = [heddle.KVCache(*sizes, format="fp32", page_bounds=True) for _ in range(bench.layers)]
        self.table = torch.arange(pages, dtype=torch.int32)[None]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, start: int) -> dict[str, Any]:
        """Writes the tokens start, start + 1, ...; returns what a call over the cache takes: block_table, seq_lens."""
        lens = self.layers[layer].append(k, v, self.table, torch.tensor([start], dtype=torch.int32))
        return {"block_table": self.table, "seq_lens": lens}


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """||out - exact|| / ||exact||"""
    return float(torch.linalg.vector_norm(out - exact) / torch.linalg.vector_norm(exact))


def paired(difference: np.ndarray) -> dict[str, float]:
    """Mean and standard error of paired differences."""
    spread = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return {"mean": float(difference.mean()), "se": float(spread)}
