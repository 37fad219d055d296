"""Augmented views on a device: many views in few operations, with the random values of the CPU.

Shapes: M images of h x w pixels, K views of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as nnf

from sktransfer.transforms.augmentation import Augmentation
from sktransfer.transforms.distortions import Geometry, Lighting
from sktransfer.utils.runtime import to_device

# Maximum size in bytes of the images and views, float32, that are on the device at once.
_MAX_BYTES = 2**29


def can_augment(augmentation: Any) -> bool:
    """Return whether a device can compute the views of an augmentation: not of every policy."""
    if not isinstance(augmentation, Augmentation) or not augmentation.steps:
        return False
    first, *others = augmentation.steps
    return type(first) is Geometry and all(type(step) is Lighting for step in others)


def augment(
    augmentation: Augmentation,
    images: Sequence[torch.Tensor],
    rows: Sequence[int],
    seeds: Sequence[int],
    size: tuple[int, int],
) -> torch.Tensor:
    """Compute views on the device of the images, as calling `augmentation` does on the CPU.

    Parameters
    ----------
    augmentation : Augmentation
        One that `can_augment` accepts.
    images : sequence of M tensors of shape (3, h, w)
        uint8, 0-255, at least as large as `size`.
    rows : sequence of K int
        The image of each view.
    seeds : sequence of K int
        The seed of each view.
    size : (int, int)
        Height and width of the views, the center of the changed image.

    Returns
    -------
    Tensor of shape (K, 3, H, W)
        uint8, 0-255.
    """
    step = max(1, _MAX_BYTES // (12 * max(image.shape[1] * image.shape[2] for image in images)))
    parts = []
    for start in range(0, len(rows), step):
        used = sorted({*rows[start : start + step]})
        position = {row: number for number, row in enumerate(used)}
        drawn = [augmentation.draw(seed) for seed in seeds[start : start + step]]
        views = _geometry(
            [images[row] for row in used],
            [position[row] for row in rows[start : start + step]],
            [values[0] for values in drawn],
            size,
        )
        for number in range(1, len(augmentation.steps)):
            views = _lighting(views, [values[number] for values in drawn])
        parts.append(views.to(torch.uint8))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _geometry(
    images: list[torch.Tensor],
    rows: list[int],
    drawn: list[dict[str, float]],
    size: tuple[int, int],
) -> torch.Tensor:
    """Resample views (K, 3, H, W): float32, whole numbers from 0 to 255."""
    device = images[0].device
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    # Differences from the border color, which are 0 outside of an image.
    stack = torch.zeros((len(images), 3, height, width), device=device)
    borders = torch.empty((len(images), 3, 1, 1), device=device)
    for plane, border, image in zip(stack, borders, images, strict=True):
        border.copy_(Geometry.border_of(image))
        plane[:, : image.shape[1], : image.shape[2]] = image - border
    plans = torch.tensor(
        [
            [*Geometry.inverse(values), *_values_of(images[row], values, size)]
            for row, values in zip(rows, drawn, strict=True)
        ],
        dtype=torch.float32,
    )
    xx, xy, yx, yy, left, top, x_shift, y_shift, h, w = to_device(plans, device).T[:, :, None, None]
    x = torch.arange(size[1], device=device) + left - x_shift
    y = torch.arange(size[0], device=device)[:, None] + top - y_shift
    # From -1 to 1 across an image, and then across the stack.
    grid = torch.stack(
        [
            ((2 / w) * (xx * x + xy * y) + 1) * (w / width) - 1,
            ((2 / h) * (yx * x + yy * y) + 1) * (h / height) - 1,
        ],
        dim=-1,
    )
    index = to_device(torch.tensor(rows), device)
    views = nnf.grid_sample(stack[index], grid, align_corners=False)
    return views.add_(borders[index]).round_().clamp_(0, 255)


def _values_of(
    image: torch.Tensor, drawn: dict[str, float], size: tuple[int, int]
) -> tuple[float, ...]:
    """Return the first column and row of the view, the centers, and the size of the image."""
    height, width = image.shape[1:]
    short = min(height, width)
    return (
        round((width - size[1]) / 2),
        round((height - size[0]) / 2),
        (width - 1) / 2 + drawn["across"] * short,
        (height - 1) / 2 + drawn["down"] * short,
        height,
        width,
    )


def _lighting(views: torch.Tensor, drawn: list[dict[str, float]]) -> torch.Tensor:
    """Change the light of views (K, 3, H, W), float32, whole numbers from 0 to 255."""
    lit = [number for number, values in enumerate(drawn) if values]
    if not lit:
        return views
    names = ("exposure", "contrast", "gamma", "slope", "direction")
    plans = torch.tensor([[drawn[number][name] for name in names] for number in lit])
    exposure, contrast, gamma, slope, direction = to_device(plans, views.device).T[
        :, :, None, None, None
    ]
    index = to_device(torch.tensor(lit), views.device)
    chosen = views[index]
    mean = chosen.mean((1, 2, 3), keepdim=True)
    changed = ((chosen - mean).mul_(contrast) + mean).clamp_(0, 255)
    changed = (changed / 255).pow_(gamma).mul_(255 * exposure)
    x = torch.linspace(-1, 1, views.shape[3], device=views.device) * direction.cos()
    y = torch.linspace(-1, 1, views.shape[2], device=views.device)[:, None] * direction.sin()
    changed.mul_(1 + slope * (x + y))
    views[index] = changed.round_().clamp_(0, 255)
    return views
