"""SelfTrainedImageClassifier: guesses of which a classifier is sure become labels."""

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
    """Make two classes, told apart by the first feature; in the target, by the second better."""
    random, y = np.random.RandomState(0), np.arange(n) % 2
    source = (2 * y - 1)[:, None] * [1, 0] + random.normal(0, 0.6, (n, 2)) * [1, 0.1]
    target = (2 * y - 1)[:, None] * [0.4, 2] + random.normal(0, 0.6, (n, 2))
    return np.concatenate([source, target]), np.tile(y, 2), np.repeat([1, -2], n)


def test_check_estimator():
    results = check_estimator(
        SelfTrainedImageClassifier(LogisticRegression()), on_fail=None, on_skip=None
    )
    failed = [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"]
    assert not failed
    assert [r["status"] for r in results].count("passed") >= 50


def test_it_learns_what_tells_the_classes_of_the_target():
    X, y, domain = shifted()
    ours, theirs = domain > 0, domain < 0
    once = LogisticRegression().fit(X[ours], y[ours])
    again = SelfTrainedImageClassifier(LogisticRegression())
    again.fit(X, np.where(ours, y, -1), sample_domain=domain)
    assert again.score(X[theirs], y[theirs]) > once.score(X[theirs], y[theirs]) + 0.08


def test_of_each_class_the_surest_join_under_what_they_were_guessed_to_be():
    X, y, domain = shifted()
    once = LogisticRegression().fit(X[domain > 0], y[domain > 0])
    found = SelfTrainedImageClassifier(LogisticRegression(), shares=[0.25])
    found.fit(X, y, sample_domain=domain)
    expected = []
    for number in (0, 1):
        guessed = np.flatnonzero((domain < 0) & (once.predict(X) == number))
        sure = once.predict_proba(X)[guessed, number]
        expected += [*guessed[np.argsort(-sure)][: round(len(guessed) / 4)]]
    assert found.pseudo_rows_.tolist() == sorted(expected)
    np.testing.assert_array_equal(found.pseudo_labels_, once.predict(X[found.pseudo_rows_]))
    learned = [*np.flatnonzero(domain > 0), *found.pseudo_rows_]
    again = LogisticRegression().fit(X[learned], [*y[domain > 0], *found.pseudo_labels_])
    np.testing.assert_allclose(found.estimators_[1].coef_, again.coef_)
    mean = (once.predict_proba(X) + again.predict_proba(X)) / 2
    np.testing.assert_allclose(found.predict_proba(X), mean)
    np.testing.assert_array_equal(found.predict(X), mean.argmax(axis=1))


def test_it_is_what_the_same_fits_one_by_one_are():
    y, options = (
        domain_labels("cat"),
        {"unfreeze": (0, 1), "batch_norm": "adapt", "early_stopping": False},
    )
    found = SelfTrainedImageClassifier(make_classifier(**options), shares=[0.5])
    found.fit(BOTH, y, sample_domain=DOMAIN)
    first = make_classifier(**options).fit(BOTH, y, sample_domain=DOMAIN)
    guesses = first.predict(BOTH[found.pseudo_rows_])
    assert found.pseudo_labels_.tolist() == guesses.tolist()
    more = np.ones(len(guesses), int)
    again = make_classifier(**options).fit(
        np.concatenate([BOTH, BOTH[found.pseudo_rows_]]),
        np.concatenate([y, guesses]),
        sample_domain=np.concatenate([DOMAIN, more]),
    )
    assert equal_states(net_state(found.estimators_[0]), net_state(first))
    assert equal_states(net_state(found.estimators_[1]), net_state(again))
    assert not equal_states(net_state(again), net_state(first))
    restored = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(restored.predict_proba(X), found.predict_proba(X))


@pytest.mark.parametrize("garbage", ["cat", "nothing", None])
def test_labels_of_the_target_are_never_read(garbage):
    estimator = make_classifier(unfreeze=0, batch_norm="adapt")
    y = [*Y.tolist(), *[garbage] * 40]
    found = SelfTrainedImageClassifier(estimator).fit([*BOTH], y, sample_domain=DOMAIN)
    expected = SelfTrainedImageClassifier(estimator).fit(
        BOTH, domain_labels("owl"), sample_domain=DOMAIN
    )
    assert found.classes_.tolist() == ["cat", "dog", "owl"]
    np.testing.assert_array_equal(found.predict_proba(X), expected.predict_proba(X))


class Noting(ClassifierMixin, BaseEstimator):
    """Notes what each fit gets."""

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


def test_a_classifier_that_knows_domains_is_told_of_them_in_every_fit():
    notes = []
    found = SelfTrainedImageClassifier(Noting(notes))
    found.fit([[1], [9], [8], [2]], ["a", "?", "b", "?"], sample_domain=[3, -1, 3, -1])
    first = ([1, 9, 8, 2], ["a", "a", "b", "a"], [1, -2, 1, -2])
    again = ([1, 9, 8, 2, 9, 2], [*first[1], "b", "a"], [*first[2], 1, 1])
    assert notes == [first, again, again, again]
    assert (found.pseudo_rows_.tolist(), found.pseudo_labels_.tolist()) == ([1, 3], ["b", "a"])


def test_without_a_target_the_classifier_is_fitted_once(log):
    estimator = make_classifier(CountingTiny(log), unfreeze=0, augment=None)
    expected = clone(estimator).fit(X, Y)
    once = counted(log)
    for domain in (None, np.ones(60, int)):
        log.unlink()
        found = SelfTrainedImageClassifier(estimator).fit(X, Y, sample_domain=domain)
        assert counted(log) == once
        assert len(found.pseudo_rows_) == len(found.pseudo_labels_) == 0
        np.testing.assert_array_equal(found.predict_proba(X), expected.predict_proba(X))


def test_a_pipeline_embeds_each_image_once(log, tmp_path):
    extractor = PretrainedFeatureExtractor(CountingTiny(log), cache=EmbeddingStore(tmp_path))
    found = SelfTrainedImageClassifier(make_pipeline(extractor, LogisticRegression()))
    found.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    assert counted(log) == len(BOTH)
    assert found.score(X_TARGET, colored_images(40, seed=2)[1]) > 0.3


def test_a_search_keeps_the_target_in_all_folds():
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


def test_what_is_in_a_pipeline_is_told_of_domains_where_it_asks_for_them():
    alone = SelfTrainedImageClassifier(make_classifier(unfreeze=0, batch_norm="adapt"))
    alone.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    with sklearn.config_context(enable_metadata_routing=True):
        found = SelfTrainedImageClassifier(in_pipeline())
        found.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    expected = alone.predict_proba(X_TARGET)
    np.testing.assert_array_equal(found.predict_proba(X_TARGET), expected)


def test_what_cannot_be_told_of_domains_is_warned_of():
    inner = GridSearchCV(make_classifier(unfreeze=0, batch_norm="adapt"), {"lr": [1e-3]}, cv=2)
    with pytest.warns(UserWarning, match="GridSearchCV, which does not pass sample_domain on"):
        SelfTrainedImageClassifier(inner, shares=[0.5]).fit(
            BOTH, domain_labels("cat"), sample_domain=DOMAIN
        )


@pytest.mark.parametrize("row", [70, 99])
def test_a_broken_image_is_named_by_its_row(row):
    X = [*BOTH[:row], b"no image", *BOTH[row + 1 :]]
    plain = make_pipeline(PretrainedFeatureExtractor(Tiny), LogisticRegression())
    for estimator in (plain, make_classifier(batch_norm="adapt")):
        with pytest.raises(ImageError) as caught:
            SelfTrainedImageClassifier(estimator).fit(X, domain_labels("?"), sample_domain=DOMAIN)
        assert caught.value.row == row


def test_an_interrupt_ends_all_of_it():
    class Once(Callback):
        def on_epoch_begin(self, net, **kwargs):
            raise KeyboardInterrupt

    classifier = SelfTrainedImageClassifier(make_classifier(callbacks=[Once()], max_epochs=2))
    with pytest.warns(UserWarning, match="Interrupted"):
        classifier.fit(BOTH, domain_labels("?"), sample_domain=DOMAIN)
    assert len(classifier.estimators_) == 1
    assert len(classifier.pseudo_rows_) == 0


def test_without_labels():
    with pytest.raises(ValueError, match="requires y to be passed"):
        SelfTrainedImageClassifier(LogisticRegression()).fit(X, None, sample_domain=[1] * len(X))


def test_a_classifier_has_to_tell_how_sure_it_is():
    with pytest.raises(TypeError, match="but expected a classifier with predict_proba"):
        SelfTrainedImageClassifier(LinearSVC()).fit(*shifted()[:2])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0], "Got 0 in shares, but expected numbers above 0"),
        ([1.5], "Got an entry of shares=1.5, but expected a number from 0 to 1"),
        (0.5, "Got shares=0.5, but expected a list of numbers"),
        (["half"], "Got an entry of shares='half', but expected a number from 0 to 1"),
    ],
)
def test_bad_shares_are_explained(shares, message):
    with pytest.raises(ValueError, match=message):
        SelfTrainedImageClassifier(LogisticRegression(), shares=shares).fit(*shifted()[:2])


def test_bad_domains_are_explained():
    classifier = SelfTrainedImageClassifier(LogisticRegression())
    with pytest.raises(ValueError, match="Got no image of the source in sample_domain"):
        classifier.fit([[1], [2]], [0, 1], sample_domain=[-1, -1])
