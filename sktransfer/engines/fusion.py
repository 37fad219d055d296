"""Convolutions fused with padding, BatchNorm and activation, for torch on the CPU.

Padding, a convolution, the BatchNorm of a frozen network and an activation are four passes over a
feature map, and three of them only wait for memory. Fusion makes BatchNorm part of the weights
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2) and padding part of the kernel. oneDNN, which torch
uses for convolutions on the CPU, then applies the activation in the same pass.

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
    """Build an equivalent network with fewer passes over its feature maps.

    Parameters
    ----------
    network : Module
        Frozen, float32, on the CPU. It is not changed, and layers that are not fused are shared.

    Returns
    -------
    network : Module
        Run it in inference mode. All batches must have the height and width of the first one, and
        are fastest with the same number of images. It is `network` itself if nothing can be fused.

    Raises
    ------
    Exception
        Whatever torch raises if the control flow of the network depends on values, or if torch
        was built without oneDNN.

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
    """A tracer that does not trace into convolutions."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d) or super().is_leaf_module(module, name)


class _Activation(NamedTuple):
    """An activation as oneDNN calls it."""

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
    """Return the activation that a node computes, or `_NONE` if it computes none."""
    module = _module(node, network)
    if module is None:
        return _FUNCTIONS.get(getattr(node, "target", None), _NONE)
    return _MODULES[type(module)](module) if type(module) in _MODULES else _NONE


def _module(node: Any, network: nn.Module) -> Any:
    """Return the module that a node calls, or None."""
    called = node is not None and node.op == "call_module"
    return network.get_submodule(node.target) if called else None


def _can_be_fused(module: Any) -> bool:
    """Return whether a module is a plain convolution that oneDNN can run."""
    plain = type(module) in (nn.Conv2d, SameConv2d)
    return plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _only_user(node: Any) -> Any:
    """Return the only node that uses the output of a node, or None if there is no single one."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


class _FusedConv2d(nn.Module):
    """A convolution and an activation in one pass; the first map fixes the size of all maps.

    oneDNN chooses the order of the weights by the number of threads, and by the number of images if
    several threads share them. In another order, it would reorder them in every call, which takes
    many times as long as the convolution.
    """

    def __init__(self, conv: nn.Conv2d, activation: _Activation) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation
        # By threads and images; the last four that were needed.
        self.weights: dict[tuple[int, int], torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        threads = torch.get_num_threads()
        key = threads, len(x) if threads > 1 else 0
        weight = self.weights.get(key)
        if weight is None:
            weight = self._reorder(x)
            # Replaced as a whole, because other threads read it.
            self.weights = dict([*self.weights.items(), (key, weight)][-4:])
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.conv.bias, *self.geometry, *self.activation
        )

    def _reorder(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder the weights for maps like `x`."""
        conv, weight, padding = self.conv, self.conv.weight, self.conv.padding
        if isinstance(conv, SameConv2d):
            height, width = conv.zeros(x)
            # Odd padding puts one more zero at the end. Here, both ends get it, and a leading zero
            # in the kernel cancels the one at the start.
            weight = nn.functional.pad(weight, [width % 2, 0, height % 2, 0])
            padding = ((height + 1) // 2, (width + 1) // 2)
        self.geometry = (padding, conv.stride, conv.dilation, conv.groups)
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(x.shape))
