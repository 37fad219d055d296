import numpy as np
import pytest
import torch
from helpers import Tiny, pixel_batch

from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.engines.batch_size import auto_batch_size
from sktransfer.engines.torch_engine import TorchEngine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def network():
    return FrozenPrefix(split_into_blocks(freeze(Tiny())))


def test_out_of_memory_halves_the_batch(network, monkeypatch):
    batch, sizes = pixel_batch(11), []
    runner = TorchEngine(network, Tiny.preprocessing, CPU, torch.float32)
    expected = runner.run(batch)
    forward = TorchEngine._run

    def scarce(self, part):
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, part)

    monkeypatch.setattr(TorchEngine, "_run", scarce)
    np.testing.assert_allclose(runner.run(batch), expected, rtol=1e-5, atol=1e-6)
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    sizes.clear()
    runner.run(batch)
    assert max(sizes) <= 3, "the engine tried again what had failed"


def test_out_of_memory_for_a_single_image_raises(network, monkeypatch):
    def never(self, part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchEngine, "_run", never)
    with pytest.raises(torch.OutOfMemoryError):
        TorchEngine(network, Tiny.preprocessing, CPU, torch.float32).run(pixel_batch(2))


def test_auto_batch_size_depends_on_device_and_image_size():
    assert auto_batch_size(CUDA, (224, 224)) > auto_batch_size(CPU, (224, 224))
    assert auto_batch_size(CPU, (448, 448)) < auto_batch_size(CPU, (224, 224))
    assert auto_batch_size(CPU, (5000, 5000)) == 1
    assert auto_batch_size(CUDA, (8, 8)) <= 2048
