import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision.models as tvm
from helpers import Tiny
from safetensors.torch import save_file
from torch import nn

from sktransfer.backbones import loading as backbones
from sktransfer.backbones.loading import Backbone, load_backbone
from sktransfer.backbones.torchvision_blocks import (
    build_on_meta,
    list_torchvision,
    split_into_blocks,
    torchvision_weights,
)
from sktransfer.data.images import as_images
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import WeightsNotFoundError


def names(backbone):
    return [name for name, _ in backbone.block_list.blocks]


def test_named_backbone_is_loaded_once_per_process():
    assert load_backbone("efficientnet_lite0") is load_backbone("efficientnet_lite0")
    assert load_backbone("resnet18", None) is not load_backbone("efficientnet_lite0")


def test_loaded_backbone_is_frozen():
    for _, block in load_backbone("efficientnet_lite0").block_list.blocks:
        assert not any(module.training for module in block.modules())
        assert not any(parameter.requires_grad for parameter in block.parameters())


def test_random_weights_are_reproducible_and_have_their_own_digest():
    first = load_backbone("mobilenet_v3_small", None)
    backbones._backbones.clear()
    second = load_backbone("mobilenet_v3_small", None)
    assert second is not first
    assert second.digest == first.digest != load_backbone("mobilenet_v3_large", None).digest


def test_module_is_copied_and_identified_by_its_content():
    module = Tiny()
    backbone = load_backbone(module)
    assert load_backbone(copy.deepcopy(module)) is backbone
    module[1][1].running_mean += 1  # the digest covers buffers too
    changed = load_backbone(module)
    assert changed.digest != backbone.digest
    blocks = dict(backbone.block_list.blocks)
    assert not any(block is module[0] for block in blocks.values())


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.layer = nn.Linear(3, 2)
        nn.init.ones_(self.layer.weight)
        nn.init.ones_(self.layer.bias)

    def forward(self, x):
        return self.layer(self.factor * x.mean((2, 3)))


class ScaledTwice(Scaled):
    def forward(self, x):
        return self.layer(2 * self.factor * x.mean((2, 3)))


def test_module_digest_covers_code_and_settings():
    digests = [load_backbone(m).digest for m in (Scaled(1.0), Scaled(2.0), ScaledTwice(1.0))]
    assert len(set(digests)) == 3
    assert load_backbone(Scaled(1.0)).digest == digests[0]


def test_module_may_define_its_preprocessing():
    assert load_backbone(Tiny()).preprocessing is Tiny.preprocessing
    assert load_backbone(Scaled(1.0)).preprocessing == Preprocessing()
    module = Scaled(1.0)
    module.preprocessing = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
    assert load_backbone(module).preprocessing is module.preprocessing
    assert load_backbone(module).digest != load_backbone(Scaled(1.0)).digest


def test_fine_tuned_torchvision_network_keeps_its_blocks():
    network = tvm.resnet18(weights=None, num_classes=4)
    backbone = load_backbone(network)
    assert names(backbone) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert backbone.block_list.logits(torch.zeros(1, 512, 7, 7)).shape == (1, 4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded_from_a_file(tmp_path, suffix):
    state = {name: t + 1 for name, t in Tiny().state_dict().items()}
    path = tmp_path / f"tiny{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    plain, loaded = load_backbone(Tiny), load_backbone(Tiny, path)
    assert plain.digest != loaded.digest
    plain_block, loaded_block = plain.block_list.blocks[0][1], loaded.block_list.blocks[0][1]
    expected = next(plain_block.parameters()) + 1
    torch.testing.assert_close(next(loaded_block.parameters()), expected)


def test_changed_weights_file_is_read_again(tmp_path):
    path = tmp_path / "lite.pth"
    state = tvm.squeezenet1_1(weights=None).state_dict()
    torch.save(state, path)
    before = load_backbone("squeezenet1_1", path)
    assert load_backbone("squeezenet1_1", str(path)) is before
    torch.save({name: t * 2 for name, t in state.items()}, path)
    assert load_backbone("squeezenet1_1", path).digest != before.digest


def test_weights_file_of_another_network_is_rejected(tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save(Tiny().state_dict(), path)
    with pytest.raises(ValueError, match="resnet18"):
        load_backbone("resnet18", path)


@pytest.mark.parametrize(
    ("backbone", "weights", "error", "message"),
    [
        ("resnet5O", "default", ValueError, "Got backbone='resnet5O'.*did you mean 'resnet50'"),
        ("lite1", "default", ValueError, r"expected one of list_backbones\(\) or 'timm:NAME'"),
        (
            "efficientnet_lit1",
            "default",
            ValueError,
            "Got backbone='efficientnet_lit1'.*did you mean 'efficientnet_lite1'",
        ),
        (3, "default", TypeError, "Got backbone=3, but expected a name"),
        (lambda: 3, "default", TypeError, "which built a int, but expected a torch.nn.Module"),
        ("resnet50", "IMAGENET1K_V3", ValueError, "Got weights='IMAGENET1K_V3', but expected one"),
        ("resnet50", 7, TypeError, "Got weights=7, but expected 'default', a torchvision name"),
        ("resnet50", "gone.pth", WeightsNotFoundError, r"there is no such file \(looked in "),
        ("efficientnet_lite0", "V1", ValueError, "expected 'default' or the path of"),
        (Tiny, None, ValueError, "Got weights=None for the backbone 'tiny', but expected"),
    ],
)
def test_invalid_backbone_or_weights_are_rejected(backbone, weights, error, message):
    with pytest.raises(error, match=message):
        load_backbone(backbone, weights)


def test_vision_transformer_is_preprocessed_at_its_own_size(tmp_path):
    network = tvm.VisionTransformer(64, 16, 1, 3, 768, 1536)
    assert load_backbone(network).preprocessing.crop == (64, 64)


def test_module_is_loaded_by_several_threads_at_once():
    """Without a lock, two threads that parse code at the same time fail on Python 3.11."""
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_backbone(Tiny), range(40)))
    assert len({backbone.digest for backbone in loaded}) == 1


PHOTOGRAPHS = as_images([np.zeros((75, 90, 3), dtype=np.uint8)] * 3)
THUMBNAILS = as_images([np.zeros((55, 80, 3), dtype=np.uint8)] * 3)


def pretrained(name):
    """Load a network with random values, marked as pretrained."""
    return dataclasses.replace(load_backbone(name, None), pretrained=True)


@pytest.mark.parametrize(
    ("name", "size", "of_thumbnails"),
    [
        ("efficientnet_lite0", (288, 288), (96, 96)),
        ("resnet18", (288, 288), (96, 96)),
        ("inception_v3", (384, 384), (128, 128)),
        ("resnet50", None, None),  # its newer weights were trained for their size
        ("vit_b_32", None, None),
    ],
)
def test_auto_image_size_fits_weights_of_standard_training(name, size, of_thumbnails):
    backbone = pretrained(name)
    assert backbone.image_size_for("auto", PHOTOGRAPHS) == size
    assert backbone.image_size_for("auto", THUMBNAILS) == of_thumbnails
    for requested in (None, 64, (64, 96)):
        assert backbone.image_size_for(requested, PHOTOGRAPHS) == requested


@pytest.mark.parametrize(("side", "size"), [(55, 96), (56, 288)])
def test_auto_image_size_depends_on_the_shorter_side_of_most_images(side, size):
    X = [np.zeros((side, 80, 3), np.uint8)] * 3 + [np.zeros((111 - side, 80, 3), np.uint8)]
    assert pretrained("resnet18").image_size_for("auto", as_images(X)) == (size, size)


def test_auto_image_size_applies_only_to_pretrained_weights():
    assert load_backbone("efficientnet_lite0").pretrained
    for backbone in (load_backbone("resnet18", None), load_backbone(Tiny)):
        assert not backbone.pretrained
        assert backbone.image_size_for("auto", PHOTOGRAPHS) is None


def test_unknown_word_for_image_size_is_rejected():
    message = "Got image_size='large', but expected a side in pixels such as 224"
    with pytest.raises(ValueError, match=message):
        load_backbone(Tiny).image_size_for("large", PHOTOGRAPHS)


@pytest.mark.slow
@pytest.mark.parametrize("images", [PHOTOGRAPHS, THUMBNAILS], ids=["photographs", "thumbnails"])
def test_auto_image_size_is_accepted_by_every_network(images):
    sizes = {}
    for name in list_torchvision():
        member = torchvision_weights(name, "default")
        block_list = split_into_blocks(build_on_meta(name))
        preprocessing = Preprocessing.from_torchvision(member.transforms())
        backbone = Backbone(name, block_list, preprocessing, b"", lambda: None, pretrained=True)
        size = backbone.image_size_for("auto", images)
        if size is not None:
            x = torch.empty(1, 3, *size, device="meta")
            for _, block in block_list.blocks:
                x = block.to("meta")(x)
            sizes[name] = block_list.logits(x).shape[1]
    assert set(sizes.values()) == {1000}
    assert len(sizes) > 20
