"""Transfer learning for images that behaves like scikit-learn.

A backbone is an ordered list of blocks, and one boundary moves. What lies before it is frozen: it
runs through the fastest engine of the machine, and each image goes through it once. The rooms, in
about the order in which they import each other (tests/test_rooms.py has the exact one):

images (decoding, items, containers, validation)
    anything image-like -> a lazy sequence of uint8 images
datasets
    folders of images -> paths and labels
transforms (distortions, augmentation, views), reading (device_decoding)
    images -> batches of pixels, prepared as the weights expect, or augmented
architectures (block_list, efficientnet_lite), split (adversary)
    networks as ordered blocks; the boundary, what is frozen before it, and what is trained behind
    it, against an adversary where there are two domains
weights, backbones, catalogue
    backbones by name, with their weights, preprocessing and digest
domain
    BatchNorm statistics of another domain
engines (openvino_engine, fusion, likeness)
    what runs the frozen blocks
store (database, space, session), machine
    image -> embedding, shared by processes; what computes
features
    the one road: images -> embeddings, through store and engine
extractor
    PretrainedFeatureExtractor
copies, leaks (report)
    images that are the same, and where that does harm
ranking (logme)
    which backbone suits the images
schedule
    which blocks each stage trains, from where, and how fast
activations, feeds
    what crosses a boundary, in a memory-mapped file; batches of it
labels, examples, head
    class numbers and weights; images with them; stage 0, which is convex
training (checkpoint, progress), network, tuning
    one stage; the whole way of an image; stage after stage
classifier (parameters, prediction, tuned)
    FineTunedImageClassifier; its network as the source of the next
self_training
    what a classifier is sure of in another domain, as labels to learn from
cost
    what a search will cost, before it is fitted
strategy (evidence, data_warnings)
    whether to freeze or to tune, and what to mind
display
    augmented images to look at
demo, cli
    the command line
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
    from sktransfer.self_training import SelfTrainedImageClassifier

# What needs skorch, or the whole of scikit-learn's model selection, is imported when it is used.
_LATER = {
    "BackboneRanking": "sktransfer.diagnostics.ranking",
    "Cost": "sktransfer.diagnostics.cost",
    "FineTunedImageClassifier": "sktransfer.classifier",
    "LeakReport": "sktransfer.diagnostics.leaks",
    "SelfTrainedImageClassifier": "sktransfer.self_training",
    "StrategyReport": "sktransfer.diagnostics.strategy",
    "estimate_cost": "sktransfer.diagnostics.cost",
    "find_leaks": "sktransfer.diagnostics.leaks",
    "rank_backbones": "sktransfer.diagnostics.ranking",
    "recommend_strategy": "sktransfer.diagnostics.strategy",
}

__all__ = [
    "AugmentationDisplay",
    "BackboneRanking",
    "Cost",
    "EmbeddingStore",
    "FineTunedImageClassifier",
    "ImageError",
    "LeakReport",
    "Preprocessing",
    "PretrainedFeatureExtractor",
    "SelfTrainedImageClassifier",
    "StrategyReport",
    "WeightsNotFoundError",
    "__version__",
    "estimate_cost",
    "find_leaks",
    "list_backbones",
    "load_image_folder",
    "rank_backbones",
    "recommend_strategy",
    "resolve_augmentation",
    "session_store",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
