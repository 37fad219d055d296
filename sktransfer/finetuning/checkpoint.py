"""Checkpoints: one file, replaced atomically, so that a complete one exists at any time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sktransfer.store.embedding_table import is_running
from sktransfer.utils.files import complete_file


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; replace the old file once everything is on the disk."""
    with complete_file(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Load a checkpoint with tensors on the CPU; return None if there is no file.

    Code in the file is never run.

    Raises
    ------
    ValueError
        If the file is not a checkpoint, or damaged.
    """
    for unfinished in path.parent.glob(f"{path.stem}.*.tmp"):
        if not is_running(int(unfinished.suffixes[-2][1:])):
            unfinished.unlink(missing_ok=True)
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"Got {str(path)!r}, which is damaged or not a checkpoint of sktransfer; delete it to "
            "start from the beginning"
        ) from error


def plain(value: Any) -> Any:
    """Convert numpy scalars, which a checkpoint cannot hold, to Python's; lists and dicts too.

    Examples
    --------
    >>> plain({"loss": np.float32(0.5), "sizes": [np.int64(3)]})
    {'loss': 0.5, 'sizes': [3]}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
