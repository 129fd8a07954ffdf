"""`heddle trace record`: a language model decodes a text, and every layer's selection is written down."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import heddle
import heddle.hf
from heddle.demo import _inputs
from heddle.demo._show import Terminal
from heddle.trace._file import Recorder

_NAME = "heddle-trace"
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}


class _Selecting:
    """The model's attention: dense until decoding begins, then over the selected tokens, which are recorded."""

    def __init__(self, recorder: Recorder | None, dense_layers: int, options: dict[str, Any]) -> None:
        self.recorder, self.dense_layers, self.options = recorder, dense_layers, options
        self.attention = heddle.hf.HeddleAttention()
        self.step: int | None = None  # None: prefill

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if self.step is None or module.layer_idx < self.dense_layers:
            return self.attention(module, query, key, value, *rest, **kwargs)
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        selection = heddle.select.topk(q, k, v, scale=kwargs.get("scaling"), **self.options)
        self.recorder.record(self.step, module.layer_idx, selection.indices[0], key.shape[2])
        with heddle.hf.options(selection=selection):
            return self.attention(module, query, key, value, *rest, **kwargs)


def record(args: argparse.Namespace, show: Terminal | None = None) -> Path:
    """Records what `args`, the options of `heddle trace record`, ask for; returns the file."""
    show = show or Terminal()
    name, path = _inputs.find_model(args.model)
    text_name, text = _inputs.read_text(args.text)
    work = {"load": 15_000.0, "prefill": float(args.tokens), "decode": 60.0 * args.steps}
    with show.working(sum(work.values())) as progress:
        with progress.step(f"loading {name}", work["load"]):
            tokenizer, model = _inputs.load_model(path)
        config = model.config
        ids = _inputs.tokenize(tokenizer, text, args.tokens + args.steps, config.max_position_embeddings)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = config.num_key_value_heads
        attention = _Selecting(
            None,
            args.dense_layers,
            {"budget": args.budget, "metric": args.metric, "n_sink": args.sink, "n_recent": args.recent},
        )
        AttentionInterface.register(_NAME, attention)
        AttentionMaskInterface.register(_NAME, heddle.hf.heddle_mask)
        model.set_attn_implementation(_NAME)
        cache = DynamicCache(config=config)
        with torch.inference_mode():
            with progress.step(f"prefill of {args.tokens} tokens", work["prefill"]):
                model.base_model(ids[:, : args.tokens], past_key_values=cache, use_cache=True)
            with (
                Recorder(
                    args.out,
                    layers=range(args.dense_layers, config.num_hidden_layers),
                    kv_heads=kv_heads,
                    budget=args.budget,
                    entry_bytes=2 * head_dim * _ELEMENT_BYTES[args.format],
                    description={
                        "model": name,
                        "text": text_name,
                        "sha256": _inputs.digest(ids),
                        "tokens": args.tokens,
                        "selection": {"metric": args.metric, "n_sink": args.sink, "n_recent": args.recent},
                        "format": args.format,
                        "operations": 4 * head_dim * (config.num_attention_heads // kv_heads),
                        "weight_bytes": 2 * model.num_parameters(),
                        "heddle": heddle.__version__,
                    },
                ) as recorder,
                progress.step(f"decoding {args.steps} tokens", work["decode"]) as tick,
            ):
                attention.recorder = recorder
                for step in range(args.steps):
                    attention.step = step
                    at = args.tokens + step
                    model.base_model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
                    tick(1 / args.steps)
    return recorder.path
