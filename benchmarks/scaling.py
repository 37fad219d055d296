"""Compare predicted with measured times of jobs, and the cost model with a simulation.

Predictions for 500, 2,000 and 8,000 JPEGs of 500 x 375 come from two small runs, as a user would
make them before a large job: of 200 images and of 1,000. Each job is run with EfficientNet-Lite0

command  by `sktransfer embed`, in a fresh process, on all cores
dask     by sktransfer.integrations.dask, on two workers of one thread each, in partitions of 100,
         in one process for all jobs: the cluster starts only once

and the embeddings of both are compared. The start is the time of the first run minus that of its
images; the cost model of benchmarks/plan.py predicts the others. The same model is compared with
the mean of simulated jobs with stragglers and failures. Parquet files of embeddings are written, to
measure the speed and the size.

The run fails if a prediction of 2,000 or 8,000 images is more than 15 % off, or the model 5 %.

    python benchmarks/scaling.py [--sizes 500,2000,8000] [--sample 200,1000] [--threads 2]
        [--json PATH]
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from _clusters import Dask, check_equal, write_images
from _common import ROOT, command_line, finish, in_fresh_process
from _simulation import Simulation
from plan import HOUR, Cluster, Job, Machine, plan

from sktransfer import PretrainedFeatureExtractor

WIDTH, PARTITION, DASK_WORKERS = 1280, 100, 2
N_PARQUET_ROWS = 20_000
MAX_ERROR, MAX_MODEL_ERROR = 0.15, 0.05
# Jobs of so few images are mostly start, which varies.
MIN_CHECKED = 1000
SEEDS = range(20)

# Clusters for which the model is compared with the simulation: 1,000 partitions of 100 s.
SIMULATED = {
    "no failures, equal partitions": Cluster(Machine(1, 10, math.inf), 50),
    "uneven partitions": Cluster(Machine(1, 10, math.inf), 50, spread=0.5),
    "a failure every 20 hours": Cluster(Machine(1, 10, math.inf, 0.05, 120), 50, spread=0.3),
    "a failure every hour": Cluster(Machine(1, 10, math.inf, 1.0, 120), 50, spread=0.3),
    "scheduler too slow": Cluster(Machine(1, 10, math.inf), 200, task_seconds=1.0),
}


def run_command(paths: list[str], folder: Path, threads: int) -> tuple[float, np.ndarray]:
    """Embed the images with `sktransfer embed`; return the seconds of the process, and the rows."""
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(dir=folder) as images:
        for path in paths:
            os.link(path, Path(images) / Path(path).name)
        output = Path(images) / "embeddings.npy"
        command = [sys.executable, "-m", "sktransfer", "embed", images, "-o", str(output)]
        start = time.perf_counter()
        subprocess.run([*command, "--quiet"], check=True, env=os.environ | settings)
        return time.perf_counter() - start, np.load(output)


def measure_dask(folder: Path, counts: list[int]) -> dict[str, Any]:
    """Run the jobs on one cluster in this process, and check their embeddings."""
    logging.disable(logging.WARNING)
    paths = (folder / "paths.txt").read_text().split("\n")
    # "auto" would run partitions of fewer than 128 images on another engine.
    extractor = PretrainedFeatureExtractor(cache=None, engine="openvino", n_jobs=1).fit(paths[:1])
    start = time.perf_counter()
    engine = Dask(DASK_WORKERS)
    started = time.perf_counter() - start
    seconds = []
    for count in counts:
        start = time.perf_counter()
        embeddings = engine.embed(extractor, paths[:count], PARTITION)
        seconds.append(time.perf_counter() - start)
        check_equal(embeddings, np.load(folder / f"expected-{count}.npy"))
    engine.stop()
    seconds[0] += started
    return {"seconds": seconds}


def predict(
    sample: list[int], seconds: list[float], counts: list[int], *, cluster: bool
) -> tuple[float, float, list[float]]:
    """Predict the seconds of jobs from those of two small ones.

    Returns the seconds of the start, the images per second, and the predictions.
    """
    few, many = sample
    if cluster:  # the first job has started the cluster, and the second one has not
        speed, workers, partition = many / seconds[1], DASK_WORKERS, PARTITION
    else:
        if seconds[1] <= seconds[0]:
            sys.exit(f"{many} images took no longer than {few}: the machine is not idle")
        speed, workers, partition = (many - few) / (seconds[1] - seconds[0]), 1, 1
    start = seconds[0] - few / speed
    machine = Machine(workers, speed / workers, math.inf, start=0.0 if cluster else start)
    one = Cluster(machine, 1)
    jobs = [Job(count, 1.0, WIDTH, partition=partition) for count in counts]
    return start, speed, [plan(job, one).seconds for job in jobs]


def compare_runs(options: Any) -> dict[str, Any]:
    """Run all jobs, and predict them from the first two."""
    sample = [int(count) for count in options.sample.split(",")]
    sizes = [int(count) for count in options.sizes.split(",")]
    counts, measured = [*sample, *sizes], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_images(folder, max(counts), options.threads)
        image_bytes = statistics.mean(os.path.getsize(path) for path in paths)
        (folder / "paths.txt").write_text("\n".join(paths))
        measured["command"] = []
        run_command(paths[: sample[0]], folder, options.threads)  # compiles the network's graph
        for count in counts:
            seconds, embeddings = run_command(paths[:count], folder, options.threads)
            np.save(folder / f"expected-{count}.npy", embeddings)
            measured["command"].append(seconds)
        arguments = ["--measure", str(folder), "--sizes", options.sizes, "--sample", options.sample]
        measured["dask"] = in_fresh_process("scaling.py", *arguments, threads=1)["seconds"]
    runs: dict[str, Any] = {}
    for name, seconds in measured.items():
        start, speed, predicted = predict(sample, seconds, sizes, cluster=name == "dask")
        runs[name] = {
            "sample_seconds": dict(zip(map(str, sample), seconds, strict=False)),
            "start_seconds": start,
            "images_per_second": speed,
            "sizes": {
                str(size): {"predicted": p, "measured": m, "error": p / m - 1}
                for size, p, m in zip(sizes, predicted, seconds[len(sample) :], strict=True)
            },
        }
    return {"image_bytes": image_bytes, "runs": runs}


def compare_simulations() -> dict[str, Any]:
    """Compare the model with the mean of simulated jobs."""
    job = Job(1_000_000, 1.0, WIDTH, partition=1000)
    compared = {}
    for name, cluster in SIMULATED.items():
        machine = cluster.machine
        settings = {
            "spread": cluster.spread,
            "failure_rate": machine.failures_per_hour / HOUR,
            "restart": machine.start,
            "start": machine.start,
            "task_seconds": cluster.task_seconds,
        }
        seconds = job.partition / machine.images_per_second
        runs = [
            Simulation(job.partitions, cluster.workers, seconds, seed=seed, **settings).run()
            for seed in SEEDS
        ]
        predicted, simulated = plan(job, cluster), statistics.mean(run.seconds for run in runs)
        compared[name] = {
            "predicted": predicted.seconds,
            "simulated": simulated,
            "error": predicted.seconds / simulated - 1,
            "lost": statistics.mean(run.attempts - job.partitions for run in runs),
        }
    return compared


def measure_parquet(rows: int) -> dict[str, float]:
    """Write embeddings to a Parquet file, as lists, and read them again."""
    values = np.random.default_rng(0).standard_normal((rows, WIDTH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        start = time.perf_counter()
        flat = pyarrow.array(values.reshape(-1))
        lists = pyarrow.FixedSizeListArray.from_arrays(flat, WIDTH).cast(
            pyarrow.list_(pyarrow.float32())
        )
        pyarrow.parquet.write_table(pyarrow.table({"embedding": lists}), path)
        written = time.perf_counter() - start
        start = time.perf_counter()
        column = pyarrow.parquet.read_table(path)["embedding"].combine_chunks()
        read = time.perf_counter() - start
        again = column.flatten().to_numpy().reshape(rows, WIDTH)
        assert (again == values).all(), "the file has other values"
        size = path.stat().st_size
    return {
        "write_rows_per_second": rows / written,
        "read_rows_per_second": rows / read,
        "bytes_per_row": size / rows,
    }


def failures_of(result: dict[str, Any]) -> list[str]:
    """List the predictions that are too far off."""
    failures = [
        f"{name}, {size} images: predicted {v['predicted']:.1f} s, measured {v['measured']:.1f} s"
        for name, run in result["runs"].items()
        for size, v in run["sizes"].items()
        if int(size) >= MIN_CHECKED and abs(v["error"]) > MAX_ERROR
    ]
    failures += [
        f"{name}: predicted {v['predicted']:.0f} s, simulated {v['simulated']:.0f} s"
        for name, v in result["simulations"].items()
        if abs(v["error"]) > MAX_MODEL_ERROR
    ]
    return failures


def print_result(result: dict[str, Any]) -> None:
    for name, run in result["runs"].items():
        print(f"{name}: {run['images_per_second']:.1f} images/s, start {run['start_seconds']:.1f}")
        for size, v in run["sizes"].items():
            print(
                f"{int(size):8,} images: predicted {v['predicted']:7.1f} s, measured "
                f"{v['measured']:7.1f} s ({100 * v['error']:+.1f} %)"
            )
    for name, v in result["simulations"].items():
        print(
            f"{name}: predicted {v['predicted']:.0f} s, simulated {v['simulated']:.0f} s "
            f"({100 * v['error']:+.1f} %)"
        )
    print(", ".join(f"{key} {value:,.0f}" for key, value in result["parquet"].items()))


def rounded(value: Any) -> Any:
    """Round the figures of a result to four digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", default="500,2000,8000", help="default: %(default)s")
    parser.add_argument("--sample", default="200,1000", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=N_PARQUET_ROWS, help="default: %(default)s")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="run Dask in this process")
    options = parser.parse_args()
    if options.measure:
        counts = [int(count) for count in f"{options.sample},{options.sizes}".split(",")]
        print(json.dumps(measure_dask(options.measure, counts)))
        return
    result = {"partition": PARTITION, "threads": options.threads, **compare_runs(options)}
    result |= {"simulations": compare_simulations(), "parquet": measure_parquet(options.rows)}
    print_result(result)
    finish(rounded(result), failures_of(result), options.json)


if __name__ == "__main__":
    main()
