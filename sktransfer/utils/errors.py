"""Errors that say what was got, what was expected, and what to do about it."""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
from collections.abc import Iterable
from types import ModuleType


class ImageError(ValueError):
    """An image that cannot be read.

    Parameters
    ----------
    reason : str
        What is wrong with the image, and the remedy.
    row : int or None
        Position of the image in `X`, once it is known.
    source : str
        What the row holds, in a few words: a path, `"bytes"`, `"array of shape (0, 0)"`.
    """

    def __init__(self, reason: str, row: int | None = None, source: str = "") -> None:
        super().__init__(reason, row, source)
        self.reason = reason
        self.row = row
        self.source = source

    def __str__(self) -> str:
        where = "Image" if self.row is None else f"Image in row {self.row}"
        source = f" ({self.source})" if self.source else ""
        return f"{where}{source}: {self.reason}"


class WeightsNotFoundError(FileNotFoundError):
    """Pretrained weights are not on this machine and could not be fetched."""


class EngineError(RuntimeError):
    """An engine that cannot compute what it was asked to."""


def did_you_mean(name: object, options: Iterable[str]) -> str:
    """Suggest the closest of `options`, or nothing where none is close.

    Examples
    --------
    >>> did_you_mean("resnet5O", ["resnet18", "resnet50"])
    "; did you mean 'resnet50'?"
    >>> did_you_mean("zzz", ["resnet18", "resnet50"])
    ''
    """
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(parameter: str, value: object, options: Iterable[str | None]) -> None:
    """Refuse a `value` that is none of `options`.

    Raises
    ------
    ValueError
        Naming the parameter, the value, the options, and the closest of them.
    """
    options = list(options)
    if not isinstance(value, str | None) or value not in options:
        expected = ", ".join(repr(option) for option in options)
        names = [option for option in options if option is not None]
        raise ValueError(
            f"Got {parameter}={value!r}, but expected one of {expected}{did_you_mean(value, names)}"
        )


def check_number(
    parameter: str,
    value: object,
    kind: type,
    low: float,
    high: float | None = None,
    *,
    besides: str = "",
) -> None:
    """Raise a ValueError where a parameter is no number of a kind, or out of its range.

    The error names what else it may be, `besides`.

    >>> check_number("lr", -1, numbers.Real, 0)
    Traceback (most recent call last):
        ...
    ValueError: Got lr=-1, but expected a number of at least 0
    """
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or not low <= value <= (math.inf if high is None else high):  # type: ignore[operator]
        what = "an integer" if kind is numbers.Integral else "a number"
        limits = f"of at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        other = f"{besides} or " if besides else ""
        raise ValueError(f"Got {parameter}={value!r}, but expected {other}{what} {limits}")


def import_optional(name: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a module that only some users need.

    Raises
    ------
    ImportError
        Naming the purpose and the command that installs the module.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {name!r}, which is not installed. "
            f"Install it with: pip install 'sktransfer[{extra}]'"
        ) from error
