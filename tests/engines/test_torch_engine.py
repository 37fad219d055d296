import numpy as np
import pytest
import torch
from helpers import Tiny, cosine, pixel_batch

from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.engines.choice import create_engine
from sktransfer.engines.torch_engine import TorchEngine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def network():
    return freeze(Tiny())


def engine(network, precision=torch.float32, device=CPU):
    prefix = FrozenPrefix(split_into_blocks(network))
    return create_engine(
        prefix,
        Tiny.preprocessing,
        engine="torch",
        device=device,
        precision=precision,
        key=b"tiny",
    )


def test_engine_equals_plain_eager_torch(network):
    batch = pixel_batch()
    plain = network.embed(Tiny.preprocessing.normalize(batch)).numpy()
    fast = engine(network).run(batch)
    assert fast.dtype == np.float32
    assert cosine(fast, plain).min() >= 0.9999


def test_bfloat16_is_close_and_returned_as_float32(network):
    batch = pixel_batch()
    low = engine(network, torch.bfloat16).run(batch)
    assert low.dtype == np.float32
    assert cosine(low, engine(network).run(batch)).min() >= 0.999


def test_float16_overflow_is_recomputed_in_float32(network):
    class Large(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.linear(x.mean((2, 3)), torch.full((4, 3), 1e6))

    batch = torch.full((3, 3, 16, 16), 255, dtype=torch.uint8)
    expected = TorchEngine(Large(), network.preprocessing, CPU, torch.float32).run(batch)
    assert abs(expected).max() > 65504
    embeddings = TorchEngine(Large(), network.preprocessing, CPU, torch.float16).run(batch)
    np.testing.assert_allclose(embeddings, expected, rtol=1e-6)


@pytest.mark.gpu
def test_cuda_equals_the_cpu(network):
    batch = pixel_batch(32)
    expected = engine(network).run(batch)
    assert cosine(engine(network, device=CUDA).run(batch), expected).min() >= 0.9999
    low = engine(network, torch.bfloat16, CUDA).run(batch)
    assert cosine(low, expected).min() >= 0.999
    half = engine(network, torch.float16, CUDA).run(batch)
    assert cosine(half, expected).min() >= 0.9999
    assert all(parameter.device == CPU for parameter in network.parameters())
