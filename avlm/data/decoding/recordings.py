"""Recordings that libsndfile reads and whose length it knows: WAV, FLAC, MP3, OGG, Opus, AIFF and others.

Of the rest its count is a guess, after which sound would be cut off or found missing; FFmpeg goes through those packet
by packet (`containers`). Where a header says what an encoder put before and behind the sound (LAME's tag of an MP3, the
pre-skip of Opus), libsndfile leaves that out.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from avlm.data.decoding.wav import with_length

ENDLESS = 2**48
"""What libsndfile counts where a header says nothing is more than any header can say."""
GUESSED = ("MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
"""Kinds of sound of whose samples it guesses how many there are; in an MP3 file a header may tell."""
TAGS = 4096
"""Bytes of tags behind the frames of an MP3; where more follows than that, it may be sound."""
FIRST = 65_536
"""Bytes in which an MP3 has its first frame, behind its tags."""


def recording_of(file: BinaryIO) -> Any | None:
    """The file as a `soundfile.SoundFile` with an exact number of frames; None where libsndfile has none."""
    import soundfile

    try:
        recording = soundfile.SoundFile(with_length(file))
    except soundfile.LibsndfileError:
        return None
    counted = _mp3_is_counted(file) if recording.format == "MP3" else recording.subtype not in GUESSED
    if counted and recording.frames < ENDLESS and recording.seekable():
        return recording
    recording.close()
    return None


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
    return not flags & 2 or size - at - begin <= length + TAGS
