"""The base class of all engines: pixels in, embeddings out.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.engines.batch_size import auto_batch_size
from sktransfer.transforms.preprocessing import Preprocessing


class FrozenEngine(ABC):
    """Base class of engines: runs a frozen prefix, and declares what it supports.

    Register a new engine with `sktransfer.engines.choice.register_engine`. Its embeddings must
    equal those of the network within rounding, because the keys of the store do not include the
    engine.

    Parameters
    ----------
    prefix : FrozenPrefix
        Maps normalized images to embeddings. It is shared, and must not be changed.
    preprocessing : Preprocessing
        Its normalization runs inside the engine.
    device : torch.device
    precision : torch.dtype
    key : bytes
        Identifies the computation of the prefix and the preprocessing.
    from_library : bool
        Whether the network comes from a library. A user's module may not be thread-safe, and may
        have side effects.

    Raises
    ------
    EngineError
        If the engine cannot run this network; `engine="auto"` then uses torch.
    ImportError
        If the library of the engine is not installed.
    """

    name: ClassVar[str]
    """The value of `engine` that selects it."""
    supported: ClassVar[str] = ""
    """Completes the error message "but this engine only runs ..." if `supports` returns False."""
    batch_invariant: bool = False
    """True if embeddings are bitwise independent of the rest of the batch."""
    thread_safe: bool = False
    """True if several threads may run the engine at once."""
    on_device: bool = False
    """True if `forward` runs pixels that are on the engine's device already."""
    threads_per_core: int = 1
    """Threads per core; more than one helps if threads wait for others."""

    @abstractmethod
    def __init__(
        self,
        prefix: FrozenPrefix,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: torch.dtype,
        *,
        key: bytes = b"",
        from_library: bool = True,
    ) -> None:
        """Prepare the engine for a prefix."""

    @classmethod
    def supports(cls, device: torch.device, precision: torch.dtype) -> bool:
        """Return whether the engine computes on `device` in `precision`."""
        return True

    @classmethod
    def is_worth_starting(cls, n_images: int, *, from_library: bool, fork: bool) -> bool:
        """Return whether `engine="auto"` should use the engine; False by default.

        Parameters
        ----------
        n_images : int
            Images of the whole job.
        from_library : bool
            Whether the network comes from a library.
        fork : bool
            Whether this process is a fork of another one.
        """
        return False

    @classmethod
    def batch_size(cls, size: tuple[int, int], device: torch.device) -> int:
        """Return the number of images of `size` (height, width) that `run` should get at once."""
        return auto_batch_size(device, size)

    @abstractmethod
    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""

    def forward(self, pixels: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """Map pixels on the device to embeddings on it, without waiting, if `on_device` is True.

        Parameters
        ----------
        pixels : Tensor of shape (N, 3, H, W)
            uint8, 0-255.
        exact : bool
            Compute in float32, whatever the precision of the engine.

        Returns
        -------
        Tensor of shape (N, D)
            float32.
        """
        raise NotImplementedError


def pad(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Pad a batch (N, 3, H, W), uint8, with black images to `size` images."""
    if len(batch) == size:
        return batch
    padded = batch.new_zeros(size, *batch.shape[1:]).contiguous(memory_format=torch.channels_last)
    padded[: len(batch)] = batch
    return padded
