import base64
import io
import mmap
import os
import sys
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from helpers import encoded, images
from PIL import Image

from sktransfer.data.decoding import channel_axis
from sktransfer.data.images import as_images
from sktransfer.data.items import describe, has_signature, is_missing, resolve
from sktransfer.data.remote import RemoteFile
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
        (None, "a missing value"),
        (float("nan"), "a missing value"),
        (pd.NA, "a missing value"),
        ({"image": None}, "a missing value"),
        (3, "int"),
        (object(), "object"),
    ],
)
def test_items_that_are_not_images_are_rejected(item, what):
    with pytest.raises(ImageError) as caught:
        resolve(item)
    assert caught.value.reason == (
        f"Got {what}, but expected a path, a PIL image, an array, a tensor, encoded bytes "
        "or a dict."
    )


@pytest.mark.parametrize(
    "item", [np.array([[7]]), torch.tensor([[7]]), [[7]], np.array([[[7]]], dtype=np.float32)]
)
def test_image_of_one_pixel_is_not_unwrapped(item):
    assert resolve(item).tolist() == [[[7]]]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (np.ones((3, 3), complex), "Complex data not supported"),
        (np.ones((3, 3), object), "Got pixels of dtype object, but expected numbers"),
        (np.ones((3, 3), [("red", "u1"), ("green", "u1")]), "structured_to_unstructured"),
        ([[1, 2], [3]], "The numbers do not form an array"),
        (np.ones(9), r"Got shape \(9,\), but expected"),
    ],
)
def test_arrays_that_are_not_images_are_rejected(item, reason):
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


PNG = encoded(Image.fromarray(RGB))


# Signatures, paths and URLs


@pytest.mark.parametrize(
    "file_type",
    [
        "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "JPEG2000", "PCX", "DDS", "ICNS",
        "AVIF",
    ],
)  # fmt: skip
def test_signatures_of_usual_formats_are_known(file_type):
    try:
        content = encoded(Image.fromarray(images(1, side=32)[0]), file_type)
    except (KeyError, OSError):
        pytest.skip("this Pillow cannot write it")
    assert has_signature(content[:16])
    assert resolve(content) == content


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Create a home folder that contains cat.png, and work in it."""
    (tmp_path / "cat.png").write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "item",
    [
        "~/cat.png",
        np.str_("~/cat.png"),
        Path("~/cat.png"),
        b"~/cat.png",
        {"path": "~/cat.png"},
        {"bytes": None, "path": "~/cat.png"},
        ("~/cat.png", 3),
        np.array("~/cat.png"),
    ],
)
def test_tilde_is_the_home_folder(item, home):
    assert resolve(item) == os.path.join(str(home), "cat.png")
    np.testing.assert_array_equal(as_images([item])[0], RGB)


@pytest.mark.skipif(sys.platform != "linux", reason="other names")
@pytest.mark.parametrize("convert", [bytes, bytearray, memoryview, np.bytes_])
def test_bytes_that_are_a_path_may_be_in_any_encoding(convert, home):
    path = os.path.join(os.fsencode(home), "größe.png".encode("latin-1"))
    with open(path, "wb") as file:
        file.write(PNG)
    assert resolve(convert(path)) == os.fsdecode(path)


@pytest.mark.parametrize("name", ["~cat.png", "~/cat.png"])
def test_name_that_begins_with_a_tilde_is_kept_if_it_exists(name, home):
    path = home / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(PNG)
    assert resolve(name) == name


@pytest.mark.parametrize(
    "item",
    [b"cat.png", bytearray(b"cat.png"), memoryview(b"cat.png"), np.bytes_(b"cat.png")],
)
@pytest.mark.usefixtures("home")
def test_bytes_that_are_the_path_of_a_file_are_a_path(item):
    assert resolve(item) == "cat.png"


@pytest.mark.parametrize(
    "item", [b"dog.png", b"folder/dog.png", b"/nowhere/dog.png", "größe.png".encode(), b"no image"]
)
def test_bytes_that_are_neither_image_nor_path_are_rejected(item, home):
    with pytest.raises(ImageError) as caught:
        resolve(item)
    assert caught.value.reason == (
        f"Got {item!r}, which is neither an encoded image nor the path of a file that exists. "
        f"Relative paths are resolved from {home}."
    )


@pytest.mark.parametrize("item", [b"\x00\x01", b"#define x_width 8\n", b"\xff" * 20, b"a" * 999])
def test_other_bytes_are_left_to_pillow(item):
    assert resolve(item) is item
    with pytest.raises(ImageError, match="Pillow cannot identify this as an image"):
        as_images([item])[0]


def test_text_formats_are_read():
    xbm = b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {\n0x0f};\n"
    assert as_images([xbm])[0][0, :, 0].tolist() == [255] * 4 + [0] * 4


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/cat.jpg",
        "https://example.org/cat.jpg?size=1",
        "s3://bucket/cat.jpg",
        "gs://bucket/cat.jpg",
        "az://container/cat.jpg",
        "hf://datasets/pets/cat.jpg",
        "ftp://example.org/cat.jpg",
    ],
)
def test_urls_are_resolved_without_reading(url):
    for item in (url, {"path": url}, Path(url), url.replace("://", ":/")):
        assert resolve(item) == RemoteFile(url)
    with pytest.raises(ImageError, match=r"Got bytes that hold the URL .*only read if it is a str"):
        resolve(url.encode())
    assert resolve(url.partition(":")[0].upper() + url[url.index(":") :]) == RemoteFile(url)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///tmp/cat.jpg", "/tmp/cat.jpg"),
        ("file:///tmp/my%20cat.jpg", "/tmp/my cat.jpg"),
        ("file:/tmp/cat.jpg", "/tmp/cat.jpg"),
        ("FILE:///tmp/cat.jpg", "/tmp/cat.jpg"),
        ("file://localhost/tmp/cat.jpg", "/tmp/cat.jpg"),
        ("file:///tmp/gr%C3%B6%C3%9Fe.jpg", "/tmp/größe.jpg"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="other paths")
def test_url_of_a_file_is_its_path(url, path):
    assert resolve(url) == path


@pytest.mark.parametrize("path", ["C:/cat.jpg", "a:b.jpg", "x/http:/cat.jpg", "12:30.jpg"])
def test_paths_with_a_colon_are_paths(path):
    assert resolve(path) == path


# Base64


@pytest.mark.parametrize("file_type", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_base64_is_rejected_and_never_printed_whole(file_type, encode):
    content = encoded(Image.fromarray(images(1, side=32)[0]), file_type)
    text = encode(content).decode()
    for item in (text, text.encode(), {"image": text}):
        with pytest.raises(ImageError) as caught:
            as_images([item])[0]
        assert caught.value.reason == (
            f"Got a base64 string of {len(text):,} characters, but expected a path or encoded "
            "bytes. Decode it: base64.b64decode(text)."
        )
        assert len(caught.value.source) <= 80
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/jpeg;charset=x;base64,"])
def test_data_address_is_rejected(head):
    text = head + base64.b64encode(PNG).decode()
    for item in (text, text.encode()):
        with pytest.raises(ImageError, match=r"base64.b64decode\(text.partition\(','\)\[2\]\)"):
            resolve(item)
    assert len(describe(text)) == 80


def test_long_strings_are_shortened_but_not_paths():
    path = "folder/" * 30 + "cat.jpg"
    assert describe(path) == resolve(path) == path
    assert describe("A" * 100_000) == f"{'A' * 39}...{'A' * 38}"
    assert len(describe(f"https://example.org/{path}")) == 80
    with pytest.raises(ImageError, match="Got a base64 string of 100,000 characters"):
        resolve("A" * 100_000)


# Open files


def archived(folder):
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("cat.png", PNG)
    return zipfile.ZipFile(folder / "images.zip").open("cat.png")


FILES = {
    "BytesIO": lambda folder: io.BytesIO(PNG),
    "open": lambda folder: open(folder / "cat.png", "rb"),  # noqa: SIM115
    "unbuffered": lambda folder: open(folder / "cat.png", "rb", buffering=0),  # noqa: SIM115
    "open for reading and writing": lambda folder: open(folder / "cat.png", "r+b"),  # noqa: SIM115
    "BufferedReader": lambda folder: io.BufferedReader(io.BytesIO(PNG)),
    "mmap": lambda folder: mmap.mmap(os.open(folder / "cat.png", os.O_RDWR), 0),
    "zip": archived,
    "SpooledTemporaryFile": lambda folder: tempfile.SpooledTemporaryFile(),  # noqa: SIM115
    "NamedTemporaryFile": lambda folder: tempfile.NamedTemporaryFile(),  # noqa: SIM115
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_files_are_read_from_their_start(kind, home):
    with FILES[kind](home) as file:
        if "Temporary" in kind:
            file.write(PNG)
        file.seek(5)
        for item in (file, (file, 3), {"image": file}):
            assert resolve(item) == PNG
            assert file.tell() == 5
        np.testing.assert_array_equal(as_images([file])[0], RGB)


def test_file_is_read_by_many_threads_at_once():
    file, barrier = io.BytesIO(PNG * 1000), threading.Barrier(8)

    def read(_):
        barrier.wait()
        return [resolve(file) == PNG * 1000 for _ in range(50)]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(equal) for equal in pool.map(read, range(8)))


class Asynchronous(io.BytesIO):
    async def read(self):
        return PNG


class Pipe(io.BytesIO):
    def seek(self, *arguments):
        raise io.UnsupportedOperation("cannot seek")


class Readable:
    """A stream, such as the uploaded file of a server."""

    async def read(self):
        return PNG


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (
            io.TextIOWrapper(io.BytesIO(PNG)),
            "Got a TextIOWrapper, a file opened as text. Open it with mode 'rb'.",
        ),
        (
            Readable(),
            "Got Readable, which cannot be read a second time. Pass what its read() returns; "
            "if read() is asynchronous, await it.",
        ),
        (io.StringIO("text"), "Got a StringIO, a file opened as text. Open it with mode 'rb'."),
        (
            Asynchronous(),
            "Got an asynchronous Asynchronous. Pass its content as bytes: await file.read().",
        ),
        (
            Pipe(PNG),
            "The Pipe cannot be read from its start: cannot seek. Pass its path, or its content "
            "as bytes.",
        ),
    ],
)
def test_files_that_cannot_be_read_are_rejected(file, reason):
    with pytest.raises(ImageError) as caught:
        resolve(file)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (None, True),
        (float("nan"), True),
        (np.float32("nan"), True),
        (pd.NA, True),
        (pd.NaT, True),
        (np.datetime64("NaT"), True),
        (np.ma.masked, True),
        ("", False),
        ("nan", False),
        (0, False),
        (False, False),
        (np.inf, False),
        (np.array([np.nan]), False),
    ],
)
def test_is_missing_knows_every_spelling(item, expected):
    assert is_missing(item) is expected
