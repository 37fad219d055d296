"""What both estimators ask of `X`: scikit-learn's checks where `X` has columns, images out."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from sktransfer.data.images import Images, as_images, is_rows, learn_pixel_range


def check_images(
    estimator: BaseEstimator, X: Any, *, reset: bool, sample_weight: Any = None
) -> Images:
    """Validate `X` and turn it into images; in `fit`, learn its columns and its pixel range.

    Parameters
    ----------
    estimator : BaseEstimator
        Has the parameters `image_shape` and `pixel_range`; gets `pixel_range_`, and
        `n_features_in_` and `feature_names_in_` as scikit-learn sets them.
    X : images in any container
    reset : bool
        True in `fit`.
    sample_weight : array-like of shape (N,), float or None
        The pixel range is learned without the images whose weight is 0.

    Raises
    ------
    ValueError, TypeError
        As `as_images` and scikit-learn's `validate_data` do.
    """
    if estimator.image_shape is not None and is_rows(X):
        X = validate_data(estimator, X, reset=reset)
    elif hasattr(X, "columns"):
        validate_data(estimator, X, reset=reset, skip_check_array=True)
    if reset:
        estimator.pixel_range_ = _pixel_range(estimator, X, sample_weight)
    return as_images(X, image_shape=estimator.image_shape, pixel_range=estimator.pixel_range_)


def _pixel_range(
    estimator: BaseEstimator, X: Any, sample_weight: Any
) -> tuple[float, float] | None:
    asked = estimator.pixel_range
    if isinstance(asked, str) and asked == "auto":
        weights = np.asarray(sample_weight)
        if weights.ndim == 1 and not weights.all():
            X = as_images(X, image_shape=estimator.image_shape)
            if len(X) == len(weights):  # where not, an error follows
                X = X.take(np.flatnonzero(weights))
        return learn_pixel_range(X, image_shape=estimator.image_shape)
    try:
        black, white = (float(value) for value in asked)
    except (TypeError, ValueError):
        black = white = 0.0
    if not black < white:
        raise ValueError(
            f"Got pixel_range={asked!r}, but expected 'auto' or the values of black and white, "
            "such as (0, 1) or (0, 255)"
        )
    return black, white
