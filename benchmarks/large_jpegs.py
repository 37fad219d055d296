"""Large JPEGs: decoded only as large as the network sees them.

36 JPEGs of 12 megapixels (4000 x 3000, quality 90), made of the photographs of
benchmarks/photographs.py: enlarged, with the grain of a sensor. The extractor decodes a JPEG at a
half, a quarter or an eighth of its size where that is enough; `full` is the same extractor made to
decode all pixels. Each variant runs in a fresh process; figures are medians of three passes.

Fails unless that is 3 times as fast, and the embeddings have a cosine of at least 0.999.

    python benchmarks/large_jpegs.py [--threads 2] [--json PATH]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import command_line, cosines, finish, in_fresh_process
from photographs import photographs
from PIL import Image

from sktransfer import PretrainedFeatureExtractor, images
from sktransfer.decoding import decode

COUNT, SIZE, PASSES = 36, (4000, 3000), 3
FASTER, LIKENESS = 3, 0.999
GRAIN = 6  # grey values, standard deviation


def make_folder(folder: Path) -> None:
    """Write the JPEGs."""
    paths = photographs()[0]
    random = np.random.default_rng(0)
    for number, path in enumerate(paths[:: len(paths) // COUNT][:COUNT]):
        picture = Image.fromarray(decode(path)).resize(SIZE, Image.Resampling.BICUBIC)
        grain = random.normal(0, GRAIN, (SIZE[1], SIZE[0], 1)).astype(np.float32)
        grainy = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{number:02}.jpg", quality=90)


def measure(variant: str, folder: Path) -> None:
    """Embed in this process; the embeddings go into a file."""
    if variant == "full":
        images.decoding.decode = lambda picture, pixel_range, side: decode(picture, pixel_range)
    paths = sorted(folder.glob("*.jpg"))
    extractor = PretrainedFeatureExtractor(cache=None, engine="openvino").fit(paths)
    seconds = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        embeddings = extractor.transform(paths)
        seconds.append(time.perf_counter() - start)
    np.save(folder / f"{variant}.npy", embeddings)
    speed = round(len(paths) / statistics.median(seconds[1:]), 2)
    print(json.dumps({"pictures_per_second": speed}))


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
            arguments = ("--measure", variant, name)
            figures = in_fresh_process("large_jpegs.py", *arguments, threads=options.threads)
            result[variant] = figures["pictures_per_second"]
        one, other = (np.load(Path(name) / f"{variant}.npy") for variant in ("ours", "full"))
    result["cosine"] = round(float(cosines(one, other).min()), 5)
    if result["cosine"] < LIKENESS:
        sys.exit(f"the embeddings differ: the cosine is {result['cosine']}")
    result["times"] = round(result["ours"] / result["full"], 2)
    print(
        "{ours} pictures a second, {full} with all pixels decoded: {times} times as fast, least "
        "cosine {cosine}".format(**result)
    )
    failures = [] if result["times"] >= FASTER else [f"it is not {FASTER} times as fast"]
    finish({"threads": options.threads, **result}, failures, options.json)


if __name__ == "__main__":
    main()
