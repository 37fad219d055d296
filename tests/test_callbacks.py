"""The estimators work with scikit-learn's callbacks."""

import warnings

import pytest
from helpers import Tiny, colored_images
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline

from sktransfer import FineTunedImageClassifier, PretrainedFeatureExtractor

callback = pytest.importorskip("sklearn.callback")

X, y = colored_images(30)


def classifier(**parameters):
    usual = {"unfreeze": (0, 1), "max_epochs": 2, "n_views": 1, "random_state": 0, "cache": None}
    return FineTunedImageClassifier(Tiny, **{**usual, **parameters})


@pytest.mark.parametrize("averaging", [1.0, 0.5, "auto"])
def test_scoring_monitor_scores_the_classifier_after_each_epoch(averaging):
    monitor = callback.ScoringMonitor(scoring="neg_log_loss")
    fitted = classifier(averaging=averaging).set_callbacks(monitor).fit(X, y)
    scores = {row["task_id_path"]: row["neg_log_loss"] for row in monitor.get_logs().data}
    head, first, last = (scores[path] for path in ((0, 0), (0, 1, 0), (0, 1, 1)))
    alone = classifier(unfreeze=(0,)).fit(X, y)
    assert head == pytest.approx(-log_loss(y, alone.predict_proba(X)), rel=1e-2)
    assert len({head, first, last}) == 3
    assert last == scores[(0, 1)]
    assert scores[(0,)] == -log_loss(y, fitted.predict_proba(X))
    assert (scores[(0,)] == last) == (averaging == 1.0)


@pytest.mark.filterwarnings("ignore:The training loss of the stage:UserWarning")
def test_scoring_monitor_scores_the_best_epoch_of_a_stage():
    monitor = callback.ScoringMonitor(scoring="neg_log_loss")
    settings = {"lr": 10.0, "early_stopping": True, "max_epochs": 3, "averaging": 1.0}
    fitted = classifier(**settings).set_callbacks(monitor).fit(X, y)
    scores = {row["task_id_path"]: row["neg_log_loss"] for row in monitor.get_logs().data}
    assert fitted.stages_[1]["best_epoch"] == 0, "the rate is too high to learn anything"
    assert scores[(0, 1)] == scores[(0, 0)] != scores[(0, 1, 1)]


def test_progress_bar_on_a_pipeline_of_the_extractor_does_not_warn(capfd, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "240")  # long names are cut to the width
    pipeline = make_pipeline(PretrainedFeatureExtractor(Tiny, cache=None), LogisticRegression())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.set_callbacks(callback.ProgressBar()).fit(X, y)
    assert "PretrainedFeatureExtractor" in capfd.readouterr().out
