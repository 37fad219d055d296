"""Views of images: each as it is, and augmented copies of it, prepared for a backbone.

Shapes: N images, V copies of each, H x W pixels.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import torch

from sktransfer.data.images import Images
from sktransfer.transforms.gpu_decoding import prepare_jpegs
from sktransfer.transforms.preprocessing import Preprocessing

# Resized images that are kept, so that the views of one image decode it once.
_MAX_RESIZED_IMAGES = 8


class Augments(Protocol):
    """What makes copies: an `Augmentation`, or what behaves like one."""

    @property
    def digest(self) -> bytes:
        """Identify what is done to images."""
        ...

    def __call__(
        self, image: torch.Tensor, seed: int, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Map an image (3, h, w), uint8, and a seed to an image of the same kind.

        Of what it gives, no more than the middle, of height and width `size`, will be used.
        """
        ...


# An image, resized, and what identifies its pixels.
_Source = tuple[torch.Tensor, bytes]


class Views:
    """N images in several views each, prepared one by one when they are asked for.

    Item `i` is view `i % n` of image `i // n`, where n is the number of views of an image.
    View 0 is the image as it is. View `v` > 0 is a copy, augmented at random, whose random
    numbers depend on the image's content, on `v` and on `salt` only: the same image has the
    same copies in every fold of a search, in every process, under whatever name it lies.

    Parameters
    ----------
    images : Images of length N
    preprocessing : Preprocessing
    augmentation : Augmentation or None
        None makes all views of an image the same.
    n_views : int
        Augmented copies of each image, V; the views are then 0 to V.
    only : int or None
        Gives a single view of each image instead, with this number.
    salt : bytes
        Makes other copies of the same images.

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
        self._augmentation, self._salt = augmentation, salt
        self._numbers: Sequence[int] = range(1 + n_views) if only is None else [only]
        self._resized: OrderedDict[int, Future[_Source]] = OrderedDict()
        self._lock = threading.Lock()
        self._identity = -1, b""

    def __len__(self) -> int:
        return len(self.images) * len(self._numbers)

    def fingerprint(self, item: int) -> bytes:
        """Identify a view, 16 bytes: its image's own identity where it is the image as it is.

        Raises
        ------
        ImageError
            For a missing file or an item that is no image.
        """
        row, number = self._place(item)
        known, identity = self._identity
        if known != row:  # views of an image come one after the other
            identity = self.images.fingerprint(row)
            self._identity = row, identity
        if number == 0 or self._augmentation is None:
            return identity
        parts = identity + self._augmentation.digest + number.to_bytes(8, "little") + self._salt
        return hashlib.blake2b(parts, digest_size=16).digest()

    def prepare(self, item: int) -> torch.Tensor:
        """Decode, resize, augment and crop: an image (3, H, W), uint8, 0-255.

        Raises
        ------
        ImageError
            Naming row and source of an image that cannot be read.
        """
        row, number = self._place(item)
        image, digest = self._source(row)
        if number > 0 and self._augmentation is not None:
            crop, (height, width) = self.preprocessing.crop, image.shape[1:]
            size = crop if crop[0] <= height and crop[1] <= width else None
            image = self._augmentation(image, self._seed(digest, number), size)
        return self.preprocessing.cropped(image)

    def prepare_on(self, device: torch.device, items: Sequence[int]) -> dict[int, torch.Tensor]:
        """Prepare many images on a device: those whose JPEGs can be decoded there.

        Returns
        -------
        dict of int to Tensor of shape (3, H, W)
            uint8, 0-255, on the CPU; the other items, and augmented ones, are left to `prepare`.
        """
        if self._augmentation is not None:
            return {}
        jpegs = {
            item: self.images.plain_jpeg(self._place(item)[0], self.preprocessing.side)
            for item in items
        }
        return prepare_jpegs(
            {item: jpeg for item, jpeg in jpegs.items() if jpeg is not None},
            lambda pixels: self.preprocessing.cropped(self.preprocessing.resized(pixels)),
            device,
        )

    def _place(self, item: int) -> tuple[int, int]:
        row, place = divmod(item, len(self._numbers))
        return row, self._numbers[place]

    def _seed(self, digest: bytes, number: int) -> int:
        parts = number.to_bytes(8, "little") + self._salt + digest
        return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "little")

    def _source(self, row: int) -> _Source:
        """Decode and resize an image, once for all of its views that are asked for together."""
        if len(self._numbers) == 1:
            return self._read(row)
        with self._lock:
            mine = row not in self._resized
            source = self._resized.setdefault(row, Future())
            while len(self._resized) > _MAX_RESIZED_IMAGES:
                self._resized.popitem(last=False)
        if mine:
            try:
                source.set_result(self._read(row))
            except Exception as error:
                source.set_exception(error)
        return source.result()

    def _read(self, row: int) -> _Source:
        pixels = self.images.decode(row, self.preprocessing.side)
        image = self.preprocessing.resized(pixels)
        if self._augmentation is None:
            return image, b""
        return image, hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
