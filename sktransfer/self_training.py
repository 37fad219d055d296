"""SelfTrainedImageClassifier: learn from a source and from confident predictions on a target.

Shapes: N images, M of them with pseudo-labels, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import Tags, _safe_indexing, get_tags
from sklearn.utils.metadata_routing import _routing_enabled, get_routing_for_object
from sklearn.utils.validation import (
    _num_samples,
    check_is_fitted,
    has_fit_parameter,
)

from sktransfer.data.images import as_images, learn_pixel_range
from sktransfer.data.labels import (
    check_class_labels,
    check_not_missing,
    check_one_per_image,
    labels_of_rows,
    split_domains,
)
from sktransfer.transforms.loader import find_broken
from sktransfer.utils.errors import ImageError, check_number, warn_user
from sktransfer.utils.runtime import resolve_threads


class SelfTrainedImageClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Self-training: train on the labels of one domain and on pseudo-labels of another.

    The first classifier is trained on the source, whose labels are known, and predicts the labels
    of the target. The most confident predictions of each class are added to the training set as
    pseudo-labels, and another classifier is trained on both. The same share of each class is added,
    because otherwise the easiest classes would soon dominate the training set. The mean of the
    probabilities of all classifiers gives the pseudo-labels and the predictions, so an error of a
    single classifier counts less.

    Parameters
    ----------
    estimator : classifier with `predict_proba`
        Such as `FineTunedImageClassifier(batch_norm="adapt")`, or a Pipeline that begins with a
        `PretrainedFeatureExtractor`. It is cloned. If its `fit` takes `sample_domain`, it is fitted
        on the images of both domains. A Pipeline or a search takes `sample_domain` if metadata
        routing is enabled and an estimator inside requests it. Otherwise the classifier is fitted
        on images with labels or pseudo-labels only.
    shares : sequence of float, default=(0.5, 0.7, 0.9)
        One entry for each classifier after the first: the share of the predictions of each class
        that is added to the training set; above 0, at most 1.

    Attributes
    ----------
    estimators_ : list of classifier
        The fitted classifiers, in order.
    classes_ : ndarray of shape (K,)
        The labels, sorted.
    pseudo_rows_ : ndarray of shape (M,), int
        Rows of `X` that were added to the training set of the last fit.
    pseudo_labels_ : ndarray of shape (M,)
        Pseudo-labels of these rows.
    n_features_in_ : int
        Number of columns seen in `fit` if the classifier has this attribute.
    feature_names_in_ : ndarray of str
        Column names seen in `fit` if the classifier has this attribute.

    See Also
    --------
    FineTunedImageClassifier : With `batch_norm="adapt"`, a good classifier to begin with.
    sklearn.semi_supervised.SelfTrainingClassifier : Self-training on numeric rows of one domain.

    Notes
    -----
    Wrong pseudo-labels are learned too: if most predictions of the first classifier are wrong,
    self-training does not help. A prediction takes the time of all classifiers together.

    Sources: Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep
    Neural Networks", 2013; for the same share of each class, Zou et al., "Unsupervised Domain
    Adaptation for Semantic Segmentation via Class-Balanced Self-Training", ECCV 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTunedImageClassifier, SelfTrainedImageClassifier
    >>> digits = load_digits()
    >>> X = np.concatenate([digits.images[:50], 16 - digits.images[50:100]])  # black, then white
    >>> y = np.concatenate([digits.target[:50], np.full(50, -1)])
    >>> first = FineTunedImageClassifier(
    ...     image_size=32, unfreeze=0, augment=None, batch_norm="adapt", random_state=0
    ... )
    >>> classifier = SelfTrainedImageClassifier(first, shares=[0.5])
    >>> classifier = classifier.fit(X, y, sample_domain=np.repeat([1, -2], 50))
    >>> bool((classifier.pseudo_rows_ >= 50).all())
    True
    """

    def __init__(self, estimator: Any, *, shares: Sequence[float] = (0.5, 0.7, 0.9)) -> None:
        self.estimator = estimator
        self.shares = shares

    def fit(self, X: Any, y: Any, *, sample_domain: Any = None) -> SelfTrainedImageClassifier:
        """Train the first classifier, and further ones with pseudo-labels of the target.

        Parameters
        ----------
        X : input of the classifier, of length N
        y : array-like of shape (N,)
            Class labels; values for the target are ignored.
        sample_domain : array-like of shape (N,), int, default=None
            Positive for the source, negative for the target. With `None`, all images are the
            source, and the classifier is fitted once.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a share is out of range, `sample_domain` is invalid, or labels are missing.
        TypeError
            If the classifier has no `predict_proba`.
        ImageError
            If images cannot be read; names all broken files of `X`.
        """
        if y is None:
            raise ValueError(
                "SelfTrainedImageClassifier requires y to be passed, but the target y is None"
            )
        if isinstance(self.shares, str) or not hasattr(self.shares, "__len__"):
            raise ValueError(f"Got shares={self.shares!r}, but expected a list of numbers")
        for share in self.shares:
            remedy = "a share of 0 adds no pseudo-labels; leave it out" if share == 0 else ""
            check_number("an entry of shares", share, Real, 0, 1, above_low=True, remedy=remedy)
        if isinstance(self.estimator, type) or not hasattr(self.estimator, "predict_proba"):
            raise TypeError(
                f"Got {self.estimator!r}, but expected a classifier with predict_proba, which "
                "measures its confidence; wrap it in a sklearn.calibration.CalibratedClassifierCV"
            )
        self.pseudo_rows_ = np.empty(0, int)
        with _all_broken_in_errors(X):
            return self._fit_all(X, y, sample_domain)

    def _fit_all(self, X: Any, y: Any, sample_domain: Any) -> SelfTrainedImageClassifier:
        if sample_domain is None:
            check_not_missing(y)
            self._set_estimators([clone(self.estimator).fit(X, y)])
            self.pseudo_labels_ = self.classes_[:0]
            return self
        check_one_per_image("y", y, X)
        source, target = split_domains(sample_domain, _num_samples(X))
        source_labels = check_class_labels(
            check_not_missing(labels_of_rows(y, source), "y", source, warn=True)
        )
        labels = np.repeat(source_labels[:1], len(source) + len(target))
        labels[source], self.pseudo_labels_ = source_labels, source_labels[:0]
        _warn_if_domains_are_lost(self.estimator)
        self._set_estimators([self._fit(X, labels, target)])
        for share in self.shares if len(target) else ():
            if getattr(self.estimators_[-1], "interrupted_", False):
                break
            with _rows_in_errors(target):
                probabilities = self.predict_proba(_safe_indexing(X, target))
            # Those of broken images are NaN if the classifier leaves these out.
            readable = np.flatnonzero(~np.isnan(probabilities).any(axis=1))
            if not len(readable):
                break
            probabilities = probabilities[readable]
            codes = probabilities.argmax(axis=1)
            confident = _most_confident(probabilities.max(axis=1), codes, share)
            self.pseudo_rows_ = target[readable[confident]]
            self.pseudo_labels_ = self.classes_[codes[confident]]
            self.estimators_.append(self._fit(X, labels, target))
        return self

    def _fit(self, X: Any, labels: np.ndarray, target: np.ndarray) -> Any:
        """Fit a new classifier; rows with a pseudo-label are repeated as rows of the source."""
        estimator = clone(self.estimator)
        rows = np.concatenate([np.arange(len(labels)), self.pseudo_rows_])
        y = np.concatenate([labels, self.pseudo_labels_])
        domain = np.ones(len(rows), int)
        domain[target] = -2
        fit_params = {"sample_domain": domain}
        if not _takes_domains(estimator):
            is_labeled, fit_params = domain > 0, {}
            rows, y = rows[is_labeled], y[is_labeled]
        with _rows_in_errors(rows):
            return estimator.fit(_safe_indexing(X, rows), y, **fit_params)

    def _set_estimators(self, estimators: list[Any]) -> None:
        self.estimators_, self.classes_ = estimators, estimators[0].classes_
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(estimators[0], name):
                setattr(self, name, getattr(estimators[0], name))

    def predict(self, X: Any) -> np.ndarray:
        """Predict the label of each image, ndarray of shape (N,).

        Raises
        ------
        ImageError
            If images cannot be read, even if the classifiers have `on_error="skip"`.
        """
        check_is_fitted(self)
        probabilities = self.predict_proba(X)
        if np.isnan(probabilities).any():
            self.estimators_[0].predict(X)  # raises an error that names the images
        return self.classes_[probabilities.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the mean class probabilities of the classifiers, ndarray of shape (N, K).

        If the classifiers have `on_error="skip"`, the rows of images that cannot be read are NaN.
        """
        check_is_fitted(self)
        return np.mean([fitted.predict_proba(X) for fitted in self.estimators_], axis=0)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on images and their labels, 0-1; labels must not be missing."""
        return super().score(X, check_not_missing(y), sample_weight)

    def __sklearn_tags__(self) -> Tags:
        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.input_tags, tags.classifier_tags = inner.input_tags, inner.classifier_tags
        return tags


def _takes_domains(estimator: Any) -> bool:
    """Return whether `fit` takes `sample_domain`, itself or by metadata routing."""
    if has_fit_parameter(estimator, "sample_domain"):
        return True
    router = get_routing_for_object(estimator)
    return _routing_enabled() and bool(router.consumes("fit", ["sample_domain"]))


def _warn_if_domains_are_lost(estimator: Any) -> None:
    """Warn if an estimator does not pass `sample_domain` on to a classifier that needs it."""
    if _takes_domains(estimator):
        return
    for name, inner in estimator.get_params().items():
        weight = getattr(inner, "domain_adversarial", None)
        if weight is not None and (weight or inner.batch_norm == "adapt"):
            warn_user(
                f"Got {type(estimator).__name__}, which does not pass sample_domain on to its "
                f"{name!r}, so {name!r} does not adapt to the target. Enable metadata routing, and "
                f"call set_fit_request(sample_domain=True) on {name!r}",
            )


@contextlib.contextmanager
def _all_broken_in_errors(X: Any) -> Iterator[None]:
    """Add all other broken files of `X` to an `ImageError`: the fits read some after others."""
    try:
        yield
    except ImageError as error:
        broken: list[ImageError] = []
        # Rows of numbers, whose shape is not known here, cannot be read, but are not files either.
        with contextlib.suppress(TypeError, ValueError):
            images = as_images(X, pixel_range=learn_pixel_range(X))
            files = [row for row in range(len(images)) if images.path(row) is not None]
            broken = find_broken([images.take(files)], resolve_threads(None))
        raise ImageError.of([error, *broken]) from error


@contextlib.contextmanager
def _rows_in_errors(rows: np.ndarray) -> Iterator[None]:
    """Replace the rows of an `ImageError`, positions in `rows`, with the rows of the user's `X`."""
    try:
        yield
    except ImageError as several:
        raise ImageError.of(
            ImageError(
                error.reason,
                None if error.row is None else int(rows[error.row]),
                error.source,
                argument=error.argument,
            )
            for error in several.errors
        ) from several


def _most_confident(confidence: np.ndarray, codes: np.ndarray, share: float) -> np.ndarray:
    """Return the sorted rows of a share of the predictions of each class, at least one of each.

    Examples
    --------
    >>> confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    >>> _most_confident(confidence, np.array([0, 0, 0, 0, 1]), 0.5)
    array([0, 1, 4])
    """
    chosen = []
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code)
        count = max(1, round(share * len(rows)))
        chosen.append(rows[np.argsort(-confidence[rows], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))
