import pytest
import torch
from helpers import Tiny, images
from torch import nn

from sktransfer.adaptation.batch_norm import adapt_batch_norm, estimate_batch_norm, match_batch_norm
from sktransfer.backbones.batch_norm import with_batch_norm
from sktransfer.backbones.loading import load_backbone
from sktransfer.data.images import as_images
from sktransfer.transforms.loader import ImageErrors
from sktransfer.transforms.views import Views

CPU = torch.device("cpu")


def batches(backbone, n=48, size=16):
    prepared = torch.stack([backbone.preprocessing.prepare(x) for x in images(n)])
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


def test_a_single_value_per_channel_has_no_variance():
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
    """Give mean and variance, channel by channel, of what each BatchNorm layer gives."""
    found, hooks = [], []
    blocks = nn.Sequential(*(block for _, block in backbone.block_list.blocks))
    for layer in blocks.modules():
        if isinstance(layer, nn.BatchNorm2d):
            hooks.append(
                layer.register_forward_hook(
                    lambda layer, x, y: found.append([y.mean((0, 2, 3)), y.var((0, 2, 3))])
                )
            )
    with torch.no_grad():
        x = torch.stack([views.prepare(row) for row in range(len(views))])
        blocks(backbone.preprocessing.normalize(x))
    for hook in hooks:
        hook.remove()
    return found


def test_a_matched_target_looks_to_each_layer_as_the_source_does():
    backbone = load_backbone(Tiny())
    source, target = views(backbone, 32), views(backbone, 32, seed=1, light=0.4)
    state = match_batch_norm(backbone, source, target, CPU, 1)
    expected = moments(backbone, source)
    for adapted, matches in ((backbone, False), (with_batch_norm(backbone, state), True)):
        for ours, theirs in zip(expected, moments(adapted, target), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-4) == matches


def test_the_source_itself_matches_as_it_is():
    backbone = load_backbone(Tiny())
    one, other = (views(backbone, 80) for _ in range(2))  # in batches
    state = match_batch_norm(backbone, one, other, CPU, 2)
    parts = nn.ModuleList(block for _, block in backbone.block_list.blocks)
    learned = [t for name, t in parts.state_dict().items() if "running" in name]
    for found, expected in zip(state.statistics.values(), learned, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02)


def test_a_single_image_can_be_matched():
    backbone = load_backbone(Tiny())
    with pytest.warns(UserWarning, match="with 1 images of the target, too few to estimate"):
        state = match_batch_norm(backbone, views(backbone, 8), views(backbone, 1), CPU, 1)
    assert all(value.isfinite().all() for value in state.statistics.values())
    assert all((v >= 0).all() for name, v in state.statistics.items() if name.endswith("var"))


def test_backbone_without_batch_norm_is_refused():
    backbone = load_backbone(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(ValueError, match="has no BatchNorm layers to adapt"):
        match_batch_norm(backbone, views(backbone, 2), views(backbone, 2), CPU, 1)


class Pooled(nn.Module):
    """A map of one value a channel into BatchNorm; another BatchNorm that nothing goes through."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(nn.functional.adaptive_avg_pool2d(x, 1)))


@pytest.mark.parametrize("n", [33, 64, 65])
def test_no_image_is_left_alone_in_a_batch(n):
    backbone = load_backbone(nn.Sequential(Pooled(), nn.Flatten()))
    views = Views(as_images(images(n)), backbone.preprocessing)
    state = adapt_batch_norm(backbone, views, CPU, 1, ImageErrors("raise"))
    assert all(each.isfinite().all() for each in state.statistics.values())


def test_a_layer_that_nothing_goes_through_keeps_its_statistics():
    backbone = load_backbone(nn.Sequential(Pooled(), nn.Flatten()))
    source, target = (
        Views(as_images(images(12, seed=seed)), backbone.preprocessing) for seed in (0, 1)
    )
    found = match_batch_norm(backbone, source, target, CPU, 1).statistics
    unused = {name: each for name, each in found.items() if "unused" in name}
    assert sorted(float(each.mean()) for each in unused.values()) == [0, 1]
    assert any(each.mean() not in (0, 1) for name, each in found.items() if name not in unused)


@pytest.mark.parametrize("n", [34, 40, 70])
def test_each_image_counts_the_same(n):
    backbone = load_backbone(Tiny())
    views = Views(as_images(images(n)), backbone.preprocessing)
    state = adapt_batch_norm(backbone, views, CPU, 1, ImageErrors("raise"))
    x = torch.stack([views.prepare(item) for item in range(n)])
    with torch.no_grad():
        maps = Tiny()[0][0](backbone.preprocessing.normalize(x))
    mean = next(each for name, each in state.statistics.items() if "running_mean" in name)
    # Batches differ by one image at most.
    torch.testing.assert_close(mean, maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_a_target_of_few_images_is_warned_of():
    backbone = load_backbone(Tiny())
    source, target = (Views(as_images(images(n)), backbone.preprocessing) for n in (20, 9))
    with pytest.warns(UserWarning, match="Got batch_norm='adapt' with 9 images of the target"):
        match_batch_norm(backbone, source, target, CPU, 1)
