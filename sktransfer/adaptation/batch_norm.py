"""Adapting to another domain: BatchNorm statistics of the images at hand (AdaBN)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as nnf
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer.backbones.batch_norm import (
    BatchNormState,
    batch_norms,
    check_batch_norm,
    named_statistics,
)
from sktransfer.backbones.blocks import BlockList
from sktransfer.backbones.loading import Backbone
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.views import Views

# Images, at most, whose statistics are estimated together.
_BATCH = 32
# Images of a domain, at most, that a tuned network is matched on: more change nothing.
_ENOUGH = 1024
# Fewer of them say little about it.
_FEW = 10


def estimate_batch_norm(
    backbone: Backbone, batches: Iterable[torch.Tensor], device: torch.device
) -> BatchNormState:
    """Estimate BatchNorm statistics on images of another domain; the backbone is left as it is.

    Source: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation" (AdaBN),
    arXiv 1603.04779. Each layer's statistics are averaged over the batches, each batch having been
    normalized by its own in the layers before.

    Parameters
    ----------
    backbone : Backbone
    batches : iterable of Tensor of shape (N, 3, H, W)
        uint8, 0-255: prepared images.
    device : torch.device

    Raises
    ------
    ValueError
        Where the backbone has no BatchNorm, or too few images came to estimate a variance.
    """
    block_list, blocks, layers = _copy(backbone, device)
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
            f"batch_norm='adapt' cannot estimate statistics from so few images ({error}); give "
            "fit more of them, or use batch_norm='frozen'"
        ) from error
    return BatchNormState({name: value.cpu() for name, value in named_statistics(block_list)})


def adapt_batch_norm(
    backbone: Backbone, views: Views, device: torch.device, threads: int, image_errors: ImageErrors
) -> BatchNormState:
    """Estimate BatchNorm statistics on images, in a shuffled order.

    Parameters
    ----------
    backbone : Backbone
    views : Views
    device : torch.device
    threads : int
        Threads that decode images.
    image_errors : ImageErrors
        Takes the errors of broken images.
    """
    return estimate_batch_norm(backbone, _shuffled(views, threads, image_errors), device)


@torch.no_grad()
def match_batch_norm(
    backbone: Backbone, source: Views, target: Views, device: torch.device, threads: int
) -> BatchNormState:
    """Find statistics under which a target looks to each layer as the source does.

    For images of the target each BatchNorm layer then gives, channel by channel, the mean and the
    variance that it gives for those of the source under the statistics that the backbone has. So
    what was learned under these goes on to hold. (AdaBN's own, a mean of 0 and a variance of 1, are
    what the layers behind had in pretraining; blocks that were trained since have seen others.)

    Parameters
    ----------
    backbone : Backbone
        Left as it is.
    source, target : Views
        No more than 1,024 images of each are looked at.
    device : torch.device
    threads : int
        Threads that decode images.

    Raises
    ------
    ValueError
        Where the backbone has no BatchNorm.

    Warns
    -----
    UserWarning
        Of fewer than 10 images of the target.
    """
    block_list, blocks, layers = _copy(backbone, device)

    def observe(views: Views, ours: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """Give the mean moments of what comes into each layer; match them to `ours`, if any."""
        found: dict[Any, list[torch.Tensor]] = {layer: [] for layer in layers}

        def look(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            (x,) = inputs
            others = [axis for axis in range(x.ndim) if axis != 1]
            moments = torch.stack([x.mean(others), x.var(others, correction=0)])
            found[layer].append(moments)
            if not ours:
                return output
            mean, var = _match(layer, ours[layer], moments)
            return nnf.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)

        hooks = [layer.register_forward_hook(look) for layer in layers]
        for batch in _shuffled(views, threads, ImageErrors("raise"), _ENOUGH):
            blocks(backbone.preprocessing.normalize(batch.to(device)))
        for hook in hooks:
            hook.remove()
        return {layer: torch.stack(seen).mean(0) for layer, seen in found.items() if seen}

    if len(target) < _FEW:
        warnings.warn(
            f"Got batch_norm='adapt' with {len(target)} images of the target: too few to tell "
            f"its statistics; give {_FEW} or more, or use batch_norm='frozen'",
            stacklevel=2,
        )
    ours = observe(source, {})
    for layer, moments in observe(target, ours).items():
        mean, var = _match(layer, ours[layer], moments)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return BatchNormState({name: value.cpu() for name, value in named_statistics(block_list)})


def _match(
    layer: Any, ours: torch.Tensor, theirs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find statistics under which `theirs` (mean, variance) come out as `ours` do."""
    learned, source, target = (
        (var + layer.eps).sqrt() for var in (layer.running_var, ours[1], theirs[1])
    )
    deviation = target * learned / source
    mean = theirs[0] - (ours[0] - layer.running_mean) / learned * deviation
    return mean, (deviation**2 - layer.eps).clamp_min(0)


def _copy(
    backbone: Backbone, device: torch.device
) -> tuple[BlockList, nn.Sequential, list[_BatchNorm]]:
    """Copy a network: what it consists of, its blocks on the device, and their BatchNorm layers."""
    block_list = copy.deepcopy(backbone.block_list)
    blocks = nn.Sequential(*(block for _, block in block_list.blocks)).to(device)
    check_batch_norm(backbone)
    return block_list, blocks, [layer for _, layer in batch_norms(block_list)]


def _shuffled(
    views: Views, threads: int, image_errors: ImageErrors, most: int | None = None
) -> Iterator[torch.Tensor]:
    """Read images in batches that look like the whole: folders come class by class."""
    rows = np.random.RandomState(0).permutation(len(views))[:most]
    # Of equal size, since each batch counts the same.
    batches = [part.tolist() for part in np.array_split(rows, math.ceil(len(rows) / _BATCH))]
    for _, batch in ImageReader(views, threads, image_errors).read(batches):
        yield batch
