"""A network that is cut at a boundary computes the same as plain torch."""

import dataclasses

import numpy as np
import pytest
import torch
from activation_helpers import FLOAT16_TOLERANCE, TINY, compute_config, run_in_torch, views_of
from helpers import cosine, images

from sktransfer.backbones.loading import load_backbone
from sktransfer.data.images import as_images
from sktransfer.finetuning import cut_network
from sktransfer.finetuning.cut_network import Network
from sktransfer.utils.errors import ImageError


def cut(boundary, backbone=TINY, size=None):
    """Build a network cut at a boundary, its suffix with a random head, and that head in numpy."""
    preprocessing = backbone.preprocessing.with_image_size(size)
    network = Network(backbone, preprocessing, boundary, 3, dropout=0.5, learn_statistics=False)
    suffix = network.suffix({boundary}, compute_config())
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=suffix.head.weight.shape), rng.normal(size=3)
    suffix.set_head(weight, bias)
    return network, suffix, lambda x: (x.double().numpy() @ weight.T + bias).astype(np.float32)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_network_apply_equals_plain_torch(boundary, n, stored, store):
    network, suffix, head = cut(boundary)
    views = views_of(n, 0)
    expected = run_in_torch(views, 2)
    tolerance = FLOAT16_TOLERANCE if boundary == 1 else {"rtol": 1e-4, "atol": 1e-4}
    for layer, expected_output in ((suffix, head(expected)), (suffix.embed, expected.numpy())):
        output = network.apply(views.images, layer, compute_config(store if stored else None), 0)
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, expected_output, **tolerance)


@pytest.mark.parametrize("boundary", [0, 10, 18])
def test_network_apply_of_lite0_equals_plain_torch(boundary):
    lite0 = load_backbone("efficientnet_lite0")
    network, suffix, _ = cut(boundary, lite0, size=64)
    views = views_of(images(2, side=70), 0, lite0, size=64)
    embeddings = network.apply(views.images, suffix.embed, compute_config(), 0)
    assert cosine(embeddings, run_in_torch(views, 18, lite0)).min() > 0.99999


@pytest.mark.parametrize("chunk", [7, 16, 17, 40])
@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_network_apply_does_not_depend_on_the_chunk_size(boundary, chunk, store, monkeypatch):
    network, suffix, _ = cut(boundary)
    X = as_images(images(40))
    whole = network.apply(X, suffix, compute_config(), 0)
    lengths = []

    def layer(x):
        lengths.append(len(x))
        return suffix(x)

    monkeypatch.setattr(cut_network, "_IMAGES_PER_CHUNK", chunk)
    atol = 1e-6 * np.abs(whole).max()  # chunks of another length may be summed in another order
    for _ in range(2):
        chunked = network.apply(X, layer, compute_config(store), 0)
        np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=atol)
    assert max(lengths) <= chunk
    assert sum(lengths) == 80


def test_network_apply_names_the_row_of_a_broken_image_in_a_later_chunk(monkeypatch):
    monkeypatch.setattr(cut_network, "_IMAGES_PER_CHUNK", 7)
    X = [*images(20), b"no image", *images(2)]
    for boundary in (0, 1):
        network, suffix, _ = cut(boundary)
        with pytest.raises(ImageError) as caught:
            network.apply(as_images(X), suffix, compute_config(), 0)
        assert caught.value.row == 20


def test_network_suffix_accepts_activations_at_every_boundary():
    network = Network(TINY, TINY.preprocessing, 0, 3, 0.0, False)
    suffix = network.suffix({0, 1, 2}, compute_config())
    views = views_of(4, 0)
    for boundary in (0, 1, 2):
        suffix.move_boundary(boundary, ())
        x = run_in_torch(views, boundary).flatten(1)
        torch.testing.assert_close(suffix.embed(x), run_in_torch(views, 2))


@pytest.mark.parametrize(
    ("precision", "trained_in"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_network_suffix_never_trains_in_float16(precision, trained_in):
    network = Network(TINY, TINY.preprocessing, 1, 3, 0.0, False)
    low = dataclasses.replace(compute_config(), precision=precision)
    assert network.suffix({1}, low).precision == trained_in


@pytest.mark.parametrize("boundary", [0, 1, 2])
def test_network_runner_carries_pixels_to_the_boundary(boundary):
    network, _, _ = cut(boundary)
    views = views_of(3, 0)
    batch = torch.stack([views.prepare(item) for item in range(3)])
    activations = network.runner(boundary, compute_config(), 3)(batch)
    assert activations.dtype == torch.float32
    torch.testing.assert_close(activations.flatten(1), run_in_torch(views, boundary).flatten(1))
