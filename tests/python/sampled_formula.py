"""Sampled attention as it is defined, in numpy float64, written without heddle: what its tests compare with."""

from __future__ import annotations

import numpy as np

TILE = 64


def philox(counter, key) -> np.ndarray:
    """Philox 4x32-10 of counters [..., 4] and a key (2 words): uint32 [..., 4]."""
    c = [np.asarray(counter[..., i], np.uint64) for i in range(4)]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> shift) ^ c[1] ^ k[0], b & low, (a >> shift) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, -1).astype(np.uint32)


def uniforms(seed, request, head, offset, draws) -> np.ndarray:
    """float64 [..., 4] in (0, 1) for an array of draw words."""
    draws = np.asarray(draws, np.uint64)
    counter = np.stack([np.full(draws.shape, x, np.uint64) for x in (request, head, offset)] + [draws], -1)
    return (philox(counter, (seed & 0xFFFFFFFF, seed >> 32)) + 0.5) / 2.0**32


def ternary(q, queries, stratified, seed, request, head, offset, query):
    """(counts, unit): the sum of the ternary queries of q [D], and what one of them counts for."""
    c = np.abs(q).max()
    n = len(q) if stratified else len(q) * queries
    quads = np.arange(-(-n // 4)) | (query << 20) | (1 << 31)
    u = uniforms(seed, request, head, offset, quads).ravel()[:n]
    share = np.abs(q) / c if c > 0 else np.zeros_like(q)
    if stratified:
        count = np.floor(queries * share) + (u < queries * share - np.floor(queries * share))
    else:
        count = (u.reshape(len(q), queries) < share[:, None]).sum(1)
    return np.sign(q) * count, c / queries


def kept_keys(scores, n_sink, n_recent, n_top) -> np.ndarray:
    """bool: the keys that are read exactly."""
    n = len(scores)
    kept = (np.arange(n) < n_sink) | (np.arange(n) >= n - n_recent)
    free = np.flatnonzero(~kept)
    kept[free[np.argsort(-scores[free], kind="stable")[:n_top]]] = True
    return kept


def targets(method, samples, seed, request, head, offset, query):
    m = np.arange(samples)
    draws = (m if method != "systematic" else np.zeros_like(m)) | (query << 20)
    u = uniforms(seed, request, head, offset, draws)[:, 0]
    return u if method == "iid" else (m + u) / samples


def invert(weights, at):
    """(weight of a draw, counts): how often each key is the first whose prefix sum reaches a target of `at`, and how
    close a target comes to a boundary, relative to the whole."""
    prefix = np.cumsum(weights)
    total = prefix[-1]
    drawn = np.minimum(np.searchsorted(prefix, at * total), len(weights) - 1)
    margin = np.abs(at[:, None] * total - prefix[None, :-1]).min(initial=np.inf) / total
    return total / len(at), np.bincount(drawn, minlength=len(weights)), margin


def row(scores, places, method, samples, *, sink=-np.inf, keep=(0, 0, 0), **stream):
    """One query of one head over the keys it sees.

    scores [n], natural logarithms; places [n]: where the keys stand, for tiles; stream: seed, request, head, offset,
    query. Returns the coefficient of each key's value, lse, and the margin by which float arithmetic may err without
    changing a draw.
    """
    top = max(scores.max(initial=-np.inf), sink)
    if top == -np.inf:
        return np.zeros(0), -np.inf, np.inf
    w = np.exp(scores - top)
    denominator = w.sum() + np.exp(sink - top)
    kept = kept_keys(scores, *keep) if method != "exact" else np.ones(len(scores), bool)
    coefficients = np.where(kept, w, 0.0)
    rest = np.flatnonzero(~kept)
    margin = np.inf
    if len(rest) and method == "systematic_tile":
        tiles = np.unique(places[rest] // TILE)
        own = max(1, samples // len(tiles))
        for t in tiles:
            members = rest[places[rest] // TILE == t]
            draw = np.array([t | (stream["query"] << 20)])
            u = uniforms(stream["seed"], stream["request"], stream["head"], stream["offset"], draw)[0, 0]
            each, counts, close = invert(w[members], (np.arange(own) + u) / own)
            coefficients[members] += each * counts
            margin = min(margin, close)
    elif len(rest):
        each, counts, margin = invert(w[rest], targets(method, samples, **stream))
        coefficients[rest] += each * counts
    return coefficients / denominator, top + np.log(denominator), margin
