"""The splits of a `cv` parameter, checked before any image is embedded.

Shapes: N images.
"""

from __future__ import annotations

import copy
from numbers import Integral, Number
from typing import Any

import numpy as np
from sklearn.model_selection import check_cv
from sklearn.utils.multiclass import type_of_target


def check_splits(
    cv: Any, n: int, y: Any = None, groups: Any = None, *, classifier: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute the splits of `cv`; the random state of a splitter is not changed.

    Parameters
    ----------
    cv : int, splitter, iterable of (train, test) or None
    n : int
        Number of images, N.
    y, groups : array-like of shape (N,) or None
    classifier : bool
        Whether an int stands for stratified folds.

    Returns
    -------
    list of (train, test)
        Rows of each split.

    Raises
    ------
    ValueError
        If `cv` is invalid, has too many folds, or needs labels or groups that are missing.

    Examples
    --------
    >>> check_splits([([0, 1], [2])], 3)
    [(array([0, 1]), array([2]))]
    """
    rows = np.arange(n)
    try:
        copied = copy.deepcopy(cv) if hasattr(cv, "split") else cv
        splitter = check_cv(copied, y, classifier=classifier)
        splits = splitter.split(np.empty((n, 1)), y, groups)
        pairs = [(rows[train], rows[test]) for train, test in splits]
        if not pairs:
            raise ValueError("no pairs")
        return pairs
    except (IndexError, TypeError, ValueError) as error:
        problem = _problem(cv, n, y, groups, classifier) or (
            f"expected an int of at least 2, a splitter, or pairs (train, test) of rows below {n:,}"
            + ("" if isinstance(cv, Number | str) else f" ({error})")
        )
        raise ValueError(f"Got cv={cv!r}, but {problem}") from error


def _problem(cv: Any, n: int, y: Any, groups: Any, classifier: bool) -> str | None:
    """Return what an invalid `cv` needs, and the remedy, if it is known."""
    name, is_number = type(cv).__name__, isinstance(cv, Integral)
    if y is None and "Stratified" in name:
        return f"{name} needs labels; pass y"
    if groups is None and "Group" in name:
        return f"{name} needs groups; pass groups, or the pairs list(cv.split(X, y, groups))"
    if isinstance(cv, str) and cv.isdecimal():
        return f"expected an int; pass cv={cv} without quotation marks"
    is_class = y is not None and type_of_target(y) in ("binary", "multiclass")
    if name.endswith("GroupKFold"):
        limit, unit = len(np.unique(groups)), "number of groups"
    elif "Stratified" in name or (is_number and classifier and is_class):
        limit, unit = int(np.unique(y, return_counts=True)[1].max()), "size of the largest class"
    else:
        limit, unit = n, "number of images"
    if limit < 2 or not (is_number or name.endswith("KFold")):
        return None
    if (cv if is_number else getattr(cv, "n_splits", 0)) > limit:
        return f"expected at most {limit:,} folds, the {unit}; decrease their number"
    return None
