"""The peers: other packages that sktransfer is compared with, and their environment.

The peers are installed in a separate environment with the same version of torch, so they are
imported inside the functions that use them.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from _common import MEAN, ROOT, STD, lite0
from _engines import Embed, headless
from PIL import Image
from torch import nn

from sktransfer.data.decoding import decode

PEERS = ["embetter>=0.9", "fastai>=2.8,<2.9", "timm>=1.0.9", "mlxtend", "scikit-image>=0.25"]
FOLDER = ROOT / "benchmarks/.peers"


def environment_of_peers(folder: Path = FOLDER) -> Path:
    """Install the peers if they are missing, and return the Python of their environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [*PEERS, *_torch_requirements(), *project["dependencies"]]
    python = folder / "bin" / "python"
    installed = folder / "installed.txt"
    if not installed.is_file() or installed.read_text().split("\n") != packages:
        print(f"installing {', '.join(PEERS)} into {folder}", file=sys.stderr)
        if not python.exists():
            venv.create(folder, with_pip=True, symlinks=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        installed.write_text("\n".join(packages))
    return python


def _torch_requirements() -> list[str]:
    return [f"{module.__name__}=={_release(module)}" for module in (torch, torchvision)]


def _release(module: Any) -> str:
    """Return the version without its local part, such as `+cpu`, which package indexes lack."""
    return module.__version__.split("+")[0]


def embetter() -> Embed:
    """Build embetter's ImageLoader and TimmEncoder, with the network in evaluation mode.

    By default TimmEncoder leaves the network in training mode.
    """
    import timm
    from embetter.vision import ImageLoader, TimmEncoder
    from timm.data.transforms_factory import create_transform

    timm.create_model = lambda *arguments, **options: headless()
    encoder = TimmEncoder("tf_efficientnet_lite0")
    encoder.transform_img = create_transform(
        (3, 224, 224), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=0.875
    )
    loader = ImageLoader()
    return lambda paths: encoder.transform(loader.fit(paths).transform(paths))


def fastai() -> Embed:
    """Build a function that embeds images with fastai's `Learner.get_preds`."""
    from fastai.callback.channelslast import ChannelsLast
    from fastai.vision.all import (
        CategoryBlock,
        CropPad,
        DataBlock,
        ImageBlock,
        IndexSplitter,
        Learner,
        Normalize,
        Resize,
    )

    crop = CropPad(224)
    crop.order = Resize.order + 1  # otherwise fastai crops before it resizes

    def embed(paths: list[str]) -> np.ndarray:
        data = DataBlock(
            blocks=(ImageBlock, CategoryBlock),
            get_y=lambda path: "any",
            splitter=IndexSplitter([]),
            item_tfms=[Resize(256, resamples=(Image.Resampling.BICUBIC, 0)), crop],
            batch_tfms=[Normalize.from_stats(MEAN, STD)],
        ).dataloaders(paths[:8], bs=8, num_workers=0)
        learner = Learner(data, headless(), loss_func=nn.MSELoss(), cbs=ChannelsLast())
        with learner.no_bar():
            embeddings, _ = learner.get_preds(dl=data.test_dl(paths, bs=8))
        return embeddings.float().numpy()

    return embed


def lite0_body(pretrained: bool = True) -> nn.Sequential:
    """Build EfficientNet-Lite0 as a sequence, which `vision_learner` cuts at the pooling layer."""
    net = lite0()
    feature_maps = [net.conv_stem, net.bn0, net.relu, net.blocks, net.conv_head, net.bn1, net.relu]
    return nn.Sequential(*feature_maps, net.avgpool, net.fc)


class FastaiPeer:
    """fastai's `vision_learner` with `fine_tune(5, freeze_epochs=3)`.

    Images are `side` pixels large, and mirrored at random if `mirrored`. With `fast=True`, tensors
    are channels last and the BatchNorm layers of the frozen body are not trained. If they are
    trained, gradients run through the whole body while it is frozen. Batches have 32 images, or a
    quarter of them if there are fewer than 128, since fastai drops the last batch of an epoch.
    """

    def __init__(self, fast: bool, side: int = 224, *, mirrored: bool = True) -> None:
        from fastai.callback.channelslast import ChannelsLast

        self.side, self.mirrored = side, mirrored
        self.settings = {"train_bn": False, "cbs": ChannelsLast()} if fast else {}

    def fit(self, paths: list[str], y: np.ndarray) -> FastaiPeer:
        """Train, starting from the ImageNet weights."""
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

        set_seed(0)
        labels = dict(zip(paths, y.tolist(), strict=True))
        dls = DataBlock(
            blocks=(ImageBlock, CategoryBlock),
            get_x=decode,  # puts transparent images on white, as in all variants
            get_y=labels.get,
            splitter=IndexSplitter([]),  # no validation, to save time
            item_tfms=Resize(round(self.side * 256 / 224)),
            batch_tfms=[
                *aug_transforms(size=self.side, do_flip=self.mirrored),
                Normalize.from_stats(MEAN, STD),
            ],
        ).dataloaders(paths, bs=min(32, len(paths) // 4), num_workers=0)
        self.learner = vision_learner(dls, lite0_body, normalize=False, **self.settings)
        with self.learner.no_bar(), self.learner.no_logging():
            self.learner.fine_tune(5, freeze_epochs=3)
        return self

    def predict(self, paths: list[str]) -> np.ndarray:
        """Predict labels without augmentation, as fastai does in validation."""
        return np.array(self.learner.dls.vocab)[self.predict_proba(paths).argmax(1)]

    def predict_proba(self, paths: list[str]) -> np.ndarray:
        """Predict probabilities without augmentation, in the order of the sorted labels."""
        batches = self.learner.dls.test_dl(paths)
        with self.learner.no_bar():
            scores, _ = self.learner.get_preds(dl=batches)
        return scores.numpy()
