"""A task with another kind of target trains without changes elsewhere."""

import numpy as np
import pytest
import torch
from helpers import NAMES, X_TEST, Tiny, X, Y, colored_images, images, make_classifier
from torch import nn

from sktransfer import FineTunedImageClassifier
from sktransfer.data.labels import EncodedLabels
from sktransfer.finetuning.head import Head
from sktransfer.finetuning.task import ClassificationTask, Task


class WeightedSquares(nn.Module):
    """Mean squared error; a target is (value, weight)."""

    def forward(self, outputs, targets):
        return (targets[:, 1] * (outputs[:, 0] - targets[:, 0]).square()).mean()


class RegressionTask(Task):
    metric_name = "score"
    n_outputs = 1

    def output_names(self):
        return ["value"]

    def encode(self, y):
        return np.asarray(y, dtype=float)

    def is_small(self, targets, counts):
        return False

    def validation_rows(self, targets, fraction, seed):
        rows = np.random.default_rng(seed).permutation(len(targets))
        return np.sort(rows[: round(fraction * len(rows))]), ""

    def batch_targets(self, targets, weights, label_smoothing):
        return torch.from_numpy(np.column_stack([targets, weights]).astype(np.float32))

    def fit_head(self, train, valid, *, strength=None, device):
        views = train.embeddings.shape[1]
        x = train.embeddings.reshape(-1, train.embeddings.shape[-1]).astype(float)
        y = np.repeat(train.y, views)
        center = x.mean(axis=0)
        gram = (x - center).T @ (x - center) + 1e-6 * len(x) * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, (x - center).T @ (y - y.mean()))[None]
        return Head(weight, y.mean() - weight @ center, np.nan, np.zeros(x.shape[1]))

    def make_loss(self):
        return WeightedSquares()

    def metric(self, outputs, targets):
        return -float((outputs[:, 0] - targets[:, 0]).square().sum())

    def predict(self, outputs):
        return outputs[:, 0]


class Regressor(FineTunedImageClassifier):
    """Fine-tunes a regression: only the task differs."""

    def _encode(self, images, y, sample_weight, sample_domain):
        values, ones = np.asarray(y, dtype=float), np.ones(len(y))
        return EncodedLabels(np.empty(0), values, ones, ones, np.arange(len(y))), RegressionTask()


def brightness(n, seed):
    """Return images and their brightness, 0-1."""
    level = np.random.default_rng(seed).uniform(0.2, 1, n)
    X = (0.2 * images(n, seed=seed) + 200) * level[:, None, None, None]
    return X.astype(np.uint8), level


@pytest.mark.parametrize(
    "parameters", [{"unfreeze": 0}, {"unfreeze": (0, 1)}, {"n_views": None}, {"mixup": 0.2}]
)
def test_regression_task_trains(parameters):
    X, y = brightness(80, seed=0)
    X_test, y_test = brightness(40, seed=1)
    settings = {"unfreeze": (0, 1), "augment": None, "max_epochs": 3, "early_stopping": True}
    regressor = Regressor(Tiny, random_state=0, cache=None, **{**settings, **parameters})
    regressor.fit(X, y)
    residual = np.square(regressor.predict(X_test) - y_test).sum()
    assert residual < 0.1 * np.square(y_test - y_test.mean()).sum()
    assert {"valid_loss", "valid_score"} <= regressor.stages_[-1].keys()
    assert regressor.stages_[-1]["valid_score"] < 0
    assert regressor.transform(X_test).shape == (40, 12)


def test_classifier_predicts_as_the_task_decodes():
    classifier = make_classifier().fit(X, Y)
    outputs = classifier._outputs(X_TEST)
    task = ClassificationTask(NAMES)
    assert (classifier.predict(X_TEST) == task.predict(outputs)).all()
    np.testing.assert_array_equal(classifier.predict_proba(X_TEST), task.predict_proba(outputs))


def test_classification_metric_counts_correct_predictions():
    task = ClassificationTask(NAMES)
    targets = task.batch_targets(np.array([0, 1, 2]), np.ones(3), 0.1)
    outputs = torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 1, 2]])
    assert task.metric(outputs, targets) == 2
    torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_classification_task_encodes_only_known_labels():
    _, y = colored_images(6)
    assert ClassificationTask(NAMES).encode(y).tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="Got \\['cow'\\] in y_val"):
        ClassificationTask(NAMES).encode(["cow"])
