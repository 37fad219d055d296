"""Engines that run a frozen prefix: pixels in, embeddings out.

Shapes: N pictures, H x W pixels, D features.
"""

from __future__ import annotations

import copy
from typing import Protocol

import numpy as np
import torch

from sktransfer._config import autocast, keep_pages
from sktransfer._errors import check_choice
from sktransfer.split import FrozenPrefix
from sktransfer.transforms import Preprocessing

ENGINES = ("torch",)

# Pictures of 224 x 224 in a batch. On a CPU a small batch keeps the feature maps in its caches; an
# accelerator wants many at once, and halves the batch where its memory ends.
_CPU_BATCH = 4
_ACCELERATOR_BATCH = 256


class FrozenEngine(Protocol):
    """What an engine offers, whatever runs inside it."""

    name: str

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        ...


def create_engine(
    prefix: FrozenPrefix,
    preprocessing: Preprocessing,
    *,
    engine: str = "auto",
    device: torch.device,
    precision: torch.dtype,
) -> FrozenEngine:
    """Choose the engine that runs a frozen prefix; the one place where this is decided.

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
        Its normalisation runs inside the engine.
    engine : {"auto", "torch"}
        `"auto"` takes the fastest one that is installed.
    device : torch.device
    precision : torch.dtype

    Raises
    ------
    ValueError
        Where the engine is unknown.
    """
    check_choice("engine", engine, ["auto", *ENGINES])
    return TorchEngine(prefix, preprocessing, device, precision)


def auto_batch_size(device: torch.device, size: tuple[int, int]) -> int:
    """Choose how many pictures of `size` (height, width) go through the backbone at once.

    Examples
    --------
    >>> auto_batch_size(torch.device("cpu"), (224, 224))
    4
    """
    at_224 = _CPU_BATCH if device.type == "cpu" else _ACCELERATOR_BATCH
    scaled = at_224 * 224 * 224 // (size[0] * size[1])
    return max(1, min(scaled, 4 * at_224))


class TorchEngine:
    """Eager torch: channels-last, without gradients, in mixed precision where asked.

    Parameters
    ----------
    prefix : FrozenPrefix
        Left where it is; another device gets a copy.
    preprocessing : Preprocessing
    device : torch.device
    precision : torch.dtype
        float32, or bfloat16 or float16 for autocast.
    """

    name = "torch"

    def __init__(
        self,
        prefix: FrozenPrefix,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        self._prefix = prefix if device.type == "cpu" else copy.deepcopy(prefix).to(device)
        self._preprocessing = preprocessing
        self._device, self._precision = device, precision
        if device.type == "cpu":
            keep_pages()
        self._most: int | None = None

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        done = []
        while len(batch):
            part = batch[: self._most]
            try:
                done.append(self._forward(part))
                batch = batch[len(part) :]
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            # Outside the handler, whose traceback would keep the tensors of the failed run alive.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._most = len(part) // 2
        return np.concatenate(done)

    @torch.inference_mode()
    def _forward(self, batch: torch.Tensor) -> np.ndarray:
        if self._device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(self._device, non_blocking=True)
        x = self._preprocessing.normalize(batch.contiguous(memory_format=torch.channels_last))
        with autocast(self._device, self._precision):
            embeddings = self._prefix(x)
        return embeddings.float().cpu().numpy()
