"""Recipes: everything but the image that determines an embedding, and the shape of the output.

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
from sktransfer.engines.verification import noise
from sktransfer.transforms.preprocessing import Preprocessing

# Activations are stored as float16 if the largest activation of a noise image is between these
# bounds, well inside the range in which float16 has full precision, 6e-5 to 65504.
_FLOAT16_LOWER_BOUND = 0.1
_FLOAT16_UPPER_BOUND = 2000.0

# Part of every key. Raise it whenever the same recipe leads to different embeddings.
_RECIPE_VERSION = 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything but the image that determines an embedding; each field is part of the key.

    Parameters
    ----------
    backbone : Backbone
    preprocessing : Preprocessing
    layers : tuple of (str or None)
        The layers to emit.
    pooling : {"avg", "max", "avgmax"} or None
    precision : torch.dtype
    dtype : {"float32", "float16"}
        Type of the stored values.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    layers: tuple[str | None, ...] = (None,)
    pooling: str | None = "avg"
    precision: torch.dtype = torch.float32
    dtype: str = "float32"

    def __str__(self) -> str:
        layers = " + ".join("penultimate" if layer is None else layer for layer in self.layers)
        precision = str(self.precision).removeprefix("torch.")
        return (
            f"{self.backbone.name} {self.backbone.digest.hex()[:8]}, layer {layers}, "
            f"pooling {self.pooling}, {precision}, {self.preprocessing}"
        )

    def prefix(self) -> FrozenPrefix:
        """Build the frozen blocks of the recipe."""
        return FrozenPrefix(self.backbone.block_list, self.layers, self.pooling)

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the backbone."""
        return len(self.backbone.block_list.blocks)

    @property
    def emits_map(self) -> bool:
        """Whether the output is a single flattened feature map."""
        return (
            self.pooling is None
            and len(self.layers) == 1
            and self.layers[0] not in (None, "logits")
        )

    @property
    def digest(self) -> bytes:
        """16 bytes of BLAKE2b over all fields, which identify the recipe."""
        parts = (
            _RECIPE_VERSION,
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
    """Build the recipe of the activations at a boundary.

    Parameters
    ----------
    backbone : Backbone
    preprocessing : Preprocessing
    boundary : int
        Number of blocks before the boundary, at least 1. After the last block, the activations are
        the penultimate vector, as in the extractor, in float32. Before the last block, they are the
        feature map, in float16 if its values are well inside the range of float16.
    precision : torch.dtype
    """
    if boundary == len(backbone.block_list.blocks):
        return Recipe(backbone, preprocessing, precision=precision)
    layers = (backbone.block_list.blocks[boundary - 1][0],)
    recipe = Recipe(backbone, preprocessing, layers, None, precision)
    return replace(recipe, dtype="float16" if _probe(recipe).fits_float16 else "float32")


def output_width(recipe: Recipe) -> int:
    """Return the number of features of a recipe.

    Raises
    ------
    ValueError
        If the backbone does not accept images of the recipe's size.
    """
    return math.prod(_probe(recipe).shape)


def map_shape(recipe: Recipe) -> tuple[int, ...]:
    """Return the shape of the activations at a boundary; the embedding is flattened."""
    return _probe(recipe).shape


class _Output(NamedTuple):
    """Properties of a recipe's output."""

    shape: tuple[int, ...]
    fits_float16: bool


_outputs: dict[bytes, _Output] = {}


def _probe(recipe: Recipe) -> _Output:
    """Measure the output of a recipe on a noise image, once in a process."""
    digest = replace(recipe, dtype="float32").digest
    if digest not in _outputs:
        _outputs[digest] = _run_noise(recipe)
    return _outputs[digest]


def _run_noise(recipe: Recipe) -> _Output:
    prefix, crop = recipe.prefix(), recipe.preprocessing.crop
    try:
        with torch.no_grad():
            x = recipe.preprocessing.normalize(noise(crop))
            output = prefix.feature_map(x) if recipe.emits_map else prefix(x)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"Got image_size={crop[0]}x{crop[1]}, but {recipe.backbone.name} does not accept "
            f"images of this size ({str(error).splitlines()[0]}); use image_size=None"
        ) from error
    fits_float16 = _FLOAT16_LOWER_BOUND < float(output.abs().max()) < _FLOAT16_UPPER_BOUND
    return _Output(tuple(output.shape[1:]), fits_float16)
