"""Backbones by name: ordered blocks, the preprocessing of their weights, and a digest."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sktransfer.backbones.blocks import BlockList
from sktransfer.backbones.frozen import freeze
from sktransfer.backbones.saved import SavedWeights
from sktransfer.backbones.sources import (
    LoadedNetwork,
    describe_code,
    is_weights_file,
    load_named,
    load_user_network,
)
from sktransfer.backbones.torchvision_blocks import split_into_blocks, weights_name
from sktransfer.backbones.weights import digest_tensors, load_state_dict
from sktransfer.data.images import Images
from sktransfer.transforms.preprocessing import Preprocessing, check_image_size
from sktransfer.utils.memory import MemoryCache
from sktransfer.utils.runtime import limit_threads_after_fork

# In pretraining, objects look larger by this factor than in the center crop of a whole image, ...
_WHOLE_IMAGE_SCALE = 9 / 7
# ... if images are resized to at least this many times the size of the crop.
_USUAL_MARGIN = 8 / 7
# Images smaller than the network's size divided by this are enlarged to this share of it.
_THUMBNAIL_DIVISOR, _THUMBNAIL_SCALE = 4, 3 / 7


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network as an ordered list of blocks, with its preprocessing.

    Parameters
    ----------
    name : str
    block_list : BlockList
        Blocks from image to last feature map, and the layers after them.
    preprocessing : Preprocessing
        The preprocessing of the weights.
    digest : bytes
        16 bytes that identify architecture and weights, BatchNorm statistics included.
    build : callable
        Builds a new copy of the whole network, with the state dict of its weights file.
    categories : tuple of str
        Names of the logits; empty if unknown.
    from_library : bool
        Whether the network comes from a library rather than from a user's code.
    pretrained : bool
        Whether the weights are those that the preprocessing belongs to.
    """

    name: str
    block_list: BlockList
    preprocessing: Preprocessing
    digest: bytes
    build: Callable[[], nn.Module]
    categories: tuple[str, ...] = ()
    from_library: bool = True
    pretrained: bool = False

    def image_size_for(self, image_size: Any, images: Images) -> Any:
        """Resolve the image size: `image_size` itself, unless it is `"auto"`.

        Pretraining enlarges crops of images, so objects look larger than in a center crop, the
        usual preprocessing of weights. Larger images, by a factor of 9/7, compensate for that:
        288 x 288 instead of 224 x 224. Images below 56 x 56 become 96 x 96: they have too little
        detail for more, which would take five times as long. `"auto"` is None for weights whose
        preprocessing leaves a narrow margin around the crop. Source:
        Touvron et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019.

        Raises
        ------
        ValueError
            If `image_size` is not a size.
        """
        check_image_size(image_size, options=("auto",))
        if not isinstance(image_size, str):
            return image_size
        resize, crop = self.preprocessing.resize, self.preprocessing.crop
        if not self.pretrained or self.block_list.image_size is not None:
            return None
        if not isinstance(resize, int) or resize < _USUAL_MARGIN * min(crop):
            return None
        is_small = not images.mostly_at_least(min(crop) // _THUMBNAIL_DIVISOR)
        scale = _THUMBNAIL_SCALE if is_small else _WHOLE_IMAGE_SCALE
        return tuple(32 * round(scale * side / 32) for side in crop)

    @property
    def n_bytes(self) -> int:
        """Memory of the network up to its penultimate vector, in bytes."""
        parts = [*(block for _, block in self.block_list.blocks), self.block_list.pre_logits]
        return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())


def load_backbone(backbone: Any, weights: Any = "default") -> Backbone:
    """Load a backbone, or return the same one if this process has loaded it before.

    Parameters
    ----------
    backbone : str, Module, callable or fitted classifier
        A name of `list_backbones`, `"timm:NAME"`, `"PREFIX:NAME"` of a registered source, a module
        (which is copied, never changed), or a callable that builds one. A module may have an
        attribute `preprocessing` (a `Preprocessing`); otherwise ImageNet's is used. A fitted
        `FineTunedImageClassifier`, or one in a `FrozenEstimator`, means its tuned network.
    weights : str, path, torchvision weights or None
        `"default"`, a torchvision name such as `"IMAGENET1K_V2"`, its member such as
        `ResNet50_Weights.IMAGENET1K_V2`, a `.safetensors` or `.pth` file, or `None` for random
        values, which are the same every time.

    Returns
    -------
    Backbone

    Raises
    ------
    ValueError
        If the backbone or the weights are unknown, or do not fit each other.
    WeightsNotFoundError
        Within a second, if the weights are neither on this machine nor reachable.

    Examples
    --------
    >>> backbone = load_backbone("efficientnet_lite0")
    >>> backbone.block_list.names[:3]
    ['stem', 'block0', 'block1']
    """
    limit_threads_after_fork()
    if isinstance(weights, SavedWeights):
        return _load_saved(backbone, weights)
    weights = _check_weights(backbone, weights)
    if isinstance(backbone, str):
        return _load_named(backbone, *_stamp(weights))
    if hasattr(backbone, "as_backbone"):
        if weights != "default":
            raise ValueError(
                f"Got weights={weights!r} with a fitted classifier as backbone, which has its "
                "own weights; leave weights at 'default'"
            )
        return backbone.as_backbone()
    loaded = load_user_network(backbone, weights)
    digest = _digest_of_user_network(loaded)

    def assemble() -> Backbone:
        copied = loaded._replace(model=copy.deepcopy(loaded.model).cpu())
        build = partial(copy.deepcopy, copied.model)
        return replace(_assemble(copied, digest, build), from_library=False)

    return keep_backbone(digest, assemble)


def _load_saved(backbone: Any, weights: SavedWeights) -> Backbone:
    """Build a network with saved weights, once per process."""

    def load() -> Backbone:
        loaded = weights.fill(backbone)
        is_named = isinstance(backbone, str)
        digest = (
            digest_tensors(loaded.model.state_dict().items(), backbone)
            if is_named
            else _digest_of_user_network(loaded)
        )
        assembled = _assemble(loaded, digest, lambda: weights.fill(backbone).model)
        return replace(assembled, from_library=is_named)

    return keep_backbone((weights.fingerprint, backbone), load)


def _digest_of_user_network(loaded: LoadedNetwork) -> bytes:
    described = [*describe_code(loaded.model), repr(astuple(loaded.preprocessing))]
    return digest_tensors(loaded.model.state_dict().items(), *described)


# Backbones that this process keeps in memory, so that clones, folds and estimators share one copy.
_backbones: MemoryCache[Backbone] = MemoryCache(at_least=3)


def keep_backbone(key: Hashable, make: Callable[[], Backbone]) -> Backbone:
    """Build a backbone, or return the same one if this process has built it before."""
    return _backbones.get(key, make, lambda backbone: backbone.n_bytes)


def _load_named(name: str, weights: str | None, stamp: tuple[int, int] | None) -> Backbone:
    """Load a backbone by name; `stamp` changes when a weights file changes."""

    def load() -> Backbone:
        loaded = load_named(name, weights)
        digest = digest_tensors(loaded.model.state_dict().items(), name)
        return _assemble(loaded, digest, lambda: load_named(name, weights).model)

    return keep_backbone((name, weights, stamp), load)


def _check_weights(backbone: Any, weights: Any) -> str | os.PathLike[str] | None:
    """Check the type of weights, and return the name of torchvision's weights."""
    weights = weights_name(backbone, weights)
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"Got weights={weights!r}, but expected 'default', a torchvision name such as "
            "'IMAGENET1K_V2', the path of a .safetensors or .pth file, or None for random values"
        )
    return weights


def _stamp(weights: Any) -> tuple[str | None, tuple[int, int] | None]:
    """Return a key for weights: their name, and the size and modification time of a file."""
    if weights is None:
        return None, None
    if not is_weights_file(weights):
        return str(weights), None
    path = Path(weights).expanduser()
    if not path.is_file():
        load_state_dict(path)  # raises an error that names the missing file
    status = path.stat()
    return str(path), (status.st_size, status.st_mtime_ns)


def _assemble(loaded: LoadedNetwork, digest: bytes, build: Callable[[], nn.Module]) -> Backbone:
    block_list = split_into_blocks(freeze(loaded.model.to(memory_format=torch.channels_last)))
    for part in (
        *(block for _, block in block_list.blocks),
        block_list.pre_logits,
        block_list.logits,
    ):
        freeze(part)  # new modules group the layers into blocks
    preprocessing = loaded.preprocessing
    if block_list.image_size not in (None, *preprocessing.crop):
        # A vision transformer with another image size than usual for its name.
        preprocessing = preprocessing.with_image_size(block_list.image_size)
    return Backbone(
        loaded.name,
        block_list,
        preprocessing,
        digest,
        build,
        loaded.categories,
        pretrained=loaded.pretrained,
    )
