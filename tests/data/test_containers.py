import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_array, csr_matrix
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sktransfer.data.containers import check_source, source_of
from sktransfer.utils.errors import ImageError

RGB = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
EXPECTED = "expected a list, array, Series, one-column DataFrame or dataset of images"


def check(X, image_shape=None):
    check_source(source_of(X), image_shape)


# Rejected containers


@pytest.mark.parametrize(
    ("X", "description"),
    [
        ("cat.jpg", "cat.jpg"),
        (np.str_("cat.jpg"), "cat.jpg"),
        (b"...", "bytes"),
        (Image.new("RGB", (6, 8)), "PIL image, RGB, 6 x 8"),
        (np.array("cat.jpg"), "array of shape ()"),
        (np.float64(3), "array of shape ()"),
    ],
)
def test_single_image_is_rejected(X, description):
    with pytest.raises(ValueError, match="wrap it") as caught:
        check(X)
    assert str(caught.value) == (
        f"Got a single image ({description}), but {EXPECTED}; wrap it in a list: [image]."
    )


@pytest.mark.parametrize(
    ("X", "description", "gray"),
    [
        (RGB, "array of shape (8, 6, 3)", "X[..., None]"),
        (RGB / 255, "array of shape (8, 6, 3)", "X[..., None]"),
        (torch.zeros(3, 8, 6), "tensor of shape (3, 8, 6)", "X[:, None]"),
        (torch.zeros(8, 6, 4), "tensor of shape (8, 6, 4)", "X[:, None]"),
    ],
)
def test_single_image_as_an_array_is_rejected(X, description, gray):
    with pytest.raises(ValueError, match="wrap it") as caught:
        check(X)
    assert str(caught.value) == (
        f"Got a single image ({description}), but {EXPECTED}; wrap it in a list: [image]. "
        f"If these are gray images, add a channel axis: {gray}."
    )


@pytest.mark.parametrize(
    "X",
    [
        np.zeros((3, 8, 6)),  # Three gray images, since numpy has channels last.
        np.zeros((8, 6, 2)),
        np.zeros((5, 4, 4)),
        torch.zeros(1, 8, 6),
        torch.zeros(2, 8, 6),
        torch.zeros(8, 6, 1)[..., None],
        RGB[:, :, :, None],
    ],
)
def test_small_stacks_are_not_taken_for_a_single_image(X):
    check(X)


def test_folder_is_rejected_with_load_image_folder_as_remedy(tmp_path):
    for X in (tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match="a folder") as caught:
            check(X)
        assert str(caught.value) == (
            f"Got X={str(tmp_path)!r}, a folder, but {EXPECTED}. "
            f"load_image_folder({str(tmp_path)!r}) lists the images in it."
        )


def test_dict_is_rejected():
    with pytest.raises(ValueError, match=r"Got X as a dict with keys 'image', 'label', but"):
        check({"image": [RGB], "label": [0]})


class WithoutLength(Dataset):
    def __getitem__(self, row):
        return RGB


class Stream(IterableDataset):
    def __len__(self):
        return 1

    def __iter__(self):
        return iter([RGB])


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (
            (path for path in ["a.jpg"]),
            f"Got X of type generator, which has no __len__, but {EXPECTED}. "
            "Convert it to a list first: list(X).",
        ),
        (
            {"a.jpg"},
            f"Got X of type set, which has no __getitem__, but {EXPECTED}. "
            "Convert it to a list first: list(X).",
        ),
        (
            Stream(),
            f"Got X of type Stream, which has no __len__, but {EXPECTED}. "
            "Convert it to a list first: list(X).",
        ),
        (WithoutLength(), f"Got X of type WithoutLength, which has no __len__, but {EXPECTED}."),
        (None, f"Got X of type NoneType, which has no __len__, but {EXPECTED}."),
        (
            DataLoader([RGB]),
            f"Got X of type DataLoader, but {EXPECTED}. Pass its dataset: X.dataset.",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_container_without_length_or_items_is_rejected(X, message):
    with pytest.raises(TypeError) as caught:
        check(X)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "X", [csr_matrix(np.eye(4)), csr_array(np.eye(4)), torch.eye(4).to_sparse()]
)
def test_sparse_matrix_is_rejected(X):
    with pytest.raises(TypeError, match="Sparse data was passed for X, but dense data is required"):
        check(X)


@pytest.mark.parametrize(
    "X", [np.ones((4, 4), complex), np.ones((2, 8, 8), complex), torch.ones(4, 4) * 1j, [[1j, 2.0]]]
)
def test_complex_numbers_are_rejected(X):
    with pytest.raises(ValueError, match="Complex data not supported"):
        check(X, (1, -1))


@pytest.mark.parametrize(
    ("X", "shape"),
    [([], "(0,)"), ((), "(0,)"), (np.empty((0, 3)), "(0, 3)"), (pd.Series([], dtype=str), "(0,)")],
)
def test_empty_container_is_rejected(X, shape):
    with pytest.raises(ValueError, match="0 sample") as caught:
        check(X, (1, -1))
    assert (
        str(caught.value)
        == f"Found array with 0 sample(s) (shape={shape}) while a minimum of 1 is required."
    )


@pytest.mark.parametrize("X", [np.empty((3, 0)), [[], [], []]])
def test_rows_without_features_are_rejected(X):
    with pytest.raises(ValueError, match="0 feature") as caught:
        check(X, (1, -1))
    assert (
        str(caught.value)
        == "Found array with 0 feature(s) (shape=(3, 0)) while a minimum of 1 is required."
    )


@pytest.mark.parametrize(
    "X",
    [
        np.arange(3),
        [1, 2, 3],
        [np.bool_(1)] * 3,
        np.arange(3).astype(object),
        torch.arange(3),
        pd.Series([1, 2, 3]),
        pl.Series([1, 2, 3]),
    ],
)
def test_one_dimensional_numbers_are_rejected(X):
    with pytest.raises(ValueError, match="Expected 2D") as caught:
        check(X, (1, -1))
    assert str(caught.value) == (
        "Expected 2D array, got 1D array of numbers instead, of shape (3,). "
        "Reshape your data: X.reshape(1, -1) if it is a single image."
    )


@pytest.mark.parametrize("X", [np.zeros((2, 5, 6, 7)), torch.zeros(2, 5, 6, 7)])
def test_array_without_a_channel_axis_is_rejected(X):
    with pytest.raises(ImageError) as caught:
        check(X)
    assert caught.value.reason == (
        "Got shape (5, 6, 7), but expected (H, W), (H, W, C) or (C, H, W) with C one of 1, 2, 3, 4."
    )


# Tables


@pytest.mark.parametrize(
    ("X", "columns", "example"),
    [
        (pd.DataFrame({"a": ["x.jpg"], "b": [1]}), "'a', 'b'", "X[['a']]"),
        (pl.DataFrame({"a": ["x.jpg"], "b": [1]}), "'a', 'b'", "X[['a']]"),
        (pd.DataFrame({"a": [{"bytes": b""}], "b": [1]}), "'a', 'b'", "X[['a']]"),
        (np.array([["x.jpg", "y.jpg"]]), "0, 1", "X[:, 0]"),
        (np.array([["x.jpg", 1]], dtype=object), "0, 1", "X[:, 0]"),
    ],
)
def test_table_with_several_columns_is_rejected(X, columns, example):
    with pytest.raises(ValueError, match="Select the column") as caught:
        check(X)
    assert str(caught.value) == (
        f"Got a table with columns {columns}, but expected one column of images. "
        f"Select the column, for example {example}."
    )


@pytest.mark.parametrize(
    ("X", "image_shape", "message"),
    [
        (
            np.zeros((5, 64)),
            None,
            "Got rows of 64 numbers (X of shape (5, 64)), but expected images. Pass the shape "
            "of one image: image_shape=(H, W) or (H, W, C); here, image_shape=(8, 8) probably "
            "fits. If X is a single gray image, wrap it in a list: [image].",
        ),
        (
            [[0] * 48],
            None,
            "Got rows of 48 numbers (X of shape (1, 48)), but expected images. Pass the shape "
            "of one image: image_shape=(H, W) or (H, W, C); here, image_shape=(4, 4, 3) probably "
            "fits. If X is a single gray image, wrap it in a list: [image].",
        ),
        (
            pd.DataFrame(np.zeros((5, 10))),
            (3, -1),
            "Got rows of 10 numbers, but image_shape=(3, -1) needs a multiple of 3; "
            "image_shape=(1, -1) reads each row as an image of height 1.",
        ),
        (
            np.zeros((5, 64)),
            (8, 9),
            "Got rows of 64 numbers, but image_shape=(8, 9) needs 72; "
            "here, image_shape=(8, 8) probably fits.",
        ),
        (
            [[1, 2], [1, 2, 3]],
            (1, -1),
            "Got rows that do not form an array: all input arrays must have the same shape.",
        ),
    ],
)
def test_rows_that_do_not_fold_are_rejected(X, image_shape, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check(X, image_shape)
    assert str(caught.value) == message


def test_rows_fold_into_images():
    with pytest.raises(ImageError, match=r"Got shape \(2, 2, 5\), but expected"):
        check(np.zeros((3, 20)), (2, 2, 5))
    check(np.zeros((3, 20)), (2, -1))
    check(np.zeros((3, 3 * 32 * 32)), (3, 32, 32))


@pytest.mark.parametrize(
    "X",
    [
        np.arange(12).reshape(3, 4),
        np.arange(12).reshape(3, 4).astype(object),
        np.arange(12).reshape(3, 4).tolist(),
        list(np.arange(12).reshape(3, 4)),
        list(torch.arange(12).reshape(3, 4)),
        torch.arange(12).reshape(3, 4),
        pd.DataFrame(np.arange(12).reshape(3, 4)),
        pd.DataFrame(np.arange(12).reshape(3, 4)).astype("Int64"),
        pl.DataFrame(np.arange(12).reshape(3, 4)),
    ],
)
def test_rows_become_an_array_or_tensor(X):
    source = source_of(X)
    assert isinstance(source, np.ndarray | torch.Tensor)
    np.testing.assert_array_equal(source, np.arange(12).reshape(3, 4))


@pytest.mark.parametrize("value", [{"foo": "bar"}, "text"])
def test_rows_of_other_objects_are_rejected(value):
    X = np.ones((3, 4), dtype=object)
    X[2, 1] = value
    with pytest.raises((TypeError, ValueError), match=r"float"):
        check(X, (1, -1))


@pytest.mark.parametrize("X", [np.zeros((2, 8, 6, 3)), torch.zeros(2, 3, 8, 6), [RGB], ("a.jpg",)])
def test_source_of_copies_nothing(X):
    source = source_of(X)
    if isinstance(X, torch.Tensor):
        assert source.data_ptr() == X.data_ptr()
    else:
        assert source is X
