"""Cost as work grows: from 1,000 to 100,000 images, time per image and memory stay the same.

The images are scikit-learn's digits, repeated, each with a number of its own in its corner, so
that no two are the same to the store; EfficientNet-Lite0 sees them at 32 x 32, so that what is
measured is what grows, not the network. Each size runs in a fresh process: embedding into a store
in a folder; reading all of it again; a search of three candidates in three folds, less the same
search on the embeddings in memory, which leaves what the extractor adds; and the peak of memory,
less both arrays of embeddings and the file of the store, which is mapped.

Fails where an image of the largest size takes more than 1.3 times as long to embed or to read as
one of the size before, or memory grows by more than 150 MB beyond images, keys and embeddings.

    python benchmarks/growth.py [--sizes 1000,10000,100000] [--threads 2] [--json PATH]
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import command_line, finish, in_fresh_process
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor

SIZES = "1000,10000,100000"
MOST, MORE_MB = 1.3, 150
STRENGTHS = [1.0, 10.0, 100.0]


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Repeat the digits, and write the number of each into its first four pixels."""
    digits = load_digits()
    rows = np.arange(count) % len(digits.images)
    images = (digits.images[rows] * 15.9375).astype(np.uint8)
    for place in range(4):
        images[:, 0, place] = np.arange(count) // 256**place % 256
    return images, digits.target[rows]


def search(extractor: PretrainedFeatureExtractor | None, X: np.ndarray, y: np.ndarray) -> float:
    """Give the seconds of a search."""
    steps = [step for step in (extractor, RidgeClassifier()) if step is not None]
    grid = {"ridgeclassifier__alpha": STRENGTHS}
    start = time.perf_counter()
    GridSearchCV(make_pipeline(*steps), grid, cv=3, refit=False).fit(X, y)
    return time.perf_counter() - start


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(count: int) -> dict:
    """Embed, read and search in this process."""
    X, y = images(count)
    with tempfile.TemporaryDirectory() as folder:
        extractor = PretrainedFeatureExtractor(cache=folder, image_size=(32, 32))
        start = time.perf_counter()
        embeddings = extractor.fit_transform(X)
        embedded = time.perf_counter()
        again = extractor.transform(X)
        read = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
        peak = peak_mb() - (2 * embeddings.nbytes + size) / 2**20
        np.testing.assert_array_equal(again, embeddings)
        beyond = search(extractor, X, y) - search(None, embeddings, y)
    return {
        "embedding_ms": round(1000 * (embedded - start) / count, 4),
        "reading_ms": round(1000 * (read - embedded) / count, 4),
        "search_beyond_s": round(beyond, 2),
        "peak_mb": round(peak),
        "bytes_kept": round(size / count),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", default=SIZES, help="default: %(default)s")
    parser.add_argument("--measure", type=int, help="measure this size, in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    sizes: dict[str, dict] = {}
    print(f"{'images':>9}{'embed ms':>10}{'read ms':>9}{'search + s':>12}{'MB':>7}{'bytes':>8}")
    for count in options.sizes.split(","):
        found = in_fresh_process("growth.py", "--measure", count, threads=options.threads)
        sizes[count] = found
        print(
            f"{int(count):9,}{found['embedding_ms']:10.3f}{found['reading_ms']:9.4f}"
            f"{found['search_beyond_s']:12.2f}{found['peak_mb']:7}{found['bytes_kept']:8}"
        )
    failures = []
    if len(sizes) > 1:
        *_, before, last = sizes.values()
        for key in ("embedding_ms", "reading_ms"):
            if last[key] > MOST * before[key]:
                failures.append(f"{key} grows from {before[key]} to {last[key]}")
        if last["peak_mb"] > before["peak_mb"] + MORE_MB:
            failures.append(f"memory grows from {before['peak_mb']} to {last['peak_mb']} MB")
    finish({"threads": options.threads, "sizes": sizes}, failures, options.json)


if __name__ == "__main__":
    main()
