import pytest
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from sktransfer.transforms.augmentation import POLICIES, resolve_augmentation
from sktransfer.transforms.device_views import augment, can_augment
from sktransfer.transforms.distortions import (
    Blur,
    ColorLoss,
    Erase,
    Geometry,
    Lighting,
    SensorNoise,
)

PHOTOGRAPH = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
IMAGES = [PHOTOGRAPH[:, top : top + 70, 3 * top : 3 * top + 80 + top] for top in (0, 40, 90)]
GEOMETRY = Geometry(10, 0.05, (0.9, 1.2))


@pytest.mark.parametrize("name", POLICIES)
def test_device_computes_the_views_of_policies(name):
    assert can_augment(resolve_augmentation(name))


@pytest.mark.parametrize(
    "steps",
    [
        [Blur(), Geometry()],
        [Geometry(p=0.5), Blur()],
        [Geometry(), v2.RandomInvert()],
        [v2.RandomRotation(5)],
    ],
    ids=["geometry second", "geometry at random", "with another transform", "another transform"],
)
def test_device_leaves_other_views_to_the_cpu(steps):
    assert not can_augment(resolve_augmentation(v2.Compose(steps)))
    assert not can_augment(None)


@pytest.mark.parametrize("size", [(60, 70), (48, 33)])
@pytest.mark.parametrize(
    "part",
    [
        Lighting((0.5, 1.3), (0.7, 1.3), gamma=(0.7, 1.5), gradient=0.4, p=0.7),
        ColorLoss(keep=(0.0, 1.5), gray=0.3, p=0.7),
        Blur(defocus=0.06, motion=0.1, p=0.7),
        SensorNoise(shot=0.1, read=0.12, grain=0.05, p=0.7),
        SensorNoise(shot=0.1, read=0.12, p=0.7),
        Erase(p=0.7),
        Erase(area=(0.5, 4.0)),  # larger than the image
    ],
    ids=lambda part: f"{type(part).__name__}({part.extra_repr()})",
)
def test_views_are_those_of_the_cpu(part, size):
    augmentation = resolve_augmentation(v2.Compose([GEOMETRY, part]))
    rows, seeds = [0, 0, 1, 2] * 8, range(32)
    found = augment(augmentation, IMAGES, rows, seeds, size)
    expected = torch.stack(
        [augmentation(IMAGES[row], seed, size) for row, seed in zip(rows, seeds, strict=True)]
    )
    expected = v2.functional.center_crop(expected, list(size))
    differences = (found.int() - expected.int()).abs()
    # Two roundings; a level that the geometry rounds differently is changed by up to a factor.
    assert differences.max() <= 4
    assert differences.float().mean() < 0.02
    resampled = augment(resolve_augmentation(v2.Compose([GEOMETRY])), IMAGES, rows, seeds, size)
    is_changed = (found != resampled).flatten(1).any(1)
    assert is_changed.all() if part.p == 1 else 16 <= is_changed.sum() < 32
