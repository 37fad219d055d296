"""Files that are complete or not there, and locks between processes."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def complete_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a path to write to; its file replaces that at `path` at the end of the block.

    If the block fails, an older file stays as it is. Missing folders are created. A `durable` file
    is on the disk before it replaces the older one, so that a power failure does not damage it.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with complete_file(Path(folder, "new", "a.txt")) as unfinished:
    ...         _ = unfinished.write_text("content")
    ...     Path(folder, "new", "a.txt").read_text()
    'content'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several machines may have the same number.
    unfinished = path.with_suffix(f".{uuid.uuid4().hex[:12]}.{os.getpid()}.tmp")
    try:
        yield unfinished
        if durable:
            with open(unfinished, "rb+") as file:
                os.fsync(file)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which the system releases if this process dies.

    On Windows, and on a file system without locks, any number of processes may hold it.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    """
    with open(path, "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # some cluster file systems have no locks
                pass
        yield
