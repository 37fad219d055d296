"""SelfTrainedImageClassifier: learn from a source and from confident predictions on a target.

Shapes: N images, M of them guessed, K classes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import Tags, _safe_indexing, get_tags
from sklearn.utils.metadata_routing import _routing_enabled, get_routing_for_object
from sklearn.utils.validation import (
    _num_samples,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    has_fit_parameter,
)

from sktransfer.data.labels import split_domains
from sktransfer.utils.errors import ImageError, check_number


class SelfTrainedImageClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """Let a classifier label the images of another domain, and learn from what it is sure of.

    The classifier learns from the source, whose labels are known, and guesses those of the target.
    Of each class that it sees there, the images of which it is surest join the source, with the
    guesses as labels, and another one learns from both. The same share of each class joins, since
    the easiest ones alone would soon be all that is seen. All of them guess and predict together,
    by the mean of their probabilities, so that what one has learned wrongly counts less.

    Parameters
    ----------
    estimator : classifier with `predict_proba`
        Such as `FineTunedImageClassifier(batch_norm="adapt")`, or a Pipeline that begins with a
        `PretrainedFeatureExtractor`. It is cloned. Where its `fit` takes `sample_domain`, each fit
        tells it which images are the target's; a Pipeline or a search takes it where metadata
        routing is on and what is in it asks for it. Otherwise it sees what is labeled alone.
    shares : sequence of float, default=(0.5, 0.7, 0.9)
        One entry for each classifier that learns after the first: of the images that are guessed
        to be of a class, how many join; above 0, at most 1.

    Attributes
    ----------
    estimators_ : list of classifier
        The first, and the others in their order.
    classes_ : ndarray of shape (K,)
        The labels, sorted.
    pseudo_rows_ : ndarray of shape (M,), int
        Rows of `X` that joined the source in the last fit.
    pseudo_labels_ : ndarray of shape (M,)
        What they were guessed to be.
    n_features_in_ : int
        Columns seen in `fit`, where the classifier knows them.
    feature_names_in_ : ndarray of str
        Column names seen in `fit`, where the classifier knows them.

    See Also
    --------
    FineTunedImageClassifier : With `batch_norm="adapt"`, what to begin with.
    sklearn.semi_supervised.SelfTrainingClassifier : For numeric rows of one domain.

    Notes
    -----
    Wrong guesses are learned too: where the first classifier is mostly wrong, nothing is gained. A
    prediction takes as long as those of all classifiers.

    Sources: Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep
    Neural Networks", 2013; for the same share of each class, Zou et al., "Unsupervised Domain
    Adaptation for Semantic Segmentation via Class-Balanced Self-Training", ECCV 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sktransfer import FineTunedImageClassifier, SelfTrainedImageClassifier
    >>> digits = load_digits()
    >>> X = np.concatenate([digits.images[:100], 16 - digits.images[100:200]])  # black, then white
    >>> y = np.concatenate([digits.target[:100], np.full(100, -1)])
    >>> first = FineTunedImageClassifier(
    ...     image_size=32, unfreeze=0, augment=None, batch_norm="adapt", random_state=0
    ... )
    >>> classifier = SelfTrainedImageClassifier(first, shares=[0.5])
    >>> classifier = classifier.fit(X, y, sample_domain=np.repeat([1, -2], 100))
    >>> bool((classifier.pseudo_rows_ >= 100).all())
    True
    """

    def __init__(self, estimator: Any, *, shares: Sequence[float] = (0.5, 0.7, 0.9)) -> None:
        self.estimator = estimator
        self.shares = shares

    def fit(self, X: Any, y: Any, *, sample_domain: Any = None) -> SelfTrainedImageClassifier:
        """Train the classifier, let it guess, and train it again.

        Parameters
        ----------
        X : what the classifier takes, of length N
        y : array-like of shape (N,)
            Class labels; what stands there for the target is never read.
        sample_domain : array-like of shape (N,), int, default=None
            A positive number for the source, a negative one for the target. `None`: all is the
            source, and the classifier is fitted once.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For shares out of range, or domains that are none.
        TypeError
            Where the classifier tells no probabilities.
        """
        if y is None:
            raise ValueError(
                "SelfTrainedImageClassifier requires y to be passed, but the target y is None"
            )
        if isinstance(self.shares, str) or not isinstance(self.shares, Iterable):
            raise ValueError(f"Got shares={self.shares!r}, but expected a list of numbers")
        for share in self.shares:
            check_number("an entry of shares", share, Real, 0, 1)
            if not share:
                raise ValueError("Got 0 in shares, so that nothing would join; leave it out")
        if not hasattr(self.estimator, "predict_proba"):
            raise TypeError(
                f"Got {self.estimator!r}, but expected a classifier with predict_proba, to tell "
                "how sure it is; a sklearn.calibration.CalibratedClassifierCV around it has one"
            )
        self.pseudo_rows_ = np.empty(0, int)
        if sample_domain is None:
            self._take([clone(self.estimator).fit(X, y)])
            self.pseudo_labels_ = self.classes_[:0]
            return self
        check_consistent_length(X, y)
        source, target = split_domains(sample_domain, _num_samples(X))
        known = column_or_1d(_safe_indexing(y, source), warn=True)
        labels = np.repeat(known[:1], len(source) + len(target))
        labels[source], self.pseudo_labels_ = known, known[:0]
        _warn_of_blind(self.estimator)
        self._take([self._fit(X, labels, target)])
        for share in self.shares if len(target) else ():
            if getattr(self.estimators_[-1], "interrupted_", False):
                break
            with _rows_of(target):
                probability = self.predict_proba(_safe_indexing(X, target))
            guesses = probability.argmax(axis=1)
            surest = _surest(probability.max(axis=1), guesses, share)
            self.pseudo_rows_, self.pseudo_labels_ = target[surest], self.classes_[guesses[surest]]
            self.estimators_.append(self._fit(X, labels, target))
        return self

    def _fit(self, X: Any, labels: np.ndarray, target: np.ndarray) -> Any:
        """Fit a new classifier on what has a label, known or guessed; the target's say nothing."""
        estimator = clone(self.estimator)
        rows = np.concatenate([np.arange(len(labels)), self.pseudo_rows_])
        y = np.concatenate([labels, self.pseudo_labels_])
        domain = np.ones(len(rows), int)
        domain[target] = -2
        told = {"sample_domain": domain}
        if not _takes_domains(estimator):
            labeled, told = domain > 0, {}
            rows, y = rows[labeled], y[labeled]
        with _rows_of(rows):
            return estimator.fit(_safe_indexing(X, rows), y, **told)

    def _take(self, estimators: list[Any]) -> None:
        self.estimators_, self.classes_ = estimators, estimators[0].classes_
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(estimators[0], name):
                setattr(self, name, getattr(estimators[0], name))

    def predict(self, X: Any) -> np.ndarray:
        """Predict a label for each image, ndarray of shape (N,)."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict how probable each class is, ndarray of shape (N, K): the classifiers' mean."""
        check_is_fitted(self)
        return np.mean([each.predict_proba(X) for each in self.estimators_], axis=0)

    def __sklearn_tags__(self) -> Tags:
        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.input_tags, tags.classifier_tags = inner.input_tags, inner.classifier_tags
        return tags


def _takes_domains(estimator: Any) -> bool:
    """Whether `fit` can be told the domains: by itself, or because what is in it asks for them."""
    if has_fit_parameter(estimator, "sample_domain"):
        return True
    router = get_routing_for_object(estimator)
    return _routing_enabled() and bool(router.consumes("fit", ["sample_domain"]))


def _warn_of_blind(estimator: Any) -> None:
    """Warn of a classifier of ours inside another estimator that does not hand domains on."""
    if _takes_domains(estimator):
        return
    for name, inner in estimator.get_params().items():
        weight = getattr(inner, "domain_adversarial", None)
        if weight is not None and (weight or inner.batch_norm == "adapt"):
            warnings.warn(
                f"{type(estimator).__name__} does not tell its {name!r} which images are the "
                "target's, so that it adapts to none. Switch metadata routing on, and let it ask "
                "for them: set_fit_request(sample_domain=True)",
                stacklevel=3,
            )


@contextlib.contextmanager
def _rows_of(rows: np.ndarray) -> Iterator[None]:
    """Let an error name the row of the user's `X` that a broken image comes from."""
    try:
        yield
    except ImageError as error:
        row = None if error.row is None else int(rows[error.row])
        raise ImageError(error.reason, row, error.source) from error


def _surest(confidence: np.ndarray, guesses: np.ndarray, share: float) -> np.ndarray:
    """Select the same share of what was guessed to be of each class, at least one; rows, sorted.

    Examples
    --------
    >>> confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    >>> _surest(confidence, np.array([0, 0, 0, 0, 1]), 0.5)
    array([0, 1, 4])
    """
    rows = []
    for number in np.unique(guesses):
        own = np.flatnonzero(guesses == number)
        most = max(1, round(share * len(own)))
        rows.append(own[np.argsort(-confidence[own], kind="stable")[:most]])
    return np.sort(np.concatenate(rows))
