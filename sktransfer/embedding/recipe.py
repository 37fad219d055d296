"""What an embedding depends on, and what a recipe makes of an image.

Shapes: N images, D features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.backbones.loading import Backbone
from sktransfer.transforms.preprocessing import Preprocessing

# Largest activations between which float16, of 6e-5 to 65504 in full precision, has room to spare.
_SMALL, _LARGE = 0.1, 2000.0


# Part of every key: raise it when the same recipe begins to give other numbers.
_EDITION = 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything but the image that an embedding depends on; each field is part of the key.

    Parameters
    ----------
    backbone : Backbone
    preprocessing : Preprocessing
    layers : tuple of (str or None)
        The layers to emit.
    pooling : {"avg", "max", "avgmax"} or None
    precision : torch.dtype
    dtype : {"float32", "float16"}
        What the values are kept in.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    layers: tuple[str | None, ...] = (None,)
    pooling: str | None = "avg"
    precision: torch.dtype = torch.float32
    dtype: str = "float32"

    def __str__(self) -> str:
        layers = " + ".join("penultimate" if tap is None else tap for tap in self.layers)
        precision = str(self.precision).removeprefix("torch.")
        return (
            f"{self.backbone.name} {self.backbone.digest.hex()[:8]}, layer {layers}, "
            f"pooling {self.pooling}, {precision}, {self.preprocessing}"
        )

    def prefix(self) -> FrozenPrefix:
        """Make the frozen blocks that the recipe runs."""
        return FrozenPrefix(self.backbone.block_list, self.layers, self.pooling)

    @property
    def emits_map(self) -> bool:
        """Whether what is emitted is one whole feature map, flattened."""
        (tap, *more), pooling = self.layers, self.pooling
        return pooling is None and not more and tap not in (None, "logits")

    @property
    def digest(self) -> bytes:
        """Identify the recipe: 16 bytes of BLAKE2b over all its fields."""
        parts = (
            _EDITION,
            self.backbone.digest.hex(),
            dataclasses.astuple(self.preprocessing),
            self.layers,
            self.pooling,
            str(self.precision),
            self.dtype,
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def recipe_at(
    backbone: Backbone, preprocessing: Preprocessing, boundary: int, precision: torch.dtype
) -> Recipe:
    """Make the recipe of what crosses a boundary.

    Parameters
    ----------
    backbone : Backbone
    preprocessing : Preprocessing
    boundary : int
        How many blocks lie before it, at least 1. After the last block it is the penultimate
        vector that crosses, the same as the extractor's, in float32; before, the feature map, in
        float16 where its values lie well within the range of that.
    precision : torch.dtype
    """
    if boundary == len(backbone.block_list.blocks):
        return Recipe(backbone, preprocessing, precision=precision)
    layers = (backbone.block_list.blocks[boundary - 1][0],)
    recipe = Recipe(backbone, preprocessing, layers, None, precision)
    return replace(recipe, dtype="float16" if _probe(recipe).fits_float16 else "float32")


def output_width(recipe: Recipe) -> int:
    """Count the features of a recipe.

    Raises
    ------
    ValueError
        Where the backbone does not take images of the recipe's size.
    """
    return math.prod(_probe(recipe).shape)


def map_shape(recipe: Recipe) -> tuple[int, ...]:
    """Tell the shape of what crosses a boundary, of which the embedding is the flattened form."""
    return _probe(recipe).shape


class _Probed(NamedTuple):
    """What a recipe makes of an image."""

    shape: tuple[int, ...]
    fits_float16: bool


_probed: dict[bytes, _Probed] = {}


def _probe(recipe: Recipe) -> _Probed:
    """Send an image of noise through the backbone, once."""
    digest = replace(recipe, dtype="float32").digest
    if digest not in _probed:
        _probed[digest] = _look(recipe)
    return _probed[digest]


def _look(recipe: Recipe) -> _Probed:
    prefix = recipe.prefix()
    height, width = recipe.preprocessing.crop
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            x = recipe.preprocessing.normalize((255 * noise).to(torch.uint8))
            emitted = prefix.feature_map(x) if recipe.emits_map else prefix(x)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"Got image_size={height}x{width}, but {recipe.backbone.name} cannot take such "
            f"images ({str(error).splitlines()[0]}); image_size=None takes the right size"
        ) from error
    largest = float(emitted.abs().max())
    return _Probed(tuple(emitted.shape[1:]), _SMALL < largest < _LARGE)
