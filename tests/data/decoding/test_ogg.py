"""Ogg files, whose decoders go over damaged pages in silence: none is heard with a gap, or up to its first part."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.media import AudioSpec, MediaSpec, VisionSpec
from avlm.data.decoding import ogg, recordings
from avlm.data.decoding.decode import decode_audio, decode_video
from avlm.data.decoding.headers import measure
from avlm.data.decoding.ogg import Page, checksum, links, pages
from avlm.errors import MediaError
from avlm.layout import AudioFacts
from avlm.samples import MediaItem

RATE = 16_000
CODECS = ["VORBIS", "OPUS"]


@cache
def recording(codec: str, seconds: float = 4.0, pitch: float = 440.0) -> bytes:
    """A tone with breath, as libsndfile writes it."""
    time = np.arange(round(RATE * seconds)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * pitch * time) + np.random.default_rng(0).normal(0, 0.01, len(time))
    file = io.BytesIO()
    soundfile.write(file, wave.astype(np.float32), RATE, format="OGG", subtype=codec)
    return file.getvalue()


def of_stream(data: bytes, number: int) -> bytes:
    """The same pages, as of a stream of this number."""
    found = b""
    for page in pages(io.BytesIO(data)):
        blank = page.data[:14] + number.to_bytes(4, "little") + page.data[18:22] + bytes(4) + page.data[26:]
        found += blank[:22] + slow_checksum(blank).to_bytes(4, "little") + blank[26:]
    return found


def slow_checksum(data: bytes) -> int:
    """Bit by bit, as RFC 3533 says it."""
    register = 0
    for byte in data:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1) ^ (0x104C11DB7 if register >> 31 else 0)
    return register


def item(data: bytes, **cut: float) -> MediaItem:
    return MediaItem("audio", data=data, **cut)  # type: ignore[arg-type]


def heard(data: bytes, **cut: float) -> np.ndarray:
    return decode_audio(item(data, **cut), RATE).waveform


def split(codec: str) -> list[Page]:
    return list(pages(io.BytesIO(recording(codec))))


@given(st.binary(max_size=80))
def test_the_check_sum_is_the_standards(data: bytes) -> None:
    assert checksum(data) == slow_checksum(data)


@pytest.mark.parametrize("codec", CODECS)
def test_the_pages_of_a_whole_file_are_all_of_it_and_sound(codec: str) -> None:
    found = split(codec)
    assert len(found) > 3 and b"".join(page.data for page in found) == recording(codec)
    assert all(page.is_intact() for page in found)  # by the sums that libogg wrote
    assert [page.number for page in found] == list(range(len(found)))
    assert [page.is_first for page in found] == [True] + [False] * (len(found) - 1)
    assert [page.is_last for page in found] == [False] * (len(found) - 1) + [True]
    assert len(heard(recording(codec))) == 4 * RATE


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(CODECS), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.integers(1, 30))
def test_whatever_byte_is_another_the_file_is_refused(codec: str, where: float, change: int, count: int) -> None:
    data = bytearray(recording(codec))
    first = int(where * len(data))
    for at in range(first, min(first + count, len(data))):
        data[at] ^= change
    with pytest.raises(MediaError, match=r"is damaged|is truncated|not readable|end to end"):
        heard(bytes(data))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CODECS), st.floats(0, 1, exclude_max=True), st.integers(1, 5000))
def test_whatever_is_cut_out_the_file_is_refused(codec: str, where: float, count: int) -> None:
    data = recording(codec)
    at = int(where * len(data))
    with pytest.raises(MediaError, match=r"is damaged|is truncated|not readable|is empty|no samples"):
        heard(data[:at] + data[at + count :])


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_damaged_is_told_by_its_place(codec: str) -> None:
    found = split(codec)
    page = found[-2]
    data = bytearray(recording(codec))
    data[page.at + 100] ^= 1
    with pytest.raises(MediaError, match=rf"is damaged: its page at byte {page.at} does not have the checksum"):
        heard(bytes(data))
    less = b"".join(one.data for one in found if one is not page)
    told = rf"pages are missing before byte {page.at}, where page {page.number + 1} follows page {page.number - 1}"
    with pytest.raises(MediaError, match=told):
        heard(less)


@pytest.mark.parametrize("codec", CODECS)
def test_a_broadcast_that_was_joined_late_is_heard(codec: str) -> None:
    """It has the stream's head, then the pages from some time on."""
    found = split(codec)
    heads = max(page.number for page in found if page.is_head)
    assert 0 < heads < len(found) - 3
    joined = b"".join(page.data for page in found if page.number <= heads or page.number > heads + 1)
    assert 0 < len(heard(joined)) <= 4 * RATE


@pytest.mark.parametrize("codec", CODECS)
def test_tags_behind_the_end_are_no_damage(codec: str) -> None:
    tagged = recording(codec) + b"TAG" + bytes(125)
    np.testing.assert_array_equal(heard(tagged), heard(recording(codec)))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seconds", [(3.0, 2.0), (2.0, 3.0), (1.0, 4.0)])
def test_recordings_put_end_to_end_are_heard_whole(codec: str, seconds: tuple[float, float]) -> None:
    """As a radio station sends songs. libsndfile hears the first."""
    parts = [recording(codec, length, pitch) for length, pitch in zip(seconds, (440, 880), strict=True)]
    data = b"".join(of_stream(part, number) for number, part in enumerate(parts))
    assert links(io.BytesIO(parts[0])) == [(0, len(parts[0]))]
    assert links(io.BytesIO(data)) == [(0, len(parts[0])), (len(parts[0]), len(parts[1]))]
    wave = heard(data)
    np.testing.assert_array_equal(wave, np.concatenate([heard(part) for part in parts]))
    for start in (seconds[0] - 0.7, seconds[0] - 0.2, seconds[0] + 0.5):
        found, first = heard(data, start_s=start, end_s=start + 0.4), round(RATE * start)
        np.testing.assert_allclose(found, wave[first : first + round(0.4 * RATE)], atol=1e-3)
    assert measure(item(data), MediaSpec(audio=AudioSpec())) == AudioFacts(len(wave))


def test_recordings_of_different_rates_put_end_to_end_are_refused() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 8000), 8000, format="OGG", subtype="VORBIS")
    data = of_stream(recording("VORBIS"), 1) + of_stream(file.getvalue(), 2)
    with pytest.raises(MediaError, match=r"put end to end, of 8000 and 16000 samples a second\. Save each by itself"):
        heard(data)


def test_recordings_that_cannot_be_told_apart_are_refused() -> None:
    data = of_stream(recording("OPUS"), 7) * 2
    with pytest.raises(MediaError, match=r"recordings put end to end that cannot be told apart.*Save each by itself"):
        heard(data)


def test_too_many_recordings_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "MOST_PARTS", 3)
    data = [of_stream(recording("VORBIS", 0.2), number) for number in range(4)]
    assert len(heard(b"".join(data[:3]))) == pytest.approx(0.6 * RATE, abs=400)
    with pytest.raises(MediaError, match=r"holds 4 recordings put end to end, and no more than 3 are read\. Save each"):
        heard(b"".join(data))


class Counting(io.BytesIO):
    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.read_bytes += len(found)
        return found


def test_a_file_of_many_gaps_is_read_a_few_times_at_most() -> None:
    page = ogg.HEAD.pack(b"OggS", 0, 0, 0, 1, 0, 0, 0)
    data = (page + b"\0") * 20_000
    file = Counting(data)
    assert sum(1 for _ in pages(file)) == 20_000 and file.read_bytes < 5 * len(data)
    file = Counting(page + bytes(3_000_000) + page)
    assert [found.at for found in pages(file)] == [0, len(page) + 3_000_000]
    assert file.read_bytes < 3_100_000


def test_a_cut_of_a_large_file_does_not_read_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(recording("OPUS", 8.0))
    data[-200] ^= 1
    with pytest.raises(MediaError, match="is damaged"):
        heard(bytes(data), end_s=1.0)
    monkeypatch.setattr(ogg, "SMALL", len(data) - 1)
    assert len(heard(bytes(data), end_s=1.0)) == RATE
    with pytest.raises(MediaError, match="is damaged"):
        heard(bytes(data))


def test_a_damaged_page_of_a_video_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ogv"
    with av.open(str(path), "w", format="ogg") as file:
        stream: Any = file.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(20):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    spec = MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14), audio=AudioSpec())
    assert len(decode_video(MediaItem("video", path=path), spec).frames) == 2
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(MediaError, match=r"a\.ogv: is damaged: its page at byte"):
        decode_video(MediaItem("video", path=path), spec)
