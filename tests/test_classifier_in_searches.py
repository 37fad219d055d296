"""FineTunedImageClassifier works in scikit-learn's searches, ensembles and pipelines."""

import numpy as np
import pytest
import sklearn
from helpers import X_TEST, Y_TEST, CountingTiny, X, Y, counted, make_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import StackingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_val_score,
    learning_curve,
)
from sklearn.pipeline import make_pipeline

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor

GRID = {"unfreeze": [(0,), (0, 1)], "lr": [1e-3, 1e-4], "dropout": [0.0, 0.2]}


def counting(log, store, **parameters):
    return make_classifier(
        CountingTiny(log), cache=store, max_epochs=2, early_stopping=False, **parameters
    )


@pytest.mark.slow
@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_search_embeds_each_view_once_per_boundary(log, store, folder, n_jobs):
    """The search has 25 fits (8 candidates in 3 folds), and boundaries after blocks 0 and 1."""
    search = GridSearchCV(counting(log, store), GRID, cv=3, n_jobs=n_jobs).fit(X, Y)
    assert search.best_score_ > 0.9
    views, boundaries = 3 * len(X), 2
    assert views * boundaries <= counted(log) <= 1.05 * views * boundaries
    before = counted(log)
    GridSearchCV(counting(log, store), {"unfreeze": GRID["unfreeze"]}, cv=3).fit(X, Y)
    cross_val_score(counting(log, store, unfreeze=(0, 1)), X, Y)
    assert counted(log) == before


@pytest.mark.slow
def test_search_without_a_store_embeds_in_every_fit(log):
    estimator = counting(log, None, unfreeze=(0, 1), augment="light")
    search = GridSearchCV(estimator, {"lr": [1e-3, 1e-4]}, cv=3)
    search.fit(X, Y)
    assert counted(log) == 2 * 3 * (3 * 40 + 20) + 3 * 60


def test_extractor_and_head_stage_share_embeddings(log, store):
    backbone = CountingTiny(log)
    PretrainedFeatureExtractor(backbone, cache=store).fit_transform(X)
    before = counted(log)
    make_classifier(backbone, cache=store, unfreeze=(0,), augment=None).fit(X, Y)
    assert counted(log) == before == len(X)


def test_classifier_is_calibrated():
    classifier = CalibratedClassifierCV(make_classifier(), cv=3).fit(X, Y)
    assert classifier.score(X_TEST, Y_TEST) > 0.9


@pytest.mark.slow
def test_classifier_is_stacked():
    rows = X.reshape(len(X), -1)
    estimators = [
        ("tuned", make_classifier(image_shape=(20, 20, 3))),
        ("linear", LogisticRegression(max_iter=1000)),
    ]
    classifier = StackingClassifier(estimators, cv=3).fit(rows, Y)
    assert classifier.score(X_TEST.reshape(len(X_TEST), -1), Y_TEST) > 0.9


def test_classifier_works_in_cross_val_predict():
    p = cross_val_predict(make_classifier(), X, Y, cv=3, method="predict_proba")
    assert p.shape == (60, 3)
    assert (np.unique(Y)[p.argmax(axis=1)] == Y).mean() > 0.9


@pytest.mark.slow
def test_classifier_works_in_learning_curve():
    sizes, _, scores = learning_curve(
        make_classifier(), X, Y, cv=3, train_sizes=[0.5, 1.0], shuffle=True
    )
    assert sizes.tolist() == [20, 40]
    assert scores.mean(axis=1)[-1] > 0.9


@pytest.mark.slow
def test_classifier_works_in_a_halving_search():
    classifier = make_classifier(early_stopping=False)  # there are too few images to hold any out
    rates = {"lr": [1e-4, 1e-5]}  # with 15 images, the loss of this network rises at 1e-3
    search = HalvingGridSearchCV(classifier, rates, cv=2, min_resources=30, random_state=0)
    assert search.fit(X, Y).score(X_TEST, Y_TEST) > 0.9


@pytest.mark.slow
def test_classifier_works_in_a_threshold_search():
    rows = np.flatnonzero(Y != "owl")
    classifier = TunedThresholdClassifierCV(make_classifier(), cv=3).fit(X[rows], Y[rows])
    test = np.flatnonzero(Y_TEST != "owl")
    assert classifier.score(X_TEST[test], Y_TEST[test]) > 0.8


def test_classifier_transforms_in_a_pipeline():
    model = make_pipeline(make_classifier(), LogisticRegression(max_iter=1000)).fit(X, Y)
    assert model.score(X_TEST, Y_TEST) > 0.9


def test_sample_weight_is_routed_through_a_search():
    weights = np.where(Y == "owl", 0, 1)
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = (
            make_classifier()
            .set_fit_request(sample_weight=True)
            .set_score_request(sample_weight=True)
        )
        search = GridSearchCV(classifier, {"lr": [1e-3]}, cv=2)
        search.fit(X, Y, sample_weight=weights)
    assert search.best_estimator_.classes_.tolist() == ["cat", "dog"]


def test_progress_bar_of_a_search_shows_stages(capsys):
    callback = pytest.importorskip("sklearn.callback")
    pytest.importorskip("rich")
    search = GridSearchCV(make_classifier(), {"lr": [1e-3]}, cv=2).set_callbacks(
        callback.ProgressBar()
    )
    search.fit(X, Y)
    out = capsys.readouterr().out
    assert "last block" in out
    assert "head" in out


@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose_fit_shows_its_stages_but_not_in_a_search(capsys, verbose):
    make_classifier(verbose=verbose).fit(X, Y)
    shown = capsys.readouterr().err
    assert ("last block" in shown) == bool(verbose)
    assert ("Embedding with" in shown) == bool(verbose), "stage 0 must show its images"
    GridSearchCV(make_classifier(verbose=verbose), {"lr": [1e-3]}, cv=2).fit(X, Y)
    assert capsys.readouterr().err == ""


def test_progress_bar_of_a_callback_replaces_the_bar_of_the_images(capsys):
    callback = pytest.importorskip("sklearn.callback")
    pytest.importorskip("rich")
    make_classifier(verbose=1).set_callbacks(callback.ProgressBar()).fit(X, Y)
    assert "Embedding with" not in capsys.readouterr().err


def test_classifier_has_the_documented_parameters():
    parameters = FineTunedImageClassifier().get_params()
    assert parameters["backbone"] == "efficientnet_lite0"
    promised = "weights unfreeze max_epochs lr lr_drop optimizer weight_decay batch_size batch_norm"
    promised += " augment n_views dropout label_smoothing mixup class_weight validation_fraction"
    promised += " early_stopping n_iter_no_change checkpoint_dir image_size image_shape pixel_range"
    promised += (
        " device engine precision n_jobs cache callbacks random_state verbose domain_adversarial"
    )
    assert set(promised.split()) <= set(parameters)
