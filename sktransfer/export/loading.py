"""load: a fitted model from a file that `save` has written. No code of the file is run."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

from sktransfer.backbones.batch_norm import BatchNormState
from sktransfer.backbones.saved import SavedWeights
from sktransfer.backbones.source import BackboneSource
from sktransfer.backbones.weights import tensors_of_bytes, to_arrays
from sktransfer.export.archive import TENSORS, Archive, read_archive
from sktransfer.export.encoding import decode
from sktransfer.export.schema import (
    ATTRIBUTES,
    SAVED_VALUES,
    TYPES,
    attributes_of,
    is_one_of,
    not_finite,
)
from sktransfer.extractor import ExtractionPlan, PretrainedFeatureExtractor
from sktransfer.finetuning.decision import FitDecision
from sktransfer.finetuning.fine_tuning import TunedState
from sktransfer.finetuning.schedule import HEAD
from sktransfer.finetuning.suffix import TrainedSuffix
from sktransfer.finetuning.task import ClassificationTask
from sktransfer.self_training import SelfTrainedImageClassifier
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import (
    ModelFileError,
    WeightsNotFoundError,
    check_bool,
    import_optional,
)

# Sides of images that a network can get, in pixels.
_MAX_SIDE = 2**14
# Side of the image that warms a model up, in pixels.
_BLANK_SIDE = 64


def load(
    path: str | PathLike[str],
    *,
    backbone: Any = None,
    trusted: Sequence[str] = (),
    warm_up: bool = False,
) -> Any:
    """Load a model that `save` has written. No code of the file is run, and nothing is extracted.

    Parameters
    ----------
    path : path
    backbone : Module, callable or None, default=None
        The network, if it is a user's own: the module, or the function that builds it. Its code
        must be that of the saved one.
    trusted : list of str, default=()
        Types outside of scikit-learn, NumPy and SciPy that steps of a pipeline may have, such as
        `"mypackage.MyScaler"`. Loading imports them.
    warm_up : bool, default=False
        Whether each network also runs a blank image, so that the first request takes no longer than
        the later ones. The engine is built for requests of one image: with `engine="auto"`, that is
        torch.

    Returns
    -------
    estimator
        It computes on the GPU if there is one, shows no progress, and caches no embeddings
        (`cache=None`): requests are rarely repeated, and those of one image would wait for the
        store.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ModelFileError
        If it is not a saved model, is damaged, or was written by a later release; if its steps have
        types that are not trusted; or if its weights do not fit its network, or are not finite.
    ValueError
        If `backbone` is given, but no network of the model is a user's own; or if it cannot be
        built.
    TypeError
        If `trusted` is not a list of names.
    """
    check_bool("warm_up", warm_up)
    if not isinstance(trusted, list | tuple | set) or not all(isinstance(t, str) for t in trusted):
        raise TypeError(
            f"Got trusted={trusted!r}, but expected a list of names of types, such as "
            "['mypackage.MyScaler']"
        )
    archive = read_archive(path)
    reader = _Reader(archive, backbone, trusted)
    try:
        model = reader.decode(archive.description["model"])
    except (ModelFileError, WeightsNotFoundError, ImportError, _ArgumentError):
        raise
    except Exception as error:  # a crafted description may lead to any error
        problem = f"its description is not that of a model ({type(error).__name__}: {error})"
        raise ModelFileError(path, problem) from error
    reader.check_used()
    reader.check_own_is_used()
    if warm_up:
        _warm_up(model)
    return model


def _warm_up(model: Any) -> None:
    """Run a blank image through the networks of a model."""
    if isinstance(model, Pipeline):
        for _, step in model.steps:
            _warm_up(step)
    elif isinstance(model, FrozenEstimator):
        _warm_up(model.estimator)
    elif type(model) in ATTRIBUTES:
        run = model.predict if hasattr(model, "predict") else model.transform
        run([np.zeros((_BLANK_SIDE, _BLANK_SIDE, 3), np.uint8)])


class _ArgumentError(ValueError):
    """The file is right, but an argument of `load` is not."""


class _Reader:
    """Decodes the model of a file; what it creates is limited to the types of this module."""

    def __init__(self, archive: Archive, backbone: Any, trusted: Sequence[str]) -> None:
        self._archive, self._own, self._trusted = archive, backbone, trusted
        try:
            tensors = tensors_of_bytes(archive.parts.get(TENSORS, b""))
        except ValueError as error:
            raise ModelFileError(archive.path, str(error)) from error
        if bad := not_finite(tensors):
            raise ModelFileError(
                archive.path, f"its tensor {bad[0]!r} has values that are not finite"
            )
        self._tensors, self._unused = tensors, {*archive.parts} - {TENSORS} | {*tensors}
        self._saved: dict[str, SavedWeights] = {}
        self._names: list[str] = []
        self._needs_own = False

    def check_used(self) -> None:
        """Refuse content that no part of the model has asked for."""
        if self._unused:
            problem = f"it has content that does not belong to the model: {min(self._unused)!r}"
            raise ModelFileError(self._archive.path, problem)

    def check_own_is_used(self) -> None:
        """Refuse a user's network that no part of the model needs."""
        if self._own is None or self._needs_own:
            return
        backbone = self._own
        is_name = isinstance(backbone, str)
        name = repr(backbone) if is_name else getattr(backbone, "__qualname__", None)
        names = ", ".join(map(repr, dict.fromkeys(self._names))) or "none"
        raise ValueError(
            f"Got backbone={name or type(backbone).__name__}, but expected no backbone: load "
            f"itself builds the networks of {str(self._archive.path)!r} ({names}); leave out "
            "backbone"
        )

    def decode(self, node: dict[str, Any]) -> Any:
        """Decode an estimator, or a step of a pipeline."""
        kind = node["type"]
        if kind == "value":
            return _check_type(node["value"], str, None)
        if kind == "Pipeline":
            return Pipeline([(_check_type(n, str), self.decode(step)) for n, step in node["steps"]])
        if kind == "FrozenEstimator":
            return FrozenEstimator(self.decode(node["estimator"]))
        if kind == "step":
            return self._decode_step(node)
        if TYPES[kind] is SelfTrainedImageClassifier:
            estimators = [self.decode(estimator) for estimator in node["estimators"]]
            model = SelfTrainedImageClassifier(clone(estimators[0]), shares=decode(node["shares"]))
            model.estimators_ = estimators
            _set_attributes(model, node["attributes"])
            return model
        return self._decode_ours(TYPES[kind], node)

    def _decode_ours(self, kind: Any, node: dict[str, Any]) -> Any:
        parameters = {name: decode(value) for name, value in node["parameters"].items()}
        for name, options in SAVED_VALUES.items():
            if name in parameters and not is_one_of(parameters[name], options):
                raise ValueError(f"{name}={parameters[name]!r}")
        parameters |= {"cache": None, "verbose": 0}
        source = self._decode_network(node["network"])
        model = kind(source.backbone, weights=node["network"]["weights"], **parameters)
        _set_attributes(model, node["attributes"])
        model.preprocessing_ = _decode_preprocessing(node["preprocessing"])
        model.batch_norm_, model.errors_ = source.batch_norm, []
        if isinstance(model, PretrainedFeatureExtractor):
            pooling = _check_type(node["pooling"], str, None)
            model._plan = ExtractionPlan(source, decode(node["layers"]), pooling)
            return model
        model._source, model._net = source, None
        model._task = ClassificationTask(model.classes_)
        model.decision_ = FitDecision(**decode(node["decision"]))
        tuned = self._take(_check_type(node["tuned"], str))
        model._tuned = TunedState(to_arrays(tuned), decode(node["history"]))
        self._check_tuned(model.net_.module_, tuned)
        return model

    def _check_tuned(self, suffix: TrainedSuffix, tuned: Mapping[str, torch.Tensor]) -> None:
        """Check that the tensors are all those of some parts; copying would broadcast others."""
        expected = suffix.state_of(suffix.parts())
        parts = [
            name for name in suffix.parts() if any(key.startswith(f"{name}.") for key in tuned)
        ]
        needed = {key for key in expected if any(key.startswith(f"{name}.") for name in parts)}
        fits = HEAD in parts and tuned.keys() == needed
        if not fits or any(
            (tuned[key].shape, tuned[key].dtype) != (expected[key].shape, expected[key].dtype)
            for key in needed
        ):
            raise ModelFileError(
                self._archive.path, "its trained weights do not fit its network, or are incomplete"
            )

    def _decode_network(self, node: dict[str, Any]) -> BackboneSource:
        saved = node.get("saved")
        weights = _check_type(node["weights"], str, None)
        statistics = None
        if "batch_norm" in node:
            statistics = BatchNormState(to_arrays(self._take(_check_type(node["batch_norm"], str))))
        source = BackboneSource(
            self._decode_backbone(node["backbone"]),
            weights if saved is None else self._decode_weights(saved, node["name"], weights),
            decode(node["image_size"]),
            statistics,
            bytes.fromhex(node["digest"]),
        )
        try:
            source.load()
        except ValueError as error:  # other weights, or the code of another module
            raise ModelFileError(self._archive.path, f"its network differs. {error}") from error
        except Exception as error:
            if self._own is None or source.backbone is not self._own:
                raise
            raise _ArgumentError(
                f"Got backbone={self._own!r}, which cannot be built ({type(error).__name__}: "
                f"{error}); pass the network with which the model was fitted"
            ) from error
        return source

    def _decode_backbone(self, encoded: Any) -> Any:
        if isinstance(encoded, str):
            self._names.append(encoded)
            return encoded
        if "estimator" in encoded:
            return self.decode(encoded["estimator"])
        self._needs_own = True
        if self._own is None:
            raise ModelFileError(
                self._archive.path,
                f"its network {encoded['own']!r} is a user's own code, which is not in the file; "
                "pass the module, or what builds it: load(path, backbone=...)",
            )
        return self._own

    def _decode_weights(self, saved: dict[str, Any], name: str, given: str | None) -> SavedWeights:
        group = _check_type(saved["tensors"], str)
        if group not in self._saved:
            self._saved[group] = SavedWeights(
                _check_type(name, str),
                to_arrays(self._take(group)),
                _decode_preprocessing(saved["preprocessing"]),
                tuple(_check_type(category, str) for category in saved["categories"]),
                bool(saved["pretrained"]),
                given,
            )
        return self._saved[group]

    def _take(self, group: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a group, by their names in it."""
        names = [name for name in self._tensors if name.startswith(f"{group}/")]
        self._unused.difference_update(names)
        return {name.removeprefix(f"{group}/"): self._tensors[name] for name in names}

    def _decode_step(self, node: dict[str, Any]) -> Any:
        name = f"steps/{int(node['part'])}.skops"
        content = self._archive.parts[name]
        self._unused.discard(name)
        purpose = f"{self._archive.path} with a {node['class']} step"
        skops = import_optional("skops.io", extra="skops", purpose=purpose)
        try:
            _check_sizes(content)
            types = {*skops.get_untrusted_types(data=content)}
            if types <= {*self._trusted}:
                return skops.loads(content, trusted=sorted(types))
        except Exception as error:  # skops raises many kinds
            problem = f"its step {node['class']!r} cannot be read ({type(error).__name__}: {error})"
            raise ModelFileError(self._archive.path, problem) from error
        raise ModelFileError(
            self._archive.path,
            f"its step {node['class']!r} has types that are not trusted: {sorted(types)}. If you "
            "know where the file comes from, load it with load(path, trusted=[...])",
        )


def _set_attributes(model: Any, encoded: dict[str, Any]) -> None:
    for name, value in encoded.items():
        if name not in attributes_of(type(model)):
            raise ValueError(f"an attribute {name!r}")
        setattr(model, name, decode(value))


def _check_sizes(content: bytes) -> None:
    """Check that an archive does not claim to have more bytes than it has."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        n_bytes = sum(info.file_size for info in archive.infolist())
    if n_bytes > len(content):
        raise ValueError(f"{n_bytes:,} bytes in {len(content):,}")


def _decode_preprocessing(encoded: dict[str, Any]) -> Preprocessing:
    preprocessing = Preprocessing(**decode(encoded))
    sides = [preprocessing.resize, *preprocessing.crop]
    sides = [side for item in sides for side in (item if isinstance(item, tuple) else (item,))]
    moments = [*preprocessing.mean, *preprocessing.std]
    if not all(isinstance(side, int) and 0 < side <= _MAX_SIDE for side in sides) or not all(
        isinstance(value, float) for value in moments
    ):
        raise ValueError(f"the preprocessing {preprocessing}")
    return preprocessing


def _check_type(value: Any, *types: type | None) -> Any:
    """Return a value of some types; None among them allows None."""
    if not any(value is None if kind is None else isinstance(value, kind) for kind in types):
        raise TypeError(f"a {type(value).__name__}")
    return value
