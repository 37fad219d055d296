"""The trained part of a network: the blocks after the boundary, pre_logits and a new head.

Shapes: N images, C channels, H x W positions or L tokens of a feature map, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer.adaptation.adversary import Adversary
from sktransfer.backbones.blocks import BlockList
from sktransfer.finetuning.schedule import ADVERSARY, HEAD, PRE_LOGITS
from sktransfer.utils.runtime import autocast, seeded


class TrainedSuffix(nn.Module):
    """The part of a network after the last boundary: blocks, pre_logits and a new head.

    The blocks are copies, so the backbone does not change. `move_boundary` sets where activations
    enter and which parts are trained; all other parts stay frozen in every mode.

    Parameters
    ----------
    block_list : BlockList
    boundary : int
        Number of blocks before the suffix; with all of them, only the head is left.
    n_outputs : int
        Number of logits, K.
    width : int
        Size of the penultimate vector, D.
    shapes : dict of int to tuple of int
        Shape of the activations at each boundary where they may enter; they may be flattened.
    dropout : float
        Dropout rate on the penultimate vector.
    learn_statistics : bool
        Whether trained BatchNorm layers normalize by the batch and update their statistics;
        otherwise they keep the pretrained ones.
    precision : torch.dtype
        float32, or bfloat16 for mixed precision while training.
    """

    def __init__(
        self,
        block_list: BlockList,
        boundary: int,
        n_outputs: int,
        width: int,
        shapes: dict[int, tuple[int, ...]],
        dropout: float = 0.0,
        learn_statistics: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        end = len(block_list.blocks)
        self.names = [name for name, _ in block_list.blocks[boundary:]]
        self.blocks = nn.ModuleList(
            copy.deepcopy(block) for _, block in block_list.blocks[boundary:]
        )
        self.pre_logits = nn.Identity() if boundary == end else copy.deepcopy(block_list.pre_logits)
        self.dropout = nn.Dropout(dropout)
        with seeded():
            self.head = nn.Linear(width, n_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # L2 penalty on the weights of each feature, (D,); saved with the head.
        self.head.register_buffer("penalty", torch.zeros(width))
        self.boundary, self.end, self.shapes = boundary, end, shapes
        self.learn_statistics, self.precision = learn_statistics, precision
        self.adversary: Adversary | None = None
        self.training = False
        self.move_boundary(boundary, ())

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts that can be trained by name, from the first block to the head."""
        blocks = dict(zip(self.names, self.blocks, strict=True))
        adversary = {} if self.adversary is None else {ADVERSARY: self.adversary}
        return {**blocks, PRE_LOGITS: self.pre_logits, HEAD: self.head, **adversary}

    def attach_adversary(self, adversary: Adversary) -> None:
        """Attach a domain adversary for training."""
        self.adversary = adversary.to(self.device)

    def detach_adversary(self) -> None:
        """Remove the adversary, which only training needs."""
        self.adversary = None

    def move_boundary(self, boundary: int, trained: Collection[str]) -> None:
        """Set the boundary where activations enter, and the names of the trained parts."""
        self.start, self.trained = boundary, frozenset(trained)
        for name, part in self.parts().items():
            part.requires_grad_(name in self.trained)
        self.train(self.training)

    def train(self, mode: bool = True) -> TrainedSuffix:
        """Set the mode of the trained parts; frozen parts stay in evaluation mode."""
        super().train(mode)
        for name, part in self.parts().items():
            if name not in self.trained:
                part.train(False)
            elif not self.learn_statistics:
                for module in part.modules():
                    if isinstance(module, _BatchNorm):
                        module.train(False)
        return self

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Map activations at the boundary, (N, ...), to penultimate vectors (N, D).

        They may be flattened; feature maps may also be smaller than those of whole images.
        """
        if self.start == self.end:
            return x.flatten(1)
        if x.ndim == 2:
            x = x.reshape(len(x), *self.shapes[self.start])
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        first = self.start - self.boundary
        for block in self.blocks[first:]:
            x = block(x)
        return self.pre_logits(x)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> Any:
        """Map activations at the boundary, (N, ...), to logits (N, K), float32.

        Given activations of the same number of target images, also return the adversary's loss.
        """
        if not len(x):  # a process's share of a batch can be empty
            return x.new_zeros(0, self.head.out_features)
        with autocast(x.device, self.precision if self.training else torch.float32):
            embeddings = self.embed(x)
            logits = self.head(self.dropout(embeddings)).float()
            if target is None or self.adversary is None:
                return logits
            return logits, self.adversary(embeddings, self.embed(target))

    def learning_layers(self, trained: Collection[str]) -> list[_BatchNorm]:
        """Return the BatchNorm layers of trained parts that normalize by the batch."""
        return [
            layer
            for name, part in self.parts().items()
            for layer in part.modules()
            if name in trained and isinstance(layer, _BatchNorm) and name != ADVERSARY
            if self.learn_statistics or layer.running_mean is None
        ]

    @torch.no_grad()
    def needs_several_images(self, boundary: int, trained: Collection[str]) -> bool:
        """Return whether a BatchNorm in training gets a single value per channel from an image.

        A batch of one image then has no variance, and torch raises an error.

        Parameters
        ----------
        boundary : int
            Where activations enter.
        trained : collection of str
            Names of the trained parts.
        """
        learning = self.learning_layers(trained)
        if not learning:
            return False
        n_values: list[int] = []

        def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            n_values.append(inputs[0].numel() // inputs[0].shape[1])

        hooks = [layer.register_forward_pre_hook(count) for layer in learning]
        start, self.start = self.start, boundary
        try:
            self.embed(torch.zeros(2, *self.shapes[boundary], device=self.device))
        finally:
            self.start = start
            for hook in hooks:
                hook.remove()
        return min(n_values, default=4) <= 2  # of two images

    @property
    def device(self) -> torch.device:
        """Device of the suffix."""
        return self.head.weight.device

    @torch.no_grad()
    def set_head(
        self, weight: np.ndarray, bias: np.ndarray, penalty: np.ndarray | float = 0.0
    ) -> None:
        """Set weight (K, D), bias (K,) and penalty (D,) of the head."""
        self.head.weight.copy_(torch.from_numpy(weight))
        self.head.bias.copy_(torch.from_numpy(bias))
        self.head.get_buffer("penalty").copy_(torch.as_tensor(penalty))

    @torch.no_grad()
    def scale_head(self, factor: float) -> None:
        """Multiply the logits by a factor."""
        self.head.weight.mul_(factor)
        self.head.bias.mul_(factor)

    def penalty(self) -> torch.Tensor:
        """Compute the penalty on the head's weights, which is added to the mean loss."""
        return (self.head.get_buffer("penalty") * self.head.weight.square()).sum()

    def count_trained(self) -> int:
        """Count the trainable parameters."""
        return sum(weight.numel() for weight in self.trained_parameters())

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [weight for weight in self.parameters() if weight.requires_grad]

    def state_of(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Copy all tensors of some parts to the CPU."""
        return {
            f"{name}.{key}": tensor.detach().to("cpu", copy=True)
            for name, part in self.parts().items()
            if name in names
            for key, tensor in part.state_dict().items()
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Load tensors that `state_of` returned."""
        for name, part in self.parts().items():
            load_part(state, name, part)


@torch.no_grad()
def load_part(state: dict[str, torch.Tensor], name: str, part: nn.Module) -> None:
    """Copy those tensors of a part into it that `TrainedSuffix.state_of` returned."""
    for key, tensor in part.state_dict().items():
        if f"{name}.{key}" in state:
            tensor.copy_(state[f"{name}.{key}"])
