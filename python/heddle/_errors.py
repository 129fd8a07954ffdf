"""The exceptions of heddle: one base, and one kind for each of Python's own that callers know to catch."""

from __future__ import annotations

from typing import Any


class HeddleError(Exception):
    """A call that heddle refused, before it touched memory, or that failed.

    Attributes:
        code: what is wrong: "shape", "dtype", "device", "layout", "value", "capacity", "unsupported" or "runtime".
        argument: the name of the argument at fault.
    """

    def __init__(self, message: str, code: str = "value", argument: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.argument = argument

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.code, self.argument)


class HeddleValueError(HeddleError, ValueError):
    """A shape, device, layout, number, name or capacity that the argument cannot have."""


class HeddleTypeError(HeddleError, TypeError):
    """An element type or a kind of object that the argument cannot be."""


class HeddleNotImplementedError(HeddleError, NotImplementedError):
    """A combination of features that no requested backend has; the message says which has it."""


class HeddleRuntimeError(HeddleError, RuntimeError):
    """The device or the system failed."""


def refuse(kind: type[HeddleError], code: str, argument: str, message: str) -> HeddleError:
    """The exception that names `argument` as the library itself does: "<argument>: <message>"."""
    return kind(f"{argument}: {message}", code, argument)


def rename(error: HeddleError, argument: str) -> HeddleError:
    """The same refusal for a caller who knows the argument by another name."""
    return refuse(type(error), error.code, argument, str(error).removeprefix(f"{error.argument}: "))
