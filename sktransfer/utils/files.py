"""Files that are complete or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; its file replaces that at `path` at the end of the block.

    If the block fails, an older file stays as it is. Missing folders are created.

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
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
