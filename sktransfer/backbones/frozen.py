"""The frozen part of a backbone: the blocks before a boundary.

A backbone is an ordered list of blocks, and a boundary divides it into a frozen and a trained part.
"Frozen" means no gradient, no changing BatchNorm statistics and no dropout in any mode.

Shapes: N images, C channels, H x W positions or L tokens of a feature map, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from sktransfer.backbones.blocks import POSITIONS, BlockList
from sktransfer.utils.errors import did_you_mean

POOLINGS = ("avg", "max", "avgmax")


def freeze(module: nn.Module) -> nn.Module:
    """Set a module to eval mode, without gradients for its parameters."""
    return module.eval().requires_grad_(False)


class FrozenPrefix(nn.Module):
    """The frozen part of a backbone, up to the deepest of the emitted layers.

    Parameters
    ----------
    block_list : BlockList
        The backbone's blocks, pre_logits and logits.
    layers : sequence of (str or None)
        Outputs to concatenate: names of blocks, `"logits"`, or `None` for the penultimate
        vector.
    pooling : {"avg", "max", "avgmax"} or None
        Reduction of a feature map to a vector. For the last map, `"avg"` is the network's own
        pooling, followed by its layers up to the classification layer. `None` flattens the map.

    Raises
    ------
    ValueError
        If a name is not a block of the backbone.
    """

    def __init__(
        self,
        block_list: BlockList,
        layers: Sequence[str | None] = (None,),
        pooling: str | None = "avg",
    ) -> None:
        super().__init__()
        names = block_list.names
        depths = [_depth(layer, names) for layer in layers]
        self.blocks = nn.ModuleList(block for _, block in block_list.blocks[: max(depths)])
        self.pre_logits = (
            block_list.pre_logits if None in layers and pooling == "avg" else nn.Identity()
        )
        self.logits = block_list.logits if "logits" in layers else nn.Identity()
        self.layers, self.depths, self.pooling = tuple(layers), depths, pooling
        self.layout, self.prefix_tokens = block_list.layout, block_list.prefix_tokens
        freeze(self)

    def train(self, mode: bool = True) -> FrozenPrefix:
        """Stay in eval mode; a frozen prefix has no training mode."""
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalized images (N, 3, H, W) to embeddings (N, D)."""
        emitted: dict[int, torch.Tensor] = {}
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x)
            for i, layer_depth in enumerate(self.depths):
                if layer_depth == depth:
                    emitted[i] = self._emit(self.layers[i], x)
        return torch.cat([emitted[i] for i in range(len(self.layers))], dim=1)

    def feature_map(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalized images (N, 3, H, W) to the output of the last block."""
        for block in self.blocks:
            x = block(x)
        return x

    def _emit(self, layer: str | None, x: torch.Tensor) -> torch.Tensor:
        if layer == "logits":
            return self.logits(x)
        if layer is None and self.pooling == "avg":
            return self.pre_logits(x)
        return pool(x, self.pooling, self.layout, self.prefix_tokens)


@fx.wrap  # fusion traces the blocks, and cannot trace what depends on the shape of a map
def pool(
    x: torch.Tensor, pooling: str | None, layout: str = "NCHW", prefix_tokens: int = 0
) -> torch.Tensor:
    """Reduce feature maps to vectors; return vectors unchanged.

    Parameters
    ----------
    x : Tensor of shape (N, C, H, W), (N, H, W, C), (N, L, C) or (N, D)
    pooling : {"avg", "max", "avgmax"} or None
        Mean or maximum over positions, both concatenated, or every value of the map.
    layout : {"NCHW", "NHWC", "NLC"}
        The axes of `x`.
    prefix_tokens : int
        Tokens at the front that are not positions of the image; the pooling leaves them out.

    Examples
    --------
    >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    >>> pool(x, "avgmax")
    tensor([[3., 6.]])
    """
    if x.ndim == 2:
        return x
    if pooling is None:
        return x.flatten(1)
    positions = POSITIONS[layout]
    x = x[:, prefix_tokens:] if layout == "NLC" else x
    pooled = {"avg": lambda: x.mean(positions), "max": lambda: x.amax(positions)}
    parts = ["avg", "max"] if pooling == "avgmax" else [pooling]
    return torch.cat([pooled[part]() for part in parts], dim=1)


def check_layers(layers: Sequence[str | None], block_list: BlockList) -> None:
    """Check that a backbone has these layers.

    Raises
    ------
    ValueError
        If a name is not a block of the backbone.
    """
    for layer in layers:
        _depth(layer, block_list.names)


def _depth(layer: str | None, names: list[str]) -> int:
    """Return the number of blocks up to a layer."""
    if layer is None or (isinstance(layer, str) and layer == "logits"):
        return len(names)
    if not isinstance(layer, str) or layer not in names:
        raise ValueError(
            f"Got layer={layer!r}, but the backbone has blocks {', '.join(names)}; expected one of "
            "them, 'logits', or None for the penultimate vector"
            f"{did_you_mean(layer, [*names, 'logits'])}"
        )
    return names.index(layer) + 1


class FrozenSpan(nn.Module):
    """The frozen blocks between two boundaries; maps activations at `start` to those at `stop`.

    Parameters
    ----------
    block_list : BlockList
    start, stop : int
        Boundaries, as numbers of blocks before them. A span up to the last block also includes
        the pre-logits layers, and returns the penultimate vector.
    """

    def __init__(self, block_list: BlockList, start: int, stop: int) -> None:
        super().__init__()
        parts = [block for _, block in block_list.blocks[start:stop]]
        if stop == len(block_list.blocks):
            parts.append(block_list.pre_logits)
        self.parts = nn.Sequential(*parts)
        freeze(self)

    def train(self, mode: bool = True) -> FrozenSpan:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map activations (N, ...) to activations (N, ...)."""
        return self.parts(x)
