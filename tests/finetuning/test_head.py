import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.utils import get_tags

from sktransfer.finetuning import head as room
from sktransfer.finetuning.head import STRENGTHS, LabeledEmbeddings, fit_head


@pytest.fixture
def to_the_end(monkeypatch):
    """Lower the tolerance, so that two solutions can be compared."""
    monkeypatch.setattr(room, "_TOL", 1e-10)


# Standard deviations of the features, without the distance between classes.
SCALES = 10.0 ** np.linspace(-0.5, 0.5, 8)


def labeled(n=60, classes=3, width=8, views=2, *, noise=1.0, seed=0):
    """Draw embeddings around the center of each class, with dimensions of different scale."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centers = np.random.default_rng(7).normal(size=(classes, width))
    drawn = centers[y][:, None] + noise * rng.normal(size=(n, views, width))
    embeddings = (3.0 + drawn) * SCALES[:width]
    return LabeledEmbeddings(embeddings.astype(np.float32), y, rng.uniform(0.5, 2, n))


def logits_of(head, embeddings):
    return embeddings @ head.weight.T + head.bias


def assert_same(head, expected, data):
    """Compare two heads by their logits."""
    assert head.strength == expected.strength
    x = data.embeddings.reshape(-1, data.embeddings.shape[2]).astype(float)
    np.testing.assert_allclose(logits_of(head, x), logits_of(expected, x), atol=1e-3)


def scaling(data):
    """Compute the center, and the mean of the standard deviations, image by image."""
    rows = [
        (view.astype(float), w / len(views))
        for views, w in zip(data.embeddings, data.weights, strict=True)
        for view in views
    ]
    total = sum(w for _, w in rows)
    center = sum(w * row for row, w in rows) / total
    deviation = np.sqrt(sum(w * (row - center) ** 2 for row, w in rows) / total)
    return center, deviation.mean()


def plain(data, strength, scale_by):
    """Fit a LogisticRegression on scaled embeddings; the views share the weight of their image."""
    center, scale = scale_by
    views = data.embeddings.shape[1]
    x = (data.embeddings.reshape(-1, data.embeddings.shape[2]) - center) / scale
    weights = np.repeat(data.weights / views, views)
    model = LogisticRegression(C=strength, tol=1e-10, max_iter=1000)
    return model.fit(x, np.repeat(data.y, views), weights)


def losses(train, valid):
    """Compute the weighted log-loss on `valid` for every strength, without warm starts."""
    scale_by = scaling(train)
    x = (valid.embeddings[:, 0] - scale_by[0]) / scale_by[1]
    originals = LabeledEmbeddings(train.embeddings[:, :1], train.y, train.weights)
    p = [plain(originals, strength, scale_by).predict_log_proba(x) for strength in STRENGTHS]
    return [
        -(valid.weights * log_probabilities[np.arange(len(x)), valid.y]).sum()
        for log_probabilities in p
    ]


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.usefixtures("to_the_end")
def test_head_equals_logistic_regression_on_scaled_embeddings(classes, views):
    train = labeled(classes=classes, views=views, noise=2.0)
    head = fit_head(train, labeled(24, classes, seed=1, views=1, noise=2.0), classes)
    assert head.weight.shape == (classes, 8)
    assert head.bias.shape == (classes,)
    center, scale = scaling(train)
    model = plain(train, head.strength, (center, scale))
    new = labeled(30, classes, seed=2).embeddings.reshape(-1, 8)
    expected = model.predict_log_proba((new - center) / scale)
    np.testing.assert_allclose(log_softmax(logits_of(head, new), axis=1), expected, atol=1e-3)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.usefixtures("to_the_end")
def test_head_minimizes_mean_loss_plus_penalty(classes, views):
    train = labeled(classes=classes, views=views, noise=2.0)
    head = fit_head(train, None, classes)
    x = torch.from_numpy(train.embeddings.reshape(-1, 8).astype(float))
    y = torch.from_numpy(np.repeat(train.y, views))
    share = torch.from_numpy(np.repeat(train.weights / views, views) / train.weights.sum())
    weight = torch.from_numpy(head.weight).requires_grad_(True)
    bias = torch.from_numpy(head.bias).requires_grad_(True)
    losses = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="none")
    loss, penalty = (share * losses).sum(), (torch.from_numpy(head.penalty) * weight**2).sum()
    of_loss = torch.autograd.grad(loss, [weight, bias], retain_graph=True)
    of_penalty = torch.autograd.grad(penalty, weight)[0]
    torch.testing.assert_close(of_loss[0], -of_penalty, rtol=1e-3, atol=1e-6)
    assert of_loss[1].abs().max() < 1e-6


ON_TENSORS = """
import numpy as np
import sklearn, torch
from sktransfer.finetuning import head
from sktransfer.finetuning.head import LabeledEmbeddings, fit_head

rng = np.random.default_rng(0)
y = np.arange(90) % CLASSES
x = (rng.normal(size=(90, 2, 6)) + y[:, None, None]).astype(np.float32)
data = LabeledEmbeddings(x, y, rng.uniform(0.5, 2, 90))
with_numpy = fit_head(data, None, CLASSES)
seen = []
fit = head.LogisticRegression.fit
head.LogisticRegression.fit = lambda self, X, *rest: seen.append(type(X)) or fit(self, X, *rest)
head._solver_device = lambda device, size: device
with_torch = fit_head(data, None, CLASSES)
assert set(seen) == {torch.Tensor}
assert with_numpy.strength == with_torch.strength
np.testing.assert_allclose(with_torch.weight, with_numpy.weight, rtol=1e-3, atol=1e-5)
assert not sklearn.get_config()["array_api_dispatch"]
"""


takes_tensors = pytest.mark.skipif(
    not get_tags(LogisticRegression()).array_api_support,
    reason="this scikit-learn's LogisticRegression takes numpy arrays only",
)


@takes_tensors
@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_head_is_the_same_on_tensors(classes):
    environment = os.environ | {"SCIPY_ARRAY_API": "1"}
    script = f"CLASSES = {classes}\n{ON_TENSORS}"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@takes_tensors
@pytest.mark.parametrize(
    ("switch", "device", "numbers", "on_device"),
    [
        ("1", "cuda", 2**24, True),
        ("1", "cuda", 2**10, False),
        ("1", "cpu", 2**24, False),
        ("0", "cuda", 2**24, False),
    ],
)
def test_solver_device_is_the_gpu_only_for_large_problems(
    monkeypatch, switch, device, numbers, on_device
):
    monkeypatch.setenv("SCIPY_ARRAY_API", switch)
    where = room._solver_device(torch.device(device), numbers)
    assert where == (torch.device(device) if on_device else None)


def test_two_classes_have_mirrored_logits():
    head = fit_head(labeled(classes=2), None, 2)
    np.testing.assert_allclose(head.weight[0], -head.weight[1])
    np.testing.assert_allclose(head.bias[0], -head.bias[1])


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_dimension_gets_a_negligible_weight(value):
    train = labeled(views=1)
    embeddings = (train.embeddings / SCALES).astype(np.float32)
    embeddings[:, :, 3] = value
    head = fit_head(LabeledEmbeddings(embeddings, train.y, train.weights), None, 3)
    assert np.abs(head.weight[:, 3]).max() < 1e-3 * np.abs(head.weight).max()
    moved = embeddings[:, 0].copy()
    moved[:, 3] += 1
    still = logits_of(head, embeddings[:, 0])
    assert np.abs(logits_of(head, moved) - still).max() < 1e-2 * np.ptp(still)


def test_nearly_constant_dimension_gets_a_bounded_weight():
    train = labeled(views=1)
    embeddings = (train.embeddings / SCALES).astype(np.float32)
    # It separates the classes perfectly, at a scale that is lost in other computations.
    embeddings[:, 0, 3] = 1e-5 * train.y
    head = fit_head(LabeledEmbeddings(embeddings, train.y, train.weights), None, 3)
    moved = embeddings[:, 0].copy()
    moved[:, 3] += 1
    still = logits_of(head, embeddings[:, 0])
    assert np.abs(logits_of(head, moved) - still).max() < np.ptp(still)


@pytest.mark.parametrize("with_valid", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.usefixtures("to_the_end")
def test_weight_equals_repetition(classes, with_valid):
    data = labeled(45, classes, noise=2.0)
    counts = np.arange(45) % 3 + 1
    rows = np.repeat(np.arange(45), counts)
    weighted = LabeledEmbeddings(data.embeddings, data.y, counts.astype(float))
    repeated = LabeledEmbeddings(data.embeddings[rows], data.y[rows], np.ones(len(rows)))
    valid = labeled(20, classes, seed=1, views=1) if with_valid else None
    weighted_head, repeated_head = (
        fit_head(train, valid, classes) for train in (weighted, repeated)
    )
    assert_same(weighted_head, repeated_head, data)


def test_validation_weight_equals_repetition():
    train, valid = labeled(noise=2.0), labeled(20, seed=1, views=1, noise=2.0)
    counts = np.arange(20) % 4 + 1
    rows = np.repeat(np.arange(20), counts)
    weighted = LabeledEmbeddings(valid.embeddings, valid.y, counts.astype(float))
    repeated = LabeledEmbeddings(valid.embeddings[rows], valid.y[rows], np.ones(len(rows)))
    heads = [fit_head(train, validation, 3) for validation in (weighted, repeated)]
    assert heads[0].strength == heads[1].strength


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("noise", [0.3, 2.0, 10.0])
def test_strength_is_the_best_on_the_validation_images(noise):
    train, valid = labeled(noise=noise), labeled(30, noise=noise, seed=1, views=1)
    assert fit_head(train, valid, 3).strength == STRENGTHS[np.argmin(losses(train, valid))]


def test_noise_is_regularized_more_than_signal_with_and_without_validation():
    for valid_seed in (1, None):
        clean, noisy = (
            fit_head(
                labeled(60, noise=noise),
                None if valid_seed is None else labeled(60, noise=noise, seed=1, views=1),
                3,
            ).strength
            for noise in (0.3, 10.0)
        )
        assert clean > 10 * noisy


@pytest.mark.usefixtures("to_the_end")
def test_strength_is_chosen_by_the_first_view_of_each_image():
    data = labeled(noise=2.0)
    junk = data.embeddings.copy()
    junk[:, 1] = junk[:, 0]
    alone = LabeledEmbeddings(data.embeddings[:, :1], data.y, data.weights)
    doubled = LabeledEmbeddings(junk, data.y, data.weights)
    single_head, doubled_head = fit_head(alone, None, 3), fit_head(doubled, None, 3)
    assert_same(single_head, doubled_head, data)


@pytest.mark.usefixtures("to_the_end")
def test_folds_do_not_depend_on_the_row_order():
    data = labeled(noise=2.0)
    order = np.random.default_rng(0).permutation(60)
    head, shuffled_head = fit_head(data, None, 3), fit_head(data.take(order), None, 3)
    assert_same(head, shuffled_head, data)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("valid", [None, labeled(30, noise=0.1, seed=1, views=1)])
def test_given_strength_is_used(valid):
    data = labeled(noise=0.1)
    chosen = fit_head(data, valid, 3)
    assert chosen.strength > 1
    head = fit_head(data, valid, 3, strength=0.01)
    assert head.strength == 0.01
    assert np.abs(head.weight).max() < 0.5 * np.abs(chosen.weight).max()
    assert_same(fit_head(data, valid, 3, strength=chosen.strength), chosen, data)


def folds_of(data):
    return [
        [set(part.embeddings[:, 0, 0].tolist()) for part in fold] for fold in room._folds(data, 3)
    ]


@pytest.mark.parametrize("copies", [1, 3])
def test_class_with_a_single_image_is_trained_on_in_all_folds(copies):
    data = labeled(31, noise=0.1)
    data = data.take(np.r_[np.flatnonzero(data.y != 2), [2] * copies])
    alone = data.embeddings[-1, 0, 0].item()
    folds = folds_of(data)
    assert len(folds) == 3
    assert all(alone in train and alone not in valid for train, valid in folds)
    assert set().union(*(valid for _, valid in folds)) == {
        *data.embeddings[:-copies, 0, 0].tolist()
    }
    head = fit_head(data, None, 3)
    assert head.strength > 1, "the other classes show that the images are easy"
    assert (logits_of(head, data.embeddings[:, 0]).argmax(1) == data.y).all()


@pytest.mark.parametrize("copies", [1, 2])
def test_strength_is_the_default_if_all_classes_have_a_single_image(copies):
    data = labeled(3).take(np.repeat(np.arange(3), copies))
    head = fit_head(data, None, 3)
    assert head.strength == 0.1
    assert np.isfinite(head.weight).all()


def test_folds_keep_copies_of_an_image_together():
    data = labeled(30).take(np.repeat(np.arange(30), 2))
    assert all(not train & valid for train, valid in folds_of(data))


def test_two_images_per_class_are_enough_for_folds():
    data = labeled(6, noise=0.1)
    head = fit_head(data, None, 3)
    assert head.strength != 0.1
    assert (logits_of(head, data.embeddings[:, 0]).argmax(1) == data.y).all()


def test_validation_set_may_lack_a_class():
    valid = labeled(30, seed=1, views=1)
    head = fit_head(labeled(), valid.take(valid.y != 1), 3)
    assert head.weight.shape == (3, 8)
    assert head.strength in STRENGTHS


@pytest.mark.parametrize("with_valid", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e-10, -7.123456, 1e6])
def test_constant_embeddings_predict_the_class_frequencies(value, with_valid):
    y, weights = np.arange(12) % 3, np.random.default_rng(0).uniform(0.5, 2, 12)
    data = LabeledEmbeddings(np.full((12, 2, 4), value, np.float32), y, weights)
    valid = LabeledEmbeddings(data.embeddings[:, :1], y, weights) if with_valid else None
    head = fit_head(data, valid, 3)
    # The network computes it in float32.
    logits = data.embeddings[0, :1] @ head.weight.astype(np.float32).T
    p = np.exp(log_softmax(logits + head.bias.astype(np.float32), axis=1))[0]
    shares = np.bincount(y, weights) / weights.sum()
    np.testing.assert_allclose(p, shares, atol=0.01)
    # Constant dimensions must not decide later predictions.
    assert np.abs(head.weight).max() < 1


@pytest.mark.parametrize("power", [-33, -100, 33])
def test_head_does_not_depend_on_the_scale_of_the_embeddings(power):
    """Scales are as small as 1e-10 or 1e-30. Powers of 2 change no digit."""
    data, valid = labeled(), labeled(30, seed=1, views=1)

    def sized(data):
        embeddings = data.embeddings * np.float32(2.0**power)
        assert ((embeddings != 0) == (data.embeddings != 0)).all()
        return LabeledEmbeddings(embeddings, data.y, data.weights)

    head, scaled_head = fit_head(data, valid, 3), fit_head(sized(data), sized(valid), 3)
    assert scaled_head.strength == head.strength
    np.testing.assert_allclose(
        logits_of(scaled_head, sized(data).embeddings.astype(float)),
        logits_of(head, data.embeddings.astype(float)),
        atol=1e-6,
    )
    alone = fit_head(sized(data), None, 3)
    predicted = logits_of(alone, sized(data).embeddings[:, 0].astype(float)).argmax(1)
    assert (predicted == data.y).mean() > 0.8


def test_fit_head_leaves_its_input_unchanged():
    train, valid = labeled(), labeled(30, seed=1, views=1)
    before = [array.copy() for data in (train, valid) for array in vars(data).values()]
    fit_head(train, valid, 3)
    after = [array for data in (train, valid) for array in vars(data).values()]
    for array_before, array_after in zip(before, after, strict=True):
        np.testing.assert_array_equal(array_before, array_after)
