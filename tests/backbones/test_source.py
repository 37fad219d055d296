import dataclasses

import pytest
import torch
from helpers import Tiny

from sktransfer.backbones.batch_norm import BatchNormState, named_statistics
from sktransfer.backbones.loading import load_backbone
from sktransfer.backbones.source import BackboneSource
from sktransfer.backbones.weights import to_arrays


def source_of(module, **fields):
    defaults = {"weights": "default", "image_size": None, "batch_norm": None}
    return BackboneSource(module, digest=load_backbone(module).digest, **{**defaults, **fields})


def test_source_loads_the_backbone_that_fit_saw():
    module = Tiny()
    assert source_of(module).load() is load_backbone(module)


def test_source_rejects_weights_changed_since_fit():
    module = Tiny()
    source = source_of(module)
    with torch.no_grad():
        module[0][0].weight += 1
    with pytest.raises(ValueError, match="Got weights of tiny with digest") as error:
        source.load()
    assert str(error.value).endswith("Call fit again, or restore them")
    assert source.digest.hex() in str(error.value)


def test_source_loads_adapted_batch_norm():
    backbone = load_backbone(Tiny())
    statistics = {name: value + 1 for name, value in named_statistics(backbone.block_list)}
    source = source_of(Tiny(), batch_norm=BatchNormState(to_arrays(statistics)))
    loaded = dict(named_statistics(source.load().block_list))
    assert all(torch.equal(loaded[name], value) for name, value in statistics.items())


def test_source_applies_the_image_size():
    source = source_of(Tiny(), image_size=(24, 40))
    assert source.preprocessing_of(source.load()).crop == (24, 40)
    default = dataclasses.replace(source, image_size=None)
    assert default.preprocessing_of(default.load()) == Tiny.preprocessing
