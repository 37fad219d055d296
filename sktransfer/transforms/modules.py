"""Preprocessing as torch modules, for export: the same pixels as `Preprocessing.prepare`.

No line branches on the size of the images, so that `torch.export` gets a graph for any height and
width.

Shapes: N images of h x w pixels, H x W after the crop.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import torch
from torch import nn

from sktransfer.transforms.preprocessing import MAX_ASPECT_RATIO, Preprocessing

# A length in pixels; `torch.export` has symbols for numbers that it does not know yet.
_Length = int | torch.SymInt


class ResizeAndCrop(nn.Module):
    """Resize and center-crop images: uint8 (N, 3, h, w) to uint8 (N, 3, H, W).

    On a CPU, the pixels are those of `Preprocessing.prepare`; on another device, they differ by
    rounding.

    Parameters
    ----------
    preprocessing : Preprocessing

    Examples
    --------
    >>> image = torch.zeros(1, 3, 300, 400, dtype=torch.uint8)
    >>> ResizeAndCrop(Preprocessing())(image).shape
    torch.Size([1, 3, 224, 224])
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.resize, self.crop = preprocessing.resize, preprocessing.crop
        self.interpolation = preprocessing.interpolation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize and crop images of one size."""
        if isinstance(self.resize, int):
            height, width = images.shape[2:]
            short = torch.sym_min(height, width)
            # Integer divisions that round up or down as the floats of `Preprocessing` do.
            length = -(-2 * short * max(self.crop) // self.resize)
            length = torch.sym_max(MAX_ASPECT_RATIO * short, length)
            images = _middle(_middle(images, 2, length), 3, length)
            height, width = images.shape[2:]
            short = torch.sym_min(height, width)
            size = (self.resize * height // short, self.resize * width // short)
            images = self._resized(images, size)
        else:
            images = self._resized(images, self.resize)
        if isinstance(self.resize, int) and self.resize < max(self.crop):
            images = self._enlarged(images)
        return _cropped(_cropped(images, 2, self.crop[0]), 3, self.crop[1])

    def _enlarged(self, images: torch.Tensor) -> torch.Tensor:
        """Enlarge images that are smaller than the crop; this branches on their size."""
        height, width = images.shape[2:]
        if height >= self.crop[0] and width >= self.crop[1]:
            return images
        factor = max(self.crop[0] / height, self.crop[1] / width)
        return self._resized(images, (math.ceil(factor * height), math.ceil(factor * width)))

    def _resized(self, images: torch.Tensor, size: tuple[_Length, _Length]) -> torch.Tensor:
        if self.interpolation == "nearest" or _resizes_integers(images.device, self.interpolation):
            return self._interpolated(images, size)
        # As in integers, columns first, and whole levels in between.
        for step in ((images.shape[2], size[1]), size):
            levels = self._interpolated(images.float(), step).clamp(0, 255).round()
            images = levels.to(torch.uint8)
        return images

    def _interpolated(self, images: torch.Tensor, size: Any) -> torch.Tensor:
        if self.interpolation == "nearest":
            return nn.functional.interpolate(images, size)
        return nn.functional.interpolate(
            images, size, mode=self.interpolation, align_corners=False, antialias=True
        )


class Normalize(nn.Module):
    """Normalize pixels as `Preprocessing.normalize` does: uint8 (N, 3, H, W) to float32.

    Parameters
    ----------
    preprocessing : Preprocessing
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(-1, 1, 1) * 255
            self.register_buffer(name, values)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalize pixels."""
        return (pixels.to(torch.float32) - self.mean) / self.std


def _middle(images: torch.Tensor, axis: int, length: _Length) -> torch.Tensor:
    """Return the middle of an axis; all of it if it is not longer than `length`."""
    size = torch.sym_min(images.shape[axis], length)
    return _slice(images, axis, (images.shape[axis] - size) // 2, size)


def _cropped(images: torch.Tensor, axis: int, length: _Length) -> torch.Tensor:
    excess = images.shape[axis] - length
    half = excess // 2
    # Half a pixel is rounded to an even number, as torchvision's center_crop rounds.
    return _slice(images, axis, half + excess % 2 * (half % 2), length)


def _slice(images: torch.Tensor, axis: int, start: _Length, length: _Length) -> torch.Tensor:
    # A real slice would compare its end with the size of the axis.
    rows = torch.arange(length, device=images.device) + start
    return images.index_select(axis, rows)


def _resizes_integers(device: torch.device, interpolation: str) -> bool:
    """Return whether torchvision resizes uint8 in integers: on most CPUs, but no other device."""
    if device.type != "cpu":
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    has_bilinear = capability in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    return interpolation == "bicubic" or has_bilinear or torch.compiler.is_compiling()
