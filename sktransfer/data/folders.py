"""Folders of images -> paths and labels; nothing is decoded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

import numpy as np
from sklearn.utils import Bunch

from sktransfer.utils.errors import check_choice

IMAGE_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
SPLITS = ("train", "val", "test")
_SPLIT_OF_FOLDER = {**{name: name for name in SPLITS}, "valid": "val", "validation": "val"}


@dataclass
class _Scan:
    """What the folders hold.

    Parameters
    ----------
    images : list of (class name, path, split)
    ignored : list of (path, split)
        Files that are in no class folder, or no images by their extension.
    empty : list of (path, split)
        Class folders without images.
    """

    images: list[tuple[str, str, str | None]] = field(default_factory=list)
    ignored: list[tuple[str, str | None]] = field(default_factory=list)
    empty: list[tuple[str, str | None]] = field(default_factory=list)


@overload
def load_image_folder(
    root: str | os.PathLike[str],
    *,
    split: str | None = ...,
    extensions: Iterable[str] = ...,
    return_X_y: Literal[False] = ...,
) -> Bunch: ...
@overload
def load_image_folder(
    root: str | os.PathLike[str],
    *,
    split: str | None = ...,
    extensions: Iterable[str] = ...,
    return_X_y: Literal[True],
) -> tuple[np.ndarray, np.ndarray]: ...
def load_image_folder(
    root: str | os.PathLike[str],
    *,
    split: str | None = None,
    extensions: Iterable[str] = IMAGE_EXTENSIONS,
    return_X_y: bool = False,
) -> Bunch | tuple[np.ndarray, np.ndarray]:
    """List the images of a folder that has one folder for each class.

    Class folders lie directly in `root`, or in folders named train, val (or valid, validation)
    and test in it; images lie anywhere below a class folder. Hidden files and folders are
    passed over, links are followed, and nothing is opened or decoded.

    Parameters
    ----------
    root : path
        The folder.
    split : {"train", "val", "test"} or None
        The split to list, where there are such folders; None lists all of them.
    extensions : iterable of str
        What an image's name ends with, in lower or upper case.
    return_X_y : bool
        Return `(data, target)` only.

    Returns
    -------
    Bunch
        With N images, sorted by class, then by path:

        data, filenames : ndarray of shape (N,), object
            Paths, starting with `root` as given.
        target : ndarray of shape (N,), int64
            Index into `target_names`.
        target_names : list of str
            Names of the class folders that hold images, sorted; of all splits together, so
            that `target` means the same in each.
        split : ndarray of shape (N,), str, or None
            "train", "val" or "test", where there are such folders.
        ignored : list of str
            Files that are in no class folder, or no images by their extension.
        DESCR : str
            How many images of which class there are.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If `root` is no folder.
    ValueError
        If there are no class folders, no images, or not the split that was asked for.

    Warns
    -----
    UserWarning
        Of files that were ignored, of class folders without images, and of classes that have
        images in val or test but none in train.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("cats/tom.png", "dogs/rex.png", "dogs/puppies/ace.png"):
    ...         path = Path(root, name)
    ...         path.parent.mkdir(parents=True, exist_ok=True)
    ...         Image.new("RGB", (8, 8)).save(path)
    ...     bunch = load_image_folder(root)
    >>> [Path(path).name for path in bunch.data]
    ['tom.png', 'ace.png', 'rex.png']
    >>> bunch.target, bunch.target_names
    (array([0, 1, 1]), ['cats', 'dogs'])
    """
    top = Path(root)
    _check_root(top)
    endings = _check_extensions(extensions)
    splits = _split_folders(top, endings)
    _check_split(split, top, splits)
    scan = _scan(top, splits, endings)
    _check_found(scan, split, top, splits)
    _warn(scan, split)
    bunch = _bunch(top, scan, split)
    return (bunch.data, bunch.target) if return_X_y else bunch


# Looking around


def _check_root(root: Path) -> None:
    if not root.exists():
        raise FileNotFoundError(
            f"Got root={str(root)!r}, but there is no such folder. "
            f"Relative paths start at {os.getcwd()}."
        )
    if not root.is_dir():
        raise NotADirectoryError(
            f"Got root={str(root)!r}, a file, but expected a folder with one folder for each class."
        )


def _check_extensions(extensions: Iterable[str]) -> tuple[str, ...]:
    endings = () if isinstance(extensions, str) else tuple(extensions)
    if not endings or not all(isinstance(end, str) and end.startswith(".") for end in endings):
        raise ValueError(
            f"Got extensions={extensions!r}, but expected names such as ('.jpg', '.png')."
        )
    return tuple(end.lower() for end in endings)


def _visible(folder: Path) -> tuple[list[Path], list[str]]:
    """List the folders and the files of a folder, sorted, without hidden ones."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(Path(entry.path))
            else:  # A dangling link too, so that it is not dropped in silence.
                files.append(entry.path)
    return folders, files


def _files_below(folder: Path) -> Iterator[str]:
    """Walk a class folder through links, but into no folder twice and never back up."""
    home = folder.parent.resolve()
    seen = {home, *home.parents}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        real = here.resolve()
        if real not in seen:
            seen.add(real)
            folders, files = _visible(here)
            yield from files
            waiting += folders


def _split_folders(root: Path, endings: tuple[str, ...]) -> dict[Path, str]:
    """Tell folders that are splits from classes that happen to be called "train" or "test"."""
    folders, _ = _visible(root)
    splits = {
        folder: _SPLIT_OF_FOLDER[folder.name.lower()]
        for folder in folders
        if folder.name.lower() in _SPLIT_OF_FOLDER
    }
    others = [
        folder
        for folder in folders
        if splits
        and folder not in splits
        and any(file.lower().endswith(endings) for file in _files_below(folder))
    ]
    if not others:
        return splits
    if len(splits) == 1:
        return {}  # One class of several, such as trains beside cars.
    raise ValueError(
        f"Got splits {', '.join(repr(folder.name) for folder in splits)} in {str(root)!r} beside "
        f"other folders of images, {', '.join(repr(folder.name) for folder in others)}, but "
        "expected either splits or classes there. Move the ones or the others away."
    )


def _check_split(split: str | None, root: Path, splits: dict[Path, str]) -> None:
    if split is None:
        return
    check_choice("split", split, SPLITS)
    if not splits:
        raise ValueError(
            f"Got split={split!r}, but {str(root)!r} has no folders named train, val or test. "
            "Leave split=None."
        )
    check_choice("split", split, [name for name in SPLITS if name in splits.values()])


def _scan(root: Path, splits: dict[Path, str], endings: tuple[str, ...]) -> _Scan:
    scan = _Scan()
    if not splits:
        _scan_classes(scan, root, None, endings)
        return scan
    folders, files = _visible(root)
    for folder in folders:
        if folder in splits:
            _scan_classes(scan, folder, splits[folder], endings)
        else:
            scan.ignored += [(path, None) for path in sorted(_files_below(folder))]
    scan.ignored += [(path, None) for path in files]
    return scan


def _scan_classes(scan: _Scan, folder: Path, split: str | None, endings: tuple[str, ...]) -> None:
    classes, files = _visible(folder)
    scan.ignored += [(path, split) for path in files]
    for class_folder in classes:
        found = len(scan.images)
        for path in sorted(_files_below(class_folder)):
            if path.lower().endswith(endings):
                scan.images.append((class_folder.name, path, split))
            else:
                scan.ignored.append((path, split))
        if len(scan.images) == found:
            scan.empty.append((str(class_folder), split))


def _check_found(scan: _Scan, split: str | None, root: Path, splits: dict[Path, str]) -> None:
    if any(split in (None, of) for _, _, of in scan.images):
        return
    chosen = [str(folder) for folder, name in splits.items() if split in (None, name)]
    where = " and ".join(map(repr, chosen or [str(root)]))
    raise ValueError(
        f"Found no class folders with images in {where}. Expected one folder for each class "
        "there, and the images of the class in it."
    )


# Telling what was found


def _warn(scan: _Scan, split: str | None) -> None:
    ignored = [path for path, of in scan.ignored if split in (None, of)]
    if ignored:
        more = ", ..." if len(ignored) > 3 else ""
        _say(
            f"Ignored {len(ignored)} file(s) that are in no class folder, or no images by their "
            f"extension: {', '.join(ignored[:3])}{more}. All of them are in bunch.ignored."
        )
    for folder, of in scan.empty:
        if split in (None, of):
            _say(f"The class folder {folder!r} holds no images.")
    trained = {name for name, _, of in scan.images if of == "train"}
    unseen = {name for name, _, of in scan.images} - trained
    if trained and unseen:
        _say(
            f"Some classes have images in val or test but none in train: "
            f"{', '.join(repr(name) for name in sorted(unseen))}."
        )


def _say(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def _bunch(root: Path, scan: _Scan, split: str | None) -> Bunch:
    rows = sorted(row for row in scan.images if split in (None, row[2]))
    target_names = sorted({name for name, _, _ in scan.images})
    position = {name: index for index, name in enumerate(target_names)}
    data = np.array([path for _, path, _ in rows], dtype=object)
    target = np.array([position[name] for name, _, _ in rows], dtype=np.int64)
    counts = np.bincount(target, minlength=len(target_names))
    lines = [f"{name}: {count}" for name, count in zip(target_names, counts, strict=True)]
    return Bunch(
        data=data,
        filenames=data,
        target=target,
        target_names=target_names,
        split=None if rows[0][2] is None else np.array([of for _, _, of in rows]),
        ignored=[path for path, of in scan.ignored if split in (None, of)],
        DESCR=f"{len(data)} images below {root}\n\n" + "\n".join(lines),
    )
