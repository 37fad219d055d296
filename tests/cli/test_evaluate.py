import json
import math
import shutil

import numpy as np
import pytest
from cli_helpers import paths_below, run, save_broken, save_classes, save_splits
from scipy.stats import binomtest
from sklearn.utils import Bunch

import sktransfer
from sktransfer.cli.evaluate import format_scores, score, wilson_interval
from sktransfer.cli.messages import Notes


def test_scores_are_printed_as_a_table(model, photos):
    result = run("evaluate", model, photos)
    assert result.stdout == (
        "accuracy 1.000 (95% interval 0.862 to 1.000): 24 of 24 images\n"
        "\n"
        "class  images  precision  recall\n"
        "cat         8      1.000   1.000\n"
        "dog         8      1.000   1.000\n"
        "owl         8      1.000   1.000\n"
        "\n"
        "true \\ predicted  cat  dog  owl\n"
        "cat                 8    0    0\n"
        "dog                 0    8    0\n"
        "owl                 0    0    8\n"
    )


def test_scores_count_wrong_labels(model, photos, tmp_path):
    """Two cats that lie among the dogs, and a class that the model does not know."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for name in ("00.png", "03.png"):
        (root / "cat" / name).rename(root / "dog" / name)
    (root / "owl").rename(root / "swan")
    result = run("evaluate", model, root, "--json")
    scores = json.loads(result.stdout)
    assert (scores["images"], scores["correct"]) == (24, 14)
    assert scores["split"] is None
    assert scores["accuracy"] == pytest.approx(14 / 24)
    assert scores["interval"] == pytest.approx(wilson_interval(14, 24))
    by_label = {entry.pop("label"): entry for entry in scores["classes"]}
    intervals = {
        label: (entry.pop("precision_interval"), entry.pop("recall_interval"))
        for label, entry in by_label.items()
    }
    assert intervals["cat"] == (
        pytest.approx(wilson_interval(6, 8)),
        pytest.approx(wilson_interval(6, 6)),
    )
    assert intervals["owl"] == (pytest.approx(wilson_interval(0, 8)), None)
    assert intervals["swan"] == (None, pytest.approx(wilson_interval(0, 8)))
    assert by_label == {
        "cat": {"images": 6, "precision": 6 / 8, "recall": 1.0},
        "dog": {"images": 10, "precision": 1.0, "recall": 0.8},
        "owl": {"images": 0, "precision": 0.0, "recall": None},
        "swan": {"images": 8, "precision": None, "recall": 0.0},
    }
    assert scores["confusion"] == {
        "labels": ["cat", "dog", "owl", "swan"],
        "counts": [[6, 0, 0, 0], [2, 8, 0, 0], [0, 0, 0, 0], [0, 0, 8, 0]],
    }
    assert "does not know these labels, so they count as errors: swan\n" in result.stderr


def test_test_images_are_scored_unless_another_split_is_chosen(model, tmp_path):
    root = save_splits(tmp_path / "splits")
    counts = {"test": 12, "val": 9, "train": 24, "all": 45}
    for split, count in counts.items():
        printed = run("evaluate", model, root, "--split", split, "--json").stdout
        assert json.loads(printed)["images"] == count
        assert json.loads(printed)["split"] == split
    result = run("evaluate", model, root, "--json")
    assert json.loads(result.stdout)["images"] == 12
    assert "Scoring the split test; --split chooses another one.\n" in result.stderr
    shutil.rmtree(root / "test")
    assert json.loads(run("evaluate", model, root, "--json").stdout)["images"] == 9
    result = run("evaluate", model, root, "--split", "test", code=1)
    assert "has no images for the split test; its splits: train, val" in result.stderr


def test_labels_in_common_are_required(model, tmp_path):
    root = save_classes(tmp_path / "photos", n=1)
    for name in ("cat", "dog", "owl"):
        (root / name).rename(root / f"{name}s")
    result = run("evaluate", model, root, code=1)
    assert "(cat, dog, owl) and the labels of the images (cats, dogs, owls)" in result.stderr


def test_broken_images_fail_or_are_left_out(model, tmp_path):
    root = save_classes(tmp_path / "photos", n=2)
    save_broken(root / "cat" / "broken.png")
    assert "1 image cannot be read" in run("evaluate", model, root, code=1).stderr
    result = run("evaluate", model, root, "--skip-broken", "--json")
    assert json.loads(result.stdout)["images"] == 6


def test_model_that_was_saved_with_numbers_can_be_scored(model, photos):
    """Numbers of classes are compared with names of folders as text."""
    images = paths_below(photos)
    numbers = {"cat": "0", "dog": "1", "owl": "2"}
    labels = np.array([numbers[path.split("/")[-2]] for path in images])
    data = Bunch(data=images, labels=labels, split=None)
    classifier = sktransfer.load(model)
    classifier.classes_ = np.arange(3)
    assert score(classifier, data, False, Notes(quiet=True))["accuracy"] == 1


@pytest.mark.parametrize(("n_correct", "n"), [(0, 10), (1, 1), (5, 10), (81, 263), (263, 263)])
def test_interval_is_that_of_scipy(n_correct, n):
    expected = binomtest(n_correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(n_correct, n) == pytest.approx(tuple(expected), abs=1e-7)


def test_wide_confusion_matrix_becomes_a_list(monkeypatch):
    labels = [f"a class with a long name {number}" for number in range(6)]
    counts = [[9 if i == j else (i == 2 and j == 3) * 4 for j in range(6)] for i in range(6)]
    scores = {
        "images": 58,
        "correct": 54,
        "accuracy": 54 / 58,
        "interval": (0.8, 0.9),
        "classes": [
            {"label": label, "images": 9, "precision": math.nan, "recall": 1.0} for label in labels
        ],
        "confusion": {"labels": labels, "counts": counts},
    }
    monkeypatch.setenv("COLUMNS", "80")
    text = format_scores(scores)
    assert "true                        predicted                   images\n" in text
    assert f"{labels[2]}  {labels[3]}       4\n" in text
    assert f"{labels[0]}       9          -   1.000\n" in text
    monkeypatch.setenv("COLUMNS", "400")
    assert "true \\ predicted" in format_scores(scores)
