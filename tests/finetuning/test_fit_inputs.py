import numpy as np
import pytest
from helpers import X_TARGET, X_TEST, X, Y, make_classifier

from sktransfer.data.images import as_images
from sktransfer.data.labels import check_labels
from sktransfer.finetuning.fit_inputs import (
    check_parameters,
    draw_seed,
    load_fit_backbone,
    resolve_target,
    resolve_validation,
    train_and_valid,
)
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.finetuning.training_set import TrainingSet

TASK = ClassificationTask(np.unique(Y))


def training_set(X=X, y=Y):
    return TrainingSet.of(as_images(X), check_labels(X, y))


def test_checkpoint_depends_on_parameters_and_data(tmp_path):
    settings = {"unfreeze": (0,), "checkpoint_dir": str(tmp_path)}
    fits = [({}, X, Y), ({"dropout": 0.5}, X, Y), ({"augment": "industrial"}, X, Y)]
    fits += [({"random_state": 1}, X, Y), ({}, X[3:], Y[3:]), ({}, X, Y[::-1])]
    for number, (parameters, data, labels) in enumerate(fits, start=1):
        make_classifier(**settings, **parameters).fit(data, labels)
        assert len(list(tmp_path.glob("*.pt"))) == number
    for valid, of_valid in ((X[:9], Y[:9]), (X[9:18], Y[9:18]), (X[9:18], Y[17:8:-1])):
        make_classifier(**settings).fit(X, Y, X_val=valid, y_val=of_valid)
    assert len(list(tmp_path.glob("*.pt"))) == len(fits) + 3
    for parameters in ({"verbose": 0, "n_jobs": 1}, {"cache": "auto"}, {"device": "cpu"}):
        make_classifier(**{**settings, **parameters}).fit(X, Y)
    assert len(list(tmp_path.glob("*.pt"))) == len(fits) + 3


def test_draw_seed_accepts_ints_and_random_states():
    assert draw_seed(7) == draw_seed(np.int64(7)) == 7
    random_state = np.random.RandomState(3)
    seeds = [draw_seed(random_state), draw_seed(random_state)]
    assert seeds[0] != seeds[1]
    assert seeds[0] == draw_seed(np.random.RandomState(3))


def test_draw_seed_of_none_leaves_the_global_state_unchanged():
    state = np.random.get_state()[1].copy()
    assert draw_seed(None) != draw_seed(None)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("random_state", [-1, 1.5, "seed", np.random.default_rng(0)])
def test_draw_seed_rejects_other_values(random_state):
    with pytest.raises(ValueError, match="but expected None, an int from 0 to"):
        draw_seed(random_state)


def test_check_parameters_warns_of_a_low_lr_drop_only_with_weights():
    with pytest.warns(
        UserWarning, match="Got lr_drop=5, so the learning rate of the last block is"
    ):
        check_parameters(make_classifier(lr_drop=5))
    check_parameters(make_classifier(lr_drop=5, weights=None))
    check_parameters(make_classifier(lr_drop=10))


@pytest.mark.parametrize("value", [True, "1", 1.5, 0])
def test_check_parameters_rejects_invalid_max_epochs(value):
    with pytest.raises(
        ValueError, match=f"Got max_epochs={value!r}, but expected 'auto' or an integer"
    ):
        check_parameters(make_classifier(max_epochs=value))


def test_given_validation_set_leaves_the_training_set_whole():
    train, valid = training_set(), training_set(X[:9], Y[:9])
    assert train_and_valid(make_classifier(), train, valid, 0, TASK) == (train, valid)
    part, held_out = train_and_valid(make_classifier(validation_fraction=0.2), train, None, 0, TASK)
    assert (len(part.y), len(held_out.y)) == (48, 12)
    assert train_and_valid(make_classifier(early_stopping=False), train, None, 0, TASK) == (
        train,
        None,
    )


def test_resolve_validation_encodes_the_given_images():
    classifier = make_classifier()
    classifier.pixel_range_ = None
    valid = resolve_validation(classifier, X[:5], Y[:5], TASK)
    assert valid.y.tolist() == [0, 1, 2, 0, 1]
    assert valid.counts.tolist() == valid.weights.tolist() == [1] * 5
    assert resolve_validation(classifier, None, None, TASK) is None
    for X_val, y_val in ((X[:5], None), (None, Y[:5])):
        with pytest.raises(ValueError, match="Got only one of X_val and y_val"):
            resolve_validation(classifier, X_val, y_val, TASK)


@pytest.mark.parametrize(
    ("parameters", "used"),
    [({}, False), ({"domain_adversarial": 0.5}, True), ({"batch_norm": "adapt"}, True)],
)
def test_resolve_target_returns_the_target_only_if_the_fit_uses_it(parameters, used):
    both = np.concatenate([X[:6], X_TARGET[:4]])
    labels = check_labels(both, [*Y[:6], *["?"] * 4], sample_domain=np.repeat([1, -1], [6, 4]))
    target = resolve_target(make_classifier(**parameters), as_images(both), labels)
    assert (target is not None) == used
    if used:
        assert len(target.y) == 4
        shown = {target.images[row].tobytes() for row in range(4)}
        assert shown == {image.tobytes() for image in X_TARGET[:4]}


def test_load_fit_backbone_adapts_batch_norm_without_a_target():
    train, target = training_set(), training_set(X_TEST, Y[:30])
    classifier = make_classifier(batch_norm="adapt")
    plain, _ = load_fit_backbone(make_classifier(), train, None)
    adapted, source = load_fit_backbone(classifier, train, None)
    assert adapted.digest != plain.digest == source.digest
    assert source.batch_norm is not None
    assert isinstance(next(iter(source.batch_norm.statistics.values())), np.ndarray)
    later, source = load_fit_backbone(classifier, train, target)
    assert (later.digest, source.batch_norm) == (plain.digest, None)
