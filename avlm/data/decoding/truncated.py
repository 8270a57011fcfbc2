"""How many bytes a file lacks, by the lengths that it announces itself.

Nothing is decoded for it, so a file whose end is missing is refused at once, and not heard with silence at its end.
Formats that announce no length, and those whose decoders count for themselves, are not looked at.
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

from avlm.data.decoding.ogg import missing_page_bytes
from avlm.data.decoding.wav import MOST_CHUNKS, missing_wav_bytes
from avlm.errors import MediaError
from avlm.samples import MediaItem

BOXES = frozenset(
    b"ftyp styp moov moof mdat mfra sidx ssix meta udta free skip wide uuid pdin prft emsg pnot PICT".split()
)
"""Boxes that lie at the top of ISO media files; behind them some programs leave what is none."""
SEGMENT = 0x18538067
"""The element of a Matroska file that holds all others (RFC 9559, section 5.1)."""
STREAMED = 0x7FFF0000
"""Lengths of RIFF files from here on are by programs that did not know them."""


def check_whole(item: MediaItem, file: BinaryIO) -> None:
    """Refuse a file whose end is missing, and go back to its beginning.

    Raises:
        MediaError: It is shorter than it says.
    """
    missing = missing_bytes(file)
    file.seek(0)
    if missing:
        raise MediaError(
            f"{item.name()}: is truncated: its header announces {missing} more bytes than the file has. Copy it again"
        )


def missing_bytes(file: BinaryIO) -> int:
    """How many bytes a file announces beyond its end; 0 where it announces nothing.

    Source:
        RIFF (Microsoft, 1991); ISO/IEC 14496-12, section 4.2; EBML (RFC 8794); Ogg (RFC 3533, section 6).
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return missing_wav_bytes(file)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        (announced,) = struct.unpack("<I", head[4:8])
        return 0 if announced >= STREAMED else max(0, 8 + announced - size)
    if head[4:8] in BOXES:
        return _missing_box_bytes(file, size)
    if head[:4] == b"\x1aE\xdf\xa3":
        return _missing_segment_bytes(file, size)
    return missing_page_bytes(file, size) if head[:4] == b"OggS" else 0


def _missing_box_bytes(file: BinaryIO, size: int) -> int:
    at = 0
    for _ in range(MOST_CHUNKS):
        if at >= size:
            break
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4])
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:])
        if head[4:8] not in BOXES or length < 8:  # 0 is up to the end
            break
        at += length
    return max(0, at - size)


def _missing_segment_bytes(file: BinaryIO, size: int) -> int:
    at = 0
    for _ in range(8):  # the header, perhaps void elements, then the segment
        file.seek(at)
        head = file.read(12)
        first, (length, width) = int.from_bytes(head[:4]), _ebml_length(head[4:])
        if first == SEGMENT:
            return 0 if length is None else max(0, at + 4 + width + length - size)
        if first != 0x1A45DFA3 or length is None:
            break
        at += 4 + width + length
    return 0


def _ebml_length(data: bytes) -> tuple[int | None, int]:
    """A length of 1 to 8 bytes, and how many; None where it is not known (all its bits are set)."""
    if not data or not data[0]:
        return None, 0
    width = 9 - data[0].bit_length()
    value = int.from_bytes(data[:width]) & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), width
