"""Base class of engines that compile a frozen prefix to a graph, verify it, and cache it.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.graph_cache import graph_folder, keep, new_folder
from sktransfer.engines.verification import min_cosine, noise
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import EngineError

# Minimum cosine between the outputs of a graph and of the network on a noise image. bfloat16 has
# two to three digits, which limits the network itself as well, especially on noise.
_MIN_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.99}


class PixelNetwork(nn.Module):
    """The network that is compiled: pixels, uint8 (N, H, W, 3), to embeddings (N, D).

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
    n_images : int
        Batch size of the graph, N.

    Attributes
    ----------
    shape : tuple of int
        (N, H, W, 3).
    """

    def __init__(self, prefix: FrozenPrefix, preprocessing: Preprocessing, n_images: int) -> None:
        super().__init__()
        self.prefix, self.preprocessing = prefix, preprocessing
        self.shape = (n_images, *preprocessing.crop, 3)
        freeze(self)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalize and embed pixels."""
        return self.prefix(self.preprocessing.normalize(pixels.permute(0, 3, 1, 2)))


class CompiledEngine(FrozenEngine):
    """An engine with a graph that is written once, and verified in every process that reads it.

    A subclass calls `_start` in its constructor, and implements `_write`, `_read` and `run`.
    """

    library: ClassVar[str]
    """Name of the library in messages."""

    def _start(self, network: PixelNetwork, precision: torch.dtype, *key: object) -> None:
        """Read the graph of a network; write it first if necessary.

        Parameters
        ----------
        network : PixelNetwork
        precision : torch.dtype
        *key : object
            Everything that the written graph depends on.

        Raises
        ------
        EngineError
            If the network cannot be written as an equivalent graph.
        """
        folder = graph_folder(self.name, *key)
        with contextlib.suppress(EngineError):
            self._read(folder)
            self._compare(network, precision)
            with contextlib.suppress(OSError):  # read-only, or removed by another process
                os.utime(folder)
            return
        with new_folder(folder.parent) as new:
            self._write(network, new)
            # Read it like every later process: a graph that is read from a file rounds differently.
            self._read(new)
            self._compare(network, precision)
            keep(new, folder)

    @abstractmethod
    def _write(self, network: PixelNetwork, folder: Path) -> None:
        """Write the graph of a network to a folder, or raise an EngineError."""

    @abstractmethod
    def _read(self, folder: Path) -> None:
        """Read and compile the graph in a folder for `run`, or raise an EngineError."""

    def _compare(self, network: PixelNetwork, precision: torch.dtype) -> None:
        """Raise an EngineError if the graph and the network differ."""
        image = noise(network.shape[1:3]).repeat(network.shape[0], 1, 1, 1)
        with torch.no_grad():
            expected = network(image.permute(0, 2, 3, 1))
        cosine = min_cosine(expected, torch.from_numpy(self.run(image)))
        if not cosine >= _MIN_COSINE[precision]:
            raise EngineError(
                f"{self.library} does not reproduce the network: the cosine of their embeddings is "
                f"{cosine:.4f}, but expected at least {_MIN_COSINE[precision]}; use engine='torch'"
            )
