"""Embedding images: against the peers, and against what the machine can do at most.

The 432 photographs of benchmarks/_sets.py, from file to embedding, with EfficientNet-Lite0 at
224 x 224 and its ImageNet weights. In each round every variant runs in a fresh process, one after
the other, on the same number of cores; what counts is the second pass over the images in that
process. Figures are medians over the rounds, and so are ratios, which compare within a round.
Before a speed counts, the embeddings are compared with those of plain eager torch.

ours         PretrainedFeatureExtractor(cache=None), as the extra [cpu] installs it: OpenVINO
torch        the same with engine="torch", which is all that the plain install has
half         ours with precision="bfloat16"
loop         a DataLoader and a loop in plain torch, as tutorials have it: batches of 32
tuned        the same loop with the best that could be found for it: channels last, batches of 4
tuned_half   the same under torch's autocast to bfloat16
embetter     ImageLoader and TimmEncoder, with its network in evaluation mode and without gradients
fastai       get_preds, channels last
fastai_half  the same under torch's autocast to bfloat16
forward      OpenVINO alone, at its best batch, on pixels that lie in memory
limit        what these cores could do if all they did was to decode, prepare and run OpenVINO:
             their number, divided by the CPU seconds that an image takes for both
arithmetic   the same, where the multiplications of the network go as fast as those of two large
             matrices in torch: there is not much above that in float32

embetter and fastai read copies of the photographs that have no transparency, which they would put
on black. thingsvision cannot be installed beside this torchvision and is reported as missing.

Fails unless ours is 5 times and torch 3 times as fast as the best of embetter, fastai,
thingsvision and loop, and ours at least 0.95 times the limit. What computes in bfloat16 is compared
with float32 by the median cosine, and a peer that is faster so counts, too, for half.

    python benchmarks/embedding.py [--variants ours,limit] [--rounds 3] [--threads 2] [--json PATH]
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

OWN = ["ours", "torch", "half", "loop", "tuned", "tuned_half", "forward", "limit", "arithmetic"]
BOUNDS = ["limit", "arithmetic"]  # which embed nothing
PEERS = ["embetter", "fastai", "fastai_half", "thingsvision"]
# Images a second, of which a peer is the best; in bfloat16 it may be another one.
JUDGED = ["embetter", "fastai", "thingsvision", "loop"]
HALF = ["fastai_half"]
# Least cosine with plain eager torch; the median one in bfloat16, and for peers, which resize in
# ways of their own.
LIKENESS = {"half": 0.999, "tuned_half": 0.999} | dict.fromkeys(PEERS, 0.99)
LIKENESS_IN_FLOAT32 = 0.9999
BARS = {"ours": 5, "torch": 3}
OF_THE_LIMIT = 0.95
# Side of the matrices whose product measures how fast a core multiplies at best.
SIDE = 2048


def loop(batch_size: int, layout: torch.memory_format) -> Embed:
    """Make a plain loop, without workers: on two cores, they only get in its way."""
    net = headless()
    return lambda paths: run_eager(net, DataLoader(Photographs(paths), batch_size), layout)


def in_half(embed: Embed) -> Embed:
    """Compute in bfloat16 what torch can compute so."""

    def embed_in_half(paths: list[str]) -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16):
            return embed(paths)

    return embed_in_half


VARIANTS: dict[str, Callable[[], Embed]] = {
    "ours": lambda: PretrainedFeatureExtractor(cache=None).fit_transform,
    "torch": lambda: PretrainedFeatureExtractor(cache=None, engine="torch").fit_transform,
    "half": lambda: PretrainedFeatureExtractor(cache=None, precision="bfloat16").fit_transform,
    "loop": lambda: loop(32, torch.contiguous_format),
    "tuned": lambda: loop(4, torch.channels_last),
    "tuned_half": lambda: in_half(loop(4, torch.channels_last)),
    "embetter": embetter,
    "fastai": fastai,
    "fastai_half": lambda: in_half(fastai()),
}


def time_embedding(embed: Embed, paths: list[str]) -> tuple[np.ndarray, dict]:
    """Time the second pass."""
    embed(paths)
    start = time.perf_counter()
    embeddings = embed(paths)
    return embeddings, {"images_per_second": len(paths) / (time.perf_counter() - start)}


def time_forward(paths: list[str]) -> tuple[np.ndarray, dict]:
    """Run OpenVINO alone, at the best of a few batch sizes: also CPU seconds for an image."""
    pixels = torch.stack([Photographs(paths)[row] for row in range(len(paths))])
    best: dict[str, float] = {"images_per_second": 0.0}
    for batch_size in (1, 2, 4, 8):
        run = raw_openvino(headless(), pixels[:batch_size])
        run(pixels[:64])
        start, cpu = time.perf_counter(), time.process_time()
        embeddings = run(pixels)
        speed = len(paths) / (time.perf_counter() - start)
        if speed > best["images_per_second"]:
            spent = (time.process_time() - cpu) / len(paths)
            best = {"images_per_second": speed, "batch_size": batch_size, "cpu_seconds": spent}
    return embeddings, best


def time_preparing(paths: list[str]) -> float:
    """Give the CPU seconds in which one thread decodes and prepares an image."""
    preprocessing = load_backbone("efficientnet_lite0").preprocessing
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for timed in (False, True):
        cpu = time.process_time()
        for path in paths if timed else paths[:64]:
            preprocessing.prepare(decode(path))
    torch.set_num_threads(threads)
    return (time.process_time() - cpu) / len(paths)


@torch.inference_mode()
def time_arithmetic() -> float:
    """Give the CPU seconds of the network's multiplications, done as fast as those of matrices."""
    with FlopCounterMode(display=False) as counter:
        headless()(torch.zeros(1, 3, 224, 224))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix, spent = torch.rand(SIDE, SIDE), []
    for _ in range(10):
        cpu = time.process_time()
        torch.mm(matrix, matrix)
        spent.append(time.process_time() - cpu)
    torch.set_num_threads(threads)
    return counter.get_total_flops() * min(spent) / (2 * SIDE**3)


def measure(name: str, folder: Path) -> dict:
    """Measure a variant in this process; its embeddings go into a file of the folder."""
    images = "opaque.txt" if name in PEERS else "originals.txt"
    paths = (folder / images).read_text().split("\n")
    if name in ("limit", "arithmetic"):
        preparing = time_preparing(paths)
        network = time_forward(paths)[1]["cpu_seconds"] if name == "limit" else time_arithmetic()
        cores = min(torch.get_num_threads(), os.cpu_count() or 1)
        speed = cores / (preparing + network)
        figures = {
            "images_per_second": speed,
            "preparing_cpu_seconds": preparing,
            "network_cpu_seconds": network,
        }
    else:
        forward = name == "forward"
        timed = time_forward(paths) if forward else time_embedding(VARIANTS[name](), paths)
        embeddings, figures = timed
        np.save(folder / f"{name}.npy", embeddings)
    return figures


def opaque_copies(paths: list[str], folder: Path) -> list[str]:
    """Save the photographs on white."""
    copies = [folder / f"{number:03}.png" for number in range(len(paths))]
    for path, copy in zip(paths, copies, strict=True):
        Image.fromarray(decode(path)).save(copy)
    return [str(copy) for copy in copies]


def run_variant(name: str, folder: Path, threads: int) -> dict:
    """Measure a variant in a fresh process; its embeddings go into a file of the folder."""
    if name == "thingsvision":
        raise ChildError(f"could not be installed beside torchvision {torchvision.__version__}")
    python = environment_of_peers() if name in PEERS else Path(sys.executable)
    arguments = ("embedding.py", "--measure", name, str(folder))
    return in_fresh_process(*arguments, threads=threads, python=python)


def min_cosine(name: str, one: np.ndarray, other: np.ndarray) -> float:
    """Compare embeddings by their cosines; ends the run where they are not the same."""
    found = float((np.median if name in LIKENESS else np.min)(cosines(one, other)))
    if not found >= LIKENESS.get(name, LIKENESS_IN_FLOAT32):
        sys.exit(f"{name} embeds something else: the cosine is {found}")
    return round(found, 6)


def measure_rounds(names: list[str], rounds: int, threads: int) -> dict[str, dict]:
    """Give the figures of each variant in every round."""
    variants: dict[str, dict[str, Any]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = photographs()[0]
        (folder / "originals.txt").write_text("\n".join(paths))
        (folder / "opaque.txt").write_text("\n".join(opaque_copies(paths, folder)))
        run_variant("loop", folder, threads)  # what all others are compared with
        expected = np.load(folder / "loop.npy")
        for _ in range(rounds):
            for name, figures in variants.items():
                if "missing" in figures:
                    continue
                try:
                    found = run_variant(name, folder, threads)
                except (ChildError, subprocess.CalledProcessError, OSError) as error:
                    print(f"{name} is missing: {error}", file=sys.stderr)
                    figures["missing"] = (
                        str(error) if name == "thingsvision" else "could not be measured"
                    )
                    continue
                if name not in BOUNDS:
                    embeddings = np.load(folder / f"{name}.npy")
                    figures["cosine"] = min_cosine(name, embeddings, expected)
                for key, value in found.items():
                    figures.setdefault(key, []).append(value)
    return variants


def judge(variants: dict[str, dict]) -> list[str]:
    """Add medians and ratios, and name the bars that were missed."""
    missing = {name: v["missing"] for name, v in variants.items() if "missing" in v}
    failures = [f"{name} {reason}" for name, reason in missing.items()]
    present = {name: v for name, v in variants.items() if name not in missing}
    speeds = {name: figures["images_per_second"] for name, figures in present.items()}
    for name, figures in present.items():
        figures["median"] = round(statistics.median(speeds[name]), 1)
        if best := _best(speeds, [*JUDGED, *(HALF if "half" in name else [])]):
            figures["times_best_peer"] = round(_median_ratio(speeds[name], best), 2)
        if "limit" in present:
            figures["of_the_limit"] = round(_median_ratio(speeds[name], speeds["limit"]), 3)
    for name, bar in BARS.items():
        times = present.get(name, {}).get("times_best_peer", bar)
        if times < bar:
            failures.append(f"{name} is {times} times as fast as the best peer, not {bar} times")
    share = present.get("ours", {}).get("of_the_limit", OF_THE_LIMIT)
    if share < OF_THE_LIMIT:
        failures.append(f"ours reaches {share} of the limit, not {OF_THE_LIMIT}")
    return failures


def _best(speeds: dict[str, list[float]], names: list[str]) -> list[float]:
    """Give the speed of the fastest in each round."""
    return [max(found) for found in zip(*(speeds[n] for n in names if n in speeds), strict=True)]


def _median_ratio(one: list[float], other: list[float]) -> float:
    """Compare round by round: machines are noisy, and what they do lasts longer than a round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def print_table(variants: dict[str, dict]) -> None:
    columns = {"median": 11, "times_best_peer": 17, "of_the_limit": 14, "cosine": 10}
    print("images/s" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for name, figures in variants.items():
        cells = [f"{figures.get(column, '-'):>{width}}" for column, width in columns.items()]
        print(f"{name:12}" + ("missing" if "missing" in figures else "".join(cells)[2:]))


def main() -> None:
    parser = command_line(__doc__)
    everything = [*OWN, *PEERS]
    parser.add_argument("--variants", default=",".join(everything), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "FOLDER"))
    options = parser.parse_args()
    if options.measure:
        name, folder = options.measure
        print(json.dumps(measure(name, Path(folder))))
        return
    names = options.variants.split(",")
    if unknown := set(names) - set(everything):
        parser.error(f"Got {sorted(unknown)} among --variants, but there are only {everything}")
    variants = measure_rounds(names, options.rounds, options.threads)
    failures = judge(variants)
    print_table(variants)
    finish({"threads": options.threads, "variants": variants}, failures, options.json)


if __name__ == "__main__":
    main()
