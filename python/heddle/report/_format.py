"""Numbers for people."""

from __future__ import annotations


def signed(number: float) -> str:
    """+0.0123, or in powers of ten where that would be all zeros."""
    if number == 0 or abs(number) >= 0.00005:
        return f"{number:+.4f}".replace("-", "−")
    return scientific(number, "+.0e")


def scientific(number: float, form: str = ".1e") -> str:
    """3.2·10⁻⁷"""
    mantissa, exponent = f"{number:{form}}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}·10{power}".replace("-", "−")


def busy_note(others_share: float | None) -> str:
    """What to know about times that were measured beside other work, or nothing."""
    if others_share is None or others_share < 0.1:
        return ""
    return f"Other processes took {100 * others_share:.0f} % of the cores meanwhile: a quiet machine is faster."


def relative(number: float) -> str:
    """4.8 %, or in powers of ten where that would be below 0.1 %."""
    return f"{100 * number:.1f} %" if number >= 1e-3 else scientific(number)
