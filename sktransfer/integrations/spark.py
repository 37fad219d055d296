"""Embed and predict columns of images with Spark."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from sktransfer.integrations.rows import RemoteModel, import_arrow, remote_model
from sktransfer.utils.errors import import_optional

_PURPOSE = "sktransfer.integrations.spark"


def embed(
    model: Any,
    images: Any,
    column: str,
    *,
    keys: Sequence[str] = (),
    cache: Any = None,
    threads: int | None = None,
) -> Any:
    """Embed a column of images with Spark, partition by partition.

    Parameters
    ----------
    model : estimator or path
        A fitted `PretrainedFeatureExtractor` or `FineTunedImageClassifier`, a `Pipeline` that
        begins with one (its steps before the classifier are used), or a file of `save` that all
        workers can read. Each Python worker process loads it once, and chooses the device.
    images : Spark DataFrame of N rows
    column : str
        Name of its column of paths, which all workers can read, or of encoded images (binary).
    keys : list of str, default=()
        Columns that are returned, too. They identify the rows.
    cache : path or None, default=None
        Directory where embeddings are cached, shared by all workers; None disables caching.
    threads : int or None, default=None
        Threads of each Python worker process; None is as many as the cores that Spark reserves for
        a task, `spark.task.cpus`.

    Returns
    -------
    Spark DataFrame
        `keys`, then `embedding`, an array of float, and `error`: null, or the reason why an image
        cannot be read. The embedding is then null. It has the partitions of `images`.

    Raises
    ------
    ImportError
        If pyspark is not installed.
    NotFittedError, TypeError, ValueError
        If the model is not fitted or computes no embeddings, or if parameters are invalid.

    Notes
    -----
    The DataFrame is lazy: each action, such as `write` or `count`, computes all images. Write the
    results, and go on with the written ones.

    Examples
    --------
    >>> from sktransfer.integrations.spark import embed  # doctest: +SKIP
    >>> images = spark.read.parquet("images.parquet")  # doctest: +SKIP
    >>> embed(extractor, images, "path", keys=["path"]).write.parquet("out")  # doctest: +SKIP
    """
    remote = remote_model(model, "embed", cache=cache, threads=threads, extra="spark")
    return _map_in_arrow(remote, images, column, keys)


def predict(
    model: Any,
    images: Any,
    column: str,
    *,
    keys: Sequence[str] = (),
    probability: bool = False,
    cache: Any = None,
    threads: int | None = None,
) -> Any:
    """Predict the labels of a column of images with Spark, partition by partition.

    Parameters
    ----------
    model : estimator or path
        A fitted `FineTunedImageClassifier` or `SelfTrainedImageClassifier`, a `Pipeline` of a
        `PretrainedFeatureExtractor` and a classifier or regressor, or a file of `save`.
    images, column, keys, cache, threads
        See `embed`.
    probability : bool, default=False
        Whether to return the probabilities of the classes, too.

    Returns
    -------
    Spark DataFrame
        `keys`, then `prediction`, in the type of the labels, but bigint for unsigned integers;
        `probability`, an array of float in the order of `classes_`; and `error`: null, or the
        reason why an image cannot be read. The others are then null.

    Raises
    ------
    ImportError, NotFittedError, TypeError, ValueError
        See `embed`.
    """
    remote = remote_model(
        model, "predict", probability=probability, cache=cache, threads=threads, extra="spark"
    )
    return _map_in_arrow(remote, images, column, keys)


def _map_in_arrow(remote: RemoteModel, images: Any, column: str, keys: Sequence[str]) -> Any:
    sql = import_optional("pyspark.sql", extra="spark", purpose=_PURPOSE)
    if not isinstance(images, sql.DataFrame):
        raise TypeError(
            f"Got a {type(images).__name__}, but expected a Spark DataFrame; convert a pandas one "
            "with spark.createDataFrame"
        )
    remote.check_columns(images.columns, column, keys)
    types = sql.types
    kind = images.schema[column].dataType
    if not isinstance(kind, types.StringType | types.BinaryType):
        raise TypeError(
            f"Got column={column!r} of type {kind.simpleString()}, but expected string (paths) or "
            "binary (encoded images); spark.read.format('binaryFile') reads images as binary, as "
            "its column 'content'"
        )
    results = _signed(remote.schema)
    computed = images.sparkSession.createDataFrame(results.empty_table()).schema
    schema = types.StructType([*(images.schema[key] for key in keys), *computed])
    names = list(dict.fromkeys([*keys, column]))
    position, n_keys = names.index(column), len(keys)

    def compute(batches: Iterator[Any]) -> Iterator[Any]:
        return _run(batches, remote, results, position, n_keys)

    # mapInArrow fails with names that have dots.
    selected = images.select(
        [images[_quoted(name)].alias(str(number)) for number, name in enumerate(names)]
    )
    # Spark sends the function, with the model, as a broadcast value if it is large.
    return selected.mapInArrow(compute, schema)


def _signed(schema: Any) -> Any:
    """Return a schema without unsigned integers, which Spark lacks."""
    arrow = import_arrow()
    unsigned = arrow.types.is_unsigned_integer
    return arrow.schema(
        [(field.name, arrow.int64() if unsigned(field.type) else field.type) for field in schema]
    )


def _quoted(name: str) -> str:
    escaped = name.replace("`", "``")
    return f"`{escaped}`"


def _run(
    batches: Iterator[Any], remote: RemoteModel, schema: Any, position: int, n_keys: int
) -> Iterator[Any]:
    """Compute the results of the batches of one task.

    Parameters
    ----------
    batches : iterator over pyarrow.RecordBatch
        The first `n_keys` columns are the keys, and the one at `position` has the images.
    schema : pyarrow.Schema
        The results in Spark's types.
    """
    arrow = import_arrow()
    threads, worker = _this_task().cpus(), _gpu_of_process()
    for batch in batches:
        images = batch.column(position).to_pylist()
        results = remote.run(images, threads=threads, worker=worker).cast(schema)
        columns = [*batch.columns[:n_keys], *(part.combine_chunks() for part in results.columns)]
        yield arrow.RecordBatch.from_arrays(
            columns, names=[*batch.schema.names[:n_keys], *schema.names]
        )


@functools.cache
def _gpu_of_process() -> int:
    """Return the index of the GPU that Spark gives the first task of this process.

    The process runs many tasks, with any GPU of its executor. If it changed the GPU with them, it
    would load the model anew. Without GPUs as resources, processes choose by their partitions.
    """
    task = _this_task()
    gpu = task.resources().get("gpu")
    if gpu is not None and gpu.addresses[0].isdecimal():
        return int(gpu.addresses[0])
    return int(task.partitionId())


def _this_task() -> Any:
    pyspark = import_optional("pyspark", extra="spark", purpose=_PURPOSE)
    return pyspark.TaskContext.get()
