"""The containers that `X` can be: N items that are read by row.

Shapes: N images of H x W pixels with C channels.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sktransfer.data.decoding import Encoded, channel_axis
from sktransfer.data.items import (
    LAZY_LIBRARIES,
    NUMERIC_KINDS,
    as_array,
    describe,
    encoded_buffer,
    has_signature,
    is_file,
    is_missing,
    looks_like_image,
)
from sktransfer.utils.errors import ImageError

_EXPECTED = "expected a list, array, Series, one-column DataFrame or dataset of images"

# Others are converted to numpy.
_TENSOR_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.int64, torch.uint64, torch.bool, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex32, torch.complex64, torch.complex128),
)

# Methods that load lazy data, in order of preference.
_LOADING_METHODS = ("toPandas", "to_pandas", "collect", "compute", "to_table", "execute", "df")
# Items that have a length.
_SINGLE_ITEMS = (str, os.PathLike, Encoded, Image.Image, Mapping)


class DatasetSource:
    """A dataset that is not in memory: read item by item, and by one thread at a time.

    Few datasets are thread-safe. Two threads that share an open file would mix up images without
    an error. Arrays on disk may have a shape, but no length (Zarr).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else self.dataset.shape[0]

    def __getitem__(self, row: int) -> Any:
        try:
            with self._lock:
                return self.dataset[row]
        except Exception as error:  # A user's dataset may raise anything.
            raise ImageError(f"The dataset cannot read it: {error!r}.") from error

    def __reduce__(self) -> tuple[type[DatasetSource], tuple[Any]]:
        return DatasetSource, (self.dataset,)  # A lock cannot be pickled.


class ArrowSource:
    """A column of pyarrow, whose scalars become Python objects when they are read."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> Any:
        value = self.column[row]
        # A tensor is flat as a Python object.
        return value.to_numpy() if hasattr(value, "to_numpy") else value.as_py()


# Containers


def source_of(X: Any) -> Any:
    """Convert `X` to a form that is read by row: `source[row]` is an item for `items.resolve`.

    Returns
    -------
    list, tuple, ndarray, torch.Tensor, values of a Series, ArrowSource, or DatasetSource
        A 2-D array or tensor of numbers holds flat rows. Numbers in nested lists, DataFrames and
        object arrays are copied; everything else is shared.

    Raises
    ------
    TypeError
        If `X` is sparse, lazy, has no length or cannot be read by row.
    ValueError
        If `X` is a single image, a tuple (X, y) or a table of several columns.
    """
    _refuse_lazy(X)
    if isinstance(X, torch.Tensor) and X.is_nested:
        return [tensor.detach() for tensor in X.unbind()]
    if hasattr(X, "tocsr") or (isinstance(X, torch.Tensor) and X.layout != torch.strided):
        raise TypeError(
            "Sparse data was passed for X, but dense data is required. "
            "Use '.toarray()' to convert to a dense numpy array."
        )
    _refuse_closed(X)
    _refuse_single(X)
    _refuse_pair(X)
    if isinstance(X, torch.Tensor):
        return X.detach() if X.dtype in _TENSOR_DTYPES else as_array(X)
    if isinstance(X, list | tuple):
        return _from_list(X)
    if type(X).__module__.partition(".")[0] == "pyarrow":
        return _from_arrow(X)
    if hasattr(X, "columns") and hasattr(X, "head"):
        return _from_frame(X)
    if hasattr(X, "to_numpy") and getattr(X, "ndim", 1) == 1:
        return _from_series(X)
    if isinstance(X, np.ma.MaskedArray):
        return _from_masked(X)
    if isinstance(X, np.ndarray) or _belongs_in_memory(X):
        return _from_array(np.asarray(X))
    return _from_dataset(X)


def _belongs_in_memory(X: Any) -> bool:
    """Return whether `X` can be converted to an array of paths or rows; images stay on disk."""
    if not hasattr(X, "__array__") or getattr(X, "ndim", 2) >= 3:
        return False
    # HDF5 holds encoded images as arrays of uint8 with different lengths, or as opaque bytes.
    dtype = getattr(X, "dtype", None)
    lengths_vary = isinstance((getattr(dtype, "metadata", None) or {}).get("vlen"), np.dtype)
    return not lengths_vary and getattr(dtype, "kind", "") != "V"


def holds_rows(source: Any) -> bool:
    """Return whether a source holds numbers of shape (N, n_features)."""
    return is_stack(source) and source.ndim == 2


def is_stack(source: Any) -> bool:
    """Return whether a source is a single array or tensor of numbers."""
    if isinstance(source, np.ndarray):
        return source.dtype.kind in NUMERIC_KINDS + "c"
    return isinstance(source, torch.Tensor)


def check_source(source: Any, image_shape: Sequence[int] | None) -> None:
    """Check that a source can hold images, without reading its items.

    Raises
    ------
    ValueError
        If there are no images, a single image, or rows that do not fit `image_shape`.
    """
    shape = _shape_of(source)
    if shape[:1] == (0,):
        remedy = " If X comes from glob, its pattern matches no file." if len(shape) == 1 else ""
        raise ValueError(
            f"Got no images: found array with 0 sample(s) (shape={shape}) while a minimum of 1 is "
            f"required.{remedy}"
        )
    if is_stack(source) and "complex" in str(source.dtype):
        raise ValueError(f"Complex data not supported: X has dtype {source.dtype}.")
    if len(shape) > 2:
        _check_stack(shape, isinstance(source, torch.Tensor))
    elif len(shape) == 2:
        _check_rows(shape, image_shape)
    elif not isinstance(source, DatasetSource):
        _refuse_numbers(source, shape)


def _shape_of(source: Any) -> tuple[int, ...]:
    """Return the shape of a source: (N,), or that of a single array, which may be on disk."""
    dataset = getattr(source, "dataset", source)
    shape = tuple(getattr(dataset, "shape", ()))
    is_numeric = getattr(getattr(dataset, "dtype", None), "kind", "") in NUMERIC_KINDS
    if isinstance(source, DatasetSource) and not (is_numeric and len(shape) > 2):
        return (len(source),)
    return shape or (len(source),)


def _refuse_lazy(X: Any) -> None:
    """Raise a TypeError if the values of `X` have not been computed yet."""
    is_lazy = type(X).__module__.partition(".")[0] in LAZY_LIBRARIES
    if not is_lazy and (hasattr(X, "__len__") or isinstance(X, Iterable)):
        return
    for method in _LOADING_METHODS:
        if callable(getattr(type(X), method, None)):
            raise TypeError(
                f"Got X of type {type(X).__name__}, which is lazy, but {_EXPECTED}. "
                f"Load it first: call .{method}()."
            )


def _refuse_closed(X: Any) -> None:
    """Raise a ValueError if `X` is a dataset of an HDF5 file that was closed."""
    if type(X).__module__.startswith("h5py.") and not X:
        raise ValueError(
            f"Got X as a closed HDF5 {type(X).__name__}, but {_EXPECTED}. Keep its file open, or "
            "read the images before it is closed: dataset[:]."
        )


def _refuse_single(X: Any) -> None:
    is_group = callable(getattr(X, "keys", None)) and not hasattr(X, "shape")
    is_group = is_group and not isinstance(X, Dataset)
    if isinstance(X, Mapping) or (is_group and not hasattr(X, "columns") and hasattr(X, "__len__")):
        names = list(X.keys())
        keys = ", ".join(map(repr, names))
        example = f", such as X[{names[0]!r}]" if names else ""
        kind = "dict" if isinstance(X, Mapping) else type(X).__name__
        raise ValueError(
            f"Got X as a {kind} with keys {keys}, but {_EXPECTED}. "
            f"Pass one of its values{example}, "
            "or, if it is a single image, wrap it in a list: [image]."
        )
    if isinstance(X, str | os.PathLike) and os.path.isdir(os.path.expanduser(X)):
        raise ValueError(
            f"Got X={os.fspath(X)!r}, a folder, but {_EXPECTED}. "
            f"load_image_folder({os.fspath(X)!r}) lists the images in it."
        )
    is_scalar = getattr(X, "ndim", 1) == 0 or hasattr(X, "as_py")
    is_encoded = is_file(X) or (is_stack(X) and encoded_buffer(X) is not None)
    if is_scalar or is_encoded or isinstance(X, str | os.PathLike | Encoded | Image.Image):
        raise ValueError(
            f"Got a single image ({describe(X)}), but {_EXPECTED}; wrap it in a list: [image]."
        )


def _refuse_pair(X: Any) -> None:
    """Raise a ValueError if `X` is a tuple of images and the same number of labels."""
    if not isinstance(X, tuple) or len(X) != 2:
        return
    if any(not hasattr(part, "__len__") or isinstance(part, _SINGLE_ITEMS) for part in X):
        return
    if any(getattr(part, "ndim", 1) == 0 for part in X) or not 0 < len(X[0]) == len(X[1]):
        return
    image, label = (next(iter(part)) for part in X)
    if isinstance(label, Number | str | np.generic) and not isinstance(image, Number):
        raise ValueError(
            f"Got X as a tuple (X, y) of images and labels, as return_X_y=True returns it, but "
            f"{_EXPECTED}. Unpack it first: X, y = X."
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
    if encoded_buffer(first) is not None and all(encoded_buffer(item) is not None for item in X):
        return X
    if nested and any(map(looks_like_image, first[1:])):
        raise ValueError(
            f"Got a {type(first).__name__} whose first entry is not an image "
            f"({describe(first[0])}), but expected images, or (image, label, ...). Select the "
            f"images: [item[{[*map(looks_like_image, first)].index(True)}] for item in X]."
        )
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


def _from_arrow(X: Any) -> Any:
    """Return an array, a chunked array or the only column of a table of pyarrow as a source."""
    if hasattr(X, "column_names"):
        columns = [X.column(index) for index in range(X.num_columns)]
        first_row = [column[0].as_py() for column in columns] if len(X) else []
        if first_row and all(map(_is_number, first_row)):
            return _from_array(np.column_stack([np.asarray(column) for column in columns]))
        if len(columns) != 1:
            _refuse_columns(X.column_names, f"X[{X.column_names[0]!r}]")
        return ArrowSource(columns[0])
    if hasattr(X, "strides"):  # a tensor
        return _from_array(X.to_numpy())
    if hasattr(X, "to_numpy_ndarray"):  # an array of tensors of one shape
        return _from_array(X.to_numpy_ndarray())
    return ArrowSource(X) if hasattr(X, "null_count") else _from_dataset(X)


def _from_series(X: Any) -> Any:
    """Return the values of a Series, or of anything else with one axis that is like one."""
    if hasattr(X, "levels"):  # an index of several levels
        return _from_array(np.array(X.to_list(), dtype=object))
    if hasattr(X, "array"):
        return X.array  # pandas reads single values faster from its array
    return np.asarray(X) if hasattr(X, "dims") else X


def _from_masked(X: np.ma.MaskedArray) -> np.ndarray:
    """Return the values of a masked array; a masked value is a missing image."""
    if not np.ma.is_masked(X):
        return _from_array(X.data)
    if X.dtype.kind in NUMERIC_KINDS:
        raise ValueError(
            f"Got a masked array with {np.ma.count_masked(X):,} masked pixels, but expected "
            "all pixels. Fill them: X.filled(0)."
        )
    values = X.data.astype(object)
    values[np.ma.getmaskarray(X)] = None
    return _from_array(values)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "S" and array.size and has_signature(array.flat[0]):
        # numpy cuts zeros off the end of such strings, which may be pixels.
        array = np.ascontiguousarray(array).view(f"V{array.itemsize}")
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
        if method == "__len__" and getattr(X, "shape", None):
            continue  # an array on disk, such as Zarr's
        if not hasattr(X, method) or isinstance(X, IterableDataset):
            remedy = " Convert it to a list first: list(X)." if hasattr(X, "__iter__") else ""
            if isinstance(X, itertools.count | itertools.cycle | itertools.repeat):
                remedy = " It may not end; choose its first n: list(itertools.islice(X, n))."
            lack = f"has no {method}" if not hasattr(X, method) else "is read only in order"
            raise TypeError(f"Got X of type {name}, which {lack}, but {_EXPECTED}.{remedy}")
    is_dataset = type(X).__module__.startswith("datasets.") and hasattr(X, "with_format")
    # In a format of tables, an item is a table of one row.
    is_table = is_dataset and X.format["type"] in ("pandas", "polars", "arrow")
    return DatasetSource(X.with_format(None) if is_table else X)


def _is_number(value: object) -> bool:
    return isinstance(value, Number | np.bool_) and not is_missing(value)
