"""Attention as it is defined, in numpy float64, written without heddle: what the tests of the package compare with."""

from __future__ import annotations

import numpy as np


def visible(sq, sk, *, causal=False, window=None, n_global=0, strided=None):
    """bool [Sq, Sk]: which keys a query may read.

    window is (left, right), and the first n_global keys beside it; strided is (width, stride).
    """
    p = np.arange(sq)[:, None] + sk - sq
    j = np.arange(sk)[None, :]
    seen = np.ones((sq, sk), bool)
    if window is not None:
        left, right = window
        inside = np.ones((sq, sk), bool)
        if left is not None:
            inside &= j >= p - left
        if right is not None:
            inside &= j <= p + right
        seen &= inside | (j < n_global)
    if strided is not None:
        width, stride = strided
        seen &= (p - j < width) | ((p - j) % stride == 0)
    if causal:
        seen &= j <= p
    return seen


def attention(q, k, v, seen=None, *, softcap=0.0, scale=None, sinks=None):
    """One batch [B, S, H, D]; seen bool broadcastable to [B, Hq, Sq, Sk]. Returns out and lse in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    _, sq, hq, d = q.shape
    sk, group = k.shape[1], hq // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    s = np.einsum("bihd,bjhd->bhij", q, k) * (d**-0.5 if scale is None else scale)
    if softcap > 0:
        s = softcap * np.tanh(s / softcap)
    seen = np.broadcast_to(True if seen is None else seen, (*s.shape[:2], sq, sk))
    s = np.where(seen, s, -np.inf)
    logits = s
    if sinks is not None:
        sink = np.broadcast_to(np.asarray(sinks, np.float64)[None, :, None, None], (*s.shape[:3], 1))
        logits = np.concatenate([s, sink], axis=-1)
    m = np.max(logits, axis=-1, keepdims=True, initial=-np.inf)
    m = np.where(np.isneginf(m), 0.0, m)
    total = np.exp(logits - m).sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (m + np.log(total))[..., 0]
    p = np.exp(s - m) / np.where(total == 0, 1.0, total)
    v = np.where(seen.any(axis=(1, 2))[:, :, None, None], v, 0.0)  # what nobody sees may be NaN
    return np.einsum("bhij,bjhd->bihd", p, v), lse


def tolerance(dtype) -> float:
    """Largest error that a result of this dtype may have, for inputs of unit variance."""
    return {"float64": 1e-6, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[str(dtype).removeprefix("torch.")]


def quantize(x, scale_of_group, limit=127):
    """x rounded to the integers of its scales (broadcast), and put back."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scale_of_group > 0, np.rint(x / scale_of_group), 0.0)
    return np.clip(steps, -limit, limit)
