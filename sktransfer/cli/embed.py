"""`sktransfer embed`: write the embeddings of images to a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from sktransfer.cli import options
from sktransfer.cli.inputs import load_image_list, make_extractor
from sktransfer.cli.messages import MAX_LISTED, Notes, listed
from sktransfer.cli.outputs import check_output, import_pyarrow, replacing
from sktransfer.cli.parts import (
    EmbeddingParts,
    check_parts_folder,
    check_unfinished,
    has_parts,
    parts_folder,
)
from sktransfer.utils.tables import counted, format_bytes

if TYPE_CHECKING:
    import numpy as np

    from sktransfer.data.image_lists import ImageList, ListedImages

SUFFIXES = (".parquet", ".npy")

# Images from which the range of the pixels is learned.
_SAMPLE = 64
# Keys of which a digest is computed at once.
_KEYS = 65_536


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`."""

    index: int
    count: int

    def rows(self, n_rows: int) -> range:
        """Return the rows of this shard.

        Examples
        --------
        >>> [Shard(index, 3).rows(8) for index in range(3)]
        [range(0, 2), range(2, 5), range(5, 8)]
        """
        return range(n_rows * self.index // self.count, n_rows * (self.index + 1) // self.count)


class _ShardType(click.ParamType):
    """A shard such as 0/16."""

    name = "shard"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shard:
        if not isinstance(value, str):
            return value
        if match := re.fullmatch(r"(\d+)/(\d+)", value):
            shard = Shard(int(match[1]), int(match[2]))
            if shard.index < shard.count:
                return shard
        return self.fail(
            f"Got {value!r}, but expected I/N with 0 <= I < N, such as 0/16 for the first of 16",
            param,
            ctx,
        )


@click.command(
    options_metavar="-o FILE [OPTIONS]",
    epilog=options.example(
        "sktransfer embed photos -o photos.parquet",
        "sktransfer embed photos -o photos.npy --backbone resnet50",
        "sktransfer embed shards/*.tar -o parts/03.parquet --shard 3/16 --resume",
    ),
)
@options.images_argument
@options.output_option("A .parquet or .npy file.", required=True)
@click.option(
    "--shard",
    metavar="I/N",
    type=_ShardType(),
    default="0/1",
    help="Embed only part I of N of the images, 0 <= I < N.",
)
@click.option("--resume", is_flag=True, help="Go on if there are parts of FILE, else begin.")
@click.option("--overwrite", is_flag=True, help="Replace FILE, or parts of it.")
@click.option(
    "--path-column",
    metavar="NAME",
    default="path",
    help="Column of paths in a table.  [default: path]",
)
@click.option("--label-column", metavar="NAME", help="Column of labels in a table, to be kept.")
@click.option("--split-column", metavar="NAME", help="Column of splits in a table, to be kept.")
@options.backbone_option
@options.image_size_option
@click.option(
    "--skip-broken",
    is_flag=True,
    help="Leave out of a .npy file images that cannot be read, and name them, instead of failing.",
)
@options.cache_option
@options.notes_option
def embed(
    images: tuple[Path, ...],
    output: Path,
    shard: Shard,
    resume: bool,
    overwrite: bool,
    path_column: str,
    label_column: str | None,
    split_column: str | None,
    backbone: str,
    image_size: Any,
    skip_broken: bool,
    cache: str,
    notes: Notes,
) -> None:
    """Write the embeddings of images to a file.

    PATHS are images and folders, which are searched with all of their subfolders; or tar files,
    such as those of WebDataset; or a list: a .txt file with a path in each line, or a .csv or
    .parquet table. Images are in the order of the arguments, and those of a folder are sorted by
    path.

    A .parquet file has a row for each image, with the columns path, embedding, and error: why an
    image cannot be read. If none can, the file is written, but the exit status is 1. A .npy file
    has an array with one row for each image, float32.

    With --shard, each of several machines embeds a part of the images. A .parquet file is written
    in parts: after the command was killed, run it again with --resume to go on.
    """
    check_output(output, SUFFIXES, images)
    _check_options(output, resume, overwrite)
    column_of = {"label": label_column, "split": split_column}
    columns = {name: column for name, column in column_of.items() if column}
    source = load_image_list(images, path_column, columns, notes)
    # The results are kept, so there is no need for a temporary store.
    store = None if cache == "auto" else cache
    extractor = make_extractor(backbone, image_size, store, notes, skip_broken=True)
    # All shards learn from the same images.
    extractor.fit(_sample(source))
    work = _Work(source, columns, shard.rows(len(source)), extractor, notes)
    if output.suffix.lower() == ".parquet":
        _write_parquet(work, output, resume=resume, overwrite=overwrite)
    else:
        _write_npy(work, output, skip_broken)


def _sample(source: ImageList) -> list[Any]:
    """Return images of the whole list that are not missing; one missing image if all are."""
    from sktransfer.embedding.job import blocks

    if images := [item for item in source.sample(_SAMPLE) if item is not None]:
        return images
    # Most are missing: it takes the first ones that are there.
    for rows in blocks(len(source), _KEYS):
        items = source.read(rows.start, rows.stop).items
        images += [item for item in items if item is not None][: _SAMPLE - len(images)]
        if len(images) == _SAMPLE:
            break
    return images or [None]


def _check_options(output: Path, resume: bool, overwrite: bool) -> None:
    """Check what does not need the images, before they are listed."""
    if resume and overwrite:
        raise click.UsageError("Got --resume and --overwrite, but expected one of them.")
    if output.suffix.lower() == ".parquet":
        import_pyarrow()
        check_parts_folder(output)
    elif resume:
        raise click.UsageError(
            f"Got --resume with {str(output)!r}, but only .parquet files are written in parts."
        )
    check_unfinished(output, resume=resume, overwrite=overwrite)


class _Block(NamedTuple):
    """Images, and their embeddings.

    Parameters
    ----------
    images : ListedImages of length n
    embeddings : ndarray of shape (n, D)
        NaN for broken images.
    reasons : list of n (str or None)
        Why images cannot be read.
    """

    images: ListedImages
    embeddings: np.ndarray
    reasons: list[str | None]


@dataclass(frozen=True)
class _Work:
    """The images that this command embeds.

    Parameters
    ----------
    source : ImageList
        All images, also those of other shards.
    columns : dict of str to str
        Other columns that options name: name in the output, name in the table.
    rows : range
        Those of this shard.
    extractor : fitted PretrainedFeatureExtractor
    notes : Notes
    """

    source: ImageList
    columns: dict[str, str]
    rows: range
    extractor: Any
    notes: Notes

    @cached_property
    def job(self) -> Any:
        """The job of all shards."""
        from sktransfer.extractor import embedding_job

        return embedding_job(self.extractor, len(self.source))

    @property
    def blocks(self) -> list[range]:
        """Rows of each block, counted in all images."""
        from sktransfer.embedding.job import blocks
        from sktransfer.embedding.output import BLOCK_SIZE

        return list(blocks(self.rows.stop, BLOCK_SIZE, self.rows.start))

    def run(self, blocks: list[range], n_done: int = 0) -> Iterator[_Block]:
        """Embed blocks; `n_done` images were embedded earlier."""
        from sktransfer.data.validation import check_images
        from sktransfer.embedding.job import reasons_of

        job, n_images = self.job, len(self.rows)
        what = f" with {job.recipe.backbone.name}"
        with (
            self.notes.timed("Embedding", "Embedded", n_images - n_done, what),
            job.bar(n_images, self.notes.verbose, n_done=n_done) as bar,
        ):
            for rows in blocks:
                listed_images = self.source.read(rows.start, rows.stop)
                images = check_images(self.extractor, listed_images.items, reset=False)
                embeddings, errors, _ = job.run(images, "nan", bar)
                yield _Block(listed_images, embeddings, reasons_of(images, errors))

    def manifest(self) -> dict[str, Any]:
        """Return what determines the embeddings, by names for messages."""
        from sktransfer.embedding.output import BLOCK_SIZE

        recipe, extractor = self.job.recipe, self.extractor
        images, values = self._digests()
        return {
            "format": 2,
            "network": str(recipe),
            "recipe": recipe.digest.hex(),
            "pixel range": extractor.pixel_range_,
            "number of images": len(self.source),
            "rows": [self.rows.start, self.rows.stop],
            "list of images": images,
            "columns": {
                name: [self.columns.get(name), str(kind or "string")]
                for name, kind in self.source.columns.items()
            },
            "values of the columns": values,
            "block size": BLOCK_SIZE,
        }

    def _digests(self) -> tuple[str, str]:
        """Return digests of the images of the shard, and of the other columns."""
        import hashlib

        from sktransfer.embedding.job import blocks

        images, values = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        for rows in blocks(self.rows.stop, _KEYS, self.rows.start):
            listed_images = self.source.read(rows.start, rows.stop)
            for key, item in zip(listed_images.keys, listed_images.items, strict=True):
                images.update(repr((key, _located(item))).encode())
            values.update(repr(listed_images.columns).encode())
        return images.hexdigest(), values.hexdigest()


def _located(item: Any) -> Any:
    """Return an image with the absolute path of its file, wherever the command runs.

    Other folders and tar files have images of the same names.
    """
    from sktransfer.data.remote import as_remote_file
    from sktransfer.data.tar_files import TarMember

    if isinstance(item, TarMember):
        return replace(item, archive=os.path.abspath(item.archive))
    if not item or as_remote_file(item):
        return item
    return os.path.abspath(item)


def _write_parquet(work: _Work, output: Path, *, resume: bool, overwrite: bool) -> None:
    notes, blocks = work.notes, work.blocks
    keys = {"path": None, **work.source.columns}
    parts = EmbeddingParts(output, keys, blocks, work.manifest())
    existed = output.exists()
    with parts.locked():
        n_finished = parts.begin(resume=resume, overwrite=overwrite)
        if n_finished is None:
            notes(f"{output} is complete.")
            return
        try:
            _embed_parts(work, parts, blocks, n_finished)
            n_broken, problems = parts.join()
        except BaseException:
            if has_parts(output):
                notes(f"The finished parts are in {parts_folder(output)}; go on with --resume.")
            raise
    none_left = n_broken > 0 and n_broken == len(work.rows)
    if n_broken and not none_left:
        text = f"{counted(n_broken, 'image')} cannot be read, as the column error says"
        notes.list(text, problems)
    size = format_bytes(output.stat().st_size)
    notes(f"{'Replaced' if existed else 'Wrote'} {output} ({size})")
    if none_left:  # the rows of this shard are part of the table of all shards nevertheless
        raise ValueError(listed("no image can be read", problems))


def _embed_parts(work: _Work, parts: EmbeddingParts, blocks: list[range], n_finished: int) -> None:
    from sktransfer.embedding.output import as_utf8, embedding_table

    n_done = sum(map(len, blocks[:n_finished]))
    if n_done:
        work.notes(f"Going on after {counted(n_done, 'image')}.")
    if n_finished == len(blocks):
        return
    for block, (images, embeddings, reasons) in enumerate(
        work.run(blocks[n_finished:], n_done), n_finished
    ):
        paths = [None if key is None else as_utf8(key) for key in images.keys]
        columns = {"path": paths, **images.columns}
        parts.write(block, embedding_table(parts.schema, columns, embeddings, reasons))


def _write_npy(work: _Work, output: Path, skip_broken: bool) -> None:
    import numpy as np

    from sktransfer.embedding.output import NpyFile

    n_broken, problems = 0, list[str]()
    with replacing(output, work.notes) as path:
        with NpyFile(path, work.job.width) as file:
            for images, embeddings, reasons in work.run(work.blocks):
                broken = [row for row, reason in enumerate(reasons) if reason is not None]
                n_broken += len(broken)
                problems += [f"{images.keys[row]}: {reasons[row]}" for row in broken]
                text = f"{counted(n_broken, 'image')} cannot be read"
                if n_broken and not skip_broken:
                    raise ValueError(listed(f"{text} (see --skip-broken)", problems))
                del problems[MAX_LISTED + 1 :]
                file.append(np.delete(embeddings, broken, axis=0))
        if n_broken and n_broken == len(work.rows):
            raise ValueError(listed("no image can be read", problems))
    if n_broken:
        work.notes.list(f"{text}, left out", problems)
