"""The header of a JPEG tells whether any decoder decodes it alike."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_image
from torchvision.io import ImageReadMode, decode_jpeg

from sktransfer.data.decoding import decode
from sktransfer.data.jpeg import plain_header

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

PHOTOGRAPH = Image.fromarray(load_sample_image("china.jpg")[:120, :150])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(mode="RGB", exif=None, order=None, **options):
    if exif is not None:
        tags = Image.Exif()
        tags.endian = order or "<"
        for tag, value in exif.items():
            tags[tag] = value
        options["exif"] = tags
    file = io.BytesIO()
    PHOTOGRAPH.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def segment(marker, content):
    """Insert a segment after the start of an image."""
    data = encoded()
    length = (len(content) + 2).to_bytes(2, "big")
    return data[:2] + bytes([0xFF, marker]) + length + content + data[2:]


PLAIN = {
    "default": encoded(),
    "gray": encoded("L"),
    "4:4:4": encoded(subsampling=0),
    "4:2:2": encoded(subsampling=1),
    "low quality": encoded(quality=20),
    "optimized": encoded(optimize=True),
    "restart markers": encoded(restart_marker_blocks=4),
    "upright": encoded(exif={0x0112: 1, 0x010F: "Maker"}),
    "big-endian Exif": encoded(exif={0x010F: "Maker"}, order=">"),
    "sRGB": encoded(icc_profile=SRGB),
    "comment": encoded(comment="made by hand"),
    "another application's segment": segment(0xE5, b"\xff\xc2\xff\xda" * 9),
    "fill bytes": encoded()[:2] + b"\xff\xff" + encoded()[2:],
    "bytes after the end": encoded() + b"\0" * 100,
    "XMP without orientation": encoded(xmp=b"<x:xmpmeta/>"),
}
SPECIAL = {
    "progressive": encoded(progressive=True),
    "CMYK": encoded("CMYK"),
    "RGB without conversion": encoded(keep_rgb=True),
    **{f"orientation {value}": encoded(exif={0x0112: value}) for value in range(2, 9)},
    "orientation, big-endian": encoded(exif={0x0112: 6}, order=">"),
    "orientation in XMP": encoded(xmp=b"<tiff:Orientation>6</tiff:Orientation>"),
    "several images": segment(0xE2, b"MPF\0" + b"\0" * 20),
    "broken Exif": segment(0xE1, b"Exif\0\0??" + b"\0" * 10),
    "truncated": encoded()[:-300],
    "without its last bytes": encoded()[:-2],
    "only the header": encoded()[:200],
    "12 bits": encoded().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "lossless": encoded().replace(b"\xff\xc0\x00\x11", b"\xff\xc3\x00\x11"),
    "arithmetic": encoded().replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"),
    "PNG": b"\x89PNG\r\n\x1a\n" + b"\0" * 99,
    "empty": b"",
    "two bytes": b"\xff\xd8",
    "noise": np.random.default_rng(0).bytes(999),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpeg_has_its_size_and_the_pixels_of_another_decoder(name):
    assert plain_header(memoryview(PLAIN[name])) == (120, 150)
    pixels = torch.frombuffer(bytearray(PLAIN[name]), dtype=torch.uint8)
    other = decode_jpeg(pixels, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    assert np.abs(decode(PLAIN[name]).astype(int) - other).max() <= 2


@pytest.mark.parametrize("name", SPECIAL)
def test_special_jpeg_is_left_to_the_cpu(name):
    assert plain_header(memoryview(SPECIAL[name])) is None


def test_every_truncation_is_noticed():
    data = encoded(exif={0x010F: "Maker"}, icc_profile=SRGB)
    for length in range(0, len(data) - 1, 7):
        assert plain_header(memoryview(data[:length])) is None
