"""Validation of labels, weights and domains.

Shapes: N images, K classes.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.utils import _safe_indexing, assert_all_finite
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    _num_samples,
    check_consistent_length,
    column_or_1d,
)

from sktransfer.data.items import are_missing, as_array, is_missing
from sktransfer.utils.errors import check_choice, did_you_mean

# numpy converts a float to a string of 32 characters, which has 4 bytes for each.
_CONVERTED_ITEMSIZE = 4 * 32


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
        If lengths differ, if labels are missing or not classes, if weights are negative, if there
        is a single class, or if domains are invalid.

    Examples
    --------
    >>> labels = check_labels(range(3), ["dog", "cat", "dog"], class_weight="balanced")
    >>> labels.classes, labels.y, labels.weights
    (array(['cat', 'dog'], dtype='<U3'), array([1, 0, 1]), array([0.75, 1.5 , 0.75]))
    """
    if y is None:
        raise ValueError(f"{estimator} requires y to be passed, but the target y is None")
    check_one_per_image("y", y, X)
    source, target = np.arange(len(X)), np.empty(0, int)
    if sample_domain is not None:
        source, target = split_domains(sample_domain, len(X))
        y = labels_of_rows(y, source)  # the labels of the target are never read
    y = check_class_labels(check_not_missing(y, "y", source, warn=True))
    weights = np.ones(len(X))
    if sample_weight is not None:
        weights = _check_weights(sample_weight, len(X))
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


def check_one_per_image(name: str, values: Any, X: Any) -> None:
    """Raise an error unless there is an entry for each image.

    Parameters
    ----------
    name : str
        Name of the values in the error message.
    values : array-like of shape (N,)
    X : sequence of length N

    Raises
    ------
    TypeError
        If `values` is not array-like.
    ValueError
        If it has another length.

    Examples
    --------
    >>> check_one_per_image("y", 1, ["a.png", "b.png"])
    Traceback (most recent call last):
        ...
    TypeError: Got y=1, but expected a list or an array with an entry for each image
    """
    is_column = hasattr(values, "__getitem__") or hasattr(values, "__array__")
    try:
        if not is_column or isinstance(values, str | bytes | bytearray | Mapping | Set):
            raise TypeError("not array-like")
        _num_samples(values)
    except TypeError as error:
        raise TypeError(
            f"Got {name}={reprlib.repr(values)}, but expected a list or an array with an entry for "
            "each image"
        ) from error
    check_consistent_length(X, values)


def _check_weights(sample_weight: Any, n: int) -> np.ndarray:
    expected = f"numbers of at least 0, one for each of the {n:,} images"
    try:
        weights = _check_sample_weight(
            sample_weight, np.empty((n, 1)), dtype=np.float64, ensure_non_negative=True
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Got an invalid sample_weight, but expected {expected} ({error})"
        ) from error
    largest = weights.max()
    # The loss is computed in float32, and must not overflow.
    if largest != 0 and not 1e-30 <= largest <= 1e30:
        raise ValueError(
            f"Got {largest:g} as the largest sample_weight, but expected {expected}, the largest "
            "from 1e-30 to 1e30"
        )
    return weights


def as_labels(y: Any, *, warn: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Convert labels to an array, and find those that are missing.

    None, NaN, NaT, pandas' NA, nulls and masked values are missing, in any container. An empty
    string is a label.

    Parameters
    ----------
    y : array-like of shape (N,)
    warn : bool
        Warn if `y` is a column of shape (N, 1).

    Returns
    -------
    labels : ndarray of shape (N,)
        If labels are missing, an array of objects with None for these; otherwise, of the dtype
        that numpy gives to `y`.
    missing : ndarray of shape (N,), bool

    Raises
    ------
    ValueError
        If `y` has several columns.

    Examples
    --------
    >>> as_labels(["cat", float("nan"), "dog"])
    (array(['cat', None, 'dog'], dtype=object), array([False,  True, False]))
    """
    y = _as_column(y)
    if isinstance(y, np.ma.MaskedArray):
        missing = np.ma.getmaskarray(y).reshape(-1)
        labels = column_or_1d(y.data, warn=warn)
    elif isinstance(y, Sequence) and not isinstance(y, str):
        # Before numpy converts NaN among strings to the string "nan".
        missing = np.array([is_missing(label) for label in y], dtype=bool)
        filled = [None if is_missing(label) else label for label in y] if missing.any() else list(y)
        labels = column_or_1d(filled, warn=warn)
    else:
        labels = column_or_1d(y, warn=warn)
        missing = np.zeros(len(labels), dtype=bool)
    missing |= _missing_in(labels)
    if missing.any():
        labels = labels.astype(object)
        labels[missing] = None
    return labels, missing


def _as_column(y: Any) -> Any:
    """Convert containers that scikit-learn does not accept, or whose dtype it would change."""
    if isinstance(y, torch.Tensor):
        return as_array(y)
    if isinstance(y, np.matrix):
        return np.asarray(y)
    if isinstance(y, np.ndarray) and y.dtype.kind == "T" and not are_missing(y).any():
        return np.array(y.tolist())
    # scikit-learn would convert nullable booleans and integers to floats.
    dtype = getattr(getattr(y, "dtype", None), "numpy_dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "biu" and not y.isna().any():
        return y.to_numpy(dtype)
    return y


def labels_of_rows(y: Any, rows: np.ndarray) -> Any:
    """Select labels from any container."""
    if isinstance(y, list | tuple | np.ndarray) or hasattr(y, "iloc"):
        return _safe_indexing(y, rows)
    return as_labels(y)[0][rows]


def check_class_labels(labels: np.ndarray, name: str = "y") -> np.ndarray:
    """Check that labels can be classes; return numbers in an array of objects as numbers.

    Raises
    ------
    ValueError
        If the labels are bytes, of several types, or of another type than strings, numbers and
        booleans.

    Examples
    --------
    >>> check_class_labels(np.array([b"cat", b"dog"]))
    Traceback (most recent call last):
        ...
    ValueError: Got labels of type bytes in y, but expected strings, numbers or booleans; convert \
them: [label.decode() for label in y]
    """
    if labels.dtype.kind == "O" and all(
        isinstance(label, bool | int | float | np.number | np.bool_) for label in labels
    ):
        labels = np.array(labels.tolist())
    is_text = labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels)
    if labels.dtype.kind in "OScV" and not is_text:
        types = sorted({type(label).__name__ for label in labels.tolist()})
        convert = "label.decode()" if types == ["bytes"] else "str(label)"
        remedy = f"convert them: [{convert} for label in {name}]"
        if types == ["dict"]:
            remedy = "select the column of labels, such as y['label']"
        raise ValueError(
            f"Got labels of type {', '.join(types)} in {name}, but expected strings, numbers or "
            f"booleans; {remedy}"
        )
    check_classification_targets(labels)
    return labels


def _missing_in(labels: np.ndarray) -> np.ndarray:
    """Return which labels of an array are missing."""
    if labels.dtype.kind in "fmM":
        return labels != labels  # only NaN and NaT differ from themselves
    if labels.dtype.kind in "OT":
        return are_missing(labels)
    # Strings with room for 32 characters, however short, come from an array that held floats.
    if labels.dtype.kind == "U" and labels.dtype.itemsize >= _CONVERTED_ITEMSIZE:
        return labels == "nan"
    return np.zeros(len(labels), dtype=bool)


def check_not_missing(
    y: Any, name: str = "y", rows: np.ndarray | None = None, *, warn: bool = False
) -> np.ndarray:
    """Convert labels to an array, and raise a ValueError if some are missing.

    Parameters
    ----------
    y : array-like of shape (n,)
    name : str
        Name of the labels in the error message.
    rows : ndarray of shape (n,) or None
        Rows of these labels in the user's data; None means all.
    warn : bool
        Warn if `y` is a column of shape (n, 1).

    Returns
    -------
    ndarray of shape (n,)

    Raises
    ------
    ValueError
        If labels are missing. The message has their number and their first ten rows.

    Examples
    --------
    >>> check_not_missing(["cat", None])
    Traceback (most recent call last):
        ...
    ValueError: Got 1 missing label in y, in row 1, but expected a label for each image; label \
this image, or leave it out
    """
    labels, missing = as_labels(y, warn=warn)
    unlabeled = np.flatnonzero(missing) if rows is None else rows[missing]
    if len(unlabeled):
        one = len(unlabeled) == 1
        listed = ", ".join(map(str, unlabeled[:10])) + (", ..." if len(unlabeled) > 10 else "")
        raise ValueError(
            f"Got {len(unlabeled):,} missing label{'' if one else 's'} in {name}, in "
            f"row{'' if one else 's'} {listed}, but expected a label for each image; label "
            f"{'this image, or leave it' if one else 'these images, or leave them'} out"
        )
    if labels.dtype.kind == "f":
        assert_all_finite(labels, input_name=name)
    return labels


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
    check_one_per_image("sample_domain", sample_domain, range(n))
    expected = "expected whole numbers: above 0 for the source, below 0 for the target"
    domains, missing = as_labels(sample_domain)
    if missing.any():
        row = np.flatnonzero(missing)[0]
        raise ValueError(f"Got no value for row {row} in sample_domain, but {expected}")
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


def _check_classes(class_weight: Mapping[Any, float], y: np.ndarray) -> None:
    """Refuse weights of unknown classes while others have none: a name is probably misspelled."""
    classes = np.unique(y).tolist()
    unknown = [label for label in class_weight if label not in classes]
    missing = [label for label in classes if label not in class_weight]
    if unknown and missing:
        raise ValueError(
            f"Got class_weight with the unknown class {unknown[0]!r}, but without "
            f"{', '.join(map(repr, missing))}; its keys must be labels"
            f"{did_you_mean(unknown[0], missing)}"
        )


def _factors(class_weight: Any, y: np.ndarray, counts: np.ndarray) -> np.ndarray | float:
    """Return the weight of the class of each image."""
    if class_weight is None:
        return 1.0
    if not isinstance(class_weight, str):
        _check_classes(class_weight, y)
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
        If a label is missing, or not one of `classes`.
    """
    y = check_class_labels(check_not_missing(y, "y_val"), "y_val")
    codes = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    unknown = np.unique(y[classes[codes] != y])
    if len(unknown):
        raise ValueError(
            f"Got {unknown.tolist()} in y_val, but expected only classes that occur in y: "
            f"{classes.tolist()}"
        )
    return codes
