"""The table of backbones that can be used by name."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import nn

from sktransfer.backbones.efficientnet_lite import LITE_VARIANTS, weights_path
from sktransfer.backbones.sources import list_names
from sktransfer.backbones.torchvision_blocks import (
    build_on_meta,
    split_into_blocks,
    torchvision_weights,
)
from sktransfer.backbones.weights import hub_path
from sktransfer.utils.errors import WeightsNotFoundError
from sktransfer.utils.tables import html_table, text_table

# Sizes of the penultimate vectors, listed because building all networks takes seconds.
_FEATURES = {
    400: "regnet_x_400mf",
    440: "regnet_y_400mf",
    512: "maxvit_t resnet18 resnet34 squeezenet1_0 squeezenet1_1",
    672: "regnet_x_800mf",
    768: ("convnext_small convnext_tiny swin_s swin_t swin_v2_s swin_v2_t vit_b_16 vit_b_32"),
    784: "regnet_y_800mf",
    888: "regnet_y_1_6gf",
    912: "regnet_x_1_6gf",
    1008: "regnet_x_3_2gf",
    1024: (
        "convnext_base densenet121 googlenet mobilenet_v3_small shufflenet_v2_x0_5 "
        "shufflenet_v2_x1_0 shufflenet_v2_x1_5 swin_b swin_v2_b vit_l_16 vit_l_32"
    ),
    1280: (
        "efficientnet_b0 efficientnet_b1 efficientnet_v2_l efficientnet_v2_m "
        "efficientnet_v2_s mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 "
        "mobilenet_v3_large vit_h_14"
    ),
    1408: "efficientnet_b2",
    1512: "regnet_y_3_2gf",
    1536: "convnext_large efficientnet_b3",
    1664: "densenet169",
    1792: "efficientnet_b4",
    1920: "densenet201 regnet_x_8gf",
    2016: "regnet_y_8gf",
    2048: (
        "efficientnet_b5 inception_v3 regnet_x_16gf resnet101 resnet152 resnet50 "
        "resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x2_0 "
        "wide_resnet101_2 wide_resnet50_2"
    ),
    2208: "densenet161",
    2304: "efficientnet_b6",
    2520: "regnet_x_32gf",
    2560: "efficientnet_b7",
    3024: "regnet_y_16gf",
    3712: "regnet_y_32gf",
    4096: "alexnet vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
    7392: "regnet_y_128gf",
}


# Parameters, billions of multiply-adds and accuracy, the last two as published for TensorFlow.
_LITE_FACTS = {
    "efficientnet_lite0": (4_652_008, 0.407, 0.751),
    "efficientnet_lite1": (5_416_680, 0.631, 0.767),
    "efficientnet_lite2": (6_092_072, 0.899, 0.776),
}


class BackboneInfo(NamedTuple):
    """A row of the table that `list_backbones` returns.

    Parameters
    ----------
    name : str
    parameters : int
    gflops : float
        Billions of multiply-adds for one image of the size that the weights were trained for.
    features : int
        Size of the penultimate embedding.
    accuracy : float
        Published top-1 accuracy on ImageNet-1K, 0-1, of the default weights.
    local : bool
        Whether the default weights are on this machine.
    """

    name: str
    parameters: int
    gflops: float
    features: int
    accuracy: float
    local: bool


class BackboneTable(tuple[BackboneInfo, ...]):
    """Rows of backbones, shown as a table; `pandas.DataFrame(table)` converts them."""

    _HEADER = ("name", "parameters", "GFLOPs", "features", "ImageNet top-1", "on this machine")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                f"{row.parameters / 1e6:.1f} M",
                f"{row.gflops:.2f}",
                str(row.features),
                f"{row.accuracy:.1%}",
                "yes" if row.local else "",
            )
            for row in self
        ]

    def __repr__(self) -> str:
        return text_table(self._HEADER, self._cells(), left=(0, 5))

    def _repr_html_(self) -> str:
        return html_table(self._HEADER, self._cells(), left=(0, 5))


def list_backbones(contains: str = "") -> BackboneTable:
    """List the backbones that can be used by name.

    In addition, `"timm:NAME"` is any model of timm, if timm is installed.

    Parameters
    ----------
    contains : str
        Only list names that contain this text.

    Returns
    -------
    BackboneTable
        A tuple of `BackboneInfo`, sorted by name, shown as a table.

    Raises
    ------
    TypeError
        If `contains` is not a string.

    Examples
    --------
    >>> list_backbones("lite")
    name                parameters  GFLOPs  features  ImageNet top-1  on this machine
    efficientnet_lite0       4.7 M    0.41      1280           75.1%  yes
    efficientnet_lite1       5.4 M    0.63      1280           76.7%  yes
    efficientnet_lite2       6.1 M    0.90      1280           77.6%  yes
    """
    if not isinstance(contains, str):
        raise TypeError(
            f"Got contains={contains!r}, but expected a part of a name, such as 'resnet'; '' lists "
            "all backbones"
        )
    names = sorted(name for name in list_names() if contains in name)
    return BackboneTable(_info(name) for name in names)


def _info(name: str) -> BackboneInfo:
    if name in LITE_VARIANTS:
        parameters, gflops, accuracy = _LITE_FACTS[name]
        return BackboneInfo(name, parameters, gflops, 1280, accuracy, _is_installed(name))
    member = torchvision_weights(name, "default")
    meta = member.meta
    return BackboneInfo(
        name,
        meta["num_params"],
        meta["_ops"],
        _features(name),
        meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100,
        hub_path(member.url).is_file(),
    )


def _is_installed(name: str) -> bool:
    try:
        return weights_path(name).is_file()
    except WeightsNotFoundError:
        return False


@lru_cache
def _features_by_name() -> dict[str, int]:
    return {name: size for size, names in _FEATURES.items() for name in names.split()}


def _features(name: str) -> int:
    return _features_by_name().get(name) or measure_features(name)


def measure_features(name: str) -> int:
    """Compute the size of the penultimate vector of a torchvision network from its structure."""
    layers = [
        m for m in split_into_blocks(build_on_meta(name)).logits.modules() if hasattr(m, "weight")
    ]
    classifying = [layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    return classifying.weight.shape[1]
