"""What the units of an H.264 stream say, without decoding a picture.

Source:
    ITU-T H.264 (08/2021), 7.3.1 and 7.3.2.1.1; ISO/IEC 14496-15, 5.3.3, for how an MP4 holds them.
"""

from __future__ import annotations

from collections.abc import Iterator

SLICES, IDR, SPS = frozenset((1, 2, 3, 4)), 5, 7
"""Types of units: parts of pictures, a picture before which no other is referred to from then on, and settings of a
sequence."""
NOTES = frozenset((6, 9, 12))
"""Types of units that are not needed to decode a picture: what else there is to say, where one begins, and filling."""
MOST_SETTINGS = 32
"""Of a stream; each has a number below this."""
LONGEST = 256
"""Bytes in which settings have said it."""
HIGH = frozenset((44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244))
"""Profiles whose settings tell of colours and scaling."""


def is_idr(data: bytes, length_bytes: int | None) -> bool:
    """Whether a packet of H.264 is an IDR picture.

    Args:
        length_bytes: Of the length before each unit, as the header of an MP4 says (ISO/IEC 14496-15, 5.3.3); None where
            units are parted by start codes.
    """
    return any(unit[0] & 31 == IDR for unit in _units(data, length_bytes))


def is_spare(data: bytes, length_bytes: int | None) -> bool:
    """Whether a packet of H.264 holds nothing but parts of pictures that no other is made from. As `is_idr`."""
    kinds = [(unit[0] & 31, unit[0] >> 5 & 3) for unit in _units(data, length_bytes)]
    return bool(kinds) and all(kind in NOTES or (kind in SLICES and not referred) for kind, referred in kinds)


def brings_fields(data: bytes, length_bytes: int | None) -> bool:
    """Whether a packet of H.264 brings settings by which a picture may be two fields, each with a packet of its own."""
    settings = [unit for unit in _units(data, length_bytes) if unit[0] & 31 == SPS]
    return len(settings) > MOST_SETTINGS or not all(map(_whole_frames, settings))


def has_fields(told: bytes) -> bool:
    """The same of the record in the header of an MP4 or Matroska file; true where there is none that says it."""
    if len(told) < 7 or told[0] != 1 or not told[5] & 31:
        return True
    at = 6
    for _ in range(told[5] & 31):
        length = int.from_bytes(told[at : at + 2])
        unit = told[at + 2 : at + 2 + length]
        if len(unit) < 4 or not _whole_frames(unit):
            return True
        at += 2 + length
    return False


def _units(data: bytes, length_bytes: int | None) -> Iterator[bytes]:
    """Units that are not empty, up to the first picture with the whole of it."""
    if length_bytes is None:
        yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
        return
    at = 0
    while at + length_bytes < len(data):
        end = at + length_bytes + int.from_bytes(data[at : at + length_bytes])
        if end > at + length_bytes:
            yield data[at + length_bytes : end]
        at = end


def _whole_frames(settings: bytes) -> bool:
    """Whether settings of a sequence say that no picture is a field (`frame_mbs_only_flag`); false where they are cut
    off, or have lists for scaling, which few have."""
    bits = _Bits(settings[1:LONGEST].replace(b"\0\0\3", b"\0\0"))
    try:
        profile = bits.number(8)
        bits.number(16)
        bits.code()
        if profile in HIGH:
            if bits.code() == 3:
                bits.number(1)
            bits.code(), bits.code(), bits.number(1)
            if bits.number(1):
                return False
        bits.code()
        _skip_order(bits)
        bits.code(), bits.number(1), bits.code(), bits.code()
        return bool(bits.number(1))
    except EOFError:
        return False


def _skip_order(bits: _Bits) -> None:
    """How the order of pictures is told."""
    kind = bits.code()
    if kind == 0:
        bits.code()
    elif kind == 1:
        bits.number(1), bits.code(), bits.code()
        for _ in range(min(bits.code(), 255)):
            bits.code()


class _Bits:
    """Numbers out of a run of bits, the highest first."""

    def __init__(self, data: bytes) -> None:
        self.bits, self.left = int.from_bytes(data), 8 * len(data)

    def number(self, count: int) -> int:
        """The next so many bits."""
        if count > self.left:
            raise EOFError
        self.left -= count
        return self.bits >> self.left & ((1 << count) - 1)

    def code(self) -> int:
        """The next number in the code of Exp-Golomb, without a sign (9.1)."""
        zeros = 0
        while not self.number(1):
            zeros += 1
        return (1 << zeros) - 1 + self.number(zeros)
