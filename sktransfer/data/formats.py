"""Formats that Pillow alone misreads: variants of TIFF and PNG, color profiles.

Shapes: H x W pixels, C channels (1 gray, 3 RGB).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageCms
from PIL.FitsImagePlugin import FitsImageFile
from PIL.IcnsImagePlugin import IcnsImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from sktransfer.utils.errors import ImageError, import_optional

# TIFF tags, and some of their values.
_SUBFILE_TYPE, _WIDTH, _LENGTH, _BITS, _COMPRESSION = 254, 256, 257, 258, 259
_PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR, _SUB_FILES = 262, 274, 277, 284, 330
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _PROFILE, _DNG_VERSION = 338, 339, 34675, 50706
_COLOR_MAP = 320
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _SEPARATED = 0, 1, 2, 5
_SIGNED, _FLOAT = 2, 3
_ASSOCIATED, _UNASSOCIATED = 1, 2
_COLORS = {0: "MinIsWhite", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELAB"}
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floating point"}

_PILLOW = int(PIL.__version__.partition(".")[0])

# A profile that changes no channel by more than this is sRGB under another name.
_SRGB_TOLERANCE = 2

# Transformations of stored pixels by EXIF orientation.
_UPRIGHT = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}

# First bytes of files that Pillow does not read, their names, and remedies.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "This is a Git LFS pointer. Run: git lfs pull",
    ),
    (0, b"%PDF", "This is a PDF. Convert its pages to images first, for example to PNG"),
    (128, b"DICM", "This is a DICOM file. Read its pixels with pydicom, and pass arrays"),
    (0, b"\x93NUMPY", "This is a NumPy file. Load it with numpy.load, and pass the array"),
    (0, b"\x89HDF", "This is an HDF5 file. Open it with h5py, and pass a dataset in it"),
    (0, b"PK\x03\x04", "This is a ZIP archive. Unpack it, and pass the images in it"),
    (0, b"\x1f\x8b", "This is a gzip archive. Unpack it, and pass the images in it"),
    (0, b"v/1\x01", "This is an OpenEXR file. Convert it to TIFF first"),
    (0, b"#?R", "This is a Radiance HDR file. Convert it to TIFF first"),
    (0, b"PF\n", "This is a PFM file of RGB. Convert it to TIFF first, or pass arrays"),
    (0, b"PF ", "This is a PFM file of RGB. Convert it to TIFF first, or pass arrays"),
    (0, b"P7\n", "This is a PAM file. Convert it to PNG first"),
    (0, b"MM\0+", "This is a big-endian BigTIFF. Read it with tifffile, and pass arrays"),
    (0, b"II\xbc", "This is a JPEG XR file. Convert it to PNG first"),
    (0, b"\xff\xd8\xff\xf7", "This is a JPEG-LS file. Convert it to PNG first"),
    (0, b"AT&TFORM", "This is a DjVu file. Convert its pages to images first"),
    (0, b"gimp xcf", "This is a GIMP file. Export it to PNG first"),
    (0, b"Rar!", "This is a RAR archive. Unpack it, and pass the images in it"),
    (0, b"7z\xbc\xaf", "This is a 7z archive. Unpack it, and pass the images in it"),
    (0, b"BZh", "This is a bzip2 archive. Unpack it, and pass the images in it"),
    (0, b"\xfd7zXZ", "This is an xz archive. Unpack it, and pass the images in it"),
    (0, b"\x28\xb5\x2f\xfd", "This is a Zstandard archive. Unpack it, and pass the images in it"),
    (257, b"ustar", "This is a tar archive. Unpack it, and pass the images in it"),
    (0, b"PAR1", "This is a Parquet file. Read it with pandas, and pass its column of images"),
    (0, b"\x1aE\xdf\xa3", "This is a video. Extract its frames as images first"),
    (8, b"AVI LIST", "This is a video. Extract its frames as images first"),
    (0, b"\xff\x0a", "This is a JPEG XL file. Install and import pillow-jxl-plugin"),
    (4, b"JXL \r\n", "This is a JPEG XL file. Install and import pillow-jxl-plugin"),
)
_BROKEN = "This {} file is truncated or corrupt. Download or copy it again"
_CAMERA_RAW = "This is a camera raw file. Develop it with rawpy, and pass arrays"
_CAMERA_SIGNATURES = (
    (8, b"CR\x02"),
    (4, b"ftypcrx"),
    (0, b"FUJIFILMCCD-RAW"),
    (0, b"IIRO"),
    (0, b"IIRS"),
    (0, b"MMOR"),
    (0, b"IIU\x00"),
    (6, b"HEAPCCDR"),
    (0, b"FOVb"),
    (0, b"\x00MRM"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


class Samples(NamedTuple):
    """Pixels of a file as it stores them, upright.

    Parameters
    ----------
    colors : ndarray of shape (H, W, C)
        Any numeric dtype; larger is brighter.
    alpha : ndarray of shape (H, W), uint8, or None
    profile : bytes or None
        The embedded color profile.
    """

    colors: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None


# Pillow's images


def correction(image: Image.Image, all_bits: bool = False) -> str:
    """Return how the numbers of an image must be corrected, from the header of its file.

    Parameters
    ----------
    image : PIL image
    all_bits : bool
        All bits of the file are needed.

    Returns
    -------
    {"", "inverted", "unsigned", "signed"}
        The numbers are right; 0 is white; or Pillow mistook unsigned numbers for signed ones, or
        the reverse.

    Raises
    ------
    ImageError
        If Pillow misreads the file in another way, or drops bits of it that are needed.
    """
    if all_bits and is_reduced(image):
        raise ImageError(
            f"Pillow keeps only 8 of 16 bits of this {image.format} image, so pixel_range cannot "
            "be applied to it. Pass the path of its file, or arrays."
        )
    if isinstance(image, FitsImageFile):
        if _fits_scale(image) != (1, 0):
            raise ImageError(
                "Pillow ignores BZERO and BSCALE of this FITS image. Pass the path of its file "
                "instead."
            )
        return "signed" if image.mode == "I;16" else ""
    if not isinstance(image, TiffImageFile):
        return ""
    tags = image.tag_v2
    if _is_misread_tiff(image):
        raise ImageError(
            f"Pillow misreads this image ({_variant(tags)}). Pass the path of its file instead."
        )
    if image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE:
        return "inverted"
    kind = _first(tags, _SAMPLE_FORMAT)
    if image.mode == "I" and kind == 1 and _first(tags, _BITS) == 32:
        return "unsigned"
    return "signed" if image.mode == "L" and kind == _SIGNED else ""


def numbers(image: Image.Image, needed: str = "") -> np.ndarray | None:
    """Return the numbers (H, W) of an image that is not 8-bit, or None.

    Parameters
    ----------
    image : PIL image
    needed : str
        The `correction` of the image or of the image of which it is a copy.
    """
    if not needed:
        has_numbers = image.mode == "F" or image.mode.startswith("I")
        return np.asarray(image) if has_numbers else None
    values = np.asarray(image)
    if needed == "inverted":
        return np.iinfo(values.dtype).max - values
    if needed == "unsigned":
        return values.view(np.uint32)
    signed = values.view(f"i{values.itemsize}")
    return signed if values.itemsize == 1 or signed.min() < 0 else values


def has_numbers(image: Image.Image) -> bool:
    """Return whether an image is not 8-bit; its pixels are not loaded."""
    if image.mode == "F" or image.mode.startswith("I"):
        return True
    if image.mode != "L" or not isinstance(image, TiffImageFile):
        return False
    return _first(image.tag_v2, _SAMPLE_FORMAT) == _SIGNED


def largest_frame(image: Image.Image) -> Image.Image:
    """Return the largest image of an opened ICNS or ICO file; any other image unchanged."""
    # Pillow loses the palette and the transparency of an embedded PNG.
    if isinstance(image, IcnsImageFile):
        return image.icns.getimage(image.best_size)
    return image.ico.getimage(image.size) if isinstance(image, IcoImageFile) else image


def without_undefined_alpha(image: Image.Image) -> Image.Image:
    """Drop the alpha channel of a loaded TGA file if it is 0 everywhere; other images unchanged."""
    # Many programs leave the fourth byte of a pixel at 0.
    if image.format != "TGA" or image.mode != "RGBA" or image.getchannel("A").getextrema()[1]:
        return image
    return image.convert("RGB")


# Files that Pillow reads only in part


def is_reduced(image: Image.Image) -> bool:
    """Return whether Pillow drops the lower 8 of 16 bits of a file that is not loaded yet."""
    tile = _tile(image)
    if not tile or has_numbers(image):
        return False
    decoder, _, _, arguments = tile[:4]
    first, *_, last = arguments if isinstance(arguments, tuple) and arguments else (arguments, None)
    if decoder in ("ppm", "ppm_plain"):
        return isinstance(last, int) and last > 255
    return decoder == "SGI16" or (decoder == "sgi_rle" and last == 2) or ";16" in str(first)


def stated_maximum(image: Image.Image) -> int | None:
    """Return the maximum that a PGM file states, to which Pillow scales it; None for others."""
    tile = _tile(image)
    is_scaled = image.mode == "I" and tile and tile[0] in ("ppm", "ppm_plain")
    return int(tile[3][-1]) if is_scaled else None


def is_misread(image: Image.Image) -> bool:
    """Return whether Pillow misreads a file that is not loaded yet."""
    if isinstance(image, TiffImageFile):
        return _is_misread_tiff(image)
    if isinstance(image, FitsImageFile):
        return _fits_scale(image) != (1, 0)
    return image.format == "PNG" and is_reduced(image) and "transparency" in image.info


def read_samples(raw: Any, image: Image.Image | None = None) -> Samples | None:
    """Read a PNG, TIFF or FITS file that Pillow misreads or of which it keeps 8 of 16 bits.

    Parameters
    ----------
    raw : str or bytes-like
    image : PIL image or None
        The image that Pillow opened; None if Pillow cannot.

    Returns
    -------
    Samples or None
        None if Pillow cannot open the file, and it is not a TIFF.

    Raises
    ------
    ImageError
        If no reader for this variant is installed.
    """
    if isinstance(image, FitsImageFile):
        return _read_fits(image)
    if image is not None and is_reduced(image) and not _is_planar(image):
        samples = _read_bytes(raw, image)
        if samples is not None:
            return samples
    if isinstance(image, TiffImageFile):
        return _read_tiff(raw, image.tag_v2)
    if image is not None:
        raise ImageError(
            f"Pillow keeps only 8 of 16 bits of this {image.format} file, so pixel_range cannot be "
            "applied to it. Convert it to PNG or TIFF, or pass arrays."
        )
    tags = _tags(raw)
    return None if tags is None else _read_tiff(raw, tags)


def scale_transparency(image: Image.Image) -> None:
    """Scale the transparent gray of a PNG of 2 or 4 bits as Pillow scales its pixels."""
    level = image.info.get("transparency")
    tile = _tile(image)
    if image.format == "PNG" and tile and isinstance(level, int):
        factor = {"L;2": 85, "L;4": 17}.get(str(tile[3]), 1)
        image.info["transparency"] = level * factor


def _tile(image: Image.Image) -> tuple[Any, ...]:
    """Return how Pillow decodes the first part of a file; empty if the image is loaded."""
    tiles = getattr(image, "tile", None)
    return tuple(tiles[0]) if tiles else ()


def _is_misread_tiff(image: TiffImageFile) -> bool:
    tags = image.tag_v2
    if image.mode == "F" and tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE:
        return True
    color_map = tags.get(_COLOR_MAP, ())
    if image.mode == "P" and 0 < max(color_map, default=0) < 256:  # 8-bit colors, instead of 16-bit
        return True
    compressed = image.info.get("compression") != "raw"
    if _is_planar(image):
        is_known = image.mode in ("L", "RGB", "RGBA", "CMYK")
        if not is_known or _ASSOCIATED in tags.get(_EXTRA_SAMPLES, ()):
            return True
        return _first(tags, _BITS) == 16 and not compressed
    wide = _first(tags, _BITS) > 8 and _first(tags, _SAMPLE_FORMAT) in (_SIGNED, _FLOAT)
    return tags.prefix == b"MM" and compressed and wide


def _is_planar(image: Image.Image) -> bool:
    if not isinstance(image, TiffImageFile):
        return False
    return image.tag_v2.get(_PLANAR) == 2 and image.tag_v2.get(_SAMPLES, 1) > 1


def _first(tags: Mapping[int, Any], tag: int) -> int:
    values = tags.get(tag, 1)
    return int(values[0] if isinstance(values, tuple) else values)


def _variant(tags: Any) -> str:
    """Describe a TIFF file, for an error."""
    parts = [
        "TIFF",
        f"{_first(tags, _BITS)}-bit {_NUMBERS.get(_first(tags, _SAMPLE_FORMAT), 'numbers')}",
        _COLORS.get(tags.get(_PHOTOMETRIC, 1), f"photometric {tags.get(_PHOTOMETRIC)}"),
        f"{tags.get(_SAMPLES, 1)} channels" if tags.get(_SAMPLES, 1) > 1 else "",
        "planar" if tags.get(_PLANAR) == 2 else "",
        "big-endian" if tags.prefix == b"MM" else "",
    ]
    return ", ".join(part for part in parts if part)


def _tags(raw: Any) -> Any:
    """Read the tags of the first image of a TIFF file; return None for other files."""
    with open(raw, "rb") if isinstance(raw, str) else io.BytesIO(raw) as file:
        header = file.read(8)
        if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return None
        if 43 in header[2:4]:
            header += file.read(8)
        tags = ImageFileDirectory_v2(header)
        try:
            file.seek(tags.next)
            tags.load(file)
        except Exception:  # truncated or corrupt
            return None
    return tags if _WIDTH in tags and _LENGTH in tags else None


def _read_bytes(raw: Any, image: Image.Image) -> Samples | None:
    """Read 16-bit colors in two passes of Pillow: upper bytes, lower bytes; None if it cannot."""
    first = _raw_mode(image)
    if first == "LA;16B":  # in one pass, as if the bytes were red, green, blue and opacity
        pairs = _decoded_as(raw, "RGBA").astype(np.uint16)
        pixels = pairs[:, :, ::2] * 256 + pairs[:, :, 1::2]
    else:
        kind, _, order = first.partition(";16")
        order = ("L" if sys.byteorder == "little" else "B") if order == "N" else order
        if kind not in ("RGB", "RGBA", "RGBX") or order not in ("L", "B"):
            return None
        upper = _decoded_as(raw, first).astype(np.uint16)
        pixels = upper * 256 + _decoded_as(raw, f"{kind};16{'B' if order == 'L' else 'L'}")
    n_colors = 3 if pixels.shape[2] > 2 else 1
    colors, alpha = pixels[:, :, :n_colors], None
    if pixels.shape[2] > n_colors:
        alpha = _alpha(pixels[:, :, n_colors])
    elif "transparency" in image.info:
        transparent = (colors == np.asarray(image.info["transparency"])).all(axis=2)
        alpha = np.where(transparent, 0, 255).astype(np.uint8)
    samples = Samples(colors, alpha, image.info.get("icc_profile"))
    # Pillow turns a TIFF when it loads it.
    return _upright(samples, 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1))


def _raw_mode(image: Image.Image) -> str:
    arguments = _tile(image)[3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _decoded_as(raw: Any, raw_mode: str) -> np.ndarray:
    """Decode a file as if its pixels were in another of Pillow's raw modes."""
    with Image.open(raw if isinstance(raw, str) else io.BytesIO(raw)) as image:
        tiles: Any = image.tile
        for index, tile in enumerate(tiles):
            arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
            changed = (*tile[:3], arguments)
            tiles[index] = type(tile)._make(changed) if hasattr(tile, "_make") else changed
        return np.asarray(image)


def _fits_scale(image: FitsImageFile) -> tuple[float, float]:
    """Return BSCALE and BZERO of a FITS file; (1, 0) if the image is loaded.

    Raises
    ------
    ImageError
        If the file has several planes, of which Pillow reads the first, or Pillow is too old.
    """
    if _PILLOW < 13:
        raise ImageError(
            f"Pillow {PIL.__version__} misreads FITS files. Update it to 13.0 or later: "
            "pip install -U pillow."
        )
    if image.fp is None or not image.tile:
        return 1, 0
    position, cards = image.fp.tell(), {}
    image.fp.seek(0)
    while (card := image.fp.read(80)) and card[:3] != b"END":
        cards[card[:8].strip()] = card[10:].partition(b"/")[0].strip()
    image.fp.seek(position)
    planes = cards.get(b"NAXIS3", b"1")
    if planes != b"1":
        raise ImageError(
            f"Got a FITS file of {planes.decode('ascii', 'replace')} planes, of which Pillow reads "
            "the first. Read it with astropy, select planes, and pass arrays."
        )
    # FITS takes exponents from Fortran, too.
    scale, zero = (
        float(cards.get(key, default).replace(b"D", b"E"))
        for key, default in ((b"BSCALE", b"1"), (b"BZERO", b"0"))
    )
    return scale, zero


def _read_fits(image: FitsImageFile) -> Samples:
    """Read the numbers of a FITS file: BZERO + BSCALE * stored."""
    scale, zero = _fits_scale(image)
    stored = np.asarray(image)
    stored = stored.view("i2") if image.mode == "I;16" else stored
    values = stored.astype(np.float64) * scale + zero
    if stored.dtype.kind == "f" or (values % 1).any():
        values = values.astype(np.float32)
    else:  # Integers of 16 bits are stored with an offset of 32768.
        unsigned = stored.itemsize == 2 and values.min() >= 0 and values.max() <= 65535
        values = values.astype(np.uint16 if unsigned else np.int64)
    return Samples(values[:, :, np.newaxis])


def _read_tiff(raw: Any, tags: Any) -> Samples:
    variant = _variant(tags)
    _refuse_bomb(tags[_WIDTH] * tags[_LENGTH])
    if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE and _first(tags, _SAMPLE_FORMAT) != 1:
        raise ImageError(
            f"The smallest number is white, and the number of black is unknown ({variant}). Negate "
            "the pixels, and pass arrays."
        )
    try:
        tifffile = import_optional("tifffile", extra="tiff", purpose="tifffile")
    except ImportError as error:
        raise ImageError(
            f"Pillow cannot read this variant correctly ({variant}). Install tifffile, which reads "
            "it: pip install 'sktransfer[tiff]'."
        ) from error
    try:
        with tifffile.TiffFile(raw if isinstance(raw, str) else io.BytesIO(raw)) as file:
            page = file.pages[0]
            array = page.asarray()
            color_map = page.colormap
    except Exception as error:
        if "imagecodecs" not in str(error):
            raise
        raise ImageError(
            f"Neither Pillow nor tifffile can read this variant ({variant}): {error} Install "
            "it: pip install imagecodecs."
        ) from error
    array = array[:, :, np.newaxis] if array.ndim == 2 else array
    if tags.get(_PLANAR) == 2 and tags.get(_SAMPLES, 1) > 1:
        array = np.moveaxis(array, 0, -1)
    samples = _interpret(array, tags, variant, color_map)
    profile = tags.get(_PROFILE)
    return _upright(samples._replace(profile=profile), tags.get(_ORIENTATION, 1))


def _interpret(array: np.ndarray, tags: Any, variant: str, color_map: Any) -> Samples:
    """Interpret the channels of a TIFF file."""
    photometric, extra = tags.get(_PHOTOMETRIC, 1), tags.get(_EXTRA_SAMPLES, ())
    unknown = ImageError(
        f"The channels of this variant cannot be interpreted ({variant}). Select one or three "
        "channels, and pass arrays."
    )
    if array.ndim != 3 or photometric not in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, 3):
        raise unknown
    if photometric == 3:
        if array.shape[2] != 1:
            raise unknown
        shift = 8 if color_map.max() > 255 else 0
        colors = color_map[:, array[:, :, 0]].transpose(1, 2, 0) >> shift
        return Samples(colors.astype(np.uint8))
    n_colors = 3 if photometric == _RGB else 1
    n_extra = array.shape[2] - n_colors
    if n_extra < 0 or n_extra > max(len(extra), 0 if n_colors == 1 else 1):
        raise unknown
    if n_colors == 1 and n_extra > 1:
        raise unknown
    colors = array[:, :, :n_colors]
    if photometric == _MIN_IS_WHITE:
        colors = np.array(2 ** _first(tags, _BITS) - 1, array.dtype) - colors
    kind = extra[0] if extra else _UNASSOCIATED
    if not n_extra or kind not in (_ASSOCIATED, _UNASSOCIATED):
        return Samples(colors)
    alpha = array[:, :, n_colors]
    return Samples(_divided(colors, alpha) if kind == _ASSOCIATED else colors, _alpha(alpha))


def _divided(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Undo the multiplication of colors by alpha."""
    top = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    share = np.where(alpha > 0, alpha / top, 1.0)[:, :, np.newaxis]
    divided = np.minimum(colors / share, top)
    return (divided if alpha.dtype.kind == "f" else np.rint(divided)).astype(colors.dtype)


def _alpha(alpha: np.ndarray) -> np.ndarray:
    """Convert transparency to uint8: integers have the range of their dtype, floats 0 to 1."""
    top = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    return np.clip(np.rint(alpha * (255 / top)), 0, 255).astype(np.uint8)


def _upright(samples: Samples, orientation: int) -> Samples:
    turn = _UPRIGHT.get(orientation)
    if turn is None:
        return samples
    alpha = None if samples.alpha is None else turn(samples.alpha)
    return Samples(turn(samples.colors), alpha, samples.profile)


def _refuse_bomb(n_pixels: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and n_pixels > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


# Color profiles


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image to sRGB if it has another color profile; a broken profile is ignored."""
    conversion = srgb_transform(image.info.get("icc_profile"), image.mode)
    if conversion is None:
        return image
    mode, transform = conversion
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        alpha = image.getchannel("A")
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None  # Only inPlace=True returns None.
    converted.info.pop("transparency", None)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def srgb_transform(profile: Any, mode: str) -> tuple[str, Any] | None:
    """Return the mode of a color profile and its transformation to sRGB.

    None if there is no profile, it is broken or sRGB, or does not fit the image's mode.
    """
    if not isinstance(profile, bytes) or not profile:
        return None
    conversion = _transform(profile)
    if conversion is None or (conversion[0] == "CMYK") != (mode == "CMYK"):
        return None
    is_gray = mode in ("1", "L", "LA", "La")
    fits = mode not in ("LAB", "HSV") and (conversion[0] != "L" or is_gray)
    return conversion if fits else None


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, Any] | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[opened.profile.xcolor_space.strip()]
        name = ImageCms.getProfileDescription(opened).strip()
        if mode == "RGB" and name.startswith("sRGB"):
            return None
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, target, mode, "RGB")
        if mode != "CMYK" and _changes_nothing(transform, mode):
            return None
    except Exception:  # Profiles come from anywhere, and littlecms raises several errors.
        return None
    return mode, transform


def _changes_nothing(transform: Any, mode: str) -> bool:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, len(levels), 3)
    probe = Image.fromarray(grid if mode == "RGB" else levels[np.newaxis])
    expected = np.asarray(probe.convert("RGB"), dtype=int)
    converted = np.asarray(ImageCms.applyTransform(probe, transform), dtype=int)
    return bool(abs(converted - expected).max() <= _SRGB_TOLERANCE)


# Files that are not images


def identify(head: bytes) -> str:
    """Identify a file that Pillow does not read, with a remedy; empty if it is unknown.

    Parameters
    ----------
    head : bytes
        The first 512 bytes of the file, or all.

    Examples
    --------
    >>> identify(b"%PDF-1.7")
    'This is a PDF. Convert its pages to images first, for example to PNG'
    >>> identify(b"no image")
    ''
    """
    if not head:
        return "The file is empty. Download or copy it again"
    if _is_camera_raw(head):
        return _CAMERA_RAW
    for start, signature, text in _SIGNATURES:
        if head[start : start + len(signature)] == signature:
            return text
    if head[4:8] == b"ftyp":
        return _identify_container(head[8:12])
    return _identify_text(head)


def refuse_camera_raw(image: Image.Image, head: bytes) -> None:
    """Raise an ImageError if Pillow opened only the thumbnail of a camera raw file."""
    if not isinstance(image, TiffImageFile):
        return
    tags = image.tag_v2
    is_thumbnail = tags.get(_SUBFILE_TYPE, 0) & 1 == 1 or _DNG_VERSION in tags
    if _is_camera_raw(head) or (_SUB_FILES in tags and is_thumbnail):
        raise ImageError(f"{_CAMERA_RAW}.")


def _is_camera_raw(head: bytes) -> bool:
    return any(head[start : start + len(text)] == text for start, text in _CAMERA_SIGNATURES)


def _identify_container(brand: bytes) -> str:
    if len(brand) < 4:
        return _BROKEN.format("media")
    if brand in _HEIF_BRANDS:
        if "HEIF" in Image.OPEN:
            return _BROKEN.format("HEIF")
        return (
            "This is a HEIC or HEIF file. Install pillow-heif, and call "
            "pillow_heif.register_heif_opener()"
        )
    if brand in (b"avif", b"avis"):
        if "AVIF" in Image.OPEN:
            return _BROKEN.format("AVIF")
        return (
            "This is an AVIF file. Install Pillow 11.3 or later, which reads AVIF, or "
            "pillow-avif-plugin"
        )
    return "This is a video. Extract its frames as images first"


def _identify_text(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "This is an SVG. Render it to PNG first, for example with cairosvg"
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text:
        return "This is an HTML page, maybe an error page of a server. Download the image again"
    return ""
