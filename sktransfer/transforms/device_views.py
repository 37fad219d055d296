"""Augmented views on a device: many views in few operations, with the random values of the CPU.

Shapes: M images of h x w pixels, K views of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as nnf

from sktransfer.transforms.augmentation import Augmentation
from sktransfer.transforms.distortions import (
    Blur,
    ColorLoss,
    Erase,
    Geometry,
    Lighting,
    Part,
    SensorNoise,
)
from sktransfer.utils.runtime import to_device

# Maximum size in bytes of the images and views, float32, that are on the device at once.
_MAX_BYTES = 2**29


def can_augment(augmentation: Any) -> bool:
    """Return whether a device can compute the views of an augmentation: not of other functions."""
    if not isinstance(augmentation, Augmentation) or not augmentation.steps:
        return False
    first, *others = augmentation.steps
    # A view is cropped where it is resampled, so that must come first, and in every view.
    resamples = type(first) is Geometry and first.p >= 1
    return resamples and all(type(step) in _CHANGES for step in others)


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
        for number, part in enumerate(augmentation.steps[1:], 1):
            _change(views, type(part), [values[number] for values in drawn])
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


def _change(views: torch.Tensor, kind: type[Any], drawn: list[dict[str, float]]) -> None:
    """Change views (K, 3, H, W), float32, in place by a part; those without values stay as is."""
    chosen = [number for number, values in enumerate(drawn) if values]
    if chosen:
        index = to_device(torch.tensor(chosen), views.device)
        changed = _CHANGES[kind](views[index], [drawn[number] for number in chosen])
        views[index] = changed.round_().clamp_(0, 255)


def _columns(rows: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    """Return a row of numbers for each view on a device: (number of columns, K, 1, 1, 1)."""
    return to_device(torch.tensor(rows), device).T[:, :, None, None, None]


# Each function maps views (K, 3, H, W), float32, whole numbers from 0 to 255, and the values drawn
# for each of them to what the part makes of them, not yet rounded and clipped.


def _lighting(views: torch.Tensor, drawn: list[dict[str, float]]) -> torch.Tensor:
    names = ("exposure", "contrast", "gamma", "slope", "direction")
    plans = [[values[name] for name in names] for values in drawn]
    exposure, contrast, gamma, slope, direction = _columns(plans, views.device)
    mean = views.mean((1, 2, 3), keepdim=True)
    lit = ((views - mean).mul_(contrast) + mean).clamp_(0, 255)
    lit = (lit / 255).pow_(gamma).mul_(255 * exposure)
    x = torch.linspace(-1, 1, views.shape[3], device=views.device) * direction.cos()
    y = torch.linspace(-1, 1, views.shape[2], device=views.device)[:, None] * direction.sin()
    return lit.mul_(1 + slope * (x + y))


def _color_loss(views: torch.Tensor, drawn: list[dict[str, float]]) -> torch.Tensor:
    plans = [[*ColorLoss.GRAY, ColorLoss.factor(values)] for values in drawn]
    *shares, factor = _columns(plans, views.device)
    gray = (views * torch.cat(shares, 1)).sum(1, keepdim=True)
    return gray + (views - gray).mul_(factor)


def _blur(views: torch.Tensor, drawn: list[dict[str, float]]) -> torch.Tensor:
    kernels = [Blur.kernel(values, min(views.shape[2:])) for values in drawn]
    side = max(map(len, kernels))
    same_size = [nnf.pad(kernel, [(side - len(kernel)) // 2] * 4) for kernel in kernels]
    weights = to_device(torch.stack(same_size), views.device).repeat_interleave(3, 0)[:, None]
    wide = nnf.pad(views, [side // 2] * 4, mode="replicate")
    return nnf.conv2d(wide.flatten(0, 1)[None], weights, groups=len(weights)).reshape(views.shape)


def _sensor_noise(views: torch.Tensor, drawn: list[dict[str, float]]) -> torch.Tensor:
    height, width = views.shape[2:]
    # Drawn on the CPU, whose random numbers the device does not have, and copied at once.
    noise = [SensorNoise.noise(values, (height, width)) for values in drawn]
    copied = to_device(torch.cat([each.flatten() for each in noise]), views.device)
    parts = copied.split([each.numel() for each in noise])
    enlarged = [
        SensorNoise.enlarged(part.view_as(each), (height, width))
        for part, each in zip(parts, noise, strict=True)
    ]
    shot, read = _columns([[each["shot"], each["read"]] for each in drawn], views.device)
    deviation = (views * shot**2).add_(255 * read**2).mul_(255).sqrt_()
    return torch.stack(enlarged).mul_(deviation).add_(views)


def _erase(views: torch.Tensor, drawn: list[dict[str, float]]) -> torch.Tensor:
    height, width = views.shape[2:]
    edges = [Erase.edges(values, height, width) for values in drawn]
    top, bottom, left, right = _columns(edges, views.device)
    x = torch.arange(width, device=views.device)
    y = torch.arange(height, device=views.device)[:, None]
    is_inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return torch.where(is_inside, views.mean((2, 3), keepdim=True), views)


_CHANGES: dict[type[Part], Callable[[torch.Tensor, list[dict[str, float]]], torch.Tensor]] = {
    Lighting: _lighting,
    ColorLoss: _color_loss,
    Blur: _blur,
    SensorNoise: _sensor_noise,
    Erase: _erase,
}
