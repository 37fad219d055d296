"""The extractor runs every classification network of torchvision."""

import gc

import numpy as np
import pytest
from helpers import cosine
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones import loading as backbones
from sktransfer.backbones.catalogue import list_backbones
from sktransfer.backbones.torchvision_blocks import list_torchvision
from sktransfer.embedding import embed as features

LARGE = 4e6  # parameters; random values for more of them take seconds

ROWS = {row.name: row for row in list_backbones()}


def size(name):
    """Return the smallest image size that the architecture accepts, to save time."""
    if name.startswith(("vit", "maxvit")):
        return None
    return 96 if name.startswith("inception") else 64


def parameters():
    for name in list_torchvision():
        marks = [pytest.mark.slow] if ROWS[name].parameters > LARGE else []
        yield pytest.param(name, marks=marks)


@pytest.fixture(autouse=True)
def _forget_networks():
    yield
    features._engines.clear()
    backbones._backbones.clear()
    gc.collect()


@pytest.mark.parametrize("name", list(parameters()))
def test_backbone_embeds_single_images_and_batches_equally(name):
    china, flower = load_sample_images().images
    X = [china, flower[:300, :300], china[100:]]
    extractor = PretrainedFeatureExtractor(
        name, weights=None, image_size=size(name), precision="float32", cache=None
    )
    together = extractor.fit_transform(X)
    assert together.shape == (3, ROWS[name].features)
    assert len(extractor.get_feature_names_out()) == together.shape[1]
    assert np.isfinite(together).all()
    alone = np.concatenate([extractor.transform([x]) for x in X])
    assert cosine(alone, together).min() >= 0.9999
    assert not np.array_equal(together[0], together[1])
