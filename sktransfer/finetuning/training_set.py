"""Labeled images: in an order of their own, each once, and what is held out of them.

Shapes: N images, K classes.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass

import numpy as np

from sktransfer.data.images import Images
from sktransfer.data.labels import EncodedLabels
from sktransfer.finetuning.task import Task


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
    def of(cls, images: Images, labels: EncodedLabels) -> TrainingSet:
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
        merged = cls.of(images, EncodedLabels(np.array([0]), zeros, ones, ones, rows))
        ones = np.ones(len(merged.y))
        return cls(merged.images, merged.y, ones, ones)

    def take(self, rows: np.ndarray) -> TrainingSet:
        """Select images."""
        images = self.images.take(rows)
        return TrainingSet(images, self.y[rows], self.counts[rows], self.weights[rows])

    def digest(self) -> str:
        """Identify images, labels and weights."""
        digest = hashlib.blake2b(self.y.tobytes() + self.weights.tobytes(), digest_size=16)
        for row in range(len(self.images)):
            digest.update(self.images.fingerprint(row))
        return digest.hexdigest()


def split_validation(
    examples: TrainingSet, fraction: float, seed: int, task: Task
) -> tuple[TrainingSet, TrainingSet | None]:
    """Split off a validation set, as the task divides its targets.

    Parameters
    ----------
    examples : TrainingSet
    fraction : float
        0 holds nothing out.
    seed : int
    task : Task

    Returns
    -------
    train : TrainingSet
    valid : TrainingSet or None

    Warns
    -----
    UserWarning
        If some class has too few images to hold any out.
    """
    if fraction == 0:
        return examples, None
    valid, problem = task.validation_rows(examples.y, fraction, seed)
    if problem:
        warnings.warn(problem, stacklevel=3)
    if not len(valid):
        return examples, None
    return examples.take(np.setdiff1d(np.arange(len(examples.y)), valid)), examples.take(valid)
