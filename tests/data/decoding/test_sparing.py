"""Frames of a video of which not all is decoded: those of a whole pass, to the last bit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from avlm.config.media import MediaSpec, VideoSpec, VisionSpec
from avlm.data.decoding import sparing
from avlm.data.decoding.decode import decode_video
from avlm.data.decoding.sparing import Sparing
from avlm.layout import frame_times_s
from avlm.samples import MediaItem

FPS, COUNT = 10, 120


def written(path: Path, *, codec: str = "libx264", times: list[int] | None = None, **options: Any) -> Path:
    """Twelve seconds of something that moves, so that a frame made from the wrong ones shows."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 256, (12, 40, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=FPS, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i, at in enumerate(times or range(COUNT)):
            shown = np.ascontiguousarray(scene[i % 30 : i % 30 + 64, 2 * i % 200 : 2 * i % 200 + 96])
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def all_frames(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as file:
        first = float(file.start_time or 0) / 1_000_000
        return [(frame.time - max(0.0, first), frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def slowly(shown: list[tuple[float, np.ndarray]], wanted: list[float]) -> list[np.ndarray]:
    return [[pixels for time, pixels in shown if time <= w + 1e-3 or time == shown[0][0]][-1] for w in wanted]


FILMS = {
    "as x264 does it by itself": {},
    "a key frame every second, none depends on a later one": {"g": 10, "bf": 0},
    "many that no other is made from": {"g": 40, "bf": 7, "b_strategy": 0},
    "key frames that are none (open)": {"g": 15, "bf": 3, "x264-params": "open-gop=1:scenecut=0"},
    "no key frame but the first": {"g": 9999, "x264-params": "intra-refresh=1"},
    "two fields": {"g": 20, "flags": "+ilme+ildct"},
    "every frame a key frame": {"g": 1},
    "MPEG-4": {"codec": "mpeg4", "bf": 2, "g": 12},
}


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("how", FILMS)
def test_the_frames_are_those_of_a_whole_pass(how: str, ending: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"a.{ending}", **FILMS[how])
    shown = all_frames(path)
    for video in ({"fps": 1}, {"fps": 0.3}, {"fps": FPS}, {"max_frames": 1}, {"fps": 4, "max_frames": 9}):
        spec = VideoSpec(**{"max_frames": 200, **video})
        clip = decode_video(MediaItem("video", path=path), MediaSpec(vision=VISION, video=spec))
        expected = slowly(shown, frame_times_s(clip.duration_s, spec))
        assert len(clip.frames) == len(expected)
        for number, (found, pixels) in enumerate(zip(clip.frames, expected, strict=True)):
            np.testing.assert_array_equal(found.pixels, pixels, err_msg=f"{video}, frame {number}")


VISION = VisionSpec(image_size_px=28, cell_px=14)


@pytest.mark.parametrize("how", FILMS)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (3.3, 5.2), (7.0, 11.95), (11.5, None)])
def test_so_are_those_of_a_cut(start: float, end: float | None, how: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", **FILMS[how])
    shown = all_frames(path)
    spec = VideoSpec(fps=2)
    clip = decode_video(MediaItem("video", path=path, start_s=start, end_s=end), MediaSpec(vision=VISION, video=spec))
    expected = slowly(shown, [start + time for time in frame_times_s(clip.duration_s, spec)])
    for found, pixels in zip(clip.frames, expected, strict=True):
        np.testing.assert_array_equal(found.pixels, pixels)


def test_slides_are_shown_until_the_next_one_comes(tmp_path: Path) -> None:
    times = [0, 1, 2, 30, 31, 70, 71, 72, 73, 119]
    path = written(tmp_path / "a.mkv", times=times, g=4)
    spec = VideoSpec(fps=2)
    clip = decode_video(MediaItem("video", path=path), MediaSpec(vision=VISION, video=spec))
    expected = slowly(all_frames(path), frame_times_s(clip.duration_s, spec))
    for found, pixels in zip(clip.frames, expected, strict=True):
        np.testing.assert_array_equal(found.pixels, pixels)


def decoded(path: Path, wanted: list[float]) -> int:
    """How many frames a stream of packets brings."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        spare = Sparing(stream, wanted, lambda time: time, 1e-3)
        return sum(len(list(spare.frames(packet))) for packet in file.demux(stream))


def test_most_is_not_decoded(tmp_path: Path) -> None:
    """Of twelve stretches of ten frames, two hold what is wanted, in their first half."""
    path = written(tmp_path / "a.mp4", g=10, bf=0)
    assert decoded(path, [2.35, 7.35]) == 2 * 4
    fields = written(tmp_path / "fields.mp4", g=10, bf=0, flags="+ilme+ildct")
    assert decoded(fields, [2.35, 7.35]) == 2 * 5  # two packets could be a frame
    assert decoded(path, [time / FPS for time in range(COUNT)]) == COUNT
    many = written(tmp_path / "b.mp4", g=200, bf=3, b_strategy=0)
    assert decoded(many, [11.95]) < 0.7 * COUNT  # half of these are made from by no other


def test_what_is_too_long_to_hold_is_decoded_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.mp4", g=40, bf=0)
    monkeypatch.setattr(sparing, "MOST_BYTES", 1000)
    assert decoded(path, [11.95]) == COUNT
