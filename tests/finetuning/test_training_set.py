"""Labeled images are merged, ordered by content, and split for validation."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import images, save_images

from sktransfer.data.images import as_images
from sktransfer.data.labels import check_labels
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.finetuning.training_set import TrainingSet, split_validation
from sktransfer.utils.errors import ImageError


def examples(X, y, sample_weight=None, class_weight=None):
    return TrainingSet.of(as_images(X), check_labels(X, y, sample_weight, class_weight))


def balanced_images(*counts):
    """Build images and labels, with a given number of images per class."""
    y = np.repeat([f"class{i}" for i in range(len(counts))], counts)
    return images(len(y), side=4), y


def assert_equal(actual, expected):
    """Compare images, labels and weights to the last bit."""
    for name in ("y", "counts", "weights"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    assert len(actual.images) == len(expected.images)
    for row in range(len(actual.images)):
        np.testing.assert_array_equal(actual.images[row], expected.images[row])
    assert actual.digest() == expected.digest()


@pytest.mark.parametrize("form", ["arrays", "paths"])
def test_training_set_does_not_depend_on_the_row_order(form, tmp_path):
    X, y = balanced_images(5, 4)
    weight = np.random.RandomState(1).rand(9) + 0.5
    if form == "paths":
        X = save_images(X, tmp_path / "images")
    ordered = examples(X, y, weight, "balanced")
    order = np.random.RandomState(0).permutation(9)
    shuffled = examples([X[row] for row in order], y[order], weight[order], "balanced")
    assert_equal(ordered, shuffled)
    assert sorted(ordered.y) == [0] * 5 + [1] * 4
    assert sorted(ordered.counts) == sorted(weight)


def test_images_keep_their_labels_and_weights():
    X, y = balanced_images(3, 3)
    weight = np.arange(1.0, 7)
    training_set = examples(X, y, weight)
    for row in range(6):
        (original,) = np.flatnonzero((training_set.images[row] == X).all((1, 2, 3)))
        assert (training_set.y[row], training_set.counts[row]) == (original // 3, weight[original])


def test_equal_images_are_merged_and_their_counts_added():
    X, y = balanced_images(3, 2)
    rows = [4, 0, 1, 4, 2, 3, 0, 0]
    merged = examples(X[rows], y[rows])
    assert sorted(merged.counts) == [1, 1, 1, 2, 3]
    assert_equal(merged, examples(X, y, [3, 1, 1, 1, 2]))


@pytest.mark.parametrize("times", [2, 3, 6, 10])
def test_weight_equals_repetition_to_the_last_bit(times):
    X, y = balanced_images(3, 6)
    rows = [*range(9), *[8] * (times - 1)]
    repeated = examples(X[rows], y[rows], class_weight="balanced")
    assert_equal(repeated, examples(X, y, [1] * 8 + [times], "balanced"))


def test_weights_of_equal_images_add_up_equally_in_any_order():
    X, y = balanced_images(1, 1)
    rows, weight = np.array([0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 1])
    back = [2, 1, 0, 3]
    assert_equal(
        examples(X[rows], y[rows], weight), examples(X[rows[back]], y[rows[back]], weight[back])
    )


def test_image_with_two_labels_is_not_merged():
    X = images(2, side=4)[[0, 0, 1, 1]]
    training_set = examples(X, ["a", "b", "a", "a"])
    assert sorted(zip(training_set.y, training_set.counts, strict=True)) == [(0, 1), (0, 2), (1, 1)]


def test_spellings_of_a_path_are_merged_but_not_two_paths(folder):
    image = images(1, side=4)[0]
    first, second = save_images([image, image], folder / "images")
    spellings = [first, second, os.path.join("images", "0.png"), "images/../images/1.png"]
    training_set = examples(spellings, ["a", "b", "a", "b"])
    assert training_set.counts.tolist() == [2, 2]


def test_images_of_weight_0_are_left_out_unread():
    X, y = balanced_images(2, 2)
    training_set = examples(
        [X[0], "missing.jpg", *X[1:]], np.insert(y, 1, "class0"), [1, 0, 1, 1, 1]
    )
    assert_equal(training_set, examples(X, y))


def test_image_error_names_the_row_of_x(tmp_path):
    paths = save_images(images(6, side=4), tmp_path / "images")
    paths[2], paths[4] = paths[4], paths[2]
    Path(paths[2]).write_bytes(b"no image")
    training_set = examples(paths[::-1], list("abcabc"), [1, 1, 0, 1, 1, 1])
    (broken,) = np.flatnonzero([training_set.images.describe(row) == paths[2] for row in range(5)])
    chosen = training_set.take(np.array([0, broken]))
    with pytest.raises(ImageError, match="cannot identify this") as caught:
        chosen.images[1]
    assert (caught.value.row, caught.value.source) == (3, paths[2])


def test_digest_names_the_row_of_a_missing_file(tmp_path):
    X = [*images(2, side=4), str(tmp_path / "missing.png")]
    training_set = examples(X, ["a", "b", "a"])
    with pytest.raises(ImageError) as caught:
        training_set.digest()
    assert caught.value.row == 2


def is_small(training_set):
    task = ClassificationTask(np.array(["class0", "class1"]))
    return task.is_small(training_set.y, training_set.counts)


@pytest.mark.parametrize(("counts", "tiny"), [((10, 10), False), ((10, 9), True)])
def test_set_is_small_if_a_class_has_fewer_than_10_images(counts, tiny):
    X, y = balanced_images(*counts)
    assert is_small(examples(X, y)) is tiny


def test_set_size_counts_weights_as_images():
    X, y = balanced_images(10, 9)
    assert not is_small(examples(X, y, [1] * 18 + [2]))
    assert is_small(examples(X, y, class_weight={"class1": 2}))


def test_digest_depends_on_images_labels_and_weights():
    X, y = balanced_images(3, 3)
    other_y = y.copy()
    other_y[0] = "class1"
    changed = X.copy()
    changed[0, 0, 0, 0] ^= 1
    digests = {
        examples(X, y).digest(),
        examples(changed, y).digest(),
        examples(X, other_y).digest(),
        examples(X, y, [2, 1, 1, 1, 1, 1]).digest(),
        examples(X, y, class_weight={"class0": 2}).digest(),
        examples(X[:5], y[:5]).digest(),
    }
    assert len(digests) == 6
    assert examples(X, y).digest() in digests


def test_split_holds_out_a_share_of_each_class_and_at_least_one_image():
    X, y = balanced_images(40, 20, 12, 3)
    training_set = examples(X, y)
    train, valid = split_validation(training_set, 0.1, 0, ClassificationTask(np.unique(y)))
    assert np.bincount(valid.y).tolist() == [4, 2, 1, 1]
    assert np.bincount(train.y).tolist() == [36, 18, 11, 2]
    rows = [part.images.fingerprint(i) for part in (train, valid) for i in range(len(part.y))]
    assert len(set(rows)) == 75, "an image is in both parts, or in none"


def test_split_keeps_two_images_of_each_class_in_training():
    X, y = balanced_images(5, 3)
    train, valid = split_validation(examples(X, y), 1.0, 0, ClassificationTask(np.unique(y)))
    assert np.bincount(train.y).tolist() == [2, 2]
    assert np.bincount(valid.y).tolist() == [3, 1]


def test_split_depends_only_on_content_and_seed():
    X, y = balanced_images(20, 20)
    training_set, classes = examples(X, y), np.unique(y)
    reversed_set = examples(X[::-1], y[::-1])
    parts = split_validation(training_set, 0.2, 3, ClassificationTask(classes))
    for part, same in zip(
        parts, split_validation(reversed_set, 0.2, 3, ClassificationTask(classes)), strict=True
    ):
        assert_equal(part, same)
    assert (
        split_validation(training_set, 0.2, 4, ClassificationTask(classes))[1].digest()
        != parts[1].digest()
    )


def test_split_keeps_weights():
    X, y = balanced_images(6, 6)
    weight = dict(zip([x.tobytes() for x in X], np.arange(1.0, 13), strict=True))
    training_set = examples(X, y, list(weight.values()), {"class1": 10})
    for part in split_validation(training_set, 0.3, 0, ClassificationTask(np.unique(y))):
        for row, number in enumerate(part.y):
            expected = weight[part.images[row].tobytes()]
            assert part.counts[row] == expected
            assert part.weights[row] == expected * (10 if number else 1)


def test_split_holds_nothing_out_of_tiny_classes_and_warns():
    X, y = balanced_images(10, 2, 1, 5)
    with pytest.warns(UserWarning, match=r"^Got at most 2 images") as caught:
        train, valid = split_validation(examples(X, y), 0.1, 0, ClassificationTask(np.unique(y)))
    assert [str(warning.message) for warning in caught] == [
        "Got at most 2 images of the classes 'class1', 'class2', too few to hold any out, so "
        "these classes are missing from validation. Add images, pass X_val and y_val, or set "
        "early_stopping=False to train on everything"
    ]
    assert np.bincount(valid.y, minlength=4).tolist() == [1, 0, 0, 1]
    assert np.bincount(train.y).tolist() == [9, 2, 1, 4]


def test_split_holds_nothing_out_if_every_class_is_tiny():
    X, y = balanced_images(2, 1)
    training_set = examples(X, y)
    with pytest.warns(UserWarning, match="'class0', 'class1'"):
        train, valid = split_validation(training_set, 0.5, 0, ClassificationTask(np.unique(y)))
    assert valid is None
    assert train is training_set


def test_split_by_a_share_of_0_holds_nothing_out_without_a_warning():
    X, y = balanced_images(2, 1)
    training_set = examples(X, y)
    assert split_validation(training_set, 0, 0, ClassificationTask(np.unique(y))) == (
        training_set,
        None,
    )
