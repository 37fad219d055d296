"""The interface of all engines: pixels in, embeddings out.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch


class FrozenEngine(Protocol):
    """What an engine offers, whatever runs inside it."""

    name: str
    batch_invariant: bool
    """Whether no bit of an embedding can depend on the company in which the image came."""
    thread_safe: bool
    """Whether several threads may run it at once."""
    threads_per_core: int
    """How many threads for each core: more than one where they wait while others compute."""

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        ...


def pad(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Append black images to a batch (N, 3, H, W), uint8, until it has `size` images."""
    if len(batch) == size:
        return batch
    padded = batch.new_zeros(size, *batch.shape[1:]).contiguous(memory_format=torch.channels_last)
    padded[: len(batch)] = batch
    return padded
