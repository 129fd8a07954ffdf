"""quantize(), and the schemes that quantize the operands of attention."""

from __future__ import annotations

from typing import Any, Literal

from heddle import _core
from heddle._core import QuantizedTensor
from heddle._errors import HeddleError, HeddleValueError, refuse, rename

Granularity = Literal["tensor", "token"] | tuple[Literal["partition"], int]


def quantize(
    x: Any,
    format: str = "int8",
    granularity: Granularity = "tensor",
    smooth: bool = False,
    *,
    static_scale: float | None = None,
) -> QuantizedTensor:
    """Quantizes x symmetrically to INT8 or FP8 E4M3.

    x_q = clamp(round_half_even(x / scale), -127, 127) with scale = max|x| / 127 over its group; for fp8 the largest
    value is 448 and rounding is to nearest even. A group of zeros has scale 0.

    Args:
        x: float32, float16 or bfloat16, [B, S, H, D] or packed [total, H, D]; finite.
        format: "int8" or "fp8".
        granularity: what shares a scale: "tensor" everything, "token" one token of one head, ("partition", n) n
            consecutive tokens of one head (in a packed batch they are counted from its first token).
        smooth: subtract each head's mean over the tokens first (K smoothing, SageAttention). Attention puts it back as
            scale * q . mean on the scores, so out and lse are those of x.
        static_scale: with "tensor": this scale in place of the maximum's. Values beyond it saturate and are counted.

    Returns:
        A QuantizedTensor whose arrays are of the kind of x: .data (the shape of x), .scale (float32 [1],
        [B, ceil(S / n), H] or [ceil(total / n), H]), .mean (float32 [B, H, D] or [H, D], or None), .saturated.

    Raises:
        HeddleTypeError: x is no array or not of a floating-point dtype.
        HeddleValueError: a format or granularity that does not exist, a wrong rank, NaN or infinity in x.
    """
    return _core.quantize(x, format, granularity, smooth, static_scale)


def quantize_operands(q: Any, k: Any, v: Any, format: str, partition: int, smooth: bool) -> tuple[Any, Any, Any]:
    """q, k and v as the scheme `format` keeps them (see attention)."""
    of_partition = ("partition", partition)
    schemes = {
        "int8-baseline": ("tensor", "tensor"),
        "int8-a": (of_partition, of_partition),
        "int8-b": ("token", "tensor"),
        "fp8": (None, "tensor"),
    }
    if format not in schemes:
        known = ", ".join(schemes)
        raise refuse(HeddleValueError, "value", "format", f"{format!r} does not exist; allowed are None, {known}")
    if not isinstance(partition, int) or partition < 1:
        raise refuse(HeddleValueError, "value", "partition", f"{partition!r}; allowed are integers of 1 and above")
    of_q, of_k = schemes[format]
    kind = "fp8" if format == "fp8" else "int8"

    def quantized(argument: str, x: Any, granularity: Any, smooth: bool = False) -> QuantizedTensor:
        try:
            return _core.quantize(x, kind, granularity, smooth, None)
        except HeddleError as error:
            raise rename(error, argument) if error.argument == "x" else error from None

    return (
        q if of_q is None else quantized("q", q, of_q),
        quantized("k", k, of_k, smooth),
        quantized("v", v, "tensor"),
    )
