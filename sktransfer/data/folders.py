"""Paths and labels from folders and tables of images, without decoding them."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from sklearn.utils import Bunch

from sktransfer.data.items import is_missing
from sktransfer.data.remote import as_remote_file
from sktransfer.utils.errors import (
    check_bool,
    check_choice,
    did_you_mean,
    import_optional,
    warn_user,
)

IMAGE_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
SPLITS = ("train", "val", "test")
# Names of split folders in lower case, without separators: "Training", "train_set", "val2017".
_SPLIT_NAMES = {
    "train": "train|training",
    "val": "val|valid|validate|validation|validating|dev|devel|development",
    "test": "test|testing|tests|eval|evaluate|evaluation|evaluating|holdout|heldout",
}
_CONTENT = "sets?|data|datasets?|images?|imgs?|pictures?|photos?|splits?|samples?|folders?"
_SPLIT_PATTERNS = {
    split: re.compile(
        rf"(?:[0-9]{{1,2}}|{_CONTENT})?(?:{names})(?:{_CONTENT})?"
        r"(?:(?:19|20)[0-9]{2})?"
    )
    for split, names in _SPLIT_NAMES.items()
}
LABELS = ("numbers", "names")
# Folders that macOS, network storage and archive programs add to a data set.
_HIDDEN_FOLDERS = (
    *("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"),
    *("lost+found", "__pycache__"),
)
_SEPARATORS = r"[\s_.-]+"


@dataclass
class _Scan:
    """Contents of the folders.

    Parameters
    ----------
    images : list of (class name, path, split)
    ignored : list of (path, split)
        Files outside any class folder, or without an image extension.
    empty : list of (path, split)
        Class folders without images.
    subfolders : dict of class name to set of str
        Names of the folders with images directly below the folders of a class.
    spellings : dict of class name to set of str
        Names of the folders of a class, before Unicode normalization.
    """

    images: list[tuple[str, str, str | None]] = field(default_factory=list)
    ignored: list[tuple[str, str | None]] = field(default_factory=list)
    empty: list[tuple[str, str | None]] = field(default_factory=list)
    subfolders: dict[str, set[str]] = field(default_factory=dict)
    spellings: dict[str, set[str]] = field(default_factory=dict)


@overload
def load_image_folder(
    root: str | os.PathLike[str],
    *,
    split: str | None = ...,
    extensions: Iterable[str] = ...,
    labels: str = ...,
    return_X_y: Literal[False] = ...,
) -> Bunch: ...
@overload
def load_image_folder(
    root: str | os.PathLike[str],
    *,
    split: str | None = ...,
    extensions: Iterable[str] = ...,
    labels: str = ...,
    return_X_y: Literal[True],
) -> tuple[np.ndarray, np.ndarray]: ...
def load_image_folder(
    root: str | os.PathLike[str],
    *,
    split: str | None = None,
    extensions: Iterable[str] = IMAGE_EXTENSIONS,
    labels: str = "numbers",
    return_X_y: bool = False,
) -> Bunch | tuple[np.ndarray, np.ndarray]:
    """List the images of a folder that has one folder for each class.

    Class folders lie directly in `root`, or in folders for train, val and test in it; images may
    be anywhere below a class folder. Hidden files and folders are skipped, links are followed, and
    no file is opened.

    The folders of the splits may have any usual name, in lower or upper case: train, training,
    train_set; val, valid, validation, dev; test, testing, eval, evaluation, holdout.

    Parameters
    ----------
    root : path
        The folder; a leading `~` is the home folder.
    split : {"train", "val", "test"} or None
        The split to list, if there are such folders; None lists all of them.
    extensions : iterable of str
        Extensions of image files, in lower or upper case.
    labels : {"numbers", "names"}
        Whether `target` holds numbers, as in scikit-learn's `load_files`, or the names of the
        classes. With names, `classes_` and predictions of a classifier are names.
    return_X_y : bool
        Return `(data, target)` only.

    Returns
    -------
    Bunch
        With N images, sorted by class, then by path:

        data, filenames : ndarray of shape (N,), object
            Paths, starting with `root` as given.
        target : ndarray of shape (N,), int64 or str
            Index into `target_names`, or, with `labels="names"`, the name itself.
        labels : ndarray of shape (N,), str
            Name of the class of each image.
        target_names : list of str
            Sorted names of the class folders that hold images, from all splits together, so
            that `target` means the same in each split. Unicode is normalized (NFC).
        split : ndarray of shape (N,), str, or None
            "train", "val" or "test", if there are such folders.
        ignored : list of str
            Files outside any class folder, or without an image extension.
        DESCR : str
            Number of images of each class.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If `root` is not a folder.
    ValueError
        If there are no class folders or no images, if the requested split is missing, or if
        `labels` or `extensions` are invalid.

    Warns
    -----
    UserWarning
        If files are ignored, if class folders have no images, if classes have images in val or
        test but none in train, if all class folders have the same subfolders, which probably are
        the classes, or if names of class folders differ only by their Unicode normalization.

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
    >>> bunch.labels
    array(['cats', 'dogs', 'dogs'], dtype='<U4')
    """
    check_choice("labels", labels, LABELS)
    _check_types(root, return_X_y)
    top = Path(root) if os.path.exists(root) else Path(root).expanduser()
    _check_root(top)
    lowercase_extensions = _check_extensions(extensions)
    splits = _split_folders(top, lowercase_extensions)
    _check_split(split, top, splits)
    scan = _scan(top, splits, lowercase_extensions)
    _check_not_empty(scan, split, top, splits, lowercase_extensions)
    _warn_about(scan, split)
    _warn_about_names(scan, top)
    bunch = _bunch(top, scan, split)
    if labels == "names":
        bunch.target = bunch.labels
    return (bunch.data, bunch.target) if return_X_y else bunch


def list_images(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """List the images anywhere below a folder, whatever its subfolders are.

    Hidden files and folders are skipped, links are followed, and no file is opened.

    Parameters
    ----------
    folder : path

    Returns
    -------
    images : list of str
        Sorted paths with an image extension, starting with `folder` as given.
    ignored : list of str
        Sorted paths of the other files.

    Raises
    ------
    OSError
        If `folder` is not a folder that can be read.
    """
    files = sorted(_files_below(Path(folder)))
    images = [path for path in files if path.lower().endswith(IMAGE_EXTENSIONS)]
    return images, [path for path in files if not path.lower().endswith(IMAGE_EXTENSIONS)]


# Scanning


def _check_types(root: object, return_X_y: object) -> None:
    if not isinstance(root, str | os.PathLike) or not str(root):
        raise TypeError(
            f"Got root={root!r}, but expected the path of a folder; for the current one, pass '.'"
        )
    check_bool("return_X_y", return_X_y)


def _check_root(root: Path) -> None:
    if not root.exists():
        raise FileNotFoundError(
            f"Got root={str(root)!r}, but there is no such folder. "
            f"Relative paths are resolved from {os.getcwd()}."
        )
    if not root.is_dir():
        raise NotADirectoryError(
            f"Got root={str(root)!r}, a file, but expected a folder with one folder for each class."
        )


def _check_extensions(extensions: Iterable[str]) -> tuple[str, ...]:
    is_list = isinstance(extensions, Iterable) and not isinstance(extensions, str)
    names = tuple(extensions) if is_list else ()
    if not names or not all(isinstance(name, str) and name.startswith(".") for name in names):
        raise ValueError(
            f"Got extensions={extensions!r}, but expected extensions such as ('.jpg', '.png')."
        )
    return tuple(name.lower() for name in names)


def _visible(folder: Path) -> tuple[list[Path], list[str]]:
    """List the subfolders and files of a folder, sorted, without hidden ones."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                folders.append(Path(entry.path))
            else:  # Including dangling links, so that they are not dropped silently.
                files.append(entry.path)
    return folders, files


def is_hidden(path: str) -> bool:
    """Return whether a relative path leads to a hidden file, or to one that a system has added.

    Examples
    --------
    >>> is_hidden("./train/cat.jpg"), is_hidden("train/._cat.jpg"), is_hidden("__MACOSX/cat.jpg")
    (False, True, True)
    """
    return any(
        (part.startswith(".") and part not in (".", "..")) or part in _HIDDEN_FOLDERS
        for part in path.split("/")
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _files_below(folder: Path) -> Iterator[str]:
    """Yield all files below a folder; follow links, but visit no folder twice and no parent."""
    # The parent of "." and of "a/.." is known only from the absolute path.
    parent = Path(os.path.abspath(folder)).parent.resolve()
    visited = {parent, *parent.parents}
    pending = [folder]
    while pending:
        current = pending.pop()
        resolved = current.resolve()
        if resolved not in visited:
            visited.add(resolved)
            subfolders, files = _visible(current)
            yield from files
            pending += subfolders


def _split_folders(root: Path, extensions: tuple[str, ...]) -> dict[Path, str]:
    """Return the split of each split folder; none if "train" or "test" is one of the classes."""
    folders, _ = _visible(root)
    splits = {folder: split for folder in folders if (split := _split_of_name(folder.name))}
    splits = splits or _splits_with_common_words(folders)
    class_folders = [
        folder
        for folder in folders
        if splits
        and folder not in splits
        and any(file.lower().endswith(extensions) for file in _files_below(folder))
    ]
    if not class_folders:
        return {_unwrapped(folder): split for folder, split in splits.items()}
    if len(splits) == 1:
        return {}  # A class among others, such as "train" next to "car".
    raise ValueError(
        f"Got the splits {', '.join(repr(folder.name) for folder in splits)} in {str(root)!r} next "
        f"to other folders of images, {', '.join(repr(folder.name) for folder in class_folders)}, "
        "but expected either splits or classes. Move the splits or the other folders away."
    )


def _splits_with_common_words(folders: list[Path]) -> dict[Path, str]:
    """Return the splits of folders such as "seg_train" and "seg_test"; none if there is one."""
    words = {folder: re.split(_SEPARATORS, folder.name.lower().strip()) for folder in folders}
    for first in (0, 1):  # The common word comes last, or first.
        common: dict[str, dict[Path, str]] = {}
        for folder, parts in words.items():
            split = _split_of_name("".join(parts[first : len(parts) - 1 + first]))
            if len(parts) > 1 and split:
                common.setdefault(parts[first - 1], {})[folder] = split
        for splits in common.values():
            if len(set(splits.values())) > 1:
                return splits
    return {}


def _unwrapped(folder: Path) -> Path:
    """Return the only folder in a split folder if it has the same name, as in some archives."""
    folders, files = _visible(folder)
    if len(folders) == 1 and not files and folders[0].name == folder.name:
        return _unwrapped(folders[0])
    return folder


def _split_of_name(name: str) -> str | None:
    """Return the split that the name of a folder means, or None.

    Examples
    --------
    >>> [_split_of_name(name) for name in ("Training", "val2017", "test-set", "cats")]
    ['train', 'val', 'test', None]
    """
    letters = re.sub(r"[\s_.-]", "", name.lower())
    matches = (split for split, pattern in _SPLIT_PATTERNS.items() if pattern.fullmatch(letters))
    return next(matches, None)


def _check_split(split: str | None, root: Path, splits: dict[Path, str]) -> None:
    if split is None:
        return
    check_choice("split", split, SPLITS)
    if split in splits.values():
        return
    folders, _ = _visible(root)
    listed = ", ".join(repr(folder.name) for folder in folders[:10]) or "none"
    more = ", ..." if len(folders) > 10 else ""
    present = [repr(name) for name in SPLITS if name in splits.values()]
    where = f"{str(root)!r} has no folder for it; its folders are {listed}{more}"
    remedy = f"Pass one of {', '.join(present)}, or None." if present else "Pass split=None."
    raise ValueError(f"Got split={split!r}, but {where}. {remedy}")


def _scan(root: Path, splits: dict[Path, str], extensions: tuple[str, ...]) -> _Scan:
    scan = _Scan()
    if not splits:
        _scan_classes(scan, root, None, extensions)
        return scan
    for folder, split in splits.items():
        _scan_classes(scan, folder, split, extensions)
    folders, files = _visible(root)
    for folder in folders:
        if not any(folder == split or folder in split.parents for split in splits):
            scan.ignored += [(path, None) for path in sorted(_files_below(folder))]
    scan.ignored += [(path, None) for path in files]
    return scan


def _scan_classes(
    scan: _Scan, folder: Path, split: str | None, extensions: tuple[str, ...]
) -> None:
    classes, files = _visible(folder)
    scan.ignored += [(path, split) for path in files]
    for class_folder in classes:
        n_before = len(scan.images)
        # macOS decomposes accents in the names of files, other systems do not.
        name = unicodedata.normalize("NFC", class_folder.name)
        subfolders = scan.subfolders.setdefault(name, set())
        for path in sorted(_files_below(class_folder)):
            if path.lower().endswith(extensions):
                scan.images.append((name, path, split))
                subfolders.update(Path(path).relative_to(class_folder).parts[:-1][:1])
            else:
                scan.ignored.append((path, split))
        if len(scan.images) == n_before:
            scan.empty.append((str(class_folder), split))
        else:
            scan.spellings.setdefault(name, set()).add(class_folder.name)


def _check_not_empty(
    scan: _Scan,
    split: str | None,
    root: Path,
    splits: dict[Path, str],
    extensions: tuple[str, ...],
) -> None:
    if any(split in (None, image_split) for _, _, image_split in scan.images):
        return
    chosen = [str(folder) for folder, name in splits.items() if split in (None, name)]
    where = " and ".join(map(repr, chosen or [str(root)]))
    ignored = [path for path, file_split in scan.ignored if split in (None, file_split)]
    raise ValueError(
        f"Found no class folders with images in {where}. Expected one folder for each class, "
        f"with the images of that class in it.{_remedy(ignored, root, splits, extensions)}"
    )


def _remedy(
    ignored: list[str], root: Path, splits: dict[Path, str], extensions: tuple[str, ...]
) -> str:
    """Suggest how to load the files that were found, as the end of an error message."""
    images = [path for path in ignored if path.lower().endswith(extensions)]
    count = "1 image" if len(images) == 1 else f"{len(images):,} images"
    if images and not splits:
        parent = str(root / "..") if root.name in ("", "..") else str(root.parent)
        return (
            f" The folder has {count} itself. If it is the folder of a class, pass "
            f"its parent, {parent!r}."
        )
    if images:
        return f" Got {count} without a class folder; move them into such folders."
    counts = Counter(Path(path).suffix.lower() or "none" for path in ignored)
    if not counts:
        return ""
    present = ", ".join(f"{suffix} ({count:,})" for suffix, count in counts.most_common(10))
    return (
        f" The extensions of the files are {present}, but only {', '.join(extensions)} were "
        "searched for. If these files are images, pass their extensions as extensions=."
    )


# Reporting


def _warn_about(scan: _Scan, split: str | None) -> None:
    ignored = [path for path, file_split in scan.ignored if split in (None, file_split)]
    if ignored:
        more = ", ..." if len(ignored) > 3 else ""
        warn_user(
            f"Ignored {len(ignored)} file(s) outside any class folder or without an image "
            f"extension: {', '.join(ignored[:3])}{more}. bunch.ignored lists all of them."
        )
    for folder, folder_split in scan.empty:
        if split in (None, folder_split):
            warn_user(f"The class folder {folder!r} holds no images.")
    train_classes = {name for name, _, image_split in scan.images if image_split == "train"}
    untrained_classes = {name for name, _, _ in scan.images} - train_classes
    if train_classes and untrained_classes:
        warn_user(
            f"Some classes have images in val or test but none in train: "
            f"{', '.join(repr(name) for name in sorted(untrained_classes))}."
        )


def _warn_about_names(scan: _Scan, root: Path) -> None:
    """Warn of classes one level too high, and of names with different Unicode normalization."""
    names = sorted(scan.spellings)
    common = sorted(set.intersection(*(scan.subfolders[name] for name in names)))
    if len(common) > 1:
        listed = ", ".join(map(repr, common[:3])) + (", ..." if len(common) > 3 else "")
        classes = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        if all(map(_split_of_name, common)):
            remedy = "If these are splits, move them above the class folders."
        else:
            remedy = (
                "If these are the classes, pass the folder that holds them as root, or name the "
                "folders above them train, val and test."
            )
        warn_user(
            f"All class folders in {str(root)!r} ({classes}) have the same subfolders, {listed}. "
            f"{remedy}"
        )
    _warn_about_similar(names)
    for name in names:
        if len(scan.spellings[name]) > 1:
            warn_user(
                f"Got {len(scan.spellings[name])} class folders named {name!r} that differ only by "
                "their Unicode normalization (NFC and NFD); they are one class."
            )


def _warn_about_similar(names: list[str]) -> None:
    """Warn of classes that differ only by capitalization, spaces and separators."""
    similar: dict[str, list[str]] = {}
    for name in names:
        is_word = any(map(str.isalpha, name))  # Numbers such as 1.5 and 15 are not similar.
        letters = re.sub(r"[\s_-]", "", name.casefold()) if is_word else name.strip()
        similar.setdefault(letters, []).append(name)
    for group in similar.values():
        if len(group) > 1:
            warn_user(
                f"The classes {', '.join(map(repr, group))} differ only by capitalization, spaces "
                "or separators. If they are one class, give them the same name."
            )


def _bunch(root: Path, scan: _Scan, split: str | None) -> Bunch:
    rows = sorted(row for row in scan.images if split in (None, row[2]))
    names, paths, splits = (list(column) for column in zip(*rows, strict=True))
    return _labeled_paths(
        paths,
        names,
        None if splits[0] is None else splits,
        sorted({name for name, _, _ in scan.images}),
        f"{len(paths)} images below {root}",
        ignored=[path for path, file_split in scan.ignored if split in (None, file_split)],
    )


def _labeled_paths(
    paths: list[str],
    labels: list[str],
    splits: list[str] | None,
    target_names: list[str],
    title: str,
    **others: Any,
) -> Bunch:
    """Build the result of a function that loads paths and the names of their classes."""
    position = {name: index for index, name in enumerate(target_names)}
    data = np.array(paths, dtype=object)
    target = np.array([position[name] for name in labels], dtype=np.int64)
    counts = np.bincount(target, minlength=len(target_names))
    lines = [f"{name}: {count}" for name, count in zip(target_names, counts, strict=True)]
    return Bunch(
        data=data,
        filenames=data,
        target=target,
        labels=np.array(labels),
        target_names=target_names,
        split=None if splits is None else np.array(splits),
        **others,
        DESCR=f"{title}\n\n" + "\n".join(lines),
    )


# Tables

# Possible delimiters of a CSV file; its header shows which one it uses.
_DELIMITERS = (",", ";", "\t")
_CSV, PARQUET_SUFFIXES = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
# Column that is used as the split if there is one.
_SPLIT_COLUMN = "split"
_MAX_NAMED_ROWS = 10


def load_image_table(
    path: str | os.PathLike[str],
    *,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Bunch:
    r"""Load paths and labels of images from a table with a row for each image.

    No image is opened, but all files must exist; URLs are not checked.

    Parameters
    ----------
    path : path
        A CSV file in UTF-8 with a header, delimited by commas, semicolons or tabs, or a Parquet
        file, for which pyarrow must be installed (``pip install 'sktransfer[parquet]'``). A leading
        `~` is the home folder.
    path_column, label_column : str
        Names of the columns of image paths and of labels. Labels become strings.
    split_column : str or None
        Name of the column that says which split an image is in; None is "split" if there is such a
        column. The usual names, such as "training", "valid" and "dev", become "train", "val" and
        "test"; others stay as they are.
    root : path or None
        The folder that the paths are relative to; None is the folder of the table. Absolute paths
        and URLs stay as they are.

    Returns
    -------
    Bunch
        As from `load_image_folder`, with N images, in the order of the table:

        data, filenames : ndarray of shape (N,), object
            Paths, starting with `root`, and URLs.
        target : ndarray of shape (N,), int64
            Index into `target_names`.
        labels : ndarray of shape (N,), str
            Label of each image, without spaces around it; Unicode is normalized (NFC).
        target_names : list of str
            The labels that occur, sorted.
        split : ndarray of shape (N,), str, or None
            Split of each image, if there is such a column.
        DESCR : str
            Number of images of each class.

    Raises
    ------
    FileNotFoundError
        If the table or images are missing; names the first ten images and counts all.
    ValueError
        If the table is neither CSV nor Parquet, has no rows or not the columns, if cells are empty,
        or if a path occurs more than once; names the first ten rows.
    ImportError
        If pyarrow is needed and missing.

    Warns
    -----
    UserWarning
        If labels differ only by capitalization, spaces or separators.

    See Also
    --------
    load_image_folder : Load a folder that has one folder for each class.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("tom.png", "rex.png"):
    ...         Image.new("RGB", (8, 8)).save(Path(folder, name))
    ...     table = Path(folder, "pets.csv")
    ...     _ = table.write_text("path,label,split\ntom.png,cat,train\nrex.png,dog,test\n")
    ...     bunch = load_image_table(table)
    >>> bunch.labels, bunch.split
    (array(['cat', 'dog'], dtype='<U3'), array(['train', 'test'], dtype='<U5'))
    >>> [Path(path).name for path in bunch.data]
    ['tom.png', 'rex.png']
    """
    table = _check_table(path)
    columns = [path_column, label_column, *([split_column] if split_column is not None else [])]
    for name in columns:
        if not isinstance(name, str):
            raise TypeError(f"Got {name!r} as the name of a column, but expected a string")
    read = read_csv if table.suffix.lower() in _CSV else _read_parquet
    cells = read(table, columns)
    if not next(iter(cells.values())):
        raise ValueError(f"Got {str(table)!r}, which has no rows; expected one for each image")
    for name, values in cells.items():
        _check_filled(values, name, table)
    folder = table.parent if root is None else Path(root).expanduser()
    paths = [
        value if as_remote_file(value) else str(folder / value) for value in cells[path_column]
    ]
    labels = [unicodedata.normalize("NFC", label.strip()) for label in cells[label_column]]
    _check_files(paths, folder)
    _check_unique(paths, labels)
    names = sorted(set(labels))
    _warn_about_similar(names)
    splits = cells.get(split_column or _SPLIT_COLUMN)
    if splits is not None:
        splits = [_split_of_name(split) or split.strip() for split in splits]
    return _labeled_paths(paths, labels, splits, names, f"{len(paths)} images of {table}")


def _check_table(path: object) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise TypeError(f"Got path={path!r}, but expected the path of a CSV or Parquet file")
    table = Path(path) if os.path.exists(path) else Path(path).expanduser()
    if table.is_dir():
        raise ValueError(
            f"Got path={str(table)!r}, a folder, but expected a CSV or Parquet file; for a folder "
            "with one folder for each class, use load_image_folder"
        )
    if not table.exists():
        raise FileNotFoundError(
            f"Got path={str(table)!r}, but there is no such file. Relative paths are resolved from "
            f"{os.getcwd()}."
        )
    if table.suffix.lower() not in (*_CSV, *PARQUET_SUFFIXES):
        raise ValueError(
            f"Got path={str(table)!r}, but expected a file whose name ends in "
            f"{', '.join((*_CSV, *PARQUET_SUFFIXES))}; save the table as one of these"
        )
    return table


def read_csv(table: Path, columns: list[str]) -> dict[str, list[str]]:
    """Read columns of a CSV file, and the column of the split if there is one.

    Raises
    ------
    ValueError
        If it is not CSV in UTF-8, or has not the columns, or rows with more cells than columns.
    """
    try:
        # Excel writes a byte order mark.
        with table.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            rows = csv.reader(file, delimiter=_delimiter(header, columns))
            names = [name.strip() for name in next(rows, [])]
            wanted = check_columns(columns, names, table)
            records = [(rows.line_num, row) for row in rows if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"Got {str(table)!r}, which is not CSV in UTF-8 ({error}); save it as such"
        ) from error
    long = [line for line, row in records if len(row) > len(names)]
    if long:
        raise ValueError(
            f"Got {len(long):,} rows with more cells than the {len(names)} columns of "
            f"{str(table)!r}, the first in line {long[0]}; quote cells that contain the delimiter"
        )
    indices = {name: names.index(name) for name in wanted}
    return {
        name: [row[index] if index < len(row) else "" for _, row in records]
        for name, index in indices.items()
    }


def _delimiter(header: str, columns: list[str]) -> str:
    r"""Return the delimiter that finds the most of the columns in a header.

    Examples
    --------
    >>> _delimiter("file;label\n", ["file", "label"])
    ';'
    """

    def count(delimiter: str) -> int:
        names = {name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])}
        return len(names.intersection(columns))

    return max(_DELIMITERS, key=count)


def _read_parquet(table: Path, columns: list[str]) -> dict[str, list[str]]:
    """Read columns of a Parquet file, and the column of the split if there is one."""
    parquet = import_optional("pyarrow.parquet", extra="parquet", purpose="a Parquet file")
    try:
        names = parquet.read_schema(table).names
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise ValueError(f"Got {str(table)!r}, which is not a Parquet file: {error}") from error
    wanted = check_columns(columns, names, table)
    cells = parquet.read_table(table, columns=wanted).to_pydict()
    for value in cells[columns[0]]:
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"Got {type(value).__name__} in the column {columns[0]!r} of {str(table)!r}, but "
                "expected paths as strings"
            )
    return {
        name: ["" if is_missing(value) else str(value) for value in values]
        for name, values in cells.items()
    }


def check_columns(columns: list[str], names: list[str], table: Path) -> list[str]:
    """Return the columns to read; raise a ValueError if some are missing, or occur twice."""
    present = ", ".join(map(repr, names)) or "none"
    for column in columns:
        if column not in names:
            raise ValueError(
                f"Got the column {column!r}, but the columns of {str(table)!r} are {present}"
                f"{did_you_mean(column, names)}; pass path_column=, label_column= or split_column="
            )
    wanted = [*columns, *([_SPLIT_COLUMN] if _SPLIT_COLUMN in names else [])]
    wanted = list(dict.fromkeys(wanted if len(columns) < 3 else columns))
    for column in wanted:
        if names.count(column) > 1:
            raise ValueError(
                f"Got several columns {column!r} in {str(table)!r}; rename all but one"
            )
    return wanted


def _check_filled(values: list[str], column: str, table: Path) -> None:
    empty = [row for row, value in enumerate(values) if not value.strip()]
    if empty:
        listed = ", ".join(map(str, empty[:_MAX_NAMED_ROWS]))
        more = ", ..." if len(empty) > _MAX_NAMED_ROWS else ""
        raise ValueError(
            f"Got {len(empty):,} empty {'cell' if len(empty) == 1 else 'cells'} in the column "
            f"{column!r} of {str(table)!r}, in row {listed}{more} (the first row after the header "
            "is 0); fill them, or leave the rows out"
        )


def _check_files(paths: list[str], folder: Path) -> None:
    missing = [
        (row, path)
        for row, path in enumerate(paths)
        if not (as_remote_file(path) or os.path.isfile(path))
    ]
    if missing:
        lines = [f"row {row} ({path})" for row, path in missing]
        raise FileNotFoundError(
            f"Got {len(missing):,} of {len(paths):,} paths that do not exist"
            f"{_list_lines(lines)}\nRelative paths are resolved from {str(folder)!r}; pass another "
            "folder as root=, or leave the rows out."
        )


def _check_unique(paths: list[str], labels: list[str]) -> None:
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        file = as_remote_file(path)
        rows.setdefault(file.name if file else os.path.abspath(path), []).append(row)
    lines = [
        f"rows {', '.join(map(str, same))} ({paths[same[0]]}, labeled "
        f"{', '.join(repr(labels[row]) for row in same)})"
        for same in rows.values()
        if len(same) > 1
    ]
    if lines:
        raise ValueError(
            f"Got {len(lines):,} {'path' if len(lines) == 1 else 'paths'} more than once"
            f"{_list_lines(lines)}\nKeep one row, with one label, of each image."
        )


def _list_lines(lines: list[str]) -> str:
    first = f"; the first {_MAX_NAMED_ROWS}" if len(lines) > _MAX_NAMED_ROWS else ""
    return "\n".join([f"{first}:", *(f"- {line}" for line in lines[:_MAX_NAMED_ROWS])])
