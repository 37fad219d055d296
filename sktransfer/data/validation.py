"""Validation of `X` for all estimators: scikit-learn's checks if `X` has columns, then images."""

from __future__ import annotations

import os
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from sktransfer.data.containers import DatasetSource, holds_rows, source_of
from sktransfer.data.decoding import resolve_background
from sktransfer.data.folders import IMAGE_EXTENSIONS
from sktransfer.data.images import (
    Images,
    as_images,
    images_of_source,
    learn_pixel_range,
    warn_if_dark,
    warn_if_invisible,
)
from sktransfer.data.items import has_signature, looks_like_image
from sktransfer.data.remote import as_remote_file
from sktransfer.utils.errors import warn_user


def check_images(
    estimator: BaseEstimator,
    X: Any,
    *,
    reset: bool,
    y: Any = None,
    sample_weight: Any = None,
    rows: np.ndarray | None = None,
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
    y : array-like of shape (N,) or None
        Labels; only whether they were swapped with `X` is checked.
    sample_weight : array-like of shape (N,), float or None
        Images whose weight is 0 do not count for the pixel range.
    rows : ndarray of int or None
        Rows of `X` to use, to which `y` and `sample_weight` belong; None means all. Nothing is
        learned from the others but columns.

    Raises
    ------
    ValueError, TypeError
        See `as_images` and scikit-learn's `validate_data`.

    Warns
    -----
    UserWarning
        In `fit`, if `image_shape` has no effect, or if all transparent images look the same.
        Otherwise, if the images are nearly black in the pixel range that `fit` has learned.
    """
    check_not_swapped(X, y)
    background = resolve_background(estimator.background)
    images = _resolve(estimator, X, reset)
    images = images if rows is None else images.take(rows)
    if reset:
        estimator.pixel_range_ = _pixel_range(estimator, images, sample_weight)
    images = as_images(images, pixel_range=estimator.pixel_range_, background=background)
    if reset:
        warn_if_invisible(images)
        _warn_of_image_shape(images)
    else:
        warn_if_dark(images)
    return images


def check_not_swapped(X: Any, y: Any) -> None:
    """Raise a ValueError if `X` holds labels and `y` images; only their first items are checked.

    Examples
    --------
    >>> check_not_swapped(["cat", "dog"], ["a.png", "b.png"])
    Traceback (most recent call last):
        ...
    ValueError: Got labels as X and images as y; pass the images first, as in fit(X, y)
    """
    if y is None or not _is_image(_first(y)):
        return
    first = _first(X)
    is_label = isinstance(first, Number | str) or getattr(first, "ndim", 1) == 0
    if is_label and not _is_image(first):
        raise ValueError("Got labels as X and images as y; pass the images first, as in fit(X, y)")


def _first(values: Any) -> Any:
    """Return the first item of a container; None if it is empty or a dataset, or no container."""
    try:
        source = values.source if isinstance(values, Images) else source_of(values)
    except (TypeError, ValueError):
        return None
    return None if isinstance(source, DatasetSource) or not len(source) else source[0]


def _is_image(item: Any) -> bool:
    """Return whether an item is an image or the path or URL of one, rather than a label."""
    if isinstance(item, str):
        is_path = Path(item).suffix.lower() in IMAGE_EXTENSIONS or os.path.isfile(item)
        return is_path or as_remote_file(item) is not None
    if isinstance(item, bytes):
        return has_signature(item)
    # A column (N, 1) holds labels.
    return looks_like_image(item) and getattr(item, "shape", None) != (1,)


def _warn_of_image_shape(images: Images) -> None:
    """Warn if `image_shape` is set, but the images are not flattened."""
    first, shape = _first(images), images.image_shape
    sizes = tuple(getattr(first, "shape", ()))
    if shape is None or first is None or len(sizes) == 1 or sizes == shape:
        return
    warn_user(
        f"Got image_shape={shape}, which has no effect, because X has no flattened rows. "
        "image_shape is for flattened rows; for the size of the network's input, set image_size",
    )


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
