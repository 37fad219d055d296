"""Optional decoding and preparation of JPEGs on a CUDA device, in batches.

Shapes: H x W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sktransfer.utils.config import DEVICE_JPEG

# Decoded images are in the memory of the device, so their number is limited.
_IMAGES_PER_BATCH = 32
_MAX_PARALLEL_BATCHES = 2

_free_batches = threading.BoundedSemaphore(_MAX_PARALLEL_BATCHES)


def decodes_on(device: torch.device) -> bool:
    """Return whether JPEGs are decoded on a device.

    ``SKTRANSFER_DEVICE_JPEG=1`` in the environment turns this on. It is off by default: the CPU
    decodes while the device computes, and decoding on the device would slow down the network.
    """
    return device.type == "cuda" and DEVICE_JPEG.get() == "1"


def prepare_jpegs(
    encoded: Mapping[int, bytes],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> dict[int, torch.Tensor]:
    """Decode JPEGs on a device, and prepare them on it.

    Parameters
    ----------
    encoded : mapping of int to bytes
        RGB or gray, upright.
    prepare : callable
        Maps an image (3, h, w), uint8, on the device to (3, H, W), uint8.
    device : torch.device

    Returns
    -------
    dict of int to Tensor of shape (3, H, W)
        uint8, on the CPU. A batch is left out if it cannot be decoded on the device: an image is
        broken, memory runs out, or torchvision has no decoder.
    """
    items, prepared = list(encoded), dict[int, torch.Tensor]()
    for start in range(0, len(items), _IMAGES_PER_BATCH):
        batch = items[start : start + _IMAGES_PER_BATCH]
        try:
            with _free_batches, torch.inference_mode():
                decoded = _decode([encoded[item] for item in batch], device)
                crops = torch.stack([prepare(pixels) for pixels in decoded]).cpu()
        except (ImportError, NotImplementedError, RuntimeError):
            continue
        prepared |= zip(batch, crops, strict=True)
    return prepared


def _decode(encoded: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    # Imported here, because a later torchvision may leave it out in favor of torchcodec.
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.from_numpy(np.frombuffer(jpeg, np.uint8).copy()) for jpeg in encoded]
    return decode_jpeg(tensors, ImageReadMode.RGB, device)
