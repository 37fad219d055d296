"""BatchNorm statistics of a backbone, and a copy of a backbone with other statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer.backbones.blocks import BlockList
from sktransfer.backbones.frozen import freeze
from sktransfer.backbones.loading import Backbone, keep_backbone
from sktransfer.backbones.weights import digest_tensors, to_arrays, to_tensors


@dataclass(frozen=True, eq=False)
class BatchNormState:
    """BatchNorm statistics of a backbone, estimated on images other than the pretraining ones.

    Parameters
    ----------
    statistics : dict of str to ndarray
        Running means and variances by the names of their buffers.
    """

    statistics: dict[str, np.ndarray]

    @classmethod
    def of(cls, block_list: BlockList) -> BatchNormState:
        """Copy the statistics of blocks."""
        return cls(to_arrays(dict(named_statistics(block_list))))


def check_batch_norm(backbone: Backbone) -> None:
    """Raise a ValueError if a backbone has no BatchNorm to adapt."""
    if not any(batch_norms(backbone.block_list)):
        raise ValueError(
            f"Got batch_norm='adapt', but {backbone.name} has no BatchNorm layers to adapt; "
            "use batch_norm='frozen'"
        )


def with_batch_norm(backbone: Backbone, state: BatchNormState) -> Backbone:
    """Return a copy of a backbone with other BatchNorm statistics."""
    statistics = to_tensors(state.statistics)
    digest = digest_tensors(sorted(statistics.items()), backbone.digest.hex())

    def make() -> Backbone:
        block_list = copy.deepcopy(backbone.block_list)
        for name, buffer in named_statistics(block_list):
            buffer.copy_(statistics[name])
        for _, block in block_list.blocks:
            freeze(block)
        return replace(backbone, block_list=block_list, digest=digest)

    return keep_backbone(digest, make)


def batch_norms(block_list: BlockList) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield the names and modules of all BatchNorm layers that keep statistics."""
    for block_name, block in block_list.blocks:
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                yield name, module


def named_statistics(block_list: BlockList) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the running means and variances of all BatchNorm layers, with their buffer names."""
    for name, layer in batch_norms(block_list):
        for kind in ("running_mean", "running_var"):
            yield f"{name}.{kind}", getattr(layer, kind)
