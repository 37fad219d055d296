import numpy as np
import pytest
import torch
from helpers import Tiny, images
from torch import nn

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones import blocks
from sktransfer.backbones.blocks import assemble, register_blocks
from sktransfer.backbones.sources import SOURCES, LoadedNetwork, register_source


class ToyNetwork(nn.Module):
    """A network of one block unless it is registered, as its children do not compose to it."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 2)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


def load_toy(name, weights):
    """Build a `ToyNetwork` whose width is its name."""
    assert weights in ("default", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LoadedNetwork(f"toy{name}", ToyNetwork(int(name)), Tiny.preprocessing)


def split_toy(network):
    stem = nn.Sequential(network.first, nn.ReLU())
    pooling = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return assemble([("stem", stem), ("second", network.second)], pooling, network.head)


@pytest.fixture
def toy_source():
    """Register a source during a test."""
    register_source("toy", load_toy)
    yield
    del SOURCES["toy"]


@pytest.fixture
def toy_splitter():
    """Register a splitter during a test."""
    register_blocks(ToyNetwork, split_toy)
    yield
    del blocks._SPLITTERS[ToyNetwork]


def test_registered_source_loads_by_name(toy_source):
    extractor = PretrainedFeatureExtractor("toy:6", cache=None, device="cpu")
    embeddings = extractor.fit_transform(images(4))
    assert embeddings.shape == (4, 6)
    assert extractor.preprocessing_ == Tiny.preprocessing
    assert extractor.get_feature_names_out()[0] == "toy6_0"
    module = PretrainedFeatureExtractor(_toy_module(6), cache=None, device="cpu")
    np.testing.assert_allclose(embeddings, module.fit_transform(images(4)), rtol=1e-5, atol=1e-6)


def _toy_module(width):
    module = load_toy(str(width), None).model
    module.preprocessing = Tiny.preprocessing
    return module


def test_registered_splitter_splits_networks_of_its_class(toy_source, toy_splitter):
    extractor = PretrainedFeatureExtractor("toy:7", layer="stem", cache=None).fit(images(2))
    assert extractor.layers_ == ["stem", "second"]
    assert extractor.transform(images(2)).shape == (2, 7)
    whole = PretrainedFeatureExtractor(_toy_module(8), cache=None).fit(images(2))
    assert whole.layers_ == ["stem", "second"]


def test_subclass_that_computes_something_else_is_not_split_by_its_class(toy_splitter):
    class Other(ToyNetwork):
        def forward(self, x):
            return 2 * super().forward(x)

    assert blocks.split_known_into_blocks(ToyNetwork(4)) is not None
    assert blocks.split_known_into_blocks(Other(4)) is None


def test_unregistered_class_is_split_by_probing():
    extractor = PretrainedFeatureExtractor(_toy_module(9), cache=None).fit(images(2))
    assert extractor.layers_ == ["trunk"]


def test_unknown_name_lists_the_prefixes(toy_source):
    with pytest.raises(ValueError, match=r"list_backbones\(\) or 'timm:NAME', 'toy:NAME'"):
        PretrainedFeatureExtractor("toyz:6").fit(images(2))


def test_unregistered_source_is_unknown():
    with pytest.raises(ValueError, match="Got backbone='toy:5', but expected one of"):
        PretrainedFeatureExtractor("toy:5").fit(images(2))


@pytest.mark.parametrize("prefix", ["timm", "", "a:b"])
def test_register_source_rejects_invalid_prefixes(prefix):
    with pytest.raises(ValueError, match=f"Got the prefix '{prefix}', but expected a word"):
        register_source(prefix, load_toy)
