"""Networks as ordered lists of blocks; the only import of torchvision's models.

Shapes: N pictures of H x W pixels, C channels, L tokens, D features, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torchvision.models as models
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sktransfer._errors import check_choice, did_you_mean
from sktransfer.efficientnet_lite import EfficientNetLite, load_strictly

_INCEPTIONS = ("googlenet", "inception_v3")
_AUXILIARY = re.compile(r"(aux1|aux2|AuxLogits)\.")
# densenet's published files say "norm.1.weight" where the modules are now called "norm1".
_OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")
# Sizes at which an unknown network is tried; most take the first.
_PROBE_SIZES = (224, 64, 32, 128, 96, 256, 299, 384, 512)
_POSITIONS: dict[str, tuple[int, ...]] = {"NCHW": (2, 3), "NHWC": (1, 2), "NLC": (1,), "vector": ()}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """An ordered list of blocks, from picture to last feature map, and what follows.

    Parameters
    ----------
    blocks : tuple of (str, nn.Module)
        Composed in order, they map normalised float pictures (N, 3, H, W) to the last feature
        map. No two share a parameter, and none writes into its input.
    neck : nn.Module
        Last feature map -> penultimate vector (N, D): the network's own pooling and what it
        computes before its last layer, without dropout.
    logits : nn.Module
        Last feature map -> logits (N, K), as the network computes them in eval mode.
    layout : str
        Of the feature maps between blocks: "NCHW", "NHWC", "NLC", or "vector" for (N, D).
    prefix_tokens : int
        Number of class tokens before the tokens of the picture, in layout "NLC".
    image_size : int or None
        The only H = W that the network takes, where its structure says so.
    """

    blocks: tuple[tuple[str, nn.Module], ...]
    neck: nn.Module
    logits: nn.Module
    layout: str
    prefix_tokens: int = 0
    image_size: int | None = None


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
    """Find published weights by their name; `"default"` is the best that there are.

    Raises
    ------
    ValueError
        Where there is no such network, or no such weights for it.

    Examples
    --------
    >>> torchvision_weights("resnet50", "default")
    ResNet50_Weights.IMAGENET1K_V2
    """
    _check_name(name)
    members = models.get_model_weights(name).__members__
    check_choice("weights", weights, ["default", *members])
    return members["DEFAULT" if weights == "default" else weights]


def skeleton(name: str, *, image_size: int | None = None, num_classes: int = 1000) -> nn.Module:
    """Build the structure of a torchvision network in milliseconds.

    What training learns has no values: it is on the meta device, until
    `load_state_dict(..., assign=True)`. The parameters are those of `build_torchvision`, but for
    the number of classes, K.

    Examples
    --------
    >>> skeleton("vgg19").classifier[0].weight.device
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
        What a weights file of this network holds, old spellings included. The number of classes
        and the picture size follow from it. Its float32 tensors are taken over, not copied.
        `None` gives random weights.
    image_size : int or None, default=None
        H = W of the pictures, for networks tied to one size (vit, maxvit) with random weights.
    seed : int, default=0
        Seed of the random weights; the global random state stays as it is.

    Returns
    -------
    nn.Module
        On the CPU, in training mode as every new module.

    Raises
    ------
    ValueError
        Where there is no such network, or `state_dict` does not fit it.

    Examples
    --------
    >>> network = build_torchvision("mobilenet_v3_small", seed=1)
    >>> [name for name, _ in dissect(network).blocks][:2]
    ['features.0', 'features.1']
    """
    if state_dict is not None:
        return _build_from(name, state_dict)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the generators of all GPUs too.
        torch.default_generator.manual_seed(seed)
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
    network: Any = skeleton(name)
    options = _options_in(tensors, network)
    if options:
        network = skeleton(name, **options)
    if name in _INCEPTIONS:
        # Their weights were trained on pictures scaled to -1..1; this turns ours into those.
        network.transform_input = True
    load_strictly(network, tensors, name, getattr(state_dict, "_metadata", None))
    return network


def _options_in(tensors: Mapping[str, Tensor], network: Any) -> dict[str, int]:
    """Find the number of classes and the picture size, where they are not the usual ones."""
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
        # Auxiliary heads only serve training from scratch; the usual initialisation is slow.
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


# Families ------------------------------------------------------------------------------------


def dissect(network: nn.Module, *, image_size: int | None = None) -> Anatomy:
    """Cut a network into blocks that share its parameters.

    Torchvision's networks, fine-tuned or not, are cut by their class, without running them. For
    any other network, a way to cut it is believed only if its outputs on two probe pictures
    equal the network's own: its children in order; else all but its last linear layer as one
    block; else the whole network as one block. The network stays as it is.

    Parameters
    ----------
    network : nn.Module
        Maps normalised float pictures (N, 3, H, W) to a tensor.
    image_size : int or None, default=None
        H = W at which an unknown network is run first.

    Raises
    ------
    ValueError
        Where an unknown network takes none of the sizes tried, or returns no usual tensor.

    Examples
    --------
    >>> anatomy = dissect(skeleton("resnet18"))
    >>> [name for name, _ in anatomy.blocks]
    ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    return _dissect_known(network) or _dissect_unknown(network, image_size, _dissect_known)


def _dissect_known(network: nn.Module) -> Anatomy | None:
    for kind, family in _FAMILIES:
        # A subclass may compute something else: then only a probe can tell.
        methods = ("forward", "_forward_impl", "_forward")
        same = all(getattr(type(network), m, 0) is getattr(kind, m, 0) for m in methods)
        if isinstance(network, kind) and same and "forward" not in vars(network):
            return family(network)
    return None


def _pooling(net: Any) -> list[nn.Module]:
    return [getattr(net, "avgpool", nn.AdaptiveAvgPool2d(1)), nn.Flatten(1)]


def _cut(layers: nn.Sequential, starts: list[int]) -> list[nn.Sequential]:
    return [layers[a:b] for a, b in pairwise([0, *starts, len(layers)])]


def _alexnet(net: models.AlexNet) -> Anatomy:
    starts = [i for i, layer in enumerate(net.features) if isinstance(layer, nn.Conv2d)]
    blocks = [(f"conv{i}", part) for i, part in enumerate(_cut(net.features, starts[1:]), 1)]
    return _assemble(blocks, _pooling(net), net.classifier)


def _convnext(net: models.ConvNeXt) -> Anatomy:
    blocks = [(f"features.{name}", part) for name, part in net.features.named_children()]
    return _assemble(blocks, [net.avgpool], net.classifier)


def _densenet(net: models.DenseNet) -> Anatomy:
    names = list(net.features._modules)
    starts = [i for i, name in enumerate(names) if name.startswith("denseblock")]
    parts = _cut(net.features, starts)
    # In place, as the network does it, it would overwrite the block's output.
    parts[-1].add_module("relu5", nn.ReLU())
    blocks = zip(["stem", *(names[i] for i in starts)], parts, strict=True)
    return _assemble(blocks, _pooling(net), net.classifier)


def _efficientnet_lite(net: EfficientNetLite) -> Anatomy:
    stem = nn.Sequential(net.conv_stem, net.bn0, net.relu)
    blocks = [(f"block{i}", block) for i, block in enumerate(net.blocks)]
    head = nn.Sequential(net.conv_head, net.bn1, net.relu)
    return _assemble([("stem", stem), *blocks, ("conv_head", head)], _pooling(net), net.fc)


def _googlenet(net: models.GoogLeNet) -> Anatomy:
    rescale = _Rescale() if net.transform_input else nn.Identity()
    stem = [rescale, net.conv1, net.maxpool1, net.conv2, net.conv3, net.maxpool2]
    names = ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    blocks = {f"inception{name}": net.get_submodule(f"inception{name}") for name in names}
    blocks["inception3b"] = nn.Sequential(net.inception3b, net.maxpool3)
    blocks["inception4e"] = nn.Sequential(net.inception4e, net.maxpool4)
    return _assemble([("stem", nn.Sequential(*stem)), *blocks.items()], _pooling(net), net.fc)


def _inception(net: models.Inception3) -> Anatomy:
    rescale = _Rescale() if net.transform_input else nn.Identity()
    stem = [rescale, net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.maxpool1]
    stem += [net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.maxpool2]
    blocks = [(name, part) for name, part in net.named_children() if name.startswith("Mixed")]
    return _assemble([("stem", nn.Sequential(*stem)), *blocks], _pooling(net), net.fc)


def _maxvit(net: models.MaxVit) -> Anatomy:
    blocks = [(f"block{i}", block) for i, block in enumerate(net.blocks, 1)]
    # The stem and the first block halve the picture before the first grid.
    size = 4 * net.blocks[0].grid_size[0]
    return _assemble([("stem", net.stem), *blocks], [], net.classifier, image_size=size)


def _mnasnet(net: models.MNASNet) -> Anatomy:
    stacks = [i for i, layer in enumerate(net.layers) if isinstance(layer, nn.Sequential)]
    names = ["stem", *(f"stack{i + 1}" for i in range(len(stacks))), "conv_head"]
    parts = _cut(net.layers, [*stacks, stacks[-1] + 1])
    return _assemble(zip(names, parts, strict=True), _pooling(net), net.classifier)


def _features(net: Any) -> Anatomy:
    blocks = [(f"features.{name}", part) for name, part in net.features.named_children()]
    return _assemble(blocks, _pooling(net), net.classifier)


def _regnet(net: models.RegNet) -> Anatomy:
    blocks = [("stem", net.stem), *net.trunk_output.named_children()]
    return _assemble(blocks, _pooling(net), net.fc)


def _resnet(net: models.ResNet) -> Anatomy:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    layers = [(f"layer{i}", net.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)]
    return _assemble([("stem", stem), *layers], _pooling(net), net.fc)


def _shufflenet(net: models.ShuffleNetV2) -> Anatomy:
    names = ("stage2", "stage3", "stage4", "conv5")
    blocks = [(name, net.get_submodule(name)) for name in names]
    stem = nn.Sequential(net.conv1, net.maxpool)
    return _assemble([("stem", stem), *blocks], _pooling(net), net.fc)


def _squeezenet(net: models.SqueezeNet) -> Anatomy:
    kinds = [type(layer).__name__ for layer in net.features]
    parts = _cut(net.features, [i for i, kind in enumerate(kinds) if kind == "Fire"])
    # The paper counts the first convolution as 1.
    blocks = [("stem" if i == 1 else f"fire{i}", part) for i, part in enumerate(parts, 1)]
    logits = nn.Sequential(net.classifier, nn.Flatten(1))
    return Anatomy(tuple(blocks), nn.Sequential(*_pooling(net)), logits, "NCHW")


def _swin(net: models.SwinTransformer) -> Anatomy:
    parts = _cut(net.features, [1, *range(2, len(net.features), 2)])
    blocks = [(f"stage{i}" if i else "stem", part) for i, part in enumerate(parts)]
    pooling = [net.norm, net.permute, net.avgpool, net.flatten]
    return _assemble(blocks, pooling, net.head, "NHWC")


def _vgg(net: models.VGG) -> Anatomy:
    ends = [i + 1 for i, layer in enumerate(net.features) if isinstance(layer, nn.MaxPool2d)]
    blocks = [(f"stage{i}", part) for i, part in enumerate(_cut(net.features, ends[:-1]), 1)]
    return _assemble(blocks, _pooling(net), net.classifier)


def _vit(net: models.VisionTransformer) -> Anatomy:
    blocks = [("stem", _VitStem(net)), *net.encoder.layers.named_children()]
    pooling = [_ClassToken(), net.encoder.ln]
    facts = {"prefix_tokens": 1, "image_size": net.image_size}
    return _assemble(blocks, pooling, net.heads, "NLC", **facts)


_FAMILIES: tuple[tuple[type[nn.Module], Callable[[Any], Anatomy]], ...] = (
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
)


class _VitStem(nn.Module):
    """Pictures to tokens with positions: the part of vit that lies in its forward."""

    def __init__(self, net: models.VisionTransformer) -> None:
        super().__init__()
        self.conv_proj, self.dropout = net.conv_proj, net.encoder.dropout
        self.class_token, self.pos_embedding = net.class_token, net.encoder.pos_embedding

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        return self.dropout(x + self.pos_embedding)


def _assemble(
    blocks: Iterable[tuple[str, nn.Module]],
    pooling: Iterable[nn.Module],
    head: nn.Module,
    layout: str = "NCHW",
    **facts: int,
) -> Anatomy:
    """Put a network together: what its head does before its last linear layer joins the neck."""
    layers = [layer for _, layer in _unroll(head)]
    linear = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    last = linear[-1] if linear else 0
    before = [layer for layer in layers[:last] if not isinstance(layer, nn.Dropout)]
    neck = nn.Sequential(*pooling, *before)
    return Anatomy(tuple(blocks), neck, nn.Sequential(neck, *layers[last:]), layout, **facts)


def _unroll(network: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name the parts of nested Sequentials, in order."""
    if not _is_sequential(network):
        yield name, network
        return
    for child_name, child in network._modules.items():
        if child is not None:
            yield from _unroll(child, f"{name}.{child_name}" if name else child_name)


def _is_sequential(network: nn.Module) -> bool:
    """Tell whether a network runs its children in order, by its own word."""
    return type(network).forward is nn.Sequential.forward


class _ClassToken(nn.Module):
    """Leave only the first token: (N, L, C) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Pick it."""
        return x[:, 0]


class _Rescale(nn.Module):
    """From ImageNet's mean and standard deviation to pictures in -1..1."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
        self.register_buffer("scale", std / 0.5, persistent=False)
        self.register_buffer("shift", (mean - 0.5) / 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale normalised pictures (N, 3, H, W)."""
        return x * self.scale + self.shift


# Unknown networks ----------------------------------------------------------------------------


def _dissect_unknown(
    network: nn.Module, image_size: int | None, known: Callable[[nn.Module], Anatomy | None]
) -> Anatomy:
    """Cut a network in the finest way whose outputs on two pictures equal its own.

    Parameters
    ----------
    network : nn.Module
        Is run in eval mode, and left as it was.
    image_size : int or None
        H = W at which it is run first.
    known : callable
        Cuts those of its children whose structure is known.
    """
    with _evaluating(network):
        probe, expected = _probe(network, image_size)
        layout = _layout(expected)
        whole = Anatomy((("model", network),), _Average(layout), nn.Identity(), layout)
        if _same(expected[:1], expected[1:]) and not _is_sequential(network):
            # Outputs that do not depend on the picture are evidence of nothing.
            return whole
        chain = _chain(network, probe, expected, known)
        return _cut_chain(chain, probe) or _trunk(network, probe) or whole


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.train(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _probe(network: nn.Module, image_size: int | None) -> tuple[Tensor, Tensor]:
    """Find two coarse random pictures (2, 3, S, S) that the network takes, and its outputs."""
    like = next(network.parameters(), torch.zeros(()))
    coarse = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = _PROBE_SIZES if image_size is None else (image_size, *_PROBE_SIZES)
    errors = []
    for size in sizes:
        probe = nn.functional.interpolate(coarse, (size, size)).to(like)
        try:
            expected = network(probe.clone())
            _layout(expected)
        except Exception as error:
            errors.append(error)
        else:
            return probe, expected
    raise ValueError(
        f"Got a {type(network).__name__}, but expected a network that maps float pictures "
        f"(N, 3, H, W) to a tensor. Pictures of {sizes[0]} x {sizes[0]} pixels gave: {errors[0]}. "
        "Wrap it in a module that does so, or pass the image_size that it needs."
    ) from errors[0]


def _layout(x: Tensor) -> str:
    """Tell the layout of what a network made of square pictures."""
    if not isinstance(x, Tensor) or x.ndim not in (2, 3, 4):
        raise ValueError(f"the output is a {type(x).__name__}, not a tensor of 2 to 4 dimensions")
    if x.ndim == 4:
        return "NHWC" if x.shape[1] == x.shape[2] != x.shape[3] else "NCHW"
    return "NLC" if x.ndim == 3 else "vector"


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-4 * y.abs().max())


@dataclass(frozen=True)
class _Link:
    """A part of a chain, and what was seen when it ran."""

    name: str
    module: nn.Module
    layout: str
    gives_map: bool
    writes_into_input: bool

    @property
    def learns(self) -> bool:
        """Whether it holds a convolution or a matrix, and not only scales."""
        return any(parameter.ndim > 1 for parameter in self.module.parameters())

    @property
    def has_linear(self) -> bool:
        return _last_linear(self.module) is not None


def _chain(
    network: nn.Module,
    probe: Tensor,
    expected: Tensor,
    known: Callable[[nn.Module], Anatomy | None],
) -> list[_Link]:
    """Run the parts of a network in order; give no chain where it computes something else."""
    links = []
    x = probe.clone()
    try:
        for name, part in _parts(network, known):
            flatten = isinstance(part, nn.Linear) and x.ndim == 4 and x.shape[3] != part.in_features
            module = nn.Sequential(nn.Flatten(1), part) if flatten else part
            version = x._version
            y = module(x)
            layout = _layout(y)
            gives_map = math.prod(y.shape[axis] for axis in _POSITIONS[layout]) > 1
            links.append(_Link(name, module, layout, gives_map, x._version != version))
            x = y
    except Exception:
        # Whatever a part says about an input that is not meant for it.
        return []
    return links if _same(x, expected) else []


def _parts(
    network: nn.Module, known: Callable[[nn.Module], Anatomy | None]
) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in network._modules.items():
        for name, part in _unroll(child, child_name) if child is not None else ():
            anatomy = known(part)
            if anatomy is None:
                yield name, part
            else:
                yield from ((f"{name}.{block}", module) for block, module in anatomy.blocks)
                yield f"{name}.logits", anatomy.logits


def _cut_chain(links: list[_Link], probe: Tensor) -> Anatomy | None:
    """Cut a chain before every convolution or matrix, and end it with the last feature map."""
    end = _end_of_blocks(links)
    if end == 0:
        return None
    layout = links[end - 1].layout
    groups = [links[:1]]
    for before, link in pairwise(links[:end]):
        # Norms, activations and pooling stay with the convolution before them.
        complete = before.layout == layout and any(other.learns for other in groups[-1])
        if complete and link.learns and not link.writes_into_input:
            groups.append([])
        groups[-1].append(link)
    blocks = tuple((_name(group, links), _join(group)) for group in groups)
    logits = _join(links[end:])
    owned = [set(module.parameters()) for module in (*dict(blocks).values(), logits)]
    if sum(map(len, owned)) != len(set().union(*owned)):
        return None
    return Anatomy(blocks, _neck(links[end:], blocks, probe), logits, layout)


def _end_of_blocks(links: list[_Link]) -> int:
    """Count the links up to the last feature map, or else up to the last linear layer."""
    first = next((i for i, link in enumerate(links) if link.learns), len(links))
    maps = [i for i, link in enumerate(links) if link.gives_map and i >= first]
    linear = [i for i, link in enumerate(links) if link.has_linear]
    if maps:
        return maps[-1] + 1
    return linear[-1] if linear else len(links)


def _name(group: list[_Link], links: list[_Link]) -> str:
    """Name a block after the child that it is, or else after its first part that learns."""
    name = next((link.name for link in group if link.learns), group[0].name)
    while "." in name:
        parent = name.rpartition(".")[0]
        if any(link.name.startswith(f"{parent}.") and link not in group for link in links):
            break
        name = parent
    return name


def _join(links: list[_Link]) -> nn.Module:
    return links[0].module if len(links) == 1 else nn.Sequential(*(link.module for link in links))


def _neck(tail: list[_Link], blocks: tuple[tuple[str, nn.Module], ...], probe: Tensor) -> nn.Module:
    x = probe.clone()
    for _, block in blocks:
        x = block(x)
    last = max((i for i, link in enumerate(tail) if link.has_linear), default=-1)
    neck = _headless(_join(tail[: last + 1]), x)
    if neck is None:
        return nn.Sequential(_join(tail), _Average(_layout(_join(tail)(x))))
    for name, layer in list(neck.named_modules()):
        if isinstance(layer, nn.Dropout):
            neck.set_submodule(name, nn.Identity())
    return neck


def _trunk(network: nn.Module, probe: Tensor) -> Anatomy | None:
    """Make one block of all but the last linear layer."""
    trunk = _headless(network, probe)
    if trunk is None:
        return None
    linear = network.get_submodule(_last_linear(network) or "")
    return Anatomy((("trunk", trunk),), nn.Identity(), linear, "vector")


def _headless(network: nn.Module, x: Tensor) -> nn.Module | None:
    """Copy all of `network` but its tensors, without its last linear layer, if that ends it."""
    network = nn.Sequential(network)
    last = _last_linear(network)
    if last is None:
        return None
    try:
        tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        twin = copy.deepcopy(network, tensors)
        twin.set_submodule(last, nn.Identity())
        features = twin(x.clone())
        logits = network.get_submodule(last)(features)
    except Exception:
        # Not every module can be copied, or works without its last layer.
        return None
    return twin if features.ndim == 2 and _same(logits, network(x.clone())) else None


def _last_linear(network: nn.Module) -> str | None:
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return names[-1] if names else None


class _Average(nn.Module):
    """Average a feature map over its positions; leave a vector as it is."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.axes = _POSITIONS[layout]

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes) if self.axes else x
