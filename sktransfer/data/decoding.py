"""One image -> uint8 RGB, and its fingerprint. The only room that opens image files.

An image is a path, encoded bytes, a PIL image or an array here; `items` reduces others to these.
Shapes: H x W pixels, C channels (1 gray, 2 gray and alpha, 3 RGB, 4 RGBA).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sktransfer.utils.errors import ImageError

PixelRange = tuple[float, float]
Encoded = bytes | bytearray | memoryview
RawImage = str | Encoded | Image.Image | np.ndarray

# From narrow to wide: the first one that holds the data is the one that is meant.
USUAL_RANGES: tuple[PixelRange, ...] = (
    (0.0, 1.0),
    (-1.0, 1.0),
    (0.0, 16.0),
    (0.0, 255.0),
    (0.0, 65535.0),
)
# What the modes of PIL that are not 8-bit can mean; the others among them are 16-bit.
_RANGES_OF_MODE = {"F": USUAL_RANGES, "I": USUAL_RANGES[3:]}

# How many times as long as in the end the sides of an image stay that is decoded smaller.
_DRAFT_MARGIN = 2

# One PIL image can sit in several rows and is not safe to load from two threads at once.
# A few locks, shared by address, let different images still decode side by side.
_LOCKS = tuple(threading.Lock() for _ in range(64))


# Numbers -> uint8


def channel_axis(shape: tuple[int, ...], channels_first: bool = False) -> int | None:
    """Return the channel axis of an image: 0, -1, or None for a gray (H, W) one.

    Parameters
    ----------
    shape : tuple of int
        The shape of one image.
    channels_first : bool
        Prefer (C, H, W) where both readings are possible, as for torch tensors.

    Raises
    ------
    ImageError
        If no axis can hold channels, or the image has no pixels.

    Examples
    --------
    >>> channel_axis((32, 32, 3), channels_first=False)
    -1
    >>> channel_axis((3, 32, 4), channels_first=False)
    -1
    >>> channel_axis((3, 32, 4), channels_first=True)
    0
    """
    if 0 in shape:
        raise ImageError(f"Got no pixels: the shape is {shape}.")
    if len(shape) == 2:
        return None
    if len(shape) == 3:
        first = shape[0] in ((1, 2, 3, 4) if channels_first else (1, 3, 4))
        last = shape[-1] in (1, 2, 3, 4)
        if first and (channels_first or not last):
            return 0
        if last:
            return -1
    raise ImageError(
        f"Got shape {shape}, but expected (H, W), (H, W, C) or (C, H, W) with C one of 1, 2, 3, 4."
    )


def extent(array: np.ndarray) -> PixelRange | None:
    """Return the smallest and the largest finite number, or None where there is none.

    Examples
    --------
    >>> extent(np.array([3, -1, 2]))
    (-1.0, 3.0)
    >>> extent(np.array([np.nan, 0.5]))
    (0.5, 0.5)
    """
    if array.size == 0:
        return None
    low, high = float(array.min()), float(array.max())
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    # Only now, since the mask and the selection are copies.
    return extent(array[np.isfinite(array)])


def usual_range(low: float, high: float, among: Sequence[PixelRange] = USUAL_RANGES) -> PixelRange:
    """Return the first usual range that holds the values to a 1000th, or the values' own.

    Examples
    --------
    >>> usual_range(0, 0.8), usual_range(-0.9, 0.8), usual_range(0, 15), usual_range(-3, 5)
    ((0.0, 1.0), (-1.0, 1.0), (0.0, 16.0), (-3, 5))
    """
    # Rounding of earlier steps may leave 1.0000001, which must not mean "0 to 16".
    return next((usual for usual in among if _holds(usual, low, high, 1e-3)), (low, high))


def _holds(pixel_range: PixelRange, low: float, high: float, slack: float) -> bool:
    return pixel_range[0] - slack <= low and high <= pixel_range[1] + slack


def _to_uint8(array: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """Map `pixel_range` linearly to 0-255; None takes the usual range of this image."""
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("Got NaN or infinite pixels, but expected finite numbers.")
    lo, hi = pixel_range or usual_range(low, high)
    if (lo, hi) in USUAL_RANGES and not _holds((lo, hi), low, high, 1e-3 * (hi - lo)):
        excess = f"up to {high:g}" if high > hi else f"down to {low:g}"
        raise ImageError(
            f"Got pixel values {excess}, but the range is {lo:g} to {hi:g} (given, or learned "
            "by fit). Pass pixel_range=(lo, hi) that holds all images."
        )
    levels = array.astype(np.result_type(array.dtype, np.float32))
    levels -= lo
    levels *= 255
    levels /= (hi - lo) or 1.0
    return np.clip(np.rint(levels, out=levels), 0, 255, out=levels).astype(np.uint8)


def _rgb(array: np.ndarray) -> np.ndarray:
    """Turn uint8 (H, W, C) into uint8 (H, W, 3) of its own memory, on a white ground."""
    if array.shape[2] in (2, 4):
        return _on_white(Image.fromarray(array))
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return np.array(array, order="C")


# Images -> uint8


def decode(
    raw: RawImage, pixel_range: PixelRange | None = None, side: int | None = None
) -> np.ndarray:
    """Decode an image.

    Parameters
    ----------
    raw : str, bytes-like, PIL.Image.Image or ndarray of shape (H, W, C)
        A path, an encoded image, a PIL image, or pixels. EXIF orientation is applied, alpha is
        composited on white, and an animation gives its first frame. uint8 pixels are taken as
        they are; 16-bit PIL modes have the range 0 to 65535.
    pixel_range : (float, float) or None
        Range of the pixels of an array other than uint8, mapped to 0-255. None takes the usual
        range of this image.
    side : int or None
        Length of the shorter side to which the image will be resized. A JPEG that has far more
        pixels than that is decoded at a half, a quarter or an eighth of its size, which leaves
        twice that length. None decodes all pixels.

    Returns
    -------
    ndarray of shape (H, W, 3), uint8, 0-255, RGB, C-contiguous
        Always memory of its own.

    Raises
    ------
    ImageError
        If the image is missing, broken, empty, too large, or out of range.
    """
    if isinstance(raw, np.ndarray):
        return _rgb(_to_uint8(raw, pixel_range))
    if isinstance(raw, Image.Image):
        return _from_pil(_upright_copy(raw))
    file = raw if isinstance(raw, str) else io.BytesIO(raw)
    with _explained(raw), Image.open(file) as image:
        _refuse_bomb(image)
        if side is not None:
            image.draft(None, (_DRAFT_MARGIN * side, _DRAFT_MARGIN * side))
        ImageOps.exif_transpose(image, in_place=True)
        return _from_pil(image)


def plain_jpeg(raw: RawImage, side: int) -> bytes | None:
    """Read an encoded image that any decoder of JPEGs can take over from `decode`.

    Parameters
    ----------
    raw : str, bytes-like, PIL.Image.Image or ndarray
    side : int
        As in `decode`.

    Returns
    -------
    bytes or None
        None where it is no JPEG, cannot be read, is not RGB or gray, is to be turned, is to be
        decoded smaller, or has too many pixels: all that is left to `decode`.
    """
    if isinstance(raw, (np.ndarray, Image.Image)):
        return None
    try:
        encoded = Path(raw).read_bytes() if isinstance(raw, str) else bytes(raw)
        with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as image:
            _refuse_bomb(image)
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            whole = min(image.size) < 2 * _DRAFT_MARGIN * side
            return encoded if upright and whole and image.mode in ("RGB", "L") else None
    except Exception:  # Pillow's plugins raise nearly anything on a broken file.
        return None


def encode_jpeg(image: torch.Tensor) -> bytes:
    """Encode an image (3, H, W), uint8, as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    return file.getvalue()


def _from_pil(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ImageError(f"Got no pixels: the size is {image.width} x {image.height}.")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)[:, :, np.newaxis]
        low, high = extent(values) or (0.0, 0.0)
        among = _RANGES_OF_MODE.get(image.mode, USUAL_RANGES[4:])
        return _rgb(_to_uint8(values, usual_range(low, high, among)))
    if image.has_transparency_data:
        # Pillow converts premultiplied gray to nothing but plain gray and alpha.
        image = image.convert("LA") if image.mode == "La" else image
        return _on_white(image)
    return np.array(image.convert("RGB"))


def _on_white(image: Image.Image) -> np.ndarray:
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    ground = Image.new("RGB", image.size, "white")
    ground.paste(transparent, mask=transparent)
    return np.array(ground)


def _upright_copy(image: Image.Image) -> Image.Image:
    """Copy the caller's image, safely from any thread, and apply its EXIF orientation."""
    # It may still be lazy, and its file broken.
    with _explained(image), _LOCKS[id(image) // 64 % len(_LOCKS)]:
        copy = ImageOps.exif_transpose(image)
    assert copy is not None  # Only in_place=True gives None.
    return copy


def _refuse_bomb(image: Image.Image) -> None:
    # Pillow itself only warns up to twice its limit.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError


@contextmanager
def _explained(raw: RawImage) -> Iterator[None]:
    """Turn what Pillow or the system raises into an ImageError with a remedy."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file.
        raise ImageError(_why(error, raw)) from error


def _why(error: Exception, raw: RawImage) -> str:
    if isinstance(error, FileNotFoundError):
        return f"There is no such file. Relative paths start at {os.getcwd()}."
    if isinstance(raw, str) and os.path.isdir(raw):
        return "Got a folder, but expected an image. load_image_folder lists those below a folder."
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"Refused as a possible decompression bomb: it has more pixels than "
            f"PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}. Raise that if you trust it."
        )
    if isinstance(error, UnidentifiedImageError):
        return "Pillow cannot identify this as an image."
    if isinstance(error, OSError) and error.strerror:
        return f"The file cannot be read: {error.strerror}."
    return f"The image is truncated or corrupt: {error}."


def fingerprint(raw: RawImage, pixel_range: PixelRange | None = None) -> bytes:
    """Identify the content of an image, for a cache.

    A file is told by its absolute path, size and time of change, without being opened;
    everything else by its content and by all that changes how it decodes.

    Returns
    -------
    bytes of length 16

    Raises
    ------
    ImageError
        If a file is missing or an image cannot be loaded.
    """
    if isinstance(raw, str):
        return _file_fingerprint(raw)
    if isinstance(raw, np.ndarray):
        applies = None if raw.dtype == np.uint8 else pixel_range
        header = ("array", raw.dtype.str, raw.shape, applies)
        return _digest(header, np.ascontiguousarray(raw).reshape(-1).data)
    if isinstance(raw, Image.Image):
        image = _upright_copy(raw)
        transparency = image.info.get("transparency")
        look = ("PIL", image.mode, image.size, transparency, image.getpalette(None))
        return _digest(look, image.tobytes())
    return _digest(("encoded",), bytes(raw))


def _file_fingerprint(path: str) -> bytes:
    with _explained(path):
        if os.path.isdir(path):
            raise IsADirectoryError(path)
        status = os.stat(path)
        absolute = os.fsencode(os.path.abspath(path))
    return _digest(("path", absolute, status.st_size, status.st_mtime_ns))


def _digest(header: tuple[object, ...], content: Encoded = b"") -> bytes:
    # A tuple's text ends at its own bracket, so no header can run into another's content.
    digest = hashlib.blake2b(repr(header).encode(), digest_size=16)
    digest.update(content)
    return digest.digest()
