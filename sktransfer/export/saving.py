"""save: a fitted model in one file.

The file describes our estimators in JSON: their parameters, what they learned, and their networks;
arrays are in safetensors. Steps of scikit-learn are in the format of skops.
"""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sktransfer._version import __version__
from sktransfer.backbones.loading import Backbone
from sktransfer.backbones.saved import SavedWeights
from sktransfer.backbones.source import BackboneSource
from sktransfer.backbones.torchvision_blocks import weights_name
from sktransfer.backbones.weights import tensors_to_bytes, to_tensors
from sktransfer.export.archive import TENSORS, write_archive
from sktransfer.export.encoding import encode
from sktransfer.export.schema import ATTRIBUTES, SAVED_VALUES, attributes_of, is_one_of, not_finite
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.self_training import SelfTrainedImageClassifier
from sktransfer.utils.errors import import_optional

# Packages whose versions a file records.
_PACKAGES = ("torch", "torchvision", "scikit-learn", "numpy", "skorch", "timm", "openvino", "skops")


def save(model: Any, path: str | PathLike[str], *, standalone: bool = True) -> None:
    """Save a fitted model in one file, which `load` reads without running code from it.

    Parameters
    ----------
    model : estimator
        A fitted `FineTunedImageClassifier`, `PretrainedFeatureExtractor`,
        `SelfTrainedImageClassifier`, or a `Pipeline` of them and steps of scikit-learn.
    path : path
        Any name; `.skt` is usual. Missing folders are created, and an old file is replaced when the
        new one is complete.
    standalone : bool, default=True
        Whether the file has all weights, so that it can be loaded without a network and with empty
        caches. Otherwise it has only those that were trained, and a digest of the others, which
        `load` gets as `fit` did.

    Raises
    ------
    NotFittedError
        If the model is not fitted.
    TypeError
        If the model, or one of its parts, cannot be saved.
    ValueError
        If weights are not finite.

    Warns
    -----
    UserWarning
        If `load` needs the network's code, or a list of types to trust.

    Notes
    -----
    What only `fit` uses is left out if it is code: `callbacks`, and functions in `augment` and
    `optimizer`. So are `cache` and `checkpoint_dir`, folders of this machine. A step of
    scikit-learn is saved by skops.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import PretrainedFeatureExtractor, load, save
    >>> images = load_sample_images().images
    >>> extractor = PretrainedFeatureExtractor(cache=None).fit(images)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(extractor, Path(folder, "embed.skt"))
    ...     loaded = load(Path(folder, "embed.skt"))
    >>> bool((loaded.transform(images) == extractor.transform(images)).all())
    True
    """
    writer = _Writer(standalone)
    write_archive(path, _describe(model, writer), writer.parts())
    for note in dict.fromkeys(writer.notes):
        warnings.warn(note, stacklevel=2)


def describe_model(model: Any) -> dict[str, Any]:
    """Return the description that the file of a fitted model would have.

    Raises
    ------
    NotFittedError, TypeError, ValueError
        If the model cannot be saved.
    """
    return _describe(model, _Writer(standalone=False))


def _describe(model: Any, writer: _Writer) -> dict[str, Any]:
    return {
        "model": writer.encode(model),
        "standalone": writer.standalone,
        "classes": encode(getattr(model, "classes_", None)),
        "versions": {"sktransfer": __version__, "python": platform.python_version(), **_versions()},
    }


class _Writer:
    """Encodes a model, and collects the parts of its file."""

    def __init__(self, standalone: bool) -> None:
        self.standalone = standalone
        self.notes: list[str] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._groups: set[str] = set()
        self._steps: list[bytes] = []

    def parts(self) -> dict[str, bytes]:
        """Return the parts of the file beside the description, by name."""
        steps = {f"steps/{number}.skops": step for number, step in enumerate(self._steps)}
        return {TENSORS: tensors_to_bytes(self._tensors), **steps}

    def encode(self, model: Any) -> dict[str, Any]:
        """Encode a fitted estimator, or a step of a pipeline."""
        if model is None or isinstance(model, str):  # "passthrough"
            return {"type": "value", "value": model}
        if type(model) is Pipeline:
            check_is_fitted(model)
            steps = [[name, self.encode(step)] for name, step in model.steps]
            return {"type": "Pipeline", "steps": steps}
        if type(model) is FrozenEstimator:
            return {"type": "FrozenEstimator", "estimator": self.encode(model.estimator)}
        if type(model) not in ATTRIBUTES:
            return self._encode_step(model)
        check_is_fitted(model)
        names = attributes_of(type(model))
        node = {
            "type": type(model).__name__,
            "attributes": {
                name: encode(vars(model)[name]) for name in names if name in vars(model)
            },
        }
        if isinstance(model, SelfTrainedImageClassifier):
            estimators = [self.encode(estimator) for estimator in model.estimators_]
            return {**node, "shares": encode(list(model.shares)), "estimators": estimators}
        node["parameters"] = self._encode_parameters(model)
        node["preprocessing"] = encode(asdict(model.preprocessing_))
        if isinstance(model, PretrainedFeatureExtractor):
            plan = model._plan
            node |= {"layers": encode(plan.layers), "pooling": encode(plan.pooling)}
            return {**node, "network": self._encode_network(plan.source)}
        decision = {**vars(model.decision_), "parameters": dict(model.decision_.parameters)}
        return {
            **node,
            "network": self._encode_network(model._source),
            "decision": encode(decision),
            "history": encode(model._tuned.history),
            "tuned": self._add_tensors(
                f"tuned {len(self._groups)}", to_tensors(model._tuned.weights)
            ),
        }

    def _encode_parameters(self, model: Any) -> dict[str, Any]:
        """Encode the parameters, without code and without folders of this machine."""
        encoded = {}
        for name, value in model.get_params(deep=False).items():
            if name in ("backbone", "weights"):  # the network has them
                continue
            if name in SAVED_VALUES and not is_one_of(value, SAVED_VALUES[name]):
                continue
            if isinstance(value, np.random.RandomState):
                continue
            try:
                encoded[name] = encode(value)
            except TypeError as error:
                raise TypeError(
                    f"Got {name}={value!r} in a {type(model).__name__}, which cannot be saved; "
                    "replace it by a plain value (set_params) before you save"
                ) from error
        return encoded

    def _encode_network(self, source: BackboneSource) -> dict[str, Any]:
        backbone, weights = replace(source, batch_norm=None).load(), source.weights
        if isinstance(weights, SavedWeights):
            weights = weights.given
        weights = weights_name(source.backbone, weights)
        node = {
            "name": backbone.name,
            "backbone": self._encode_backbone(source.backbone),
            "weights": fspath(weights) if isinstance(weights, PathLike) else weights,
            "image_size": encode(source.image_size),
            "digest": backbone.digest.hex(),
        }
        if source.batch_norm is not None:
            name = f"statistics {len(self._groups)}"
            node["batch_norm"] = self._add_tensors(name, to_tensors(source.batch_norm.statistics))
        if self.standalone and not isinstance(source.backbone, BaseEstimator):
            node["saved"] = self._encode_weights(backbone)
        return node

    def _encode_backbone(self, backbone: Any) -> Any:
        """Encode a name, a fitted classifier, or the name of a user's own code."""
        if isinstance(backbone, str):
            return backbone
        if isinstance(backbone, BaseEstimator):
            return {"estimator": self.encode(backbone)}
        code = backbone if hasattr(backbone, "__qualname__") else type(backbone)
        self.notes.append(
            f"The code of the backbone {code.__module__}.{code.__qualname__} is not saved; to load "
            f"the model, pass it again: load(path, backbone={code.__qualname__})"
        )
        return {"own": f"{code.__module__}.{code.__qualname__}"}

    def _encode_weights(self, backbone: Backbone) -> dict[str, Any]:
        """Encode all weights of a network, once for all estimators that have it."""
        name = f"network {backbone.digest.hex()}"
        if name not in self._groups:
            self._add_tensors(name, backbone.build().state_dict())
        return {
            "tensors": name,
            "preprocessing": encode(asdict(backbone.preprocessing)),
            "categories": list(backbone.categories),
            "pretrained": backbone.pretrained,
        }

    def _add_tensors(self, group: str, tensors: Mapping[str, torch.Tensor]) -> str:
        if bad := not_finite(tensors):
            raise ValueError(
                f"Got weights that are not finite in {', '.join(bad[:3])}; the fit has diverged, "
                "so fit again with a lower lr"
            )
        self._groups.add(group)
        self._tensors.update({f"{group}/{name}": tensor for name, tensor in tensors.items()})
        return group

    def _encode_step(self, step: Any) -> dict[str, Any]:
        """Encode an estimator of another library."""
        if isinstance(step, BaseSearchCV):
            raise TypeError(
                f"Got a {type(step).__name__}, but expected a model; save its best_estimator_"
            )
        ours = _ours_in(step)
        if ours or not isinstance(step, BaseEstimator):
            inside = f" with a {type(ours).__name__} inside" if ours else ""
            raise TypeError(
                f"Got a {type(step).__name__}{inside}, but expected a FineTunedImageClassifier, a "
                "PretrainedFeatureExtractor, a SelfTrainedImageClassifier, or a Pipeline of these "
                "and steps of scikit-learn; save its fitted parts, or use joblib.dump"
            )
        check_is_fitted(step)
        skops = import_optional("skops.io", extra="skops", purpose=f"a {type(step).__name__} step")
        content = skops.dumps(step)
        if untrusted := skops.get_untrusted_types(data=content):
            self.notes.append(
                f"A {type(step).__name__} has types outside of scikit-learn; to load the model, "
                f"say that you trust them: load(path, trusted={untrusted!r})"
            )
        self._steps.append(content)
        return {"type": "step", "class": type(step).__name__, "part": len(self._steps) - 1}


def _ours_in(estimator: Any) -> Any:
    """Return an estimator of this package among the parameters of another one; None if none."""
    values = estimator.get_params().values() if hasattr(estimator, "get_params") else ()
    return next((value for value in values if type(value) in ATTRIBUTES), None)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
