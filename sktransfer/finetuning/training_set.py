"""Labeled images: in an order of their own, each once, and what is held back of them.

Shapes: N images, K classes.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass

import numpy as np

from sktransfer.data.images import Images
from sktransfer.data.labels import Labels

# Images of a class that stay in training at least; a class with no more gives none away.
_KEPT = 2
# A class of fewer images makes a set tiny.
_TINY = 10


@dataclass(frozen=True)
class TrainingSet:
    """Labeled images.

    Parameters
    ----------
    images : Images of length N
    y : ndarray of shape (N,)
        Class numbers, 0 to K - 1.
    counts : ndarray of shape (N,)
        How many images each stands for: its sample weight.
    weights : ndarray of shape (N,)
        How much each matters: the same, times the weight of its class.
    """

    images: Images
    y: np.ndarray
    counts: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, images: Images, labels: Labels) -> TrainingSet:
        """Put images in an order that follows from what they are, and merge equal ones.

        A weight of 2 is then the same as an image that comes twice, and the order of the rows
        does not matter: a fit is the same, to the last bit.

        Raises
        ------
        ImageError
            For a missing file or an item that is no image.
        """
        keys = [
            (images.order_key(row), number)
            for row, number in zip(labels.rows, labels.y, strict=True)
        ]
        merged: dict[tuple[bytes, int], list[int]] = {}
        for place, key in enumerate(keys):
            merged.setdefault(key, []).append(place)
        places = [merged[key] for key in sorted(merged)]
        first = np.array([same[0] for same in places])
        counts = np.array([math.fsum(labels.sample_weight[same]) for same in places])
        weights = counts * (labels.weights / labels.sample_weight)[first]
        return cls(images.take(labels.rows[first]), labels.y[first], counts, weights)

    @classmethod
    def unlabeled(cls, images: Images, rows: np.ndarray) -> TrainingSet:
        """Put images in the same kind of order, each once; their class is 0, and says nothing."""
        zeros, ones = np.zeros(len(rows), int), np.ones(len(rows))
        merged = cls.of(images, Labels(np.array([0]), zeros, ones, ones, rows))
        ones = np.ones(len(merged.y))
        return cls(merged.images, merged.y, ones, ones)

    def take(self, rows: np.ndarray) -> TrainingSet:
        """Select images."""
        images = self.images.take(rows)
        return TrainingSet(images, self.y[rows], self.counts[rows], self.weights[rows])

    @property
    def tiny(self) -> bool:
        """Whether some class has fewer than 10 images, so that defaults regularize more."""
        return bool(np.bincount(self.y, weights=self.counts).min() < _TINY)

    def digest(self) -> str:
        """Identify images, labels and weights."""
        digest = hashlib.blake2b(self.y.tobytes() + self.weights.tobytes(), digest_size=16)
        for row in range(len(self.images)):
            digest.update(self.images.fingerprint(row))
        return digest.hexdigest()


def hold_back(
    examples: TrainingSet, fraction: float, seed: int, classes: np.ndarray
) -> tuple[TrainingSet, TrainingSet | None]:
    """Choose images for validation: of each class the same share, and at least one.

    A class of no more than two images gives none away, with a warning.

    Parameters
    ----------
    examples : TrainingSet
    fraction : float
        0 holds nothing back.
    seed : int
    classes : ndarray of shape (K,)
        The labels, for the warning.

    Returns
    -------
    train : TrainingSet
    valid : TrainingSet or None
    """
    if fraction == 0:
        return examples, None
    rng = np.random.default_rng(seed)
    held, small = [], []
    for number, label in enumerate(classes.tolist()):
        rows = rng.permutation(np.flatnonzero(examples.y == number))
        count = min(max(1, round(fraction * len(rows))), len(rows) - _KEPT)
        if count < 1:
            small.append(repr(label))
        held.append(rows[: max(0, count)])
    if small:
        warnings.warn(
            f"Got no more than {_KEPT} images of the classes {', '.join(small)}: too few to hold "
            "one back, so validation does without these classes. Give more images, pass X_val "
            "and y_val, or set early_stopping=False to train on everything",
            stacklevel=3,
        )
    valid = np.sort(np.concatenate(held))
    if not len(valid):
        return examples, None
    return examples.take(np.setdiff1d(np.arange(len(examples.y)), valid)), examples.take(valid)
