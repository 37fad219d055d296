"""The data of a fit, without the images that cannot be read.

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sktransfer.data.images import Images
from sktransfer.data.labels import EncodedLabels, labels_of_rows
from sktransfer.utils.errors import ImageError, list_errors, warn_user
from sktransfer.utils.tables import counted

# Name of the validation images in errors.
X_VAL = "X_val"


@dataclass(frozen=True)
class FitData:
    """The arguments of `fit`, and which of their rows are used.

    Parameters
    ----------
    X : images in any container
    y : array-like of shape (N,)
    sample_weight : array-like of shape (N,), float or None
    sample_domain : array-like of shape (N,) or None
    X_val, y_val : images and their labels, or None
    rows, rows_val : ndarray of int or None
        Rows of `X` and of `X_val` that are used; None means all.
    errors : tuple of ImageError
        The images that are left out.
    """

    X: Any
    y: Any
    sample_weight: Any
    sample_domain: Any
    X_val: Any
    y_val: Any
    rows: np.ndarray | None = None
    rows_val: np.ndarray | None = None
    errors: tuple[ImageError, ...] = ()

    def used(self, name: str) -> Any:
        """Return the entries of an argument, such as `"y"`, in the rows that are used."""
        values, rows = getattr(self, name), self.rows
        # A number as sample_weight holds for all rows.
        return values if rows is None or np.isscalar(values) else _select(values, rows)

    def without(self, error: ImageError, images: Images, valid: Images | None) -> FitData:
        """Leave out the images that an error names.

        Parameters
        ----------
        error : ImageError
        images : Images
            Those of `X` that are used now.
        valid : Images or None
            Those of `X_val` that are used now.

        Raises
        ------
        ImageError
            The error itself, if it names none of these images.
        """
        rows = images.without(error)
        rows_val = np.empty(0, int) if valid is None else valid.without(error)
        n_used = len(images) + (0 if valid is None else len(valid))
        if len(rows) + len(rows_val) == n_used:
            raise error
        return replace(
            self,
            rows=rows if self.rows is None else self.rows[rows],
            rows_val=rows_val if self.rows_val is None else self.rows_val[rows_val],
            errors=tuple(ImageError.of([*self.errors, error]).errors),
        )


def _select(values: Any, rows: np.ndarray) -> Any:
    return None if values is None else labels_of_rows(values, rows)


def check_enough_left(data: FitData, labels: EncodedLabels, *, uses_target: bool) -> None:
    """Raise an error if too few images remain without the broken ones.

    Parameters
    ----------
    data : FitData
        Some images are left out.
    labels : EncodedLabels
        Of all images.
    uses_target : bool
        Whether the fit needs images of the target domain.

    Raises
    ------
    ValueError
        If no image of a class, of the target or of `X_val` is left.
    """
    rows = np.empty(0, int) if data.rows is None else data.rows
    totals = np.bincount(labels.y)
    is_left = np.isin(labels.rows, rows)
    lost = np.flatnonzero(np.bincount(labels.y[is_left], minlength=len(totals)) == 0)
    problems = [
        f"{counted(totals[code], 'image')} of the class {labels.classes.tolist()[code]!r}"
        for code in lost
    ]
    if len(lost) == len(totals):
        problems = [f"{counted(totals.sum(), 'image')} in X"]
    if uses_target and len(labels.target) and not np.isin(labels.target, rows).any():
        problems.append(f"{counted(len(labels.target), 'image')} of the target domain")
    if data.X_val is not None and data.rows_val is not None and not len(data.rows_val):
        n_val = sum(error.argument == X_VAL for error in data.errors)
        problems.append(f"{counted(n_val, 'image')} in {X_VAL}")
    if problems:
        raise ValueError(
            f"Got {', '.join(problems[:10])}{', ...' if len(problems) > 10 else ''}, none of which "
            "can be read, but on_error='skip' needs at least one readable image of each class, and "
            "of the target domain and X_val if they are used. Fix the images, or leave out the "
            f"class or the argument. Images that cannot be read{list_errors(data.errors)}"
        )


def warn_of_skipped(data: FitData, n_images: int) -> None:
    """Warn of the broken images that a fit left out, if there are any.

    Parameters
    ----------
    data : FitData
    n_images : int
        Number of images in `X`.
    """
    if not data.errors:
        return
    n_val = sum(error.argument == X_VAL for error in data.errors)
    counts = [f"{len(data.errors) - n_val:,} of {counted(n_images, 'image')}"]
    if data.X_val is not None:
        counts.append(f"{n_val:,} images of {X_VAL}")
    warn_user(
        f"Left out {' and '.join(counts)} that cannot be read; errors_ lists "
        f"all of them{list_errors(data.errors)}",
    )


def warn_of_nan(errors: list[ImageError], n_images: int) -> None:
    """Warn of broken images, whose outputs are NaN."""
    warn_user(
        f"Got {len(errors):,} of {counted(n_images, 'image')} that cannot be read. Their rows are "
        "NaN; leave them out, because argmax of such a row is the first class. predict raises an "
        f"ImageError whose errors lists all of them{list_errors(errors)}",
    )
