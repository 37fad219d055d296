import pickle
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn.datasets
import torch
from helpers import Items, save_images
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from sktransfer.data.containers import holds_rows, source_of
from sktransfer.data.images import Images, as_images, learn_pixel_range
from sktransfer.utils.errors import ImageError

PHOTOGRAPHS = [
    str(Path(sklearn.datasets.__file__).parent / "images" / name)
    for name in ("china.jpg", "flower.jpg")
]


@pytest.fixture(scope="module")
def pixels():
    """Return two photographs, resized: uint8 (2, 20, 30, 3)."""
    small = []
    for path in PHOTOGRAPHS:
        with Image.open(path) as image:
            small.append(np.asarray(image.resize((30, 20))))
    return np.stack(small)


@pytest.fixture(scope="module")
def paths(pixels, tmp_path_factory):
    return save_images(pixels, tmp_path_factory.mktemp("images"))


def file_contents(paths):
    return [Path(path).read_bytes() for path in paths]


def pil(pixels):
    return [Image.fromarray(image) for image in pixels]


def channels_first(pixels):
    return torch.tensor(pixels).permute(0, 3, 1, 2)


def test_files_are_told_from_other_images(paths, pixels):
    content = file_contents(paths)
    X = [
        paths[0],
        Path(paths[0]),
        {"path": paths[0], "bytes": None},
        Path(paths[0]).as_uri(),
        content[0],
        pixels[0],
        Image.fromarray(pixels[0]),
    ]
    images = Images(X)
    assert [images.identity(row).is_file for row in range(7)] == [True] * 4 + [False] * 3
    for row in range(7):
        assert images.fingerprint(row) == images.identity(row).fingerprint
    for row in range(5):
        assert images.content_fingerprint(row) == images.fingerprint(4)
    assert images.content_fingerprint(5) == images.fingerprint(5)
    for other in (pixels, channels_first(pixels), Items(content)):
        assert not as_images(other).identity(0).is_file
    assert as_images(Items(paths)).identity(0).is_file


FORMS = {
    "list of str": lambda paths, _: paths,
    "tuple of Path": lambda paths, _: tuple(map(Path, paths)),
    "array of str": lambda paths, _: np.array(paths),
    "array of Path (n, 1)": lambda paths, _: np.array(list(map(Path, paths)))[:, None],
    "array of str (n, 1)": lambda paths, _: np.array(paths)[:, None],
    "pandas Series": lambda paths, _: pd.Series(paths, index=[7, 3]),
    "pandas Series of categories": lambda paths, _: pd.Series(paths, dtype="category"),
    "pandas Series of Path": lambda paths, _: pd.Series(list(map(Path, paths))),
    "pandas Index": lambda paths, _: pd.Index(paths),
    "pandas DataFrame": lambda paths, _: pd.DataFrame({"image": paths}, index=[7, 3]),
    "pandas DataFrame of PIL": lambda _, pixels: pd.DataFrame({"image": pil(pixels)}),
    "polars Series": lambda paths, _: pl.Series(paths),
    "polars DataFrame": lambda paths, _: pl.DataFrame({"image": paths}),
    "polars DataFrame of bytes": lambda paths, _: pl.DataFrame({"image": file_contents(paths)}),
    "polars Series of structs": lambda paths, _: pl.Series(
        [{"bytes": None, "path": path} for path in paths]
    ),
    "PIL": lambda _, pixels: pil(pixels),
    "bytes": lambda paths, _: file_contents(paths),
    "bytearray": lambda paths, _: list(map(bytearray, file_contents(paths))),
    "memoryview": lambda paths, _: list(map(memoryview, file_contents(paths))),
    "arrays": lambda _, pixels: list(pixels),
    "object array of arrays (n, 1)": lambda _, pixels: pd.DataFrame({"a": list(pixels)}).to_numpy(),
    "NHWC": lambda _, pixels: pixels,
    "NHWC with holes": lambda _, pixels: np.repeat(pixels, 2, axis=1)[:, ::2],
    "NCHW": lambda _, pixels: pixels.transpose(0, 3, 1, 2),
    "int64": lambda _, pixels: pixels.astype(np.int64),
    "uint16": lambda _, pixels: pixels.astype(np.uint16) * 257,
    "float16 0 to 1": lambda _, pixels: (pixels / 255).astype(np.float16),
    "float32 0 to 1": lambda _, pixels: (pixels / 255).astype(np.float32),
    "float64 -1 to 1": lambda _, pixels: pixels / 127.5 - 1,
    "float32 0 to 255, NCHW": lambda _, pixels: pixels.astype(np.float32).transpose(0, 3, 1, 2),
    "tensor": lambda _, pixels: channels_first(pixels),
    "tensors": lambda _, pixels: list(channels_first(pixels)),
    "float tensor with gradient": lambda _, pixels: (channels_first(pixels) / 255).requires_grad_(),
    "NHWC tensor": lambda _, pixels: torch.tensor(pixels),
    "dicts of PIL": lambda _, pixels: [{"image": image, "label": 0} for image in pil(pixels)],
    "dicts of bytes": lambda paths, _: [
        {"bytes": data, "path": "gone.png"} for data in file_contents(paths)
    ],
    "dicts of paths": lambda paths, _: [{"bytes": None, "path": path} for path in paths],
    "dicts of tensors": lambda _, pixels: [
        {"pixel_values": tensor} for tensor in channels_first(pixels) / 255
    ],
    "Dataset of PIL": lambda _, pixels: Items(pil(pixels)),
    "Dataset of paths": lambda paths, _: Items(paths),
    "TensorDataset": lambda _, pixels: TensorDataset(channels_first(pixels), torch.zeros(2)),
    "nested lists": lambda _, pixels: pixels.tolist(),
    "mixed": lambda paths, pixels: [paths[0], pixels[1] / 255],
}
FLAT_FORMS = {
    "array": lambda rows: rows,
    "floats": lambda rows: rows / 255,
    "tensor": lambda rows: torch.tensor(rows),
    "lists": lambda rows: rows.tolist(),
    "pandas": lambda rows: pd.DataFrame(rows),
    "polars": lambda rows: pl.DataFrame(rows),
    "objects": lambda rows: rows.astype(object),
    "Dataset": lambda rows: Items(list(rows)),
}


@pytest.mark.parametrize("form", FORMS)
def test_as_images_reads_every_container_to_the_same_images(form, paths, pixels):
    X = FORMS[form](paths, pixels)
    images = as_images(X, pixel_range=learn_pixel_range(X))
    assert len(images) == 2
    assert not holds_rows(source_of(X))
    for row in range(2):
        assert images[row].dtype == np.uint8
        assert images[row].flags.c_contiguous
        np.testing.assert_array_equal(images[row], pixels[row])
        assert images.fingerprint(row) == images.fingerprint(row)
    assert images.fingerprint(0) != images.fingerprint(1)


@pytest.mark.parametrize("image_shape", [(20, 30, 3), (20, -1, 3), [-1, 30, 3]])
@pytest.mark.parametrize("form", FLAT_FORMS)
def test_as_images_reads_flat_rows_to_the_same_images(form, image_shape, pixels):
    X = FLAT_FORMS[form](pixels.reshape(2, -1))
    assert holds_rows(source_of(X)) == (form != "Dataset")
    pixel_range = learn_pixel_range(X, image_shape=image_shape)
    images = as_images(X, image_shape=image_shape, pixel_range=pixel_range)
    for row in range(2):
        np.testing.assert_array_equal(images[row], pixels[row])


def test_photographs_are_decoded_as_by_pillow():
    images = as_images(PHOTOGRAPHS)
    with Image.open(PHOTOGRAPHS[1]) as flower:
        np.testing.assert_array_equal(images[1], np.asarray(flower))
    assert images.describe(1) == PHOTOGRAPHS[1]


def test_digits_are_read_from_rows_arrays_and_strips():
    digits = load_digits()
    assert learn_pixel_range(digits.data, image_shape=(8, 8)) == (0, 16)
    assert learn_pixel_range(digits.images) == (0, 16)
    flat = as_images(digits.data, image_shape=(8, 8), pixel_range=(0, 16))
    expected = np.rint(digits.images[5] * 255 / 16)
    np.testing.assert_array_equal(flat[5], np.stack([expected] * 3, axis=-1))
    np.testing.assert_array_equal(flat[5], as_images(digits.images, pixel_range=(0, 16))[5])
    strip = as_images(digits.data, image_shape=(1, -1), pixel_range=(0, 16))
    np.testing.assert_array_equal(strip[5][0, :, 0], expected.ravel())


def test_arrays_of_different_sizes_are_accepted(pixels):
    X = [pixels[0], pixels[1, :10], pixels[1, :, :, 0], pixels[1, ..., 0] > 99]
    shapes = [image.shape for image in as_images(X)]
    assert shapes == [(20, 30, 3), (10, 30, 3), (20, 30, 3), (20, 30, 3)]


# Rows, selections, pickles


def test_images_are_a_sequence(paths, pixels):
    images = as_images(paths)
    np.testing.assert_array_equal(images[-1], pixels[1])
    np.testing.assert_array_equal(images[np.int64(1)], pixels[1])
    assert isinstance(images[:1], Images)
    assert len(images[:1]) == 1
    for row in (2, -3):
        with pytest.raises(IndexError):
            images[row]
    with pytest.raises(TypeError):
        images[0.0]


def test_take_renumbers_rows_but_errors_name_those_of_x():
    images = as_images(["a.jpg", "b.jpg", "c.jpg"])
    taken = images.take([2, 0, 2]).take(np.array([1, 2]))
    assert [taken.describe(row) for row in range(len(taken))] == ["a.jpg", "c.jpg"]
    with pytest.raises(ImageError) as caught:
        taken[1]
    assert (caught.value.row, caught.value.source) == (2, "c.jpg")
    assert len(images.take([])) == 0
    with pytest.raises(IndexError):
        images.take([3])


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"memoryview"}))
def test_pickled_images_are_equal(form, paths, pixels):
    images = as_images(FORMS[form](paths, pixels), pixel_range=None).take([1])
    loaded = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(loaded[0], images[0])
    assert loaded.fingerprint(0) == images.fingerprint(0)


def test_as_images_keeps_the_pixel_range_of_images(pixels):
    X = as_images(pixels / 510)
    assert X.pixel_range is None
    assert as_images(X, pixel_range=(0, 1))[0].max() < 200
    fixed = as_images(pixels / 510, pixel_range=(0, 0.5))
    np.testing.assert_array_equal(as_images(fixed, pixel_range=(0, 1))[0], pixels[0])
    assert learn_pixel_range(fixed) == (0, 0.5)
    assert not holds_rows(source_of(fixed))


def test_as_images_leaves_the_input_unchanged(pixels):
    array, tensor, image = pixels / 255, channels_first(pixels) / 255, Image.fromarray(pixels[0])
    for X, values in [(array, array), (tensor, tensor), ([image], image)]:
        before = np.asarray(values).copy()
        as_images(X, pixel_range=learn_pixel_range(X))[0][:] = 7
        as_images(X).fingerprint(0)
        np.testing.assert_array_equal(np.asarray(values), before)


def test_decoded_uint8_array_is_not_shared(pixels):
    X = pixels.copy()
    as_images(X)[0][:] = 7
    np.testing.assert_array_equal(X, pixels)


# Pixel ranges


@pytest.mark.parametrize(
    ("X", "expected"),
    [
        (["gone.jpg"], None),
        ([b"..."], None),
        (pil(np.zeros((2, 4, 4), dtype=np.uint16)), (0, 1)),
        (pil(np.full((2, 4, 4), 40_000, dtype=np.uint16)), (0, 65535)),
        (np.zeros((2, 4, 4), dtype=np.uint8), None),
        ([np.zeros((4, 4), dtype=np.uint8), np.ones((4, 4))], (0, 1)),
        (np.zeros((2, 4, 4), dtype=bool), (0, 1)),
        (np.array([[[0, 16]], [[0, 1]]]), (0, 16)),
        (torch.tensor([[[0.0, 1.0]], [[0.0, 200.0]]]), (0, 255)),
        (torch.tensor([[[0.0, 1.0]]], dtype=torch.bfloat16), (0, 1)),
        ([np.array([[-1.0, 0]]), "gone.jpg", None, np.array([[0.5]])], (-1, 1)),
        (np.array([[[0, 40_000]]]), (0, 65535)),
        (np.array([[[-3, 4]]]), (-3, 4)),
        (np.array([[[np.nan, 0.5]], [[np.inf, 0.25]]]), (0, 1)),
        (np.full((1, 2, 2), np.nan), None),
    ],
)
def test_learn_pixel_range_finds_the_usual_range(X, expected):
    assert learn_pixel_range(X) == expected
    assert learn_pixel_range(list(X)) == expected


def test_learn_pixel_range_reads_all_arrays(monkeypatch):
    X = np.zeros((300, 4, 4))
    X[299, 3, 3] = 16
    monkeypatch.setattr("sktransfer.data.images._BLOCK_BYTES", 1000)
    assert learn_pixel_range(X) == (0, 16)
    assert learn_pixel_range(X[:, None]) == (0, 16)
    assert learn_pixel_range(torch.tensor(X)) == (0, 16)
    assert learn_pixel_range(list(X)) == (0, 16)
    assert learn_pixel_range(as_images(X).take(range(299))) == (0, 1)


def test_learn_pixel_range_reads_64_items_of_a_dataset():
    dataset = Items(list(np.zeros((300, 4, 4))))
    assert learn_pixel_range(dataset) == (0, 1)
    assert dataset.reads == list(range(64))


GRAY_16 = np.random.default_rng(0).integers(0, 40_000, (6, 8), dtype=np.uint16)
# A container of an image that is not 8-bit; its range is that of the array in it.
WIDE_FORMS = {
    "array": lambda array, folder: array,
    "tensor": lambda array, folder: torch.tensor(array.astype(np.float32))[None],
    "PIL": lambda array, folder: Image.fromarray(array),
    "TIFF": lambda array, folder: wide_file(array, folder / "a.tif"),
    "TIFF bytes": lambda array, folder: Path(wide_file(array, folder / "a.tif")).read_bytes(),
    "opened TIFF": lambda array, folder: Image.open(wide_file(array, folder / "a.tif")),
    "dict of bytes": lambda array, folder: {
        "bytes": Path(wide_file(array, folder / "a.tif")).read_bytes()
    },
    "tuple of path": lambda array, folder: (wide_file(array, folder / "a.tif"), 3),
}


def wide_file(array, path):
    Image.fromarray(array).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("array", "pixel_range", "learned"),
    [
        (GRAY_16, None, (0, 65535)),
        (GRAY_16, (0, 65535), (0, 65535)),
        (GRAY_16 // 10, (0, 4095), None),
        (GRAY_16 // 200, None, (0, 255)),
        (GRAY_16.astype(np.float32) / 65535, None, (0, 1)),
        (GRAY_16.astype(np.float32) / 32768 - 1, None, (-1, 1)),
        (GRAY_16.astype(np.float32) / 65535, (0, 1.05), None),
        (GRAY_16.astype(np.float32) / 200, None, (0, 255)),
        (GRAY_16.astype(np.int32), None, (0, 65535)),
        (GRAY_16.astype(np.int32) + 70_000, (60_000, 120_000), None),
    ],
)
@pytest.mark.parametrize("form", WIDE_FORMS)
def test_pixel_range_is_the_same_in_every_container(form, array, pixel_range, learned, tmp_path):
    X = [WIDE_FORMS[form](array, tmp_path)]
    if learned is not None:
        assert learn_pixel_range(X) == learned
    images = as_images(X, pixel_range=pixel_range or learned)
    low, high = pixel_range or learned
    expected = np.clip(np.rint((array.astype(float) - low) / (high - low) * 255), 0, 255)
    np.testing.assert_allclose(images[0][:, :, 1], expected, atol=1)
    np.testing.assert_array_equal(
        images[0], as_images([array], pixel_range=pixel_range or learned)[0]
    )


@pytest.mark.parametrize("form", WIDE_FORMS)
def test_values_beyond_the_range_are_rejected_in_every_container(form, tmp_path):
    images = as_images([WIDE_FORMS[form](GRAY_16, tmp_path)], pixel_range=(0, 255))
    with pytest.raises(ImageError, match=r"row 0 .*up to 38427, but the pixel range is 0 to 255"):
        images[0]


@pytest.mark.parametrize("form", WIDE_FORMS)
def test_range_joins_the_fingerprint_of_images_that_may_not_be_8_bit(form, tmp_path):
    X = [WIDE_FORMS[form](GRAY_16, tmp_path)]
    ranges = (None, (0, 65535), (0, 4095))
    assert len({as_images(X, pixel_range=limits).fingerprint(0) for limits in ranges}) == 3


def test_pixel_range_is_learned_from_64_files_once(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{number}.png") for number in range(100)]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kw: opened.append(1) or open_image(*args))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", None)  # 8-bit files are not decoded
        assert learn_pixel_range(paths) is None
        assert len(opened) == 64
        assert learn_pixel_range(paths) is None
        assert len(opened) == 64
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(paths[0])  # another version
    assert learn_pixel_range(paths) == (0, 65535)


def test_pixel_range_is_learned_from_files_beside_broken_ones(paths, tmp_path):
    wide = wide_file(GRAY_16, tmp_path / "a.tif")
    mixed = [
        *paths * 20,
        "gone.png",
        b"broken",
        wide,
        wide_file(GRAY_16 // 200, tmp_path / "b.tif"),
    ]
    assert learn_pixel_range(mixed) == (0, 65535)
    assert learn_pixel_range(mixed[-1:]) == (0, 255)
    assert learn_pixel_range([np.zeros((4, 4)), wide]) == (0, 65535)


@pytest.mark.parametrize(
    ("high", "dtype", "white"),
    [
        (256, np.uint16, 1023),
        (1023, np.uint16, 1023),
        (1024, np.int16, 4095),
        (4095, np.uint16, 4095),
        (4095, np.int64, 4095),
        (4096, np.int32, 16383),
        (16383, np.uint16, 16383),
        (16384, np.uint16, None),
        (255, np.uint16, None),
        (16384, np.float32, None),
    ],
)
@pytest.mark.parametrize("form", ["array", "PIL", "TIFF", "TIFF bytes"])
def test_integers_of_fewer_than_16_bits_warn(high, dtype, white, form, tmp_path):
    array = np.full((4, 4), high, dtype=dtype)
    if form != "array":
        # The types that Pillow has.
        array = array.astype({"f": np.float32, "u": np.uint16, "i": np.int32}[array.dtype.kind])
    X = [WIDE_FORMS[form](array, tmp_path)]
    if white is None:
        learn_pixel_range(X)
        return
    with pytest.warns(UserWarning, match="Got integer pixels") as caught:
        assert learn_pixel_range(X) == (0, 65535)
    assert [str(warning.message) for warning in caught] == [
        f"Got integer pixels up to {high}, for which pixel_range='auto' uses the range of 16 bits, "
        f"0 to 65535, so the images are dark. If white is {white}, set pixel_range=(0, {white})"
    ]


@pytest.mark.parametrize(
    ("low", "high", "dtype", "warns"),
    [
        (-2.1, 2.6, np.float32, True),
        (-1.0, 1.5, np.float64, True),
        (-1.1, 0.9, np.float32, True),
        (-0.5, 200, np.float32, True),
        (-1.0, 1.0, np.float32, False),
        (0.0, 1e6, np.float32, False),
        (-5, 5, np.int16, False),
        (0.2, 0.9, np.float32, False),
    ],
)
def test_floats_that_look_normalized_warn(low, high, dtype, warns):
    X = np.array([[[low, high]]], dtype=dtype)
    if not warns:
        learn_pixel_range(X)
        return
    with pytest.warns(
        UserWarning, match=r"look normalized .* before normalization, or set pixel_r"
    ):
        assert learn_pixel_range(X) == pytest.approx((low, high))
    assert learn_pixel_range(X.reshape(1, 2), image_shape=(1, -1)) == pytest.approx((low, high))


@pytest.mark.parametrize("high", [1.0, 1.02, 1.1])
@pytest.mark.parametrize("low", [0.0, -0.02, -0.1])
def test_floats_that_exceed_0_to_1_by_little_are_clipped(low, high):
    X = [np.array([[low, 0.5, high]]), np.array([[0.2, 0.5, 0.8]])]
    assert learn_pixel_range(X) == (0, 1)
    for images in (as_images(X), as_images(X, pixel_range=(0, 1))):
        np.testing.assert_array_equal(images[0][0, :, 0], [0, 128, 255])


@pytest.mark.parametrize(
    ("high", "learned"), [(1.3, (0, 16)), (2.0, (0, 16)), (30.5, (0, 255)), (4095, (0, 65535))]
)
def test_floats_that_are_dark_in_their_range_warn(high, learned):
    with pytest.warns(UserWarning, match=rf"pixels up to {high:g}, .* such as \(0, {high:g}\)"):
        assert learn_pixel_range(np.array([[[0.0, high]]])) == learned


@pytest.mark.parametrize(
    "X", [np.array([[[0.0, 5.5]]]), np.array([[[0.0, 2.0]]]).astype(int), np.zeros((1, 2, 2))]
)
def test_other_numbers_do_not_warn_of_their_range(X):
    learn_pixel_range(X)


def test_values_beyond_the_learned_range_are_rejected():
    X = [np.array([[0.0, 1.0]]), np.array([[0.0, 200.0]])]
    images = as_images(X, pixel_range=learn_pixel_range(X[:1]))
    np.testing.assert_array_equal(images[0][0, :, 0], [0, 255])
    with pytest.raises(ImageError) as caught:
        images[1]
    assert str(caught.value) == (
        "Image in row 1 (array of shape (1, 2)): Got pixel values up to 200, but the pixel "
        "range is 0 to 1 (passed, or learned by fit). Pass a pixel_range=(lo, hi) that covers all "
        "images."
    )


def test_images_without_a_range_are_scaled_one_by_one():
    images = as_images([np.array([[0.0, 1.0]]), np.array([[0.0, 255.0]])])
    np.testing.assert_array_equal(images[0], images[1])


@pytest.mark.parametrize("pixel_range", ["auto", (1,), (1, 0), (0, np.inf), (0, None), 3])
def test_invalid_pixel_range_is_rejected(pixel_range):
    with pytest.raises(ValueError, match="Got pixel_range") as caught:
        as_images(["a.jpg"], pixel_range=pixel_range)
    assert str(caught.value) == (
        f"Got pixel_range={pixel_range!r}, but expected (lo, hi), two finite numbers with lo <= hi."
    )


@pytest.mark.parametrize("image_shape", [8, (8,), (8, 0), (8, 8, 3, 1), (-1, -1), (8.0, 8), "88"])
def test_invalid_image_shape_is_rejected(image_shape):
    with pytest.raises(ValueError, match="Got image_shape") as caught:
        as_images(np.zeros((3, 64)), image_shape=image_shape)
    assert str(caught.value) == (
        f"Got image_shape={image_shape!r}, but expected (H, W) or (H, W, C) of positive integers, "
        "one of them possibly -1."
    )


# Broken images


def test_errors_name_row_and_source(paths, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(paths[0]).read_bytes()[:200])
    nan = np.array([[np.nan, 0.5]])
    images = as_images([paths[0], "gone.jpg", broken, None, nan, {"path": "gone.png"}, 3])
    images[0]
    for row, source, reason in [
        (1, "gone.jpg", "There is no such file"),
        (2, str(broken), "truncated or corrupt"),
        (3, "missing value", "Got a missing value, but expected a path"),
        (4, "array of shape (1, 2)", "NaN or infinite"),
        (5, "gone.png", "There is no such file"),
        (6, "int", "Got int, but expected a path"),
    ]:
        with pytest.raises(ImageError, match=reason) as caught:
            images[row]
        assert (caught.value.row, caught.value.source) == (row, source)
        assert str(caught.value).startswith(f"Image in row {row} ({source}): ")
        if row not in (2, 4):
            with pytest.raises(ImageError, match=reason) as caught:
                images.fingerprint(row)
            assert (caught.value.row, caught.value.source) == (row, source)


def test_missing_first_path_is_rejected_only_when_read(paths):
    for X in (pd.Series([None, paths[0]]), np.array([[None], [paths[0]]], dtype=object)):
        images = as_images(X)
        assert images[1].shape == (20, 30, 3)
        with pytest.raises(ImageError, match=r"row 0 \(missing value\)"):
            images[0]


def test_failing_dataset_raises_an_error_that_names_the_row():
    class Failing(Items):
        def __getitem__(self, row):
            raise OSError("disk on fire")

    images = as_images(Failing([0, 1]))
    with pytest.raises(ImageError) as caught:
        images[1]
    assert str(caught.value) == (
        "Image in row 1 (item of Failing): The dataset cannot read it: OSError('disk on fire')."
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert learn_pixel_range(Failing([0, 1])) is None


# Threads and memory


def test_lazy_image_is_shared_by_threads(tmp_path):
    path = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.getexif()[0x0112] = 6
    image.save(path, exif=image.getexif())
    for _ in range(5):
        with Image.open(path) as lazy, ThreadPoolExecutor(8) as pool:
            images = as_images([lazy] * 16)
            for got in pool.map(images.__getitem__, range(16)):
                np.testing.assert_array_equal(got, np.rot90(noise, -1))


def test_dataset_is_read_by_one_thread_at_a_time(pixels):
    class Fragile(Items):
        inside = 0

        def __getitem__(self, row):
            Fragile.inside += 1
            assert Fragile.inside == 1
            time.sleep(0.0005)
            Fragile.inside -= 1
            return pixels[row % 2]

    images = as_images(Fragile([0] * 100))
    with ThreadPoolExecutor(8) as pool:
        for row, got in enumerate(pool.map(images.__getitem__, range(100))):
            np.testing.assert_array_equal(got, pixels[row % 2])


def test_many_paths_take_no_memory(paths):
    many = paths * 100_000
    for X in (many, np.array(many), pd.Series(many)):
        tracemalloc.start()
        images = as_images(X)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        images.take(range(100_000, 100_010))[3]
        tracemalloc.stop()
        assert len(images) == 200_000


def test_decoded_images_are_not_kept(paths):
    images = as_images(PHOTOGRAPHS * 20)
    tracemalloc.start()
    for row in range(len(images)):
        images[row]
    assert tracemalloc.get_traced_memory()[0] < 1e5
    tracemalloc.stop()


def test_learn_pixel_range_does_not_copy_the_data():
    X = np.ones((200, 64, 64, 3), dtype=np.float32)
    tracemalloc.start()
    assert learn_pixel_range(X) == (0, 1)
    assert learn_pixel_range(torch.tensor(X)) == (0, 1)
    assert tracemalloc.get_traced_memory()[1] < X.nbytes / 10
    tracemalloc.stop()
