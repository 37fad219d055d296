"""The containers that `X` can be: N items that are read by row.

Shapes: N images of H x W pixels with C channels.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from sktransfer.data.decoding import Encoded, channel_axis
from sktransfer.data.items import NUMERIC_KINDS, as_array, describe, is_missing, looks_like_image
from sktransfer.utils.errors import ImageError

_EXPECTED = "expected a list, array, Series, one-column DataFrame or dataset of images"


class DatasetSource:
    """A dataset that is not in memory: read item by item, and by one thread at a time.

    Few datasets are thread-safe. Two threads that share an open file would mix up images without
    an error.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        try:
            with self._lock:
                return self.dataset[row]
        except Exception as error:  # A user's dataset may raise anything.
            raise ImageError(f"The dataset cannot read it: {error!r}.") from error

    def __reduce__(self) -> tuple[type[DatasetSource], tuple[Any]]:
        return DatasetSource, (self.dataset,)  # A lock cannot be pickled.


# Containers


def source_of(X: Any) -> Any:
    """Convert `X` to a form that is read by row: `source[row]` is an item for `items.resolve`.

    Returns
    -------
    list, tuple, ndarray, torch.Tensor, values of a Series, or DatasetSource
        A 2-D array or tensor of numbers holds flat rows. Numbers in nested lists, DataFrames and
        object arrays are copied; everything else is shared.

    Raises
    ------
    TypeError
        If `X` is sparse, has no length or cannot be read by row.
    ValueError
        If `X` is a single image or a table of several columns.
    """
    _refuse_single(X)
    if hasattr(X, "tocsr") or (isinstance(X, torch.Tensor) and X.layout != torch.strided):
        raise TypeError(
            "Sparse data was passed for X, but dense data is required. "
            "Use '.toarray()' to convert to a dense numpy array."
        )
    if isinstance(X, torch.Tensor):
        return X.detach()
    if isinstance(X, list | tuple):
        return _from_list(X)
    if hasattr(X, "columns") and hasattr(X, "head"):
        return _from_frame(X)
    if hasattr(X, "to_numpy") and getattr(X, "ndim", 1) == 1:
        return getattr(X, "array", X)  # pandas reads single values faster from its array.
    # Stacks of images that are not numpy arrays (HDF5, Zarr, ...) may be on disk and stay there.
    if isinstance(X, np.ndarray) or (hasattr(X, "__array__") and getattr(X, "ndim", 2) < 3):
        return _from_array(np.asarray(X))
    return _from_dataset(X)


def holds_rows(source: Any) -> bool:
    """Return whether a source holds numbers of shape (N, n_features)."""
    return is_stack(source) and source.ndim == 2


def is_stack(source: Any) -> bool:
    """Return whether a source is a single array or tensor of numbers."""
    if isinstance(source, np.ndarray):
        return source.dtype.kind in NUMERIC_KINDS + "c"
    return isinstance(source, torch.Tensor)


def check_source(source: Any, image_shape: Sequence[int] | None) -> None:
    """Check that a source as a whole can be images; its items are not read.

    Raises
    ------
    ValueError
        If there are no images, a single image, or rows that do not fit `image_shape`.
    """
    shape = tuple(getattr(source, "shape", (len(source),)))
    if shape[:1] == (0,):
        raise ValueError(
            f"Found array with 0 sample(s) (shape={shape}) while a minimum of 1 is required."
        )
    if is_stack(source) and "complex" in str(source.dtype):
        raise ValueError(f"Complex data not supported: X has dtype {source.dtype}.")
    if len(shape) < 2 and not isinstance(source, DatasetSource):
        _refuse_numbers(source, shape)
    elif len(shape) == 2:
        _check_rows(shape, image_shape)
    elif is_stack(source):
        _check_stack(shape, isinstance(source, torch.Tensor))


def _refuse_single(X: Any) -> None:
    if isinstance(X, Mapping):
        keys = ", ".join(repr(key) for key in X)
        raise ValueError(
            f"Got X as a dict with keys {keys}, but {_EXPECTED}. Pass one of its columns, or, "
            "if it is a single image, wrap it in a list: [image]."
        )
    if isinstance(X, str | os.PathLike) and os.path.isdir(X):
        raise ValueError(
            f"Got X={os.fspath(X)!r}, a folder, but {_EXPECTED}. "
            f"load_image_folder({os.fspath(X)!r}) lists the images in it."
        )
    is_scalar = getattr(X, "ndim", 1) == 0
    if is_scalar or isinstance(X, str | os.PathLike | Encoded | Image.Image):
        raise ValueError(
            f"Got a single image ({describe(X)}), but {_EXPECTED}; wrap it in a list: [image]."
        )


def _refuse_numbers(source: Any, shape: tuple[int, ...]) -> None:
    if is_stack(source) or _is_number(source[0]):
        raise ValueError(
            f"Expected 2D array, got {len(shape)}D array of numbers instead, of shape {shape}. "
            "Reshape your data: X.reshape(1, -1) if it is a single image."
        )


def _check_rows(shape: tuple[int, ...], image_shape: Sequence[int] | None) -> None:
    n_features = shape[1]
    if n_features == 0:
        raise ValueError(
            f"Found array with 0 feature(s) (shape={shape}) while a minimum of 1 is required."
        )
    if image_shape is None:
        raise ValueError(
            f"Got rows of {n_features} numbers (X of shape {shape}), but expected images. "
            "Pass the shape of one image: image_shape=(H, W) or (H, W, C)"
            f"{_suggest_shape(n_features)}. "
            "If X is a single gray image, wrap it in a list: [image]."
        )
    known_size = math.prod(size for size in image_shape if size != -1)
    if n_features % known_size or (-1 not in image_shape and n_features != known_size):
        needed = f"a multiple of {known_size}" if -1 in image_shape else str(known_size)
        raise ValueError(
            f"Got rows of {n_features} numbers, but image_shape={tuple(image_shape)} needs "
            f"{needed}{_suggest_shape(n_features)}."
        )
    channel_axis(tuple(n_features // known_size if size == -1 else size for size in image_shape))


def _suggest_shape(n_features: int) -> str:
    """Suggest an `image_shape`, as the end of an error message."""
    for channels in (1, 3):
        side = math.isqrt(n_features // channels)
        if side * side * channels == n_features:
            shape = (side, side) if channels == 1 else (side, side, 3)
            return f"; here, image_shape={shape} probably fits"
    return "; image_shape=(1, -1) reads each row as an image of height 1"


def _check_stack(shape: tuple[int, ...], is_tensor: bool) -> None:
    channels_first, channels_last = (shape[0] in (3, 4) and is_tensor), shape[-1] in (3, 4)
    is_image = (channels_last and min(shape[:2]) > 4) or (channels_first and min(shape[1:]) > 4)
    if len(shape) == 3 and is_image:
        kind = "tensor" if is_tensor else "array"
        raise ValueError(
            f"Got a single image ({kind} of shape {shape}), but {_EXPECTED}; wrap it in a "
            "list: [image]. If these are gray images, add a channel axis: "
            f"{'X[:, None]' if is_tensor else 'X[..., None]'}."
        )
    channel_axis(shape[1:], is_tensor)


def _from_list(X: Sequence[Any]) -> Any:
    """Stack a list of flat rows; return any other list unchanged."""
    first: Any = X[0] if len(X) else None
    nested = isinstance(first, list | tuple)
    if nested and len(first) > 0 and not isinstance(first[0], Number | np.bool_):
        return X
    if not nested and not (is_stack(first) and first.ndim == 1):
        return X
    try:
        return _from_array(np.stack([as_array(row) for row in X]))
    except ValueError as error:
        raise ValueError(f"Got rows that do not form an array: {error}.") from error


def _from_frame(X: Any) -> Any:
    """Return the numbers of a pandas or polars DataFrame, or its only column of images."""
    if _is_number_table(np.asarray(X.head(1))):
        return _from_array(np.asarray(X))
    if len(X.columns) != 1:
        _refuse_columns(list(X.columns), f"X[[{X.columns[0]!r}]]")
    return source_of(X[X.columns[0]])


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind in NUMERIC_KINDS + "c":
        return array
    if _is_number_table(array):
        return array.astype(np.float64)
    if array.shape[1] != 1:
        _refuse_columns(list(range(array.shape[1])), "X[:, 0]")
    return array.reshape(-1)


def _is_number_table(array: np.ndarray) -> bool:
    """Return whether a 2-D array holds numbers, possibly as objects, rather than images."""
    if array.dtype.kind != "O" or len(array) == 0:
        return array.dtype.kind in NUMERIC_KINDS + "c"
    if array.shape[1] == 1:
        return _is_number(array[0, 0])
    return not any(looks_like_image(value) for value in array[0])


def _refuse_columns(columns: list[Any], example: str) -> None:
    raise ValueError(
        f"Got a table with columns {', '.join(map(repr, columns))}, but expected one column of "
        f"images. Select the column, for example {example}."
    )


def _from_dataset(X: Any) -> DatasetSource:
    name = type(X).__name__
    if isinstance(X, DataLoader):
        raise TypeError(f"Got X of type {name}, but {_EXPECTED}. Pass its dataset: X.dataset.")
    for method in ("__len__", "__getitem__"):
        if not hasattr(X, method) or isinstance(X, IterableDataset):
            remedy = " Convert it to a list first: list(X)." if hasattr(X, "__iter__") else ""
            raise TypeError(
                f"Got X of type {name}, which has no {method}, but {_EXPECTED}.{remedy}"
            )
    return DatasetSource(X)


def _is_number(value: object) -> bool:
    return isinstance(value, Number | np.bool_) and not is_missing(value)
