import numpy as np
import pytest
import torch
import torchvision.models as tvm
from PIL import Image
from sklearn.datasets import load_sample_images

from sktransfer.transforms.preprocessing import Preprocessing, check_image_size


@pytest.mark.parametrize("name", ["ResNet50_Weights", "EfficientNet_B3_Weights", "Swin_T_Weights"])
def test_preprocessing_equals_torchvision(name):
    preset = getattr(tvm, name).DEFAULT.transforms()
    preprocessing = Preprocessing.from_torchvision(preset)
    photograph = load_sample_images().images[0]
    expected = preset(Image.fromarray(photograph))
    got = preprocessing.normalize(preprocessing.prepare(photograph)[None])[0]
    # Pillow and torch round the two passes of a resize differently: rarely, and by at most two
    # gray values.
    gray_value = 1 / 255 / min(preprocessing.std)
    assert (got - expected).abs().max() < 2.01 * gray_value
    assert (got - expected).abs().mean() < 0.01 * gray_value


def test_normalize_subtracts_mean_and_divides_by_std():
    preprocessing = Preprocessing(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    batch = torch.tensor([0, 127, 255], dtype=torch.uint8).expand(1, 3, 1, 3)
    torch.testing.assert_close(
        preprocessing.normalize(batch)[0, 0, 0], torch.tensor([-127 / 128, 0.0, 1.0])
    )
    assert batch[0, 0, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize(
    ("image_size", "resize", "crop"),
    [
        (None, 256, (224, 224)),
        (112, 128, (112, 112)),
        ((64, 32), (64, 32), (64, 32)),
        (np.int64(224), 256, (224, 224)),
    ],
)
def test_image_size_sets_resize_and_crop(image_size, resize, crop):
    sized = Preprocessing().with_image_size(image_size)
    assert (sized.resize, sized.crop) == (resize, crop)
    image = np.zeros((50, 80, 3), dtype=np.uint8)
    assert sized.prepare(image).shape == (3, *crop)


def test_image_size_set_twice_keeps_the_margin():
    assert Preprocessing().with_image_size(112).with_image_size(224) == Preprocessing()


@pytest.mark.parametrize("image_size", [0, -1, 2.5, "224", (224,) * 3, (0, 8), ()])
def test_invalid_image_size_is_rejected(image_size):
    with pytest.raises(ValueError, match=r"Got image_size=.*but expected a side in pixels such as"):
        Preprocessing().with_image_size(image_size)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 64, 3), (3, 40_000, 3), (40_000, 2, 3)])
def test_prepared_strip_has_the_size_of_the_crop(shape):
    assert Preprocessing().prepare(np.zeros(shape, np.uint8)).shape == (3, 224, 224)


def test_strip_is_cropped_at_its_center():
    strip = np.zeros((10, 400, 3), np.uint8)
    strip[:, 195:205] = 255
    prepared = Preprocessing().prepare(strip).float()
    assert prepared[0, 112, 112] == 255
    torch.testing.assert_close(prepared, prepared.flip(-1), atol=1, rtol=0)


def test_export_before_the_first_image_changes_nothing():
    class Normalize(torch.nn.Module):
        def forward(self, batch):
            return preprocessing.normalize(batch)

    preprocessing = Preprocessing(mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.125))  # not used before
    batch = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    exported = torch.export.export(Normalize(), (torch.zeros_like(batch),)).module()
    expected = preprocessing.normalize(batch)
    assert torch.equal(exported(batch), expected)
    again = torch.export.export(Normalize(), (batch,)).module()
    assert torch.equal(again(batch), expected)


def test_prepared_images_are_channels_last():
    assert (
        Preprocessing().prepare(np.zeros((300, 300, 3), np.uint8)).permute(1, 2, 0).stride(2) == 1
    )


@pytest.mark.parametrize(
    "size",
    ["big", "224", 0, 1, 7, -3, (0, 5), 10**6, True, (True, 32), (224, 224, 3), (), 32.0],
)
def test_check_image_size_rejects_other_values(size):
    with pytest.raises(ValueError, match=r"but expected a side in pixels such as 224 \(an integer"):
        check_image_size(size, options=("auto",))


@pytest.mark.parametrize("size", [None, "auto", 8, 224, np.int64(64), (48, 64), [32, np.int32(32)]])
def test_check_image_size_accepts_sizes(size):
    check_image_size(size, options=("auto",))
