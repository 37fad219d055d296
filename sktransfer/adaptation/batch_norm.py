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
_BATCH_SIZE = 32
# Images of a domain, at most, that a tuned network is matched on: more change nothing.
MAX_MATCHED_IMAGES = 1024
# Fewer images are too few to estimate the statistics of a domain.
_FEWEST_IMAGES = 10


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
        If the backbone has no BatchNorm, or the images are too few to estimate a variance.
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
    """Compute statistics that give target images the layer outputs of the source.

    With them the output of each BatchNorm layer has, channel by channel, the same mean and variance
    for target images as it has for source images with the statistics of the backbone. So later
    layers see inputs like those that they were trained on. (AdaBN gives outputs a mean of 0 and a
    variance of 1, which fits layers as they were pretrained, not as they were trained since.)

    Parameters
    ----------
    backbone : Backbone
        It is not changed.
    source, target : Views
        At most 1,024 images of each are read.
    device : torch.device
    threads : int
        Threads that decode images.

    Raises
    ------
    ValueError
        If the backbone has no BatchNorm.

    Warns
    -----
    UserWarning
        If the target has fewer than 10 images.
    """
    block_list, blocks, layers = _copy(backbone, device)

    def mean_moments(
        views: Views, source_moments: dict[Any, torch.Tensor]
    ) -> dict[Any, torch.Tensor]:
        """Average the moments of each layer's input; match them to those of the source, if any."""
        found: dict[Any, list[torch.Tensor]] = {layer: [] for layer in layers}

        def record(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            (x,) = inputs
            others = [axis for axis in range(x.ndim) if axis != 1]
            moments = torch.stack([x.mean(others), x.var(others, correction=0)])
            found[layer].append(moments)
            if not source_moments:
                return output
            mean, var = _match(layer, source_moments[layer], moments)
            return nnf.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)

        hooks = [layer.register_forward_hook(record) for layer in layers]
        for batch in _shuffled(views, threads, ImageErrors("raise"), MAX_MATCHED_IMAGES):
            blocks(backbone.preprocessing.normalize(batch.to(device)))
        for hook in hooks:
            hook.remove()
        return {layer: torch.stack(seen).mean(0) for layer, seen in found.items() if seen}

    if len(target) < _FEWEST_IMAGES:
        warnings.warn(
            f"Got batch_norm='adapt' with {len(target)} images of the target: too few to "
            f"estimate its statistics; give {_FEWEST_IMAGES} or more, or use batch_norm='frozen'",
            stacklevel=2,
        )
    source_moments = mean_moments(source, {})
    for layer, moments in mean_moments(target, source_moments).items():
        mean, var = _match(layer, source_moments[layer], moments)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return BatchNormState({name: value.cpu() for name, value in named_statistics(block_list)})


def _match(
    layer: Any, source_moments: torch.Tensor, target_moments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute statistics that map target moments (mean, variance) to the outputs of the source."""
    learned, source, target = (
        (var + layer.eps).sqrt()
        for var in (layer.running_var, source_moments[1], target_moments[1])
    )
    deviation = target * learned / source
    mean = target_moments[0] - (source_moments[0] - layer.running_mean) / learned * deviation
    return mean, (deviation**2 - layer.eps).clamp_min(0)


def _copy(
    backbone: Backbone, device: torch.device
) -> tuple[BlockList, nn.Sequential, list[_BatchNorm]]:
    """Copy a network: its block list, its blocks on the device, and their BatchNorm layers."""
    block_list = copy.deepcopy(backbone.block_list)
    blocks = nn.Sequential(*(block for _, block in block_list.blocks)).to(device)
    check_batch_norm(backbone)
    return block_list, blocks, [layer for _, layer in batch_norms(block_list)]


def _shuffled(
    views: Views, threads: int, image_errors: ImageErrors, most: int | None = None
) -> Iterator[torch.Tensor]:
    """Read images in batches that look like the whole: folders come class by class."""
    rows = np.random.RandomState(0).permutation(len(views))[:most]
    # Batches of equal size, since each batch has the same weight.
    batches = [part.tolist() for part in np.array_split(rows, math.ceil(len(rows) / _BATCH_SIZE))]
    for _, batch in ImageReader(views, threads, image_errors).read(batches):
        yield batch
