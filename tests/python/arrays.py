"""Arrays of the libraries that the tests put through heddle."""

from __future__ import annotations

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
