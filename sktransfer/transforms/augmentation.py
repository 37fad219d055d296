"""Augmentation: policies and users' transforms that map an image and a seed to a changed copy.

Shapes: an image is uint8 (3, H, W), RGB, 0-255, on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import random
import sys
import textwrap
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

# Augmented views of each image by default, for policies and users' transforms.
_DEFAULT_N_VIEWS = 3

# Part of every digest. Raise it whenever the same seed gives a different image.
_AUGMENTATION_VERSION = 5

# Code of these libraries is identified by its name; the digest includes torchvision's version.
_LIBRARIES = sys.stdlib_module_names | {"PIL", "numpy", "sktransfer", "torch", "torchvision"}


@dataclass(frozen=True)
class Augmentation:
    """A random change of images that is the same every time for the same seed.

    Built by `resolve_augmentation`. The parts of the policies use separate random generators and
    run on several threads at once. Any other transform runs on one thread at a time; the global
    generators of torch, numpy and `random` are seeded for it and restored afterwards.

    Parameters
    ----------
    name : str
        Name of the policy, or of the user's transform.
    steps : tuple of callable
        Each step takes the result of the previous one, and has its own random numbers.
    digest : bytes
        16 bytes that identify what is computed, in any process. They are random if the transform
        contains user-defined functions or classes: then only copies of this object share results.
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
            uint8, 0-255, RGB; not changed in place.
        seed : int
            Not negative.
        size : (int, int) or None
            Height and width of the center crop that will be taken, at most those of the image:
            the policies need not compute the rest.

        Returns
        -------
        Tensor of shape (3, h, w)
            uint8, 0-255, on the CPU. The policies keep the height and width, or return `size`.

        Raises
        ------
        TypeError, ValueError
            If a user's transform does not return an image.
        """
        result: Any = image.clone()
        for number, step in enumerate(self.steps):
            if isinstance(step, Part):
                drawn = self._draw(step, seed, number)
                result = step.transform(result, drawn and {**drawn, "size": size})
            else:
                step_seed = _seed_of_step(seed, number)
                with GLOBAL_GENERATORS, _globally_seeded(step_seed), torch.no_grad():
                    result = step(result)
        return _check_result(result, self.name)

    @property
    def mirrors(self) -> bool:
        """Whether it mirrors images, so a mirrored image keeps its label."""
        return any(isinstance(step, Geometry) and step.flip > 0 for step in self.steps)

    def draw(self, seed: int) -> list[dict[str, float]]:
        """Draw the random values of each part; all steps must be parts."""
        return [self._draw(step, seed, number) for number, step in enumerate(self.steps)]

    @staticmethod
    def _draw(step: Any, seed: int, number: int) -> dict[str, float]:
        return step.draw(torch.Generator().manual_seed(_seed_of_step(seed, number)))


@dataclass(frozen=True)
class Policy:
    """A named augmentation.

    Parameters
    ----------
    steps : tuple of Part or callable
        As in `Augmentation`. Parts run on several threads at once, other callables do not.
    n_views : int
        Augmented views of each image that are cached with `n_views="auto"`.
    doc : str
        Effect and purpose, in one or two lines for the documentation.
    """

    steps: tuple[Callable[[Any], Any], ...]
    n_views: int
    doc: str


POLICIES: dict[str, Policy] = {}


def register_policy(name: str, policy: Policy) -> None:
    """Register a policy under a new name for `resolve_augmentation` and the estimators.

    Parameters
    ----------
    name : str
    policy : Policy

    Raises
    ------
    ValueError
        If the name is taken.

    Examples
    --------
    >>> register_policy("grainy", Policy((SensorNoise(),), n_views=2, doc="Sensor noise only."))
    >>> resolve_augmentation("grainy").name
    'grainy'
    >>> del POLICIES["grainy"]
    """
    if name in POLICIES:
        raise ValueError(
            f"Got name={name!r}, but a policy of this name is registered; choose another name"
        )
    POLICIES[name] = policy


_SMALL_GEOMETRY: dict[str, Any] = {"rotation": 5, "shift": 0.05, "zoom": (0.95, 1.05)}

register_policy(
    "light",
    Policy(
        (Geometry(**_SMALL_GEOMETRY), Lighting((0.9, 1.1), (0.9, 1.1))),
        n_views=_DEFAULT_N_VIEWS,
        doc="small rotations, shifts and zooms, slight lighting changes, no mirroring. For digits.",
    ),
)
register_policy(
    "standard",
    Policy(
        (Geometry(12, 0.08, (0.85, 1.2), flip=0.5), Lighting((0.8, 1.2), (0.8, 1.2))),
        n_views=1,  # its activations are mirrored too, so each view counts as two
        doc="larger rotations, shifts, zooms and lighting changes, and mirroring. For photographs.",
    ),
)
register_policy(
    "aggressive",
    Policy(
        (
            Geometry(20, 0.12, (0.7, 1.4), aspect=(0.8, 1.25), shear=8, flip=0.5),
            Lighting((0.7, 1.3), (0.7, 1.3)),
            ColorLoss(keep=(0.5, 1.5), gray=0.1),
            Blur(p=0.2),
            Erase(p=0.4),
        ),
        n_views=_DEFAULT_N_VIEWS,
        doc="even larger changes, and shear, color, blur and erased parts. For few images.",
    ),
)
register_policy(
    "industrial",
    # Most views have one or two of the distortions, so that the network sees each alone, too.
    Policy(
        (
            Geometry(**_SMALL_GEOMETRY, flip=0.5),
            Lighting((0.5, 1.3), (0.8, 1.2), gamma=(0.7, 1.5), gradient=0.4, p=0.4),
            Blur(defocus=0.04, motion=0.06, p=0.35),
            SensorNoise(shot=0.1, read=0.12, grain=0.01, p=0.35),
            ColorLoss(gray=0.5, p=0.35),
        ),
        n_views=7,  # more than for other policies, as there are more distortions
        doc="a fixed camera with varying lighting, focus, sensor noise and colors; small "
        "rotations, and mirroring.",
    ),
)


def _list_policies(docstring: str) -> str:
    """Insert the policies and their descriptions into a docstring."""
    names = ", ".join(f'"{name}"' for name in POLICIES)
    lines = [
        textwrap.fill(f'- `"{name}"`: {policy.doc}', 91, subsequent_indent="  ")
        for name, policy in POLICIES.items()
    ]
    listed = textwrap.indent("\n".join(lines), " " * 8).lstrip()
    return docstring.replace("POLICY_NAMES", names).replace("POLICY_LIST", listed)


def resolve_augmentation(augment: Any) -> Augmentation | None:
    """Resolve the augmentation of the training images.

    Parameters
    ----------
    augment : {POLICY_NAMES}, callable or None
        A policy, or a transform that takes a uint8 tensor (3, H, W) and returns one, of any height
        and width (float pixels of 0-1 are converted): torchvision's, a module, a function.
        `None` changes nothing. An `Augmentation` is returned unchanged, so a user-defined function
        that is resolved once counts as the same function in every fit.

        POLICY_LIST

    Raises
    ------
    ValueError, TypeError
        If `augment` is none of these.

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
        steps = POLICIES[augment].steps
        return Augmentation(augment, steps, _policy_digest(augment, steps))
    if not callable(augment) or isinstance(augment, type):
        remedy = "; put them into a v2.Compose" if isinstance(augment, (list, tuple)) else ""
        remedy = f"; make one: {augment.__name__}(...)" if isinstance(augment, type) else remedy
        raise TypeError(
            f"Got augment={augment!r}, but expected one of {str(list(POLICIES))[1:-1]}, None, or "
            f"a transform that takes and returns a uint8 tensor of shape (3, H, W){remedy}"
        )
    name = getattr(augment, "__name__", type(augment).__name__)
    return Augmentation(name, tuple(_flatten(augment)), _identify(augment))


# Generated, so that the docstring lists every policy that this module registers.
if resolve_augmentation.__doc__:  # there are no docstrings with python -OO
    resolve_augmentation.__doc__ = _list_policies(resolve_augmentation.__doc__)


def resolve_n_views(augmentation: Augmentation | None, n_views: Any) -> int | None:
    """Return the number of cached augmented views of each image; `None`: new ones in every epoch.

    Examples
    --------
    >>> resolve_n_views(resolve_augmentation("industrial"), "auto")
    7
    >>> resolve_n_views(None, 5)
    0
    """
    if augmentation is None:
        return 0
    if n_views == "auto":
        policy = POLICIES.get(augmentation.name)
        # A user's transform may have the name of a policy.
        if policy is not None and policy.steps == augmentation.steps:
            return policy.n_views
        return _DEFAULT_N_VIEWS
    return n_views


def _seed_of_step(seed: int, number: int) -> int:
    return random.Random(f"{int(seed)} {number}").getrandbits(64)


@contextlib.contextmanager
def _globally_seeded(seed: int) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with seeded(seed):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _flatten(transform: Any) -> list[Callable[[Any], Any]]:
    """Flatten a Compose, so that policy parts in it can run on several threads."""
    if type(transform) not in (v1.Compose, v2.Compose):
        return [transform]
    return [step for inner in transform.transforms for step in _flatten(inner)]


def _check_result(result: Any, name: str) -> torch.Tensor:
    """Check the result of a transform, and convert it to uint8 (3, h, w) on the CPU."""
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


def _policy_digest(name: str, steps: tuple[Callable[[Any], Any], ...]) -> bytes:
    """Compute the digest of a policy: parts by their settings, other steps as users' transforms."""
    return _digest(
        name, tuple(step if isinstance(step, Part) else _identify(step) for step in steps)
    )


def _digest(*described: object) -> bytes:
    return hashlib.blake2b(
        repr((_AUGMENTATION_VERSION, *described)).encode(), digest_size=16
    ).digest()


def _identify(transform: Any) -> bytes:
    """Compute the digest of a user's transform; random if names and values do not determine it."""
    content = hashlib.blake2b()
    try:
        _Describer(content).dump(transform)
    except Exception:  # objects that cannot be pickled raise anything
        return random.SystemRandom().randbytes(16)
    return _digest(torchvision.__version__, content.hexdigest())


class _Describer(pickle.Pickler):
    """Writes equal objects equally in all processes; refuses code from outside `_LIBRARIES`."""

    def __init__(self, content: Any) -> None:
        super().__init__(SimpleNamespace(write=content.update), protocol=4)
        self.fast = True  # no memo, with which equal objects could be written differently

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            return str, (str(obj.dtype), tuple(obj.shape), obj.detach().cpu().tolist())
        is_code = isinstance(obj, (FunctionType, type))
        if is_code and obj.__module__.partition(".")[0] not in _LIBRARIES:
            raise pickle.PicklingError(f"the code of {obj.__qualname__} may change")
        return NotImplemented
