"""Run-time selection as it is defined, in numpy float64 and simple loops, written without heddle."""

from __future__ import annotations

import math

import numpy as np


def seen_keys(i, sq, sk, causal=True, window=None):
    """The keys [begin, end) of query i."""
    p = i + sk - sq
    begin, end = 0, sk
    if causal:
        end = min(end, p + 1)
    if window is not None:
        left, right = window
        begin = begin if left is None else max(begin, p - left)
        end = end if right is None else min(end, p + right + 1)
    return begin, max(begin, end)


def scores(q, k, scale=None, softcap=0.0):
    """q [D], k [n, D]."""
    s = np.asarray(k, np.float64) @ np.asarray(q, np.float64) * (len(q) ** -0.5 if scale is None else scale)
    return softcap * np.tanh(s / softcap) if softcap else s


def token_metric(q, k, v, metric, *, beta=0.2, norm="clipped", epsilon=1e-6, sinks=None, output=None, **options):
    """The metric of each key for one query: q [group, D], k [n, D], v [n, Dv]; sinks and output by head."""
    per_head = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for head, row in enumerate(q):
            s = scores(row, k, **options)
            if metric == "oam":
                length = np.sqrt((np.asarray(v, np.float64) ** 2).sum(-1))
                s = s + beta * (np.maximum(0.0, np.log(length)) if norm == "clipped" else np.log(length + epsilon))
            elif metric == "loo":
                logits = s if sinks is None else np.append(s, np.float64(sinks[head]))
                m = logits.max(initial=-np.inf)
                p = np.exp(s - m) / np.exp(logits - m).sum()
                o = p @ v if output is None else np.asarray(output[head], np.float64)
                distance = np.sqrt(((np.asarray(v, np.float64) - o) ** 2).sum(-1))
                s = np.where(p < 1.0, p / (1.0 - p) * distance, np.inf)
            per_head.append(s)
    return np.max(per_head, axis=0)


def kept_count(budget, seen, always):
    k = budget if isinstance(budget, int) else math.ceil(budget * seen)
    return min(max(k, always), seen)


def top(metric, k):
    """Positions of the k largest, ascending; of equal ones the first."""
    order = sorted(range(len(metric)), key=lambda j: (-metric[j], j))
    return sorted(order[:k])


def check_list(chosen, metric, begin, end, budget, n_sink, n_recent, tolerance):
    """`chosen` keeps what it must, as many as it must, and nothing outside it beats what is inside by the tolerance.

    metric[j - begin] is that of key j.
    """
    chosen = list(chosen)
    always = {j for j in range(begin, end) if j < n_sink or j >= end - n_recent}
    assert chosen == sorted(set(chosen))
    assert all(begin <= j < end for j in chosen)
    assert always <= set(chosen)
    assert len(chosen) == kept_count(budget, end - begin, len(always))
    inside = [metric[j - begin] for j in chosen if j not in always]
    outside = [metric[j - begin] for j in range(begin, end) if j not in set(chosen)]
    if inside and outside:
        best = max(outside)
        assert min(inside) >= best - tolerance * max(1.0, abs(best)), (min(inside), best)


def page_bound(q, k, v, metric, *, beta=0.2, norm="clipped", epsilon=1e-6, scale=None, softcap=0.0):
    """The bound of a page for one query: q [group, D], k [n, D], v [n, Dv]."""
    high, low = np.max(k, axis=0), np.min(k, axis=0)
    best = -math.inf
    for row in q:
        row = np.asarray(row, np.float64) * (len(row) ** -0.5 if scale is None else scale)
        s = sum(max(x * a, x * b) for x, a, b in zip(row, high, low, strict=True))
        best = max(best, softcap * math.tanh(s / softcap) if softcap else s)
    if metric == "oam":
        longest = max(math.sqrt(float((x**2).sum())) for x in np.asarray(v, np.float64))
        with np.errstate(divide="ignore"):
            best += beta * (max(0.0, float(np.log(longest))) if norm == "clipped" else math.log(longest + epsilon))
    return best


def check_pages(chosen, bounds, begin, end, page_size, budget, n_sink, n_recent, tolerance):
    """bounds[page] of the pages that tokens [begin, end) lie in; `chosen` are tokens."""
    pages = range(begin // page_size, -(-end // page_size)) if begin < end else range(0)
    always = {j // page_size for j in range(begin, end) if j < n_sink or j >= end - n_recent}
    kept = {j // page_size for j in chosen}
    assert list(chosen) == [j for j in range(begin, end) if j // page_size in kept]
    assert always <= kept
    wanted = (
        min(budget, end - begin) if isinstance(budget, int) else min(math.ceil(budget * (end - begin)), end - begin)
    )
    assert len(kept) == min(len(pages), max(-(-wanted // page_size), len(always)))
    inside = [bounds[p] for p in kept - always]
    outside = [bounds[p] for p in pages if p not in kept]
    if inside and outside:
        assert min(inside) >= max(outside) - tolerance * max(1.0, abs(max(outside)))
