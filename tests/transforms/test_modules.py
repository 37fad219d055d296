"""The preprocessing as torch modules gives the pixels of `Preprocessing`, for any size."""

import pytest
import torch
from export_helpers import PREPROCESSINGS, RESIZED_SIZES
from helpers import images, smooth_image

from sktransfer.transforms import modules
from sktransfer.transforms.modules import Normalize, ResizeAndCrop
from sktransfer.transforms.preprocessing import Preprocessing


def noise(size, seed=0):
    return torch.from_numpy(images(1, max(size), seed)[0, : size[0], : size[1]].copy())


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
@pytest.mark.parametrize("size", RESIZED_SIZES)
def test_pixels_are_those_of_the_preprocessing(preprocessing, size):
    image = noise(size)
    found = ResizeAndCrop(preprocessing)(image.permute(2, 0, 1)[None])
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], preprocessing.prepare(image.numpy()))


def test_images_of_a_batch_are_independent():
    batch = torch.stack([smooth_image(70, 90, seed) for seed in range(3)])
    module = ResizeAndCrop(PREPROCESSINGS["odd crop"])
    together = module(batch)
    assert torch.equal(together, torch.cat([module(image[None]) for image in batch]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_pixels_in_floats_are_within_two_levels(name, monkeypatch):
    """Other devices than a CPU resize in floats."""
    monkeypatch.setattr(modules, "_resizes_integers", lambda *arguments: False)
    # Cubic interpolation of noise leaves the range of pixels.
    image = noise((301, 400))
    expected = PREPROCESSINGS[name].prepare(image.numpy()).int()
    found = ResizeAndCrop(PREPROCESSINGS[name])(image.permute(2, 0, 1)[None])[0]
    assert found.dtype == torch.uint8
    difference = (found.int() - expected).abs()
    assert 0 < difference.max() <= 2
    assert difference.float().mean() < 0.3


@pytest.mark.parametrize(
    "name",
    [
        "bicubic",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ["bilinear", "nearest", "odd crop", "a pair"]
        ),
    ],
)
def test_exported_program_takes_all_sizes(name):
    module, dynamic = ResizeAndCrop(PREPROCESSINGS[name]), torch.export.Dim.DYNAMIC
    example = torch.zeros(2, 3, 301, 420, dtype=torch.uint8)
    program = torch.export.export(
        module, (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    ).module()
    for size in RESIZED_SIZES:
        image = noise(size).permute(2, 0, 1)[None]
        assert torch.equal(program(image), module(image)), size


def test_normalized_values_are_those_of_the_preprocessing():
    preprocessing = Preprocessing(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    pixels = torch.from_numpy(images(3)).permute(0, 3, 1, 2)
    assert torch.equal(Normalize(preprocessing)(pixels), preprocessing.normalize(pixels))
