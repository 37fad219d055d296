"""Duplicates are found, and reported if they cross a split or have different labels."""

import os

import numpy as np
import pandas as pd
import polars as pl
import pytest
from duplicate_helpers import COPIES, TILES, cropped, tile
from edge_helpers import Unread
from helpers import Tiny
from PIL import Image, ImageOps
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from sktransfer import PretrainedFeatureExtractor, find_leaks


def rows(report):
    return [tuple(pair) for pair in report.pairs.tolist()]


@pytest.mark.parametrize("copy", COPIES)
def test_find_leaks_finds_copies(copy):
    change, kind = COPIES[copy]
    copies = [np.asarray(change(tile(number))) for number in (0, 5, 13)]
    report = find_leaks([*TILES, *copies])
    assert sorted(rows(report)) == [(0, 15), (5, 16), (13, 17)]
    assert set(report.kinds) == {kind}
    assert np.issubdtype(report.pairs.dtype, np.integer)
    assert sorted(np.arange(15)[report.pairs[:, 0]]) == [0, 5, 13], "pairs must select rows"
    assert report.cosines.shape == (3,)
    assert np.all(np.diff(report.cosines) <= 0)
    assert not report.across.any()
    assert not report.conflicts.any()


def test_find_leaks_reports_no_copies():
    report = find_leaks(TILES, [0, 1, 2] * 5, cv=3)
    assert report.pairs.shape == (0, 2)
    assert report.cosines.shape == (0,)
    assert repr(report) == "No duplicates or near-duplicates among 15 images."
    assert "among 15 images" in report._repr_html_()
    assert len(set(report.groups)) == 15


def test_find_leaks_reports_splits_and_labels():
    X = [*TILES[:6], TILES[0], np.asarray(ImageOps.mirror(tile(3)))]  # 0 and 6, 3 and 7
    y = [0, 0, 1, 1, 0, 1, 0, 0]
    halves = [(range(4), range(4, 8)), ([0, 1, 6], [3, 7])]
    report = find_leaks(X, y, cv=halves)
    assert rows(report) == [(0, 6), (3, 7)]
    assert report.across.tolist() == [True, True]
    assert report.conflicts.tolist() == [False, True]
    second_split = find_leaks(X, y, cv=halves[1:])
    assert second_split.across.tolist() == [False, False]
    text = repr(report)
    assert "2 pairs among 8 images: 1 identical, 1 mirrored." in text
    assert "2 pairs on both sides of a split, so scores are too optimistic" in text
    assert "1 pair with different labels." in text
    assert second_split.conflicts.tolist() == [False, True]
    assert "None of these pairs is on both sides of a split." in second_split.summary
    assert "on both sides of a split" not in repr(find_leaks(X, y))
    assert "1 pair with different labels." in repr(second_split)


@pytest.mark.parametrize(
    ("images", "settings", "sentence"),
    [
        ([0, 1, 0], {"cv": [([0, 2], [1])]}, "This pair is not on both sides of a split."),
        ([0, 1, 0], {"groups": [0, 1, 0]}, "This pair is not on both sides of a split."),
        (
            [0, 1, 0, 1],
            {"groups": [0, 1, 0, 1]},
            "None of these pairs is on both sides of a split.",
        ),
        ([0, 1, 2], {"cv": 3}, None),
        ([0, 1, 0], {}, None),
        ([0, 1, 0], {"cv": [([0], [2])]}, "1 pair on both sides of a split, so scores are too"),
    ],
)
def test_find_leaks_reports_that_no_pair_is_separated(images, settings, sentence):
    summary = find_leaks([TILES[number] for number in images], **settings).summary
    split = [line for line in summary if "of a split" in line]
    assert len(split) == (sentence is not None)
    assert not split or split[0].startswith(sentence)


def test_find_leaks_groups_fix_a_split():
    X = [tile for tile in TILES[:8] for _ in range(2)]
    y = np.repeat([0, 1] * 4, 2)
    assert find_leaks(X, y, cv=StratifiedKFold(4, shuffle=True, random_state=0)).across.any()
    report = find_leaks(X, y)
    assert len(set(report.groups)) == 8
    fixed = find_leaks(X, y, cv=StratifiedGroupKFold(2), groups=report.groups)
    assert len(fixed.pairs) == 8
    assert not fixed.across.any()
    splits = GroupKFold(2).split(X, y, report.groups)
    assert not find_leaks(X, y, cv=splits).across.any()


def test_find_leaks_compares_groups_without_cv():
    X = [TILES[0], TILES[1], TILES[0], TILES[1]]
    report = find_leaks(X, groups=["a", "a", "b", "a"])
    assert dict(zip(rows(report), report.across.tolist(), strict=True)) == {
        (0, 2): True,
        (1, 3): False,
    }


def test_find_leaks_compares_two_sets():
    test = [
        np.asarray(cropped(tile(7))),
        np.asarray(tile(19)),
        np.asarray(ImageOps.mirror(tile(2))),
    ]
    report = find_leaks(TILES, np.arange(15) % 4, X_test=test, y_test=[3, 0, 1])
    assert sorted(rows(report)) == [(2, 2), (7, 0)]
    assert report.across.all()
    assert dict(zip(rows(report), report.conflicts.tolist(), strict=True)) == {
        (2, 2): True,
        (7, 0): False,
    }
    assert report.groups is None
    assert "2 pairs among 15 and 3 images" in repr(report)
    assert "Remove one image of each pair" in repr(report)


def test_find_leaks_reports_alike_images():
    """All embeddings of a network with positive weights are nearly parallel."""
    extractor = PretrainedFeatureExtractor(Tiny, cache=None)
    report = find_leaks([TILES[0], TILES[3]], ["a", "b"], extractor=extractor)
    assert rows(report) == [(0, 1)]
    assert report.kinds.tolist() == ["alike"]
    assert report.conflicts.tolist() == [True]
    assert report.cosines[0] >= 0.95
    assert "1 pair among 2 images: 1 alike." in repr(report)
    assert not hasattr(extractor, "digest_"), "the caller's extractor was fitted"


def test_find_leaks_does_not_report_rotated_images_as_copies():
    turned = [np.asarray(tile(0)), np.asarray(tile(0).rotate(12, resample=2, fillcolor="gray"))]
    report = find_leaks([*turned, *TILES[1:]])
    assert set(report.kinds) <= {"alike"}


def test_find_leaks_leaves_out_broken_images_with_a_warning(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for number in (0, 1):
        tile(number).save(tmp_path / f"{number}.png")
    names = ["0.png", "broken.png", "1.png", "0.png"]
    with pytest.warns(
        UserWarning,
        match=r"Got 1 image that cannot be read; the report leaves .*\n- Image in row 1 ",
    ):
        report = find_leaks([tmp_path / name for name in names])
    assert rows(report) == [(0, 3)]
    assert report.unreadable.tolist() == [1]
    assert "1 pair among 3 images" in repr(report)
    assert "1 image could not be read and left out." in repr(report)
    assert str(tmp_path / "0.png") in repr(report)


def test_find_leaks_warns_of_broken_images_in_the_second_set():
    floats = [np.asarray(image) / 255 for image in TILES[:3]]
    message = (
        r"\(those of X_test begin at 3\):\n- Image in row 0 of X_test \(.*\n- Image in row 1 of"
    )
    with pytest.warns(UserWarning, match=message):
        report = find_leaks(np.stack(floats), X_test=np.stack(TILES[:2]).astype(float))
    assert report.n_images == (3, 0)
    assert report.unreadable.tolist() == [3, 4]


@pytest.mark.parametrize(
    "y",
    [
        np.array(["a", None, "b"], dtype=object),
        np.array(["a", np.nan, "b"], dtype=object),
        ["a", np.nan, "b"],
        ["a", None, "b"],
        ["a", pd.NA, "b"],
        np.array(["a", np.nan, "b"]),
        np.array([1, np.nan, 2]),
        np.ma.array(["a", "x", "b"], mask=[0, 1, 0]),
        pd.Series(["a", None, "b"], dtype="category"),
        pd.Series([1, None, 2], dtype="Int64"),
        pl.Series(["a", None, "b"]),
    ],
    ids=lambda y: type(y).__name__,
)
def test_find_leaks_ignores_missing_labels(y):
    report = find_leaks([TILES[0]] * 3, y)
    conflicts = {
        pair for pair, conflict in zip(rows(report), report.conflicts, strict=True) if conflict
    }
    assert conflicts == {(0, 2)}


def test_missing_labels_are_a_class_of_their_own_in_splits():
    X = [*TILES[:3], *TILES[:3]]
    report = find_leaks(X, ["a", "b", None, None, "a", "b"], cv=2)
    expected = find_leaks(X, ["a", "b", "c", "c", "a", "b"], cv=2)
    assert sorted(rows(report)) == sorted(rows(expected)) == [(0, 3), (1, 4), (2, 5)]
    assert report.across.tolist() == expected.across.tolist()
    conflicts = dict(zip(rows(report), report.conflicts.tolist(), strict=True))
    assert conflicts == {(0, 3): False, (1, 4): True, (2, 5): False}


def test_missing_labels_of_a_second_set_do_not_conflict():
    report = find_leaks(TILES[:2], ["a", "b"], X_test=TILES[:2], y_test=[None, "a"])
    assert rows(report) == [(0, 0), (1, 1)]
    assert report.conflicts.tolist() == [False, True]


def test_missing_group_is_rejected():
    with pytest.raises(ValueError, match=r"^Got 1 missing label in groups, in row 1, but"):
        find_leaks(TILES[:3], groups=["a", np.nan, "b"])


def test_leak_report_names_images_without_a_path_by_their_rows():
    second = np.asarray(TILES[0])
    assert repr(find_leaks(TILES[:2], X_test=[TILES[5], second])).splitlines()[-2:] == [
        "image i     image j          cosine  kind       split",
        "row 0 of X  row 1 of X_test   1.000  identical  across",
    ]


def test_leak_report_names_images_with_a_path_by_row_and_path(folder):
    for name in ("a.png", "b.png"):
        tile(0).save(name)
    X = ["a.png", TILES[0], {"path": "b.png", "bytes": None}]
    lines = repr(find_leaks(X, ["cat", "cat", "dog"])).splitlines()
    assert lines[-4] == "i  j  cosine  kind       labels  image i  image j"
    assert sorted(lines[-3:]) == [
        "0  1   1.000  identical          a.png    row 1",
        "0  2   1.000  identical  differ  a.png    b.png",
        "1  2   1.000  identical  differ  row 1    b.png",
    ]


def test_leak_report_shows_images_side_by_side():
    report = find_leaks([TILES[0], TILES[1], TILES[0]], ["a&b", "c", "<d>"])
    page = report._repr_html_()
    assert page.count("<img src=") == 2
    assert page.count("display: flex") == 1
    assert "data:image/jpeg;base64," in page
    assert "<d>" not in page


def test_leak_report_escapes_names(folder):
    """Names of files can contain HTML."""
    name = "<b onclick=alert()>.png"
    tile(0).save(name)
    page = find_leaks([name, name])._repr_html_()
    assert "<b" not in page
    assert "&lt;b onclick" in page


def test_leak_report_shows_deleted_files_and_names_that_are_not_utf8(folder):
    names = [os.fsdecode(b"caf\xe9.png"), "gone.png"]
    for name in names:
        tile(0).save(name)
    report = find_leaks(names)
    os.remove("gone.png")
    page = report._repr_html_()
    assert page.count("<img") == 1
    assert "caf?.png" in page.encode().decode()
    assert "Image in row 1 (gone.png)" in page


def test_leak_report_shows_the_first_20_pairs():
    report = find_leaks([TILES[0]] * 8)
    assert len(report.pairs) == 28
    assert "and 8 more in report.pairs" in repr(report)
    assert report._repr_html_().count("<img") == 40


def test_find_leaks_accepts_rows_of_floats():
    X = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in TILES]) / 255
    X = np.concatenate([X, X[[4]]]).reshape(16, -1)
    report = find_leaks(X, extractor=PretrainedFeatureExtractor(image_shape=(32, 32, 3)))
    assert (4, 15) in rows(report)


def test_find_leaks_rejects_invalid_arguments(monkeypatch):
    def never(self, X):
        raise AssertionError("images were embedded before the labels were checked")

    monkeypatch.setattr(PretrainedFeatureExtractor, "transform", never)
    with pytest.raises(ValueError, match="X_test together with cv or groups"):
        find_leaks(TILES, X_test=TILES, cv=3)
    with pytest.raises(ValueError, match="Got y_test without X_test"):
        find_leaks(TILES, y_test=[0] * 15)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        find_leaks(TILES[:3], [0, 1])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        find_leaks(TILES[:3], groups=[0, 1])


@pytest.mark.parametrize(
    "options",
    [{"cv": value} for value in (0, 1, "x", True, 2.5, 10**6, [([0], [99])], [1, 2])]
    + [{"extractor": value} for value in (3, "resnet18", PretrainedFeatureExtractor)]
    + [{"extractor": PretrainedFeatureExtractor(Tiny, n_jobs=0)}],
)
def test_find_leaks_checks_its_parameters_before_an_image_is_read(options):
    options = {"extractor": PretrainedFeatureExtractor(Tiny), **options}
    with pytest.raises((ValueError, TypeError), match=r"^Got "):
        find_leaks(Unread(), np.arange(12) % 2, **options)
