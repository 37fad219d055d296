"""The OpenVINO engine: a frozen prefix as one graph, compiled for this CPU.

Converting a network to a graph takes seconds, so graphs are cached (see `graph_cache`).

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

# OpenVINO's names for the precisions.
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Increment it when the same prefix leads to another graph.
_GRAPH_VERSION = 1
# For fewer images, torch is done before the network is converted to a graph.
_MIN_IMAGES = 128
# The images of a batch share the overhead of each layer and the reading of its weights. That is
# faster as long as their feature maps fit into the caches: up to two images of 224 x 224, or more
# smaller images. If the weights exceed the caches of any CPU, a batch has at least four images.
_PIXELS_PER_BATCH = 2 * 224 * 224
_MAX_BATCH = 16
_HEAVY_WEIGHTS_BYTES = 2**26
_HEAVY_WEIGHTS_BATCH = 4


def images_together(size: tuple[int, int]) -> int:
    """Return the batch size for images of `size` (height, width): a power of two.

    Examples
    --------
    >>> [images_together((side, side)) for side in (32, 96, 160, 224, 288)]
    [16, 8, 4, 2, 1]
    """
    exponent = math.log2(_PIXELS_PER_BATCH / (size[0] * size[1]))
    return min(2 ** max(round(exponent), 0), _MAX_BATCH)


class OpenVINOEngine(CompiledEngine):
    """A frozen prefix as an OpenVINO graph on the CPU, with the fastest batch size.

    Parameters
    ----------
    prefix : FrozenPrefix
    preprocessing : Preprocessing
    device : torch.device
        The CPU.
    precision : torch.dtype
        float32 or bfloat16.
    key : bytes
        Identifies the computation of the prefix and the preprocessing.
    from_library : bool
        Not used: a graph contains nothing but the computation.

    Raises
    ------
    ImportError
        If OpenVINO is not installed.
    EngineError
        If the network cannot be converted to an equivalent graph.
    """

    name = "openvino"
    library = "OpenVINO"
    supported = "on the CPU, in float32 or bfloat16; set device='cpu' and precision='auto'"
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
        self._batch_size = _graph_batch_size(prefix, preprocessing)
        self.batch_invariant = self._batch_size == 1
        self._core, self._precision = openvino.Core(), precision
        network = PixelNetwork(prefix, preprocessing, self._batch_size)
        versions = (_GRAPH_VERSION, openvino.__version__, torch.__version__)
        self._start(network, precision, key.hex(), self._batch_size, *versions)

    @classmethod
    def supports(cls, device: torch.device, precision: torch.dtype) -> bool:
        """Return whether the device is the CPU and the precision float32 or bfloat16."""
        return device.type == "cpu" and precision in _PRECISIONS

    @classmethod
    def is_worth_starting(cls, n_images: int, *, from_library: bool, fork: bool) -> bool:
        """Return whether there are enough images, and the network comes from a library.

        A user's module may have side effects, which a graph would leave out.
        """
        is_worth_it = from_library and n_images >= _MIN_IMAGES and not fork
        return is_worth_it and importlib.util.find_spec("openvino") is not None

    @classmethod
    def batch_size(cls, size: tuple[int, int], device: torch.device) -> int:
        """Return a multiple of the batch size of the graph, whatever the size of the weights."""
        return max(images_together(size), _HEAVY_WEIGHTS_BATCH)

    def run(self, batch: torch.Tensor) -> np.ndarray:
        """Map pixels (N, 3, H, W), uint8 on the CPU, to float32 embeddings (N, D)."""
        embeddings, request = [], self._idle_requests.get()
        try:
            for part in batch.split(self._batch_size):
                padded = pad(part, self._batch_size).permute(0, 2, 3, 1).contiguous()
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


def _graph_batch_size(prefix: FrozenPrefix, preprocessing: Preprocessing) -> int:
    """Return the batch size of the graph of a prefix."""
    batch_size = images_together(preprocessing.crop)
    n_bytes = sum(tensor.nbytes for tensor in prefix.state_dict().values())
    is_heavy = n_bytes > _HEAVY_WEIGHTS_BYTES
    return max(batch_size, _HEAVY_WEIGHTS_BATCH) if is_heavy else batch_size


@cache
def _openvino() -> ModuleType:
    """Import OpenVINO without its telemetry module, which reports usage to its vendor."""
    block_telemetry = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if block_telemetry:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_optional("openvino", extra="openvino", purpose="engine='openvino'")
    finally:
        if block_telemetry:
            del sys.modules["openvino_telemetry"]


def _convert(network: PixelNetwork) -> Any:
    """Convert a network to a graph."""
    example = torch.zeros(network.shape, dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Warnings of torch's exporter do not matter: the graph is compared with the network.
            warnings.simplefilter("ignore")
            return _openvino().convert_model(torch.export.export(network, (example,)))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"OpenVINO cannot run this network ({reason}); engine='torch' can"
        ) from error
