"""Measure the speed of embedding images, compared with other packages and with the hardware limit.

The task is to embed the 432 photographs of benchmarks/_sets.py, from file to embedding, with
EfficientNet-Lite0 at 224 x 224 and its ImageNet weights. In each round, each variant runs in a
fresh process, one after the other, with the same number of threads. The time is that of the second
pass over the images. Figures are medians over the rounds; ratios are computed within each round
first. Before a speed is reported, the embeddings are compared with those of plain eager torch.

sktransfer           PretrainedFeatureExtractor(cache=None) with OpenVINO (the extra [openvino])
sktransfer_torch     the same with engine="torch", the only engine of the plain install
sktransfer_bfloat16  sktransfer with precision="bfloat16"
loop                 a DataLoader and a loop in plain torch, as in tutorials: batches of 32
tuned_loop           the same loop with the fastest settings found: channels last, batches of 4
tuned_loop_bfloat16  the same under torch's autocast to bfloat16
embetter             ImageLoader and TimmEncoder, with the network in evaluation mode and without
                     gradients
fastai               get_preds, channels last
fastai_bfloat16      the same under torch's autocast to bfloat16
forward              only OpenVINO, at its best batch size, on pixels in memory
limit                the speed if the cores did nothing but decode, preprocess and run OpenVINO:
                     the number of cores divided by the CPU seconds per image of these steps
matmul_limit         the same if the network multiplied as fast as torch multiplies two large
                     matrices, which is close to the fastest possible in float32

embetter and fastai read copies of the photographs without transparency, because they would put
transparent images on black. thingsvision cannot be installed together with this torchvision and is
reported as missing.

The run fails unless sktransfer is 5 times and sktransfer_torch 3 times as fast as the fastest of
embetter, fastai, thingsvision and loop, and sktransfer reaches 0.95 of the limit. For variants in
bfloat16, fastai_bfloat16 is a peer, too. The embeddings of variants in bfloat16 and of the other
packages are checked by the median cosine, those of all other variants by the minimum cosine.

    python benchmarks/embedding.py [--variants sktransfer,limit] [--rounds 3] [--threads 2]
        [--json PATH]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from _common import ChildError, command_line, cosines, finish, in_fresh_process
from _engines import Embed, Photographs, headless, raw_openvino, run_eager
from _peers import embetter, environment_of_peers, fastai
from _sets import photographs
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.loading import load_backbone
from sktransfer.data.decoding import decode

# Variants that need no other package.
WITHOUT_PEERS = [
    *["sktransfer", "sktransfer_torch", "sktransfer_bfloat16"],
    *["loop", "tuned_loop", "tuned_loop_bfloat16", "forward", "limit", "matmul_limit"],
]
LIMITS = ["limit", "matmul_limit"]  # these compute no embeddings
PEERS = ["embetter", "fastai", "fastai_bfloat16", "thingsvision"]
# The fastest of these is the best peer. In bfloat16 it may be one of BFLOAT16_OTHERS.
OTHERS = ["embetter", "fastai", "thingsvision", "loop"]
BFLOAT16_OTHERS = ["fastai_bfloat16"]
# Minimum of the median cosine with plain eager torch, in bfloat16 and for peers, which resize
# differently. For all other variants every cosine must reach MIN_COSINE_IN_FLOAT32.
MIN_MEDIAN_COSINE = {"sktransfer_bfloat16": 0.999, "tuned_loop_bfloat16": 0.999}
MIN_MEDIAN_COSINE |= dict.fromkeys(PEERS, 0.99)
MIN_COSINE_IN_FLOAT32 = 0.9999
MIN_TIMES_BEST_PEER = {"sktransfer": 5, "sktransfer_torch": 3}
MIN_SHARE_OF_LIMIT = 0.95
# Side of the matrices whose product measures the peak speed of a core.
MATRIX_SIDE = 2048


def loop(batch_size: int, layout: torch.memory_format) -> Embed:
    """Build a plain loop without workers, which would make it slower on two cores."""
    net = headless()
    return lambda paths: run_eager(net, DataLoader(Photographs(paths), batch_size), layout)


def in_bfloat16(embed: Embed) -> Embed:
    """Run a function under torch's autocast to bfloat16."""

    def embed_in_bfloat16(paths: list[str]) -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16):
            return embed(paths)

    return embed_in_bfloat16


def extractor(**parameters: str) -> Embed:
    return PretrainedFeatureExtractor(cache=None, **parameters).fit_transform


VARIANTS: dict[str, Callable[[], Embed]] = {
    "sktransfer": extractor,
    "sktransfer_torch": lambda: extractor(engine="torch"),
    "sktransfer_bfloat16": lambda: extractor(precision="bfloat16"),
    "loop": lambda: loop(32, torch.contiguous_format),
    "tuned_loop": lambda: loop(4, torch.channels_last),
    "tuned_loop_bfloat16": lambda: in_bfloat16(loop(4, torch.channels_last)),
    "embetter": embetter,
    "fastai": fastai,
    "fastai_bfloat16": lambda: in_bfloat16(fastai()),
}


def time_embedding(embed: Embed, paths: list[str]) -> tuple[np.ndarray, dict]:
    """Measure the speed of the second pass."""
    embed(paths)
    start = time.perf_counter()
    embeddings = embed(paths)
    return embeddings, {"images_per_second": len(paths) / (time.perf_counter() - start)}


def time_forward(paths: list[str]) -> tuple[np.ndarray, dict]:
    """Measure OpenVINO alone at its best batch size: speed, and CPU seconds per image."""
    pixels = torch.stack([Photographs(paths)[row] for row in range(len(paths))])
    best: dict[str, float] = {"images_per_second": 0.0}
    for batch_size in (1, 2, 4, 8):
        run = raw_openvino(headless(), pixels[:batch_size])
        run(pixels[:64])
        start, cpu = time.perf_counter(), time.process_time()
        embeddings = run(pixels)
        speed = len(paths) / (time.perf_counter() - start)
        if speed > best["images_per_second"]:
            cpu_seconds = (time.process_time() - cpu) / len(paths)
            best = {
                "images_per_second": speed,
                "batch_size": batch_size,
                "cpu_seconds": cpu_seconds,
            }
    return embeddings, best


def time_preparing(paths: list[str]) -> float:
    """Measure the CPU seconds per image that one thread needs to decode and preprocess."""
    preprocessing = load_backbone("efficientnet_lite0").preprocessing
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for batch in (paths[:64], paths):  # the first pass only warms up
        cpu = time.process_time()
        for path in batch:
            preprocessing.prepare(decode(path))
    torch.set_num_threads(threads)
    return (time.process_time() - cpu) / len(paths)


@torch.inference_mode()
def time_multiplications() -> float:
    """Estimate the CPU seconds of the network at the speed of a large matrix product."""
    with FlopCounterMode(display=False) as counter:
        headless()(torch.zeros(1, 3, 224, 224))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix, seconds = torch.rand(MATRIX_SIDE, MATRIX_SIDE), []
    for _ in range(10):
        cpu = time.process_time()
        torch.mm(matrix, matrix)
        seconds.append(time.process_time() - cpu)
    torch.set_num_threads(threads)
    return counter.get_total_flops() * min(seconds) / (2 * MATRIX_SIDE**3)


def measure(name: str, folder: Path) -> dict:
    """Measure a variant in this process, and save its embeddings in the folder."""
    images = "opaque.txt" if name in PEERS else "originals.txt"
    paths = (folder / images).read_text().split("\n")
    if name in LIMITS:
        preparing = time_preparing(paths)
        limit = name == "limit"
        network = time_forward(paths)[1]["cpu_seconds"] if limit else time_multiplications()
        cores = min(torch.get_num_threads(), os.cpu_count() or 1)
        speed = cores / (preparing + network)
        figures = {
            "images_per_second": speed,
            "preparing_cpu_seconds": preparing,
            "network_cpu_seconds": network,
        }
    else:
        forward = name == "forward"
        embeddings, figures = (
            time_forward(paths) if forward else time_embedding(VARIANTS[name](), paths)
        )
        np.save(folder / f"{name}.npy", embeddings)
    return figures


def opaque_copies(paths: list[str], folder: Path) -> list[str]:
    """Save copies of the photographs, with transparent areas on white."""
    copies = [folder / f"{number:03}.png" for number in range(len(paths))]
    for path, copy in zip(paths, copies, strict=True):
        Image.fromarray(decode(path)).save(copy)
    return [str(copy) for copy in copies]


def run_variant(name: str, folder: Path, threads: int) -> dict:
    """Measure a variant in a fresh process, which saves its embeddings in the folder."""
    if name == "thingsvision":
        version = torchvision.__version__
        raise ChildError(f"could not be installed together with torchvision {version}")
    python = environment_of_peers() if name in PEERS else Path(sys.executable)
    arguments = ("embedding.py", "--measure", name, str(folder))
    return in_fresh_process(*arguments, threads=threads, python=python)


def check_cosine(name: str, embeddings: np.ndarray, expected: np.ndarray) -> float:
    """Return the minimum or median cosine, and exit with an error if it is too low."""
    similarities = cosines(embeddings, expected)
    by_median = name in MIN_MEDIAN_COSINE
    cosine = float(np.median(similarities) if by_median else similarities.min())
    minimum = MIN_MEDIAN_COSINE.get(name, MIN_COSINE_IN_FLOAT32)
    if not cosine >= minimum:
        sys.exit(f"The embeddings of {name} differ: got cosine {cosine}, expected {minimum}")
    return round(cosine, 6)


def measure_rounds(names: list[str], rounds: int, threads: int) -> dict[str, dict]:
    """Measure the variants in turn, and collect the figures of all rounds."""
    variants: dict[str, dict[str, Any]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = photographs()[0]
        (folder / "originals.txt").write_text("\n".join(paths))
        (folder / "opaque.txt").write_text("\n".join(opaque_copies(paths, folder)))
        run_variant("loop", folder, threads)  # the reference for all other variants
        expected = np.load(folder / "loop.npy")
        for _ in range(rounds):
            for name, figures in variants.items():
                if "missing" in figures:
                    continue
                try:
                    measured = run_variant(name, folder, threads)
                except (ChildError, subprocess.CalledProcessError, OSError) as error:
                    print(f"{name} is missing: {error}", file=sys.stderr)
                    figures["missing"] = (
                        str(error) if name == "thingsvision" else "could not be measured"
                    )
                    continue
                if name not in LIMITS:
                    embeddings = np.load(folder / f"{name}.npy")
                    figures["cosine"] = check_cosine(name, embeddings, expected)
                for key, value in measured.items():
                    figures.setdefault(key, []).append(value)
    return variants


def summarize(variants: dict[str, dict]) -> list[str]:
    """Add medians and ratios to the figures, and return the failures."""
    missing = {name: v["missing"] for name, v in variants.items() if "missing" in v}
    failures = [f"{name} {reason}" for name, reason in missing.items()]
    present = {name: v for name, v in variants.items() if name not in missing}
    speeds = {name: figures["images_per_second"] for name, figures in present.items()}
    for name, figures in present.items():
        figures["median"] = round(statistics.median(speeds[name]), 1)
        others = [*OTHERS, *(BFLOAT16_OTHERS if "bfloat16" in name else [])]
        if best := _best(speeds, others):
            figures["times_best_peer"] = round(_median_ratio(speeds[name], best), 2)
        if "limit" in present:
            figures["share_of_limit"] = round(_median_ratio(speeds[name], speeds["limit"]), 3)
    for name, minimum in MIN_TIMES_BEST_PEER.items():
        times = present.get(name, {}).get("times_best_peer", minimum)
        if times < minimum:
            failures.append(
                f"{name} is {times} times as fast as the best peer, expected {minimum} times"
            )
    share = present.get("sktransfer", {}).get("share_of_limit", MIN_SHARE_OF_LIMIT)
    if share < MIN_SHARE_OF_LIMIT:
        failures.append(f"sktransfer reaches {share} of the limit, expected {MIN_SHARE_OF_LIMIT}")
    return failures


def _best(speeds: dict[str, list[float]], names: list[str]) -> list[float]:
    """Return the speed of the fastest variant in each round."""
    rounds = zip(*(speeds[name] for name in names if name in speeds), strict=True)
    return [max(rates) for rates in rounds]


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Compute the median of the ratios of each round.

    Other work on the machine affects all variants of a round, so it cancels in a ratio.
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def print_table(variants: dict[str, dict]) -> None:
    columns = {"median": 11, "times_best_peer": 17, "share_of_limit": 16, "cosine": 10}
    header = "".join(f"{name:>{width}}" for name, width in columns.items())
    print(f"{'images per second':20}{header}")
    for name, figures in variants.items():
        cells = [f"{figures.get(column, '-'):>{width}}" for column, width in columns.items()]
        print(f"{name:20}" + ("missing" if "missing" in figures else "".join(cells)))


def main() -> None:
    parser = command_line(__doc__)
    all_names = [*WITHOUT_PEERS, *PEERS]
    parser.add_argument("--variants", default=",".join(all_names), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("VARIANT", "FOLDER"),
        help="measure a variant in this process; FOLDER holds originals.txt and opaque.txt",
    )
    options = parser.parse_args()
    if options.measure:
        name, folder = options.measure
        print(json.dumps(measure(name, Path(folder))))
        return
    names = options.variants.split(",")
    if unknown := set(names) - set(all_names):
        parser.error(f"Got {sorted(unknown)} in --variants, expected some of {all_names}")
    variants = measure_rounds(names, options.rounds, options.threads)
    failures = summarize(variants)
    print_table(variants)
    finish({"threads": options.threads, "variants": variants}, failures, options.json)


if __name__ == "__main__":
    main()
