"""What the parameters of `FineTunedImageClassifier` may be, and what follows from them alone."""

from __future__ import annotations

import hashlib
import warnings
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer._config import resolve_device, resolve_precision
from sktransfer._errors import check_choice, check_number
from sktransfer._version import __version__
from sktransfer.augmentation import resolve_augmentation
from sktransfer.backbones import Backbone
from sktransfer.engines import ENGINES
from sktransfer.examples import Examples
from sktransfer.training import resolve_optimizer

# How much slower than the head the blocks should learn at least.
SAFE_DROP = 10.0
# Kind, least and greatest value of the parameters that are numbers.
_RANGES: dict[str, tuple[Any, float, float | None]] = {
    "max_epochs": (Integral, 1, None),
    "batch_size": (Integral, 1, None),
    "n_iter_no_change": (Integral, 1, None),
    "lr": (Real, 0, None),
    "lr_drop": (Real, 1, None),
    "lr_decay": (Real, 1, None),
    "dropout": (Real, 0, 1),
    "label_smoothing": (Real, 0, 1),
    "mixup": (Real, 0, None),
    "validation_fraction": (Real, 0, 1),
}

# What a fit does not depend on, or what its checkpoint knows by other means.
_APART = {
    "augment",
    "backbone",
    "cache",
    "callbacks",
    "checkpoint_dir",
    "device",
    "engine",
    "image_shape",
    "n_jobs",
    "pixel_range",
    "random_state",
    "verbose",
    "weights",
}


def check_parameters(estimator: Any) -> None:
    """Validate what does not depend on the data, and warn of rates that destroy features.

    Raises
    ------
    ValueError
        Naming the parameter, what it is, and what it may be.
    """
    check_choice("batch_norm", estimator.batch_norm, ["frozen", "adapt", "train"])
    check_choice("engine", estimator.engine, ["auto", *ENGINES])
    resolve_optimizer(estimator.optimizer)
    resolve_precision(estimator.precision, resolve_device(estimator.device))
    for name, (kind, low, high) in _RANGES.items():
        check_number(name, getattr(estimator, name), kind, low, high)
    if estimator.n_views is not None:
        check_number("n_views", estimator.n_views, Integral, 0)
    if estimator.weight_decay != "auto":
        check_number("weight_decay", estimator.weight_decay, Real, 0)
    if estimator.lr_drop < SAFE_DROP and estimator.weights is not None:
        warnings.warn(
            f"Got lr_drop={estimator.lr_drop:g}, so the blocks learn at "
            f"{estimator.lr / estimator.lr_drop:g}, less than {SAFE_DROP:g} times slower than the "
            f"head ({estimator.lr:g}): large early steps destroy pretrained features faster than "
            f"the head learns to use them; use lr_drop={SAFE_DROP:g} or more",
            stacklevel=4,
        )


def draw_seed(random_state: Any) -> int:
    """Make a seed of what scikit-learn calls a random state; the global one stays untouched.

    Raises
    ------
    ValueError
        Where it is none.
    """
    if random_state is None:
        return int(np.random.default_rng().integers(2**63))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if isinstance(random_state, Integral) and int(random_state) >= 0:
        return int(random_state)
    raise ValueError(
        f"Got random_state={random_state!r}, but expected None, an int that is not negative, or a "
        "numpy.random.RandomState"
    )


def checkpoint_of(
    estimator: Any, seed: int, backbone: Backbone, train: Examples, valid: Examples | None
) -> Path | None:
    """Find the file of a fit in its `checkpoint_dir`: other parameters or data, another file."""
    if estimator.checkpoint_dir is None:
        return None
    ours = estimator.get_params(deep=False)
    augmentation = resolve_augmentation(estimator.augment)
    parts = [
        __version__,
        repr(sorted((name, str(value)) for name, value in ours.items() if name not in _APART)),
        backbone.digest.hex(),
        "" if augmentation is None else augmentation.digest.hex(),
        # A fit without a seed goes on with the one that it drew.
        "" if estimator.random_state is None else str(seed),
        *(examples.digest() for examples in (train, valid) if examples is not None),
    ]
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    return Path(estimator.checkpoint_dir).expanduser() / f"{name}.pt"
