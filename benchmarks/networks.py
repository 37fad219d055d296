"""The engines on other networks: never far behind the better of eager torch and raw OpenVINO.

Six networks of torchvision with random weights, 128 images of 224 x 224 that lie in memory. Each
variant runs in a fresh process, one after the other, on the same number of cores. Figures are
images a second, medians over the passes and over the rounds; ratios compare within a round.

ours      PretrainedFeatureExtractor(cache=None), from uint8 pixels to embeddings
torch     the same with engine="torch", which is all that the plain install has
eager     plain torch on normalized float tensors, at the best of two layouts and three batch sizes
openvino  OpenVINO itself on normalized float tensors, at the best of three batch sizes

The embeddings have to be the same: cosine at least 0.9999. Fails unless ours has, with each
network, at least 0.95 times the speed of the better of both.

    python benchmarks/networks.py [--networks vgg16] [--rounds 3] [--threads 2] [--json PATH]
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import command_line, cosines, finish, in_fresh_process
from _engines import raw_openvino, run_eager

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.backbones.loading import load_backbone

NETWORKS = [
    "resnet50",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "vgg16",
    "convnext_tiny",
    "vit_b_16",
]
VARIANTS = ["ours", "torch", "eager", "openvino"]
JUDGES = VARIANTS[2:]
SHARE, LIKENESS = 0.95, 0.9999
IMAGES, TRIED, LONG_ENOUGH = 128, 16, 3.0
BATCHES = (1, 4, 16)

Run = Callable[[Any], np.ndarray]


def images() -> np.ndarray:
    """Make squares of random colors: what an image shows does not change how long it takes."""
    colors = np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28, 3))
    return colors.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


def prepared(name: str) -> tuple[FrozenPrefix, torch.Tensor]:
    """Give the network up to its embedding, and the images as it takes them."""
    backbone = load_backbone(name, None)
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2)
    return FrozenPrefix(backbone.block_list), backbone.preprocessing.normalize(pixels)


def time_passes(run: Run, x: Any) -> dict:
    """Time passes over all images, until they have taken long enough together."""
    seconds: list[float] = []
    while sum(seconds) < LONG_ENOUGH:
        start = time.perf_counter()
        embeddings = run(x)
        seconds.append(time.perf_counter() - start)
    return {"images_per_second": len(x) / statistics.median(seconds), "embeddings": embeddings}


def time_best(runs: dict[str, Run], x: torch.Tensor) -> dict:
    """Time the run that is fastest on a few images, on all of them."""
    seconds = {}
    for name, run in runs.items():
        run(x[:TRIED])
        start = time.perf_counter()
        run(x[:TRIED])
        seconds[name] = time.perf_counter() - start
    best = min(seconds, key=seconds.__getitem__)
    return {**time_passes(runs[best], x), "best": best}


def extractor(name: str, engine: str) -> dict:
    """Time the extractor, from uint8 pixels to embeddings."""
    extractor = PretrainedFeatureExtractor(
        name, weights=None, image_size=(224, 224), cache=None, engine=engine
    ).fit(images())
    extractor.transform(images())  # makes the engine, and wakes it up
    return {**time_passes(extractor.transform, images()), "best": extractor.engine_}


def eager(name: str) -> dict:
    """Time plain torch."""
    net, x = prepared(name)

    def runner(size: int, layout: torch.memory_format) -> Run:
        return lambda x: run_eager(net, x.split(size), layout)

    layouts = {"": torch.contiguous_format, ", channels last": torch.channels_last}
    return time_best(
        {
            f"batch {size}{suffix}": runner(size, layout)
            for suffix, layout in layouts.items()
            for size in BATCHES
        },
        x,
    )


def openvino(name: str) -> dict:
    """Time OpenVINO itself."""
    net, x = prepared(name)
    return time_best({f"batch {size}": raw_openvino(net, x[:size]) for size in BATCHES}, x)


def measure(variant: str, name: str, folder: Path) -> None:
    """Measure in this process; the embeddings go into a file."""
    found = {
        "ours": lambda name: extractor(name, "auto"),
        "torch": lambda name: extractor(name, "torch"),
        "eager": eager,
        "openvino": openvino,
    }[variant](name)
    np.save(folder / f"{variant}.npy", found.pop("embeddings"))
    print(json.dumps(found))


def one_round(name: str, threads: int) -> dict:
    """Measure all variants of a network, and make sure that they embed the same."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            arguments = ("--measure", variant, name, folder)
            figures[variant] = in_fresh_process("networks.py", *arguments, threads=threads)
        found = {variant: np.load(Path(folder) / f"{variant}.npy") for variant in VARIANTS}
    for one, other in itertools.combinations(VARIANTS, 2):
        likeness = cosines(found[one], found[other])
        if not likeness.min() >= LIKENESS:
            sys.exit(
                f"{name}: {one} and {other} embed {np.sum(~(likeness >= LIKENESS))} images "
                f"differently, the least cosine is {likeness.min()}"
            )
    return figures


def compare(name: str, rounds: int, threads: int) -> dict:
    """Take the medians of some rounds; ratios compare within a round."""
    found = [one_round(name, threads) for _ in range(rounds)]
    speeds = {
        variant: [each[variant]["images_per_second"] for each in found] for variant in VARIANTS
    }
    best = [max(judges) for judges in zip(*(speeds[judge] for judge in JUDGES), strict=True)]
    summary = {
        variant: {
            "images_per_second": round(statistics.median(speeds[variant]), 2),
            "best": found[-1][variant]["best"],
        }
        for variant in VARIANTS
    }
    shares = [ours / most for ours, most in zip(speeds["ours"], best, strict=True)]
    return {**summary, "share": round(statistics.median(shares), 3)}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--measure", nargs=3, metavar=("VARIANT", "NETWORK", "FOLDER"))
    options = parser.parse_args()
    if options.measure:
        variant, name, folder = options.measure
        measure(variant, name, Path(folder))
        return
    result, failures = {}, []
    print(f"{'':20}" + "".join(f"{variant:>10}" for variant in [*VARIANTS, "share"]))
    for name in options.networks.split(","):
        figures = result[name] = compare(name, options.rounds, options.threads)
        speeds = [figures[variant]["images_per_second"] for variant in VARIANTS]
        print(
            f"{name:20}" + "".join(f"{each:10.1f}" for each in speeds) + f"{figures['share']:10.2f}"
        )
        if figures["share"] < SHARE:
            failures.append(f"{name}: {figures['share']} of the better of both, not {SHARE}")
    finish({"threads": options.threads, "networks": result}, failures, options.json)


if __name__ == "__main__":
    main()
