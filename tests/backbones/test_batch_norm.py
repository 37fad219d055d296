import numpy as np
import pytest
import torch
from helpers import Tiny
from torch import nn

from sktransfer.backbones.batch_norm import (
    BatchNormState,
    batch_norms,
    check_batch_norm,
    named_statistics,
    with_batch_norm,
)
from sktransfer.backbones.loading import load_backbone
from sktransfer.backbones.weights import to_arrays


def test_batch_norms_are_listed_with_block_and_layer():
    block_list = load_backbone(Tiny()).block_list
    layers = dict(batch_norms(block_list))
    assert list(layers) == ["0.1", "1.1"]
    assert all(isinstance(layer, nn.BatchNorm2d) for layer in layers.values())
    assert [name for name, _ in named_statistics(block_list)] == [
        f"{layer}.running_{kind}" for layer in ("0.1", "1.1") for kind in ("mean", "var")
    ]


def test_batch_norms_leave_out_layers_without_statistics():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()]
    assert dict(batch_norms(load_backbone(nn.Sequential(*layers)).block_list)) == {}


def test_with_batch_norm_sets_the_statistics_of_a_frozen_copy():
    backbone = load_backbone(Tiny())
    before = {name: value.clone() for name, value in named_statistics(backbone.block_list)}
    state = BatchNormState(to_arrays({name: value + 1 for name, value in before.items()}))
    adapted = with_batch_norm(backbone, state)
    for name, value in named_statistics(adapted.block_list):
        np.testing.assert_array_equal(value, state.statistics[name])
    for name, value in named_statistics(backbone.block_list):
        assert torch.equal(value, before[name])
    assert adapted.digest not in (backbone.digest, with_batch_norm(adapted, state).digest)
    assert with_batch_norm(backbone, state) is adapted
    for _, block in adapted.block_list.blocks:
        assert not any(module.training for module in block.modules())
        assert not any(parameter.requires_grad for parameter in block.parameters())


def test_check_batch_norm_rejects_a_backbone_without_batch_norm():
    check_batch_norm(load_backbone(Tiny()))
    bare = load_backbone(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(ValueError, match=r"sequential has no BatchNorm layers.*'frozen'"):
        check_batch_norm(bare)
