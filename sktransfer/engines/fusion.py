"""Convolutions that do the work of what surrounds them, for networks that torch runs on the CPU.

Padding, a convolution, the BatchNorm of a frozen network and an activation are four passes over a
feature map, of which three only wait for memory. BatchNorm becomes part of the weights (Jacob et
al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2), padding part of the kernel, and oneDNN, with which torch convolves on the
CPU, applies the activation while the values are at hand.

Shapes: N images, C channels, H x W positions of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sktransfer.backbones.efficientnet_lite import SameConv2d
from sktransfer.backbones.frozen import freeze


@torch.inference_mode()
def fuse(network: nn.Module) -> nn.Module:
    """Make a network that computes the same with fewer passes over its feature maps.

    Parameters
    ----------
    network : Module
        Frozen, float32, on the CPU. It stays as it is, and shares what is not fused.

    Returns
    -------
    network : Module
        To be run in inference mode, on one batch before several threads do. All others are to have
        the height and width of the first, and are fastest with its number of images. The network
        itself where its convolutions are surrounded by nothing that they can do.

    Raises
    ------
    Exception
        Where the way through the network depends on the values in it, or where this torch has no
        oneDNN: whatever torch says of it.

    Examples
    --------
    >>> network = freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    >>> x = torch.ones(1, 3, 5, 5)
    >>> with torch.inference_mode():
    ...     torch.allclose(fuse(network)(x), network(x), atol=1e-6)
    True
    """
    graph = _Tracer().trace(network)
    fused, changed = fx.GraphModule(network, graph), False
    for node in list(graph.nodes):
        conv = _module(node, fused)
        if not _can_be_fused(conv):
            continue
        last, follower = node, _only_user(node)
        batch_norm = _module(follower, fused)
        if isinstance(batch_norm, nn.BatchNorm2d) and batch_norm.track_running_stats:
            conv = fuse_conv_bn_eval(conv, batch_norm)
            last, follower = follower, _only_user(follower)
        activation = _activation(follower, fused)
        if activation.name != "none":
            last = follower
        if last is node and not isinstance(conv, SameConv2d):
            continue
        name = f"fused_{node.name}"
        fused.add_module(name, _FusedConv2d(conv, activation))
        with graph.inserting_after(last):
            last.replace_all_uses_with(graph.call_module(name, node.args, node.kwargs))
        changed = True
    graph.eliminate_dead_code()
    fused.delete_all_unused_submodules()
    fused.recompile()
    return freeze(fused) if changed else network


class _Tracer(fx.Tracer):
    """Follows a network down to its convolutions, whatever these do inside."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)


class _Activation(NamedTuple):
    """What oneDNN calls an activation."""

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str | None = None


_NONE, _RELU = _Activation("none"), _Activation("relu")
_RELU6 = _Activation("hardtanh", (0.0, 6.0))
_FUNCTIONS: dict[Any, _Activation] = {nn.functional.relu: _RELU, nn.functional.relu6: _RELU6}
_MODULES: dict[type, Callable[[Any], _Activation]] = {
    nn.ReLU: lambda module: _RELU,
    nn.ReLU6: lambda module: _RELU6,
    nn.SiLU: lambda module: _Activation("swish"),
    nn.Hardswish: lambda module: _Activation("hardswish"),
    nn.GELU: lambda module: _Activation("gelu", (), module.approximate),
}


def _activation(node: Any, network: nn.Module) -> _Activation:
    """Tell what oneDNN calls a node, `"none"` where that is no activation."""
    module = _module(node, network)
    if module is None:
        return _FUNCTIONS.get(getattr(node, "target", None), _NONE)
    return _MODULES[type(module)](module) if type(module) in _MODULES else _NONE


def _module(node: Any, network: nn.Module) -> Any:
    """Find the module that a node calls, None where it calls none."""
    called = node is not None and node.op == "call_module"
    return network.get_submodule(node.target) if called else None


def _can_be_fused(module: Any) -> bool:
    """Whether it is a convolution, and none that does more than that."""
    known = type(module) in (nn.Conv2d, SameConv2d)
    return known and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _only_user(node: Any) -> Any:
    """Find the node that alone uses what a node gives, None where none or several do."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


class _FusedConv2d(nn.Module):
    """A convolution and an activation in one pass, over maps of the size of the first one."""

    def __init__(self, conv: nn.Conv2d, activation: _Activation) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation
        self.weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            self._prepare(x)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.conv.bias, *self.geometry, *self.activation
        )

    def _prepare(self, x: torch.Tensor) -> None:
        """Lay out the weights as is best for maps like this one."""
        conv, weight, padding = self.conv, self.conv.weight, self.conv.padding
        if isinstance(conv, SameConv2d):
            height, width = conv.zeros(x)
            # The end gets one more where they are odd. So do both, and the kernel begins with 0.
            weight = nn.functional.pad(weight, [width % 2, 0, height % 2, 0])
            padding = ((height + 1) // 2, (width + 1) // 2)
        self.geometry = (padding, conv.stride, conv.dilation, conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight, *self.geometry, list(x.shape)
        )
