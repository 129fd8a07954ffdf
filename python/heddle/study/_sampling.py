"""The sampling methods on synthetic data: unbiased, as spread as theory says, and the same whoever computes.

One query of four heads over keys and values drawn from normal distributions. The exact output, the probabilities and
the closed forms of the variance are computed here in float64:

    iid         tr Cov = sum_j p_j |v_j - o|^2 / S
    stratified  tr Cov = sum_m Var_m(v) / S^2, the variance within each of S equal slices of the cumulative distribution

A z-test asks of every number of the output whether its mean over the seeds is the exact one. With n numbers it rejects
beyond the quantile of 1 - false_alarm / (2 n): the chance that a correct method is rejected at all is at most
false_alarm.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

import heddle

METHODS = {"iid": "iid", "stratified": "stratified", "systematic": "systematic", "systematic_tile": "by tile"}
FALSE_ALARM = 1e-3
_KEYS, _Q_HEADS, _KV_HEADS, _DIM, _DIM_V = 1000, 4, 2, 32, 16
_PAGE = 16
# What the tests draw with; the slopes go over more.
_SAMPLES = 64
_SLOPE_SAMPLES = (8, 16, 32, 64, 128, 256, 512)
_HYBRID = {"n_sink": 4, "n_recent": 16, "n_top": 16}


def measure(seeds: int, tick: Callable[[float], None]) -> dict[str, Any]:
    """All of it; `seeds` runs a test, a fourth of them a point of the slopes."""
    case = _Case()
    few = max(seeds // 4, 2)
    plan = [(method, {}) for method in METHODS] + [(method, _HYBRID) for method in METHODS]
    total = seeds * (len(plan) + 2) + few * len(METHODS) * len(_SLOPE_SAMPLES)
    tests, variances = [], []
    for method, keep in plan:
        outs = case.outputs(seeds, method, _SAMPLES, **keep)
        label = METHODS[method] + (", first, recent and top keys exact" if keep else "")
        tests.append({"method": method, "hybrid": bool(keep), "label": label, **z_test(outs, case.exact)})
        if not keep:
            variances.append({"method": method, "label": label, **case.spread(outs, method, _SAMPLES)})
        tick(seeds / total)
    for form, queries in (("independent", 8), ("stratified", ("stratified", 8))):
        scores = case.bernoulli_scores(seeds, queries)
        found = z_test(scores, case.scores)
        tests.append({"method": f"bernoulli_{form}", "hybrid": False, "label": f"Bernoulli scores, {form}", **found})
        tick(seeds / total)

    slopes = []
    for method in METHODS:
        points = []
        for samples in _SLOPE_SAMPLES:
            outs = case.outputs(few, method, samples)
            points.append({"samples": samples, **case.spread(outs, method, samples)})
            tick(few / total)
        x, y = (np.log([point[key] for point in points]) for key in ("samples", "measured"))
        slopes.append({"method": method, "label": METHODS[method], "slope": float(np.polyfit(x, y, 1)[0])})
        slopes[-1]["points"] = points
    return {
        "seeds": seeds,
        "slope_seeds": few,
        "samples": _SAMPLES,
        "keys": _KEYS,
        "false_alarm": FALSE_ALARM,
        "tests": tests,
        "variances": variances,
        "slopes": slopes,
        "identity": case.identity(),
    }


def z_test(found: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """Is the mean of found [runs, ...] exact [...]?"""
    runs = len(found)
    spread = found.std(axis=0, ddof=1) / math.sqrt(runs)
    z = np.abs(found.mean(axis=0) - exact) / np.maximum(spread, 1e-12)
    limit = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * z.size))
    return {"numbers": z.size, "largest_z": float(z.max()), "limit": limit, "unbiased": bool(z.max() <= limit)}


class _Case:
    """The data, and what float64 says of it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.q = (1.5 * rng.standard_normal((1, 1, _Q_HEADS, _DIM))).astype(np.float32)
        self.k, self.v = (rng.standard_normal((1, _KEYS, _KV_HEADS, d)).astype(np.float32) for d in (_DIM, _DIM_V))
        self.cache, self.table, self.lens = self._cached(_PAGE)
        group = _Q_HEADS // _KV_HEADS
        k, v = (np.repeat(x[0], group, axis=1).astype(np.float64) for x in (self.k, self.v))
        self.scores = np.einsum("hd,nhd->hn", self.q[0, 0].astype(np.float64), k)[:, :8] * _DIM**-0.5
        s = np.einsum("hd,nhd->hn", self.q[0, 0].astype(np.float64), k) * _DIM**-0.5
        p = np.exp(s - s.max(1, keepdims=True))
        self.p = p / p.sum(1, keepdims=True)
        self.values = v.transpose(1, 0, 2)  # [Hq, n, Dv]
        self.exact = np.einsum("hn,hnd->hd", self.p, self.values)

    def _cached(self, page_size: int) -> tuple[heddle.KVCache, np.ndarray, np.ndarray]:
        pages = -(-_KEYS // page_size)
        cache = heddle.KVCache(pages, page_size, _KV_HEADS, _DIM, head_dim_v=_DIM_V, format="fp32", feature_major=True)
        table = np.arange(pages, dtype=np.int32)[None]
        return cache, table, cache.append(self.k, self.v, table, np.zeros(1, np.int32))

    def outputs(self, seeds: int, method: str, samples: int, **keep: int) -> np.ndarray:
        """float64 [seeds, Hq, Dv]."""
        return np.stack(
            [
                heddle.decode(
                    self.q,
                    self.cache,
                    self.table,
                    self.lens,
                    sampling=heddle.Sampling(method, samples, seed=seed, **keep),
                )[0, 0]
                for seed in range(seeds)
            ]
        ).astype(np.float64)

    def bernoulli_scores(self, seeds: int, queries: Any) -> np.ndarray:
        """float64 [seeds, Hq, 8]: the scores of the first eight keys, each the lse of a window that sees it alone."""
        found = np.zeros((seeds, _Q_HEADS, self.scores.shape[1]))
        for key in range(found.shape[2]):
            only = heddle.select.tokens(np.full((1, 1, 1), key, np.int32))
            for seed in range(seeds):
                sampling = heddle.Sampling("exact", 0, seed=seed, bernoulli=queries)
                call = (self.q, self.cache, self.table, self.lens)
                _, lse = heddle.decode(*call, sampling=sampling, selection=only, return_lse=True)
                found[seed, :, key] = lse[0, :, 0]
        return found

    def spread(self, outs: np.ndarray, method: str, samples: int) -> dict[str, Any]:
        """The trace of the covariance, mean over heads: measured around the exact output, its standard error, and the
        closed form with the z of their difference where there is one."""
        squares = ((outs - self.exact) ** 2).sum(-1).mean(-1)
        measured, error = float(squares.mean()), float(squares.std(ddof=1) / math.sqrt(len(squares)))
        closed = {"iid": self._iid, "stratified": self._stratified}.get(method)
        if closed is None:
            return {"measured": measured, "se": error, "closed": None, "z": None}
        expected = closed(samples)
        return {"measured": measured, "se": error, "closed": expected, "z": float(measured - expected) / error}

    def _iid(self, samples: int) -> float:
        distance = ((self.values - self.exact[:, None]) ** 2).sum(-1)
        return float((self.p * distance).sum(1).mean()) / samples

    def _stratified(self, samples: int) -> float:
        total = 0.0
        for p, v in zip(self.p, self.values, strict=True):
            edges = np.concatenate([[0.0], np.cumsum(p)])
            edges /= edges[-1]
            for m in range(samples):
                part = np.minimum(edges[1:], (m + 1) / samples) - np.maximum(edges[:-1], m / samples)
                here = part > 0
                w = samples * part[here]
                mean = w @ v[here]
                total += w @ ((v[here] - mean) ** 2).sum(-1)
        return float(total) / samples**2 / len(self.p)

    def identity(self) -> dict[str, Any]:
        """Bits of every method under other page sizes, schedules, splits and numbers of threads: how many variants ran
        and how many of them gave other bits than the first."""
        schedules = (
            ("auto", 0),
            ("tile", 0),
            ("static", 64),
            ("static", 192),
            ("stealing", 640),
            ("stealing", 100_000),
        )
        variants = list(itertools.product((1, 16, 50, 1000), (1, 2, 3), schedules))
        caches = {size: self._cached(size) for size in (1, 16, 50, 1000)}
        differing = 0
        try:
            for method in METHODS:
                sampling = heddle.Sampling(method, _SAMPLES, seed=3)
                first = None
                for page, count, schedule in variants:
                    heddle.set_num_threads(count)
                    options = {"sampling": sampling, "schedule": heddle.Schedule(*schedule), "return_reads": True}
                    out, reads = heddle.decode(self.q, *caches[page], **options)
                    bits = (out.tobytes(), reads[0].tobytes())
                    first = first or bits
                    differing += bits != first
        finally:
            heddle.set_num_threads(0)
        return {"variants": len(variants) * len(METHODS), "differing": differing}
