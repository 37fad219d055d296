"""Measure how time and memory scale from 1,000 to 100,000 images.

The images are scikit-learn's digits, repeated, each with its number written into one corner, so
that the store sees distinct images. EfficientNet-Lite0 runs at 32 x 32, so that the network does
not dominate the time. For each number of images a fresh process measures:

- embedding into a store in a folder, and reading all embeddings again;
- a search of three candidates in three folds, minus the same search on embeddings in memory, which
  leaves the time that the extractor adds;
- peak memory of the process, minus the arrays of embeddings; memory-mapped files do not count.

The run fails if, at the largest size, embedding or reading takes more than 1.3 times as long per
image as at the size before, or peak memory is more than 150 MB higher.

    python benchmarks/growth.py [--sizes 1000,10000,100000] [--threads 2] [--json PATH]
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import PeakMemory, command_line, finish, in_fresh_process
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor

SIZES = "1000,10000,100000"
MAX_RATIO, MAX_EXTRA_MB = 1.3, 150
ALPHAS = [1.0, 10.0, 100.0]


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Repeat the digits, and write the number of each image into its first four pixels."""
    digits = load_digits()
    rows = np.arange(count) % len(digits.images)
    images = (digits.images[rows] * 15.9375).astype(np.uint8)
    for column in range(4):
        images[:, 0, column] = np.arange(count) // 256**column % 256
    return images, digits.target[rows]


def search(extractor: PretrainedFeatureExtractor | None, X: np.ndarray, y: np.ndarray) -> float:
    """Measure the seconds of a grid search."""
    steps = [step for step in (extractor, RidgeClassifier()) if step is not None]
    grid = {"ridgeclassifier__alpha": ALPHAS}
    start = time.perf_counter()
    GridSearchCV(make_pipeline(*steps), grid, cv=3, refit=False).fit(X, y)
    return time.perf_counter() - start


def measure(count: int) -> dict:
    """Embed, read and search in this process."""
    X, y = images(count)
    with tempfile.TemporaryDirectory() as folder:
        extractor = PretrainedFeatureExtractor(cache=folder, image_size=(32, 32))
        with PeakMemory() as embedding_memory:
            start = time.perf_counter()
            embeddings = extractor.fit_transform(X)
            embedded = time.perf_counter()
        with PeakMemory() as reading_memory:
            again = extractor.transform(X)
        read = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
        peak = max(
            embedding_memory.bytes - embeddings.nbytes,
            reading_memory.bytes - embeddings.nbytes - again.nbytes,
        )
        np.testing.assert_array_equal(again, embeddings)
        overhead = search(extractor, X, y) - search(None, embeddings, y)
    return {
        "embedding_ms": round(1000 * (embedded - start) / count, 4),
        "reading_ms": round(1000 * (read - embedded) / count, 4),
        "search_overhead_s": round(overhead, 2),
        "peak_mb": round(peak / 2**20),
        "bytes_per_image": round(size / count),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", default=SIZES, help="numbers of images; default: %(default)s")
    parser.add_argument("--measure", type=int, help="measure this size in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    sizes: dict[str, dict] = {}
    print(f"{'images':>9}{'embed ms':>10}{'read ms':>9}{'search + s':>12}{'MB':>7}{'bytes':>8}")
    for count in options.sizes.split(","):
        figures = in_fresh_process("growth.py", "--measure", count, threads=options.threads)
        sizes[count] = figures
        print(
            f"{int(count):9,}{figures['embedding_ms']:10.3f}{figures['reading_ms']:9.4f}"
            f"{figures['search_overhead_s']:12.2f}{figures['peak_mb']:7}"
            f"{figures['bytes_per_image']:8}"
        )
    failures = []
    if len(sizes) > 1:
        *_, before, last = sizes.values()
        for key in ("embedding_ms", "reading_ms"):
            if last[key] > MAX_RATIO * before[key]:
                failures.append(f"{key} grows from {before[key]} to {last[key]}")
        if last["peak_mb"] > before["peak_mb"] + MAX_EXTRA_MB:
            failures.append(f"memory grows from {before['peak_mb']} to {last['peak_mb']} MB")
    finish({"threads": options.threads, "sizes": sizes}, failures, options.json)


if __name__ == "__main__":
    main()
