import io
import itertools
import os
import pickle
import zipfile
from collections import UserList, deque
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from helpers import encoded, images, save_images
from PIL import Image
from scipy.sparse import csr_array, csr_matrix
from sklearn.datasets import load_digits
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from sktransfer.data.containers import check_source, source_of
from sktransfer.data.images import as_images
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
            f"Got X of type Stream, which is read only in order, but {EXPECTED}. "
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
    "X",
    [
        csr_matrix(np.eye(4)),
        csr_array(np.eye(4)),
        csr_array(np.eye(4)).todok(),  # a dict, too
        torch.eye(4).to_sparse(),
    ],
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
    [
        ([], "(0,)"),
        ((), "(0,)"),
        (np.array([]), "(0,)"),
        (np.array([], dtype=object), "(0,)"),
        (pd.Series([], dtype=str), "(0,)"),
        (pd.DataFrame({"file": pd.Series([], dtype=str)}), "(0,)"),
        (pl.Series("file", [], dtype=pl.String), "(0,)"),
        (torch.empty(0), "(0,)"),
        (np.empty((0, 3)), "(0, 3)"),
        (np.empty((0, 8, 8), dtype=np.uint8), "(0, 8, 8)"),
    ],
)
def test_empty_container_is_rejected(X, shape):
    with pytest.raises(ValueError, match="0 sample") as caught:
        check(X, (1, -1))
    remedy = " If X comes from glob, its pattern matches no file." if shape == "(0,)" else ""
    assert str(caught.value) == (
        f"Got no images: found array with 0 sample(s) (shape={shape}) while a minimum of 1 is "
        f"required.{remedy}"
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


# Containers of other libraries: each holds the same two images.

PIXELS = images(2, side=12)
PATHS = ["0.png", "1.png"]
PNGS = [encoded(Image.fromarray(image)) for image in PIXELS]
BMPS = [encoded(Image.fromarray(image), "BMP") for image in PIXELS]
BUFFERS = [np.array(bytearray(png)) for png in PNGS]
LONGEST = max(map(len, PNGS))
DICTS = [{"bytes": png, "path": None} for png in PNGS]
TENSORS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)

IN_MEMORY = {
    "pyarrow strings": pa.array(PATHS),
    "pyarrow large strings": pa.array(PATHS, pa.large_string()),
    "pyarrow dictionary": pa.array(PATHS).dictionary_encode(),
    "pyarrow chunks": pa.chunked_array([PATHS[:1], PATHS[1:]]),
    "pyarrow binary": pa.array(PNGS),
    "pyarrow structs": pa.array(DICTS),
    "pyarrow structs of paths": pa.array([{"bytes": None, "path": path} for path in PATHS]),
    "pyarrow table": pa.table({"image": PATHS}),
    "pyarrow table of structs": pa.table({"image": DICTS}),
    "pyarrow record batch": pa.record_batch({"image": PNGS}),
    "pyarrow tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS),
    "pyarrow nested lists": pa.array(PIXELS.tolist()),
    "list of pyarrow scalars": [pa.scalar(path) for path in PATHS],
    "list of pyarrow buffers": [pa.py_buffer(png) for png in PNGS],
    "buffers": BUFFERS,
    "tuple of buffers": tuple(BUFFERS),
    "buffers of one column": [buffer[:, None] for buffer in BUFFERS],
    "array of buffers": np.array([*BUFFERS, None], dtype=object)[:2],
    "tensors of encoded images": [torch.tensor(buffer) for buffer in BUFFERS],
    "memoryviews": [memoryview(png) for png in PNGS],
    "bytearrays": [bytearray(png) for png in PNGS],
    "array of bytes": np.array(PNGS),
    "array of bytes that end in zeros": np.array(BMPS),
    "array of void": np.array(PNGS, dtype=f"V{LONGEST}"),
    "array of bytes as objects": np.array(PNGS, dtype=object),
    "buffers with labels": [(buffer, 3) for buffer in BUFFERS],
    "BytesIO": [io.BytesIO(png) for png in PNGS],
    "BytesIO with labels": [(io.BytesIO(png), 3) for png in PNGS],
    "dicts of BytesIO": [{"image": io.BytesIO(png)} for png in PNGS],
    "bytes paths": [path.encode() for path in PATHS],
    "array of bytes paths": np.array(PATHS, dtype=bytes),
    "array without axes": [np.array(path) for path in PATHS],
    "pandas category": pd.Series(PATHS, dtype="category"),
    "pandas DataFrame of a category": pd.DataFrame({"a": pd.Series(PATHS, dtype="category")}),
    "pandas strings": pd.Series(PATHS, dtype="string"),
    "pandas strings in pyarrow": pd.Series(PATHS, dtype="string[pyarrow]"),
    "pandas binary in pyarrow": pd.Series(PNGS, dtype=pd.ArrowDtype(pa.binary())),
    "pandas structs in pyarrow": pd.Series(DICTS, dtype=pd.ArrowDtype(pa.array(DICTS).type)),
    "pandas Index": pd.Index(PATHS),
    "pandas array": pd.array(PATHS),
    "polars categories": pl.Series(PATHS, dtype=pl.Categorical),
    "polars enum": pl.Series(PATHS, dtype=pl.Enum(PATHS)),
    "polars binary": pl.Series(PNGS),
    "polars structs": pl.Series(DICTS),
    "polars DataFrame": pl.DataFrame({"a": pl.Series(PATHS, dtype=pl.Categorical)}),
    "Subset": Subset(TensorDataset(TENSORS), [0, 1]),
    "ConcatDataset": ConcatDataset([TensorDataset(tensor[None]) for tensor in TENSORS]),
    "pandas nested arrays": pa.array(PIXELS.tolist()).to_pandas(),
    "pandas DataFrame of nested arrays": pa.table({"a": PIXELS.tolist()}).to_pandas(),
    "pandas lists in pyarrow": pd.Series(
        PIXELS.tolist(), dtype=pd.ArrowDtype(pa.array(PIXELS.tolist()).type)
    ),
    "pandas rows": [row for _, row in pd.DataFrame({"a": PATHS}).iterrows()],
    "pandas DataFrames of one row": [pd.DataFrame({"a": [path]}) for path in PATHS],
    "arrays of one path": [np.array([path], dtype=object) for path in PATHS],
    "polars nested lists": pl.Series(PIXELS.tolist()),
    "polars DataFrame of nested lists": pl.DataFrame({"a": PIXELS.tolist()}),
    "polars arrays": pl.Series(PIXELS, dtype=pl.Array(pl.UInt8, PIXELS.shape[1:])),
    "polars objects": pl.Series([PIXELS[0], PIXELS[1]], dtype=pl.Object),
    "pyarrow chunks of tensors": pa.chunked_array(
        [pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS[row : row + 1]) for row in (0, 1)]
    ),
    "pyarrow table of tensors": pa.table(
        {"a": pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS)}
    ),
    "pyarrow tensor": pa.Tensor.from_numpy(PIXELS),
    "deque": deque(PATHS),
    "UserList": UserList(PATHS),
    "masked array without masked values": np.ma.array(PIXELS),
}


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    save_images(PIXELS, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_pixels(X):
    resolved = as_images(X)
    assert len(resolved) == 2
    for row in (1, 0, 1):
        np.testing.assert_array_equal(resolved[row], PIXELS[row])
        assert resolved.describe(row)
        assert resolved.fingerprint(row) == resolved.fingerprint(row)
    assert resolved.fingerprint(0) != resolved.fingerprint(1)


@pytest.mark.parametrize("container", IN_MEMORY)
@pytest.mark.usefixtures("in_folder")
def test_containers_of_other_libraries_are_read(container):
    check_pixels(IN_MEMORY[container])


@pytest.mark.parametrize(
    "container", ["pyarrow binary", "pyarrow table", "polars structs", "BytesIO", "array of void"]
)
@pytest.mark.usefixtures("in_folder")
def test_containers_of_other_libraries_are_pickled(container):
    check_pixels(pickle.loads(pickle.dumps(as_images(IN_MEMORY[container]))))


@pytest.mark.usefixtures("in_folder")
def test_open_files_are_read_from_their_start_and_keep_their_position():
    with open("0.png", "rb") as first, open("1.png", "rb") as second:
        second.seek(7)
        check_pixels([first, second])
        assert (first.tell(), second.tell()) == (0, 7)
        assert as_images([first]).describe(0) == "0.png"
    with pytest.raises(ImageError, match="The BufferedReader cannot be read from its start: I/O"):
        as_images([first])[0]


@pytest.mark.parametrize(
    "X",
    [
        [(1, PIXELS[0])],
        [(True, BUFFERS[0])],
        [(np.int64(7), PATHS[0])],
        list(pd.DataFrame({"a": PATHS}).itertuples()),
    ],
)
def test_labels_in_front_of_images_are_rejected_with_the_right_column(X):
    message = r"^Got a \w+ whose first entry is not an image .*images: \[item\[1\] for item"
    with pytest.raises(ValueError, match=message):
        check(X)


def test_members_of_an_archive_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path, png in zip(PATHS, PNGS, strict=True):
            archive.writestr(path, png)
    archive = zipfile.ZipFile(tmp_path / "images.zip")
    check_pixels([zipfile.Path(archive, path) for path in PATHS])
    with pytest.raises(ImageError, match="The Path cannot be read: "):
        as_images([zipfile.Path(archive, "nowhere.png")])[0]
    archive.close()


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow", "numpy", "torch", None])
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.usefixtures("in_folder")
def test_hugging_face_datasets_are_read_in_every_format(kind, decode):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": PATHS}, features=features)
    if kind is None or not decode:
        dataset = dataset.cast_column("image", datasets.Image(decode=decode))
    check_pixels(dataset.with_format(kind))


TENSORS_WITHOUT_PIXELS = {
    "sparse": (lambda tensor: tensor.to_sparse(), "Call its to_dense"),
    "compressed": (lambda tensor: tensor[0].to_sparse_csr(), "Call its to_dense"),
    "meta": (lambda tensor: tensor.to("meta"), "It has no data"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", TENSORS_WITHOUT_PIXELS)
def test_tensor_without_pixels_is_named(kind):
    convert, remedy = TENSORS_WITHOUT_PIXELS[kind]
    with pytest.raises(ImageError, match=rf"Got a tensor that is not dense .*{remedy}"):
        as_images([convert(TENSORS[0])])[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_floats_that_numpy_does_not_have_are_converted(dtype):
    tensors = (TENSORS > 127).to(getattr(torch, dtype))
    for X in (tensors, list(tensors)):
        np.testing.assert_array_equal(
            as_images(X, pixel_range=(0, 1))[1], np.where(PIXELS[1] > 127, 255, 0)
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_read(layout):
    check_pixels(torch.nested.nested_tensor(list(TENSORS), layout=layout))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_read():
    tensors = torch.quantize_per_tensor(TENSORS.float(), 1.0, 0, torch.quint8)
    for X in (tensors, list(tensors)):
        np.testing.assert_array_equal(as_images(X, pixel_range=(0, 255))[1], PIXELS[1])


def test_lazy_items_are_rejected():
    dask = pytest.importorskip("dask")
    delayed = dask.delayed(np.asarray)(PIXELS[0])
    with pytest.raises(ImageError, match=r"Got a Delayed, which is lazy. Call its compute\(\)"):
        as_images([delayed])[0]
    with pytest.raises(TypeError, match=r"Got X of type Delayed, which is lazy.*\.compute\(\)"):
        as_images(delayed)


def test_groups_and_closed_files_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    group = zarr.open_group("group.zarr", mode="w", zarr_format=2)
    group.create_array("images", data=PIXELS)
    with pytest.raises(ValueError, match=r"^Got X as a Group with keys 'images'.*X\['images'\]"):
        as_images(group)
    check_pixels(group["images"])
    with h5py.File("images.h5", "w") as file:
        dataset = file.create_dataset("images", data=PIXELS)
    with pytest.raises(ValueError, match=r"^Got X as a closed HDF5 Dataset.*Keep its file open"):
        as_images(dataset)


def zarr_containers():
    zarr = pytest.importorskip("zarr")
    assert not hasattr(zarr.array(PIXELS), "__len__")
    return {
        "pixels": zarr.array(PIXELS),
        "chunks": zarr.array(PIXELS, chunks=(1, 4, 4, 3)),
        "strings": zarr.array(np.array(PATHS)),
    }


def h5py_containers():
    h5py = pytest.importorskip("h5py")
    file = h5py.File("images.h5", "w")
    lengths_vary = file.create_dataset("vlen", (2,), dtype=h5py.vlen_dtype(np.uint8))
    for row, buffer in enumerate(BUFFERS):
        lengths_vary[row] = buffer
    return {
        "pixels": file.create_dataset("pixels", data=PIXELS),
        "chunks": file.create_dataset("chunks", data=PIXELS, chunks=(1, 4, 4, 3)),
        "strings": file.create_dataset("strings", data=PATHS),
        "bytes": file.create_dataset("bytes", data=np.array(PATHS, dtype=bytes)),
        "encoded": lengths_vary,
        "opaque": file.create_dataset("opaque", data=np.array(PNGS, dtype=f"V{LONGEST}")),
    }


def xarray_containers():
    xarray = pytest.importorskip("xarray")
    return {
        "pixels": xarray.DataArray(PIXELS),
        "strings": xarray.DataArray(PATHS),
        "scalars": list(xarray.DataArray(PATHS)),
        "list of arrays": list(xarray.DataArray(PIXELS)),
    }


def opencv_containers():
    cv2 = pytest.importorskip("cv2")
    return {
        extension: [cv2.imencode(extension, image[:, :, ::-1])[1] for image in PIXELS]
        for extension in (".png", ".bmp", ".tiff", ".ppm")
    }


def hugging_face_containers():
    datasets = pytest.importorskip("datasets")
    columns = {"image": DICTS, "label": [0, 1]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return {
        "dataset": dataset,
        "column": dataset["image"],
        "numpy": dataset.with_format("numpy"),
        "torch": dataset.with_format("torch"),
        "selection": dataset.select([0, 1]),
        "encoded": dataset.cast_column("image", datasets.Image(decode=False)),
        "concatenated": ConcatDataset([Subset(dataset, [0]), Subset(dataset, [1])]),
        "list of rows": list(dataset),
    }


@pytest.mark.parametrize(
    "make",
    [
        zarr_containers,
        h5py_containers,
        xarray_containers,
        opencv_containers,
        hugging_face_containers,
    ],
)
@pytest.mark.usefixtures("in_folder")
@pytest.mark.filterwarnings("ignore")
def test_containers_of_optional_libraries_are_read(make):
    for X in make().values():
        check_pixels(X)


class OnDisk:
    """Has a shape and rows, but no length, as an array of Zarr."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, row):
        return self.array[row]


def test_arrays_without_a_length_are_read_by_row():
    check_pixels(OnDisk(PIXELS))
    check_pixels(OnDisk(np.array(PNGS, dtype=object)))
    with pytest.raises(ValueError, match=r"Got a single image \(array of shape \(8, 6, 3\)\)"):
        check(OnDisk(RGB))
    with pytest.raises(ValueError, match="found array with 0 sample"):
        check(OnDisk(PIXELS[:0]))
    with pytest.raises(ImageError, match=r"Got shape \(5, 6, 7\), but expected"):
        check(OnDisk(np.zeros((2, 5, 6, 7))))


# Lazy containers, and others that must be converted first


def dask_containers():
    dask = pytest.importorskip("dask.array")
    frames = pytest.importorskip("dask.dataframe")
    return [
        dask.from_array(PIXELS),
        dask.from_array(np.array(PATHS)),
        frames.from_pandas(pd.Series(PATHS), npartitions=1),
        frames.from_pandas(pd.DataFrame({"a": PATHS}), npartitions=1),
    ]


@pytest.mark.filterwarnings("ignore")
def test_dask_is_rejected_with_compute_as_remedy():
    for X in dask_containers():
        with pytest.raises(TypeError, match="which is lazy") as caught:
            check(X)
        assert str(caught.value) == (
            f"Got X of type {type(X).__name__}, which is lazy, but {EXPECTED}. "
            "Load it first: call .compute()."
        )


@pytest.mark.parametrize("method", ["collect", "toPandas", "to_pandas", "compute", "to_table"])
def test_lazy_frame_is_rejected_with_its_method_as_remedy(method):
    # Spark's frames have columns, too.
    frame = type("Frame", (), {method: lambda self: None, "columns": ["a"], "head": lambda self: 0})
    with pytest.raises(TypeError, match=rf"type Frame, which is lazy, .* call \.{method}\(\)\.$"):
        check(frame())


def test_polars_lazy_frame_is_rejected():
    with pytest.raises(TypeError, match=r"type LazyFrame, which is lazy, .* call \.collect\(\)\.$"):
        check(pl.LazyFrame({"a": PATHS}))


@pytest.mark.parametrize(
    "X",
    [
        iter(PATHS),
        map(str, PATHS),
        filter(None, PATHS),
        zip(PATHS, PATHS, strict=True),
        itertools.chain(PATHS),
        itertools.islice(PATHS, 2),
        frozenset(PATHS),
        dict.fromkeys(PATHS).keys(),
        dict.fromkeys("ab", PATHS).values(),
        Path().glob("*.png"),
    ],
    ids=lambda X: type(X).__name__,
)
def test_iterables_are_rejected_with_list_as_remedy(X):
    with pytest.raises(TypeError, match=rf"^Got X of type {type(X).__name__}, which has no") as got:
        check(X)
    assert str(got.value).endswith(" Convert it to a list first: list(X).")


@pytest.mark.parametrize("X", [itertools.cycle(PATHS), itertools.count(), itertools.repeat("a")])
def test_endless_iterators_are_rejected(X):
    with pytest.raises(TypeError, match=r"its first n: list\(itertools\.islice\(X, n\)\)\.$"):
        check(X)


@pytest.mark.parametrize(
    "X", [io.BytesIO(PNGS[0]), BUFFERS[0], torch.tensor(BUFFERS[0]), pa.scalar("cat.jpg")]
)
def test_single_file_or_buffer_is_rejected(X):
    with pytest.raises(ValueError, match=r"^Got a single image .* wrap it in a list: \[image\]\.$"):
        check(X)


def test_masked_arrays_are_not_read_as_if_nothing_were_masked():
    with pytest.raises(ValueError, match="masked pixels") as caught:
        check(np.ma.array(PIXELS, mask=PIXELS[0, 0, 0, 0] == PIXELS))
    n_masked = int((PIXELS[0, 0, 0, 0] == PIXELS).sum())
    assert str(caught.value) == (
        f"Got a masked array with {n_masked} masked pixels, but expected all pixels. "
        "Fill them: X.filled(0)."
    )
    assert source_of(np.ma.array(PATHS, mask=[0, 1])).tolist() == ["0.png", None]
    with pytest.raises(ImageError, match=r"Got masked pixels. Fill them: image.filled\(0\)."):
        as_images([np.ma.array(RGB, mask=RGB[0, 0, 0] == RGB)])[0]


def test_arrow_tables_are_like_other_tables():
    with pytest.raises(ValueError, match=r"Select the column, for example X\['a'\]\.$"):
        check(pa.table({"a": PATHS, "b": [1, 2]}))
    np.testing.assert_array_equal(
        source_of(pa.table({"a": [1, 2], "b": [3.0, 4.0]})), [[1, 3], [2, 4]]
    )
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array of numbers"):
        check(pa.array([1, 2]))
    with pytest.raises(ImageError, match="Got a missing value, but expected a path"):
        as_images(pa.array(["0.png", None]))[1]


def test_flat_rows_are_not_taken_for_encoded_images():
    rows = list(np.arange(24, dtype=np.uint8).reshape(2, 12))
    assert source_of(rows).shape == (2, 12)
    row = np.zeros(64, np.uint8)
    row[:4] = [0xFF, 0xD8, 0xFF, 0xE0]  # as a JPEG begins
    for X in ([row, row], [row, np.zeros(64, np.uint8)], np.stack([row, row])):
        resolved = as_images(X, image_shape=(8, 8))
        np.testing.assert_array_equal(resolved[0][:, :, 0], row.reshape(8, 8))


def test_folder_below_home_is_rejected_with_load_image_folder_as_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    os.mkdir(tmp_path / "pets")
    with pytest.raises(ValueError, match=r"Got X='~/pets', a folder"):
        check("~/pets")


class WithKeys(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, row):
        return RGB

    def keys(self):
        return ["a"]


def test_dataset_with_keys_is_not_taken_for_a_group():
    np.testing.assert_array_equal(as_images(WithKeys())[0], RGB)


@pytest.mark.parametrize(
    "pair",
    [
        load_digits(return_X_y=True),
        load_digits(return_X_y=True, as_frame=True),
        (["a.png", "b.png"], [0, 1]),
        (["a.png", "b.png"], ["cat", "dog"]),
        (np.array(["a.png", "b.png"], dtype=object), np.array(["cat", "dog"])),
        (pd.Series(["a.png", "b.png"]), pd.Series([0, 1])),
        (PIXELS, np.arange(len(PIXELS))),
        (list(PIXELS), list(range(len(PIXELS)))),
        (torch.zeros(4, 3, 8, 8), torch.arange(4).numpy()),
        ((Path("a.png"), Path("b.png")), ("cat", "dog")),
    ],
)
def test_tuple_of_images_and_labels_is_rejected(pair):
    with pytest.raises(ValueError, match=r"^Got X as a tuple \(X, y\).* Unpack it first: X, y = X"):
        check(pair)


@pytest.mark.parametrize(
    "X",
    [
        ("a.png", "b.png"),
        (b"GIF89a", b"GIF89a"),
        (np.zeros((8, 6)), np.zeros((8, 6))),
        (RGB, RGB),
        (np.frombuffer(PNGS[0], np.uint8), np.frombuffer(PNGS[0], np.uint8)),
        (Path("a.png"), Path("b.png")),
        ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]),
        ({"path": "a.png"}, {"path": "b.png"}),
    ],
)
def test_tuple_of_two_images_is_accepted(X):
    assert len(as_images(X, image_shape=(1, -1))) == 2
