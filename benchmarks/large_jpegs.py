"""Measure the speed of large JPEGs, decoded at reduced size or with all pixels.

The images are 16 JPEGs of 12 megapixels (4000 x 3000, quality 90), each with many photographs of
benchmarks/_sets.py side by side at their original size.

sktransfer  decodes a JPEG at a half, a quarter or an eighth of its size if the result still has
            twice the side that is needed
all_pixels  the same, but forced to decode all pixels

Each variant runs in a fresh process. Figures are medians of five passes, in images per second:
"read" is decoding, resizing and cropping on all cores, "embedded" is the whole extractor.

The run fails unless reading is 3 times as fast and the embeddings have a cosine of at least 0.999.

    python benchmarks/large_jpegs.py [--threads 2] [--json PATH]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import command_line, cosines, finish, in_fresh_process
from _sets import photographs
from PIL import Image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.loading import load_backbone
from sktransfer.data import images
from sktransfer.data.decoding import decode
from sktransfer.data.images import as_images
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.views import Views

COUNT, SIZE, PASSES = 16, (4000, 3000), 5
VARIANTS = ["sktransfer", "all_pixels"]
MIN_SPEEDUP, MIN_COSINE = 3, 0.999


def sheet(images: list[np.ndarray]) -> Image.Image:
    """Paste images on white, row by row, until the sheet is full."""
    canvas = Image.new("RGB", SIZE, "white")
    left = top = height = index = 0
    while top < SIZE[1]:
        image = Image.fromarray(images[index % len(images)])
        canvas.paste(image, (left, top))
        left, height, index = left + image.width, max(height, image.height), index + 1
        if left >= SIZE[0]:
            left, top, height = 0, top + height, 0
    return canvas


def write_jpegs(folder: Path) -> None:
    """Write the JPEGs into the folder."""
    images = [decode(path) for path in photographs()[0]]
    random = np.random.default_rng(0)
    for number in range(COUNT):
        order = random.permutation(len(images))
        sheet([images[row] for row in order]).save(folder / f"{number:02}.jpg", quality=90)


def median_speed(run: Callable[[], object], count: int) -> float:
    """Measure the images per second of a run, as the median of the passes after the first."""
    seconds = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return round(count / statistics.median(seconds[1:]), 2)


def measure(variant: str, folder: Path) -> None:
    """Measure a variant in this process, and save its embeddings in the folder."""
    if variant == "all_pixels":
        images.decoding.decode = lambda image, *settings, side: decode(image, *settings)
    paths = sorted(folder.glob("*.jpg"))
    views = Views(as_images(paths), load_backbone("efficientnet_lite0").preprocessing)
    reader = ImageReader(views, torch.get_num_threads(), ImageErrors("raise"))
    batches = [[row] for row in range(len(paths))]
    extractor = PretrainedFeatureExtractor(cache=None, engine="openvino").fit(paths)
    np.save(folder / f"{variant}.npy", extractor.transform(paths))
    figures = {
        "read": median_speed(lambda: list(reader.map(lambda x: np.zeros(len(x)), batches)), COUNT),
        "embedded": median_speed(lambda: extractor.transform(paths), COUNT),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("VARIANT", "FOLDER"),
        help="measure a variant in this process, on the JPEGs in FOLDER",
    )
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    result: dict = {}
    with tempfile.TemporaryDirectory() as name:
        write_jpegs(Path(name))
        for variant in VARIANTS:
            arguments = ("large_jpegs.py", "--measure", variant, name)
            result[variant] = in_fresh_process(*arguments, threads=options.threads)
        reduced, full = (np.load(Path(name) / f"{variant}.npy") for variant in VARIANTS)
    result["cosine"] = round(float(cosines(reduced, full).min()), 5)
    if result["cosine"] < MIN_COSINE:
        sys.exit(f"The embeddings differ: got cosine {result['cosine']}, expected {MIN_COSINE}")
    for key in ("read", "embedded"):
        speed, full_speed = (result[variant][key] for variant in VARIANTS)
        result[f"times_{key}"] = round(speed / full_speed, 2)
        print(f"{key} per second: {speed}; if all pixels are decoded: {full_speed}")
    print(f"{result['times_read']} and {result['times_embedded']} times as fast")
    failures = []
    if result["times_read"] < MIN_SPEEDUP:
        failures.append(f"reading is not {MIN_SPEEDUP} times as fast")
    finish({"threads": options.threads, **result}, failures, options.json)


if __name__ == "__main__":
    main()
