"""Files that claim or hold more than is decoded: pixels, seconds, frames, text, scans, channels, boxes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from media_files import Kind, animated, flat, made, sound, video


@dataclass(frozen=True)
class Bomb:
    name: str
    kind: Kind
    make: Callable[[], bytes]
    hopeless: bool = True
    """Whether it must be refused; of others it is enough that they do no harm."""


def png(
    width: int, height: int, raw: bytes, bits: int = 8, colour: int = 0, chunks: Sequence[tuple[bytes, bytes]] = ()
) -> bytes:
    """A PNG of these rows, each with its filter byte (W3C PNG, sections 5 and 11)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    others = b"".join(chunk(name, data) for name, data in chunks)
    pixels = chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + header + others + pixels + chunk(b"IEND", b"")


def tiff(width: int, height: int, tile: int = 0, rows: int = 0) -> bytes:
    """A grey TIFF of 64 bytes of pixels (TIFF 6.0, section 2)."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1)]
    tags += [(322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, 64)] if tile else [(273, 4, 8), (279, 4, 64)]
    tags += [] if tile else [(278, 4, rows or height)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    return b"II*\0" + struct.pack("<I", 72) + bytes(range(64)) + struct.pack("<H", len(tags)) + entries + bytes(4)


def _gif_with_a_large_frame() -> bytes:
    data = bytearray(made("moving.gif"))
    at = data.index(b"\x2c\0\0\0\0")
    data[at + 5 : at + 9] = b"\xff" * 4
    return bytes(data)


def _gif_of_endless_frames(count: int) -> bytes:
    """Frames of one pixel (GIF89a, sections 18 to 22)."""
    head = b"GIF89a\x10\0\x10\0\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x02\0\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    return head + frame * count + b"\x3b"


def _webp_with_a_large_canvas() -> bytes:
    data = bytearray(made("moving.webp"))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = b"\xff\x3f\0" * 2  # 16384 x 16384: as wide as its frames can be
    return bytes(data)


def _jpeg_with_a_large_frame() -> bytes:
    data = bytearray(made("baseline.jpg"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xdc\xff\xdc"
    return bytes(data)


def _jpeg_of_endless_scans() -> bytes:
    """Each scan goes over all of the picture again."""
    data = flat("JPEG", "L", 2800, 2800, progressive=True)
    end = data.rindex(b"\xff\xda")
    return data[:end] + data[end:-2] * 3000 + data[-2:]


def _wav(channels: int, rate: int, samples: bytes) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, min(2 * channels * rate, 2**32 - 1), 2 * channels % 2**16, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _mp3_with_a_large_count() -> bytes:
    data = bytearray(made("a.mp3"))
    at = max(data.find(b"Xing"), data.find(b"Info"))
    data[at + 8 : at + 12] = struct.pack(">I", 2**31 - 1)
    return bytes(data)


def _repeated_mp3(frames: int) -> bytes:
    data = made("uncounted.mp3")
    first = data.index(b"\xff\xf3")  # MPEG 2, behind a tag
    return data[first : data.index(b"\xff\xf3", first + 4)] * frames


def _ogg_with_a_late_end(name: str) -> bytes:
    """The last page says that it ends in a million hours (RFC 3533, section 6)."""
    data = made(name)
    at = data.rindex(b"OggS")
    page = bytearray(data[at:])
    page[6:14] = struct.pack("<q", 2**47)
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", _ogg_sum(bytes(page)))
    return data[:at] + bytes(page)


def _ogg_sum(page: bytes) -> int:
    found = 0
    for byte in page:
        found ^= byte << 24
        for _ in range(8):
            found = (found << 1 ^ 0x04C11DB7) & 0xFFFFFFFF if found & 0x80000000 else found << 1
    return found


def _long_mp4(name: str) -> bytes:
    """Every header, edit list and table of times says that it lasts long (ISO/IEC 14496-12)."""
    found = bytearray(made(name))
    for box, at in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24), (b"elst", 12)):
        place = found.find(box)
        while place >= 0:
            found[place + at : place + at + 4] = struct.pack(">I", 2**31 - 1)
            place = found.find(box, place + 1)
    place = found.find(b"stts")
    while place >= 0:
        found[place + 16 : place + 20] = struct.pack(">I", 2**28)  # of each sample
        place = found.find(b"stts", place + 1)
    return bytes(found)


def _mp4_with_a_large_table() -> bytes:
    found = bytearray(made("h264.mp4"))
    for name, at in ((b"stts", 12), (b"stsz", 12), (b"stts", 8), (b"stsz", 8)):
        place = found.index(name)
        found[place + at : place + at + 4] = struct.pack(">I", 2**30)
    return bytes(found)


def _mkv_with_a_large_void() -> bytes:
    data = made("h264.mkv")
    return data[:40] + b"\xec\x08" + b"\x7f" * 8 + data[40:]


def _patched(name: str, at: int, patch: bytes) -> bytes:
    data = made(name)
    return data[:at] + patch + data[at + len(patch) :]


ZEROS = zlib.compress(bytes(2**26))

BOMBS = (
    Bomb("pixels claimed.png", "image", partial(png, 60_000, 60_000, bytes(100))),
    Bomb("pixels held.png", "image", lambda: png(9000, 9000, bytes(9000 * 9000 // 8 + 9000), bits=1)),
    Bomb("pixels beyond Pillow's limit.png", "image", partial(png, 2**31 - 1, 2**31 - 1, b"")),
    Bomb("text.png", "image", lambda: png(8, 8, bytes(72), chunks=[(b"zTXt", b"a\0\0" + ZEROS)]), hopeless=False),
    Bomb("profile.png", "image", lambda: png(8, 8, bytes(72), chunks=[(b"iCCP", b"a\0\0" + ZEROS)]), hopeless=False),
    Bomb("chunks.png", "image", lambda: made("rgb.png")[:33] + bytes(12) * 2_000_000, hopeless=False),
    Bomb("pixels claimed by the screen.gif", "image", lambda: _patched("moving.gif", 6, b"\xff" * 4)),
    Bomb("pixels claimed by a frame.gif", "image", _gif_with_a_large_frame),
    Bomb("pixels held.gif", "image", lambda: flat("GIF", "P", 3000, 3000)),
    Bomb("frames for one picture.gif", "image", lambda: _gif_of_endless_frames(50_000), hopeless=False),
    Bomb("pixels claimed.tiff", "image", partial(tiff, 2**31 - 1, 2**31 - 1)),
    Bomb("pixels claimed beyond ours.tiff", "image", partial(tiff, 10_000, 10_000)),
    Bomb("pixels claimed by a tile.tiff", "image", partial(tiff, 8, 8, tile=2**20), hopeless=False),
    Bomb("pixels claimed by a strip.tiff", "image", partial(tiff, 8, 8, rows=2**31), hopeless=False),
    Bomb("pixels held.tiff", "image", lambda: flat("TIFF", "1", 9000, 9000, compression="group4")),
    Bomb("pixels claimed by the canvas.webp", "image", _webp_with_a_large_canvas),
    Bomb("pixels held.webp", "image", lambda: flat("WEBP", "L", 3000, 3000, lossless=True)),
    Bomb("frames for one picture.webp", "image", lambda: animated("WEBP", 40), hopeless=False),
    Bomb("pixels claimed.bmp", "image", lambda: _patched("rgb.bmp", 18, struct.pack("<ii", 2**20, 2**20))),
    Bomb("pixels claimed.jpg", "image", _jpeg_with_a_large_frame),
    Bomb("scans.jpg", "image", _jpeg_of_endless_scans),
    Bomb("seconds held.wav", "audio", lambda: _wav(1, 16_000, bytes(8_000_000))),
    Bomb("seconds claimed.wav", "audio", lambda: _patched("16.wav", 40, struct.pack("<I", 2**31 - 2**17))),
    Bomb("channels.wav", "audio", lambda: _wav(1024, 8000, b"\1\2" * (1024 * 4000)), hopeless=False),
    Bomb("too many channels.wav", "audio", lambda: _wav(65_535, 8000, b"\1\2" * (65_535 * 40))),
    Bomb("one sample a second.wav", "audio", lambda: _wav(1, 1, b"\1\2" * 100), hopeless=False),
    Bomb("a sample a nanosecond.wav", "audio", lambda: _wav(1, 2**31 - 1, b"\1\2" * 500_000)),
    Bomb("chunks.wav", "audio", lambda: made("16.wav")[:12] + b"junk\0\0\0\0" * 3_000_000),
    Bomb("seconds claimed.flac", "audio", lambda: _patched("a.flac", 21, b"\x0f\xff\xff\xff\xff")),
    Bomb("seconds held.flac", "audio", lambda: sound("FLAC", rate=8000, count=1_200_000)),
    Bomb("seconds claimed.mp3", "audio", _mp3_with_a_large_count),
    Bomb("seconds held.mp3", "audio", lambda: _repeated_mp3(30_000)),
    Bomb("a tag claimed.mp3", "audio", lambda: b"ID3\4\0\0\x7f\x7f\x7f\x7f" + made("a.mp3"), hopeless=False),
    Bomb("seconds claimed.ogg", "audio", lambda: _ogg_with_a_late_end("a.ogg"), hopeless=False),
    Bomb("seconds claimed.opus", "audio", lambda: _ogg_with_a_late_end("a.opus")),
    Bomb("seconds claimed.m4a", "audio", lambda: _long_mp4("a.m4a")),
    Bomb("seconds claimed.mp4", "video", lambda: _long_mp4("h264.mp4")),
    Bomb("seconds held.mkv", "video", lambda: video("matroska", "mpeg4", None, frames=200, fps=1, size=(16, 16))),
    Bomb("frames held.mkv", "video", lambda: video("matroska", "mpeg4", None, frames=2500, fps=60, size=(16, 16))),
    Bomb("frames held.avi", "video", lambda: video("avi", "mpeg4", None, frames=2500, fps=60, size=(16, 16))),
    Bomb("frames held.gif", "video", lambda: _gif_of_endless_frames(100_000)),
    Bomb("frames claimed.mp4", "video", _mp4_with_a_large_table),
    Bomb("boxes.mp4", "video", lambda: made("h264.mp4")[:32] + b"\0\0\0\x08free" * 1_000_000),
    Bomb("pixels.mkv", "video", lambda: video("matroska", "mpeg4", None, frames=2, size=(2304, 4096))),
    Bomb("pixels.mp4", "video", lambda: video("mp4", "mpeg4", None, frames=2, size=(2304, 4096))),
    Bomb("pixels.avi", "video", lambda: video("avi", "mpeg4", None, frames=2, size=(2304, 4096))),
    Bomb("emptiness.mkv", "video", _mkv_with_a_large_void, hopeless=False),
)
