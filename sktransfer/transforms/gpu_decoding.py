"""JPEGs decoded and prepared on a CUDA device, many at once, where one asks for it.

Shapes: H x W pixels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

# Images that are decoded at once, and how often side by side: their pixels lie on the device.
_TOGETHER, _SIDE_BY_SIDE = 32, 2

_places = threading.BoundedSemaphore(_SIDE_BY_SIDE)


def decodes_on(device: torch.device) -> bool:
    """Tell whether JPEGs are to be decoded on a device.

    ``SKTRANSFER_DEVICE_JPEG=1`` in the environment asks for it. It is not the default: the cores
    decode while the device computes, and a decoder on the device takes its time from the network.
    """
    return device.type == "cuda" and os.environ.get("SKTRANSFER_DEVICE_JPEG") == "1"


def prepare_jpegs(
    encoded: Mapping[int, bytes],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> dict[int, torch.Tensor]:
    """Decode JPEGs on a device, and prepare them there.

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
        uint8, on the CPU. Without those that cannot be decoded there, or that came together with
        one: broken ones, all where the memory ends or torchvision has no decoder for the device.
    """
    items, prepared = list(encoded), dict[int, torch.Tensor]()
    for start in range(0, len(items), _TOGETHER):
        few = items[start : start + _TOGETHER]
        try:
            with _places, torch.inference_mode():
                decoded = _decode([encoded[item] for item in few], device)
                crops = torch.stack([prepare(pixels) for pixels in decoded]).cpu()
        except (ImportError, NotImplementedError, RuntimeError):
            continue
        prepared |= zip(few, crops, strict=True)
    return prepared


def _decode(encoded: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    # Not above: torchcodec supersedes it, and a later torchvision will not have it.
    from torchvision.io import ImageReadMode, decode_jpeg

    tensors = [torch.from_numpy(np.frombuffer(each, np.uint8).copy()) for each in encoded]
    return decode_jpeg(tensors, ImageReadMode.RGB, device)
