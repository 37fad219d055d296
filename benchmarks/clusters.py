"""Measure what Dask, Ray and Spark add to embedding images on one machine.

The task is to embed JPEGs of 500 x 375 in partitions of several sizes, with EfficientNet-Lite0 at
112 x 112, a quarter of the pixels of its default, so that the network does not hide the overhead.
Each variant runs in a fresh process, and all embeddings are compared with those of the local run
before a speed is reported. Figures are medians over the rounds; ratios are computed within each
round first.

local   extractor.transform(paths), with one thread and with two, for all images at once and for
        one partition after the other
dask, ray, spark
        sktransfer.integrations, with one and with two worker processes of one thread each; Spark
        needs Java

For each engine and number of workers:

- seconds to start the cluster, and from the first job until its first partition is done, which
  includes loading the model;
- milliseconds for an empty task, of many that are submitted at once;
- for each partition size, images per second, from the end of the first partition of each worker to
  the end of its last one. Starting workers, collecting results and idle workers at the end do not
  count; they are in the seconds of the whole job;
- milliseconds for each partition: the intercept of a line through the seconds per partition. It
  includes what the extractor itself needs for a call, which is the same figure of the local run;
- bytes per image on the loopback interface. Shared memory (Ray) and pipes (Spark) do not count.

Two cores show what an engine costs on the machine of a worker, and how much of two workers' speed
is left when scheduler and driver share their cores. They cannot show the network between machines,
nor how many workers a scheduler can serve: for that, see the time of an empty task. The run fails
if an engine is missing, or if the machine was so busy that a partition seems to take no time.

    python benchmarks/clusters.py [--images 1600] [--partitions 25,100,400] [--tasks 1000]
        [--engines dask,ray,spark] [--rounds 2] [--json PATH]
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
from _clusters import ENGINES, LogsPartitions, check_equal, write_images
from _common import ChildError, command_line, finish, in_fresh_process
from sklearn.pipeline import Pipeline, make_pipeline

from sktransfer import PretrainedFeatureExtractor

SIDE = 112
WORKERS = (1, 2)


def make_extractor(paths: list[str], threads: int) -> PretrainedFeatureExtractor:
    # "auto" would run partitions of fewer than 128 images on another engine.
    extractor = PretrainedFeatureExtractor(
        cache=None, image_size=(SIDE, SIDE), engine="openvino", n_jobs=threads
    )
    return extractor.fit(paths[:1])


def measure_local(threads: int, folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Measure the extractor in this process; one thread also writes the expected embeddings."""
    paths = (folder / "paths.txt").read_text().split("\n")
    start = time.perf_counter()
    extractor = make_extractor(paths, threads)
    extractor.transform(paths[: min(sizes)])
    first = time.perf_counter() - start
    start = time.perf_counter()
    embeddings = extractor.transform(paths)
    speed = len(paths) / (time.perf_counter() - start)
    if not (folder / "expected.npy").exists():
        np.save(folder / "expected.npy", embeddings)
    check_equal(embeddings, np.load(folder / "expected.npy"))
    figures: dict[str, Any] = {}
    for size in sizes:
        start = time.perf_counter()
        parts = [extractor.transform(paths[at : at + size]) for at in range(0, len(paths), size)]
        seconds = time.perf_counter() - start
        check_equal(np.concatenate(parts), embeddings)
        figures[str(size)] = {"seconds": seconds, "images_per_second": len(paths) / seconds}
    return {"first_seconds": first, "images_per_second": speed, "partitions": figures}


def measure_engine(
    name: str, workers: int, folder: Path, sizes: list[int], tasks: int
) -> dict[str, Any]:
    """Measure an engine in this process."""
    logging.disable(logging.WARNING)
    paths = (folder / "paths.txt").read_text().split("\n")
    expected, log = np.load(folder / "expected.npy"), folder / "partitions.log"
    model = make_pipeline(make_extractor(paths, 1), LogsPartitions(str(log)))
    start = time.perf_counter()
    engine = ENGINES[name](workers)
    figures: dict[str, Any] = {"start_seconds": time.perf_counter() - start}
    engine.run_empty_tasks(10 * workers)  # the first tasks start processes
    start = time.perf_counter()
    engine.run_empty_tasks(tasks)
    figures["task_ms"] = 1000 * (time.perf_counter() - start) / tasks
    figures["model_bytes"] = len(cloudpickle.dumps(model))
    # The first job also loads the model.
    figures["partitions"] = {
        str(size): measure_partitions(engine, model, paths, size, log, expected) for size in sizes
    }
    figures["first_seconds"] = figures["partitions"][str(sizes[0])]["first_seconds"]
    engine.stop()
    return figures


def measure_partitions(
    engine: Any, model: Pipeline, paths: list[str], size: int, log: Path, expected: np.ndarray
) -> dict[str, float]:
    """Measure a job."""
    log.unlink(missing_ok=True)
    moved, submitted, start = loopback_bytes(), time.time(), time.perf_counter()
    embeddings = engine.embed(model, paths, size)
    seconds = time.perf_counter() - start
    moved = loopback_bytes() - moved
    check_equal(embeddings, expected)
    return {
        "seconds": seconds,
        "first_seconds": min(map(min, read_log(log)))[0] - submitted,
        "images_per_second": sum(map(steady_speed, read_log(log))),
        "bytes_per_image": moved / len(paths),
    }


def read_log(log: Path) -> list[list[tuple[float, int]]]:
    """Return the end and the number of images of each partition, for each worker."""
    workers: dict[str, list[tuple[float, int]]] = {}
    for line in log.read_text().splitlines():
        process, end, count = line.split()
        workers.setdefault(process, []).append((float(end), int(count)))
    return list(workers.values())


def steady_speed(partitions: list[tuple[float, int]]) -> float:
    """Return the images per second of a worker after its first partition; 0 if it had only one."""
    (begin, _), *rest = sorted(partitions)
    return sum(count for _, count in rest) / (max(end for end, _ in rest) - begin) if rest else 0.0


def loopback_bytes() -> int:
    """Return the bytes that were sent over the loopback interface (Linux), or else 0."""
    table = Path("/proc/net/dev")
    lines = table.read_text().splitlines() if table.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == "lo:")


def partition_ms(figures: dict[str, Any], workers: int) -> float:
    """Return the milliseconds that a partition of a worker takes beyond those of its images."""
    sizes = np.array([int(size) for size in figures])
    speeds = np.array([figures[str(size)]["images_per_second"] for size in sizes])
    # Seconds per image = a + overhead / size, since errors of timing are relative.
    slope, _ = np.polyfit(1 / sizes, workers / speeds, 1)
    return float(1000 * slope)


def measure_rounds(options: Any, sizes: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Measure all variants in turn, and collect the figures of all rounds."""
    names = [("local", count) for count in WORKERS]
    names += [(engine, count) for engine in options.engines.split(",") for count in WORKERS]
    variants: dict[str, list[dict[str, Any]]] = {f"{name} {n}": [] for name, n in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_images(folder, options.images, options.threads)
        (folder / "paths.txt").write_text("\n".join(paths))
        for _ in range(options.rounds):
            for name, count in names:
                figures = run_variant(name, count, folder, options)
                if "missing" not in figures:
                    overhead = partition_ms(figures["partitions"], count if name != "local" else 1)
                    figures["partition_ms"] = overhead
                variants[f"{name} {count}"].append(figures)
                print(f"{name} {count}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    return variants


def run_variant(name: str, count: int, folder: Path, options: Any) -> dict[str, Any]:
    """Measure a variant in a fresh process."""
    arguments = ["--partitions", options.partitions, "--tasks", str(options.tasks)]
    arguments += ["--measure", name, str(count), str(folder)]
    threads = count if name == "local" else 1
    try:
        return in_fresh_process("clusters.py", *arguments, threads=threads)
    except ChildError as error:
        print(f"{name} is missing: {error}", file=sys.stderr)
        return {"missing": "could not be measured"}


def summarize(variants: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Compute the medians of all rounds, and ratios to the local run with as many threads."""
    summary: dict[str, dict[str, Any]] = {}
    for name, rounds in variants.items():
        if missing := [figures["missing"] for figures in rounds if "missing" in figures]:
            summary[name] = {"missing": missing[0]}
            continue
        references = variants[f"local {name.split()[1]}"]
        for figures, local in zip(rounds, references, strict=True):
            for part in figures["partitions"].values():
                part["share_of_local"] = part["images_per_second"] / local["images_per_second"]
        summary[name] = medians(rounds)
    return summary


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute the medians of figures, also of those in dictionaries."""
    return {
        key: medians([figures[key] for figures in rounds])
        if isinstance(value, dict)
        else round_figure(statistics.median(figures[key] for figures in rounds))
        for key, value in rounds[0].items()
    }


def round_figure(value: float) -> float:
    return float(f"{value:.4g}")


def print_table(summary: dict[str, dict[str, Any]], sizes: Iterable[int]) -> None:
    head = "".join(f"{f'{size} images':>20}" for size in sizes)
    print(f"{'':10}{'start s':>9}{'first s':>9}{'task ms':>9}{'partition ms':>14}{head}")
    for name, figures in summary.items():
        if "missing" in figures:
            print(f"{name:10}  missing")
            continue
        cells = [figures.get(key, "-") for key in ("start_seconds", "first_seconds", "task_ms")]
        parts = figures["partitions"].values()
        speeds = "".join(
            f"{p['images_per_second']:>12.1f} ({p['share_of_local']:.2f})".rjust(20) for p in parts
        )
        print(
            f"{name:10}"
            + "".join(f"{cell:>9}" for cell in cells)
            + f"{figures['partition_ms']:>14}{speeds}"
        )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=1600, help="default: %(default)s")
    parser.add_argument("--partitions", default="25,100,400", help="default: %(default)s")
    parser.add_argument("--tasks", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--measure",
        nargs=3,
        metavar=("VARIANT", "COUNT", "FOLDER"),
        help="measure a variant in this process; FOLDER holds paths.txt and expected.npy",
    )
    options = parser.parse_args()
    sizes = [int(size) for size in options.partitions.split(",")]
    if options.measure:
        name, count, folder = options.measure[0], int(options.measure[1]), Path(options.measure[2])
        if name == "local":
            print(json.dumps(measure_local(count, folder, sizes)))
        else:
            print(json.dumps(measure_engine(name, count, folder, sizes, options.tasks)))
        return
    if options.images < 2 * max(WORKERS) * max(sizes):
        parser.error("each worker needs two partitions: raise --images or lower --partitions")
    summary = summarize(measure_rounds(options, sizes))
    print_table(summary, sizes)
    failures = [f"{name} {v['missing']}" for name, v in summary.items() if "missing" in v]
    failures += [
        f"{name} took no time for a partition: the machine was not idle"
        for name, v in summary.items()
        if v.get("partition_ms", 1) <= 0
    ]
    result = {
        "images": options.images,
        "rounds": options.rounds,
        "tasks": options.tasks,
        "variants": summary,
    }
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
