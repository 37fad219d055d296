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
        The problem, and the remedy.
    row : int or None
        Position of the image in `X`, if it is known.
    source : str
        Short description of the item: a path, `"bytes"`, `"array of shape (0, 0)"`.
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
    """Pretrained weights are not on this machine and cannot be downloaded."""


class EngineError(RuntimeError):
    """An engine that cannot run a network."""


def did_you_mean(name: object, options: Iterable[str]) -> str:
    """Suggest the closest of `options`; return an empty string if none is close.

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
    """Check that `value` is one of `options`.

    Raises
    ------
    ValueError
        Otherwise. The message names the parameter, the value, the options, and the closest one.
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
    """Raise a ValueError if a parameter is not a number of type `kind`, or out of range.

    The message includes `besides`, other values that the parameter accepts.

    >>> check_number("lr", -1, numbers.Real, 0)
    Traceback (most recent call last):
        ...
    ValueError: Got lr=-1, but expected a number of at least 0
    """
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not low <= value <= (math.inf if high is None else high):  # type: ignore[operator]
        noun = "an integer" if kind is numbers.Integral else "a number"
        limits = f"of at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        alternatives = f"{besides} or " if besides else ""
        raise ValueError(f"Got {parameter}={value!r}, but expected {alternatives}{noun} {limits}")


def import_optional(name: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a module that only some users need.

    Raises
    ------
    ImportError
        If the module is missing; the message names the purpose and the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {name!r}, which is not installed. "
            f"Install it with: pip install 'sktransfer[{extra}]'"
        ) from error
