"""Labels: class numbers and weights.

Shapes: N pictures, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils import assert_all_finite
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, column_or_1d

from sktransfer._errors import check_choice


@dataclass(frozen=True)
class Labels:
    """What `y` says.

    Parameters
    ----------
    classes : ndarray of shape (K,)
        The labels, sorted.
    y : ndarray of shape (n,)
        Class numbers, 0 to K - 1, of the pictures that take part.
    sample_weight : ndarray of shape (n,)
        Positive, float64.
    weights : ndarray of shape (n,)
        The same, times the weight of the class.
    rows : ndarray of shape (n,)
        The pictures that take part: those whose weight is not 0.
    """

    classes: np.ndarray
    y: np.ndarray
    sample_weight: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


def check_labels(
    X: Any, y: Any, sample_weight: Any = None, class_weight: Any = None, estimator: str = "fit"
) -> Labels:
    """Validate labels and weights.

    Parameters
    ----------
    X : sequence of length N
    y : array-like of shape (N,)
    sample_weight : array-like of shape (N,), float or None
    class_weight : dict, "balanced" or None
        As in scikit-learn.
    estimator : str
        Who asks.

    Raises
    ------
    ValueError
        For lengths that differ, labels that are no classes, weights that are negative, or a single
        class.

    Examples
    --------
    >>> labels = check_labels(range(3), ["dog", "cat", "dog"], class_weight="balanced")
    >>> labels.classes, labels.y, labels.weights
    (array(['cat', 'dog'], dtype='<U3'), array([1, 0, 1]), array([0.75, 1.5 , 0.75]))
    """
    if y is None:
        raise ValueError(f"{estimator} requires y to be passed, but the target y is None")
    y = column_or_1d(y, warn=True)
    check_consistent_length(X, y)
    if y.dtype.kind == "f":
        assert_all_finite(y, input_name="y")
    check_classification_targets(y)
    weights = np.ones(len(y))
    if sample_weight is not None:
        weights = _check_sample_weight(
            sample_weight, np.empty((len(y), 1)), dtype=np.float64, ensure_non_negative=True
        )
    rows = np.flatnonzero(weights)
    classes, codes = np.unique(y[rows], return_inverse=True)
    if len(classes) < 2:
        found = f"1 class in y, {classes.tolist()[0]!r}" if len(classes) else "no weight above 0"
        raise ValueError(f"Got {found}, but a classifier needs at least two classes")
    counts = weights[rows]
    return Labels(classes, codes, counts, counts * _factors(class_weight, y[rows], counts), rows)


def _factors(class_weight: Any, y: np.ndarray, counts: np.ndarray) -> np.ndarray | float:
    """Give the weight of each picture's class."""
    if class_weight is None:
        return 1.0
    if not isinstance(class_weight, str):
        factors = compute_sample_weight(class_weight, y)
        if not factors.min() > 0:
            raise ValueError(
                f"Got class_weight={class_weight!r}, but expected weights above 0; leave the "
                "pictures of a class out that is not to count"
            )
        return factors
    check_choice("class_weight", class_weight, ["balanced", None])
    _, codes = np.unique(y, return_inverse=True)
    totals = np.array([math.fsum(counts[codes == code]) for code in range(codes.max() + 1)])
    return (math.fsum(totals) / (len(totals) * totals))[codes]


def encode(y: Any, classes: np.ndarray) -> np.ndarray:
    """Turn labels into the numbers of known classes.

    Raises
    ------
    ValueError
        Where a label is none of the classes.
    """
    y = column_or_1d(y)
    codes = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    unknown = np.unique(y[classes[codes] != y])
    if len(unknown):
        raise ValueError(
            f"Got {unknown.tolist()} in y_val, but expected only classes that occur in y: "
            f"{classes.tolist()}"
        )
    return codes
