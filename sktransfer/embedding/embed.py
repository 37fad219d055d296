"""Images to embeddings, through store and engine; all estimators use `embed`.

An item is an index into `Views`. A key index is an index into the keys of the readable items; the
rows of the store are key indices.

Shapes: N items, D features.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from sktransfer.data.images import Identity, Images
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.recipe import Recipe, output_width
from sktransfer.engines.base import FrozenEngine, pad
from sktransfer.engines.choice import create_engine, engine_batch_size
from sktransfer.store.embedding_table import chunks
from sktransfer.store.store import EmbeddingStore, embed_once
from sktransfer.transforms.device_feed import DeviceFeed, image_reader
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import EngineError, ImageError
from sktransfer.utils.memory import MemoryCache
from sktransfer.utils.progress import progress_bar

# Minimum number of batches of a job on a CUDA device, and of images in a batch.
_MIN_DEVICE_BATCHES, _MIN_DEVICE_BATCH = 4, 64
# Items that a thread hashes in one task.
_HASHED_TOGETHER = 64

_Result = TypeVar("_Result")


class Embedded(NamedTuple):
    """Result of `embed`.

    Parameters
    ----------
    embeddings : ndarray of shape (N, D)
        In the `dtype` of the recipe.
    errors : list of ImageError
        The broken images, by row.
    engine : str
        The engine that ran, or that would have run if embeddings had been missing.
    """

    embeddings: np.ndarray
    errors: list[ImageError]
    engine: str


def embed(
    views: Views,
    recipe: Recipe,
    compute: ComputeConfig,
    *,
    n_images: int | None = None,
    batch_size: int | None = None,
    on_error: str = "raise",
    verbose: int = 0,
    bar: Any = None,
    pad_batches: bool = False,
    out: np.ndarray | None = None,
) -> Embedded:
    """Compute the embeddings of views of images, each embedding once.

    Parameters
    ----------
    views : Views of length N
    recipe : Recipe
    compute : ComputeConfig
        Its engine is not part of the key: all engines compute the same embedding. Embeddings are
        read from its store and written to it.
    n_images : int or None
        Number of images of the whole job, which determines the engine; `None`: `len(views)`.
    batch_size : int or None
        Images per forward pass; `None` depends on engine and device.
    on_error : {"raise", "nan"}
        Broken images raise one error after all other images have been stored (or have been read,
        without a store), or their rows are NaN.
    verbose : int
        If not 0, show a progress bar.
    bar : progress bar or None
        The bar of a job of which this is a part; `None` opens one for this call.
    pad_batches : bool
        Pad incomplete batches on a CPU, so that embeddings are bitwise independent of the other
        images of a batch.
    out : ndarray of shape (N, D) or None
        Array for the embeddings, such as a memory-mapped file; `None` makes a new one.

    Returns
    -------
    Embedded

    Raises
    ------
    ImageError
        If images are broken and `on_error` is `"raise"`; names all of them.
    """
    width = output_width(recipe)
    n_images = n_images or len(views)
    engine = engine_name(recipe, compute, n_images)
    batch_size = batch_size or _batch_size(recipe, compute, engine, n_images)
    # With a store, readable images are embedded after a broken one too, so no work is lost.
    image_errors = ImageErrors(on_error if compute.store is None else "nan")
    items, keys, files = list(range(len(views))), list[bytes](), dict[int, bytes]()
    if compute.store is not None:
        items, keys, files = _keys(views, compute.store, compute.threads, image_errors)
    if out is None:
        out = np.full((len(views), width), np.nan, dtype=recipe.dtype)
    all_readable = len(items) == len(views)
    embeddings = out if all_readable else np.full((len(items), width), np.nan, out.dtype)

    with contextlib.ExitStack() as stack:
        if bar is None:
            bar = stack.enter_context(embedding_bar(recipe, len(views), verbose))
        done = bar.n + len(views)

        def compute_missing(
            claims: Iterator[list[int]],
        ) -> Iterator[tuple[list[int], np.ndarray]]:
            nonlocal engine
            runner = _engine_of_name(recipe, compute, engine)
            engine = runner.name
            # With some networks, the bits of an embedding depend on the batch size.
            full_size = batch_size if pad_batches and compute.device.type == "cpu" else 0
            # A small job is faster if all cores work on one batch, but the bits may differ.
            sequential = not pad_batches and n_images <= batch_size
            device = compute.device if runner.on_device else torch.device("cpu")
            decodes = compute.device_decodes
            reader = image_reader(views, compute.threads, image_errors, device, decodes=decodes)
            batches = (
                [items[key_index] for key_index in batch]
                for claim in claims
                for batch in chunks(claim, batch_size)
            )
            key_index_of = {item: key_index for key_index, item in enumerate(items)}
            for batch, values in _run(runner, reader, batches, full_size, sequential=sequential):
                bar.update(len(batch))
                same = _unchanged(batch, files, views, image_errors)
                yield [key_index_of[batch[row]] for row in same], values[same]

        if compute.store is not None:
            table = compute.store.table(recipe.digest, str(recipe), width, recipe.dtype)
            embed_once(table, keys, compute_missing, batch_size=batch_size, out=embeddings)
            image_errors.copy_to_duplicates(items, keys, views)
        else:
            for computed, values in compute_missing(iter([items])):
                embeddings[computed] = values
        bar.update(done - bar.n)

    errors = image_errors.sorted()
    if errors and on_error == "raise":
        raise ImageError.of(errors)
    if not all_readable:
        out[items] = embeddings
    return Embedded(out, errors, engine)


def embedding_bar(recipe: Recipe, n_images: int, verbose: int, *, n_done: int = 0) -> Any:
    """Open the progress bar of a job, of which `n_done` images were embedded earlier."""
    title = f"Embedding with {recipe.backbone.name}"
    return progress_bar(n_images, verbose, title, n_done=n_done)


def _batch_size(recipe: Recipe, compute: ComputeConfig, engine: str, n_images: int) -> int:
    size = engine_batch_size(engine, recipe.preprocessing.crop, compute.device)
    if compute.device.type == "cuda":
        # One batch is read and another one is computed, so a job has several.
        return min(size, max(_MIN_DEVICE_BATCH, math.ceil(n_images / _MIN_DEVICE_BATCHES)))
    return size


def _run(
    engine: FrozenEngine,
    reader: ImageReader | DeviceFeed,
    batches: Iterator[list[int]],
    full_size: int,
    *,
    sequential: bool,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the readable items of each batch and their embeddings.

    `full_size` is the size to which every batch is padded, 0 for no padding; `sequential` runs one
    batch at a time.
    """

    def run(batch: torch.Tensor) -> np.ndarray:
        padded = pad(batch, full_size) if full_size and not engine.batch_invariant else batch
        return engine.run(padded)[: len(batch)]

    if isinstance(reader, DeviceFeed):
        yield from reader.map(engine.forward, batches)
    elif engine.thread_safe and not sequential:
        yield from reader.map(run, batches, engine.threads_per_core)
    else:
        for items, batch in reader.read(batches):
            yield items, run(batch)


# Digests of recipes that only torch can run.
_torch_only: set[bytes] = set()


def engine_name(recipe: Recipe, compute: ComputeConfig, n_images: int) -> str:
    """Return the engine of the job, or choose one for a number of images."""
    if compute.chosen_engine is None:
        compute = compute.for_job(n_images, from_library=recipe.backbone.from_library)
    fails = compute.engine == "auto" and recipe.digest in _torch_only
    return "torch" if fails else str(compute.chosen_engine)


def engine_for(recipe: Recipe, compute: ComputeConfig, n_images: int) -> FrozenEngine:
    """Return the engine of a recipe for a number of images; build it if necessary."""
    return _engine_of_name(recipe, compute, engine_name(recipe, compute, n_images))


def _engine_of_name(recipe: Recipe, compute: ComputeConfig, name: str) -> FrozenEngine:
    """Build an engine by name; with `engine="auto"`, fall back to torch if it cannot run."""
    try:
        return _make_engine(recipe, name, compute.device)
    except EngineError:
        if compute.engine != "auto":
            raise
        _torch_only.add(recipe.digest)
        return _make_engine(recipe, "torch", compute.device)


# Engines that this process keeps, so that estimators that take turns do not rebuild them.
_engines: MemoryCache[FrozenEngine] = MemoryCache(at_least=2)


def _make_engine(recipe: Recipe, engine: str, device: torch.device) -> FrozenEngine:
    from_library = recipe.backbone.from_library

    def make() -> FrozenEngine:
        return create_engine(
            recipe.prefix(),
            recipe.preprocessing,
            engine=engine,
            device=device,
            precision=recipe.precision,
            key=recipe.digest,
            from_library=from_library,
        )

    def n_bytes(engine: FrozenEngine) -> int:
        return sum(tensor.nbytes for tensor in recipe.prefix().state_dict().values())

    return _engines.get((recipe.digest, from_library, engine, device), make, n_bytes, device)


def _keys(
    views: Views, store: EmbeddingStore, threads: int, image_errors: ImageErrors
) -> tuple[list[int], list[bytes], dict[int, bytes]]:
    """Return the items of the readable images, and their keys in the store.

    Also return the fingerprints of files whose content is in the key, by the row of the image.
    """
    of_images, files = _keys_of_images(views.images, store, threads)
    items, keys = list[int](), list[bytes]()
    for row, of_image in enumerate(of_images):
        for item in views.items_of(row):
            if isinstance(of_image, ImageError):
                image_errors.add(item, of_image)
            else:
                items.append(item)
                keys.append(views.fingerprint(item, of_image))
    return items, keys, files


def _unchanged(
    batch: list[int], files: dict[int, bytes], views: Views, image_errors: ImageErrors
) -> list[int]:
    """Return the rows of a batch, without those of files that have changed since they were hashed.

    The store would otherwise have the new embedding as that of the old content.
    """
    same = list[int]()
    for row, item in enumerate(batch):
        image = views.image_of(item)
        # Only a file is looked at again: pixels would be hashed anew.
        if image not in files or _fingerprint(views.images, image) == files[image]:
            same.append(row)
        else:
            reason = "The file has changed while it was embedded; embed it again."
            image_errors.add(item, _error_of_row(reason, views.images, image))
    return same


def _fingerprint(images: Images, row: int) -> bytes | None:
    """Return the fingerprint of an image, or None if it cannot be read any more."""
    try:
        return images.fingerprint(row)
    except ImageError:
        return None


def _keys_of_images(
    images: Images, store: EmbeddingStore, threads: int
) -> tuple[list[bytes | ImageError], dict[int, bytes]]:
    """Return the fingerprint of each image in a store, or its error, and those of files by row.

    The first is that of the content, so that embeddings may be carried to another machine. A file
    is read for it if the store does not know it yet, by its path, size and modification time. A
    temporary store is not carried, so these identify its files.
    """
    # Files are only looked up; pixels and encoded images are hashed in parallel.
    in_parallel = threads if len(images) and images.path(0) is None else 1
    if store.temporary:
        return _map(images.fingerprint, range(len(images)), in_parallel), {}
    identities = _map(images.identity, range(len(images)), in_parallel)
    keys = [each if isinstance(each, ImageError) else each.fingerprint for each in identities]
    files = {
        row: each.fingerprint
        for row, each in enumerate(identities)
        if isinstance(each, Identity) and each.is_file
    }
    errors = dict[bytes, ImageError]()

    def read(unknown: list[bytes]) -> dict[bytes, bytes]:
        row_of = {key: row for row, key in files.items()}
        digests = _map(images.content_fingerprint, [row_of[key] for key in unknown], threads)
        results = dict(zip(unknown, digests, strict=True))
        errors.update({key: each for key, each in results.items() if isinstance(each, ImageError)})
        return {key: each for key, each in results.items() if isinstance(each, bytes)}

    contents = store.contents_of(list(files.values()), read)
    for row, key in files.items():
        # The same file may be in several rows, which the error names.
        keys[row] = (
            contents[key] if key in contents else _error_of_row(errors[key].reason, images, row)
        )
    return keys, files


def _error_of_row(reason: str, images: Images, row: int) -> ImageError:
    origin = int(images.origins[row])
    return ImageError(reason, origin, images.describe(row), argument=images.argument)


def _map(
    function: Callable[[int], _Result], rows: Sequence[int], threads: int
) -> list[_Result | ImageError]:
    """Return the result of a function or its error for each row; on threads, if there are many."""

    def apply(part: Sequence[int]) -> list[_Result | ImageError]:
        return [_result_or_error(function, row) for row in part]

    if threads == 1 or len(rows) <= _HASHED_TOGETHER:
        return apply(rows)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(apply, chunks(list(rows), _HASHED_TOGETHER))
        return [each for part in parts for each in part]


def _result_or_error(function: Callable[[int], _Result], row: int) -> _Result | ImageError:
    try:
        return function(row)
    except ImageError as error:
        return error
