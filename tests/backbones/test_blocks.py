"""Networks of unknown classes are split into blocks that compute the same."""

import pytest
import torch
import torchvision
from block_helpers import check_block_list, fill, two_images
from torch import nn

from sktransfer.backbones.torchvision_blocks import build_torchvision, split_into_blocks


def convolutions():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU()),
    )


class Flattening(nn.Module):
    """Runs its children in order, with a flatten in `forward`."""

    def __init__(self):
        super().__init__()
        self.features = convolutions()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.unused = None
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))


class Residual(nn.Module):
    """Runs its children in order, with an addition in `forward`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1)
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.drop((x + self.second(x).relu()).mean((2, 3))))


class Wrapped(nn.Module):
    """A known network with a custom head."""

    def __init__(self):
        super().__init__()
        self.backbone = build_torchvision("resnet18")
        self.backbone.fc = nn.Identity()
        self.head = nn.Linear(512, 4)

    def forward(self, x):
        return self.head(self.backbone(x))


class PreActivated(nn.Conv2d):
    """Writes into its input, so no block may begin with it."""

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
def test_unknown_network_is_split_finely(make, blocks, layout, width, size):
    block_list, last = check_block_list(fill(make()), two_images(size))
    assert [name for name, _ in block_list.blocks] == blocks.split()
    assert block_list.layout == layout
    assert block_list.pre_logits(last).shape == (2, width)
    assert not any(isinstance(m, nn.Dropout) for m in block_list.pre_logits.modules())


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224",
     "efficientnet_lite0"],
)  # fmt: skip
def test_timm_network_is_split(name):
    timm = pytest.importorskip("timm")
    network = fill(timm.create_model(name, pretrained=False))
    block_list, last = check_block_list(network, two_images(224))
    assert (len(block_list.blocks) > 4) == (name != "vit_tiny_patch16_224")
    assert block_list.pre_logits(last).shape == (2, network.get_classifier().in_features)


@pytest.mark.parametrize("make", [Flattening, Residual, jumpy, tied])
def test_split_leaves_the_network_unchanged(make):
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


def test_network_with_constant_outputs_is_one_block():
    network = Flattening()
    nn.init.zeros_(network.classifier[3].weight)
    assert [name for name, _ in split_into_blocks(network).blocks] == ["model"]


def test_network_of_fixed_input_size_is_split_at_image_size():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 19**2, 2))
    with pytest.raises(ValueError, match="Sequential"):
        split_into_blocks(network)
    assert [name for name, _ in split_into_blocks(network, image_size=40).blocks] == ["0"]


def test_network_that_takes_no_images_is_rejected():
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


class Doubled(torchvision.models.ResNet):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclass_that_computes_something_else_is_probed():
    network = fill(Doubled(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))
    block_list, _ = check_block_list(network, two_images(64))
    assert [name for name, _ in block_list.blocks] == ["model"]
