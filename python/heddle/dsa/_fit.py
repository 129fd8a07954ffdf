"""fit_indexer(): an indexer learns where a model's attention goes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import heddle
import heddle.hf
from heddle._errors import HeddleNotImplementedError, HeddleTypeError, HeddleValueError, refuse
from heddle.dsa._indexer import Indexer, LayerIndexer, attention_inputs, attention_modules

_NAME = "heddle-dsa-fit"
# Of the queries that are looked at, one in so many is held out: the KL divergence that is reported is theirs.
_HELD_OUT = 8


def fit_indexer(
    model: Any,
    ids: torch.Tensor,
    *,
    heads: int = 8,
    dim: int = 64,
    rope_dim: int | None = None,
    layers: Sequence[int] | None = None,
    queries: int = 2048,
    steps: int = 240,
    batch: int = 32,
    learning_rate: float = 3e-3,
    n_sink: int = 4,
    seed: int = 0,
    name: str | None = None,
    progress: Callable[[float], None] = lambda part: None,
) -> Indexer:
    """Learns a lightning indexer for a model's layers from the model's own attention.

    The model reads the text once, dense. When it comes to a layer, that layer's indexer learns: for queries at random
    positions, Adam lowers the KL divergence from the layer's attention, summed over its query heads and normalized, to
    the softmax of the index scores over the keys that a query sees. The first n_sink keys, which hold most of many
    heads' attention and which a selection always keeps, are left out of both. Only one layer's states are held at a
    time.

    Args:
        model: a transformers causal language model whose attention goes through AttentionInterface; it is not changed.
        ids: the text, int64 [B, S]: as long as what the indexer will be used for.
        heads, dim: index heads and their dimension.
        rope_dim: leading dimensions of an index head that are rotated by the model's angles, an even number; all of
            them unless given, and 0 for a model without rotary embeddings.
        layers: which layers; all unless given.
        queries: queries of a sequence that a layer learns from, an eighth of them held out.
        n_sink: as it will be given to heddle.select.indexer.
        steps, batch, learning_rate, seed: of Adam; the rate falls to zero along a half cosine.
        name: of the model, kept with the result.
        progress: called with the part of the work that was done since the last call.

    Returns:
        An Indexer; its `about` has the KL divergence (nats, held-out queries) of each layer before and after.

    Raises:
        HeddleTypeError: ids that are no int64 tensor. HeddleValueError: numbers out of range, layers that the model
            does not have. HeddleNotImplementedError: a layer whose attention has a sliding window or a mask.

    Source: the sparse training of DeepSeek-V3.2's indexer, here with the model's weights as they are.
    """
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
        raise refuse(HeddleTypeError, "dtype", "ids", f"{getattr(ids, 'dtype', type(ids))}; allowed are int64 tensors")
    if ids.ndim != 2 or ids.shape[1] < 32:
        raise refuse(HeddleValueError, "shape", "ids", f"{list(ids.shape)}; allowed is [B, S], S of 32 and above")
    numbers = {"heads": heads, "dim": dim, "steps": steps, "batch": batch}
    for argument, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise refuse(HeddleValueError, "value", argument, f"{number!r}; allowed are integers of 1 and above")
    if not isinstance(n_sink, int) or not 0 <= n_sink < ids.shape[1] // 16:
        allowed = f"allowed are integers of 0 to {ids.shape[1] // 16 - 1}, below a sixteenth of the text"
        raise refuse(HeddleValueError, "value", "n_sink", f"{n_sink!r}; {allowed}")
    if not isinstance(queries, int) or queries < _HELD_OUT:
        raise refuse(
            HeddleValueError, "value", "queries", f"{queries!r}; allowed are integers of {_HELD_OUT} and above"
        )
    if not learning_rate > 0:
        raise refuse(HeddleValueError, "value", "learning_rate", f"{learning_rate}; allowed are numbers above 0")
    modules = attention_modules(model)
    wanted = sorted(modules) if layers is None else sorted(set(layers))
    if not wanted or (missing := sorted(set(wanted) - set(modules))):
        message = f"{missing if wanted else wanted}; allowed are those of the model, {min(modules)} to {max(modules)}"
        raise refuse(HeddleValueError, "value", "layers", message)
    if rope_dim is not None and not (0 <= rope_dim <= dim and rope_dim % 2 == 0):
        raise refuse(HeddleValueError, "value", "rope_dim", f"{rope_dim}; allowed are even numbers of 0 to {dim}")

    generator = torch.Generator().manual_seed(seed)
    fit = _Fit(heads, dim, rope_dim, set(wanted), queries, steps, batch, learning_rate, n_sink, generator, progress)
    fit.share = 1 / len(wanted)
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, fit)
    AttentionMaskInterface.register(_NAME, heddle.hf.heddle_mask)
    hooks = [
        modules[layer].register_forward_pre_hook(functools.partial(fit.before, layer), with_kwargs=True)
        for layer in wanted
    ]
    try:
        model.set_attn_implementation(_NAME)
        with torch.no_grad():
            model.base_model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    about = {
        "model": name or getattr(model.config, "name_or_path", "") or type(model).__name__,
        "text_sha256": hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest(),
        "tokens": list(ids.shape),
        "options": {**numbers, "queries": queries, "learning_rate": learning_rate, "n_sink": n_sink, "seed": seed},
        "kl": {str(layer): list(pair) for layer, pair in fit.kl.items()},
    }
    return Indexer(model.config.hidden_size, heads, dim, fit.rope_dim or 0, fit.learnt, about)


class _Fit:
    """The model's attention while it is learnt from."""

    def __init__(
        self,
        heads: int,
        dim: int,
        rope_dim: int | None,
        wanted: set[int],
        queries: int,
        steps: int,
        batch: int,
        learning_rate: float,
        n_sink: int,
        generator: torch.Generator,
        progress: Callable[[float], None],
    ) -> None:
        self.heads, self.dim, self.rope_dim, self.wanted = heads, dim, rope_dim, wanted
        self.queries, self.steps, self.batch, self.learning_rate = queries, steps, batch, learning_rate
        self.n_sink, self.generator, self.progress = n_sink, generator, progress
        self.share = 1.0
        self.attention = heddle.hf.HeddleAttention()
        self.inputs: dict[int, Any] = {}
        self.learnt: dict[int, LayerIndexer] = {}
        self.kl: dict[int, tuple[float, float]] = {}

    def before(self, layer: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.inputs[layer] = attention_inputs(args, kwargs)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        layer = module.layer_idx
        if layer in self.wanted:
            if attention_mask is not None or kwargs.get("sliding_window") is not None:
                message = f"layer {layer} has a sliding window or a mask; leave it out of layers"
                raise refuse(HeddleNotImplementedError, "unsupported", "layers", message)
            self.learn(layer, query, key, kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
        return self.attention(module, query, key, value, attention_mask, **kwargs)

    def learn(self, layer: int, q: torch.Tensor, k: torch.Tensor, scale: Any, softcap: Any, sinks: Any) -> None:
        """q [B, Hq, S, D], k [B, Hkv, S, D]."""
        hidden, rope = self.inputs.pop(layer)
        hidden = hidden.float()
        batches, length = hidden.shape[:2]
        if self.rope_dim is None:
            self.rope_dim = 0 if rope is None else self.dim // 2 * 2
        if rope is not None:
            rope = tuple(angle.expand(batches, -1, -1) for angle in rope)
        # The first queries see too little to choose from.
        first = min(length // 16, 256)
        count = min(self.queries, length - first)
        at = first + torch.randperm(length - first, generator=self.generator)[:count]
        target = [attention_of(q[b], k[b], at, scale, softcap, sinks, self.n_sink) for b in range(batches)]
        held_out = torch.arange(count) < max(count // _HELD_OUT, 1)
        learning = torch.nonzero(~held_out)[:, 0]

        # Seeded through the generator, and the caller's own random state is left alone.
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.generator)))
            indexer = LayerIndexer(hidden.shape[2], self.heads, self.dim, self.rope_dim)
        optimizer = torch.optim.Adam(indexer.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)

        def divergence(b: int, rows: torch.Tensor) -> torch.Tensor:
            """The mean over these rows of KL(attention || softmax of the index scores)."""
            here = at[rows]
            states = hidden[b]
            angles = None if rope is None else tuple(angle[b] for angle in rope)
            some = None if angles is None else tuple(angle[here] for angle in angles)
            kept = int(here.max()) + 1
            keys = indexer.keys(states[:kept], None if angles is None else tuple(angle[:kept] for angle in angles))
            logits = index_scores(indexer.queries(states[here], some), keys, indexer.weights(states[here]))
            token = torch.arange(kept)
            logits = logits.masked_fill((token > here[:, None]) | (token < self.n_sink), -torch.inf)
            p = target[b][rows, :kept]
            log_ratio = torch.where(p > 0, p.clamp_min(1e-30).log() - logits.log_softmax(-1), 0.0)
            return (p * log_ratio).sum(-1).mean()

        def held_out_divergence() -> float:
            rows = torch.nonzero(held_out)[:, 0].split(self.batch)
            with torch.no_grad():
                sums = [divergence(b, part) * len(part) for b in range(batches) for part in rows]
            return float(sum(sums)) / (batches * int(held_out.sum()))

        before = held_out_divergence()
        order: list[tuple[int, torch.Tensor]] = []
        with torch.enable_grad():
            for _ in range(self.steps):
                if not order:
                    shuffled = learning[torch.randperm(len(learning), generator=self.generator)]
                    order = [(b, part) for part in shuffled.split(self.batch) for b in range(batches)]
                optimizer.zero_grad()
                divergence(*order.pop()).backward()
                torch.nn.utils.clip_grad_norm_(indexer.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                self.progress(self.share / self.steps)
        self.kl[layer] = before, held_out_divergence()
        self.learnt[layer] = indexer.eval().requires_grad_(False)


def index_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """I [n, S] of q [n, heads, dim], k [S, dim] and weights [n, heads]."""
    products = (q.flatten(0, 1) @ k.T).relu_().unflatten(0, q.shape[:2])
    return torch.einsum("nh,nhs->ns", weights, products)


def attention_of(
    q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, scale: Any, softcap: Any, sinks: Any, n_sink: int
) -> torch.Tensor:
    """The attention of the queries at these positions, summed over heads, without the first n_sink keys, and
    normalized: float32 [n, S].

    q [Hq, S, D], k [Hkv, S, D], causal.
    """
    group = q.shape[0] // k.shape[0]
    length = k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = torch.zeros(len(at), length)
    for rows in torch.arange(len(at)).split(64):
        hidden = torch.arange(length) > at[rows, None]
        for head in range(q.shape[0]):
            scores = scale * (q[head, at[rows]].float() @ k[head // group].float().T)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill_(hidden, -torch.inf)
            if sinks is None:
                found[rows] += scores.softmax(-1)
            else:
                found[rows] += (scores - torch.logaddexp(scores.logsumexp(-1), sinks[head].float())[:, None]).exp()
    found[:, :n_sink] = 0
    return found / found.sum(-1, keepdim=True).clamp_min(1e-30)
