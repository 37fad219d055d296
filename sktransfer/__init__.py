"""Transfer learning for images that behaves like scikit-learn.

A pretrained network is an ordered list of blocks. The blocks before a boundary are frozen and run
once per image; the blocks after it are trained.

Estimators
    PretrainedFeatureExtractor (images to embeddings), FineTunedImageClassifier,
    SelfTrainedImageClassifier (labels in one domain, images in another)
Data
    load_image_folder, find_leaks, AugmentationDisplay, resolve_augmentation
Choice of a model
    list_backbones, rank_backbones, recommend_strategy, estimate_cost
Cached embeddings
    EmbeddingStore, session_store
Export
    export_onnx (a file from image to label), register_onnx_converter, to_module (a torch module)

X can be paths, PIL images, arrays, tensors, bytes or a column of a table. The guide is in docs/;
docs/architecture.md describes how the package is built.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sktransfer._version import __version__
from sktransfer.backbones.catalogue import list_backbones
from sktransfer.data.folders import load_image_folder
from sktransfer.extractor import PretrainedFeatureExtractor
from sktransfer.inspection.augmentation_display import AugmentationDisplay
from sktransfer.store.session import session_store
from sktransfer.store.store import EmbeddingStore
from sktransfer.transforms.augmentation import resolve_augmentation
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import ImageError, WeightsNotFoundError

if TYPE_CHECKING:
    from sktransfer.classifier import FineTunedImageClassifier
    from sktransfer.diagnostics.cost import Cost, estimate_cost
    from sktransfer.diagnostics.leaks import LeakReport, find_leaks
    from sktransfer.diagnostics.ranking import BackboneRanking, rank_backbones
    from sktransfer.diagnostics.strategy import StrategyReport, recommend_strategy
    from sktransfer.export.converter import register_onnx_converter
    from sktransfer.export.module import to_module
    from sktransfer.export.onnx import OnnxExport, export_onnx
    from sktransfer.self_training import SelfTrainedImageClassifier

# Modules that need skorch or scikit-learn's model selection are imported on first use, to keep
# `import sktransfer` fast.
_IMPORTED_ON_USE = {
    "BackboneRanking": "sktransfer.diagnostics.ranking",
    "Cost": "sktransfer.diagnostics.cost",
    "FineTunedImageClassifier": "sktransfer.classifier",
    "LeakReport": "sktransfer.diagnostics.leaks",
    "OnnxExport": "sktransfer.export.onnx",
    "SelfTrainedImageClassifier": "sktransfer.self_training",
    "StrategyReport": "sktransfer.diagnostics.strategy",
    "estimate_cost": "sktransfer.diagnostics.cost",
    "export_onnx": "sktransfer.export.onnx",
    "find_leaks": "sktransfer.diagnostics.leaks",
    "rank_backbones": "sktransfer.diagnostics.ranking",
    "recommend_strategy": "sktransfer.diagnostics.strategy",
    "register_onnx_converter": "sktransfer.export.converter",
    "to_module": "sktransfer.export.module",
}

__all__ = [
    "AugmentationDisplay",
    "BackboneRanking",
    "Cost",
    "EmbeddingStore",
    "FineTunedImageClassifier",
    "ImageError",
    "LeakReport",
    "OnnxExport",
    "Preprocessing",
    "PretrainedFeatureExtractor",
    "SelfTrainedImageClassifier",
    "StrategyReport",
    "WeightsNotFoundError",
    "__version__",
    "estimate_cost",
    "export_onnx",
    "find_leaks",
    "list_backbones",
    "load_image_folder",
    "rank_backbones",
    "recommend_strategy",
    "register_onnx_converter",
    "resolve_augmentation",
    "session_store",
    "to_module",
]


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_ON_USE:
        return getattr(importlib.import_module(_IMPORTED_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
