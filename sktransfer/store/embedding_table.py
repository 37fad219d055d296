"""A table of embeddings: reads, writes, and claims on the missing ones.

A *table* stands for everything but the image that determines an embedding: weights,
preprocessing, layer, pooling, precision. An *image* is a key of a few bytes.

N images, D values in an embedding (`width`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sktransfer.store.database import FAILURES, Connection, Database

T = TypeVar("T")

LEASE_SECONDS = 60.0
ITEMS_PER_QUERY = 500
_BYTES_PER_READ = 2**23


class EmbeddingTable:
    """A table in a store, and an owner of claims on images.

    Built by `EmbeddingStore.table`. Every `EmbeddingTable` object is a separate owner of claims,
    even if it is a copy or refers to the same table. Use it through `embed_once`.

    Raises
    ------
    ValueError
        If `width` or `dtype` are impossible; or, on use, if the store has the same digest with
        another width or dtype.
    """

    def __init__(
        self,
        database: Database,
        max_bytes: int,
        digest: bytes,
        description: str,
        width: int,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.database = database
        self.max_bytes = max_bytes
        self.digest = digest
        self.description = description
        self.width = width
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.row_bytes = width * self.dtype.itemsize
        self._token = uuid.uuid4().bytes
        if width < 1 or self.dtype.kind != "f":
            raise ValueError(
                f"Got width={width!r} and dtype={str(self.dtype)!r}, but expected at least one "
                "value of a floating dtype."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the token: a copy is another owner.
        table = (self.digest, self.description, self.width, self.dtype)
        return EmbeddingTable, (self.database, self.max_bytes, *table)

    def read(self, keys: Sequence[bytes], out: np.ndarray) -> np.ndarray:
        """Fill the rows of `out` whose keys are stored; leave other rows unchanged.

        Parameters
        ----------
        keys : sequence of N bytes
            Keys may repeat.
        out : ndarray of shape (N, D)

        Returns
        -------
        is_stored : ndarray of shape (N,), bool
        """
        first, source = first_rows(keys)
        is_stored = np.zeros(len(keys), bool)
        # In the order of the file: shuffled rows would read each page many times.
        select_ids = "SELECT id FROM embeddings WHERE table_id = ? AND key IN"
        select_values = "SELECT key, value FROM embeddings WHERE table_id = ? AND id IN"
        ids = sorted(row_id for (row_id,) in self._look_up(select_ids, list(first)))
        for chunk in chunks(ids, max(1, _BYTES_PER_READ // self.row_bytes)):
            # The id may belong to another image by now.
            stored = [row for row in self._look_up(select_values, chunk) if row[0] in first]
            rows = [first[key] for key, _ in stored]
            values = np.frombuffer(b"".join(value for _, value in stored), self.dtype)
            out[rows] = values.reshape(len(rows), self.width)
            is_stored[rows] = True
        count = int(is_stored.sum())
        is_stored = is_stored[source]
        repeats = np.flatnonzero(is_stored & (source != np.arange(len(keys))))
        out[repeats] = out[source[repeats]]
        if count:
            with contextlib.suppress(*FAILURES):  # only the counter fails; the rows were read
                self.database.transact(lambda c: self._count(c, "read", count))
        return is_stored

    def as_rows(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Check that `rows` are `count` embeddings of this table, and convert them to its dtype."""
        rows = np.ascontiguousarray(rows, self.dtype)
        if rows.shape != (count, self.width):
            raise ValueError(
                f"Got embeddings of shape {rows.shape}, but expected {(count, self.width)}: "
                "one row for each image, one column for each value."
            )
        return rows

    def claim(self, keys: Iterable[bytes]) -> list[bytes]:
        """Claim and return the keys that are neither stored nor claimed by another live owner.

        A claim ends with `write`, with `release`, at the end of its process, or after a lease of a
        minute, which `claim`, `write` and `renew` renew.
        """
        select_free = functools.partial(self._select_free, list(dict.fromkeys(keys)))

        def claim(connection: Connection) -> list[bytes]:
            _drop_dead_owners(connection)
            claimed = select_free(connection)
            table_id = self._id(connection, create=True)
            claims = [(table_id, key, self._token) for key in claimed]
            connection.executemany("REPLACE INTO claims VALUES (?, ?, ?)", claims)
            lease = (self._token, this_host(), os.getpid(), time.time() + LEASE_SECONDS)
            connection.execute("REPLACE INTO owners VALUES (?, ?, ?, ?)", lease)
            return claimed

        # Waiting processes call this often, and a write transaction would block those that write.
        if not self.database.transact(select_free, write=False):
            return []
        return self.database.transact(claim)

    def _select_free(self, keys: list[bytes], connection: Connection) -> list[bytes]:
        other_owners = {token for token, alive in _owners(connection) if alive} - {self._token}
        select_stored = "SELECT key FROM embeddings WHERE table_id = ? AND key IN"
        select_claims = "SELECT key, owner FROM claims WHERE table_id = ? AND key IN"
        taken = {key for (key,) in self._select(select_stored, keys, connection)}
        claims = self._select(select_claims, keys, connection)
        taken |= {key for key, owner in claims if owner in other_owners}
        return [key for key in keys if key not in taken]

    def write(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        """Store `rows` of shape (N, D), drop their claims, and count the images as computed."""
        self._store(keys, rows, computed=len(keys))

    def absorb(self, keys: Sequence[bytes], rows: np.ndarray) -> int:
        """Store `rows` of shape (N, D) that another store has computed; return how many are new."""
        return self._store(keys, rows, computed=0)

    def check_shape(self) -> None:
        """Raise a ValueError if the store has this table with another width or dtype."""
        self.database.transact(self._id, write=False)

    def _store(self, keys: Sequence[bytes], rows: np.ndarray, computed: int) -> int:
        rows = self.as_rows(rows, len(keys))
        fits = self.row_bytes <= self.max_bytes

        def write(connection: Connection) -> tuple[int, bool]:
            table_id = self._id(connection, create=True)
            assert table_id is not None
            row_keys = [(table_id, key) for key in keys]
            connection.executemany("DELETE FROM claims WHERE table_id = ? AND key = ?", row_keys)
            self._renew(connection)
            self._count(connection, "computed", computed)
            if not fits:
                return 0, False
            values = [(*key, row.tobytes()) for key, row in zip(row_keys, rows, strict=True)]
            insert = "INSERT OR IGNORE INTO embeddings (table_id, key, value) VALUES (?, ?, ?)"
            new = connection.executemany(insert, values).rowcount
            self._count(connection, "images", new)
            return new, self._evict(connection, table_id)

        new, evicted = self.database.transact(write)
        if evicted:
            self.database.shrink(spare=self.max_bytes // 5)  # room for the next rows
        if not fits:
            self.database.warn_once(
                f"One embedding takes {self.row_bytes} bytes, but the embedding store "
                f"{self.database.path} is limited to {self.max_bytes} bytes, so none is stored; "
                "raise max_bytes."
            )
        return new

    def release(self, keys: Iterable[bytes] | None = None) -> None:
        """Drop claims of this object without storing anything; all claims if `keys` is None."""

        def release(connection: Connection) -> None:
            if keys is None:
                _drop_owner(connection, self._token)
            else:
                table_id = self._id(connection)
                connection.executemany(
                    "DELETE FROM claims WHERE table_id = ? AND key = ? AND owner = ?",
                    [(table_id, key, self._token) for key in keys],
                )

        self.database.transact(release)

    def renew(self) -> None:
        """Extend the lease of the claims of this object."""
        self.database.transact(self._renew)

    def _renew(self, connection: Connection) -> None:
        connection.execute(
            "UPDATE owners SET expires = ? WHERE token = ?",
            (time.time() + LEASE_SECONDS, self._token),
        )

    def _count(self, connection: Connection, counter: str, number: int) -> None:
        connection.execute(
            f"UPDATE tables SET {counter} = {counter} + ?, last_used = ? WHERE digest = ?",
            (number, time.time(), self.digest),
        )

    def _id(self, connection: Connection, *, create: bool = False) -> int | None:
        row = connection.execute(
            "SELECT id, width, dtype FROM tables WHERE digest = ?", (self.digest,)
        ).fetchone()
        if row is None:
            return self._create(connection) if create else None
        table, width, dtype = row
        if (width, dtype) != (self.width, self.dtype.str):
            raise ValueError(
                f"Got width={self.width} and dtype={self.dtype.str!r} for the table "
                f"{self.description!r}, but its digest is stored with width={width} and "
                f"dtype={dtype!r}; the digest must cover everything that determines an embedding."
            )
        return int(table)

    def _create(self, connection: Connection) -> int | None:
        return connection.execute(
            """INSERT INTO tables (digest, description, width, dtype, row_bytes, last_used)
                VALUES (?, ?, ?, ?, ?, ?)""",
            (
                self.digest,
                self.description,
                self.width,
                self.dtype.str,
                self.row_bytes,
                time.time(),
            ),
        ).lastrowid

    def _look_up(self, query: str, items: list[Any]) -> list[tuple[Any, ...]]:
        select = functools.partial(self._select, query, items)
        return self.database.transact(select, write=False)

    def _select(
        self, query: str, items: list[Any], connection: Connection
    ) -> list[tuple[Any, ...]]:
        table_id = self._id(connection)
        rows: list[tuple[Any, ...]] = []
        for chunk in chunks(items, ITEMS_PER_QUERY):
            marks = ", ".join("?" * len(chunk))
            rows += connection.execute(f"{query} ({marks})", (table_id, *chunk))
        return rows

    def _evict(self, connection: Connection, current: int) -> bool:
        """Evict the oldest rows if necessary: least recently used table first, `current` last."""
        tables = connection.execute(
            "SELECT id, images, row_bytes FROM tables ORDER BY id = ?, last_used, id", (current,)
        ).fetchall()
        excess = sum(images * row_bytes for _, images, row_bytes in tables) - self.max_bytes
        if excess <= 0:
            return False
        excess += self.max_bytes // 10
        for table_id, images, row_bytes in tables:
            count = min(images, max(0, -(-excess // row_bytes)))
            excess -= count * row_bytes
            connection.execute(
                """DELETE FROM embeddings WHERE id IN (
                    SELECT id FROM embeddings WHERE table_id = ? ORDER BY id LIMIT ?)""",
                (table_id, count),
            )
            connection.execute(
                "UPDATE tables SET images = images - ? WHERE id = ?", (count, table_id)
            )
        return True


def first_rows(keys: Sequence[bytes]) -> tuple[dict[bytes, int], np.ndarray]:
    """Return the first row of each key, and for each row the first row with the same key."""
    first: dict[bytes, int] = {}
    source = np.array([first.setdefault(key, row) for row, key in enumerate(keys)], np.intp)
    return first, source


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """Split a list into lists of `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _drop_owner(connection: Connection, token: bytes) -> None:
    connection.execute("DELETE FROM claims WHERE owner = ?", (token,))
    connection.execute("DELETE FROM owners WHERE token = ?", (token,))


def _owners(connection: Connection) -> list[tuple[bytes, bool]]:
    """List the owners, and whether each is alive."""
    local_host, now = this_host(), time.time()
    return [
        (token, expires > now and (host != local_host or is_running(pid)))
        for token, host, pid, expires in connection.execute("SELECT * FROM owners")
    ]


def _drop_dead_owners(connection: Connection) -> None:
    for token, alive in _owners(connection):
        if not alive:
            _drop_owner(connection, token)


@functools.cache
def this_host() -> str:
    """Return a name of this machine and container, outside of which a process id is unknown."""
    container = ""
    with contextlib.suppress(OSError):
        container = str(os.stat("/proc/self/ns/pid").st_ino)
    return re.sub(r"\W", "_", platform.node()) + container


def is_running(pid: int) -> bool:
    """Return whether a process of this machine is alive; True if that cannot be determined."""
    if os.name == "posix":  # on Windows, signal 0 would end the process
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
    return True
