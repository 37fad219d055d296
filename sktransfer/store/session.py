"""The session store: shared by a process and the processes that it starts, deleted at its exit.

A worker may be older than the session, or lack the environment of its parent, so it can find the
session in three ways: a store inherited in a fork, the environment variable
``SKTRANSFER_SESSION``, and a directory named after the process id of its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import uuid
from multiprocessing.util import Finalize
from pathlib import Path

from sktransfer.store.embedding_table import is_running, this_host
from sktransfer.store.location import temporary_root
from sktransfer.store.store import EmbeddingStore
from sktransfer.utils.config import SESSION
from sktransfer.utils.errors import check_directory

_MAX_BYTES = 4 * 2**30
_WEEK = 7 * 24 * 3600.0
_RUNNING_IS_KNOWN = os.name == "posix"

_session: EmbeddingStore | None = None
_stores: dict[Path, EmbeddingStore] = {}
_shared_files: set[Path] = set()
_lock = threading.Lock()


def resolve_store(cache: object) -> EmbeddingStore | None:
    """Resolve a `cache` parameter to a store.

    Parameters
    ----------
    cache : "auto", str, Path, EmbeddingStore or None
        `"auto"` is the session store. Any other string, or a path, is a store in that directory
        (one object per directory and process). `None` is no store.

    Raises
    ------
    TypeError, ValueError, NotADirectoryError
        If `cache` is none of these.

    Examples
    --------
    >>> resolve_store(None) is None
    True
    """
    if cache is None or isinstance(cache, EmbeddingStore):
        return cache
    if isinstance(cache, str) and cache == "auto":
        return session_store()
    if isinstance(cache, str) and cache.lower() == "auto":
        raise ValueError(f"Got cache={cache!r}, but expected 'auto' in lower case, or './{cache}'")
    check_directory("cache", cache, besides="'auto', a directory, an EmbeddingStore or None")
    store = EmbeddingStore(cache)  # type: ignore[arg-type]
    return _stores.setdefault(store.directory, store)


def session_store() -> EmbeddingStore:
    """Return the store of the session; create it at the first call."""
    global _session
    with _lock:
        if _session is None:
            directory = _from_environment() or _from_parent() or _create()
            SESSION.set(str(directory))
            _session = EmbeddingStore(directory, max_bytes=_limit(directory), temporary=True)
        return _session


def share_session() -> None:
    """Create the session if it does not exist, so that workers started later find it."""
    with contextlib.suppress(OSError):  # the store warns when used
        session_store().directory.mkdir(0o700, parents=True, exist_ok=True)


def share_with_workers(name: str, content: bytes, *, is_usual: bool) -> None:
    """Write a private file that the worker processes of this process read; it is removed at exit.

    Parameters
    ----------
    name : str
    content : bytes
    is_usual : bool
        Whether workers need no file, unless there is one to replace.
    """
    with contextlib.suppress(OSError):  # workers then go without
        path = _shared_file(name, os.getpid())
        if is_usual and not path.exists():
            return
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
        with _lock:
            if path not in _shared_files:
                _shared_files.add(path)
                Finalize(None, _remove_file, args=(path,), exitpriority=-1)


def read_from_parent(name: str) -> bytes | None:
    """Return what the parent of this worker process has shared, or None."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return None
    try:
        return _shared_file(name, parent.pid).read_bytes()
    except OSError:
        return None


def _shared_file(name: str, pid: int | None) -> Path:
    return temporary_root() / f"{name}-{this_host()}-{pid}"


def _from_environment() -> Path | None:
    directory = Path(SESSION.get())
    # A job on another machine that shares the file system may have inherited the variable.
    is_local = directory.name.startswith(f"{this_host()}-")
    return directory if is_local and directory.is_dir() else None


def _from_parent() -> Path | None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return None
    directories = temporary_root().glob(f"{this_host()}-{parent.pid}-*")
    return max(directories, key=_last_changed, default=None)


def _create() -> Path:
    base = temporary_root()
    _remove_stale(base)
    directory = base / f"{this_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(OSError):
        directory.mkdir(0o700, parents=True)
    # Unlike atexit, this also runs in a worker that multiprocessing forked, never in a fork of this
    # process, and only after the processes that this process waits for.
    Finalize(None, _remove, args=(directory,), exitpriority=-1)
    return directory


def _remove_stale(base: Path) -> None:
    """Remove the directories of sessions that were killed."""
    for directory in base.glob(f"{this_host()}-*-*"):
        pid = int(directory.name.split("-")[1])
        # This process has no session yet, so a session with its id belongs to an earlier process.
        dead = pid == os.getpid() or not is_running(pid)
        old = not _RUNNING_IS_KNOWN and _last_changed(directory) < time.time() - _WEEK
        if dead or old:
            shutil.rmtree(directory, ignore_errors=True)
    for path in base.glob(f"*-{this_host()}-*"):
        if not is_running(int(path.name.rpartition("-")[2])):
            path.unlink(missing_ok=True)


def _last_changed(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0


def _limit(directory: Path) -> int:
    try:
        return max(2**20, min(_MAX_BYTES, shutil.disk_usage(directory).free // 4))
    except OSError:
        return _MAX_BYTES


def _remove(directory: Path) -> None:
    if _session is not None:
        _session.close()
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # other sessions exist
        directory.parent.rmdir()


def _remove_file(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
        path.parent.rmdir()  # fails if there are sessions


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
