"""The recommended strategy follows from measurements of the images."""

import numpy as np
import pytest
from edge_helpers import Unread
from helpers import BROKEN_ROWS, SIZE, CountingTiny, Tiny, counted, images, paths_with_broken
from sklearn.base import clone
from sklearn.datasets import load_digits, load_sample_images
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils.validation import check_is_fitted

from sktransfer import (
    FineTunedImageClassifier,
    ImageError,
    PretrainedFeatureExtractor,
    rank_backbones,
    recommend_strategy,
)
from sktransfer.diagnostics import strategy
from sktransfer.diagnostics.strategy import decide, make_estimator
from sktransfer.finetuning import decision

X, y = load_digits(n_class=3, return_X_y=True)
X, y = X[:60], np.array(["zero", "one", "two"])[y[:60]]
SCANS = {"image_shape": (8, 8), "image_size": (64, 64)}
TINY = PretrainedFeatureExtractor(Tiny, image_size="auto")
AT_64 = PretrainedFeatureExtractor(image_size=(64, 64))


def cuts(count):
    """Crop squares from a temple and a flower; the first 15 are all different."""
    sources = load_sample_images().images
    crops = []
    for number in range(count):
        top, left = (140 * position for position in divmod(number // 2, 4))
        crops.append(sources[number % 2][top : top + 140, left : left + 140])
    return np.stack(crops), np.array(["temple", "flower"])[np.arange(count) % 2]


@pytest.fixture(scope="module")
def far():
    return recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(**SCANS))


@pytest.fixture(scope="module")
def near():
    return recommend_strategy(*cuts(8), extractor=AT_64)


def test_recommend_strategy_tunes_all_blocks_for_scans(far):
    assert far.case == "Many images, different from the pretraining images"
    assert (far.strategy, far.different, far.many) == ("full", True, True)
    assert far.estimator_.get_params() | SCANS | {"random_state": 0} == far.estimator_.get_params()
    assert far.estimator_.unfreeze == (0, "all")
    assert far.estimator_.augment == "light"
    assert far.probe_results.gray == 1
    assert far.probe_results.side == (8, 8, 8)


def test_recommend_strategy_freezes_the_network_for_few_photographs(near):
    assert near.case == "Few images, similar to the pretraining images"
    assert near.strategy == "frozen"
    assert not near.different
    assert not near.many
    assert near.counts == {"flower": 4, "temple": 4}
    assert near.probe_results.gray < 0.5


@pytest.mark.parametrize(
    ("images_per_class", "cosine", "pretrained", "expected"),
    [
        (4.9, 0.44, True, (False, False, "frozen")),
        (5, 0.44, True, (True, False, "staged")),
        (4.9, 0.45, True, (False, True, "full")),
        (5, 0.45, True, (True, True, "full")),
        (4.9, 0.44, False, (False, False, "scratch")),
        (5, 0.45, False, (True, True, "scratch")),
    ],
)
def test_decide_maps_image_count_and_cosine_to_a_strategy(
    images_per_class, cosine, pretrained, expected
):
    assert decide(images_per_class, cosine, pretrained) == expected


def test_ranking_and_strategy_report_the_same_accuracy(far):
    (row,) = rank_backbones(X, y, [PretrainedFeatureExtractor(**SCANS)]).rows
    assert row.accuracy == far.probe_results.accuracy
    assert row.spread == far.probe_results.spread


@pytest.mark.parametrize("n_images", [8, 14])
def test_recommended_estimator_has_the_values_that_the_default_decides(n_images):
    X, y = cuts(n_images)
    report = recommend_strategy(X, y, extractor=AT_64, random_state=3)
    default = FineTunedImageClassifier(image_size=(64, 64), random_state=3, cache=None).fit(X, y)
    decided = default.decision_.parameters
    assert default.decision_.strategy == report.strategy
    assert set(decided) == {"unfreeze", "augment", "max_epochs", "lr"}
    assert {name: getattr(report.estimator_, name) for name in decided} == decided
    recommended = clone(report.estimator_).set_params(cache=None).fit(X, y)
    np.testing.assert_array_equal(recommended.predict_proba(X), default.predict_proba(X))


def test_recommend_strategy_rejects_other_extractors():
    with pytest.raises(TypeError, match="Got extractor='resnet18', but expected a Pretrained"):
        recommend_strategy(X, y, extractor="resnet18")


def test_probe_results_equal_cross_val_score(far):
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


def test_recommend_strategy_embeds_each_image_once(log, monkeypatch):
    monkeypatch.setattr(strategy, "estimate_cost", lambda *_: None)  # it embeds some images
    X, y = images(40), np.arange(40) % 4
    backbone = CountingTiny(log)
    recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(backbone))
    assert counted(log) == 40
    PretrainedFeatureExtractor(backbone).fit_transform(X)
    assert counted(log) == 40, "a later fit embeds the images again"


def test_recommend_strategy_measures_a_sample_of_many_images(log, monkeypatch):
    monkeypatch.setattr(decision, "MAX_MEASURED", 40)
    X, y = images(200), np.repeat([0, 1, 2], [150, 45, 5])
    monkeypatch.setattr(strategy, "estimate_cost", lambda *_: None)
    report = recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(CountingTiny(log)))
    assert counted(log) == report.probe_results.n_images == 30 + 10 + 5
    assert "Measured on 45 of the images." in report.reasons
    assert report.counts == {"0": 150, "1": 45, "2": 5}
    assert np.bincount(y[report.rows]).tolist() == [30, 10, 5]


@pytest.mark.slow
def test_recommend_strategy_keeps_groups_together(monkeypatch):
    """The images of a group share a color, which helps only if folds divide groups."""
    random = np.random.RandomState(0)
    groups = np.arange(120) // 5
    y = np.arange(24)[groups] % 2
    X = (
        random.randint(100, 110, (120, SIZE, SIZE, 3))
        + 10 * random.randint(-9, 9, (24, 1, 1, 3))[groups]
    )
    X = X.astype(np.uint8)
    report = recommend_strategy(X, y, extractor=TINY, groups=groups)
    ungrouped = recommend_strategy(X, y, extractor=TINY)
    assert ungrouped.probe_results.neighbor > report.probe_results.neighbor + 0.2
    names = np.array([f"patient {group}" for group in groups])
    named = recommend_strategy(X, y, extractor=TINY, groups=names)
    assert named.probe_results.n_images == 120


def test_recommend_strategy_is_reproducible_for_a_seed(far):
    state = np.random.get_state()[1].copy()
    repeated = recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(**SCANS))
    assert repeated.probe_results == far.probe_results
    assert repeated.reasons == far.reasons
    noise = {"X": images(30), "y": np.arange(30) % 2, "extractor": TINY}
    first, same, different = (recommend_strategy(**noise, random_state=seed) for seed in (0, 0, 1))
    assert first.probe_results == same.probe_results != different.probe_results
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("name", strategy.STRATEGIES)
def test_make_estimator_returns_an_estimator_that_fits_and_predicts(name):
    X, y = cuts(14)
    extractor = PretrainedFeatureExtractor(
        image_size=32, weights=None if name == "scratch" else "default"
    )
    estimator = make_estimator(name, extractor, augment="light", random_state=0)
    assert (estimator.augment, estimator.image_size) == ("light", 32)
    estimator.set_params(max_epochs=1, n_views=1)
    assert set(estimator.fit(X, y).predict(X)) <= {"temple", "flower"}
    stages = {"frozen": ["head"], "staged": ["head", "last 4 blocks"], "full": ["head", "all"]}
    assert [stage["stage"] for stage in estimator.stages_] == stages.get(name, ["all"])
    assert estimator.weights == extractor.weights


def test_recommended_estimator_is_unfitted_and_ready_to_fit(near):
    with pytest.raises(NotFittedError):
        check_is_fitted(near.estimator_)
    X, y = cuts(8)
    assert near.estimator_.unfreeze == (0,)
    assert clone(near.estimator_).fit(X, y).score(X, y) == 1
    assert near.cost.images_embedded == 8 * 2  # the images, and a view of each
    assert near.cost.images_trained == 0


def test_recommend_strategy_accepts_two_images_per_class():
    report = recommend_strategy(images(4), [0, 0, 1, 1], extractor=TINY)
    assert report.probe_results.curve == ((2, report.probe_results.accuracy),)
    warning = "Fewer than 5 images of '0', '1': scores of such classes are unreliable."
    assert warning in report.warnings


def test_recommend_strategy_trains_from_scratch_without_weights():
    X, y = cuts(14)
    report = recommend_strategy(
        X, y, extractor=PretrainedFeatureExtractor(weights=None, image_size=32)
    )
    assert report.strategy == "scratch"
    assert report.case == "Many images, no pretrained weights"
    assert not any("cosine" in reason for reason in report.reasons)
    assert report.estimator_.weights is None
    assert report.estimator_.unfreeze == ("all",)
    assert "Got weights=None, so there are no pretrained weights to keep." in report.reasons


def test_recommend_strategy_warns_of_duplicates_and_their_labels():
    X, y = cuts(14)
    X = np.concatenate([X, X[[0, 1, 2]]])
    y = np.concatenate([y, [y[1], y[1], y[2]]])
    report = recommend_strategy(X, y, extractor=AT_64)
    assert (
        "Duplicates with different labels: 1 pair. One label of each pair is wrong; see "
        "report.leaks." in (report.warnings)
    )
    assert any(
        "are too high; pass groups=report.leaks.groups" in warning for warning in report.warnings
    )
    groups = report.leaks.groups
    grouped = recommend_strategy(X, y, extractor=AT_64, groups=groups)
    assert not any("too high" in warning for warning in grouped.warnings)
    assert "Duplicates: 3 pairs. See report.leaks." in grouped.warnings


def test_strategy_report_repr_lists_reasons_and_warnings(far):
    lines = repr(far).splitlines()
    assert lines[0] == (
        "Many images, different from the pretraining images: fit the head, then tune all blocks"
    )
    assert f"- {far.reasons[0]}" in lines
    assert lines[lines.index("Warnings:") + 1] == f"- {far.warnings[0]}"
    assert "estimator_: FineTunedImageClassifier(" in repr(far)


def test_strategy_report_html_escapes_class_names():
    X, y = cuts(14)
    y = np.where(y == "temple", "<b onclick=alert()>", "a & b")
    page = recommend_strategy(X, y, extractor=AT_64)._repr_html_()
    assert page.count("<img src=") == 2
    assert "<b onclick" not in page
    assert "&lt;b onclick=alert()&gt;" in page
    assert "a &amp; b" in page


def test_recommend_strategy_rejects_invalid_input(monkeypatch):
    def fail(self, X):
        raise AssertionError("images were embedded before the labels were checked")

    monkeypatch.setattr(PretrainedFeatureExtractor, "transform", fail)
    X, y = images(9), np.arange(9) % 3
    for problem, changes in {
        "recommend_strategy requires y to be passed, but the target y is None": {"y": None},
        "Found input variables with inconsistent numbers of samples: [9, 3]": {"y": y[:3]},
        "Got 1 class in y, 0, but a classifier needs at least two classes": {"y": y * 0},
        "Got a single image of the class 1, but cross-validation needs at least two images "
        "of each class; leave the class out, or add images": {"y": [0] * 8 + [1]},
        "Found input variables with inconsistent numbers of samples: [9, 2]": {"groups": [0, 1]},
        "Got a single group of each of the classes 0, 1, 2, but cross-validation needs at least "
        "two groups of each class; leave the class out, or pass finer groups": {"groups": y},
        "Got engine='tensor', but expected one of 'auto', 'torch', 'openvino'": {
            "extractor": PretrainedFeatureExtractor(Tiny, engine="tensor")
        },
        "Got random_state=-1, but expected None, an int from 0 to "
        "9,223,372,036,854,775,807, or a numpy.random.RandomState": {"random_state": -1},
    }.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            recommend_strategy(**{"X": X, "y": y, "extractor": TINY, **changes})
        assert str(error.value) == problem


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan")])
def test_missing_labels_are_rejected(missing):
    with pytest.raises(ValueError, match=r"^Got 1 missing label in y, in row 58, but"):
        recommend_strategy(
            X, [*y[:-2], missing, y[-1]], extractor=PretrainedFeatureExtractor(**SCANS)
        )


@pytest.mark.parametrize(
    "options",
    [{"random_state": value} for value in (-1, 1.5, "0", True, 10**30, [0])]
    + [{"extractor": value} for value in (3, "resnet18", PretrainedFeatureExtractor)]
    + [{"extractor": PretrainedFeatureExtractor(Tiny, n_jobs=0)}],
)
def test_recommend_strategy_checks_its_parameters_before_an_image_is_read(options):
    options = {"extractor": PretrainedFeatureExtractor(Tiny), **options}
    with pytest.raises((ValueError, TypeError), match=r"^Got "):
        recommend_strategy(Unread(), np.arange(12) % 2, **options)


@pytest.mark.parametrize("on_error", ["raise", "nan"])
def test_recommend_strategy_names_all_broken_images(tmp_path, on_error):
    paths, labels = paths_with_broken(tmp_path)
    extractor = PretrainedFeatureExtractor(Tiny, on_error=on_error)
    with pytest.raises(ImageError) as caught:
        recommend_strategy(paths, labels, extractor=extractor)
    assert [error.row for error in caught.value.errors] == BROKEN_ROWS


def test_recommend_strategy_is_the_same_in_every_call_by_default():
    first, second = (
        recommend_strategy(X, y, extractor=PretrainedFeatureExtractor(Tiny, image_shape=(8, 8)))
        for _ in range(2)
    )
    assert first.probe_results == second.probe_results
    assert repr(first.estimator_) == repr(second.estimator_)
