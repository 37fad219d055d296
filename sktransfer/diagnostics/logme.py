"""LogME: how well embeddings explain labels, without a classifier.

Source: You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning",
ICML 2021.

Shapes: N images, D features, K classes, R the rank of the embeddings.
"""

from __future__ import annotations

import numpy as np

# Maximum number of fixed-point iterations, and the relative change of the ratio that ends them.
_MAX_ITERATIONS, _RATIO_TOLERANCE = 50, 1e-4
# Added to denominators that can be 0.
_DENOMINATOR_EPSILON = 1e-12


def logme(embeddings: np.ndarray, y: np.ndarray) -> float:
    """Compute LogME, the log evidence of a linear model on the embeddings.

    For each class, a Bayesian linear regression predicts whether an image is of this class. Its
    score is the logarithm of the marginal likelihood, per image, at the precisions of prior and
    noise that maximize it. LogME is the mean over the classes. It is only comparable between
    embeddings of the same images.

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
    """Compute the maximum log evidence of one target (N,), per image.

    `left` (N, R) and `powers` (R,) are the left singular vectors and the squared singular values.
    """
    n, rank = left.shape
    projected = (left.T @ target) ** 2
    residual = max(float(target @ target - projected.sum()), 0.0)  # outside the column space
    ratio = 1.0  # precision of the prior divided by that of the noise
    for _ in range(_MAX_ITERATIONS):
        shrunk = powers / (powers + ratio)
        effective = shrunk.sum()
        # Squared norm of the weights, and squared error.
        weights = float((powers * projected / (powers + ratio) ** 2).sum())
        error = float((projected * (ratio / (powers + ratio)) ** 2).sum()) + residual
        prior = effective / (weights + _DENOMINATOR_EPSILON)
        noise = (n - effective) / (error + _DENOMINATOR_EPSILON)
        previous, ratio = ratio, prior / noise
        if abs(ratio - previous) <= _RATIO_TOLERANCE * previous:
            break
    evidence = (
        rank * np.log(prior)
        + n * np.log(noise)
        - np.log(prior + noise * powers).sum()
        - noise * error
        - prior * weights
        - n * np.log(2 * np.pi)
    )
    return float(evidence / (2 * n))
