"""The variants of benchmarks/embedding.py that need no other environment, each by itself.

python benchmarks/own_embedding.py \
    {ours,torch,half,loop,tuned,tuned_half,forward,limit,arithmetic} FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import MEAN, STD, lite0
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.loading import load_backbone
from sktransfer.data.decoding import decode

Embed = Callable[[list[str]], np.ndarray]

# Of the matrices whose product tells how fast a core multiplies at best.
SIDE = 2048


class Photographs(torch.utils.data.Dataset):
    """Images as the weights expect them."""

    def __init__(self, paths: list[str]) -> None:
        resize = v2.Resize(256, interpolation=InterpolationMode.BICUBIC, antialias=True)
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.paths, self.transform = paths, v2.Compose([resize, v2.CenterCrop(224), *scale])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(torch.from_numpy(decode(self.paths[row])).permute(2, 0, 1))


def headless() -> nn.Module:
    """Build the backbone of all variants, up to the embedding."""
    net = lite0().eval().requires_grad_(False)
    net.fc = nn.Identity()
    return net


def loop(batch_size: int, layout: torch.memory_format) -> Embed:
    """Make a plain loop, without workers: on two cores, they only get in its way."""
    net = headless().to(memory_format=layout)

    @torch.inference_mode()
    def embed(paths: list[str]) -> np.ndarray:
        batches = torch.utils.data.DataLoader(Photographs(paths), batch_size)
        found = [net(x.contiguous(memory_format=layout)).float().numpy() for x in batches]
        return np.concatenate(found)

    return embed


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
}


def time_embedding(embed: Embed, paths: list[str]) -> tuple[np.ndarray, dict]:
    """Time the second pass."""
    embed(paths)
    start = time.perf_counter()
    embeddings = embed(paths)
    return embeddings, {"images_per_second": len(paths) / (time.perf_counter() - start)}


def time_forward(paths: list[str]) -> tuple[np.ndarray, dict]:
    """Run OpenVINO alone, at the best of a few batch sizes: also CPU seconds for an image."""
    from _openvino import raw_openvino

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


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    paths = (folder / "originals.txt").read_text().split("\n")
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
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
