"""Validation of labels, weights and domains.

Shapes: N images, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils import _safe_indexing, assert_all_finite
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, column_or_1d

from sktransfer.data.items import are_missing
from sktransfer.utils.errors import check_choice


@dataclass(frozen=True)
class EncodedLabels:
    """Labels as class numbers, with weights.

    Parameters
    ----------
    classes : ndarray of shape (K,)
        The labels, sorted.
    y : ndarray of shape (n,)
        Class numbers, 0 to K - 1, of the images in `rows`.
    sample_weight : ndarray of shape (n,)
        Positive, float64.
    weights : ndarray of shape (n,)
        `sample_weight` times the weight of the class.
    rows : ndarray of shape (n,)
        Rows of the labeled images whose weight is not 0.
    target : ndarray of shape (m,)
        Rows of the unlabeled images of a target domain whose weight is not 0.
    """

    classes: np.ndarray
    y: np.ndarray
    sample_weight: np.ndarray
    weights: np.ndarray
    rows: np.ndarray
    target: np.ndarray = field(default_factory=lambda: np.empty(0, int))


def check_labels(
    X: Any,
    y: Any,
    sample_weight: Any = None,
    class_weight: Any = None,
    estimator: str = "fit",
    sample_domain: Any = None,
) -> EncodedLabels:
    """Validate labels, weights and domains.

    Parameters
    ----------
    X : sequence of length N
    y : array-like of shape (N,)
    sample_weight : array-like of shape (N,), float or None
    class_weight : dict, "balanced" or None
        As in scikit-learn.
    estimator : str
        Name for the error messages.
    sample_domain : array-like of shape (N,) or None
        Positive for the source, negative for the target, whose labels are ignored.

    Raises
    ------
    ValueError
        If lengths differ, if labels are not classes, if weights are negative, if there is a single
        class, or if domains are invalid.

    Examples
    --------
    >>> labels = check_labels(range(3), ["dog", "cat", "dog"], class_weight="balanced")
    >>> labels.classes, labels.y, labels.weights
    (array(['cat', 'dog'], dtype='<U3'), array([1, 0, 1]), array([0.75, 1.5 , 0.75]))
    """
    if y is None:
        raise ValueError(f"{estimator} requires y to be passed, but the target y is None")
    check_consistent_length(X, y)
    source, target = np.arange(len(X)), np.empty(0, int)
    if sample_domain is not None:
        source, target = split_domains(sample_domain, len(X))
        y = _safe_indexing(y, source)  # the labels of the target are never read
    y = _check_not_missing(column_or_1d(y, warn=True), "y", source)
    check_classification_targets(y)
    weights = np.ones(len(X))
    if sample_weight is not None:
        weights = _check_sample_weight(
            sample_weight, np.empty((len(X), 1)), dtype=np.float64, ensure_non_negative=True
        )
    positive = weights[source] > 0
    rows, target, y = source[positive], target[weights[target] > 0], y[positive]
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        got = f"1 class in y, {classes.tolist()[0]!r}" if len(classes) else "no weight above 0"
        raise ValueError(f"Got {got}, but a classifier needs at least two classes")
    counts = weights[rows]
    return EncodedLabels(
        classes, codes, counts, counts * _factors(class_weight, y, counts), rows, target
    )


def _check_not_missing(y: np.ndarray, name: str, rows: np.ndarray) -> np.ndarray:
    """Return labels, or raise a ValueError if some are missing."""
    if y.dtype.kind == "f":
        assert_all_finite(y, input_name=name)
    if y.dtype.kind == "O" and (missing := are_missing(y)).any():
        raise ValueError(
            f"Input {name} contains missing labels, in rows {rows[missing][:10].tolist()}; label "
            "these images, or leave them out"
        )
    return y


def split_domains(sample_domain: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the source and the rows of the target.

    Parameters
    ----------
    sample_domain : array-like of shape (n,)
    n : int

    Raises
    ------
    ValueError
        If the length differs, a value is 0 or not a whole number, or no image is of the source.

    Examples
    --------
    >>> split_domains([1, 1, -2, 1, -2], 5)
    (array([0, 1, 3]), array([2, 4]))
    """
    domains = column_or_1d(sample_domain)
    check_consistent_length(np.empty(n), domains)
    expected = "expected whole numbers: above 0 for the source, below 0 for the target"
    if domains.dtype.kind == "O" and all(isinstance(domain, Integral) for domain in domains):
        domains = domains.astype(int)
    if domains.dtype.kind in "iuf":
        invalid = domains[~(np.isfinite(domains) & (domains == np.round(domains)))]
    else:
        invalid = domains
    if len(invalid):
        raise ValueError(f"Got {invalid.tolist()[0]!r} in sample_domain, but {expected}")
    if not domains.all():
        raise ValueError(f"Got 0 in sample_domain, but {expected}")
    if not (domains > 0).any():
        raise ValueError(
            f"Got no image of the source in sample_domain, but {expected}; labels are learned from "
            "the source only"
        )
    return np.flatnonzero(domains > 0), np.flatnonzero(domains < 0)


def _factors(class_weight: Any, y: np.ndarray, counts: np.ndarray) -> np.ndarray | float:
    """Return the weight of the class of each image."""
    if class_weight is None:
        return 1.0
    if not isinstance(class_weight, str):
        factors = compute_sample_weight(class_weight, y)
        if not factors.min() > 0:
            raise ValueError(
                f"Got class_weight={class_weight!r}, but expected weights above 0; to "
                "ignore a class, leave out its images"
            )
        return factors
    check_choice("class_weight", class_weight, ["balanced", None])
    _, codes = np.unique(y, return_inverse=True)
    totals = np.array([math.fsum(counts[codes == code]) for code in range(codes.max() + 1)])
    return (math.fsum(totals) / (len(totals) * totals))[codes]


def encode(y: Any, classes: np.ndarray) -> np.ndarray:
    """Convert labels to class numbers.

    Raises
    ------
    ValueError
        If a label is not one of `classes`.
    """
    y = _check_not_missing(column_or_1d(y), "y_val", np.arange(len(y)))
    codes = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    unknown = np.unique(y[classes[codes] != y])
    if len(unknown):
        raise ValueError(
            f"Got {unknown.tolist()} in y_val, but expected only classes that occur in y: "
            f"{classes.tolist()}"
        )
    return codes
