"""Ordered lists of images that are read in parts: paths, text files, tables and tar files.

Shapes: N images.
"""

from __future__ import annotations

import bisect
import codecs
import io
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer.data.folders import check_columns, read_csv
from sktransfer.data.remote import as_remote_file
from sktransfer.utils.errors import import_optional

LIST_SUFFIXES, CSV_SUFFIXES = (".txt",), (".csv", ".tsv")


@dataclass(frozen=True)
class ListedImages:
    """Some consecutive images of a list.

    Parameters
    ----------
    keys : list of (str or None)
        What identifies each image: its path, URL or the name of a member. None is a missing value.
    items : list
        The images, as `X` takes them. None is a missing image.
    columns : dict of str to list
        Other columns, such as labels.
    """

    keys: list[str | None]
    items: list[Any]
    columns: dict[str, list[Any]]

    def part(self, start: int, stop: int) -> ListedImages:
        """Select the images from `start` to `stop`."""
        columns = {name: values[start:stop] for name, values in self.columns.items()}
        return ListedImages(self.keys[start:stop], self.items[start:stop], columns)


class ImageList(ABC):
    """N images in groups, such as the row groups of a table, of which one is in memory.

    Attributes
    ----------
    columns : dict of str to (pyarrow.DataType or None)
        Names and types of the other columns; None is a string.
    """

    columns: Mapping[str, Any] = {}
    _last: tuple[int, ListedImages] | None = None

    @property
    @abstractmethod
    def group_sizes(self) -> Sequence[int]:
        """Number of images in each group."""

    @abstractmethod
    def read_group(self, group: int) -> ListedImages:
        """Read a group."""

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> ListedImages:
        """Read the images of the rows from `start` to `stop`."""
        keys, items = list[str | None](), list[Any]()
        columns: dict[str, list[Any]] = {name: [] for name in self.columns}
        group = bisect.bisect_right(self._starts, start) - 1
        while len(keys) < stop - start:
            first = self._starts[group]
            part = self._group(group).part(max(start - first, 0), stop - first)
            keys += part.keys
            items += part.items
            for name, values in part.columns.items():
                columns[name] += values
            group += 1
        return ListedImages(keys, items, columns)

    def sample(self, count: int) -> list[Any]:
        """Return at most `count` of the images, evenly spaced."""
        rows = np.unique(np.linspace(0, len(self) - 1, count).round().astype(int)).tolist()
        return [self.read(row, row + 1).items[0] for row in rows]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.group_sizes)]

    def _group(self, group: int) -> ListedImages:
        if self._last is None or self._last[0] != group:
            self._last = None  # the memory of the old group is free before the new one is read
            self._last = (group, self.read_group(group))
        return self._last[1]


class PathList(ImageList):
    """Images at paths and URLs.

    Parameters
    ----------
    paths : list of (str or None)
    folder : Path or None
        The folder that relative paths are relative to; None is the current one.
    columns : dict of str to list
        Other columns.

    Examples
    --------
    >>> PathList(["a.png", "b.png", "c.png"], Path("photos")).read(1, 3).items
    ['photos/b.png', 'photos/c.png']
    """

    def __init__(
        self,
        paths: list[str | None],
        folder: Path | None = None,
        columns: Mapping[str, list[Any]] | None = None,
    ) -> None:
        self._values = dict(columns or {})
        self._paths, self._folder = paths, folder
        self.columns = dict.fromkeys(self._values)

    @property
    def group_sizes(self) -> Sequence[int]:
        """One group of all paths."""
        return [len(self._paths)]

    def read_group(self, group: int) -> ListedImages:
        """Resolve the paths."""
        return ListedImages(self._paths, _located(self._paths, self._folder), self._values)


class ParquetList(ImageList):
    """A column of paths and URLs of a Parquet table, read by row group.

    Parameters
    ----------
    table : Path
        Relative paths are relative to its folder.
    path_column : str
    columns : dict of str to str
        Other columns: name in this list, name in the table.

    Raises
    ------
    ValueError
        If the file is not Parquet, has not the columns, or if the paths are not strings.
    ImportError
        If pyarrow is missing.
    """

    def __init__(self, table: Path, path_column: str, columns: Mapping[str, str]) -> None:
        parquet = import_optional("pyarrow.parquet", extra="parquet", purpose="a Parquet file")
        try:
            self._file = parquet.ParquetFile(table)
        except ValueError as error:  # pyarrow's ArrowInvalid
            raise ValueError(f"Got {str(table)!r}, which is not a Parquet file: {error}") from error
        schema = self._file.schema_arrow
        check_columns([path_column, *columns.values()], schema.names, table)
        kind = schema.field(path_column).type
        if not _is_text(kind):
            raise ValueError(
                f"Got the column {path_column!r} of {str(table)!r} with values of type {kind}, but "
                "expected strings, which are paths or URLs; convert it, or name another column"
            )
        self._table, self._path_column, self._names = table, path_column, dict(columns)
        self.columns = {name: schema.field(column).type for name, column in columns.items()}

    @property
    def group_sizes(self) -> Sequence[int]:
        """Rows of the row groups."""
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def read_group(self, group: int) -> ListedImages:
        """Read a row group."""
        names = list(dict.fromkeys([self._path_column, *self._names.values()]))
        cells = self._file.read_row_group(group, columns=names).to_pydict()
        paths = cells[self._path_column]
        columns = {name: cells[column] for name, column in self._names.items()}
        return ListedImages(paths, _located(paths, self._table.parent), columns)


def _is_text(kind: Any) -> bool:
    """Return whether a type of pyarrow is that of strings or of missing values."""
    types = import_optional("pyarrow.types", extra="parquet", purpose="a Parquet file")
    if types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in {"string", "large_string", "string_view", "null"}


def read_path_list(file: Path) -> PathList:
    """Read a text file with a path or URL in each line, relative to its folder.

    Empty lines are left out.

    Raises
    ------
    ValueError
        If it is in UTF-16 or is not text.
    """
    content = file.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise ValueError(
            f"Got {str(file)!r}, which is in UTF-16 or is not text, but expected a path or URL in "
            "each line; save it as UTF-8"
        )
    # Names of files may be in another encoding.
    text = io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline=None).getvalue()
    return PathList([line for line in text.split("\n") if line.strip()], file.parent)


def read_csv_list(table: Path, path_column: str, columns: Mapping[str, str]) -> PathList:
    """Read a CSV table; the parameters are those of `ParquetList`."""
    cells = read_csv(table, list(dict.fromkeys([path_column, *columns.values()])))
    paths = [path if path.strip() else None for path in cells[path_column]]
    return PathList(paths, table.parent, {name: cells[column] for name, column in columns.items()})


def _located(paths: Sequence[str | None], folder: Path | None) -> list[str | None]:
    """Return paths from the current folder instead of from another one; URLs stay as they are."""
    if folder is None:
        return list(paths)
    return [
        path if not path or as_remote_file(path) else os.path.join(folder, path) for path in paths
    ]
