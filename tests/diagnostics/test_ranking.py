"""Backbones are ranked by the accuracy of a linear classifier on their embeddings."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sklearn
from edge_helpers import Unread
from helpers import BROKEN_ROWS, Tiny, paths_with_broken
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from sktransfer import (
    ImageError,
    PretrainedFeatureExtractor,
    rank_backbones,
    recommend_strategy,
)
from sktransfer.diagnostics.ranking import make_folds

X, y = load_digits(n_class=4, return_X_y=True)
X, y = X[:120], np.array(["zero", "one", "two", "three"])[y[:120]]
SMALL = {"image_shape": (8, 8)}
SCANS = PretrainedFeatureExtractor(**SMALL)


@pytest.fixture(scope="module")
def ranking():
    return rank_backbones(X, y, [Tiny, "efficientnet_lite0"], extractor=SCANS)


def test_rank_backbones_orders_by_accuracy(ranking):
    assert [row.name for row in ranking.rows] == ["efficientnet_lite0", "tiny"]
    assert ranking.rows[0].accuracy > ranking.rows[1].accuracy
    assert ranking.best_ is ranking.extractors[0]
    assert ranking.best_.backbone == "efficientnet_lite0"
    assert ranking.best_.transform(X[:2]).shape == (2, 1280)


def test_rank_backbones_accuracy_equals_cross_val_score(ranking):
    row = ranking.rows[0]
    embeddings = PretrainedFeatureExtractor(**SMALL).fit_transform(X)
    probe = make_pipeline(Normalizer(), LogisticRegression(C=30.0, max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_score(probe, embeddings, y, cv=folds)
    assert row.accuracy == pytest.approx(scores.mean())
    assert row.spread == pytest.approx(scores.std(ddof=1))
    assert row.features == 1280
    assert 13 < row.megabytes < 14  # 3.4 million weights, without the classifier
    assert 0 < row.seconds < 10


def test_rank_backbones_embeds_each_image_once_per_network(tmp_path):
    from helpers import CountingTiny, counted

    log = tmp_path / "log"
    extractor = PretrainedFeatureExtractor(lambda: CountingTiny(log), **SMALL)
    rank_backbones(X, y, [extractor], cv=3)
    embedded = counted(log)
    timed = 2 * 32
    assert embedded == len(X) + timed


def test_rank_backbones_keeps_the_settings_of_each_extractor():
    extractors = [
        PretrainedFeatureExtractor(layer=layer, **SMALL) for layer in ("block5", "block10")
    ]
    result = rank_backbones(X, y, extractors, cv=2)
    assert {row.features for row in result.rows} == {80, 112}
    assert not hasattr(extractors[0], "digest_"), "the caller's extractor was fitted"


@pytest.mark.parametrize("routing", [False, True])  # importing skada enables routing
def test_rank_backbones_uses_a_given_splitter_and_groups(ranking, routing):
    groups = np.arange(len(X)) // 6
    with sklearn.config_context(enable_metadata_routing=routing):
        grouped = rank_backbones(
            X, y, ["efficientnet_lite0"], cv=GroupKFold(4), groups=groups, extractor=SCANS
        )
    assert grouped.rows[0].accuracy != ranking.rows[0].accuracy
    assert np.isnan(grouped.agreement)


def test_rank_backbones_keeps_groups_together_without_a_splitter(ranking):
    groups = np.arange(len(X)) // 6
    default_row = rank_backbones(X, y, "efficientnet_lite0", groups=groups, extractor=SCANS).rows[0]
    splits = make_folds(np.unique(y, return_inverse=True)[1], groups)
    assert len(splits) == 5
    assert not any(set(groups[train]) & set(groups[test]) for train, test in splits)
    split_row = rank_backbones(X, y, "efficientnet_lite0", cv=splits, extractor=SCANS).rows[0]
    assert (default_row.accuracy, default_row.spread) == (split_row.accuracy, split_row.spread)


def test_make_folds_trains_on_every_class_in_every_fold():
    codes = np.array([0, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1])
    groups = np.array([2, 1, 2, 2, 0, 1, 2, 1, 0, 0, 2])
    for seed in range(100):
        for train, test in make_folds(codes, groups, seed):
            assert len(np.unique(codes[train])) == 2
            assert len(test)


def test_rank_backbones_spread_is_nan_for_a_single_split():
    split = [(np.arange(60), np.arange(60, 120))]
    result = rank_backbones(X, y, [Tiny], cv=split, extractor=SCANS)
    assert np.isnan(result.rows[0].spread)


def test_rank_backbones_row_names_include_the_parameters_that_differ():
    extractors = [
        PretrainedFeatureExtractor(Tiny, image_size=size, **SMALL) for size in (8, (8, 12))
    ]
    assert {row.name for row in rank_backbones(X, y, extractors, cv=2).rows} == {
        "tiny, 8",
        "tiny, 8 x 12",
    }


def test_ranking_repr_and_html_are_tables(ranking):
    lines = repr(ranking).splitlines()
    header = ["backbone", "pixels", "accuracy", "LogME", "features", "MB", "ms/image"]
    assert lines[0].split() == header
    assert lines[1].split()[1] == "224x224"
    assert lines[1].startswith("efficientnet_lite0")
    assert "rank correlation" in lines[-1]
    page = ranking._repr_html_()
    assert page.count("<tr>") == 3
    assert "rank correlation" in page


def test_ranking_plot_labels_each_backbone_and_reuses_axes(ranking):
    axes = ranking.plot()
    assert [text.get_text() for text in axes.texts] == ["efficientnet_lite0", "tiny"]
    assert ranking.plot(axes) is axes


def test_rank_backbones_defaults_to_all_local_backbones(monkeypatch):
    from sktransfer.diagnostics import ranking

    monkeypatch.setattr(ranking, "_local", lambda: ["efficientnet_lite0"])
    assert [row.name for row in rank_backbones(X, y, cv=2, extractor=SCANS).rows] == [
        "efficientnet_lite0"
    ]


def test_rank_backbones_rejects_invalid_input():
    with pytest.raises(ValueError, match="Got no backbones"):
        rank_backbones(X, y, [], extractor=SCANS)
    with pytest.raises(ValueError, match="Got a single image of the class 1, but"):
        rank_backbones(X[:9], [0] * 8 + [1], ["efficientnet_lite0"], extractor=SCANS)
    with pytest.raises(ValueError, match="at least two classes"):
        rank_backbones(X[:9], [0] * 9, ["efficientnet_lite0"], extractor=SCANS)
    with pytest.raises(ValueError, match="Got a single group of each of the classes 0, 1, but"):
        rank_backbones(X[:4], [0, 0, 1, 1], Tiny, groups=[0, 0, 1, 1], extractor=SCANS)
    broken = PretrainedFeatureExtractor(Tiny, on_error="nan")
    images = [*np.zeros((8, 9, 9), np.uint8), b"no image"]
    with pytest.raises(ImageError, match=r"^Image in row 8 \(bytes\)"):
        rank_backbones(images, [0, 1, 0, 1, 0, 1, 0, 1, 1], broken)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        rank_backbones(X[:9], [0, 1], ["efficientnet_lite0"], extractor=SCANS)


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan")])
def test_missing_labels_are_rejected(missing):
    labels = [*y[:-2], missing, y[-1]]
    with pytest.raises(ValueError, match=r"^Got 1 missing label in y, in row 118, but"):
        rank_backbones(X, labels, [Tiny], extractor=SCANS)


@pytest.mark.parametrize(
    ("backbones", "options"),
    [
        (3, {}),
        ("", {}),
        ([Tiny, None], {}),
        ([Tiny, 3], {}),
        ([Tiny, "resnet5o"], {}),
        ([Tiny, PretrainedFeatureExtractor(Tiny, n_jobs=0)], {}),
        ([Tiny, PretrainedFeatureExtractor(Tiny, layer="zz")], {}),
        ([Tiny], {"cv": 0}),
        ([Tiny], {"cv": 1}),
        ([Tiny], {"cv": "x"}),
        ([Tiny], {"cv": 10**6}),
        ([Tiny], {"cv": [([0], [99])]}),
        ([Tiny], {"random_state": -1}),
        ([Tiny], {"random_state": "0"}),
        ([Tiny], {"random_state": True}),
        ([Tiny], {"extractor": 3}),
        ([Tiny], {"extractor": PretrainedFeatureExtractor}),
    ],
)
def test_rank_backbones_checks_its_parameters_before_an_image_is_read(backbones, options):
    with pytest.raises((ValueError, TypeError), match=r"^Got "):
        rank_backbones(Unread(), np.arange(12) % 2, backbones, **options)


def test_rank_backbones_names_all_broken_images(tmp_path):
    paths, labels = paths_with_broken(tmp_path)
    for on_error in ("raise", "nan"):
        extractor = PretrainedFeatureExtractor(on_error=on_error)
        with pytest.raises(ImageError) as caught:
            rank_backbones(paths, labels, [Tiny], extractor=extractor)
        assert [error.row for error in caught.value.errors] == BROKEN_ROWS


@pytest.mark.parametrize("function", [rank_backbones, recommend_strategy])
@pytest.mark.parametrize(
    "groups",
    [
        [1, 1, None, 2],
        ["a", "a", float("nan"), "b"],
        np.array([1, 1, np.nan, 2]),
        np.array(["a", "a", None, "b"], dtype=object),
        np.ma.array([1, 1, 1, 2], mask=[0, 0, 1, 0]),
        pd.Series([1, 1, None, 2], dtype="Int64"),
        pd.Series(["a", "a", None, "b"]),
        pd.Series(["a", "a", None, "b"], dtype="category"),
    ],
)
def test_missing_groups_are_rejected(function, groups):
    with pytest.raises(ValueError, match=r"^Got 1 missing label in groups, in row 2, but expected"):
        function(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1], groups=groups)


@pytest.mark.parametrize(
    ("labels", "groups", "problem"),
    [
        (list("aabbc"), None, "Got a single image of the class 'c', but"),
        (
            ["cat", "dog", "dog", "elk"],
            None,
            "image of each of the classes 'cat', 'elk', but",
        ),
        ([3, 3, 7], None, "Got a single image of the class 7, but"),
        ([True, False, True], None, "Got a single image of the class False, but"),
        (list("abcdefghijklmm"), None, "'i', 'j', ..., but"),
        (list("aabb"), [0, 1, 2, 2], "Got a single group of the class 'b', but"),
        (list("aabb"), [0, 0, 2, 2], "Got a single group of each of the classes 'a', 'b', but"),
        ([5, 5, 6, 6], [0, 0, 1, 2], "Got a single group of the class 5, but"),
    ],
)
def test_error_names_the_classes_that_are_too_small(labels, groups, problem):
    with pytest.raises(ValueError, match="cross-validation needs at least two") as caught:
        rank_backbones(X[: len(labels)], labels, Tiny, groups=groups, extractor=SCANS)
    assert problem in str(caught.value)


def test_ranking_with_tied_accuracies_has_no_rank_correlation(ranking):
    rows = tuple(row._replace(accuracy=1.0, spread=0.0) for row in ranking.rows)
    tied = replace(ranking, rows=rows)
    assert np.isnan(tied.agreement)
    assert "LogME agrees" not in repr(tied)
    assert "nan" not in repr(tied)
    assert "rank correlation" not in tied._repr_html_()
