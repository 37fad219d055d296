"""Measure the time to read the embeddings of many images from a store, in shuffled order.

One process writes synthetic embeddings into a store. Three fresh processes read all of them in
shuffled order and check the values; the figure is the median of the three.

    python benchmarks/store_read.py [--images 50000] [--width 1280] [--json PATH]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from _common import command_line, finish, in_fresh_process

from sktransfer.store.store import EmbeddingStore, EmbeddingTable, embed_once

BATCH_SIZE = 32


def keys(order: np.ndarray) -> list[bytes]:
    # Random like the digests of images, so neighbors in a folder are not neighbors in the index.
    names = np.random.RandomState(0).bytes(16 * len(order))
    return [names[16 * number : 16 * number + 16] for number in order]


def values(order: np.ndarray, width: int) -> np.ndarray:
    # Every value differs from its neighbors, and all are exact in float32.
    return (order[:, None] * 7 + np.arange(width) * 3).astype(np.float32)


def table(store: EmbeddingStore, width: int) -> EmbeddingTable:
    return store.table(b"benchmark", "benchmark", width)


def write(store: EmbeddingStore, images: int, width: int) -> float:
    order = np.arange(images)

    def compute(claims: Iterator[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        for rows in claims:
            for start in range(0, len(rows), BATCH_SIZE):
                batch = rows[start : start + BATCH_SIZE]
                yield batch, values(order[batch], width)

    start = time.perf_counter()
    embed_once(table(store, width), keys(order), compute, batch_size=BATCH_SIZE)
    return time.perf_counter() - start


def read(directory: str, images: int, width: int) -> float:
    order = np.random.RandomState(1).permutation(images)
    shuffled = keys(order)

    def compute(claims: Iterator[list[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        raise AssertionError(f"{len(next(claims))} images are not in the store")

    start = time.perf_counter()
    store = EmbeddingStore(directory)
    embeddings = embed_once(table(store, width), shuffled, compute, batch_size=BATCH_SIZE)
    seconds = time.perf_counter() - start
    assert (embeddings == values(order, width)).all(), "the store returned other values"
    return seconds


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=50_000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=1280, help="default: %(default)s")
    parser.add_argument(
        "--measure", metavar="DIRECTORY", help="read the store in DIRECTORY in this process"
    )
    options = parser.parse_args()
    if options.measure:
        seconds = read(options.measure, options.images, options.width)
        print(json.dumps({"seconds": seconds}))
        return
    size = ["--images", str(options.images), "--width", str(options.width)]
    with tempfile.TemporaryDirectory() as directory:
        store = EmbeddingStore(directory)
        written = write(store, options.images, options.width)
        store.close()
        stored = store.info().bytes
        store.close()
        arguments = ("store_read.py", "--measure", directory, *size)
        children = [in_fresh_process(*arguments, threads=options.threads) for _ in range(3)]
    seconds = [child["seconds"] for child in children]
    figures = {
        "images": options.images,
        "width": options.width,
        "read_seconds": statistics.median(seconds),
        "write_seconds": written,
        "bytes_per_image": stored / options.images,
    }
    print(
        f"{options.images:,} x {options.width:,} float32: read in "
        f"{figures['read_seconds']:.2f} s (median of {', '.join(f'{s:.2f}' for s in seconds)}), "
        f"written in {written:.2f} s, {figures['bytes_per_image']:,.0f} bytes per image"
    )
    finish(figures, [], options.json)


if __name__ == "__main__":
    main()
