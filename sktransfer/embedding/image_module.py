"""A whole fitted model as one torch module: from images of any size to its outputs.

Shapes: N images of h x w pixels, D outputs.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from sktransfer.backbones.frozen import freeze
from sktransfer.transforms.modules import Normalize, ResizeAndCrop
from sktransfer.transforms.preprocessing import Preprocessing


class ImageModule(nn.Module):
    """Images to the outputs of a model: resize, crop, normalize, and run the network.

    It is frozen and always in eval mode. It computes in float32, and copies all weights, so it can
    be moved to another device.

    Parameters
    ----------
    preprocessing : Preprocessing
    *network : nn.Module
        Run in order; they map normalized images to outputs. Copied.
    classes : ndarray of shape (K,) or None

    Attributes
    ----------
    preprocessing : Preprocessing
    prepare : nn.Module
        Maps images, uint8 (N, 3, h, w), to crops, uint8 (N, 3, H, W).
    network : nn.Module
        Maps crops, uint8 (N, 3, H, W), to outputs, float32 (N, D).
    classes : ndarray of shape (K,) or None
        Labels of the outputs, if they are probabilities or logits.
    """

    def __init__(
        self, preprocessing: Preprocessing, *network: nn.Module, classes: np.ndarray | None = None
    ) -> None:
        super().__init__()
        self.preprocessing, self.classes = preprocessing, classes
        self.prepare = ResizeAndCrop(preprocessing)
        self.network = nn.Sequential(Normalize(preprocessing), *copy.deepcopy(network))
        freeze(self)

    def train(self, mode: bool = True) -> ImageModule:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the outputs of images of one size.

        Parameters
        ----------
        images : Tensor of shape (N, 3, h, w)
            uint8, 0-255, RGB.

        Returns
        -------
        Tensor of shape (N, D)
            float32.

        Raises
        ------
        TypeError
            If the images are not uint8.
        ValueError
            If the images have another shape.
        """
        check_pixels(images)
        return self.network(self.prepare(images)).float()

    def then(self, *tail: nn.Module, classes: Any = None) -> ImageModule:
        """Return a copy with more modules after the network, and other classes."""
        return ImageModule(self.preprocessing, *list(self.network)[1:], *tail, classes=classes)


def check_pixels(images: torch.Tensor) -> None:
    """Raise an error if images are not uint8 (N, 3, h, w)."""
    if images.dtype != torch.uint8:
        raise TypeError(
            f"Got images of {images.dtype}, but expected uint8 from 0 to 255, which the module "
            "normalizes itself"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Got images of shape {tuple(images.shape)}, but expected (N, 3, height, width): RGB, "
            "channels first; use image[None] for a single image, and "
            "images.permute(0, 3, 1, 2) if channels are last"
        )
