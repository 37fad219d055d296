"""Resizing and cropping of many images of any size on a device, in few operations.

Antialiased resizing is linear and separable, so the resized and cropped rows are one matrix
product, and the columns another one. The weights are those of torch's `interpolate` with
antialiasing (triangle filter; Keys' cubic with a = -0.5), and the crop is taken by computing only
the needed rows and columns.

Shapes: N images, h x w pixels before and H x W pixels after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.runtime import to_device

# Maximum size in bytes of the floating-point pixels that are resized at once.
_MAX_BYTES = 2**29
_CUBIC = -0.5


def can_resize(preprocessing: Preprocessing, size: tuple[int, int]) -> bool:
    """Return whether `resize` does what `Preprocessing` does with images of a size (h, w)."""
    if preprocessing.interpolation not in ("bilinear", "bicubic"):
        return False
    if preprocessing.cuts_strip(size):
        return False
    height, width = preprocessing.resized_size(size)
    return height >= preprocessing.crop[0] and width >= preprocessing.crop[1]


def resize(images: Sequence[torch.Tensor], preprocessing: Preprocessing) -> torch.Tensor:
    """Resize and center-crop images on their device, without waiting for it.

    Parameters
    ----------
    images : sequence of N tensors of shape (3, h, w)
        uint8, 0-255, of sizes that `can_resize` accepts.
    preprocessing : Preprocessing

    Returns
    -------
    Tensor of shape (N, 3, H, W)
        uint8, 0-255, on the same device.
    """
    order, parts = list[int](), list[torch.Tensor]()
    for group, stack, sizes in _stacks(images):
        order += group
        parts.append(_resize_group(stack, sizes, preprocessing))
    crops = torch.cat(parts)
    if order == sorted(order):
        return crops
    position = torch.empty(len(order), dtype=torch.long)
    position[order] = torch.arange(len(order))
    return crops[to_device(position, crops.device)]


def resize_whole(
    images: Sequence[torch.Tensor], preprocessing: Preprocessing
) -> list[torch.Tensor]:
    """Resize images as `resize` does, but without cropping them: uint8, each (3, h, w)."""
    whole = list[torch.Tensor](images)
    for group, stack, sizes in _stacks(images):
        resized = [preprocessing.resized_size(size) for size in sizes]
        heights, widths = zip(*resized, strict=True)
        planes = _resize_group(stack, sizes, preprocessing, (max(heights), max(widths)))
        for plane, index, (height, width) in zip(planes.unbind(), group, resized, strict=True):
            whole[index] = plane[:, :height, :width]
    return whole


def resize_stack(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize and center-crop a stack (N, 3, h, w), uint8, as `resize` does."""
    size = (pixels.shape[2], pixels.shape[3])
    step = max(1, _MAX_BYTES // (12 * size[0] * size[1]))
    parts = [_resize_group(part.float(), [size], preprocessing) for part in pixels.split(step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stacks(
    images: Sequence[torch.Tensor],
) -> Iterator[tuple[list[int], torch.Tensor, list[tuple[int, int]]]]:
    """Yield groups of images: their positions, padded pixels, and sizes (h, w)."""
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    # Images of similar size together, so that little is padded.
    order = sorted(range(len(images)), key=sizes.__getitem__)
    for group in _groups(order, sizes):
        yield group, _stack([images[index] for index in group]), [sizes[index] for index in group]


def _groups(order: list[int], sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Split images into groups that fit into the limit when they are padded to equal sizes."""
    groups: list[list[int]] = [[]]
    height = width = 0
    for index in order:
        taller, wider = max(height, sizes[index][0]), max(width, sizes[index][1])
        if groups[-1] and 12 * (len(groups[-1]) + 1) * taller * wider > _MAX_BYTES:
            groups.append([])
            taller, wider = sizes[index]
        groups[-1].append(index)
        height, width = taller, wider
    return groups


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Stack images as float32 (N, 3, h, w), padded to the largest height and width."""
    if len({image.shape for image in images}) == 1:
        return torch.stack(images).float()
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    stack = torch.zeros((len(images), 3, height, width), device=images[0].device)
    targets = [
        plane[:, : image.shape[1], : image.shape[2]]
        for plane, image in zip(stack.unbind(), images, strict=True)
    ]
    torch._foreach_copy_(targets, images)
    return stack


def _resize_group(
    pixels: torch.Tensor,
    sizes: list[tuple[int, int]],
    preprocessing: Preprocessing,
    whole: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Resize float32 pixels (N, 3, h, w); a single size applies to all images.

    The center crop is returned, or all pixels, padded to the height and width `whole`.
    """
    resized = [preprocessing.resized_size(size) for size in sizes]
    crop = whole or preprocessing.crop
    plans = torch.tensor(
        [
            (before, after, 0 if whole else _crop_start(after, cropped))
            for axis, cropped in enumerate(crop)
            for before, after in zip(
                (size[axis] for size in sizes), (size[axis] for size in resized), strict=True
            )
        ],
        dtype=torch.float32,
    )
    plans = to_device(plans, pixels.device).view(2, len(sizes), 3)
    cubic = preprocessing.interpolation == "bicubic"
    across = _weights(plans[1], crop[1], pixels.shape[3], cubic)
    down = _weights(plans[0], crop[0], pixels.shape[2], cubic)
    n, channels, height, width = pixels.shape
    # As on the CPU, columns first, and whole levels in between.
    columns = torch.matmul(pixels.reshape(n, channels * height, width), across.transpose(1, 2))
    columns = columns.round_().clamp_(0, 255).view(n, channels, height, crop[1])
    return torch.matmul(down[:, None], columns).round_().clamp_(0, 255).to(torch.uint8)


def _weights(plan: torch.Tensor, count: int, length: int, cubic: bool) -> torch.Tensor:
    """Return the weights (N, `count`, `length`) of the pixels of one axis.

    A row of `plan` has the length of the axis before and after resizing, and the first pixel of the
    crop.
    """
    before, after, start = (column[:, None, None] for column in plan.unbind(1))
    scale = before / after
    center = (start + torch.arange(count, device=plan.device)[:, None] + 0.5) * scale
    pixel = torch.arange(length, device=plan.device)
    x = ((pixel + 0.5 - center) / scale.clamp(min=1)).abs()
    if cubic:
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * _CUBIC
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weights = (1 - x).clamp_(min=0)
    weights = weights * (pixel < before)
    # Pixels beyond the resized image have no weights.
    return weights / weights.sum(2, keepdim=True).clamp_(min=1e-6)


def _crop_start(length: int, cropped: int) -> int:
    # As torchvision's center_crop rounds.
    return round((length - cropped) / 2.0)
