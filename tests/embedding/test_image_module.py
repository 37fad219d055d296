"""A model as one torch module: frozen, and from images to outputs."""

import re

import pytest
import torch
from helpers import SIZE, Tiny, pixel_batch
from torch import nn

from sktransfer.embedding.image_module import ImageModule

PREPROCESSING = Tiny.preprocessing


@pytest.fixture
def network():
    return Tiny()


def test_module_stays_frozen_in_training_mode(network):
    module = ImageModule(PREPROCESSING, network)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    outputs = module.train()(pixel_batch())
    assert not any(part.training for part in module.modules())
    assert not any(weight.requires_grad for weight in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(module(pixel_batch()), outputs)


def test_network_is_copied(network):
    module = ImageModule(PREPROCESSING, network)
    expected = module(pixel_batch())
    with torch.no_grad():
        network[0][0].weight.zero_()
    assert network.training
    assert torch.equal(module(pixel_batch()), expected)


def test_images_of_the_crop_size_are_normalized_and_passed_on(network):
    module = ImageModule(PREPROCESSING, network)
    pixels = pixel_batch(side=SIZE)
    expected = network.eval()(PREPROCESSING.normalize(pixels))
    torch.testing.assert_close(module(pixels), expected)
    assert module(pixels).shape == (5, 5)


def test_then_adds_modules_and_classes(network):
    module = ImageModule(PREPROCESSING, network)
    longer = module.then(nn.Softmax(dim=1), classes=["a"])
    torch.testing.assert_close(longer(pixel_batch()), module(pixel_batch()).softmax(1))
    assert (module.classes, longer.classes) == (None, ["a"])


def test_floats_raise_an_error(network):
    message = re.escape("Got images of torch.float32, but expected uint8 from 0 to 255")
    with pytest.raises(TypeError, match=message):
        ImageModule(PREPROCESSING, network)(pixel_batch().float())


@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 20, 20, 3), (2, 1, 20, 20)])
def test_other_shapes_raise_an_error_with_the_remedy(network, shape):
    message = re.escape(f"Got images of shape {shape}, but expected (N, 3, height, width)")
    with pytest.raises(ValueError, match=message):
        ImageModule(PREPROCESSING, network)(torch.zeros(shape, dtype=torch.uint8))
