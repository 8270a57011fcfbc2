"""Recordings that libsndfile reads and whose length it knows: WAV, FLAC, MP3, OGG, Opus, AIFF and others.

Of the rest its count is a guess, after which sound would be cut off or found missing, or it is of the first of several
that were put end to end; FFmpeg goes through those packet by packet (`containers`), but for those in Ogg, each of which
libsndfile reads by itself. Where a header says what an encoder put before and behind the sound (LAME's tag of an MP3,
the pre-skip of Opus), libsndfile leaves that out.
"""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Sequence
from typing import Any, BinaryIO, Self

import numpy as np

from avlm.data.decoding.ogg import links
from avlm.data.decoding.wav import with_length
from avlm.data.fetching.window import window
from avlm.errors import MediaError
from avlm.samples import MediaItem

ENDLESS = 2**48
"""What libsndfile counts where a header says nothing is more than any header can say."""
GUESSED = ("MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
"""Kinds of sound of whose samples it guesses how many there are; in an MP3 file a header may tell."""
TAGS = 4096
"""Bytes of tags behind the frames of an MP3; where more follows than that, it may be sound."""
FIRST = 65_536
"""Bytes in which an MP3 has its first frame, behind its tags."""
MOST_PARTS = 1000
"""Recordings in one file: days of radio."""


def recording_of(item: MediaItem, file: BinaryIO) -> Any | None:
    """An item's file as a `soundfile.SoundFile`, or a `Chain` of such, with an exact number of frames; None where
    libsndfile has none.

    Raises:
        MediaError: It holds recordings of different rates, or too many.
    """
    import soundfile

    try:
        recording = soundfile.SoundFile(with_length(file))
    except soundfile.LibsndfileError:
        return None
    if recording.format == "OGG" and len(parts := links(file)) > 1:
        recording.close()
        return Chain(item, file, parts)
    counted = _mp3_is_counted(file) if recording.format == "MP3" else recording.subtype not in GUESSED
    if counted and recording.frames < ENDLESS and recording.seekable():
        return recording
    recording.close()
    return None


class Chain:
    """Recordings put end to end in one file, as one, its channels averaged: what a radio station sends, song by song.

    Args:
        item: What they are of, for messages.
        file: Which holds them.
        parts: First byte and number of bytes of each.

    Raises:
        MediaError: They are of different rates, or too many.
    """

    channels = 1

    def __init__(self, item: MediaItem, file: BinaryIO, parts: Sequence[tuple[int, int]]) -> None:
        self.file, self.parts, self.at = file, parts, 0
        self.open: tuple[int, Any] | None = None
        if len(parts) > MOST_PARTS:
            raise MediaError(
                f"{item.name()}: holds {len(parts)} recordings put end to end, and no more than {MOST_PARTS} are read. "
                "Save each by itself"
            )
        facts = [(part.frames, part.samplerate) for part in map(self._part, range(len(parts)))]
        self.begins = list(itertools.accumulate((frames for frames, _ in facts), initial=0))
        self.frames, self.samplerate = self.begins[-1], facts[0][1]
        rates = sorted({rate for _, rate in facts})
        if len(rates) > 1:
            raise MediaError(
                f"{item.name()}: holds recordings put end to end, of {' and '.join(map(str, rates))} samples a second. "
                "Save each by itself"
            )

    def _part(self, number: int) -> Any:
        """One of them. It stays open until another is wanted."""
        import soundfile

        if self.open is None or self.open[0] != number:
            self.close()
            begin, length = self.parts[number]
            self.open = number, soundfile.SoundFile(window(self.file, begin, length, own=False))
        return self.open[1]

    def seek(self, frame: int) -> None:
        """Go to a frame."""
        self.at = frame

    def read(self, frames: int, dtype: str, *, always_2d: bool) -> np.ndarray:
        """The next frames, [frames, 1], or as many as there are, as `soundfile.SoundFile` gives them."""
        found = [np.empty(0, dtype)]
        while frames and self.at < self.frames:
            number = bisect.bisect_right(self.begins, self.at) - 1
            part = self._part(number)
            part.seek(self.at - self.begins[number])
            wave = part.read(frames, dtype=dtype, always_2d=True).mean(1)
            if not len(wave):
                break
            found.append(wave)
            self.at += len(wave)
            frames -= len(wave)
        return np.concatenate(found)[:, None]

    def close(self) -> None:
        if self.open is not None:
            self.open[1].close()
            self.open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mp3_is_counted(file: BinaryIO) -> bool:
    """Whether the first frame of an MP3 has a Xing or Info header with the number of frames, and the file ends with the
    last of them: files that were put end to end have the first one's. Leaves the file where it stands, as libsndfile
    goes on reading there.

    Source:
        The header of the Xing encoder as LAME writes it: behind the side information of the first frame, whose length
        follows from version and channels (ISO/IEC 11172-3, section 2.4.1.7; 13818-3, section 2.4.1.7).
    """
    stands = file.tell()
    size = file.seek(0, io.SEEK_END)
    at = file.seek(0)
    while (tag := file.read(10))[:3] == b"ID3":  # its length has seven bits in each byte
        at += 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(tag[6:10]))) + 10 * bool(tag[5] & 0x10)
        file.seek(at)
    file.seek(at)
    head = file.read(FIRST)
    file.seek(stands)
    begin = next((i for i in range(len(head) - 4) if head[i] == 0xFF and head[i + 1] & 0xE6 == 0xE2), None)
    if begin is None:
        return False
    first, mono = head[begin + 1] & 0x18 == 0x18, head[begin + 3] & 0xC0 == 0xC0
    side = (17 if mono else 32) if first else (9 if mono else 17)
    told = head[begin + 4 + side : begin + 20 + side]
    name, flags, length = told[:4], int.from_bytes(told[4:8]), int.from_bytes(told[12:16])
    if name not in (b"Xing", b"Info") or not flags & 1:
        return False
    end = at + begin + length
    file.seek(end)
    behind = file.read(2)
    file.seek(stands)
    goes_on = len(behind) == 2 and behind[0] == 0xFF and behind[1] & 0xE0 == 0xE0
    return not flags & 2 or not (goes_on or size - end > TAGS)
