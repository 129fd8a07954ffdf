"""Quality against budget: what each way of choosing keys, or drawing values, keeps at decode.

The context is read dense. Then the tokens that follow are fed by teacher forcing, every layer sparse, all of them in
one call: each attends to the keys that it selects of those before it, which is what decode one token at a time does.

    loss    of these tokens, its difference from dense decode paired by token
    mass    part of the attention that the selected keys have, the mean over heads, layers and tokens
    error   ||o - o_dense|| / ||o_dense|| of a layer's output, the mean over layers; both this and the mass on the
            states of the dense run, so that errors do not compound
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import heddle
from heddle.dsa import Indexer, Watch
from heddle.study._bench import Attend, Bench, Caches, paired, relative_error

SELECTING = {
    "qk": "QK",
    "oam": "OAM",
    "oam_log": "OAM, log form",
    "loo": "leave-one-out",
    "pages": "page bounds",
    "dsa": "DSA indexer",
    "window": "window + sinks",
}
SAMPLING = {
    "iid": "sampled, iid",
    "stratified": "sampled, stratified",
    "systematic": "sampled, systematic",
    "systematic_tile": "sampled by tile",
}
LABELS = SELECTING | SAMPLING
# Judged against QK, pair by pair.
RIVALS = ("oam", "oam_log", "loo")
KEEP = {"n_sink": 4, "n_recent": 8}


def measure(
    bench: Bench,
    indexer: Indexer,
    passages: list[int],
    context: int,
    queries: int,
    budgets: list[int],
    methods: list[str],
    tick: Callable[[float], None],
) -> dict[str, Any]:
    """All methods and budgets at one context. Each passage is context tokens of the text, the last `queries` of them
    decoded; errors and masses are those of the last quarter of these."""
    configurations = [(method, budget) for method in methods for budget in budgets]
    share = 1 / (len(passages) * (1.25 * len(configurations) + 2))
    found = [
        _Passage(bench, indexer, first, context, queries, seed, lambda part: tick(part * share)).measure(configurations)
        for seed, first in enumerate(passages)
    ]
    nll, masses, errors = ({key: [f[i][key] for f in found] for key in found[0][i]} for i in range(3))
    values_above_one = [f[3] for f in found]

    joined = {key: np.concatenate(parts) for key, parts in nll.items()}
    rows = []
    for method, budget in configurations:
        key = (method, budget)
        by_layer_mean = np.mean(errors[key], axis=0)
        row = {
            "method": method,
            "budget": budget,
            "loss_difference": paired(joined[key] - joined["dense"]),
            "error": float(by_layer_mean.mean()),
            "error_by_layer": [float(x) for x in by_layer_mean],
            "mass": float(np.mean(masses[key])) if key in masses else None,
        }
        if method in RIVALS and ("qk", budget) in joined:
            row["loss_against_qk"] = paired(joined[key] - joined["qk", budget])
            row["error_against_qk"] = row["error"] - float(np.mean(errors["qk", budget]))
            row["layers_below_qk"] = int((by_layer_mean < np.mean(errors["qk", budget], axis=0)).sum())
        rows.append(row)
    return {
        "context": context,
        "queries": queries,
        "passages": passages,
        "always_kept": KEEP,
        "loss_dense": float(joined["dense"].mean()),
        "values_longer_than_one": float(np.mean(values_above_one)),
        "rows": rows,
    }


class _Passage:
    """One passage of the text in caches of its own."""

    def __init__(
        self,
        bench: Bench,
        indexer: Indexer,
        first: int,
        context: int,
        queries: int,
        seed: int,
        tick: Callable[[float], None],
    ) -> None:
        self.bench, self.indexer, self.first, self.seed, self.tick = bench, indexer, first, seed, tick
        self.begin, self.end = context - queries, context
        # Errors and masses are of the last quarter of the queries.
        self.looked_at = slice(-max(queries // 4, 1), None)
        self.caches = Caches(bench, context)
        self.watch: Watch | None = None

    def measure(self, configurations: list[tuple[str, int]]) -> tuple[dict, dict, dict, float]:
        """By configuration: negative log-likelihoods ("dense" too), masses, errors by layer; and the part of the values
        of the decoded tokens that are longer than 1. A tick of 1 is one pass over the queries."""
        with self.indexer.watching(self.bench.model) as self.watch:
            self.bench.run(self.first, 0, self.begin, self._read)
            self.tick(1)
            masses: dict[Any, list[float]] = {}
            errors: dict[Any, list[float]] = {key: [] for key in configurations}
            longer = []

            def compare(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                cache, call = self.caches.layers[layer], self.caches.append(layer, k, v, self.begin)
                exact, lse = heddle.decode(q, cache, **call, return_lse=True)
                longer.append(float((torch.linalg.vector_norm(v, dim=-1) > 1).float().mean()))
                some, lse_some = q[:, self.looked_at], lse[..., self.looked_at]
                for key in configurations:
                    choice = self._choice(*key, layer, some, cache, call, self.looked_at)
                    out, kept = heddle.decode(some, cache, **call, **choice, return_lse=True)
                    errors[key].append(relative_error(out, exact[:, self.looked_at]))
                    if "selection" in choice:
                        masses.setdefault(key, []).append(float((kept - lse_some).double().exp().mean()))
                self.tick((1 + len(configurations) / 4) / self.bench.layers)
                return exact

            nll = {"dense": self._losses(compare)}
            for key in configurations:
                nll[key] = self._losses(functools.partial(self._sparse, key))
                self.tick(1)
        return nll, {key: float(np.mean(m)) for key, m in masses.items()}, errors, float(np.mean(longer))

    def _losses(self, attend: Attend) -> np.ndarray:
        return self.bench.losses(self.bench.run(self.first, self.begin, self.end, attend), self.first, self.begin)

    def _read(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.caches.append(layer, k, v, 0)
        self.watch.store(layer, self.begin)
        return heddle.attention(q, k, v, causal=True)

    def _sparse(
        self, key: tuple[str, int], layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        cache, call = self.caches.layers[layer], self.caches.append(layer, k, v, self.begin)
        return heddle.decode(q, cache, **call, **self._choice(*key, layer, q, cache, call, slice(None)))

    def _choice(
        self,
        method: str,
        budget: int,
        layer: int,
        q: torch.Tensor,
        cache: heddle.KVCache,
        call: dict[str, Any],
        queries: slice,
    ) -> dict[str, Any]:
        """What heddle.decode is asked for."""
        if method in SAMPLING:
            return {"sampling": heddle.Sampling(method, budget, seed=self.seed, offset=layer)}
        if method == "window":
            sinks = KEEP["n_sink"]
            return {"selection": heddle.select.window(budget - sinks - 1, n_global=sinks)}
        if method == "pages":
            return {"selection": heddle.select.pages(q, cache, budget=budget, **KEEP, **call)}
        if method == "dsa":
            length = int(call["seq_lens"][0])
            return {"selection": self.watch.select(layer, length, budget, queries=queries, **KEEP)}
        metric, norm = ("oam", "log") if method == "oam_log" else (method, "clipped")
        return {"selection": heddle.select.topk(q, cache, budget=budget, metric=metric, norm=norm, **KEEP, **call)}
