"""Jobs whose embeddings do not fit in memory: computed block by block, and written to a file.

Shapes: N images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer.data.images import Images
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.embedding.embed import Embedded, embed, embedding_bar
from sktransfer.embedding.output import (
    MAX_BLOCK_NUMBERS,
    NpyFile,
    ParquetFile,
    as_utf8,
    embedding_schema,
    embedding_table,
    import_arrow,
)
from sktransfer.embedding.recipe import Recipe, output_width
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError, check_number
from sktransfer.utils.files import complete_file


@dataclass(frozen=True)
class EmbeddingJob:
    """What the blocks of one job have in common, so that all have the same engine and batches.

    Parameters
    ----------
    recipe : Recipe
    compute : ComputeConfig
    n_images : int
        Images of the whole job.
    batch_size : int or None
        Images per forward pass; None depends on engine and device.
    pad_batches : bool
        See `embed`.
    """

    recipe: Recipe
    compute: ComputeConfig
    n_images: int
    batch_size: int | None
    pad_batches: bool = False

    @property
    def width(self) -> int:
        """D."""
        return output_width(self.recipe)

    def bar(self, n_images: int, verbose: int, *, n_done: int = 0) -> Any:
        """Open a progress bar for some of the images, `n_done` of which are embedded already."""
        return embedding_bar(self.recipe, n_images, verbose, n_done=n_done)

    def run(self, images: Images, on_error: str, bar: Any) -> Embedded:
        """Embed the images of a block.

        Raises
        ------
        ImageError
            If images are broken and `on_error` is `"raise"`.
        """
        return embed(
            Views(images, self.recipe.preprocessing),
            self.recipe,
            self.compute,
            n_images=self.n_images,
            batch_size=self.batch_size,
            on_error=on_error,
            bar=bar,
            pad_batches=self.pad_batches,
        )


def blocks(n_rows: int, block_size: int, start: int = 0) -> Iterator[range]:
    """Yield the rows of each block.

    Examples
    --------
    >>> list(blocks(5, 2))
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    for first in range(start, n_rows, block_size):
        yield range(first, min(first + block_size, n_rows))


def reasons_of(images: Images, errors: Sequence[ImageError]) -> list[str | None]:
    """Return why each image cannot be read; None of those that can."""
    reasons = {error.row: error.reason for error in errors}
    return [reasons.get(row) for row in images.origins.tolist()]


def save_embeddings(
    path: Path,
    images: Images,
    run: Callable[[Images], tuple[np.ndarray, Sequence[ImageError]]],
    *,
    width: int,
    block_size: int,
    with_errors: bool,
) -> Any:
    """Write the embeddings of images to a file, block by block; it appears when it is complete.

    Parameters
    ----------
    path : Path
        From `check_embedding_path`.
    images : Images of length N
    run : callable
        Computes the embeddings (n, D) of a block of images, in which those of broken images are
        NaN, and the errors of these.
    width : int
        D.
    block_size : int
        Images of a block at most.
    with_errors : bool
        Whether a `.parquet` file has the column `error`.

    Returns
    -------
    ndarray of shape (N, D), float32
        A read-only memory map, of a `.npy` file.
    Path
        `path`, of a `.parquet` file.
    """
    check_number("block_size", block_size, Integral, 1, MAX_BLOCK_NUMBERS // width)
    parts = (images.take(rows) for rows in blocks(len(images), block_size))
    with complete_file(path) as unfinished:
        if path.suffix.lower() == ".npy":
            with NpyFile(unfinished, width) as file:
                for part in parts:
                    file.append(run(part)[0])
        else:
            _save_parquet(unfinished, images, parts, run, with_errors)
    return np.load(path, mmap_mode="r") if path.suffix.lower() == ".npy" else path


def _save_parquet(
    path: Path,
    images: Images,
    parts: Iterator[Images],
    run: Callable[[Images], tuple[np.ndarray, Sequence[ImageError]]],
    with_errors: bool,
) -> None:
    has_paths = images.path(0) is not None
    keys = {"path": None} if has_paths else {"row": import_arrow().int64()}
    schema = embedding_schema(keys, with_errors=with_errors)
    n_rows = 0
    with ParquetFile(path, schema) as file:
        for part in parts:
            embeddings, errors = run(part)
            rows = range(n_rows, n_rows := n_rows + len(part))
            column = _paths(part) if has_paths else rows
            columns = dict.fromkeys(keys, column)
            file.append(embedding_table(schema, columns, embeddings, reasons_of(part, errors)))


def _paths(images: Images) -> list[str | None]:
    paths = (images.path(row) for row in range(len(images)))
    return [None if path is None else as_utf8(path) for path in paths]
