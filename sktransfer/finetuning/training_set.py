"""Training sets: labeled images without duplicates, in a fixed order, and the validation split.

Shapes: N images, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sktransfer.data.images import Images
from sktransfer.data.labels import EncodedLabels
from sktransfer.finetuning.task import Task
from sktransfer.utils.errors import ImageError, warn_user


@dataclass(frozen=True)
class TrainingSet:
    """Labeled images without duplicates.

    Parameters
    ----------
    images : Images of length N
    y : ndarray of shape (N,)
        Class numbers, 0 to K - 1.
    counts : ndarray of shape (N,)
        Sum of the sample weights of each image's duplicates.
    weights : ndarray of shape (N,)
        The same, multiplied by the weight of the class.
    """

    images: Images
    y: np.ndarray
    counts: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, images: Images, labels: EncodedLabels) -> TrainingSet:
        """Sort images by content and merge identical ones that have the same label.

        A sample weight of 2 is then equivalent to an image that occurs twice, and a fit does not
        depend on the order of the rows, bit for bit.

        Raises
        ------
        ImageError
            If items are not images; names all of them.
        """
        merged: dict[tuple[bytes, int], list[int]] = {}
        broken: list[ImageError] = []
        for index, (row, number) in enumerate(zip(labels.rows, labels.y, strict=True)):
            try:
                merged.setdefault((images.order_key(row), number), []).append(index)
            except ImageError as error:
                broken.append(error)
        if broken:
            raise ImageError.of(broken)
        duplicates = [merged[key] for key in sorted(merged)]
        first = np.array([indices[0] for indices in duplicates])
        counts = np.array([math.fsum(labels.sample_weight[indices]) for indices in duplicates])
        weights = counts * (labels.weights / labels.sample_weight)[first]
        return cls(images.take(labels.rows[first]), labels.y[first], counts, weights)

    @classmethod
    def unlabeled(cls, images: Images, rows: np.ndarray) -> TrainingSet:
        """Sort and merge images without labels; their class number is 0."""
        zeros, ones = np.zeros(len(rows), int), np.ones(len(rows))
        merged = cls.of(images, EncodedLabels(np.array([0]), zeros, ones, ones, rows))
        ones = np.ones(len(merged.y))
        return cls(merged.images, merged.y, ones, ones)

    def take(self, rows: np.ndarray) -> TrainingSet:
        """Select images."""
        images = self.images.take(rows)
        return TrainingSet(images, self.y[rows], self.counts[rows], self.weights[rows])

    def order_digest(self) -> bytes:
        """Return a digest of labels, weights and the keys by which the images are sorted."""
        digest = hashlib.blake2b(self.y.tobytes() + self.weights.tobytes(), digest_size=16)
        for row in range(len(self.images)):
            digest.update(self.images.order_key(row) + b"\0")
        return digest.digest()

    def digest(self) -> str:
        """Return a digest of images, labels and weights.

        Raises
        ------
        ImageError
            If files are missing or items are not images; names all of them.
        """
        digest = hashlib.blake2b(self.y.tobytes() + self.weights.tobytes(), digest_size=16)
        broken: list[ImageError] = []
        for row in range(len(self.images)):
            try:
                digest.update(self.images.fingerprint(row))
            except ImageError as error:
                broken.append(error)
        if broken:
            raise ImageError.of(broken)
        return digest.hexdigest()


@contextlib.contextmanager
def duplicates_in_errors(images: Images) -> Iterator[None]:
    """Add the rows with the same content to an `ImageError`: a fit merges them."""
    try:
        yield
    except ImageError as error:
        broken = {one.row: one.reason for one in error.errors if one.argument == images.argument}
        origins = images.origins.tolist()
        reasons: dict[bytes, str] = {}
        for position, row in enumerate(origins):
            if row in broken:
                with contextlib.suppress(ImageError):
                    reasons[images.order_key(position)] = broken[row]
        duplicates = []
        for position, row in enumerate(origins):
            with contextlib.suppress(ImageError):
                if reason := reasons.get(images.order_key(position)):
                    duplicates.append(ImageError(reason, row, images.describe(position)))
        raise ImageError.of([error, *duplicates]) from error


def split_validation(
    labeled: TrainingSet, fraction: float, seed: int, task: Task
) -> tuple[TrainingSet, TrainingSet | None]:
    """Split off a validation set.

    Parameters
    ----------
    labeled : TrainingSet
    fraction : float
        Share of the images to hold out; 0 holds none out.
    seed : int
    task : Task

    Returns
    -------
    train : TrainingSet
    valid : TrainingSet or None

    Warns
    -----
    UserWarning
        If some class has too few images to hold any of them out.
    """
    if fraction == 0:
        return labeled, None
    valid, problem = task.validation_rows(labeled.y, fraction, seed)
    if problem:
        warn_user(problem)
    if not len(valid):
        return labeled, None
    return labeled.take(np.setdiff1d(np.arange(len(labeled.y)), valid)), labeled.take(valid)
