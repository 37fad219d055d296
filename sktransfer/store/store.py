"""The store of embeddings by image: concurrent, crash-safe and limited in size.

A *table* holds the embeddings that share everything but the image: weights,
preprocessing, layer, pooling, precision. An *image* is a key of a few bytes. One SQLite file holds
all tables.

Several processes may need the same image at once. Each process *claims* images before it computes
them; other processes compute other images meanwhile and read the result once it is stored. A
process computes all images that it has claimed before it waits, so there is no deadlock.

N images, D values in an embedding (`width`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sktransfer.store.archive import absorb_archive, write_archive
from sktransfer.store.database import FAILURES, Connection, Database
from sktransfer.store.embedding_table import (
    ITEMS_PER_QUERY,
    LEASE_SECONDS,
    EmbeddingTable,
    chunks,
    first_rows,
)
from sktransfer.store.location import locate
from sktransfer.utils.errors import check_bool, check_directory, check_number, warn_user

__all__ = [
    "DEFAULT_MAX_BYTES",
    "EmbeddingStore",
    "EmbeddingTable",
    "StoreInfo",
    "TableInfo",
    "embed_once",
]

T = TypeVar("T")
Compute = Callable[[Iterator[list[int]]], Iterable[tuple[list[int], np.ndarray]]]

DEFAULT_MAX_BYTES = 32 * 2**30
# Files whose content a store remembers: one for so many bytes of its limit, and so many at least.
_BYTES_PER_FILE, _MIN_FILES = 2**12, 10_000
_MIN_PAUSE, _MAX_PAUSE = 0.001, 0.05  # seconds between checks for the results of others


class EmbeddingStore:
    """Embeddings of images in one file of a directory, shared by any number of processes.

    A store is a handle: it is cheap to build, pickle and copy, and opens or creates nothing before
    it is used. Threads may share a store, and so may a process and its forks.

    Parameters
    ----------
    directory : str or Path
        Directory of the file ``embeddings.sqlite``, created when needed. If it is on a network file
        system, where SQLite is not safe, a warning says so, and the file is in a directory of this
        machine instead.
    max_bytes : int, default=32 GiB
        Limit on the stored values. If it is exceeded, the oldest rows of the least recently used
        tables are deleted, until a tenth is free.
    temporary : bool, default=False
        The store need not survive a power cut, so it never waits for the disk, and only this user
        can read its directory. Files are identified by path, size and modification time instead
        of their content, so embeddings of files are not of use on other machines.

    Raises
    ------
    ValueError, TypeError
        If `directory` is not a path, or `max_bytes` is not positive and finite; or, on use, if the
        file has another version.
    NotADirectoryError
        If `directory` is a file.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from sktransfer.store.store import EmbeddingStore, embed_once
    >>> def compute(claims):
    ...     for rows in claims:
    ...         print("computing", rows)
    ...         yield rows, np.ones((len(rows), 2), np.float32)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     store = EmbeddingStore(directory)
    ...     table = store.table(b"digest of a recipe", "an example", width=2)
    ...     for keys in ([b"cat", b"dog", b"cat"], [b"dog", b"cow"]):
    ...         embed_once(table, keys, compute, batch_size=32).shape
    ...     store.close()
    computing [0, 1]
    (3, 2)
    computing [1]
    (2, 2)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        temporary: bool = False,
    ) -> None:
        check_directory("directory", directory, purpose=" for embeddings")
        remedy = "to store nothing, pass cache=None."
        check_number("max_bytes", max_bytes, Real, 1, remedy=remedy)
        check_bool("temporary", temporary)
        self.directory = Path(directory).expanduser().resolve()
        self.max_bytes = int(max_bytes)
        self.temporary = bool(temporary)

    @functools.cached_property
    def _database(self) -> Database:
        place = locate(self.directory, stay=self.temporary)
        return Database(
            place.directory / "embeddings.sqlite", self.temporary, wal=not place.on_network
        )

    @property
    def path(self) -> Path:
        """The file: in `directory`, or on a local disk if that is on a network file system."""
        return self._database.path

    def table(
        self, digest: bytes, description: str, width: int, dtype: npt.DTypeLike = np.float32
    ) -> EmbeddingTable:
        """Return the table that `digest` identifies, of embeddings of `width` values."""
        return EmbeddingTable(self._database, self.max_bytes, digest, description, width, dtype)

    def contents_of(
        self, files: Sequence[bytes], read: Callable[[list[bytes]], Mapping[bytes, bytes]]
    ) -> dict[bytes, bytes]:
        """Look up the digest of the content of files; read and remember those that are unknown.

        Parameters
        ----------
        files : sequence of bytes
            Digests of path, size and modification time.
        read : callable
            Takes the unknown files, and returns the digests of those that it can read.

        Returns
        -------
        dict
            The digest of the content of each file that is known or was read. If the store fails,
            all are read.
        """

        def select(connection: Connection) -> dict[bytes, bytes]:
            known = dict[bytes, bytes]()
            for chunk in chunks(list(files), ITEMS_PER_QUERY):
                marks = ", ".join("?" * len(chunk))
                query = f"SELECT file, content FROM files WHERE file IN ({marks})"
                known.update(connection.execute(query, chunk))
            return known

        if not files:
            return {}
        try:
            known, failed = self._database.transact(select, write=False), False
        except FAILURES:  # a warning follows when embeddings are read
            known, failed = {}, True
        unknown = [file for file in dict.fromkeys(files) if file not in known]
        new = read(unknown) if unknown else {}
        if new and not failed:
            self._remember(new)
        return {**known, **new}

    def _remember(self, contents: Mapping[bytes, bytes]) -> None:
        limit = max(_MIN_FILES, self.max_bytes // _BYTES_PER_FILE)

        def remember(connection: Connection) -> None:
            insert = "REPLACE INTO files (file, content) VALUES (?, ?)"
            connection.executemany(insert, contents.items())
            oldest = "DELETE FROM files WHERE id <= (SELECT MAX(id) FROM files) - ?"
            connection.execute(oldest, (limit,))

        with contextlib.suppress(*FAILURES):
            self._database.transact(remember)

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write all embeddings to one file, for the store of another machine.

        Other processes may use the store meanwhile. Memory does not grow with the store.

        Parameters
        ----------
        path : str or Path
            A file at this path is replaced, once the new one is complete.

        Returns
        -------
        int
            The number of embeddings in the file.

        Raises
        ------
        FileNotFoundError, IsADirectoryError
            If there is no store in the directory yet, or if `path` is a directory.
        ValueError
            If `path` is the file of the store.
        OSError, sqlite3.Error
            If the file cannot be written, or the store cannot be read.

        See Also
        --------
        EmbeddingStore.absorb : Add the embeddings to another store.

        Examples
        --------
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store, other = (EmbeddingStore(Path(folder.name, name)) for name in ("a", "b"))
        >>> table = store.table(b"digest of a recipe", "an example", width=2)
        >>> table.write([b"cat", b"dog"], np.ones((2, 2)))
        >>> store.export(Path(folder.name, "embeddings"))
        2
        >>> other.absorb(Path(folder.name, "embeddings"))
        2
        >>> other.absorb(Path(folder.name, "embeddings"))
        0
        >>> store.close()
        >>> other.close()
        >>> folder.cleanup()
        """
        if Path(path).expanduser().is_dir():
            raise IsADirectoryError(
                f"Got the directory {str(path)!r}, but expected a file for embeddings; add a name."
            )
        own_files = {
            f"{self._database.path}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")
        }
        if os.path.realpath(Path(path).expanduser()) in own_files:
            raise ValueError(
                f"Got {str(path)!r}, a file of the store itself, but expected another file for "
                "embeddings; choose another name or folder."
            )
        if not self._database.path.exists():
            raise FileNotFoundError(
                f"Got the directory {str(self.directory)!r}, but there are no embeddings in it; "
                "embed images with this store as cache first."
            )
        # Its own connection: other threads do not wait for the file.
        database = Database(self._database.path, self.temporary, self._database.wal)
        try:
            return write_archive(database, Path(path).expanduser())
        finally:
            database.close()

    def absorb(self, path: str | os.PathLike[str]) -> int:
        """Add the embeddings of a file of `export`, except for those that the store has.

        The whole file is checked before anything is added. Other processes may use the store
        meanwhile. As everywhere, `max_bytes` limits the store, and the least recently used
        embeddings are deleted. If an error of the disk ends it early, the embeddings added so far
        stay, and it may be repeated.

        Parameters
        ----------
        path : str or Path

        Returns
        -------
        int
            The number of embeddings that were new.

        Raises
        ------
        ValueError
            If the file is damaged or incomplete, has another version or is not such a file, or if
            its embeddings have other shapes than those in the store. Nothing is added then.
        OSError, sqlite3.Error
            If the file cannot be read, or the store cannot be written.

        Warns
        -----
        UserWarning
            If the file has more embeddings than the store may keep.
        """
        path = Path(path).expanduser()
        if path.is_file() and path.stat().st_size > self.max_bytes:
            size, limit = _binary_size(path.stat().st_size), _binary_size(self.max_bytes)
            warn_user(
                f"Got {str(path)!r} of {size}, but the embedding store {self._database.path} is "
                f"limited to {limit}, so it keeps only a part; raise max_bytes."
            )
        return absorb_archive(path, self.table)

    def clear(self) -> None:
        """Remove every embedding and counter; the file shrinks."""

        def clear(connection: Connection) -> None:
            for table in ("embeddings", "files", "claims", "owners", "tables"):
                connection.execute(f"DELETE FROM {table}")

        if self._database.path.exists():
            self._database.transact(clear)
            self._database.shrink()

    def info(self) -> StoreInfo:
        """Return the contents of the store, and how often they were read."""
        path = self._database.path
        query = """SELECT description, images, images * row_bytes, last_used, computed, read
            FROM tables ORDER BY last_used DESC"""
        rows = []
        if path.exists():
            rows = self._database.transact(lambda c: c.execute(query).fetchall(), write=False)
        files = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
        return StoreInfo(
            directory=path.parent,
            bytes=sum(file.stat().st_size for file in files if file.exists()),
            max_bytes=self.max_bytes,
            tables=tuple(TableInfo(*row[:4]) for row in rows),
            computed=sum(row[4] for row in rows),
            read=sum(row[5] for row in rows),
        )

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if "_database" in vars(self):
            self._database.close()

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.directory)!r}, max_bytes={self.max_bytes})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "max_bytes": self.max_bytes,
            "temporary": self.temporary,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingStore:
        return self  # scikit-learn's clone copies parameters; all clones can share a handle


def embed_once(
    table: EmbeddingTable,
    keys: Sequence[bytes],
    compute: Compute,
    *,
    batch_size: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read the stored embeddings, and compute each missing embedding once.

    Threads and processes that need the same images at the same time share the work. If the store
    fails (full disk, no permission), all missing embeddings are computed, with a warning.

    Parameters
    ----------
    table : EmbeddingTable
        The table in which the embeddings are stored.
    keys : sequence of N bytes
        The key of each image; images with the same key are computed once.
    compute : callable
        Takes an iterator over lists of rows and yields ``(rows, embeddings)`` batch by batch,
        `embeddings` of shape (len(rows), D). The iterator claims rows as it yields them, so
        `compute` may read a little ahead. Every batch is stored immediately. Rows that `compute`
        never yields count as images that cannot be computed.
    batch_size : int
        Images in a batch, which determines how many are claimed at once.
    out : ndarray of shape (N, D) or None
        Array for the embeddings; `None` creates one that is filled with NaN.

    Returns
    -------
    embeddings : ndarray of shape (N, D)
        Rows that `compute` did not yield are unchanged.

    Raises
    ------
    ValueError
        If `compute` yields another shape, or the table is stored with another width or dtype.
    Exception
        Whatever `compute` raises. Rows that it has yielded are stored; other claims are released.
    """
    call = _Call(table, keys, compute, out)
    missing = call.read_all()
    if missing:
        # Claim few batches at a time, so that processes that start together share the work.
        size = batch_size * min(16, max(2, len(missing) // (4 * batch_size)))
        with call:
            call.work_through(list(chunks(missing, size)))
    call.repeat()
    return call.result


class _Call:
    """One call of `embed_once`; it renews its claims inside its ``with`` block."""

    def __init__(
        self, table: EmbeddingTable, keys: Sequence[bytes], compute: Compute, out: np.ndarray | None
    ) -> None:
        self.table = copy.copy(table)  # the claims of this call have a separate owner
        self.keys = keys
        self.compute = compute
        self.first, self.source = first_rows(keys)
        if out is None:
            out = np.full((len(keys), table.width), np.nan, table.dtype)
        self.result: np.ndarray = out
        self.store_failed = False
        self.finished = threading.Event()
        self.renewal = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> None:
        self.renewal.start()

    def __exit__(self, *error: object) -> None:
        self.finished.set()
        self.renewal.join()
        with contextlib.suppress(*FAILURES):
            self.table.release()

    def _renew(self) -> None:
        while not self.finished.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(*FAILURES):
                self.table.renew()

    def work_through(self, chunks: list[list[int]]) -> None:
        """Compute the rows that can be claimed; read the other rows once they are stored."""
        pause = _MIN_PAUSE
        while chunks:
            claimed_rows = self.compute_and_write(chunks)
            missing = [
                self.read([row for row in rows if row not in claimed_rows]) for rows in chunks
            ]
            idle = not claimed_rows and missing == chunks
            chunks = [rows for rows in missing if rows]
            if idle:
                time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE) if idle else _MIN_PAUSE

    def repeat(self) -> None:
        """Copy embeddings to the rows that repeat an earlier key."""
        repeats = np.flatnonzero(self.source != np.arange(len(self.keys)))
        self.result[repeats] = self.result[self.source[repeats]]

    def read_all(self) -> list[int]:
        """Read all stored embeddings; return the first row of each missing key."""
        is_read = self._try(np.zeros(len(self.keys), bool), self.table.read, self.keys, self.result)
        return [row for row in self.first.values() if not is_read[row]]

    def read(self, rows: list[int]) -> list[int]:
        """Read those of `rows` that are stored; return the missing ones."""
        block = np.empty((len(rows), self.table.width), self.table.dtype)
        keys = [self.keys[row] for row in rows]
        is_read = self._try(np.zeros(len(rows), bool), self.table.read, keys, block)
        self.result[np.array(rows, int)[is_read]] = block[is_read]
        return [row for row, row_is_read in zip(rows, is_read, strict=True) if not row_is_read]

    def claim(self, rows: list[int]) -> list[int]:
        """Claim and return those of `rows` that are free; all of them after a store failure."""
        keys = [self.keys[row] for row in rows]
        return [self.first[key] for key in self._try(keys, self.table.claim, keys)]

    def compute_and_write(self, chunks: list[list[int]]) -> set[int]:
        """Compute the rows that can be claimed, and write each batch; return the claimed rows."""
        claimed_rows, unfinished = set[int](), set[int]()

        def claims() -> Iterator[list[int]]:
            for rows in chunks:
                if claimed := self.claim(rows):
                    claimed_rows.update(claimed)
                    unfinished.update(claimed)
                    yield claimed

        iterator = claims()
        first = list(itertools.islice(iterator, 1))
        for rows, embeddings in self.compute(itertools.chain(first, iterator)) if first else ():
            embeddings = self.table.as_rows(embeddings, len(rows))
            self.result[rows] = embeddings
            self._try(None, self.table.write, [self.keys[row] for row in rows], embeddings)
            unfinished.difference_update(rows)
        if unfinished:
            self._try(None, self.table.release, [self.keys[row] for row in unfinished])
        return claimed_rows

    def _try(self, otherwise: T, operation: Callable[..., T], *args: Any) -> T:
        """Call a method of the table; after its first failure, return `otherwise` instead."""
        if self.store_failed:
            return otherwise
        try:
            return operation(*args)
        except FAILURES as error:
            self.store_failed = True
            self.table.database.warn_once(
                f"The embedding store {self.table.database.path} failed ({error}), so embeddings "
                "are computed without it. Free disk space, pass a writable directory as cache, or "
                "switch the store off with cache=None."
            )
            return otherwise


@dataclass(frozen=True)
class TableInfo:
    """Contents of one table; `last_used` is in seconds since 1970."""

    description: str
    images: int
    bytes: int
    last_used: float


@dataclass(frozen=True, repr=False)
class StoreInfo:
    """Contents of a store: `bytes` on disk, and counters over its lifetime, of all processes.

    Examples
    --------
    >>> table = TableInfo("resnet18, avg", images=9, bytes=18_432, last_used=0.0)
    >>> StoreInfo(Path("cache"), 98_304, 2**30, (table,), computed=9, read=45)
    Embeddings in cache: 96 KiB on disk, limit 1 GiB; computed 9, read 45
       images        size   last used (UTC)  recipe
            9      18 KiB  1970-01-01 00:00  resnet18, avg
    """

    directory: Path
    bytes: int
    max_bytes: int
    tables: tuple[TableInfo, ...]
    computed: int
    read: int

    def __repr__(self) -> str:
        lines = [
            f"Embeddings in {self.directory}: {_binary_size(self.bytes)} on disk, limit "
            f"{_binary_size(self.max_bytes)}; computed {self.computed:,}, read {self.read:,}"
        ]
        if self.tables:
            lines.append(f"{'images':>9} {'size':>11} {'last used (UTC)':>17}  recipe")
        for table in self.tables:
            used = time.strftime("%Y-%m-%d %H:%M", time.gmtime(table.last_used))
            size = _binary_size(table.bytes)
            lines.append(f"{table.images:>9,} {size:>11} {used:>17}  {table.description}")
        return "\n".join(lines)


def _binary_size(size: float) -> str:
    """Format a number of bytes in the units in which limits are usually set: KiB, MiB, GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
