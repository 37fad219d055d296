"""Domain-adversarial training and BatchNorm of two domains."""

import contextlib
import math
import pickle
import re

import numpy as np
import pytest
import sklearn
import torch
from helpers import (
    BOTH,
    DOMAIN,
    X_TARGET,
    X_TEST,
    CountingTiny,
    Interrupt,
    PowerCut,
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
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from sktransfer.adaptation.adversary import Adversary, reversal_strength, reverse_gradient
from sktransfer.adaptation.batch_norm import match_batch_norm
from sktransfer.backbones.batch_norm import with_batch_norm
from sktransfer.backbones.loading import load_backbone
from sktransfer.backbones.weights import to_tensors
from sktransfer.data.images import as_images
from sktransfer.data.labels import check_labels
from sktransfer.transforms.views import Views

CPU = torch.device("cpu")


def dann(**parameters):
    return make_classifier(**{"unfreeze": (0, 1), "domain_adversarial": 1.0, **parameters})


def fitted(**parameters):
    return dann(**parameters).fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)


# Gradient reversal and the adversary


def test_reverse_gradient_keeps_values_and_scales_the_gradient():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (x.sin() @ weight).sum().backward()
    plain_x, plain_weight = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    reversed_x = reverse_gradient(x.sin(), 0.3)
    assert torch.equal(reversed_x, x.sin())
    (reversed_x @ weight).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * plain_x)
    torch.testing.assert_close(weight.grad, plain_weight)


def test_reversal_strength_follows_the_schedule_of_the_paper():
    for p in np.linspace(0, 1, 7):
        assert reversal_strength(p) == pytest.approx(2 / (1 + math.exp(-10 * p)) - 1)


def test_adversary_loss_is_the_weighted_cross_entropy_of_domains():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adversary, source, target = Adversary(6, 0.5), torch.randn(4, 6), torch.randn(4, 6)
        loss = adversary(source, target)
        p = adversary.layers(torch.cat([source, target])).sigmoid().squeeze(1)
    expected = -(p[:4].log().sum() + (1 - p[4:]).log().sum()) / 8
    torch.testing.assert_close(loss, 0.5 * expected)


def test_gradients_improve_the_adversary_and_worsen_the_embeddings():
    """A step of the adversary lowers the domain loss, and a step of the embedding raises it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adversary, embed = Adversary(6, 1.0), torch.nn.Linear(6, 6)
        source, target = torch.randn(50, 6), torch.randn(50, 6) + 1
    adversary.strength = 1.0

    def loss():
        return adversary(embed(source), embed(target))

    before = loss()
    before.backward()
    for module, sign in ((adversary, -1), (embed, 1)):
        originals = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for p in module.parameters():
                p -= 0.01 * p.grad
            assert sign * (loss() - before) > 0
            for p, old in zip(module.parameters(), originals, strict=True):
                p.copy_(old)


# Labels of the target


@pytest.mark.slow_cases("parameters1")
@pytest.mark.parametrize("parameters", [{}, {"batch_norm": "adapt"}, {"domain_adversarial": 0.0}])
def test_target_labels_are_never_read(parameters):
    expected = net_state(fitted(**parameters))
    lists = [*Y.tolist(), *([None, ["no label"]] * 20)]
    for y in (domain_labels("unknown"), domain_labels("dog"), lists):
        classifier = dann(**parameters).fit(BOTH, y, sample_domain=DOMAIN)
        assert classifier.classes_.tolist() == ["cat", "dog", "owl"]
        assert equal_states(net_state(classifier), expected)


def test_target_placeholders_are_not_classes():
    codes = np.unique(Y, return_inverse=True)[1]
    expected = net_state(fitted())
    for mask in (-1, 7, np.nan):
        y = np.concatenate([codes, np.full(40, mask)])
        classifier = dann().fit(BOTH, y, sample_domain=DOMAIN)
        assert classifier.classes_.tolist() == [0, 1, 2]
        assert equal_states(net_state(classifier), expected)


def test_target_changes_nothing_without_an_adversary():
    both = make_classifier().fit(BOTH, domain_labels("unknown"), sample_domain=DOMAIN)
    assert equal_states(net_state(both), net_state(make_classifier().fit(X, Y)))


def test_target_order_copies_and_zero_weights_do_not_matter():
    order = np.random.RandomState(0).permutation(100)
    expected, y = net_state(fitted()), domain_labels("cat")
    shuffled = dann().fit(BOTH[order], y[order], sample_domain=DOMAIN[order])
    assert equal_states(net_state(shuffled), expected)
    rows = np.r_[np.arange(100), 70]
    twice = dann().fit(BOTH[rows], y[rows], sample_domain=DOMAIN[rows])
    assert equal_states(net_state(twice), expected)
    leave = np.r_[np.ones(95), np.zeros(5)]
    fewer = dann().fit(BOTH[:95], y[:95], sample_domain=DOMAIN[:95])
    weighted = dann().fit(BOTH, y, sample_domain=DOMAIN, sample_weight=leave)
    assert equal_states(net_state(weighted), net_state(fewer))


# Training


def test_trained_blocks_depend_on_the_target_and_the_weight():
    settings = {"unfreeze": (0, 1), "early_stopping": False, "averaging": 1.0}
    source_only = net_state(make_classifier(**settings).fit(X, Y))
    strong, weak = (
        net_state(fitted(**settings, domain_adversarial=weight)) for weight in (1.0, 0.1)
    )
    assert not equal_states(strong, source_only)
    assert not equal_states(strong, weak)


class Calm(Tiny):
    """Tiny with torch's initial values, so that embeddings have a usual scale."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()


def separability(classifier):
    """Compute the distance of the domain means in standard deviations of the source."""
    source, target = classifier.transform(X), classifier.transform(X_TARGET)
    apart = source.mean(axis=0) - target.mean(axis=0)
    return np.linalg.norm(apart / (source.std(axis=0) + 0.1 * source.std()))


def test_adversary_makes_domains_harder_to_separate():
    settings = {"backbone": Calm, "unfreeze": (0, 2), "max_epochs": 10, "lr": 1e-2}
    settings |= {"early_stopping": False, "n_views": 0, "averaging": 1.0, "augment": None}
    settings |= {"batch_size": 16, "lr_decay": 2.6}
    plain = make_classifier(**settings).fit(X, Y)
    confused = fitted(**settings)
    assert separability(confused) < 0.75 * separability(plain)
    assert confused.score(X, Y) > 0.9


def test_auto_early_stopping_holds_nothing_out_with_an_adversary(monkeypatch):
    monkeypatch.setattr("sktransfer.finetuning.plan.MIN_IMAGES_TO_HOLD_OUT", 10)
    assert fitted(early_stopping="auto").stages_[-1]["valid_loss"] is None
    assert fitted(early_stopping=True).stages_[-1]["valid_loss"] is not None
    plain = make_classifier(unfreeze=(0, 1), early_stopping="auto").fit(X, Y)
    assert plain.stages_[-1]["valid_loss"] is not None


@pytest.mark.slow_cases("parameters1")
@pytest.mark.parametrize("parameters", [{"mixup": 0.3}, {"batch_norm": "adapt"}])
def test_fit_is_bitwise_reproducible_for_a_seed(parameters):
    assert equal_states(net_state(fitted(**parameters)), net_state(fitted(**parameters)))
    assert not equal_states(
        net_state(fitted(**parameters)), net_state(fitted(**parameters, random_state=1))
    )


def test_head_stage_is_fitted_on_the_source_only():
    still = {"unfreeze": (0, 1), "max_epochs": 1, "lr": 1e-30, "averaging": 1.0}
    assert equal_states(net_state(fitted(**still)), net_state(make_classifier(**still).fit(X, Y)))


def test_views_of_both_domains_are_embedded_once(log, store):
    settings = {"cache": store, "n_views": 2, "early_stopping": False}
    for weight in (1.0, 0.5):
        fitted(backbone=CountingTiny(log), domain_adversarial=weight, **settings)
    assert counted(log) == 3 * 100


@pytest.mark.parametrize("parameters", [{"n_views": None}, {"unfreeze": "all"}])
def test_target_images_train_without_cached_activations(parameters):
    settings = {"early_stopping": False, **parameters}
    adversarial = net_state(fitted(**settings))
    assert equal_states(adversarial, net_state(fitted(**settings)))
    assert not equal_states(adversarial, net_state(fitted(**settings, domain_adversarial=0.0)))


def test_recomputed_activations_give_the_same_result(monkeypatch):
    expected = fitted().predict_proba(X_TEST)
    counts = []
    monkeypatch.setattr(
        "sktransfer.finetuning.fine_tuning.disk_problem",
        lambda n, *_: counts.append(n) or "9 bytes, and 8 are free",
    )
    with pytest.warns(UserWarning, match="computed again in every epoch"):
        probabilities = fitted().predict_proba(X_TEST)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-2, atol=1e-3)
    assert counts == [3 * (54 + 40)]  # 6 of the source are held out


def test_history_holds_the_domain_loss():
    for row in fitted().history_:
        assert 0 < row["domain_loss"] < 5
    assert all("domain_loss" not in row for row in make_classifier().fit(X, Y).history_)


# BatchNorm


def of_block(classifier, name):
    return classifier.net_.module_.parts()[name].state_dict()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_target_is_matched_to_the_source_after_training(weight):
    frozen, adapted = (
        fitted(batch_norm=kind, domain_adversarial=weight) for kind in ("frozen", "adapt")
    )
    views = (Views(as_images(domain), frozen.preprocessing_) for domain in (X, X_TARGET))
    expected = match_batch_norm(frozen.as_backbone(), *views, CPU, 1).statistics
    expected, statistics = map(to_tensors, (expected, adapted.batch_norm_.statistics))
    for name in expected:  # in other batches, since the order differs
        torch.testing.assert_close(statistics[name], expected[name], rtol=0.15, atol=0.01)
    assert frozen.batch_norm_ is None
    trained = of_block(adapted, "1")
    assert torch.equal(trained["1.running_mean"], statistics["1.1.running_mean"])
    assert torch.equal(trained["1.running_var"], statistics["1.1.running_var"])
    before, after = net_state(frozen), net_state(adapted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.0.1.running_mean", "blocks.0.1.running_var"}
    loaded = pickle.loads(pickle.dumps(adapted))
    assert (loaded.predict_proba(X_TEST) == adapted.predict_proba(X_TEST)).all()


def test_network_without_batch_norm_is_rejected_before_training():
    bare = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    classifier = dann(backbone=bare, unfreeze=(0,), domain_adversarial=0.0, batch_norm="adapt")
    with pytest.raises(ValueError, match="has no BatchNorm layers to adapt"):
        classifier.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)
    assert not hasattr(classifier, "stages_")


def test_head_is_fitted_on_the_source_and_used_on_the_target():
    head = {"unfreeze": (0,), "domain_adversarial": 0.0}
    alone = make_classifier(**head).fit(X, Y)
    both = fitted(batch_norm="adapt", **head)
    assert equal_states(net_state(both), net_state(alone))
    target = with_batch_norm(load_backbone(Tiny), both.batch_norm_)
    prefix = torch.nn.Sequential(*(block for _, block in target.block_list.blocks))
    x = torch.stack([Tiny.preprocessing.prepare(image) for image in X_TEST])
    with torch.no_grad():
        expected = prefix(Tiny.preprocessing.normalize(x)).mean((2, 3))
    np.testing.assert_allclose(both.transform(X_TEST), expected, rtol=1e-3, atol=1e-4)


def test_adapted_batch_norm_compensates_for_darkness():
    test, y = colored_images(60, seed=3)
    dark = (test * 0.4).astype(np.uint8)
    scores = {
        batch_norm: fitted(
            batch_norm=batch_norm, unfreeze=(0, 1), domain_adversarial=0.0, early_stopping=False
        ).score(dark, y)
        for batch_norm in ("frozen", "adapt")
    }
    assert scores["adapt"] > scores["frozen"] + 0.3


@pytest.mark.parametrize("unfreeze", [(0, 1), (0, ["0"])])
def test_adapted_batch_norm_of_untrained_blocks_survives_pickling(unfreeze):
    classifier = fitted(batch_norm="adapt", unfreeze=unfreeze, domain_adversarial=0.0)
    loaded = pickle.loads(pickle.dumps(classifier))
    assert (loaded.predict_proba(X_TARGET) == classifier.predict_proba(X_TARGET)).all()


# Pickles, clones and routing


def test_pickle_leaves_out_the_adversary():
    classifier = fitted()
    assert not any("adversary" in name for name in classifier._tuned.weights)
    assert not any("adversary" in name for name in net_state(classifier))
    plain = make_classifier(unfreeze=(0, 1)).fit(X, Y)
    assert len(pickle.dumps(classifier)) < len(pickle.dumps(plain)) + 2000
    loaded = pickle.loads(pickle.dumps(classifier))
    assert (loaded.predict_proba(X_TEST) == classifier.predict_proba(X_TEST)).all()


def test_clone_keeps_domain_adversarial():
    assert clone(dann(domain_adversarial=0.3)).domain_adversarial == 0.3


def test_sample_domain_is_routed_through_pipelines_and_searches():
    y = domain_labels("cat")
    # Every fold trains with the target, and is tested on the source.
    folds = PredefinedSplit(np.r_[np.arange(60) % 2, np.full(40, -1)])
    with sklearn.config_context(enable_metadata_routing=True):
        last = dann(early_stopping=False).set_fit_request(sample_domain=True)
        pipeline = Pipeline([("same", FunctionTransformer()), ("classify", last)])
        alone = pipeline.fit(BOTH, y, sample_domain=DOMAIN)
        search = GridSearchCV(pipeline, {"classify__domain_adversarial": [1.0]}, cv=folds)
        search.fit(BOTH, y, sample_domain=DOMAIN)
    expected = net_state(fitted(early_stopping=False))
    assert equal_states(net_state(alone[-1]), expected)
    assert equal_states(net_state(search.best_estimator_[-1]), expected)
    assert np.isfinite(search.best_score_)


def test_callbacks_score_the_labeled_images():
    callback = pytest.importorskip("sklearn.callback")
    monitor = callback.ScoringMonitor(scoring="accuracy")
    classifier = dann().set_callbacks(monitor)
    classifier.fit(BOTH, domain_labels("unknown"), sample_domain=DOMAIN)
    scores = {row["task_id_path"]: row["accuracy"] for row in monitor.get_logs().data}
    assert scores[(0,)] == classifier.score(X, Y)


# Resumed fits


@pytest.mark.slow_cases("parameters1")
@pytest.mark.parametrize("parameters", [{}, {"batch_norm": "adapt"}])
def test_resumed_fit_gives_the_same_result(tmp_path, parameters):
    settings = {"max_epochs": 4, "n_iter_no_change": 9, "unfreeze": (0, 1, 2), **parameters}
    expected = fitted(**settings)
    settings["checkpoint_dir"] = str(tmp_path)
    deaths = 0
    for _ in range(20):
        with contextlib.suppress(RuntimeError):
            classifier = fitted(**settings, callbacks=[PowerCut(1)])
            break
        deaths += 1
    assert deaths > 3
    assert equal_states(net_state(classifier), net_state(expected))
    assert [row["domain_loss"] for row in classifier.history_] == [
        row["domain_loss"] for row in expected.history_
    ]


def test_checkpoint_holds_the_adversary_and_depends_on_the_target(tmp_path):
    settings = {"max_epochs": 4, "checkpoint_dir": str(tmp_path)}
    with pytest.warns(UserWarning, match="interrupted in stage"):
        fitted(**settings, callbacks=[Interrupt()])
    (file,) = tmp_path.glob("*.pt")
    assert any("adversary" in name for name in torch.load(file, weights_only=True)["weights"])
    dann(**settings).fit(BOTH[:90], domain_labels("cat")[:90], sample_domain=DOMAIN[:90])
    fitted(**settings, domain_adversarial=0.5)
    assert len(list(tmp_path.glob("*.pt"))) == 3
    dann(**settings).fit(BOTH, domain_labels("unknown"), sample_domain=DOMAIN)
    assert len(list(tmp_path.glob("*.pt"))) == 3


# Errors


def test_adversary_without_a_target_is_rejected():
    message = (
        "Got domain_adversarial=1, but no images of a target domain; pass sample_domain to "
        "fit, positive for labeled images of the source and negative for unlabeled images of the "
        "target, or set domain_adversarial=0"
    )
    for domain in (None, np.ones(60)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            dann().fit(X, Y, sample_domain=domain)


def test_adversary_without_trained_blocks_is_rejected():
    message = (
        "Got domain_adversarial=1 and unfreeze=(0,), but it only affects trained blocks, and no "
        "stage trains any; train blocks, as with unfreeze=(0, 2), or set domain_adversarial=0"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fitted(unfreeze=(0,))


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ([1, 0, -1], "Got 0 in sample_domain, but expected whole numbers: above 0 for the source"),
        ([1, 1.5, -1], "Got 1.5 in sample_domain, but expected whole numbers"),
        (["a", "a", "b"], "Got 'a' in sample_domain, but expected whole numbers"),
        ([-1, -1, -2], "Got no image of the source in sample_domain, but expected whole numbe"),
        ([1, 1], "inconsistent numbers of samples: [3, 2]"),
    ],
)
def test_invalid_sample_domain_is_rejected(domain, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_labels(range(3), ["a", "b", "a"], sample_domain=domain)


def test_negative_domain_adversarial_is_rejected():
    with pytest.raises(
        ValueError, match="Got domain_adversarial=-1, but expected a number from 0 to 100"
    ):
        fitted(domain_adversarial=-1)
