"""JPEG files: what is refused undecoded, and pixels straight from libjpeg-turbo where nothing is in doubt.

Pillow decodes with that library too and gives the same pixels; it takes a tenth longer for small pictures, and half as
long again for large ones, which it hands over in a second copy. Whatever is in doubt is left to it: four colours, a
size that is not what the header told, and every file about which libjpeg has as much as a warning, unless it is that
pixels are lost: those are refused, which Pillow does not do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from avlm.data.decoding.plain import SEQUENTIAL
from avlm.errors import MediaError
from avlm.layout import Size
from avlm.samples import MediaItem

try:
    import simplejpeg
except ImportError:  # a system that it was not built for, whose Pillow decodes as well
    simplejpeg = None

UPRIGHT = 1
"""Of EXIF's orientations, the one in which pixels lie as they are seen."""
TURNS = {
    UPRIGHT: (1, 1, False),
    2: (1, -1, False),
    3: (-1, -1, False),
    4: (-1, 1, False),
    5: (1, 1, True),
    6: (-1, 1, True),
    7: (-1, -1, True),
    8: (1, -1, True),
}
"""By EXIF's orientation: which way rows and columns are read, and whether they then change places (Exif 3.0, 4.6.5)."""
STRIP = 64
"""Rows that become columns at once: so few that they stay in the processor's near memory."""
COLOURS = (1, 3)
"""How many there may be: red, green and blue are made of them in one way only."""
LOSSES = {
    "bad Huffman code": "a bad Huffman code",
    "bad arithmetic code": "a bad arithmetic code",
    "premature end of data": "too little data",
    "instead of RST": "another marker than the next restart's",
}
"""What libjpeg warns of when pixels are lost, and how that is told. Other warnings are of what some programs write."""
SCAN, END = 0xDA, 0xD9
MOST_SCANS = 200
"""Scans of a JPEG; progressive ones have about ten. Each goes over all pixels, so thousands take minutes."""
MOST_SEGMENTS = 20_000
"""Each of them takes a microsecond; the longest colour profile has 255."""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""What begins a segment. Fill bytes, restarts and another beginning are gone over, and so is what is no marker."""


def jpeg_pixels(
    item: MediaItem, data: bytes, size: Size, colours: int, orientation: int = UPRIGHT
) -> np.ndarray | None:
    """uint8 [height, width, 3], upright, colours four bytes apart; None where Pillow is to decode it.

    Args:
        size: Height and width that the header tells, within what may be decoded.
        colours: How many the header tells.
        orientation: EXIF's number; what is none of the eight says nothing.

    Raises:
        MediaError: Some of its pixels are lost. libjpeg makes grey or noise of them, and Pillow does not say so.
    """
    if simplejpeg is None or colours not in COLOURS:
        return None
    pixels = _memory(size)
    try:
        if simplejpeg.decode_jpeg(data, colorspace="RGBA", buffer=pixels).shape != pixels.shape:
            return None
    except MemoryError:
        raise
    except Exception as error:  # what can be read with a warning, and samplings that the library has no name for
        found = next((loss for loss in LOSSES if loss in str(error)), None)
        if found is None:
            return None
        raise MediaError(f"{item.name()}: is damaged: there is {LOSSES[found]} in it. Copy the picture again") from None
    return _turned(pixels, orientation)[:, :, :3]


def _memory(size: Size) -> np.ndarray:
    """uint8 [height, width, 4], unset, whose rows as a rule do not begin at a multiple of 8 bytes.

    Rows that begin at one of 32 (16 on old processors) libjpeg-turbo writes past the processor's near memory, out of
    which they are then not read: a tenth longer for decoding and resizing, in every second picture, as memory happens
    to lie.
    """
    count = 4 * size[0] * size[1]
    return np.empty(count + 4, np.uint8)[4:].reshape(*size, 4)  # NumPy's own begins at a multiple of 16


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """uint8 [height, width, 4], upright."""
    if orientation == UPRIGHT:
        return pixels
    down, right, swapped = TURNS.get(orientation, TURNS[UPRIGHT])
    lying = pixels.view(np.uint32)[::down, ::right, 0]
    if not swapped:
        standing = np.ascontiguousarray(lying)
    else:
        standing = np.empty(lying.shape[::-1], np.uint32)
        for top in range(0, len(lying), STRIP):
            standing[:, top : top + STRIP] = lying[top : top + STRIP].T
    return standing.view(np.uint8).reshape(*standing.shape, 4)


def check_jpeg(item: MediaItem, data: bytes, scan: int | None = None) -> None:
    """Refuse a JPEG without an end marker behind the beginning of its scan (a thumbnail in its header has its own), and
    one of endless scans.

    Where a download broke off and the rest is zeros, the missing end is the only sign: zeros are decoded to grey.

    Args:
        scan: Where the scan begins, of a picture of which it is known that there is but one.

    Raises:
        MediaError: It is one of these.
    """
    begin = _first_scan(item, data) if scan is None else scan
    if data.rfind(b"\xff\xd9", begin) < 0:
        raise MediaError(f"{item.name()}: is truncated: its end marker is missing. Copy the picture again")


def _first_scan(item: MediaItem, data: bytes) -> int:
    """Where a JPEG's first scan begins, or its segments, if it has none.

    Raises:
        MediaError: It has endless scans, or segments.
    """
    colours, scans, begin = None, 0, 2
    for number, (kind, at) in enumerate(_segments(data)):
        if number == MOST_SEGMENTS:
            raise MediaError(
                f"{item.name()}: has more than {MOST_SEGMENTS} segments, and no more are read. Encode it again"
            )
        if kind in SEQUENTIAL and colours is None:
            colours = data[at + 9 : at + 10]
        if kind == END and scans:  # what follows is another picture
            break
        if kind != SCAN:
            continue
        scans += 1
        if scans == 1:
            begin = at
            if data[at + 4 : at + 5] == colours:  # all in one scan, behind which libjpeg reads no other
                break
        if scans > MOST_SCANS:
            raise MediaError(
                f"{item.name()}: has more than {MOST_SCANS} scans, and no more are decoded. Encode it again"
            )
    return begin


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Kinds of a JPEG's segments and where they begin, as libjpeg comes upon them.

    Source:
        ITU-T T.81, B.1.1; a length below two is taken for two, as libjpeg does.
    """
    at = 2
    while (found := _MARKER.search(data, at)) is not None:
        at = found.start()
        kind = data[at + 1]
        yield kind, at
        at += 2 if kind == END else 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
