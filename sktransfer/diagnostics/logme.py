"""LogME: how well embeddings explain labels, without a classifier.

Source: You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning",
ICML 2021.

Shapes: N images, D features, K classes, R the rank of the embeddings.
"""

from __future__ import annotations

import numpy as np

# Maximum number of fixed-point iterations, and the relative change at which they stop.
_MAX_ITERATIONS, _TOLERANCE = 50, 1e-4
_EPSILON = 1e-12


def logme(embeddings: np.ndarray, y: np.ndarray) -> float:
    """Score embeddings by the evidence that a linear model on them has.

    For each class, a Bayesian linear regression of its membership: the logarithm of the marginal
    likelihood, per image, at the precisions of prior and noise that make it largest. The mean
    over the classes counts. It has no scale of its own, and only compares embeddings of the same
    images.

    Parameters
    ----------
    embeddings : ndarray of shape (N, D)
        Finite.
    y : ndarray of shape (N,)
        Class numbers, 0 to K - 1.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat([0, 1], 50)
    >>> good, bad = y[:, None] + 0.1 * rng.normal(size=(100, 5)), rng.normal(size=(100, 5))
    >>> logme(good, y) > logme(bad, y)
    True
    """
    left, singular, _ = np.linalg.svd(embeddings.astype(np.float64), full_matrices=False)
    powers = singular**2
    targets = np.eye(y.max() + 1)[y]
    return float(np.mean([_evidence(left, powers, target) for target in targets.T]))


def _evidence(left: np.ndarray, powers: np.ndarray, target: np.ndarray) -> float:
    """Return the largest evidence for one target (N,), per image.

    `left` (N, R) and `powers` (R,) are the left singular vectors and the squared singular values.
    """
    n, rank = left.shape
    projected = (left.T @ target) ** 2
    rest = max(float(target @ target - projected.sum()), 0.0)  # what no weights explain
    ratio = 1.0  # of the precisions: prior to noise
    for _ in range(_MAX_ITERATIONS):
        shrunk = powers / (powers + ratio)
        effective = shrunk.sum()
        size = float((powers * projected / (powers + ratio) ** 2).sum())  # of the weights, squared
        error = float((projected * (ratio / (powers + ratio)) ** 2).sum()) + rest
        prior = effective / (size + _EPSILON)
        noise = (n - effective) / (error + _EPSILON)
        before, ratio = ratio, prior / noise
        if abs(ratio - before) <= _TOLERANCE * before:
            break
    evidence = (
        rank * np.log(prior)
        + n * np.log(noise)
        - np.log(prior + noise * powers).sum()
        - noise * error
        - prior * size
        - n * np.log(2 * np.pi)
    )
    return float(evidence / (2 * n))
