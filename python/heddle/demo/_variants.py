"""The ways of running the model's attention that the demo compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import heddle
from heddle._errors import HeddleValueError, refuse

REFERENCES = ("sdpa", "dense")
# What heddle computes attention in, by the device.
PRECISION = {"cpu": "float32", "cuda": "float16"}
DEFAULT_VARIANTS = (*REFERENCES, "window", "strided", "int8-baseline", "int8-a", "int8-b", "fp8")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of running attention.

    Attributes:
        name: as in --variants. label: for people. detail: one sentence that says what it does.
        selection: a function of heddle.select and its arguments, or None for every key.
        kv_format: the format of keys and values in prefill (heddle.attention) and in the cache; None is fp32, on a GPU
            fp16.
    """

    name: str
    label: str
    detail: str
    selection: tuple[str, dict[str, Any]] | None = None
    kv_format: str | None = None

    @property
    def uses_heddle(self) -> bool:
        return self.name != "sdpa"

    def make_selection(self) -> heddle.Selection | None:
        if self.selection is None:
            return None
        function, arguments = self.selection
        return getattr(heddle.select, function)(**arguments)

    def keys_read(self, length: int) -> np.ndarray:
        """How many keys each of `length` causal queries attends to, int64 [length]."""
        position = np.arange(length)
        if self.selection is None:
            return position + 1
        function, a = self.selection
        if function == "window":
            first = np.maximum(position - a["left"], 0)
            return position - first + 1 + np.minimum(first, a["n_global"])
        near = np.minimum(position + 1, a["width"])
        # Distances near..position that are multiples of the stride.
        return near + position // a["stride"] - (near - 1) // a["stride"]


def make_variants(
    names: Sequence[str], window: int, n_global: int, width: int, stride: int, precision: str = "float32"
) -> list[Variant]:
    """The variants of these names, in the table's order, the references always among them.

    precision: of PRECISION, for people.

    Raises HeddleValueError for a name that does not exist and for a window or stride out of range.
    """
    limits = {"--window": (window, 1), "--globals": (n_global, 0), "--strided": (min(width, stride), 1)}
    for option, (number, least) in limits.items():
        if number < least:
            raise refuse(HeddleValueError, "value", option, f"{number}; allowed are {least} and above")
    variants = [
        Variant("sdpa", "PyTorch SDPA", "scaled_dot_product_attention in float32 over transformers' DynamicCache."),
        Variant("dense", "heddle dense", f"Every key, in {precision}. The reference that differences are taken from."),
        Variant(
            "window",
            f"window {window} + {n_global}",
            f"Each query reads the newest {window} keys and the first {n_global}, in {precision}.",
            ("window", {"left": window - 1, "n_global": n_global}),
        ),
        Variant(
            "strided",
            f"strided {width} / {stride}",
            f"Each query reads the newest {width} keys and every {stride}th before them, in {precision}.",
            ("strided", {"width": width, "stride": stride}),
        ),
        Variant(
            "int8-baseline",
            "INT8 baseline",
            "Q, K and V in INT8, one static scale each.",
            kv_format="int8-baseline",
        ),
        Variant(
            "int8-a",
            "INT8 scheme A",
            "Q and K in INT8 with a scale a token and head, V one static scale.",
            None,
            "int8-a",
        ),
        Variant(
            "int8-b",
            "INT8 scheme B",
            "Q in INT8 with a scale a token and head, K and V one static scale.",
            None,
            "int8-b",
        ),
        Variant("fp8", "FP8 E4M3", "K and V in FP8 with one static scale each, Q as it is.", None, "fp8"),
    ]
    known = {variant.name for variant in variants}
    wanted = {name.strip() for name in names if name.strip()}
    if unknown := sorted(wanted - known):
        message = f"{', '.join(unknown)} does not exist; allowed are {', '.join(DEFAULT_VARIANTS)}"
        raise refuse(HeddleValueError, "value", "--variants", message)
    return [variant for variant in variants if variant.name in wanted.union(REFERENCES)]
