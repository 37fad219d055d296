"""Inputs of a fit: checked parameters, backbone, validation images, target images, checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer._version import __version__
from sktransfer.adaptation.batch_norm import adapt_batch_norm
from sktransfer.backbones.batch_norm import check_batch_norm
from sktransfer.backbones.loading import Backbone, load_backbone
from sktransfer.backbones.source import BackboneSource
from sktransfer.data.images import Images
from sktransfer.data.labels import EncodedLabels, check_one_per_image
from sktransfer.data.validation import check_images
from sktransfer.embedding.compute import ComputeConfig, check_shared_parameters
from sktransfer.embedding.recipe import recipe_at
from sktransfer.engines.batch_size import MAX_BATCH_SIZE
from sktransfer.finetuning.activations import ViewActivations
from sktransfer.finetuning.checkpoint import load_checkpoint
from sktransfer.finetuning.decision import (
    FitDecision,
    decide_parameters,
    is_auto,
    mean_interclass_cosine,
    measured_boundary,
    needs_embeddings,
    sample_rows,
)
from sktransfer.finetuning.fit_data import X_VAL
from sktransfer.finetuning.plan import held_out_fraction
from sktransfer.finetuning.schedule import resolve_stages
from sktransfer.finetuning.task import Task
from sktransfer.finetuning.train_stage import check_callbacks, resolve_optimizer
from sktransfer.finetuning.training_set import TrainingSet, split_validation
from sktransfer.transforms.augmentation import Augmentation, resolve_augmentation
from sktransfer.transforms.loader import ImageErrors
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import (
    check_choice,
    check_directory,
    check_number,
    check_random_state,
    warn_user,
)
from sktransfer.utils.processes import ALONE, Processes
from sktransfer.utils.runtime import differ, resolve_device, resolve_threads

# Recommended minimum of lr_drop.
SAFE_DROP = 10.0
# Type, minimum and maximum of the numeric parameters.
_RANGES: dict[str, tuple[Any, float, float | None]] = {
    "max_epochs": (Integral, 1, None),
    "batch_size": (Integral, 1, MAX_BATCH_SIZE),
    "n_iter_no_change": (Integral, 1, None),
    "lr": (Real, 0, 10),
    "lr_drop": (Real, 1, None),
    "lr_decay": (Real, 1, None),
    "dropout": (Real, 0, 1),
    "label_smoothing": (Real, 0, 1),
    "mixup": (Real, 0, None),
    "domain_adversarial": (Real, 0, 100),
    "validation_fraction": (Real, 0, 1),
    "weight_decay": (Real, 0, 10),
    "averaging": (Real, 0, 1),
}
_OR_AUTO = {"lr", "max_epochs", "weight_decay", "averaging"}
# Parameters that must be above their minimum, or below their maximum.
_ABOVE, _BELOW = (
    {"lr", "validation_fraction"},
    {"dropout", "label_smoothing", "validation_fraction"},
)
_REMEDIES = {
    "lr": "good values are from 1e-4 to 1e-2",
    "validation_fraction": "to hold out no images, set early_stopping=False",
}
_MAX_VIEWS = 1000

# Parameters that do not change a fit, or that its checkpoint identifies in another way.
_NOT_IN_DIGEST = {
    "augment",
    "backbone",
    "background",
    "cache",
    "callbacks",
    "checkpoint_dir",
    "device",
    "engine",
    "image_shape",
    "n_jobs",
    "on_error",
    "pixel_range",
    "random_state",
    "verbose",
    "weights",
}


def check_parameters(estimator: Any) -> None:
    """Check parameters that do not depend on the data; warn about rates that destroy features.

    Raises
    ------
    ValueError
        If a parameter has a value that it cannot have.
    """
    check_choice("batch_norm", estimator.batch_norm, ["frozen", "adapt", "train"])
    check_choice("on_error", estimator.on_error, ["raise", "skip"])
    if not (
        isinstance(estimator.early_stopping, bool | np.bool_) or is_auto(estimator.early_stopping)
    ):
        raise ValueError(
            f"Got early_stopping={estimator.early_stopping!r}, but expected 'auto', True or False"
        )
    check_shared_parameters(estimator)
    resolve_optimizer(estimator.optimizer)
    if not is_auto(estimator.augment):
        resolve_augmentation(estimator.augment)
    _check_numbers(estimator)
    check_random_state(estimator.random_state)
    _check_class_weight(getattr(estimator, "class_weight", None))
    check_callbacks(estimator.callbacks)
    if estimator.checkpoint_dir is not None:
        check_directory("checkpoint_dir", estimator.checkpoint_dir, besides="a directory or None")
    if estimator.lr_drop < SAFE_DROP and estimator.weights is not None:
        warn_user(
            f"Got lr_drop={estimator.lr_drop:g}, so the learning rate of the last block is more "
            "than a tenth of that of the head. Large steps can destroy pretrained features before "
            f"the head has learned to use them; use lr_drop={SAFE_DROP:g} or more",
        )


def _check_numbers(estimator: Any) -> None:
    for name, (kind, low, high) in _RANGES.items():
        value, besides = getattr(estimator, name), "'auto'" if name in _OR_AUTO else ""
        if besides and is_auto(value):
            continue
        check_number(
            name,
            value,
            kind,
            low,
            high,
            above_low=name in _ABOVE,
            below_high=name in _BELOW,
            besides=besides,
            remedy=_REMEDIES.get(name, ""),
        )
    n_views = estimator.n_views
    if n_views is not None and not is_auto(n_views):
        check_number("n_views", n_views, Integral, 0, _MAX_VIEWS, besides="'auto', None")


def _check_class_weight(class_weight: Any) -> None:
    """Check the weights themselves; `check_labels` checks whether they fit the labels."""
    if not isinstance(class_weight, Mapping):
        besides = "a dict with the weight of each class"
        check_choice("class_weight", class_weight, ["balanced", None], besides=besides)
        return
    for label, weight in class_weight.items():
        check_number(
            f"class_weight[{label!r}]",
            weight,
            Real,
            0,
            above_low=True,
            remedy="to ignore a class, leave out its images",
        )


def draw_seed(random_state: Any) -> int:
    """Derive a seed from `random_state`, without use of the global random state.

    Raises
    ------
    ValueError
        If it is neither None, an int nor a RandomState.
    """
    check_random_state(random_state)
    if random_state is None:
        return int(np.random.default_rng().integers(2**63))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    return int(random_state)


def resolve_validation(
    estimator: Any, X_val: Any, y_val: Any, task: Task, rows: np.ndarray | None = None
) -> TrainingSet | None:
    """Resolve the validation images given to `fit`, if any; `rows` are used, None means all.

    Raises
    ------
    ValueError
        If only one of `X_val` and `y_val` is given, or they do not fit the training data.
    """
    if (X_val is None) != (y_val is None):
        raise ValueError("Got only one of X_val and y_val; pass both or neither")
    if X_val is None:
        return None
    images = check_images(estimator, X_val, reset=False).of_argument(X_VAL)
    check_one_per_image("y_val", y_val, images)
    ones = np.ones(len(images))
    valid = TrainingSet(images, task.encode(y_val), ones, ones)
    return valid if rows is None else valid.take(rows)


def train_and_valid(
    estimator: Any, labeled: TrainingSet, valid: TrainingSet | None, seed: int, task: Task
) -> tuple[TrainingSet, TrainingSet | None]:
    """Return training and validation images; hold some out if no validation images are given."""
    if valid is not None:
        return labeled, valid
    fraction = held_out_fraction(estimator, len(labeled.y))
    return split_validation(labeled, fraction, seed, task)


def resolve_target(estimator: Any, images: Images, labels: EncodedLabels) -> TrainingSet | None:
    """Resolve the images of the target domain, if the fit uses them.

    Raises
    ------
    ValueError
        If there are none for `domain_adversarial`.
    """
    if not len(labels.target):
        if not estimator.domain_adversarial:
            return None
        raise ValueError(
            f"Got domain_adversarial={estimator.domain_adversarial:g}, but no images of a target "
            "domain; pass sample_domain to fit, positive for labeled images of the source and "
            "negative for unlabeled images of the target, or set domain_adversarial=0"
        )
    return TrainingSet.unlabeled(images, labels.target) if uses_target(estimator) else None


def uses_target(estimator: Any) -> bool:
    """Return whether a fit reads the images of a target domain."""
    return bool(estimator.domain_adversarial) or estimator.batch_norm == "adapt"


def load_fit_backbone(
    estimator: Any,
    labeled: TrainingSet,
    target: TrainingSet | None,
    processes: Processes = ALONE,
) -> tuple[Backbone, BackboneSource]:
    """Load the backbone of a fit, and adapt its BatchNorm statistics if requested.

    The main process estimates the statistics. If there are target images, the statistics are
    adapted after training instead.
    """
    backbone = load_backbone(estimator.backbone, estimator.weights)
    # Before images are read, so that an error is raised early.
    if not is_auto(estimator.unfreeze):
        resolve_stages(estimator.unfreeze, backbone.block_list.names)
    size = backbone.image_size_for(estimator.image_size, labeled.images)
    source = BackboneSource(estimator.backbone, estimator.weights, size, None, backbone.digest)
    if estimator.batch_norm != "adapt":
        return backbone, source
    check_batch_norm(backbone)
    if target is not None:
        return backbone, source
    adapted = processes.from_main(
        lambda: adapt_batch_norm(
            backbone,
            Views(labeled.images, source.preprocessing_of(backbone)),
            resolve_device(estimator.device),
            resolve_threads(estimator.n_jobs),
            ImageErrors("raise"),
        )
    )
    source = replace(source, batch_norm=adapted)
    return source.adapted(backbone), source


def make_decision(
    estimator: Any,
    backbone: Backbone,
    preprocessing: Preprocessing,
    labeled: TrainingSet,
    task: Task,
    compute: ComputeConfig,
    verbose: int,
) -> FitDecision:
    """Decide the parameters that are `"auto"`, from the labeled images."""
    blocks = backbone.block_list.blocks
    codes, cosine = task.class_numbers(labeled.y), None
    if needs_embeddings(estimator):
        rows = sample_rows(codes, 0)
        activations = ViewActivations(
            Views(labeled.images.take(rows), preprocessing),
            lambda boundary: recipe_at(backbone, preprocessing, boundary, compute.precision),
            measured_boundary(estimator, blocks),
            compute,
            verbose,
        )
        embeddings = activations.at(len(blocks)).values
        cosine = mean_interclass_cosine(embeddings, codes[rows])
    return decide_parameters(estimator, blocks, np.bincount(codes), cosine)


def resolve_checkpoint(
    estimator: Any, seed: int, backbone: Backbone, *image_sets: TrainingSet | None
) -> tuple[Path | None, int]:
    """Return the file of a fit in its `checkpoint_dir`, and the seed to use.

    The file's name depends on parameters and data. A resumed fit without a `random_state` takes
    the seed that it drew at its start, instead of the one it has drawn now.
    """
    if estimator.checkpoint_dir is None:
        return None, seed
    augmentation = resolve_augmentation(estimator.augment)
    parts = [
        __version__,
        _describe_parameters(estimator),
        backbone.digest.hex(),
        "" if augmentation is None else _identify(estimator.augment, augmentation),
        "" if estimator.random_state is None else str(seed),
        *("" if images is None else images.digest() for images in image_sets),
    ]
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    path = Path(estimator.checkpoint_dir).expanduser() / f"{name}.pt"
    checkpoint = load_checkpoint(path) if estimator.random_state is None else None
    return path, checkpoint["seed"] if checkpoint else seed


def check_same_inputs(
    processes: Processes, estimator: Any, *image_sets: TrainingSet | None
) -> None:
    """Check the parameters and the data of processes that train together.

    Raises
    ------
    ValueError
        If they differ, or the `device` of the estimator is not that of the process.
    """
    device = resolve_device(estimator.device)
    if processes.device is not None and differ(device, processes.device):
        raise ValueError(
            f"Got device={str(estimator.device)!r}, which is {str(device)!r} here, but this "
            f"process was started for {str(processes.device)!r}; set device='auto' for GPUs, and "
            "device='cpu' for CPUs"
        )
    digests = [b"" if images is None else images.order_digest() for images in image_sets]
    inputs = [_describe_parameters(estimator).encode(), *digests]
    if any(other != inputs for other in processes.gather(inputs)):
        raise ValueError(
            f"Got other parameters, images, labels or weights in some of the {processes.count} "
            "processes, but all must call fit with the same ones. Pass random_state to functions "
            "that shuffle or split, and use the same paths on all machines"
        )


def _describe_parameters(estimator: Any) -> str:
    """Return the parameters that change a fit, in one line."""
    parameters = estimator.get_params(deep=False).items()
    used = sorted((name, str(value)) for name, value in parameters if name not in _NOT_IN_DIGEST)
    return repr(used)


def _identify(augment: Any, augmentation: Augmentation) -> str:
    """Return a digest, or the name of a user's function, which is the same in every process."""
    known = isinstance(augment, str) or resolve_augmentation(augment) == augmentation
    return augmentation.digest.hex() if known else augmentation.name
