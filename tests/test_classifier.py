"""FineTunedImageClassifier behaves as users of scikit-learn expect."""

import pickle
import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from edge_helpers import BAD_SHARED, Unread, cases
from helpers import (
    BROKEN_ROWS,
    NAMES,
    X_TEST,
    Y_TEST,
    CountingTiny,
    Interrupt,
    Tiny,
    X,
    Y,
    count_calls,
    counted,
    equal_states,
    images,
    make_classifier,
    net_state,
    paths_with_broken,
)
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator
from skorch.callbacks import Callback, EarlyStopping

from sktransfer import FineTunedImageClassifier, ImageError
from sktransfer.backbones.loading import load_backbone
from sktransfer.finetuning.fine_tuning import FineTuning
from sktransfer.finetuning.suffix import TrainedSuffix
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.transforms.augmentation import resolve_augmentation, resolve_n_views
from sktransfer.utils.progress import StageProgress

# The contract of scikit-learn


@pytest.mark.parametrize(
    "unfreeze",
    [(0,), *(pytest.param(depths, marks=pytest.mark.slow) for depths in [0, (0, 1, 2)])],
)
def test_classifier_passes_check_estimator(unfreeze):
    estimator = FineTunedImageClassifier(
        Tiny,
        image_shape=(1, -1),
        unfreeze=unfreeze,
        max_epochs=2,
        lr=1e-4,
        augment=None,  # the rows are no images, so views of them make no sense
        early_stopping=False,  # some checks have too few rows to hold any out
    )
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    statuses = [result["status"] for result in results]
    failed = [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"]
    assert not failed
    assert "xfail" not in statuses
    assert statuses.count("passed") >= 50
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}  # scikit-learn's PCA skips it too


def test_classifier_learns_and_predicts_the_labels_of_y():
    classifier = make_classifier(max_epochs=10).fit(X, Y)
    assert classifier.classes_.tolist() == ["cat", "dog", "owl"]
    assert classifier.score(X_TEST, Y_TEST) > 0.9
    p = classifier.predict_proba(X_TEST)
    assert p.shape == (30, 3)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    assert (classifier.predict(X_TEST) == NAMES[p.argmax(axis=1)]).all()
    assert (classifier.decision_function(X_TEST).argmax(axis=1) == p.argmax(axis=1)).all()


def test_decision_function_is_one_dimensional_for_two_classes():
    rows = np.flatnonzero(Y != "owl")
    classifier = make_classifier().fit(X[rows], Y[rows])
    decision, p = classifier.decision_function(X_TEST), classifier.predict_proba(X_TEST)
    assert decision.shape == (30,)
    np.testing.assert_allclose(1 / (1 + np.exp(-decision)), p[:, 1], rtol=1e-4)


def test_transform_returns_the_tuned_embedding_with_names():
    classifier = make_classifier().set_output(transform="pandas").fit(X, Y)
    frame = classifier.transform(X_TEST)
    assert list(frame.columns[:2]) == ["finetunedimageclassifier0", "finetunedimageclassifier1"]
    assert frame.shape == (30, 12)
    head = classifier.net_.module_.head
    logits = head(torch.tensor(frame.to_numpy())).detach().numpy()
    np.testing.assert_allclose(logits, classifier.decision_function(X_TEST), rtol=1e-4, atol=1e-4)


def test_stages_and_history_describe_the_fit():
    classifier = make_classifier().fit(X, Y)
    head, last, both = classifier.stages_
    assert (head["stage"], head["boundary"], head["epochs"]) == ("head", 2, 0)
    assert (last["blocks"], last["boundary"]) == (["1"], 1)
    assert (both["blocks"], both["boundary"]) == (["0", "1"], 0)
    module = classifier.net_.module_
    sizes = {k: sum(p.numel() for p in part.parameters()) for k, part in module.parts().items()}
    assert head["trainable"] == sizes["head"]
    assert last["trainable"] == sizes["head"] + sizes["pre_logits"] + sizes["1"]
    assert both["trainable"] == sum(sizes.values())
    stages = [row["stage"] for row in classifier.history_]
    assert stages == ["last block"] * last["epochs"] + ["last 2 blocks"] * both["epochs"]
    for row in classifier.history_:
        rates = row["lr"]
        assert max(rate for name, rate in rates.items() if name != "head") <= rates["head"] / 9.99


def test_clone_is_unfitted_and_set_params_applies_at_the_next_fit():
    classifier = make_classifier().fit(X, Y)
    with pytest.raises(NotFittedError):
        clone(classifier).predict(X)
    assert not hasattr(clone(classifier), "net_")
    classifier.set_params(unfreeze=(0,)).fit(X, Y)
    assert [stage["stage"] for stage in classifier.stages_] == ["head"]


# Frozen blocks


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize("augment", [None, "standard"])
def test_fit_changes_only_blocks_after_the_boundary(batch_norm, augment):
    backbone = Tiny()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    loaded = load_backbone(backbone).block_list
    pretrained = [
        {k: v.clone() for k, v in block.state_dict().items()} for _, block in loaded.blocks
    ]
    classifier = make_classifier(backbone, unfreeze=(0, 1), batch_norm=batch_norm, augment=augment)
    classifier.set_params(early_stopping=False, averaging=1.0).fit(X, Y)
    assert equal_states(before, backbone.state_dict())
    for (_, block), values in zip(loaded.blocks, pretrained, strict=True):
        assert equal_states(values, block.state_dict())
    trained = classifier.net_.module_.parts()["1"].state_dict()
    for name, value in pretrained[1].items():
        statistic = "running" in name or "num_batches" in name
        changed = not torch.equal(value, trained[name])
        assert changed == (batch_norm == "train" or not statistic), name


def test_fit_changes_only_the_named_blocks():
    classifier = make_classifier(unfreeze=(0, "0"), early_stopping=False, averaging=1.0).fit(X, Y)
    original = dict(load_backbone(Tiny).block_list.blocks)
    parts = classifier.net_.module_.parts()
    assert not equal_states(original["0"].state_dict(), parts["0"].state_dict())
    assert equal_states(original["1"].state_dict(), parts["1"].state_dict())


def test_batch_norm_adapt_sets_statistics_and_learns():
    classifier = make_classifier(batch_norm="adapt", unfreeze=(0, 1)).fit(X, Y)
    assert classifier.batch_norm_ is not None
    assert classifier.score(X_TEST, Y_TEST) > 0.9


# Reproducibility


def test_fit_is_reproducible_and_leaves_global_random_states_unchanged():
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = make_classifier(mixup=0.2).fit(X, Y)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    torch.manual_seed(6)
    second = make_classifier(mixup=0.2).fit(X, Y)
    assert (first.predict_proba(X_TEST) == second.predict_proba(X_TEST)).all()
    different = make_classifier(mixup=0.2, random_state=1).fit(X, Y)
    assert (first.predict_proba(X_TEST) != different.predict_proba(X_TEST)).any()


def test_fit_does_not_depend_on_the_row_order():
    order = np.random.RandomState(3).permutation(len(X))
    ordered, shuffled = make_classifier().fit(X, Y), make_classifier().fit(X[order], Y[order])
    assert (ordered.predict_proba(X_TEST) == shuffled.predict_proba(X_TEST)).all()


def test_sample_weight_equals_repetition():
    repeats = np.arange(len(X)) % 3
    weighted = make_classifier().fit(X, Y, sample_weight=repeats)
    repeated = make_classifier().fit(np.repeat(X, repeats, axis=0), np.repeat(Y, repeats))
    assert (weighted.predict_proba(X_TEST) == repeated.predict_proba(X_TEST)).all()


def test_class_weight_raises_the_probability_of_its_class():
    even = make_classifier(unfreeze=(0, 1)).fit(X, Y).predict_proba(X_TEST).mean(axis=0)
    heavy = {"cat": 20, "dog": 1, "owl": 1}
    uneven = (
        make_classifier(unfreeze=(0, 1), class_weight=heavy)
        .fit(X, Y)
        .predict_proba(X_TEST)
        .mean(axis=0)
    )
    assert uneven[0] > even[0]


# Cached and computed activations


@pytest.mark.parametrize("augment", [None, "standard"])
def test_recomputed_activations_give_the_same_result(monkeypatch, augment):
    backbone = "efficientnet_lite0"
    settings = {"image_size": 64, "unfreeze": (0, 2), "lr": 1e-3, "averaging": 1.0}
    # Cached maps are in half precision, which can tip the choice of C.
    monkeypatch.setattr("sktransfer.finetuning.head.STRENGTHS", (0.1,))
    cached = make_classifier(backbone, augment=augment, **settings).fit(X, Y)
    monkeypatch.setattr(
        "sktransfer.finetuning.fine_tuning.disk_problem", lambda *_: "9 bytes, and 8 are free"
    )
    with pytest.warns(UserWarning, match="computed again in every epoch"):
        recomputed = make_classifier(backbone, augment=augment, **settings).fit(X, Y)
    np.testing.assert_allclose(
        cached.predict_proba(X_TEST), recomputed.predict_proba(X_TEST), rtol=1e-2, atol=1e-3
    )
    for cached_row, recomputed_row in zip(cached.history_, recomputed.history_, strict=True):
        assert cached_row["train_loss"] == pytest.approx(
            recomputed_row["train_loss"], rel=1e-2, abs=1e-3
        )


def test_fit_of_the_head_warns_of_embeddings_that_do_not_fit_on_disk(monkeypatch):
    monkeypatch.setattr(
        "sktransfer.finetuning.fine_tuning.disk_problem", lambda *_: "9 bytes, and 8 are free"
    )
    with pytest.warns(UserWarning, match="The activations of 180 views before 'head' take 9 bytes"):
        make_classifier(unfreeze=(0,), early_stopping=False).fit(X, Y)


def test_training_equals_a_plain_torch_loop():
    """Compare two epochs of one batch each, without randomness, with plain torch."""
    settings = {"augment": None, "dropout": 0.0, "batch_size": 100, "early_stopping": False}
    settings |= {"unfreeze": (0, 2), "max_epochs": 2, "weight_decay": 0.1, "averaging": 1.0}
    classifier = make_classifier(**settings).fit(X, Y)
    start = make_classifier(**{**settings, "unfreeze": (0,)}).fit(X, Y)

    network = Tiny().eval()
    network[5] = torch.nn.Linear(12, 3)
    state = start.net_.module_.head.state_dict()
    penalty = state.pop("penalty")
    assert (penalty > 0).all()
    factor = ClassificationTask.start_factor
    network[5].load_state_dict({name: factor * value for name, value in state.items()})
    groups = [{"params": list(network[part].parameters())} for part in (0, 1, 5)]
    optimizer = torch.optim.AdamW(groups, lr=0, weight_decay=0.1)
    x = torch.stack([Tiny.preprocessing.prepare(image) for image in X])
    y = torch.from_numpy(np.searchsorted(NAMES, Y))
    for row in classifier.history_:
        for group, name in zip(optimizer.param_groups, ("0", "1", "head"), strict=True):
            group["lr"] = row["lr"][name]
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(Tiny.preprocessing.normalize(x)), y)
        (loss + (penalty * network[5].weight ** 2).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        test = torch.stack([Tiny.preprocessing.prepare(image) for image in X_TEST])
        plain = network(Tiny.preprocessing.normalize(test)).softmax(1).numpy()
    np.testing.assert_allclose(classifier.predict_proba(X_TEST), plain, rtol=1e-4, atol=1e-5)


def test_fresh_augmentation_reads_every_image_in_every_epoch(log):
    settings = {"unfreeze": (0, 1), "max_epochs": 3, "early_stopping": False}
    settings |= {"augment": "light", "averaging": 1.0}
    make_classifier(CountingTiny(log), n_views=None, **settings).fit(X, Y)
    fresh = counted(log)
    log.unlink()
    make_classifier(CountingTiny(log), n_views=2, **settings).fit(X, Y)
    assert (fresh, counted(log)) == (60 + 3 * 60, 3 * 60)


@pytest.mark.parametrize(
    ("augment", "copies"),
    [("standard", 1), ("light", 3), ("aggressive", 3), ("industrial", 7), (None, 0)],
)
def test_auto_n_views_depends_on_the_policy(log, augment, copies):
    settings = {"unfreeze": (0, 1), "max_epochs": 1, "early_stopping": False}
    make_classifier(CountingTiny(log), n_views="auto", augment=augment, **settings).fit(X, Y)
    assert counted(log) == (1 + copies) * 60


def test_auto_n_views_ignores_the_name_of_a_function():
    def industrial(image):
        return image

    assert resolve_n_views(resolve_augmentation(industrial), "auto") == 3


# Warnings and errors


def test_low_lr_drop_warns():
    with pytest.warns(
        UserWarning, match=r"Got lr_drop=2, so the learning rate of the last block is more than"
    ):
        make_classifier(lr_drop=2, unfreeze=(0,)).fit(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_classifier(lr_drop=10, unfreeze=(0,)).fit(X, Y)


def test_fit_raises_on_a_single_class():
    with pytest.raises(
        ValueError, match="Got 1 class in y, 'cat', but a classifier needs at least"
    ):
        make_classifier().fit(X[:5], ["cat"] * 5)


def test_class_too_small_to_hold_out_warns():
    y = Y.copy()
    y[0] = "yak"
    with pytest.warns(UserWarning, match="Got at most 2 images of the classes 'yak'"):
        make_classifier(unfreeze=(0,)).fit(X, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"unfreeze": (0, 3)}, "Got 3 in unfreeze, but the backbone has 2 blocks"),
        ({"unfreeze": (0, "layer")}, "Got 'layer' in unfreeze, but the backbone has blocks 0, 1"),
        ({"unfreeze": ()}, "Got unfreeze=(), but expected one entry per stage"),
        ({"unfreeze": (1, 0)}, "0, which fits only the head, must come first"),
        ({"lr": -1}, "Got lr=-1, but expected 'auto' or a number above 0 and at most 10"),
        ({"max_epochs": 0}, "Got max_epochs=0, but expected 'auto' or an integer of at least 1"),
        ({"averaging": 2}, "Got averaging=2, but expected 'auto' or a number from 0 to 1"),
        ({"dropout": 2}, "Got dropout=2, but expected a number of at least 0 and below 1"),
        ({"n_views": -1}, "Got n_views=-1, but expected 'auto', None or an integer from"),
        ({"n_views": "atuo"}, "Got n_views='atuo', but expected 'auto', None or an integer from"),
        (
            {"weight_decay": "x"},
            "Got weight_decay='x', but expected 'auto' or a number from 0 to 10",
        ),
        ({"early_stopping": "yes"}, "Got early_stopping='yes', but expected 'auto', True or Fal"),
        ({"callbacks": 3}, "Got callbacks=3, but expected a list of skorch's"),
        ({"batch_norm": "no"}, "Got batch_norm='no', but expected"),
        ({"optimizer": "adma"}, "did you mean 'adam'?"),
        ({"augment": "standrad"}, "did you mean 'standard'?"),
        ({"random_state": "x"}, "Got random_state='x', but expected None, an int"),
        ({"class_weight": "balance"}, "did you mean 'balanced'?"),
    ],
)
def test_invalid_parameters_are_rejected(parameters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_classifier(**parameters).fit(X, Y)


class Explode(Callback):
    """Sets the weights to infinity in one epoch."""

    def __init__(self, epoch):
        self.epoch, self.epochs = epoch, 0

    def on_epoch_begin(self, net, **kwargs):
        self.epochs += 1
        if self.epochs == self.epoch:
            with torch.no_grad():
                net.module_.head.weight.fill_(torch.inf)


def test_non_finite_loss_ends_the_stage_with_the_best_weights():
    with pytest.warns(UserWarning, match="Got a loss that is not finite in epoch 2 of stage"):
        classifier = make_classifier(unfreeze=(0, 1), callbacks=[Explode(2)]).fit(X, Y)
    assert np.isfinite(classifier.predict_proba(X_TEST)).all()
    classifier = make_classifier(unfreeze=(0, 1), callbacks=[Explode(3)], early_stopping=False)
    with pytest.warns(UserWarning, match="Got a loss that is not finite in epoch 3 of stage"):
        classifier.fit(X, Y, X_val=X_TEST, y_val=Y_TEST)
    assert np.isfinite(classifier.predict_proba(X_TEST)).all()
    assert classifier.stages_[-1]["best_epoch"] == 2
    with pytest.raises(FloatingPointError, match="decrease lr, increase lr_drop"):
        make_classifier(unfreeze=(0, 1), callbacks=[Explode(1)], early_stopping=False).fit(X, Y)


def test_broken_images_are_named_by_their_row(tmp_path):
    from PIL import Image

    paths = []
    for row, image in enumerate(X):
        paths.append(str(tmp_path / f"{97 - row}.png"))
        Image.fromarray(image).save(paths[-1])
    (tmp_path / "90.png").write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        make_classifier().fit(paths, Y)
    assert (caught.value.row, caught.value.source) == (7, paths[7])


def test_inconsistent_labels_or_validation_images_are_rejected():
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        make_classifier().fit(X, Y[:-1])
    with pytest.raises(ValueError, match="Got only one of X_val and y_val"):
        make_classifier().fit(X, Y, X_val=X_TEST)
    with pytest.raises(
        ValueError, match=re.escape("Got ['yak'] in y_val, but expected only classe")
    ):
        make_classifier().fit(X, Y, X_val=X_TEST[:1], y_val=["yak"])


# Validation, early stopping, interruption


def test_given_validation_images_determine_valid_loss():
    classifier = make_classifier(unfreeze=(0, 1), averaging=1.0)
    classifier.fit(X, Y, X_val=X_TEST, y_val=Y_TEST)
    p = classifier.predict_proba(X_TEST)[np.arange(30), np.searchsorted(NAMES, Y_TEST)]
    assert classifier.stages_[-1]["valid_loss"] == pytest.approx(-np.log(p).mean(), rel=1e-2)


@pytest.mark.parametrize("averaging", [1.0, "auto"])
def test_stage_never_ends_worse_than_it_began(averaging):
    settings = {"unfreeze": (0, 1, 2), "lr": 10.0, "max_epochs": 4, "averaging": averaging}
    classifier = make_classifier(**settings).fit(X, Y)
    losses = [stage["valid_loss"] for stage in classifier.stages_]
    if averaging == 1:  # otherwise the stage begins with a weaker head
        assert losses[1] <= losses[0] * 1.01
    assert losses[2] <= losses[1] * 1.01
    assert classifier.score(X_TEST, Y_TEST) > 0.9


def test_stage_ends_after_n_iter_no_change():
    classifier = make_classifier(unfreeze=(0, 1), lr=1.0, max_epochs=50, n_iter_no_change=2).fit(
        X, Y
    )
    stage = classifier.stages_[-1]
    assert stage["epochs"] == stage["best_epoch"] + 2 < 50


def test_all_images_train_in_all_epochs_without_early_stopping():
    classifier = make_classifier(unfreeze=(0, 1), max_epochs=4, early_stopping=False).fit(X, Y)
    assert len(classifier.history_) == 4
    assert sum(batch["train_batch_size"] for batch in classifier.history_[0]["batches"]) == 60
    assert classifier.stages_[-1]["valid_loss"] is None


def test_last_epoch_is_kept_without_early_stopping():
    settings = {"max_epochs": 4, "early_stopping": False, "averaging": 1.0}
    classifier = make_classifier(unfreeze=(0, 1), lr=10.0, **settings)
    classifier.fit(X, Y, X_val=X_TEST, y_val=Y_TEST)
    first, last = classifier.stages_
    assert last["best_epoch"] == 4
    assert last["valid_loss"] == classifier.history_[-1]["valid_loss"] > first["valid_loss"]
    assert last["valid_acc"] == pytest.approx(classifier.score(X_TEST, Y_TEST))


def test_skorch_callback_stops_a_stage():
    stopping = EarlyStopping(monitor="train_loss", patience=1, threshold=1e9)
    classifier = make_classifier(unfreeze=(0, 1, 2), max_epochs=9, callbacks=[stopping]).fit(X, Y)
    assert [stage["epochs"] for stage in classifier.stages_[1:]] == [2, 2]
    assert len(classifier.stages_) == 3


def test_callbacks_of_skorch_and_scikit_learn_stop_a_stage_together(monkeypatch):
    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(StageProgress, "update", lambda self, metrics, *_: "loss" in metrics)
    classifier = make_classifier(unfreeze=(0, 1, 2), callbacks=[Stop()]).fit(X, Y)
    assert [stage["epochs"] for stage in classifier.stages_] == [0, 1, 1]


def test_interrupted_fit_keeps_its_best_weights():
    with pytest.warns(UserWarning, match="interrupted in stage 'last block'"):
        classifier = make_classifier(max_epochs=9, callbacks=[Interrupt()]).fit(X, Y)
    assert [stage["stage"] for stage in classifier.stages_] == ["head", "last block"]
    assert classifier.score(X_TEST, Y_TEST) > 0.9
    assert classifier.interrupted_


# Random augmentation


def slow_noise(image):
    """Draw from the global generator, slowly."""
    noise = torch.randint(0, 30, image.shape, dtype=torch.uint8)
    time.sleep(0.002)
    return image // 2 + noise


@pytest.mark.slow_cases("unfreeze0")
@pytest.mark.parametrize("unfreeze", [(0, 1), "all"])
def test_background_transforms_do_not_change_dropout(unfreeze):
    settings = {"n_views": None, "dropout": 0.5, "batch_size": 4, "n_jobs": 2, "max_epochs": 2}
    fits = [
        make_classifier(
            unfreeze=unfreeze, augment=slow_noise, early_stopping=False, **settings
        ).fit(X, Y)
        for _ in range(2)
    ]
    assert equal_states(*map(net_state, fits))


def test_fresh_views_differ_in_each_epoch_of_each_stage(monkeypatch):
    seen, fresh = [], FineTuning._fresh_views

    def noted(*arguments):
        views, count = fresh(*arguments)
        seen.append(views.fingerprint(0))
        return views, count

    monkeypatch.setattr(FineTuning, "_fresh_views", noted)
    settings = {"n_views": None, "early_stopping": False, "averaging": 1.0}
    make_classifier(**settings, max_epochs=2).fit(X, Y)
    assert len(seen) == len(set(seen)) == 4


# Training of all blocks at once


@pytest.mark.parametrize("weights", [None, "default"])
def test_unfreeze_all_changes_every_parameter_in_one_stage(weights):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = "efficientnet_lite0"
        classifier = FineTunedImageClassifier(
            backbone, weights=weights, unfreeze="all", image_size=32, max_epochs=2, random_state=0
        ).fit(X[:30], Y[:30])
    (stage,) = classifier.stages_
    assert (stage["boundary"], stage["stage"]) == (0, "all")
    module = classifier.net_.module_
    original = dict(load_backbone(backbone, weights).block_list.blocks)
    for name, block in original.items():
        for key, value in block.named_parameters():
            tuned = dict(module.parts()[name].named_parameters())[key]
            assert not torch.equal(value, tuned), f"{name}.{key}"


def test_rates_are_equal_only_from_scratch():
    classifier = make_classifier(lambda: Tiny(), unfreeze="all", weights="default").fit(X, Y)
    assert min(classifier.history_[0]["lr"].values()) < classifier.history_[0]["lr"]["head"]
    scratch = FineTunedImageClassifier(
        "efficientnet_lite0", weights=None, unfreeze="all", image_size=32, max_epochs=1
    ).fit(X[:12], Y[:12])
    assert len(set(scratch.history_[0]["lr"].values())) == 1


# Devices


def test_fitted_classifier_moves_to_another_device():
    classifier = make_classifier(unfreeze=(0, 1)).fit(X, Y)
    expected, net = classifier.predict_proba(X_TEST), classifier.net_
    assert classifier.set_params(device="cpu").net_ is net
    assert classifier.set_params(device="meta").net_.module_.device.type == "meta"
    assert (classifier.set_params(device="cpu").predict_proba(X_TEST) == expected).all()


def test_out_of_memory_in_trained_blocks_halves_the_batch(monkeypatch):
    classifier, embed = make_classifier(unfreeze=(0, 1)).fit(X, Y), TrainedSuffix.embed
    expected, sizes = classifier.predict_proba(X_TEST), []

    def scarce(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(x))
        return embed(self, x)

    monkeypatch.setattr(TrainedSuffix, "embed", scarce)
    np.testing.assert_allclose(classifier.predict_proba(X_TEST), expected, rtol=1e-4, atol=1e-6)
    assert sum(sizes) == 30


def test_fit_prints_nothing_if_another_library_replaces_print(monkeypatch, capsys):
    honest = print
    monkeypatch.setattr("builtins.print", lambda *args, **options: honest(*args, **options))
    make_classifier().fit(X, Y)
    assert capsys.readouterr().out == ""


# Pickles


@pytest.mark.slow
def test_pickle_holds_only_trained_blocks_and_predicts_the_same(tmp_path):
    settings = {"unfreeze": (0, 1), "image_size": 64, "max_epochs": 1, "augment": None}
    classifier = FineTunedImageClassifier(random_state=0, **settings).fit(X[:30], Y[:30])
    saved = pickle.dumps(classifier)
    trained = sum(4 * p.numel() for p in classifier.net_.module_.parameters())
    assert trained < len(saved) < trained + 100_000
    (tmp_path / "classifier.pkl").write_bytes(saved)
    np.save(tmp_path / "X.npy", X_TEST)
    script = (
        "import numpy as np, pickle, sys\n"
        "classifier = pickle.load(open('classifier.pkl', 'rb'))\n"
        "np.save('p.npy', classifier.predict_proba(np.load('X.npy')))\n"
        "assert [row['stage'] for row in classifier.history_] == ['last block']\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert (np.load(tmp_path / "p.npy") == classifier.predict_proba(X_TEST)).all()


def test_pickle_holds_only_arrays():
    state = make_classifier().fit(X, Y).__getstate__()
    assert state["_net"] is None
    assert {type(array) for array in state["_tuned"].weights.values()} == {np.ndarray}


@pytest.mark.gpu
def test_classifier_fitted_on_a_gpu_predicts_the_same_on_the_cpu():
    gpu = make_classifier(device="cuda", precision="float32", max_epochs=10).fit(X, Y)
    assert gpu.score(X_TEST, Y_TEST) > 0.9
    loaded = pickle.loads(pickle.dumps(gpu)).set_params(device="cpu")
    np.testing.assert_allclose(
        loaded.predict_proba(X_TEST), gpu.predict_proba(X_TEST), rtol=1e-2, atol=1e-3
    )


# Calls per fit


def test_fit_resolves_images_backbone_and_engine_once(monkeypatch):
    from sktransfer.backbones import loading, source
    from sktransfer.embedding import compute
    from sktransfer.finetuning import estimator, fit_inputs

    functions = {
        "load_backbone": (fit_inputs, source),
        "digest_tensors": (loading,),
        "check_images": (estimator,),
        "choose_engine": (compute,),
    }
    calls = count_calls(monkeypatch, functions)
    once = dict.fromkeys(functions, 1)
    classifier = make_classifier(Tiny(), n_views=2, early_stopping=True, checkpoint_dir=None)
    classifier.fit(X, Y)
    assert calls == once
    calls.clear()
    classifier.predict(X_TEST)
    assert calls == once


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_labels_are_rejected(missing):
    labels = [missing if row in (2, 5) else name for row, name in enumerate(Y)]
    classifier = make_classifier(unfreeze=0)
    expected = "missing labels in {}, in rows 2, 5, but expected a label for each image"
    with pytest.raises(ValueError, match=expected.format("y")):
        classifier.fit(X, labels)
    with pytest.raises(ValueError, match=expected.format("y_val")):
        classifier.fit(X, Y, X_val=X, y_val=labels)
    with pytest.raises(ValueError, match=expected.format("y")):
        classifier.fit(X, Y).score(X, labels)


NAN, INF = float("nan"), float("inf")
BAD = {
    **BAD_SHARED,
    "lr": [0, -1, 1000, INF, NAN, "1e-3", True, None],
    "batch_size": [True, 0, 10**9, 1.5, "16", None],
    "max_epochs": [0, -1, True, 1.5, None, INF],
    "validation_fraction": [0, 1, -0.1, 1.5, "a", None, NAN],
    "unfreeze": [True, (0, True), -1, (0, -1), 9, (0, 9), 1.5, None, "zz", (), [[]], {}, "All"],
    "class_weight": ["balance", 1, [1, 2], {0: -1}, {0: NAN}, {0: INF}, {0: "1"}, {0: 0}, True],
    "random_state": [-1, 1.5, "0", True, 10**30, NAN, np.random.default_rng(0)],
    "dropout": [1, -0.1, NAN, "a", True],
    "label_smoothing": [1, -1, INF],
    "mixup": [-1, INF, NAN, "a"],
    "weight_decay": [-1, INF, NAN, 1e9, True, "Auto", None],
    "averaging": [-0.1, 1.1, INF, NAN, True, "Auto", "1", None],
    "n_views": [-1, 1.5, True, 10**9, "all"],
    "early_stopping": ["yes", None, 1, 0],
    "n_iter_no_change": [0, True, 1.5, None, INF],
    "lr_drop": [0, 0.5, INF, NAN, None],
    "lr_decay": [0, INF, True],
    "domain_adversarial": [-1, INF, 1e9, True, "a"],
    "optimizer": [None, "Adam", 3],
    "augment": ["", "Light", 3, True, []],
    "callbacks": [3, [3], "x", [None], {}],
    "checkpoint_dir": ["", 0, True, __file__, "none"],
}


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_parameter_at_the_edge_is_rejected_before_an_image_is_read(name, value):
    estimator = FineTunedImageClassifier(**{"backbone": Tiny, "batch_norm": "adapt", name: value})
    X = Unread() if name != "pixel_range" else images(12)
    with pytest.raises((ValueError, TypeError, OSError), match=r"^Got "):
        estimator.fit(X, np.arange(12) % 2)


@pytest.mark.parametrize(
    "parameters",
    [
        {"lr": np.float32(1e-3)},
        {"batch_size": np.int64(4)},
        {"max_epochs": np.int32(1)},
        {"validation_fraction": np.float64(0.3)},
        {"early_stopping": np.True_},
        {"unfreeze": np.int64(0)},
        {"unfreeze": (np.int64(0), np.int64(1))},
        {"random_state": np.int64(3)},
        {"n_views": np.int64(1)},
        {"averaging": np.float32(0.5)},
        {"class_weight": {name: np.float32(2) for name in NAMES}},
        {"optimizer": torch.optim.Adam},
    ],
)
def test_numbers_of_numpy_are_accepted(parameters):
    settings = {"unfreeze": (0, 1), "max_epochs": 1, "n_views": 1, **parameters}
    assert np.isfinite(make_classifier(**settings).fit(X, Y).predict_proba(X_TEST)).all()


def test_numpy_true_holds_out_as_many_images_as_true():
    reports = [
        make_classifier(unfreeze=0, early_stopping=value).fit(X, Y).stages_[0]["valid_loss"]
        for value in (True, np.True_, False)
    ]
    assert reports[0] == reports[1]
    assert reports[2] is None


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"early_stopping": False},
        {"unfreeze": ("all",), "n_views": None},
        {"unfreeze": 0},
        {"batch_norm": "adapt"},
        {"unfreeze": (1,)},
        {"cache": "auto"},
        {"n_views": None},
        {"unfreeze": "auto"},
        {"augment": "light"},
    ],
)
def test_one_error_names_all_broken_images(parameters, tmp_path):
    paths, y = paths_with_broken(tmp_path, 24)
    with pytest.raises(ImageError, match="Got 4 images that cannot be read:") as caught:
        make_classifier(**{"batch_size": 4, **parameters}).fit(paths, y)
    assert [error.row for error in caught.value.errors] == BROKEN_ROWS
    assert caught.value.source == paths[1]


@pytest.mark.parametrize("unfreeze", [0, (0, 1), "all"])
@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function", "transform"])
def test_one_error_names_all_broken_images_of_a_prediction(unfreeze, method, tmp_path):
    paths, _ = paths_with_broken(tmp_path)
    classifier = make_classifier(unfreeze=unfreeze, max_epochs=1).fit(X, Y)
    with pytest.raises(ImageError) as caught:
        getattr(classifier, method)(paths)
    assert [error.row for error in caught.value.errors] == BROKEN_ROWS


def test_broken_images_of_a_checkpointed_fit_are_named_together(tmp_path):
    paths, y = paths_with_broken(tmp_path)
    with pytest.raises(ImageError) as caught:
        make_classifier(checkpoint_dir=tmp_path / "fits").fit(paths, y)
    assert {4, 10} <= {error.row for error in caught.value.errors}


def test_rising_loss_warns():
    settings = {"unfreeze": 2, "lr_drop": 10, "max_epochs": 3, "early_stopping": False}
    message = r"The training loss of the stage 'last 2 blocks' is .* \(lr=10\): lower lr, or raise"
    with pytest.warns(UserWarning, match=message):
        make_classifier(lr=10.0, **settings).fit(X, Y)


@pytest.mark.parametrize("parameters", [{}, {"unfreeze": "all"}, {"mixup": 0.2}])
def test_falling_loss_does_not_warn(parameters):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_classifier(**{"unfreeze": (0, 1), "max_epochs": 3, **parameters}).fit(X, Y)


def test_decision_on_some_images_names_all_broken_images(tmp_path, monkeypatch):
    monkeypatch.setattr("sktransfer.finetuning.decision.MAX_MEASURED", 4)
    monkeypatch.setattr("sktransfer.finetuning.decision.MIN_PER_CLASS", 2)
    paths, y = paths_with_broken(tmp_path, 12)
    valid = [paths[2], str(tmp_path / "missing.png")]
    with pytest.raises(ImageError) as caught:
        make_classifier(unfreeze="auto").fit(paths, y, X_val=valid, y_val=y[:2])
    sources = {error.source for error in caught.value.errors}
    assert sources == {valid[1], *(paths[row] for row in BROKEN_ROWS)}


def test_rows_with_the_same_broken_image_are_all_named():
    items = [b"" if row in (2, 7, 9) else image for row, image in enumerate(X)]
    with pytest.raises(ImageError) as caught:
        make_classifier(unfreeze=0).fit(items, Y)
    assert [error.row for error in caught.value.errors] == [2, 7, 9]
