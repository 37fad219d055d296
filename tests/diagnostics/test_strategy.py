"""What a set of images is told to be follows from what was measured, and so does what to do."""

import dataclasses

import numpy as np
import pytest
from helpers import SIZE, CountingTiny, Tiny, counted, images
from sklearn.base import clone
from sklearn.datasets import load_digits, load_sample_images
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils.validation import check_is_fitted

from sktransfer import (
    PretrainedFeatureExtractor,
    rank_backbones,
    recommend_strategy,
)
from sktransfer.diagnostics import strategy
from sktransfer.diagnostics.data_warnings import find_data_warnings
from sktransfer.diagnostics.probes import ProbeResults, mean_interclass_cosine
from sktransfer.diagnostics.ranking import make_folds
from sktransfer.diagnostics.strategy import decide, make_estimator

X, y = load_digits(n_class=3, return_X_y=True)
X, y = X[:60], np.array(["zero", "one", "two"])[y[:60]]
SCANS = {"image_shape": (8, 8), "image_size": (64, 64)}
TINY = PretrainedFeatureExtractor(Tiny, image_size="auto")
AT_64 = PretrainedFeatureExtractor(image_size=(64, 64))


def cuts(count):
    """Cut squares out of a temple and a flower, in color; the first 15 are all different."""
    sources = load_sample_images().images
    found = []
    for number in range(count):
        top, left = (140 * each for each in divmod(number // 2, 4))
        found.append(sources[number % 2][top : top + 140, left : left + 140])
    return np.stack(found), np.array(["temple", "flower"])[np.arange(count) % 2]


@pytest.fixture(scope="module")
def far():
    return recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(**SCANS))


@pytest.fixture(scope="module")
def near():
    return recommend_strategy(*cuts(14), extractor=AT_64)


def test_scans_are_different_and_all_blocks_are_tuned(far):
    assert far.case == "Many images, different from the pretraining images"
    assert (far.strategy, far.different, far.many) == ("full", True, True)
    assert far.estimator_.get_params() | SCANS | {"random_state": 0} == far.estimator_.get_params()
    assert far.estimator_.unfreeze == (0, "all")
    assert far.estimator_.augment == "light"
    assert far.probe_results.gray == 1
    assert far.probe_results.side == (8, 8, 8)


def test_photographs_are_similar(near):
    assert near.case == "Few images, similar to the pretraining images"
    assert near.strategy == "frozen"
    assert not near.different
    assert not near.many
    assert near.counts == {"flower": 7, "temple": 7}
    assert near.probe_results.gray < 0.5


@pytest.mark.parametrize(
    ("images_per_class", "cosine", "pretrained", "expected"),
    [
        (9.9, 0.44, True, (False, False, "frozen")),
        (10, 0.44, True, (True, False, "staged")),
        (9.9, 0.45, True, (False, True, "full")),
        (10, 0.45, True, (True, True, "full")),
        (9.9, 0.44, False, (False, False, "scratch")),
        (10, 0.45, False, (True, True, "scratch")),
    ],
)
def test_decide(images_per_class, cosine, pretrained, expected):
    assert decide(images_per_class, cosine, pretrained) == expected


def test_ranking_and_strategy_report_the_same_accuracy(far):
    (row,) = rank_backbones(X, y, [PretrainedFeatureExtractor(**SCANS)]).rows
    assert row.accuracy == far.probe_results.accuracy
    assert row.spread == far.probe_results.spread


def test_frozen_estimator_is_the_measured_probe(near):
    X, y = cuts(14)
    folds = make_folds(np.unique(y, return_inverse=True)[1], random_state=0)
    scores = cross_val_score(near.estimator_, X, y, cv=folds)
    assert scores.mean() == pytest.approx(near.probe_results.accuracy)


def test_recommend_strategy_rejects_other_extractors():
    with pytest.raises(TypeError, match="Got extractor='resnet18', but expected a Pretrained"):
        recommend_strategy(X, y, extractor="resnet18")


def test_the_probe_results_is_scikit_learns(far):
    embeddings = PretrainedFeatureExtractor(image_shape=(8, 8), image_size=(64, 64)).fit_transform(
        X
    )
    probe = make_pipeline(Normalizer(), LogisticRegression(C=30.0, max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_score(probe, embeddings, y, cv=folds)
    assert far.probe_results.accuracy == pytest.approx(scores.mean())
    assert far.probe_results.spread == pytest.approx(scores.std(ddof=1))
    assert far.probe_results.curve[-1] == (48, pytest.approx(scores.mean()))
    assert [count for count, _ in far.probe_results.curve] == [12, 24, 48]
    assert far.probe_results.pixels > 0.9
    assert 0.4 < far.probe_results.neighbor <= 1


def test_crowding_weighs_classes_alike():
    rng = np.random.default_rng(0)
    ones, others = rng.normal(size=(50, 8)) + 3, rng.normal(size=(4, 8)) - 3
    embeddings, codes = np.concatenate([ones, others]), np.repeat([0, 1], [50, 4])
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert mean_interclass_cosine(embeddings, codes) == pytest.approx(
        (unit[:50] @ unit[50:].T).mean()
    )
    assert mean_interclass_cosine(np.zeros((2, 3)), np.array([0, 1])) == 0


def test_each_image_goes_through_the_network_once(log, monkeypatch):
    monkeypatch.setattr(strategy, "estimate_cost", lambda *_: None)  # takes the time of a few
    X, y = images(40), np.arange(40) % 4
    backbone = CountingTiny(log)
    recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(backbone))
    assert counted(log) == 40
    PretrainedFeatureExtractor(backbone).fit_transform(X)
    assert counted(log) == 40, "what is fitted later embeds the images again"


def test_many_images_are_measured_on_a_share(log, monkeypatch):
    monkeypatch.setattr(strategy, "_MAX_MEASURED", 40)
    X, y = images(200), np.repeat([0, 1, 2], [150, 45, 5])
    monkeypatch.setattr(strategy, "estimate_cost", lambda *_: None)
    report = recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(CountingTiny(log)))
    assert counted(log) == report.probe_results.n_images == 30 + 10 + 5
    assert "Measured on 45 of the images." in report.reasons
    assert report.counts == {"0": 150, "1": 45, "2": 5}
    assert np.bincount(y[report.rows]).tolist() == [30, 10, 5]


def test_copies_of_a_share_are_counted_by_find_leaks(near):
    leaks = dataclasses.replace(
        near.leaks,
        kinds=np.array(["copy", "alike"]),
        across=np.array([True, True]),
        conflicts=np.array([False, False]),
    )
    for count, groups in {50: "report.leaks", 49: "find_leaks(X)"}.items():
        probe_results = dataclasses.replace(RESULTS, n_images=count)
        (warning,) = find_data_warnings({"a": 30, "b": 20}, probe_results, leaks, 224)
        assert warning == (
            "Duplicates on both sides of a fold: 1 pair. The accuracies here are too high; pass "
            f"groups={groups}.groups."
        )


def test_groups_are_respected(monkeypatch):
    """Images of a group carry its color: only folds that divide groups find it of use."""
    random = np.random.RandomState(0)
    groups = np.arange(60) // 5
    y = np.arange(12)[groups] % 2
    X = (
        random.randint(100, 110, (60, SIZE, SIZE, 3))
        + 10 * random.randint(-9, 9, (12, 1, 1, 3))[groups]
    )
    X = X.astype(np.uint8)
    report = recommend_strategy(X, y, extractor=TINY, groups=groups)
    without = recommend_strategy(X, y, extractor=TINY)
    assert without.probe_results.neighbor > report.probe_results.neighbor + 0.2
    names = np.array([f"patient {group}" for group in groups])
    again = recommend_strategy(X, y, extractor=TINY, groups=names)
    assert again.probe_results.n_images == 60


def test_the_same_seed_gives_the_same_report(far):
    state = np.random.get_state()[1].copy()
    again = recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(**SCANS))
    assert again.probe_results == far.probe_results
    assert again.reasons == far.reasons
    noise = {"X": images(30), "y": np.arange(30) % 2, "extractor": TINY}
    one, same, other = (recommend_strategy(**noise, random_state=seed) for seed in (0, 0, 1))
    assert one.probe_results == same.probe_results != other.probe_results
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("name", strategy.STRATEGIES)
def test_every_estimator_fits_and_predicts(name):
    X, y = cuts(14)
    estimator = make_estimator(
        name, PretrainedFeatureExtractor(image_size=32), different=True, random_state=0
    )
    if name == "frozen":
        assert estimator.fit(X, y).score(X, y) == 1
        return
    estimator.set_params(max_epochs=1, n_views=1)
    assert set(estimator.fit(X, y).predict(X)) <= {"temple", "flower"}
    stages = {"staged": ["head", "last 2 blocks"], "full": ["head", "all"], "scratch": ["all"]}
    assert [stage["stage"] for stage in estimator.stages_] == stages[name]
    assert estimator.weights == (None if name == "scratch" else "default")


def test_the_recommended_estimator_is_ready_to_fit(near):
    with pytest.raises(NotFittedError):
        check_is_fitted(near.estimator_)
    X, y = cuts(14)
    assert [name for name, _ in near.estimator_.steps] == [
        "pretrainedfeatureextractor",
        "normalizer",
        "logisticregression",
    ]
    assert clone(near.estimator_).fit(X, y).score(X, y) == 1
    assert near.cost.images_embedded == 14
    assert near.cost.images_trained == 0


def test_two_images_of_a_class_are_enough():
    report = recommend_strategy(images(4), [0, 0, 1, 1], extractor=TINY)
    assert report.probe_results.curve == ((2, report.probe_results.accuracy),)
    warning = "Fewer than 5 images of '0', '1': scores of such classes are unreliable."
    assert warning in report.warnings


def test_without_weights_it_is_from_scratch():
    X, y = cuts(14)
    report = recommend_strategy(
        X, y, extractor=PretrainedFeatureExtractor(weights=None, image_size=32)
    )
    assert report.strategy == "scratch"
    assert report.case == "Few images, no pretrained weights"
    assert not any("cosine" in reason for reason in report.reasons)
    assert report.estimator_.weights is None
    assert report.estimator_.unfreeze == "all"
    assert "Got weights=None, so there are no pretrained weights to keep." in report.reasons


def test_copies_and_their_labels_are_minded():
    X, y = cuts(14)
    X = np.concatenate([X, X[[0, 1, 2]]])
    y = np.concatenate([y, [y[1], y[1], y[2]]])
    report = recommend_strategy(X, y, extractor=AT_64)
    assert (
        "Duplicates with different labels: 1 pair. One label of each pair is wrong; see "
        "report.leaks." in (report.warnings)
    )
    assert any("are too high; pass groups=report.leaks.groups" in each for each in report.warnings)
    groups = report.leaks.groups
    mended = recommend_strategy(X, y, extractor=AT_64, groups=groups)
    assert not any("too high" in each for each in mended.warnings)
    assert "Duplicates: 3 pairs. See report.leaks." in mended.warnings


RESULTS = ProbeResults(
    n_images=50,
    accuracy=0.9,
    spread=0.1,
    neighbor=0.8,
    pixels=0.5,
    curve=((20, 0.7), (40, 0.9)),
    mean_interclass_cosine=0.2,
    side=(100, 200, 300),
    gray=0.0,
    contrast=50.0,
)


@pytest.mark.parametrize(
    ("counts", "change", "expected"),
    [
        (
            {"a": 50, "b": 10},
            {},
            "The largest class, 'a', has 50 images, and the smallest, 'b', has 10. Score with "
            "balanced accuracy, and try class_weight='balanced'.",
        ),
        (
            {"a": 4, "b": 5, "c": 3},
            {},
            "Fewer than 5 images of 'a', 'c': scores of such classes are unreliable.",
        ),
        (
            {"a": 5, "b": 5},
            {"side": (8, 56, 79)},
            "Half of the images have a shorter side of at most 56 pixels, but the network's input "
            "has 224. A smaller image_size is faster, and may be as accurate.",
        ),
        (
            {"a": 5, "b": 5},
            {"side": (30, 200, 300)},
            "The shorter sides range from 30 to 300 pixels: small images are enlarged and look "
            "blurred. Check that image size does not correlate with the class.",
        ),
        (
            {"a": 5, "b": 5},
            {"contrast": 4.9},
            "Half of the images have nearly one color. Check pixel_range.",
        ),
        (
            {"a": 9, "b": 6},
            {"accuracy": 0.6, "pixels": 0.4},
            "No classifier is better than always guessing the largest class, which is right 60% of "
            "the time. Check the labels.",
        ),
    ],
)
def test_what_is_minded(near, counts, change, expected):
    leaks = near.leaks
    probe_results = dataclasses.replace(RESULTS, **change)
    assert find_data_warnings(counts, probe_results, leaks, 224) == (expected,)


def test_nothing_is_minded_where_all_is_well(near):
    assert find_data_warnings({"a": 50, "b": 11}, RESULTS, near.leaks, 224) == ()


def test_it_shows_as_text(far):
    lines = repr(far).splitlines()
    assert lines[0] == (
        "Many images, different from the pretraining images: fit the head, then tune all blocks"
    )
    assert f"- {far.reasons[0]}" in lines
    assert lines[lines.index("Warnings:") + 1] == f"- {far.warnings[0]}"
    assert "estimator_: FineTunedImageClassifier(" in repr(far)


def test_it_shows_as_a_page_that_names_cannot_break():
    X, y = cuts(14)
    y = np.where(y == "temple", "<b onclick=alert()>", "a & b")
    page = recommend_strategy(X, y, extractor=AT_64)._repr_html_()
    assert page.count("<img src=") == 2
    assert "<b onclick" not in page
    assert "&lt;b onclick=alert()&gt;" in page
    assert "a &amp; b" in page


def test_what_cannot_be(monkeypatch):
    def never(self, X):
        raise AssertionError("images were embedded before the labels were looked at")

    monkeypatch.setattr(PretrainedFeatureExtractor, "transform", never)
    X, y = images(9), np.arange(9) % 3
    for problem, changes in {
        "recommend_strategy requires y to be passed, but the target y is None": {"y": None},
        "Found input variables with inconsistent numbers of samples: [9, 3]": {"y": y[:3]},
        "Got 1 class in y, 0, but a classifier needs at least two classes": {"y": y * 0},
        "Got a class with a single image, but cross-validation needs at least two images "
        "of each class; leave the class out, or add images": {"y": [0] * 8 + [1]},
        "Found input variables with inconsistent numbers of samples: [9, 2]": {"groups": [0, 1]},
        "Got a class in a single group, but cross-validation needs at least two groups of each "
        "class; leave the class out, or pass finer groups": {"groups": y},
        "Got engine='tensor', but expected one of 'auto', 'torch', 'openvino'": {
            "extractor": PretrainedFeatureExtractor(Tiny, engine="tensor")
        },
        "Got random_state=-1, but expected None, an int that is not negative, or a "
        "numpy.random.RandomState": {"random_state": -1},
    }.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            recommend_strategy(**{"X": X, "y": y, "extractor": TINY, **changes})
        assert str(error.value) == problem
