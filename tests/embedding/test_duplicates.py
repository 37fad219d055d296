"""Duplicates are found by embeddings and thumbnails, and a fit warns of them."""

import numpy as np
import pytest
import torch
from duplicate_helpers import COPIES, TILES, tile
from helpers import Tiny

from sktransfer import FineTunedImageClassifier
from sktransfer.data.images import as_images
from sktransfer.embedding.duplicates import EmbeddedImages, find_pairs, match


def test_find_pairs_returns_alike_images():
    """Embeddings of two shots of a scene: the cosine is high, the correlation of pixels is not."""
    images = as_images([TILES[0], TILES[3]])
    embeddings = np.array([[1.0, 0.0], [0.97, 0.2431]])
    pairs = find_pairs(EmbeddedImages(images, embeddings))
    assert pairs.rows.tolist() == [[0, 1]]
    assert pairs.cosines[0] == pytest.approx(0.97, abs=1e-3)
    assert pairs.correlations[0] < 0.9


def test_find_pairs_connects_many_copies():
    embeddings = np.ones((130, 4), dtype=np.float32)
    pairs = find_pairs(EmbeddedImages(as_images([TILES[0]] * 130), embeddings))
    assert {*pairs.rows.ravel().tolist()} == {*range(130)}


def test_match_does_not_match_blank_images():
    blank = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    noise = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert match(blank, noise).correlations.abs().max() < 1e-3
    assert match(blank, blank).correlations.abs().max() < 1e-3


def fit(validation):
    classifier = FineTunedImageClassifier(Tiny, unfreeze=(0,), n_views=1, cache=None)
    return classifier.fit(
        TILES[:12], [0, 1] * 6, X_val=validation, y_val=np.arange(len(validation)) % 2
    )


@pytest.mark.parametrize("copy", COPIES)
def test_fit_warns_of_validation_copies_of_training_images(copy):
    change, _ = COPIES[copy]
    copies = [np.asarray(change(tile(number))) for number in (2, 3)]
    message = (
        "Got 2 validation images that are copies of training images, so validation scores are too "
        "optimistic. Use find_leaks to list such pairs, and its groups to keep them on the same "
        "side of a split"
    )
    with pytest.warns(UserWarning, match=f"^{message}$"):
        fit([*TILES[12:], *copies])


def test_fit_names_the_files_of_a_leak(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(16)]
    for number, path in enumerate(paths):
        tile(number).save(path)
    copy = str(tmp_path / "copy.png")
    tile(2).save(copy)
    labels = [0, 1] * 6
    classifier = FineTunedImageClassifier(Tiny, unfreeze=(0,), n_views=1, cache=None)
    with pytest.warns(UserWarning, match=f"such as {copy} of {paths[2]}, so validation"):
        classifier.fit(paths[:12], labels, X_val=[paths[12], copy], y_val=[0, 1])


def test_fit_does_not_warn_of_distinct_validation_images():
    fit(TILES[12:])


def test_fit_does_not_warn_of_small_validation_images():
    scans = [np.asarray(tile(number).resize((40, 35))) for number in (2, 3)]
    fit([*scans, *TILES[12:]])
