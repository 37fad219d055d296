import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from sktransfer.data.decoding import channel_axis
from sktransfer.data.items import describe, resolve
from sktransfer.utils.errors import ImageError

RGB = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "channels_first", "expected"),
    [
        ((8, 6), False, None),
        ((8, 6), True, None),
        *[((8, 6, c), False, -1) for c in (1, 2, 3, 4)],
        *[((c, 8, 6), False, 0) for c in (1, 3, 4)],
        *[((c, 8, 6), True, 0) for c in (1, 2, 3, 4)],
        ((8, 6, 3), True, -1),
        ((3, 6, 3), False, -1),
        ((3, 6, 3), True, 0),
        ((1, 1, 1), True, 0),
    ],
)
def test_channel_axis_follows_shape_and_layout(shape, channels_first, expected):
    assert channel_axis(shape, channels_first) == expected


@pytest.mark.parametrize("shape", [(), (8,), (2, 8, 6), (8, 6, 5), (2, 2, 2, 3)])
def test_channel_axis_rejects_other_shapes(shape):
    with pytest.raises(ImageError, match="but expected"):
        channel_axis(shape, channels_first=False)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0, 3), (0,)])
def test_array_without_pixels_is_rejected(shape):
    with pytest.raises(ImageError) as caught:
        resolve(np.zeros(shape))
    assert caught.value.reason == f"Got no pixels: the shape is {shape}."


def test_folded_row_has_channels_last_if_both_are_possible():
    row = torch.arange(3 * 5 * 4)
    np.testing.assert_array_equal(resolve(row, (3, 5, 4)), np.arange(60).reshape(3, 5, 4))
    np.testing.assert_array_equal(
        resolve(row, (3, 4, 5)), np.arange(60).reshape(3, 4, 5).transpose(1, 2, 0)
    )
    with pytest.raises(ImageError, match=r"Got 60 numbers, which do not fit image_shape=\(7, -1\)"):
        resolve(row, (7, -1))


def test_tensors_of_any_dtype_are_resolved():
    tensor = torch.tensor(RGB).permute(2, 0, 1)
    for kind in (
        tensor.double().requires_grad_(),
        tensor.bfloat16(),
        torch.rand(3, 8, 6, requires_grad=True) * 0 + tensor,
    ):
        np.testing.assert_array_equal(resolve(kind), RGB.astype(float), strict=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_are_resolved():
    on_device = torch.tensor(RGB, device="cuda", dtype=torch.float32).requires_grad_()
    np.testing.assert_array_equal(resolve(on_device.permute(2, 0, 1)), RGB)


@pytest.mark.parametrize(
    "item",
    [
        {"image": RGB},
        {"img": RGB, "label": 3},
        {"pixel_values": torch.tensor(RGB)},
        {"image": {"image": RGB}},
        (RGB, 3),
        (RGB, {"a": 1}, "b"),
        [RGB],
        RGB.tolist(),
        tuple(RGB.tolist()),
        pl.Series(RGB[None])[0],
    ],
)
def test_wrapped_images_are_unwrapped(item):
    np.testing.assert_array_equal(resolve(item), RGB)


def test_hugging_face_items_are_resolved():
    assert resolve({"bytes": b"123", "path": "a.jpg"}) == b"123"
    assert resolve({"bytes": None, "path": "a.jpg"}) == "a.jpg"
    assert resolve({"image": {"bytes": None, "path": "a.jpg"}}) == "a.jpg"
    with pytest.raises(ImageError) as caught:
        resolve({"label": 3, "photo": RGB})
    assert caught.value.reason == (
        "Got a dict with keys 'label', 'photo', but expected one of 'image', 'img', "
        "'pixel_values', 'bytes', 'path'. Pass the column of images itself."
    )


@pytest.mark.parametrize(
    ("item", "what"),
    [
        (None, "missing value"),
        (float("nan"), "missing value"),
        (pd.NA, "missing value"),
        ({"image": None}, "missing value"),
        (3, "int"),
        (object(), "object"),
    ],
)
def test_items_that_are_no_image_are_rejected(item, what):
    with pytest.raises(ImageError) as caught:
        resolve(item)
    assert caught.value.reason == (
        f"Got {what}, but expected a path, a PIL image, an array, a tensor, encoded bytes "
        "or a dict."
    )


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (np.ones((3, 3), complex), "Complex data not supported"),
        (np.ones((3, 3), object), "Got pixels of dtype object, but expected numbers"),
        ([[1, 2], [3]], "The numbers do not form an array"),
        (np.ones(9), r"Got shape \(9,\), but expected"),
    ],
)
def test_arrays_that_are_no_image_are_rejected(item, reason):
    with pytest.raises(ImageError, match=reason):
        resolve(item)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"bytes": b"", "path": "a.jpg"}, "a.jpg"),
        ({"bytes": None}, "missing value"),
        ({"foo": 1}, "dict"),
        (("a.jpg", 3), "a.jpg"),
        (torch.zeros(3, 4, 5), "tensor of shape (3, 4, 5)"),
        (memoryview(b""), "bytes"),
        (7, "int"),
    ],
)
def test_describe_names_the_item(item, said):
    assert describe(item) == said
