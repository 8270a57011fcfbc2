"""JPEG files: what is refused undecoded, and pixels straight from libjpeg-turbo where nothing is in doubt.

Pillow decodes with the same library and gives the same pixels; it takes a tenth longer for small pictures, and half as
long again for large ones, which it hands over in a second copy. Whatever is in doubt is left to it: four colours, a
size that is not what the header told, and every file about which libjpeg has as much as a warning, so that damaged
files have one reader and one message.
"""

from __future__ import annotations

import numpy as np

from avlm.errors import MediaError
from avlm.layout import Size
from avlm.samples import MediaItem

try:
    import simplejpeg
except ImportError:  # there is no wheel for this system, whose Pillow decodes them as well
    simplejpeg = None

COLOURS = ("YCbCr", "RGB", "Gray")
"""Which red, green and blue are made of in one way only."""
SEQUENTIAL = (b"\xc0", b"\xc1")
"""Segments that begin a picture of which every colour is stored once; a progressive one is stored by and by."""
MOST_SCANS = 200
"""Scans of a JPEG; progressive ones have about ten. Each goes over all pixels, so thousands take minutes."""


def jpeg_pixels(data: bytes, size: Size) -> np.ndarray | None:
    """uint8 [height, width, 3], colours four bytes apart, as they lie in the file; None where Pillow is to decode it.

    Args:
        size: Height and width that the header tells, within what may be decoded.
    """
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != size or colours not in COLOURS:
            return None
        pixels = np.empty((height, width, 4), np.uint8)
        simplejpeg.decode_jpeg(data, colorspace="RGBA", buffer=pixels)
    except ValueError:  # also of what can be read with a warning
        return None
    return pixels[:, :, :3]


def check_jpeg(item: MediaItem, data: bytes) -> None:
    """Refuse a JPEG without an end marker behind the beginning of its scan (a thumbnail in its header has its own), and
    one of endless scans.

    Where a download broke off and the rest is zeros, the missing end is the only sign: zeros are decoded to grey.

    Raises:
        MediaError: It is one of these.
    """
    at, colours = 2, None
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        if data[at + 1 : at + 2] in SEQUENTIAL:
            colours = data[at + 9 : at + 10]
        at += 1 if data[at + 1 : at + 2] == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4])
    if data.rfind(b"\xff\xd9", at) < 0:
        raise MediaError(f"{item.name()}: is truncated: its end marker is missing. Copy the picture again")
    if data[at + 4 : at + 5] == colours or _scans(data, at) <= MOST_SCANS:  # all in one scan, behind which none is read
        return
    scans = data.count(b"\xff\xda", at, data.find(b"\xff\xd9", at))  # of the first picture
    if scans > MOST_SCANS:
        raise MediaError(f"{item.name()}: has {scans} scans, and at most {MOST_SCANS} are decoded. Encode it again")


def _scans(data: bytes, at: int) -> int:
    """Beginnings of scans in all that follows, of further pictures too: counting them up to the first end takes several
    times as long."""
    codes = np.frombuffer(data, np.uint8)[at:]
    return int(np.count_nonzero((codes[:-1] == 0xFF) & (codes[1:] == 0xDA)))
