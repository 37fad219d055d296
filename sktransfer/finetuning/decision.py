"""The decision of a fit: which blocks it trains and how, from what is known before training.

Shapes: N images, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from sktransfer.finetuning.schedule import resolve_stages, train_all

# Images are different from the pretraining images if their mean inter-class cosine is at least
# DIFFERENT, and many if their mean number per class is at least MANY. benchmarks/_sets.py has the
# data sets on which these thresholds were chosen, and those on which they were tested.
DIFFERENT, MANY = 0.45, 5

# The strategy for each case (many, different).
CHOICES = {
    (False, False): "frozen",
    (True, False): "staged",
    (False, True): "full",
    (True, True): "full",
}

# A description of each strategy.
STRATEGIES = {
    "frozen": "a linear classifier on frozen embeddings",
    "staged": "fit the head, then tune the last blocks",
    "full": "fit the head, then tune all blocks",
    "scratch": "train all blocks from random weights",
}

# The reason for each strategy.
REASONS = {
    "frozen": "With so few photographs, tuning does not help; a fit without it takes seconds.",
    "staged": "The network's features suit these images, so only its last blocks are tuned.",
    "full": "The first blocks were trained on photographs and must change too, so all are tuned.",
    "scratch": "Got weights=None, so there are no pretrained weights to keep.",
}

# Parameters that a fit decides if they are "auto".
DECIDED = ("unfreeze", "augment", "max_epochs", "lr")

# Maximum number of images that are measured, and minimum number of images of each class.
MAX_MEASURED, MIN_PER_CLASS = 2000, 10

# Share of the parameters that the last blocks have.
_TUNED_SHARE = 0.5

# Learning rate and epochs of a stage that trains all blocks, and of one that trains some of them.
_TRAIN_ALL, _TRAIN_SOME = (3e-3, 10), (3e-3, 6)
# The latter with fewer than MANY_IMAGES images, which need more epochs.
_TRAIN_SOME_ON_FEW = (1e-3, 12)
MANY_IMAGES = 200


class Decision(NamedTuple):
    """A case and its strategy; see `StrategyReport`."""

    many: bool
    different: bool
    strategy: str


@dataclass(frozen=True)
class FitDecision:
    """What a fit decided, and why.

    Parameters
    ----------
    parameters : dict of str to object
        The values used for the parameters that were `"auto"`. The same fit with these values gives
        the same result.
    strategy : {"frozen", "staged", "full", "scratch"} or None
        None if `unfreeze` was given.
    images_per_class : float
        Mean over the classes.
    mean_interclass_cosine : float or None
        Mean cosine between the embeddings of different classes; None if nothing depended on it.
    class_counts : tuple of int or None
        Number of training images of each class, in the order of the classes; None in models that
        were saved before it was recorded.
    """

    parameters: Mapping[str, Any]
    strategy: str | None
    images_per_class: float
    mean_interclass_cosine: float | None
    class_counts: tuple[int, ...] | None = None

    def describe(self) -> str:
        """Return the decided values, as they are written in a call."""
        return ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())

    def __str__(self) -> str:
        facts = [f"{self.images_per_class:.3g} images per class"]
        if self.mean_interclass_cosine is not None:
            facts.append(f"cosine between classes {self.mean_interclass_cosine:.2f}")
        reason = f" {REASONS[self.strategy]}" if self.strategy else ""
        decided = self.describe() or "Nothing was decided: all values were given"
        return f"{decided} ({', '.join(facts)}).{reason}"


def decide(images_per_class: float, mean_interclass_cosine: float, pretrained: bool) -> Decision:
    """Return the case of a data set, and the strategy for it.

    Parameters
    ----------
    images_per_class : float
        Mean over the classes.
    mean_interclass_cosine : float
        See `ProbeResults`.
    pretrained : bool
        False if the network has random weights.

    Examples
    --------
    >>> decide(4, 0.2, pretrained=True)
    Decision(many=False, different=False, strategy='frozen')
    """
    many, different = images_per_class >= MANY, mean_interclass_cosine >= DIFFERENT
    return Decision(many, different, CHOICES[many, different] if pretrained else "scratch")


def needs_embeddings(estimator: Any) -> bool:
    """Return whether a decision depends on embeddings of the training images."""
    return is_auto(estimator.augment) or (
        is_auto(estimator.unfreeze) and estimator.weights is not None
    )


def measured_boundary(estimator: Any, blocks: Sequence[tuple[str, nn.Module]]) -> int:
    """Return the boundary through which images are embedded for a decision.

    It is the one that tuning would use, whose activations a fit then finds in the store.
    """
    unfreeze = stages_of("staged", blocks) if is_auto(estimator.unfreeze) else estimator.unfreeze
    stages = resolve_stages(unfreeze, [name for name, _ in blocks])
    return stages[-1].boundary or len(blocks)


def decide_parameters(
    estimator: Any,
    blocks: Sequence[tuple[str, nn.Module]],
    counts: np.ndarray,
    mean_interclass_cosine: float | None,
) -> FitDecision:
    """Decide those parameters of an estimator that are `"auto"`.

    Parameters
    ----------
    estimator : FineTunedEstimator
        Only its parameters are read.
    blocks : sequence of (str, nn.Module)
        Of the backbone.
    counts : ndarray of shape (K,)
        Number of training images of each class.
    mean_interclass_cosine : float or None
        None if `needs_embeddings` is False.
    """
    cosine = 0.0 if mean_interclass_cosine is None else mean_interclass_cosine
    case = decide(counts.mean(), cosine, estimator.weights is not None)
    if case.strategy == "frozen" and estimator.domain_adversarial:
        case = case._replace(strategy="staged")  # an adversary needs blocks to train
    unfreeze = estimator.unfreeze
    if is_auto(unfreeze):
        unfreeze = stages_of(case.strategy, blocks)
    stages = resolve_stages(unfreeze, [name for name, _ in blocks])
    lr, epochs = choose_training(train_all(stages), int(counts.sum()))
    values = {
        "unfreeze": unfreeze,
        "augment": "light" if case.different else "standard",
        "max_epochs": epochs,
        "lr": lr,
    }
    decided = {name: values[name] for name in DECIDED if is_auto(getattr(estimator, name))}
    return FitDecision(
        decided,
        case.strategy if "unfreeze" in decided else None,
        float(counts.mean()),
        mean_interclass_cosine,
        tuple(counts.tolist()),
    )


def choose_training(all_blocks: bool, n_images: int) -> tuple[float, int]:
    """Return the learning rate and the number of epochs of a stage.

    Parameters
    ----------
    all_blocks : bool
        Whether the stage trains all blocks.
    n_images : int
        Number of training images.
    """
    if all_blocks:
        return _TRAIN_ALL
    return _TRAIN_SOME if n_images >= MANY_IMAGES else _TRAIN_SOME_ON_FEW


def stages_of(strategy: str, blocks: Sequence[tuple[str, nn.Module]]) -> Any:
    """Return the value of `unfreeze` for a strategy."""
    if strategy == "frozen":
        return (0,)
    if strategy == "staged":
        return (0, count_last_blocks(blocks))
    return (0, "all") if strategy == "full" else ("all",)


def count_last_blocks(blocks: Sequence[tuple[str, nn.Module]]) -> int:
    """Return the smallest number of last blocks that have half of the parameters of all.

    Examples
    --------
    >>> count_last_blocks([("a", nn.Linear(9, 9)), ("b", nn.Linear(9, 9)), ("c", nn.Linear(9, 9))])
    2
    """
    sizes = [sum(weight.numel() for weight in block.parameters()) for _, block in blocks]
    shares = np.cumsum(sizes[::-1]) / max(1, sum(sizes))
    return int(np.argmax(shares >= _TUNED_SHARE)) + 1


def with_decision(estimator: Any, decision: FitDecision) -> Any:
    """Return a shallow copy of an estimator that has the decided values."""
    decided = copy.copy(estimator)
    for name, value in decision.parameters.items():
        setattr(decided, name, value)
    return decided


def is_auto(value: Any) -> bool:
    """Return whether a parameter is `"auto"`."""
    return isinstance(value, str) and value == "auto"


def sample_rows(codes: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows to measure: all of them, or the same share of each class."""
    share = min(1.0, MAX_MEASURED / len(codes))
    rng = np.random.default_rng(seed)
    chosen = []
    for code in range(codes.max() + 1):
        rows = rng.permutation(np.flatnonzero(codes == code))
        chosen.append(rows[: max(MIN_PER_CLASS, round(share * len(rows)))])
    return np.sort(np.concatenate(chosen))


def mean_interclass_cosine(embeddings: np.ndarray, codes: np.ndarray) -> float:
    """Compute the mean cosine between classes, with the same weight for each pair of classes.

    Parameters
    ----------
    embeddings : ndarray of shape (N, D)
    codes : ndarray of shape (N,)
        Class numbers, 0 to K - 1.

    Examples
    --------
    >>> mean_interclass_cosine(np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]]), np.array([0, 0, 1]))
    0.6
    """
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(lengths > 0, lengths, 1)
    means = np.stack([unit[codes == code].mean(axis=0) for code in range(codes.max() + 1)])
    if len(means) == 1:
        return 0.0
    cosines = means @ means.T
    return float(cosines[~np.eye(len(means), dtype=bool)].mean())
