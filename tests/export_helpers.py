"""Images of many sizes, and comparisons with exported models."""

import numpy as np
import torch
from helpers import Tiny, Y, images, smooth_image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.transforms.preprocessing import Preprocessing

# Square, wide, tall and very long; enlarged, reduced, and smaller than the crop of `Tiny`.
SIZES = [(64, 80), (20, 20), (16, 16), (1, 200), (200, 1), (9, 7), (41, 300), (333, 40), (121, 160)]

PREPROCESSINGS = {
    "bilinear": Preprocessing(),
    "bicubic": Preprocessing(interpolation="bicubic"),
    "nearest": Preprocessing(interpolation="nearest"),
    "odd crop": Preprocessing(51, (37, 40)),
    "a pair": Preprocessing((48, 60), (48, 60), "bicubic"),
    "no margin": Preprocessing(64, (64, 64)),
    "enlarged twice": Preprocessing(200, (224, 224)),
    "enlarged twice, bicubic": Preprocessing(200, (224, 180), "bicubic"),
}
# Enlarged and reduced, cut first or not, of odd and even sizes, as large as the crop or the resize.
RESIZED_SIZES = [
    (427, 640),
    (301, 300),
    (64, 80),
    (90, 350),
    (33, 41),
    (1, 200),
    (200, 1),
    (1, 1),
    (31, 500),
    (500, 30),
    (256, 256),
    (224, 224),
    (255, 257),
]

TWO = np.where(Y == "cat", "cat", "other")


def extractor(**parameters):
    return PretrainedFeatureExtractor(Tiny, **{"cache": None, **parameters})


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
