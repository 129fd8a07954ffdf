"""Run-time selection as it is defined, in numpy float64 and simple loops, written without heddle."""

from __future__ import annotations

import math

import numpy as np

import formula


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


def queries_of(cache, q):
    """What a cache's format makes of queries: int8 caches round them, in float32, by token or by one scale."""
    if not cache.format.startswith("int8") or q.size == 0:
        return np.asarray(q, np.float64)
    x = np.asarray(q, np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127) if cache.q_scale is None else cache.q_scale[0]
    return formula.quantize(x, scale).astype(np.float64) * np.float64(scale)


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


# --- blocks ---


def antidiagonal(q, k, stride):
    """The sum over the anti-diagonal of a sub-block; rows that are not there count as zero."""
    total = 0.0
    for i in range(stride):
        j = stride - 1 - i
        if i < len(q) and j < len(k):
            total += float(q[i] @ k[j])
    return total


def stem_score(q, k, stride, scale):
    """Of one block: q [rows, D], k [columns, D]."""
    sums = [
        antidiagonal(q[a : a + stride], k[b : b + stride], stride)
        for a in range(0, len(q), stride)
        for b in range(0, len(k), stride)
    ]
    return sum(sums) / len(sums) * scale / stride


def stem_value_terms(v, block, stride, beta, norm, epsilon):
    """Of every key block of a head: v [Sk, Dv]."""
    if len(v) == 0:
        return []
    lengths = np.sqrt((v**2).sum(-1))
    starts = range(0, len(v), block)
    with np.errstate(divide="ignore"):
        if norm == "clipped":
            return [beta * max(0.0, float(np.log(lengths[j : j + block].max()))) for j in starts]
        if norm == "log":
            return [beta * math.log(lengths[j : j + block].max() + epsilon) for j in starts]
    logs = np.array([math.log(lengths[g : g + stride].max() + epsilon) for g in range(0, len(v), stride)])
    whole = logs[: len(v) // stride] if len(v) >= stride else logs
    deviation = whole.std(ddof=1) if len(whole) > 1 else 0.0
    z = np.maximum(0.0, (logs - whole.mean()) / (deviation + 1e-6))
    return [beta * float(z[j // stride : j // stride + block // stride].mean()) for j in starts]


def stem_start(budget, n):
    if isinstance(budget, int):
        return min(budget, n)
    if budget is not None:
        return budget * n
    return n if n < 56 else 0.2 * n + 30 if n < 160 else 0.1 * n + 30


def stem_budget(budget, n, decay, position):
    start = float(stem_start(budget, n))
    return math.ceil(start - start * (1.0 - decay) * position / n)


def block_row(row, block, sq, sk, causal, window):
    """Key blocks that a block row sees, its own ones, and the block of positions of its first query."""
    queries = range(row * block, min((row + 1) * block, sq))
    spans = [seen_keys(i, sq, sk, causal, window) for i in (queries[0], queries[-1])]
    begin, end = spans[0][0], spans[1][1]
    seen = list(range(begin // block, -(-end // block))) if begin < end else []
    positions = [i + sk - sq for i in queries]
    own = {p // block for p in positions if p >= 0} & set(seen)
    return seen, own, max(0, positions[0]) // block


def always_kept(seen, own, n_first, n_last):
    return {j for j in seen if j < n_first} | set(seen[len(seen) - min(n_last, len(seen)) :]) | own


def check_blocks(chosen, scores, seen, always, wanted, tolerance):
    """`chosen` blocks of a row; scores by block."""
    assert set(chosen) <= set(seen)
    assert always <= set(chosen)
    assert len(chosen) == min(len(seen), max(wanted, len(always)))
    inside = [scores[j] for j in chosen if j not in always]
    outside = [scores[j] for j in seen if j not in chosen]
    if inside and outside:
        assert min(inside) >= max(outside) - tolerance * max(1.0, abs(max(outside)))


def group_mass(q, k, sq, sk, row, block, stride, scale, causal, window):
    """XAttention's mass of each key block for a block row of one head: q [Sq, D], k [Sk, D]."""
    mass = np.zeros(-(-sk // block))
    first, last = row * block, min((row + 1) * block, sq)
    for a in range(first, last, stride):
        members = range(a, min(a + stride, last))
        begin = seen_keys(members[0], sq, sk, causal, window)[0] // stride
        end = -(-seen_keys(members[-1], sq, sk, causal, window)[1] // stride)
        groups = range(begin, end)
        if not groups:
            continue
        s = np.array(
            [
                antidiagonal(q[a : members[-1] + 1], k[g * stride : min((g + 1) * stride, sk)], stride) * scale / stride
                for g in groups
            ]
        )
        p = np.exp(s - s.max())
        for g, x in zip(groups, p / p.sum(), strict=True):
            mass[g * stride // block] += x
    return mass


def last_query_mass(q, k, n_queries, block, scale, softcap, causal, window):
    """Vertical and slash mass by blocks for one head."""
    sq, sk = len(q), len(k)
    columns = -(-sk // block)
    vertical, slash = np.zeros(columns), np.zeros(columns)
    for i in range(max(0, sq - n_queries), sq):
        begin, end = seen_keys(i, sq, sk, causal, window)
        if begin >= end:
            continue
        s = scores(q[i], k[begin:end], scale, softcap)
        p = np.exp(s - s.max())
        p /= p.sum()
        for j in range(begin, end):
            vertical[j // block] += p[j - begin]
            distance = (i + sk - sq) // block - j // block
            if distance >= 0:
                slash[distance] += p[j - begin]
    return vertical, slash


# --- indexer ---


def index_scores(q, k, weights, scale=1.0):
    """Of one query: q [Hi, Di], k [n, Di], weights [Hi]."""
    total = np.zeros(len(k))
    for row, w in zip(q, weights, strict=True):
        total += float(w) * np.maximum(0.0, scale * (np.asarray(k, np.float64) @ np.asarray(row, np.float64)))
    return total
