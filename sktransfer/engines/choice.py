"""Engines that run a frozen prefix: pixels in, embeddings out.

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import importlib.util

import torch

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.openvino_engine import PRECISIONS, OpenVINOEngine
from sktransfer.engines.torch_engine import TorchEngine
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import check_choice
from sktransfer.utils.runtime import is_fork

ENGINES = ("torch", "openvino")


# For fewer images it takes longer to make a graph than to run the network as it is.
_WORTH_A_GRAPH = 128


def choose_engine(
    engine: str,
    device: torch.device,
    precision: torch.dtype,
    n_images: int,
    *,
    from_library: bool = True,
) -> str:
    """Choose the engine that runs a frozen prefix; the one place where this is decided.

    Parameters
    ----------
    engine : {"auto", "torch", "openvino"}
        `"auto"` is OpenVINO where it is installed, computes on the CPU, the network is
        a library's, and there are enough images to be worth it; torch otherwise. What it depends
        on is the same in every process of a search.
    device : torch.device
    precision : torch.dtype
    n_images : int
        How many are asked for, whether or not they are in a store.
    from_library : bool
        Whether the network is one of the libraries': the modules of a user may do more than
        compute, which a graph would leave out.

    Raises
    ------
    ValueError
        Where the engine is unknown, or cannot compute on that device.

    Examples
    --------
    >>> choose_engine("auto", torch.device("cpu"), torch.float16, 1000)
    'torch'
    """
    check_choice("engine", engine, ["auto", *ENGINES])
    fits = device.type == "cpu" and precision in PRECISIONS
    if engine == "openvino" and not fits:
        raise ValueError(
            f"Got engine='openvino' with device={str(device)!r} and {precision}, but it computes "
            "on the CPU in float32 or bfloat16; device='cpu' and precision='auto' do that"
        )
    if engine != "auto":
        return engine
    pays = from_library and n_images >= _WORTH_A_GRAPH and not is_fork()
    return "openvino" if fits and pays and importlib.util.find_spec("openvino") else "torch"


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
    """Make an engine that `choose_engine` has chosen.

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
        Its normalization runs inside the engine.
    engine : {"torch", "openvino"}
    device : torch.device
    precision : torch.dtype
    key : bytes
        Identifies what prefix and preprocessing compute.
    from_library : bool
        Whether the network is one of the libraries'.

    Raises
    ------
    EngineError
        Where the engine cannot run this network.
    ImportError
        Where the engine is not installed.
    """
    if engine == "openvino":
        return OpenVINOEngine(prefix, preprocessing, precision, key)
    return TorchEngine(prefix, preprocessing, device, precision, from_library=from_library)
