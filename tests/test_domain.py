import pytest
import torch
from tiny import Tiny, pictures
from torch import nn

from sktransfer.backbones import load_backbone
from sktransfer.domain import estimate_batch_norm, with_batch_norm

CPU = torch.device("cpu")


def batches(backbone, n=48, size=16):
    prepared = torch.stack([backbone.preprocessing.prepare(x) for x in pictures(n)])
    return prepared.split(size)


def test_statistics_are_the_average_over_the_batches_of_each_layer_in_turn():
    backbone = load_backbone(Tiny())
    state = estimate_batch_norm(backbone, batches(backbone), CPU)
    reference = Tiny().train()
    for layer in reference.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        for batch in batches(backbone):
            reference(backbone.preprocessing.normalize(batch))
    expected = [t for name, t in reference.state_dict().items() if "running" in name]
    assert len(expected) == len(state.statistics) == 4
    for got, wanted in zip(state.statistics.values(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_backbone_is_left_as_it_is_and_its_copy_has_another_digest():
    backbone = load_backbone(Tiny())
    parts = nn.ModuleList(block for _, block in backbone.anatomy.blocks)
    before = {name: t.clone() for name, t in parts.state_dict().items()}
    state = estimate_batch_norm(backbone, batches(backbone), CPU)
    adapted = with_batch_norm(backbone, state)
    assert all(torch.equal(before[name], t) for name, t in parts.state_dict().items())
    assert not any(module.training for part in parts for module in part.modules())
    assert adapted.digest != backbone.digest
    copied = nn.ModuleList(block for _, block in adapted.anatomy.blocks)
    assert not any(module.training for part in copied for module in part.modules())
    same = {n for n, t in copied.state_dict().items() if torch.equal(before[n], t)}
    changed = {n for n in before if "running" in n}
    assert changed == set(before) - same


def test_a_single_value_per_channel_has_no_variance():
    module = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()
    )
    backbone = load_backbone(module)
    with pytest.raises(ValueError, match="cannot estimate statistics from so few pictures"):
        estimate_batch_norm(backbone, [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], CPU)
