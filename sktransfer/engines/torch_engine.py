"""The torch engine.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.batch_size import auto_batch_size, in_parts
from sktransfer.engines.fusion import fuse
from sktransfer.engines.verification import min_cosine, noise
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.runtime import autocast, full_float32, tune_malloc

# Minimum cosine between the outputs of a fused network and of the network on noise images.
_MIN_COSINE = 0.9999


class TorchEngine(FrozenEngine):
    """Eager torch: channels-last, without gradients, in mixed precision on request.

    On the CPU in float32, convolutions are fused with the layers after them.

    Parameters
    ----------
    prefix : FrozenPrefix
        It stays on the CPU; another device gets a copy.
    preprocessing : Preprocessing
    device : torch.device
    precision : torch.dtype
        float32, or bfloat16 or float16 for autocast.
    key : bytes
        Not used: this engine caches nothing on disk.
    from_library : bool
        Whether the network comes from a library: a user's module may not be thread-safe.
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
            torch.cuda.synchronize(device)  # other streams do not wait for the copy
        self.on_device = device.type == "cuda"
        self._max_part: int | None = None  # learned when memory runs out

    @classmethod
    def is_worth_starting(cls, n_images: int, *, from_library: bool, fork: bool) -> bool:
        """Return True: torch runs every network."""
        return True

    @torch.inference_mode()
    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        return self._in_parts(self._run, batch).numpy()

    @torch.no_grad()  # the results can be trained on, unlike those of inference mode
    def forward(self, pixels: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """See `FrozenEngine.forward`."""
        precision = torch.float32 if exact else self._precision

        def run(part: torch.Tensor) -> torch.Tensor:
            return run_blocks(self._prefix, self._normalized(part), precision)

        return self._in_parts(run, pixels)

    def _in_parts(
        self, run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
    ) -> torch.Tensor:
        result, most = in_parts(run, batch, self._max_part)
        if most is not None:  # another thread may have learned less
            self._max_part = min(most, self._max_part or most)
        return result

    def _run(self, part: torch.Tensor) -> torch.Tensor:
        x = self._normalized(part.to(self._device))
        return run_frozen(self._prefix, x, self._precision).cpu()

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._preprocessing.normalize(pixels.contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def _fused(prefix: FrozenPrefix, preprocessing: Preprocessing) -> nn.Module:
    """Return the fused prefix, or the prefix itself if they differ or nothing can be fused."""
    try:
        fused = fuse(prefix)
        if fused is prefix:
            return prefix
        x = preprocessing.normalize(noise(preprocessing.crop))
        batch_size = auto_batch_size(torch.device("cpu"), preprocessing.crop)
        batch = x.repeat(batch_size, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        is_equal = min_cosine(prefix(x), fused(batch)[:1]) >= _MIN_COSINE
    except Exception:  # after any error, the prefix itself can run
        return prefix
    return fused if is_equal else prefix


def run_frozen(blocks: nn.Module, x: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Run frozen blocks in mixed precision, in float32 if float16 overflows; return float32."""
    y = run_blocks(blocks, x, precision)
    if precision == torch.float16 and not y.isfinite().all():
        y = run_blocks(blocks, x, torch.float32)
    return y


def run_blocks(blocks: nn.Module, x: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """Run frozen blocks in mixed precision, or in float32; return float32."""
    with autocast(x.device, precision), full_float32(x.device):
        return blocks(x).float()
