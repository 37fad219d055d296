"""Images of many sizes, and comparisons with exported models."""

import numpy as np
import torch
from helpers import images, smooth_image

# Square, wide, tall and very long; enlarged, reduced, and smaller than the crop of `Tiny`.
SIZES = [(64, 80), (20, 20), (16, 16), (1, 200), (200, 1), (9, 7), (41, 300), (333, 40), (121, 160)]


def _noise(height, width, seed):
    return images(1, max(height, width), seed)[0, :height, :width].copy()


EXAMPLES = [_noise(*size, seed) for seed, size in enumerate(SIZES)]
EXAMPLES += [smooth_image(*size).permute(1, 2, 0).numpy().copy() for size in SIZES]


def batch_of(image):
    """Return an image (H, W, 3) as a batch (1, 3, H, W)."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def largest_difference(module, method):
    """Compare the outputs of a module and of a method of a model on all examples."""
    expected = method(EXAMPLES)
    found = torch.cat([module(batch_of(image)) for image in EXAMPLES]).numpy()
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    return abs(found - expected).max()
