"""BatchNorm statistics for another domain (AdaBN, and matching after fine-tuning)."""

from __future__ import annotations

import copy
import math
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
)
from sktransfer.backbones.blocks import BlockList
from sktransfer.backbones.loading import Backbone
from sktransfer.transforms.device_feed import image_reader
from sktransfer.transforms.loader import ImageErrors
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError, warn_user

# Maximum number of images per batch; each batch has its own statistics.
_MAX_BATCH_SIZE = 32
# Maximum number of images per domain for matching a tuned network; more make no difference.
MAX_MATCHED_IMAGES = 1024
# Minimum number of images from which the statistics of a domain can be estimated.
_MIN_DOMAIN_IMAGES = 10


def estimate_batch_norm(
    backbone: Backbone, batches: Iterable[torch.Tensor], device: torch.device
) -> BatchNormState:
    """Estimate BatchNorm statistics on images of another domain; the backbone is not changed.

    The statistics of each layer are averaged over the batches. Earlier layers normalize each batch
    with its own statistics. Source: Li et al., "Revisiting Batch Normalization For Practical Domain
    Adaptation" (AdaBN), arXiv 1603.04779.

    Parameters
    ----------
    backbone : Backbone
    batches : iterable of Tensor of shape (N, 3, H, W)
        Preprocessed images, uint8, 0-255.
    device : torch.device

    Raises
    ------
    ValueError
        If the backbone has no BatchNorm, or there are too few images to estimate a variance.
    """
    block_list, blocks, layers = _copy(backbone, device)
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
        layer.train()
    n_images = 0
    try:
        with torch.no_grad():
            for batch in batches:
                n_images += len(batch)
                blocks(backbone.preprocessing.normalize(batch.to(device)))
        if not n_images:
            raise ValueError("no image can be read")
    except ImageError:
        raise
    except ValueError as error:
        raise ValueError(
            "Got batch_norm='adapt' and too few images to estimate BatchNorm statistics "
            f"({error}); pass more images to fit, or use batch_norm='frozen'"
        ) from error
    return BatchNormState.of(block_list)


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
        Collects or raises the errors of broken images.
    """
    return estimate_batch_norm(backbone, _shuffled(views, threads, image_errors, device), device)


@torch.no_grad()
def match_batch_norm(
    backbone: Backbone, source: Views, target: Views, device: torch.device, threads: int
) -> BatchNormState:
    """Compute statistics that give target images the layer outputs of source images.

    With these statistics, the output of each BatchNorm layer has the same mean and variance per
    channel for target images as for source images with the statistics of the backbone. Later layers
    thus get inputs like those that they were trained on. (AdaBN normalizes layer inputs to a mean
    of 0 and a variance of 1, which suits the pretrained layers, but not layers tuned since.)

    Parameters
    ----------
    backbone : Backbone
        Not changed.
    source, target : Views
        Images of the two domains; at most 1,024 of each are read.
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
        """Average the moments of each layer's input; with source moments, match its outputs."""
        recorded: dict[Any, list[torch.Tensor]] = {layer: [] for layer in layers}

        def record(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            (x,) = inputs
            axes = [axis for axis in range(x.ndim) if axis != 1]
            moments = torch.stack([x.mean(axes), x.var(axes, correction=0)])
            recorded[layer].append(moments)
            if not source_moments:
                return output
            mean, var = _match(layer, source_moments[layer], moments)
            return nnf.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)

        hooks = [layer.register_forward_hook(record) for layer in layers]
        for batch in _shuffled(views, threads, ImageErrors("raise"), device, MAX_MATCHED_IMAGES):
            blocks(backbone.preprocessing.normalize(batch.to(device)))
        for hook in hooks:
            hook.remove()
        return {
            layer: torch.stack(moments).mean(0) for layer, moments in recorded.items() if moments
        }

    if len(target) < _MIN_DOMAIN_IMAGES:
        warn_user(
            f"Got batch_norm='adapt' with {len(target)} images of the target, too few to estimate "
            f"its statistics; pass {_MIN_DOMAIN_IMAGES} or more, or use batch_norm='frozen'",
        )
    source_moments = mean_moments(source, {})
    for layer, moments in mean_moments(target, source_moments).items():
        mean, var = _match(layer, source_moments[layer], moments)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return BatchNormState.of(block_list)


def _match(
    layer: Any, source_moments: torch.Tensor, target_moments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute statistics that map target moments (mean, variance) to the source's outputs."""
    learned, source, target = (  # standard deviations
        (var + layer.eps).sqrt()
        for var in (layer.running_var, source_moments[1], target_moments[1])
    )
    deviation = target * learned / source
    mean = target_moments[0] - (source_moments[0] - layer.running_mean) / learned * deviation
    return mean, (deviation**2 - layer.eps).clamp_min(0)


def _copy(
    backbone: Backbone, device: torch.device
) -> tuple[BlockList, nn.Sequential, list[_BatchNorm]]:
    """Return a copy: the block list, the blocks on the device, and their BatchNorm layers."""
    block_list = copy.deepcopy(backbone.block_list)
    blocks = nn.Sequential(*(block for _, block in block_list.blocks)).to(device)
    check_batch_norm(backbone)
    return block_list, blocks, [layer for _, layer in batch_norms(block_list)]


def _shuffled(
    views: Views,
    threads: int,
    image_errors: ImageErrors,
    device: torch.device,
    max_images: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield batches of images in a shuffled order, because folders are sorted by class."""
    rows = np.random.RandomState(0).permutation(len(views))[:max_images]
    # Batches of equal size, because each batch has the same weight.
    n_batches = math.ceil(len(rows) / _MAX_BATCH_SIZE)
    batches = [batch.tolist() for batch in np.array_split(rows, n_batches)]
    # The CPU decodes, because statistics of few values amplify small differences.
    for _, batch in image_reader(views, threads, image_errors, device, decodes=False).read(batches):
        yield batch
