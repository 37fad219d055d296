"""One SQLite file of embeddings: opened when needed, shared by threads, never across a fork.

In addition to what `sqlite3` does, a transaction is repeated in a new file if the old one is
corrupt or gone, and connections are closed before a fork, which SQLite's locks do not survive.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Connection = sqlite3.Connection
FAILURES = (sqlite3.Error, OSError)  # errors of a disk or a file, not bugs of this package

_VERSION = 3  # of the tables; a file with another version is refused
_SCHEMA = (
    """CREATE TABLE tables (
        id INTEGER PRIMARY KEY, digest BLOB UNIQUE, description TEXT, width INTEGER, dtype TEXT,
        row_bytes INTEGER, last_used REAL DEFAULT 0, images INTEGER DEFAULT 0,
        computed INTEGER DEFAULT 0, read INTEGER DEFAULT 0)""",
    """CREATE TABLE embeddings (
        id INTEGER PRIMARY KEY, table_id INTEGER, key BLOB, value BLOB, UNIQUE (table_id, key))""",
    "CREATE INDEX oldest_first ON embeddings (table_id)",  # every index ends in the id
    # The content of a file that has a path, size and modification time; both are digests.
    """CREATE TABLE files (id INTEGER PRIMARY KEY, file BLOB UNIQUE, content BLOB)""",
    """CREATE TABLE owners (
        token BLOB PRIMARY KEY, host TEXT, pid INTEGER, expires REAL) WITHOUT ROWID""",
    """CREATE TABLE claims (
        table_id INTEGER, key BLOB, owner BLOB, PRIMARY KEY (table_id, key)) WITHOUT ROWID""",
)
_PAGE_BYTES = 2**15  # two rows of 2,048 float32 do not quite fit a page of 2**14
_BUSY_SECONDS = 60.0
_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Database:
    """A file of embeddings that many threads and processes read and write.

    Parameters
    ----------
    path : Path
        The file; the first transaction creates it and its directory.
    temporary : bool
        Never wait for the disk, and let only this user read the directory.
    wal : bool
        Use a write-ahead log, with which readers and a writer do not wait for each other. It needs
        memory that processes share through the file system.
    """

    def __init__(self, path: Path, temporary: bool, wal: bool = True) -> None:
        self.path = path
        self.temporary = temporary
        self.wal = wal
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._identity: tuple[int, int] | None = None  # of the open file
        self._warned: set[str] = set()
        _databases[id(self)] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Database, (self.path, self.temporary, self.wal)

    def transact(self, operation: Callable[[Connection], T], *, write: bool = True) -> T:
        """Run `operation` in one transaction; repeat it in a new file if this one is corrupt.

        Raises
        ------
        ValueError
            If the file has another version, or tables of another program.
        sqlite3.Error, OSError
            If the file cannot be opened, read or written, or is locked for a minute.
        """
        with self._lock:
            try:
                return self._attempt(operation, write)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _CORRUPT:
                    raise
                self._move_aside(error)
                return self._attempt(operation, write)

    def shrink(self, spare: int = 0) -> None:
        """Return free pages to the file system, except for `spare` bytes."""
        with self._lock:
            connection = self._open()
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            surplus = free - spare // _PAGE_BYTES
            if surplus > 0:
                # As a script, because `execute` stops after the first page.
                connection.executescript(f"PRAGMA incremental_vacuum({surplus})")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def warn_once(self, message: str) -> None:
        """Warn, but only once with the same message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def close(self) -> None:
        """Close the file; the next transaction opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        self.close()

    def _attempt(self, operation: Callable[[Connection], T], write: bool) -> T:
        with self._open() as connection:  # commits, or rolls back
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            return operation(connection)

    def _open(self) -> Connection:
        if self._connection is not None and self._identity != _identity(self.path):
            self.close()  # the file was deleted, or another process moved it aside
        if self._connection is None:
            mode = 0o700 if self.temporary else 0o777
            self.path.parent.mkdir(mode, parents=True, exist_ok=True)
            self._identity = _identity(self.path)  # needed even if the file turns out to be corrupt
            self._connection = self._connect()
            self._identity = _identity(self.path)
        return self._connection

    def _connect(self) -> Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: Connection) -> None:
        for pragma in (
            f"page_size = {_PAGE_BYTES}",
            "auto_vacuum = INCREMENTAL",
            "cache_size = -65536",  # KiB
            "journal_size_limit = 67108864",
            f"synchronous = {'OFF' if self.temporary else 'NORMAL'}",
        ):
            connection.execute(f"PRAGMA {pragma}")
        with connection:
            connection.execute("BEGIN")
            new = self._is_new(connection)
        if not self.wal:
            _leave_wal(connection)
        if new:
            if self.wal:
                _prefer_wal(connection)
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                if self._is_new(connection):  # else another process has created the tables
                    for statement in _SCHEMA:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _is_new(self, connection: Connection) -> bool:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if version != _VERSION and (version or tables):
            raise ValueError(
                f"Got version {version} of the embedding store {self.path}, but expected version "
                f"{_VERSION}; delete that file, or pass another directory as cache."
            )
        return not tables

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        self.close()
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
        if _identity(self.path) == self._identity:  # else another process has moved it
            # The file comes last: once it is gone, other processes create a new one.
            for suffix in ("-wal", "-shm", ""):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        warnings.warn(
            f"The embedding store {self.path} is corrupt ({error}). It was moved to {aside}, "
            "which may be deleted; a new file takes its place.",
            stacklevel=2,
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _prefer_wal(connection: Connection) -> None:
    """Switch to the write-ahead log, which a few network file systems do not support."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
        except sqlite3.OperationalError as error:
            # If two processes switch at once, SQLite raises this error without waiting.
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
        return


def _leave_wal(connection: Connection) -> None:
    """Switch to the rollback journal, unless another process has the file open."""
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()


# If a connection is open during a fork, SQLite assumes that the child holds the locks of its
# parent, even in connections that the child opens later. So all connections are closed, and all
# transactions finished, before a process forks.
_databases: weakref.WeakValueDictionary[int, Database] = weakref.WeakValueDictionary()
_held: list[Database] = []
_forking = threading.Lock()


def _before_fork() -> None:
    _forking.acquire()
    for reference in _databases.valuerefs():
        database = reference()
        if database is not None:
            database._lock.acquire()
            _held.append(database)
            database.close()


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    while _held:
        _held.pop()._lock = threading.RLock()
    _forking = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
