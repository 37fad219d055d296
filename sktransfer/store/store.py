"""The per-image store: key -> embedding. Concurrent, crash-safe and bounded.

A *table* is everything except the image that determines an embedding: weights, preprocessing,
layer, pooling, precision. An *image* is a key of a few bytes. One SQLite file holds all tables.

Many processes may need the same image at once. Each *claims* what it will compute; the others
compute something else meanwhile and read that result when it is there. Whoever has claimed
computes before it waits, so no two can wait for each other.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sktransfer.store.database import FAILURES, Connection, Database
from sktransfer.store.embedding_table import LEASE_SECONDS, EmbeddingTable, chunks, first_rows

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
_FIRST_PAUSE, _LAST_PAUSE = 0.001, 0.05  # seconds between two looks at what others compute


class EmbeddingStore:
    """Embeddings of images in one file of a directory, shared by any number of processes.

    A store is a handle: making, pickling and copying it are cheap, and nothing is opened or
    created before it is used. Threads may share one, and so may a process and its forks.

    Parameters
    ----------
    directory : str or Path
        If ``embeddings.sqlite`` lies; made when first needed. Best on a local disk: SQLite
        cannot coordinate several machines that write to one network directory.
    max_bytes : int, default=32 GiB
        Limit on the stored values. Beyond it the oldest rows of the least recently used table
        go, until a tenth is free.
    temporary : bool, default=False
        The store need not survive a power cut (so it never waits for the disk), and its
        directory is made for this user's eyes only.

    Raises
    ------
    ValueError
        `max_bytes` is not positive; or, when used, the file has another version.
    NotADirectoryError
        `directory` is a file.

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
    ...     table = store.table(b"all that determines it", "an example", width=2)
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
        if max_bytes <= 0:
            raise ValueError(
                f"Got max_bytes={max_bytes!r}, but expected a positive number of bytes; "
                "to store nothing, pass cache=None."
            )
        self.directory = Path(directory).expanduser().resolve()
        self.max_bytes = max_bytes
        self.temporary = temporary
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(
                f"Got the file {str(self.directory)!r}, but expected a directory for embeddings; "
                "give another path, or move that file away."
            )
        self._database = Database(self.directory / "embeddings.sqlite", temporary)

    def table(
        self, digest: bytes, description: str, width: int, dtype: npt.DTypeLike = np.float32
    ) -> EmbeddingTable:
        """Name a table: embeddings of `width` values each, identified by `digest`."""
        return EmbeddingTable(self._database, self.max_bytes, digest, description, width, dtype)

    def clear(self) -> None:
        """Remove every embedding and counter; the file shrinks."""

        def clear(connection: Connection) -> None:
            for table in ("embeddings", "claims", "owners", "tables"):
                connection.execute(f"DELETE FROM {table}")

        if self._database.path.exists():
            self._database.transact(clear)
            self._database.shrink()

    def info(self) -> StoreInfo:
        """Return what is stored and how often it was read."""
        path = self._database.path
        query = """SELECT description, images, images * row_bytes, last_used, computed, read
            FROM tables ORDER BY last_used DESC"""
        rows = []
        if path.exists():
            rows = self._database.transact(lambda c: c.execute(query).fetchall(), write=False)
        files = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
        return StoreInfo(
            directory=self.directory,
            bytes=sum(file.stat().st_size for file in files if file.exists()),
            max_bytes=self.max_bytes,
            tables=tuple(TableInfo(*row[:4]) for row in rows),
            computed=sum(row[4] for row in rows),
            read=sum(row[5] for row in rows),
        )

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._database.close()

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.directory)!r}, max_bytes={self.max_bytes})"

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(EmbeddingStore, max_bytes=self.max_bytes, temporary=self.temporary)
        return make, (str(self.directory),)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingStore:
        return self  # scikit-learn's clone copies parameters; one handle serves them all


def embed_once(
    table: EmbeddingTable,
    keys: Sequence[bytes],
    compute: Compute,
    *,
    batch_size: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read the embeddings that are stored, compute the others, each of them once.

    Threads and processes that need the same images at the same time share the work. Should the
    store fail (full disk, no permission), everything missing is computed, with a warning.

    Parameters
    ----------
    table : EmbeddingTable
        What determines the embeddings, and where they are stored.
    keys : sequence of N bytes
        One for each image; images with the same key are computed once.
    compute : callable
        Takes an iterator over lists of rows and yields ``(rows, embeddings)`` batch by batch,
        `embeddings` of shape (len(rows), D). Rows are claimed when the iterator is asked for them,
        so `compute` may ask a little ahead of what it yields. Every batch is stored at once. Rows
        that it never yields are those that it cannot compute.
    batch_size : int
        Images in a batch, as a measure for how much to claim at once.
    out : ndarray of shape (N, D) or None
        If to put the embeddings; `None` makes an array that is filled with NaN.

    Returns
    -------
    embeddings : ndarray of shape (N, D)
        Unchanged in the rows that `compute` did not yield.

    Raises
    ------
    ValueError
        `compute` yields another shape, or the table is stored with another width or dtype.
    Exception
        Whatever `compute` raises. What it had yielded is stored, what it had not is released.
    """
    call = _Call(table, keys, compute, out)
    missing = call.read_all()
    if missing:
        # Few batches at a time, so that processes that start together share the work.
        size = batch_size * min(16, max(2, len(missing) // (4 * batch_size)))
        with call:
            call.work_through(list(chunks(missing, size)))
    call.repeat()
    return call.result


class _Call:
    """One call of `embed_once`; inside its ``with`` block it keeps its claims alive."""

    def __init__(
        self, table: EmbeddingTable, keys: Sequence[bytes], compute: Compute, out: np.ndarray | None
    ) -> None:
        self.table = copy.copy(table)  # an owner of its own
        self.keys = keys
        self.compute = compute
        self.first, self.source = first_rows(keys)
        blank = np.full((len(keys), table.width), np.nan, table.dtype) if out is None else out
        self.result: np.ndarray = blank
        self.store_failed = False
        self.finished = threading.Event()
        self.heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self.heart.start()

    def __exit__(self, *error: object) -> None:
        self.finished.set()
        self.heart.join()
        with contextlib.suppress(*FAILURES):
            self.table.release()

    def _beat(self) -> None:
        while not self.finished.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(*FAILURES):
                self.table.renew()

    def work_through(self, chunks: list[list[int]]) -> None:
        """Compute what can be claimed of each chunk; then come back for what others compute."""
        pause = _FIRST_PAUSE
        while chunks:
            claimed_rows = self.compute_and_write(chunks)
            left = [self.read([row for row in rows if row not in claimed_rows]) for rows in chunks]
            idle = not claimed_rows and left == chunks
            chunks = [rows for rows in left if rows]
            if idle:
                time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE) if idle else _FIRST_PAUSE

    def repeat(self) -> None:
        """Return the rows whose image came before the same embedding."""
        rows = np.flatnonzero(self.source != np.arange(len(self.keys)))
        self.result[rows] = self.result[self.source[rows]]

    def read_all(self) -> list[int]:
        """Read what is stored; return the other rows, one for each key."""
        found = self._try(np.zeros(len(self.keys), bool), self.table.read, self.keys, self.result)
        return [row for row in self.first.values() if not found[row]]

    def read(self, rows: list[int]) -> list[int]:
        """Read what is stored of `rows`; return the others."""
        block = np.empty((len(rows), self.table.width), self.table.dtype)
        keys = [self.keys[row] for row in rows]
        found = self._try(np.zeros(len(rows), bool), self.table.read, keys, block)
        self.result[np.array(rows, int)[found]] = block[found]
        return [row for row, there in zip(rows, found, strict=True) if not there]

    def claim(self, rows: list[int]) -> list[int]:
        """Claim what can be claimed of `rows`; without a store, all of them."""
        keys = [self.keys[row] for row in rows]
        return [self.first[key] for key in self._try(keys, self.table.claim, keys)]

    def compute_and_write(self, chunks: list[list[int]]) -> set[int]:
        """Compute what can be claimed, write each batch at once; return the rows it tried."""
        claimed_rows, undone = set[int](), set[int]()

        def claims() -> Iterator[list[int]]:
            for rows in chunks:
                if claimed := self.claim(rows):
                    claimed_rows.update(claimed)
                    undone.update(claimed)
                    yield claimed

        claimed = claims()
        first = list(itertools.islice(claimed, 1))
        for done, embeddings in self.compute(itertools.chain(first, claimed)) if first else ():
            embeddings = self.table.as_rows(embeddings, len(done))
            self.result[done] = embeddings
            self._try(None, self.table.write, [self.keys[row] for row in done], embeddings)
            undone.difference_update(done)
        if undone:
            self._try(None, self.table.release, [self.keys[row] for row in undone])
        return claimed_rows

    def _try(self, otherwise: T, operation: Callable[..., T], *args: Any) -> T:
        """Ask the store; after its first failure do without, as if every image were ours."""
        if self.store_failed:
            return otherwise
        try:
            return operation(*args)
        except FAILURES as error:
            self.store_failed = True
            self.table.database.warn_once(
                f"The embedding store {self.table.database.path} failed ({error}), so embeddings "
                "are computed without it. Free disk space, give cache= a directory that can be "
                "written, or switch the store off with cache=None."
            )
            return otherwise


@dataclass(frozen=True)
class TableInfo:
    """What a store holds of one table; `last_used` is in seconds since 1970."""

    description: str
    images: int
    bytes: int
    last_used: float


@dataclass(frozen=True, repr=False)
class StoreInfo:
    """What a store holds: `bytes` on disk, and counters of its whole life, over all processes.

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
            f"Embeddings in {self.directory}: {_readable(self.bytes)} on disk, limit "
            f"{_readable(self.max_bytes)}; computed {self.computed:,}, read {self.read:,}"
        ]
        if self.tables:
            lines.append(f"{'images':>9} {'size':>11} {'last used (UTC)':>17}  recipe")
        for table in self.tables:
            used = time.strftime("%Y-%m-%d %H:%M", time.gmtime(table.last_used))
            size = _readable(table.bytes)
            lines.append(f"{table.images:>9,} {size:>11} {used:>17}  {table.description}")
        return "\n".join(lines)


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
