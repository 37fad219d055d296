"""Decoding of one image to uint8 RGB, and its fingerprint; only this module opens image files.

Here, an image is a path, encoded bytes, a PIL image or an array; `items` resolves items to these.
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

# From narrow to wide: the first range that contains the data is assumed.
USUAL_RANGES: tuple[PixelRange, ...] = (
    (0.0, 1.0),
    (-1.0, 1.0),
    (0.0, 16.0),
    (0.0, 255.0),
    (0.0, 65535.0),
)
# Possible ranges of PIL's modes that are not 8-bit; a mode that is not listed is 16-bit.
_RANGES_OF_MODE = {"F": USUAL_RANGES, "I": USUAL_RANGES[3:]}

# An image decoded at a reduced size keeps sides at least this many times the requested length.
_DRAFT_MARGIN = 2

# The same PIL image can be in several rows, and two threads must not load it at once. Images are
# assigned to locks by their address, so that different images can still decode in parallel.
_LOCKS = tuple(threading.Lock() for _ in range(64))


# Numbers to uint8


def channel_axis(shape: tuple[int, ...], channels_first: bool = False) -> int | None:
    """Return the channel axis of an image: 0, -1, or None for a gray (H, W) one.

    Parameters
    ----------
    shape : tuple of int
        The shape of one image.
    channels_first : bool
        Prefer (C, H, W) if both readings are possible, as for torch tensors.

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
    """Return the smallest and the largest finite number, or None if there is none.

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
    # Only if necessary, since the mask and the selection take memory.
    return extent(array[np.isfinite(array)])


def usual_range(low: float, high: float, among: Sequence[PixelRange] = USUAL_RANGES) -> PixelRange:
    """Return the first usual range that contains the values within 0.001, or their own range.

    Examples
    --------
    >>> usual_range(0, 0.8), usual_range(-0.9, 0.8), usual_range(0, 15), usual_range(-3, 5)
    ((0.0, 1.0), (-1.0, 1.0), (0.0, 16.0), (-3, 5))
    """
    # Rounding in earlier steps can leave 1.0000001, which must not select (0, 16).
    return next((usual for usual in among if _holds(usual, low, high, 1e-3)), (low, high))


def _holds(pixel_range: PixelRange, low: float, high: float, slack: float) -> bool:
    return pixel_range[0] - slack <= low and high <= pixel_range[1] + slack


def _to_uint8(array: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """Map `pixel_range` linearly to 0-255; None uses the usual range of this image."""
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("Got NaN or infinite pixels, but expected finite numbers.")
    lo, hi = pixel_range or usual_range(low, high)
    if (lo, hi) in USUAL_RANGES and not _holds((lo, hi), low, high, 1e-3 * (hi - lo)):
        excess = f"up to {high:g}" if high > hi else f"down to {low:g}"
        raise ImageError(
            f"Got pixel values {excess}, but the pixel range is {lo:g} to {hi:g} (passed, or "
            "learned by fit). Pass a pixel_range=(lo, hi) that covers all images."
        )
    levels = array.astype(np.result_type(array.dtype, np.float32))
    levels -= lo
    levels *= 255
    levels /= (hi - lo) or 1.0
    return np.clip(np.rint(levels, out=levels), 0, 255, out=levels).astype(np.uint8)


def _rgb(array: np.ndarray) -> np.ndarray:
    """Convert uint8 (H, W, C) to a new uint8 array (H, W, 3), on a white background."""
    if array.shape[2] in (2, 4):
        return _on_white(Image.fromarray(array))
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return np.array(array, order="C")


# Images to uint8


def decode(
    raw: RawImage, pixel_range: PixelRange | None = None, side: int | None = None
) -> np.ndarray:
    """Decode an image.

    Parameters
    ----------
    raw : str, bytes-like, PIL.Image.Image or ndarray of shape (H, W, C)
        A path, an encoded image, a PIL image, or pixels. EXIF orientation is applied, alpha is
        composited on white, and only the first frame of an animation is used. uint8 pixels stay
        unchanged; 16-bit PIL modes have the range 0 to 65535.
    pixel_range : (float, float) or None
        Range of the pixels of an array other than uint8, mapped to 0-255. None uses the usual
        range of this image.
    side : int or None
        Length of the shorter side to which the image will be resized. A far larger JPEG is decoded
        at a half, a quarter or an eighth of its size, which is still at least twice that length.
        None decodes all pixels.

    Returns
    -------
    ndarray of shape (H, W, 3), uint8, 0-255, RGB, C-contiguous
        Always a new array.

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
    """Return the bytes of a JPEG that any JPEG decoder decodes in the same way as `decode`.

    Parameters
    ----------
    raw : str, bytes-like, PIL.Image.Image or ndarray
    side : int
        As in `decode`.

    Returns
    -------
    bytes or None
        None if the image is not a JPEG, cannot be read, is not RGB or gray, must be rotated, would
        be decoded at a reduced size, or has too many pixels. Only `decode` handles these.
    """
    if isinstance(raw, (np.ndarray, Image.Image)):
        return None
    try:
        encoded = Path(raw).read_bytes() if isinstance(raw, str) else bytes(raw)
        with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as image:
            _refuse_bomb(image)
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            full_size = min(image.size) < 2 * _DRAFT_MARGIN * side
            return encoded if upright and full_size and image.mode in ("RGB", "L") else None
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
        ranges = _RANGES_OF_MODE.get(image.mode, USUAL_RANGES[4:])
        return _rgb(_to_uint8(values, usual_range(low, high, ranges)))
    if image.has_transparency_data:
        # Pillow can convert premultiplied gray only to gray with alpha.
        image = image.convert("LA") if image.mode == "La" else image
        return _on_white(image)
    return np.array(image.convert("RGB"))


def _on_white(image: Image.Image) -> np.ndarray:
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    background = Image.new("RGB", image.size, "white")
    background.paste(transparent, mask=transparent)
    return np.array(background)


def _upright_copy(image: Image.Image) -> Image.Image:
    """Copy the caller's image, from any thread, and apply its EXIF orientation."""
    # The image may not be loaded yet, and its file may be broken.
    with _explained(image), _LOCKS[id(image) // 64 % len(_LOCKS)]:
        copy = ImageOps.exif_transpose(image)
    assert copy is not None  # Only in_place=True returns None.
    return copy


def _refuse_bomb(image: Image.Image) -> None:
    # Pillow itself only warns up to twice the limit.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError


@contextmanager
def _explained(raw: RawImage) -> Iterator[None]:
    """Convert errors of Pillow and of the system to an ImageError with a remedy."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a broken file.
        raise ImageError(_why(error, raw)) from error


def _why(error: Exception, raw: RawImage) -> str:
    if isinstance(error, FileNotFoundError):
        return f"There is no such file. Relative paths are resolved from {os.getcwd()}."
    if isinstance(raw, str) and os.path.isdir(raw):
        return "Got a folder, but expected an image. load_image_folder lists the images in it."
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"Refused as a possible decompression bomb: the image has more pixels than "
            f"PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}. Raise the limit if you trust "
            "the image."
        )
    if isinstance(error, UnidentifiedImageError):
        return "Pillow cannot identify this as an image."
    if isinstance(error, OSError) and error.strerror:
        return f"The file cannot be read: {error.strerror}."
    return f"The image is truncated or corrupt: {error}."


def fingerprint(raw: RawImage, pixel_range: PixelRange | None = None) -> bytes:
    """Compute a digest that identifies the content of an image in a cache.

    A file is identified by its absolute path, size and modification time, without being opened;
    any other image by its content and by everything that affects how it is decoded.

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
        applied_range = None if raw.dtype == np.uint8 else pixel_range
        header = ("array", raw.dtype.str, raw.shape, applied_range)
        return _digest(header, np.ascontiguousarray(raw).reshape(-1).data)
    if isinstance(raw, Image.Image):
        image = _upright_copy(raw)
        transparency = image.info.get("transparency")
        properties = ("PIL", image.mode, image.size, transparency, image.getpalette(None))
        return _digest(properties, image.tobytes())
    return _digest(("encoded",), bytes(raw))


def _file_fingerprint(path: str) -> bytes:
    with _explained(path):
        if os.path.isdir(path):
            raise IsADirectoryError(path)
        status = os.stat(path)
        absolute = os.fsencode(os.path.abspath(path))
    return _digest(("path", absolute, status.st_size, status.st_mtime_ns))


def _digest(header: tuple[object, ...], content: Encoded = b"") -> bytes:
    # The repr of a tuple ends at its closing bracket, so header and content cannot be confused.
    digest = hashlib.blake2b(repr(header).encode(), digest_size=16)
    digest.update(content)
    return digest.digest()
