"""Distributions of a trace: how the selected tokens move from step to step and from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from heddle._errors import HeddleValueError, refuse
from heddle.trace._file import Stream, Trace

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Distribution:
    """Values, ascending, and how often each was seen; the mean of each layer beside them (NaN where none was seen)."""

    title: str
    unit: str
    values: np.ndarray
    counts: np.ndarray
    layers: list[int]
    layer_means: np.ndarray

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(np.average(self.values, weights=self.counts)) if self.count else float("nan")

    def quantile(self, q: float) -> float:
        """The smallest value that at least the fraction q of what was seen does not exceed."""
        if not self.count:
            return float("nan")
        reached = np.cumsum(self.counts) >= q * self.count * (1 - 1e-12)
        return float(self.values[np.argmax(reached)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the moments, and the whole distribution in at most 200 bins."""
        edges, heights = self.histogram(200)
        return {
            "title": self.title,
            "unit": self.unit,
            "count": self.count,
            "mean": _number(self.mean),
            "quantiles": {str(q): _number(self.quantile(q)) for q in QUANTILES},
            "layers": self.layers,
            "layer_means": [_number(x) for x in self.layer_means],
            "histogram": {"edges": edges.tolist(), "counts": heights.tolist()},
        }

    def histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """(edges, counts) of at most `bins` equal bins over what was seen, each around as many possible values."""
        if not self.count:
            return np.zeros(0), np.zeros(0, np.int64)
        span = self.values[-1] - self.values[0]
        step = np.diff(self.values).min() if len(self.values) > 1 else 1.0
        width = step * np.ceil((span / step + 1) / bins)
        edges = self.values[0] - step / 2 + width * np.arange(np.ceil((span + step) / width - 1e-9) + 1)
        heights, edges = np.histogram(self.values, edges, weights=self.counts)
        return edges, heights.astype(np.int64)


@dataclass(frozen=True)
class Analysis:
    """What analyze() found. `distributions` by name: see analyze()."""

    steps: int
    layers: list[int]
    kv_heads: int
    budget: int
    window: int
    page_size: int
    distributions: dict[str, Distribution]
    description: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        shape = {key: getattr(self, key) for key in ("steps", "layers", "kv_heads", "budget", "window", "page_size")}
        found = {name: distribution.to_dict() for name, distribution in self.distributions.items()}
        return {**shape, "description": self.description, "distributions": found}


def analyze(trace: Trace, *, window: int = 50, page_size: int = 16) -> Analysis:
    """The distributions of a trace, over all its KV heads and layers. With k the budget:

        working_set   different tokens of a window of `window` consecutive steps / k
        persistence   consecutive steps that a token stays selected, of each run (those that the trace's ends cut too)
        look_back     tokens between a step's own and a selected one / k
        new           tokens of a step that the step before did not select / k
        overlap       tokens of a step that the next recorded layer selects too, same KV head / k
        page_use      used fraction of each page of `page_size` tokens that a step reads from (of the last page: of its
                      tokens that exist)

    Raises HeddleValueError for a window longer than the trace, or numbers below 1.

    Source: the quantities of Levy, arXiv 2603.13430.
    """
    if not 1 <= window <= trace.steps:
        raise refuse(
            HeddleValueError, "value", "window", f"{window}; allowed are 1 to {trace.steps}, the trace's steps"
        )
    if page_size < 1:
        raise refuse(HeddleValueError, "value", "page_size", f"{page_size}; allowed are 1 and above")
    k = trace.budget
    tally = {
        "working_set": _Tally(f"different tokens of {window} steps", "k", trace),
        "persistence": _Tally("steps that a token stays selected", "steps", trace),
        "look_back": _Tally("distance of a selected token", "k", trace),
        "new": _Tally("tokens that the step before did not select", "k", trace),
        "overlap": _Tally("tokens that the next layer selects too", "k", trace),
        "page_use": _Tally(f"used fraction of a page of {page_size} tokens", "of a page", trace),
    }
    above: list[Stream] = []
    for layer in range(len(trace.layers)):
        here = [trace.stream(layer, head) for head in range(trace.kv_heads)]
        for stream in here:
            last_seen = previous_steps(stream)
            tally["working_set"].add(layer, working_sets(stream, last_seen, window), k)
            tally["persistence"].add(layer, run_lengths(stream), 1)
            tally["look_back"].add(layer, trace.lengths[stream.steps] - 1 - stream.tokens, k)
            tally["new"].add(layer, new_tokens(stream, last_seen), k)
            tally["page_use"].add(layer, page_use(stream, trace.lengths, page_size), 1)
        for lower, upper in zip(above, here, strict=False):
            tally["overlap"].add(layer - 1, overlaps(lower, upper), k)
        above = here
    return Analysis(
        steps=trace.steps,
        layers=trace.layers,
        kv_heads=trace.kv_heads,
        budget=k,
        window=window,
        page_size=page_size,
        distributions={name: t.distribution() for name, t in tally.items()},
        description=trace.description,
    )


class _Tally:
    """Adds up a distribution."""

    def __init__(self, title: str, unit: str, trace: Trace) -> None:
        self.title, self.unit, self.layers = title, unit, trace.layers
        self.values, self.counts = np.zeros(0), np.zeros(0, np.int64)
        self.sums, self.seen = np.zeros(len(trace.layers)), np.zeros(len(trace.layers))

    def add(self, layer: int, numbers: np.ndarray, unit: int) -> None:
        values, counts = np.unique(numbers, return_counts=True)
        values = values / unit
        self.sums[layer] += values @ counts
        self.seen[layer] += counts.sum()
        self.values, where = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        self.counts = np.bincount(where, np.concatenate([self.counts, counts]), len(self.values)).astype(np.int64)

    def distribution(self) -> Distribution:
        with np.errstate(invalid="ignore"):
            means = self.sums / self.seen
        return Distribution(self.title, self.unit, self.values, self.counts, self.layers, means)


def previous_steps(stream: Stream) -> np.ndarray:
    """For each selected token the last step before that selected it, -1 if none did; int64 [len(tokens)]."""
    steps = stream.steps
    order = np.argsort(stream.tokens, kind="stable")  # by token, then step
    tokens, at = stream.tokens[order], steps[order]
    found = np.full(len(order), -1, np.int64)
    again = np.flatnonzero(tokens[1:] == tokens[:-1]) + 1
    found[order[again]] = at[again - 1]
    return found


def working_sets(stream: Stream, last_seen: np.ndarray, window: int) -> np.ndarray:
    """Different tokens of each window [a, a + window) of steps: those that are selected in it for the first time."""
    windows = len(stream.offsets) - window  # one fewer than there are
    first = np.maximum(np.maximum(last_seen + 1, stream.steps - window + 1), 0)
    last = np.minimum(stream.steps, windows)
    counted = first <= last
    edges = np.bincount(first[counted], minlength=windows + 2) - np.bincount(last[counted] + 1, minlength=windows + 2)
    return np.cumsum(edges)[:windows]


def run_lengths(stream: Stream) -> np.ndarray:
    """Length of each run of consecutive steps that select a token."""
    order = np.argsort(stream.tokens, kind="stable")
    tokens, at = stream.tokens[order], stream.steps[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (tokens[1:] != tokens[:-1]) | (at[1:] != at[:-1] + 1)
    return np.diff(np.append(np.flatnonzero(starts), len(order)))


def new_tokens(stream: Stream, last_seen: np.ndarray) -> np.ndarray:
    """Of each step but the first: tokens that the step before did not select."""
    steps = stream.steps
    new = last_seen != steps - 1
    return np.bincount(steps[new], minlength=len(stream.offsets) - 1)[1:]


def overlaps(lower: Stream, upper: Stream) -> np.ndarray:
    """Tokens that both select, step by step."""
    size = 1 + max(int(s.tokens.max(initial=0)) for s in (lower, upper))
    a, b = (s.steps * size + s.tokens for s in (lower, upper))  # ascending
    at = np.searchsorted(b, a)
    both = np.zeros(len(a), bool)
    inside = at < len(b)
    both[inside] = b[at[inside]] == a[inside]
    return np.bincount(lower.steps[both], minlength=len(lower.offsets) - 1)


def page_use(stream: Stream, lengths: np.ndarray, page_size: int) -> np.ndarray:
    """Used fraction of each page of each step that is read from."""
    steps, pages = stream.steps, stream.tokens // page_size
    starts = np.ones(len(pages), bool)
    starts[1:] = (pages[1:] != pages[:-1]) | (steps[1:] != steps[:-1])
    first = np.flatnonzero(starts)
    used = np.diff(np.append(first, len(pages)))
    there = np.minimum(page_size, lengths[steps[first]] - pages[first].astype(np.int64) * page_size)
    return used / there


def _number(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
