"""Errors that say what was got, what was expected, and what to do about it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# Broken images that the message of an ImageError names.
_MAX_NAMED_IMAGES = 10
# Strings that would become directories, but are meant as None, True or False.
_NOT_DIRECTORIES = ("none", "null", "nil", "false", "true", "off", "on", "no", "yes")
# Packages that call this one for the user; a warning that named their lines would not help.
_INTERMEDIATE_PACKAGES = {
    *("concurrent", "contextlib", "copy", "copyreg", "joblib", "pickle", "sklearn", "skops"),
    *("skorch", "sktransfer", "threading"),
}


class ImageError(ValueError):
    """One or more images that cannot be read.

    Parameters
    ----------
    reason : str
        The problem of the first image, and the remedy.
    row : int or None
        Position of the first image in `X`, if it is known.
    source : str
        Short description of the first item: a path, `"bytes"`, `"array of shape (0, 0)"`.
    others : tuple of ImageError
        The other broken images, one error each.
    argument : str
        Name of the argument that the row belongs to, such as `"X_val"`; empty for `X`.

    Attributes
    ----------
    errors : list of ImageError
        All broken images, one error each, by row.
    """

    def __init__(
        self,
        reason: str,
        row: int | None = None,
        source: str = "",
        others: tuple[ImageError, ...] = (),
        argument: str = "",
    ) -> None:
        super().__init__(reason, row, source, others, argument)
        self.reason = reason
        self.row = row
        self.source = source
        self.others = others
        self.argument = argument

    @classmethod
    def of(cls, errors: Iterable[ImageError]) -> ImageError:
        """Combine the errors of several images, at least one, into a single error.

        Examples
        --------
        >>> error = ImageError.of([ImageError("Empty.", 7, "b.png"), ImageError("Gone.", 2, "a")])
        >>> print(error)  # doctest: +ELLIPSIS
        Got 2 images that cannot be read:
        - Image in row 2 (a): Gone.
        - Image in row 7 (b.png): Empty.
        ...
        >>> error.row, len(error.errors)
        (2, 2)
        """
        # Several views of an image have the same row and the same problem.
        unique = {
            (error.argument, error.row, error.source): error
            for several in errors
            for error in several.errors
        }
        first, *others = sorted(
            unique.values(),
            key=lambda error: (error.argument, math.inf if error.row is None else error.row),
        )
        return cls(first.reason, first.row, first.source, tuple(others), first.argument)

    @property
    def errors(self) -> list[ImageError]:
        """All broken images, one error each."""
        first = ImageError(self.reason, self.row, self.source, argument=self.argument)
        return [first, *self.others]

    def __repr__(self) -> str:
        first = f"{type(self).__name__}({str(self.errors[0])!r}"
        more = f", and {len(self.others):,} more)" if self.others else ")"
        return first + more

    def __str__(self) -> str:
        if self.others:
            return self._list()
        where = "Image" if self.row is None else f"Image in row {self.row}"
        where += f" of {self.argument}" if self.argument else ""
        source = f" ({self.source})" if self.source else ""
        return f"{where}{source}: {self.reason}"

    def _list(self) -> str:
        return "\n".join(
            [
                f"Got {len(self.errors):,} images that cannot be read{list_errors(self.errors)}",
                "Fix the cause, or leave these images out. `error.errors` lists all of them. Rows "
                "count the images that this call got, such as those of one fold.",
            ]
        )


def list_errors(errors: Sequence[ImageError]) -> str:
    """Return the first ten errors as the end of a message, one a line.

    Examples
    --------
    >>> print("2 images" + list_errors([ImageError("Gone.", 2, "a"), ImageError("Gone.", 5, "b")]))
    2 images:
    - Image in row 2 (a): Gone.
    - Image in row 5 (b): Gone.
    """
    first = f"; the first {_MAX_NAMED_IMAGES}" if len(errors) > _MAX_NAMED_IMAGES else ""
    return "\n".join([f"{first}:", *(f"- {error}" for error in errors[:_MAX_NAMED_IMAGES])])


class WeightsNotFoundError(FileNotFoundError):
    """Pretrained weights are not on this machine and cannot be downloaded."""


class ModelFileError(ValueError):
    """A file is not a saved model that can be loaded.

    Parameters
    ----------
    path : path
    problem : str
        What is wrong with it, and what to do if anything can be done.

    Examples
    --------
    >>> raise ModelFileError("birds.skt", "it is damaged")
    Traceback (most recent call last):
        ...
    sktransfer.utils.errors.ModelFileError: Got 'birds.skt', but it is damaged
    """

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(f"Got {os.fspath(path)!r}, but {problem}")
        self.path, self.problem = os.fspath(path), problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.problem)


class EngineError(RuntimeError):
    """An engine that cannot run a network."""


class ExportError(RuntimeError):
    """A model that cannot be exported, or whose export computes something else."""


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


def check_choice(
    parameter: str, value: object, options: Iterable[str | None], *, besides: str = ""
) -> None:
    """Check that `value` is one of `options`; `besides` says what else the caller accepts.

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
            f"Got {parameter}={value!r}, but expected one of {expected}"
            f"{besides and f', or {besides}'}{did_you_mean(value, names)}"
        )


def check_number(
    parameter: str,
    value: object,
    kind: type,
    low: float,
    high: float | None = None,
    *,
    above_low: bool = False,
    below_high: bool = False,
    besides: str = "",
    remedy: str = "",
) -> None:
    """Raise a ValueError if a parameter is not a finite number of type `kind`, or out of range.

    Parameters
    ----------
    parameter : str
    value : object
    kind : numbers.Integral or numbers.Real
        Numbers of numpy are accepted, booleans are not.
    low : float
        Minimum.
    high : float or None
        Maximum; None is any finite number.
    above_low, below_high : bool
        Whether the minimum, or the maximum, is excluded itself.
    besides : str
        Other values that the parameter accepts, for the message.
    remedy : str
        End of the message.

    Examples
    --------
    >>> check_number("lr", -1, numbers.Real, 0)
    Traceback (most recent call last):
        ...
    ValueError: Got lr=-1, but expected a number of at least 0
    """
    number: Any = value
    if (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (number > low if above_low else number >= low)
        and number < math.inf
        and (high is None or (number < high if below_high else number <= high))
    ):
        return
    noun = "an integer" if kind is numbers.Integral else "a number"
    limits = _limits(low, high, above_low=above_low, below_high=below_high)
    alternatives = f"{besides} or " if besides else ""
    ending = f"; {remedy}" if remedy else ""
    raise ValueError(
        f"Got {parameter}={value!r}, but expected {alternatives}{noun} {limits}{ending}"
    )


def _limits(low: float, high: float | None, *, above_low: bool, below_high: bool) -> str:
    if high is None:
        return f"above {low:,g}" if above_low else f"of at least {low:,g}"
    if not above_low and not below_high:
        return f"from {low:,g} to {high:,g}"
    minimum = f"above {low:,g}" if above_low else f"of at least {low:,g}"
    return f"{minimum} and {'below' if below_high else 'at most'} {high:,g}"


def check_bool(parameter: str, value: object) -> None:
    """Raise a ValueError if a parameter is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"Got {parameter}={value!r}, but expected True or False")


def check_verbose(verbose: object) -> None:
    """Raise a ValueError if `verbose` is neither a boolean nor an integer of at least 0."""
    if not isinstance(verbose, bool | np.bool_):
        check_number("verbose", verbose, numbers.Integral, 0, besides="True, False")


def check_random_state(random_state: object, maximum: int = 2**63 - 1) -> None:
    """Raise a ValueError if `random_state` is not a seed up to a maximum, a RandomState or None.

    Unlike scikit-learn's function of this name, it returns nothing, and draws no random numbers.
    """
    if random_state is None or isinstance(random_state, np.random.RandomState):
        return
    is_seed = isinstance(random_state, numbers.Integral) and not isinstance(random_state, bool)
    if not is_seed or not 0 <= random_state <= maximum:  # type: ignore[operator]
        raise ValueError(
            f"Got random_state={random_state!r}, but expected None, an int from 0 to "
            f"{maximum:,}, or a numpy.random.RandomState"
        )


def file_path(path: Any, example: str) -> Path:
    """Return the path of a file, with its `~` expanded.

    Parameters
    ----------
    path : object
        Of the caller; a model if the arguments were swapped.
    example : str
        A call with a path, for the message.

    Raises
    ------
    TypeError
        If it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"Got {type(path).__name__} as the path, but expected the name of a file, as in "
            f"{example}"
        )
    return Path(path).expanduser()


def check_directory(parameter: str, value: object, *, besides: str = "", purpose: str = "") -> None:
    """Check that a parameter is the path of a directory, which need not exist yet.

    Parameters
    ----------
    parameter : str
    value : object
    besides : str
        All values that the parameter accepts, for the message: `"a directory or None"`.
    purpose : str
        For the message.

    Raises
    ------
    TypeError
        If the value is not a path.
    ValueError
        If it is empty, or a string such as "None".
    NotADirectoryError
        If it is the path of a file.
    """
    expected = f"but expected {besides or 'a directory'}{purpose}"
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"Got {parameter}={value!r}, {expected}")
    if not str(value):
        raise ValueError(f"Got {parameter}='', {expected}; for the current one, pass '.'")
    if isinstance(value, str) and value.lower() in _NOT_DIRECTORIES:
        raise ValueError(
            f"Got the string {parameter}={value!r}, {expected}; pass None without quotation marks, "
            f"or './{value}' for a directory of this name"
        )
    path = Path(value).expanduser()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"Got the file {str(path)!r}, {expected}; pass another path, or move that file away."
        )


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


def warn_user(message: str) -> None:
    """Warn with a `UserWarning` that names the line of the user's code which led to it."""
    frame, level = inspect.currentframe(), 1
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _INTERMEDIATE_PACKAGES:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=2 if frame is None else level)
