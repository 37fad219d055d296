"""Embed and predict columns of images with Ray Data."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from sktransfer.integrations.rows import RemoteModel, import_arrow, remote_model
from sktransfer.utils.errors import check_number, import_optional


def embed(
    model: Any,
    images: Any,
    column: str,
    *,
    keys: Sequence[str],
    workers: int | None = None,
    batch_size: int = 256,
    cache: Any = None,
    threads: int = 1,
    num_gpus: float | None = None,
) -> Any:
    """Embed a column of images with a pool of Ray actors.

    Parameters
    ----------
    model : estimator or path
        A fitted `PretrainedFeatureExtractor` or `FineTunedImageClassifier`, a `Pipeline` that
        begins with one (its steps before the classifier are used), or a file of `save` that all
        workers can read. Each actor loads it once, and chooses the device.
    images : ray.data.Dataset of N rows
    column : str
        Name of its column of paths, which all workers can read, or of encoded images (bytes).
    keys : list of str
        Columns that are returned, too. They identify the rows, as Ray may change their order.
    workers : int or None, default=None
        Number of actors; None lets Ray add actors while there are resources. Other tasks, such as
        those that read files, need some cores, too.
    batch_size : int, default=256
        Images that an actor gets at once.
    cache : path or None, default=None
        Directory on a local disk where embeddings are cached, shared by the workers of a machine;
        None disables caching.
    threads : int, default=1
        Cores that each actor reserves and uses.
    num_gpus : float or None, default=None
        GPUs that each actor reserves; None is one if the cluster has GPUs.

    Returns
    -------
    ray.data.Dataset
        `keys`, then `embedding`, a list of float32, and `error`: null, or the reason why an image
        cannot be read. The embedding is then null.

    Raises
    ------
    ImportError
        If Ray is not installed.
    NotFittedError, TypeError, ValueError
        If the model is not fitted or computes no embeddings, or if parameters are invalid.

    Examples
    --------
    >>> from sktransfer.integrations.ray import embed  # doctest: +SKIP
    >>> images = ray.data.read_parquet("images.parquet")  # doctest: +SKIP
    >>> embed(extractor, images, "path", keys=["path"], workers=2)  # doctest: +SKIP
    """
    remote = remote_model(model, "embed", cache=cache, threads=threads, extra="ray")
    return _map_batches(remote, images, column, keys, workers, batch_size, threads, num_gpus)


def predict(
    model: Any,
    images: Any,
    column: str,
    *,
    keys: Sequence[str],
    probability: bool = False,
    workers: int | None = None,
    batch_size: int = 256,
    cache: Any = None,
    threads: int = 1,
    num_gpus: float | None = None,
) -> Any:
    """Predict the labels of a column of images with a pool of Ray actors.

    Parameters
    ----------
    model : estimator or path
        A fitted `FineTunedImageClassifier` or `SelfTrainedImageClassifier`, a `Pipeline` of a
        `PretrainedFeatureExtractor` and a classifier or regressor, or a file of `save`.
    images, column, keys, workers, batch_size, cache, threads, num_gpus
        See `embed`.
    probability : bool, default=False
        Whether to return the probabilities of the classes, too.

    Returns
    -------
    ray.data.Dataset
        `keys`, then `prediction`, in the type of the labels; `probability`, a list of float32 in
        the order of `classes_`; and `error`: null, or the reason why an image cannot be read. The
        others are then null.

    Raises
    ------
    ImportError, NotFittedError, TypeError, ValueError
        See `embed`.
    """
    remote = remote_model(
        model, "predict", probability=probability, cache=cache, threads=threads, extra="ray"
    )
    return _map_batches(remote, images, column, keys, workers, batch_size, threads, num_gpus)


class _Actor:
    """A worker process that loads the model once."""

    def __init__(self, remote: RemoteModel, column: str, keys: list[str]) -> None:
        self._remote, self._column, self._keys = remote, column, keys
        remote.load()

    def __call__(self, batch: Any) -> Any:
        results = self._remote.run(batch[self._column].to_pylist())
        columns = {name: batch[name] for name in self._keys}
        columns |= dict(zip(results.column_names, results.columns, strict=True))
        return import_arrow().table(columns)


def _map_batches(
    remote: RemoteModel,
    images: Any,
    column: str,
    keys: Sequence[str],
    workers: int | None,
    batch_size: int,
    threads: int,
    num_gpus: float | None,
) -> Any:
    ray = import_optional("ray", extra="ray", purpose="sktransfer.integrations.ray")
    data = import_optional("ray.data", extra="ray", purpose="sktransfer.integrations.ray")
    if not isinstance(images, data.Dataset):
        raise TypeError(
            f"Got a {type(images).__name__}, but expected a ray.data.Dataset; convert a pandas "
            "DataFrame with ray.data.from_pandas"
        )
    remote.check_columns(images.schema().names, column, keys)
    check_number("batch_size", batch_size, Integral, 1)
    if workers is not None:
        check_number("workers", workers, Integral, 1, besides="None")
    if num_gpus is None:
        num_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    check_number("num_gpus", num_gpus, Real, 0, besides="None")
    return images.map_batches(
        _Actor,
        fn_constructor_args=(remote, column, list(keys)),
        batch_size=batch_size,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
        num_gpus=num_gpus,
    )
