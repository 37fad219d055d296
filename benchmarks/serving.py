"""Measure a loaded model that serves requests of one image, beside a plain forward pass.

Two models: "classifier" is a tuned FineTunedImageClassifier at 288 x 288, "pipeline" is a linear
classifier on frozen embeddings at 224 x 224, both with EfficientNet-Lite0. A request is
`model.predict_proba([image])`, with an array of 400 x 300 pixels. The plain forward is the same
resize and crop, and the same network in torch: eager, in inference mode, channels last, without the
linear classifier of the pipeline.

latency     milliseconds of a request and of a plain forward, which take turns: median and 95th
            percentile
first       seconds of loading and of the first request, without and with `warm_up=True`
throughput  requests per second from 16 threads, and plain forwards per second from 16 threads
memory      MB of the process after 1,000 requests, and after all of them (Linux)

Each of these runs in a fresh process, except for latency and throughput, which share one.
Probabilities are compared with those of the plain forward before anything is printed.

The run fails if the median latency is above 1.1 times that of the plain forward, or if the memory
grows by more than 30 MB.

    python benchmarks/serving.py [--requests 10000] [--threads 2] [--json PATH]
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import command_line, finish, in_fresh_process, make_probe
from _sets import photographs
from sklearn.pipeline import Pipeline

from sktransfer import FineTunedImageClassifier, load, save, to_module

N_TRAINED, N_TIMED, N_THREADS, N_CONCURRENT, N_WARM = 48, 200, 16, 480, 1000
MAX_RATIO, MAX_GROWTH_MB, MAX_DIFFERENCE = 1.1, 30, 1e-3

Serve = Callable[[np.ndarray], np.ndarray]


def models() -> dict[str, Any]:
    """Build the models, unfitted."""
    tuned = FineTunedImageClassifier(unfreeze=(0, 2), max_epochs=1, random_state=0)
    return {"classifier": tuned, "pipeline": make_probe()}


def images(count: int) -> Iterator[np.ndarray]:
    """Build different images, uint8 (300, 400, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 300, 400, 3), dtype=np.uint8)
    for number in range(count):
        yield noise[number % 64] ^ np.uint8(number // 64 % 256)


def plain_forward(model: Any) -> Serve:
    """Build a function that runs the network of a model in plain torch."""
    module = to_module(model[0] if isinstance(model, Pipeline) else model)
    network = module.network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(image: np.ndarray) -> np.ndarray:
        pixels = module.preprocessing.prepare(image)[None]
        return network(pixels.contiguous(memory_format=torch.channels_last)).numpy()

    return forward


def check_equal(model: Any, forward: Serve) -> None:
    """Check that both compute the same probabilities."""
    tail = model[1:].predict_proba if isinstance(model, Pipeline) else np.asarray
    for image in images(4):
        difference = np.abs(model.predict_proba([image]) - tail(forward(image))).max()
        assert difference < MAX_DIFFERENCE, f"the probabilities differ by {difference:.1g}"


def seconds(run: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def latency(serve: Serve, forward: Serve) -> dict[str, float]:
    """Measure the latency of requests and of plain forwards, which take turns."""
    timed = [[seconds(run, image) for run in (serve, forward)] for image in images(N_TIMED)]
    figures = {}
    for name, column in zip(("request", "forward"), zip(*timed, strict=True), strict=True):
        percentiles = np.percentile(column, [50, 95]) * 1000
        figures |= {f"{name}_p50_ms": percentiles[0], f"{name}_p95_ms": percentiles[1]}
    return figures | {"times_forward": figures["request_p50_ms"] / figures["forward_p50_ms"]}


def throughput(serve: Serve) -> float:
    """Measure the images per second from 16 threads."""
    with ThreadPoolExecutor(N_THREADS) as pool:
        elapsed = seconds(lambda: list(pool.map(serve, images(N_CONCURRENT))))
    return N_CONCURRENT / elapsed


def first_request(path: str, warm_up: bool) -> dict[str, float]:
    (image,) = images(1)
    start = time.perf_counter()
    model = load(path, warm_up=warm_up)
    loaded = time.perf_counter()
    model.predict_proba([image])
    return {"load_seconds": loaded - start, "first_seconds": time.perf_counter() - loaded}


def memory(path: str, requests: int) -> dict[str, float]:
    """Measure the memory of the process while it serves different images."""
    model, figures = load(path), {}
    for number, image in enumerate(images(requests), start=1):
        model.predict_proba([image])
        if number in (N_WARM, requests):
            figures[number] = rss_mb()
    return {"warm_mb": figures[N_WARM], "end_mb": figures[requests]}


def rss_mb() -> float:
    """Return the memory of this process that is not swapped out, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(task: str, path: str, requests: int) -> dict[str, float]:
    """Measure one of the tasks in this process."""
    if task in ("first", "first_warm"):
        return first_request(path, task == "first_warm")
    if task == "memory":
        return memory(path, requests)
    model = load(path, warm_up=True)
    forward = plain_forward(model)
    check_equal(model, forward)

    def serve(image: np.ndarray) -> np.ndarray:
        return model.predict_proba([image])

    rates = {"requests_per_second": throughput(serve), "forwards_per_second": throughput(forward)}
    return latency(serve, forward) | rates


def serve_model(name: str, path: Path, options: Any) -> dict[str, Any]:
    """Measure all tasks of one model; figures of the first request are medians of three."""

    def fresh(task: str) -> dict[str, float]:
        arguments = ("--measure", task, str(path), "--requests", str(options.requests))
        return in_fresh_process("serving.py", *arguments, threads=options.threads)

    figures: dict[str, Any] = {}
    for task in ("latency", "first", "first_warm", "memory"):
        runs = [fresh(task) for _ in range(3 if task.startswith("first") else 1)]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        figures[task] = {key: round(value, 3) for key, value in medians.items()}
        print(name, task, figures[task], flush=True)
    return figures


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--requests", type=int, default=10_000, help="for memory; default: %(default)s"
    )
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("TASK", "MODEL"),
        help="measure one task with the model of a file in this process",
    )
    options = parser.parse_args()
    if options.requests <= N_WARM:
        parser.error(f"Got --requests {options.requests}, but expected more than {N_WARM}")
    if options.measure:
        print(json.dumps(measure(*options.measure, options.requests)))
        return
    paths, y = photographs()
    rows = np.random.RandomState(0).permutation(len(paths))[:N_TRAINED]
    result, failures = {}, []
    for name, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.skt")
            save(model.fit([paths[row] for row in rows], y[rows]), path)
            figures = result[name] = serve_model(name, path, options)
        if figures["latency"]["times_forward"] > MAX_RATIO:
            failures.append(f"{name}: a request takes more than {MAX_RATIO} forward passes")
        if figures["memory"]["end_mb"] - figures["memory"]["warm_mb"] > MAX_GROWTH_MB:
            failures.append(f"{name}: the memory grows by more than {MAX_GROWTH_MB} MB")
    finish(
        {"threads": options.threads, "requests": options.requests, **result}, failures, options.json
    )


if __name__ == "__main__":
    main()
