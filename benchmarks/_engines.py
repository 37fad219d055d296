"""Networks without sktransfer: plain torch, and OpenVINO in its recommended throughput mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from _common import MEAN, STD, lite0
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from sktransfer.data.decoding import decode

if TYPE_CHECKING:
    import openvino

Embed = Callable[[list[str]], np.ndarray]
Run = Callable[[torch.Tensor], np.ndarray]


class Photographs(torch.utils.data.Dataset):
    """Photographs, preprocessed as the weights of EfficientNet-Lite0 expect."""

    def __init__(self, paths: list[str]) -> None:
        resize = v2.Resize(256, interpolation=InterpolationMode.BICUBIC, antialias=True)
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.paths, self.transform = paths, v2.Compose([resize, v2.CenterCrop(224), *scale])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(torch.from_numpy(decode(self.paths[row])).permute(2, 0, 1))


def headless() -> nn.Module:
    """Build EfficientNet-Lite0 without its head, so that it returns embeddings."""
    net = lite0().eval().requires_grad_(False)
    net.fc = nn.Identity()
    return net


@torch.inference_mode()
def run_eager(
    net: nn.Module, batches: Iterable[torch.Tensor], layout: torch.memory_format
) -> np.ndarray:
    """Run a network in plain torch on batches, in a given memory layout."""
    net.to(memory_format=layout)
    return np.concatenate(
        [net(x.contiguous(memory_format=layout)).float().numpy() for x in batches]
    )


def raw_openvino(net: nn.Module, example: torch.Tensor) -> Run:
    """Build a function that runs a network in OpenVINO, in batches as large as the example."""
    import openvino

    graph = openvino.convert_model(torch.export.export(net, (example,)))
    return run_graph(graph, len(example))


def run_graph(graph: openvino.Model, batch_size: int, precision: str = "f32") -> Run:
    """Build a function that runs an OpenVINO graph on images."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    queue = openvino.AsyncInferQueue(openvino.compile_model(graph, "CPU", settings))
    outputs: dict[int, np.ndarray] = {}

    def store_output(request: openvino.InferRequest, index: int) -> None:
        outputs[index] = request.get_output_tensor().data.copy()

    queue.set_callback(store_output)

    def run(x: torch.Tensor) -> np.ndarray:
        outputs.clear()
        for index, batch in enumerate(x.split(batch_size)):
            queue.start_async(batch.numpy(), index)
        queue.wait_all()
        return np.concatenate([outputs[index] for index in range(len(outputs))])

    return run
