"""Python values as JSON, with types that JSON lacks; decoding creates plain values and arrays only.

Examples
--------
>>> encode(("all", 1.5, None))
{'tuple': ['all', 1.5, None]}
>>> decode({'tuple': ['all', 1.5, None]})
('all', 1.5, None)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# Kinds of arrays: bool, integers, float, str, and objects that are any of these.
_KINDS = "biufUO"
# Of a string of 4,096 characters.
_MAX_ITEM_BYTES = 2**14


def encode(value: Any) -> Any:
    """Encode a value.

    Parameters
    ----------
    value : None, bool, int, float, str, list, tuple, dict, or numpy scalar or array of these

    Raises
    ------
    TypeError
        If it is something else.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        return {"array": encode(value.tolist()), "dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"Got a {type(value).__name__}, which has no form in JSON")


def decode(encoded: Any) -> Any:
    """Decode a value.

    Raises
    ------
    ValueError, TypeError, KeyError
        If it is not the result of `encode`.
    """
    if isinstance(encoded, list):
        return [decode(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if "array" in encoded:
        return _decode_array(encoded)
    ((kind, content),) = encoded.items()
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "float":
        return float(content)
    raise ValueError(f"Got an unknown kind of value, {kind!r}")


def _decode_array(encoded: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(str(encoded["dtype"]))
    if dtype.kind not in _KINDS or dtype.itemsize > _MAX_ITEM_BYTES:
        raise ValueError(f"Got an array of {dtype}")
    return np.array(decode(encoded["array"]), dtype).reshape(encoded["shape"])
