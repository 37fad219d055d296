"""`sktransfer embed`: write the embeddings of images to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sktransfer.cli import options
from sktransfer.cli.inputs import load_images, make_extractor
from sktransfer.cli.messages import Notes, broken_images, listed
from sktransfer.cli.outputs import check_output, import_pyarrow, replacing, write_table

SUFFIXES = (".parquet", ".npy")


@click.command(
    options_metavar="-o FILE [OPTIONS]",
    epilog=options.example(
        "sktransfer embed photos -o photos.parquet",
        "sktransfer embed photos -o photos.npy --backbone resnet50",
    ),
)
@options.images_argument
@options.output_option("A .parquet or .npy file, which is replaced if it exists.", required=True)
@options.backbone_option
@options.image_size_option
@options.skip_broken_option
@options.cache_option
@options.notes_option
def embed(
    images: tuple[Path, ...],
    output: Path,
    backbone: str,
    image_size: Any,
    skip_broken: bool,
    cache: str,
    notes: Notes,
) -> None:
    """Write the embeddings of images to a file.

    PATHS are images and folders; folders are searched with all of their subfolders. A .parquet file
    has the column path and a column for each value of the embedding; a .npy file has an array with
    one row for each image, float32. Images are in the order of the arguments, and those of a folder
    are sorted by path.
    """
    import numpy as np

    check_output(output, SUFFIXES, images)
    is_table = output.suffix.lower() == ".parquet"
    if is_table:
        import_pyarrow()
    paths = np.array(load_images(images, notes), dtype=object)
    extractor = make_extractor(backbone, image_size, cache, notes, skip_broken=skip_broken)
    with notes.timed("Embedding", "Embedded", len(paths), f" with {backbone}"):
        embeddings = extractor.fit_transform(paths)
    readable = _readable(extractor.errors_, len(paths), notes)
    paths, embeddings = paths[readable], embeddings[readable]
    if is_table:
        columns = dict(zip(extractor.get_feature_names_out(), embeddings.T, strict=True))
        write_table({"path": paths, **columns}, output, notes)
    else:
        with replacing(output, notes) as path:
            np.save(path, embeddings)


def _readable(errors: list[Any], n_images: int, notes: Notes) -> Any:
    """Return a mask (N,) of the images that were read, and name the others."""
    import numpy as np

    from sktransfer.utils.errors import ImageError

    readable = np.ones(n_images, dtype=bool)
    if errors:
        error = ImageError.of(errors)
        for each in error.errors:
            readable[each.row] = False
        text, problems = broken_images(error)
        if not readable.any():
            raise ValueError(listed("no image can be read", problems))
        notes.list(f"{text}, left out", problems)
    return readable
