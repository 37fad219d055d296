import io
import os
import warnings

import numpy as np
import pytest
from helpers import encoded
from PIL import Image

from sktransfer.data.decoding import (
    content_digest,
    decode,
    extent,
    fingerprint,
    resolve_background,
    usual_range,
)
from sktransfer.utils.errors import ImageError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RGB[:, :, 0]


def on_white(array):
    """Composite on white in floating point, as an independent reference."""
    color, alpha = array[..., :-1].astype(float), array[..., -1:] / 255
    return np.broadcast_to(np.rint(color * alpha + 255 * (1 - alpha)), (*array.shape[:2], 3))


def rgb(gray):
    return np.stack([gray] * 3, axis=-1)


def with_alpha(n_colors):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (40, 40, n_colors + 1), dtype=np.uint8)


# Modes of PIL


@pytest.mark.parametrize("wrap", [lambda image: image, encoded], ids=["PIL", "PNG"])
@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GRAY), rgb(GRAY)),
        (Image.fromarray(GRAY > 99), rgb(np.where(GRAY > 99, 255, 0))),
        (Image.fromarray(with_alpha(3)), on_white(with_alpha(3))),
        (Image.fromarray(with_alpha(1)), on_white(with_alpha(1))),
        (Image.fromarray(GRAY.astype(np.uint16) * 257), rgb(GRAY)),
    ],
    ids=["RGB", "L", "1", "RGBA", "LA", "I;16"],
)
def test_common_modes_become_rgb(image, expected, wrap):
    got = decode(wrap(image))
    assert (got.dtype, got.flags.c_contiguous) == (np.uint8, True)
    np.testing.assert_array_equal(got, expected)


def test_cmyk_becomes_rgb():
    inks = [(0, 0, 0, 0), (0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 55)]
    image = Image.new("CMYK", (5, 1))
    image.putdata(inks)
    light = [[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 0], [200, 200, 200]]
    np.testing.assert_array_equal(decode(image)[0], light)
    np.testing.assert_array_equal(decode(encoded(image, "TIFF"))[0], light)


@pytest.mark.parametrize(
    ("mode", "pixel", "expected", "slack"),
    [
        ("HSV", (85, 255, 200), (0, 200, 0), 2),
        ("YCbCr", (120, 128, 128), (120, 120, 120), 0),
        ("LAB", (255, 128, 128), (255, 255, 255), 1),
        ("RGBa", (64, 0, 0, 128), (191, 127, 127), 1),  # 64, and 127 of the white ground
        ("La", (64, 128), (191, 191, 191), 1),
        ("PA", (0, 128), (127, 127, 127), 0),
    ],
)
def test_rare_modes_become_rgb(mode, pixel, expected, slack):
    image = Image.new(mode, (2, 2), pixel)
    np.testing.assert_allclose(decode(image)[0, 0], expected, atol=slack)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[255, 0, 0], [0, 255, 0], [0, 0, 255]]),
        ({"transparency": 1}, [[255, 0, 0], [255, 255, 255], [0, 0, 255]]),
        (
            {"transparency": bytes([255, 0, 128])},
            [[255, 0, 0], [255, 255, 255], [127, 127, 255]],
        ),
    ],
)
def test_palette_becomes_rgb_on_white(options, expected):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    data = encoded(image, **options)
    np.testing.assert_array_equal(decode(data)[0], expected)
    np.testing.assert_array_equal(decode(Image.open(io.BytesIO(data)))[0], expected)


def test_transparent_color_becomes_white():
    data = encoded(Image.fromarray(RGB), transparency=tuple(map(int, RGB[0, 0])))
    expected = RGB.copy()
    expected[0, 0] = 255
    np.testing.assert_array_equal(decode(data), expected)


def test_colors_are_resolved():
    for background, expected in [
        ("white", (255, 255, 255)),
        ("Black", (0, 0, 0)),
        ("#f00", (255, 0, 0)),
        ("#00ff00", (0, 255, 0)),
        ("rgb(1, 2, 3)", (1, 2, 3)),
        ("hsl(0, 100%, 50%)", (255, 0, 0)),
        ((7, 8, 9), (7, 8, 9)),
        ([0, 0, np.uint8(255)], (0, 0, 255)),
    ]:
        assert resolve_background(background) == expected


@pytest.mark.parametrize(
    "background",
    [
        "whit",
        "",
        None,
        3,
        (1, 2),
        (1, 2, 3, 4),
        (1, 2, 256),
        (-1, 2, 3),
        (0.5, 0.5, 0.5),
        (True, 0, 0),
        "#00000080",
        float("nan"),
    ],
)
def test_invalid_background_is_rejected(background):
    with pytest.raises(ValueError, match="Got background") as caught:
        resolve_background(background)
    assert str(caught.value) == (
        f"Got background={background!r}, but expected the name of a color, such as 'white' or "
        "'#808080', or (red, green, blue), integers from 0 to 255"
    )


def palette(alpha):
    image = Image.new("P", (2, 2))
    image.putpalette([200, 100, 50])
    image.info["transparency"] = alpha
    return image


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 250, 60)])
@pytest.mark.parametrize(
    ("raw", "color", "opacity"),
    [
        (Image.new("RGBA", (2, 2), (200, 100, 50, 64)), (200, 100, 50), 64 / 255),
        (encoded(Image.new("RGBA", (2, 2), (200, 100, 50, 64))), (200, 100, 50), 64 / 255),
        (Image.new("LA", (2, 2), (200, 64)), (200, 200, 200), 64 / 255),
        (Image.new("La", (2, 2), (50, 64)), (199, 199, 199), 64 / 255),
        (Image.new("RGBa", (2, 2), (50, 25, 12, 64)), (199, 99, 48), 64 / 255),
        (Image.new("PA", (2, 2), (0, 64)), (0, 0, 0), 64 / 255),
        (palette(bytes([64])), (200, 100, 50), 64 / 255),
        (palette(0), (200, 100, 50), 0),
        (np.full((2, 2, 4), [200, 100, 50, 64], dtype=np.uint8), (200, 100, 50), 64 / 255),
        (np.full((2, 2, 2), [200, 64], dtype=np.uint8), (200, 200, 200), 64 / 255),
        (np.full((2, 2, 4), [200, 100, 50, 64]) / 255, (200, 100, 50), 64 / 255),
        (np.full((2, 2, 3), [200, 100, 50], dtype=np.uint8), (200, 100, 50), 1),
        (encoded(Image.new("RGB", (2, 2), (200, 100, 50))), (200, 100, 50), 1),
    ],
)
def test_transparency_is_composited_on_the_background(raw, color, opacity, background):
    expected = np.array(color) * opacity + np.array(background) * (1 - opacity)
    got = decode(raw, None, background)
    np.testing.assert_allclose(got, np.broadcast_to(expected, (2, 2, 3)), atol=2)
    assert (fingerprint(raw, None, background) == fingerprint(raw)) == (background == (255,) * 3)


@pytest.mark.parametrize(
    ("mode", "dtype", "values", "expected"),
    [
        ("I;16", np.uint16, [0, 257, 65535], [0, 1, 255]),
        ("I;16B", ">u2", [0, 257, 65535], [0, 1, 255]),
        ("I", np.int32, [0, 257, 65535], [0, 1, 255]),
        ("I", np.int32, [0, 7, 255], [0, 7, 255]),
        ("I", np.int32, [-100, 0, 100], [0, 128, 255]),
        ("F", np.float32, [0.0, 0.2, 1.0], [0, 51, 255]),
        ("F", np.float32, [0.0, 7.0, 200.0], [0, 7, 200]),
    ],
)
def test_numeric_pil_modes_are_scaled_to_uint8(mode, dtype, values, expected):
    array = np.array([values], dtype=dtype)
    image = Image.frombytes(mode, (3, 1), array.tobytes())
    np.testing.assert_array_equal(decode(image)[0], rgb(np.array(expected)))


# EXIF, animations, files

UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("file_type", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation, file_type, tmp_path):
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_type == "WEBP" else {}
    data = encoded(image, file_type, exif=exif, **options)
    path = tmp_path / "image"
    path.write_bytes(data)
    expected = UPRIGHT[orientation](RGB)
    np.testing.assert_array_equal(decode(data), expected)
    np.testing.assert_array_equal(decode(str(path)), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(decode(opened), expected)
        np.testing.assert_array_equal(decode(opened), expected)


def test_exif_set_in_memory_is_applied_and_the_image_is_unchanged():
    image = Image.fromarray(RGB)
    image.getexif()[0x0112] = 6
    np.testing.assert_array_equal(decode(image), np.rot90(RGB, -1))
    assert image.size == (7, 5)
    assert image.getexif()[0x0112] == 6
    np.testing.assert_array_equal(np.asarray(image), RGB)


@pytest.mark.parametrize("file_type", ["GIF", "TIFF", "WEBP", "PNG"])
def test_animation_is_decoded_to_its_first_frame(file_type):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if file_type == "WEBP" else {}
    data = encoded(frames[0], file_type, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(decode(data), np.full((4, 4, 3), [255, 0, 0]))


def test_jpeg_is_decoded_as_by_pillow(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(RGB).save(path)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(decode(str(path)), np.asarray(opened))


@pytest.mark.parametrize(
    ("side", "size"),
    [(20, (80, 60)), (30, (80, 60)), (31, (160, 120)), (121, (320, 240)), (500, (320, 240))],
)
def test_jpeg_is_decoded_no_larger_than_needed(side, size):
    smooth = Image.fromarray(RGB).resize((320, 240), Image.Resampling.BICUBIC)
    got = decode(encoded(smooth, "JPEG"), side=side)
    assert got.shape == (size[1], size[0], 3)
    expected = np.asarray(smooth.resize(size, Image.Resampling.BOX), dtype=float)
    assert abs(got - expected).mean() < 4
    assert decode(encoded(smooth, "PNG"), side=side).shape == (240, 320, 3)


def test_jpeg_decoded_smaller_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    Image.fromarray(RGB).resize((320, 240)).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), side=30).shape == (80, 60, 3)


@pytest.mark.parametrize("file_type", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_truncated_file_is_rejected(file_type, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), file_type)
    path = tmp_path / "image"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"truncated or corrupt|cannot identify"):
        decode(str(path))
    with pytest.raises(ImageError, match=r"truncated or corrupt|cannot identify"):
        decode(data[: len(data) // 2])


def test_lazy_image_of_a_truncated_file_is_rejected():
    data = encoded(Image.fromarray(RGB), "BMP")
    image = Image.open(io.BytesIO(data[:-20]))
    with pytest.raises(ImageError, match=r"truncated or corrupt: image file is truncated"):
        decode(image)
    with pytest.raises(ImageError, match=r"truncated or corrupt: image file is truncated"):
        fingerprint(Image.open(io.BytesIO(data[:-20])))


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_not_an_image_is_rejected(content, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        decode(str(path))
    assert caught.value.reason == "Pillow cannot identify this as an image."


@pytest.mark.parametrize("function", [decode, fingerprint])
def test_missing_file_is_rejected_with_its_full_path(function):
    with pytest.raises(ImageError) as caught:
        function("no/such.jpg")
    expected = f"There is no such file. It was looked for at '{os.getcwd()}/no/such.jpg'."
    assert caught.value.reason == expected


@pytest.mark.parametrize("function", [decode, fingerprint])
def test_folder_and_null_character_in_a_path_are_rejected(function, tmp_path):
    with pytest.raises(ImageError, match="Got a folder, but expected an image"):
        function(str(tmp_path))
    with pytest.raises(ImageError, match="The path contains a NUL character"):
        function("a\0b")


@pytest.mark.parametrize("limit", [16, 34])  # Pillow raises, and Pillow warns.
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_decompression_bomb_is_rejected(limit, action, monkeypatch):
    data = encoded(Image.fromarray(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=rf"MAX_IMAGE_PIXELS = {limit}\. Raise"):
            decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    np.testing.assert_array_equal(decode(data), RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    np.testing.assert_array_equal(decode(data), RGB)


def test_image_without_pixels_is_rejected():
    with pytest.raises(ImageError, match="Got no pixels: the size is 0 x 3"):
        decode(Image.new("RGB", (0, 3)))


# Arrays


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_keep_every_gray_value(dtype):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    for pixels, pixel_range in [
        ((levels / 255).astype(dtype), (0, 1)),
        ((levels / 127.5 - 1).astype(dtype), (-1, 1)),
        (levels.astype(dtype), (0, 255)),
    ]:
        np.testing.assert_array_equal(decode(pixels, pixel_range)[:, :, :1], levels)


@pytest.mark.parametrize(
    ("values", "pixel_range", "expected"),
    [
        (np.array([0, 8, 16]), (0, 16), [0, 128, 255]),
        (np.array([0, 8, 15]), None, [0, 128, 239]),
        (np.array([False, True, True]), None, [0, 255, 255]),
        (np.array([0, 257, 65535], dtype=np.uint16), (0, 65535), [0, 1, 255]),
        (np.array([-50.0, 0.0, 50.0]), (-10, 10), [0, 128, 255]),  # No usual range: clipped.
        (np.array([7e5, 7e5, 7e5]), None, [0, 0, 0]),
        (np.array([-0.0009, 0.5, 1.0009]), (0, 1), [0, 128, 255]),
        (np.array([-3.0, 1.0, 5.0]), None, [0, 128, 255]),
        (np.array([0, 1, 16], dtype=np.uint8), (0, 16), [0, 1, 16]),  # uint8 is taken as it is.
    ],
)
def test_pixel_range_is_mapped_to_uint8(values, pixel_range, expected):
    before = values.copy()
    got = decode(values.reshape(1, 3, 1), pixel_range)[0, :, 0]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(("value", "said"), [(2.0, "up to 2"), (-0.5, "down to -0.5")])
def test_values_beyond_a_usual_range_are_rejected(value, said):
    with pytest.raises(ImageError) as caught:
        decode(np.array([[[0.0], [value]]]), (0, 1))
    assert caught.value.reason == (
        f"Got pixel values {said}, but the pixel range is 0 to 1 (passed, or learned by fit). "
        "Pass a pixel_range=(lo, hi) that covers all images."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_rejected(value):
    with pytest.raises(ImageError, match="Got NaN or infinite pixels, but expected finite"):
        decode(np.array([[[0.0], [value]]]), (0, 1))


def test_alpha_of_arrays_is_composited_on_white():
    pixels = with_alpha(3)
    np.testing.assert_array_equal(decode(pixels), on_white(pixels))
    np.testing.assert_array_equal(decode(pixels / 255, (0, 1)), on_white(pixels))
    np.testing.assert_array_equal(decode(with_alpha(1)), on_white(with_alpha(1)))


def test_decoded_array_does_not_share_memory():
    pixels = RGB.copy()
    decode(pixels)[:] = 0
    np.testing.assert_array_equal(pixels, RGB)


def test_extent_ignores_non_finite_values():
    assert extent(np.array([[np.nan, 2], [-np.inf, 1]])) == (1.0, 2.0)
    assert extent(np.array([np.nan])) is None
    assert extent(np.array([True, False])) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0, (0, 1)),
        (0, 1.0000001, (0, 1)),
        (-1e-6, 1, (0, 1)),
        (-0.5, 1, (-1, 1)),
        (0, 1.5, (0, 16)),
        (0, 17, (0, 255)),
        (0, 256, (0, 65535)),
        (0, 65536, (0, 65536)),
        (-3, 5, (-3, 5)),
        (7, 7, (0, 16)),
    ],
)
def test_usual_range_contains_the_values(low, high, expected):
    assert usual_range(low, high) == expected


# Fingerprints


def test_fingerprints_of_different_images_differ(tmp_path):
    path = tmp_path / "a.png"
    data = encoded(Image.fromarray(RGB))
    path.write_bytes(data)
    floats = (RGB / 255).astype(np.float32)
    turned = Image.fromarray(RGB)
    turned.getexif()[0x0112] = 6
    palettes = [Image.fromarray(GRAY).convert("P") for _ in range(3)]
    palettes[1].putpalette(list(range(255, -1, -1)) * 3)
    palettes[2].info["transparency"] = 3
    prints = [
        fingerprint(str(path)),
        fingerprint(data),
        fingerprint(RGB),
        fingerprint(RGB.reshape(7, 5, 3)),
        fingerprint(RGB.astype(np.int16)),
        fingerprint(RGB.view(np.int8)),
        fingerprint(np.ascontiguousarray(RGB[::-1])),
        fingerprint(floats),
        fingerprint(floats, (0, 1)),
        fingerprint(floats, (0, 2)),
        fingerprint(RGB.tobytes()),
        fingerprint(Image.fromarray(RGB)),
        fingerprint(Image.fromarray(RGB.reshape(7, 5, 3))),
        fingerprint(Image.frombytes("YCbCr", (7, 5), RGB.tobytes())),
        fingerprint(turned),
        *map(fingerprint, palettes),
    ]
    assert {len(value) for value in prints} == {16}
    assert len(set(prints)) == len(prints)


def test_fingerprints_of_equal_images_agree(tmp_path):
    assert fingerprint(RGB, (0, 1)) == fingerprint(RGB)  # A range does not touch uint8.
    channels_first = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    assert fingerprint(np.moveaxis(channels_first, 0, -1)) == fingerprint(RGB)
    assert fingerprint(bytearray(b"abc")) == fingerprint(memoryview(b"abc")) == fingerprint(b"abc")
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    with Image.open(path) as lazy:
        assert fingerprint(lazy) == fingerprint(Image.fromarray(RGB))


def test_fingerprints_of_ordinary_images_are_unchanged():
    """A change makes all persistent stores useless."""
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for image, expected in [
        (b"abc", "3a674d1aa4fa1896e0e546d8a0ea7f80"),
        (array, "ad8f067e08d9a5b4a224b0129ee22710"),
        (Image.fromarray(array), "7d94266c148da539785c96a39ca0c9d4"),
        (Image.fromarray(array[:, :, 0]), "67c76d367e7fa7b5833dad50452b8c24"),
    ]:
        assert fingerprint(image).hex() == expected
    assert fingerprint(array / 255, (0, 1)).hex() == "5f6ee08d2b481cdc4bca99333435bd6e"


def test_content_digest_of_a_file_is_the_fingerprint_of_its_bytes(tmp_path):
    data = encoded(Image.fromarray(RGB))
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(data)
        for settings in ((), ((0, 255),), (None, (0, 0, 0)), ((0, 1), (0, 0, 0))):
            expected = fingerprint(data, *settings)
            assert content_digest(str(tmp_path / name), *settings) == expected
            assert content_digest(data, *settings) == expected
    assert content_digest(RGB, (0, 1)) == fingerprint(RGB)
    for path, reason in (("none.png", "There is no such file"), ("", "Got a folder")):
        with pytest.raises(ImageError, match=reason):
            content_digest(str(tmp_path / path))


def test_fingerprint_of_a_path_does_not_open_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"no image at all")
    before = fingerprint(str(path))
    monkeypatch.chdir(tmp_path)
    assert fingerprint("a.png") == before
    os.utime(path, ns=(0, 1))
    assert fingerprint(str(path)) != before
