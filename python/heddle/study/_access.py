"""What the fitted indexer reads as the model decodes: the trace's distributions, and a reserved cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from heddle.dsa import Indexer
from heddle.study._bench import Bench
from heddle.trace import analyze, load, simulate
from heddle.trace._record import Decoding, by_indexer, recorder_of

KEEP = {"n_sink": 4, "n_recent": 8}
MEGABYTES = (0.0, 5.0, 10.0, 15.0, 20.0)
# The sizes are those of arXiv 2603.13430; "scaled to the model" takes them for a model of eight billion parameters,
# 32 layers of 8 KV heads of 128 in bf16, and keeps the number of tokens (of all layers) that fit.
_SCALED_FROM = 32 * 8 * 128 * 2 * 2
POLICIES = ("optimum", "lru", "fifo", "previous", "page-lru")
MACHINE = "h100-80gb"


def measure(
    bench: Bench,
    indexer: Indexer,
    first: int,
    context: int,
    steps: int,
    budget: int,
    window: int,
    path: Path,
    tick: Callable[[float], None],
) -> dict[str, Any]:
    """Records `steps` steps of decode after `context` tokens into `path`, then analyses and replays them."""
    ids = bench.ids[None, first : first + context + steps]
    with indexer.watching(bench.model) as watch:
        decoding = Decoding(bench.model, by_indexer(watch, budget, KEEP), 0)
        cache = decoding.read(ids[:, :context])
        tick(0.4)
        options = {"budget": budget, "dense_layers": 0, "format": "bf16", "shared": True}
        with recorder_of(bench.model, path, **options, description={"selection": KEEP}) as recorder:
            decoding.decode(ids[:, context:], cache, recorder, lambda part: tick(0.5 * part))
    trace = load(path)
    analysis = analyze(trace, window=window)
    token_bytes = trace.entry_bytes * len(trace.layers)
    footprint = trace.footprint()
    scale = token_bytes / _SCALED_FROM
    sizes = sorted({*(mb * scale for mb in MEGABYTES), *MEGABYTES})
    entries = {mb: round(mb * 1e6 / trace.entry_bytes) for mb in sizes}
    # Above what was ever selected a reservation is no different from one of that size.
    entries = {mb: n for mb, n in entries.items() if n <= footprint} | {footprint * trace.entry_bytes / 1e6: footprint}
    results = simulate(trace, sorted(set(entries.values())), policies=POLICIES, machine=MACHINE)
    tick(0.1)
    by_size = {(r.policy, r.tokens): r for r in results}
    between = [
        by_size["fifo", n].hit_rate <= by_size["lru", n].hit_rate <= by_size["optimum", n].hit_rate
        for n in entries.values()
    ]
    return {
        "context": context,
        "passage": first,
        "steps": steps,
        "budget": budget,
        "window": window,
        "always_kept": KEEP,
        "machine": MACHINE,
        "entry_bytes": trace.entry_bytes,
        "token_bytes": token_bytes,
        "scale": scale,
        "scaled_mb": [mb * scale for mb in MEGABYTES],
        "footprint_mb": footprint * trace.entry_bytes / 1e6,
        "step_mb": len(trace.tokens) / trace.steps * trace.entry_bytes / 1e6,
        "distributions": {name: d.to_dict() for name, d in analysis.distributions.items()},
        "reservation": [r.to_dict() for r in results],
        "lru_between": {"sizes": len(between), "true": sum(between)},
    }
