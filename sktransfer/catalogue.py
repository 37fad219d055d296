"""The table of backbones that can be used by name."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from sktransfer.architectures import dissect, list_torchvision, skeleton, torchvision_weights
from sktransfer.backbones import LITE0
from sktransfer.weights import hub_path


class BackboneInfo(NamedTuple):
    """One row of `list_backbones`.

    Parameters
    ----------
    name : str
    parameters : int
    gflops : float
        Billions of multiply-adds for one picture of the size that the weights were made for.
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
    """Rows of backbones that show as a table; `pandas.DataFrame(table)` makes a frame of it."""

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
        lines = [self._HEADER, *self._cells()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self._HEADER))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in (0, 5) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        def line(tag: str, cells: tuple[str, ...]) -> str:
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line("td", cells) for cells in self._cells())
        return f"<table><thead>{line('th', self._HEADER)}</thead><tbody>{body}</tbody></table>"


def list_backbones(contains: str = "") -> BackboneTable:
    """List the backbones that can be used by name.

    Beside these, `"timm:NAME"` takes any model of timm, where that is installed.

    Parameters
    ----------
    contains : str
        Only names that contain this.

    Returns
    -------
    BackboneTable
        A tuple of `BackboneInfo`, sorted by name, that shows as a table.

    Examples
    --------
    >>> list_backbones("lite")
    name                parameters  GFLOPs  features  ImageNet top-1  on this machine
    efficientnet_lite0       4.7 M    0.41      1280           75.1%  yes
    """
    names = sorted(name for name in [LITE0, *list_torchvision()] if contains in name)
    return BackboneTable(_info(name) for name in names)


def _info(name: str) -> BackboneInfo:
    if name == LITE0:
        # Accuracy and multiply-adds as published with the TensorFlow original.
        return BackboneInfo(name, 4_652_008, 0.407, 1280, 0.751, True)
    member = torchvision_weights(name, "default")
    meta = member.meta
    return BackboneInfo(
        name,
        meta["num_params"],
        meta["_ops"],
        _penultimate_width(name),
        meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100,
        hub_path(member.url).is_file(),
    )


def _penultimate_width(name: str) -> int:
    """Read the size of the penultimate vector off the network's last layer."""
    layers = [m for m in dissect(skeleton(name)).logits.modules() if hasattr(m, "weight")]
    classifying = [layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    return classifying.weight.shape[1]
