"""Peak memory of embedding 20,000 paths against 200: it must not grow with the images.

Each variant runs in a fresh process. The paths are real photographs (those that come with
scikit-learn, cut into crops), linked under many names: every name is an image of its own to the
store. The output array, which has to grow, is subtracted.

    python benchmarks/memory.py [--many 20000] [--few 200] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LIMIT_MB = 150
CROPS = 20


def make_folder(folder: Path, count: int) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    crops = []
    for number, photograph in enumerate(load_sample_images().images):
        for top in range(0, 320, 32):
            path = folder / f"crop-{number}-{top}.jpg"
            Image.fromarray(photograph[top : top + 100, top : top + 300]).save(path)
            crops.append(path)
    assert len(crops) == CROPS
    for row in range(count):
        os.link(crops[row % CROPS], folder / f"{row:06}.jpg")


def measure(folder: Path, count: int, image_size: int) -> None:
    """Embed in this process and print its peak memory, less the output, in MB."""
    from sktransfer import PretrainedFeatureExtractor

    paths = [folder / f"{row:06}.jpg" for row in range(count)]
    extractor = PretrainedFeatureExtractor(image_size=image_size)
    embeddings = extractor.fit_transform(paths)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for row in range(CROPS, count):  # the same pixels under another name
        np.testing.assert_allclose(embeddings[row], embeddings[row - CROPS], atol=1e-3)
    np.testing.assert_array_equal(extractor.transform(paths[:200]), embeddings[:200])
    print(json.dumps({"peak_mb": round(peak - embeddings.nbytes / 2**20)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=20_000)
    parser.add_argument("--few", type=int, default=200)
    parser.add_argument("--image-size", type=int, default=64, help="small: it is memory, not speed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), int(options.measure[1]), options.image_size)
        return
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), options.many)
        for count in (options.few, options.many):
            command = [sys.executable, __file__, "--measure", folder, str(count)]
            command += ["--image-size", str(options.image_size)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[count] = json.loads(output)["peak_mb"]
            print(f"{count:7,} paths: peak {peaks[count]:.0f} MB without the output array")
    growth = peaks[options.many] - peaks[options.few]
    print(f"growth: {growth:.0f} MB (limit {LIMIT_MB} MB)")
    if options.json:
        options.json.write_text(
            json.dumps({"peak_mb": peaks, "growth_mb": growth}, indent=2) + "\n"
        )
    sys.exit(growth > LIMIT_MB)


if __name__ == "__main__":
    main()
