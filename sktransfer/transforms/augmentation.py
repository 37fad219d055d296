"""Augmentation: an image and a seed -> a changed copy; policies, their parts, users' transforms.

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

# Part of every digest. Raise it whenever the same seed gives another image than before.
_AUGMENTATION_VERSION = 4

# Code of these is identified by its name; torchvision's version is part of the digest too.
_LIBRARIES = sys.stdlib_module_names | {"PIL", "numpy", "sktransfer", "torch", "torchvision"}


@dataclass(frozen=True)
class Augmentation:
    """Changes images at random, and the same way each time for the same seed.

    Made by `resolve_augmentation`. The parts of the policies use their own random generators and
    run on several threads at once. Any other transform runs on one thread at a time, with the
    global generators of torch, numpy and `random` seeded for it and restored afterwards.

    Parameters
    ----------
    name : str
        Of the policy, or of the user's transform.
    steps : tuple of callable
        Each takes the result of the one before it, and has its own random numbers.
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
        What it does and what it is for, in a line or two of the documentation.
    """

    steps: tuple[Callable[[Any], Any], ...]
    n_views: int
    doc: str


POLICIES: dict[str, Policy] = {}


def register_policy(name: str, policy: Policy) -> None:
    """Add a policy under a new name, which `resolve_augmentation` and the estimators then take.

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
        doc="small turns, shifts and zooms, a little light. No mirror images: for digits.",
    ),
)
register_policy(
    "standard",
    Policy(
        (Geometry(12, 0.08, (0.85, 1.2), flip=0.5), Lighting((0.8, 1.2), (0.8, 1.2))),
        n_views=_DEFAULT_N_VIEWS,
        doc="more of each, and mirror images. For photographs.",
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
        doc="still more, and shear, color, blur, hidden parts. For few images.",
    ),
)
register_policy(
    "industrial",
    # Most copies show one or two of the distortions; those with one teach it alone.
    Policy(
        (
            Geometry(**_SMALL_GEOMETRY, flip=0.5),
            Lighting((0.5, 1.3), (0.8, 1.2), gamma=(0.7, 1.5), gradient=0.4, p=0.4),
            Blur(defocus=0.04, motion=0.06, p=0.35),
            SensorNoise(shot=0.1, read=0.12, grain=0.01, p=0.35),
            ColorLoss(gray=0.5, p=0.35),
        ),
        n_views=7,  # there are more distortions to see
        doc="a fixed camera whose lighting, focus, sensor and colors vary; small turns, and "
        "mirror images.",
    ),
)


def _list_policies(docstring: str) -> str:
    """Fill the policies and their descriptions into a docstring."""
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
        `None` changes nothing. An `Augmentation` is taken as it is, so that a function of your own,
        resolved once, counts as the same one in every fit.

        POLICY_LIST

    Raises
    ------
    ValueError, TypeError
        If it is none of these.

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


# Derived, so that the docstring names each policy that this module registers.
if resolve_augmentation.__doc__:  # Python leaves docstrings out with -OO
    resolve_augmentation.__doc__ = _list_policies(resolve_augmentation.__doc__)


def resolve_n_views(augmentation: Augmentation | None, n_views: Any) -> int | None:
    """Return how many augmented views of each image are cached; `None`: new ones in every epoch.

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


def _policy_digest(name: str, steps: tuple[Callable[[Any], Any], ...]) -> bytes:
    """Digest a policy: parts by their settings, other steps as users' transforms."""
    return _digest(
        name, tuple(step if isinstance(step, Part) else _identify(step) for step in steps)
    )


def _digest(*described: object) -> bytes:
    return hashlib.blake2b(
        repr((_AUGMENTATION_VERSION, *described)).encode(), digest_size=16
    ).digest()


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
