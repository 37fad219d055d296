"""A fitted model as one torch module: `to_module`.

Shapes: N images of h x w pixels, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sktransfer.backbones.frozen import freeze
from sktransfer.classifier import FineTunedImageClassifier
from sktransfer.embedding.image_module import ImageModule
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.self_training import SelfTrainedImageClassifier


def to_module(model: Any) -> nn.Module:
    """Return a fitted model as one torch module, from images of any size to its outputs.

    The module resizes, crops and normalizes images, and runs the network and all steps after it.

    Parameters
    ----------
    model : fitted estimator
        A `PretrainedFeatureExtractor`, a `FineTunedImageClassifier`, a `SelfTrainedImageClassifier`
        or a scikit-learn `Pipeline` that begins with one of the first two. All other steps of a
        pipeline must be `StandardScaler`, `Normalizer`, `LogisticRegression` or `"passthrough"`;
        `export_onnx` accepts more.

    Returns
    -------
    nn.Module
        Maps images, uint8 RGB of shape (N, 3, height, width) and of any one size, to probabilities
        (N, K), float32. The module of an extractor, or of a pipeline without a classifier, returns
        embeddings (N, D). It is frozen, on the CPU, computes in float32, and shares no weights with
        the model. Its attribute `classes` holds the `classes_` of the model, or None. It works with
        `torch.export`, for dynamic N, height and width.

    Raises
    ------
    NotFittedError
        If the model is not fitted.
    TypeError
        If the model is another one, or a step of the pipeline has no torch equivalent here.

    Notes
    -----
    On a CPU, the outputs are those of `predict_proba` or `transform` within rounding. Other devices
    resize images in floats, so pixels differ by one level of 255 here and there. Images that are
    not 8-bit RGB have to be converted first: the parameters `pixel_range` and `background` are not
    part of the module.

    Examples
    --------
    >>> from sklearn.datasets import load_sample_images
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sktransfer import PretrainedFeatureExtractor, to_module
    >>> images = load_sample_images().images
    >>> pipeline = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression())
    >>> module = to_module(pipeline.fit(images, ["china", "flower"]))
    >>> batch = torch.tensor(images[0]).permute(2, 0, 1)[None]
    >>> print(module.classes[module(batch).argmax()])
    china
    """
    if isinstance(model, (PretrainedFeatureExtractor, FineTunedImageClassifier)):
        return model.to_module()
    if isinstance(model, FrozenEstimator):
        return to_module(model.estimator)
    if isinstance(model, SelfTrainedImageClassifier):
        check_is_fitted(model)
        return MeanModule([to_module(fitted) for fitted in model.estimators_], model.classes_)
    if isinstance(model, Pipeline):
        embed, tail = split_pipeline(model)
        if not tail:
            return embed
        modules = [_translated(name, step) for name, step in tail]
        return embed.then(*modules, classes=getattr(tail[-1][1], "classes_", None))
    raise unknown_model(model)


class MeanModule(nn.Module):
    """The mean of the probabilities of several modules; always in eval mode.

    Parameters
    ----------
    members : list of nn.Module
        Each maps images, uint8 (N, 3, h, w), to probabilities (N, K).
    classes : ndarray of shape (K,)
    """

    def __init__(self, members: list[nn.Module], classes: np.ndarray) -> None:
        super().__init__()
        self.members, self.classes = nn.ModuleList(members), classes
        freeze(self)

    def train(self, mode: bool = True) -> MeanModule:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images, uint8 (N, 3, h, w), to probabilities (N, K), float32."""
        return torch.stack([member(images) for member in self.members]).mean(0)


def unknown_model(model: Any) -> TypeError:
    """Return the error for a model that cannot be exported."""
    remedy = "; pass its best_estimator_" if hasattr(model, "best_estimator_") else ""
    return TypeError(
        f"Got {type(model).__name__}, but expected a fitted PretrainedFeatureExtractor, "
        "FineTunedImageClassifier or SelfTrainedImageClassifier, or a Pipeline that begins with "
        f"one of the first two{remedy}"
    )


def split_pipeline(pipeline: Pipeline) -> tuple[ImageModule, list[tuple[str, Any]]]:
    """Split a fitted pipeline into the module of its first step, and the other steps by name.

    Steps that pass everything through are left out.

    Raises
    ------
    TypeError
        If the first step does not embed images.
    """
    check_is_fitted(pipeline)
    (name, first), *others = pipeline.steps
    tail = [(other, step) for other, step in others if step not in (None, "passthrough")]
    if isinstance(first, FrozenEstimator):
        first = first.estimator
    if isinstance(first, PretrainedFeatureExtractor):
        return first.to_module(), tail
    if isinstance(first, FineTunedImageClassifier):
        # On its own it classifies; before other steps, a pipeline calls its `transform`.
        return first.to_module("embeddings" if others else "probabilities"), tail
    raise TypeError(
        f"Got a Pipeline that begins with {name!r}, a {type(first).__name__}, but expected a "
        "PretrainedFeatureExtractor or a FineTunedImageClassifier as its first step"
    )


class _Scaler(nn.Module):
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, step: StandardScaler) -> None:
        super().__init__()
        width = step.n_features_in_
        self.register_buffer("mean", _float32(step.mean_ if step.with_mean else np.zeros(width)))
        self.register_buffer("scale", _float32(step.scale_ if step.with_std else np.ones(width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.scale


class _Normalizer(nn.Module):
    def __init__(self, step: Normalizer) -> None:
        super().__init__()
        self.order = {"l1": 1.0, "l2": 2.0, "max": float("inf")}[step.norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, self.order, dim=1, keepdim=True)
        return x / torch.where(norm == 0, 1.0, norm)


class _Logistic(nn.Module):
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, step: LogisticRegression) -> None:
        super().__init__()
        self.register_buffer("weight", _float32(step.coef_))
        self.register_buffer("bias", _float32(step.intercept_))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(x, self.weight, self.bias)
        if logits.shape[1] == 1:  # the log-odds of the second of two classes
            return torch.sigmoid(torch.cat([-logits, logits], dim=1))
        return logits.softmax(dim=1)


_TRANSLATIONS: dict[type, Callable[[Any], nn.Module]] = {
    StandardScaler: _Scaler,
    Normalizer: _Normalizer,
    LogisticRegression: _Logistic,
}


def _translated(name: str, step: Any) -> nn.Module:
    """Return the torch module of a fitted step of a pipeline."""
    # Subclasses may compute something else.
    translate = _TRANSLATIONS.get(type(step))
    if translate is None or not _is_plain(step):
        names = ", ".join(known.__name__ for known in _TRANSLATIONS)
        raise TypeError(
            f"Got a Pipeline with the step {name!r}, {step!r}, which is not translated to torch, "
            f"but expected {names} or 'passthrough' after the first step; sktransfer.export_onnx "
            "exports more kinds of steps"
        )
    return translate(step)


def _is_plain(step: Any) -> bool:
    """Return whether a step is not a logistic regression with one classifier for each class."""
    several = isinstance(step, LogisticRegression) and len(step.classes_) > 2
    old = getattr(step, "multi_class", "deprecated") in ("ovr", "multinomial")
    return not old and not (several and step.solver == "liblinear")


def _float32(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))
