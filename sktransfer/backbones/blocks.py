"""An ordered list of blocks, and functions that split a network of any class into blocks.

Shapes: N images of H x W pixels, C channels, L tokens, D features, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sktransfer.transforms.preprocessing import IMAGENET_MEAN, IMAGENET_STD

# Image sizes that are tried on an unknown network; most networks accept the first.
_PROBE_SIZES = (224, 64, 32, 128, 96, 256, 299, 384, 512)
# The axes of a feature map that are positions in the image, for each layout.
POSITIONS: dict[str, tuple[int, ...]] = {"NCHW": (2, 3), "NHWC": (1, 2), "NLC": (1,), "vector": ()}


@dataclass(frozen=True, eq=False)
class BlockList:
    """An ordered list of blocks, from image to last feature map, and the layers after them.

    Parameters
    ----------
    blocks : tuple of (str, nn.Module)
        Composed in order, they map normalized float images (N, 3, H, W) to the last feature
        map. No two share a parameter, and none writes into its input.
    pre_logits : nn.Module
        Maps the last feature map to the penultimate vector (N, D): the network's pooling and all
        layers before its last one, without dropout.
    logits : nn.Module
        Maps the last feature map to logits (N, K), as the network does in eval mode.
    layout : str
        Of the feature maps between blocks: "NCHW", "NHWC", "NLC", or "vector" for (N, D).
    prefix_tokens : int
        Number of class tokens before the tokens of the image, in layout "NLC".
    image_size : int or None
        The only H = W that the network accepts, if its structure fixes it.
    """

    blocks: tuple[tuple[str, nn.Module], ...]
    pre_logits: nn.Module
    logits: nn.Module
    layout: str
    prefix_tokens: int = 0
    image_size: int | None = None

    @property
    def names(self) -> list[str]:
        """Names of the blocks, in network order."""
        return [name for name, _ in self.blocks]


def assemble(
    blocks: Iterable[tuple[str, nn.Module]],
    pooling: Iterable[nn.Module],
    head: nn.Module,
    layout: str = "NCHW",
    **facts: int,
) -> BlockList:
    """Assemble a block list; the layers of `head` before its last linear layer are pre-logits."""
    layers = [layer for _, layer in unroll(head)]
    linear = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    last = linear[-1] if linear else 0
    before = [layer for layer in layers[:last] if not isinstance(layer, nn.Dropout)]
    pre_logits = nn.Sequential(*pooling, *before)
    return BlockList(
        tuple(blocks), pre_logits, nn.Sequential(pre_logits, *layers[last:]), layout, **facts
    )


def unroll(network: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and parts of nested Sequentials, in order."""
    if not is_sequential(network):
        yield name, network
        return
    for child_name, child in network._modules.items():
        if child is not None:
            yield from unroll(child, f"{name}.{child_name}" if name else child_name)


def is_sequential(network: nn.Module) -> bool:
    """Return whether a network is a Sequential that runs its children in order."""
    return type(network).forward is nn.Sequential.forward


class ClassToken(nn.Module):
    """Select the first token: (N, L, C) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Select the token."""
        return x[:, 0]


class Rescale(nn.Module):
    """Convert images normalized by ImageNet's mean and standard deviation to -1..1."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        mean = torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)
        std = torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
        self.register_buffer("scale", std / 0.5, persistent=False)
        self.register_buffer("shift", (mean - 0.5) / 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale normalized images (N, 3, H, W)."""
        return x * self.scale + self.shift


_SPLITTERS: dict[type[nn.Module], Callable[[Any], BlockList]] = {}


def register_blocks(cls: type[nn.Module], split: Callable[[Any], BlockList]) -> None:
    """Register how networks of a class are split into blocks.

    A subclass with another `forward` is not split this way: it may compute something else.

    Parameters
    ----------
    cls : subclass of nn.Module
    split : callable
        Maps a network to a `BlockList` that shares its parameters; `assemble` builds one. It
        replaces a function that was registered before for the same class.
    """
    _SPLITTERS[cls] = split


def split_known_into_blocks(network: nn.Module) -> BlockList | None:
    """Split a network by its class without running it; return None if the class is unknown."""
    for cls, split in _SPLITTERS.items():
        methods = ("forward", "_forward_impl", "_forward")
        same_forward = all(getattr(type(network), m, 0) is getattr(cls, m, 0) for m in methods)
        if isinstance(network, cls) and same_forward and "forward" not in vars(network):
            return split(network)
    return None


def split_unknown_into_blocks(network: nn.Module, image_size: int | None) -> BlockList:
    """Split a network as finely as possible with the same outputs on two images.

    Parameters
    ----------
    network : nn.Module
        Runs in eval mode, and is not changed.
    image_size : int or None
        H = W of the images that are tried first.
    """
    with _evaluating(network):
        probe, expected = _probe(network, image_size)
        layout = _layout(expected)
        single_block = BlockList((("model", network),), _Average(layout), nn.Identity(), layout)
        if _same(expected[:1], expected[1:]) and not is_sequential(network):
            # If the output does not depend on the image, equal outputs prove nothing.
            return single_block
        chain = _chain(network, probe, expected)
        return _cut_chain(chain, probe) or _trunk(network, probe) or single_block


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
    """Return two coarse random images (2, 3, S, S) that the network accepts, and its outputs."""
    parameter = next(network.parameters(), torch.zeros(()))  # for its device and dtype
    coarse = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = _PROBE_SIZES if image_size is None else (image_size, *_PROBE_SIZES)
    errors = []
    for size in sizes:
        probe = nn.functional.interpolate(coarse, (size, size)).to(parameter)
        try:
            expected = network(probe.clone())
            _layout(expected)
        except Exception as error:
            errors.append(error)
        else:
            return probe, expected
    raise ValueError(
        f"Got a {type(network).__name__}, but expected a network that maps float images "
        f"(N, 3, H, W) to a tensor. Images of {sizes[0]} x {sizes[0]} pixels gave: {errors[0]}. "
        "Wrap it in a module that does so, or pass the image_size that it needs."
    ) from errors[0]


def _layout(x: Tensor) -> str:
    """Return the layout of the output of a network for square images."""
    if not isinstance(x, Tensor) or x.ndim not in (2, 3, 4):
        raise ValueError(f"the output is a {type(x).__name__}, not a tensor of 2 to 4 dimensions")
    if x.ndim == 4:
        return "NHWC" if x.shape[1] == x.shape[2] != x.shape[3] else "NCHW"
    return "NLC" if x.ndim == 3 else "vector"


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-4 * y.abs().max())


@dataclass(frozen=True)
class _Link:
    """A part of a chain, with properties that were measured when it ran."""

    name: str
    module: nn.Module
    layout: str
    gives_map: bool
    writes_into_input: bool

    @property
    def learns(self) -> bool:
        """Whether the part has a convolution or a matrix, and not only scales."""
        return any(parameter.ndim > 1 for parameter in self.module.parameters())

    @property
    def has_linear(self) -> bool:
        return _last_linear(self.module) is not None


def _chain(network: nn.Module, probe: Tensor, expected: Tensor) -> list[_Link]:
    """Run the parts of a network in order; return [] if the output differs from the network's."""
    links = []
    x = probe.clone()
    try:
        for name, part in _parts(network):
            flatten = isinstance(part, nn.Linear) and x.ndim == 4 and x.shape[3] != part.in_features
            module = nn.Sequential(nn.Flatten(1), part) if flatten else part
            version = x._version
            y = module(x)
            layout = _layout(y)
            gives_map = math.prod(y.shape[axis] for axis in POSITIONS[layout]) > 1
            links.append(_Link(name, module, layout, gives_map, x._version != version))
            x = y
    except Exception:
        # A part may raise anything for an input that it does not expect.
        return []
    return links if _same(x, expected) else []


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in network._modules.items():
        for name, part in unroll(child, child_name) if child is not None else ():
            block_list = split_known_into_blocks(part)
            if block_list is None:
                yield name, part
            else:
                yield from ((f"{name}.{block}", module) for block, module in block_list.blocks)
                yield f"{name}.logits", block_list.logits


def _cut_chain(links: list[_Link], probe: Tensor) -> BlockList | None:
    """Cut a chain before every convolution or matrix, up to the last feature map."""
    end = _end_of_blocks(links)
    if end == 0:
        return None
    layout = links[end - 1].layout
    groups = [links[:1]]
    for before, link in pairwise(links[:end]):
        # Norms, activations and pooling stay with the convolution before them.
        complete = before.layout == layout and any(part.learns for part in groups[-1])
        if complete and link.learns and not link.writes_into_input:
            groups.append([])
        groups[-1].append(link)
    blocks = tuple((_name(group, links), _join(group)) for group in groups)
    logits = _join(links[end:])
    parameters = [set(module.parameters()) for module in (*dict(blocks).values(), logits)]
    if sum(map(len, parameters)) != len(set().union(*parameters)):
        return None  # two blocks share a parameter
    return BlockList(blocks, _pre_logits(links[end:], blocks, probe), logits, layout)


def _end_of_blocks(links: list[_Link]) -> int:
    """Count the links up to the last feature map, or without one up to the last linear layer."""
    first = next((i for i, link in enumerate(links) if link.learns), len(links))
    maps = [i for i, link in enumerate(links) if link.gives_map and i >= first]
    linear = [i for i, link in enumerate(links) if link.has_linear]
    if maps:
        return maps[-1] + 1
    return linear[-1] if linear else len(links)


def _name(group: list[_Link], links: list[_Link]) -> str:
    """Name a block after the child that it consists of, or after its first part that learns."""
    name = next((link.name for link in group if link.learns), group[0].name)
    while "." in name:
        parent = name.rpartition(".")[0]
        if any(link.name.startswith(f"{parent}.") and link not in group for link in links):
            break
        name = parent
    return name


def _join(links: list[_Link]) -> nn.Module:
    return links[0].module if len(links) == 1 else nn.Sequential(*(link.module for link in links))


def _pre_logits(
    tail: list[_Link], blocks: tuple[tuple[str, nn.Module], ...], probe: Tensor
) -> nn.Module:
    x = probe.clone()
    for _, block in blocks:
        x = block(x)
    last = max((i for i, link in enumerate(tail) if link.has_linear), default=-1)
    pre_logits = _headless(_join(tail[: last + 1]), x)
    if pre_logits is None:
        return nn.Sequential(_join(tail), _Average(_layout(_join(tail)(x))))
    for name, layer in list(pre_logits.named_modules()):
        if isinstance(layer, nn.Dropout):
            pre_logits.set_submodule(name, nn.Identity())
    return pre_logits


def _trunk(network: nn.Module, probe: Tensor) -> BlockList | None:
    """Build a single block of all layers but the last linear one."""
    trunk = _headless(network, probe)
    if trunk is None:
        return None
    linear = network.get_submodule(_last_linear(network) or "")
    return BlockList((("trunk", trunk),), nn.Identity(), linear, "vector")


def _headless(network: nn.Module, x: Tensor) -> nn.Module | None:
    """Copy `network` without its last linear layer, if that is at the end; share its tensors."""
    network = nn.Sequential(network)
    last = _last_linear(network)
    if last is None:
        return None
    try:
        tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        headless = copy.deepcopy(network, tensors)
        headless.set_submodule(last, nn.Identity())
        features = headless(x.clone())
        logits = network.get_submodule(last)(features)
    except Exception:
        # Not every module can be copied, or works without its last layer.
        return None
    return headless if features.ndim == 2 and _same(logits, network(x.clone())) else None


def _last_linear(network: nn.Module) -> str | None:
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return names[-1] if names else None


class _Average(nn.Module):
    """Average a feature map over its positions; return a vector unchanged."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.axes = POSITIONS[layout]

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes) if self.axes else x
