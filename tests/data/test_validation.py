import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Items, encoded, images
from PIL import Image
from sklearn.base import BaseEstimator

from sktransfer.data.images import as_images
from sktransfer.data.validation import check_images, check_not_swapped


class Estimator(BaseEstimator):
    def __init__(self, image_shape=None, pixel_range="auto", background="white"):
        self.image_shape = image_shape
        self.pixel_range = pixel_range
        self.background = background


def test_check_images_learns_the_pixel_range_only_in_fit():
    estimator, X = Estimator(), images(4).astype(float)
    checked = check_images(estimator, X, reset=True)
    assert estimator.pixel_range_ == checked.pixel_range == (0, 255)
    np.testing.assert_array_equal(checked[2], images(4)[2])
    with pytest.warns(UserWarning, match="nearly black"):
        later = check_images(estimator, X / 255, reset=False)
    assert estimator.pixel_range_ == later.pixel_range == (0, 255)
    assert later[2].max() <= 1


@pytest.mark.parametrize("high", [255, 65535])
def test_numbers_of_another_range_than_in_fit_warn(high):
    estimator, X = Estimator(), np.linspace(0, 1, 48).reshape(4, 4, 3)
    check_images(estimator, [high * X], reset=True)
    with pytest.warns(UserWarning, match=f"up to 1, but the pixel range is 0 to {high}.*nearly bl"):
        check_images(estimator, [X, X], reset=False)
    check_images(estimator, [high * X, X], reset=False)  # an image may be dark
    check_images(estimator, [0 * X], reset=False)
    check_images(estimator, [np.rint(255 * X).astype(np.uint8)], reset=False)


def test_check_images_learns_the_pixel_range_without_images_of_weight_0():
    X = np.stack([np.full((4, 4), 1.0), np.full((4, 4), 200.0)])
    for weight, expected in (([1, 1], (0, 255)), ([1, 0], (0, 1)), (None, (0, 255))):
        estimator = Estimator()
        check_images(estimator, X, reset=True, sample_weight=weight)
        assert estimator.pixel_range_ == expected


def drawings(color, count=3):
    """Draw transparent squares of one color, at different positions."""
    pixels = np.zeros((count, 8, 8, 4), dtype=np.uint8)
    pixels[..., :3] = color
    for row in range(count):
        pixels[row, row : row + 4, :4, 3] = 255
    return pixels


def as_files(pixels, folder):
    paths = [str(folder / f"{row}.png") for row in range(len(pixels))]
    for array, path in zip(pixels, paths, strict=True):
        Image.fromarray(array).save(path)
    return paths


@pytest.mark.parametrize("wrap", ["arrays", "files", "PIL", "dataset"])
@pytest.mark.parametrize(
    ("color", "background", "warns"),
    [
        ((255, 255, 255), "white", True),
        ((0, 0, 0), "black", True),
        ((9, 8, 7), (9, 8, 7), True),
        ((255, 255, 255), "black", False),
        ((0, 0, 0), "white", False),
        ((255, 255, 254), "white", False),
    ],
)
def test_check_images_warns_of_drawings_in_the_color_of_the_background(
    color, background, warns, wrap, tmp_path
):
    pixels = drawings(color)
    X = {
        "arrays": lambda: pixels,
        "files": lambda: as_files(pixels, tmp_path),
        "PIL": lambda: [Image.fromarray(array) for array in pixels],
        "dataset": lambda: Items(list(pixels)),
    }[wrap]()
    estimator = Estimator(background=background)
    if not warns:
        check_images(estimator, X, reset=True)
        return
    with pytest.warns(UserWarning, match=r"Got 3 different images .* all equal on background="):
        check_images(estimator, X, reset=True)
    check_images(estimator, X, reset=False)


@pytest.mark.parametrize(
    "X",
    [
        drawings(255, 1),
        np.stack([drawings(255, 1)[0]] * 3),
        [*drawings(255, 1), np.zeros((8, 8, 3), dtype=np.uint8)],
        np.full((3, 8, 8, 3), 255, dtype=np.uint8),
        [*drawings(255, 2), *drawings(0, 2)],
        images(4),
        ["gone.png", "gone.png"],
        [Image.new("L", (4, 4))] * 2,
    ],
)
def test_check_images_does_not_warn_of_other_images(X):
    check_images(Estimator(), X, reset=True)


def test_check_images_takes_the_background():
    checked = check_images(Estimator(background="#102030"), drawings(0)[..., :], reset=True)
    np.testing.assert_array_equal(checked[0][7, 7], [16, 32, 48])
    np.testing.assert_array_equal(checked.take([1])[0][7, 7], [16, 32, 48])
    with pytest.raises(ValueError, match=r"Got background='whit', but expected the name"):
        check_images(Estimator(background="whit"), None, reset=True)


def test_check_images_sets_and_compares_the_columns():
    frame = pd.DataFrame({"image": ["a.png", "b.png"]})
    estimator = Estimator()
    check_images(estimator, frame, reset=True)
    assert estimator.feature_names_in_.tolist() == ["image"]
    with pytest.raises(ValueError, match="feature names should match"):
        check_images(estimator, frame.rename(columns={"image": "file"}), reset=False)
    rows = Estimator(image_shape=(8, 8))
    check_images(rows, np.zeros((2, 64)), reset=True)
    assert rows.n_features_in_ == 64
    with pytest.raises(ValueError, match="expecting 64 features"):
        check_images(rows, np.zeros((2, 32)), reset=False)


def test_check_images_accepts_resolved_images():
    estimator = Estimator()
    checked = check_images(estimator, as_images(images(3) / 255), reset=True)
    assert checked.pixel_range == (0, 1)
    assert not hasattr(estimator, "n_features_in_")


@pytest.mark.parametrize("pixel_range", [(1, 0), (0, 0), "full", 3, (0, 1, 2), None])
def test_check_images_rejects_an_invalid_pixel_range(pixel_range):
    message = f"Got pixel_range={pixel_range!r}, but expected 'auto' or the values of black and"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_images(Estimator(pixel_range=pixel_range), images(2), reset=True)


PATHS, CLASSES = [f"{number}.png" for number in range(6)], ["cat", "dog"] * 3


@pytest.mark.parametrize(
    ("X", "y"),
    [
        (PATHS, CLASSES),
        (np.array(PATHS, dtype=object), np.array(CLASSES)),
        (pd.Series(PATHS), pd.Series(CLASSES, dtype="category")),
        (pd.DataFrame({"file": PATHS}), pd.DataFrame({"class": CLASSES})),
        ([Path(path) for path in PATHS], [0, 1] * 3),
        (images(6), np.arange(6)),
        (list(images(6)), CLASSES),
        (torch.zeros(6, 3, 8, 8), torch.arange(6)),
        (images(6).reshape(6, -1), np.arange(6) / 6),
        ([Image.fromarray(image) for image in images(6)], [True, False] * 3),
        ([encoded(Image.fromarray(image)) for image in images(6)], CLASSES),
        ([f"{number}.JPG" for number in range(6)], np.arange(6)),
        ([f"https://host/image?id={number}" for number in range(6)], CLASSES),
    ],
)
def test_swapped_images_and_labels_are_rejected(X, y):
    check_not_swapped(X, y)
    with pytest.raises(ValueError, match=r"^Got labels as X and images as y; pass"):
        check_images(Estimator((1, -1)), y, reset=True, y=X)


@pytest.mark.parametrize(
    ("X", "y"),
    [
        (PATHS, None),
        (PATHS, PATHS),
        (["folder/1", "folder/2"], ["1", "2"]),
        (["folder/1", "folder/2"], [b"1", b"2"]),
        (["folder/1", "folder/2"], np.array([[0], [1]])),
        (images(6), np.eye(6)),
        (images(6).reshape(6, -1), np.eye(6)),
        (Items(images(6)), PATHS),
        ([], PATHS),
        (PATHS, 5),
        (PATHS, iter(CLASSES)),
        (np.arange(6), np.arange(6)),
    ],
)
def test_other_labels_are_not_taken_for_images(X, y):
    check_not_swapped(X, y)


NO_EFFECT = r"^Got image_shape=\(20, 20\), which has no effect, .* network's input, set image_size$"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda X, folder: as_files(X, folder),
        lambda X, folder: np.array(as_files(X, folder), dtype=object),
        lambda X, folder: pd.DataFrame({"file": as_files(X, folder)}),
        lambda X, folder: [Path(path) for path in as_files(X, folder)],
        lambda X, folder: list(map(Image.fromarray, X)),
        lambda X, folder: [encoded(Image.fromarray(image)) for image in X],
        lambda X, folder: X,
        lambda X, folder: torch.from_numpy(X),
        lambda X, folder: [X[0], X[1, :9]],
        lambda X, folder: as_images(as_files(X, folder)),
    ],
)
def test_image_shape_without_rows_warns_in_fit(wrap, tmp_path):
    X, estimator = wrap(images(4), tmp_path), Estimator(image_shape=(20, 20))
    with pytest.warns(UserWarning, match=NO_EFFECT):
        check_images(estimator, X, reset=True)
    check_images(estimator, X, reset=False)


@pytest.mark.parametrize(
    "X",
    [
        images(4)[..., 0].reshape(4, -1),
        images(4)[..., 0].reshape(4, -1).tolist(),
        pd.DataFrame(images(4)[..., 0].reshape(4, -1)),
        pd.Series(list(images(4)[..., 0].reshape(4, -1))),
        images(4)[..., 0],
        list(images(4)[..., 0]),
        Items(images(4)[..., 0].reshape(4, -1)),
    ],
)
def test_image_shape_of_rows_does_not_warn(X):
    assert check_images(Estimator(image_shape=(20, 20)), X, reset=True)[0].shape == (20, 20, 3)
