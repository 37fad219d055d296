"""Checkpoints: one file, replaced in one step, so that at every moment a whole one is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sktransfer.store.embedding_table import is_running


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values; until all of it is on the disk the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read what `save_checkpoint` wrote, tensors on the CPU; None where nothing was written.

    No code of the file is run.

    Raises
    ------
    ValueError
        If the file is something else.
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
            f"Got {str(path)!r}, which is no checkpoint of sktransfer's, or a damaged one; delete "
            "it to start anew"
        ) from error


def plain(value: Any) -> Any:
    """Turn numpy's numbers, which a checkpoint cannot hold, into Python's; in lists and dicts too.

    Examples
    --------
    >>> plain({"loss": np.float32(0.5), "sizes": [np.int64(3)]})
    {'loss': 0.5, 'sizes': [3]}
    """
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value
