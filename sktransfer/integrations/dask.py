"""Embed and predict columns of images with Dask."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from sktransfer.integrations.rows import RemoteModel, import_arrow, remote_model
from sktransfer.utils.errors import import_optional


def embed(
    model: Any,
    images: Any,
    column: str | None = None,
    *,
    keys: Sequence[str] = (),
    cache: Any = None,
    threads: int | None = None,
) -> Any:
    """Embed a column of images with Dask, partition by partition.

    Parameters
    ----------
    model : estimator or path
        A fitted `PretrainedFeatureExtractor` or `FineTunedImageClassifier`, a `Pipeline` that
        begins with one (its steps before the classifier are used), or a file of `save` that all
        workers can read. It is loaded once in each worker process, which chooses the device.
    images : dask DataFrame or Series of N rows
        Paths, which all workers can read, or encoded images (bytes).
    column : str or None, default=None
        Name of the column of images; None if `images` is a Series.
    keys : list of str, default=()
        Columns that are returned, too. The index always is.
    cache : path or None, default=None
        Directory on a local disk where embeddings are cached, shared by the workers of a machine;
        None disables caching.
    threads : int or None, default=None
        Threads of each worker process. None is as many as the Dask worker has; without a cluster
        (`dask.distributed`), it is `n_jobs` of the model.

    Returns
    -------
    dask DataFrame
        With the index and the divisions of `images`, and columns of pyarrow's types. `embedding`
        is a list of float32; `error` is null, or the reason why an image cannot be read. The
        embedding is then null.

    Raises
    ------
    ImportError
        If Dask is not installed.
    NotFittedError, TypeError, ValueError
        If the model is not fitted or computes no embeddings, or if parameters are invalid.

    Notes
    -----
    pandas and Dask read Parquet files of the results with `dtype_backend="pyarrow"`; their own
    types have no lists.

    Examples
    --------
    >>> from sktransfer.integrations.dask import embed  # doctest: +SKIP
    >>> frame = dask.dataframe.read_parquet("images.parquet")  # doctest: +SKIP
    >>> embed(extractor, frame, "path").to_parquet("embeddings")  # doctest: +SKIP
    """
    remote = remote_model(model, "embed", cache=cache, threads=threads)
    return _map_partitions(remote, images, column, keys)


def predict(
    model: Any,
    images: Any,
    column: str | None = None,
    *,
    keys: Sequence[str] = (),
    probability: bool = False,
    cache: Any = None,
    threads: int | None = None,
) -> Any:
    """Predict the labels of a column of images with Dask, partition by partition.

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
    dask DataFrame
        With the index and the divisions of `images`. `prediction` has the type of the labels,
        `probability` is a list of float32 in the order of `classes_`, and `error` is null, or the
        reason why an image cannot be read. The others are then null.

    Raises
    ------
    ImportError, NotFittedError, TypeError, ValueError
        See `embed`.
    """
    remote = remote_model(model, "predict", probability=probability, cache=cache, threads=threads)
    return _map_partitions(remote, images, column, keys)


def _map_partitions(
    remote: RemoteModel, images: Any, column: str | None, keys: Sequence[str]
) -> Any:
    purpose = "sktransfer.integrations.dask"
    dask = import_optional("dask", extra="dask", purpose=purpose)
    frames = import_optional("dask.dataframe", extra="dask", purpose=purpose)
    _check(remote, frames, images, column, keys)
    # The model is one value of the graph, which each worker gets once.
    shared = dask.delayed(remote, pure=True, traverse=False)
    keys = list(keys)
    meta = _frame(remote.schema.empty_table(), images._meta, keys)
    return images.map_partitions(_run, shared, column, keys, meta=meta)


def _check(
    remote: RemoteModel, frames: Any, images: Any, column: str | None, keys: Sequence[str]
) -> None:
    if isinstance(images, frames.Series):
        if column is not None or keys:
            raise ValueError(
                f"Got column={column!r} and keys={keys!r} with a Series, which has no columns; "
                "leave them out, or pass the DataFrame"
            )
        return
    if not isinstance(images, frames.DataFrame):
        raise TypeError(
            f"Got a {type(images).__name__}, but expected a dask DataFrame or Series; convert a "
            "pandas one with dask.dataframe.from_pandas"
        )
    remote.check_columns(list(images.columns), column, keys)


def _run(part: Any, remote: RemoteModel, column: str | None, keys: list[str]) -> Any:
    """Compute the results of one partition, a pandas DataFrame or Series."""
    images = part if column is None else part[column]
    items = import_arrow().array(images, from_pandas=True).to_pylist()
    threads, worker = _this_worker()
    return _frame(remote.run(items, threads=threads, worker=worker), part, keys)


def _frame(results: Any, part: Any, keys: list[str]) -> Any:
    """Build a DataFrame of the keys of a partition and its results."""
    pandas = import_optional("pandas", extra="dask", purpose="sktransfer.integrations.dask")
    frame = part[keys] if keys else pandas.DataFrame(index=part.index)
    # With the types of Arrow, to_parquet knows what a partition has in which nothing can be read.
    columns = {
        name: pandas.array(column.combine_chunks(), dtype=pandas.ArrowDtype(column.type))
        for name, column in zip(results.column_names, results.columns, strict=True)
    }
    return frame.assign(**columns)


def _this_worker() -> tuple[int | None, int | None]:
    """Return the threads of this worker of `dask.distributed`, and its index; None if unknown."""
    distributed: Any = sys.modules.get("distributed")
    if distributed is None:
        return None, None
    try:
        worker = distributed.get_worker()
    except ValueError:  # another scheduler
        return None, None
    if "dask_cuda" in sys.modules:  # each worker sees its own GPU first
        return worker.state.nthreads, 0
    number = re.search(r"(\d+)$", str(worker.name))
    return worker.state.nthreads, int(number.group(1)) if number else 0
