"""The registry of engines, and the choice among them.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import torch

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.openvino_engine import OpenVINOEngine
from sktransfer.engines.torch_engine import TorchEngine
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import check_choice
from sktransfer.utils.runtime import is_fork

# By name. "auto" takes the last suitable engine; torch, the first one, is always suitable.
ENGINES: dict[str, type[FrozenEngine]] = {}


def register_engine(cls: type[FrozenEngine]) -> type[FrozenEngine]:
    """Register an engine under its `name`, for the parameter `engine` of the estimators.

    Every process that uses the engine must register it, workers of a parallel search included.

    Parameters
    ----------
    cls : subclass of FrozenEngine

    Returns
    -------
    type
        `cls` itself, so that this function can be a decorator.

    Raises
    ------
    ValueError
        If the name is `"auto"` or belongs to another engine.
    """
    if cls.name == "auto" or ENGINES.get(cls.name, cls) is not cls:
        raise ValueError(
            f"Got the engine {cls.__name__} with the name {cls.name!r}, but expected a name other "
            f"than {', '.join(map(repr, ['auto', *ENGINES]))}; rename it"
        )
    ENGINES[cls.name] = cls
    return cls


register_engine(TorchEngine)
register_engine(OpenVINOEngine)


def choose_engine(
    engine: str,
    device: torch.device,
    precision: torch.dtype,
    n_images: int,
    *,
    from_library: bool = True,
) -> str:
    """Return the name of the engine that runs a frozen prefix.

    All processes of a search make the same choice.

    Parameters
    ----------
    engine : {"auto", "torch", "openvino"} or the name of a registered engine
        `"auto"` is the last registered engine that supports the device and the precision and is
        worth starting. It is OpenVINO if OpenVINO is installed, the device is the CPU, the network
        comes from a library, and there are enough images. Otherwise it is torch.
    device : torch.device
    precision : torch.dtype
    n_images : int
        Images of the whole job, stored or not.
    from_library : bool
        Whether the network comes from a library.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If the engine is unknown, or does not support the device or the precision.

    Examples
    --------
    >>> choose_engine("auto", torch.device("cpu"), torch.float16, 1000)
    'torch'
    """
    check_choice("engine", engine, ["auto", *ENGINES])
    if engine == "auto":
        fork = is_fork()
        return next(
            name
            for name, cls in reversed(ENGINES.items())
            if cls.supports(device, precision)
            and cls.is_worth_starting(n_images, from_library=from_library, fork=fork)
        )
    if not ENGINES[engine].supports(device, precision):
        raise ValueError(
            f"Got engine={engine!r} with device={str(device)!r} and {precision}, but this "
            f"engine only runs {ENGINES[engine].supported}"
        )
    return engine


def create_engine(
    prefix: FrozenPrefix,
    preprocessing: Preprocessing,
    *,
    engine: str,
    device: torch.device,
    precision: torch.dtype,
    key: bytes,
    from_library: bool = True,
) -> FrozenEngine:
    """Build the engine that `choose_engine` has chosen.

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
        Its normalization runs inside the engine.
    engine : str
        Name of a registered engine.
    device : torch.device
    precision : torch.dtype
    key : bytes
        Identifies the computation of the prefix and the preprocessing.
    from_library : bool
        Whether the network comes from a library.

    Returns
    -------
    FrozenEngine

    Raises
    ------
    EngineError
        If the engine cannot run this network.
    ImportError
        If the library of the engine is not installed.
    """
    return ENGINES[engine](
        prefix, preprocessing, device, precision, key=key, from_library=from_library
    )


def engine_batch_size(engine: str, size: tuple[int, int], device: torch.device) -> int:
    """Return the number of images of `size` (height, width) that an engine should get at once."""
    return ENGINES[engine].batch_size(size, device)
