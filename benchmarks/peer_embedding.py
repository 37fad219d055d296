"""The peers of benchmarks/embedding.py, each by itself, in the environment that they share.

python benchmarks/peer_embedding.py {embetter,fastai,fastai_half} FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import timm
from _common import MEAN, STD
from embetter.vision import ImageLoader, TimmEncoder
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
from own_embedding import Embed, headless, in_half, time_embedding
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import nn


def embetter() -> Embed:
    """Make ImageLoader and TimmEncoder; left to itself, it would embed in training mode."""
    timm.create_model = lambda *arguments, **options: headless()
    encoder = TimmEncoder("tf_efficientnet_lite0")
    encoder.transform_img = create_transform(
        (3, 224, 224), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=0.875
    )
    images = ImageLoader()
    return lambda paths: encoder.transform(images.fit(paths).transform(paths))


def fastai() -> Embed:
    """Make a Learner that only predicts."""
    crop = CropPad(224)
    crop.order = Resize.order + 1  # or it would come first

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


VARIANTS = {"embetter": embetter, "fastai": fastai, "fastai_half": lambda: in_half(fastai())}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    paths = (folder / "opaque.txt").read_text().split("\n")
    embeddings, figures = time_embedding(VARIANTS[name](), paths)
    np.save(folder / f"{name}.npy", embeddings)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
