"""The splits of a `cv` parameter, checked before any image is embedded.

Shapes: N images.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from sklearn.model_selection import check_cv


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
        If `cv` is invalid.

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
        raise ValueError(
            f"Got cv={cv!r}, but expected an int of at least 2, a splitter, or pairs (train, test) "
            f"of rows below {n:,} ({error})"
        ) from error
