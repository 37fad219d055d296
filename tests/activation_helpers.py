"""Activations of small networks, which the tests of boundaries compare with plain torch."""

import torch
from helpers import Tiny, images

from sktransfer.backbones.loading import load_backbone
from sktransfer.data.images import as_images
from sktransfer.embedding.compute import ComputeConfig
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.views import Views

TINY = load_backbone(Tiny())
# Half of the last digit of float16, and the effect of this rounding on what is computed from it.
FLOAT16_TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}


def views_of(X=20, n_views=1, backbone=TINY, size=None):
    """Build views of images, or of `X` random ones, with standard augmentation."""
    X = images(X) if isinstance(X, int) else X
    preprocessing = backbone.preprocessing.with_image_size(size)
    return Views(as_images(X), preprocessing, resolve_augmentation("standard"), n_views)


@torch.no_grad()
def run_in_torch(views, boundary, backbone=TINY, start=0, x=None):
    """Run views through the blocks before a boundary, and after the last one the pre-logits."""
    if x is None:
        batch = torch.stack([views.prepare(item) for item in range(len(views))])
        x = views.preprocessing.normalize(batch)
    for _, block in backbone.block_list.blocks[start:boundary]:
        x = block(x)
    return backbone.block_list.pre_logits(x) if boundary == len(backbone.block_list.blocks) else x


def compute_config(store=None, engine="auto"):
    """Build a configuration for the CPU with two threads."""
    return ComputeConfig(torch.device("cpu"), engine, torch.float32, 2, store)
