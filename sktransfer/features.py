"""The one road that both estimators take: pictures -> activations, through store and engine.

Shapes: N pictures, D features.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from sktransfer._config import progress_bar
from sktransfer._errors import PictureError
from sktransfer.backbones import Backbone
from sktransfer.engines import FrozenEngine, auto_batch_size, create_engine
from sktransfer.images import Pictures
from sktransfer.reading import Faults, PictureReader
from sktransfer.split import FrozenPrefix
from sktransfer.store import EmbeddingStore, embed_once
from sktransfer.transforms import Preprocessing

# Part of every key: raise it when the same recipe begins to give other numbers.
_EDITION = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything but the picture that an embedding depends on; each field is part of the key.

    Parameters
    ----------
    backbone : Backbone
    preprocessing : Preprocessing
    taps : tuple of (str or None)
        The layers to emit.
    pooling : {"avg", "max", "avgmax"} or None
    precision : torch.dtype
    """

    backbone: Backbone
    preprocessing: Preprocessing
    taps: tuple[str | None, ...] = (None,)
    pooling: str | None = "avg"
    precision: torch.dtype = torch.float32

    def __str__(self) -> str:
        layers = " + ".join("penultimate" if tap is None else tap for tap in self.taps)
        precision = str(self.precision).removeprefix("torch.")
        return (
            f"{self.backbone.name} {self.backbone.digest.hex()[:8]}, layer {layers}, "
            f"pooling {self.pooling}, {precision}, {self.preprocessing}"
        )

    @property
    def digest(self) -> bytes:
        """Identify the recipe: 16 bytes of BLAKE2b over all its fields."""
        parts = (
            _EDITION,
            self.backbone.digest.hex(),
            dataclasses.astuple(self.preprocessing),
            self.taps,
            self.pooling,
            str(self.precision),
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def embed(
    pictures: Pictures,
    recipe: Recipe,
    *,
    device: torch.device,
    engine: str = "auto",
    batch_size: int | None = None,
    threads: int = 1,
    store: EmbeddingStore | None = None,
    on_error: str = "raise",
    verbose: int = 0,
) -> tuple[np.ndarray, list[PictureError]]:
    """Embed pictures, each of them once.

    Parameters
    ----------
    pictures : Pictures of length N
    recipe : Recipe
    device : torch.device
    engine : str
        See `create_engine`. It is not part of the key: all engines give the same embedding.
    batch_size : int or None
        Pictures that go through the backbone at once; `None` lets the device decide.
    threads : int
        Threads that decode and prepare pictures.
    store : EmbeddingStore or None
        Where embeddings are looked up and kept.
    on_error : {"raise", "nan"}
        What a broken picture does: end the run (all finished batches are in the store by then), or
        give a row of NaN.
    verbose : int
        Shows a progress bar where it is not 0.

    Returns
    -------
    embeddings : ndarray of shape (N, D)
        float32.
    errors : list of PictureError
        The broken pictures, by row.

    Raises
    ------
    PictureError
        At the first broken picture, where `on_error` is `"raise"`.
    """
    width = output_width(recipe)
    batch_size = batch_size or auto_batch_size(device, recipe.preprocessing.crop)
    faults = Faults(on_error)
    rows, keys = list(range(len(pictures))), list[bytes]()
    if store is not None:
        rows, keys = _fingerprints(pictures, faults)

    with progress_bar(len(pictures), verbose, f"Embedding with {recipe.backbone.name}") as bar:

        def compute(places: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray]]:
            run = engine_for(recipe, engine, device).run
            reader = PictureReader(pictures, recipe.preprocessing, threads, faults)
            place_of = {rows[place]: place for place in places}
            for batch_rows, batch in reader.batches(list(place_of), batch_size):
                yield [place_of[row] for row in batch_rows], run(batch)
                bar.update(len(batch_rows))

        if store is not None:
            space = store.space(recipe.digest, str(recipe), width)
            found = embed_once(space, keys, compute, batch_size=batch_size)
            faults.spread(rows, keys)
        else:
            found = np.full((len(rows), width), np.nan, dtype=np.float32)
            for places, values in compute(range(len(rows))):
                found[places] = values
        bar.update(len(pictures) - bar.n)

    if len(rows) == len(pictures):
        return found, faults.sorted()
    embeddings = np.full((len(pictures), width), np.nan, dtype=np.float32)
    embeddings[rows] = found
    return embeddings, faults.sorted()


_widths: dict[bytes, int] = {}


def output_width(recipe: Recipe) -> int:
    """Count the features of a recipe, by sending a blank picture through the backbone, once.

    Raises
    ------
    ValueError
        Where the backbone does not take pictures of the recipe's size.
    """
    digest = recipe.digest
    if digest not in _widths:
        _widths[digest] = _measure_width(recipe)
    return _widths[digest]


def _measure_width(recipe: Recipe) -> int:
    prefix = _prefix(recipe)
    blank = torch.zeros(1, 3, *recipe.preprocessing.crop)
    try:
        with torch.inference_mode():
            return int(prefix(blank).shape[1])
    except (RuntimeError, AssertionError, ValueError) as error:
        height, width = recipe.preprocessing.crop
        raise ValueError(
            f"Got image_size={height}x{width}, but {recipe.backbone.name} cannot take such "
            f"pictures ({str(error).splitlines()[0]}); image_size=None takes the right size"
        ) from error


@lru_cache(maxsize=2)
def engine_for(recipe: Recipe, engine: str, device: torch.device) -> FrozenEngine:
    """Make the engine of a recipe, or find the one that this process made before."""
    return create_engine(
        _prefix(recipe),
        recipe.preprocessing,
        engine=engine,
        device=device,
        precision=recipe.precision,
    )


def _prefix(recipe: Recipe) -> FrozenPrefix:
    return FrozenPrefix(recipe.backbone.anatomy, recipe.taps, recipe.pooling)


def _fingerprints(pictures: Pictures, faults: Faults) -> tuple[list[int], list[bytes]]:
    """Identify the pictures that can be found: their rows and their keys."""
    rows, keys = [], []
    for row in range(len(pictures)):
        try:
            keys.append(pictures.fingerprint(row))
            rows.append(row)
        except PictureError as error:
            faults.add(row, error)
    return rows, keys
