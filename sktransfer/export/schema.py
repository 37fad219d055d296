"""What the file of a saved model says about our estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sktransfer.classifier import FineTunedImageClassifier
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.self_training import SelfTrainedImageClassifier

# Values that are saved of parameters that may be code, or folders of this machine.
SAVED_VALUES: dict[str, tuple[Any, ...]] = {
    "augment": ("auto", "light", "standard", "aggressive", "industrial", None),
    "cache": ("auto", None),
    "callbacks": (None,),
    "checkpoint_dir": (None,),
    "device": ("auto", "cpu"),
    "optimizer": ("adam", "sgd"),
}
# Attributes that are saved as they are. scikit-learn sets the shared ones.
_SHARED_NAMES = ("n_features_in_", "feature_names_in_", "_sklearn_output_config")
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    FineTunedImageClassifier: (
        "pixel_range_",
        "classes_",
        "stages_",
        "interrupted_",
        "averaging_",
        "temperature_",
        "_boundary",
    ),
    PretrainedFeatureExtractor: ("pixel_range_", "layers_", "digest_", "_widths", "engine_"),
    SelfTrainedImageClassifier: ("classes_", "pseudo_rows_", "pseudo_labels_"),
}
TYPES = {kind.__name__: kind for kind in ATTRIBUTES}


def attributes_of(kind: type) -> tuple[str, ...]:
    """Return the names of the attributes that are saved as they are."""
    return (*ATTRIBUTES[kind], *_SHARED_NAMES)


def is_one_of(value: Any, options: tuple[Any, ...]) -> bool:
    """Return whether a value is one of some strings or None; arrays and the like are not."""
    return (value is None or isinstance(value, str)) and value in options


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that have values that are not finite."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
