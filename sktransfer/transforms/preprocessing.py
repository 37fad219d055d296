"""Preparing images the way the weights were trained: resize, crop, normalize.

Shapes: N images of H x W pixels; a prepared image is uint8 (3, H, W), 0-255, in
channels-last memory, and becomes normalized float32 only on the device, a batch at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A strip is cut to its middle before it is resized where its long side exceeds the short one
# this many times: the rest would be cropped away, and resizing it could fill the memory.
_STRIP = 4


@dataclass(frozen=True, repr=False)
class Preprocessing:
    """What the weights expect of an image.

    Parameters
    ----------
    resize : int or (int, int)
        The shorter side after resizing, in pixels (the aspect ratio is kept), or height and width
        (it is not kept).
    crop : (int, int)
        Height and width of the center crop, in pixels.
    interpolation : {"nearest", "bilinear", "bicubic"}
        Method of resizing; always with antialiasing, as Pillow does.
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
            What ``weights.transforms()`` gives.
        """
        (resize,), (crop,) = preset.resize_size, preset.crop_size
        return cls(
            resize, (crop, crop), preset.interpolation.value, tuple(preset.mean), tuple(preset.std)
        )

    def with_image_size(self, image_size: int | tuple[int, int] | None) -> Preprocessing:
        """Change the size of the images that the backbone sees.

        Parameters
        ----------
        image_size : int, (int, int) or None
            A side: the crop is a square, and the margin that resizing leaves around it stays in
            proportion. Height and width: images are squeezed to just that, nothing is cropped
            away. `None`: as the weights say.

        Raises
        ------
        ValueError
            Where `image_size` is no positive size.
        """
        if image_size is None:
            return self
        sides = image_size if isinstance(image_size, (tuple, list)) else (image_size,)
        whole = all(isinstance(side, (int, np.integer)) and side > 0 for side in sides)
        if len(sides) not in (1, 2) or not whole:
            raise ValueError(
                f"Got image_size={image_size!r}, but expected a side in pixels such as 224, "
                "(height, width), or None for the size of the weights"
            )
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
        """The length, in pixels, that no side of a resized image falls short of."""
        return self.resize if isinstance(self.resize, int) else max(self.resize)

    def resized(self, image: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Resize one image, and cut nothing away.

        Parameters
        ----------
        image : ndarray of shape (H, W, 3) or Tensor of shape (3, H, W)
            uint8, 0-255, RGB; a tensor is resized on its own device.

        Returns
        -------
        Tensor of shape (3, h, w)
            uint8, 0-255, in a size out of which `crop` can be cut.
        """
        if isinstance(image, np.ndarray):
            # torch has no read-only tensors
            own = image if image.flags.writeable else image.copy()
            image = torch.from_numpy(own).permute(2, 0, 1)
        return self._resize(self._cut_strip(image), self.resize)

    def cropped(self, image: torch.Tensor) -> torch.Tensor:
        """Cut the middle out of an image (3, h, w), uint8; what is too small for it is enlarged.

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
        """Turn a batch of pixels into what the backbone takes, on the batch's own device.

        Parameters
        ----------
        batch : Tensor of shape (N, 3, H, W)
            uint8, 0-255.

        Returns
        -------
        Tensor of shape (N, 3, H, W)
            float32.
        """
        mean = torch.tensor(self.mean, device=batch.device).view(-1, 1, 1) * 255
        std = torch.tensor(self.std, device=batch.device).view(-1, 1, 1) * 255
        return batch.to(torch.float32).sub_(mean).div_(std)

    def _cut_strip(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        short = min(height, width)
        if not isinstance(self.resize, int) or max(height, width) <= _STRIP * short:
            return image
        keep = max(_STRIP * short, math.ceil(2 * short * max(self.crop) / self.resize))
        top, left = max(0, (height - keep) // 2), max(0, (width - keep) // 2)
        return image[:, top : top + keep, left : left + keep]
