"""Anything image-like as a lazy sequence of uint8 RGB images.

Shapes: N images of H x W pixels with C channels.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch

from sktransfer.data import decoding
from sktransfer.data.containers import DatasetSource, check_source, is_stack, source_of
from sktransfer.data.decoding import (
    USUAL_RANGES,
    WHITE,
    Color,
    Extent,
    PixelRange,
    PlainJpeg,
    RawImage,
    resolve_background,
)
from sktransfer.data.items import as_array, describe, path_of, remote_file_of, resolve
from sktransfer.data.remote import RemoteFile, RemoteFiles, RemoteVersion
from sktransfer.utils.errors import ImageError, warn_user

# Items of a lazily read dataset, and files, from which the pixel range is learned.
_N_ITEMS_FOR_PIXEL_RANGE = 64
# Maximum number of images that are compared on the background.
_N_IMAGES_ON_BACKGROUND = 64
# Images from which it is estimated whether most images are large.
_N_IMAGES_FOR_SIZE = 16
# Size in bytes of the parts in which an array is scanned.
_BLOCK_BYTES = 2**26

_Result = TypeVar("_Result")

# Digests of images on their background, by fingerprint: a search compares the same ones in every
# fit. A few bytes for at most 64 images of a set, so their number is not limited.
_appearances: dict[bytes, bytes] = {}
# Properties of images at URLs, by function and fingerprint, for the same reason.
_known_properties: dict[tuple[str, bytes], Any] = {}


class Identity(NamedTuple):
    """What identifies an image in a cache.

    Parameters
    ----------
    fingerprint : bytes of length 16
    is_file : bool
        Whether the fingerprint is that of a path, size and modification time. Then it is only valid
        on this machine.
    """

    fingerprint: bytes
    is_file: bool


def _identity(image: Any, *settings: Any) -> Identity:
    return Identity(decoding.fingerprint(image, *settings), isinstance(image, str))


class Images(Sequence[np.ndarray]):
    """N images, decoded one at a time on access.

    Built by `as_images`. It references the caller's container and keeps no decoded image, so
    memory does not grow with N. Several threads may read from it at once. Every access to an item
    of a torch or Hugging Face dataset reads the item again, even for its `fingerprint`, and only
    one thread reads at a time, since few datasets are thread-safe. Paths are decoded in parallel.

    Parameters
    ----------
    source : object
        Anything with a length whose items `sktransfer.data.items.resolve` understands.
    image_shape : tuple of int or None
        Shape of an image that is given as a flat row of numbers.
    pixel_range : (float, float) or None
        Range of pixels that are not 8-bit, mapped to 0-255. None uses, for each image separately,
        the first usual range that contains its pixels.
    background : (int, int, int)
        Color on which transparency is composited.
    rows : ndarray of int or None
        Indices of these images in `source`; None means all.
    argument : str
        Name of the argument that `source` was passed as, for errors; empty for `X`.
    remote : RemoteFiles or None
        Reads the images at URLs; None is a new one.
    """

    # Pickles from before this attribute do not have it.
    argument = ""

    def __init__(
        self,
        source: Any,
        *,
        image_shape: tuple[int, ...] | None = None,
        pixel_range: PixelRange | None = None,
        background: Color = WHITE,
        rows: np.ndarray | None = None,
        argument: str = "",
        remote: RemoteFiles | None = None,
    ) -> None:
        self.source = source
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.background = background
        self.rows = rows
        self.argument = argument
        self.remote = RemoteFiles() if remote is None else remote

    def __len__(self) -> int:
        return len(self.source if self.rows is None else self.rows)

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, row: slice) -> Images: ...
    def __getitem__(self, row: int | slice) -> np.ndarray | Images:
        """Decode one image.

        Returns
        -------
        ndarray of shape (H, W, 3), uint8, 0-255, RGB, C-contiguous

        Raises
        ------
        ImageError
            If the image cannot be read; the message names its row and source.
        """
        if isinstance(row, slice):
            return self.take(range(len(self))[row])
        return self.decode(row)

    def decode(self, row: int, side: int | None = None) -> np.ndarray:
        """Decode one image as indexing does, optionally at a reduced size.

        Parameters
        ----------
        row : int
        side : int or None
            Length of the shorter side to which the image will be resized. A far larger image may
            be decoded at a reduced size, but not below this length. None decodes all pixels.
        """
        return self._apply(partial(decoding.decode, side=side), row)

    def decode_with_digest(self, row: int, side: int | None = None) -> tuple[np.ndarray, bytes]:
        """Decode one image as `decode` does, and compute a digest of its content.

        The digest is that of the encoded image, if it is encoded, whatever the name of its file.
        """

        def decode(image: RawImage, *settings: Any) -> tuple[np.ndarray, bytes]:
            pixels = decoding.decode(image, *settings, side=side)
            return pixels, decoding.content_digest(image)

        return self._apply(decode, row)

    def plain_jpeg(self, row: int, side: int) -> PlainJpeg | None:
        """Return one image if it is a JPEG that any JPEG decoder can decode, else `None`.

        Items of datasets are not read, and broken images raise no error here, but in `decode`.
        """
        if isinstance(self.source, DatasetSource):
            return None

        def read(image: RawImage, *_: Any) -> PlainJpeg | None:
            jpeg = decoding.plain_jpeg(image, side)
            file = self.remote_file(row) if jpeg is None else None
            if file is not None and isinstance(image, bytes):
                self.remote.keep(file, image)  # for `decode`
            return jpeg

        with contextlib.suppress(ImageError):
            return self._apply(read, row)
        return None

    def stack(self) -> tuple[np.ndarray | torch.Tensor, bool] | None:
        """Return the images of the source as one array, if it is an array of 8-bit RGB images.

        Returns
        -------
        pixels : ndarray or Tensor of shape (M, H, W, 3) or (M, 3, H, W)
            uint8, the source itself; a tensor is on another device. M is the length of the source,
            not of `rows`.
        channels_first : bool
        """
        source = self.source
        if not isinstance(source, np.ndarray | torch.Tensor) or source.ndim != 4:
            return None
        if not str(source.dtype).endswith("uint8") or 0 in source.shape:
            return None
        is_tensor = isinstance(source, torch.Tensor)
        axis = decoding.channel_axis(tuple(source.shape[1:]), channels_first=is_tensor)
        if axis is None or source.shape[1:][axis] != 3:
            return None
        on_cpu = isinstance(source, torch.Tensor) and not source.is_cuda
        pixels = as_array(source) if on_cpu else source
        return pixels, axis == 0

    def fingerprint(self, row: int) -> bytes:
        """Compute a digest that identifies the content of one image in a cache.

        A file is identified by its absolute path, size and modification time, without being opened;
        a file at a URL by its name, ETag (or time) and size, which are requested in parallel for
        all images at once; any other image by its content. The pixel range is included if there is
        one and the image may not be 8-bit, and the background if it is not white.

        Returns
        -------
        bytes of length 16

        Raises
        ------
        ImageError
            If a file is missing or an item is not an image.
        """
        return self._apply(decoding.fingerprint, row, self._versioned)

    def identity(self, row: int) -> Identity:
        """Return the fingerprint of one image, and whether the image is a file on a disk."""
        return self._apply(_identity, row, self._versioned)

    def _versioned(self, file: RemoteFile) -> RemoteVersion:
        return self.remote.version(file, partial(self._remote_files, range(len(self))))

    def content_fingerprint(self, row: int) -> bytes:
        """Compute the fingerprint of the content of one image; a file is read.

        Copies of a file have the same one on all machines, and so has the encoded image in bytes.

        Raises
        ------
        ImageError
            As in `fingerprint`; also if a file cannot be read.
        """
        return self._apply(decoding.content_digest, row)

    def order_key(self, row: int) -> bytes:
        """Return a key for sorting images: the path, the name of a URL, or else the content.

        Items of a dataset keep their order, since their content would have to be read.
        """
        if isinstance(self.source, DatasetSource):
            return self._origin(row).to_bytes(8, "big")
        if (file := self.remote_file(row)) is not None:
            return os.fsencode(file.name)
        item = self._apply(lambda image, *_: image, row)
        return (
            os.fsencode(os.path.abspath(item)) if isinstance(item, str) else self.fingerprint(row)
        )

    def mostly_at_least(self, side: int) -> bool:
        """Estimate from a sample whether the shorter side of most images is at least `side`."""
        sample, n_large = self.sample(_N_IMAGES_FOR_SIZE), 0
        with sample.fetching() as start:
            start(range(len(sample)))
            for row in range(len(sample)):
                try:
                    n_large += min(sample.decode(row, side).shape[:2]) >= side
                except ImageError:  # reported when the image is decoded for use
                    continue
        return 2 * n_large > len(sample)

    def describe(self, row: int) -> str:
        """Describe an item in a few words: its path, `"bytes"`, `"array of shape (8, 8)"`."""
        if isinstance(self.source, DatasetSource):
            return f"item of {type(self.source.dataset).__name__}"
        return describe(self._read(row))

    def take(self, rows: Sequence[int] | np.ndarray) -> Images:
        """Select images without reading them; errors still name their original rows.

        Parameters
        ----------
        rows : sequence of int
            Positions of the selected images, in any order; they may repeat.
        """
        chosen = np.asarray(rows, dtype=np.intp)
        return Images(
            self.source,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
            background=self.background,
            rows=self.origins[chosen],
            argument=self.argument,
            remote=self.remote,
        )

    def of_argument(self, argument: str) -> Images:
        """Return the same images, whose errors name an argument other than `X`."""
        named = copy.copy(self)
        named.argument = argument
        return named

    @property
    def origins(self) -> np.ndarray:
        """Rows of these images in the container that they came in, which errors name."""
        return np.arange(len(self.source)) if self.rows is None else self.rows

    def without(self, error: ImageError) -> np.ndarray:
        """Return the positions of the images that an error does not name."""
        named = [broken.row for broken in error.errors if broken.argument == self.argument]
        return np.flatnonzero(~np.isin(self.origins, [row for row in named if row is not None]))

    def sample(self, count: int) -> Images:
        """Select at most `count` images, evenly spaced."""
        return self.take(np.unique(np.linspace(0, len(self) - 1, count).round().astype(int)))

    def path(self, row: int) -> str | None:
        """Return the path or URL of one image, or None if it has none."""
        return None if isinstance(self.source, DatasetSource) else path_of(self._read(row))

    def remote_file(self, row: int) -> RemoteFile | None:
        """Return the URL of one image, or None if it has none or is in a dataset."""
        source = self.source
        no_paths = isinstance(source, DatasetSource | torch.Tensor) or is_stack(source)
        return None if no_paths else remote_file_of(self._read(row))

    @contextlib.contextmanager
    def fetching(self) -> Iterator[Callable[[Sequence[int]], None]]:
        """Return a function that starts to read the URLs of some rows, in a context.

        Threads read them, more than there are cores, and whatever decodes these rows waits for
        them. Rows without a URL are left out.
        """
        with self.remote.fetching() as start:
            yield lambda rows: start(self._remote_files(rows))

    def _remote_files(self, rows: Sequence[int]) -> Iterator[RemoteFile]:
        return (file for row in rows if (file := self.remote_file(row)) is not None)

    def properties(self, function: Callable[[RawImage], _Result]) -> Iterator[_Result | ImageError]:
        """Yield the result of a function of `decoding` for each image, or an error.

        Those of images at URLs are remembered, and the others are fetched in parallel.
        """
        name, keys = function.__name__, [self._key_of_url(row) for row in range(len(self))]
        with self.fetching() as start:
            start(
                [
                    row
                    for row, key in enumerate(keys)
                    if isinstance(key, bytes) and (name, key) not in _known_properties
                ]
            )
            for row, key in enumerate(keys):
                yield key if isinstance(key, ImageError) else self._property(function, row, key)

    def _property(
        self, function: Callable[[RawImage], _Result], row: int, key: bytes | None
    ) -> _Result | ImageError:
        known = None if key is None else (function.__name__, key)
        if known in _known_properties:
            return _known_properties[known]
        try:
            result = self._apply(lambda image, *_: function(image), row)
        except ImageError as error:
            return error
        if known is not None:
            _known_properties[known] = result
        return result

    def _key_of_url(self, row: int) -> bytes | ImageError | None:
        """Return the fingerprint of an image at a URL, or its error; None without a URL."""
        try:
            return None if self.remote_file(row) is None else self.fingerprint(row)
        except ImageError as error:
            return error

    def _read(self, row: int) -> Any:
        return self.source[self._origin(row)]

    def _origin(self, row: int) -> int:
        position = range(len(self))[row]
        return position if self.rows is None else int(self.rows[position])

    def _apply(
        self,
        function: Callable[[Any, PixelRange | None, Color], _Result],
        row: int,
        fetch: Callable[[RemoteFile], Any] | None = None,
    ) -> _Result:
        """Call a function of `decoding` for a row; its errors name the row.

        Of an image at a URL, the function gets the bytes, or what `fetch` returns for the URL.
        """
        item = None
        try:
            item = self._read(row)
            image: Any = resolve(item, self.image_shape)
            if isinstance(image, RemoteFile):
                image = (fetch or self.remote.read)(image)
            return function(image, self.pixel_range, self.background)
        except ImageError as error:
            source = self.describe(row) if item is None else describe(item)
            raise ImageError(
                error.reason, self._origin(row), source, argument=self.argument
            ) from error.__cause__


def as_images(
    X: Any,
    *,
    image_shape: Sequence[int] | None = None,
    pixel_range: tuple[float, float] | None = None,
    background: Any = "white",
) -> Images:
    """Convert anything image-like to `Images`.

    Parameters
    ----------
    X : list, array, Series, one-column DataFrame, tensor or dataset of length N
        Paths (str, Path or bytes), URLs (str or Path), PIL images, arrays of shape (H, W) or
        (H, W, C) or (C, H, W), torch tensors (C, H, W) on any device, encoded bytes in any buffer,
        open binary files, pyarrow columns, arrays on disk (HDF5, Zarr), dicts as in Hugging Face
        `datasets`, or a mixture; stacked arrays of shape (N, H, W), (N, H, W, C) or
        (N, C, H, W); a map-style torch Dataset; or numbers of shape (N, n_features), which need
        `image_shape`.
    image_shape : (H, W) or (H, W, C), or None
        The shape of an image that is given as a flat row; one size may be -1. It has no effect on
        other `X`.
    pixel_range : (lo, hi) or None
        The range of all pixels that are not 8-bit, in arrays, PIL images and files; it is mapped
        linearly to 0-255. 8-bit pixels stay unchanged. Pixels outside one of the usual ranges (see
        `learn_pixel_range`) raise an error; pixels outside any other range are clipped. None uses,
        for each image, the first usual range that contains it, so images may differ.
    background : str or (int, int, int)
        The color on which transparency is composited. The last of 2 or 4 channels is the opacity.

    Returns
    -------
    Images
        Of length N; nothing is decoded yet. If `X` is `Images`, its own settings take precedence.

    Raises
    ------
    TypeError
        If `X` is a sparse matrix, an iterator, a lazy frame, or a dataset without a length.
    ValueError
        If `X` is a single image, is empty, or has rows that do not fit `image_shape`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> images = as_images(load_digits().data, image_shape=(8, 8), pixel_range=(0, 16))
    >>> len(images), images[0].shape, int(images[0].max())
    (1797, (8, 8, 3), 239)
    """
    shape, limits = _check_image_shape(image_shape), _check_pixel_range(pixel_range)
    color = resolve_background(background)
    if isinstance(X, Images):
        return Images(
            X.source,
            image_shape=X.image_shape or shape,
            pixel_range=X.pixel_range or limits,
            background=color if X.background == WHITE else X.background,
            rows=X.rows,
            argument=X.argument,
            remote=X.remote,
        )
    return _checked(source_of(X), shape, limits, color)


def images_of_source(
    source: Any,
    *,
    image_shape: Sequence[int] | None = None,
    pixel_range: tuple[float, float] | None = None,
    background: Any = "white",
) -> Images:
    """Build `Images` from a source that `containers.source_of` returned.

    Parameters
    ----------
    source : list, tuple, ndarray, torch.Tensor, values of a Series, or DatasetSource
    image_shape, pixel_range, background
        See `as_images`.

    Raises
    ------
    ValueError
        See `as_images`.
    """
    shape, limits = _check_image_shape(image_shape), _check_pixel_range(pixel_range)
    return _checked(source, shape, limits, resolve_background(background))


def _checked(
    source: Any,
    image_shape: tuple[int, ...] | None,
    pixel_range: PixelRange | None,
    background: Color,
) -> Images:
    check_source(source, image_shape)
    return Images(source, image_shape=image_shape, pixel_range=pixel_range, background=background)


def learn_pixel_range(
    X: Any, *, image_shape: Sequence[int] | None = None
) -> tuple[float, float] | None:
    """Return the range of the pixels that are not 8-bit.

    All numbers in memory are scanned, 64 evenly spaced files and encoded images, but only the first
    64 items of a lazily read dataset. Files of 8-bit images are opened, but not decoded. Broken
    images are skipped; they raise an error when they are decoded.

    Parameters
    ----------
    X, image_shape
        See `as_images`.

    Returns
    -------
    (float, float) or None
        The first of (0, 1), (-1, 1), (0, 16), (0, 255), (0, 65535) that contains all numbers, or
        their minimum and maximum if none does. Values from -0.1 to 1.1 count as 0 to 1, because
        resizing exceeds it; they are clipped. None if no image needs a range, because all are
        8-bit.

    Warns
    -----
    UserWarning
        If the images are dark in the range: integers of 10, 12 or 14 bits in that of 16 bits, and
        other numbers below a quarter of it. Also if the numbers look as if they were normalized
        with a mean and a standard deviation.

    Examples
    --------
    >>> learn_pixel_range([np.array([[0.0, 0.7]]), np.array([[-0.2, 0.5]])])
    (-1.0, 1.0)
    >>> learn_pixel_range(np.zeros((5, 8, 8), dtype=np.uint8)) is None
    True
    """
    images = as_images(X, image_shape=image_shape)
    if images.pixel_range is not None:
        return images.pixel_range
    low, high, integer = math.inf, -math.inf, True
    for extent in _extents(images):
        low, high = min(low, extent.low), max(high, extent.high)
        integer = integer and extent.is_integer
    if low > high:
        return None
    learned = decoding.usual_range(low, high)
    # Any numbers, not only pixels, can be read as images of height 1.
    if images.image_shape is None or images.image_shape[0] != 1:
        _warn_of_range(learned, high, integer)
    return learned


def _warn_of_range(learned: PixelRange, high: float, integer: bool) -> None:
    """Warn if a learned range probably does not extend from black to white."""
    if integer and learned == USUAL_RANGES[-1] and high < 2**14:
        white = next(2**bits - 1 for bits in (10, 12, 14) if high < 2**bits)
        warn_user(
            f"Got integer pixels up to {high:g}, for which pixel_range='auto' uses the range of 16 "
            f"bits, 0 to 65535, so the images are dark. If white is {white}, set "
            f"pixel_range=(0, {white})",
        )
    if not integer and learned in USUAL_RANGES and 1 < high < learned[1] / 4:
        warn_user(
            f"Got floating-point pixels up to {high:g}, for which pixel_range='auto' uses the "
            f"range {learned[0]:g} to {learned[1]:g}, so the images are dark. Set pixel_range to "
            f"the values of black and white, such as (0, {high:g})",
        )
    if not integer and learned not in USUAL_RANGES and learned[0] < 0:
        warn_user(
            f"Got floating-point pixels from {learned[0]:g} to {learned[1]:g}, which look "
            "normalized by mean and standard deviation, as the network does itself. Pass the "
            "images before normalization, or set pixel_range to the values of black and white",
        )


def warn_if_dark(images: Images) -> None:
    """Warn if numbers in memory are nearly 0 in the pixel range that was learned from others."""
    black, white = images.pixel_range or (0, 0)
    if white < 16 or not len(images) or isinstance(images.source, DatasetSource):
        return
    if images.path(0) is not None:
        return
    # The white of 8-bit pixels is dark among 16 bits, and that of 0 to 1 in any other range.
    dark = 255 if white == USUAL_RANGES[-1][1] else 1
    high = max((e.high for e in _extents(images.sample(_N_ITEMS_FOR_PIXEL_RANGE))), default=0)
    if 0 < high <= dark:
        warn_user(
            f"Got pixels up to {high:g}, but the pixel range is {black:g} to {white:g} (passed, or "
            "learned by fit), so the images are nearly black. Pass pixels of the same range as to "
            "fit",
        )


def _extents(images: Images) -> Iterator[Extent]:
    """Yield the extents of the numbers that need a pixel range."""
    source = images.source
    if is_stack(source) and images.rows is None:
        step = max(1, _BLOCK_BYTES // max(1, source[0].nbytes))
        is_8_bit = str(source.dtype).endswith("uint8")
        blocks = range(0, 0 if is_8_bit else len(source), step)
        extents = (decoding.extent_of(as_array(source[start : start + step])) for start in blocks)
        yield from (extent for extent in extents if extent is not None)
        return
    count, is_dataset = len(images), isinstance(source, DatasetSource)
    encoded = np.zeros(count, dtype=bool)
    for row in range(min(count, _N_ITEMS_FOR_PIXEL_RANGE) if is_dataset else count):
        try:
            item = resolve(images._read(row), images.image_shape)
            is_file = isinstance(item, str | decoding.Encoded | RemoteFile)
            encoded[row] = is_file and not is_dataset
            if encoded[row]:
                continue
            if isinstance(item, RemoteFile):
                item = images.remote.read(item)
            if extent := decoding.extent_of(item):
                yield extent
        except ImageError:
            continue
    if encoded.any():
        yield from _extents_of_files(images.take(np.flatnonzero(encoded)))


def _extents_of_files(files: Images) -> Iterator[Extent]:
    sample = files.sample(_N_ITEMS_FOR_PIXEL_RANGE)
    for extent in sample.properties(decoding.extent_of):
        if isinstance(extent, Extent):
            yield extent


def warn_if_invisible(images: Images) -> None:
    """Warn if all transparent images of a sample are equal on the background."""
    count = min(len(images), _N_IMAGES_ON_BACKGROUND)
    is_dataset = isinstance(images.source, DatasetSource)
    sample = images[:count] if is_dataset else images.sample(count)
    appearances, contents = set(), set()
    for row, transparent in enumerate(sample.properties(decoding.may_be_transparent)):
        try:
            if not transparent or isinstance(transparent, ImageError):
                if is_dataset and not transparent:  # Reading more items may be slow.
                    return
                continue
            contents.add(content := sample.fingerprint(row))
            if content not in _appearances:
                _appearances[content] = _appearance(sample[row])
        except ImageError:  # reported when the image is decoded for use
            continue
        appearances.add(_appearances[content])
        if len(appearances) > 1:
            return
    if len(contents) > 1:
        warn_user(
            f"Got {len(contents)} different images with transparency, which are all equal on "
            f"background={images.background!r}: their colors are probably those of the background. "
            "Set background to another color, such as 'black' or 'gray'",
        )


def _appearance(pixels: np.ndarray) -> bytes:
    """Return a digest of pixels, the same for all sizes of a uniform image."""
    pixels = pixels[:1, :1] if (pixels == pixels[0, 0]).all() else pixels
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()


def _check_image_shape(image_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    if image_shape is None:
        return None
    sizes = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
    valid = all(isinstance(size, Integral) and (size > 0 or size == -1) for size in sizes)
    if len(sizes) not in (2, 3) or not valid or sizes.count(-1) > 1:
        raise ValueError(
            f"Got image_shape={image_shape!r}, but expected (H, W) or (H, W, C) of positive "
            "integers, one of them possibly -1."
        )
    return tuple(int(size) for size in sizes)


def _check_pixel_range(pixel_range: Sequence[float] | None) -> PixelRange | None:
    if pixel_range is None:
        return None
    try:
        lo, hi = (float(limit) for limit in pixel_range)
    except (TypeError, ValueError):
        lo = hi = math.nan
    if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
        raise ValueError(
            f"Got pixel_range={pixel_range!r}, but expected (lo, hi), two finite numbers with "
            "lo <= hi."
        )
    return lo, hi
