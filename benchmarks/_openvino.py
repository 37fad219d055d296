"""OpenVINO by itself, as its makers recommend it for throughput."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino
import torch
from torch import nn


def raw_openvino(net: nn.Module, example: torch.Tensor) -> Callable[[torch.Tensor], np.ndarray]:
    """Turn a network into what runs images, in batches as large as the example."""
    graph = openvino.convert_model(torch.export.export(net, (example,)))
    return run_graph(graph, len(example))


def run_graph(
    graph: openvino.Model, batch_size: int, precision: str = "f32"
) -> Callable[[torch.Tensor], np.ndarray]:
    """Make what runs images through a graph."""
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
