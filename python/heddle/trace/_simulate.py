"""A part of the last-level cache, reserved for selected keys and values: what it would hit, and what that is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from heddle import _core
from heddle._errors import HeddleValueError, refuse
from heddle.advise import Machine
from heddle.trace._file import Trace

POLICIES = {
    "optimum": "Belady's: keeps what will be used again first, so no policy hits more",
    "lru": "least recently used, token by token",
    "fifo": "first in, first out, token by token",
    "previous": "the last selection alone, its newest tokens if not all fit",
    "page-lru": "least recently used, page by page: a miss fetches the whole page",
}


@dataclass(frozen=True)
class Reservation:
    """One policy with one size.

    Attributes:
        policy, tokens: what was simulated; tokens are entries: a token of one KV head of one layer.
        megabytes: tokens * entry_bytes / 1e6.
        hit_rate: of all selected tokens of all steps.
        misses_per_step: blocking misses, all layers: tokens (page-lru: pages) that a step waits for; the mean.
        misses_p95, misses_max: the same of the 95th percentile and of the worst step.
        fetched_per_step: tokens that memory delivers: page_size for each miss of page-lru.
        slowdown: time of a step over that of a step which hits everything: see simulate().
    """

    policy: str
    tokens: int
    megabytes: float
    hit_rate: float
    misses_per_step: float
    misses_p95: float
    misses_max: int
    fetched_per_step: float
    slowdown: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def simulate(
    trace: Trace,
    sizes: Sequence[int],
    *,
    policies: Sequence[str] = tuple(POLICIES),
    page_size: int = 16,
    shared: bool = False,
    machine: Machine | str = "h100-80gb",
    cache_speedup: float = 4.0,
    batch: int = 1,
    fixed_bytes: float = 0.0,
) -> list[Reservation]:
    """Replays a trace through a reserved cache of each size with each policy.

    What a KV head selects in a step is looked up at once, as it is known before anything is fetched: its hits are the
    tokens that the cache holds by then. A token that was never selected before is a miss.

    Args:
        sizes: entries that the reservation holds, all layers and heads together; 0 is none.
        policies: of POLICIES.
        page_size: tokens of a page, for "page-lru".
        shared: one cache for all KV heads and layers, which look things up one after the other, rather than an equal
            part of it for each, rounded down.
        machine: a heddle.Machine or a name that heddle.advise knows, "host" among them.
        cache_speedup: an assumption: bandwidth of the last-level cache over that of memory.
        batch: requests like this one that run together, each with a reservation of its own.
        fixed_bytes: what a step reads from memory besides selected entries, all requests together: weights.

    The slowdown is a roofline's, in which misses block: a step takes the longer of
        operations / rate         the trace's operations for each selected token, in bf16, and
        memory / bandwidth + cache / (bandwidth * cache_speedup)
    where memory is fixed_bytes and what is fetched, and cache what hits. The ratio is to the same without misses.

    Raises:
        HeddleValueError: sizes that are negative or above the trace's footprint (its different entries), an unknown
            policy or machine, numbers out of range.
    """
    footprint = trace.footprint()
    for size in sizes:
        if not 0 <= size <= footprint:
            allowed = f"allowed are 0 to {footprint}, the different entries of the trace"
            raise refuse(HeddleValueError, "value", "sizes", f"{size}; {allowed}")
    for policy in policies:
        if policy not in POLICIES:
            raise refuse(HeddleValueError, "value", "policies", f"{policy!r}; allowed are {', '.join(POLICIES)}")
    for name, number in (("page_size", page_size), ("batch", batch)):
        if number < 1:
            raise refuse(HeddleValueError, "value", name, f"{number}; allowed are 1 and above")
    if not cache_speedup >= 1:
        raise refuse(HeddleValueError, "value", "cache_speedup", f"{cache_speedup}; allowed are 1 and above")
    if not fixed_bytes >= 0:
        raise refuse(HeddleValueError, "value", "fixed_bytes", f"{fixed_bytes}; allowed are 0 and above")
    machine = Machine.named(machine) if isinstance(machine, str) else machine
    operations = float(trace.description.get("operations", 0.0))
    rate = machine.bf16 or machine.fp32 or float("inf")

    accesses = len(trace.tokens) / trace.steps
    keys = [(policy, int(size)) for policy in policies for size in sizes]
    missed = {key: np.zeros(trace.steps, np.int64) for key in keys}  # tokens of each step
    pages_missed = {key: np.zeros(trace.steps, np.int64) for key in keys}
    streams = 1 if shared else trace.num_streams
    for ids, batches in _shared(trace, page_size) if shared else _apart(trace):
        pages, page_batches = _pages(ids, batches, page_size)

        def replayed(policy: str, ids: np.ndarray, batches: np.ndarray, capacity: int) -> np.ndarray:
            return _core.replay(policy, ids, batches, capacity).reshape(trace.steps, -1).sum(1)

        for policy, size in keys:
            if policy == "page-lru":
                capacity = size // streams // page_size
                missed[policy, size] += replayed("lru", ids // page_size, batches, capacity)
                pages_missed[policy, size] += replayed("lru", pages, page_batches, capacity)
            else:
                missed[policy, size] += replayed(policy, ids, batches, size // streams)

    def seconds(fetched: float, missed: float) -> float:
        memory = fixed_bytes + batch * fetched * trace.entry_bytes
        cached = batch * (accesses - missed) * trace.entry_bytes / cache_speedup
        return max(batch * accesses * operations / rate, (memory + cached) / machine.bandwidth)

    results = []
    for policy, size in keys:
        tokens = missed[policy, size]
        waited = pages_missed[policy, size] if policy == "page-lru" else tokens
        fetched = float(waited.mean()) * (page_size if policy == "page-lru" else 1)
        results.append(
            Reservation(
                policy=policy,
                tokens=size,
                megabytes=size * trace.entry_bytes / 1e6,
                hit_rate=1.0 - float(tokens.mean()) / accesses if accesses else 1.0,
                misses_per_step=float(waited.mean()),
                misses_p95=float(np.quantile(waited, 0.95)),
                misses_max=int(waited.max()),
                fetched_per_step=fetched,
                slowdown=seconds(fetched, float(tokens.mean())) / seconds(0.0, 0.0) if accesses else 1.0,
            )
        )
    return results


def _apart(trace: Trace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, offsets of the steps' selections) of each KV head of each layer."""
    for stream in trace.streams():
        yield stream.tokens, stream.offsets


def _shared(trace: Trace, page_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All of them as one: each has a range of ids of its own, whole pages long."""
    span = -(-(int(trace.tokens.max(initial=0)) + 1) // page_size) * page_size
    if span * trace.num_streams > np.iinfo(np.int32).max:
        message = f"True for {trace.num_streams} heads of {span} tokens; allowed are 2**31 entries in all"
        raise refuse(HeddleValueError, "capacity", "shared", message)
    heads = np.repeat(np.arange(len(trace.offsets) - 1) % trace.num_streams, np.diff(trace.offsets))
    yield (heads * span + trace.tokens).astype(np.int32), trace.offsets


def _pages(ids: np.ndarray, batches: np.ndarray, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pages that each batch reads, each once: ids ascend within a batch."""
    pages = ids // page_size
    first = np.ones(len(pages), bool)
    first[1:] = pages[1:] != pages[:-1]
    first[batches[:-1][np.diff(batches) > 0]] = True
    return pages[first], np.concatenate([[0], np.cumsum(first)])[batches]
