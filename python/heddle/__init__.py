"""heddle: attention for long-context inference.

Exact attention over contiguous, packed and paged keys and values (attention, decode), selections of keys
(heddle.select), values drawn at random (Sampling), quantized keys and values (quantize, KVCache), and the merge of
partial results (merge). Arrays in decide the kind of arrays out: numpy arrays, torch tensors, and anything that speaks
DLPack, without copies.
"""

import os

from heddle import select
from heddle._attention import SharedPrefix, attention, decode, decode_cascade, merge, plan_decode
from heddle._core import (
    DecodePlan,
    KVCache,
    QuantizedTensor,
    Sampling,
    Schedule,
    Selection,
    __version__,
    available_backends,
    available_host_isas,
    host_isa,
    last_kernel,
    num_threads,
    set_host_isa,
    set_num_threads,
    set_validation,
    validation,
)
from heddle._errors import (
    HeddleError,
    HeddleNotImplementedError,
    HeddleRuntimeError,
    HeddleTypeError,
    HeddleValueError,
)
from heddle._quantize import quantize
from heddle.advise import Advice, Machine, advise

# A forked child has no threads but its own, and OpenMP would wait for the pool it had before: one thread is what works.
os.register_at_fork(after_in_child=lambda: set_num_threads(1))

__all__ = [
    "Advice",
    "DecodePlan",
    "HeddleError",
    "HeddleNotImplementedError",
    "HeddleRuntimeError",
    "HeddleTypeError",
    "HeddleValueError",
    "KVCache",
    "Machine",
    "QuantizedTensor",
    "Sampling",
    "Schedule",
    "Selection",
    "SharedPrefix",
    "__version__",
    "advise",
    "attention",
    "available_backends",
    "available_host_isas",
    "decode",
    "decode_cascade",
    "host_isa",
    "last_kernel",
    "merge",
    "num_threads",
    "plan_decode",
    "quantize",
    "select",
    "set_host_isa",
    "set_num_threads",
    "set_validation",
    "validation",
]
