"""Measure what the CPU does for each JPEG that a CUDA device decodes, without a device.

The files are read and their headers checked as in a real run, but the device costs nothing: its
decoder, its resizing and its network are replaced by functions that return at once. So the speed is
the limit that the CPU sets, whatever the device. The JPEGs are 500 x 375, cut from the photographs
that come with scikit-learn, and in the cache of the system.

    python benchmarks/feed.py [--images 16384] [--threads 2] [--json PATH]
"""

from __future__ import annotations

import functools
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from _common import command_line, finish
from _gpu import write_cut

from sktransfer.data.decoding import PlainJpeg
from sktransfer.data.images import as_images
from sktransfer.transforms import device_feed
from sktransfer.transforms.loader import ImageErrors
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.transforms.views import Views

N_FILES, BATCH, REPEATS = 1024, 512, 5
# Milliseconds of the CPU for an image, at most: 20,000 images a second on one core.
MAX_MS = 0.05

real_empty = torch.empty


class Stream:
    """A stream on which nothing runs."""

    def __init__(self, device: torch.device) -> None:
        pass

    def synchronize(self) -> None:
        """Wait for nothing."""


def empty(*shape: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
    """Allocate without pinning, which needs a GPU."""
    return real_empty(*shape, **options)


def decode(jpegs: dict[int, PlainJpeg], device: torch.device) -> dict[int, torch.Tensor]:
    pixels = torch.zeros(3, 1, 1, dtype=torch.uint8)
    return {slot: pixels for slot, jpeg in jpegs.items() if torch.from_numpy(jpeg.encoded).numel()}


def resize(images: list[torch.Tensor], preprocessing: Preprocessing) -> torch.Tensor:
    return real_empty(len(images), 3, 1, 1)


def measure(paths: list[str], threads: int) -> dict[str, float]:
    """Send all paths through the feed; return seconds and CPU milliseconds for each image."""
    feed = device_feed.DeviceFeed(
        Views(as_images(paths), Preprocessing()),
        threads,
        ImageErrors("raise"),
        torch.device("cuda"),
    )
    embeddings = torch.zeros(BATCH, 1)  # a device copies its results itself
    batches = [range(start, start + BATCH) for start in range(0, len(paths), BATCH)]
    start, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
    done = sum(
        len(rows) for rows, _ in feed.map(lambda pixels, _: embeddings[: len(pixels)], batches)
    )
    assert done == len(paths)
    return {
        "images_per_second": len(paths) / (time.perf_counter() - start),
        "cpu_ms": 1000 * (time.process_time() - cpu) / len(paths),
        "main_thread_ms": 1000 * (time.thread_time() - main) / len(paths),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--images", type=int, default=16_384, help="number of images; default: %(default)s"
    )
    options = parser.parse_args()
    figures: dict = {"threads": options.threads, "images": options.images, "runs": {}}
    with tempfile.TemporaryDirectory() as name:
        files = [*map(functools.partial(write_cut, Path(name)), range(N_FILES))]
        paths = (files * (options.images // N_FILES + 1))[: options.images // BATCH * BATCH]
        with (
            mock.patch.object(torch, "empty", empty),
            mock.patch.multiple(torch.cuda, Stream=Stream, stream=lambda stream: nullcontext()),
            mock.patch.object(device_feed, "_decode", decode),
            mock.patch.object(device_feed.device_resize, "resize", resize),
        ):
            measure(paths, options.threads)
            for threads in sorted({1, options.threads}):
                runs = [measure(paths, threads) for _ in range(REPEATS)]
                medians = {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
                figures["runs"][str(threads)] = medians
                print(f"{threads} threads: {medians}")
    least = min(run["cpu_ms"] for run in figures["runs"].values())
    finish(figures, [f"{least} ms of the CPU for an image"] * (least > MAX_MS), options.json)


if __name__ == "__main__":
    main()
