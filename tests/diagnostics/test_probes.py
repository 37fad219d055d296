import numpy as np
import pytest
from helpers import images
from sklearn.base import clone

from sktransfer.data.images import as_images
from sktransfer.diagnostics.probes import make_probe, mean_interclass_cosine, measure
from sktransfer.embedding.duplicates import EmbeddedImages


def test_mean_interclass_cosine_weighs_classes_equally():
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(50, 8)) + 3, rng.normal(size=(4, 8)) - 3
    embeddings, codes = np.concatenate([large, small]), np.repeat([0, 1], [50, 4])
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert mean_interclass_cosine(embeddings, codes) == pytest.approx(
        (unit[:50] @ unit[50:].T).mean()
    )
    assert mean_interclass_cosine(np.zeros((2, 3)), np.array([0, 1])) == 0


def test_probe_does_not_depend_on_the_length_of_embeddings():
    rng = np.random.default_rng(0)
    codes = np.arange(40) % 2
    embeddings = rng.normal(size=(40, 6)) + codes[:, None]
    lengths = rng.uniform(0.1, 10, size=(40, 1))
    probabilities = [
        clone(make_probe()).fit(rows, codes).predict_proba(embeddings)
        for rows in (embeddings, lengths * embeddings)
    ]
    np.testing.assert_allclose(*probabilities, rtol=1e-6)


def test_measure_separates_embeddings_from_pixels():
    """Embeddings that hold the class score 1, random pixels score about as well as guessing."""
    codes = np.arange(40) % 2
    embeddings = np.eye(2)[codes] + 0.01
    splits = [(np.arange(20), np.arange(20, 40)), (np.arange(20, 40), np.arange(20))]
    X = images(40, side=20)
    X[:10] = X[:10, :, :, :1]  # gray
    results = measure(EmbeddedImages(as_images(X), embeddings), codes, splits, seed=0, threads=1)
    assert (results.accuracy, results.spread, results.neighbor) == (1, 0, 1)
    assert results.pixels < 0.8
    assert results.curve == ((4, 1), (10, 1), (20, 1))
    assert results.n_images == 40
    assert results.side == (20, 20, 20)
    assert results.gray == 0.25
