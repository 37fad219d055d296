"""A recipe is the cache key of an embedding, and knows the shape and dtype of its output."""

import dataclasses

import pytest
import torch
from helpers import CountingTiny, Tiny
from torch import nn
from torchvision.models import VisionTransformer

from sktransfer.backbones.loading import load_backbone
from sktransfer.embedding import recipe as recipe_module
from sktransfer.embedding.recipe import Recipe, map_shape, output_width, recipe_at
from sktransfer.transforms.preprocessing import Preprocessing

TINY = load_backbone(Tiny())


def recipe(**fields):
    return Recipe(**{"backbone": TINY, "preprocessing": TINY.preprocessing, **fields})


def test_recipe_digest_depends_on_every_field():
    """Fail if a new field is not part of the key."""
    base = Recipe(load_backbone(CountingTiny("a")), Preprocessing())
    changes = {
        "backbone": load_backbone(CountingTiny("b")),
        "preprocessing": Preprocessing(interpolation="bicubic"),
        "layers": ("0",),
        "pooling": "max",
        "precision": torch.bfloat16,
        "dtype": "float16",
    }
    assert {field.name for field in dataclasses.fields(Recipe)} == set(changes)
    digests = {dataclasses.replace(base, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {base.digest}) == len(changes) + 1

    changed_preprocessing = {
        "resize": 100,
        "crop": (100, 100),
        "interpolation": "bicubic",
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    fields = {field.name for field in dataclasses.fields(Preprocessing)}
    assert fields == set(changed_preprocessing)
    for name, value in changed_preprocessing.items():
        changed = dataclasses.replace(Preprocessing(), **{name: value})
        assert dataclasses.replace(base, preprocessing=changed).digest != base.digest


def test_recipe_digest_depends_on_the_recipe_version(monkeypatch):
    digest = recipe().digest
    monkeypatch.setattr(recipe_module, "_RECIPE_VERSION", recipe_module._RECIPE_VERSION + 1)
    assert recipe().digest != digest


@pytest.mark.parametrize(
    ("fields", "emits_map", "width"),
    [
        ({}, False, 12),
        ({"layers": ("0",)}, False, 8),
        ({"layers": ("0",), "pooling": "avgmax"}, False, 16),
        ({"layers": ("0", None, "logits")}, False, 8 + 12 + 5),
        ({"layers": ("0",), "pooling": None}, True, 8 * 8 * 8),
        ({"layers": ("logits",), "pooling": None}, False, 5),
        ({"layers": ("0", "1"), "pooling": None}, False, 8 * 8 * 8 + 12 * 4 * 4),
    ],
)
def test_output_width_equals_the_width_of_the_prefix(fields, emits_map, width):
    tested = recipe(**fields)
    pixels = torch.zeros(2, 3, *tested.preprocessing.crop, dtype=torch.uint8)
    with torch.no_grad():
        output = tested.prefix()(tested.preprocessing.normalize(pixels))
    assert output.shape == (2, width)
    assert output_width(tested) == width
    assert tested.emits_map == emits_map


def test_recipe_at_a_boundary_emits_the_map_in_float16():
    early = recipe_at(TINY, TINY.preprocessing, 1, torch.float32)
    assert (early.layers, early.pooling, early.dtype) == (("0",), None, "float16")
    assert map_shape(early) == (8, 8, 8)
    last = recipe_at(TINY, TINY.preprocessing, 2, torch.bfloat16)
    assert last == recipe(precision=torch.bfloat16)
    assert (last.layers, last.dtype, map_shape(last)) == ((None,), "float32", (12,))


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1, "float16"), (1e-6, "float32"), (1e6, "float32"), (0, "float32")]
)
def test_recipe_at_stores_float32_if_values_do_not_fit_float16(factor, dtype):
    class Scaled(nn.Module):
        def forward(self, x):
            return factor * x

    scaled = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), Scaled()), nn.Conv2d(4, 4, 3))
    backbone = load_backbone(nn.Sequential(*scaled, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    preprocessing = Preprocessing(resize=16, crop=(16, 16))
    map_recipe = recipe_at(backbone, preprocessing, 1, torch.float32)
    assert map_recipe.emits_map
    assert map_recipe.dtype == dtype


def test_output_is_measured_once_per_process(monkeypatch):
    monkeypatch.setattr(recipe_module, "_outputs", {})
    calls, run_noise = [], recipe_module._run_noise
    monkeypatch.setattr(
        recipe_module, "_run_noise", lambda tested: calls.append(tested) or run_noise(tested)
    )
    tested = recipe(layers=("0",), pooling=None)
    for _ in range(2):
        assert output_width(tested) == 512
        assert map_shape(dataclasses.replace(tested, dtype="float16")) == (8, 8, 8)
    assert len(calls) == 1


def test_output_width_names_the_image_size_that_the_backbone_rejects():
    network = VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=1, hidden_dim=12, mlp_dim=12
    )
    backbone = load_backbone(network)
    assert output_width(Recipe(backbone, backbone.preprocessing)) == 12
    large = backbone.preprocessing.with_image_size((48, 64))
    with pytest.raises(ValueError, match=r"Got image_size=48x64, but .* does not accept images"):
        output_width(Recipe(backbone, large))
