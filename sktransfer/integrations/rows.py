"""RemoteModel: a fitted model that workers of a cluster apply to columns of images.

Shapes: N images, R of them readable, D features, K classes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, is_classifier, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sktransfer.embedding.workers import SharedEstimator
from sktransfer.export.loading import load
from sktransfer.finetuning.estimator import FineTunedEstimator
from sktransfer.self_training import SelfTrainedImageClassifier
from sktransfer.utils.errors import ImageError, check_directory, check_number, import_optional
from sktransfer.utils.runtime import resolve_device, torch_threads

# Models that a worker process keeps.
_MAX_MODELS = 2
_PURPOSE = "sktransfer.integrations"


@dataclass(frozen=True)
class RemoteModel:
    """A fitted model, and what workers compute with it. `remote_model` builds it.

    Parameters
    ----------
    key : str
        Digest of `content`, or the path of a file of `save`.
    content : bytes or None
        The pickled model; None: each worker process reads the file.
    fields : tuple of (str, pyarrow.DataType)
        Names and types of the computed columns: `embedding`, or `prediction` and perhaps
        `probability`.
    cache : str or None
        Directory of a store of embeddings.
    threads : int or None
        Threads of each worker process; None takes as many as the worker has cores, if the cluster
        says so, and otherwise those of the model.
    """

    key: str
    content: bytes | None = field(repr=False, compare=False)
    fields: tuple[tuple[str, Any], ...]
    cache: str | None
    threads: int | None

    @property
    def schema(self) -> Any:
        """The names and types of the results, as a pyarrow Schema."""
        arrow = import_arrow()
        return arrow.schema([*self.fields, ("error", arrow.string())])

    def check_columns(self, names: Sequence[Any], column: Any, keys: Sequence[Any]) -> None:
        """Check the column of images and the keys against the columns `names` of a table.

        Raises
        ------
        TypeError, ValueError
            If a column is missing, or if two columns of the results would have the same name.
        """
        if isinstance(keys, str):
            raise TypeError(f"Got keys={keys!r}, but expected a list of columns: [{keys!r}]")
        for parameter, name in (("column", column), *(("keys", key) for key in keys)):
            if name not in names:
                raise ValueError(
                    f"Got {parameter}={name!r}, but expected one of the columns {names}"
                )
        computed = self.schema.names
        for position, key in enumerate(keys):
            if key in computed:
                raise ValueError(
                    f"Got the key {key!r}, but the results have a column of this name: {computed}; "
                    "rename the key first"
                )
            if key in keys[:position]:
                raise ValueError(f"Got the key {key!r} twice, but expected each column once")

    def run(
        self,
        images: Sequence[str | bytes | None],
        *,
        threads: int | None = None,
        worker: int | None = None,
    ) -> Any:
        """Compute the results of images.

        Parameters
        ----------
        images : sequence of length N
            Paths or encoded images. None is an image that is missing.
        threads : int or None
            Cores of this worker, for `threads=None`.
        worker : int or None
            Index of this worker among those of its machine, for the choice of a GPU.

        Returns
        -------
        pyarrow.Table of N rows
            The columns of `schema`. Rows of images that cannot be read are null, except for the
            reason in `error`.
        """
        if not len(images):
            return self.schema.empty_table()
        loaded = self.load(threads=threads, worker=worker)
        errors: list[str | None] = [None] * len(images)
        rows, values = list(range(len(images))), dict[str, np.ndarray]()
        # Threads of a worker take turns, and each computes on all cores.
        with loaded.lock, torch_threads(loaded.threads):
            while rows:
                try:
                    values = self._compute(loaded.model, [images[row] for row in rows])
                    break
                except ImageError as error:  # it names all broken images
                    reasons = _reasons(error)
                    for position, reason in reasons.items():
                        errors[rows[position]] = reason
                    rows = [row for position, row in enumerate(rows) if position not in reasons]
        return self._table(values, rows, errors)

    def load(self, *, threads: int | None = None, worker: int | None = None) -> LoadedModel:
        """Load the model, once in a process; the parameters are those of `run`."""
        modified = None
        if self.content is None:
            status = os.stat(self.key)
            modified = (status.st_mtime_ns, status.st_size)
        with _loading:
            return _load(self, modified, self.threads or threads, worker)

    def _compute(self, model: Any, images: list[Any]) -> dict[str, np.ndarray]:
        names = [name for name, _ in self.fields]
        if names == ["embedding"]:
            return {"embedding": np.asarray(_embedder(model).transform(images), np.float32)}
        if names == ["prediction"]:
            return {"prediction": np.asarray(model.predict(images))}
        features, last = images, model
        if isinstance(model, Pipeline) and len(model) > 1:  # run the network only once
            features, last = model[:-1].transform(images), model[-1]
        probabilities = np.asarray(last.predict_proba(features), np.float32)
        if isinstance(last, FineTunedEstimator | SelfTrainedImageClassifier):
            predictions = last.classes_[probabilities.argmax(axis=1)]
        else:
            predictions = np.asarray(last.predict(features))
        return {"prediction": predictions, "probability": probabilities}

    def _table(
        self, values: Mapping[str, np.ndarray], rows: list[int], errors: list[str | None]
    ) -> Any:
        """Build a table of N rows from the values of the R readable ones."""
        arrow = import_arrow()
        positions, broken = np.zeros(len(errors), np.int64), np.ones(len(errors), bool)
        positions[rows], broken[rows] = np.arange(len(rows)), False
        indices = arrow.array(positions, mask=broken)
        columns = [
            _array(values[name], kind).take(indices) if rows else arrow.nulls(len(errors), kind)
            for name, kind in self.fields
        ]
        columns.append(arrow.array(errors, arrow.string()))
        return arrow.Table.from_arrays(columns, schema=self.schema)


class LoadedModel(NamedTuple):
    """A model in a worker process."""

    model: Any
    threads: int | None
    lock: Any


def remote_model(
    model: Any,
    method: str,
    *,
    probability: bool = False,
    cache: Any = None,
    threads: int | None = None,
    extra: str = "dask",
) -> RemoteModel:
    """Check a fitted model, and prepare it for workers.

    Parameters
    ----------
    model : estimator or path
        A fitted `PretrainedFeatureExtractor`, `FineTunedImageClassifier` or
        `SelfTrainedImageClassifier`, or a `Pipeline` that begins with one; or a file of `save`,
        which this process and the workers read.
    method : {"embed", "predict"}
    probability : bool
        Whether predictions come with the probability of each class.
    cache, threads
        See `RemoteModel`.
    extra : {"dask", "ray", "spark"}
        The extra that installs what is missing.

    Raises
    ------
    ImportError
        If cloudpickle is not installed.
    NotFittedError
        If the model is not fitted.
    ValueError, TypeError
        If it cannot compute the results, or if `cache` or `threads` are invalid.
    """
    if threads is not None:
        check_number("threads", threads, Integral, 1, besides="None")
    if cache is not None:
        check_directory("cache", cache, besides="a directory or None")
        cache = os.path.abspath(os.path.expanduser(cache))
    if isinstance(model, str | os.PathLike):
        key, content = os.path.abspath(os.path.expanduser(model)), None
        model = load(key)
    else:
        check_is_fitted(model)
        content = _pickled(model, extra)
        key = hashlib.blake2b(content, digest_size=16).hexdigest()
    if method == "embed":
        _embedder(model)
        fields = [("embedding", _list_of_float32())]
    else:
        fields = _fields_of_predictions(model, probability)
    return RemoteModel(key, content, tuple(fields), cache, threads)


def _pickled(model: Any, extra: str) -> bytes:
    """Pickle a model with the code that it has of a notebook."""
    cloudpickle: Any = import_optional("cloudpickle", extra=extra, purpose=_PURPOSE)
    return bytes(cloudpickle.dumps(model))


def import_arrow() -> Any:
    """Import pyarrow."""
    return import_optional("pyarrow", extra="parquet", purpose=_PURPOSE)


def _list_of_float32() -> Any:
    arrow = import_arrow()
    return arrow.list_(arrow.float32())


def _embedder(model: Any) -> Any:
    """Return a model, or the steps of a pipeline before its classifier."""
    if not hasattr(model, "transform") and isinstance(model, Pipeline) and len(model) > 1:
        model = model[:-1]
    if not hasattr(model, "transform"):
        raise TypeError(
            f"Got a {type(model).__name__}, which computes no embeddings, but expected a "
            "PretrainedFeatureExtractor, a FineTunedImageClassifier, or a Pipeline that begins "
            "with one"
        )
    return model


def _fields_of_predictions(model: Any, probability: bool) -> list[tuple[str, Any]]:
    arrow = import_arrow()
    if is_regressor(model):
        kind = arrow.float64()
    elif is_classifier(model):
        try:
            kind = arrow.array(model.classes_).type
        except arrow.ArrowException as error:
            raise TypeError(
                f"Got a {type(model).__name__} whose classes {model.classes_!r} have different "
                "types, but a column has one; fit it to labels of one type"
            ) from error
    else:
        raise TypeError(
            f"Got a {type(model).__name__}, but expected a fitted classifier or regressor: a "
            "FineTunedImageClassifier, or a Pipeline that ends with a classifier"
        )
    if not probability:
        return [("prediction", kind)]
    if not hasattr(model, "predict_proba"):
        raise TypeError(
            f"Got probability=True, but the {type(model).__name__} has no predict_proba; pass "
            "probability=False, or calibrate it with a CalibratedClassifierCV"
        )
    return [("prediction", kind), ("probability", _list_of_float32())]


_loading = threading.Lock()


@functools.lru_cache(_MAX_MODELS)
def _load(
    remote: RemoteModel,
    modified: tuple[int, int] | None,
    threads: int | None,
    worker: int | None,
) -> LoadedModel:
    """Load a model with the device, threads and cache of this process.

    `modified` is the time and size of the file, so that a new one is loaded again.
    """
    model = load(remote.key) if remote.content is None else pickle.loads(remote.content)
    for estimator in _image_estimators(model):
        settings = {} if threads is None else {"n_jobs": threads}
        # Broken images are found by the error that names them.
        estimator.set_params(
            device=str(resolve_device(estimator.device, worker)),
            cache=remote.cache,
            on_error="raise",
            verbose=0,
            **settings,
        )
    return LoadedModel(model, threads, threading.Lock())


def _image_estimators(value: Any) -> Iterator[Any]:
    """Yield the estimators of this package in a model, however deep in other estimators."""
    if isinstance(value, SharedEstimator):
        yield value
    elif isinstance(value, BaseEstimator):
        yield from _image_estimators(vars(value))
    elif isinstance(value, Mapping):
        yield from _image_estimators([*value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _image_estimators(part)


def _reasons(error: ImageError) -> dict[int, str]:
    """Return the reasons of an error by row; raise the error again if it names no row of `X`."""
    if any(broken.row is None or broken.argument for broken in error.errors):
        raise error
    return {int(broken.row): broken.reason for broken in error.errors if broken.row is not None}


def _array(values: np.ndarray, kind: Any) -> Any:
    """Convert numbers or labels (R,), or vectors (R, D), to an array of pyarrow."""
    arrow = import_arrow()
    if not arrow.types.is_list(kind):
        return arrow.array(values, kind)
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    return arrow.FixedSizeListArray.from_arrays(flat, values.shape[1]).cast(kind)
