"""Transfer learning for images that behaves like scikit-learn.

A pretrained network is an ordered list of blocks. The blocks before a boundary are frozen and run
once per image; the blocks after it are trained.

Estimators
    PretrainedFeatureExtractor (images to embeddings), FineTunedImageClassifier,
    SelfTrainedImageClassifier (labels in one domain, images in another)
Data
    load_image_folder, load_image_table, find_leaks, AugmentationDisplay, resolve_augmentation
Choice of a model
    list_backbones, rank_backbones, recommend_strategy, estimate_cost
Cached embeddings
    EmbeddingStore, session_store
Fitted models in files
    save, load, make_card (a model card), export_onnx, register_onnx_converter, to_module (a torch
    module)
Clusters
    embed and predict of sktransfer.integrations.dask, sktransfer.integrations.ray and
    sktransfer.integrations.spark

X can be paths, URLs, PIL images, arrays, tensors, bytes or a column of a table. The guide is in
docs/; docs/architecture.md describes how the package is built.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sktransfer._version import __version__

if TYPE_CHECKING:
    from sktransfer.backbones.catalogue import list_backbones
    from sktransfer.classifier import FineTunedImageClassifier
    from sktransfer.data.folders import load_image_folder, load_image_table
    from sktransfer.diagnostics.cost import Cost, estimate_cost
    from sktransfer.diagnostics.leaks import LeakReport, find_leaks
    from sktransfer.diagnostics.ranking import BackboneRanking, rank_backbones
    from sktransfer.diagnostics.strategy import StrategyReport, recommend_strategy
    from sktransfer.export.card import make_card
    from sktransfer.export.converter import register_onnx_converter
    from sktransfer.export.loading import load
    from sktransfer.export.module import to_module
    from sktransfer.export.onnx import OnnxExport, export_onnx
    from sktransfer.export.saving import save
    from sktransfer.extractor import PretrainedFeatureExtractor
    from sktransfer.inspection.augmentation_display import AugmentationDisplay
    from sktransfer.self_training import SelfTrainedImageClassifier
    from sktransfer.store.session import session_store
    from sktransfer.store.store import EmbeddingStore
    from sktransfer.transforms.augmentation import resolve_augmentation
    from sktransfer.transforms.preprocessing import Preprocessing
    from sktransfer.utils.errors import ImageError, ModelFileError, WeightsNotFoundError

# Modules are imported on first use: `import sktransfer` is fast, and the command line reads a saved
# model without torch.
_IMPORTED_ON_USE = {
    "AugmentationDisplay": "sktransfer.inspection.augmentation_display",
    "BackboneRanking": "sktransfer.diagnostics.ranking",
    "Cost": "sktransfer.diagnostics.cost",
    "EmbeddingStore": "sktransfer.store.store",
    "FineTunedImageClassifier": "sktransfer.classifier",
    "ImageError": "sktransfer.utils.errors",
    "LeakReport": "sktransfer.diagnostics.leaks",
    "ModelFileError": "sktransfer.utils.errors",
    "OnnxExport": "sktransfer.export.onnx",
    "Preprocessing": "sktransfer.transforms.preprocessing",
    "PretrainedFeatureExtractor": "sktransfer.extractor",
    "SelfTrainedImageClassifier": "sktransfer.self_training",
    "StrategyReport": "sktransfer.diagnostics.strategy",
    "WeightsNotFoundError": "sktransfer.utils.errors",
    "estimate_cost": "sktransfer.diagnostics.cost",
    "export_onnx": "sktransfer.export.onnx",
    "find_leaks": "sktransfer.diagnostics.leaks",
    "list_backbones": "sktransfer.backbones.catalogue",
    "load": "sktransfer.export.loading",
    "load_image_folder": "sktransfer.data.folders",
    "load_image_table": "sktransfer.data.folders",
    "make_card": "sktransfer.export.card",
    "rank_backbones": "sktransfer.diagnostics.ranking",
    "recommend_strategy": "sktransfer.diagnostics.strategy",
    "register_onnx_converter": "sktransfer.export.converter",
    "resolve_augmentation": "sktransfer.transforms.augmentation",
    "save": "sktransfer.export.saving",
    "session_store": "sktransfer.store.session",
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
    "ModelFileError",
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
    "load",
    "load_image_folder",
    "load_image_table",
    "make_card",
    "rank_backbones",
    "recommend_strategy",
    "register_onnx_converter",
    "resolve_augmentation",
    "save",
    "session_store",
    "to_module",
]


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_ON_USE:
        value = globals()[name] = getattr(importlib.import_module(_IMPORTED_ON_USE[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
