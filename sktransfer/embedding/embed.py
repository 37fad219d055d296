"""The one road that both estimators take: pictures -> activations, through store and engine.

Shapes: N pictures, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from sktransfer.embedding.compute import Machine
from sktransfer.embedding.recipe import Recipe, output_width
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.batch_size import auto_batch_size
from sktransfer.engines.choice import choose_engine, create_engine
from sktransfer.store.space import chunks
from sktransfer.store.store import embed_once
from sktransfer.transforms.gpu_decoding import decodes_on
from sktransfer.transforms.loader import Faults, PictureReader
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import EngineError, PictureError
from sktransfer.utils.progress import progress_bar


def embed(
    views: Views,
    recipe: Recipe,
    machine: Machine,
    *,
    n_pictures: int | None = None,
    batch_size: int | None = None,
    on_error: str = "raise",
    verbose: int = 0,
    steady: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, list[PictureError]]:
    """Embed pictures, or views of them, each of them once.

    Parameters
    ----------
    views : Views of length N
    recipe : Recipe
    machine : Machine
        Its engine is not part of the key: all engines give the same embedding. Its store is where
        embeddings are looked up and kept.
    n_pictures : int or None
        Of the whole job, for the choice of the engine; `None`: these are all.
    batch_size : int or None
        Pictures that go through the backbone at once; `None` lets the device decide.
    on_error : {"raise", "nan"}
        What a broken picture does: end the run (all finished batches are in the store by then), or
        give a row of NaN.
    verbose : int
        Shows a progress bar where it is not 0.
    steady : bool
        Fills the last batch up on a CPU, so that every bit is the same in whatever company a
        picture comes.
    out : ndarray of shape (N, D) or None
        Where to put the embeddings, such as a memory-mapped file.

    Returns
    -------
    embeddings : ndarray of shape (N, D)
        With the `dtype` of the recipe.
    errors : list of PictureError
        The broken pictures, by row.

    Raises
    ------
    PictureError
        At the first broken picture, where `on_error` is `"raise"`.
    """
    width = output_width(recipe)
    n_pictures = n_pictures or len(views)
    store = machine.store
    batch_size = batch_size or _batch_size(recipe, machine, n_pictures)
    faults = Faults(on_error)
    rows, keys = list(range(len(views))), list[bytes]()
    if store is not None:
        rows, keys = _fingerprints(views, faults)
    place_of = {row: place for place, row in enumerate(rows)}
    if out is None:
        out = np.full((len(views), width), np.nan, dtype=recipe.dtype)
    found = out if len(rows) == len(views) else np.full((len(rows), width), np.nan, out.dtype)

    with progress_bar(len(views), verbose, f"Embedding with {recipe.backbone.name}") as bar:

        def compute(claims: Iterator[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
            engine = engine_for(recipe, machine, n_pictures)
            # Some networks compute other bits for few pictures.
            fill = batch_size if steady and machine.device.type == "cpu" else 0
            # Few pictures are ready sooner where all cores work on each; the bits may be others.
            alone = not steady and n_pictures <= batch_size
            items = ([rows[place] for place in claim] for claim in claims)
            batches = (batch for claim in items for batch in chunks(claim, batch_size))
            device = machine.device if decodes_on(machine.device) else None
            reader = PictureReader(views, machine.threads, faults, device)
            for batch_rows, values in _run(engine, reader, batches, fill, alone=alone):
                yield [place_of[row] for row in batch_rows], values
                bar.update(len(batch_rows))

        if store is not None:
            space = store.space(recipe.digest, str(recipe), width, recipe.dtype)
            embed_once(space, keys, compute, batch_size=batch_size, out=found)
            faults.spread(rows, keys)
        else:
            for places, values in compute(iter([[*place_of.values()]])):
                found[places] = values
        bar.update(len(views) - bar.n)

    if found is not out:
        out[rows] = found
    return out, faults.sorted()


def _batch_size(recipe: Recipe, machine: Machine, n_pictures: int) -> int:
    name = engine_name(recipe, machine, n_pictures)
    size = auto_batch_size(machine.device, recipe.preprocessing.crop, name)
    if machine.device.type == "cuda":  # no thread is to be without a batch
        return min(size, math.ceil(n_pictures / machine.threads))
    return size


def _run(
    engine: FrozenEngine,
    reader: PictureReader,
    batches: Iterator[list[int]],
    fill: int,
    *,
    alone: bool,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Read batches and send them through an engine: the rows that could be read, their embeddings.

    `fill` is the size that every batch is to have, 0 for as it comes; `alone` runs one at a time.
    """

    def run(batch: torch.Tensor) -> np.ndarray:
        full = _filled(batch, fill) if fill and not engine.alone else batch
        return engine.run(full)[: len(batch)]

    if engine.side_by_side and not alone:
        yield from reader.map(run, batches, engine.callers)
    else:
        for rows, batch in reader.read(batches):
            yield rows, run(batch)


def _filled(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Append black pictures to a batch until it has `size`."""
    if len(batch) == size:
        return batch
    full = batch.new_zeros(size, *batch.shape[1:]).contiguous(memory_format=torch.channels_last)
    full[: len(batch)] = batch
    return full


# Digests of the recipes that can only be run by torch.
_no_graph: set[bytes] = set()


def engine_name(recipe: Recipe, machine: Machine, n_pictures: int) -> str:
    """Tell which engine runs so many pictures."""
    device, known = machine.device, recipe.backbone.known
    name = choose_engine(machine.engine, device, recipe.precision, n_pictures, known=known)
    return "torch" if machine.engine == "auto" and recipe.digest in _no_graph else name


def engine_for(recipe: Recipe, machine: Machine, n_pictures: int) -> FrozenEngine:
    """Make the engine of a recipe for so many pictures, or find the one that was made before."""
    name = engine_name(recipe, machine, n_pictures)
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
        known=recipe.backbone.known,
    )


def _fingerprints(views: Views, faults: Faults) -> tuple[list[int], list[bytes]]:
    """Identify the pictures that can be found: their rows and their keys."""
    rows, keys = [], []
    for row in range(len(views)):
        try:
            keys.append(views.fingerprint(row))
            rows.append(row)
        except PictureError as error:
            faults.add(row, error)
    return rows, keys
