"""Engines that embed a column of images on this machine: Dask, Ray and Spark, behind one interface.

An engine starts a cluster of worker processes with one thread each, runs empty tasks, and embeds
images in partitions of some size. N images, D features.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import numpy as np
import pyarrow
from _gpu import write_cut
from sklearn.base import BaseEstimator, TransformerMixin

# Different images that are written; the others are links to them.
N_FILES = 400
PATH = "path"


class Engine(Protocol):
    """A cluster with some workers. To create it is to start it."""

    def __init__(self, workers: int) -> None: ...

    def run_empty_tasks(self, count: int) -> None:
        """Run tasks that do nothing, and wait for them."""

    def embed(self, model: Any, paths: list[str], partition: int) -> np.ndarray:
        """Embed images in partitions of some size; return (N, D) in the order of the paths."""

    def stop(self) -> None: ...


class Dask:
    """A `LocalCluster` of processes."""

    def __init__(self, workers: int) -> None:
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        )
        self.client = Client(self.cluster)
        self.client.wait_for_workers(workers)

    def run_empty_tasks(self, count: int) -> None:
        self.client.gather(self.client.map(lambda number: None, range(count), pure=False))

    def embed(self, model: Any, paths: list[str], partition: int) -> np.ndarray:
        import dask.dataframe
        import pandas

        from sktransfer.integrations.dask import embed

        table = pandas.DataFrame({PATH: paths})
        frame = dask.dataframe.from_pandas(table, chunksize=partition)
        results = embed(model, frame, PATH).compute()
        return as_array(pyarrow.array(results["embedding"]))

    def stop(self) -> None:
        self.client.close()
        self.cluster.close()


class Ray:
    """Ray on this machine, with a logical core for each actor and one for other tasks."""

    def __init__(self, workers: int) -> None:
        import ray

        self.workers = workers
        ray.init(
            num_cpus=workers + 1,
            num_gpus=0,
            object_store_memory=500 * 2**20,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
        )

    def run_empty_tasks(self, count: int) -> None:
        import ray

        task = ray.remote(lambda number: None)
        ray.get([task.remote(number) for number in range(count)])

    def embed(self, model: Any, paths: list[str], partition: int) -> np.ndarray:
        import ray

        from sktransfer.integrations.ray import embed

        ray.data.DataContext.get_current().enable_progress_bars = False
        table = rows(paths)
        blocks = [table.slice(start, partition) for start in range(0, len(paths), partition)]
        images = ray.data.from_arrow(blocks)
        results = embed(
            model, images, PATH, keys=["row"], workers=self.workers, batch_size=partition
        )
        batches = results.iter_batches(batch_size=None, batch_format="pyarrow")
        return in_order(pyarrow.concat_tables(batches))

    def stop(self) -> None:
        import ray

        ray.shutdown()


class Spark:
    """Spark in one process of Java, with a process of Python for each worker."""

    def __init__(self, workers: int) -> None:
        from pyspark.sql import SparkSession

        os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
        builder = SparkSession.builder.master(f"local[{workers}]")
        for key, value in {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
        }.items():
            builder = builder.config(key, value)
        self.session = builder.getOrCreate()
        self.session.sparkContext.setLogLevel("ERROR")

    def run_empty_tasks(self, count: int) -> None:
        self.session.sparkContext.parallelize(range(count), count).foreach(lambda number: None)

    def embed(self, model: Any, paths: list[str], partition: int) -> np.ndarray:
        from sktransfer.integrations.spark import embed

        parts = self.session.sparkContext.parallelize(
            list(enumerate(paths)), -(-len(paths) // partition)
        )
        frame = self.session.createDataFrame(parts, f"row long, {PATH} string")
        return in_order(embed(model, frame, PATH, keys=["row"]).toArrow())

    def stop(self) -> None:
        self.session.stop()


ENGINES: dict[str, type[Engine]] = {"dask": Dask, "ray": Ray, "spark": Spark}


def rows(paths: Sequence[str]) -> pyarrow.Table:
    return pyarrow.table({"row": range(len(paths)), PATH: paths})


def in_order(results: pyarrow.Table) -> np.ndarray:
    """Return the embeddings in the order of the rows, all of which must be there once."""
    results = results.sort_by("row")
    assert results["row"].to_pylist() == list(range(len(results))), "rows are lost or doubled"
    return as_array(results["embedding"])


def as_array(embeddings: Any) -> np.ndarray:
    """Convert lists of pyarrow to an array (N, D)."""
    assert embeddings.null_count == 0, "images were not read"
    if isinstance(embeddings, pyarrow.ChunkedArray):
        embeddings = embeddings.combine_chunks()
    return embeddings.flatten().to_numpy().reshape(len(embeddings), -1)


class LogsPartitions(TransformerMixin, BaseEstimator):
    """A step that changes nothing, and writes a line for each partition that a worker finishes."""

    def __init__(self, log: str) -> None:
        self.log = log

    def fit(self, X: Any, y: Any = None) -> LogsPartitions:
        return self

    def transform(self, X: Any) -> Any:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {time.time()} {len(X)}\n")
        return X

    def __sklearn_is_fitted__(self) -> bool:
        return True


# Workers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def write_images(folder: Path, count: int, processes: int) -> list[str]:
    """Write JPEGs of 500 x 375, and return as many different paths as are asked for."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        files = pool.map(functools.partial(write_cut, folder), range(min(count, N_FILES)))
    paths = list(files)
    for number in range(len(files), count):
        path = folder / f"{number:06}.jpg"
        os.link(files[number % N_FILES], path)
        paths.append(str(path))
    return paths


def check_equal(embeddings: np.ndarray, expected: np.ndarray) -> None:
    """Exit with an error unless embeddings are equal, up to the rounding of other batch sizes."""
    if embeddings.shape != expected.shape:
        sys.exit(f"Got embeddings of shape {embeddings.shape}, expected {expected.shape}")
    difference = float(np.abs(embeddings - expected).max())
    allowed = 1e-4 * float(np.abs(expected).max())
    if not difference <= allowed:
        sys.exit(f"The embeddings differ by {difference}, expected at most {allowed}")
