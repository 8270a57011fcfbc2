"""Videos as cameras, browsers and broadcasters write them: the right frames, and the sound where it belongs."""

from __future__ import annotations

import gc
import itertools
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from avlm.config.media import AudioSpec, MediaSpec, VideoSpec, VisionSpec
from avlm.config.model import ModelConfig
from avlm.data.decoding.decode import Limits, decode_audio, decode_video, watch
from avlm.data.media.reader import MediaReader, PreparedVideo
from avlm.data.world.video import write_clip
from avlm.errors import MediaError
from avlm.layout import Segment, video_segments
from avlm.recipes import recipe
from avlm.samples import Clip, MediaItem

FPS, RATE = 10, 48_000
TASKS = Path("/proc/self/task")
STEP = 8
"""Frame i is grey of level 8 i, so the frame that was chosen can be read off."""


def media(**video: Any) -> MediaSpec:
    return MediaSpec(
        vision=VisionSpec(image_size_px=28, cell_px=14), audio=AudioSpec(), video=VideoSpec(**{"fps": 1, **video})
    )


def write(
    path: Path,
    *,
    frames: int = 30,
    start_s: float = 0.0,
    beep_s: float = 1.0,
    sound_s: float | None = 3.0,
    sound_start_s: float = 0.0,
    video: str = "mpeg4",
    audio: str = "aac",
    form: str | None = None,
    options: dict[str, str] | None = None,
    pts: list[int] | None = None,
) -> Path:
    """A video of grey frames, and silence with a beep from ``beep_s`` on for a fifth of a second."""
    with av.open(str(path), "w", format=form, options=options or {}) as file:
        pictures = file.add_stream(video, rate=FPS)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        pictures.bit_rate = 4_000_000
        track = None if sound_s is None else file.add_stream(audio, rate=RATE, layout="mono")
        for i, at in enumerate(pts or range(frames)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), STEP * (i % 32), np.uint8), format="rgb24")
            frame.pts, frame.time_base = at + round(start_s * FPS), Fraction(1, FPS)
            file.mux(pictures.encode(frame))
        file.mux(pictures.encode(None))
        if track is not None and sound_s is not None:
            time = np.arange(round(sound_s * RATE)) / RATE
            wave = np.where((time >= beep_s) & (time < beep_s + 0.2), 0.5 * np.sin(2 * np.pi * 1000 * time), 0)
            sound = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], "fltp", "mono")
            sound.sample_rate, sound.pts, sound.time_base = (
                RATE,
                round((start_s + sound_start_s) * RATE),
                Fraction(1, RATE),
            )
            file.mux(track.encode(sound))
            file.mux(track.encode(None))
    return path


def decode(path: Path, spec: MediaSpec | None = None, **limits: Any) -> Clip:
    return decode_video(MediaItem("video", path=path), spec or media(), Limits(**limits))


def chosen(clip: Clip) -> list[int]:
    """Numbers of the frames that were chosen."""
    return [round(float(frame.pixels.mean()) / STEP) for frame in clip.frames]


def beep_s(clip: Clip) -> float:
    """When the beep begins."""
    assert clip.sound is not None
    loud = np.nonzero(np.abs(clip.sound.waveform) > 0.2)[0]
    return float(loud[0]) / clip.sound.sample_rate_hz


CONTAINERS = [
    pytest.param("a.mp4", {}, id="mp4"),
    pytest.param("a.mov", {"video": "libx264"}, id="mov h264 with frames that depend on later ones"),
    pytest.param("a.mkv", {}, id="mkv: length known to the file, not to its streams"),
    pytest.param("a.mkv", {"video": "libx264", "audio": "libopus"}, id="mkv h264 and opus"),
    pytest.param("a.webm", {"video": "libvpx", "audio": "libopus"}, id="webm"),
    pytest.param("a.webm", {"video": "libvpx-vp9", "audio": "libopus"}, id="webm vp9"),
    pytest.param("b.avi", {"video": "mpeg4", "audio": "pcm_s16le"}, id="avi and pcm"),
    pytest.param(
        "a.webm", {"video": "libvpx", "audio": "libopus", "options": {"live": "1"}}, id="a browser's: no length"
    ),
    pytest.param("a.avi", {"audio": "mp3"}, id="avi"),
    pytest.param("a.ts", {"start_s": 7.0}, id="a broadcast: its clock begins at 7 s"),
    pytest.param("a.mp4", {"options": {"movflags": "frag_keyframe+empty_moov"}}, id="mp4 in fragments"),
]


@pytest.mark.parametrize(("name", "how"), CONTAINERS)
def test_the_frames_are_those_on_the_screen_at_their_times(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    clip = decode(write(tmp_path / name, **how))
    assert clip.duration_s == pytest.approx(3.0, abs=0.15)
    for found, expected in zip(chosen(clip), [5, 15, 25], strict=True):  # at 0.5 s, 1.5 s and 2.5 s of 10 a second
        assert abs(found - expected) <= 1


@pytest.mark.parametrize(("name", "how"), CONTAINERS)
def test_the_sound_lies_on_the_videos_own_time(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    clip = decode(write(tmp_path / name, **how))
    assert clip.sound is not None
    assert len(clip.sound.waveform) == round(clip.duration_s * clip.sound.sample_rate_hz)
    assert beep_s(clip) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("width", [16, 34, 62, 130])
def test_frames_of_any_width_are_pyavs_and_outlive_their_video(width: int, tmp_path: Path) -> None:
    """FFmpeg leaves room behind each line of most of them."""
    rng, path = np.random.default_rng(width), tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, 20, "bgr0"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (20, width, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with av.open(str(path)) as file:
        expected = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    clip, other = decode(path, media(fps=FPS)), decode(path, media(fps=1))
    gc.collect()
    np.testing.assert_array_equal([frame.pixels for frame in clip.frames], expected)
    np.testing.assert_array_equal([frame.pixels for frame in other.frames], [expected[5], expected[15]])
    assert all(frame.pixels.flags.writeable for frame in clip.frames)  # which torch asks for


@pytest.mark.skipif(not TASKS.is_dir(), reason="this system does not list a process's threads")
def test_colours_are_made_on_the_workers_own_thread(tmp_path: Path) -> None:
    path, threads = write(tmp_path / "a.mp4"), len(list(TASKS.iterdir()))
    found: list[int] = []
    watch(MediaItem("video", path=path), media(), Limits(), lambda frame: found.append(len(list(TASKS.iterdir()))))
    assert found == [threads] * 3


def spoiled(path: Path, codec: str, number: int) -> Path:
    """A film of blots that move, with a key frame every second, the second half of one packet zeros."""
    rng = np.random.default_rng(0)
    blots = rng.integers(40, 216, (12, 16, 3)).repeat(4, 0).repeat(4, 1)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=FPS, options={"g": str(FPS), "bf": "0", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(3 * FPS):
            pixels = np.roll(blots, i, 1) + rng.integers(-20, 21, (48, 64, 1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][number]
        half, end = packet.pos + packet.size // 2, packet.pos + packet.size
    data = path.read_bytes()
    path.write_bytes(data[:half] + bytes(end - half) + data[end:])
    return path


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mpeg2video"])
@pytest.mark.parametrize("number", [12, 15])
def test_pictures_that_are_lost_are_not_made_up(codec: str, number: int, tmp_path: Path) -> None:
    """FFmpeg mends them, and what is made of them; a key frame ends that."""
    path = spoiled(tmp_path / "a.mp4", codec, number)
    eyes = MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14), video=VideoSpec(fps=1))
    with pytest.raises(
        MediaError, match=r"a\.mp4: is damaged: parts of the picture at 1\.50 s are lost, or made of lost"
    ):
        decode(path, eyes)
    for start_s, end_s in ((0.0, 1.0), (2.0, 3.0)):
        cut = MediaItem("video", path=path, start_s=start_s, end_s=end_s)
        assert len(decode_video(cut, eyes).frames) == 1


def test_frames_are_chosen_by_time_and_not_by_number(tmp_path: Path) -> None:
    """Slides: four frames, shown from 0, 0.2, 2 and 2.1 s on."""
    clip = decode(write(tmp_path / "a.mkv", pts=[0, 2, 20, 21], video="libx264", options={}))
    assert chosen(clip) == [1, 1, 3]


@pytest.mark.parametrize(("fps", "limits", "count"), [(1, {}, 3), (5, {}, 15), (5, {"max_frames": 4}, 4), (0.1, {}, 1)])
def test_as_many_frames_as_asked_for(fps: float, limits: dict[str, int], count: int, tmp_path: Path) -> None:
    clip = decode(write(tmp_path / "a.mp4"), media(fps=fps, **limits))
    spacing = 30 / count
    assert chosen(clip) == pytest.approx([spacing * (i + 0.5) for i in range(count)], abs=1)


def test_sound_that_begins_late_or_ends_early_is_padded_with_silence(tmp_path: Path) -> None:
    late = decode(write(tmp_path / "late.mkv", sound_start_s=0.7, sound_s=1.5))
    assert late.sound is not None
    assert len(late.sound.waveform) == round(late.duration_s * RATE)
    assert beep_s(late) == pytest.approx(1.7, abs=0.05)
    assert not late.sound.waveform[: round(0.6 * RATE)].any()
    assert not late.sound.waveform[round(2.4 * RATE) :].any()


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.avi"])
def test_pictures_that_end_long_before_the_sound_are_not_taken_for_truncated(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, sound_s=9.0, audio="mp3" if name == "a.avi" else "aac")
    for order in ("video", "interleaved"):
        clip = decode(path, media(order=order))
        assert clip.duration_s == pytest.approx(9.0 if name == "a.mkv" else 3.0, abs=0.15)
        assert chosen(clip)[-1] >= 24


def test_sound_that_outlasts_the_pictures_is_cut(tmp_path: Path) -> None:
    clip = decode(write(tmp_path / "a.mp4", sound_s=5.0))
    assert clip.sound is not None
    assert len(clip.sound.waveform) == 3 * RATE


def test_a_gap_in_the_sound_stays_a_gap() -> None:
    from avlm.data.decoding.timeline import on_timeline

    def laid(stretches: list[tuple[float, np.ndarray]], count: int) -> np.ndarray:
        clocks, sounds = zip(*stretches, strict=True)
        return on_timeline(np.concatenate(sounds), clocks, list(map(len, sounds)), 1000, count)

    ones = np.ones(100, np.float32)
    gap = laid([(0.0, ones), (1.0, 2 * ones)], 1500)
    assert gap[:100].tolist() == [1] * 100
    assert not gap[100:1000].any()
    assert gap[1000:1100].tolist() == [2] * 100
    overlap = laid([(0.0, np.ones(600, np.float32)), (0.3, np.full(600, 2, np.float32))], 1000)
    assert overlap.tolist() == [1] * 600 + [2] * 300 + [0] * 100
    loose = laid([(0.0, ones), (0.15, 2 * ones)], 300)  # clocks of some formats are not exact
    assert loose.tolist() == [1] * 100 + [2] * 100 + [0] * 100
    before = laid([(-0.5, np.ones(100, np.float32)), (-0.4, np.arange(500, dtype=np.float32))], 50)
    assert before.tolist() == list(range(400, 450))


@pytest.mark.parametrize("expected", [0, 100, 100_000])
def test_channels_are_averaged_however_many_stretches_come_at_once(expected: int) -> None:
    """Of two channels and of one, planes apart and interleaved, more of them than are averaged together, and more and
    fewer samples than there was room for."""
    import av

    from avlm.data.decoding.timeline import TOGETHER, Stretches

    rng, heard, waves = np.random.default_rng(0), Stretches(expected), list[np.ndarray]()
    for number in range(3 * TOGETHER):
        early = number < 2 * TOGETHER - 7
        form = ("fltp", "stereo") if early else ("fltp", "mono") if number % 5 else ("flt", "stereo")
        channels = rng.normal(0, 0.1, (1 + (form[1] == "stereo"), 20 + number % 3)).astype(np.float32)
        given = channels if form[0] == "fltp" else channels.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(given), *form)
        heard.add(sum(map(len, waves)) / 1000, frame)
        waves.append(channels.mean(0))
    whole = np.concatenate(waves)
    assert len(heard) == 3 * TOGETHER
    assert np.abs(heard.laid(1000, len(whole)) - whole).max() < 1e-7
    longer = heard.laid(1000, len(whole) + 50, start_s=-0.02)  # it begins later than its timeline
    assert not longer[:20].any() and not longer[-30:].any()
    assert np.abs(longer[20:-30] - whole).max() < 1e-7


def test_a_video_without_sound_has_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", sound_s=None)
    assert decode(path).sound is None
    prepared = MediaReader(media()).prepare(MediaItem("video", path=path))
    assert isinstance(prepared, PreparedVideo)
    assert prepared.sound == ()
    assert prepared.facts.num_samples == 0


def test_a_video_is_prepared_for_eyes_and_ears(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    prepared = MediaReader(media()).prepare(MediaItem("video", path=path))
    assert isinstance(prepared, PreparedVideo)
    assert [tuple(frame.shape) for frame in prepared.frames] == [(3, 28, 28)] * 3
    assert prepared.facts.num_samples == 48_000  # 3 s at 16 kHz
    assert [chunk.features.shape for chunk in prepared.sound] == [(80, 300)]
    looks_only = MediaReader(media(order="video")).prepare(MediaItem("video", path=path))
    assert isinstance(looks_only, PreparedVideo)
    assert looks_only.sound == ()


def test_a_video_without_any_clock_is_timed_by_its_rate(tmp_path: Path) -> None:
    clip = decode(write(tmp_path / "a.h264", sound_s=None, form="h264", video="libx264", frames=25))
    assert clip.duration_s > 0
    assert len(clip.frames) >= 1
    assert 0 < chosen(clip)[0] < 24


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_video_filmed_lying_down_stands_up(degrees: int, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, :32] = 255  # light at the top left of what the sensor saw
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    matrix = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    at = data.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2: a, b, u, c, d, v, x, y, w behind 40 bytes and the name
    a, b, c, d = (65_536 * v for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(bytes(data))
    found = decode(path).frames[0].pixels
    # turned clockwise by so much, the light corner is top left, top right, bottom right, bottom left
    expected = np.rot90(pixels, -degrees // 90)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 20


@pytest.mark.parametrize(
    ("name", "how"), [("a.mkv", {}), ("a.webm", {"video": "libvpx", "audio": "libopus"}), ("a.mp4", {})]
)
def test_a_truncated_video_is_refused_and_not_filled_up_with_its_last_frame(
    name: str, how: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / name, frames=60, sound_s=6.0, **how)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError) as error:
        decode(path)
    assert f"{path}: " in str(error.value)
    assert "truncated" in str(error.value) or "not readable as a video" in str(error.value)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(MediaError) as error:
        decode(text)
    assert str(error.value) == (
        f"{text}: not readable as a video (InvalidDataError). Replace the file, or remove it from the sample"
    )
    sound = write(tmp_path / "sound.mp4")
    with av.open(str(sound)) as source, av.open(str(tmp_path / "only.m4a"), "w", format="mp4") as target:
        track = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = track
                target.mux(packet)
    with pytest.raises(MediaError) as error:
        decode(tmp_path / "only.m4a")
    assert str(error.value) == f"{tmp_path / 'only.m4a'}: holds no pictures. Give it as audio, or replace the file"


def test_limits_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    for limits, message in (
        ({"max_seconds": 2.0}, "lasts 3 s, and at most 2 s are decoded. Cut it"),
        (
            {"max_pixels": 100},
            "its frames have more pixels, or no size, and at most 100 pixels are decoded. Make it smaller",
        ),
        ({"max_frames": 20}, "has more than 20 frames, and no more are decoded. Cut it"),
        (
            {"max_samples": 1000},
            "has 1024 samples at 48000 Hz, and at most 1000 samples and 3600 s are decoded. Cut it",
        ),
        ({"max_decode_s": 0.0}, "takes longer than 0 s to decode. Cut it"),
    ):
        with pytest.raises(MediaError) as error:
            decode(path, **limits)
        assert str(error.value) == f"{path}: {message}"


def test_the_sound_of_a_video_can_be_heard_alone(tmp_path: Path) -> None:
    """And begins where the sound begins, whatever the clock says."""
    for name, how in (("a.mp4", {}), ("a.ts", {"start_s": 7.0})):
        sound = decode_audio(MediaItem("audio", path=write(tmp_path / name, **how)), 16_000)
        loud = np.nonzero(np.abs(sound.waveform) > 0.2)[0]
        assert loud[0] / 16_000 == pytest.approx(1.0, abs=0.08)
        assert len(sound.waveform) / 16_000 == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("seconds", [2, 3, 4])
def test_the_demos_own_videos_are_laid_out_as_ever(seconds: int, tmp_path: Path) -> None:
    """Frame, its share of the sound, frame ...: the shares differ by at most one token, the later ones are larger."""
    count = seconds * 8
    rng = np.random.default_rng(seconds)
    frames = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    write_clip(tmp_path / "a.mp4", frames, rng.normal(0, 0.1, seconds * 16_000))
    model = recipe("tiny").model
    assert isinstance(model, ModelConfig) and model.vision is not None and model.audio is not None
    eyes = VisionSpec(image_size_px=64, cell_px=16, reduction=model.vision.connector.reduction())
    spec = MediaSpec(vision=eyes, audio=AudioSpec(reduction=model.audio.connector.reduction()), video=model.video)
    prepared = MediaReader(spec).prepare(MediaItem("video", path=tmp_path / "a.mp4"))
    assert isinstance(prepared, PreparedVideo)
    looked, total = 2 * seconds, -(-50 * seconds // 4)  # 20 ms an embedding, four of them a token
    edges = [total * i // looked for i in range(looked + 1)]
    shares = [b - a for a, b in itertools.pairwise(edges)]
    picture = Segment("video", model.vision.connector.reduction().spread)
    expected = [s for share in shares for s in (picture, Segment("audio", share))]
    assert video_segments(prepared.facts, spec) == expected
    assert len(prepared.frames) == looked


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
@pytest.mark.parametrize("start_s", [0.8, 3.0])
def test_a_file_whose_clock_begins_late_is_as_long_as_it_is(name: str, start_s: float, tmp_path: Path) -> None:
    """FFmpeg's Matroska says when it ends."""
    how = {"video": "libvpx", "audio": "libopus"} if name == "a.webm" else {}
    clip = decode(write(tmp_path / name, start_s=start_s, **how))
    assert clip.duration_s == pytest.approx(3.0, abs=0.15)
    assert chosen(clip) == [5, 15, 25]
    assert beep_s(clip) == pytest.approx(1.0, abs=0.08)


def test_the_cover_of_a_recording_is_no_film(tmp_path: Path) -> None:
    path = tmp_path / "a.mka"
    with av.open(str(path), "w", format="mp4") as file:
        track = file.add_stream("aac", rate=RATE, layout="mono")
        cover = file.add_stream("mjpeg")
        cover.width = cover.height = 16
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.full((1, RATE), 0.1, np.float32), "fltp", "mono")
        sound.sample_rate, sound.pts = RATE, 0
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        file.mux([*cover.encode(picture), *cover.encode(None), *track.encode(sound), *track.encode(None)])
    with pytest.raises(MediaError, match=r"holds no pictures\. Give it as audio"):
        decode(path)
