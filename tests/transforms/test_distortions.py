import numpy as np
import pytest
import torch
from helpers import flat_image, smooth_image
from torchvision import tv_tensors
from torchvision.transforms import v2

from sktransfer.transforms.distortions import (
    Blur,
    ColorLoss,
    Erase,
    Geometry,
    Lighting,
    SensorNoise,
)


def test_geometry_without_motion_is_the_identity():
    image = smooth_image(33, 50)
    assert torch.equal(Geometry()(image), image)
    assert torch.equal(Geometry(flip=1.0)(image), image.flip(-1))


def test_geometry_agrees_with_torchvision():
    image = smooth_image(60, 90)
    drawn = {"rotation": 9.0, "across": 0.1, "down": -0.05, "shear": 0.0}
    moved = Geometry().transform(image, drawn | {"zoom": 1.1, "aspect": 1.0, "mirror": -1.0})
    expected = v2.functional.affine(
        image,
        angle=9.0,
        translate=[6, -3],
        scale=1.1,
        shear=[0, 0],
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    inside = (slice(None), slice(15, -15), slice(15, -15))
    assert (moved[inside].int() - expected[inside].int()).abs().max() <= 1


def test_border_color_is_the_majority_of_each_channel():
    image = torch.tensor([250, 20, 130], dtype=torch.uint8)[:, None, None].repeat(1, 32, 32)
    image[:, :, 10:14] = 0  # reaches the border
    shifted = Geometry(shift=0.4)
    for seed in range(10):
        moved = shifted.transform(image, shifted.draw(torch.Generator().manual_seed(seed)))
        assert moved.amax((1, 2)).tolist() == [250, 20, 130]


def test_lighting_computes_contrast_gamma_exposure_and_slope():
    drawn = {"contrast": 1.0, "gamma": 2.0, "exposure": 0.5, "slope": 0.0, "direction": 0.0}
    image = flat_image(0, 1, 3)
    image[:, 0, 1:] = torch.tensor([128, 255], dtype=torch.uint8)
    assert Lighting().transform(image, drawn)[0, 0].tolist() == [0, 32, 128]
    lit = Lighting().transform(
        flat_image(100), drawn | {"gamma": 1.0, "exposure": 1.0, "slope": 0.3}
    )
    assert lit[0, 0, 0] == 70
    assert lit[0, 0, -1] == 130
    assert (lit[0] == lit[0, 0]).all()
    contrast = Lighting().transform(image, drawn | {"contrast": 0.5, "gamma": 1, "exposure": 1})
    assert contrast[0, 0].tolist() == [64, 128, 191]


def test_color_loss_keeps_luminance():
    image = smooth_image()
    gray = ColorLoss(gray=1.0)(image)
    assert torch.equal(gray[0], gray[1])
    expected = v2.functional.rgb_to_grayscale(image)
    assert (gray[:1].int() - expected.int()).abs().max() <= 1
    assert torch.equal(ColorLoss(keep=(1.0, 1.0), gray=0.0)(image), image)


def test_blur_spreads_a_point_and_preserves_its_sum():
    point = flat_image(0)
    point[:, 32, 32] = 255
    drawn = {"radius": 0.05, "path": 0.14, "direction": 0.0, "moving": 1.0}
    line = Blur().transform(point, drawn)[0]
    assert (line > 0).sum(0).max() == 1  # one pixel high, along the rows
    assert 8 <= (line > 0).sum() <= 11
    disc = Blur().transform(point, drawn | {"moving": -1.0})[0]
    assert torch.equal(disc, disc.T)
    assert 30 <= (disc > 0).sum() <= 60
    assert all(abs(int(spread.sum()) - 255) < 30 for spread in (line, disc))
    assert torch.equal(Blur().transform(point, drawn | {"moving": -1.0, "radius": 0.0}), point)


def test_sensor_noise_has_the_drawn_deviation():
    drawn = {"shot": 0.04, "read": 0.03, "grain": 0.0, "seed": 5.0}
    noisy = SensorNoise().transform(flat_image(128, 200, 200), drawn).float()
    assert noisy.mean().item() == pytest.approx(128, abs=0.2)
    expected = 255 * (0.03**2 + 0.04**2 * 128 / 255) ** 0.5
    assert noisy.std().item() == pytest.approx(expected, rel=0.03)
    sensor_noise = SensorNoise()
    seeds = {
        int(sensor_noise.draw(torch.Generator().manual_seed(i))["seed"]) % 2**32 for i in range(200)
    }
    assert len(seeds) == 200


def test_sensor_noise_has_the_drawn_grain():
    def correlation_of_neighbors(grain):
        drawn = {"shot": 0.0, "read": 0.05, "grain": grain, "seed": 5.0}
        noise = SensorNoise().transform(flat_image(128, 150, 200), drawn)[0].float() - 128
        return np.corrcoef(noise[:, 1:].flatten(), noise[:, :-1].flatten())[0, 1]

    fine, pixel, coarse = (correlation_of_neighbors(grain) for grain in (0.0, 1 / 150, 0.02))
    assert fine == pixel == pytest.approx(0, abs=0.02)
    assert coarse > 0.7  # three pixels


def test_erase_fills_a_rectangle_with_the_mean():
    image = smooth_image(64, 100)
    erased = Erase(area=(0.1, 0.1))(image)
    changed = (erased != image).any(0)
    assert 0.8 < changed.sum() / (0.1 * 64 * 64) < 1.2
    color = erased[:, changed]
    assert (color == color[:, :1]).all()
    assert (color[:, 0].float() - image.float().mean((1, 2))).abs().max() < 1


@pytest.mark.parametrize("part", [Geometry, Lighting, ColorLoss, Blur, SensorNoise, Erase])
def test_part_works_in_a_compose_and_respects_its_probability(part):
    image = smooth_image()
    assert torch.equal(v2.Compose([part(p=0.0)])(image), image)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = v2.Compose([part()])(tv_tensors.Image(image))
        torch.manual_seed(0)
        assert torch.equal(first, part()(image))
    assert isinstance(first, tv_tensors.Image)
    with pytest.raises(TypeError, match=rf"{part.__name__} got torch.float32 \(3, 64, 80\), but"):
        part()(image / 255)
