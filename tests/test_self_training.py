"""SelfTrainedImageClassifier adds confident predictions on the target to the labels."""

import pickle

import numpy as np
import pytest
import sklearn
from helpers import (
    BOTH,
    DOMAIN,
    X_TARGET,
    CountingTiny,
    Tiny,
    X,
    Y,
    colored_images,
    counted,
    domain_labels,
    equal_states,
    make_classifier,
    net_state,
)
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator
from skorch.callbacks import Callback

from sktransfer import ImageError, PretrainedFeatureExtractor, SelfTrainedImageClassifier
from sktransfer.store.store import EmbeddingStore


def shifted(n=200):
    """Draw two classes that the first feature separates; in the target, the second does better."""
    random, y = np.random.RandomState(0), np.arange(n) % 2
    source = (2 * y - 1)[:, None] * [1, 0] + random.normal(0, 0.6, (n, 2)) * [1, 0.1]
    target = (2 * y - 1)[:, None] * [0.4, 2] + random.normal(0, 0.6, (n, 2))
    return np.concatenate([source, target]), np.tile(y, 2), np.repeat([1, -2], n)


def test_self_training_passes_check_estimator():
    results = check_estimator(
        SelfTrainedImageClassifier(LogisticRegression()), on_fail=None, on_skip=None
    )
    failed = [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"]
    assert not failed
    assert [r["status"] for r in results].count("passed") >= 50


def test_self_training_improves_the_target_score():
    X, y, domain = shifted()
    source, target = domain > 0, domain < 0
    source_only = LogisticRegression().fit(X[source], y[source])
    self_trained = SelfTrainedImageClassifier(LogisticRegression())
    self_trained.fit(X, np.where(source, y, -1), sample_domain=domain)
    assert self_trained.score(X[target], y[target]) > source_only.score(X[target], y[target]) + 0.08


def test_most_confident_predictions_of_each_class_join():
    X, y, domain = shifted()
    first = LogisticRegression().fit(X[domain > 0], y[domain > 0])
    self_trained = SelfTrainedImageClassifier(LogisticRegression(), shares=[0.25])
    self_trained.fit(X, y, sample_domain=domain)
    expected = []
    for number in (0, 1):
        guessed = np.flatnonzero((domain < 0) & (first.predict(X) == number))
        sure = first.predict_proba(X)[guessed, number]
        expected += [*guessed[np.argsort(-sure)][: round(len(guessed) / 4)]]
    assert self_trained.pseudo_rows_.tolist() == sorted(expected)
    np.testing.assert_array_equal(
        self_trained.pseudo_labels_, first.predict(X[self_trained.pseudo_rows_])
    )
    learned = [*np.flatnonzero(domain > 0), *self_trained.pseudo_rows_]
    second = LogisticRegression().fit(X[learned], [*y[domain > 0], *self_trained.pseudo_labels_])
    np.testing.assert_allclose(self_trained.estimators_[1].coef_, second.coef_)
    mean = (first.predict_proba(X) + second.predict_proba(X)) / 2
    np.testing.assert_allclose(self_trained.predict_proba(X), mean)
    np.testing.assert_array_equal(self_trained.predict(X), mean.argmax(axis=1))


def test_self_training_equals_the_same_fits_one_by_one():
    y, options = (
        domain_labels("cat"),
        {"unfreeze": (0, 1), "batch_norm": "adapt", "early_stopping": False},
    )
    self_trained = SelfTrainedImageClassifier(make_classifier(**options), shares=[0.5])
    self_trained.fit(BOTH, y, sample_domain=DOMAIN)
    first = make_classifier(**options).fit(BOTH, y, sample_domain=DOMAIN)
    guesses = first.predict(BOTH[self_trained.pseudo_rows_])
    assert self_trained.pseudo_labels_.tolist() == guesses.tolist()
    ones = np.ones(len(guesses), int)
    second = make_classifier(**options).fit(
        np.concatenate([BOTH, BOTH[self_trained.pseudo_rows_]]),
        np.concatenate([y, guesses]),
        sample_domain=np.concatenate([DOMAIN, ones]),
    )
    assert equal_states(net_state(self_trained.estimators_[0]), net_state(first))
    assert equal_states(net_state(self_trained.estimators_[1]), net_state(second))
    assert not equal_states(net_state(second), net_state(first))
    restored = pickle.loads(pickle.dumps(self_trained))
    np.testing.assert_array_equal(restored.predict_proba(X), self_trained.predict_proba(X))


@pytest.mark.slow_cases("nothing", "None")
@pytest.mark.parametrize("garbage", ["cat", "nothing", None])
def test_target_labels_are_never_read(garbage):
    estimator = make_classifier(unfreeze=0, batch_norm="adapt")
    y = [*Y.tolist(), *[garbage] * 40]
    classifier = SelfTrainedImageClassifier(estimator).fit([*BOTH], y, sample_domain=DOMAIN)
    expected = SelfTrainedImageClassifier(estimator).fit(
        BOTH, domain_labels("owl"), sample_domain=DOMAIN
    )
    assert classifier.classes_.tolist() == ["cat", "dog", "owl"]
    np.testing.assert_array_equal(classifier.predict_proba(X), expected.predict_proba(X))


class Noting(ClassifierMixin, BaseEstimator):
    """Records the arguments of each fit."""

    def __init__(self, notes=None):
        self.notes = notes

    def __sklearn_clone__(self):
        return Noting(self.notes)

    def fit(self, X, y, sample_domain=None):
        self.notes.append((np.ravel(X).tolist(), list(y), list(sample_domain)))
        self.classes_ = np.unique(np.asarray(y)[np.asarray(sample_domain) > 0])
        return self

    def predict_proba(self, X):
        second = np.ravel(X) / 10
        return np.stack([1 - second, second], axis=1)


def test_sample_domain_is_passed_to_every_fit():
    notes = []
    classifier = SelfTrainedImageClassifier(Noting(notes))
    classifier.fit([[1], [9], [8], [2]], ["a", "?", "b", "?"], sample_domain=[3, -1, 3, -1])
    first = ([1, 9, 8, 2], ["a", "a", "b", "a"], [1, -2, 1, -2])
    later = ([1, 9, 8, 2, 9, 2], [*first[1], "b", "a"], [*first[2], 1, 1])
    assert notes == [first, later, later, later]
    assert (classifier.pseudo_rows_.tolist(), classifier.pseudo_labels_.tolist()) == (
        [1, 3],
        ["b", "a"],
    )


def test_classifier_is_fitted_once_without_a_target(log):
    estimator = make_classifier(CountingTiny(log), unfreeze=0, augment=None)
    expected = clone(estimator).fit(X, Y)
    count = counted(log)
    for domain in (None, np.ones(60, int)):
        log.unlink()
        classifier = SelfTrainedImageClassifier(estimator).fit(X, Y, sample_domain=domain)
        assert counted(log) == count
        assert len(classifier.pseudo_rows_) == len(classifier.pseudo_labels_) == 0
        np.testing.assert_array_equal(classifier.predict_proba(X), expected.predict_proba(X))


def test_self_training_of_a_pipeline_embeds_each_image_once(log, tmp_path):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=EmbeddingStore(tmp_path))
    classifier = SelfTrainedImageClassifier(
        make_pipeline(extractor, LogisticRegression(max_iter=1000))
    )
    classifier.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    assert counted(log) == len(BOTH)
    assert classifier.score(X_TARGET, colored_images(40, seed=2)[1]) > 0.3


def test_search_keeps_the_target_in_all_folds():
    folds = PredefinedSplit(np.r_[np.arange(60) % 2, np.full(40, -1)])
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = SelfTrainedImageClassifier(make_classifier(unfreeze=0, batch_norm="adapt"))
        classifier.set_fit_request(sample_domain=True)
        search = GridSearchCV(
            classifier, {"shares": [(0.3,), (0.6,)]}, cv=folds, error_score="raise"
        )
        search.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    joined = search.best_estimator_.pseudo_rows_
    assert len(joined) > 8
    assert (joined >= 60).all()


def in_pipeline(**parameters):
    classifier = make_classifier(unfreeze=0, batch_norm="adapt", **parameters)
    return make_pipeline(classifier.set_fit_request(sample_domain=True))


def test_sample_domain_is_routed_into_a_pipeline_on_request():
    plain = SelfTrainedImageClassifier(make_classifier(unfreeze=0, batch_norm="adapt"))
    plain.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = SelfTrainedImageClassifier(in_pipeline())
        classifier.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    expected = plain.predict_proba(X_TARGET)
    np.testing.assert_array_equal(classifier.predict_proba(X_TARGET), expected)


def test_meta_estimator_without_domain_routing_warns():
    inner = GridSearchCV(make_classifier(unfreeze=0, batch_norm="adapt"), {"lr": [1e-3]}, cv=2)
    with pytest.warns(UserWarning, match="GridSearchCV, which does not pass sample_domain on"):
        SelfTrainedImageClassifier(inner, shares=[0.5]).fit(
            BOTH, domain_labels("cat"), sample_domain=DOMAIN
        )


@pytest.mark.parametrize("row", [70, 99])
def test_broken_image_is_named_by_its_row(row):
    X = [*BOTH[:row], b"no image", *BOTH[row + 1 :]]
    plain = make_pipeline(PretrainedFeatureExtractor(Tiny), LogisticRegression(max_iter=1000))
    for estimator in (plain, make_classifier(batch_norm="adapt")):
        with pytest.raises(ImageError) as caught:
            SelfTrainedImageClassifier(estimator).fit(X, domain_labels("?"), sample_domain=DOMAIN)
        assert caught.value.row == row


def test_interrupt_ends_self_training():
    class Once(Callback):
        def on_epoch_begin(self, net, **kwargs):
            raise KeyboardInterrupt

    classifier = SelfTrainedImageClassifier(make_classifier(callbacks=[Once()], max_epochs=2))
    with pytest.warns(UserWarning, match="interrupted in stage"):
        classifier.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    assert len(classifier.estimators_) == 1
    assert len(classifier.pseudo_rows_) == 0


def test_missing_y_is_rejected():
    with pytest.raises(ValueError, match="requires y to be passed"):
        SelfTrainedImageClassifier(LogisticRegression()).fit(X, None, sample_domain=[1] * len(X))


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_labels_are_rejected(missing):
    features, y, domain = shifted(20)
    labels = [f"class {label}" for label in y]
    classifier = SelfTrainedImageClassifier(LogisticRegression())
    labels[30] = missing  # in the target
    classifier.fit(features, labels, sample_domain=domain)
    assert classifier.classes_.tolist() == ["class 0", "class 1"]
    with pytest.raises(ValueError, match=r"^Got 1 missing label in y, in row 30, but"):
        classifier.fit(features, labels)
    with pytest.raises(ValueError, match=r"^Got 1 missing label in y, in row 30, but"):
        classifier.score(features, labels)
    labels[3] = missing
    with pytest.raises(ValueError, match=r"^Got 1 missing label in y, in row 3, but"):
        classifier.fit(features, labels, sample_domain=domain)


def test_classifier_without_predict_proba_is_rejected():
    with pytest.raises(TypeError, match="but expected a classifier with predict_proba"):
        SelfTrainedImageClassifier(LinearSVC()).fit(*shifted()[:2])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0], "Got an entry of shares=0, but expected a number above 0 and at most 1"),
        ([1.5], "Got an entry of shares=1.5, but expected a number above 0 and at most 1"),
        (0.5, "Got shares=0.5, but expected a list of numbers"),
        (["half"], "Got an entry of shares='half', but expected a number above 0 and at most 1"),
    ],
)
def test_invalid_shares_are_rejected(shares, message):
    with pytest.raises(ValueError, match=message):
        SelfTrainedImageClassifier(LogisticRegression(), shares=shares).fit(*shifted()[:2])


def test_domains_without_a_source_are_rejected():
    classifier = SelfTrainedImageClassifier(LogisticRegression())
    with pytest.raises(ValueError, match="Got no image of the source in sample_domain"):
        classifier.fit([[1], [2]], [0, 1], sample_domain=[-1, -1])


@pytest.mark.parametrize(
    "shares",
    [
        None,
        "0.5",
        0.5,
        [0],
        [float("nan")],
        [True],
        ["0.5"],
        [2],
        [-1],
        [float("inf")],
        iter([0.5]),
    ],
)
def test_shares_at_the_edge_are_rejected(shares):
    with pytest.raises(ValueError, match=r"^Got (an entry of )?shares="):
        SelfTrainedImageClassifier(LogisticRegression(), shares=shares).fit([[0], [1]], [0, 1])


@pytest.mark.parametrize("estimator", [None, 3, "x", LogisticRegression, LinearSVC(), []])
def test_estimator_without_probabilities_is_rejected(estimator):
    with pytest.raises(TypeError, match=r"^Got .*but expected a classifier with predict_proba"):
        SelfTrainedImageClassifier(estimator).fit([[0], [1]], [0, 1])


def test_fit_and_predict_name_all_broken_images_by_row():
    broken = [70, 75, 99]
    X = [b"no image" if row in broken else image for row, image in enumerate(BOTH)]
    classifier = SelfTrainedImageClassifier(make_classifier(batch_norm="adapt"))
    with pytest.raises(ImageError) as caught:
        classifier.fit(X, domain_labels("?"), sample_domain=DOMAIN)
    assert [error.row for error in caught.value.errors] == broken
