"""The head fit: a logistic regression on embeddings, a convex problem.

Shapes: N images, V views of each, D features, K classes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils import get_tags
from threadpoolctl import ThreadpoolController

# Values of C that are tried, from strong to weak regularization.
STRENGTHS = tuple((10.0 ** np.arange(-4, 4.01, 0.5)).tolist())
# C if some class has too few images for cross-validation.
_DEFAULT_C = 0.1
_N_FOLDS = 3
_MAX_ITER = 1000
_TOL = 1e-4
# Size of the embeddings below which one thread is many times faster than several, which would
# mostly wait for each other.
_SINGLE_THREAD_SIZE = 2**24
# The search ends once the loss has risen twice, to this multiple of the lowest loss.
_STOP_FACTOR = 1.1

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Head:
    """A linear classifier on embeddings: ``logits = embeddings @ weight.T + bias``.

    Parameters
    ----------
    weight : ndarray of shape (K, D)
    bias : ndarray of shape (K,)
    strength : float
        The chosen C, the inverse strength of the regularization.
    penalty : ndarray of shape (D,)
        L2 penalty on the weights of each feature, for a loss that is a mean over images.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    penalty: np.ndarray


@dataclass(frozen=True)
class LabeledEmbeddings:
    """Embeddings with targets and sample weights.

    Parameters
    ----------
    embeddings : ndarray of shape (N, V, D)
    y : ndarray of shape (N,)
        Class numbers, 0 to K - 1.
    weights : ndarray of shape (N,)
    """

    embeddings: np.ndarray
    y: np.ndarray
    weights: np.ndarray

    def take(self, rows: np.ndarray) -> LabeledEmbeddings:
        """Select images."""
        return LabeledEmbeddings(self.embeddings[rows], self.y[rows], self.weights[rows])

    def originals(self) -> LabeledEmbeddings:
        """Select the first view of each image, which is not augmented."""
        return LabeledEmbeddings(self.embeddings[:, :1], self.y, self.weights)


def fit_logistic_regression(
    train: LabeledEmbeddings,
    valid: LabeledEmbeddings | None,
    n_classes: int,
    *,
    strength: float | None = None,
    device: torch.device = _CPU,
) -> Head:
    """Fit the head.

    The embeddings are centered, and divided by the mean of their features' standard deviations.
    Center and scale are then folded into weight and bias. Scaling each feature by its own deviation
    would amplify features that are almost constant in training, which costs accuracy with few
    images, and explodes once the blocks before them change.

    C is the value with the lowest log-loss on `valid`, or in a cross-validation on the images of
    `train` if there are no validation images.

    Parameters
    ----------
    train : LabeledEmbeddings
        Each view has 1/V of its image's weight.
    valid : LabeledEmbeddings or None
    n_classes : int
        Number of classes; all of them occur in `train`.
    strength : float or None
        C; None chooses it.
    device : torch.device
        Device for a large problem, if scikit-learn's array API is switched on
        (`SCIPY_ARRAY_API=1` in the environment before Python starts). Otherwise the CPU is used.
    """
    solver_device = _solver_device(device, train.embeddings.size)
    flat = train.embeddings.reshape(-1, train.embeddings.shape[-1])
    views = train.embeddings.shape[1]
    weights = np.repeat(train.weights / views, views)
    center = np.average(flat, axis=0, weights=weights)
    deviation = np.sqrt(np.average((flat - center) ** 2, axis=0, weights=weights))
    # Deviations within rounding error count as zero.
    deviation[deviation <= np.finfo(np.float32).eps * np.abs(center)] = 0
    scale = deviation.mean() or 1.0

    def scaled(data: LabeledEmbeddings) -> LabeledEmbeddings:
        return LabeledEmbeddings((data.embeddings - center) / scale, data.y, data.weights)

    if strength is None:
        originals = train.originals()
        splits = [(originals, valid)] if valid is not None else _folds(originals, n_classes)
        splits = [(scaled(fold_train), scaled(fold_valid)) for fold_train, fold_valid in splits]
        strength = _choose(splits, solver_device)
    train = scaled(train)
    model = _fit(_model(), train, strength, solver_device)
    weight, bias = _numpy(model.coef_), _numpy(model.intercept_)
    if n_classes == 2:  # one logit for two classes
        weight, bias = np.vstack([-weight / 2, weight / 2]), np.hstack([-bias / 2, bias / 2])
    weight = weight / scale
    # For two classes the two rows are halves of one, so their squares sum to half of its square.
    halves = 2 if n_classes == 2 else 1
    penalty = np.full_like(center, halves * scale**2 / (2 * strength * train.weights.sum()))
    return Head(weight, bias - weight @ center, float(strength), penalty)


def _solver_device(device: torch.device, size: int) -> torch.device | None:
    """Choose the device for a problem of a size, or None for numpy."""
    if device.type != "cuda" or size < _SINGLE_THREAD_SIZE:
        return None
    supported = get_tags(LogisticRegression()).array_api_support  # from scikit-learn 1.9 on
    return device if supported and os.environ.get("SCIPY_ARRAY_API") == "1" else None


def _choose(
    splits: list[tuple[LabeledEmbeddings, LabeledEmbeddings]], solver_device: torch.device | None
) -> float:
    """Return the C with the lowest log-loss on the held-out images of all splits."""
    if not splits:
        return _DEFAULT_C
    models = [_model(warm_start=True) for _ in splits]
    losses: list[float] = []
    for strength in STRENGTHS:
        losses.append(
            sum(
                _log_loss(_fit(model, train, strength, solver_device), valid, solver_device)
                for model, (train, valid) in zip(models, splits, strict=True)
            )
        )
        rising = len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]
        if rising and losses[-1] > _STOP_FACTOR * min(losses):
            break
    return STRENGTHS[int(np.argmin(losses))]


def _log_loss(
    model: LogisticRegression, valid: LabeledEmbeddings, solver_device: torch.device | None
) -> float:
    x = valid.embeddings.reshape(-1, valid.embeddings.shape[-1])
    with sklearn.config_context(array_api_dispatch=solver_device is not None):
        p = _numpy(model.predict_proba(_array(x, solver_device)))
    p = p[np.arange(len(p)), np.searchsorted(_numpy(model.classes_), valid.y)]
    return -float((valid.weights * np.log(np.clip(p, 1e-15, 1))).sum())


def _folds(
    data: LabeledEmbeddings, n_classes: int
) -> list[tuple[LabeledEmbeddings, LabeledEmbeddings]]:
    """Split the images of each class by content, so that duplicates stay together.

    A class with a single image is never held out. Return no splits if all classes are such.
    """
    fold_of = np.full(len(data.y), -1)
    names = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in data.embeddings]
    for label in range(n_classes):
        rows = np.flatnonzero(data.y == label)
        rank = {name: index for index, name in enumerate(sorted({names[row] for row in rows}))}
        if len(rank) < 2:
            continue
        fold_of[rows] = [(rank[names[row]] + label) % _N_FOLDS for row in rows]
    parts = [(data.take(fold_of != fold), data.take(fold_of == fold)) for fold in range(_N_FOLDS)]
    return [(train, valid) for train, valid in parts if len(valid.y)]


def _model(*, warm_start: bool = False) -> LogisticRegression:
    return LogisticRegression(max_iter=_MAX_ITER, tol=_TOL, warm_start=warm_start)


def _fit(
    model: LogisticRegression,
    data: LabeledEmbeddings,
    strength: float,
    solver_device: torch.device | None,
) -> LogisticRegression:
    views = data.embeddings.shape[1]
    x = data.embeddings.reshape(-1, data.embeddings.shape[-1])
    y, weights = np.repeat(data.y, views), np.repeat(data.weights / views, views)
    threads = 1 if x.size < _SINGLE_THREAD_SIZE else None
    with (
        warnings.catch_warnings(),
        _thread_pools().limit(limits=threads),
        sklearn.config_context(array_api_dispatch=solver_device is not None),
    ):
        # The later stages gain more than full convergence would.
        warnings.simplefilter("ignore", ConvergenceWarning)
        arrays = (_array(values, solver_device) for values in (x, y, weights.astype(x.dtype)))
        return model.set_params(C=strength).fit(*arrays)


@functools.cache
def _thread_pools() -> ThreadpoolController:
    """Return the thread pools of the process; to find them takes as long as a small fit."""
    return ThreadpoolController()


def _array(values: np.ndarray, solver_device: torch.device | None) -> Any:
    """Move an array to the solver's device."""
    return values if solver_device is None else torch.from_numpy(values).to(solver_device)


def _numpy(values: Any) -> np.ndarray:
    """Convert the solver's array to numpy."""
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values
