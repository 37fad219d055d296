"""Items of `X`, resolved to paths, encoded bytes, PIL images or arrays of pixels.

Shapes: H x W pixels, C channels (1 gray, 2 gray and alpha, 3 RGB, 4 RGBA).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from sktransfer.data.decoding import Encoded, RawImage, channel_axis
from sktransfer.utils.errors import ImageError

NUMERIC_KINDS = "biuf"

_IMAGE_KEYS = ("image", "img", "pixel_values", "bytes", "path")


def resolve(item: Any, image_shape: Sequence[int] | None = None) -> RawImage:
    """Reduce an item of `X` to a path, encoded bytes, a PIL image or an array.

    Parameters
    ----------
    item : object
        A path, encoded bytes, a PIL image, a numeric array or torch tensor of shape (H, W),
        (H, W, C) or (C, H, W), a dict as in Hugging Face `datasets`, or an
        (image, label, ...) tuple as in a torch Dataset.
    image_shape : sequence of int or None
        The shape of an image that is given as a 1-D array of numbers.

    Returns
    -------
    str, bytes-like, PIL.Image.Image or ndarray of shape (H, W, C)
        The array keeps its dtype and shares the item's memory if possible.

    Raises
    ------
    ImageError
        If the item is not an image.
    """
    if isinstance(item, str | Encoded | Image.Image):
        return item
    if isinstance(item, os.PathLike):
        return os.fsdecode(item)
    if isinstance(item, Mapping):
        _check_keys(item)
        return resolve(_value_of(item), image_shape)
    if _wraps_image(item):
        return resolve(item[0], image_shape)
    return _channels_last(as_array(item), isinstance(item, torch.Tensor), image_shape)


def looks_like_image(value: object) -> bool:
    """Return whether a value is an image or leads to one, rather than a number or label."""
    if isinstance(value, Mapping):
        return any(key in value for key in _IMAGE_KEYS)
    if isinstance(value, str | os.PathLike | Encoded | Image.Image):
        return True
    return getattr(value, "ndim", 0) > 0


def describe(item: Any) -> str:
    """Describe an item of `X` in a few words; never fails.

    Examples
    --------
    >>> describe("cat.jpg"), describe(b"..."), describe(np.zeros((8, 8))), describe(None)
    ('cat.jpg', 'bytes', 'array of shape (8, 8)', 'missing value')
    """
    if isinstance(item, str | os.PathLike):
        return os.fsdecode(item)
    if isinstance(item, Encoded):
        return "bytes"
    if isinstance(item, Image.Image):
        return f"PIL image, {item.mode}, {item.width} x {item.height}"
    if isinstance(item, Mapping) and looks_like_image(item):
        return describe(item.get("path") or _value_of(item))
    if _wraps_image(item):
        return describe(item[0])
    if hasattr(item, "shape"):
        kind = "tensor" if isinstance(item, torch.Tensor) else "array"
        return f"{kind} of shape {tuple(item.shape)}"
    return "missing value" if is_missing(item) else type(item).__name__


def path_of(item: Any) -> str | None:
    """Return the path of an item of `X`, or None if it has none; never fails.

    Examples
    --------
    >>> path_of("cat.jpg"), path_of({"path": "cat.jpg", "bytes": b"..."}), path_of(b"...")
    ('cat.jpg', 'cat.jpg', None)
    """
    if isinstance(item, str | os.PathLike):
        return os.fsdecode(item)
    if isinstance(item, Mapping) and looks_like_image(item):
        return path_of(item.get("path") or _value_of(item))
    return path_of(item[0]) if _wraps_image(item) else None


def _check_keys(item: Mapping[str, Any]) -> None:
    if not looks_like_image(item):
        keys = ", ".join(repr(key) for key in item)
        raise ImageError(
            f"Got a dict with keys {keys}, but expected one of 'image', 'img', 'pixel_values', "
            "'bytes', 'path'. Pass the column of images itself."
        )


def _value_of(item: Mapping[str, Any]) -> Any:
    # Hugging Face represents an image on disk as {"bytes": None, "path": ...}.
    values = (item[key] for key in _IMAGE_KEYS if key in item)
    return next((value for value in values if value is not None), None)


def _wraps_image(item: object) -> bool:
    """Return whether an item is an (image, label, ...) tuple, or a list of one image."""
    if isinstance(item, tuple) or (isinstance(item, list) and len(item) == 1):
        return len(item) > 0 and looks_like_image(item[0])
    return False


def is_missing(item: object) -> bool:
    """Return whether an item is None, NaN or pandas' NA."""
    # Checked by name, since pandas may not be installed.
    if item is None or type(item).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(item, float) and math.isnan(item)


def are_missing(items: np.ndarray) -> np.ndarray:
    """Return a mask of the missing items."""
    return np.array([is_missing(item) for item in items.tolist()], dtype=bool)


def as_array(item: Any) -> np.ndarray:
    """Convert a tensor, nested lists or anything else array-like to an array of any dtype.

    Raises
    ------
    ImageError
        If the item is not array-like.
    """
    if isinstance(item, torch.Tensor):
        # numpy has no bfloat16.
        return (item.float() if item.dtype == torch.bfloat16 else item).numpy(force=True)
    if not is_missing(item) and (hasattr(item, "__array__") or isinstance(item, list | tuple)):
        try:
            return np.asarray(item)
        except ValueError as error:
            raise ImageError(f"The numbers do not form an array: {error}") from error
    raise ImageError(
        f"Got {describe(item)}, but expected a path, a PIL image, an array, a tensor, "
        "encoded bytes or a dict."
    )


def _channels_last(
    array: np.ndarray, channels_first: bool, image_shape: Sequence[int] | None
) -> np.ndarray:
    """View an (H, W), (H, W, C) or (C, H, W) array, or a flattened one, as (H, W, C)."""
    if array.ndim == 1 and image_shape is not None:
        try:
            array, channels_first = array.reshape(image_shape), False
        except ValueError as error:
            raise ImageError(
                f"Got {array.size} numbers, which do not fit {image_shape=}."
            ) from error
    if array.dtype.kind == "c":
        raise ImageError("Complex data not supported.")
    if array.dtype.kind not in NUMERIC_KINDS:
        raise ImageError(f"Got pixels of dtype {array.dtype}, but expected numbers.")
    axis = channel_axis(array.shape, channels_first)
    return array[:, :, np.newaxis] if axis is None else np.moveaxis(array, axis, -1)
