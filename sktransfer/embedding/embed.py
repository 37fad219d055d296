"""The one road that both estimators take: images -> activations, through store and engine.

Shapes: N images, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.recipe import Recipe, output_width
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.choice import choose_engine, create_engine, engine_batch_size
from sktransfer.store.embedding_table import chunks
from sktransfer.store.store import embed_once
from sktransfer.transforms.gpu_decoding import decodes_on
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import EngineError, ImageError
from sktransfer.utils.progress import progress_bar


def embed(
    views: Views,
    recipe: Recipe,
    machine: ComputeConfig,
    *,
    n_images: int | None = None,
    batch_size: int | None = None,
    on_error: str = "raise",
    verbose: int = 0,
    pad_batches: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, list[ImageError]]:
    """Embed images, or views of them, each of them once.

    Parameters
    ----------
    views : Views of length N
    recipe : Recipe
    machine : ComputeConfig
        Its engine is not part of the key: all engines give the same embedding. Its store is where
        embeddings are looked up and kept.
    n_images : int or None
        Of the whole job, for the choice of the engine; `None`: these are all.
    batch_size : int or None
        Images that go through the backbone at once; `None` lets the device decide.
    on_error : {"raise", "nan"}
        What a broken image does: end the run (all finished batches are in the store by then), or
        give a row of NaN.
    verbose : int
        Shows a progress bar where it is not 0.
    pad_batches : bool
        Fills the last batch up on a CPU, so that every bit is the same in whatever company a
        image comes.
    out : ndarray of shape (N, D) or None
        Where to put the embeddings, such as a memory-mapped file.

    Returns
    -------
    embeddings : ndarray of shape (N, D)
        With the `dtype` of the recipe.
    errors : list of ImageError
        The broken images, by row.

    Raises
    ------
    ImageError
        At the first broken image, where `on_error` is `"raise"`.
    """
    width = output_width(recipe)
    n_images = n_images or len(views)
    store = machine.store
    batch_size = batch_size or _batch_size(recipe, machine, n_images)
    image_errors = ImageErrors(on_error)
    rows, keys = list(range(len(views))), list[bytes]()
    if store is not None:
        rows, keys = _fingerprints(views, image_errors)
    place_of = {row: place for place, row in enumerate(rows)}
    if out is None:
        out = np.full((len(views), width), np.nan, dtype=recipe.dtype)
    found = out if len(rows) == len(views) else np.full((len(rows), width), np.nan, out.dtype)

    with progress_bar(len(views), verbose, f"Embedding with {recipe.backbone.name}") as bar:

        def compute(claims: Iterator[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
            engine = engine_for(recipe, machine, n_images)
            # Some networks compute other bits for few images.
            fill = batch_size if pad_batches and machine.device.type == "cpu" else 0
            # Few images are ready sooner where all cores work on each; the bits may be others.
            sequential = not pad_batches and n_images <= batch_size
            items = ([rows[place] for place in claim] for claim in claims)
            batches = (batch for claim in items for batch in chunks(claim, batch_size))
            device = machine.device if decodes_on(machine.device) else None
            reader = ImageReader(views, machine.threads, image_errors, device)
            for batch_rows, values in _run(engine, reader, batches, fill, sequential=sequential):
                yield [place_of[row] for row in batch_rows], values
                bar.update(len(batch_rows))

        if store is not None:
            table = store.table(recipe.digest, str(recipe), width, recipe.dtype)
            embed_once(table, keys, compute, batch_size=batch_size, out=found)
            image_errors.copy_to_duplicates(rows, keys)
        else:
            for places, values in compute(iter([[*place_of.values()]])):
                found[places] = values
        bar.update(len(views) - bar.n)

    if found is not out:
        out[rows] = found
    return out, image_errors.sorted()


def _batch_size(recipe: Recipe, machine: ComputeConfig, n_images: int) -> int:
    name = engine_name(recipe, machine, n_images)
    size = engine_batch_size(name, recipe.preprocessing.crop, machine.device)
    if machine.device.type == "cuda":  # no thread is to be without a batch
        return min(size, math.ceil(n_images / machine.threads))
    return size


def _run(
    engine: FrozenEngine,
    reader: ImageReader,
    batches: Iterator[list[int]],
    fill: int,
    *,
    sequential: bool,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Read batches and send them through an engine: the rows that could be read, their embeddings.

    `fill` is the size to which every batch is padded, 0 for none; `sequential` runs one at a time.
    """

    def run(batch: torch.Tensor) -> np.ndarray:
        full = _filled(batch, fill) if fill and not engine.batch_invariant else batch
        return engine.run(full)[: len(batch)]

    if engine.thread_safe and not sequential:
        yield from reader.map(run, batches, engine.threads_per_core)
    else:
        for rows, batch in reader.read(batches):
            yield rows, run(batch)


def _filled(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Append black images to a batch until it has `size`."""
    if len(batch) == size:
        return batch
    full = batch.new_zeros(size, *batch.shape[1:]).contiguous(memory_format=torch.channels_last)
    full[: len(batch)] = batch
    return full


# Digests of the recipes that can only be run by torch.
_no_graph: set[bytes] = set()


def engine_name(recipe: Recipe, machine: ComputeConfig, n_images: int) -> str:
    """Tell which engine runs so many images."""
    device, known = machine.device, recipe.backbone.from_library
    name = choose_engine(machine.engine, device, recipe.precision, n_images, from_library=known)
    return "torch" if machine.engine == "auto" and recipe.digest in _no_graph else name


def engine_for(recipe: Recipe, machine: ComputeConfig, n_images: int) -> FrozenEngine:
    """Make the engine of a recipe for so many images, or find the one that was made before."""
    name = engine_name(recipe, machine, n_images)
    try:
        return _make_engine(recipe, name, machine.device)
    except EngineError:
        if machine.engine != "auto":
            raise
        _no_graph.add(recipe.digest)
        return _make_engine(recipe, "torch", machine.device)


@lru_cache(maxsize=2)
def _make_engine(recipe: Recipe, engine: str, device: torch.device) -> FrozenEngine:
    return create_engine(
        recipe.prefix(),
        recipe.preprocessing,
        engine=engine,
        device=device,
        precision=recipe.precision,
        key=recipe.digest,
        from_library=recipe.backbone.from_library,
    )


def _fingerprints(views: Views, image_errors: ImageErrors) -> tuple[list[int], list[bytes]]:
    """Identify the images that can be found: their rows and their keys."""
    rows, keys = [], []
    for row in range(len(views)):
        try:
            keys.append(views.fingerprint(row))
            rows.append(row)
        except ImageError as error:
            image_errors.add(row, error)
    return rows, keys
