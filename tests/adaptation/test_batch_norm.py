import numpy as np
import pytest
import torch
from helpers import Tiny, images
from torch import nn

from sktransfer.adaptation.batch_norm import adapt_batch_norm, estimate_batch_norm, match_batch_norm
from sktransfer.backbones.batch_norm import with_batch_norm
from sktransfer.backbones.loading import load_backbone
from sktransfer.backbones.weights import to_tensors
from sktransfer.data.images import as_images
from sktransfer.transforms.loader import ImageErrors
from sktransfer.transforms.views import Views

CPU = torch.device("cpu")


def batches(backbone, n=48, size=16):
    prepared = torch.stack([backbone.preprocessing.prepare(x) for x in images(n)])
    return prepared.split(size)


def test_estimate_batch_norm_averages_over_batches_layer_by_layer():
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
    got_values = to_tensors(state.statistics).values()
    for got, reference_value in zip(got_values, expected, strict=True):
        torch.testing.assert_close(got, reference_value)


def test_with_batch_norm_leaves_the_backbone_and_changes_the_digest():
    backbone = load_backbone(Tiny())
    parts = nn.ModuleList(block for _, block in backbone.block_list.blocks)
    before = {name: t.clone() for name, t in parts.state_dict().items()}
    state = estimate_batch_norm(backbone, batches(backbone), CPU)
    adapted = with_batch_norm(backbone, state)
    assert all(torch.equal(before[name], t) for name, t in parts.state_dict().items())
    assert not any(module.training for part in parts for module in part.modules())
    assert adapted.digest != backbone.digest
    copied = nn.ModuleList(block for _, block in adapted.block_list.blocks)
    assert not any(module.training for part in copied for module in part.modules())
    same = {n for n, t in copied.state_dict().items() if torch.equal(before[n], t)}
    changed = {n for n in before if "running" in n}
    assert changed == set(before) - same


def test_estimate_batch_norm_rejects_a_single_value_per_channel():
    module = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()
    )
    backbone = load_backbone(module)
    with pytest.raises(ValueError, match="too few images to estimate BatchNorm statistics"):
        estimate_batch_norm(backbone, [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], CPU)


# Two domains


def views(backbone, n, seed=0, light=1.0):
    taken = [(light * image).astype("uint8") for image in images(n, seed=seed)]
    return Views(as_images(taken), backbone.preprocessing)


def moments(backbone, views):
    """Return mean and variance of each channel in the output of each BatchNorm layer."""
    outputs, hooks = [], []
    blocks = nn.Sequential(*(block for _, block in backbone.block_list.blocks))
    for layer in blocks.modules():
        if isinstance(layer, nn.BatchNorm2d):
            hooks.append(
                layer.register_forward_hook(
                    lambda layer, x, y: outputs.append([y.mean((0, 2, 3)), y.var((0, 2, 3))])
                )
            )
    with torch.no_grad():
        x = torch.stack([views.prepare(row) for row in range(len(views))])
        blocks(backbone.preprocessing.normalize(x))
    for hook in hooks:
        hook.remove()
    return outputs


def test_matched_target_has_the_moments_of_the_source():
    backbone = load_backbone(Tiny())
    source, target = views(backbone, 32), views(backbone, 32, seed=1, light=0.4)
    state = match_batch_norm(backbone, source, target, CPU, 1)
    expected = moments(backbone, source)
    for adapted, matches in ((backbone, False), (with_batch_norm(backbone, state), True)):
        for source_moments, target_moments in zip(expected, moments(adapted, target), strict=True):
            for source_moment, target_moment in zip(source_moments, target_moments, strict=True):
                assert torch.allclose(source_moment, target_moment, rtol=1e-3, atol=1e-4) == matches


def test_matching_the_source_to_itself_keeps_the_statistics():
    backbone = load_backbone(Tiny())
    source, target = (views(backbone, 80) for _ in range(2))  # more than one batch
    state = match_batch_norm(backbone, source, target, CPU, 2)
    parts = nn.ModuleList(block for _, block in backbone.block_list.blocks)
    learned = [t for name, t in parts.state_dict().items() if "running" in name]
    for value, expected in zip(to_tensors(state.statistics).values(), learned, strict=True):
        torch.testing.assert_close(value, expected, rtol=0.1, atol=0.02)


def test_match_batch_norm_accepts_a_single_image_with_a_warning():
    backbone = load_backbone(Tiny())
    with pytest.warns(UserWarning, match="with 1 images of the target, too few to estimate"):
        state = match_batch_norm(backbone, views(backbone, 8), views(backbone, 1), CPU, 1)
    assert all(np.isfinite(value).all() for value in state.statistics.values())
    assert all((v >= 0).all() for name, v in state.statistics.items() if name.endswith("var"))


def test_match_batch_norm_rejects_a_backbone_without_batch_norm():
    backbone = load_backbone(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(ValueError, match="has no BatchNorm layers to adapt"):
        match_batch_norm(backbone, views(backbone, 2), views(backbone, 2), CPU, 1)


class Pooled(nn.Module):
    """A BatchNorm with one value per channel and image, and another one that is never run."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(nn.functional.adaptive_avg_pool2d(x, 1)))


@pytest.mark.parametrize("n", [33, 64, 65])
def test_adapt_batch_norm_makes_no_batch_of_one_image(n):
    backbone = load_backbone(nn.Sequential(Pooled(), nn.Flatten()))
    views = Views(as_images(images(n)), backbone.preprocessing)
    state = adapt_batch_norm(backbone, views, CPU, 1, ImageErrors("raise"))
    assert all(np.isfinite(value).all() for value in state.statistics.values())


def test_match_batch_norm_keeps_the_statistics_of_unused_layers():
    backbone = load_backbone(nn.Sequential(Pooled(), nn.Flatten()))
    source, target = (
        Views(as_images(images(12, seed=seed)), backbone.preprocessing) for seed in (0, 1)
    )
    statistics = match_batch_norm(backbone, source, target, CPU, 1).statistics
    unused = {name: value for name, value in statistics.items() if "unused" in name}
    assert sorted(float(value.mean()) for value in unused.values()) == [0, 1]
    assert any(
        value.mean() not in (0, 1) for name, value in statistics.items() if name not in unused
    )


@pytest.mark.parametrize("n", [34, 40, 70])
def test_adapt_batch_norm_weighs_images_equally(n):
    backbone = load_backbone(Tiny())
    views = Views(as_images(images(n)), backbone.preprocessing)
    state = adapt_batch_norm(backbone, views, CPU, 1, ImageErrors("raise"))
    x = torch.stack([views.prepare(item) for item in range(n)])
    with torch.no_grad():
        maps = Tiny()[0][0](backbone.preprocessing.normalize(x))
    statistics = to_tensors(state.statistics)
    mean = next(value for name, value in statistics.items() if "running_mean" in name)
    # The batches differ by at most one image.
    torch.testing.assert_close(mean, maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_match_batch_norm_warns_of_few_target_images():
    backbone = load_backbone(Tiny())
    source, target = (Views(as_images(images(n)), backbone.preprocessing) for n in (20, 9))
    with pytest.warns(UserWarning, match="Got batch_norm='adapt' with 9 images of the target"):
        match_batch_norm(backbone, source, target, CPU, 1)
