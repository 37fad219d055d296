"""Large JPEGs: decoded only as large as the network sees them.

16 JPEGs of 12 megapixels (4000 x 3000, quality 90), each a sheet of the photographs of
benchmarks/_sets.py, side by side at their own size. The extractor decodes a JPEG at a half, a
quarter or an eighth of its size where that leaves twice the length that it needs; `full` is the
same made to decode all pixels. Each variant runs in a fresh process; figures are medians of five
passes: images that are read a second (decoded, resized, cropped, on all cores), and embedded.

Fails unless reading is 3 times as fast, and the embeddings have a cosine of at least 0.999.

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
FASTER, LIKENESS = 3, 0.999


def sheet(images: list[np.ndarray]) -> Image.Image:
    """Lay images side by side, row by row, on white, until the sheet is full."""
    whole = Image.new("RGB", SIZE, "white")
    left = top = height = place = 0
    while top < SIZE[1]:
        image = Image.fromarray(images[place % len(images)])
        whole.paste(image, (left, top))
        left, height, place = left + image.width, max(height, image.height), place + 1
        if left >= SIZE[0]:
            left, top, height = 0, top + height, 0
    return whole


def make_folder(folder: Path) -> None:
    """Write the JPEGs."""
    images = [decode(path) for path in photographs()[0]]
    random = np.random.default_rng(0)
    for number in range(COUNT):
        order = random.permutation(len(images))
        sheet([images[row] for row in order]).save(folder / f"{number:02}.jpg", quality=90)


def median_speed(run: Callable[[], object], count: int) -> float:
    """Give images a second, of the passes after the first."""
    seconds = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return round(count / statistics.median(seconds[1:]), 2)


def measure(variant: str, folder: Path) -> None:
    """Read and embed in this process; the embeddings go into a file."""
    if variant == "full":
        images.decoding.decode = lambda image, pixel_range, side: decode(image, pixel_range)
    paths = sorted(folder.glob("*.jpg"))
    views = Views(as_images(paths), load_backbone("efficientnet_lite0").preprocessing)
    reader = ImageReader(views, torch.get_num_threads(), ImageErrors("raise"))
    each = [[row] for row in range(len(paths))]
    extractor = PretrainedFeatureExtractor(cache=None, engine="openvino").fit(paths)
    np.save(folder / f"{variant}.npy", extractor.transform(paths))
    figures = {
        "read": median_speed(lambda: list(reader.map(lambda x: np.zeros(len(x)), each)), COUNT),
        "embedded": median_speed(lambda: extractor.transform(paths), COUNT),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "FOLDER"))
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    result: dict = {}
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name))
        for variant in ("ours", "full"):
            arguments = ("large_jpegs.py", "--measure", variant, name)
            result[variant] = in_fresh_process(*arguments, threads=options.threads)
        one, other = (np.load(Path(name) / f"{variant}.npy") for variant in ("ours", "full"))
    result["cosine"] = round(float(cosines(one, other).min()), 5)
    if result["cosine"] < LIKENESS:
        sys.exit(f"the embeddings differ: the cosine is {result['cosine']}")
    for key in ("read", "embedded"):
        result[f"times_{key}"] = round(result["ours"][key] / result["full"][key], 2)
        print(f"{key} a second: {result['ours'][key]}, all pixels decoded {result['full'][key]}")
    print(f"{result['times_read']} and {result['times_embedded']} times as fast")
    failures = [] if result["times_read"] >= FASTER else [f"reading is not {FASTER} times as fast"]
    finish({"threads": options.threads, **result}, failures, options.json)


if __name__ == "__main__":
    main()
