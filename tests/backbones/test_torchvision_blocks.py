"""The blocks of every torchvision network compose to the network."""

import copy
import re

import pytest
import torch
import torchvision
from block_helpers import assert_equal, check_block_list, fill, random_state, run, two_images
from torch import nn
from torchvision import models

from sktransfer.backbones.efficientnet_lite import efficientnet_lite
from sktransfer.backbones.torchvision_blocks import (
    build_on_meta,
    build_torchvision,
    list_torchvision,
    split_into_blocks,
    torchvision_weights,
    weights_name,
)

# Image sizes that keep a network fast, if not 64.
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 28}
LARGE = 3e7  # parameters; random values for more of them take up to seconds


def is_large(name):
    return torchvision_weights(name, "default").meta["num_params"] > LARGE


def build(name):
    size = SIZES.get(name, 32 if name.startswith("vit") else 64)
    options = {"image_size": size} if name.startswith("vit") else {}
    network = build_torchvision(name, state_dict=random_state(build_on_meta(name, **options)))
    return network.eval(), two_images(size)


# Every network of torchvision ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * is_large(n)) for n in list_torchvision()]
)
def test_blocks_compose_to_the_network(name):
    network, x = build(name)
    assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))
    block_list, last = check_block_list(network, x)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        vector, logits = block_list.pre_logits(last), block_list.logits(last)
        if name.startswith("squeezenet"):
            assert vector.shape == (2, 512)
        else:
            assert vector.shape == (2, layers[-1].in_features)
            assert_equal(layers[-1](vector), logits)
    assert block_list.layout == {"swin": "NHWC", "vit": "NLC"}.get(name.split("_")[0], "NCHW")
    assert block_list.prefix_tokens == (1 if name.startswith("vit") else 0)
    assert block_list.image_size == (x.shape[-1] if name.startswith(("vit", "maxvit")) else None)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("alexnet", "conv1 conv2 conv3 conv4 conv5"),
        ("densenet121", "stem denseblock1 denseblock2 denseblock3 denseblock4"),
        ("mnasnet1_0", "stem stack1 stack2 stack3 stack4 stack5 stack6 conv_head"),
        ("resnet50", "stem layer1 layer2 layer3 layer4"),
        ("shufflenet_v2_x1_0", "stem stage2 stage3 stage4 conv5"),
        ("squeezenet1_0", "stem fire2 fire3 fire4 fire5 fire6 fire7 fire8 fire9"),
        ("swin_t", "stem stage1 stage2 stage3 stage4"),
        ("vgg16", "stage1 stage2 stage3 stage4 stage5"),
        ("vit_b_16", "stem " + " ".join(f"encoder_layer_{i}" for i in range(12))),
    ],
)
def test_blocks_have_their_conventional_names(name, blocks):
    assert [block for block, _ in split_into_blocks(build_on_meta(name)).blocks] == blocks.split()


def test_efficientnet_lite_is_split_after_every_block():
    block_list, last = check_block_list(
        fill(efficientnet_lite("efficientnet_lite0")), two_images(64)
    )
    names = [name for name, _ in block_list.blocks]
    assert names == ["stem", *(f"block{i}" for i in range(16)), "conv_head"]
    assert block_list.pre_logits(last).shape == (2, 1280)


@pytest.mark.parametrize("name", ["vgg19", "vit_h_14", "swin_v2_b", "regnet_y_128gf"])
def test_build_on_meta_takes_no_memory_and_no_random_numbers(name):
    before = torch.get_rng_state()
    network = build_on_meta(name)
    real = [t for t in (*network.parameters(), *network.buffers()) if not t.is_meta]
    assert sum(t.numel() for t in network.parameters()) > 5e7
    assert sum(t.numel() for t in real) < 1e6
    assert torch.equal(torch.get_rng_state(), before)


# Random weights and published ones ------------------------------------------------------------


@pytest.mark.slow_cases("googlenet", "inception_v3", "vit_b_32")
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3", "vit_b_32", "swin_t"])
def test_random_weights_depend_only_on_the_seed(name):
    options = {"image_size": 64} if name == "vit_b_32" else {}
    before = torch.get_rng_state()
    first, same, different = (build_torchvision(name, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    state = same.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    state = different.state_dict()
    assert not all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    block_list = split_into_blocks(first.eval())
    with torch.no_grad():
        vectors = block_list.pre_logits(run(block_list.blocks, two_images(SIZES.get(name, 64))))
    assert vectors.isfinite().all()
    assert (vectors[0] - vectors[1]).abs().max() > 1e-2 * vectors.abs().max()


def old_dense_keys(key):
    return re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key)


def old_vit_keys(key):
    return key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")


def same_key(key):
    return key


AS_PUBLISHED = {"transform_input": True, "init_weights": False}


@pytest.mark.parametrize(
    ("name", "options", "old_key"),
    [
        ("resnet18", {}, same_key),
        ("resnet18", {"num_classes": 7}, same_key),
        ("densenet121", {}, old_dense_keys),
        ("mnasnet0_5", {}, same_key),
        ("googlenet", {**AS_PUBLISHED, "aux_logits": True}, same_key),
        ("inception_v3", AS_PUBLISHED, same_key),
        ("squeezenet1_1", {"num_classes": 3}, same_key),
        ("vit_b_32", {"image_size": 64, "num_classes": 5}, old_vit_keys),
    ],
)  # fmt: skip
@torch.no_grad()
def test_build_torchvision_loads_published_state_dicts(name, options, old_key):
    expected = fill(torchvision.models.get_model(name, weights=None, **options))
    state = {old_key(key): value.clone() for key, value in expected.state_dict().items()}
    network = build_torchvision(name, state_dict=state)
    x = two_images(96 if name == "inception_v3" else 64)
    torch.testing.assert_close(network.eval()(x), expected.eval()(x))
    assert all(parameter.requires_grad for parameter in network.parameters())
    check_block_list(network, x)


def test_build_torchvision_shares_tensors_and_converts_to_float32():
    state = random_state(build_on_meta("squeezenet1_1"))
    state["features.0.bias"] = state["features.0.bias"].half()
    network = build_torchvision("squeezenet1_1", state_dict=state)
    assert network.features[0].weight.data_ptr() == state["features.0.weight"].data_ptr()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_build_torchvision_leaves_the_state_dict_metadata_unchanged():
    state = build_torchvision("mnasnet0_5").state_dict()
    before = copy.deepcopy(state._metadata)
    build_torchvision("mnasnet0_5", state_dict=state)
    assert state._metadata == before


def test_weights_of_another_network_are_rejected():
    state = random_state(build_on_meta("resnet18"))
    with pytest.raises(
        ValueError, match="Got weights that do not fit resnet34: Missing key"
    ) as error:
        build_torchvision("resnet34", state_dict=state)
    assert '"layer1.2.conv1.weight"' in str(error.value)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="Got weights that do not fit vit_b_16"):
        build_torchvision("vit_b_16", state_dict=state)


def test_torchvision_weights_are_found_by_name():
    members = torchvision.models.ResNet50_Weights
    assert torchvision_weights("resnet50", "default") is members.DEFAULT
    assert torchvision_weights("resnet50", "IMAGENET1K_V1") is members.IMAGENET1K_V1
    with pytest.raises(ValueError, match="weights") as error:
        torchvision_weights("resnet50", "IMAGENET1K_V3")
    assert str(error.value) == (
        "Got weights='IMAGENET1K_V3', but expected one of 'default', 'IMAGENET1K_V1', "
        "'IMAGENET1K_V2', None; did you mean 'IMAGENET1K_V2'?"
    )


@pytest.mark.parametrize("function", [torchvision_weights, build_on_meta, build_torchvision])
def test_unknown_names_are_rejected(function):
    with pytest.raises(ValueError, match="resnet5O") as error:
        function("resnet5O")
    count = len(list_torchvision())
    assert str(error.value) == (
        f"Got backbone='resnet5O', but expected one of torchvision's {count} classification "
        "networks; did you mean 'resnet50'?"
    )


# Networks with another head -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "width"),
    [
        ("resnet18", nn.Sequential(nn.Dropout(), nn.Linear(512, 9), nn.ReLU(), nn.Linear(9, 3)), 9),
        ("resnet18", nn.Identity(), 512),
        ("mobilenet_v2", nn.Linear(1280, 3), 1280),
        ("vgg11", nn.Sequential(nn.Linear(25088, 4), nn.LogSoftmax(1)), 25088),
    ],
)
def test_fine_tuned_network_keeps_its_blocks(name, head, width):
    network, x = build(name)
    blocks = [block for block, _ in split_into_blocks(network).blocks]
    head = copy.deepcopy(head)
    setattr(network, "fc" if name == "resnet18" else "classifier", head)
    block_list, last = check_block_list(network, x)
    assert [block for block, _ in block_list.blocks] == blocks
    assert block_list.pre_logits(last).shape == (2, width)


@torch.no_grad()
def test_copied_block_list_shares_its_parameters():
    network, x = build("resnet18")
    block_list = copy.deepcopy(split_into_blocks(network))
    assert_equal(block_list.logits(run(block_list.blocks, x)), network(x))
    assert set(block_list.pre_logits.parameters()) <= set(block_list.logits.parameters())


@pytest.mark.parametrize(
    ("backbone", "weights", "name"),
    [
        ("resnet50", models.ResNet50_Weights.DEFAULT, "IMAGENET1K_V2"),
        ("resnet50", models.ResNet50_Weights.IMAGENET1K_V1, "IMAGENET1K_V1"),
        ("resnet18", models.ResNet18_Weights.DEFAULT, "IMAGENET1K_V1"),
        (
            "vit_b_16",
            models.ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1,
            "IMAGENET1K_SWAG_LINEAR_V1",
        ),
        ("resnet50", "IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("resnet50", "default", "default"),
        ("resnet50", None, None),
        (torch.nn.Identity(), "default", "default"),
    ],
)
def test_weights_name_takes_members_of_torchvision(backbone, weights, name):
    assert weights_name(backbone, weights) == name


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "resnet101", "efficientnet_lite0", "timm:resnet50", "zzz", torch.nn.Identity(), 3],
)
def test_weights_name_rejects_members_of_another_network(backbone):
    message = "Got weights=ResNet50_Weights.IMAGENET1K_V2 with backbone="
    with pytest.raises(
        ValueError, match=f"^{message}.*; pass backbone='resnet50', or leave weights"
    ):
        weights_name(backbone, models.ResNet50_Weights.DEFAULT)


def test_weights_name_rejects_members_of_networks_for_other_tasks():
    weights = models.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT
    with pytest.raises(ValueError, match="expected weights of this network; leave weights at"):
        weights_name("resnet50", weights)
