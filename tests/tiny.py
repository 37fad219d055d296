"""Small backbones for the tests: fast, random but fixed, one of them counting its pictures."""

import os
import time

import numpy as np
import torch
from torch import nn

from sktransfer.transforms import Preprocessing

SIZE = 16


def seeded(module):
    """Fill a module with fixed random values, BatchNorm statistics included."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
    return module


class Tiny(nn.Sequential):
    """Two blocks of convolution with BatchNorm, 12 features, 5 logits."""

    preprocessing = Preprocessing(resize=SIZE, crop=(SIZE, SIZE))

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(12, 5),
        )
        seeded(self)

    def embed(self, x):
        """Compute the penultimate vector in plain torch."""
        for module in list(self)[:5]:
            x = module(x)
        return x


class CountingTiny(Tiny):
    """Appends to the file `log` a line for each batch that comes through: its length.

    The log is written by every process that runs the backbone, and knows nothing of the store.
    Probes are not counted, by which `fit` learns the structure (outside inference mode) and the
    width (a blank picture).
    """

    def __init__(self, log):
        super().__init__()
        self[0] = Counter(self[0], log)


class Counter(nn.Module):
    def __init__(self, block, log):
        super().__init__()
        self.block = block
        self.log = str(log)

    def forward(self, x):
        shown = int((x.flatten(2).std(dim=2).sum(dim=1) > 0).sum())  # not what fills a batch up
        if torch.is_inference_mode_enabled() and shown:
            with open(self.log, "a") as file:
                os.write(file.fileno(), f"{shown}\n".encode())
        return self.block(x)


def counted(log):
    """Sum the pictures of a log."""
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def unreachable(*arguments, **options):
    """Stand in for `socket.create_connection` where nobody answers for a long time."""
    time.sleep(30)
    raise OSError("timed out")


def pictures(n, side=20, seed=0):
    """Make `n` distinct random pictures, uint8 NHWC."""
    return np.random.RandomState(seed).randint(0, 256, (n, side, side, 3)).astype(np.uint8)


def cosine(a, b):
    """Cosine between the rows of two arrays."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
