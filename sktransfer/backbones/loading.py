"""Backbones by name: ordered blocks, the preprocessing of their weights, and a digest."""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sktransfer.backbones.blocks import BlockList
from sktransfer.backbones.efficientnet_lite import efficientnet_lite0, weights_path
from sktransfer.backbones.frozen import freeze
from sktransfer.backbones.torchvision_blocks import (
    build_torchvision,
    list_torchvision,
    split_into_blocks,
    torchvision_weights,
)
from sktransfer.backbones.weights import digest_tensors, fetch, load_state_dict, require_reachable
from sktransfer.data.images import Images
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import check_choice, did_you_mean, import_optional
from sktransfer.utils.runtime import limit_threads_after_fork, seeded

LITE0 = "efficientnet_lite0"

# (x - 127) / 128 on pixels of 0-255.
_LITE0_PREPROCESSING = Preprocessing(
    interpolation="bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)

# In pretraining things look so many times larger than in the middle of a whole image, where the
# size of that image is at least so many times the size of what is cut out of it; and so many
# times smaller than the network's own side, images hold too little to be enlarged further.
_LARGER, _MARGIN, _TINY = 9 / 7, 8 / 7, 4

# Backbones kept in memory by a process, so that clones and folds share one copy.
_KEPT = 3


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
        Makes the network anew, whole, with the state dict that its files have.
    categories : tuple of str
        Names of the logits; empty where unknown.
    known : bool
        Whether a library makes the network, rather than code of the user's.
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
        """Find the size that images are to have: what is asked for, but what `"auto"` means.

        Pretraining cuts pieces out of images and enlarges them, so things look larger in it than
        in the middle of a whole image, which is what most weights' preprocessing shows. Whole
        images in 9/7 of the size, 288 x 288 for 224 x 224, make up for that. Weights with a
        narrow margin were made for their own size; small images hold too little. Source: Touvron
        et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019.

        Raises
        ------
        ValueError
            For a word that is not `"auto"`.
        """
        if not isinstance(asked, str):
            return asked
        check_choice("image_size", asked, ["auto"])
        resize, crop = self.preprocessing.resize, self.preprocessing.crop
        if not self.pretrained or self.block_list.image_size is not None:
            return None
        if not isinstance(resize, int) or resize < _MARGIN * min(crop):
            return None
        if not images.mostly_at_least(min(crop) // _TINY):
            return None
        return tuple(32 * round(_LARGER * side / 32) for side in crop)

    @property
    def n_bytes(self) -> int:
        """What the network takes in memory, up to its penultimate vector."""
        parts = [*(block for _, block in self.block_list.blocks), self.block_list.pre_logits]
        return sum(each.nbytes for part in parts for each in part.state_dict().values())


class _Loaded(NamedTuple):
    """What a source of backbones gives: a network and what is known about it."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] = ()


def load_backbone(backbone: Any, weights: Any = "default") -> Backbone:
    """Load a backbone, or find it where this process has loaded it before.

    Parameters
    ----------
    backbone : str, Module, callable or fitted classifier
        A name of `list_backbones`, `"timm:NAME"`, a module (which is copied and left as it is), or
        a callable that makes one. A module may say what it expects of an image in an attribute
        `preprocessing` (a `Preprocessing`); otherwise it gets ImageNet's. A fitted
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
        Where backbone or weights are unknown, or do not fit each other.
    WeightsNotFoundError
        Within a second, where the weights are neither here nor within reach.

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
    loaded = _from_user(backbone, weights)
    described = [*_code(loaded.model), repr(astuple(loaded.preprocessing))]
    digest = digest_tensors(loaded.model.state_dict().items(), *described)

    def assemble() -> Backbone:
        own = loaded._replace(model=copy.deepcopy(loaded.model).cpu())
        build = partial(copy.deepcopy, own.model)
        return replace(_assemble(own, digest, build), from_library=False)

    return keep_backbone(digest, assemble)


def keep_backbone(digest: bytes, make: Callable[[], Backbone]) -> Backbone:
    """Make a backbone, or find it where this process has made it before."""
    with _making:
        found = _made.pop(digest, None) or make()
        _made[digest] = found  # the last to go
        while len(_made) > _KEPT:
            _made.popitem(last=False)
    return found


_made: OrderedDict[bytes, Backbone] = OrderedDict()
_making = threading.RLock()


@lru_cache(maxsize=_KEPT)
def _load_named(name: str, weights: str | None, stamp: tuple[int, int] | None) -> Backbone:
    """Load by name; `stamp` makes a weights file that changed another one."""
    loaded = _find_named(name, weights)
    digest = digest_tensors(loaded.model.state_dict().items(), name)
    backbone = _assemble(loaded, digest, lambda: _find_named(name, weights).model)
    return replace(backbone, pretrained=weights is not None and not name.startswith("timm:"))


def _find_named(name: str, weights: str | None) -> _Loaded:
    if name == LITE0:
        return _load_lite0(weights)
    if name.startswith("timm:"):
        return _load_timm(name, weights)
    if name in list_torchvision():
        return _load_torchvision(name, weights)
    raise ValueError(
        f"Got backbone={name!r}, but expected one of list_backbones() or 'timm:NAME'"
        f"{did_you_mean(name, [LITE0, *list_torchvision()])}"
    )


def _stamp(weights: Any) -> tuple[str | None, tuple[int, int] | None]:
    """Make weights a key: their name, and size and time where they are a file."""
    if weights is None:
        return None, None
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"Got weights={weights!r}, but expected 'default', a name of torchvision's such as "
            "'IMAGENET1K_V2', the path of a .safetensors or .pth file, or None for random values"
        )
    if not _is_file_name(weights):
        return str(weights), None
    path = Path(weights).expanduser()
    if not path.is_file():
        load_state_dict(path)  # says what is missing
    status = path.stat()
    return str(path), (status.st_size, status.st_mtime_ns)


def _is_file_name(weights: str | os.PathLike[str]) -> bool:
    path = Path(weights)
    return isinstance(weights, os.PathLike) or path.suffix in (".safetensors", ".pth", ".pt")


def _assemble(loaded: _Loaded, digest: bytes, build: Callable[[], nn.Module]) -> Backbone:
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
    return Backbone(loaded.name, block_list, preprocessing, digest, build, loaded.categories)


def _load_lite0(weights: str | None) -> _Loaded:
    state = None
    if weights is not None:
        state = load_state_dict(weights_path() if weights == "default" else _file(LITE0, weights))
    categories = _imagenet_categories() if weights == "default" else ()
    return _Loaded(LITE0, efficientnet_lite0(state), _LITE0_PREPROCESSING, categories)


def _load_torchvision(name: str, weights: str | None) -> _Loaded:
    own_file = weights is not None and _is_file_name(weights)
    member = torchvision_weights(name, "default" if weights is None or own_file else weights)
    preprocessing = Preprocessing.from_torchvision(member.transforms())
    if weights is None:
        return _Loaded(name, build_torchvision(name), preprocessing)
    state = load_state_dict(weights if own_file else fetch(member.url, name))
    model = build_torchvision(name, state_dict=state)
    categories = () if own_file else tuple(member.meta["categories"] or ())
    return _Loaded(name, model, preprocessing, categories)


def _load_timm(name: str, weights: str | None) -> _Loaded:
    timm = import_optional("timm", extra="timm", purpose=f"backbone={name!r}")
    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture):
        options = [f"timm:{model}" for model in timm.list_models()]
        raise ValueError(
            f"Got backbone={name!r}, but timm has no such model (timm.list_models() lists them all)"
            f"{did_you_mean(name, options)}"
        )
    if weights is None:
        with seeded():
            model = timm.create_model(architecture)
    else:
        config = timm.get_pretrained_cfg(architecture)
        path = _timm_file(name, config) if weights == "default" else _file(name, weights)
        overlay = {"state_dict": load_state_dict(path)}
        model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay)
    data = timm.data.resolve_model_data_config(model)
    height, width = data["input_size"][1:]
    preprocessing = Preprocessing(
        round(min(height, width) / data["crop_pct"]),
        (height, width),
        data["interpolation"],
        tuple(data["mean"]),
        tuple(data["std"]),
    )
    return _Loaded(name, model, preprocessing)


def _timm_file(name: str, config: Any) -> Path:
    """Find a timm model's file in the Hugging Face cache, or fetch it."""
    hub = import_optional("huggingface_hub", extra="timm", purpose=f"backbone={name!r}")
    repository, file = config.hf_hub_id, config.hf_hub_filename or "model.safetensors"
    if not repository:
        raise ValueError(
            f"Got backbone={name!r} with weights='default', but timm has no pretrained weights "
            "for it; give a file (weights='model.safetensors') or weights=None"
        )
    cached = hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    require_reachable(
        f"https://huggingface.co/{repository}/resolve/main/{file}",
        f"The weights of {name!r} are not on this machine: {file} of {repository} is not in "
        f"{hub.constants.HF_HUB_CACHE}",
        f"pass its path (weights='{file}')",
    )
    return Path(hub.hf_hub_download(repository, file))


def _from_user(source: Any, weights: Any) -> _Loaded:
    if not callable(source):
        raise TypeError(
            f"Got backbone={source!r}, but expected a name (see list_backbones()), 'timm:NAME', a "
            "torch.nn.Module, a callable that makes one, or a fitted FineTunedImageClassifier"
        )
    name = getattr(source, "__name__", type(source).__name__).lower()
    if isinstance(source, nn.Module):
        model = source if weights == "default" else copy.deepcopy(source)
    else:
        with seeded():
            model = source()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Got backbone={source!r}, which made a {type(model).__name__}, but expected a "
            "torch.nn.Module"
        )
    if weights != "default":
        model.load_state_dict(load_state_dict(_file(name, weights)))
    return _Loaded(name, model, getattr(model, "preprocessing", Preprocessing()))


def _file(name: str, weights: Any) -> str:
    if weights is None or not _is_file_name(weights):
        raise ValueError(
            f"Got weights={weights!r} for the backbone {name!r}, but expected 'default' or the "
            "path of a .safetensors or .pth file"
        )
    return str(weights)


def _code(model: nn.Module) -> list[str]:
    """Describe what a user's modules compute: their code, their layout, their plain settings."""
    described = [repr(model)]
    for kind in sorted({type(module) for module in model.modules()}, key=lambda kind: repr(kind)):
        if kind.__module__.split(".")[0] not in ("torch", "torchvision", "timm"):
            described.append(_source(kind))
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
        described.append(f"{name}{sorted((k, v) for k, v in plain.items() if k != 'training')}")
    return described


# Python 3.11 fails where two threads parse code at once (python/cpython issue 106905).
_parsing = threading.Lock()


def _source(kind: type) -> str:
    """Give the code of a class, or its name where there is no code."""
    try:
        with _parsing:
            return inspect.getsource(kind)
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


@lru_cache(maxsize=1)
def _imagenet_categories() -> tuple[str, ...]:
    return tuple(torchvision_weights("resnet50", "default").meta["categories"])
