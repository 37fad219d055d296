"""BatchNorm statistics of a backbone, and a backbone with others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer.backbones.blocks import Anatomy
from sktransfer.backbones.frozen import freeze
from sktransfer.backbones.loading import Backbone
from sktransfer.backbones.weights import digest_tensors


@dataclass(frozen=True, eq=False)
class BatchNormState:
    """Statistics of all BatchNorm layers of a backbone, estimated on other pictures.

    Parameters
    ----------
    statistics : dict of str to Tensor
        Running means and variances by the name of their buffer.
    """

    statistics: dict[str, torch.Tensor]


def check_batch_norm(backbone: Backbone) -> None:
    """Refuse a backbone that has no BatchNorm to adapt, with a ValueError."""
    if not any(batch_norms(backbone.anatomy)):
        raise ValueError(
            f"Got batch_norm='adapt', but {backbone.name} has no BatchNorm layers to adapt; "
            "use batch_norm='frozen'"
        )


@lru_cache(maxsize=2)
def with_batch_norm(backbone: Backbone, state: BatchNormState) -> Backbone:
    """Copy a backbone, with other BatchNorm statistics."""
    anatomy = copy.deepcopy(backbone.anatomy)
    for name, buffer in named_statistics(anatomy):
        buffer.copy_(state.statistics[name])
    for _, block in anatomy.blocks:
        freeze(block)
    digest = digest_tensors(state.statistics.items(), backbone.digest.hex())
    return replace(backbone, anatomy=anatomy, digest=digest)


def batch_norms(anatomy: Anatomy) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield all BatchNorm layers that keep statistics, with their names."""
    for block_name, block in anatomy.blocks:
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                yield name, module


def named_statistics(anatomy: Anatomy) -> Iterator[tuple[str, torch.Tensor]]:
    """Give running means and variances of all BatchNorm layers, by the name of their buffer."""
    for name, layer in batch_norms(anatomy):
        for kind in ("running_mean", "running_var"):
            yield f"{name}.{kind}", getattr(layer, kind)
