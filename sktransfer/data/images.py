"""Anything image-like -> a lazy sequence of uint8 RGB images; all validation of `X`.

Shapes: N images of H x W pixels with C channels.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any, TypeVar, overload

import numpy as np

from sktransfer.data import decoding
from sktransfer.data.containers import DatasetSource, check_source, holds_rows, is_stack, source_of
from sktransfer.data.decoding import PixelRange, RawImage
from sktransfer.data.items import as_array, describe, path_of, resolve
from sktransfer.utils.errors import ImageError

# How many items tell the pixel range of a dataset that is read lazily, how many tell whether
# images are large, and how large a piece of an array is looked at in one go.
_N_ITEMS_FOR_PIXEL_RANGE = 64
_N_IMAGES_FOR_SIZE = 16
_BLOCK_BYTES = 2**26

_Result = TypeVar("_Result")


class Images(Sequence[np.ndarray]):
    """N images, decoded one by one when they are asked for.

    Made by `as_images`. It holds a reference to the caller's container, never a decoded
    image, so that memory does not grow with N, and it may be read from several threads at
    once. A torch or Hugging Face dataset is read anew by each access, `fingerprint` included,
    and by one thread at a time, since few datasets are thread-safe; paths decode in parallel.

    Parameters
    ----------
    source : object
        Anything with a length whose items `sktransfer.data.items.resolve` understands.
    image_shape : tuple of int or None
        Shape into which an item that is a flat row of numbers folds.
    pixel_range : (float, float) or None
        Range of the numbers that are not uint8, mapped to 0-255. None takes, for each image
        alone, the first usual range that holds it.
    rows : ndarray of int or None
        Which items of `source` these are; None means all.
    """

    def __init__(
        self,
        source: Any,
        *,
        image_shape: tuple[int, ...] | None = None,
        pixel_range: PixelRange | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.rows = rows

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
            Naming row and source of an image that cannot be read.
        """
        if isinstance(row, slice):
            return self.take(range(len(self))[row])
        return self.decode(row)

    def decode(self, row: int, side: int | None = None) -> np.ndarray:
        """Decode one image, as indexing does, or only as large as its use needs.

        Parameters
        ----------
        row : int
        side : int or None
            Length of the shorter side to which it will be resized; the image may come with
            fewer pixels than it has, but not with so few. None gives all of them.
        """
        return self._apply(partial(decoding.decode, side=side), row)

    def plain_jpeg(self, row: int, side: int) -> bytes | None:
        """Read one image as it is encoded where any decoder of JPEGs can take it, else `None`.

        Items of datasets are not looked at, and what is wrong with an image `decode` tells.
        """
        if isinstance(self.source, DatasetSource):
            return None
        with contextlib.suppress(ImageError):
            return self._apply(lambda image, _: decoding.plain_jpeg(image, side), row)
        return None

    def fingerprint(self, row: int) -> bytes:
        """Identify the content of one image, for a cache.

        A path is told by its absolute form, size and time of change, and not opened; everything
        else by content, including the pixel range where one applies.

        Returns
        -------
        bytes of length 16

        Raises
        ------
        ImageError
            For a missing file or an item that is no image.
        """
        return self._apply(decoding.fingerprint, row)

    def order_key(self, row: int) -> bytes:
        """Return a key that orders images: the path, or else the content.

        The items of a dataset, which would have to be read for it, stay in their order.
        """
        if isinstance(self.source, DatasetSource):
            return self._origin(row).to_bytes(8, "big")
        item = self._apply(lambda image, _: image, row)
        return (
            os.fsencode(os.path.abspath(item)) if isinstance(item, str) else self.fingerprint(row)
        )

    def mostly_at_least(self, side: int) -> bool:
        """Estimate from a sample whether the shorter side of most images is at least `side`."""
        few, large = self.sample(_N_IMAGES_FOR_SIZE), 0
        for row in range(len(few)):
            try:
                large += min(few.decode(row, side).shape[:2]) >= side
            except ImageError:  # reported when it is decoded for use
                continue
        return 2 * large > len(few)

    def describe(self, row: int) -> str:
        """Say in a few words what a row holds: its path, `"bytes"`, `"array of shape (8, 8)"`."""
        if isinstance(self.source, DatasetSource):
            return f"item of {type(self.source.dataset).__name__}"
        return describe(self._read(row))

    def take(self, rows: Sequence[int] | np.ndarray) -> Images:
        """Select images, numbered from 0 again, but not in errors; nothing is read.

        Parameters
        ----------
        rows : sequence of int
            Positions in these images, in any order; repetition is allowed.
        """
        chosen = np.asarray(rows, dtype=np.intp)
        return Images(
            self.source,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
            rows=(np.arange(len(self)) if self.rows is None else self.rows)[chosen],
        )

    def sample(self, count: int) -> Images:
        """Select so many images, or as many as there are, from everywhere."""
        return self.take(np.unique(np.linspace(0, len(self) - 1, count).round().astype(int)))

    def path(self, row: int) -> str | None:
        """Return the path of one image, or None if it has none."""
        return None if isinstance(self.source, DatasetSource) else path_of(self._read(row))

    def _read(self, row: int) -> Any:
        return self.source[self._origin(row)]

    def _origin(self, row: int) -> int:
        position = range(len(self))[row]
        return position if self.rows is None else int(self.rows[position])

    def _apply(
        self, function: Callable[[RawImage, PixelRange | None], _Result], row: int
    ) -> _Result:
        """Call a function of `decoding` for a row, and name the row if it fails."""
        item = None
        try:
            item = self._read(row)
            return function(resolve(item, self.image_shape), self.pixel_range)
        except ImageError as error:
            source = self.describe(row) if item is None else describe(item)
            raise ImageError(error.reason, self._origin(row), source) from error.__cause__


def as_images(
    X: Any,
    *,
    image_shape: Sequence[int] | None = None,
    pixel_range: tuple[float, float] | None = None,
) -> Images:
    """Bring anything image-like into one form.

    Parameters
    ----------
    X : list, array, Series, one-column DataFrame, tensor or dataset of length N
        Paths (str or Path), PIL images, arrays of shape (H, W) or (H, W, C) or (C, H, W),
        torch tensors (C, H, W) on any device, encoded bytes, dicts as Hugging Face `datasets`
        gives them, also mixed; stacked arrays of shape (N, H, W), (N, H, W, C) or
        (N, C, H, W); a map-style torch Dataset; or numbers of shape (N, n_features), which need
        `image_shape`.
    image_shape : (H, W) or (H, W, C), or None
        The shape into which flat rows fold; one of them may be -1. It has no effect on other X.
    pixel_range : (lo, hi) or None
        The range of all pixels that are not uint8; it is mapped linearly to 0-255. uint8 pixels
        are taken as they are. An image that exceeds one of the usual ranges (see
        `learn_pixel_range`) is an error; any other range clips. None takes for each image the
        first usual range that holds it, which may differ from image to image.

    Returns
    -------
    Images
        Of length N; nothing is decoded yet. An existing `Images` keeps what it has set.

    Raises
    ------
    TypeError
        For sparse matrices, iterators, and datasets without a length.
    ValueError
        For a single image, no images, or rows that do not fold.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> images = as_images(load_digits().data, image_shape=(8, 8), pixel_range=(0, 16))
    >>> len(images), images[0].shape, images[0].dtype, images[0].max()
    (1797, (8, 8, 3), dtype('uint8'), np.uint8(239))
    """
    shape, limits = _check_image_shape(image_shape), _check_pixel_range(pixel_range)
    if isinstance(X, Images):
        return Images(
            X.source,
            image_shape=X.image_shape or shape,
            pixel_range=X.pixel_range or limits,
            rows=X.rows,
        )
    return _checked(source_of(X), shape, limits)


def images_of_source(
    source: Any,
    *,
    image_shape: Sequence[int] | None = None,
    pixel_range: tuple[float, float] | None = None,
) -> Images:
    """Return the images of a source that `containers.source_of` has resolved before.

    Parameters
    ----------
    source : list, tuple, ndarray, torch.Tensor, values of a Series, or DatasetSource
    image_shape, pixel_range
        As `as_images` takes them.

    Raises
    ------
    ValueError
        As `as_images` does.
    """
    return _checked(source, _check_image_shape(image_shape), _check_pixel_range(pixel_range))


def _checked(
    source: Any, image_shape: tuple[int, ...] | None, pixel_range: PixelRange | None
) -> Images:
    check_source(source, image_shape)
    return Images(source, image_shape=image_shape, pixel_range=pixel_range)


def is_rows(X: Any) -> bool:
    """Whether `X` is numbers of shape (N, n_features), flat rows that need `image_shape`.

    Examples
    --------
    >>> is_rows([[0, 1, 2, 3]]), is_rows(np.zeros((1, 2, 2))), is_rows(["cat.jpg"])
    (True, False, False)
    """
    try:
        return not isinstance(X, Images) and holds_rows(source_of(X))
    except (TypeError, ValueError):
        return False


def learn_pixel_range(
    X: Any, *, image_shape: Sequence[int] | None = None
) -> tuple[float, float] | None:
    """Return the range of the pixels that are not uint8.

    All numbers in memory are looked at, and the first 64 items of a dataset that is read lazily.
    Broken images are passed over here, since reading them tells.

    Parameters
    ----------
    X, image_shape
        As `as_images` takes them.

    Returns
    -------
    (float, float) or None
        The first of (0, 1), (-1, 1), (0, 16), (0, 255), (0, 65535) that holds all numbers, and
        their own minimum and maximum where none does. None where nothing needs a range: paths,
        PIL images, encoded images, uint8.

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
    low, high = math.inf, -math.inf
    for numbers in _numbers(images):
        smallest, largest = decoding.extent(numbers) or (math.inf, -math.inf)
        low, high = min(low, smallest), max(high, largest)
    return decoding.usual_range(low, high) if low <= high else None


def _numbers(images: Images) -> Iterator[np.ndarray]:
    """Return the arrays whose numbers need a range, in pieces that share the caller's memory."""
    source = images.source
    if is_stack(source) and images.rows is None:
        if str(source.dtype).endswith("uint8"):
            return
        step = max(1, _BLOCK_BYTES // max(1, source[0].nbytes))
        for start in range(0, len(source), step):
            yield as_array(source[start : start + step])
        return
    count = len(images)
    for row in range(
        min(count, _N_ITEMS_FOR_PIXEL_RANGE) if isinstance(source, DatasetSource) else count
    ):
        try:
            item = resolve(images._read(row), images.image_shape)
        except ImageError:
            continue
        if isinstance(item, np.ndarray) and item.dtype != np.uint8:
            yield item


def _check_image_shape(image_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    if image_shape is None:
        return None
    sizes = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
    right = all(isinstance(size, Integral) and (size > 0 or size == -1) for size in sizes)
    if len(sizes) not in (2, 3) or not right or sizes.count(-1) > 1:
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
