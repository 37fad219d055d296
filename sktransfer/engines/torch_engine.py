"""The engine that torch drives.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import copy
from queue import SimpleQueue

import numpy as np
import torch
from torch import nn

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.batch_size import auto_batch_size, in_parts
from sktransfer.engines.fusion import fuse
from sktransfer.engines.verification import min_cosine, noise
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.runtime import autocast, tune_malloc

# Batches on a CUDA device at once: one computes while others are copied.
_CUDA_STREAMS = 3
# A fused network must give what the network gives: cosine on images of noise.
_MIN_COSINE = 0.9999


class TorchEngine(FrozenEngine):
    """Eager torch: channels-last, without gradients, in mixed precision if asked.

    On the CPU in float32, convolutions are fused with what follows them.

    Parameters
    ----------
    prefix : FrozenPrefix
        It stays on the CPU; another device gets a copy.
    preprocessing : Preprocessing
    device : torch.device
    precision : torch.dtype
        float32, or bfloat16 or float16 for autocast.
    key : bytes
        Makes no difference: nothing is kept.
    from_library : bool
        Whether a library built the network: a user's module may not be thread-safe.
    """

    name = "torch"

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
        self._prefix: nn.Module = prefix
        if device.type != "cpu":
            self._prefix = copy.deepcopy(prefix).to(device)
        elif from_library and precision == torch.float32:
            self._prefix = _fused(prefix, preprocessing)
        self._preprocessing = preprocessing
        self._device, self._precision = device, precision
        self.thread_safe = from_library and device.type in ("cpu", "cuda")
        if device.type == "cpu":
            tune_malloc()
        if device.type == "cuda":
            self._prefix.to(memory_format=torch.channels_last)
            torch.cuda.synchronize(device)  # other streams would not wait for it
            self._streams = SimpleQueue[torch.cuda.Stream]()
            for _ in range(_CUDA_STREAMS):
                self._streams.put(torch.cuda.Stream(device))
        self._most: int | None = None

    @classmethod
    def is_worth_starting(cls, n_images: int, *, from_library: bool, fork: bool) -> bool:
        """Return True: torch runs whatever no other engine takes."""
        return True

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        found, self._most = in_parts(self._forward, batch, self._most)
        return found

    @torch.inference_mode()
    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return self._compute(batch)
        stream = self._streams.get()  # one batch is copied while another is computed
        try:
            with torch.cuda.stream(stream):
                return self._compute(batch.pin_memory())
        finally:
            self._streams.put(stream)

    def _compute(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(self._device, non_blocking=True)
        x = self._preprocessing.normalize(batch.contiguous(memory_format=torch.channels_last))
        return run_frozen(self._prefix, x, self._precision).cpu()


@torch.inference_mode()
def _fused(prefix: FrozenPrefix, preprocessing: Preprocessing) -> nn.Module:
    """Return a fused network, or the prefix itself if the two differ or nothing can be fused."""
    try:
        fused = fuse(prefix)
        if fused is prefix:
            return prefix
        x = preprocessing.normalize(noise(preprocessing.crop))
        n = auto_batch_size(torch.device("cpu"), preprocessing.crop)
        batch = x.repeat(n, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        same = min_cosine(prefix(x), fused(batch)[:1]) >= _MIN_COSINE
    except Exception:  # whatever torch raises, the prefix itself can run
        return prefix
    return fused if same else prefix


def run_frozen(blocks: nn.Module, x: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Run frozen blocks in mixed precision, in float32 if float16 overflows; return float32."""
    with autocast(x.device, precision):
        y = blocks(x)
    if precision == torch.float16 and not y.isfinite().all():
        y = blocks(x)
    return y.float()
