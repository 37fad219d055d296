"""Export a tuned network, as a backbone or as a file of weights.

Shapes: D features, K classes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import astuple, replace

import torch
from torch import nn

from sktransfer.backbones.frozen import FrozenSpan, freeze
from sktransfer.backbones.loading import Backbone, keep_backbone
from sktransfer.backbones.source import BackboneSource
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.backbones.weights import digest_tensors, save_state_dict
from sktransfer.finetuning.schedule import HEAD, PRE_LOGITS
from sktransfer.finetuning.suffix import load_part
from sktransfer.transforms.preprocessing import Preprocessing


def tuned_backbone(
    source: BackboneSource,
    tuned: dict[str, torch.Tensor],
    preprocessing: Preprocessing,
    classes: Sequence[object],
) -> Backbone:
    """Build a backbone from the weights of a fit.

    Parameters
    ----------
    source : BackboneSource
        Source of the backbone that was tuned.
    tuned : dict of str to Tensor
        The tensors of trained blocks, pre_logits and head, from `TrainedSuffix.state_of`.
    preprocessing : Preprocessing
        Preprocessing of the fit; its image size may differ from the source's.
    classes : sequence of length K
        Names of the logits.
    """
    backbone = source.load()
    digest = digest_tensors(
        sorted(tuned.items()),
        backbone.digest.hex(),
        repr(astuple(preprocessing)),
        repr(list(classes)),
    )

    def make() -> Backbone:
        block_list = copy.deepcopy(backbone.block_list)
        for name, part in (*block_list.blocks, (PRE_LOGITS, block_list.pre_logits)):
            load_part(tuned, name, part)
        n_classes, width = tuned[f"{HEAD}.weight"].shape
        head = nn.Linear(width, n_classes)
        load_part(tuned, HEAD, head)
        block_list = replace(block_list, logits=freeze(nn.Sequential(block_list.pre_logits, head)))
        return replace(
            backbone,
            name=f"{backbone.name.removesuffix('_tuned')}_tuned",
            block_list=block_list,
            preprocessing=preprocessing,
            digest=digest,
            categories=tuple(map(str, classes)),
            pretrained=False,  # the image size is the one it was tuned for
        )

    return keep_backbone(digest, make)


class Float16(nn.Module):
    """Round to float16, as activations are stored; the result is float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round activations."""
        return x.to(torch.float16).to(torch.float32)


def tuned_parts(backbone: Backbone, boundary: int, dtype: str) -> list[nn.Module]:
    """Split a tuned network into modules that compute what a fitted estimator computes on a CPU.

    Parameters
    ----------
    backbone : Backbone
        From `tuned_backbone`.
    boundary : int
        Number of blocks that were frozen.
    dtype : {"float16", "float32"}
        Of the activations at the boundary.

    Returns
    -------
    list of nn.Module
        In order, they map normalized images to logits. The last one maps penultimate vectors to
        logits.
    """
    block_list = backbone.block_list
    end = len(block_list.blocks)
    parts: list[nn.Module] = [FrozenSpan(block_list, 0, boundary)] if 0 < boundary < end else []
    if parts and dtype == "float16":
        parts.append(Float16())
    start = boundary if parts else 0
    head = list(block_list.logits.children())[-1]
    return [*parts, FrozenSpan(block_list, start, end), head]


def save_weights(backbone: Backbone, path: str | os.PathLike[str]) -> None:
    """Save the state dict of a tuned network, with the keys of its architecture.

    The classification layer is the source's; the fitted head is not saved.

    Parameters
    ----------
    backbone : Backbone
    path : path
        Must end in `.safetensors`.
    """
    model = backbone.build()
    block_list = split_into_blocks(freeze(model))
    for (_, block), (_, tuned) in zip(block_list.blocks, backbone.block_list.blocks, strict=True):
        block.load_state_dict(tuned.state_dict())
    block_list.pre_logits.load_state_dict(backbone.block_list.pre_logits.state_dict())
    save_state_dict(model.state_dict(), path)
