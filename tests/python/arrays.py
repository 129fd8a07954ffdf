"""Arrays of the libraries that the tests put through heddle."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import torch

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def to_torch(x: np.ndarray) -> torch.Tensor:
    """The same memory as a torch tensor; torch does not know the types of ml_dtypes."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    if x.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(x)


def to_float64(x) -> np.ndarray:
    return x.double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def address(x) -> int:
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data


def normal(rng: np.random.Generator, *shape: int, dtype="float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES.get(dtype, dtype))


def paged(rng: np.random.Generator, seq_lens, page_size: int, spare: int = 3) -> tuple[np.ndarray, int]:
    """A block table that scatters the requests over a cache, with wild entries where none is needed, and its pages."""
    pages = [-(-int(n) // page_size) for n in seq_lens]
    table = np.full((len(pages), max([*pages, 1]) + 1), -(2**31), np.int32)
    order = rng.permutation(sum(pages) + spare).astype(np.int32)
    for b, n in enumerate(pages):
        table[b, :n], order = order[:n], order[n:]
    return table, sum(pages) + spare


class Producer:
    """An array of some other library: it offers __dlpack__ and nothing else.

    versioned=False speaks the protocol from before versions. `device` is what it claims; nobody can read that memory.
    """

    def __init__(self, array: np.ndarray, *, versioned=True, read_only=False, device=(1, 0)):
        self.array, self.versioned, self.read_only, self.device = array, versioned, read_only, device
        self.streams = []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if not self.versioned and "max_version" in options:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.streams.append(options.get("stream"))
        capsule = self.array.__dlpack__(max_version=(1, 0) if self.versioned else None)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        managed = pointer(capsule, b"dltensor_versioned" if self.versioned else b"dltensor")
        if self.versioned:  # DLManagedTensorVersioned: version, context, deleter, flags, tensor
            ctypes.c_uint64.from_address(managed + 24).value = int(self.read_only)
        tensor = managed + (32 if self.versioned else 0)  # DLTensor: data, device type, device id, ...
        ctypes.c_int32.from_address(tensor + 8).value = self.device[0]
        ctypes.c_int32.from_address(tensor + 12).value = self.device[1]
        return capsule
