"""Items of `X`, resolved to paths, URLs, encoded bytes, PIL images or arrays of pixels.

Shapes: H x W pixels, C channels (1 gray, 2 gray and alpha, 3 RGB, 4 RGBA).
"""

from __future__ import annotations

import base64
import inspect
import io
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image

from sktransfer.data.decoding import Encoded, RawImage, channel_axis
from sktransfer.data.remote import RemoteFile, as_remote_file
from sktransfer.utils.errors import ImageError

NUMERIC_KINDS = "biuf"

# Libraries whose values are lazy.
LAZY_LIBRARIES = ("dask", "dask_expr", "pyspark", "duckdb", "_duckdb", "ibis")

_IMAGE_KEYS = ("image", "img", "pixel_values", "bytes", "path")

# The first bytes of encoded images, long enough that pixels do not begin like this.
_SIGNATURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xc0-\xcf\xdb\xe0-\xef\xfe]|GIF8[79]a|RIFF....WEBP"
    rb"|BM.{4}\0\0\0\0|II[*+]\0|MM\0[*+]|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|....ftyp"
    rb"|P[1-7fF][\s]|\0\0[\1\2]\0.\0|qoif|8BPS|icns|DDS |\x0a[\0-\5]\x01[\1\2\4\x08]",
    re.S,
)
_SIGNATURE_LENGTH = 16
# Strings up to this length can be the name of a file, so they are kept whole in messages.
_MAX_PATH_LENGTH, _SHOWN_LENGTH = 255, 80
# An encoded image has more characters in base64 than this.
_MIN_BASE64_LENGTH = 48

_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")

# Two threads that read the same file would move each other's position.
_FILE_LOCK = threading.Lock()


def resolve(item: Any, image_shape: Sequence[int] | None = None) -> RawImage | RemoteFile:
    """Reduce an item of `X` to a path, a URL, encoded bytes, a PIL image or an array.

    Parameters
    ----------
    item : object
        A path (`str`, `Path` or `bytes`), a URL (`str` or `Path`), encoded bytes in any buffer, an
        open binary file, a PIL image, a numeric array or torch tensor of shape (H, W), (H, W, C) or
        (C, H, W), a dict as in Hugging Face `datasets`, an (image, label, ...) tuple as in a torch
        Dataset, or a scalar of pyarrow, numpy or xarray that holds one of these.
    image_shape : sequence of int or None
        The shape of an image that is given as a 1-D array of numbers.

    Returns
    -------
    str, RemoteFile, bytes-like, PIL.Image.Image or ndarray of shape (H, W, C)
        A `file://` URL becomes its path. The array keeps its dtype and shares the item's memory if
        possible.

    Raises
    ------
    ImageError
        If the item is not an image.
    """
    if isinstance(item, str):
        return _path_or_url(item)
    if _is_pixels(item):
        return _channels_last(item, False, image_shape)
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, os.PathLike):
        return _path_or_url(os.fsdecode(item))
    if isinstance(item, Encoded):
        return _encoded_or_path(item, image_shape)
    if isinstance(item, Mapping) and not _is_arrow_scalar(item):
        _check_keys(item)
        value = _value_of(item)
        # The value of "bytes" is an encoded image, never a path.
        is_content = isinstance(value, Encoded) and value is item.get("bytes")
        return value if is_content else resolve(value, image_shape)
    if (inner := _unwrapped(item)) is not item:
        return resolve(inner, image_shape)
    if (content := _read(item)) is not None:
        return content
    if (encoded := encoded_buffer(item)) is not None and not _fits(item, image_shape):
        return encoded
    array = as_array(item)
    return _channels_last(array, isinstance(item, torch.Tensor), image_shape)


def _is_pixels(item: Any) -> bool:
    """Return whether an item is an array that can be nothing but pixels: the most common one."""
    if type(item) is not np.ndarray or item.dtype.kind not in NUMERIC_KINDS:
        return False
    return item.ndim > 2 or (item.ndim == 2 and 1 not in item.shape)


def _unwrapped(item: Any) -> Any:
    """Return the image in a tuple or scalar; return any other item unchanged."""
    if type(item).__name__ == "Delayed" and type(item).__module__.startswith("dask"):
        raise ImageError("Got a Delayed, which is lazy. Call its compute() first.")
    if _is_arrow_scalar(item):
        return item.as_py()
    if _wraps_image(item):
        return item[0]
    if _is_scalar(item):
        return item.item()
    if _is_single_object(item):
        return np.asarray(item).item()
    return item


def _is_scalar(item: Any) -> bool:
    """Return whether an item is an array without axes that holds text, bytes or an object."""
    kind = getattr(getattr(item, "dtype", None), "kind", "")
    return getattr(item, "ndim", None) == 0 and kind in ("U", "S", "T", "V", "O")


def _is_single_object(item: Any) -> bool:
    """Return whether an item is an array or row of a table that holds one path or object."""
    if isinstance(item, torch.Tensor) or not hasattr(item, "__array__"):
        return False
    shape = getattr(item, "shape", ())
    return len(shape) > 0 and math.prod(shape) == 1 and np.asarray(item).dtype.kind in "USTO"


def _is_arrow_scalar(item: object) -> bool:
    # Objects of lazy libraries have any attribute, but their classes do not.
    return hasattr(type(item), "as_py")


def _fits(item: Any, image_shape: Sequence[int] | None) -> bool:
    """Return whether a buffer has as many numbers as a flattened image."""
    size = math.prod(getattr(item, "shape", (len(item),)))
    return image_shape is not None and -1 not in image_shape and size == math.prod(image_shape)


# Paths and encoded images


def _path_or_url(path: str) -> str | RemoteFile:
    """Return a URL, or a path with its `~` expanded; raise an ImageError if it is neither."""
    if path.startswith("~") and not os.path.exists(path):
        return os.path.expanduser(path)
    if file := _url_of(path):
        return _path_of_url(file.url) if file.url.startswith("file:") else file
    if _is_base64(path):
        raise ImageError(_base64_remedy(path))
    return path


def _url_of(path: str) -> RemoteFile | None:
    """Return a URL, or None if it is the path of a file or no URL."""
    file = as_remote_file(path)
    return file if file and not os.path.exists(path) else None


def _path_of_url(url: str) -> str:
    """Return the path of a `file://` URL, whose special characters may be encoded or not."""
    path = url.removeprefix("file://").removeprefix("localhost")
    return path if os.path.exists(path) else url2pathname(urlsplit(url).path)


def remote_file_of(item: Any) -> RemoteFile | None:
    """Return the URL that `resolve` returns for an item, without reading anything.

    Encoded bytes that hold a URL are left out.

    Examples
    --------
    >>> remote_file_of({"bytes": None, "path": "s3://bucket/cat.jpg"})
    RemoteFile(url='s3://bucket/cat.jpg')
    >>> remote_file_of("cat.jpg"), remote_file_of(np.zeros((8, 8)))
    (None, None)
    """
    if _wraps_image(item):
        item = item[0]
    if isinstance(item, Mapping):
        item = _value_of(item)
    if not isinstance(item, str | os.PathLike):
        return None
    file = _url_of(os.fsdecode(item))
    return None if file is None or file.url.startswith("file:") else file


def _is_base64(text: str) -> bool:
    """Return whether a string is an image in base64, possibly with the prefix of a data URI."""
    if text.startswith("data:"):
        return "," in text[:_MAX_PATH_LENGTH]
    if "." in text[:_MAX_PATH_LENGTH]:  # paths usually have an extension
        return False
    if len(text) < _MIN_BASE64_LENGTH or not _BASE64.fullmatch(text[:_MIN_BASE64_LENGTH]):
        return False
    # Separators that differ between the dialects of base64.
    start = "".join(text[:_MIN_BASE64_LENGTH].split()).translate({45: 43, 95: 47})
    if has_signature(base64.b64decode(start[: len(start) // 4 * 4])):
        return not os.path.exists(text)
    return len(text) > _MAX_PATH_LENGTH and _BASE64.fullmatch(text) is not None


def _base64_remedy(text: str) -> str:
    encoded = "text.partition(',')[2]" if text.startswith("data:") else "text"
    return (
        f"Got a base64 string of {len(text):,} characters, but expected a path or encoded bytes. "
        f"Decode it: base64.b64decode({encoded})."
    )


def _encoded_or_path(item: Encoded, image_shape: Sequence[int] | None) -> RawImage:
    """Return encoded bytes unchanged, or the path that they hold."""
    if isinstance(item, memoryview) and (item.ndim != 1 or item.itemsize != 1):
        return _channels_last(np.asarray(item), False, image_shape)
    if len(item) == 0 or has_signature(bytes(item[:_SIGNATURE_LENGTH])):
        return item
    # Text formats, such as XBM, have several lines.
    start = bytes(item[:_MIN_BASE64_LENGTH]).decode("ascii", "ignore")
    if len(start) == _MIN_BASE64_LENGTH and _is_base64(start):
        raise ImageError(_base64_remedy(bytes(item).decode("ascii", "replace")))
    if len(item) > _MAX_PATH_LENGTH or b"\0" in (content := bytes(item)):
        return item
    path = os.fsdecode(content)
    if path.isprintable() or os.path.exists(path):  # Older names may not be UTF-8.
        local = _path_or_url(path)
        if isinstance(local, RemoteFile):  # an upload must not make a server request it
            raise ImageError(
                f"Got bytes that hold the URL {shorten(str(local))!r}, but a URL is only read if "
                "it is a str: decode it"
            )
        if os.path.exists(local):
            return local
        raise ImageError(
            f"Got {shorten(repr(content))}, which is neither an encoded image nor the path of a "
            f"file that exists. Relative paths are resolved from {os.getcwd()}."
        )
    return item


def has_signature(start: bytes) -> bool:
    """Return whether some bytes begin as the file of an image does.

    Examples
    --------
    >>> has_signature(bytes.fromhex("89504e470d0a1a0a")), has_signature(b"cat.jpg")
    (True, False)
    """
    return _SIGNATURE.match(start) is not None


def encoded_buffer(item: Any) -> bytes | None:
    """Return the bytes of an image that a buffer holds, or None if it holds none.

    Encoders return a 1-D or one-column array or tensor of uint8 (`cv2.imencode`,
    `torchvision.io.encode_png`). Other libraries have buffers of their own.

    Examples
    --------
    >>> encoded_buffer(np.frombuffer(b"GIF89a...", np.uint8))
    b'GIF89a...'
    >>> encoded_buffer(np.zeros(64, np.uint8)) is None
    True
    """
    if isinstance(item, np.ndarray | torch.Tensor):
        shape = tuple(item.shape)
        if not str(item.dtype).endswith("uint8") or math.prod(shape) != max(shape, default=0):
            return None
        if len(shape) > 2 or not shape:
            return None
        content = item.reshape(-1)
        if not has_signature(as_array(content[:_SIGNATURE_LENGTH]).tobytes()):
            return None
        return as_array(content).tobytes()
    if isinstance(item, list | tuple) or hasattr(item, "__array__"):
        return None
    try:
        return bytes(memoryview(item))
    except (TypeError, BufferError):
        return None


def is_file(item: object) -> bool:
    """Return whether an item is an open file, or behaves like one."""
    return all(callable(getattr(item, method, None)) for method in ("read", "seek", "tell"))


def _read(item: Any) -> bytes | None:
    """Read a file or a file-like object; return None for any other item."""
    if is_file(item):
        return _read_file(item)
    if callable(getattr(item, "read_bytes", None)):  # a member of an archive, a path of a cloud
        return _read_member(item)
    if callable(getattr(item, "read", None)):
        raise ImageError(
            f"Got {type(item).__name__}, which cannot be read a second time. Pass what its "
            "read() returns; if read() is asynchronous, await it."
        )
    return None


def _read_file(file: Any) -> bytes:
    """Read a file from its start, and restore its position."""
    name, remedy = type(file).__name__, "Pass its path, or its content as bytes."
    if inspect.iscoroutinefunction(file.read):
        raise ImageError(
            f"Got an asynchronous {name}. Pass its content as bytes: await file.read()."
        )
    if isinstance(file, io.TextIOBase):
        raise ImageError(f"Got a {name}, a file opened as text. Open it with mode 'rb'.")
    with _FILE_LOCK:
        try:
            position = file.tell()
            file.seek(0)
            content = file.read()
            file.seek(position)
        except Exception as error:  # A user's file may raise anything.
            raise ImageError(
                f"The {name} cannot be read from its start: {error}. {remedy}"
            ) from error
    if isinstance(content, str):
        raise ImageError(f"Got a {name}, a file opened as text. Open it with mode 'rb'.")
    return content


def _read_member(member: Any) -> bytes:
    try:
        return bytes(member.read_bytes())
    except Exception as error:  # A user's path may raise anything.
        raise ImageError(f"The {type(member).__name__} cannot be read: {error}.") from error


def looks_like_image(value: object) -> bool:
    """Return whether a value is an image or leads to one, rather than a number or label."""
    if isinstance(value, Mapping):
        return any(key in value for key in _IMAGE_KEYS)
    if isinstance(value, str | os.PathLike | Encoded | Image.Image | np.void):
        return True
    is_member = callable(getattr(value, "read_bytes", None))
    return getattr(value, "ndim", 0) > 0 or is_file(value) or is_member


def describe(item: Any) -> str:
    """Describe an item of `X` in a few words; never fails.

    Examples
    --------
    >>> describe("cat.jpg"), describe(b"..."), describe(np.zeros((8, 8))), describe(None)
    ('cat.jpg', 'bytes', 'array of shape (8, 8)', 'missing value')
    """
    if isinstance(item, str | os.PathLike):
        path = os.fsdecode(item)
        return shorten(str(as_remote_file(path) or path))
    if isinstance(item, Encoded | np.void):
        return "bytes"
    if isinstance(item, Image.Image):
        return f"PIL image, {item.mode}, {item.width} x {item.height}"
    if _is_arrow_scalar(item):
        return describe(item.as_py())
    if isinstance(item, Mapping) and looks_like_image(item):
        return describe(item.get("path") or _value_of(item))
    if _wraps_image(item):
        return describe(item[0])
    if is_missing(item):
        return "missing value"
    if is_file(item):
        name = getattr(item, "name", None)
        return shorten(name) if isinstance(name, str) else type(item).__name__
    if hasattr(item, "shape"):
        kind = "tensor" if isinstance(item, torch.Tensor) else "array"
        return f"{kind} of shape {tuple(item.shape)}"
    return type(item).__name__


def shorten(text: str) -> str:
    """Cut the middle out of a long text that is not a path, such as an image in base64.

    Examples
    --------
    >>> shorten("cat.jpg"), len(shorten("A" * 100_000))
    ('cat.jpg', 80)
    """
    can_be_path = len(text) <= _MAX_PATH_LENGTH and not (as_remote_file(text) or _is_base64(text))
    if can_be_path or len(text) <= _SHOWN_LENGTH:
        return text
    half = (_SHOWN_LENGTH - 3) // 2
    return f"{text[: half + 1]}...{text[-half:]}"


def path_of(item: Any) -> str | None:
    """Return the path or URL of an item of `X`, or None if it has none; never fails.

    Examples
    --------
    >>> path_of("cat.jpg"), path_of({"path": "cat.jpg", "bytes": b"..."}), path_of(b"...")
    ('cat.jpg', 'cat.jpg', None)
    """
    if isinstance(item, str | os.PathLike):
        return os.fsdecode(item)
    if _is_arrow_scalar(item):
        return path_of(item.as_py())
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
    """Return whether an item is None, NaN, NaT, pandas' NA or a masked value of numpy."""
    # Checked by name, since pandas may not be installed.
    if item is None or item is np.ma.masked or type(item).__name__ in ("NAType", "NaTType"):
        return True
    # Only NaN and NaT differ from themselves.
    is_scalar = isinstance(item, Number | np.datetime64 | np.timedelta64)
    return is_scalar and bool(item != item)


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
        return _tensor_as_array(item)
    if isinstance(item, np.ma.MaskedArray) and np.ma.is_masked(item):
        raise ImageError("Got masked pixels. Fill them: image.filled(0).")
    if not is_missing(item) and (hasattr(item, "__array__") or isinstance(item, list | tuple)):
        try:
            array = np.asarray(item)
            # Nested columns hold rows as objects.
            return _dense(item) if array.dtype == object and array.ndim == 1 else array
        except ValueError as error:
            raise ImageError(f"The numbers do not form an array: {error}") from error
    got = "a missing value" if is_missing(item) else describe(item)
    raise ImageError(
        f"Got {got}, but expected a path, a PIL image, an array, a tensor, encoded bytes or a dict."
    )


def _dense(item: Any) -> np.ndarray:
    """Stack nested sequences of numbers, such as lists in a column of a table, to one array."""
    values = list(item)
    if not values or any(isinstance(value, str) or np.ndim(value) == 0 for value in values):
        return np.asarray(item)
    return np.stack([_dense(value) if _is_nested(value) else np.asarray(value) for value in values])


def _is_nested(value: Any) -> bool:
    return np.asarray(value).dtype == object


def _tensor_as_array(tensor: torch.Tensor) -> np.ndarray:
    remedy = ""
    if tensor.is_meta:
        remedy = "It has no data: move it from the meta device before it is filled."
    elif tensor.layout != torch.strided:
        remedy = "Call its to_dense() first."
    elif tensor.is_nested:
        remedy = "Pass its tensors: list(X.unbind())."
    if remedy:
        raise ImageError(f"Got a tensor that is not dense ({tensor.layout}). {remedy}")
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS:
        tensor = tensor.float()  # numpy has no bfloat16, and no float8.
    return tensor.numpy(force=True)


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
        remedy = ""
        if array.dtype.names:
            remedy = " Convert the image: numpy.lib.recfunctions.structured_to_unstructured(image)."
        raise ImageError(f"Got pixels of dtype {array.dtype}, but expected numbers.{remedy}")
    axis = channel_axis(array.shape, channels_first)
    return array[:, :, np.newaxis] if axis is None else np.moveaxis(array, axis, -1)
