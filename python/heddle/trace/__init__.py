"""Which tokens a selection picks as a model decodes: recorded, analysed, and replayed through a reserved cache.

    with heddle.trace.Recorder("run.parquet", layers=range(30), kv_heads=3, budget=128, entry_bytes=256) as recorder:
        for step in ...:
            for layer in ...:
                recorder.record(step, layer, indices, length)

    trace = heddle.trace.load("run.parquet")
    analysis = heddle.trace.analyze(trace)                 # working set, persistence, look-back, ...
    results = heddle.trace.simulate(trace, [0, 64, 256])   # hit rates of a cache of so many entries, by policy

The commands `heddle trace record`, `analyze` and `simulate` do the same with a model, tables and plots.

Needs pyarrow: pip install 'heddle-attention[trace]'.
"""

from heddle.trace._analyze import Analysis, Distribution, analyze
from heddle.trace._file import VERSION, Recorder, Trace, load
from heddle.trace._simulate import POLICIES, Reservation, simulate

__all__ = [
    "POLICIES",
    "VERSION",
    "Analysis",
    "Distribution",
    "Recorder",
    "Reservation",
    "Trace",
    "analyze",
    "load",
    "simulate",
]
