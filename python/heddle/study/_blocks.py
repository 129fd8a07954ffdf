"""Stem against other ways of choosing blocks for prefill, all at one density.

Every method has a number that its density grows with: the budget of Stem and of block top-k as a fraction of the
blocks, XAttention's threshold, the fraction of columns and diagonals of vertical-slash. Layer by layer, on the states
of the dense run, that number is searched for which gives the wanted density; the model then runs with it.

    loss    its difference from dense prefill over the whole passage, paired by token
    error   ||o - o_dense|| / ||o_dense|| of a layer's output on the dense run's states, the mean over layers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import heddle
from heddle.study._bench import Bench, paired, relative_error

# name: (label, function of heddle.select, its options, the option that density grows with)
METHODS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "stem": ("Stem", "stem", {}, ("budget",)),
    "stem_beta_0": ("Stem, β = 0", "stem", {"beta": 0.0}, ("budget",)),
    "stem_log": ("Stem, log ‖v‖ unclipped", "stem", {"norm": "log"}, ("budget",)),
    "stem_log_1": ("Stem, log ‖v‖ unclipped, β = 1", "stem", {"norm": "log", "beta": 1.0}, ("budget",)),
    "stem_zscore": ("Stem, z-scored", "stem", {"norm": "zscore"}, ("budget",)),
    "stem_flat": ("Stem, no decay", "stem", {"decay": 1.0}, ("budget",)),
    "block_topk": ("block top-k", "block_topk", {}, ("budget",)),
    "xattention": ("XAttention", "xattention", {}, ("threshold",)),
    "vertical_slash": ("vertical-slash", "vertical_slash", {}, ("vertical", "slash")),
}
# At every density; the others, which tell beta and decay apart, at the first alone.
MAIN = ("stem", "block_topk", "xattention", "vertical_slash")
# What Stem was published with, at whatever density that has.
PUBLISHED = "stem_published"
LABELS = {name: label for name, (label, *_) in METHODS.items()} | {PUBLISHED: "Stem, as published"}
# Counted on the data: the same for all of a method's layers.
_FIXED_DENSITY = ("stem", "block_topk")
_LOSS_EVERY = 2


def measure(
    bench: Bench,
    first: int,
    context: int,
    densities: list[float],
    block: int,
    tick: Callable[[float], None],
) -> dict[str, Any]:
    """All methods on one passage of the text. The first block of the passage and the last two that a block row sees
    are kept by all of them."""
    keep = {"block": block, "n_first": 1, "n_last": 2}
    wanted = [(name, density) for density in densities for name in METHODS if name in MAIN or density == densities[0]]
    share = 1 / (2 * len(wanted) + 4)
    parameters: dict[Any, list[float]] = {key: [] for key in wanted}
    found: dict[Any, list[float]] = {key: [] for key in [*wanted, (PUBLISHED, None)]}
    errors: dict[Any, list[float]] = {key: [] for key in found}

    def compare(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        exact = heddle.attention(q, k, v, causal=True)
        for name, density in wanted:
            known = parameters[name, density]
            start = known[-1] if known and METHODS[name][1] in _FIXED_DENSITY else None
            number, selection = _at_density(name, density, q, k, v, keep, start)
            known.append(number)
            _judge((name, density), selection, exact, q, k, v)
        _judge((PUBLISHED, None), heddle.select.stem(q, k, v), exact, q, k, v)
        tick(share * (len(wanted) + 3) / bench.layers)
        return exact

    def _judge(key: Any, selection: heddle.Selection, exact: torch.Tensor, *states: torch.Tensor) -> None:
        found[key].append(selection.density())
        errors[key].append(relative_error(heddle.attention(*states, causal=True, selection=selection), exact))

    dense = bench.losses(bench.run(first, 0, context, compare), first, 0, _LOSS_EVERY)
    rows = []
    nll = {}
    for key in found:
        name, density = key

        def sparse(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if name == PUBLISHED:  # noqa: B023 (called within the loop)
                selection = heddle.select.stem(q, k, v)
            else:
                selection = _select(name, parameters[key][layer], q, k, v, keep)  # noqa: B023
            return heddle.attention(q, k, v, causal=True, selection=selection)

        nll[key] = bench.losses(bench.run(first, 0, context, sparse), first, 0, _LOSS_EVERY)
        tick(share)
        difference = nll[key] - dense
        rows.append(
            {
                "method": name,
                "wanted_density": density,
                "density": float(np.mean(found[key])),
                "loss_difference": paired(difference),
                "loss_difference_second_half": paired(difference[len(difference) // 2 :]),
                "error": float(np.mean(errors[key])),
                "error_by_layer": errors[key],
            }
        )
        if density is not None and name != "stem":
            rows[-1]["loss_against_stem"] = paired(nll[key] - nll["stem", density])
    return {"context": context, "passage": first, "always_kept": keep, "loss_dense": float(dense.mean()), "rows": rows}


def _select(
    name: str, number: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: dict[str, int]
) -> heddle.Selection:
    _, function, options, grows = METHODS[name]
    return getattr(heddle.select, function)(q, k, v, **options, **keep, **dict.fromkeys(grows, number))


def _at_density(
    name: str,
    density: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: dict[str, int],
    known: float | None,
    steps: int = 8,
) -> tuple[float, heddle.Selection]:
    """The number that gives about this density, by bisection, and the selection with it; `known` is taken as it is."""
    if known is not None:
        return known, _select(name, known, q, k, v, keep)
    low, high = 0.0, 1.0
    best: tuple[float, float, heddle.Selection] | None = None
    for _ in range(steps):
        middle = (low + high) / 2
        selection = _select(name, middle, q, k, v, keep)
        off = selection.density() - density
        if best is None or abs(off) < best[0]:
            best = abs(off), middle, selection
        if abs(off) < 0.005 * density:
            break
        low, high = (middle, high) if off < 0 else (low, middle)
    return best[1], best[2]
