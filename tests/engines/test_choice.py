import numpy as np
import pytest
import torch
from helpers import Tiny, images

from sktransfer import PretrainedFeatureExtractor
from sktransfer.engines import choice, openvino_engine
from sktransfer.engines.base import FrozenEngine
from sktransfer.engines.choice import ENGINES, choose_engine, engine_batch_size, register_engine
from sktransfer.engines.torch_engine import TorchEngine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
def test_choose_engine_depends_on_request_device_and_image_count(changed, expected):
    usual = {"engine": "auto", "device": CPU, "precision": torch.float32, "n_images": 1000}
    assert choose_engine(**{**usual, **changed}) == expected


def test_auto_engine_is_torch_if_openvino_is_not_installed(monkeypatch):
    monkeypatch.setattr(openvino_engine.importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", CPU, torch.float32, 1000) == "torch"


def test_auto_engine_is_torch_in_a_fork(monkeypatch):
    monkeypatch.setattr(choice, "is_fork", lambda: True)
    assert choose_engine("auto", CPU, torch.float32, 1000) == "torch"


def test_openvino_rejects_unsupported_devices_and_precisions():
    with pytest.raises(ValueError, match=r"Got engine='openvino' with device='cuda'.*device='cpu'"):
        choose_engine("openvino", CUDA, torch.float32, 1000)
    with pytest.raises(ValueError, match=r"float16.*precision='auto'"):
        choose_engine("openvino", CPU, torch.float16, 1000)


def test_unknown_engine_is_rejected():
    with pytest.raises(ValueError, match="Got engine='tensorflow', but expected one of 'auto', "):
        choose_engine("tensorflow", CPU, torch.float32, 1000)


class ToyEngine(FrozenEngine):
    """The minimum that an engine must implement."""

    name = "toy"
    supported = "on the CPU; device='cpu' does that"
    batches = ()

    def __init__(self, prefix, preprocessing, device, precision, *, key=b"", from_library=True):
        self.prefix, self.preprocessing = prefix, preprocessing

    @classmethod
    def supports(cls, device, precision):
        return device.type == "cpu"

    @classmethod
    def batch_size(cls, size, device):
        return 3

    def run(self, batch):
        ToyEngine.batches += (len(batch),)
        return self.prefix(self.preprocessing.normalize(batch)).numpy()


@pytest.fixture
def toy(monkeypatch):
    """Register an engine during a test."""
    monkeypatch.setattr(ToyEngine, "batches", ())
    register_engine(ToyEngine)
    yield ToyEngine
    del ENGINES["toy"]


def test_registered_engine_runs_in_an_extractor(toy):
    X = images(7)
    extractor = PretrainedFeatureExtractor(Tiny(), engine="toy", device="cpu", cache=None)
    embeddings = extractor.fit_transform(X)
    assert extractor.engine_ == "toy"
    assert sum(toy.batches) == 7
    assert max(toy.batches) == 3
    expected = PretrainedFeatureExtractor(Tiny(), engine="torch", device="cpu", cache=None)
    np.testing.assert_allclose(embeddings, expected.fit_transform(X), rtol=1e-5, atol=1e-6)


def test_registered_engine_declares_what_it_supports(toy):
    assert choose_engine("toy", CPU, torch.float16, 1) == "toy"
    with pytest.raises(ValueError, match=r"Got engine='toy' with device='cuda'.*device='cpu' does"):
        choose_engine("toy", CUDA, torch.float32, 1)


def test_auto_engine_is_a_registered_one_only_if_worth_starting(toy, monkeypatch):
    assert choose_engine("auto", CPU, torch.float16, 1000) == "torch"
    monkeypatch.setattr(toy, "is_worth_starting", lambda n, **options: n > 5)
    assert choose_engine("auto", CPU, torch.float32, 6) == "toy"
    assert choose_engine("auto", CPU, torch.float32, 5) == "torch"
    assert choose_engine("auto", CUDA, torch.float32, 6) == "torch"


def test_unregistered_engine_is_unknown():
    with pytest.raises(ValueError, match="Got engine='toy', but expected one of 'auto', 'torch'"):
        PretrainedFeatureExtractor(Tiny(), engine="toy").fit(images(2))


@pytest.mark.parametrize("taken", ["auto", "torch", "openvino"])
def test_register_engine_rejects_a_name_in_use(taken):
    engine = type("Other", (ToyEngine,), {"name": taken})
    with pytest.raises(ValueError, match=f"Got the engine Other with the name '{taken}', but exp"):
        register_engine(engine)
    assert ENGINES["torch"] is TorchEngine
    assert register_engine(TorchEngine) is TorchEngine


def test_openvino_batch_size_is_a_multiple_of_its_group():
    assert engine_batch_size("openvino", (32, 32), CPU) % 16 == 0
    assert engine_batch_size("openvino", (5000, 5000), CPU) == 4  # the number for heavy weights


def test_torch_batch_size_is_the_automatic_one():
    assert engine_batch_size("torch", (224, 224), CPU) == 4
