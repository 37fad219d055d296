"""Resizing on a device gives the pixels that resizing on the CPU gives."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from sktransfer.transforms import device_resize
from sktransfer.transforms.device_resize import can_resize, resize, resize_stack
from sktransfer.transforms.preprocessing import Preprocessing

PHOTOGRAPHS = load_sample_images().images
PREPROCESSINGS = {
    "bilinear": Preprocessing(),
    "bicubic": Preprocessing(interpolation="bicubic"),
    "small": Preprocessing(40, (32, 32)),
    "no margin": Preprocessing(64, (64, 64)),
    "odd crop": Preprocessing(51, (37, 40)),
    "a pair": Preprocessing((48, 60), (48, 60), "bicubic"),
    "enlarging": Preprocessing(420, (400, 400)),
    "enlarging, bicubic": Preprocessing(420, (400, 400), "bicubic"),
}
SIZES = [(427, 640), (300, 301), (301, 300), (64, 80), (200, 200), (90, 350), (350, 90), (33, 41)]


def image(height, width, number=0):
    return torch.from_numpy(PHOTOGRAPHS[number % 2][:height, :width].copy()).permute(2, 0, 1)


def prepared(images, preprocessing):
    return torch.stack([preprocessing.prepare(each.permute(1, 2, 0).numpy()) for each in images])


def assert_equal_pixels(found, expected):
    assert (found.dtype, found.shape) == (torch.uint8, expected.shape)
    difference = (found.short() - expected.short()).abs()
    assert difference.max() <= 2  # rounding, twice
    assert difference.float().mean() < 0.05


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_images_of_many_sizes_are_resized_as_on_the_cpu(preprocessing):
    sizes = [size for size in SIZES if can_resize(preprocessing, size)]
    assert len(sizes) >= 6
    images = [image(*size, number) for number, size in enumerate(sizes)]
    assert_equal_pixels(resize(images, preprocessing), prepared(images, preprocessing))


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
def test_images_of_one_size_are_resized_as_on_the_cpu(preprocessing):
    images = [image(100, 130, number) for number in range(3)]
    expected = prepared(images, preprocessing)
    assert_equal_pixels(resize(images, preprocessing), expected)
    assert_equal_pixels(resize_stack(torch.stack(images), preprocessing), expected)


def test_groups_within_the_memory_limit_give_the_same(monkeypatch):
    preprocessing = PREPROCESSINGS["small"]
    images = [image(50 + 7 * number, 90 - 5 * number, number) for number in range(9)]
    expected = resize(images, preprocessing)
    stack = torch.stack([image(60, 50, number) for number in range(5)])
    expected_stack = resize_stack(stack, preprocessing)
    for limit in (1, 12 * 60 * 90 * 2, 12 * 110 * 90 * 4):
        monkeypatch.setattr(device_resize, "_MAX_BYTES", limit)
        assert torch.equal(resize(images, preprocessing), expected)
        assert torch.equal(resize_stack(stack, preprocessing), expected_stack)


@pytest.mark.parametrize(
    ("preprocessing", "size", "possible"),
    [
        (Preprocessing(), (300, 400), True),
        (Preprocessing(), (1, 1), True),
        (Preprocessing(interpolation="nearest"), (300, 400), False),
        (Preprocessing(), (100, 401), False),  # cropped before it is resized
        (Preprocessing(), (100, 400), True),
        (Preprocessing((8, 8), (8, 8)), (100, 4000), True),
        (Preprocessing(200, (224, 224)), (300, 300), False),  # enlarged once more
        (Preprocessing(200, (224, 180)), (300, 200), True),
    ],
)
def test_can_resize_accepts_what_the_cpu_resizes_in_one_step(preprocessing, size, possible):
    assert can_resize(preprocessing, size) == possible


@pytest.mark.parametrize("size", [(300, 400), (401, 300), (7, 9), (255, 256), (1000, 333)])
def test_resized_size_is_that_of_the_cpu(size):
    for resized_to in (256, 33, (20, 30)):
        preprocessing = Preprocessing(resized_to, (16, 16))
        resized = preprocessing.resized(np.zeros((*size, 3), np.uint8))
        assert preprocessing.resized_size(size) == tuple(resized.shape[1:])
