"""The engine that OpenVINO drives: a frozen prefix as one graph, compiled for this CPU.

Converting a network to a graph takes seconds, so graphs are kept (see `graph_cache`).

Shapes: N images, H x W pixels, D features.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np
import torch

from sktransfer.backbones.frozen import FrozenPrefix
from sktransfer.engines.base import pad
from sktransfer.engines.compiled_engine import CompiledEngine, PixelNetwork
from sktransfer.transforms.preprocessing import Preprocessing
from sktransfer.utils.errors import EngineError, import_optional

# OpenVINO's names of the precisions.
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# To be raised when the same prefix becomes another graph.
_GRAPH_VERSION = 1
# Converting a network to a graph takes longer than running it on fewer images with torch.
_MIN_IMAGES = 128
# Images that go together share the overhead of each layer and the reading of its weights. That
# pays while their feature maps stay in the caches: those of two images of 224 x 224 do, and of
# more that are smaller. Weights larger than the caches of any CPU are shared by four or more.
_PIXELS_TOGETHER = 2 * 224 * 224
_MOST_TOGETHER = 16
_HEAVY_BYTES = 2**26
_HEAVY_TOGETHER = 4


def images_together(size: tuple[int, int]) -> int:
    """Return how many images of `size` (height, width) go together: a power of two.

    Examples
    --------
    >>> [images_together((side, side)) for side in (32, 96, 160, 224, 288)]
    [16, 8, 4, 2, 1]
    """
    fitting = math.log2(_PIXELS_TOGETHER / (size[0] * size[1]))
    return min(2 ** max(round(fitting), 0), _MOST_TOGETHER)


class OpenVINOEngine(CompiledEngine):
    """A frozen prefix on the CPU, on as many images at once as pays.

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
    device : torch.device
        The CPU.
    precision : torch.dtype
        float32 or bfloat16.
    key : bytes
        Identifies what the engine computes.
    from_library : bool
        Makes no difference: the graph holds nothing but the computation.

    Raises
    ------
    ImportError
        If OpenVINO is not installed.
    EngineError
        If the network cannot be converted to a graph that gives the same.
    """

    name = "openvino"
    library = "OpenVINO"
    supported = "on the CPU in float32 or bfloat16; device='cpu' and precision='auto' do that"
    thread_safe = True
    threads_per_core = 2

    def __init__(
        self,
        prefix: FrozenPrefix,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: torch.dtype,
        *,
        key: bytes = b"",
        from_library: bool = True,
    ) -> None:
        openvino = _openvino()
        self._together = _graph_batch(prefix, preprocessing)
        self.batch_invariant = self._together == 1
        self._core, self._precision = openvino.Core(), precision
        network = PixelNetwork(prefix, preprocessing, self._together)
        versions = (_GRAPH_VERSION, openvino.__version__, torch.__version__)
        self._start(network, precision, key.hex(), self._together, *versions)

    @classmethod
    def supports(cls, device: torch.device, precision: torch.dtype) -> bool:
        """Return whether it is the CPU in float32 or bfloat16."""
        return device.type == "cpu" and precision in _PRECISIONS

    @classmethod
    def is_worth_starting(cls, n_images: int, *, from_library: bool, fork: bool) -> bool:
        """Return whether many images go through a library's network.

        A user's module may do more than compute, which a graph would leave out.
        """
        pays = from_library and n_images >= _MIN_IMAGES and not fork
        return pays and importlib.util.find_spec("openvino") is not None

    @classmethod
    def batch_size(cls, size: tuple[int, int], device: torch.device) -> int:
        """Return a multiple of the images that go together, whatever the weights."""
        return max(images_together(size), _HEAVY_TOGETHER)

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        embeddings, request = [], self._idle_requests.get()
        try:
            for part in batch.split(self._together):
                padded = pad(part, self._together).permute(0, 2, 3, 1).contiguous()
                request.infer({0: padded.numpy()}, share_inputs=True)
                embeddings.append(request.get_output_tensor(0).data.copy())
        finally:
            self._idle_requests.put(request)
        return np.concatenate(embeddings)[: len(batch)]

    def _write(self, network: PixelNetwork, folder: Path) -> None:
        graph = _convert(network)
        try:
            _openvino().save_model(graph, folder / "graph.xml", compress_to_fp16=False)
        except (OSError, RuntimeError) as error:
            raise EngineError(f"OpenVINO cannot write its graph to {folder}: {error}") from error

    def _read(self, folder: Path) -> None:
        settings = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self._precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            graph = self._core.read_model(folder / "graph.xml")
            compiled = self._core.compile_model(graph, "CPU", settings)
        except (OSError, RuntimeError) as error:
            raise EngineError(f"OpenVINO cannot read its graph in {folder}: {error}") from error
        self._idle_requests = SimpleQueue[Any]()
        parallel = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        for _ in range(self.threads_per_core * parallel):
            self._idle_requests.put(compiled.create_infer_request())


def _graph_batch(prefix: FrozenPrefix, preprocessing: Preprocessing) -> int:
    """Return how many images the graph of a prefix takes at once."""
    together = images_together(preprocessing.crop)
    heavy = sum(tensor.nbytes for tensor in prefix.state_dict().values()) > _HEAVY_BYTES
    return max(together, _HEAVY_TOGETHER) if heavy else together


@cache
def _openvino() -> ModuleType:
    """Import OpenVINO without the module by which it reports its use to its makers."""
    absent = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if absent:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_optional("openvino", extra="cpu", purpose="engine='openvino'")
    finally:
        if absent:
            del sys.modules["openvino_telemetry"]


def _convert(network: PixelNetwork) -> Any:
    """Convert a network to a graph."""
    example = torch.zeros(network.shape, dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The graph is compared with the network, whatever torch's exporter warns of.
            warnings.simplefilter("ignore")
            return _openvino().convert_model(torch.export.export(network, (example,)))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"OpenVINO cannot run this network ({reason}); engine='torch' can"
        ) from error
