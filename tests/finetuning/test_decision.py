"""The decision what a fit trains is a function of parameters, class counts and one cosine."""

import numpy as np
import pytest
import torch
from helpers import X_TARGET, X_TEST, Tiny, X, Y, seeded
from torch import nn

from sktransfer import FineTunedImageClassifier
from sktransfer.finetuning import decision as decision_module
from sktransfer.finetuning.decision import (
    FitDecision,
    count_last_blocks,
    decide_parameters,
    mean_interclass_cosine,
    needs_embeddings,
    sample_rows,
    with_decision,
)
from sktransfer.transforms.preprocessing import Preprocessing

BLOCKS = [("stem", nn.Linear(9, 9)), ("middle", nn.Linear(9, 9)), ("last", nn.Linear(9, 9))]


class Apart(Tiny):
    """Its embeddings of different colors point in different directions."""

    def __init__(self):
        super().__init__()
        self.eval()
        self[1] = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12, momentum=None)
        )
        seeded(self)
        self[1][1].reset_running_stats()
        nn.init.zeros_(self[1][1].bias)
        batch = torch.stack([self.preprocessing.prepare(image) for image in X])
        self[1].train()
        with torch.no_grad():
            self(self.preprocessing.normalize(batch))
        self.eval()


def classifier(backbone=Tiny, **parameters):
    return FineTunedImageClassifier(
        backbone, **{"random_state": 0, "cache": None, "n_views": 1, **parameters}
    )


def decided(per_class=20.0, cosine=0.2, classes=10, **parameters):
    counts = np.full(classes, int(per_class))
    counts[: round(classes * (per_class % 1))] += 1
    return decide_parameters(classifier(**parameters), BLOCKS, counts, cosine)


@pytest.mark.parametrize(
    ("per_class", "cosine", "weights", "strategy", "unfreeze", "augment"),
    [
        (4.9, 0.44, "default", "frozen", (0,), "standard"),
        (5, 0.44, "default", "staged", (0, 2), "standard"),
        (4.9, 0.45, "default", "full", (0, "all"), "light"),
        (5, 0.45, "default", "full", (0, "all"), "light"),
        (4.9, 0.44, None, "scratch", ("all",), "standard"),
        (5, 0.45, None, "scratch", ("all",), "light"),
    ],
)
def test_strategy_follows_from_images_per_class_and_cosine(
    per_class, cosine, weights, strategy, unfreeze, augment
):
    decision = decided(per_class, cosine, weights=weights)
    assert decision.strategy == strategy
    assert decision.parameters["unfreeze"] == unfreeze
    assert decision.parameters["augment"] == augment
    assert decision.images_per_class == pytest.approx(per_class)
    assert decision.mean_interclass_cosine == cosine


@pytest.mark.parametrize(
    ("unfreeze", "n_images", "lr", "max_epochs"),
    [
        ((0, "all"), 20, 3e-3, 10),
        ((0, "all"), 2000, 3e-3, 10),
        ("all", 20, 3e-3, 10),
        (["all"], 200, 3e-3, 10),
        ((0, 1, "all"), 200, 3e-3, 10),
        ((0, 3), 20, 3e-3, 10),  # there are three blocks
        ((0, 2), 200, 3e-3, 6),
        ((0, 2), 199, 1e-3, 12),
        (2, 199, 1e-3, 12),
        ((0, ["last"]), 200, 3e-3, 6),
        ("last", 199, 1e-3, 12),
        ((0,), 199, 1e-3, 12),
    ],
)
def test_training_follows_from_the_stages_and_the_number_of_images(
    unfreeze, n_images, lr, max_epochs
):
    counts = np.array([n_images - n_images // 3, n_images // 3])
    decision = decide_parameters(classifier(unfreeze=unfreeze), BLOCKS, counts, 0.2)
    assert decision.parameters == {"augment": "standard", "lr": lr, "max_epochs": max_epochs}
    assert decision.strategy is None


def test_given_parameters_are_not_decided():
    given = {"unfreeze": (0, 1), "augment": "industrial", "max_epochs": 3, "lr": 0.5}
    for name in given:
        rest = {key: value for key, value in given.items() if key != name}
        assert set(decided(**rest).parameters) == {name}
        assert name not in decided(**{name: given[name]}).parameters
    assert decided(**given).parameters == {}


def test_adversary_gets_blocks_to_train():
    assert decided(2, 0.2).strategy == "frozen"
    decision = decided(2, 0.2, domain_adversarial=1.0)
    assert (decision.strategy, decision.parameters["unfreeze"]) == ("staged", (0, 2))


@pytest.mark.parametrize(
    ("parameters", "needed"),
    [
        ({}, True),
        ({"unfreeze": 0}, True),  # to choose the augmentation
        ({"augment": None}, True),  # to choose the blocks
        ({"augment": None, "weights": None}, False),
        ({"weights": None}, True),
        ({"augment": "light", "unfreeze": (0, 1)}, False),
        ({"lr": 0.1, "max_epochs": 2}, True),
    ],
)
def test_embeddings_are_needed_only_for_blocks_and_augmentation(parameters, needed):
    assert needs_embeddings(classifier(**parameters)) == needed


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1, 1, 1, 1], 2), ([8, 1, 1], 3), ([1, 1, 8], 1), ([4, 1, 3], 2), ([5, 2, 2], 3), ([3], 1)],
)
def test_last_blocks_have_half_of_the_parameters(sizes, expected):
    blocks = [(str(row), nn.Linear(size, 1, bias=False)) for row, size in enumerate(sizes)]
    assert count_last_blocks(blocks) == expected


def test_last_block_is_tuned_in_a_network_without_parameters():
    assert count_last_blocks([("a", nn.ReLU()), ("b", nn.ReLU())]) == 1


def test_cosine_weighs_pairs_of_classes_equally():
    rng = np.random.default_rng(0)
    embeddings, codes = rng.normal(size=(40, 6)) + 1, rng.permutation(np.arange(40) % 3)
    codes[codes == 2] = np.where(np.arange((codes == 2).sum()) > 2, 0, 2)  # few of one class
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    pairs = [
        np.mean([a @ b for a in unit[codes == first] for b in unit[codes == second]])
        for first, second in ((0, 1), (0, 2), (1, 2))
    ]
    assert mean_interclass_cosine(embeddings, codes) == pytest.approx(np.mean(pairs))


def test_cosine_ignores_embedding_lengths_and_zero_embeddings():
    embeddings, codes = np.eye(3)[[0, 1, 2, 0]] + 0.5, np.array([0, 1, 1, 0])
    longer = embeddings * np.array([[1], [5], [0.1], [3]])
    assert mean_interclass_cosine(longer, codes) == pytest.approx(
        mean_interclass_cosine(embeddings, codes)
    )
    assert mean_interclass_cosine(np.zeros((4, 3)), codes) == 0


def test_sample_has_equal_shares_and_some_images_of_each_class(monkeypatch):
    monkeypatch.setattr(decision_module, "MAX_MEASURED", 100)
    codes = np.repeat([0, 1, 2], [300, 88, 12])
    rows = sample_rows(codes, 0)
    assert np.bincount(codes[rows]).tolist() == [75, 22, 10]
    assert (np.diff(rows) > 0).all()
    assert (rows == sample_rows(codes, 0)).all()
    assert (sample_rows(codes[::4], 0) == np.arange(100)).all()


def test_decision_is_shown_with_its_reason():
    assert str(decided(20, 0.214)) == (
        "unfreeze=(0, 2), augment='standard', max_epochs=6, lr=0.003 (20 images per class, cosine "
        "between classes 0.21). The network's features suit these images, so only its last blocks "
        "are tuned."
    )
    only_lr = classifier(unfreeze=(0, 1), augment=None, max_epochs=2)
    decision = decide_parameters(only_lr, BLOCKS, np.array([3, 4]), None)
    assert str(decision) == "lr=0.001 (3.5 images per class)."


def test_decided_copy_leaves_the_estimator_unchanged():
    estimator = classifier()
    copy = with_decision(estimator, decided(20, 0.9))
    assert (copy.unfreeze, copy.augment, copy.max_epochs) == ((0, "all"), "light", 10)
    assert {getattr(estimator, name) for name in decision_module.DECIDED} == {"auto"}


# Fits

CASES = [
    pytest.param(Apart, 60, {}, "staged", id="staged"),
    pytest.param(Apart, 12, {}, "frozen", id="frozen"),
    pytest.param(Tiny, 30, {"max_epochs": 3}, "full", id="full"),
    pytest.param(Apart, 60, {"unfreeze": (0, 1)}, None, id="given blocks"),
    pytest.param(Apart, 60, {"early_stopping": True}, "staged", id="validation"),
    pytest.param(
        *(Apart, 60, {"random_state": None}, "staged"),
        id="no seed",
        # Some seeds have a training whose loss warrants a warning.
        marks=pytest.mark.filterwarnings("ignore:The training loss of the stage"),
    ),
]


@pytest.mark.slow_cases("no seed", "given blocks", "staged")
@pytest.mark.parametrize(("backbone", "n", "parameters", "strategy"), CASES)
def test_fit_with_the_decided_values_gives_the_same_result(
    tmp_path, backbone, n, parameters, strategy
):
    settings = {"checkpoint_dir": str(tmp_path), **parameters}
    seed = settings.pop("random_state", 0)
    default = classifier(backbone, random_state=seed, **settings).fit(X[:n], Y[:n])
    decision = default.decision_
    assert decision.strategy == strategy
    assert set(decision.parameters) == {*decision_module.DECIDED} - {*parameters}
    if seed is not None:
        settings.pop("checkpoint_dir")  # otherwise the fit takes the result of the first
    explicit = classifier(backbone, random_state=seed, **settings, **decision.parameters)
    explicit.fit(X[:n], Y[:n])
    np.testing.assert_array_equal(explicit.predict_proba(X_TEST), default.predict_proba(X_TEST))
    assert explicit.decision_.parameters == {}
    assert explicit.averaging_ == default.averaging_
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert default.get_params()["unfreeze"] == parameters.get("unfreeze", "auto")


def test_decision_does_not_read_validation_or_target_images():
    alone = classifier(Apart).fit(X, Y).decision_
    assert alone.strategy == "staged"
    same_colors = np.full_like(X, 100) + np.arange(60)[:, None, None, None].astype(np.uint8)
    both = np.concatenate([X, X_TARGET])
    validated = classifier(Apart).fit(X, Y, X_val=same_colors, y_val=Y).decision_
    domains = np.repeat([1, -2], [60, 40])
    adapted = classifier(Apart, domain_adversarial=1.0, max_epochs=1)
    adapted.fit(both, np.concatenate([Y, ["cat"] * 40]), sample_domain=domains)
    assert validated == alone
    assert adapted.decision_.mean_interclass_cosine == alone.mean_interclass_cosine
    assert classifier(Apart).fit(same_colors, Y).decision_.strategy == "full"


def test_decision_does_not_depend_on_copies_the_order_or_the_seed():
    alone = classifier(Apart).fit(X, Y).decision_
    rows = np.random.RandomState(0).permutation(np.r_[np.arange(60), np.arange(9)])
    assert classifier(Apart, random_state=7).fit(X[rows], Y[rows]).decision_ == alone


class Small(Apart):
    preprocessing = Preprocessing(resize=8, crop=(8, 8))


def test_two_classes_and_a_class_with_one_image_are_decided():
    two = Y != "owl"
    assert classifier(Apart).fit(X[two], Y[two]).decision_.images_per_class == 20
    rows = np.r_[np.flatnonzero(two), np.flatnonzero(~two)[:1]]
    fitted = classifier(Small).fit(X[rows], Y[rows])
    assert fitted.decision_.images_per_class == pytest.approx(41 / 3)
    assert fitted.decision_.class_counts == (20, 20, 1)
    assert fitted.classes_.tolist() == ["cat", "dog", "owl"]
    assert fitted.score(X[two], Y[two]) > 0.9


def test_fit_that_decides_nothing_says_so():
    decision = FitDecision({}, None, 27.75, None)
    assert str(decision) == "Nothing was decided: all values were given (27.8 images per class)."
