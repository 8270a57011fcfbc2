"""Headers of plain JPEG and WAV files, read without opening a decoder: most files of most data sets are such.

Plain is what can be read in one way only. Whatever else there is (another order of segments, EXIF, an extensible
format, a length that does not fit the file) is left to the decoders, so what is told here is what they tell.

Source:
    ISO/IEC 10918-1, annex B; JFIF 1.02; RIFF (Microsoft, 1991).
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

from avlm.layout import Size

HEAD = 4096
"""Bytes in which a plain file has its header; pictures with a colour profile have a longer one."""
LONGER = 2**16
SEQUENTIAL = (0xC0, 0xC1)
"""Segments that begin a picture of which every colour is stored once: baseline, extended."""
_FRAMES = (*SEQUENTIAL, 0xC2)
"""Segments that tell the size, of the JPEGs that there are: these, and progressive ones, which are stored by and by."""
_SKIPPED = (0xC4, 0xDD, 0xFE)
"""Huffman tables, restart intervals and comments, which say nothing about it."""
_BEGIN = b"\xff\xd8\xff"
_BITS = {1: (16, 24, 32), 3: (32,)}
"""Bits of a sample of sound, by the number of its format: whole numbers, floats."""


class PlainJpeg(NamedTuple):
    """What the header of a plain JPEG tells."""

    size: Size
    """Height and width."""
    colours: int
    """1, 3 or 4."""
    scan: int
    """The byte where its first scan begins."""
    at_once: bool
    """Whether that scan holds the whole picture."""


def plain_jpeg_size(file: BinaryIO) -> Size | None:
    """Height and width of a plain JPEG whose header says nothing about which side is up; None for any other file."""
    file.seek(0)
    data = file.read(HEAD)
    found = plain_jpeg(data)
    if found is None and len(data) == HEAD and data[:3] == _BEGIN:
        found = plain_jpeg(data + file.read(LONGER - HEAD))
    return None if found is None else found.size


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """As `plain_jpeg_size`, of a file's first bytes or all of them; None also where they are too few."""
    if data[:3] != _BEGIN:
        return None
    frame, at, most = None, 2, min(len(data), LONGER)
    while most >= at + 4 and data[at] == 0xFF:
        marker, length = data[at + 1], (data[at + 2] << 8) + data[at + 3]
        begin, end = at + 4, at + 2 + length
        if length < 2 or end > most:
            return None
        if marker == 0xDA:  # the scan: here Pillow stops too
            if frame is None:
                return None
            size, colours, sequential = frame
            return PlainJpeg(size, colours, at, sequential and data[begin:end][:1] == bytes([colours]))
        if marker in _FRAMES and frame is None:
            found = _frame_size(data[begin:end])
            if found is None:
                return None
            frame = found, data[begin + 5], marker in SEQUENTIAL
        elif marker not in _SKIPPED and not (_tables(data[begin:end]) if marker == 0xDB else _quiet(data, at, end)):
            return None
        at = end
    return None


def _frame_size(frame: bytes) -> Size | None:
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3, 4) or len(frame) != 6 + 3 * frame[5]:
        return None
    height, width = struct.unpack(">HH", frame[1:5])
    return (height, width) if height and width else None


def _tables(tables: bytes) -> bool:
    """Whether quantization tables have the lengths that they should."""
    at = 0
    while at < len(tables):
        at += 65 if tables[at] < 16 else 129
    return at == len(tables)


def _quiet(data: bytes, at: int, end: int) -> bool:
    """Whether a segment is of those by programs that say nothing about the size or which side is up."""
    marker, said = data[at + 1], data[at + 4 : end]
    if marker == 0xE0:
        return said[:5] == b"JFIF\0" and len(said) >= 14
    if marker == 0xE2:
        return said[:12] == b"ICC_PROFILE\0" and len(said) >= 14
    return marker == 0xEE and said[:5] == b"Adobe" and len(said) == 12


def plain_wav_length(file: BinaryIO, size: int) -> tuple[int, int] | None:
    """Samples (of each channel) and samples a second of a plain WAV file, up to whose end there is sound.

    Args:
        size: Bytes of the file.

    Returns:
        None for any other file.
    """
    file.seek(0)
    head = file.read(HEAD)
    if head[:4] != b"RIFF" or head[8:16] != b"WAVEfmt " or len(head) < 44:
        return None
    (whole,) = struct.unpack_from("<I", head, 4)
    length, form, channels, rate_hz, byte_rate, block, bits = struct.unpack_from("<IHHIIHH", head, 16)
    sound = bits in _BITS.get(form, ()) and 0 < channels <= 8 and block == channels * bits // 8
    if whole != size - 8 or length != 16 or not sound or not rate_hz or byte_rate != rate_hz * block:
        return None
    at = 36
    if head[at : at + 8] == b"fact\x04\0\0\0":
        at += 12
    name, count = struct.unpack_from("<4sI", head, at)
    if name != b"data" or not count or count % block or at + 8 + count != size:
        return None
    return count // block, rate_hz
