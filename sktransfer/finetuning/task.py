"""The task of an estimator: everything in training that depends on the kind of target.

Only a `Task` knows the targets: how they are encoded and held out, how the head, the loss and the
metric are computed, and how outputs are decoded. Another kind of target needs another task and a
thin estimator.

Shapes: N images, B images in a batch, K outputs of the network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from torch import nn

from sktransfer.data.labels import encode
from sktransfer.finetuning.head import Head, LabeledEmbeddings, fit_logistic_regression

if TYPE_CHECKING:
    from collections.abc import Sequence

# Minimum number of training images of a class when others are held out.
_MIN_TRAIN_IMAGES = 2
# A training set with fewer images of some class is small.
_SMALL_CLASS = 10
# Limits of the factor on the logits, and its penalty, in images.
_FACTORS, _FACTOR_PENALTY = (0.1, 3.0), 10.0


class Task(ABC):
    """The kind of target of a fine-tuned estimator.

    An estimator encodes its targets as an array of shape (N,); all methods take encoded targets.
    """

    metric_name: ClassVar[str]
    """Suffix of the metric in the history, as in `"valid_acc"`."""

    start_factor: ClassVar[float] = 1.0
    """Factor on the outputs of the fitted head when the blocks before it begin to train."""

    @property
    @abstractmethod
    def n_outputs(self) -> int:
        """Number of outputs of the network, K."""

    @abstractmethod
    def output_names(self) -> Sequence[object]:
        """Return the names of the K outputs."""

    @abstractmethod
    def encode(self, y: Any) -> np.ndarray:
        """Return the encoded targets (N,) of validation images, or raise a ValueError."""

    @abstractmethod
    def is_small(self, targets: np.ndarray, counts: np.ndarray) -> bool:
        """Return whether there are so few images that the defaults regularize more.

        Parameters
        ----------
        targets : ndarray of shape (N,)
        counts : ndarray of shape (N,)
            Number of images that each row represents.
        """

    @abstractmethod
    def validation_rows(
        self, targets: np.ndarray, fraction: float, seed: int
    ) -> tuple[np.ndarray, str]:
        """Choose the rows to hold out.

        Returns
        -------
        rows : ndarray of int
            Sorted.
        problem : str
            Text of a warning about the split; empty if there is none.
        """

    def class_numbers(self, targets: np.ndarray) -> np.ndarray:
        """Return the class of each image, 0 to K - 1; one class unless a task overrides this."""
        return np.zeros(len(targets), int)

    @abstractmethod
    def batch_targets(
        self, targets: np.ndarray, weights: np.ndarray, label_smoothing: float
    ) -> torch.Tensor:
        """Return the targets of the loss with weights applied, float32 of shape (B, ...)."""

    @abstractmethod
    def fit_head(
        self,
        train: LabeledEmbeddings,
        valid: LabeledEmbeddings | None,
        *,
        strength: float | None = None,
        device: torch.device,
    ) -> Head:
        """Fit a linear head on embeddings; `strength` is its regularization, None chooses it."""

    @abstractmethod
    def make_loss(self) -> nn.Module:
        """Build the loss: outputs (B, K) and batch targets to a scalar, a mean over images."""

    @abstractmethod
    def metric(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Return the sum of the metric over a batch; higher is better."""

    @abstractmethod
    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """Decode outputs (N, K) into predictions (N,)."""

    def calibrate(
        self, outputs: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Choose a factor on the outputs that makes them fit held-out targets best.

        Returns
        -------
        factor : float
            1 unless a task overrides this.
        losses : ndarray of shape (N,)
            Weighted loss of each image's scaled outputs.
        """
        soft = self.batch_targets(targets, weights / weights.mean(), 0.0)
        loss, scores = self.make_loss(), torch.from_numpy(outputs)
        rows = range(len(outputs))
        return 1.0, np.array([float(loss(scores[i : i + 1], soft[i : i + 1])) for i in rows])


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Each image belongs to one class; targets are class numbers, outputs are logits.

    Parameters
    ----------
    classes : ndarray of shape (K,)
        The labels, sorted.
    """

    classes: np.ndarray
    metric_name: ClassVar[str] = "acc"
    # A head that fits all training images would leave no loss from which blocks learn.
    start_factor: ClassVar[float] = 0.3

    @property
    def n_outputs(self) -> int:
        """See `Task.n_outputs`."""
        return len(self.classes)

    def output_names(self) -> list[object]:
        """Return the labels."""
        return self.classes.tolist()

    def encode(self, y: Any) -> np.ndarray:
        """Return class numbers; raise a ValueError for an unknown label."""
        return encode(y, self.classes)

    def is_small(self, targets: np.ndarray, counts: np.ndarray) -> bool:
        """Return whether some class has fewer than 10 images."""
        return bool(np.bincount(targets, weights=counts).min() < _SMALL_CLASS)

    def validation_rows(
        self, targets: np.ndarray, fraction: float, seed: int
    ) -> tuple[np.ndarray, str]:
        """Choose the same share of each class, and at least one image of each.

        A class of one or two images stays in the training set.
        """
        rng = np.random.default_rng(seed)
        held_out, small = [], []
        for number, label in enumerate(self.classes.tolist()):
            rows = rng.permutation(np.flatnonzero(targets == number))
            count = min(max(1, round(fraction * len(rows))), len(rows) - _MIN_TRAIN_IMAGES)
            if count < 1:
                small.append(repr(label))
            held_out.append(rows[: max(0, count)])
        problem = (
            f"Got at most {_MIN_TRAIN_IMAGES} images of the classes {', '.join(small)}, too few to "
            "hold any out, so these classes are missing from validation. Add images, pass X_val "
            "and y_val, or set early_stopping=False to train on everything"
        )
        return np.sort(np.concatenate(held_out)), problem if small else ""

    def class_numbers(self, targets: np.ndarray) -> np.ndarray:
        """Return the targets."""
        return targets

    def batch_targets(
        self, targets: np.ndarray, weights: np.ndarray, label_smoothing: float
    ) -> torch.Tensor:
        """Return weighted soft targets (B, K); a row sums to its weight."""
        share = label_smoothing / self.n_outputs
        soft = np.full((len(targets), self.n_outputs), share, np.float32)
        soft[np.arange(len(targets)), targets] += 1 - label_smoothing
        return torch.from_numpy(soft * weights[:, None].astype(np.float32))

    def fit_head(
        self,
        train: LabeledEmbeddings,
        valid: LabeledEmbeddings | None,
        *,
        strength: float | None = None,
        device: torch.device,
    ) -> Head:
        """Fit a logistic regression."""
        return fit_logistic_regression(
            train, valid, self.n_outputs, strength=strength, device=device
        )

    def make_loss(self) -> nn.Module:
        """Build the cross-entropy of soft targets."""
        return nn.CrossEntropyLoss()

    def calibrate(
        self, outputs: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Choose the inverse temperature with the lowest log loss on held-out images.

        A factor far from 1 needs evidence: its squared logarithm is added to the sum of the losses.
        Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
        """
        relative = weights / weights.mean()

        def losses(log_factor: float) -> np.ndarray:
            scores = outputs.astype(np.float64) * math.exp(log_factor)
            true = scores[np.arange(len(scores)), targets]
            return relative * (logsumexp(scores, axis=1) - true)

        def penalized(log_factor: float) -> float:
            return float(losses(log_factor).sum()) + _FACTOR_PENALTY * log_factor**2

        bounds = tuple(map(math.log, _FACTORS))
        best = float(minimize_scalar(penalized, bounds=bounds, method="bounded").x)
        return math.exp(best), losses(best)

    def metric(self, outputs: torch.Tensor, targets: torch.Tensor) -> int:
        """Count the correct predictions."""
        return int((outputs.argmax(1) == targets.argmax(1)).sum())

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        """Return the label with the largest logit."""
        return self.classes[outputs.argmax(axis=1)]

    def predict_proba(self, outputs: np.ndarray) -> np.ndarray:
        """Return the probability of each class, (N, K)."""
        return softmax(outputs, axis=1)

    def decision_function(self, outputs: np.ndarray) -> np.ndarray:
        """Return the logits (N, K); for two classes, the log-odds (N,) of the second one."""
        return outputs[:, 1] - outputs[:, 0] if self.n_outputs == 2 else outputs


# The task of unlabeled images, whose targets are ignored.
UNLABELED = ClassificationTask(np.array([0]))
