"""Networks without sktransfer: plain torch, and OpenVINO in the mode that its makers recommend."""

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
    """Images as the weights expect them."""

    def __init__(self, paths: list[str]) -> None:
        resize = v2.Resize(256, interpolation=InterpolationMode.BICUBIC, antialias=True)
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.paths, self.transform = paths, v2.Compose([resize, v2.CenterCrop(224), *scale])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(torch.from_numpy(decode(self.paths[row])).permute(2, 0, 1))


def headless() -> nn.Module:
    """Build the backbone of all variants, up to the embedding."""
    net = lite0().eval().requires_grad_(False)
    net.fc = nn.Identity()
    return net


@torch.inference_mode()
def run_eager(
    net: nn.Module, batches: Iterable[torch.Tensor], layout: torch.memory_format
) -> np.ndarray:
    """Run plain torch on batches, in a memory layout."""
    net.to(memory_format=layout)
    return np.concatenate(
        [net(x.contiguous(memory_format=layout)).float().numpy() for x in batches]
    )


def raw_openvino(net: nn.Module, example: torch.Tensor) -> Run:
    """Build a function that runs a network on images, in batches as large as the example."""
    import openvino

    graph = openvino.convert_model(torch.export.export(net, (example,)))
    return run_graph(graph, len(example))


def run_graph(graph: openvino.Model, batch_size: int, precision: str = "f32") -> Run:
    """Build a function that runs a graph on images."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    queue = openvino.AsyncInferQueue(openvino.compile_model(graph, "CPU", settings))
    taken: dict[int, np.ndarray] = {}
    queue.set_callback(lambda run, at: taken.update({at: run.get_output_tensor().data.copy()}))

    def run(x: torch.Tensor) -> np.ndarray:
        taken.clear()
        for at, batch in enumerate(x.split(batch_size)):
            queue.start_async(batch.numpy(), at)
        queue.wait_all()
        return np.concatenate([taken[at] for at in range(len(taken))])

    return run
