"""Sources of backbones: functions that build a network by name and load its weights."""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sktransfer.backbones.efficientnet_lite import (
    LITE_VARIANTS,
    efficientnet_lite,
    load_strictly,
    weights_path,
)
from sktransfer.backbones.torchvision_blocks import (
    build_torchvision,
    list_torchvision,
    torchvision_weights,
)
from sktransfer.backbones.weights import fetch, load_state_dict, require_reachable
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import did_you_mean, import_optional
from sktransfer.utils.runtime import seeded


class LoadedNetwork(NamedTuple):
    """A network as its source built it.

    Parameters
    ----------
    name : str
    model : nn.Module
        Maps normalized float images (N, 3, H, W) to logits (N, K).
    preprocessing : Preprocessing
        The preprocessing of the weights.
    categories : tuple of str
        Names of the logits; empty if unknown.
    pretrained : bool
        Whether the weights are those that the preprocessing belongs to, so that the `"auto"`
        image size applies.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] = ()
    pretrained: bool = False


def load_named(name: str, weights: str | None) -> LoadedNetwork:
    """Load a network by its name.

    Parameters
    ----------
    name : str
        A name of `list_backbones`, or `"PREFIX:NAME"` with the prefix of a source.
    weights : str or None
        `"default"`, the name of torchvision weights, a file, or `None` for random values.

    Raises
    ------
    ValueError
        If the name is unknown, or the weights do not fit the network.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix in SOURCES:
        return SOURCES[prefix](rest, weights)
    if name in LITE_VARIANTS:
        return _load_lite(name, weights)
    if name in list_torchvision():
        return _load_torchvision(name, weights)
    prefixed = ", ".join(f"'{prefix}:NAME'" for prefix in SOURCES)
    raise ValueError(
        f"Got backbone={name!r}, but expected one of list_backbones() or {prefixed}"
        f"{did_you_mean(name, list_names())}"
    )


def build_named(name: str, state: Mapping[str, Tensor], *, pretrained: bool) -> nn.Module:
    """Build a network by its name, with the weights of a state dict.

    Parameters
    ----------
    name : str
        As for `load_named`.
    state : mapping of str to Tensor
        The network uses its tensors without a copy if it can.
    pretrained : bool
        Whether the weights are those that the name's preprocessing belongs to.

    Raises
    ------
    ValueError
        If the name is unknown, or the state dict is that of another network.
    """
    if pretrained and name in LITE_VARIANTS:
        return efficientnet_lite(name, state)
    if pretrained and name in list_torchvision():
        return build_torchvision(name, state_dict=state)
    model = load_named(name, None).model
    load_strictly(model, state, name)
    return model


def list_names() -> list[str]:
    """List the names of the networks without a prefix."""
    return [*LITE_VARIANTS, *list_torchvision()]


def register_source(prefix: str, load: Callable[[str, str | None], LoadedNetwork]) -> None:
    """Register a source of networks for `backbone="PREFIX:NAME"`.

    Every process that loads such a backbone must register it, workers of a parallel search
    included.

    Parameters
    ----------
    prefix : str
    load : callable
        Maps NAME and weights (`"default"`, a path, or `None` for random values) to a
        `LoadedNetwork`. Equal arguments must give equal networks.

    Raises
    ------
    ValueError
        If the prefix contains a colon, or belongs to another source.
    """
    if not prefix or ":" in prefix or SOURCES.get(prefix, load) is not load:
        raise ValueError(
            f"Got the prefix {prefix!r}, but expected a word without a colon other than "
            f"{', '.join(map(repr, SOURCES))}; choose another prefix"
        )
    SOURCES[prefix] = load


def load_user_network(source: Any, weights: Any) -> LoadedNetwork:
    """Load a user's module, or call a function that builds one.

    Parameters
    ----------
    source : Module or callable
        A module may have an attribute `preprocessing`; otherwise ImageNet's is used.
    weights : "default" or path
        `"default"` keeps the weights of the module.

    Raises
    ------
    TypeError
        If `source` is neither, or does not build a module.
    ValueError
        If the weights are not a file, or do not fit.
    """
    if not callable(source):
        raise TypeError(
            f"Got backbone={source!r}, but expected a name (see list_backbones()), 'timm:NAME', a "
            "torch.nn.Module, a callable that builds one, or a fitted FineTunedImageClassifier"
        )
    name = getattr(source, "__name__", type(source).__name__).lower()
    if isinstance(source, nn.Module):
        model = source if weights == "default" else copy.deepcopy(source)
    else:
        with seeded():
            model = source()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Got backbone={source!r}, which built a {type(model).__name__}, but expected a "
            "torch.nn.Module"
        )
    if weights != "default":
        model.load_state_dict(load_state_dict(_file(name, weights)))
    return LoadedNetwork(name, model, getattr(model, "preprocessing", Preprocessing()))


def describe_code(model: nn.Module) -> list[str]:
    """Describe the computation of a user's modules: their code, structure and plain settings."""
    described = [repr(model)]
    kinds: set[type] = {type(module) for module in model.modules()}
    for kind in sorted(kinds, key=repr):
        if kind.__module__.split(".")[0] not in ("torch", "torchvision", "timm"):
            described.append(_source(kind))
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
        described.append(f"{name}{sorted((k, v) for k, v in plain.items() if k != 'training')}")
    return described


# Python 3.11 fails if two threads parse code at once (python/cpython issue 106905).
_parsing = threading.Lock()


@lru_cache(maxsize=1024)
def _source(kind: type) -> str:
    """Return the source code of a class, or its name if there is none."""
    try:
        with _parsing:
            return inspect.getsource(kind)
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


def is_weights_file(weights: str | os.PathLike[str]) -> bool:
    """Return whether weights are the path of a file rather than a name."""
    path = Path(weights)
    return isinstance(weights, os.PathLike) or path.suffix in (".safetensors", ".pth", ".pt")


def _load_lite(name: str, weights: str | None) -> LoadedNetwork:
    state = None
    if weights is not None:
        path = weights_path(name) if weights == "default" else _file(name, weights)
        state = load_state_dict(path)
    size = LITE_VARIANTS[name].image_size
    preprocessing = Preprocessing(
        resize=size + 32,
        crop=(size, size),
        interpolation="bicubic",
        # This is (x - 127) / 128 on pixels of 0-255.
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
    categories = _imagenet_categories() if weights == "default" else ()
    network = efficientnet_lite(name, state)
    return LoadedNetwork(name, network, preprocessing, categories, pretrained=weights is not None)


def _load_torchvision(name: str, weights: str | None) -> LoadedNetwork:
    is_file = weights is not None and is_weights_file(weights)
    member = torchvision_weights(name, "default" if weights is None or is_file else weights)
    preprocessing = Preprocessing.from_torchvision(member.transforms())
    if weights is None:
        return LoadedNetwork(name, build_torchvision(name), preprocessing)
    state = load_state_dict(weights if is_file else fetch(member.url, name))
    model = build_torchvision(name, state_dict=state)
    categories = () if is_file else tuple(member.meta["categories"] or ())
    return LoadedNetwork(name, model, preprocessing, categories, pretrained=True)


def _load_timm(architecture: str, weights: str | None) -> LoadedNetwork:
    name = f"timm:{architecture}"
    timm = import_optional("timm", extra="timm", purpose=f"backbone={name!r}")
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
    return LoadedNetwork(name, model, preprocessing)


def _timm_file(name: str, config: Any) -> Path:
    """Return a timm model's file in the Hugging Face cache, or download it."""
    hub = import_optional("huggingface_hub", extra="timm", purpose=f"backbone={name!r}")
    repository, file = config.hf_hub_id, config.hf_hub_filename or "model.safetensors"
    if not repository:
        raise ValueError(
            f"Got backbone={name!r} with weights='default', but timm has no pretrained weights "
            "for it; pass a file (weights='model.safetensors') or weights=None"
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


def _file(name: str, weights: Any) -> str:
    if weights is None or not is_weights_file(weights):
        raise ValueError(
            f"Got weights={weights!r} for the backbone {name!r}, but expected 'default' or the "
            "path of a .safetensors or .pth file"
        )
    return str(weights)


@lru_cache(maxsize=1)
def _imagenet_categories() -> tuple[str, ...]:
    return tuple(torchvision_weights("resnet50", "default").meta["categories"])


# Functions that load a network, by prefix.
SOURCES: dict[str, Callable[[str, str | None], LoadedNetwork]] = {"timm": _load_timm}
