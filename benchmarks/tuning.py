"""Fine-tuning against its peers: seconds and accuracy on real photographs.

The 432 photographs of benchmarks/_sets.py in five folds, of which fold 0 (345 to train on, 87
to test with) is the default, and always EfficientNet-Lite0 with its ImageNet weights. Each variant
runs in a fresh process, one after the other, with the same number of threads; seconds are those of
fit, with the loading of the model and without imports. Of several folds, medians of the seconds and
means of the accuracies count; `--folds 0,0,0` measures one fold three times, in rounds.

ours    FineTunedImageClassifier(), its defaults; the first run on a machine, which turns the
        network into a graph, and `again`, a later process that finds that graph
crop    ours with image_size=None: the middle of an image at 224 x 224, as the weights say and as
        the others test; by default ours has whole images at 288 x 288
probe   StandardScaler and LogisticRegression(C=0.03) on frozen embeddings
loop    the textbook loop in plain torch: 10 epochs of Adam at 1e-3 for the head, then 10 at 1e-4
        for the head and the last three blocks; fresh augmentation, frozen BatchNorm, channels last
large   the same loop at 288 x 288, tested with whole images as ours is
plain   fastai's vision_learner and fine_tune(5, freeze_epochs=3), in the environment of the peers
        (6 GB), which is made where it is missing
fastai  the same with the settings that make it fastest: channels last, and train_bn=False

Fails unless ours is more accurate than loop and fastai, 5 times as fast as loop and 8 times as fast
as fastai; variants that were not asked for are not judged. crop and large never are: they tell how
much of the difference is the size.

    python benchmarks/tuning.py [--variants ours,loop] [--folds 0,1] [--threads 2] [--json PATH]
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

VARIANTS = ["ours", "crop", "probe", "loop", "large", "fastai", "plain"]
FASTER = {"loop": 5, "fastai": 8, "plain": 8}  # how many times as fast ours has to be


def ours(**parameters: Any) -> Any:
    from sktransfer import FineTunedImageClassifier

    return FineTunedImageClassifier(random_state=0, **parameters)


class Photographs(Dataset):
    """Decoded at each visit, on white where they are transparent, as in all variants."""

    def __init__(self, paths: list[str], y: np.ndarray, transform: v2.Transform) -> None:
        self.paths, self.y, self.transform = paths, y, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(decode(self.paths[row])).permute(2, 0, 1)
        return self.transform(pixels), int(self.y[row])


class TextbookLoop:
    """Train the head, then the head and the last three blocks, as tutorials do it.

    On a CPU batches of 8 are faster than batches of 32: their feature maps stay in its caches.
    A `side` is that of the images; without one they are as the weights expect them.
    """

    epochs, batch_size = 10, 8

    def __init__(self, side: int | None = None) -> None:
        self.side = side

    def fit(self, paths: list[str], y: np.ndarray) -> TextbookLoop:
        """Train from the ImageNet weights on."""
        torch.manual_seed(0)
        augmentation = [
            v2.RandomResizedCrop(self.side or 224, scale=(0.8, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
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
        """Classify images without augmentation."""
        size, crop = ((self.side, self.side), self.side) if self.side else (256, 224)
        resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        transform = v2.Compose([resize, v2.CenterCrop(crop), *self._normalize()])
        loader = DataLoader(
            Photographs(paths, np.zeros(len(paths), dtype=int), transform), self.batch_size
        )
        self.net.eval()
        with torch.inference_mode():
            return np.concatenate([self.net(x).argmax(1).cpu() for x, _ in self._batches(loader)])

    def _train(self, loader: DataLoader, modules: Iterable[nn.Module], lr: float) -> None:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.net.eval()  # BatchNorm stays as pretrained
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
    """Measure a variant in a fresh process; one that cannot be had says so."""
    try:
        if name == "ours":
            return run_ours(fold, threads)
        peer = name in ("fastai", "plain")
        python = environment_of_peers() if peer else sys.executable
        arguments = ("tuning.py", "--measure", name, str(fold))
        return in_fresh_process(*arguments, threads=threads, python=python)
    except (ChildError, subprocess.CalledProcessError, OSError) as error:
        return {"missing": str(error)}


def run_ours(fold: int, threads: int) -> dict:
    """Measure ours in two processes, of which the second finds what the first has kept."""
    arguments = ("tuning.py", "--measure", "ours", str(fold))
    with tempfile.TemporaryDirectory() as caches:
        first, again = (
            in_fresh_process(*arguments, threads=threads, caches=caches) for _ in range(2)
        )
    if first["accuracy"] != again["accuracy"]:
        raise ChildError(f"ours is {first['accuracy']}, and again {again['accuracy']} accurate")
    return {**first, "again": again["fit_seconds"]}


def summarize(found: list[dict]) -> dict:
    """Put the figures of a variant on all folds together."""
    missing = [figures["missing"] for figures in found if "missing" in figures]
    if missing:
        return {"missing": missing[0]}
    summary = {
        key: round(statistics.median(figures[key] for figures in found), 2)
        for key in ("fit_seconds", "again", "predict_seconds")
        if key in found[0]
    }
    accuracies = [figures["accuracy"] for figures in found]
    summary |= {"accuracy": round(statistics.mean(accuracies), 4), "folds": accuracies}
    return summary | {"seconds": [figures["fit_seconds"] for figures in found]}


def judge(variants: dict[str, dict]) -> list[str]:
    """Add how many times as long as ours each variant took, and name the bars that were missed."""
    missing = {name for name, figures in variants.items() if "missing" in figures}
    failures = [f"{name} is missing: {variants[name]['missing']}" for name in sorted(missing)]
    if "ours" not in variants.keys() - missing:
        return failures
    ours = variants["ours"]
    for name in [name for name in variants if name != "ours" and name not in missing]:
        peer = variants[name]
        peer["times_ours"] = times = round(peer["fit_seconds"] / ours["fit_seconds"], 2)
        peer["times_again"] = round(peer["fit_seconds"] / ours["again"], 2)
        if times < FASTER.get(name, 0):
            failures.append(f"ours is {times} times as fast as {name}, not {FASTER[name]} times")
        if name in FASTER and ours["accuracy"] <= peer["accuracy"]:
            failures.append(f"ours is not more accurate than {name}")
    return failures


def print_table(variants: dict[str, dict]) -> None:
    widths = {"fit_seconds": 12, "again": 7, "times_ours": 11, "times_again": 12}
    widths |= {"accuracy": 9, "predict_seconds": 16}
    print(" " * 7 + "".join(f"{column:>{width}}" for column, width in widths.items()))
    for name, figures in variants.items():
        cells = [f"{figures.get(column, '-'):>{width}}" for column, width in widths.items()]
        print(f"{name:7}" + "".join(cells))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="default: %(default)s")
    parser.add_argument("--folds", default="0", help="default: %(default)s")
    parser.add_argument(
        "--measure", nargs=2, metavar=("NAME", "FOLD"), help="measure this, in this process"
    )
    options = parser.parse_args()
    if options.measure:
        name, fold = options.measure
        make = {
            "ours": ours,
            "crop": partial(ours, image_size=None),
            "probe": make_probe,
            "loop": TextbookLoop,
            "large": partial(TextbookLoop, side=288),
            "fastai": partial(FastaiPeer, fast=True),
            "plain": partial(FastaiPeer, fast=False),
        }[name]
        print(json.dumps(measure(make(), *split(int(fold)))))
        return
    names = options.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"Got {sorted(unknown)} among --variants, but there are only {VARIANTS}")
    for path in photographs()[0]:
        Path(path).read_bytes()  # or the first variant would pay for a cold disk
    folds = [int(fold) for fold in options.folds.split(",")]
    found = {name: [] for name in names}
    for fold, (name, figures) in itertools.product(folds, found.items()):
        figures.append(run_variant(name, fold, options.threads))
        print(fold, name, figures[-1], file=sys.stderr)
    variants = {name: summarize(figures) for name, figures in found.items()}
    failures = judge(variants)
    print_table(variants)
    finish({"threads": options.threads, "variants": variants}, failures, options.json)


if __name__ == "__main__":
    main()
