import numpy as np
import pytest
import torch
from helpers import Tiny, cosine

from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.engines import choice as engines
from sktransfer.engines.batch_size import auto_batch_size
from sktransfer.engines.choice import choose_engine, create_engine
from sktransfer.engines.torch_engine import TorchEngine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def network():
    return freeze(Tiny())


def pixels(n=5):
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)


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


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "openvino"),
        ({"engine": "torch"}, "torch"),
        ({"precision": torch.bfloat16}, "openvino"),
        ({"precision": torch.float16}, "torch"),
        ({"device": CUDA}, "torch"),
        ({"n_images": 20}, "torch"),
        ({"from_library": False}, "torch"),
        ({"from_library": False, "n_images": 1, "engine": "openvino"}, "openvino"),
    ],
)
def test_the_choice(changed, expected):
    usual = {"engine": "auto", "device": CPU, "precision": torch.float32, "n_images": 1000}
    assert choose_engine(**{**usual, **changed}) == expected


def test_the_choice_where_openvino_is_not_installed(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", CPU, torch.float32, 1000) == "torch"


def test_the_choice_in_a_fork(monkeypatch):
    monkeypatch.setattr(engines, "is_fork", lambda: True)
    assert choose_engine("auto", CPU, torch.float32, 1000) == "torch"


def test_openvino_where_it_does_not_compute():
    with pytest.raises(ValueError, match=r"Got engine='openvino' with device='cuda'.*device='cpu'"):
        choose_engine("openvino", CUDA, torch.float32, 1000)
    with pytest.raises(ValueError, match=r"float16.*precision='auto'"):
        choose_engine("openvino", CPU, torch.float16, 1000)


def test_an_unknown_engine():
    with pytest.raises(ValueError, match="Got engine='tensorflow', but expected one of 'auto', "):
        choose_engine("tensorflow", CPU, torch.float32, 1000)


def test_equals_plain_eager_torch(network):
    batch = pixels()
    plain = network.embed(Tiny.preprocessing.normalize(batch)).numpy()
    fast = engine(network).run(batch)
    assert fast.dtype == np.float32
    assert cosine(fast, plain).min() >= 0.9999


def test_bfloat16_is_close_and_comes_out_as_float32(network):
    batch = pixels()
    low = engine(network, torch.bfloat16).run(batch)
    assert low.dtype == np.float32
    assert cosine(low, engine(network).run(batch)).min() >= 0.999


def test_out_of_memory_halves_the_batch_and_goes_on(network, monkeypatch):
    batch, sizes = pixels(11), []
    runner = engine(network)
    expected = runner.run(batch)
    forward = TorchEngine._forward

    def scarce(self, part):
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, part)

    monkeypatch.setattr(TorchEngine, "_forward", scarce)
    np.testing.assert_allclose(runner.run(batch), expected, rtol=1e-5, atol=1e-6)
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    sizes.clear()
    runner.run(batch)
    assert max(sizes) <= 3, "the engine tried again what had failed"


def test_out_of_memory_for_a_single_image_is_an_error(network, monkeypatch):
    def never(self, part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchEngine, "_forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        engine(network).run(pixels(2))


def test_batches_fit_the_device_and_the_size_of_the_images():
    assert auto_batch_size(CUDA, (224, 224)) > auto_batch_size(CPU, (224, 224))
    assert auto_batch_size(CPU, (448, 448)) < auto_batch_size(CPU, (224, 224))
    assert auto_batch_size(CPU, (5000, 5000)) == 1
    assert auto_batch_size(CPU, (32, 32), "openvino") % 16 == 0  # as many as go together
    assert auto_batch_size(CPU, (5000, 5000), "openvino") == 4  # what heavy weights ask for
    assert auto_batch_size(CUDA, (8, 8)) <= 1024


def test_what_is_too_large_for_float16_is_computed_in_float32(network):
    class Large(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.linear(x.mean((2, 3)), torch.full((4, 3), 1e6))

    batch = torch.full((3, 3, 16, 16), 255, dtype=torch.uint8)
    expected = TorchEngine(Large(), network.preprocessing, CPU, torch.float32).run(batch)
    assert abs(expected).max() > 65504
    found = TorchEngine(Large(), network.preprocessing, CPU, torch.float16).run(batch)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.gpu
def test_cuda_equals_the_cpu(network):
    batch = pixels(32)
    expected = engine(network).run(batch)
    assert cosine(engine(network, device=CUDA).run(batch), expected).min() >= 0.9999
    low = engine(network, torch.bfloat16, CUDA).run(batch)
    assert cosine(low, expected).min() >= 0.999
    half = engine(network, torch.float16, CUDA).run(batch)
    assert cosine(half, expected).min() >= 0.9999
    assert all(parameter.device == CPU for parameter in network.parameters())
