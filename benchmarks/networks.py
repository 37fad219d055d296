"""Measure the engines' speed on other networks, compared with eager torch and with OpenVINO.

The networks are six of torchvision with random weights; the images are 128 of 224 x 224, in memory.
Each variant runs in a fresh process, one after the other, with the same number of threads. Figures
are images per second, medians over the passes and over the rounds. Ratios are computed within each
round first.

sktransfer        PretrainedFeatureExtractor(cache=None), from uint8 pixels to embeddings
sktransfer_torch  the same with engine="torch", the only engine of the plain install
eager             plain torch on normalized float tensors, with the fastest of two layouts and
                  three batch sizes
openvino          OpenVINO alone on normalized float tensors, with the fastest of three batch sizes

All embeddings must agree with a cosine of at least 0.9999. The run fails unless sktransfer has, on
each network, 0.95 times the speed of the faster of eager and openvino.

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
VARIANTS = ["sktransfer", "sktransfer_torch", "eager", "openvino"]
BASELINES = VARIANTS[2:]
MIN_SHARE, MIN_COSINE = 0.95, 0.9999
N_IMAGES, N_TRIAL_IMAGES, MIN_SECONDS = 128, 16, 3.0
BATCH_SIZES = (1, 4, 16)

Run = Callable[[Any], np.ndarray]


def images() -> np.ndarray:
    """Build images of randomly colored squares; their content does not affect the speed."""
    colors = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 28, 28, 3))
    return colors.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


def prepared(name: str) -> tuple[FrozenPrefix, torch.Tensor]:
    """Load the network without its head, and the preprocessed images."""
    backbone = load_backbone(name, None)
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2)
    return FrozenPrefix(backbone.block_list), backbone.preprocessing.normalize(pixels)


def time_passes(run: Run, x: Any) -> dict:
    """Measure passes over all images until they have taken MIN_SECONDS in total."""
    seconds: list[float] = []
    while sum(seconds) < MIN_SECONDS:
        start = time.perf_counter()
        embeddings = run(x)
        seconds.append(time.perf_counter() - start)
    return {"images_per_second": len(x) / statistics.median(seconds), "embeddings": embeddings}


def time_best(runs: dict[str, Run], x: torch.Tensor) -> dict:
    """Measure, on all images, the run that is fastest on a few images."""
    seconds = {}
    for name, run in runs.items():
        run(x[:N_TRIAL_IMAGES])
        start = time.perf_counter()
        run(x[:N_TRIAL_IMAGES])
        seconds[name] = time.perf_counter() - start
    best = min(seconds, key=seconds.__getitem__)
    return {**time_passes(runs[best], x), "best": best}


def extractor(name: str, engine: str) -> dict:
    """Measure the extractor, from uint8 pixels to embeddings."""
    extractor = PretrainedFeatureExtractor(
        name, weights=None, image_size=(224, 224), cache=None, engine=engine
    ).fit(images())
    extractor.transform(images())  # starts the engine and warms it up
    return {**time_passes(extractor.transform, images()), "best": extractor.engine_}


def eager(name: str) -> dict:
    """Measure plain torch."""
    net, x = prepared(name)

    def runner(size: int, layout: torch.memory_format) -> Run:
        return lambda x: run_eager(net, x.split(size), layout)

    layouts = {"": torch.contiguous_format, ", channels last": torch.channels_last}
    return time_best(
        {
            f"batch {size}{suffix}": runner(size, layout)
            for suffix, layout in layouts.items()
            for size in BATCH_SIZES
        },
        x,
    )


def openvino(name: str) -> dict:
    """Measure OpenVINO alone."""
    net, x = prepared(name)
    return time_best({f"batch {size}": raw_openvino(net, x[:size]) for size in BATCH_SIZES}, x)


def measure(variant: str, name: str, folder: Path) -> None:
    """Measure a variant in this process, and save its embeddings in the folder."""
    figures = {
        "sktransfer": lambda name: extractor(name, "auto"),
        "sktransfer_torch": lambda name: extractor(name, "torch"),
        "eager": eager,
        "openvino": openvino,
    }[variant](name)
    np.save(folder / f"{variant}.npy", figures.pop("embeddings"))
    print(json.dumps(figures))


def measure_round(name: str, threads: int) -> dict:
    """Measure all variants on a network, and check that their embeddings agree."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            arguments = ("--measure", variant, name, folder)
            figures[variant] = in_fresh_process("networks.py", *arguments, threads=threads)
        embeddings = {variant: np.load(Path(folder) / f"{variant}.npy") for variant in VARIANTS}
    for first, second in itertools.combinations(VARIANTS, 2):
        similarities = cosines(embeddings[first], embeddings[second])
        if not similarities.min() >= MIN_COSINE:
            sys.exit(
                f"{name}: the embeddings of {first} and {second} differ for "
                f"{np.sum(~(similarities >= MIN_COSINE))} images: got a minimum cosine of "
                f"{similarities.min()}, expected {MIN_COSINE}"
            )
    return figures


def compare(name: str, rounds: int, threads: int) -> dict:
    """Compute the medians over the rounds, and the ratio to the faster baseline."""
    results = [measure_round(name, threads) for _ in range(rounds)]
    speeds = {
        variant: [figures[variant]["images_per_second"] for figures in results]
        for variant in VARIANTS
    }
    baselines = [speeds[variant] for variant in BASELINES]
    fastest = [max(rates) for rates in zip(*baselines, strict=True)]
    summary = {
        variant: {
            "images_per_second": round(statistics.median(speeds[variant]), 2),
            "best": results[-1][variant]["best"],
        }
        for variant in VARIANTS
    }
    shares = [rate / peak for rate, peak in zip(speeds["sktransfer"], fastest, strict=True)]
    return {**summary, "share": round(statistics.median(shares), 3)}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--measure",
        nargs=3,
        metavar=("VARIANT", "NETWORK", "FOLDER"),
        help="measure a variant in this process, and save its embeddings in FOLDER",
    )
    options = parser.parse_args()
    if options.measure:
        variant, name, folder = options.measure
        measure(variant, name, Path(folder))
        return
    result, failures = {}, []
    print(f"{'':20}" + "".join(f"{variant:>17}" for variant in [*VARIANTS, "share"]))
    for name in options.networks.split(","):
        figures = result[name] = compare(name, options.rounds, options.threads)
        speeds = [figures[variant]["images_per_second"] for variant in VARIANTS]
        cells = "".join(f"{speed:17.1f}" for speed in speeds)
        print(f"{name:20}{cells}{figures['share']:17.2f}")
        if figures["share"] < MIN_SHARE:
            failures.append(
                f"{name}: {figures['share']} times the faster baseline, expected {MIN_SHARE}"
            )
    finish({"threads": options.threads, "networks": result}, failures, options.json)


if __name__ == "__main__":
    main()
