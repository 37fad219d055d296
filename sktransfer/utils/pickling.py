"""Code among the parameters of an estimator, which pickle, joblib and skops save only by name."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from types import FrameType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

from sktransfer.utils.errors import warn_user

# Modules, and those in them, that copy estimators, hash them or send them to processes of this
# program, or that save the code of functions and classes.
_UNCHECKED = (
    "copy",
    "multiprocessing",
    "multiprocess",
    "concurrent.futures",
    "joblib.externals",  # loky and cloudpickle
    "joblib.pool",
    "joblib.hashing",
    "loky",
    "distributed",  # tries pickle first, and then cloudpickle
    "dask",
    "ray",
    "cloudpickle",
    "pyspark",
    "dill",
)
_MAX_REPR = 80
_OF_PICKLE = {__name__, "pickle", "copyreg"}
# Subclasses may call those of our classes.
_METHODS = {"__getstate__", "__reduce__", "__reduce_ex__"}


def check_other_programs_can_load(parameters: Mapping[str, Any]) -> None:
    """Check parameters that are saved; to be called in the `__getstate__` of estimators.

    Nothing is checked if the estimator is only copied or sent to a worker, or if it is saved by
    cloudpickle or dill, which save code too.

    Raises
    ------
    pickle.PicklingError
        If pickle cannot save a parameter, such as a lambda. skops would save it, but not load it.
    TypeError
        If skops saves a backbone that is a torch module.

    Warns
    -----
    UserWarning
        If a parameter has a function or class of `__main__`.
    """
    saver = _saving_module(sys._getframe(1))
    if any(saver == name or saver.startswith(f"{name}.") for name in _UNCHECKED):
        return
    if saver.startswith("skops."):
        _check_no_module(parameters["backbone"])
    for name, value in parameters.items():
        _check_code(name, value)


def _saving_module(frame: FrameType) -> str:
    """Return the name of the module that saves or copies an estimator."""
    while frame.f_back is not None and (
        frame.f_globals.get("__name__") in _OF_PICKLE or frame.f_code.co_name in _METHODS
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


def _check_no_module(backbone: Any) -> None:
    if isinstance(backbone, torch.nn.Module):  # skops cannot save tensors, but does not say so
        raise TypeError(
            f"Got a {type(backbone).__name__} as backbone, but skops cannot save a torch module. "
            "Pass a class or function that builds it, with the path of its weights as weights, or "
            "save the estimator with pickle or joblib"
        )


def _check_code(parameter: str, value: Any) -> None:
    finder = _CodeFinder()
    try:
        finder.dump(value)
    except Exception as error:  # objects that cannot be pickled raise anything
        reason = f"which pickle, joblib and skops cannot save: {error}"
        if finder.nameless:
            reason += ". They save code by the name by which it is imported"
        raise pickle.PicklingError(
            f"{_got(parameter, value)}, {reason}. {_remedy(parameter, finder.nameless)}"
        ) from error
    if finder.of_main:
        warn_user(
            f"{_got(parameter, value)}, but only a program that defines "
            f"{_listed(finder.of_main)} in its own main script or notebook can load this file. "
            f"{_remedy(parameter, finder.of_main)}",
        )


def _got(parameter: str, value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of the user's class
        text = f"a {type(value).__name__}"
    return f"Got {parameter}={text if len(text) <= _MAX_REPR else text[:_MAX_REPR] + '...'}"


def _remedy(parameter: str, code: list[str]) -> str:
    effect = "saves its weights" if parameter == "backbone" else "leaves it out"
    save = f"sktransfer.save, which {effect}"
    if not code:
        return f"Save the model with {save}"
    return (
        f"Define {_listed(code)} in a module that you import, or save the model with "
        f"cloudpickle.dump or with {save}"
    )


def _listed(code: list[str]) -> str:
    return ", ".join(dict.fromkeys(code))


class _CodeFinder(pickle.Pickler):
    """Pickles a value to nowhere, and lists functions and classes that may not be found again.

    Attributes
    ----------
    nameless : list of str
        Those that their module does not have under their name, such as `"<lambda>"`.
    of_main : list of str
        The others of `__main__`.
    """

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(write=len))
        self.nameless: list[str] = []
        self.of_main: list[str] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor | np.ndarray | BaseEstimator):
            return str, ()  # no code, or checked when it is saved itself
        if isinstance(obj, FunctionType | type) and obj.__module__ != "builtins":
            if not _has_name(obj):
                self.nameless.append(obj.__qualname__)
            elif obj.__module__ == "__main__":
                self.of_main.append(obj.__qualname__)
        return NotImplemented


def _has_name(code: FunctionType | type) -> bool:
    """Return whether a module has a function or class under its name, as pickle requires.

    Examples
    --------
    >>> _has_name(_listed), _has_name(lambda: None)
    (True, False)
    """
    value: Any = sys.modules.get(code.__module__)
    for name in code.__qualname__.split("."):
        value = getattr(value, name, None)
    return value is code
