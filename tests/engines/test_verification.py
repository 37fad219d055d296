import pytest
import torch

from sktransfer.engines.verification import min_cosine, noise


def test_min_cosine_is_scale_free_and_nan_for_bad_values():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert min_cosine(x, x) == 1.0
    assert min_cosine(x, 3 * x) == pytest.approx(1.0)
    assert min_cosine(1e-20 * x, 1e-20 * x + 1e-27) == pytest.approx(1.0)
    assert min_cosine(torch.zeros(2, 3), torch.zeros(2, 3)) == 1.0
    opposite = x.clone()
    opposite[1] = -opposite[1]
    assert min_cosine(x, opposite) == pytest.approx(-1.0)
    for bad in (torch.full((3, 5), torch.nan), torch.zeros(3, 5), x[:2], x[:, :4]):
        assert not min_cosine(x, bad) >= 0.9999


def test_noise_is_the_same_image_for_a_size():
    state = torch.get_rng_state()
    image = noise((5, 7))
    assert (image.shape, image.dtype) == ((1, 3, 5, 7), torch.uint8)
    assert torch.equal(image, noise((5, 7)))
    assert len(image.unique()) > 50
    assert torch.equal(torch.get_rng_state(), state)
