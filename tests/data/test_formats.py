import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from helpers import encoded
from PIL import Image, ImageCms

from sktransfer.data import formats
from sktransfer.data.decoding import decode, fingerprint, numbers_of, plain_jpeg
from sktransfer.data.formats import identify
from sktransfer.utils.errors import ImageError

new_pillow = pytest.mark.skipif(formats._PILLOW < 13, reason="Pillow misreads these files")
RNG = np.random.default_rng(0)
SHAPE = (16, 32)


def numbers(dtype, *channels):
    """Return pixels of a dtype: all integers, or floats from 0 to 1."""
    dtype, shape = np.dtype(dtype), (*SHAPE, *channels)
    if dtype.kind == "f":
        return RNG.random(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def tiff(array, **options):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def png(pixels, bits, color_type, transparent=b""):
    """Encode integers (H, W, C) as a PNG of any bit depth, without Pillow."""
    height, width = pixels.shape[:2]
    if bits < 16:
        levels = pixels.reshape(height, -1, 1).astype(np.uint8)
        rows = np.packbits((levels >> np.arange(bits)[::-1] & 1).reshape(height, -1), axis=1)
    else:
        rows = pixels.astype(">u2").reshape(height, -1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
        if data or name != b"tRNS"
    )


def as_rgb(array):
    return np.repeat(array, 3, axis=2) if array.ndim == 3 else np.stack([array] * 3, axis=-1)


def scaled(array, low, high):
    """Map a range to 0-255 in floating point, as an independent reference."""
    levels = (array.astype(np.float64) - low) / (high - low) * 255
    return np.clip(np.rint(levels), 0, 255)


# TIFF

GRAY_RANGES = {
    "u1": None,
    "i1": (-128, 127),
    "u2": (0, 65535),
    "i2": (-32768, 32767),
    "u4": (0, 2**32 - 1),
    "i4": (-(2**31), 2**31 - 1),
    "u8": (0, 2**64 - 1),
    "f2": (0, 1),
    "f4": (0, 1),
    "f8": (0, 1),
}


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("dtype", GRAY_RANGES)
def test_gray_tiff_has_the_pixels_of_its_array(dtype, tile, order, compression, tmp_path):
    array, limits = numbers(dtype), GRAY_RANGES[dtype]
    data = tiff(array, byteorder=order, compression=compression, tile=tile)
    path = tmp_path / "image.tif"
    path.write_bytes(data)
    expected = decode(array[:, :, np.newaxis], limits)
    reference = array if limits is None else scaled(array, *limits)
    np.testing.assert_allclose(expected[:, :, 0], reference, atol=1)
    np.testing.assert_array_equal(decode(data, limits), expected)
    np.testing.assert_array_equal(decode(str(path), limits), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_min_is_white_is_inverted(dtype, order):
    array = numbers(dtype)
    top = np.iinfo(dtype).max
    data = tiff(array, byteorder=order, photometric="miniswhite")
    limits = None if dtype == "u1" else (0, top)
    expected = 255 - array if dtype == "u1" else scaled(top - array, 0, top)
    np.testing.assert_allclose(decode(data, limits), as_rgb(expected), atol=1)


@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
def test_min_is_white_without_a_known_black_is_refused(dtype):
    data = tiff(numbers(dtype), photometric="miniswhite")
    with pytest.raises(ImageError, match=r"smallest number is white.*MinIsWhite.*Negate"):
        decode(data)


RGB_VARIANTS = {
    "chunky": {},
    "planar": {"planarconfig": "separate"},
    "planar in strips": {"planarconfig": "separate", "rowsperstrip": 4},
    "planar, deflate": {"planarconfig": "separate", "compression": "zlib"},
    "planar, big-endian": {"planarconfig": "separate", "byteorder": ">"},
    "predictor": {"compression": "zlib", "predictor": True},
    "tiled": {"tile": (16, 16)},
    "big TIFF": {"bigtiff": True},
}


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "f2", "f4", "f8"])
@pytest.mark.parametrize("variant", RGB_VARIANTS)
def test_rgb_tiff_has_the_pixels_of_its_array(variant, dtype):
    options = RGB_VARIANTS[variant]
    if "predictor" in options and dtype[0] == "f":
        options = {"compression": "zlib"}  # tifffile alone cannot write it
    array, limits = numbers(dtype, 3), GRAY_RANGES[dtype]
    stored = np.moveaxis(array, -1, 0) if "planarconfig" in options else array
    data = tiff(stored, photometric="rgb", **options)
    reference = array if limits is None else scaled(array, *limits)
    np.testing.assert_allclose(decode(data, limits), reference, atol=1)


EXTRA_CHANNELS = [
    ("rgb", 4, ["unassalpha"]),
    ("rgb", 4, ["assocalpha"]),
    ("rgb", 4, ["unspecified"]),
    ("minisblack", 2, ["unassalpha"]),
    ("minisblack", 2, ["unspecified"]),
]


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize(("photometric", "count", "extra"), EXTRA_CHANNELS)
def test_channels_after_the_colors_are_alpha_only_if_the_file_says_so(
    photometric, count, extra, dtype, planar
):
    if (count, extra, dtype, planar) == (4, ["unspecified"], "u1", True) and formats._PILLOW < 13:
        pytest.skip("this Pillow refuses such files")
    array = numbers(dtype, count)
    share = array[..., -1:] / (1 if dtype == "f4" else np.iinfo(dtype).max)
    colors = array[..., :-1].astype(float)
    if extra == ["assocalpha"]:
        colors = colors * share
        array[..., :-1] = colors if dtype == "f4" else np.rint(colors)
    options = {"planarconfig": "separate" if planar else "contig", "extrasamples": extra}
    stored = np.moveaxis(array, -1, 0) if planar else array
    data = tiff(stored, photometric=photometric, **options)
    levels = colors * (255 if dtype == "f4" else 255 / np.iinfo(dtype).max)
    white = 0 if extra == ["unspecified"] else 255 * (1 - share)
    if extra == ["unassalpha"]:
        levels = levels * share
    expected = levels + white
    got = decode(data)
    np.testing.assert_allclose(got, as_rgb(expected) if count == 2 else expected, atol=3)


@pytest.mark.parametrize(
    ("channels", "photometric"),
    [(4, "minisblack"), (5, "minisblack"), (3, "minisblack"), (7, "minisblack")],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_channels_of_unknown_meaning_are_refused(channels, photometric, dtype):
    data = tiff(numbers(dtype, channels), photometric=photometric, planarconfig="contig")
    message = rf"cannot be interpreted \(TIFF, .*{channels} channels.*\). Select one or three"
    with pytest.raises(ImageError, match=message):
        decode(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_cmyk_tiff_of_16_bits_is_read(order):
    array = numbers("u2", 4)
    data = tiff(array, photometric="separated", byteorder=order)
    expected = np.asarray(Image.fromarray((array >> 8).astype(np.uint8), "CMYK").convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    with pytest.raises(ImageError, match=r"cannot be interpreted \(TIFF, 16-bit .*CMYK"):
        decode(data, (0, 4095))
    planar = tiff(np.moveaxis(array, -1, 0), photometric="separated", planarconfig="separate")
    with pytest.raises(ImageError, match=r"cannot be interpreted \(TIFF, 16-bit .*CMYK.*planar"):
        decode(planar)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_palette_of_a_tiff_is_applied(dtype):
    colors = RNG.integers(0, 256, (3, np.iinfo(dtype).max + 1)).astype(np.uint16)
    array = numbers(dtype)
    data = tiff(array, photometric="palette", colormap=colors * 257)
    np.testing.assert_array_equal(decode(data), np.moveaxis(colors[:, array], 0, -1))


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
@pytest.mark.parametrize("white", [0, 1])
def test_packed_tiff_is_read_or_refused(bits, white):
    levels = RNG.integers(0, 2**bits, SHAPE)
    spread = (levels[..., np.newaxis] >> np.arange(bits)[::-1] & 1).reshape(SHAPE[0], -1)
    pixels = np.packbits(spread.astype(np.uint8), axis=1).tobytes()
    tags = [
        (256, SHAPE[1]),
        (257, SHAPE[0]),
        (258, bits),
        (259, 1),
        (262, white),
        (273, 8),
        (277, 1),
        (278, SHAPE[0]),
        (279, len(pixels)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    data = start + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)
    top = 2**bits - 1
    if (bits, white) == (12, 0):
        with pytest.raises(ImageError, match=r"12-bit unsigned integers, MinIsWhite"):
            decode(data, (0, top))
        return
    expected = scaled(levels if white else top - levels, 0, top)
    np.testing.assert_allclose(decode(data, (0, top)), as_rgb(expected), atol=1)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f8"])
def test_first_page_of_a_tiff_is_read(dtype):
    pages = np.stack([numbers(dtype) for _ in range(3)])
    data = tiff(pages, photometric="minisblack")
    np.testing.assert_array_equal(decode(data), decode(tiff(pages[0])))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_read_without_pillow_is_upright(orientation):
    array = numbers("f8", 3)
    data = tiff(array, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    plain = tiff((array * 255).round().astype(np.uint8), photometric="rgb")
    image = Image.open(io.BytesIO(plain))
    exif = image.getexif()
    exif[0x0112] = orientation
    expected = decode(encoded(Image.open(io.BytesIO(plain)), "TIFF", exif=exif))
    np.testing.assert_allclose(decode(data, (0, 1)).astype(int), expected, atol=1)


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"dtype": "f8"}, "TIFF, 64-bit floating point, gray"),
        ({"dtype": "f2"}, "TIFF, 16-bit floating point, gray"),
        ({"dtype": "f4", "channels": 3}, "TIFF, 32-bit floating point, RGB, 3 channels"),
        ({"dtype": "u4", "byteorder": ">"}, "TIFF, 32-bit unsigned integers, gray, big-endian"),
        ({"dtype": "i4", "channels": 3}, "TIFF, 32-bit signed integers, RGB, 3 channels"),
        (
            {"dtype": "i2", "byteorder": ">", "compression": "zlib"},
            "TIFF, 16-bit signed integers, gray, big-endian",
        ),
        (
            {"dtype": "f4", "byteorder": ">", "compression": "zlib"},
            "TIFF, 32-bit floating point, gray, big-endian",
        ),
        (
            {"dtype": "u2", "channels": 3, "planarconfig": "separate"},
            "TIFF, 16-bit unsigned integers, RGB, 3 channels, planar",
        ),
    ],
)
def test_variant_is_named_if_tifffile_is_missing(options, variant, monkeypatch):
    dtype, channels = options.pop("dtype"), options.pop("channels", None)
    array = numbers(dtype, *([channels] if channels else []))
    array = np.moveaxis(array, -1, 0) if "planarconfig" in options else array
    photometric = "rgb" if channels else "minisblack"
    data = tiff(array, photometric=photometric, **options)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == (
        f"Pillow cannot read this variant correctly ({variant}). Install tifffile, which reads "
        "it: pip install 'sktransfer[tiff]'."
    )


def test_decompression_bomb_is_refused_without_pillow(monkeypatch):
    data = tiff(numbers("f8"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(data)


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options", "limits"),
    [
        ("u2", {"photometric": "miniswhite"}, (0, 65535)),
        ("u4", {}, (0, 2**32 - 1)),
        ("i1", {}, (-128, 127)),
        ("i2", {}, (-32768, 32767)),
        ("f4", {}, (0, 1)),
    ],
)
def test_opened_tiff_equals_its_file(dtype, options, limits, load):
    data = tiff(numbers(dtype), **options)
    image = Image.open(io.BytesIO(data))
    if load:
        image.load()
    np.testing.assert_array_equal(decode(image, limits), decode(data, limits))
    copy = Image.frombytes(image.mode, image.size, image.tobytes())
    if dtype in ("i1", "u4") or options:
        assert fingerprint(image, limits) != fingerprint(copy, limits)


def test_opened_tiff_that_pillow_misreads_is_refused():
    data = tiff(numbers("u2", 3).transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    for function in (decode, fingerprint):
        with pytest.raises(
            ImageError, match=r"misreads this image \(TIFF.*planar\). Pass the path"
        ):
            function(Image.open(io.BytesIO(data)))


# PNG

PNG_TYPES = {"gray": (0, 1), "RGB": (2, 3), "LA": (4, 2), "RGBA": (6, 4)}


@pytest.mark.parametrize("limits", [None, (0, 65535), (0, 4095), (0, 1023), (0, 255)])
@pytest.mark.parametrize("kind", PNG_TYPES)
def test_16_bit_png_has_all_bits_if_a_range_needs_them(kind, limits):
    color_type, channels = PNG_TYPES[kind]
    low, high = limits or (0, 65535)
    pixels = RNG.integers(0, high, (*SHAPE, channels), endpoint=True)
    colors, share = pixels, 1
    if kind in ("LA", "RGBA"):
        pixels[..., -1] = RNG.integers(0, 65536, SHAPE)
        colors, share = pixels[..., :-1], pixels[..., -1:] / 65535
    expected = scaled(colors, low, high) * share + 255 * (1 - share)
    expected = expected if expected.shape[2] == 3 else as_rgb(expected)
    np.testing.assert_allclose(decode(png(pixels, 16, color_type), limits), expected, atol=3)


def test_value_beyond_a_usual_range_is_rejected_in_files():
    data = png(np.full((2, 2, 3), 300), 16, 2)
    with pytest.raises(ImageError, match="Got pixel values up to 300, but the pixel range is 0 to"):
        decode(data, (0, 255))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_color_of_a_png_becomes_the_background(bits, channels, background):
    if channels == 3 and bits < 8:
        pytest.skip("PNG has RGB of 8 and 16 bits only")
    if bits == 1 and formats._PILLOW < 13:
        pytest.skip("this Pillow ignores the transparent color of 1-bit PNG files")
    pixels = RNG.integers(0, 2**bits, (4, 5, channels))
    transparent = pixels[1, 2].copy()
    data = png(
        pixels,
        bits,
        0 if channels == 1 else 2,
        struct.pack(f">{channels}H", *map(int, transparent)),
    )
    expected = scaled(pixels, 0, 2**bits - 1)
    expected = as_rgb(expected) if channels == 1 else expected
    expected[(pixels == transparent).all(axis=2)] = background
    np.testing.assert_allclose(decode(data, None, background), expected, atol=1)


def test_upper_bounds_are_returned_if_nothing_reads_all_bits(monkeypatch):
    array = numbers("u2", 3) & 4095
    options = {"planarconfig": "separate", "compression": "zlib"}
    data = tiff(array.transpose(2, 0, 1), photometric="rgb", **options)
    np.testing.assert_array_equal(numbers_of(data), array)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    np.testing.assert_array_equal(numbers_of(data), array >> 8 << 8 | 255)


# PPM, ICNS, ICO


@pytest.mark.parametrize("maximum", [255, 1023, 4095, 16383, 65535])
def test_pgm_is_scaled_by_its_maximum_or_by_the_range(maximum):
    levels = RNG.integers(0, maximum + 1, SHAPE)
    pixels = levels.astype(np.uint8 if maximum < 256 else ">u2").tobytes()
    data = f"P5 {SHAPE[1]} {SHAPE[0]} {maximum} ".encode() + pixels
    expected = as_rgb(scaled(levels, 0, maximum))
    np.testing.assert_allclose(decode(data), expected, atol=1)
    np.testing.assert_allclose(decode(data, (0, maximum)), expected, atol=1)


def test_format_reduced_to_8_bits_is_refused_if_a_range_is_set():
    data = b"P6 2 1 4095 " + np.arange(6, dtype=">u2").tobytes()
    assert decode(data).shape == (1, 2, 3)
    with pytest.raises(ImageError, match="only 8 of 16 bits of this PPM file"):
        decode(data, (0, 4095))


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P", "L", "LA"])
def test_largest_image_of_an_icns_file_is_decoded(mode):
    image = Image.fromarray(RNG.integers(0, 256, (128, 128, 4), dtype=np.uint8)).convert(mode)
    frame = encoded(image)
    small = encoded(Image.new("RGB", (32, 32)))
    entries = [(b"ic11", small), (b"ic07", frame)]
    body = b"".join(name + struct.pack(">I", 8 + len(data)) + data for name, data in entries)
    data = b"icns" + struct.pack(">I", 8 + len(body)) + body
    np.testing.assert_array_equal(decode(data), decode(image))
    if mode != "P":  # Pillow loses the palette
        opened = Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(decode(opened), decode(image))
        np.testing.assert_array_equal(decode(opened), decode(image))


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P", "L"])
def test_largest_image_of_an_ico_file_is_decoded(mode):
    image = Image.fromarray(RNG.integers(0, 256, (64, 64, 4), dtype=np.uint8)).convert(mode)
    data = encoded(image, "ICO", sizes=[(16, 16), (64, 64), (32, 32)])
    np.testing.assert_array_equal(decode(data), decode(image))


# Color profiles


def matrix_profile(red, green, blue, gamma=2.2):
    """Build an RGB profile from chromaticities (D50 colorants) and a gamma."""
    return _profile(
        b"RGB ",
        [(b"rXYZ", _xyz(red)), (b"gXYZ", _xyz(green)), (b"bXYZ", _xyz(blue))]
        + [(name, _curve(gamma)) for name in (b"rTRC", b"gTRC", b"bTRC")],
    )


def gray_profile(gamma):
    return _profile(b"GRAY", [(b"kTRC", _curve(gamma))])


def _xyz(values):
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space, tags):
    text = b"text\0\0\0\0test\0\0\0\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = [(b"desc", name), (b"cprt", text), (b"wtpt", _xyz((0.9642, 1, 0.8249))), *tags]
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for tag, data in tags:
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ "
    )
    header += bytes(12) + b"acsp" + bytes(28) + _xyz((0.9642, 1, 0.8249))[8:]
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


# Colorants relative to D50, red, green and blue.
PRIMARIES = {
    "Adobe RGB": ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)),
    "Display P3": ((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)),
    "ProPhoto": ((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0001), (0.0313, 0.0001, 0.8249)),
    "sRGB": ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)),
}
ADOBE = matrix_profile(*PRIMARIES["Adobe RGB"])
P3 = matrix_profile(*PRIMARIES["Display P3"])
SRGB_TWIN = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def srgb_of(pixel, primaries, gamma=2.2):
    """Convert a color to sRGB in floating point, as an independent reference."""
    xyz = (np.array(pixel) / 255) ** gamma @ np.array(PRIMARIES[primaries])
    return srgb_curve(np.clip(xyz @ np.linalg.inv(np.array(PRIMARIES["sRGB"])), 0, 1))


def srgb_curve(linear):
    curved = 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, curved)


@pytest.mark.parametrize("primaries", ["Adobe RGB", "Display P3", "ProPhoto"])
@pytest.mark.parametrize(
    "pixel", [(128, 128, 128), (150, 120, 110), (110, 150, 120), (90, 90, 120)]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("file_type", ["PNG", "TIFF", "PIL"])
def test_rgb_profile_is_converted_to_srgb(primaries, pixel, mode, file_type):
    gamma = 1.8 if primaries == "ProPhoto" else 2.2
    profile = matrix_profile(*PRIMARIES[primaries], gamma)
    image = Image.new("RGB", (4, 4), pixel)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.info["icc_profile"] = profile
    raw = image if file_type == "PIL" else encoded(image, file_type, icc_profile=profile)
    expected = srgb_of(pixel, primaries, gamma)
    np.testing.assert_allclose(decode(raw), np.broadcast_to(expected, (4, 4, 3)), atol=2)


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.6])
@pytest.mark.parametrize("bits", [8, 16])
def test_gray_profile_is_converted_to_srgb(gamma, bits):
    levels = np.arange(32, 256, 32, dtype=np.uint8)[np.newaxis]
    linear = (levels / 255) ** gamma
    expected = srgb_curve(linear)
    array = levels if bits == 8 else levels.astype(np.uint16) * 257
    data = encoded(Image.fromarray(array), icc_profile=gray_profile(gamma))
    np.testing.assert_allclose(decode(data), as_rgb(expected), atol=2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
@pytest.mark.parametrize(
    "profile", [SRGB_TWIN, b"", b"broken", ADOBE[:200], ADOBE[:64] + bytes(400)]
)
def test_image_with_an_srgb_or_broken_profile_is_unchanged(profile, mode):
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)).convert(mode)
    expected, key = decode(image), fingerprint(image)
    image.info["icc_profile"] = profile
    np.testing.assert_array_equal(decode(image), expected)
    assert fingerprint(image) == key


def test_profile_of_another_color_space_is_ignored():
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for mode, profile in (("RGB", gray_profile(1.0)), ("CMYK", ADOBE)):
        plain = image.convert(mode)
        expected = decode(plain)
        plain.info["icc_profile"] = profile
        np.testing.assert_array_equal(decode(plain), expected)


def test_jpeg_with_a_profile_is_decoded_by_pillow_only():
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for profile, is_plain in ((b"", True), (SRGB_TWIN, True), (b"broken", True), (P3, False)):
        data = encoded(image, "JPEG", icc_profile=profile)
        assert (plain_jpeg(data, 8) is not None) == is_plain


def test_transparency_is_kept_by_a_profile():
    image = Image.new("RGBA", (2, 2), (200, 100, 100, 128))
    image.putpixel((0, 0), (200, 100, 100, 0))
    got = decode(encoded(image, icc_profile=P3), None, (0, 0, 0))
    np.testing.assert_array_equal(got[0, 0], 0)
    expected = srgb_of((200, 100, 100), "Display P3") * 128 / 255
    np.testing.assert_allclose(got[1, 1], expected, atol=2)


def test_profile_joins_the_fingerprint_of_a_pil_image():
    images = [Image.new("RGB", (4, 4)) for _ in range(3)]
    images[1].info["icc_profile"], images[2].info["icc_profile"] = ADOBE, P3
    assert len(set(map(fingerprint, images))) == 3


# Files that are no images


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"", "The file is empty"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIC.*pillow-heif.*register_heif_opener"),
        (b"\0\0\0\x18ftypmif1\0\0", "HEIC"),
        (b"\0\0\0\x18ftyp", "truncated or corrupt. Download"),
        (b"\0\0\0\x18ftypisom\0\0", "video"),
        (bytes(128) + b"DICM", "DICOM.*pydicom"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG.*cairosvg"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"II*\0\x10\0\0\0CR\x02\0", "camera raw.*rawpy"),
        (b"FUJIFILMCCD-RAW 0201", "camera raw"),
        (b"\0\0\0\x18ftypcrx ", "camera raw"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "HTML.*Download"),
        (b"<html><body>404", "HTML"),
        (b"\x93NUMPY\x01\0", "numpy.load"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"PK\x03\x04", "ZIP"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\xff\x0a\x00", "JPEG XL"),
        (b"#?RADIANCE\n", "Radiance HDR"),
        (b"PF\n8 8\n-1.0\n", "PFM.*TIFF"),
        (b"P7\nWIDTH 8\n", "PAM.*PNG"),
        (b"MM\0+\0\x08\0\0" + bytes(7) + b"\x10", "big-endian BigTIFF.*tifffile"),
        (b"II\xbc\x01\x08\0\0\0", "JPEG XR"),
        (b"\xff\xd8\xff\xf7\0\x0b", "JPEG-LS"),
        (b"AT&TFORM", "DjVu"),
        (b"gimp xcf v011", "GIMP"),
        (b"Rar!\x1a\x07", "RAR"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\0", "xz archive"),
        (b"\x28\xb5\x2f\xfd\0", "Zstandard"),
        (b"a.png".ljust(257, b"\0") + b"ustar", "tar archive"),
        (b"PAR1\x15\0", "Parquet.*pandas"),
        (b"\x1aE\xdf\xa3\0", "video"),
        (b"RIFF\0\0\0\0AVI LIST", "video"),
    ],
)
def test_file_that_is_not_an_image_is_identified(head, said, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(head)
    assert identify(head)
    for raw in (head, str(path)):
        with pytest.raises(ImageError, match=said):
            decode(raw)


def test_thumbnail_of_a_camera_raw_file_is_refused():
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(numbers("u1", 3), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(numbers("u2"), photometric="minisblack")
    data = file.getvalue()
    with pytest.raises(ImageError, match=r"camera raw file\. Develop it with rawpy"):
        decode(data)


@pytest.mark.parametrize(
    ("kind", "brand", "remedy"),
    [("AVIF", b"avif", "pillow-avif-plugin"), ("HEIF", b"heic", "HEIC")],
)
def test_truncated_file_of_a_known_format_needs_no_plugin(kind, brand, remedy, monkeypatch):
    head = b"\0\0\0\x18ftyp" + brand
    monkeypatch.setattr(Image, "OPEN", {})
    assert remedy in identify(head)
    monkeypatch.setattr(Image, "OPEN", {kind: None})
    assert identify(head).startswith(f"This {kind} file is truncated or corrupt")


# FITS files


def fits(stored, bits, **cards):
    """Encode numbers (H, W) or (C, H, W) as a FITS file, whose rows begin at the bottom."""
    sizes = stored.shape[::-1]
    cards = {
        "SIMPLE": "T",
        "BITPIX": bits,
        "NAXIS": len(sizes),
        **{f"NAXIS{axis + 1}": size for axis, size in enumerate(sizes)},
        **cards,
    }
    lines = [f"{name:8}= {value:>20} / comment".ljust(80) for name, value in cards.items()]
    header = "".join([*lines, "END".ljust(80)]).encode()
    dtype = {8: ">u1", 16: ">i2", 32: ">i4", -32: ">f4", -64: ">f8"}[bits]
    content = stored[..., ::-1, :].astype(dtype).tobytes()
    return b"".join(part + bytes(-len(part) % 2880) for part in (header, content))


GRAY = np.arange(16 * 32).reshape(SHAPE)
FITS = {
    "bytes": (GRAY % 256, 8, {}, (0, 255)),
    "unsigned": (GRAY * 128 - 32768, 16, {"BZERO": 32768, "BSCALE": 1}, (0, 65535)),
    "unsigned, in floating point": (GRAY * 128 - 32768, 16, {"BZERO": "3.2768D4"}, (0, 65535)),
    "positive": (GRAY * 60, 16, {}, (0, 65535)),
    "negative": (GRAY * 60 - 20000, 16, {}, (-20000, 12000)),
    "scaled": (GRAY * 60, 16, {"BSCALE": "0.5"}, (0, 16000)),
    "scaled bytes": (GRAY % 256, 8, {"BSCALE": "2.0", "BZERO": "10"}, (10, 520)),
    "32 bits": (GRAY * 100, 32, {"BZERO": 7}, (7, 60000)),
    "floats": (GRAY / 511, -32, {}, (0, 1)),
    "scaled floats": (GRAY / 511, -64, {"BSCALE": 3, "BZERO": -1}, (-1, 2)),
}


def test_fits_is_refused_with_a_pillow_that_misreads_it(monkeypatch):
    monkeypatch.setattr(formats, "_PILLOW", 12)
    with pytest.raises(ImageError, match=r"^Image: Pillow .* misreads FITS files. Update it to 13"):
        decode(fits(GRAY % 256, 8))


@new_pillow
@pytest.mark.parametrize("kind", FITS)
def test_fits_has_the_numbers_of_its_header(kind, tmp_path):
    stored, bits, cards, (low, high) = FITS[kind]
    content = fits(stored, bits, **cards)
    zero = float(str(cards.get("BZERO", 0)).replace("D", "E"))
    pixels = stored * float(cards.get("BSCALE", 1)) + zero
    expected = as_rgb(scaled(pixels, low, high))
    path = tmp_path / "image.fits"
    path.write_bytes(content)
    for raw in (content, str(path)):
        assert np.abs(decode(raw, pixel_range=(low, high)).astype(int) - expected).max() <= 1
    with Image.open(io.BytesIO(content)) as image:
        if cards:
            with pytest.raises(ImageError, match=r"BZERO and BSCALE.*Pass the path"):
                decode(image, pixel_range=(low, high))
        else:
            pixels = decode(image, pixel_range=(low, high)).astype(int)
            assert np.abs(pixels - expected).max() <= 1


@new_pillow
def test_fits_of_several_planes_is_refused():
    with pytest.raises(ImageError, match=r"FITS file of 3 planes.*astropy"):
        decode(fits(np.stack([GRAY % 256] * 3), 8))


# Opened images, of which Pillow keeps the wrong numbers


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("level", [0, 1])
def test_transparent_gray_of_an_opened_png_is_that_of_its_file(bits, level):
    if bits == 1 and formats._PILLOW < 13:
        pytest.skip("this Pillow ignores the transparent color of 1-bit PNG files")
    pixels = (GRAY % 2**bits)[:, :, np.newaxis]
    content = png(pixels, bits, 0, struct.pack(">H", level))
    expected = decode(content, background=(10, 200, 30))
    assert (expected[pixels[:, :, 0] == level] == (10, 200, 30)).all()
    with Image.open(io.BytesIO(content)) as image:
        for _ in range(2):  # The first time, it is not loaded yet.
            np.testing.assert_array_equal(decode(image, background=(10, 200, 30)), expected)


REDUCED = {
    "PNG of RGB": lambda: png(numbers("u2", 3), 16, 2),
    "PNG of RGBA": lambda: png(numbers("u2", 4), 16, 6),
    "PNG of gray and alpha": lambda: png(numbers("u2", 2), 16, 4),
    "TIFF": lambda: tiff(numbers("u2", 3), photometric="rgb"),
    "big-endian TIFF": lambda: tiff(numbers("u2", 3), photometric="rgb", byteorder=">"),
    "compressed TIFF": lambda: tiff(numbers("u2", 3), photometric="rgb", compression="zlib"),
    "tiled TIFF": lambda: tiff(numbers("u2", 3), photometric="rgb", tile=(16, 16)),
    "PPM": lambda: b"P6 32 16 65535 " + numbers("u2", 3).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", REDUCED)
@pytest.mark.parametrize("function", [decode, fingerprint])
def test_opened_image_without_all_bits_is_refused_if_a_range_needs_them(kind, function):
    content = REDUCED[kind]()
    for limits in (None, (0.0, 65535.0)):
        with Image.open(io.BytesIO(content)) as image:
            function(image, pixel_range=limits)
    image = Image.open(io.BytesIO(content))
    with pytest.raises(ImageError, match=r"keeps only 8 of 16 bits.*Pass the path of its file"):
        function(image, pixel_range=(0.0, 4095.0))


@pytest.mark.parametrize("close", ["image", "file"])
def test_closed_image_is_named(close, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(numbers("u1", 3)).save(path)
    with open(path, "rb") as file:
        image = Image.open(file)
        if close == "image":
            image.close()
    with pytest.raises(ImageError, match=r"was closed before its pixels were read. Call its load"):
        decode(image)


# Other variants


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_color_map_of_a_tiff_has_8_or_16_bits(bits, order):
    colors = numbers("u1", 3).reshape(-1, 3)[:256].T
    indices = (GRAY % 256).astype("u1")
    color_map = colors.astype("u2") * (257 if bits == 16 else 1)
    content = tiff(indices, photometric="palette", colormap=color_map, byteorder=order)
    np.testing.assert_array_equal(decode(content), colors.T[indices])


@pytest.mark.parametrize("alpha", [0, 1, 128, 255])
@pytest.mark.parametrize("raw_type", ["bytes", "PIL"])
def test_alpha_of_a_tga_that_is_0_everywhere_is_undefined(alpha, raw_type):
    pixels = np.dstack([numbers("u1", 3), np.full(SHAPE, alpha, "u1")])
    content = encoded(Image.fromarray(pixels), "TGA")
    expected = pixels[:, :, :3] if alpha == 0 else decode(pixels)
    raw = content if raw_type == "bytes" else Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(decode(raw), expected)


def test_variant_that_pillow_does_not_support_is_not_called_corrupt():
    pixels = numbers("u1", 4)
    header = struct.pack("<IiiHHIIiiII", 40, 32, 16, 1, 32, 3, pixels.size, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF0, 0xF000, 0xF00000)
    content = b"BM" + struct.pack("<IHHI", 66 + pixels.size, 0, 0, 66) + header + masks
    with pytest.raises(ImageError, match=r"cannot read this variant: Unsupported.*PNG first"):
        decode(content + pixels.tobytes())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipe_is_refused_instead_of_waiting(tmp_path):
    os.mkfifo(path := str(tmp_path / "image.png"))
    for function in (decode, fingerprint):
        with pytest.raises(ImageError, match="Got a pipe, a socket or a device"):
            function(path)
    assert plain_jpeg(path, 8) is None
