"""Inputs of commands: folders and tables of labeled images, lists of images, models."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sktransfer.cli.messages import Notes, listed
from sktransfer.utils.tables import counted

if TYPE_CHECKING:
    import numpy as np
    from sklearn.utils import Bunch

    from sktransfer.data.image_lists import ImageList

_TAR_SUFFIXES = (".tar", ".tgz", ".gz")  # an error says that they must not be compressed
_PATH_COLUMN = "path"  # by default


def load_data(source: Path, columns: Mapping[str, Any], notes: Notes) -> Bunch:
    """Load the paths and labels of a folder of class folders, or of a table.

    Returns
    -------
    Bunch
        `data` are paths, `labels` strings, and `split` is None or "train", "val" or "test" for
        each image, all ndarrays of shape (N,).

    Raises
    ------
    FileNotFoundError
        If there is no such folder or table.
    ValueError
        If it has no labeled images.
    """
    from sktransfer.data import folders

    check_exists(source, "folder or table")
    if not source.is_dir():
        return folders.load_image_table(source, **columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Ignored .* file", UserWarning)
        bunch = folders.load_image_folder(source, labels="names")
    report_ignored(bunch.ignored, notes)
    return bunch


def take(data: Bunch, rows: np.ndarray) -> Bunch:
    """Return the images in some rows (a mask or numbers) as a Bunch of the same fields."""
    from sklearn.utils import Bunch

    split = None if data.split is None else data.split[rows]
    return Bunch(data=data.data[rows], labels=data.labels[rows], split=split)


def training_images(data: Bunch, notes: Notes) -> Bunch:
    """Return the images of the training folders; all images if there are no such folders."""
    if data.split is None or "train" not in data.split:
        return data
    train = take(data, data.split == "train")
    if len(train.data) < len(data.data):
        notes(f"Using the {counted(len(train.data), 'image')} for training.")
    return train


def load_images(paths: Sequence[Path], notes: Notes) -> list[str]:
    """List the images of files, URLs and folders; folders are searched with their subfolders.

    A file is an image whatever its name: one that cannot be read is an error later.

    Raises
    ------
    FileNotFoundError
        If files are missing.
    ValueError
        If there are no images.
    """
    from sktransfer.data.folders import list_images
    from sktransfer.data.remote import as_remote_file

    absent = [path for path in paths if not os.path.lexists(path)]
    urls = {path: file.url for path in absent if (file := as_remote_file(str(path)))}
    missing = [str(path) for path in absent if path not in urls]
    if missing:
        raise FileNotFoundError(listed(f"{counted(len(missing), 'path')} not found", missing))
    images, ignored = [], list[str]()
    for path in paths:
        if path.is_dir():
            in_folder, others = list_images(path)
            images += in_folder
            ignored += others
        else:
            images.append(urls.get(path, str(path)))
    report_ignored(ignored, notes)
    if not images:
        raise ValueError(f"no images in {listed_paths(paths)}")
    return list(dict.fromkeys(images))


def load_image_list(
    paths: Sequence[Path], path_column: str, columns: Mapping[str, str], notes: Notes
) -> ImageList:
    """List the images of files, URLs and folders, of tar files, or of one text file or table.

    Parameters
    ----------
    paths : sequence of Path
    path_column : str
        Name of the column of paths in a table.
    columns : dict of str to str
        Other columns of a table: name in the list, name in the table.
    notes : Notes

    Raises
    ------
    FileNotFoundError
        If files are missing.
    ValueError
        If there are no images, if the paths are of different kinds, or if there are names of
        columns, but no table.
    """
    from sktransfer.data import image_lists
    from sktransfer.data.tar_files import TarList

    kinds = {path: _kind_of(path) for path in paths}
    first, kind = next(iter(kinds.items()))
    if len(set(kinds.values())) > 1 or (kind == "table" and len(kinds) > 1):
        raise ValueError(
            f"Got {listed_paths(paths)}, but expected images, URLs and folders; or tar files; or "
            "one list or table, and nothing else"
        )
    suffix = first.suffix.lower()
    if kind != "table" or suffix in image_lists.LIST_SUFFIXES:
        _refuse_columns(path_column, columns, paths)
    if kind == "images":
        return image_lists.PathList([*load_images(paths, notes)])
    for path in paths:
        check_exists(path, "file")
    images: ImageList
    if kind == "tar files":
        notes(f"Searching {counted(len(kinds), 'tar file')} ...")
        images = TarList(list(kinds))
    elif suffix in image_lists.LIST_SUFFIXES:
        images = image_lists.read_path_list(first)
    elif suffix in image_lists.CSV_SUFFIXES:
        images = image_lists.read_csv_list(first, path_column, columns)
    else:
        images = image_lists.ParquetList(first, path_column, columns)
    if not len(images):
        raise ValueError(f"no images in {listed_paths(paths)}")
    return images


def _refuse_columns(path_column: str, columns: Mapping[str, str], paths: Sequence[Path]) -> None:
    """Raise a ValueError if there are names of columns."""
    named = {} if path_column == _PATH_COLUMN else {"path": path_column}
    for name, column in {**named, **columns}.items():
        raise ValueError(
            f"Got --{name}-column {column} with {listed_paths(paths)}, but expected a .csv, .tsv "
            "or .parquet table, which has columns; leave the option out"
        )


def listed_paths(paths: Sequence[Path]) -> str:
    """Return the first three paths."""
    return ", ".join(map(str, paths[:3]))


def _kind_of(path: Path) -> str:
    """Return what kind of images a path leads to."""
    from sktransfer.data import image_lists
    from sktransfer.data.folders import PARQUET_SUFFIXES
    from sktransfer.data.remote import as_remote_file

    suffix = path.suffix.lower()
    tables = (*image_lists.LIST_SUFFIXES, *image_lists.CSV_SUFFIXES, *PARQUET_SUFFIXES)
    kind = "tar files" if suffix in _TAR_SUFFIXES else "table" if suffix in tables else "images"
    if path.is_dir():
        return "images"
    if kind != "images" and (file := as_remote_file(str(path))):
        raise ValueError(f"Got {file}, but expected a file on this machine; download it")
    return kind


def report_ignored(files: Sequence[str], notes: Notes) -> None:
    """Report which files of a folder are not used."""
    if files:
        text = "outside class folders, or without the extension of an image"
        notes.list(f"Left out {counted(len(files), 'file')} {text}", files)


def check_exists(path: Path, what: str) -> None:
    """Raise a FileNotFoundError if a path does not exist."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {what} {str(path)!r}")


def load_groups(table: Path | None, images: Iterable[str], root: Path) -> list[str] | None:
    """Read the group of each image from a table with the columns path and group.

    Parameters
    ----------
    table : Path or None
        Paths in it are relative to its folder, to `root`, or to the current folder. None has no
        groups.
    images : iterable of str
        Paths of the images.
    root : Path
        Folder of the images, or their table.

    Raises
    ------
    ValueError
        If a column or the group of an image is missing.
    """
    if table is None:
        return None
    check_exists(table, "table of groups")
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"path", "group"} <= set(reader.fieldnames or ()):
            names = ", ".join(reader.fieldnames or ()) or "none"
            raise ValueError(f"{table} needs the columns path and group, but its columns: {names}")
        rows = [(row["path"], row["group"]) for row in reader]
    groups = {
        os.path.realpath(folder / path): group
        for folder in (Path(), root if root.is_dir() else root.parent, table.parent)
        for path, group in rows
        if path and group
    }
    images = list(images)
    group_of_each = [groups.get(os.path.realpath(path)) for path in images]
    missing = [path for path, group in zip(images, group_of_each, strict=True) if group is None]
    if missing:
        raise ValueError(
            listed(f"{table} has no group for {counted(len(missing), 'image')}", missing)
        )
    return [str(group) for group in group_of_each]


def load_model(path: Path, notes: Notes) -> Any:
    """Load a model that `sktransfer train` or `sktransfer.save` wrote."""
    import sktransfer

    check_exists(path, "model")
    if path.is_dir():
        raise IsADirectoryError(f"expected a model, but {str(path)!r} is a folder")
    return set_options(sktransfer.load(path), verbose=notes.verbose)


def load_classifier(path: Path, cache: str, notes: Notes) -> Any:
    """Load a classifier that shows its progress and keeps embeddings in `cache`."""
    model = load_model(path, notes)
    if not hasattr(model, "predict_proba"):
        raise ValueError(f"expected a classifier, but {str(path)!r} is a {type(model).__name__}")
    return set_options(model, cache=cache)


def set_options(model: Any, **options: Any) -> Any:
    """Set options of all estimators of this package in a model that have them."""
    from sktransfer.embedding.workers import SharedEstimator

    for part in (model, *model.get_params(deep=True).values()):
        if isinstance(part, SharedEstimator):
            parameters = part.get_params(deep=False)
            part.set_params(
                **{name: value for name, value in options.items() if name in parameters}
            )
    return model


def make_extractor(
    backbone: str, image_size: Any, cache: str | None, notes: Notes, *, skip_broken: bool = False
) -> Any:
    """Build the extractor with which a command embeds images."""
    from sktransfer import PretrainedFeatureExtractor

    return PretrainedFeatureExtractor(
        backbone,
        image_size=image_size,
        cache=cache,
        on_error="nan" if skip_broken else "raise",
        verbose=notes.verbose,
    )
