"""Measure seconds and accuracy of fine-tuning on photographs, compared with other packages.

The data are the 432 photographs of benchmarks/_sets.py in five folds; by default only fold 0 runs
(345 to train on, 87 to test on). The network is EfficientNet-Lite0 with its ImageNet weights. Each
variant runs in a fresh process, one after the other, with the same number of threads. Seconds are
those of fit, including loading the model but not imports. Over several folds, seconds are medians
and accuracies are means; `--folds 0,0,0` measures fold 0 three times, in rounds.

sktransfer      FineTunedImageClassifier() with its defaults: whole images at 288 x 288. The first
                run on a machine converts the network into a graph; `later_fit_seconds` is a fit in
                a later process, which reuses it.
crop            sktransfer with image_size=None: a center crop of 224 x 224, as the weights specify
                and as the other variants use
probe           StandardScaler and LogisticRegression(C=0.03) on frozen embeddings
loop            a plain torch loop: 10 epochs of Adam at 1e-3 for the head, then 10 at 1e-4 for the
                head and the last three blocks; random augmentation, frozen BatchNorm, channels last
loop_288        the same loop at 288 x 288, tested on whole images like sktransfer
fastai          fastai's vision_learner and fine_tune(5, freeze_epochs=3) with its fastest settings:
                channels last, and train_bn=False
fastai_default  the same with fastai's default settings

fastai runs in the environment of the peers (6 GB), which is created if it is missing.

The run fails unless sktransfer is more accurate than loop, fastai and fastai_default, 5 times as
fast as loop, and 8 times as fast as the other two. Only measured variants are compared. There is no
threshold for crop and loop_288, which show the effect of the image size.

    python benchmarks/tuning.py [--variants sktransfer,loop] [--folds 0,1] [--threads 2]
        [--json PATH]
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    MEAN,
    STD,
    ChildError,
    command_line,
    finish,
    in_fresh_process,
    lite0,
    make_probe,
    measure,
    split,
)
from _peers import FastaiPeer, environment_of_peers
from _sets import photographs
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from sktransfer.data.decoding import decode

VARIANTS = ["sktransfer", "crop", "probe", "loop", "loop_288", "fastai", "fastai_default"]
MIN_SPEEDUP = {"loop": 5, "fastai": 8, "fastai_default": 8}


def make_sktransfer(**parameters: Any) -> Any:
    from sktransfer import FineTunedImageClassifier

    return FineTunedImageClassifier(random_state=0, **parameters)


class Photographs(Dataset):
    """Photographs, decoded at each access, with transparent areas on white."""

    def __init__(self, paths: list[str], y: np.ndarray, transform: v2.Transform) -> None:
        self.paths, self.y, self.transform = paths, y, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(decode(self.paths[row])).permute(2, 0, 1)
        return self.transform(pixels), int(self.y[row])


class TextbookLoop:
    """Train the head, then the head and the last three blocks, as in tutorials.

    On a CPU, batches of 8 are faster than batches of 32, because their feature maps fit into its
    caches. By default, images have the size that the weights expect; `side` sets another one.
    """

    epochs, batch_size = 10, 8

    def __init__(self, side: int | None = None, *, mirrored: bool = True) -> None:
        self.side, self.mirrored = side, mirrored

    def fit(self, paths: list[str], y: np.ndarray) -> TextbookLoop:
        """Train, starting from the ImageNet weights."""
        torch.manual_seed(0)
        augmentation = [
            v2.RandomResizedCrop(self.side or 224, scale=(0.8, 1.0), antialias=True),
            v2.RandomHorizontalFlip(0.5 if self.mirrored else 0.0),
            v2.RandomRotation(15, fill=255),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
        ]
        photographs = Photographs(paths, y, v2.Compose([*augmentation, *self._normalize()]))
        loader = DataLoader(photographs, self.batch_size, shuffle=True)
        net = lite0()
        net.fc = nn.Linear(net.fc.in_features, len(np.unique(y)))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = net.to(self.device, memory_format=torch.channels_last).requires_grad_(False)
        self._train(loader, [net.fc], lr=1e-3)
        self._train(loader, [*net.blocks[-2:], net.conv_head, net.bn1, net.fc], lr=1e-4)
        return self

    def predict(self, paths: list[str]) -> np.ndarray:
        """Predict labels without augmentation."""
        return self.predict_proba(paths).argmax(axis=1)

    def predict_proba(self, paths: list[str]) -> np.ndarray:
        """Predict probabilities without augmentation."""
        size, crop = ((self.side, self.side), self.side) if self.side else (256, 224)
        resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        transform = v2.Compose([resize, v2.CenterCrop(crop), *self._normalize()])
        loader = DataLoader(
            Photographs(paths, np.zeros(len(paths), dtype=int), transform), self.batch_size
        )
        self.net.eval()
        with torch.inference_mode():
            outputs = [self.net(x).softmax(1).cpu() for x, _ in self._batches(loader)]
        return torch.cat(outputs).numpy()

    def _train(self, loader: DataLoader, modules: Iterable[nn.Module], lr: float) -> None:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.net.eval()  # keeps the pretrained BatchNorm statistics
        self.net.dropout.train()
        optimizer = torch.optim.Adam(parameters, lr)
        for _ in range(self.epochs):
            for x, y in self._batches(loader):
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.net(x), y).backward()
                optimizer.step()

    def _batches(self, loader: DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in loader:
            yield x.to(self.device, memory_format=torch.channels_last), y.to(self.device)

    def _normalize(self) -> list[v2.Transform]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def run_variant(name: str, fold: int, threads: int) -> dict:
    """Measure a variant in a fresh process, or return why it is missing."""
    try:
        if name == "sktransfer":
            return run_sktransfer(fold, threads)
        peer = name in ("fastai", "fastai_default")
        python = environment_of_peers() if peer else sys.executable
        arguments = ("tuning.py", "--measure", name, str(fold))
        return in_fresh_process(*arguments, threads=threads, python=python)
    except (ChildError, subprocess.CalledProcessError, OSError) as error:
        return {"missing": str(error)}


def run_sktransfer(fold: int, threads: int) -> dict:
    """Measure sktransfer in two processes. The second reuses the caches of the first."""
    arguments = ("tuning.py", "--measure", "sktransfer", str(fold))
    with tempfile.TemporaryDirectory() as caches:
        first, later = (
            in_fresh_process(*arguments, threads=threads, caches=caches) for _ in range(2)
        )
    if first["accuracy"] != later["accuracy"]:
        raise ChildError(
            f"two runs of sktransfer differ in accuracy: {first['accuracy']}, {later['accuracy']}"
        )
    return {**first, "later_fit_seconds": later["fit_seconds"]}


def summarize(results: list[dict]) -> dict:
    """Summarize the figures of a variant over all folds."""
    missing = [figures["missing"] for figures in results if "missing" in figures]
    if missing:
        return {"missing": missing[0]}
    summary = {
        key: round(statistics.median(figures[key] for figures in results), 2)
        for key in ("fit_seconds", "later_fit_seconds", "predict_seconds")
        if key in results[0]
    }
    accuracies = [figures["accuracy"] for figures in results]
    summary |= {"accuracy": round(statistics.mean(accuracies), 4), "folds": accuracies}
    return summary | {"seconds": [figures["fit_seconds"] for figures in results]}


def compare(variants: dict[str, dict]) -> list[str]:
    """Add the seconds of each variant relative to sktransfer, and return the failures."""
    missing = {name for name, figures in variants.items() if "missing" in figures}
    failures = [f"{name} is missing: {variants[name]['missing']}" for name in sorted(missing)]
    if "sktransfer" not in variants.keys() - missing:
        return failures
    sktransfer = variants["sktransfer"]
    for name in [name for name in variants if name != "sktransfer" and name not in missing]:
        peer = variants[name]
        times = round(peer["fit_seconds"] / sktransfer["fit_seconds"], 2)
        peer["times_sktransfer"] = times
        peer["times_later"] = round(peer["fit_seconds"] / sktransfer["later_fit_seconds"], 2)
        if times < MIN_SPEEDUP.get(name, 0):
            failures.append(
                f"sktransfer is {times} times as fast as {name}, expected {MIN_SPEEDUP[name]}"
            )
        if name in MIN_SPEEDUP and sktransfer["accuracy"] <= peer["accuracy"]:
            failures.append(f"sktransfer is not more accurate than {name}")
    return failures


def print_table(variants: dict[str, dict]) -> None:
    columns = ["fit_seconds", "later_fit_seconds", "times_sktransfer", "times_later"]
    columns += ["accuracy", "predict_seconds"]
    print(" " * 15 + "".join(f"{column:>19}" for column in columns))
    for name, figures in variants.items():
        print(f"{name:15}" + "".join(f"{figures.get(column, '-'):>19}" for column in columns))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="default: %(default)s")
    parser.add_argument("--folds", default="0", help="default: %(default)s")
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("VARIANT", "FOLD"),
        help="measure a variant on a fold in this process",
    )
    options = parser.parse_args()
    if options.measure:
        name, fold = options.measure
        make = {
            "sktransfer": make_sktransfer,
            "crop": partial(make_sktransfer, image_size=None),
            "probe": make_probe,
            "loop": TextbookLoop,
            "loop_288": partial(TextbookLoop, side=288),
            "fastai": partial(FastaiPeer, fast=True),
            "fastai_default": partial(FastaiPeer, fast=False),
        }[name]
        print(json.dumps(measure(make(), *split(int(fold)))))
        return
    names = options.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"Got {sorted(unknown)} in --variants, expected some of {VARIANTS}")
    for path in photographs()[0]:
        Path(path).read_bytes()  # warms up the disk cache
    folds = [int(fold) for fold in options.folds.split(",")]
    results: dict[str, list[dict]] = {name: [] for name in names}
    for fold, (name, runs) in itertools.product(folds, results.items()):
        runs.append(run_variant(name, fold, options.threads))
        print(fold, name, runs[-1], file=sys.stderr)
    variants = {name: summarize(runs) for name, runs in results.items()}
    failures = compare(variants)
    print_table(variants)
    finish({"threads": options.threads, "variants": variants}, failures, options.json)


if __name__ == "__main__":
    main()
