"""Preparation of images as in the training of the weights: resize, crop, normalize.

Shapes: N images of H x W pixels; a prepared image is uint8 (3, H, W), 0-255, in
channels-last memory. It becomes normalized float32 only on the device, batch by batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Limits of the sides of a network's input, in pixels: smaller images have no content, and larger
# ones do not fit into memory.
_MIN_SIDE, _MAX_SIDE = 8, 8192

# An image whose long side is more than this many times its short side is cropped before it is
# resized: the ends would be cropped away anyway, and resizing them could fill the memory.
MAX_ASPECT_RATIO = 4


def check_image_size(image_size: Any, *, options: tuple[str, ...] = ()) -> None:
    """Check a size of the network's input.

    Parameters
    ----------
    image_size : object
    options : tuple of str
        Strings that are accepted, too.

    Raises
    ------
    ValueError
        If `image_size` is neither a side, a pair of sides nor None.
    """
    if image_size is None or (isinstance(image_size, str) and image_size in options):
        return
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size,)
    valid = all(
        isinstance(side, Integral)
        and not isinstance(side, bool)
        and _MIN_SIDE <= int(side) <= _MAX_SIDE
        for side in sides
    )
    if len(sides) not in (1, 2) or not valid:
        others = "".join(f"{option!r}, " for option in options)
        raise ValueError(
            f"Got image_size={image_size!r}, but expected a side in pixels such as 224 (an integer "
            f"from {_MIN_SIDE} to {_MAX_SIDE:,}), (height, width), {others}or None for the size of "
            "the weights"
        )


@dataclass(frozen=True, repr=False)
class Preprocessing:
    """The preprocessing that the weights expect.

    Parameters
    ----------
    resize : int or (int, int)
        The shorter side after resizing, in pixels, which keeps the aspect ratio; or height and
        width, which does not.
    crop : (int, int)
        Height and width of the center crop, in pixels.
    interpolation : {"nearest", "bilinear", "bicubic"}
        Method of resizing; always with antialiasing, as in Pillow.
    mean, std : (float, float, float)
        Per channel, on pixels scaled to 0-1: a pixel becomes ``(x / 255 - mean) / std``.

    Examples
    --------
    >>> import numpy as np
    >>> preprocessing = Preprocessing()
    >>> print(preprocessing)
    resize 256 bilinear, crop 224x224, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)
    >>> image = np.zeros((300, 400, 3), dtype=np.uint8)
    >>> preprocessing.prepare(image).shape
    torch.Size([3, 224, 224])
    """

    resize: int | tuple[int, int] = 256
    crop: tuple[int, int] = (224, 224)
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __str__(self) -> str:
        resize = self.resize if isinstance(self.resize, int) else "{}x{}".format(*self.resize)
        crop = "{}x{}".format(*self.crop)
        mean, std = (tuple(round(value, 4) for value in values) for values in (self.mean, self.std))
        return f"resize {resize} {self.interpolation}, crop {crop}, mean {mean}, std {std}"

    def __repr__(self) -> str:
        return f"Preprocessing({self})"

    @classmethod
    def from_torchvision(cls, preset: Any) -> Preprocessing:
        """Read the `transforms()` of torchvision's weights.

        Parameters
        ----------
        preset : torchvision.transforms._presets.ImageClassification
            The result of ``weights.transforms()``.
        """
        (resize,), (crop,) = preset.resize_size, preset.crop_size
        return cls(
            resize, (crop, crop), preset.interpolation.value, tuple(preset.mean), tuple(preset.std)
        )

    def with_image_size(self, image_size: int | tuple[int, int] | None) -> Preprocessing:
        """Return a copy with another image size.

        Parameters
        ----------
        image_size : int, (int, int) or None
            An integer is the side of a square crop; the size before the crop changes in proportion.
            A pair is a height and width to which images are resized without a crop, which does
            not keep the aspect ratio. `None` keeps the size of the weights.

        Raises
        ------
        ValueError
            If `image_size` is not a size.
        """
        if image_size is None:
            return self
        check_image_size(image_size)
        sides = image_size if isinstance(image_size, (tuple, list)) else (image_size,)
        if len(sides) == 2:
            size = (int(sides[0]), int(sides[1]))
            return replace(self, resize=size, crop=size)
        side = int(sides[0])
        margin = self.resize / min(self.crop) if isinstance(self.resize, int) else 1.0
        return replace(self, resize=max(side, round(side * margin)), crop=(side, side))

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Resize and crop one image.

        Parameters
        ----------
        image : ndarray of shape (H, W, 3)
            uint8, 0-255, RGB.

        Returns
        -------
        Tensor of shape (3, H, W)
            uint8, 0-255, with the height and width of `crop`.
        """
        return self.cropped(self.resized(image))

    @property
    def side(self) -> int:
        """The minimum length of the sides of a resized image, in pixels."""
        return self.resize if isinstance(self.resize, int) else max(self.resize)

    def resized(self, image: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Resize one image without cropping it.

        Parameters
        ----------
        image : ndarray of shape (H, W, 3) or Tensor of shape (3, H, W)
            uint8, 0-255, RGB; a tensor is resized on its own device.

        Returns
        -------
        Tensor of shape (3, h, w)
            uint8, 0-255, before the crop.
        """
        if isinstance(image, np.ndarray):
            # torch has no read-only tensors.
            writable = image if image.flags.writeable else image.copy()
            image = torch.from_numpy(writable).permute(2, 0, 1)
        return self._resize(self._cut_strip(image), self.resize)

    def cropped(self, image: torch.Tensor) -> torch.Tensor:
        """Center-crop an image (3, h, w), uint8; enlarge it first if it is smaller than the crop.

        Returns
        -------
        Tensor of shape (3, H, W)
            uint8, 0-255, with the height and width of `crop`.
        """
        height, width = image.shape[1:]
        if height < self.crop[0] or width < self.crop[1]:
            factor = max(self.crop[0] / height, self.crop[1] / width)
            image = self._resize(image, (math.ceil(factor * height), math.ceil(factor * width)))
        return tvf.center_crop(image, list(self.crop))

    def _resize(self, image: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
        sides = [size] if isinstance(size, int) else list(size)
        mode = InterpolationMode(self.interpolation)
        return tvf.resize(image, sides, interpolation=mode, antialias=True)

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """Normalize a batch of pixels for the backbone, on the device of the batch.

        Parameters
        ----------
        batch : Tensor of shape (N, 3, H, W)
            uint8, 0-255.

        Returns
        -------
        Tensor of shape (N, 3, H, W)
            float32.
        """
        # Kept only where copying them would wait. While a graph is traced, they are no numbers.
        keeps = batch.is_cuda and not torch.compiler.is_compiling()
        statistics = _kept_statistics if keeps else _statistics
        mean, std = statistics(self.mean, self.std, batch.device)
        return batch.to(torch.float32).sub_(mean).div_(std)

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width to which an image of `size` (height, width) is resized.

        Examples
        --------
        >>> Preprocessing().resized_size((300, 400))
        (256, 341)
        """
        if not isinstance(self.resize, int):
            return self.resize
        short, long = min(size), max(size)
        longer = int(self.resize * long / short)
        return (self.resize, longer) if size[0] <= size[1] else (longer, self.resize)

    def cuts_strip(self, size: tuple[int, int]) -> bool:
        """Return whether an image of `size` (height, width) is cropped before it is resized."""
        return isinstance(self.resize, int) and max(size) > MAX_ASPECT_RATIO * min(size)

    def _cut_strip(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        if not self.cuts_strip((height, width)):
            return image
        assert isinstance(self.resize, int)
        short = min(height, width)
        kept_length = math.ceil(2 * short * max(self.crop) / self.resize)
        kept_length = max(MAX_ASPECT_RATIO * short, kept_length)
        top, left = max(0, (height - kept_length) // 2), max(0, (width - kept_length) // 2)
        return image[:, top : top + kept_length, left : left + kept_length]


def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of pixels, (3, 1, 1)."""
    with torch.inference_mode(False):
        # Computed on the CPU: other streams of the device would not wait for the product.
        scaled = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (mean, std))
        first, second = (values.to(device) for values in scaled)
        return first, second


_kept_statistics = lru_cache(maxsize=64)(_statistics)
