"""The header of a JPEG, which shows whether all decoders decode the file alike.

Source: ITU-T T.81 (markers and frame headers), JEITA CP-3451 (Exif).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from sktransfer.data.formats import srgb_transform

# Markers without a segment: RST0 to RST7, and TEM.
_WITHOUT_SEGMENT = {*range(0xD0, 0xD8), 0x01}
_BASELINE = {0xC0, 0xC1}
# Frame headers of progressive, lossless, hierarchical and arithmetic coding.
_OTHER_FRAMES = {0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_APP1, _APP2, _APP14, _START_OF_SCAN = 0xE1, 0xE2, 0xEE, 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_ORIENTATION = 0x0112


class JpegHeader(NamedTuple):
    """Size of a JPEG in pixels."""

    height: int
    width: int


def plain_header(encoded: memoryview) -> JpegHeader | None:
    """Read the header of a JPEG that every decoder decodes to the same pixels.

    Parameters
    ----------
    encoded : memoryview
        All bytes of the file.

    Returns
    -------
    JpegHeader or None
        None for a file that is not a JPEG, or that only `decode` handles: it is not baseline, has
        other than 1 or 3 channels, must be rotated, has a color profile other than sRGB, contains
        several images, or has no end.
    """
    try:
        return _plain_header(encoded)
    except (IndexError, struct.error):
        return None


def _plain_header(encoded: memoryview) -> JpegHeader | None:
    frame, profile, start, end = None, b"", 0, 0
    for marker, start, end in _segments(encoded):
        if _changes_pixels(encoded, marker, start, end):
            return None
        if marker in _BASELINE:
            frame = struct.unpack_from(">BHHB", encoded, start)
            # Channels that are named R, G and B are not Y, Cb and Cr.
            if frame[3] == 3 and encoded[start + 6] == ord("R"):
                return None
        elif marker == _APP2 and encoded[start : start + 12] == b"ICC_PROFILE\0":
            profile += bytes(encoded[start + 14 : end])
    # `start` and `end` are those of the first scan.
    if frame is None or not _has_end(encoded, end):
        return None
    precision, height, width, channels = frame
    if precision != 8 or channels not in (1, 3) or encoded[start] != channels:
        return None
    has_profile = srgb_transform(profile, "RGB" if channels == 3 else "L") is not None
    return None if has_profile or not height or not width else JpegHeader(height, width)


def _has_end(encoded: memoryview, start: int) -> bool:
    """Return whether a file is complete: within a scan, these two bytes do not occur."""
    # Usually they are the last ones.
    return encoded[-2:] == _END_OF_IMAGE or _END_OF_IMAGE in bytes(encoded[start:])


def _segments(encoded: memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment, up to the header of the first scan."""
    position, marker = 2, 0
    if encoded[:2] != b"\xff\xd8":
        raise IndexError("not a JPEG")
    while marker != _START_OF_SCAN:
        marker = encoded[position + 1]
        if encoded[position] != 0xFF:
            raise IndexError("no marker")
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _WITHOUT_SEGMENT:
            position += 2
        else:
            length = encoded[position + 2] << 8 | encoded[position + 3]
            yield marker, position + 4, position + 2 + length
            position += 2 + length


def _changes_pixels(encoded: memoryview, marker: int, start: int, end: int) -> bool:
    """Return whether decoders may disagree on a file with this segment."""
    if marker in _OTHER_FRAMES:
        return True
    if marker == _APP1:
        return not _is_upright(encoded, start, end)
    if marker == _APP2:  # several images in one file
        return encoded[start : start + 4] == b"MPF\0"
    # Adobe's way to say whether the channels are Y, Cb and Cr.
    return marker == _APP14 and encoded[start : start + 5] == b"Adobe" and encoded[start + 11] != 1


def _is_upright(encoded: memoryview, start: int, end: int) -> bool:
    """Return whether an APP1 segment leaves the image as it is stored."""
    if encoded[start : start + 6] != b"Exif\0\0":
        return b"Orientation" not in bytes(encoded[start:end])  # XMP can rotate, too
    tiff = start + 6
    order = {b"II": "<", b"MM": ">"}.get(bytes(encoded[tiff : tiff + 2]))
    if order is None:
        return False
    (offset,) = struct.unpack_from(order + "I", encoded, tiff + 4)
    (count,) = struct.unpack_from(order + "H", encoded, tiff + offset)
    for entry in range(tiff + offset + 2, tiff + offset + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", encoded, entry)
        if tag == _ORIENTATION:
            value = struct.unpack_from(order + ("H" if kind == 3 else "I"), encoded, entry + 8)
            return value[0] == 1
    return True
