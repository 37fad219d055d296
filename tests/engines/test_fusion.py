"""Fused convolutions compute the same numbers in fewer steps."""

import numpy as np
import pytest
import torch
from helpers import Tiny, seeded
from torch import nn

from sktransfer.backbones.efficientnet_lite import SameConv2d
from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.engines import torch_engine
from sktransfer.engines.fusion import fuse
from sktransfer.engines.torch_engine import TorchEngine
from sktransfer.engines.verification import noise

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def maps(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def kinds(network):
    return [type(module).__name__ for module in network.modules()]


@torch.inference_mode()
def assert_same(network, x, *, fused=None):
    fused = fused or fuse(network)
    torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-5)
    return fused


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"), nn.Tanh()],
    ids=str,
)
@pytest.mark.parametrize("normalized", [True, False])
def test_activation_is_fused_into_the_convolution(activation, normalized):
    batch_norm = [nn.BatchNorm2d(8)] if normalized else []
    network = freeze(seeded(nn.Sequential(nn.Conv2d(3, 8, 3), *batch_norm, activation)))
    fused = assert_same(network, 10 * maps(4, 3, 9, 9))
    assert "BatchNorm2d" not in kinds(fused)
    assert (type(activation).__name__ in kinds(fused)) == isinstance(activation, nn.Tanh)


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9), (7, 10)])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_fused_into_the_convolution(size, kernel, stride):
    layers = SameConv2d(6, 6, kernel, stride, groups=6), nn.BatchNorm2d(6)
    assert_same(freeze(seeded(nn.Sequential(*layers))), maps(2, 6, *size))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11
@pytest.mark.parametrize("function", [nn.functional.relu, nn.functional.relu6])
def test_functional_activation_is_fused(function):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return function(self.conv(x))

    network = freeze(seeded(Functional()))
    x = 10 * maps(2, 3, 9, 9)
    with torch.profiler.profile() as profile:
        fused = assert_same(network, x)
        fused(x)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls[f"aten::{function.__name__}"] == 1, "only the plain network calls it"


def test_output_with_several_users_is_not_fused():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    fused = assert_same(freeze(seeded(Forked())), maps(2, 3, 9, 9))
    assert "BatchNorm2d" in kinds(fused)


def test_module_used_twice_is_fused_correctly():
    conv, relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
    network = freeze(seeded(nn.Sequential(conv, relu, conv, nn.BatchNorm2d(3), relu)))
    assert_same(network, maps(2, 3, 9, 9))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.LazyConv2d(8, 3),
    ],
    ids=["reflect", "same", "another class"],
)
def test_unsupported_convolution_computes_the_same(conv):
    conv(maps(2, 3, 9, 9))
    network = freeze(seeded(nn.Sequential(conv, nn.ReLU())))
    assert_same(network, maps(2, 3, 9, 9))


def test_batch_norm_without_statistics_computes_the_same():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
    assert_same(freeze(seeded(nn.Sequential(*layers))), maps(4, 3, 9, 9))


def test_network_without_anything_to_fuse_is_returned_unchanged():
    layers = nn.Conv2d(3, 8, 3), nn.LayerNorm(7), nn.Conv2d(8, 8, 3), nn.Tanh()
    network = freeze(nn.Sequential(*layers))
    assert fuse(network) is network


def test_fused_network_accepts_any_number_of_images():
    network = freeze(seeded(nn.Sequential(SameConv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())))
    fused = assert_same(network, maps(4, 3, 16, 16))
    for n in (1, 2, 4, 7):
        assert_same(network, maps(n, 3, 16, 16), fused=fused)


def test_fuse_leaves_the_network_unchanged():
    network = freeze(Tiny())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modules = kinds(network)
    assert_same(network, maps(2, 3, 16, 16))
    assert kinds(network) == modules
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_torch_engine_fuses_a_copy_of_the_prefix(monkeypatch):
    prefix = FrozenPrefix(split_into_blocks(freeze(Tiny())))
    engine = TorchEngine(prefix, Tiny.preprocessing, CPU, torch.float32)
    assert "_FusedConv2d" in kinds(engine._prefix)
    assert "_FusedConv2d" not in kinds(prefix)


@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax", None])
def test_torch_engine_fuses_a_prefix_that_ends_after_a_block(pooling):
    prefix = FrozenPrefix(split_into_blocks(freeze(Tiny())), layers=("1",), pooling=pooling)
    engine = TorchEngine(prefix, Tiny.preprocessing, CPU, torch.float32)
    assert "_FusedConv2d" in kinds(engine._prefix)
    batch = noise((16, 16))
    expected = prefix(Tiny.preprocessing.normalize(batch)).numpy()
    np.testing.assert_allclose(engine.run(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_torch_engine_does_not_fuse_user_modules_or_mixed_precision(precision):
    prefix = FrozenPrefix(split_into_blocks(freeze(Tiny())))
    known = precision != torch.float32
    engine = TorchEngine(prefix, Tiny.preprocessing, CPU, precision, from_library=known)
    assert engine._prefix is prefix


def test_torch_engine_runs_networks_that_cannot_be_fused():
    class Undecided(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    prefix = freeze(Undecided())
    engine = TorchEngine(prefix, Tiny.preprocessing, CPU, torch.float32)
    assert engine._prefix is prefix
    batch = noise((16, 16))
    expected = prefix(Tiny.preprocessing.normalize(batch)).numpy()
    np.testing.assert_allclose(engine.run(batch), expected, rtol=1e-6)


def test_torch_engine_rejects_a_fusion_that_computes_something_else(monkeypatch):
    wrong = freeze(seeded(nn.Sequential(nn.Flatten(), nn.Linear(768, 12))))
    monkeypatch.setattr(torch_engine, "fuse", lambda network: wrong)
    prefix = FrozenPrefix(split_into_blocks(freeze(Tiny())))
    assert TorchEngine(prefix, Tiny.preprocessing, CPU, torch.float32)._prefix is prefix


def test_weights_are_reordered_for_each_number_of_threads_once():
    """oneDNN would reorder them in every call if they had the order of other threads."""
    network = freeze(seeded(nn.Sequential(nn.Conv2d(256, 64, 1), nn.ReLU())))
    fused, before = fuse(network), torch.get_num_threads()
    (conv,) = [module for module in fused.modules() if hasattr(module, "weights")]
    reordered, reorder = [], conv._reorder
    conv._reorder = lambda x: reordered.append((torch.get_num_threads(), len(x))) or reorder(x)
    try:
        for threads, count in [(1, 4), (1, 2), *((3, n) for n in (2, 1, 1, 3, 4, 2)), (1, 1)]:
            torch.set_num_threads(threads)
            assert_same(network, maps(count, 256, 9, 9), fused=fused)
            assert len(conv.weights) <= 4
    finally:
        torch.set_num_threads(before)
    assert reordered == [(1, 4), (3, 2), (3, 1), (3, 3), (3, 4), (1, 1)]
