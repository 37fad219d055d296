"""Adapting to another domain: BatchNorm statistics of the pictures at hand (AdaBN)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer.anatomy import Anatomy
from sktransfer.backbones import Backbone
from sktransfer.split import freeze
from sktransfer.weights import digest_tensors


@dataclass(frozen=True, eq=False)
class BatchNormState:
    """Statistics of all BatchNorm layers of a backbone, estimated on other pictures.

    Parameters
    ----------
    statistics : dict of str to Tensor
        Running means and variances by the name of their buffer.
    """

    statistics: dict[str, torch.Tensor]


def estimate_batch_norm(
    backbone: Backbone, batches: Iterable[torch.Tensor], device: torch.device
) -> BatchNormState:
    """Estimate BatchNorm statistics on pictures of another domain; the backbone is left as it is.

    Source: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation" (AdaBN),
    arXiv 1603.04779. Each layer's statistics are averaged over the batches, each batch having been
    normalised by its own in the layers before.

    Parameters
    ----------
    backbone : Backbone
    batches : iterable of Tensor of shape (N, 3, H, W)
        uint8, 0-255: prepared pictures.
    device : torch.device

    Raises
    ------
    ValueError
        Where the backbone has no BatchNorm, or too few pictures came to estimate a variance.
    """
    anatomy = copy.deepcopy(backbone.anatomy)
    blocks = nn.Sequential(*(block for _, block in anatomy.blocks)).to(device)
    layers = [layer for _, layer in _batch_norms(anatomy)]
    if not layers:
        raise ValueError(
            f"Got batch_norm='adapt', but {backbone.name} has no BatchNorm layers to adapt; "
            "use batch_norm='frozen'"
        )
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
        layer.train()
    try:
        with torch.no_grad():
            for batch in batches:
                blocks(backbone.preprocessing.normalize(batch.to(device)))
    except ValueError as error:
        raise ValueError(
            f"batch_norm='adapt' cannot estimate statistics from so few pictures ({error}); give "
            "fit more of them, or use batch_norm='frozen'"
        ) from error
    return BatchNormState({name: value.cpu() for name, value in _statistics(anatomy)})


@lru_cache(maxsize=2)
def with_batch_norm(backbone: Backbone, state: BatchNormState) -> Backbone:
    """Copy a backbone, with other BatchNorm statistics."""
    anatomy = copy.deepcopy(backbone.anatomy)
    for name, buffer in _statistics(anatomy):
        buffer.copy_(state.statistics[name])
    for _, block in anatomy.blocks:
        freeze(block)
    digest = digest_tensors(state.statistics.items(), backbone.digest.hex())
    return replace(backbone, anatomy=anatomy, digest=digest)


def _batch_norms(anatomy: Anatomy) -> Iterator[tuple[str, _BatchNorm]]:
    for block_name, block in anatomy.blocks:
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                yield name, module


def _statistics(anatomy: Anatomy) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layer in _batch_norms(anatomy):
        for kind in ("running_mean", "running_var"):
            yield f"{name}.{kind}", getattr(layer, kind)
