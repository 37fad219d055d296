"""Torchvision's networks as ordered lists of blocks; only this module imports its models.

Shapes: N images of H x W pixels, C channels, L tokens, D features, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torchvision.models as models
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sktransfer.backbones.blocks import (
    BlockList,
    ClassToken,
    Rescale,
    assemble,
    register_blocks,
    split_known_into_blocks,
    split_unknown_into_blocks,
)
from sktransfer.backbones.efficientnet_lite import EfficientNetLite, load_strictly
from sktransfer.utils.errors import check_choice, did_you_mean
from sktransfer.utils.runtime import seeded

__all__ = [
    "BlockList",
    "build_on_meta",
    "build_torchvision",
    "list_torchvision",
    "split_into_blocks",
    "torchvision_weights",
    "weights_name",
]

_INCEPTIONS = ("googlenet", "inception_v3")
_AUXILIARY = re.compile(r"(aux1|aux2|AuxLogits)\.")
# densenet's published files have "norm.1.weight"; the modules are now called "norm1".
_OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


# Building ------------------------------------------------------------------------------------


def list_torchvision() -> list[str]:
    """List the names of torchvision's classification networks.

    Examples
    --------
    >>> list_torchvision()[:3]
    ['alexnet', 'convnext_base', 'convnext_large']
    """
    return sorted(models.list_models(module=models))


def torchvision_weights(name: str, weights: str = "default") -> models.WeightsEnum:
    """Return published weights by their name; `"default"` is the most accurate.

    Raises
    ------
    ValueError
        If the network is unknown, or has no such weights.

    Examples
    --------
    >>> torchvision_weights("resnet50", "default")
    ResNet50_Weights.IMAGENET1K_V2
    """
    _check_name(name)
    members = models.get_model_weights(name).__members__
    weights = "default" if weights == "DEFAULT" else weights
    names = [name for name in members if name != "DEFAULT"]
    check_choice("weights", weights, ["default", *names, None])
    return members["DEFAULT" if weights == "default" else weights]


def weights_name(backbone: Any, weights: Any) -> Any:
    """Return the name of a member such as `ResNet50_Weights.DEFAULT`; other weights unchanged.

    Raises
    ------
    ValueError
        If the weights belong to another network.

    Examples
    --------
    >>> weights_name("resnet50", models.ResNet50_Weights.DEFAULT)
    'IMAGENET1K_V2'
    """
    if not isinstance(weights, models.WeightsEnum):
        return weights
    known = isinstance(backbone, str) and backbone in list_torchvision()
    if known and isinstance(weights, models.get_model_weights(backbone)):
        return weights.name
    networks = [
        name for name in list_torchvision() if type(weights) is models.get_model_weights(name)
    ]
    remedy = f"pass backbone={networks[0]!r}, or " if networks else ""
    raise ValueError(
        f"Got weights={weights!r} with backbone={backbone!r}, but expected weights of this "
        f"network; {remedy}leave weights at 'default'"
    )


def build_on_meta(
    name: str, *, image_size: int | None = None, num_classes: int = 1000
) -> nn.Module:
    """Build the structure of a torchvision network in milliseconds.

    Parameters and statistics are on the meta device, without values, until
    `load_state_dict(..., assign=True)`. `num_classes` is the number of logits, K; for `name` and
    `image_size`, see `build_torchvision`.

    Examples
    --------
    >>> build_on_meta("vgg19").classifier[0].weight.device
    device(type='meta')
    """
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        return _construct(name, image_size, num_classes)


def build_torchvision(
    name: str,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build a torchvision network, without auxiliary heads and without a download.

    Parameters
    ----------
    name : str
        One of `list_torchvision()`.
    state_dict : mapping of str to Tensor or None, default=None
        The content of a weights file of this network; old key names are supported. It determines
        the number of classes and the image size. Its float32 tensors are used without a copy.
        `None` is random weights.
    image_size : int or None, default=None
        H = W of the images, for networks tied to one size (vit, maxvit) with random weights.
    seed : int, default=0
        Seed of the random weights; the global random state does not change.

    Returns
    -------
    nn.Module
        On the CPU, in training mode like every new module.

    Raises
    ------
    ValueError
        If the network is unknown, or `state_dict` does not fit it.

    Examples
    --------
    >>> network = build_torchvision("mobilenet_v3_small", seed=1)
    >>> split_into_blocks(network).names[:2]
    ['features.0', 'features.1']
    """
    if state_dict is not None:
        return _build_from(name, state_dict)
    with seeded(seed):
        network = _construct(name, image_size)
        if name in _INCEPTIONS:
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network


def _build_from(name: str, state_dict: Mapping[str, Tensor]) -> nn.Module:
    tensors = {
        _OLD_DENSE_LAYER.sub(r"\1", key): value
        for key, value in state_dict.items()
        if not (name in _INCEPTIONS and _AUXILIARY.match(key))
    }
    network: Any = build_on_meta(name)
    options = _options_in(tensors, network)
    if options:
        network = build_on_meta(name, **options)
    if name in _INCEPTIONS:
        # Their weights were trained on images scaled to -1..1; this rescales normalized images.
        network.transform_input = True
    load_strictly(network, tensors, name, getattr(state_dict, "_metadata", None))
    return network


def _options_in(tensors: Mapping[str, Tensor], network: Any) -> dict[str, int]:
    """Return the number of classes and the image size, if they differ from the defaults."""
    options = {}
    layers = (nn.Linear, nn.Conv2d)
    last = [name for name, m in network.named_modules() if isinstance(m, layers)][-1]
    head, usual = tensors.get(f"{last}.weight"), network.get_submodule(last).weight
    if isinstance(head, Tensor) and head.ndim == usual.ndim and len(head) != len(usual):
        options["num_classes"] = len(head)
    if isinstance(network, models.VisionTransformer):
        positions = tensors.get("encoder.pos_embedding")
        if isinstance(positions, Tensor) and positions.ndim == 3:
            size = network.patch_size * math.isqrt(positions.shape[1] - 1)
            if size != network.image_size:
                options["image_size"] = size
    return options


def _construct(name: str, image_size: int | None, num_classes: int = 1000) -> nn.Module:
    _check_name(name)
    options: dict[str, Any] = {"num_classes": num_classes}
    if name in _INCEPTIONS:
        # Auxiliary heads are only for training from scratch; the default initialization is slow.
        options |= {"aux_logits": False, "init_weights": False}
    if image_size is not None and name.startswith("vit"):
        options["image_size"] = image_size
    if image_size is not None and name.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    return models.get_model(name, weights=None, **options)


def _check_name(name: str) -> None:
    names = list_torchvision()
    if name not in names:
        raise ValueError(
            f"Got backbone={name!r}, but expected one of torchvision's {len(names)} classification "
            f"networks{did_you_mean(name, names)}"
        )


class _EmptyOnMeta(TorchFunctionMode):
    """Put only `torch.empty` on the meta device: regnet computes its widths with real tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        device = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **device})


# Splitting by class --------------------------------------------------------------------------


def split_into_blocks(network: nn.Module, *, image_size: int | None = None) -> BlockList:
    """Split a network into blocks that share its parameters.

    Torchvision's networks, fine-tuned or not, and classes registered with `register_blocks` are
    split by their class, without running them. Any other network is split in the first of these
    ways that reproduces its outputs on two probe images: its children in order; all but its last
    linear layer as one block; the whole network as one block. The network is not changed.

    Parameters
    ----------
    network : nn.Module
        Maps normalized float images (N, 3, H, W) to a tensor.
    image_size : int or None, default=None
        H = W at which an unknown network is run first.

    Raises
    ------
    ValueError
        If an unknown network accepts none of the tried sizes, or does not return a tensor of 2 to
        4 dimensions.

    Examples
    --------
    >>> block_list = split_into_blocks(build_on_meta("resnet18"))
    >>> block_list.names
    ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    return split_known_into_blocks(network) or split_unknown_into_blocks(network, image_size)


def _pooling(net: Any) -> list[nn.Module]:
    return [getattr(net, "avgpool", nn.AdaptiveAvgPool2d(1)), nn.Flatten(1)]


def _cut(layers: nn.Sequential, starts: list[int]) -> list[nn.Sequential]:
    return [layers[a:b] for a, b in pairwise([0, *starts, len(layers)])]


def _alexnet(net: models.AlexNet) -> BlockList:
    starts = [i for i, layer in enumerate(net.features) if isinstance(layer, nn.Conv2d)]
    blocks = [(f"conv{i}", part) for i, part in enumerate(_cut(net.features, starts[1:]), 1)]
    return assemble(blocks, _pooling(net), net.classifier)


def _convnext(net: models.ConvNeXt) -> BlockList:
    blocks = [(f"features.{name}", part) for name, part in net.features.named_children()]
    return assemble(blocks, [net.avgpool], net.classifier)


def _densenet(net: models.DenseNet) -> BlockList:
    names = list(net.features._modules)
    starts = [i for i, name in enumerate(names) if name.startswith("denseblock")]
    parts = _cut(net.features, starts)
    # In place, as in the network, it would overwrite the output of the block.
    parts[-1].add_module("relu5", nn.ReLU())
    blocks = zip(["stem", *(names[i] for i in starts)], parts, strict=True)
    return assemble(blocks, _pooling(net), net.classifier)


def _efficientnet_lite(net: EfficientNetLite) -> BlockList:
    stem = nn.Sequential(net.conv_stem, net.bn0, net.relu)
    blocks = [(f"block{i}", block) for i, block in enumerate(net.blocks)]
    head = nn.Sequential(net.conv_head, net.bn1, net.relu)
    return assemble([("stem", stem), *blocks, ("conv_head", head)], _pooling(net), net.fc)


def _googlenet(net: models.GoogLeNet) -> BlockList:
    rescale = Rescale() if net.transform_input else nn.Identity()
    stem = [rescale, net.conv1, net.maxpool1, net.conv2, net.conv3, net.maxpool2]
    names = ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    blocks = {f"inception{name}": net.get_submodule(f"inception{name}") for name in names}
    blocks["inception3b"] = nn.Sequential(net.inception3b, net.maxpool3)
    blocks["inception4e"] = nn.Sequential(net.inception4e, net.maxpool4)
    return assemble([("stem", nn.Sequential(*stem)), *blocks.items()], _pooling(net), net.fc)


def _inception(net: models.Inception3) -> BlockList:
    rescale = Rescale() if net.transform_input else nn.Identity()
    stem = [rescale, net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.maxpool1]
    stem += [net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.maxpool2]
    blocks = [(name, part) for name, part in net.named_children() if name.startswith("Mixed")]
    return assemble([("stem", nn.Sequential(*stem)), *blocks], _pooling(net), net.fc)


def _maxvit(net: models.MaxVit) -> BlockList:
    blocks = [(f"block{i}", block) for i, block in enumerate(net.blocks, 1)]
    # The stem and the first block halve the image before the first grid.
    size = 4 * net.blocks[0].grid_size[0]
    return assemble([("stem", net.stem), *blocks], [], net.classifier, image_size=size)


def _mnasnet(net: models.MNASNet) -> BlockList:
    stacks = [i for i, layer in enumerate(net.layers) if isinstance(layer, nn.Sequential)]
    names = ["stem", *(f"stack{i + 1}" for i in range(len(stacks))), "conv_head"]
    parts = _cut(net.layers, [*stacks, stacks[-1] + 1])
    return assemble(zip(names, parts, strict=True), _pooling(net), net.classifier)


def _features(net: Any) -> BlockList:
    blocks = [(f"features.{name}", part) for name, part in net.features.named_children()]
    return assemble(blocks, _pooling(net), net.classifier)


def _regnet(net: models.RegNet) -> BlockList:
    blocks = [("stem", net.stem), *net.trunk_output.named_children()]
    return assemble(blocks, _pooling(net), net.fc)


def _resnet(net: models.ResNet) -> BlockList:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    layers = [(f"layer{i}", net.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)]
    return assemble([("stem", stem), *layers], _pooling(net), net.fc)


def _shufflenet(net: models.ShuffleNetV2) -> BlockList:
    names = ("stage2", "stage3", "stage4", "conv5")
    blocks = [(name, net.get_submodule(name)) for name in names]
    stem = nn.Sequential(net.conv1, net.maxpool)
    return assemble([("stem", stem), *blocks], _pooling(net), net.fc)


def _squeezenet(net: models.SqueezeNet) -> BlockList:
    kinds = [type(layer).__name__ for layer in net.features]
    parts = _cut(net.features, [i for i, kind in enumerate(kinds) if kind == "Fire"])
    # The paper counts the first convolution as 1.
    blocks = [("stem" if i == 1 else f"fire{i}", part) for i, part in enumerate(parts, 1)]
    logits = nn.Sequential(net.classifier, nn.Flatten(1))
    return BlockList(tuple(blocks), nn.Sequential(*_pooling(net)), logits, "NCHW")


def _swin(net: models.SwinTransformer) -> BlockList:
    parts = _cut(net.features, [1, *range(2, len(net.features), 2)])
    blocks = [(f"stage{i}" if i else "stem", part) for i, part in enumerate(parts)]
    pooling = [net.norm, net.permute, net.avgpool, net.flatten]
    return assemble(blocks, pooling, net.head, "NHWC")


def _vgg(net: models.VGG) -> BlockList:
    ends = [i + 1 for i, layer in enumerate(net.features) if isinstance(layer, nn.MaxPool2d)]
    blocks = [(f"stage{i}", part) for i, part in enumerate(_cut(net.features, ends[:-1]), 1)]
    return assemble(blocks, _pooling(net), net.classifier)


def _vit(net: models.VisionTransformer) -> BlockList:
    blocks = [("stem", _VitStem(net)), *net.encoder.layers.named_children()]
    pooling = [ClassToken(), net.encoder.ln]
    facts = {"prefix_tokens": 1, "image_size": net.image_size}
    return assemble(blocks, pooling, net.heads, "NLC", **facts)


for _cls, _split in (
    (EfficientNetLite, _efficientnet_lite),
    (models.AlexNet, _alexnet),
    (models.ConvNeXt, _convnext),
    (models.DenseNet, _densenet),
    (models.EfficientNet, _features),
    (models.GoogLeNet, _googlenet),
    (models.Inception3, _inception),
    (models.MaxVit, _maxvit),
    (models.MNASNet, _mnasnet),
    (models.MobileNetV2, _features),
    (models.MobileNetV3, _features),
    (models.RegNet, _regnet),
    (models.ResNet, _resnet),
    (models.ShuffleNetV2, _shufflenet),
    (models.SqueezeNet, _squeezenet),
    (models.SwinTransformer, _swin),
    (models.VGG, _vgg),
    (models.VisionTransformer, _vit),
):
    register_blocks(_cls, _split)


class _VitStem(nn.Module):
    """Map images to tokens with positions, as the forward method of vit does."""

    def __init__(self, net: models.VisionTransformer) -> None:
        super().__init__()
        self.conv_proj, self.dropout = net.conv_proj, net.encoder.dropout
        self.class_token, self.pos_embedding = net.class_token, net.encoder.pos_embedding

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        return self.dropout(x + self.pos_embedding)
