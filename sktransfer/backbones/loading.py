"""Backbones by name: ordered blocks, the preprocessing of their weights, and a digest."""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sktransfer.backbones.blocks import BlockList
from sktransfer.backbones.frozen import freeze
from sktransfer.backbones.sources import (
    LoadedNetwork,
    describe_code,
    is_weights_file,
    load_named,
    load_user_network,
)
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.backbones.weights import digest_tensors, load_state_dict
from sktransfer.data.images import Images
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import check_choice
from sktransfer.utils.runtime import limit_threads_after_fork

# In pretraining things look larger, by this factor, than in the middle of a whole image ...
_WHOLE_IMAGE_SCALE = 9 / 7
# ... if that image's size is at least so many times the size of the crop. And images whose size
# is less than the network's own divided by this hold too little to be enlarged further.
_USUAL_MARGIN = 8 / 7
_THUMBNAIL_DIVISOR = 4

# Backbones that a process keeps in memory, so that clones and folds share one copy.
_MAX_BACKBONES = 3


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network as an ordered list of blocks, and what it expects of an image.

    Parameters
    ----------
    name : str
    block_list : BlockList
        Blocks from image to last feature map, and what follows.
    preprocessing : Preprocessing
        Comes with the weights.
    digest : bytes
        16 bytes that identify architecture and weights, BatchNorm statistics included.
    build : callable
        Builds the whole network anew, with the state dict that its files have.
    categories : tuple of str
        Names of the logits; empty if unknown.
    from_library : bool
        Whether a library built the network, rather than a user's code.
    pretrained : bool
        Whether the weights are those that the preprocessing came with.
    """

    name: str
    block_list: BlockList
    preprocessing: Preprocessing
    digest: bytes
    build: Callable[[], nn.Module]
    categories: tuple[str, ...] = ()
    from_library: bool = True
    pretrained: bool = False

    def image_size_for(self, asked: Any, images: Images) -> Any:
        """Resolve the size that images should have: `asked` itself, unless it is `"auto"`.

        Pretraining crops parts of images and enlarges them, so things look larger in it than in
        the middle of a whole image, which is what most weights' preprocessing shows. Whole images
        in 9/7 of the size, 288 x 288 for 224 x 224, make up for that. Weights with a narrow
        margin were made for their own size, and small images hold too little: `"auto"` is None
        for these. Source: Touvron et al., "Fixing the train-test resolution discrepancy",
        NeurIPS 2019.

        Raises
        ------
        ValueError
            If `asked` is a word other than `"auto"`.
        """
        if not isinstance(asked, str):
            return asked
        check_choice("image_size", asked, ["auto"])
        resize, crop = self.preprocessing.resize, self.preprocessing.crop
        if not self.pretrained or self.block_list.image_size is not None:
            return None
        if not isinstance(resize, int) or resize < _USUAL_MARGIN * min(crop):
            return None
        if not images.mostly_at_least(min(crop) // _THUMBNAIL_DIVISOR):
            return None
        return tuple(32 * round(_WHOLE_IMAGE_SCALE * side / 32) for side in crop)

    @property
    def n_bytes(self) -> int:
        """Memory of the network up to its penultimate vector."""
        parts = [*(block for _, block in self.block_list.blocks), self.block_list.pre_logits]
        return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())


def load_backbone(backbone: Any, weights: Any = "default") -> Backbone:
    """Load a backbone, or return the one that this process has loaded before.

    Parameters
    ----------
    backbone : str, Module, callable or fitted classifier
        A name of `list_backbones`, `"timm:NAME"`, `"PREFIX:NAME"` of a registered source, a module
        (which is copied and left as it is), or a callable that builds one. A module may have an
        attribute `preprocessing` (a `Preprocessing`); otherwise it gets ImageNet's. A fitted
        `FineTunedImageClassifier`, itself or in a `FrozenEstimator`, is its tuned network.
    weights : str, path or None
        `"default"`, a name of torchvision's such as `"IMAGENET1K_V2"`, a `.safetensors` or `.pth`
        file, or `None` for random values, the same ones every time.

    Returns
    -------
    Backbone

    Raises
    ------
    ValueError
        If backbone or weights are unknown, or do not fit each other.
    WeightsNotFoundError
        Within a second, if the weights are neither on this machine nor reachable.

    Examples
    --------
    >>> backbone = load_backbone("efficientnet_lite0")
    >>> [name for name, _ in backbone.block_list.blocks][:3]
    ['stem', 'block0', 'block1']
    """
    limit_threads_after_fork()
    if isinstance(backbone, str):
        return _load_named(backbone, *_stamp(weights))
    if hasattr(backbone, "as_backbone"):
        if weights != "default":
            raise ValueError(
                f"Got weights={weights!r} with a fitted classifier as backbone, which brings its "
                "own; leave weights at 'default'"
            )
        return backbone.as_backbone()
    loaded = load_user_network(backbone, weights)
    described = [*describe_code(loaded.model), repr(astuple(loaded.preprocessing))]
    digest = digest_tensors(loaded.model.state_dict().items(), *described)

    def assemble() -> Backbone:
        own = loaded._replace(model=copy.deepcopy(loaded.model).cpu())
        build = partial(copy.deepcopy, own.model)
        return replace(_assemble(own, digest, build), from_library=False)

    return keep_backbone(digest, assemble)


def keep_backbone(digest: bytes, make: Callable[[], Backbone]) -> Backbone:
    """Build a backbone, or return the one that this process has built before."""
    with _making:
        found = _made.pop(digest, None) or make()
        _made[digest] = found  # the most recently used
        while len(_made) > _MAX_BACKBONES:
            _made.popitem(last=False)
    return found


_made: OrderedDict[bytes, Backbone] = OrderedDict()
_making = threading.RLock()


@lru_cache(maxsize=_MAX_BACKBONES)
def _load_named(name: str, weights: str | None, stamp: tuple[int, int] | None) -> Backbone:
    """Load by name; `stamp` tells a weights file that changed from the old one."""
    loaded = load_named(name, weights)
    digest = digest_tensors(loaded.model.state_dict().items(), name)
    return _assemble(loaded, digest, lambda: load_named(name, weights).model)


def _stamp(weights: Any) -> tuple[str | None, tuple[int, int] | None]:
    """Return a key for weights: their name, and size and time if they are a file."""
    if weights is None:
        return None, None
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"Got weights={weights!r}, but expected 'default', a name of torchvision's such as "
            "'IMAGENET1K_V2', the path of a .safetensors or .pth file, or None for random values"
        )
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
        freeze(part)  # the modules that group others into blocks are new
    preprocessing = loaded.preprocessing
    if block_list.image_size not in (None, *preprocessing.crop):
        # A vision transformer of another size than the one that is usual under its name.
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
