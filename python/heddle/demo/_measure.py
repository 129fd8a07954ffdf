"""What the demo measures, and how.

Every figure is of the whole model on one text, with the weights in float32. On a GPU heddle computes attention in
float16, and keeps keys and values in it where no other format is asked for; times there are those of the GPU.

loss        mean negative log-likelihood of each token after the first, from a prefill whose attention is the variant's
difference  of the loss against heddle dense, with the standard error of the paired differences
error       ||o - o_dense|| / ||o_dense|| of a layer's attention output, both from the q, k and v of the dense run, so
            that errors do not compound from layer to layer
KV bytes    what the cache keeps for a token, all layers: K, V, scales and value norms
prefill ms  the forward pass over all tokens, cache writes included, without the logits; the best of the repeats
decode ms   the last tokens again, one at a time, over the cached context, logits included; the median
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import heddle
import heddle.hf
from heddle import _core, _record
from heddle.demo import _inputs
from heddle.demo._show import Terminal
from heddle.demo._variants import PRECISION, Variant

# Rows of the text whose logits are held at once.
_LOGIT_ROWS = 256
# The model is asked about at most this many tokens of the text.
_EXCERPT_TOKENS = 1024


def measure(
    args: argparse.Namespace, variants: list[Variant], show: Terminal, command: str, device: str
) -> dict[str, Any]:
    """All measurements of the demo, as plain data (see to_json). `command` is recorded with them.

    device: "cpu" or "cuda".
    """
    started = time.perf_counter()
    others = _OthersShare()
    name, path = _inputs.find_model(args.model)
    text_name, text = _inputs.read_text(args.text)

    rounds = len(variants) * args.repeats
    # One unit is about a token of prefill.
    work = {
        "load": 15_000.0,
        "errors": 1.0 * args.tokens * (1 + len(variants) / 4),
        "prefill": float(args.tokens),
        "loss": args.tokens / 2,
        "decode": 40.0 * args.decode_tokens,
        "generate": _EXCERPT_TOKENS + 40.0 * args.generate,
    }
    total = (
        work["load"]
        + work["errors"]
        + rounds * (work["prefill"] + work["decode"])
        + len(variants) * (work["loss"] + work["generate"])
    )
    with show.working(total) as progress:
        with progress.step(f"loading {name}", work["load"]):
            tokenizer, model = _inputs.load_model(path)
            model = model.to(device)
        ids = _inputs.tokenize(tokenizer, text, args.tokens, model.config.max_position_embeddings).to(device)
        bench = _Bench(model, ids, args.decode_tokens)

        with progress.step("attention errors, layer by layer", work["errors"]) as tick:
            errors = bench.attention_errors(variants, tick)

        records: dict[str, dict[str, Any]] = {variant.name: {} for variant in variants}
        # Rounds take turns, so that a slow moment of the machine does not fall on one variant alone.
        for repeats in range(1, args.repeats + 1):
            begun = time.perf_counter()
            for number, variant in enumerate(variants, 1):
                record = records[variant.name]
                position = f"{variant.label} ({number} of {len(variants)})"
                with progress.step(f"prefill · {position}", work["prefill"]) as tick:
                    hidden, cache = bench.prefill(variant, record, tick)
                if "nll" not in record:
                    with progress.step(f"loss · {position}", work["loss"]) as tick:
                        record["nll"] = bench.losses(hidden, tick)
                with progress.step(f"decode · {position}", work["decode"]) as tick:
                    bench.decode(variant, cache, record, tick)
                del hidden, cache
            ended = time.perf_counter()
            if ended - started + (ended - begun) > args.budget:
                progress.skip((args.repeats - repeats) * len(variants) * (work["prefill"] + work["decode"]))
                break

        prompt = _inputs.chat_prompt(tokenizer, ids, args.question, min(args.tokens, _EXCERPT_TOKENS)).to(device)
        answers = {}
        for variant in variants:
            with progress.step(f"answering · {variant.label}", work["generate"]):
                answers[variant.name] = bench.generate(variant, prompt, args.generate)

    return {
        "schema": 1,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": time.perf_counter() - started,
        "machine": {
            **machine(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "others_share": others.share(),
        },
        "versions": versions(),
        "model": {**_describe_model(name, path, model), "attention": PRECISION[device]},
        "text": {
            "name": text_name,
            "tokens": args.tokens,
            "sha256": _inputs.digest(ids),
            "begins": tokenizer.decode(ids[0, :60]),
        },
        "options": {
            "decode_tokens": args.decode_tokens,
            "repeats": repeats,
            "generate": args.generate,
            "question": args.question,
            "prompt_tokens": prompt.shape[1],
        },
        "variants": [
            _summary(variant, records, errors[variant.name], answers, tokenizer, args) for variant in variants
        ],
    }


class _Stopwatch:
    """Seconds from start() to stop(), and those of spans in between; of the GPU's own clock where one works."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._begin: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._gpu else end - begin

    def start(self) -> None:
        self._spans.clear()
        self._begin = self._mark()

    def stop(self) -> tuple[float, float]:
        """The seconds since start(), and those within spans."""
        end = self._mark()
        if self._gpu:
            torch.cuda.synchronize()
        return self._between(self._begin, end), sum(self._between(*span) for span in self._spans)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of it a span."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._mark()
            result = function(*args, **kwargs)
            self._spans.append((begin, self._mark()))
            return result

        return timed


class _Bench:
    """The model, the text and the stopwatch."""

    def __init__(self, model: Any, ids: torch.Tensor, decode_tokens: int) -> None:
        self.model = model
        self.ids = ids
        self.decode_tokens = decode_tokens
        self.layers = model.config.num_hidden_layers
        self.watch = _Stopwatch(ids.device)  # spans: attention and cache updates
        self.dtype = getattr(torch, PRECISION[ids.device.type])
        self.dense_format = f"fp{torch.finfo(self.dtype).bits}"
        self.tick: Callable[[float], None] = lambda part: None

        self.heddle = heddle.hf.HeddleAttention(heddle.hf.HeddleConfig(dtype=self.dtype))
        self._register("heddle-demo-sdpa", self._timed(sdpa_attention_forward), sdpa_mask)
        self._register("heddle-demo", self._timed(self.heddle), heddle.hf.heddle_mask)

    @staticmethod
    def _register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        timed = self.watch.timed(function)

        def ticking(*args: Any, **kwargs: Any) -> Any:
            result = timed(*args, **kwargs)
            self.tick(1 / self.layers)
            return result

        return ticking

    @contextlib.contextmanager
    def _running(self, variant: Variant, tick: Callable[[float], None]) -> Iterator[None]:
        """Within the block the model's attention is the variant's."""
        self.model.set_attn_implementation("heddle-demo" if variant.uses_heddle else "heddle-demo-sdpa")
        self.tick = tick
        with torch.inference_mode(), heddle.hf.options(selection=variant.make_selection(), kv_format=variant.kv_format):
            yield

    def _new_cache(self, variant: Variant, length: int) -> Any:
        if variant.uses_heddle:
            return heddle.hf.HeddleCache(length, format=variant.kv_format or self.dense_format)
        cache = DynamicCache(config=self.model.config)
        cache.update = self.watch.timed(cache.update)
        return cache

    def attention_errors(self, variants: list[Variant], tick: Callable[[float], None]) -> dict[str, list[float]]:
        """The relative error of each variant's attention output in each layer, on the dense run's q, k and v."""
        errors: dict[str, list[float]] = {variant.name: [] for variant in variants}

        def observe(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            exact, _ = self.heddle(*args, **kwargs)
            norm = torch.linalg.vector_norm(exact)
            for variant in variants:
                attention = self.heddle if variant.uses_heddle else sdpa_attention_forward
                with heddle.hf.options(selection=variant.make_selection(), kv_format=variant.kv_format):
                    out, _ = attention(*args, **kwargs)
                errors[variant.name].append((torch.linalg.vector_norm(out - exact) / norm).item())
            tick(1 / self.layers)
            return exact, None

        # Plain causal attention: both implementations do it without a mask.
        self._register("heddle-demo-observe", observe, heddle.hf.heddle_mask)
        self.model.set_attn_implementation("heddle-demo-observe")
        with torch.inference_mode():
            self.model.base_model(self.ids, use_cache=False)
        return errors

    def prefill(
        self, variant: Variant, record: dict[str, Any], tick: Callable[[float], None]
    ) -> tuple[torch.Tensor, Any]:
        """One forward pass over the text: the last hidden states [1, tokens, hidden] and the filled cache."""
        cache = self._new_cache(variant, self.ids.shape[1])
        with self._running(variant, tick):
            self.watch.start()
            hidden = self.model.base_model(self.ids, past_key_values=cache, use_cache=True).last_hidden_state
            record.setdefault("prefill", []).append(self.watch.stop())
        if variant.uses_heddle:
            record["kv_bytes"] = cache.bytes_per_token
        else:
            stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            record["kv_bytes"] = stored / self.ids.shape[1]
        return hidden, cache

    def losses(self, hidden: torch.Tensor, tick: Callable[[float], None]) -> np.ndarray:
        """Negative log-likelihood of every token but the first, float64 [tokens - 1]; logits in chunks of rows."""
        states, targets = hidden[0, :-1], self.ids[0, 1:]
        nll = []
        with torch.inference_mode():
            for rows, target in zip(states.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
                logits = self.model.get_output_embeddings()(rows)
                nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
                tick(len(rows) / len(states))
        return torch.cat(nll).double().cpu().numpy()

    def decode(self, variant: Variant, cache: Any, record: dict[str, Any], tick: Callable[[float], None]) -> None:
        """The last tokens of the text again, one at a time, over the cache of all that is before them."""
        steps = self.decode_tokens
        cache.crop(-steps)
        nll, times = [], record.setdefault("decode", [])
        with self._running(variant, lambda part: tick(part / steps)):
            for position in range(self.ids.shape[1] - steps, self.ids.shape[1]):
                self.watch.start()
                token = self.ids[:, position : position + 1]
                hidden = self.model.base_model(token, past_key_values=cache, use_cache=True).last_hidden_state
                logits = self.model.get_output_embeddings()(hidden[0])
                times.append(self.watch.stop())
                if position + 1 < self.ids.shape[1]:
                    target = self.ids[0, position + 1 : position + 2]
                    nll.append(torch.nn.functional.cross_entropy(logits, target).item())
        record["decode_nll"] = nll
        record["saturated"] = cache.saturated if variant.uses_heddle else 0

    def generate(self, variant: Variant, prompt: torch.Tensor, length: int) -> list[int]:
        """`length` tokens after the prompt, each the likeliest."""
        cache = self._new_cache(variant, prompt.shape[1] + length)
        with self._running(variant, lambda part: None):
            tokens = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
            )
        return tokens[0, prompt.shape[1] :].tolist()


def _summary(
    variant: Variant,
    records: dict[str, dict[str, Any]],
    errors: list[float],
    answers: dict[str, list[int]],
    tokenizer: Any,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One variant's measurements as plain data."""
    record, dense = records[variant.name], records["dense"]
    nll = record["nll"]
    difference = nll - dense["nll"]
    read = variant.keys_read(args.tokens)
    prefill, prefill_attention = min(record["prefill"])
    steps = record["decode"]
    bins = np.array_split(np.arange(len(nll)), min(16, len(nll)))
    answer, expected = answers[variant.name], answers["sdpa"]
    same = next((i for i, pair in enumerate(zip(answer, expected, strict=True)) if pair[0] != pair[1]), len(answer))
    text = tokenizer.decode(answer, clean_up_tokenization_spaces=False)
    # Less the beginning of a character whose end is in the next token.
    kept = tokenizer.decode(answer[:same], clean_up_tokenization_spaces=False).rstrip("\ufffd")
    decoded = min(len(record["decode_nll"]), len(nll))
    return {
        "name": variant.name,
        "label": variant.label,
        "detail": variant.detail,
        "loss": float(nll.mean()),
        "loss_difference": float(difference.mean()),
        "loss_difference_se": float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(nll) > 1 else 0.0,
        "loss_difference_by_position": [
            {"token": int(where[len(where) // 2]) + 1, "difference": float(difference[where].mean())} for where in bins
        ],
        "attention_error": {
            "mean": float(np.mean(errors)),
            "worst": max(errors),
            "worst_layer": int(np.argmax(errors)),
            "by_layer": errors,
        },
        "keys_read": float(read.sum() / (np.arange(args.tokens) + 1).sum()),
        "kv_bytes_per_token": record["kv_bytes"],
        "kv_bytes_read_per_step": record["kv_bytes"] * int(read[-1]),
        "kv_values_saturated": record["saturated"],
        "prefill_ms": 1e3 * prefill,
        "prefill_attention_ms": 1e3 * prefill_attention,
        "prefill_ms_runs": [1e3 * total for total, _ in record["prefill"]],
        "decode_ms": 1e3 * statistics.median(total for total, _ in steps),
        "decode_attention_ms": 1e3 * statistics.median(attention for _, attention in steps),
        # The same predictions by decode over the cache and by prefill.
        "decode_loss": float(np.mean(record["decode_nll"])) if decoded else None,
        "decode_loss_in_prefill": float(nll[-decoded:].mean()) if decoded else None,
        "answer": text,
        # The part that agrees with SDPA's, and the rest.
        "answer_kept": kept,
        "answer_rest": text[len(kept) :],
        "answer_tokens": answer,
        "answer_same_tokens": same,
    }


def machine() -> dict[str, Any]:
    """The processor, its share of cores, the memory and the operating system."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "isa": heddle.host_isa(),
        "heddle_threads": heddle.num_threads(),
        "torch_threads": torch.get_num_threads(),
    }


class _OthersShare:
    """What other processes take of the processor cores, from when it is made: their work makes the times longer."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: the wall clock, this process on all cores, everybody on the cores that this process may use."""
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        try:
            lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        except OSError:
            return None
        # user nice system idle iowait irq softirq steal ...
        busy = sum(sum(map(int, words[1:4] + words[6:9])) for words in lines if words and words[0] in allowed)
        return time.perf_counter(), time.process_time(), busy / os.sysconf("SC_CLK_TCK")

    def share(self) -> float | None:
        """0 to 1; None where the system does not tell."""
        end = self._now()
        if self._start is None or end is None:
            return None
        wall, own, busy = (b - a for a, b in zip(self._start, end, strict=True))
        return min(max((busy - own) / (wall * len(os.sched_getaffinity(0))), 0.0), 1.0)


def versions() -> dict[str, str | None]:
    """Versions of what took part; the source revision if this runs from a checkout."""
    found: dict[str, str | None] = {"heddle": heddle.__version__, "compiler": _core.compiler}
    found["python"] = platform.python_version()
    for package in ("numpy", "torch", "transformers"):
        found[package] = importlib.metadata.version(package)
    source = _record.revision()
    found["revision"] = source and source["commit"][:12] + "-dirty" * source["dirty"]
    return found


def _describe_model(name: str, path: Path, model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "name": name,
        "file": path.name,
        "parameters": model.num_parameters(),
        "dtype": "float32",
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def to_json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1) + "\n"
