"""Distortions: the parts of the augmentation policies, each a random change of one kind.

Shapes: an image is uint8 (3, H, W), RGB, 0-255, on the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as nnf
from torchvision import tv_tensors
from torchvision.transforms import v2

Range = tuple[float, float]


class Part(v2.Transform):
    """A random change of one kind; parts also work in a user's `v2.Compose`.

    Images are uint8 (3, H, W), 0-255, RGB, on the CPU. Lengths are fractions of the shorter side.

    Parameters
    ----------
    p : float
        Probability of the change, 0-1.
    **amounts : float or (float, float)
        Range of the value drawn for each image: a pair, or from -amount to amount.
    """

    def __init__(self, p: float, **amounts: float | Range) -> None:
        super().__init__()
        self.p, self._amounts = p, amounts

    def extra_repr(self) -> str:
        """Return the ranges of the random values; they are part of the digest."""
        return ", ".join([f"p={self.p}", *(f"{name}={x}" for name, x in self._amounts.items())])

    def draw(self, generator: torch.Generator) -> dict[str, float]:
        """Draw all amounts, or none if the image stays unchanged."""
        if torch.rand((), generator=generator).item() >= self.p:
            return {}
        drawn = {}
        for name, amount in self._amounts.items():
            low, high = amount if isinstance(amount, (tuple, list)) else (-amount, amount)
            drawn[name] = low + (high - low) * torch.rand((), generator=generator).item()
        return drawn

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw all amounts from torch's global generator."""
        return self.draw(torch.default_generator)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change an image by the drawn amounts."""
        if not isinstance(inpt, torch.Tensor) or (inpt.dtype, *inpt.shape[:-2]) != (torch.uint8, 3):
            got = f"{getattr(inpt, 'dtype', type(inpt))} {tuple(getattr(inpt, 'shape', ()))}"
            raise TypeError(f"{type(self).__name__} got {got}, but expected uint8 (3, H, W)")
        if not params:
            return inpt
        changed = self._render(inpt.as_subclass(torch.Tensor), params)
        return tv_tensors.wrap(changed.round_().clamp_(0, 255).to(torch.uint8), like=inpt)

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        """Return float32, 0-255, not yet rounded and clipped."""
        raise NotImplementedError


class Geometry(Part):
    """Rotate, shift, zoom, stretch, shear (degrees) and mirror, in one resampling.

    Pixels from outside the image get the median color of its border, so that a white background
    stays white and a black one black. `flip` is a probability.
    """

    def __init__(
        self,
        rotation: float = 0.0,
        shift: float = 0.0,
        zoom: Range = (1.0, 1.0),
        aspect: Range = (1.0, 1.0),
        shear: float = 0.0,
        flip: float = 0.0,
        p: float = 1.0,
    ) -> None:
        limits: dict[str, float] = {"rotation": rotation, "across": shift, "down": shift}
        ranges = {"zoom": zoom, "aspect": aspect, "mirror": (flip - 1, flip)}
        super().__init__(p, **limits, shear=shear, **ranges)
        self.flip = flip

    def _render(self, pixels: torch.Tensor, drawn: dict[str, Any]) -> torch.Tensor:
        height, width = pixels.shape[1:]
        rows, columns = drawn.get("size") or (height, width)
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        xx, xy, yx, yy = self.inverse(drawn)
        short = min(height, width)  # x and y are in pixels from the center
        x = torch.arange(left, left + columns) - (width - 1) / 2 - drawn["across"] * short
        y = torch.arange(top, top + rows) - (height - 1) / 2 - drawn["down"] * short
        grid = torch.empty(rows, columns, 2)
        torch.add((2 / width * xx) * x, (2 / width * xy) * y[:, None], out=grid[..., 0])
        torch.add((2 / height * yx) * x, (2 / height * yy) * y[:, None], out=grid[..., 1])
        border = self.border_of(pixels)
        return border + nnf.grid_sample((pixels - border)[None], grid[None], align_corners=False)[0]

    @staticmethod
    def inverse(drawn: dict[str, float]) -> tuple[float, float, float, float]:
        """Return the matrix, row by row, from positions in the changed image to original ones."""
        angle, slant = math.radians(drawn["rotation"]), math.tan(math.radians(drawn["shear"]))
        cos, sin, stretch = math.cos(angle), math.sin(angle), math.sqrt(drawn["aspect"])
        x_scale = math.copysign(drawn["zoom"] * stretch, -drawn["mirror"])
        scale = np.diag([x_scale, drawn["zoom"] / stretch])
        inverse = np.linalg.inv(np.array([[cos, -sin], [sin, cos]]) @ [[1, slant], [0, 1]] @ scale)
        (xx, xy), (yx, yy) = inverse.tolist()
        return xx, xy, yx, yy

    @staticmethod
    def border_of(pixels: torch.Tensor) -> torch.Tensor:
        """Return the median color of the border of an image, float32 of shape (3, 1, 1)."""
        edges = torch.cat((pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]), 1)
        # torch's median is not deterministic on CUDA devices, and refuses to be.
        return edges.float().sort(1).values[:, (edges.shape[1] - 1) // 2, None, None]


class Lighting(Part):
    """Exposure (a factor), contrast (around the mean), gamma, and light from one side.

    `gradient` is by how much one side of the image is brighter than its center, 0-1.
    """

    def __init__(
        self,
        exposure: Range = (0.8, 1.2),
        contrast: Range = (0.8, 1.2),
        gamma: Range = (1.0, 1.0),
        gradient: float = 0.0,
        p: float = 1.0,
    ) -> None:
        curve = {"exposure": exposure, "contrast": contrast, "gamma": gamma}
        super().__init__(p, **curve, slope=(0.0, gradient), direction=math.pi)

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        mean = pixels.float().mean()
        curve = (torch.arange(256) - mean).mul_(drawn["contrast"]).add_(mean).clamp_(0, 255)
        curve = (curve / 255).pow_(drawn["gamma"]).mul_(255 * drawn["exposure"])
        lit = curve.index_select(0, pixels.reshape(-1).int()).view(pixels.shape)
        if drawn["slope"]:
            x = torch.linspace(-1, 1, pixels.shape[2]) * math.cos(drawn["direction"])
            y = torch.linspace(-1, 1, pixels.shape[1]) * math.sin(drawn["direction"])
            lit.mul_(1 + drawn["slope"] * (x + y[:, None]))
        return lit


class ColorLoss(Part):
    """Weaken the color by a factor (above 1: strengthen it); remove it with probability `gray`."""

    # The gray of red, green and blue.
    GRAY = (0.299, 0.587, 0.114)

    def __init__(self, keep: Range = (0.0, 0.8), gray: float = 0.3, p: float = 1.0) -> None:
        super().__init__(p, keep=keep, none=(gray - 1, gray))

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        gray = torch.tensordot(torch.tensor(self.GRAY), pixels.float(), 1)
        return gray + (pixels - gray).mul_(self.factor(drawn))

    @staticmethod
    def factor(drawn: dict[str, float]) -> float:
        """Return the factor of the color."""
        return 0 if drawn["none"] >= 0 else drawn["keep"]


class Blur(Part):
    """Blur by defocus (maximum radius of the disc) or by motion (maximum length of the path)."""

    def __init__(self, defocus: float = 0.012, motion: float = 0.045, p: float = 1.0) -> None:
        lengths = {"radius": (0.0, defocus), "path": (0.0, motion)}
        super().__init__(p, **lengths, direction=math.pi, moving=1.0)

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        kernel = self.kernel(drawn, min(pixels.shape[1:]))
        wide = nnf.pad(pixels.float()[None], [len(kernel) // 2] * 4, mode="replicate")
        return nnf.conv2d(wide, kernel.expand(3, 1, -1, -1), groups=3)[0]

    @staticmethod
    def kernel(drawn: dict[str, float], short: int) -> torch.Tensor:
        """Return the weights of the neighbors, (S, S) with an odd S, for an image's shorter side.

        Examples
        --------
        >>> Blur.kernel({"radius": 0.0, "path": 0.2, "direction": 0.0, "moving": 1.0}, short=10)
        tensor([[0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.3333, 0.3333, 0.3333, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000, 0.0000]])
        """
        moving = drawn["moving"] >= 0
        half, radius = (drawn["path"] * short / 2, 0.5) if moving else (0, drawn["radius"] * short)
        reach = math.ceil(half + radius)
        x = torch.arange(-reach, reach + 1.0)
        cos, sin = math.cos(drawn["direction"]), math.sin(drawn["direction"])
        beyond = (x * cos + x[:, None] * sin).abs().sub_(half).clamp_(min=0)
        weights = (radius + 0.5 - torch.hypot(beyond, x * sin - x[:, None] * cos)).clamp_(0, 1)
        return weights / weights.sum()


class SensorNoise(Part):
    """Add noise: up to `read` of the full scale everywhere, and up to `shot` more on white.

    `grain` is the maximum size of a grain; enlarging a small image enlarges the grains of noise.
    """

    def __init__(
        self, shot: float = 0.06, read: float = 0.03, grain: float = 0.0, p: float = 1.0
    ) -> None:
        levels = {"shot": (0.0, shot), "read": (0.0, read)}
        super().__init__(p, **levels, grain=(0.0, grain), seed=(0.0, 2.0**24))

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        deviation = (pixels * drawn["shot"] ** 2).add_(255 * drawn["read"] ** 2).mul_(255).sqrt_()
        height, width = pixels.shape[1:]
        noise = self.enlarged(self.noise(drawn, (height, width)), (height, width))
        return noise.mul_(deviation).add_(pixels)

    @staticmethod
    def noise(drawn: dict[str, float], size: tuple[int, int]) -> torch.Tensor:
        """Draw the noise of an image of `size` (height, width): (3, h, w), a number per grain."""
        generator = torch.Generator().manual_seed(int(drawn["seed"]))
        grain = max(1.0, drawn["grain"] * min(size))
        return torch.randn(3, *(math.ceil(side / grain) for side in size), generator=generator)

    @staticmethod
    def enlarged(noise: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Enlarge the grains of noise to an image of `size` (height, width)."""
        if noise.shape[1:] == size:
            return noise
        return nnf.interpolate(noise[None], size, mode="bicubic")[0]


class Erase(Part):
    """Fill a rectangle with the mean color; `area` is relative to the squared shorter side."""

    def __init__(self, area: Range = (0.02, 0.12), p: float = 1.0) -> None:
        super().__init__(p, area=area, shape=(0.5, 2.0), left=(0.0, 1.0), top=(0.0, 1.0))
        if 2 * area[1] > 1:
            # Part of the digest: rectangles longer than the image used to be rendered differently.
            self.version = 2

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        erased = pixels.float()
        top, bottom, left, right = self.edges(drawn, *pixels.shape[1:])
        erased[:, top:bottom, left:right] = erased.mean((1, 2), keepdim=True)
        return erased

    @staticmethod
    def edges(drawn: dict[str, float], height: int, width: int) -> tuple[int, int, int, int]:
        """Return the first and the last row and column of the rectangle, exclusive at the end.

        Examples
        --------
        >>> Erase.edges({"area": 0.04, "shape": 4.0, "top": 1.0, "left": 0.5}, 20, 30)
        (12, 20, 14, 16)
        """
        side, stretch = min(height, width) * drawn["area"] ** 0.5, drawn["shape"] ** 0.5
        tall, broad = min(round(side * stretch), height), min(round(side / stretch), width)
        top, left = round(drawn["top"] * (height - tall)), round(drawn["left"] * (width - broad))
        return top, top + tall, left, left + broad
