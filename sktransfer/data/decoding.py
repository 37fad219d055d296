"""Decoding of one image to uint8 RGB, and its fingerprint; `formats` has what Pillow misreads.

Here, an image is a path, encoded bytes, a PIL image or an array; `items` resolves items to these.
Shapes: H x W pixels, C channels (1 gray, 2 gray and alpha, 3 RGB, 4 RGBA).
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from sktransfer.data import formats
from sktransfer.data.formats import Samples
from sktransfer.data.jpeg import plain_header
from sktransfer.data.remote import RemoteVersion
from sktransfer.utils.errors import ImageError

PixelRange = tuple[float, float]
Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
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
_RANGE_16_BIT = USUAL_RANGES[-1]
# How far values may be outside a range: earlier steps may have rounded to 1.0000001. Resizing and
# sharpening exceed 0 and 1 by more; those values are clipped.
_ROUNDING, _OVERSHOOT = 1e-3, 0.1

# An image decoded at a reduced size keeps sides at least this many times the requested length.
_DRAFT_MARGIN = 2

# Words in messages of Pillow about files that are intact.
_UNSUPPORTED = re.compile("unsupported|not supported|unimplemented|unknown|not available", re.I)

# Maximum number of file versions whose properties are remembered.
_REMEMBERED_FILES = 2**14

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
    """Return the first usual range that contains the values, nearly, or their own range.

    Examples
    --------
    >>> usual_range(0, 0.8), usual_range(-0.9, 0.8), usual_range(0, 15), usual_range(-3, 5)
    ((0.0, 1.0), (-1.0, 1.0), (0.0, 16.0), (-3, 5))
    >>> usual_range(-0.04, 1.02), usual_range(0, 2)
    ((0.0, 1.0), (0.0, 16.0))
    """
    return next((usual for usual in among if _holds(usual, low, high, _ROUNDING)), (low, high))


def _holds(usual: PixelRange, low: float, high: float, slack: float) -> bool:
    slack = _OVERSHOOT if usual == (0, 1) else slack
    return usual[0] - slack <= low and high <= usual[1] + slack


def _to_uint8(array: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """Map `pixel_range` linearly to 0-255; None uses the usual range of this image."""
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("Got NaN or infinite pixels, but expected finite numbers.")
    lo, hi = pixel_range or usual_range(low, high)
    if (lo, hi) in USUAL_RANGES and not _holds((lo, hi), low, high, _ROUNDING * (hi - lo)):
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


def _rgb(array: np.ndarray, background: Color) -> np.ndarray:
    """Convert uint8 (H, W, C) to a new uint8 array (H, W, 3), on a background."""
    if array.shape[2] in (2, 4):
        return _on_background(Image.fromarray(array), background)
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return np.array(array, order="C")


def resolve_background(background: object) -> Color:
    """Return the RGB values of a color.

    Parameters
    ----------
    background : str or (int, int, int)
        A name or a code that `PIL.ImageColor` understands, or red, green and blue from 0 to 255.

    Raises
    ------
    ValueError
        If it is neither.

    Examples
    --------
    >>> resolve_background("white"), resolve_background("#102030"), resolve_background((1, 2, 3))
    ((255, 255, 255), (16, 32, 48), (1, 2, 3))
    """
    color: object = background
    if isinstance(background, str):
        with suppress(ValueError):
            color = ImageColor.getrgb(background)
    if isinstance(color, Sequence) and not isinstance(color, str) and len(color) in (3, 4):
        is_level = [
            isinstance(level, Integral) and not isinstance(level, bool) and 0 <= int(level) <= 255
            for level in color
        ]
        opaque = len(color) == 3 or (isinstance(background, str) and color[3] == 255)
        if all(is_level) and opaque:
            red, green, blue = (int(level) for level in color[:3])
            return red, green, blue
    raise ValueError(
        f"Got background={background!r}, but expected the name of a color, such as 'white' or "
        "'#808080', or (red, green, blue), integers from 0 to 255"
    )


# Images to uint8


def decode(
    raw: RawImage,
    pixel_range: PixelRange | None = None,
    background: Color = WHITE,
    *,
    side: int | None = None,
) -> np.ndarray:
    """Decode an image.

    Parameters
    ----------
    raw : str, bytes-like, PIL.Image.Image or ndarray of shape (H, W, C)
        A path, an encoded image, a PIL image, or pixels. EXIF orientation is applied, a color
        profile other than sRGB is converted to sRGB, and only the first frame of an animation is
        used. 8-bit pixels stay unchanged.
    pixel_range : (float, float) or None
        Range of pixels that are not 8-bit, mapped to 0-255. None uses the usual range of this
        image: 0 to 65535 for unsigned 16-bit PIL images and files.
    background : (int, int, int)
        Color on which transparency is composited.
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
        If the image is missing, broken, empty, too large, out of range, or in a format that
        nothing installed reads correctly.
    """
    if isinstance(raw, np.ndarray):
        return _rgb(_to_uint8(raw, pixel_range), background)
    content: Samples | Image.Image | None
    if isinstance(raw, Image.Image):
        content = _content_of_pil(raw, _needs_all_bits(pixel_range))
    else:
        content = _content_of_file(raw, _needs_all_bits(pixel_range), side)
    with _Explained(raw):
        if isinstance(content, Samples):
            return _from_samples(content, pixel_range, background)
        assert content is not None  # Only only_numbers=True returns None.
        return _from_pil(content, background)


def _needs_all_bits(pixel_range: PixelRange | None) -> bool:
    # A reduced file is read with all bits only if necessary, since that is slower.
    return pixel_range not in (None, _RANGE_16_BIT)


def numbers_of(raw: RawImage) -> np.ndarray | None:
    """Return the pixels of an image without its transparency if they are not 8-bit, else None.

    Files of 8-bit images are opened, but not decoded. The upper bounds of the pixels are returned
    if the lower 8 of 16 bits cannot be read.

    Raises
    ------
    ImageError
        As in `decode`.
    """
    if isinstance(raw, np.ndarray):
        return None if raw.dtype == np.uint8 else raw
    if isinstance(raw, Image.Image):
        content = _content_of_pil(raw) if formats.has_numbers(raw) else None
    else:
        content = _content_of_file(raw, all_bits=True, only_numbers=True)
    if isinstance(content, Samples) and content.colors.dtype != np.uint8:
        return content.colors
    return None


class Extent(NamedTuple):
    """The smallest and the largest number of an image, and whether its numbers are integers."""

    low: float
    high: float
    is_integer: bool


def extent_of(raw: RawImage) -> Extent | None:
    """Return the extent of the numbers that `numbers_of` returns; that of a file is remembered.

    Raises
    ------
    ImageError
        As in `decode`.
    """
    return _file_extent(*_file_identity(raw)[1:]) if isinstance(raw, str) else _extent_of(raw)


def _extent_of(raw: RawImage) -> Extent | None:
    numbers = numbers_of(raw)
    bounds = None if numbers is None else extent(numbers)
    if numbers is None or bounds is None:
        return None
    return Extent(*bounds, numbers.dtype.kind in "iu")


# A search reads the same files in every fit.
@lru_cache(maxsize=_REMEMBERED_FILES)
def _file_extent(path: bytes, size: int, modified: int) -> Extent | None:
    return _extent_of(os.fsdecode(path))


def may_be_transparent(raw: RawImage) -> bool:
    """Return whether an image has an alpha channel or a transparent color, without decoding it."""
    if isinstance(raw, np.ndarray):
        return raw.shape[2] in (2, 4)
    if isinstance(raw, Image.Image):
        return raw.has_transparency_data
    try:
        if isinstance(raw, str):
            return _file_may_be_transparent(*_file_identity(raw)[1:])
        with Image.open(io.BytesIO(raw)) as image:
            return image.has_transparency_data
    except Exception:  # Pillow's plugins raise nearly anything on a broken file.
        return False


@lru_cache(maxsize=_REMEMBERED_FILES)
def _file_may_be_transparent(path: bytes, size: int, modified: int) -> bool:
    with Image.open(os.fsdecode(path)) as image:
        return image.has_transparency_data


def _content_of_file(
    raw: str | Encoded, all_bits: bool, side: int | None = None, only_numbers: bool = False
) -> Samples | Image.Image | None:
    """Read a file: its numbers if it is not 8-bit, else an upright, loaded PIL image.

    Parameters
    ----------
    all_bits : bool
        Read all bits of a file of which Pillow keeps 8.
    only_numbers : bool
        Return None instead of a PIL image.
    """
    file = raw if isinstance(raw, str) else io.BytesIO(raw)
    with _Explained(raw):
        if isinstance(raw, str):
            _refuse_pipe(os.stat(raw).st_mode)
        try:
            opened = Image.open(file)
        except UnidentifiedImageError:
            samples = None if formats.identify(_head(raw)) else formats.read_samples(raw)
            if samples is None:
                raise
            return samples
        with opened as image:
            _refuse_bomb(image)
            formats.refuse_camera_raw(image, _head(raw))
            if formats.is_misread(image):
                return formats.read_samples(raw, image)
            if all_bits and formats.is_reduced(image):
                if not only_numbers:
                    return formats.read_samples(raw, image)
                return _bounds(raw, image)
            if only_numbers and not formats.has_numbers(image):
                return None
            if side is not None:
                image.draft(None, (_DRAFT_MARGIN * side, _DRAFT_MARGIN * side))
            return _content(image, all_bits)


def _bounds(raw: str | Encoded, image: Image.Image) -> Samples | None:
    """Return all bits of a reduced file, or the upper bounds of its pixels if nothing reads it."""
    try:
        return formats.read_samples(raw, image)
    except ImageError:
        if image.mode not in ("RGB", "RGBA"):
            return None
        return Samples(np.asarray(image.convert("RGB")).astype(np.uint16) * 256 + 255)


def _content_of_pil(image: Image.Image, all_bits: bool = False) -> Samples | Image.Image:
    """Return the numbers of the caller's image if it is not 8-bit, else an upright copy."""
    # The caller's image may be broken.
    with _Explained(image):
        needed = formats.correction(image, all_bits)
    return _with_numbers(_upright_copy(image), needed)


def _content(image: Image.Image, all_bits: bool) -> Samples | Image.Image:
    """Load an opened file, upright."""
    needed, maximum = formats.correction(image), formats.stated_maximum(image)
    formats.scale_transparency(image)
    image = formats.largest_frame(image)
    image.load()  # Pillow knows the mode of an embedded image only then.
    image = formats.without_undefined_alpha(image)
    ImageOps.exif_transpose(image, in_place=True)
    content = _with_numbers(image, needed)
    if all_bits and maximum is not None and isinstance(content, Samples):
        stored = np.rint(content.colors * (maximum / 65535)).astype(content.colors.dtype)
        content = content._replace(colors=stored)
    return content


def _with_numbers(image: Image.Image, correction: str) -> Samples | Image.Image:
    if 0 in image.size:
        raise ImageError(f"Got no pixels: the size is {image.width} x {image.height}.")
    numbers = formats.numbers(image, correction)
    if numbers is None:
        return image
    transparent = image.info.get("transparency")
    alpha = None
    if isinstance(transparent, int) and correction == "":
        alpha = np.where(numbers == transparent, 0, 255).astype(np.uint8)
    return Samples(numbers[:, :, np.newaxis], alpha, image.info.get("icc_profile"))


class PlainJpeg(NamedTuple):
    """An encoded JPEG, uint8, and its size in pixels."""

    encoded: np.ndarray
    height: int
    width: int


def plain_jpeg(raw: RawImage, side: int) -> PlainJpeg | None:
    """Read a JPEG that any JPEG decoder decodes in the same way as `decode`.

    Parameters
    ----------
    raw : str, bytes-like, PIL.Image.Image or ndarray
    side : int
        As in `decode`.

    Returns
    -------
    PlainJpeg or None
        None if the image is not such a JPEG (see `plain_header`), cannot be read, would be decoded
        at a reduced size, or has too many pixels. Only `decode` handles these.
    """
    if isinstance(raw, (np.ndarray, Image.Image)):
        return None
    try:
        if isinstance(raw, str):
            _refuse_pipe(os.stat(raw).st_mode)
        # torch shares only memory that can be written to.
        encoded = _read_file(raw) if isinstance(raw, str) else np.frombuffer(raw, np.uint8).copy()
    except (OSError, ImageError):
        return None
    header = plain_header(encoded.data)
    if header is None or min(header) >= 2 * _DRAFT_MARGIN * side:
        return None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and header.height * header.width > limit:
        return None
    return PlainJpeg(encoded, header.height, header.width)


def _read_file(path: str) -> np.ndarray:
    """Read a file, in Python and under its lock for as little time as possible."""
    with open(path, "rb", buffering=0) as file:
        content = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
        return content[: file.readinto(content.data)]


def encode_jpeg(image: torch.Tensor) -> bytes:
    """Encode an image (3, H, W), uint8, as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    return file.getvalue()


def _from_samples(
    samples: Samples, pixel_range: PixelRange | None, background: Color
) -> np.ndarray:
    colors = samples.colors
    if pixel_range is None and colors.dtype != np.uint8:
        low, high = extent(colors) or (0.0, 0.0)
        pixel_range = usual_range(low, high, _ranges_of(colors.dtype))
    colors = _to_uint8(colors, pixel_range)
    if samples.alpha is None and samples.profile is None:
        return _rgb(colors, background)
    image = Image.fromarray(
        colors[:, :, 0] if colors.shape[2] == 1 else np.ascontiguousarray(colors)
    )
    if samples.alpha is not None:
        image.putalpha(Image.fromarray(np.ascontiguousarray(samples.alpha)))
    image.info["icc_profile"] = samples.profile
    return _from_pil(image, background)


def _ranges_of(dtype: np.dtype) -> Sequence[PixelRange]:
    """Return the possible ranges of a file or PIL image of which only the dtype is known."""
    if dtype.kind == "f":
        return USUAL_RANGES
    return USUAL_RANGES[4:] if dtype.kind == "u" and dtype.itemsize == 2 else USUAL_RANGES[3:]


def _from_pil(image: Image.Image, background: Color) -> np.ndarray:
    image = formats.to_srgb(image)
    if image.has_transparency_data:
        # Pillow can convert premultiplied gray only to gray with alpha.
        image = image.convert("LA") if image.mode == "La" else image
        return _on_background(image, background)
    return np.array(image.convert("RGB"))


def _on_background(image: Image.Image, background: Color) -> np.ndarray:
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(transparent, mask=transparent)
    return np.array(canvas)


def _upright_copy(image: Image.Image) -> Image.Image:
    """Copy the caller's image, from any thread, and apply its EXIF orientation."""
    # The image may not be loaded yet, and its file may be broken.
    with _Explained(image), _LOCKS[id(image) // 64 % len(_LOCKS)]:
        formats.scale_transparency(image)
        image.load()  # Pillow knows the mode of an embedded image only then.
        copy = ImageOps.exif_transpose(formats.without_undefined_alpha(image))
    assert copy is not None  # Only in_place=True returns None.
    return copy


def _refuse_pipe(mode: int) -> None:
    # Reading it would wait forever.
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode):
        raise ImageError("Got a pipe, a socket or a device, but expected a file.")


def _refuse_bomb(image: Image.Image) -> None:
    # Pillow itself only warns up to twice the limit.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError


class _Explained:
    """Convert errors of Pillow and of the system, inside the block, to an ImageError."""

    def __init__(self, raw: RawImage) -> None:
        self._raw = raw

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # Pillow's plugins raise nearly anything on a broken file.
        if isinstance(error, Exception) and not isinstance(error, ImageError | MemoryError):
            raise ImageError(_why(error, self._raw)) from error


def _why(error: Exception, raw: RawImage) -> str:
    if isinstance(error, FileNotFoundError):
        # Paths of a list are relative to its folder. The repr is UTF-8 whatever the path is.
        where = f" It was looked for at {os.path.abspath(raw)!r}." if isinstance(raw, str) else ""
        return f"There is no such file.{where}"
    if isinstance(raw, str) and os.path.isdir(raw):
        return "Got a folder, but expected an image. load_image_folder lists the images in it."
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return (
            f"Refused as a possible decompression bomb: the image has more pixels than "
            f"PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}. Raise the limit if you trust "
            "the image."
        )
    if isinstance(raw, Image.Image) and "closed" in str(error):
        return (
            "The image was closed before its pixels were read. Call its load() before, or pass the "
            "path of its file."
        )
    return _why_unreadable(error, raw)


def _why_unreadable(error: Exception, raw: RawImage) -> str:
    if isinstance(raw, str) and "\0" in raw:
        return "The path contains a NUL character. Remove it."
    if isinstance(error, UnidentifiedImageError | struct.error):
        kind = formats.identify(_head(raw))
        if kind:
            return f"{kind}."
    if isinstance(error, UnidentifiedImageError):
        return "Pillow cannot identify this as an image."
    if isinstance(error, OSError) and error.strerror:
        return f"The file cannot be read: {error.strerror}."
    if _UNSUPPORTED.search(str(error)):
        return f"Pillow cannot read this variant: {error}. Convert the image to PNG first."
    return f"The image is truncated or corrupt: {error}."


def _head(raw: RawImage) -> bytes:
    if isinstance(raw, str):
        with open(raw, "rb") as file:
            return file.read(512)
    return bytes(raw[:512]) if isinstance(raw, Encoded) else b""


def fingerprint(
    raw: RawImage | RemoteVersion, pixel_range: PixelRange | None = None, background: Color = WHITE
) -> bytes:
    """Compute a digest that identifies the content of an image in a cache.

    A file is identified by its absolute path, size and modification time, without being opened, a
    file at a URL by its version, and any other image by its content. The pixel range is included if
    there is one and the image may not be 8-bit, and the background if it is not white.

    Returns
    -------
    bytes of length 16

    Raises
    ------
    ImageError
        If a file is missing or an image cannot be loaded.
    """
    settings: tuple[object, ...] = () if background == WHITE else (background,)
    if isinstance(raw, np.ndarray):
        applied_range = None if raw.dtype == np.uint8 else pixel_range
        header = ("array", raw.dtype.str, raw.shape, applied_range, *settings)
        return _digest(header, np.ascontiguousarray(raw).reshape(-1).data)
    ranges = () if pixel_range is None else (pixel_range,)
    if isinstance(raw, Image.Image):
        return _digest(*_pil_content(raw, ranges, settings))
    if isinstance(raw, str):
        return _digest((*_file_identity(raw), *ranges, *settings))
    if isinstance(raw, RemoteVersion):
        return _digest(("url", *raw, *ranges, *settings))
    return _digest(("encoded", *ranges, *settings), bytes(raw))


def content_digest(
    raw: RawImage, pixel_range: PixelRange | None = None, background: Color = WHITE
) -> bytes:
    """Compute the fingerprint of the content of an image, also of a file, which is read.

    It does not depend on the name of the file: the encoded image has the same one.
    """
    if not isinstance(raw, str):
        return fingerprint(raw, pixel_range, background)
    with _Explained(raw):
        return fingerprint(_read_file(raw).data, pixel_range, background)


def _pil_content(
    raw: Image.Image, ranges: tuple[PixelRange, ...], settings: tuple[object, ...]
) -> tuple[tuple[object, ...], bytes]:
    with _Explained(raw):
        needed = formats.correction(raw, _needs_all_bits(ranges[0]) if ranges else False)
        wide = formats.has_numbers(raw)
    image = _upright_copy(raw)
    profile = image.info.get("icc_profile")
    details: list[object] = [*(ranges if wide else ()), *settings]
    details += [needed] if needed else []
    details += [profile] if formats.srgb_transform(profile, image.mode) else []
    transparency = image.info.get("transparency")
    properties = ("PIL", image.mode, image.size, transparency, image.getpalette(None), *details)
    return properties, image.tobytes()


def _file_identity(path: str) -> tuple[str, bytes, int, int]:
    with _Explained(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            _refuse_pipe(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(path)
        absolute = os.fsencode(os.path.abspath(path))
    return "path", absolute, status.st_size, status.st_mtime_ns


def _digest(header: tuple[object, ...], content: Encoded = b"") -> bytes:
    # The repr of a tuple ends at its closing bracket, so header and content cannot be confused.
    digest = hashlib.blake2b(repr(header).encode(), digest_size=16)
    digest.update(content)
    return digest.digest()
