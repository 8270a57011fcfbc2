"""Ogg files page by page: what is damaged, which decoders go over in silence, and recordings put end to end.

Source:
    RFC 3533, section 6.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from avlm.data.decoding.files import SMALL
from avlm.errors import MediaError
from avlm.samples import MediaItem

BEGIN = b"OggS\0"
HEAD = struct.Struct("<4sBBqIIIB")
LONGEST = HEAD.size + 255 + 255 * 255
"""Bytes of the longest page."""
FIRST, LAST = 2, 4
"""The flags of a stream's first page and of its last."""
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Page(NamedTuple):
    """One page, as its head tells."""

    at: int
    """Its first byte."""
    is_first: bool
    """Whether a stream begins with it."""
    is_last: bool
    is_head: bool
    """Whether nothing that has a time ends in it, but what stands before all that has."""
    stream: int
    number: int
    """Pages of a stream are counted."""
    data: bytes

    def is_intact(self) -> bool:
        """Whether it has the check sum that it was written with."""
        blank = self.data[:22] + bytes(4) + self.data[26:]
        return checksum(blank) == int.from_bytes(self.data[22:26], "little")


def checksum(data: bytes) -> int:
    """Ogg's CRC: the polynomial of zlib's with the bits of bytes and of the sum in the other order, begun with zero."""
    register = zlib.crc32(data.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{register:032b}"[::-1], 2)


def pages(file: BinaryIO) -> Iterator[Page]:
    """The pages of an Ogg file in order, the last perhaps without its end. What is none between them is gone over."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(HEAD.size)
        if head[:5] != BEGIN:
            at = _next(file, at + 1)
            if at < 0:
                return
            continue
        if len(head) < HEAD.size:
            return
        _, _, flags, granule, stream, number, _, segments = HEAD.unpack(head)
        table = file.read(segments)
        data = head + table + file.read(sum(table))
        yield Page(at, bool(flags & FIRST), bool(flags & LAST), granule == 0, stream, number, data)
        at += len(data)


def _next(file: BinaryIO, at: int) -> int:
    """Where the next page begins, or -1. Little is read at first, as a file can have such places between all pages."""
    file.seek(at)
    before, count = b"", HEAD.size
    while block := file.read(count):
        found = (before + block).find(BEGIN)
        if found >= 0:
            return at - len(before) + found
        at += len(block)
        before = block[-len(BEGIN) + 1 :]
        count = min(2 * count, 2**20)
    return -1


def missing_page_bytes(file: BinaryIO, size: int) -> int:
    """What the last page of a file of this many bytes lacks of what its table of segments announces."""
    page = _last(file, size)
    if page is None:
        return 0
    if len(page) < HEAD.size or len(page) < HEAD.size + page[26]:
        return 1
    return max(0, HEAD.size + page[26] + sum(page[27 : 27 + page[26]]) - len(page))


def _last(file: BinaryIO, size: int) -> bytes | None:
    """The last page, and whatever is behind it."""
    file.seek(max(0, size - LONGEST))
    tail = file.read()
    at = tail.rfind(BEGIN)
    return None if at < 0 else tail[at:]


def links(file: BinaryIO) -> list[tuple[int, int]]:
    """First byte and number of bytes of each part of an Ogg file that is a file by itself: of recordings put end to end
    one for each, else one for all. libsndfile hears the first. Leaves the file where it stands.

    They are looked for where other streams end the file than began it.
    """
    stands = file.tell()
    size = file.seek(0, io.SEEK_END)
    last = _last(file, size) or b""
    begins = [0]
    began = {page.stream for page in itertools.takewhile(lambda page: page.is_first, pages(file))}
    if len(last) >= HEAD.size and HEAD.unpack(last[: HEAD.size])[4] not in began:
        is_first = True
        for page in pages(file):
            if page.is_first and not is_first:
                begins.append(page.at)
            is_first = page.is_first
    file.seek(stands)
    return [(begin, end - begin) for begin, end in itertools.pairwise([*begins, size])]


def check_pages(item: MediaItem, file: BinaryIO) -> None:
    """Refuse an Ogg file of which a page is damaged or missing, where decoders go on behind it, and go back to its
    beginning. Other files are not looked at.

    A recording of a live broadcast has the stream's head and then its pages from where somebody began to listen, so
    behind a head none is missing. Cuts of a large file are not looked at, as all of it would be read for each.

    Raises:
        MediaError: It is such a file, or one of recordings that cannot be told apart.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(BEGIN)) == BEGIN and not (item.is_cut() and size > SMALL):
        _check_pages(item, file, size)
    file.seek(0)


def _check_pages(item: MediaItem, file: BinaryIO, size: int) -> None:
    last: dict[int, Page] = {}
    end, is_last = 0, False
    for page in pages(file):
        if not page.is_intact():
            raise MediaError(
                f"{item.name()}: is damaged: its page at byte {page.at} does not have the checksum that it was written "
                "with. Copy it again"
            )
        before = last.get(page.stream)
        if before is not None and page.is_first:
            raise MediaError(
                f"{item.name()}: holds recordings put end to end that cannot be told apart, so only the first would be "
                "heard. Save each by itself"
            )
        if before is not None and page.number != (before.number + 1) % 2**32 and not before.is_head:
            raise MediaError(
                f"{item.name()}: is damaged: pages are missing before byte {page.at}, where page {page.number} follows "
                f"page {before.number}. Copy it again"
            )
        last[page.stream] = page._replace(data=b"")  # there may be as many streams as pages
        end, is_last = page.at + len(page.data), page.is_last
    if end < size and not is_last:  # tags behind the end are none of its pages
        raise MediaError(
            f"{item.name()}: is damaged: it goes on behind byte {end} with what is no page, before its end. "
            "Copy it again"
        )
