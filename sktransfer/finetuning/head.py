"""Stage 0: the head is a convex problem, solved by scikit-learn's LogisticRegression.

Shapes: N images, V views of each, D features, K classes.
"""

from __future__ import annotations

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
from threadpoolctl import threadpool_limits

# Inverse strengths of the regularization that are tried, from strong to weak.
STRENGTHS = tuple(10.0 ** np.arange(-4, 4.01, 0.5))
# The greatest of them for a tiny set.
_TINY_BOUND = 0.1
# What is taken where nothing can be held out to choose by.
_UNCHOSEN = 0.03
_FOLDS = 3
_ITERATIONS = 1000
_TOLERANCE = 1e-4
# Numbers in the embeddings below which one thread is many times faster than several, which would
# spend their time waiting for each other.
_SMALL = 2**24
# The search ends where the loss has risen twice, to this many times the least one.
_CLEARLY = 1.1

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Head:
    """A linear classifier on embeddings: ``logits = embeddings @ weight.T + bias``.

    Parameters
    ----------
    weight : ndarray of shape (K, D)
    bias : ndarray of shape (K,)
    strength : float
        The inverse strength of regularization, C, that was chosen.
    penalty : ndarray of shape (D,)
        What the square of each weight costs, where the loss is a mean over images.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    penalty: np.ndarray


@dataclass(frozen=True)
class LabeledEmbeddings:
    """Embeddings with what is known about them.

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
        """Leave out the augmented copies."""
        return LabeledEmbeddings(self.embeddings[:, :1], self.y, self.weights)


def fit_head(
    train: LabeledEmbeddings,
    valid: LabeledEmbeddings | None,
    n_classes: int,
    *,
    tiny: bool = False,
    device: torch.device = _CPU,
) -> Head:
    """Solve the head.

    The embeddings are centered, and scaled by ``sqrt(sd**2 + (0.5 * mean(sd))**2)``: without that
    floor, a dimension which is all but constant in training would explode once the blocks before
    it move. Center and scale are then folded into weight and bias.

    The regularization is the one with the least log-loss on `valid`, or by cross-validation on the
    images of `train` where there is none.

    Parameters
    ----------
    train : LabeledEmbeddings
        Every view counts as a V-th of its image.
    valid : LabeledEmbeddings or None
    n_classes : int
        All of which occur in `train`.
    tiny : bool
        Regularizes more: C is at most 0.1.
    device : torch.device
        If the problem is solved if it is large, and scikit-learn's array API is switched on
        (`SCIPY_ARRAY_API=1` in the environment before Python starts); otherwise on the CPU.
    """
    where = _solver_device(device, train.embeddings.size)
    flat = train.embeddings.reshape(-1, train.embeddings.shape[-1])
    views = train.embeddings.shape[1]
    weights = np.repeat(train.weights / views, views)
    center = np.average(flat, axis=0, weights=weights)
    deviation = np.sqrt(np.average((flat - center) ** 2, axis=0, weights=weights))
    # What does not vary is not to be told from its rounding.
    deviation[deviation <= np.finfo(np.float32).eps * np.abs(center)] = 0
    scale = np.sqrt(deviation**2 + (0.5 * deviation.mean()) ** 2)
    scale[scale == 0] = 1.0

    def scaled(data: LabeledEmbeddings) -> LabeledEmbeddings:
        return LabeledEmbeddings((data.embeddings - center) / scale, data.y, data.weights)

    originals = train.originals()
    divisions = [(originals, valid)] if valid is not None else _folds(originals, n_classes)
    divisions = [(scaled(one), scaled(other)) for one, other in divisions]
    train = scaled(train)
    strengths = np.array(STRENGTHS)
    if tiny:
        strengths = strengths[strengths <= _TINY_BOUND * 1.001]
    strength = _choose(divisions, strengths, where)
    model = _fit(_model(), train, strength, where)
    weight, bias = _numpy(model.coef_), _numpy(model.intercept_)
    if n_classes == 2:  # one logit for two classes
        weight, bias = np.vstack([-weight / 2, weight / 2]), np.hstack([-bias / 2, bias / 2])
    weight = weight / scale
    # Of two rows that are one, each other's negative, every square counts twice.
    penalty = scale**2 / (2 * strength * train.weights.sum()) * (2 if n_classes == 2 else 1)
    return Head(weight, bias - weight @ center, float(strength), penalty)


def _solver_device(device: torch.device, numbers: int) -> torch.device | None:
    """Choose where a problem of so many numbers is solved; None is numpy."""
    switched_on = os.environ.get("SCIPY_ARRAY_API") == "1"
    return device if switched_on and device.type == "cuda" and numbers >= _SMALL else None


def _choose(
    divisions: list[tuple[LabeledEmbeddings, LabeledEmbeddings]],
    strengths: np.ndarray,
    where: torch.device | None,
) -> float:
    """Return the strength with the least log-loss on what each division holds back."""
    if not divisions:
        return min(_UNCHOSEN, strengths[-1])
    models = [_model(warm_start=True) for _ in divisions]
    losses: list[float] = []
    for strength in strengths:
        losses.append(
            sum(
                _log_loss(_fit(model, train, strength, where), valid, where)
                for model, (train, valid) in zip(models, divisions, strict=True)
            )
        )
        rising = len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]
        if rising and losses[-1] > _CLEARLY * min(losses):
            break
    return float(strengths[int(np.argmin(losses))])


def _log_loss(
    model: LogisticRegression, valid: LabeledEmbeddings, where: torch.device | None
) -> float:
    x = valid.embeddings.reshape(-1, valid.embeddings.shape[-1])
    with sklearn.config_context(array_api_dispatch=where is not None):
        p = _numpy(model.predict_proba(_array(x, where)))
    p = p[np.arange(len(p)), np.searchsorted(_numpy(model.classes_), valid.y)]
    return -float((valid.weights * np.log(np.clip(p, 1e-15, 1))).sum())


def _folds(
    data: LabeledEmbeddings, n_classes: int
) -> list[tuple[LabeledEmbeddings, LabeledEmbeddings]]:
    """Divide the images of each class by content, so that copies stay together.

    Gives nothing where some class has too few images to be in every part.
    """
    fold_of = np.zeros(len(data.y), dtype=int)
    names = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in data.embeddings]
    for label in range(n_classes):
        rows = np.flatnonzero(data.y == label)
        rank = {name: place for place, name in enumerate(sorted({names[row] for row in rows}))}
        if len(rank) < 2:
            return []
        fold_of[rows] = [(rank[names[row]] + label) % _FOLDS for row in rows]
    parts = [(data.take(fold_of != fold), data.take(fold_of == fold)) for fold in range(_FOLDS)]
    return [(train, valid) for train, valid in parts if len(valid.y)]


def _model(*, warm_start: bool = False) -> LogisticRegression:
    return LogisticRegression(max_iter=_ITERATIONS, tol=_TOLERANCE, warm_start=warm_start)


def _fit(
    model: LogisticRegression, data: LabeledEmbeddings, strength: float, where: torch.device | None
) -> LogisticRegression:
    views = data.embeddings.shape[1]
    x = data.embeddings.reshape(-1, data.embeddings.shape[-1])
    y, weights = np.repeat(data.y, views), np.repeat(data.weights / views, views)
    threads = 1 if x.size < _SMALL else None
    with (
        warnings.catch_warnings(),
        threadpool_limits(threads),
        sklearn.config_context(array_api_dispatch=where is not None),
    ):
        # What is left to gain is less than what the later stages gain.
        warnings.simplefilter("ignore", ConvergenceWarning)
        arrays = (_array(each, where) for each in (x, y, weights.astype(x.dtype)))
        return model.set_params(C=strength).fit(*arrays)


def _array(values: np.ndarray, where: torch.device | None) -> Any:
    """Put an array where the problem is solved."""
    return values if where is None else torch.from_numpy(values).to(where)


def _numpy(values: Any) -> np.ndarray:
    """Bring an array back."""
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values
