"""Blocks, put together again, are the network; for every network, known or not."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from sktransfer.backbones.efficientnet_lite import efficientnet_lite
from sktransfer.backbones.torchvision_blocks import (
    build_on_meta,
    build_torchvision,
    list_torchvision,
    split_into_blocks,
    torchvision_weights,
)

# The smallest images that a network takes quickly, where it is not 64.
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 28}
# Gigabytes of parameters.
LARGE = {"regnet_y_128gf", "vit_h_14"}
# Tables that follow from the structure.
TABLES = ("relative_position_index", "relative_coords_table", "num_batches_tracked")


def random_state(network):
    """Fill every parameter and statistic with values that carry a signal to the last layer."""
    values = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith(TABLES):
            state[name] = tensor
            continue
        value = values.repeat(-(-tensor.numel() // len(values)))[: tensor.numel()]
        value = value.reshape(tensor.shape)
        if tensor.ndim > 1:
            state[name] = value.mul_((2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("weight", "var")):
            state[name] = value.abs_().mul_(0.1).add_(1)
        else:
            state[name] = value.mul_(0.1)
    return state


@torch.no_grad()
def fill(network):
    state = network.state_dict()
    for name, value in random_state(network).items():
        state[name].copy_(value)
    return network


def build(name):
    size = SIZES.get(name, 32 if name.startswith("vit") else 64)
    options = {"image_size": size} if name.startswith("vit") else {}
    network = build_torchvision(name, state_dict=random_state(build_on_meta(name, **options)))
    return network.eval(), images(size)


def images(size):
    coarse = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, (size, size), mode="bicubic")


def run(blocks, x):
    for _, block in blocks:
        version = x._version
        y = block(x)
        assert x._version == version, "a block writes into its input"
        x = y
    return x


def assert_equal(x, y):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@torch.no_grad()
def check_anatomy(network, x):
    """Check what holds for every network, and give its block_list and last feature map."""
    block_list = split_into_blocks(network)
    network.eval()
    expected = network(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    last = run(block_list.blocks, x)
    assert_equal(block_list.logits(last), expected)
    vector = block_list.pre_logits(last)
    assert vector.ndim == 2
    assert len(vector) == len(x)
    assert last.ndim == {"NCHW": 4, "NHWC": 4, "NLC": 3, "vector": 2}[block_list.layout]
    assert len(dict(block_list.blocks)) == len(block_list.blocks)
    owned = [
        set(part.parameters()) for part in (*dict(block_list.blocks).values(), block_list.logits)
    ]
    assert sum(map(len, owned)) == len(set().union(*owned))
    assert set().union(*owned) == set(network.parameters())
    return block_list, last


# Every network of torchvision ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in list_torchvision()]
)
def test_blocks_are_the_network(name):
    network, x = build(name)
    assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))
    block_list, last = check_anatomy(network, x)
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
def test_blocks_have_the_names_of_the_field(name, blocks):
    assert [block for block, _ in split_into_blocks(build_on_meta(name)).blocks] == blocks.split()


def test_efficientnet_lite_can_be_cut_after_every_block():
    block_list, last = check_anatomy(fill(efficientnet_lite("efficientnet_lite0")), images(64))
    names = [name for name, _ in block_list.blocks]
    assert names == ["stem", *(f"block{i}" for i in range(16)), "conv_head"]
    assert block_list.pre_logits(last).shape == (2, 1280)


@pytest.mark.parametrize("name", ["vgg19", "vit_h_14", "swin_v2_b", "regnet_y_128gf"])
def test_a_skeleton_takes_no_memory_and_no_random_numbers(name):
    before = torch.get_rng_state()
    network = build_on_meta(name)
    real = [t for t in (*network.parameters(), *network.buffers()) if not t.is_meta]
    assert sum(t.numel() for t in network.parameters()) > 5e7
    assert sum(t.numel() for t in real) < 1e6
    assert torch.equal(torch.get_rng_state(), before)


# Random weights and published ones ------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3", "vit_b_32", "swin_t"])
def test_random_weights_follow_the_seed_alone(name):
    options = {"image_size": 64} if name == "vit_b_32" else {}
    before = torch.get_rng_state()
    one, same, other = (build_torchvision(name, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    state = same.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())
    state = other.state_dict()
    assert not all(torch.equal(value, state[key]) for key, value in one.state_dict().items())
    block_list = split_into_blocks(one.eval())
    with torch.no_grad():
        vectors = block_list.pre_logits(run(block_list.blocks, images(SIZES.get(name, 64))))
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
def test_loads_the_weights_of_torchvisions_own_networks(name, options, old_key):
    expected = fill(torchvision.models.get_model(name, weights=None, **options))
    state = {old_key(key): value.clone() for key, value in expected.state_dict().items()}
    network = build_torchvision(name, state_dict=state)
    x = images(96 if name == "inception_v3" else 64)
    torch.testing.assert_close(network.eval()(x), expected.eval()(x))
    assert all(parameter.requires_grad for parameter in network.parameters())
    check_anatomy(network, x)


def test_loading_takes_tensors_over_as_float32():
    state = random_state(build_on_meta("squeezenet1_1"))
    state["features.0.bias"] = state["features.0.bias"].half()
    network = build_torchvision("squeezenet1_1", state_dict=state)
    assert network.features[0].weight.data_ptr() == state["features.0.weight"].data_ptr()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_loading_leaves_the_versions_of_the_state_dict_alone():
    state = build_torchvision("mnasnet0_5").state_dict()
    before = copy.deepcopy(state._metadata)
    build_torchvision("mnasnet0_5", state_dict=state)
    assert state._metadata == before


def test_weights_of_another_network_are_refused():
    state = random_state(build_on_meta("resnet18"))
    with pytest.raises(
        ValueError, match="Got weights that do not fit resnet34: Missing key"
    ) as error:
        build_torchvision("resnet34", state_dict=state)
    assert '"layer1.2.conv1.weight"' in str(error.value)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="Got weights that do not fit vit_b_16"):
        build_torchvision("vit_b_16", state_dict=state)


def test_published_weights_by_name():
    members = torchvision.models.ResNet50_Weights
    assert torchvision_weights("resnet50", "default") is members.DEFAULT
    assert torchvision_weights("resnet50", "IMAGENET1K_V1") is members.IMAGENET1K_V1
    with pytest.raises(ValueError, match="weights") as error:
        torchvision_weights("resnet50", "IMAGENET1K_V3")
    assert str(error.value) == (
        "Got weights='IMAGENET1K_V3', but expected one of 'default', 'IMAGENET1K_V1', "
        "'IMAGENET1K_V2'; did you mean 'IMAGENET1K_V2'?"
    )


@pytest.mark.parametrize("function", [torchvision_weights, build_on_meta, build_torchvision])
def test_unknown_names_are_refused(function):
    with pytest.raises(ValueError, match="resnet5O") as error:
        function("resnet5O")
    count = len(list_torchvision())
    assert str(error.value) == (
        f"Got backbone='resnet5O', but expected one of torchvision's {count} classification "
        "networks; did you mean 'resnet50'?"
    )


# Networks that somebody changed ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "width"),
    [
        ("resnet18", nn.Sequential(nn.Dropout(), nn.Linear(512, 9), nn.ReLU(), nn.Linear(9, 3)), 9),
        ("resnet18", nn.Identity(), 512),
        ("mobilenet_v2", nn.Linear(1280, 3), 1280),
        ("vgg11", nn.Sequential(nn.Linear(25088, 4), nn.LogSoftmax(1)), 25088),
    ],
)
def test_a_fine_tuned_network_keeps_its_blocks(name, head, width):
    network, x = build(name)
    blocks = [block for block, _ in split_into_blocks(network).blocks]
    head = copy.deepcopy(head)
    setattr(network, "fc" if name == "resnet18" else "classifier", head)
    block_list, last = check_anatomy(network, x)
    assert [block for block, _ in block_list.blocks] == blocks
    assert block_list.pre_logits(last).shape == (2, width)


class Doubled(torchvision.models.ResNet):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_that_computes_something_else_is_probed():
    network = fill(Doubled(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))
    block_list, _ = check_anatomy(network, images(64))
    assert [name for name, _ in block_list.blocks] == ["model"]


@torch.no_grad()
def test_a_copied_anatomy_is_one_network_still():
    network, x = build("resnet18")
    block_list = copy.deepcopy(split_into_blocks(network))
    assert_equal(block_list.logits(run(block_list.blocks, x)), network(x))
    assert set(block_list.pre_logits.parameters()) <= set(block_list.logits.parameters())


# Unknown networks -----------------------------------------------------------------------------


def convolutions():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU()),
    )


class Flattening(nn.Module):
    """Children in order, but for a flatten in `forward`."""

    def __init__(self):
        super().__init__()
        self.features = convolutions()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.unused = None
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))


class Residual(nn.Module):
    """Children in order, but for an addition in `forward`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1)
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.drop((x + self.second(x).relu()).mean((2, 3))))


class Wrapped(nn.Module):
    """A known network under a head of one's own."""

    def __init__(self):
        super().__init__()
        self.backbone = build_torchvision("resnet18")
        self.backbone.fc = nn.Identity()
        self.head = nn.Linear(512, 4)

    def forward(self, x):
        return self.head(self.backbone(x))


class PreActivated(nn.Conv2d):
    """Writes into its input, so that no block may begin with it."""

    def forward(self, x):
        return super().forward(x.relu_())


class Do(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def jumpy():
    return nn.Sequential(convolutions(), Do(lambda x: x + 0 * torch.rand(())))


def pre_activated():
    layers = [nn.Conv2d(3, 8, 3), PreActivated(8, 8, 3), nn.Conv2d(8, 6, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def tied():
    conv = nn.Conv2d(8, 8, 3)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), conv, nn.ReLU(), conv, nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4))


def with_channels_last():
    permute, mean = Do(lambda x: x.permute(0, 2, 3, 1)), Do(lambda x: x.mean((1, 2)))
    layers = [nn.Conv2d(3, 8, 4, 4), permute, nn.LayerNorm(8), nn.Linear(8, 10), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(10, 12), nn.GELU(), mean, nn.Linear(12, 4))


def with_tokens():
    tokens, mean = Do(lambda x: x.flatten(2).transpose(1, 2)), Do(lambda x: x.mean(1))
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Conv2d(3, 8, 16, 16), tokens, layer, mean, nn.Linear(8, 4))


def perceptron():
    layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("make", "blocks", "layout", "width", "size"),
    [
        (convolutions, "0 1.0 1.2", "NCHW", 12, 64),
        (Flattening, "features.0 features.1.0 features.1.2", "NCHW", 6, 64),
        (Wrapped, "backbone.stem backbone.layer1 backbone.layer2 backbone.layer3 backbone.layer4",
         "NCHW", 512, 64),
        (Residual, "trunk", "vector", 8, 64),
        (tied, "trunk", "vector", 8, 64),
        (pre_activated, "0 2", "NCHW", 6, 64),
        (with_channels_last, "0 3 5", "NHWC", 12, 64),
        (with_tokens, "0 2", "NLC", 8, 64),
        (perceptron, "1 3", "vector", 8, 32),
    ],
)  # fmt: skip
def test_unknown_networks(make, blocks, layout, width, size):
    block_list, last = check_anatomy(fill(make()), images(size))
    assert [name for name, _ in block_list.blocks] == blocks.split()
    assert block_list.layout == layout
    assert block_list.pre_logits(last).shape == (2, width)
    assert not any(isinstance(m, nn.Dropout) for m in block_list.pre_logits.modules())


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224",
     "efficientnet_lite0"],
)  # fmt: skip
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    network = fill(timm.create_model(name, pretrained=False))
    block_list, last = check_anatomy(network, images(224))
    assert (len(block_list.blocks) > 4) == (name != "vit_tiny_patch16_224")
    assert block_list.pre_logits(last).shape == (2, network.get_classifier().in_features)


@pytest.mark.parametrize("make", [Flattening, Residual, jumpy, tied])
def test_an_unknown_network_is_left_as_it_was(make):
    network = make().train()
    next(network.children()).eval()
    next(network.parameters()).requires_grad_(False)
    modes = [module.training for module in network.modules()]
    parts = list(network.named_modules())
    gradients = [parameter.requires_grad for parameter in network.parameters()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.get_rng_state()
    split_into_blocks(network)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in network.modules()] == modes
    assert list(network.named_modules()) == parts
    assert [parameter.requires_grad for parameter in network.parameters()] == gradients
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_equal_outputs_for_all_images_prove_nothing():
    network = Flattening()
    nn.init.zeros_(network.classifier[3].weight)
    assert [name for name, _ in split_into_blocks(network).blocks] == ["model"]


def test_a_network_that_takes_only_one_size():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 19**2, 2))
    with pytest.raises(ValueError, match="Sequential"):
        split_into_blocks(network)
    assert [name for name, _ in split_into_blocks(network, image_size=40).blocks] == ["0"]


def test_a_network_that_takes_no_images_is_refused():
    with pytest.raises(ValueError, match="Got a Conv2d") as error:
        split_into_blocks(nn.Conv2d(5, 4, 3))
    assert str(error.value).startswith(
        "Got a Conv2d, but expected a network that maps float images (N, 3, H, W) to a tensor. "
        "Images of 224 x 224 pixels gave: Given groups=1, weight of size"
    )
    assert str(error.value).endswith(
        "Wrap it in a module that does so, or pass the image_size that it needs."
    )
    with pytest.raises(ValueError, match="the output is a tuple, not a tensor"):
        split_into_blocks(nn.Sequential(nn.Flatten(), nn.LSTM(3 * 224**2, 2)))
