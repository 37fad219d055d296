"""Views of images, unchanged or augmented, prepared for a backbone.

Shapes: N images, V augmented views of each, H x W pixels.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sktransfer.data.decoding import PlainJpeg
from sktransfer.data.images import Images
from sktransfer.transforms.preprocessing import Preprocessing

# Maximum number of resized images that are kept, so that the views of an image decode it once. It
# exceeds the number of threads that prepare views.
_MAX_RESIZED_IMAGES = 64


class Augments(Protocol):
    """Protocol of an `Augmentation`."""

    @property
    def digest(self) -> bytes:
        """Bytes that identify the augmentation."""
        ...

    def __call__(
        self, image: torch.Tensor, seed: int, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Map an image (3, h, w), uint8, and a seed to an image of the same kind.

        Only the center of the result, of height and width `size`, will be used.
        """
        ...


class Stack(NamedTuple):
    """Images of one size in one array.

    Parameters
    ----------
    pixels : ndarray or Tensor of shape (M, h, w, 3) or (M, 3, h, w)
        uint8; a tensor is on another device than the CPU.
    channels_first : bool
    rows : ndarray of shape (N,)
        The row of `pixels` of each item.
    """

    pixels: np.ndarray | torch.Tensor
    channels_first: bool
    rows: np.ndarray


# A resized image, and a digest of its content.
_Source = tuple[torch.Tensor, bytes]


class Views:
    """Several views of each of N images, prepared one at a time on access.

    Item `i` is view `i % n` of image `i // n`; n is the number of views of an image. View 0 is the
    image without augmentation. Views `v` > 0 are augmented at random. Their random numbers depend
    only on the content of the image (its encoded bytes, or its pixels if it is not encoded), on `v`
    and on `salt`, so an image has the same views in every fold of a search, in every process, on
    every device and under any file name.

    Parameters
    ----------
    images : Images of length N
    preprocessing : Preprocessing
    augmentation : Augmentation or None
        With None, all views of an image are the same.
    n_views : int
        Number of augmented views of each image, V; the views are numbered 0 to V.
    only : int or None
        Number of a single view of each image to return instead.
    salt : bytes
        Another salt leads to other views of the same images.

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer.data.images import as_images
    >>> images = as_images(np.zeros((2, 30, 40, 3), dtype=np.uint8))
    >>> views = Views(images, Preprocessing(), n_views=3)
    >>> len(views), views.prepare(5).shape
    (8, torch.Size([3, 224, 224]))
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        augmentation: Augments | None = None,
        n_views: int = 0,
        *,
        only: int | None = None,
        salt: bytes = b"",
    ) -> None:
        self.images, self.preprocessing = images, preprocessing
        self.augmentation, self._salt = augmentation, salt
        self._numbers: Sequence[int] = range(1 + n_views) if only is None else [only]
        self._resized: OrderedDict[int, Future[_Source]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.images) * len(self._numbers)

    def part(self, rows: slice) -> tuple[slice, Views]:
        """Return the items of the views of some consecutive images, and these views."""
        selected = copy.copy(self)
        selected.images = self.images[rows]
        selected._resized, selected._lock = OrderedDict(), threading.Lock()
        count = len(self._numbers)
        return slice(rows.start * count, rows.stop * count), selected

    def origin(self, item: int) -> int:
        """Return the row of `X` that an item was made from."""
        row, _ = self._row_and_view(item)
        return row if self.images.rows is None else int(self.images.rows[row])

    def fingerprint(self, item: int, of_image: bytes | None = None) -> bytes:
        """Compute the 16 bytes that identify a view; those of the image if it is not augmented.

        Parameters
        ----------
        item : int
        of_image : bytes or None
            Those of the image; None computes its fingerprint.

        Raises
        ------
        ImageError
            If a file is missing or an item is not an image.
        """
        if of_image is None:
            of_image = self.images.fingerprint(self.image_of(item))
        if self.augmentation is None:
            return of_image
        _, number = self._row_and_view(item)
        if number == 0:
            return of_image
        parts = of_image + self.augmentation.digest + number.to_bytes(8, "little") + self._salt
        return hashlib.blake2b(parts, digest_size=16).digest()

    def prepare(self, item: int) -> torch.Tensor:
        """Decode, resize, augment and crop an image; return (3, H, W), uint8, 0-255.

        Raises
        ------
        ImageError
            If the image cannot be read; the message names its row and source.
        """
        row, number = self._row_and_view(item)
        image, digest = self._source(row)
        if number > 0 and self.augmentation is not None:
            crop, (height, width) = self.preprocessing.crop, image.shape[1:]
            size = crop if crop[0] <= height and crop[1] <= width else None
            image = self.augmentation(image, self.seed(item, digest), size)
        return self.preprocessing.cropped(image)

    @contextmanager
    def fetched_ahead(self, batches: Iterable[Sequence[int]]) -> Iterator[Iterator[Sequence[int]]]:
        """Return batches of items; images at URLs are requested as soon as their batch is taken."""
        with self.images.fetching() as start:
            yield self._fetched(batches, start)

    def _fetched(
        self, batches: Iterable[Sequence[int]], start: Callable[[Sequence[int]], None]
    ) -> Iterator[Sequence[int]]:
        last = -1  # the views of an image are consecutive, and may be in two batches
        for items in batches:
            rows = dict.fromkeys(self.image_of(item) for item in items)
            start([row for row in rows if row != last])
            last = next(reversed(rows), last)
            yield items

    def is_augmented(self, item: int) -> bool:
        """Return whether a view differs from its image."""
        return self.augmentation is not None and self._row_and_view(item)[1] > 0

    def plain_jpeg(self, item: int) -> PlainJpeg | None:
        """Return the image of a view if any JPEG decoder can decode it; see `Images.plain_jpeg`."""
        return self.images.plain_jpeg(self._row_and_view(item)[0], self.preprocessing.side)

    def image_of(self, item: int) -> int:
        """Return the position of the image of a view."""
        return self._row_and_view(item)[0]

    def items_of(self, image: int) -> range:
        """Return the views of the image at a position."""
        count = len(self._numbers)
        return range(image * count, (image + 1) * count)

    def pixels(self, item: int) -> tuple[np.ndarray, bytes]:
        """Decode the image of a view: (h, w, 3), uint8, 0-255, and the digest of its content.

        The digest is empty if there is no augmentation.

        Raises
        ------
        ImageError
            If the image cannot be read; the message names its row and source.
        """
        row, side = self.image_of(item), self.preprocessing.side
        if self.augmentation is None:
            return self.images.decode(row, side), b""
        return self.images.decode_with_digest(row, side)

    def stack(self) -> Stack | None:
        """Return the images as one array; None if they are not, or if views are augmented."""
        stack = None if self.augmentation is not None else self.images.stack()
        if stack is None:
            return None
        rows = np.arange(len(self.images)) if self.images.rows is None else self.images.rows
        return Stack(*stack, np.repeat(rows, len(self._numbers)))

    def _row_and_view(self, item: int) -> tuple[int, int]:
        row, index = divmod(item, len(self._numbers))
        return row, self._numbers[index]

    def seed(self, item: int, digest: bytes) -> int:
        """Return the seed of a view of an image whose content has a digest."""
        _, number = self._row_and_view(item)
        parts = number.to_bytes(8, "little") + self._salt + digest
        return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little")

    def _source(self, row: int) -> _Source:
        """Decode and resize an image, once for views that are prepared together."""
        if len(self._numbers) == 1:
            return self._read(row)
        with self._lock:
            is_first = row not in self._resized
            source = self._resized.setdefault(row, Future())
            while len(self._resized) > _MAX_RESIZED_IMAGES:
                self._resized.popitem(last=False)
        if is_first:
            try:
                source.set_result(self._read(row))
            except Exception as error:
                source.set_exception(error)
        return source.result()

    def _read(self, row: int) -> _Source:
        pixels, digest = self.pixels(row * len(self._numbers))
        return self.preprocessing.resized(pixels), digest
