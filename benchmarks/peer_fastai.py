"""The fastai of benchmarks/tuning.py: `fine_tune` on the same backbone, images and split.

    python benchmarks/peer_fastai.py {fastai,plain} FOLD

It runs in an environment of its own, which benchmarks/tuning.py makes.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from _common import MEAN, STD, lite0, measure, split
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Normalize,
    Resize,
    aug_transforms,
    set_seed,
    vision_learner,
)
from torch import nn

from sktransfer.data.decoding import decode


def backbone(pretrained: bool = True) -> nn.Sequential:
    """Build EfficientNet-Lite0 as the list of children that `vision_learner` cuts at the pool."""
    net = lite0()
    feature_maps = [net.conv_stem, net.bn0, net.relu, net.blocks, net.conv_head, net.bn1, net.relu]
    return nn.Sequential(*feature_maps, net.avgpool, net.fc)


class FastaiPeer:
    """`vision_learner` and `fine_tune(5, freeze_epochs=3)`.

    `fast` lays tensors out channels last and keeps BatchNorm of the frozen body as it is: otherwise
    gradients run through the whole body while it is frozen.
    """

    def __init__(self, fast: bool) -> None:
        self.settings = {"train_bn": False, "cbs": ChannelsLast()} if fast else {}

    def fit(self, paths: list[str], y: np.ndarray) -> FastaiPeer:
        """Train from the ImageNet weights on."""
        set_seed(0)
        labels = dict(zip(paths, y.tolist(), strict=True))
        dls = DataBlock(
            blocks=(ImageBlock, CategoryBlock),
            get_x=decode,  # transparency on white, as in all variants
            get_y=labels.get,
            splitter=IndexSplitter([]),  # nothing to validate on: that would cost time
            item_tfms=Resize(256),
            batch_tfms=[*aug_transforms(size=224), Normalize.from_stats(MEAN, STD)],
        ).dataloaders(paths, bs=32, num_workers=0)
        self.learner = vision_learner(dls, backbone, normalize=False, **self.settings)
        with self.learner.no_bar(), self.learner.no_logging():
            self.learner.fine_tune(5, freeze_epochs=3)
        return self

    def predict(self, paths: list[str]) -> np.ndarray:
        """Classify as fastai validates: without augmentation."""
        batches = self.learner.dls.test_dl(paths)
        with self.learner.no_bar():
            scores, _ = self.learner.get_preds(dl=batches)
        return np.array(self.learner.dls.vocab)[scores.argmax(1).numpy()]


if __name__ == "__main__":
    variant, fold = sys.argv[1:]
    print(json.dumps(measure(FastaiPeer(fast=variant == "fastai"), *split(int(fold)))))
