"""`heddle trace record`: a language model decodes a text, and every layer's selection is written down."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import heddle
import heddle.hf
from heddle._errors import HeddleValueError, refuse
from heddle.demo import _inputs
from heddle.demo._show import Terminal
from heddle.trace._file import Recorder

_NAME = "heddle-trace"
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}


class Decoding:
    """A model that decodes a text: dense until `begin` tokens are read, then over the tokens that each layer selects,
    which are recorded.

    select(layer, q [1, S, Hq, D], k [1, n, Hkv, D], v, scale, prefill) is asked in every call of a layer; what it
    returns counts once decoding has begun.
    """

    def __init__(self, model: Any, select: Callable[..., heddle.Selection], dense_layers: int) -> None:
        self.model, self.select, self.dense_layers = model, select, dense_layers
        self.attention = heddle.hf.HeddleAttention()
        self.recorder: Recorder | None = None
        self.step: int | None = None  # None: prefill
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, heddle.hf.heddle_mask)

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        layer = module.layer_idx
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        selection = self.select(layer, q, k, v, kwargs.get("scaling"), self.step is None)
        if self.step is None or layer < self.dense_layers:
            return self.attention(module, query, key, value, *rest, **kwargs)
        self.recorder.record(self.step, layer, selection.indices[0], key.shape[2])
        with heddle.hf.options(selection=selection):
            return self.attention(module, query, key, value, *rest, **kwargs)

    def read(self, ids: torch.Tensor) -> DynamicCache:
        """Prefill of ids [1, n]."""
        self.model.set_attn_implementation(_NAME)
        self.step = None
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model.base_model(ids, past_key_values=cache, use_cache=True)
        return cache

    def decode(self, ids: torch.Tensor, cache: DynamicCache, recorder: Recorder, tick: Callable[[float], None]) -> None:
        """The tokens ids [1, steps], one at a time, into the recorder."""
        self.recorder = recorder
        with torch.inference_mode():
            for self.step in range(ids.shape[1]):
                self.model.base_model(ids[:, self.step : self.step + 1], past_key_values=cache, use_cache=True)
                tick(1 / ids.shape[1])


def recorder_of(
    model: Any, path: Path, *, budget: int, dense_layers: int, format: str, shared: bool, description: dict[str, Any]
) -> Recorder:
    """A Recorder for a model. `shared`: one list for all KV heads of a layer, so that an entry is a token of all."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lists = 1 if shared else config.num_key_value_heads
    return Recorder(
        path,
        layers=range(dense_layers, config.num_hidden_layers),
        kv_heads=lists,
        budget=budget,
        entry_bytes=2 * head_dim * _ELEMENT_BYTES[format] * (config.num_key_value_heads // lists),
        description={
            **description,
            "format": format,
            "operations": 4 * head_dim * (config.num_attention_heads // lists),
            "weight_bytes": 2 * model.num_parameters(),
            "heddle": heddle.__version__,
        },
    )


def record(args: argparse.Namespace, show: Terminal | None = None) -> Path:
    """Records what `args`, the options of `heddle trace record`, ask for; returns the file."""
    show = show or Terminal()
    name, path = _inputs.find_model(args.model)
    text_name, text = _inputs.read_text(args.text)
    keep = {"n_sink": args.sink, "n_recent": args.recent}
    indexer = None
    if args.method == "indexer":
        from heddle.dsa import load

        indexer = load(args.indexer)
    work = {"load": 15_000.0, "prefill": float(args.tokens), "decode": 60.0 * args.steps}
    with show.working(sum(work.values())) as progress, contextlib.ExitStack() as stack:
        with progress.step(f"loading {name}", work["load"]):
            tokenizer, model = _inputs.load_model(path)
        ids = _inputs.tokenize(tokenizer, text, args.tokens + args.steps, model.config.max_position_embeddings)
        if indexer is None:
            ranked_by = {"metric": args.metric, **keep}
            select = _by_metric(args.budget, ranked_by)
        else:
            ranked_by = {"indexer": indexer.about, **keep}
            select = by_indexer(stack.enter_context(indexer.watching(model)), args.budget, keep)
            if missing := sorted(set(range(args.dense_layers, model.config.num_hidden_layers)) - set(indexer.layers)):
                message = f"{args.indexer} has none for the layers {missing}; see --dense-layers"
                raise refuse(HeddleValueError, "value", "--indexer", message)
        decoding = Decoding(model, select, args.dense_layers)
        with progress.step(f"prefill of {args.tokens} tokens", work["prefill"]):
            cache = decoding.read(ids[:, : args.tokens])
        description = {"model": name, "text": text_name, "sha256": _inputs.digest(ids), "tokens": args.tokens}
        with (
            recorder_of(
                model,
                args.out,
                budget=args.budget,
                dense_layers=args.dense_layers,
                format=args.format,
                shared=indexer is not None,
                description={**description, "selection": ranked_by},
            ) as recorder,
            progress.step(f"decoding {args.steps} tokens", work["decode"]) as tick,
        ):
            decoding.decode(ids[:, args.tokens :], cache, recorder, tick)
    return recorder.path


def _by_metric(budget: int, options: dict[str, Any]) -> Callable[..., heddle.Selection | None]:
    """The tokens that each KV head ranks highest."""

    def select(layer: int, q: Any, k: Any, v: Any, scale: float | None, prefill: bool) -> heddle.Selection | None:
        return None if prefill else heddle.select.topk(q, k, v, budget, scale=scale, **options)

    return select


def by_indexer(watch: Any, budget: int, keep: dict[str, int]) -> Callable[..., heddle.Selection | None]:
    """The tokens that a layer's indexer ranks highest, for all of its KV heads. `watch` is of Indexer.watching()."""

    def select(layer: int, q: Any, k: Any, v: Any, scale: float | None, prefill: bool) -> heddle.Selection | None:
        if layer not in watch.indexer.layers:
            return None
        if prefill:
            watch.store(layer, k.shape[1])
            return None
        return watch.select(layer, k.shape[1], budget, **keep)

    return select
