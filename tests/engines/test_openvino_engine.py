import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from activation_helpers import compute_config
from helpers import Tiny, cosine, images, pixel_batch
from sklearn.datasets import load_sample_images
from torch import nn

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.frozen import FrozenPrefix, freeze
from sktransfer.backbones.loading import load_backbone
from sktransfer.backbones.torchvision_blocks import split_into_blocks
from sktransfer.embedding.embed import engine_for
from sktransfer.embedding.recipe import Recipe, recipe_at
from sktransfer.engines import graph_cache, openvino_engine
from sktransfer.engines.openvino_engine import OpenVINOEngine
from sktransfer.engines.torch_engine import TorchEngine
from sktransfer.utils.errors import EngineError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def graphs(tmp_path, monkeypatch):
    """Use an empty folder for the graphs of each test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "sktransfer"


def make(network=None, precision=torch.float32, key=b"tiny"):
    prefix = FrozenPrefix(split_into_blocks(freeze(network or Tiny())))
    return OpenVINOEngine(prefix, Tiny.preprocessing, CPU, precision, key=key)


def plain(batch):
    return freeze(Tiny()).embed(Tiny.preprocessing.normalize(batch)).numpy()


def never(*arguments):
    raise AssertionError("a graph was made again")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_openvino_equals_plain_torch(layout):
    batch = pixel_batch(37).contiguous(memory_format=layout)
    embeddings = make().run(batch)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, plain(batch), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_and_returned_as_float32():
    embeddings = make(precision=torch.bfloat16).run(pixel_batch())
    assert embeddings.dtype == np.float32
    assert cosine(embeddings, plain(pixel_batch())).min() >= 0.999


@pytest.mark.slow
def test_bfloat16_of_real_weights_is_as_close_as_in_torch():
    backbone = load_backbone("efficientnet_lite0")
    preprocessing, end = backbone.preprocessing, len(backbone.block_list.blocks)
    china, flower = (torch.tensor(each) for each in load_sample_images().images)
    batch = torch.stack([each[:384, :480].permute(2, 0, 1) for each in (china, flower)])
    batch = batch.unfold(2, 224, 80).unfold(3, 224, 64).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    exact_engine, torch_engine, openvino = (
        engine_for(
            recipe_at(backbone, preprocessing, end, precision), compute_config(engine=engine), 3
        )
        for engine, precision in (
            ("torch", torch.float32),
            ("torch", torch.bfloat16),
            ("openvino", torch.bfloat16),
        )
    )
    assert (torch_engine.name, openvino.name) == ("torch", "openvino")
    expected = exact_engine.run(batch)
    cosines = [cosine(engine.run(batch), expected) for engine in (torch_engine, openvino)]
    assert [np.median(each) >= 0.999 for each in cosines] == [True, True]
    assert 1 - cosines[1].min() < 2 * (1 - cosines[0].min())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "swin_t"])
@pytest.mark.parametrize("boundary", ["middle", "end"])
def test_openvino_equals_torch_for_known_networks(name, boundary):
    backbone = load_backbone(name, "default" if name == "efficientnet_lite0" else None)
    end = len(backbone.block_list.blocks)
    preprocessing = backbone.preprocessing
    if boundary == "end":
        recipe = recipe_at(backbone, preprocessing, end, torch.float32)
    else:
        recipe = recipe_at(backbone, preprocessing, end // 2, torch.float32)
    batch = pixel_batch(3, preprocessing.crop[0])
    fast, slow = (
        engine_for(recipe, compute_config(engine=engine), 3) for engine in ("openvino", "torch")
    )
    assert (fast.name, slow.name) == ("openvino", "torch")
    assert cosine(fast.run(batch), slow.run(batch)).min() >= 0.9999


def test_embedding_of_a_large_image_is_independent_of_its_batch(monkeypatch):
    monkeypatch.setattr(openvino_engine, "_PIXELS_PER_BATCH", 16 * 16)
    engine, batch = make(), pixel_batch(20)
    together = engine.run(batch)
    alone = np.concatenate([engine.run(batch[row : row + 1]) for row in range(20)])
    assert engine.batch_invariant
    assert (together == alone).all()


@pytest.mark.slow_cases(
    "1-4-67108864", "1-1-100", "1-1000-100", "4-4-67108864", "4-1-100", "4-1000-100"
)
@pytest.mark.parametrize(
    ("fitting", "heavy", "together"), [(4, 2**26, 4), (1, 100, 4), (1000, 100, 16)]
)
@pytest.mark.parametrize("n", [1, 3, 4, 37])
def test_small_or_heavy_images_are_grouped(n, fitting, heavy, together, monkeypatch):
    monkeypatch.setattr(openvino_engine, "_PIXELS_PER_BATCH", fitting * 16 * 16)
    monkeypatch.setattr(openvino_engine, "_HEAVY_WEIGHTS_BYTES", heavy)
    engine, batch = make(), pixel_batch(n)
    embeddings = engine.run(batch)
    assert not engine.batch_invariant
    requests = [engine._idle_requests.get() for _ in range(engine._idle_requests.qsize())]
    assert max(request.get_input_tensor(0).shape[0] for request in requests) == together
    np.testing.assert_allclose(embeddings, plain(batch), rtol=1e-4, atol=1e-5)


def test_engine_is_shared_by_threads():
    engine = make()
    batches = [pixel_batch(9) * 0 + number for number in range(8)]
    expected = [engine.run(batch) for batch in batches]
    barrier = threading.Barrier(8)

    def work(batch):
        barrier.wait()
        return engine.run(batch)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, batches))
    assert all(
        (result == expected_result).all()
        for result, expected_result in zip(results, expected, strict=True)
    )


def test_graph_is_written_once_and_reused(graphs, monkeypatch):
    expected = make().run(pixel_batch())
    monkeypatch.setattr(openvino_engine, "_convert", never)
    assert (make().run(pixel_batch()) == expected).all()
    assert len(list(graphs.iterdir())) == 1
    with pytest.raises(AssertionError, match="made again"):
        make(key=b"another")


def test_graph_of_another_user_is_reused(graphs, monkeypatch):
    expected = make().run(pixel_batch())

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(openvino_engine, "_convert", never)
    assert (make().run(pixel_batch()) == expected).all()


@pytest.mark.slow_cases("0.0")
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("damaged", ["graph.xml", "graph.bin"])
def test_truncated_graph_is_rebuilt(graphs, damaged, share, monkeypatch):
    expected = make().run(pixel_batch())
    (folder,) = graphs.iterdir()
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content[: int(share * len(content))])
    assert (make().run(pixel_batch()) == expected).all()
    monkeypatch.setattr(openvino_engine, "_convert", never)
    assert (make().run(pixel_batch()) == expected).all()


def test_graph_with_damaged_weights_is_rebuilt(graphs):
    expected = make().run(pixel_batch())
    (folder,) = graphs.iterdir()
    content = (folder / "graph.bin").read_bytes()
    (folder / "graph.bin").write_bytes(content[::-1])
    assert (make().run(pixel_batch()) == expected).all()
    assert (folder / "graph.bin").read_bytes() == content


def test_least_recently_used_graphs_are_removed(graphs, monkeypatch):
    make(key=b"first")
    size = sum(file.stat().st_size for file in graphs.glob("*/*"))
    monkeypatch.setattr(graph_cache, "_MAX_BYTES", 2.5 * size)
    (first,) = graphs.iterdir()
    make(key=b"second")
    (second,) = set(graphs.iterdir()) - {first}
    for folder, time in ((first, 2000), (second, 1000)):
        os.utime(folder, (time, time))
    make(key=b"third")
    assert len(list(graphs.iterdir())) == 2
    assert first.exists()
    assert not second.exists()


def test_engine_works_if_nothing_can_be_written(graphs, tmp_path):
    (tmp_path / "hub").write_text("a file where the folder should be")
    assert cosine(make().run(pixel_batch()), plain(pixel_batch())).min() >= 0.9999


def test_graph_that_computes_something_else_is_rejected(graphs, monkeypatch):
    convert = openvino_engine._convert

    def wrong(network):
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed.prefix.blocks[1][0].weight.neg_()
        return convert(changed)

    monkeypatch.setattr(openvino_engine, "_convert", wrong)
    with pytest.raises(EngineError, match="does not reproduce the network"):
        make()
    assert not list(graphs.iterdir())


class Branching(nn.Module):
    """Branches on its input, which no graph can express."""

    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x


def test_network_that_cannot_be_exported_is_rejected():
    network = Tiny()
    network[1] = nn.Sequential(network[1], Branching())
    with pytest.raises(EngineError, match=r"OpenVINO cannot run this network.*engine='torch' can"):
        make(network)


def test_auto_engine_falls_back_to_torch(monkeypatch):
    def fails(*arguments):
        raise EngineError("no")

    monkeypatch.setattr(openvino_engine, "_convert", fails)
    backbone = load_backbone("mobilenet_v3_small", None)
    recipe = Recipe(backbone, backbone.preprocessing.with_image_size(32))
    assert isinstance(engine_for(recipe, compute_config(engine="auto"), 1000), TorchEngine)
    with pytest.raises(EngineError, match="no"):
        engine_for(recipe, compute_config(engine="openvino"), 1000)


def test_auto_engine_falls_back_to_torch_if_the_graph_cannot_be_written(monkeypatch):
    import openvino

    def fails(*arguments, **options):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", fails)
    backbone = load_backbone("mobilenet_v3_small", None)
    recipe = Recipe(backbone, backbone.preprocessing.with_image_size(32))
    assert isinstance(engine_for(recipe, compute_config(engine="auto"), 1000), TorchEngine)
    with pytest.raises(EngineError, match=r"OpenVINO cannot write its graph to .*iostream error"):
        engine_for(recipe, compute_config(engine="openvino"), 1000)


def test_extractor_computes_the_same_with_either_engine():
    X = images(130, 40)
    usual = {"backbone": "resnet18", "weights": None, "image_size": 32, "cache": None}
    embeddings = [
        PretrainedFeatureExtractor(engine=engine, **usual).fit_transform(X)
        for engine in ("torch", "openvino", "auto")
    ]
    assert cosine(embeddings[0], embeddings[1]).min() >= 0.9999
    assert (embeddings[1] == embeddings[2]).all(), "auto does not take OpenVINO"


def test_user_module_runs_with_openvino():
    X = images(7)
    embeddings = PretrainedFeatureExtractor(Tiny(), engine="openvino", cache=None).fit_transform(X)
    expected = PretrainedFeatureExtractor(Tiny(), engine="torch", cache=None).fit_transform(X)
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_openvino_is_imported_on_first_use_and_without_telemetry():
    script = """
import sys
import sktransfer
assert "openvino" not in sys.modules
from sktransfer.engines.openvino_engine import _openvino
assert _openvino().Core()
assert "openvino" in sys.modules
assert "openvino_telemetry" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_missing_openvino_raises_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino_engine._openvino.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'sktransfer\[openvino\]'"):
        make()
