"""Augmentation: an image and a seed -> a changed copy; policies, their parts, users' transforms.

Shapes: an image is uint8 (3, H, W), RGB, 0-255, on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from torchvision import transforms as v1
from torchvision.transforms import v2

from sktransfer.transforms.distortions import (
    Blur,
    ColorLoss,
    Erase,
    Geometry,
    Lighting,
    Part,
    SensorNoise,
)
from sktransfer.utils.errors import check_choice
from sktransfer.utils.runtime import GLOBAL_GENERATORS, seeded

POLICIES = ("light", "standard", "aggressive", "industrial")

# Copies that show what a policy does; much may be wrong with an industrial image.
_COPIES = {"industrial": 7}
_FEW_COPIES = 3

# Part of every digest. To be raised whenever the same seed gives another image than before.
_EDITION = 4

# What is in them is told by its name; torchvision's version is part of the digest too.
_LIBRARIES = sys.stdlib_module_names | {"PIL", "numpy", "sktransfer", "torch", "torchvision"}


@dataclass(frozen=True)
class Augmentation:
    """Changes images at random, and the same way each time for the same seed.

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

    def __call__(
        self, image: torch.Tensor, seed: int, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Change one image.

        Parameters
        ----------
        image : Tensor of shape (3, H, W)
            uint8, 0-255, RGB; left as it is.
        seed : int
            Not negative.
        size : (int, int) or None
            Height and width of the middle that will be cut out, within those of the image: the
            policies need not compute the rest.

        Returns
        -------
        Tensor of shape (3, h, w)
            uint8, 0-255, on the CPU. The policies keep height and width, or give `size`.

        Raises
        ------
        TypeError, ValueError
            Where a user's transform returns no image.
        """
        result: Any = image.clone()
        for number, step in enumerate(self.steps):
            own_seed = random.Random(f"{int(seed)} {number}").getrandbits(64)
            if isinstance(step, Part):
                drawn = step.draw(torch.Generator().manual_seed(own_seed))
                result = step.transform(result, drawn and {**drawn, "size": size})
            else:
                with GLOBAL_GENERATORS, _globally_seeded(own_seed), torch.no_grad():
                    result = step(result)
        return _check_result(result, self.name)


def resolve_augmentation(augment: Any) -> Augmentation | None:
    """Find what changes the training images.

    Parameters
    ----------
    augment : {"light", "standard", "aggressive", "industrial"}, callable or None
        A policy, or a transform that takes a uint8 tensor (3, H, W) and returns one, of any height
        and width (float pixels of 0-1 are converted): torchvision's, a module, a function.
        `None` changes nothing. An `Augmentation` is taken as it is, so that a function of your own,
        resolved once, counts as the same one in every fit.

        - `"light"`: small turns, shifts and zooms, a little light. No mirror images: for digits.
        - `"standard"`: more of each, and mirror images. For photographs.
        - `"aggressive"`: still more, and shear, color, blur, hidden parts. For few images.
        - `"industrial"`: a fixed camera whose lighting, focus, sensor and colors vary; small
          turns, and mirror images.

    Raises
    ------
    ValueError, TypeError
        Where it is none of these.

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


def count_views(augmentation: Augmentation | None, n_views: Any) -> int | None:
    """Tell how many copies of each image are cached; `None` where every epoch makes fresh ones.

    Examples
    --------
    >>> count_views(resolve_augmentation("industrial"), "auto")
    7
    >>> count_views(None, 5)
    0
    """
    if augmentation is None:
        return 0
    if n_views == "auto":
        known = augmentation.steps == _STEPS.get(augmentation.name)  # not a user's of that name
        return _COPIES.get(augmentation.name, _FEW_COPIES) if known else _FEW_COPIES
    return n_views


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
        raise ValueError(f"Got shape {tuple(pixels.shape)}, {expected}; for gray, append v2.RGB()")
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = pixels.min().item(), pixels.max().item()
    if not (pixels.is_floating_point() and 0 <= low <= high <= 1):
        raise ValueError(
            f"Got {pixels.dtype} from {low:.3g} to {high:.3g}, {expected}, or floats from 0 to 1; "
            "leave out v2.Normalize, since images are normalized afterwards"
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


_SMALL: dict[str, Any] = {"rotation": 5, "shift": 0.05, "zoom": (0.95, 1.05)}
_STEPS: dict[str, tuple[Part, ...]] = {
    "light": (Geometry(**_SMALL), Lighting((0.9, 1.1), (0.9, 1.1))),
    "standard": (Geometry(12, 0.08, (0.85, 1.2), flip=0.5), Lighting((0.8, 1.2), (0.8, 1.2))),
    "aggressive": (
        Geometry(20, 0.12, (0.7, 1.4), aspect=(0.8, 1.25), shear=8, flip=0.5),
        Lighting((0.7, 1.3), (0.7, 1.3)),
        ColorLoss(keep=(0.5, 1.5), gray=0.1),
        Blur(p=0.2),
        Erase(p=0.4),
    ),
    # One or two things are wrong with most copies: what is wrong alone is learned from those.
    "industrial": (
        Geometry(**_SMALL, flip=0.5),
        Lighting((0.5, 1.3), (0.8, 1.2), gamma=(0.7, 1.5), gradient=0.4, p=0.4),
        Blur(defocus=0.04, motion=0.06, p=0.35),
        SensorNoise(shot=0.1, read=0.12, grain=0.01, p=0.35),
        ColorLoss(gray=0.5, p=0.35),
    ),
}
