"""Augmentation: a picture and a seed -> a changed copy; policies, their parts, users' transforms.

Shapes: a picture is uint8 (3, H, W), RGB, 0-255, on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from torch.nn import functional as nnf
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

from sktransfer._config import seeded
from sktransfer._errors import check_choice

POLICIES = ("light", "standard", "aggressive", "industrial")

# Part of every digest. To be raised whenever the same seed gives another picture than before.
_EDITION = 1

# What is in them is told by its name; torchvision's version is part of the digest too.
_LIBRARIES = sys.stdlib_module_names | {"PIL", "numpy", "sktransfer", "torch", "torchvision"}

# Users' transforms draw from generators that the whole process shares.
_GLOBAL_GENERATORS = threading.RLock()

Range = tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """Changes pictures at random, and the same way each time for the same seed.

    Made by `resolve_augmentation`. The parts of the policies have random generators of their own
    and run on any number of threads side by side. Any other transform runs alone, with the global
    generators of torch, numpy and `random` seeded for it and set back afterwards.

    Parameters
    ----------
    name : str
        Of the policy, or of the user's transform.
    steps : tuple of callable
        Each takes what the one before it gives, and has random numbers of its own.
    digest : bytes
        16 bytes that identify what is computed, in any process. Random where the transform holds
        functions or classes of the user's own: only copies of this object share what it made.
    """

    name: str
    steps: tuple[Callable[[Any], Any], ...]
    digest: bytes

    def __call__(self, picture: torch.Tensor, seed: int) -> torch.Tensor:
        """Change one picture.

        Parameters
        ----------
        picture : Tensor of shape (3, H, W)
            uint8, 0-255, RGB; left as it is.
        seed : int
            Not negative.

        Returns
        -------
        Tensor of shape (3, h, w)
            uint8, 0-255, on the CPU. The policies keep height and width.

        Raises
        ------
        TypeError, ValueError
            Where a user's transform returns no picture.
        """
        result: Any = picture.clone()
        for number, step in enumerate(self.steps):
            own_seed = random.Random(f"{int(seed)} {number}").getrandbits(64)
            if isinstance(step, Part):
                result = step.transform(result, step.draw(torch.Generator().manual_seed(own_seed)))
            else:
                with _GLOBAL_GENERATORS, _globally_seeded(own_seed), torch.no_grad():
                    result = step(result)
        return _check_result(result, self.name)


def resolve_augmentation(augment: Any) -> Augmentation | None:
    """Find what changes the training pictures.

    Parameters
    ----------
    augment : {"light", "standard", "aggressive", "industrial"}, callable or None
        A policy, or a transform that takes a uint8 tensor (3, H, W) and returns one, of any height
        and width (float pixels of 0-1 are converted): torchvision's, a module, a function.
        `None` changes nothing. An `Augmentation` is taken as it is, so that a function of your own,
        resolved once, counts as the same one in every fit.

        - `"light"`: small turns, shifts and zooms, a little light. No mirror images: for digits.
        - `"standard"`: more of each, and mirror images. For photographs.
        - `"aggressive"`: still more, and shear, colour, blur, hidden parts. For few pictures.
        - `"industrial"`: a fixed camera whose lighting, focus, sensor and colours vary.

    Examples
    --------
    >>> resolve_augmentation("light")(torch.zeros(3, 64, 48, dtype=torch.uint8), seed=0).shape
    torch.Size([3, 64, 48])
    >>> resolve_augmentation(v2.Compose([v2.RandomRotation(10), SensorNoise()])).name
    'Compose'
    """
    if augment is None or isinstance(augment, Augmentation):
        return augment
    if isinstance(augment, str):
        check_choice("augment", augment, [None, *POLICIES])
        return Augmentation(augment, _STEPS[augment], _digest(augment, _STEPS[augment]))
    if not callable(augment) or isinstance(augment, type):
        remedy = "; put them into a v2.Compose" if isinstance(augment, (list, tuple)) else ""
        remedy = f"; make one: {augment.__name__}(...)" if isinstance(augment, type) else remedy
        raise TypeError(
            f"Got augment={augment!r}, but expected one of {str(POLICIES)[1:-1]}, None, or a "
            f"transform that takes and returns a uint8 tensor of shape (3, H, W){remedy}"
        )
    name = getattr(augment, "__name__", type(augment).__name__)
    return Augmentation(name, tuple(_flatten(augment)), _identify(augment))


@contextlib.contextmanager
def _globally_seeded(seed: int) -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with seeded(seed):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _flatten(transform: Any) -> list[Callable[[Any], Any]]:
    """Take a Compose apart, so that parts of ours in it need not run alone."""
    if type(transform) not in (v1.Compose, v2.Compose):
        return [transform]
    return [step for inner in transform.transforms for step in _flatten(inner)]


def _check_result(result: Any, name: str) -> torch.Tensor:
    """Bring what a transform returned to uint8 (3, h, w) on the CPU."""
    expected = f"but augment={name!r} should return a uint8 tensor of shape (3, H, W)"
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"Got {type(result).__name__}, {expected}; let v2.ToImage() come last")
    pixels = result.detach().as_subclass(torch.Tensor).cpu()
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.numel() == 0:
        raise ValueError(f"Got shape {tuple(pixels.shape)}, {expected}; for grey, append v2.RGB()")
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = pixels.min().item(), pixels.max().item()
    if not (pixels.is_floating_point() and 0 <= low <= high <= 1):
        raise ValueError(
            f"Got {pixels.dtype} from {low:.3g} to {high:.3g}, {expected}, or floats from 0 to 1; "
            "leave out v2.Normalize, since pictures are normalised afterwards"
        )
    return (pixels.float() * 255).round_().to(torch.uint8)


def _digest(*described: object) -> bytes:
    return hashlib.blake2b(repr((_EDITION, *described)).encode(), digest_size=16).digest()


def _identify(transform: Any) -> bytes:
    """Digest a user's transform; random bytes where names and values do not tell all of it."""
    content = hashlib.blake2b()
    try:
        _Describer(content).dump(transform)
    except Exception:  # every kind of object refuses in a way of its own
        return random.SystemRandom().randbytes(16)
    return _digest(torchvision.__version__, content.hexdigest())


class _Describer(pickle.Pickler):
    """Writes equal things equally in all processes; refuses code that no library holds."""

    def __init__(self, content: Any) -> None:
        super().__init__(SimpleNamespace(write=content.update), protocol=4)
        self.fast = True  # no memo: it matters there which equal objects are one

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return str, (str(thing.dtype), tuple(thing.shape), thing.detach().cpu().tolist())
        code = isinstance(thing, (FunctionType, type))
        if code and thing.__module__.partition(".")[0] not in _LIBRARIES:
            raise pickle.PicklingError(f"{thing.__qualname__} may change under its name")
        return NotImplemented


class Part(v2.Transform):
    """One kind of change, at random; parts also work in a `v2.Compose` of your own.

    Pictures are uint8 (3, H, W), 0-255, RGB, on the CPU; lengths, fractions of the shorter side.

    Parameters
    ----------
    p : float
        Probability of the change, 0-1.
    **amounts : float or (float, float)
        What is drawn for each picture: from -amount to amount, or from the range of a pair.
    """

    def __init__(self, p: float, **amounts: float | Range) -> None:
        super().__init__()
        self.p, self._amounts = p, amounts

    def extra_repr(self) -> str:
        """Give what is drawn, and from where; it is part of the digest."""
        return ", ".join([f"p={self.p}", *(f"{name}={x}" for name, x in self._amounts.items())])

    def draw(self, generator: torch.Generator) -> dict[str, float]:
        """Draw all amounts, or nothing where the picture is to stay as it is."""
        if torch.rand((), generator=generator).item() >= self.p:
            return {}
        drawn = {}
        for name, amount in self._amounts.items():
            low, high = amount if isinstance(amount, (tuple, list)) else (-amount, amount)
            drawn[name] = low + (high - low) * torch.rand((), generator=generator).item()
        return drawn

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw all that is random, from torch's global generator."""
        return self.draw(torch.default_generator)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change a picture as drawn."""
        if not isinstance(inpt, torch.Tensor) or (inpt.dtype, *inpt.shape[:-2]) != (torch.uint8, 3):
            got = f"{getattr(inpt, 'dtype', type(inpt))} {tuple(getattr(inpt, 'shape', ()))}"
            raise TypeError(f"{type(self).__name__} got {got}, but expected uint8 (3, H, W)")
        if not params:
            return inpt
        changed = self._render(inpt.as_subclass(torch.Tensor), params)
        return tv_tensors.wrap(changed.round_().clamp_(0, 255).to(torch.uint8), like=inpt)

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        """Give float32, 0-255, not yet rounded and clipped."""
        raise NotImplementedError


class Geometry(Part):
    """Turn, shift, zoom, stretch, shear (degrees) and mirror, in one resampling.

    What comes into view from outside has the median colour of the picture's border, so that
    white surroundings stay white and black ones black. `flip` is a probability.
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
        even: dict[str, float] = {"rotation": rotation, "across": shift, "down": shift}
        uneven = {"zoom": zoom, "aspect": aspect, "mirror": (flip - 1, flip)}
        super().__init__(p, **even, shear=shear, **uneven)

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        height, width = pixels.shape[1:]
        angle, slant = math.radians(drawn["rotation"]), math.tan(math.radians(drawn["shear"]))
        cos, sin, stretch = math.cos(angle), math.sin(angle), math.sqrt(drawn["aspect"])
        broader = math.copysign(drawn["zoom"] * stretch, -drawn["mirror"])
        scale = np.diag([broader, drawn["zoom"] / stretch])
        inverse = np.linalg.inv(np.array([[cos, -sin], [sin, cos]]) @ [[1, slant], [0, 1]] @ scale)
        (xx, xy), (yx, yy) = inverse.tolist()
        short = min(height, width)  # x and y count pixels from the middle
        x = torch.arange(width) - (width - 1) / 2 - drawn["across"] * short
        y = torch.arange(height)[:, None] - (height - 1) / 2 - drawn["down"] * short
        grid = torch.stack([(xx * x + xy * y) * 2 / width, (yx * x + yy * y) * 2 / height], -1)
        edges = (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1])
        border = torch.cat(edges, 1).float().median(1).values[:, None, None]
        return border + nnf.grid_sample((pixels - border)[None], grid[None], align_corners=False)[0]


class Lighting(Part):
    """Exposure (a factor), contrast (about the mean), gamma, and light from one side.

    `gradient` is how much brighter than its middle one side of the picture is, 0-1.
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


class ColourLoss(Part):
    """Keep a part of the colour (over 1 strengthens it); none at all with probability `grey`."""

    def __init__(self, keep: Range = (0.0, 0.8), grey: float = 0.3, p: float = 1.0) -> None:
        super().__init__(p, keep=keep, none=(grey - 1, grey))

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        grey = torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), pixels.float(), 1)
        return grey + (pixels - grey).mul_(0 if drawn["none"] >= 0 else drawn["keep"])


class Blur(Part):
    """Out of focus (radius of the disc), or moved while exposed (length of the path), at most."""

    def __init__(self, defocus: float = 0.012, motion: float = 0.045, p: float = 1.0) -> None:
        lengths = {"radius": (0.0, defocus), "path": (0.0, motion)}
        super().__init__(p, **lengths, direction=math.pi, moving=1.0)

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        short, moving = min(pixels.shape[1:]), drawn["moving"] >= 0
        half, radius = (drawn["path"] * short / 2, 0.5) if moving else (0, drawn["radius"] * short)
        reach = math.ceil(half + radius)
        x = torch.arange(-reach, reach + 1.0)
        cos, sin = math.cos(drawn["direction"]), math.sin(drawn["direction"])
        beyond = (x * cos + x[:, None] * sin).abs().sub_(half).clamp_(min=0)
        kernel = (radius + 0.5 - torch.hypot(beyond, x * sin - x[:, None] * cos)).clamp_(0, 1)
        wide = nnf.pad(pixels.float()[None], [reach] * 4, mode="replicate")
        return nnf.conv2d(wide, (kernel / kernel.sum()).expand(3, 1, -1, -1), groups=3)[0]


class SensorNoise(Part):
    """Noise: at most `read` of the full scale everywhere, and `shot` more where it is white."""

    def __init__(self, shot: float = 0.06, read: float = 0.03, p: float = 1.0) -> None:
        super().__init__(p, shot=(0.0, shot), read=(0.0, read), seed=(0.0, 2.0**24))

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        own = torch.Generator().manual_seed(int(drawn["seed"]))
        deviation = (pixels * drawn["shot"] ** 2).add_(255 * drawn["read"] ** 2).mul_(255).sqrt_()
        return torch.randn(pixels.shape, generator=own).mul_(deviation).add_(pixels)


class Erase(Part):
    """Hide a rectangle, `area` of the square on the shorter side, under the mean colour."""

    def __init__(self, area: Range = (0.02, 0.12), p: float = 1.0) -> None:
        super().__init__(p, area=area, shape=(0.5, 2.0), left=(0.0, 1.0), top=(0.0, 1.0))

    def _render(self, pixels: torch.Tensor, drawn: dict[str, float]) -> torch.Tensor:
        painted = pixels.float()
        side, (height, width) = min(pixels.shape[1:]) * drawn["area"] ** 0.5, pixels.shape[1:]
        tall, broad = round(side * drawn["shape"] ** 0.5), round(side / drawn["shape"] ** 0.5)
        top, left = round(drawn["top"] * (height - tall)), round(drawn["left"] * (width - broad))
        painted[:, top : top + tall, left : left + broad] = painted.mean((1, 2), keepdim=True)
        return painted


_SMALL: dict[str, Any] = {"rotation": 5, "shift": 0.05, "zoom": (0.95, 1.05)}
_STEPS: dict[str, tuple[Part, ...]] = {
    "light": (Geometry(**_SMALL), Lighting((0.9, 1.1), (0.9, 1.1))),
    "standard": (Geometry(12, 0.08, (0.85, 1.2), flip=0.5), Lighting((0.8, 1.2), (0.8, 1.2))),
    "aggressive": (
        Geometry(20, 0.12, (0.7, 1.4), aspect=(0.8, 1.25), shear=8, flip=0.5),
        Lighting((0.7, 1.3), (0.7, 1.3)),
        ColourLoss(keep=(0.5, 1.5), grey=0.1),
        Blur(p=0.2),
        Erase(p=0.4),
    ),
    "industrial": (
        Geometry(**_SMALL, flip=0.5),
        Lighting((0.6, 1.3), (0.8, 1.2), gamma=(0.7, 1.5), gradient=0.4, p=0.8),
        Blur(p=0.3),
        SensorNoise(p=0.5),
        ColourLoss(p=0.3),
    ),
}
