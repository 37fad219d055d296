"""Validation of `X` for all estimators: scikit-learn's checks if `X` has columns, then images."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from sktransfer.data.containers import holds_rows, source_of
from sktransfer.data.decoding import resolve_background
from sktransfer.data.images import (
    Images,
    as_images,
    images_of_source,
    learn_pixel_range,
    warn_if_invisible,
)


def check_images(
    estimator: BaseEstimator, X: Any, *, reset: bool, sample_weight: Any = None
) -> Images:
    """Validate `X` and convert it to images; in `fit`, learn its columns and its pixel range.

    Parameters
    ----------
    estimator : BaseEstimator
        Has the parameters `image_shape`, `pixel_range` and `background`. `fit` sets its
        `pixel_range_`, and scikit-learn sets `n_features_in_` and `feature_names_in_`.
    X : images in any container
    reset : bool
        True in `fit`.
    sample_weight : array-like of shape (N,), float or None
        Images whose weight is 0 do not count for the pixel range.

    Raises
    ------
    ValueError, TypeError
        See `as_images` and scikit-learn's `validate_data`.
    """
    background = resolve_background(estimator.background)
    images = _resolve(estimator, X, reset)
    if reset:
        estimator.pixel_range_ = _pixel_range(estimator, images, sample_weight)
    images = as_images(images, pixel_range=estimator.pixel_range_, background=background)
    if reset:
        warn_if_invisible(images)
    return images


def _resolve(estimator: BaseEstimator, X: Any, reset: bool) -> Images:
    """Resolve `X` once; scikit-learn checks rows of numbers and column names."""
    if isinstance(X, Images):
        return as_images(X, image_shape=estimator.image_shape)
    source = source_of(X)
    if estimator.image_shape is not None and holds_rows(source):
        source = validate_data(estimator, X, reset=reset)
    elif hasattr(X, "columns"):
        validate_data(estimator, X, reset=reset, skip_check_array=True)
    return images_of_source(source, image_shape=estimator.image_shape)


def _pixel_range(
    estimator: BaseEstimator, images: Images, sample_weight: Any
) -> tuple[float, float] | None:
    requested = estimator.pixel_range
    if isinstance(requested, str) and requested == "auto":
        weights = np.asarray(sample_weight)
        # A wrong number of weights raises an error later.
        if weights.shape == (len(images),) and not weights.all():
            images = images.take(np.flatnonzero(weights))
        return learn_pixel_range(images)
    try:
        black, white = (float(value) for value in requested)
        if any(isinstance(value, str | bool) for value in requested):
            raise TypeError
    except (TypeError, ValueError):
        black = white = 0.0
    if not black < white:
        raise ValueError(
            f"Got pixel_range={requested!r}, but expected 'auto' or the values of black and white, "
            "such as (0, 1) or (0, 255)"
        )
    return black, white
