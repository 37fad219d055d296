"""The tuned weights are averaged with those before, and calibrated, on held-out images."""

import re

import numpy as np
import pytest
import torch
from helpers import NAMES, X_TEST, Y_TEST, Interrupt, Tiny, X, Y, images, make_classifier, net_state
from scipy.special import log_softmax, softmax
from skorch.callbacks import Callback

from sktransfer.data.images import as_images
from sktransfer.finetuning import averaging, fine_tuning
from sktransfer.finetuning.averaging import Tuned, choose_averaging
from sktransfer.finetuning.batches import CachedBatches, SoftTargets
from sktransfer.finetuning.fine_tuning import FineTuning
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.finetuning.training_set import TrainingSet
from sktransfer.utils.progress import TrialProgress

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
TASK = ClassificationTask(NAMES)


def classifier(backbone=Tiny, **parameters):
    settings = {"unfreeze": (0, 1), "early_stopping": False, "augment": None, "lr": 0.01}
    return make_classifier(backbone, **{**settings, **parameters})


def fitted(**parameters):
    return classifier(**parameters).fit(X, Y)


def log_loss(outputs, y):
    return -log_softmax(outputs.astype(float), axis=1)[np.arange(len(y)), y].mean()


@pytest.mark.slow_cases("unfreeze1", "unfreeze2")
@pytest.mark.parametrize("unfreeze", [(0, 1), (0, 2), (0, 1, 2), (0, ["0"])])
def test_share_of_zero_predicts_as_the_head_alone_up_to_a_factor(unfreeze):
    alone, average = fitted(unfreeze=(0,)), fitted(unfreeze=unfreeze, averaging=0)
    expected = ClassificationTask.start_factor * alone._outputs(X_TEST)
    # Cached maps are in half precision.
    np.testing.assert_allclose(average._outputs(X_TEST), expected, rtol=0.02, atol=0.1)
    assert (average.predict(X_TEST) == alone.predict(X_TEST)).all()
    assert (average.averaging_, average.temperature_) == (0, 1)


@pytest.mark.parametrize(
    ("share", "factor"), [("auto", TASK.start_factor), (0.5, TASK.start_factor), (1, 1)]
)
def test_epochs_are_compared_with_the_weaker_head_if_an_average_follows(share, factor):
    # The head has almost no loss, so no epoch has a lower one.
    fit = classifier(averaging=share, early_stopping=True, max_epochs=1)
    fit.fit(X, Y, X_val=X_TEST, y_val=Y_TEST)
    outputs = classifier(unfreeze=(0,)).fit(X, Y, X_val=X_TEST, y_val=Y_TEST)._outputs(X_TEST)
    expected = log_loss(factor * outputs, np.searchsorted(NAMES, Y_TEST))
    assert fit.stages_[1]["best_epoch"] == 0
    assert fit.stages_[1]["valid_loss"] == pytest.approx(expected, rel=0.1)


class LastWeights(Callback):
    """Keeps the weights after the last training step."""

    def on_epoch_end(self, net, **kwargs):
        self.weights = {k: v.clone() for k, v in net.module_.state_dict().items()}


def test_share_of_one_keeps_the_tuned_weights(monkeypatch):
    monkeypatch.delattr(FineTuning, "_average")
    last = LastWeights()
    tuned = fitted(averaging=1.0, callbacks=[last])
    for name, tensor in net_state(tuned).items():
        assert torch.equal(tensor, last.weights[name])
    assert (tuned.averaging_, tuned.temperature_) == (1, 1)


@pytest.mark.slow_cases("parameters2", "0.9")
@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("parameters", [{}, {"batch_norm": "train"}, {"unfreeze": (0, 1, 2)}])
def test_share_between_is_the_average_of_all_weights(share, parameters):
    before, after, average = (
        net_state(fitted(averaging=value, **parameters)) for value in (0.0, 1.0, share)
    )
    changed = 0
    for name, tensor in average.items():
        if tensor.is_floating_point():
            expected = (1 - share) * before[name] + share * after[name]
            torch.testing.assert_close(tensor, expected)
            changed += not torch.equal(before[name], after[name])
        else:
            assert torch.equal(tensor, after[name])
    assert changed >= 4


@pytest.mark.slow_cases("True", "unfreeze1")
@pytest.mark.parametrize("unfreeze", [(0, 1), (0, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_share_is_the_largest_with_nearly_the_lowest_loss(unfreeze, known):
    """Labels of noise have nothing that tuning could learn."""
    data = (X, Y) if known else (images(60, seed=5), Y)
    valid = (X_TEST, Y_TEST) if known else (images(30, seed=6), Y[:30])
    settings = {"unfreeze": unfreeze, "max_epochs": 6}
    chosen = classifier(**settings).fit(*data, X_val=valid[0], y_val=valid[1])
    losses, y = [], np.searchsorted(NAMES, valid[1])
    for share in SHARES:
        one = classifier(**settings, averaging=share).fit(*data, X_val=valid[0], y_val=valid[1])
        outputs = one._outputs(valid[0])
        factor, values = TASK.calibrate(outputs, y, np.ones(30))
        assert values.mean() == pytest.approx(log_loss(factor * outputs, y))
        losses.append(values)
        if share == chosen.averaging_:
            np.testing.assert_allclose(
                chosen._outputs(X_TEST), factor * one._outputs(X_TEST), rtol=1e-3, atol=1e-3
            )
            assert chosen.temperature_ == pytest.approx(1 / factor, rel=1e-3)
    differences = np.array(losses) - min(losses, key=np.mean)
    near = differences.mean(axis=1) <= differences.std(axis=1) / np.sqrt(30)
    assert chosen.averaging_ == max(np.array(SHARES)[near])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_weights_are_chosen_that_predict_the_held_out_images(share):
    head = fitted(unfreeze=0).net_.module_
    good = head.state_of(["head"])
    bad = {name: tensor.roll(1, 0) for name, tensor in good.items()}
    held_out = TrainingSet(
        as_images(X_TEST), np.searchsorted(NAMES, Y_TEST), np.ones(30), np.ones(30)
    )
    embeddings = fitted(unfreeze=0).transform(X_TEST)[:, None]
    targets = SoftTargets(held_out.y, held_out.weights, TASK)
    batches = CachedBatches(embeddings, targets, 8, torch.device("cpu"), shuffle=False)
    before, after = (good, bad) if share == 0 else (bad, good)
    chosen = choose_averaging(Tuned(head, before, after), batches, held_out, TASK)
    assert chosen.share == share


# The held-out check


@pytest.fixture
def trials(monkeypatch):
    """Record the fits of held-out checks, with the images on which they are compared."""
    recorded, run = [], FineTuning.run

    def recording(self, progress):
        result = run(self, progress)
        if isinstance(progress, TrialProgress):
            recorded.append([self, [row["batches"] for row in result[0].history_]])
        return result

    def choosing(tuned, batches, held_out, task):
        if recorded:
            recorded[-1].append(held_out)
        return choose_averaging(tuned, batches, held_out, task)

    monkeypatch.setattr(FineTuning, "run", recording)
    monkeypatch.setattr(fine_tuning, "choose_averaging", choosing)
    return recorded


def contents(training_set):
    return {training_set.images[row].tobytes() for row in range(len(training_set.y))}


@pytest.mark.slow_cases("unfreeze1")
@pytest.mark.parametrize(("n", "n_held_out"), [(60, 15), (201, 102)])
@pytest.mark.parametrize("unfreeze", [(0, 1), (0, 2)])
def test_check_compares_on_images_that_it_does_not_train_on(trials, n, n_held_out, unfreeze):
    data, labels = images(n, seed=3), np.arange(n) % 3
    fit = classifier(unfreeze=unfreeze, augment="standard", n_views=1, max_epochs=2)
    fit.fit(data, labels)
    ((trial, epochs, held_out),) = trials
    assert len(held_out.y) == n_held_out
    assert contents(held_out).isdisjoint(contents(trial.train))
    assert contents(held_out) | contents(trial.train) == {image.tobytes() for image in data}
    assert [sum(batch["train_batch_size"] for batch in epoch) for epoch in epochs] == [
        n - n_held_out
    ] * 2
    assert trial._head.strength == fit.stages_[0]["C"]
    labels_of = {image.tobytes(): label for image, label in zip(data, labels, strict=True)}
    for part in (trial.train, held_out):
        assert [labels_of[part.images[row].tobytes()] for row in range(len(part.y))] == list(part.y)


@pytest.mark.parametrize(
    "parameters",
    [
        {"averaging": 1.0},
        {"averaging": 0.5},
        {"unfreeze": (0,)},
        {"unfreeze": (1,)},
        {"unfreeze": "all"},
        {"early_stopping": True},
    ],
)
def test_check_is_left_out_if_nothing_depends_on_it(trials, parameters):
    fitted(**parameters, max_epochs=1)
    assert not trials


@pytest.mark.parametrize(("unfreeze", "share"), [((0, 1), 0.75), ((0, 2), 1.0)])
def test_few_images_use_the_usual_share_without_a_check(trials, unfreeze, share):
    few = classifier(unfreeze=unfreeze).fit(X[:36], Y[:36])  # a quarter is 9
    assert (few.averaging_, few.temperature_) == (share, 1)
    assert not trials
    classifier(unfreeze=unfreeze).fit(X[:42], Y[:42])
    assert len(trials) == 1


@pytest.mark.parametrize(("unfreeze", "share"), [((0, 1), 0.75), ((0, 2), 1.0)])
def test_many_images_use_the_usual_share_without_a_check(trials, monkeypatch, unfreeze, share):
    monkeypatch.setattr(averaging, "_MAX_IMAGES_OF_ALL", 59)
    monkeypatch.setattr(averaging, "MIN_IMAGES_TO_HOLD_OUT", 60)
    assert fitted(unfreeze=unfreeze).averaging_ == share
    assert not trials
    classifier(unfreeze=unfreeze).fit(X[:59], Y[:59])
    assert len(trials) == 1


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        *(
            pytest.param(parameters, marks=pytest.mark.slow)
            for parameters in [
                {"unfreeze": (0, 2)},
                {"augment": "standard", "n_views": None},
                {"augment": "light", "n_views": 2},
                {"batch_norm": "train"},
                {"mixup": 0.3},
            ]
        ),
    ],
)
def test_check_does_not_change_the_training_of_the_fit(parameters):
    chosen = fitted(**parameters)
    expected = net_state(fitted(**parameters, averaging=chosen.averaging_))
    for name, tensor in net_state(chosen).items():
        factor = 1 / chosen.temperature_ if name in ("head.weight", "head.bias") else 1
        torch.testing.assert_close(tensor, factor * expected[name])
    np.testing.assert_array_equal(
        chosen.predict_proba(X_TEST), fitted(**parameters).predict_proba(X_TEST)
    )


def test_probabilities_are_calibrated_for_random_labels():
    noise, labels = images(120, seed=8), np.random.RandomState(0).randint(0, 3, 120)
    fit = classifier(lr=0.03, max_epochs=8).fit(noise, labels)
    assert fit.temperature_ > 1
    p = fit.predict_proba(images(60, seed=9))
    assert p.max() < 0.7, "the probabilities are calibrated"


def test_check_is_made_without_activations_on_disk(monkeypatch):
    settings = {"augment": "standard", "n_views": 1, "lr": 1e-3}
    expected = fitted(**settings)
    monkeypatch.setattr(fine_tuning, "disk_problem", lambda *_: "9 bytes, and 8 are free")
    with pytest.warns(UserWarning, match="computed again in every epoch"):
        recomputed = fitted(**settings)
    assert recomputed.averaging_ == expected.averaging_
    np.testing.assert_allclose(
        recomputed.predict_proba(X_TEST), expected.predict_proba(X_TEST), rtol=0.02, atol=2e-3
    )


def test_callbacks_do_not_see_the_check(trials):
    class Count(Callback):
        epochs = 0

        def on_epoch_begin(self, net, **kwargs):
            self.epochs += 1

    count = Count()
    fit = fitted(callbacks=[count], max_epochs=3)
    assert len(trials) == 1
    assert count.epochs == len(fit.history_) == 3


@pytest.mark.parametrize("moment", ["update", "begin"])  # after the head fit, in an epoch
def test_check_that_is_interrupted_ends_with_the_usual_share(monkeypatch, moment):
    def interrupt(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrialProgress, moment, interrupt)
    with pytest.warns(UserWarning, match="interrupted in its check on held-out images"):
        fit = fitted(unfreeze=(0, 1), max_epochs=2)
    assert fit.interrupted_
    assert (fit.averaging_, fit.temperature_) == (0.75, 1)
    assert [stage["epochs"] for stage in fit.stages_] == [0, 2]


def test_fit_that_is_interrupted_is_not_averaged(trials):
    with pytest.warns(UserWarning, match="interrupted in stage"):
        fit = fitted(callbacks=[Interrupt()], max_epochs=9)
    assert (fit.averaging_, fit.temperature_) == (1, 1)
    assert not trials


def test_check_that_diverges_ends_with_the_usual_share(monkeypatch):
    def fail(self, *arguments):
        raise FloatingPointError

    monkeypatch.setattr(TrialProgress, "update", fail)
    assert fitted().averaging_ == 0.75


@pytest.mark.slow
def test_resumed_fit_is_averaged_as_an_undisturbed_fit(tmp_path):
    settings = {"max_epochs": 5, "unfreeze": (0, 1, 2)}
    expected = fitted(**settings)
    with pytest.warns(UserWarning, match="interrupted in stage"):
        fitted(**settings, checkpoint_dir=str(tmp_path), callbacks=[Interrupt()])
    for _ in range(2):  # the second one finds all stages
        resumed = fitted(**settings, checkpoint_dir=str(tmp_path))
        np.testing.assert_array_equal(resumed.predict_proba(X_TEST), expected.predict_proba(X_TEST))
        assert resumed.averaging_ == expected.averaging_
        assert resumed.temperature_ == expected.temperature_
    (file,) = tmp_path.glob("*.pt")
    assert file.exists()


def test_bars_show_the_decision_and_the_check(capsys):
    quiet = classifier(unfreeze="auto", max_epochs=1, verbose=0).fit(X, Y)
    assert not capsys.readouterr().err
    classifier(unfreeze=(0, 1), lr="auto", max_epochs=1, verbose=1).fit(X, Y)
    shown = capsys.readouterr()
    assert "FineTunedImageClassifier: lr=0.001 (20 images per class).\n" in shown.err
    assert "held-out check: last block" in shown.err
    assert re.search(r"\nAveraging: \d+% of the tuned weights.*; temperature \d\.\d\d\n", shown.err)
    assert not shown.out
    assert quiet.decision_.parameters == {"unfreeze": (0, "all")}


@pytest.mark.parametrize("rows", [np.flatnonzero(Y != "owl"), np.r_[0, 1, 2, np.arange(3, 60, 3)]])
def test_two_classes_and_classes_with_one_image_are_averaged(rows):
    data, labels = X[rows], Y[rows]
    labels[labels == "owl"] = "cat" if len(rows) == 40 else "owl"
    fit = classifier(unfreeze=(0, 1)).fit(data, labels)
    assert fit.averaging_ in (*SHARES, 0.75)
    assert fit.score(data, labels) > 0.9


def test_sample_weight_equals_repetition_in_the_check(trials):
    repeats = np.arange(len(X)) % 3 + 1
    weighted = classifier().fit(X, Y, sample_weight=repeats)
    repeated = classifier().fit(np.repeat(X, repeats, axis=0), np.repeat(Y, repeats))
    assert len(trials) == 2
    np.testing.assert_array_equal(weighted.predict_proba(X_TEST), repeated.predict_proba(X_TEST))


# Calibration


def drawn(n, temperature, seed=0):
    """Draw logits, and labels from the probabilities of the logits divided by a temperature."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(n, 4)) * 3
    p = softmax(outputs / temperature, axis=1).cumsum(axis=1)
    labels = (rng.random((n, 1)) > p).sum(axis=1).clip(0, 3)
    return outputs.astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_calibrate_finds_the_temperature(temperature):
    outputs, labels = drawn(20_000, temperature)
    factor, values = TASK.calibrate(outputs, labels, np.ones(len(labels)))
    loss = values.mean()
    assert 1 / factor == pytest.approx(temperature, rel=0.05)
    assert loss == pytest.approx(log_loss(factor * outputs, labels))
    for other in (0.9, 1.1):
        assert loss < log_loss(other * factor * outputs, labels)


def test_calibrate_needs_evidence_for_a_factor_far_from_one():
    outputs, labels = np.eye(4, dtype=np.float32)[[0, 1, 2]], np.arange(3)
    factors = [
        TASK.calibrate(np.repeat(outputs, n, axis=0), np.repeat(labels, n), np.ones(3 * n))[0]
        for n in (1, 10, 1000)
    ]
    assert 1 < factors[0] < factors[1] < factors[2] <= 3


def test_calibrate_weighs_the_images():
    outputs, labels = drawn(3000, 1.0)
    wrong = outputs.argmax(axis=1) != labels
    light = TASK.calibrate(outputs, labels, np.where(wrong, 0.1, 1.0))[0]
    heavy = TASK.calibrate(outputs, labels, np.where(wrong, 10.0, 1.0))[0]
    assert light > 1.2
    assert heavy < 0.8


# Feature maps of the training


@pytest.fixture
def changes(monkeypatch):
    """Record how each stage changes its feature maps."""
    recorded, map_change = [], FineTuning._map_change

    def recording(self, stage):
        recorded.append(map_change(self, stage))
        return recorded[-1]

    monkeypatch.setattr(FineTuning, "_map_change", recording)
    return recorded


class Fixed(Tiny):
    """Its second block adds a value at each of 112 x 112 positions."""

    def __init__(self):
        super().__init__()
        self[1] = Position(self[1])


class Position(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.value = block, torch.nn.Parameter(torch.zeros(8, 112, 112))

    def forward(self, x):
        return self.block(x + self.value)


@pytest.mark.parametrize(
    ("augment", "size", "expected"),
    [
        (None, 16, None),
        ("light", 16, (False, True)),
        ("standard", 16, (True, True)),
        ("aggressive", 16, (True, True)),
        ("standard", 10, (True, False)),  # maps of 5 x 5
        (lambda image: image, 16, (False, True)),
    ],
)
def test_feature_maps_are_mirrored_and_cropped_as_the_images_allow(
    changes, augment, size, expected
):
    fitted(augment=augment, image_size=size, averaging=1.0, max_epochs=1)
    (change,) = changes
    assert (change and (change.mirrors, change.crops)) == expected


def test_feature_maps_of_a_network_for_one_size_are_not_cropped(changes):
    settings = {"augment": "standard", "n_views": 0, "averaging": 1.0, "max_epochs": 1}
    fit = classifier(Fixed, image_size=224, **settings).fit(X[:12], Y[:12])
    (change,) = changes
    assert (change.mirrors, change.crops) == (True, False)
    assert change.shape == (8, 112, 112)
    assert fit.predict_proba(X_TEST[:2]).shape == (2, 3)
