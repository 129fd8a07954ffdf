"""The INT8 schemes on real activations: the error of each layer's output at prefill, with and without K smoothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import heddle
from heddle.study._bench import Bench, relative_error

LABELS = {"int8-baseline": "INT8 baseline", "int8-b": "INT8 scheme B", "int8-a": "INT8 scheme A"}


def measure(bench: Bench, first: int, context: int, tick: Callable[[float], None]) -> dict[str, Any]:
    """||o - o_fp32|| / ||o_fp32|| of causal attention in each scheme, on the float32 run's q, k and v of each layer."""
    variants = [(scheme, smooth) for smooth in (False, True) for scheme in LABELS]
    errors: dict[Any, list[float]] = {variant: [] for variant in variants}

    def compare(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        exact = heddle.attention(q, k, v, causal=True)
        for scheme, smooth in variants:
            out = heddle.attention(q, k, v, causal=True, format=scheme, smooth=smooth)
            errors[scheme, smooth].append(relative_error(out, exact))
        tick(1 / bench.layers)
        return exact

    bench.run(first, 0, context, compare)
    return {
        "context": context,
        "passage": first,
        "rows": [
            {"scheme": scheme, "smooth": smooth, "error": float(np.mean(found)), "error_by_layer": found}
            for (scheme, smooth), found in errors.items()
        ],
        # Layers in which the claim, baseline > B > A, holds.
        "ordered_layers": {
            name: int(sum(a > b > c for a, b, c in zip(*(errors[s, smooth] for s in LABELS), strict=True)))
            for name, smooth in (("plain", False), ("smooth", True))
        },
    }
