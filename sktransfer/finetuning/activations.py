"""Activations of many views at a boundary, in a memory-mapped file.

Shapes: N views, W values of one view's activations.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sktransfer.backbones.frozen import FrozenSpan
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.embed import embed
from sktransfer.embedding.recipe import Recipe, map_shape, output_width, recipe_at
from sktransfer.engines.batch_size import auto_batch_size, in_parts
from sktransfer.engines.torch_engine import run_frozen
from sktransfer.store.store import EmbeddingStore
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError
from sktransfer.utils.processes import ALONE, Processes

# Share of the free disk space that the activations of one fit may take.
_DISK_SHARE = 0.5


class Activations:
    """Activations of views at a boundary, in a temporary file that is deleted with the object.

    Parameters
    ----------
    values : ndarray of shape (N, W)
        Memory-mapped.
    recipe : Recipe
        Recipe that computed them.
    boundary : int
        Number of blocks before them.
    """

    def __init__(self, values: np.ndarray, recipe: Recipe, boundary: int) -> None:
        self.values, self.recipe, self.boundary = values, recipe, boundary

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one view's activations; a row of `values` is flattened."""
        return map_shape(self.recipe)

    def advance(
        self, boundary: int, device: torch.device, processes: Processes = ALONE
    ) -> Activations:
        """Compute the activations at a later boundary; each process computes some batches."""
        if boundary == self.boundary:
            return self
        old = self.recipe
        recipe = recipe_at(old.backbone, old.preprocessing, boundary, old.precision)
        span = FrozenSpan(old.backbone.block_list, self.boundary, boundary)
        if device.type != "cpu":
            span = copy.deepcopy(span).to(device)
        out = scratch_array((len(self.values), output_width(recipe)), recipe.dtype, processes)
        size = 4 * auto_batch_size(device, old.preprocessing.crop)
        starts = range(0, len(out), size)
        for start, x in self._batches(starts[processes.local_rank :: processes.local_count], size):
            y = run_span(span, x, device, recipe.precision)
            out[start : start + size] = y[: len(out) - start]
        processes.gather(None)  # until all of them have computed theirs
        return Activations(out, recipe, boundary)

    def _batches(self, starts: range, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield batches of equal size, the last one padded with zeros."""
        for start in starts:
            rows = np.zeros((size, self.values.shape[1]), np.float32)
            part = self.values[start : start + size]
            rows[: len(part)] = part
            yield start, torch.from_numpy(rows).reshape(size, *self.shape)


class ViewActivations:
    """Activations of the same views at one boundary after another.

    They are gathered at the first boundary when they are needed, and advanced from there. At most
    three sets are kept: the first, the last one that was requested, and the embeddings.

    Parameters
    ----------
    views : Views of length N
    recipe_at : callable
        Returns the recipe of a boundary.
    first : int
        The earliest boundary.
    compute : ComputeConfig
    verbose : int
        If not 0, show a progress bar while they are gathered.
    """

    def __init__(
        self,
        views: Views,
        recipe_at: Callable[[int], Recipe],
        first: int,
        compute: ComputeConfig,
        verbose: int = 0,
    ) -> None:
        self._views, self._recipe_at, self._first, self._compute = views, recipe_at, first, compute
        self._verbose = verbose
        self._last: Activations | None = None

    @cached_property
    def gathered(self) -> Activations:
        """The activations at the first boundary."""
        recipe = self._recipe_at(self._first)
        return gather(self._views, recipe, self._first, self._compute, self._verbose)

    def at(self, boundary: int) -> Activations:
        """Return the activations at a boundary, which is not before the first one."""
        if boundary == self._recipe_at(boundary).n_blocks:
            return self._embeddings
        if self._last is None or self._last.boundary != boundary:
            self._last = None  # delete its file before the next one is written
            self._last = self._advance(boundary)
        return self._last

    @cached_property
    def _embeddings(self) -> Activations:
        n_blocks = self._recipe_at(self._first).n_blocks
        return self._advance(n_blocks)

    def _advance(self, boundary: int) -> Activations:
        return self.gathered.advance(boundary, self._compute.device, self._compute.processes)


class SelectedActivations:
    """Some rows of the activations of a set of views.

    Parameters
    ----------
    whole : ViewActivations
    rows : ndarray of int
        Views, in the desired order.
    """

    def __init__(self, whole: ViewActivations, rows: np.ndarray) -> None:
        self._whole, self._rows = whole, rows

    def at(self, boundary: int) -> Activations:
        """Return the activations at a boundary, which is not before the first one."""
        whole = self._whole.at(boundary)
        return Activations(whole.values[self._rows], whole.recipe, boundary)


def gather(
    views: Views,
    recipe: Recipe,
    boundary: int,
    compute: ComputeConfig,
    verbose: int = 0,
) -> Activations:
    """Compute the activations of views at a boundary; each process computes those of some images.

    Raises
    ------
    ImageError
        If images are broken; names all of them.
    """
    processes, n_views = compute.processes, len(views)
    out = scratch_array((n_views, output_width(recipe)), recipe.dtype, processes)
    items, part = slice(None), views
    if processes.count > 1:
        items, part = views.part(processes.local_share(len(views.images)))
        verbose = verbose if processes.is_main else 0
    broken = None
    if len(part):
        options = {"n_images": n_views, "pad_batches": True, "verbose": verbose}
        try:
            embed(part, recipe, compute, out=out[items], **options)  # type: ignore[arg-type]
        except ImageError as error:
            broken = error
    errors = [error for error in processes.gather(broken) if error is not None]
    if errors:
        raise ImageError.of(errors)
    return Activations(out, recipe, boundary)


def disk_problem(n_views: int, recipe: Recipe, store: EmbeddingStore | None) -> str | None:
    """Return why the activations of this many views cannot be kept, or None if they can."""
    wanted = n_views * output_width(recipe) * np.dtype(recipe.dtype).itemsize
    free = _DISK_SHARE * shutil.disk_usage(tempfile.gettempdir()).free
    if wanted > free:
        return f"{wanted:,} bytes, but half of the free disk space is only {free:,.0f}"
    if store is not None and wanted > store.max_bytes:
        return f"{wanted:,} bytes, but the store is limited to {store.max_bytes:,}"
    return None


@torch.inference_mode()
def run_span(
    span: FrozenSpan, x: torch.Tensor, device: torch.device, precision: torch.dtype
) -> np.ndarray:
    """Run frozen blocks on a batch of activations (N, ...): float32 of shape (N, W)."""

    def run(part: torch.Tensor) -> torch.Tensor:
        part = part.to(device)
        if part.ndim == 4:
            part = part.contiguous(memory_format=torch.channels_last)
        return run_frozen(span, part, precision).flatten(1).cpu()

    return in_parts(run, x)[0].numpy()


def scratch_array(shape: tuple[int, int], dtype: str, processes: Processes = ALONE) -> np.ndarray:
    """Build an array in a temporary file that is deleted with the array.

    The processes of a machine have one array together.

    Raises
    ------
    OSError
        If there is not enough space on the disk.
    """
    if processes.local_rank > 0:
        path = processes.gather(Path())[processes.local_main]
        array = np.memmap(path, dtype=dtype, mode="r+", shape=shape)
        processes.gather(None)
        return array
    with tempfile.NamedTemporaryFile(prefix="sktransfer-", delete=False) as file:
        path = Path(file.name)
    try:
        _reserve(path, math.prod(shape) * np.dtype(dtype).itemsize)
        array = np.memmap(path, dtype=dtype, mode="w+", shape=shape)
        processes.gather(path)
        processes.gather(None)  # until all of them have opened it
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # Windows cannot delete a file that is open
        path.unlink()
        return array
    weakref.finalize(array, path.unlink, missing_ok=True)
    return array


def _reserve(path: Path, size: int) -> None:
    """Allocate the space now: a mapped file that runs out of space later kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        raise OSError(
            error.errno,
            f"Got {size:,} bytes of activations, but {path.parent} does not have enough space "
            f"({error.strerror}); free disk space, set TMPDIR to a folder on another disk, or "
            "decrease n_views",
        ) from error
