"""Number of images that torch runs at once, and smaller batches if memory runs out.

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Images of 224 x 224 in a batch. On a CPU, the feature maps of a small batch stay in the caches. An
# accelerator is fast with a large batch, which `in_parts` halves if memory runs out.
_CPU_BATCH = 4
# More images do not fit into the memory of any computer.
MAX_BATCH_SIZE = 65_536
_ACCELERATOR_BATCH = 512


def auto_batch_size(device: torch.device, size: tuple[int, int]) -> int:
    """Return the number of images of `size` (height, width) that torch runs at once.

    Examples
    --------
    >>> auto_batch_size(torch.device("cpu"), (224, 224))
    4
    """
    at_224 = _CPU_BATCH if device.type == "cpu" else _ACCELERATOR_BATCH
    scaled = at_224 * 224 * 224 // (size[0] * size[1])
    return max(1, min(scaled, 4 * at_224))


def in_parts(
    run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, most: int | None = None
) -> tuple[torch.Tensor, int | None]:
    """Run a batch; if the device runs out of memory, halve the batch until it fits.

    Parameters
    ----------
    run : callable
        Maps a part (n, ...) of the batch to its results, (n, ...).
    batch : Tensor of shape (N, ...)
    most : int or None
        Maximum size of a part; None is the whole batch.

    Returns
    -------
    Tensor of shape (N, ...)
    most : int or None
        Size of a part that fits in memory, for the next call.
    """
    results = []
    while len(batch):
        part = batch[:most]
        try:
            results.append(run(part))
            batch = batch[len(part) :]
            continue
        except RuntimeError as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler, because its traceback keeps the tensors of the failed run alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        most = len(part) // 2
    return (results[0] if len(results) == 1 else torch.cat(results)), most


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the memory of a device, or pinned memory, has run out.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    True
    """
    message = str(error)
    is_known = "out of memory" in message or "ALLOC_FAILED" in message
    return isinstance(error, torch.OutOfMemoryError) or is_known
