"""A folder of compiled graphs that later processes reuse.

It is next to torch's downloads: `sktransfer` in `torch.hub.get_dir()`.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

# Limit on all graphs together; the least recently used graphs are removed.
_MAX_BYTES = 2 * 2**30


def graph_folder(*key: object) -> Path:
    """Return the folder of a graph, which may not exist yet.

    Parameters
    ----------
    *key : object
        Everything that the graph depends on; different values must have different `repr`.
    """
    name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
    return Path(torch.hub.get_dir()) / "sktransfer" / name


@contextlib.contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """Create a folder for a graph in `parent`, or in the temporary folder if that fails.

    It is removed on exit, unless `keep` has moved it.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        new = tempfile.mkdtemp(dir=parent, prefix="new-")
    except OSError:
        new = tempfile.mkdtemp(prefix="sktransfer-")
    try:
        yield Path(new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def keep(new: Path, folder: Path) -> None:
    """Move a graph to its folder, atomically; do nothing if the folder is not writable."""
    if new.parent != folder.parent:
        return
    with contextlib.suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)  # an old graph that could not be read
        new.rename(folder)
        _remove_oldest(folder.parent)


def _remove_oldest(parent: Path) -> None:
    """Remove the least recently used graphs until the others fit."""
    total = 0
    for folder in sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > _MAX_BYTES:
            shutil.rmtree(folder, ignore_errors=True)
