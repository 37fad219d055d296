"""Adapting to another domain: BatchNorm statistics of the pictures at hand (AdaBN)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer.anatomy import Anatomy
from sktransfer.backbones import Backbone, load_backbone
from sktransfer.reading import Faults, PictureReader
from sktransfer.split import freeze
from sktransfer.transforms import Preprocessing
from sktransfer.views import Views
from sktransfer.weights import digest_tensors

# Pictures whose statistics are estimated together.
_BATCH = 32


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
    return BatchNormState({name: value.cpu() for name, value in named_statistics(anatomy)})


def adapt_batch_norm(
    backbone: Backbone, views: Views, device: torch.device, threads: int, faults: Faults
) -> BatchNormState:
    """Estimate BatchNorm statistics on pictures, in a shuffled order.

    Parameters
    ----------
    backbone : Backbone
    views : Views
    device : torch.device
    threads : int
        Threads that decode pictures.
    faults : Faults
        Takes the errors of broken pictures.
    """
    # Shuffled: folders come class by class, and a batch should look like the whole.
    rows = np.random.RandomState(0).permutation(len(views)).tolist()
    batches = PictureReader(views, threads, faults).batches(rows, _BATCH)
    return estimate_batch_norm(backbone, (batch for _, batch in batches), device)


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


@dataclass(frozen=True)
class BackboneSource:
    """What a fitted estimator remembers of its backbone, which is looked up again when needed.

    Parameters
    ----------
    backbone, weights
        As `load_backbone` takes them.
    image_size : int, (int, int) or None
    batch_norm : BatchNormState or None
        The statistics that replace those of the weights.
    digest : bytes
        Of the weights that `fit` saw.
    """

    backbone: Any
    weights: Any
    image_size: Any
    batch_norm: BatchNormState | None
    digest: bytes

    def load(self) -> Backbone:
        """Load the backbone, or find it where this process has loaded it before.

        Raises
        ------
        ValueError
            Where the weights are others than those that `fit` saw.
        """
        backbone = load_backbone(self.backbone, self.weights)
        if backbone.digest != self.digest:
            raise ValueError(
                f"Got weights of {backbone.name} with digest {backbone.digest.hex()}, but fit saw "
                f"{self.digest.hex()}: they changed since. Call fit again, or bring them back"
            )
        return with_batch_norm(backbone, self.batch_norm) if self.batch_norm else backbone

    def block_names(self) -> list[str]:
        """Name the blocks, from the picture on."""
        return [name for name, _ in self.load().anatomy.blocks]

    def preprocessing(self) -> Preprocessing:
        """Tell what is done to a picture before it is seen."""
        return self.load().preprocessing.with_image_size(self.image_size)


def _batch_norms(anatomy: Anatomy) -> Iterator[tuple[str, _BatchNorm]]:
    for block_name, block in anatomy.blocks:
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                yield name, module


def named_statistics(anatomy: Anatomy) -> Iterator[tuple[str, torch.Tensor]]:
    """Give running means and variances of all BatchNorm layers, by the name of their buffer."""
    for name, layer in _batch_norms(anatomy):
        for kind in ("running_mean", "running_var"):
            yield f"{name}.{kind}", getattr(layer, kind)
