"""Cuts of sounds and videos: as if they were files by themselves, found without decoding what is before them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from avlm.config.media import AudioSpec, MediaSpec, VideoSpec, VisionSpec
from avlm.data.decoding import containers
from avlm.data.decoding.decode import Limits, decode_audio, decode_video
from avlm.data.media.reader import MediaReader, PreparedVideo
from avlm.errors import DataError, MediaError
from avlm.samples import Clip, MediaItem, Picture, Sound

FPS, RATE, SECONDS = 10, 48_000, 20
VITA = VideoSpec(fps=1, min_frames=4, max_frames=16)


def media(**video: Any) -> MediaSpec:
    vision = VisionSpec(image_size_px=28, cell_px=14)
    return MediaSpec(vision=vision, audio=AudioSpec(), video=VideoSpec(**{"fps": 2, "max_frames": 64, **video}))


def drawn(number: int) -> np.ndarray:
    """A number as ten black or white bars."""
    bars = [255 * (number >> bit & 1) for bit in range(10)]
    return np.ascontiguousarray(np.repeat(np.array(bars, np.uint8), 16)[None, :, None].repeat(48, 0).repeat(3, 2))


def read(picture: Picture) -> int:
    """The number that is drawn in a frame."""
    grey = picture.pixels[8:40].mean((0, 2)).reshape(10, 16)[:, 4:12].mean(1)
    return sum(1 << bit for bit in range(10) if grey[bit] > 128)


def numbers(clip: Clip) -> list[int]:
    return [read(frame) for frame in clip.frames]


TIME = np.arange(SECONDS * RATE) / RATE
RISING = (0.4 * np.sin(2 * np.pi * (200 * TIME + 10 * TIME * TIME))).astype(np.float32)
"""A tone that rises all the time, so no two moments sound alike."""


def write(
    path: Path,
    *,
    video: str = "mpeg4",
    audio: str | None = "pcm_s16le",
    form: str | None = None,
    options: dict[str, str] | None = None,
    start_s: float = 0.0,
    times: list[int] | None = None,
    first: int = 0,
    sound: np.ndarray = RISING,
) -> Path:
    """A video of numbered frames and of a rising tone.

    Args:
        times: When each frame comes, in tenths of a second; default one after the other.
        first: Number of the first frame.
    """
    with av.open(str(path), "w", format=form, options=options or {}) as file:
        pictures = file.add_stream(video, rate=FPS)
        pictures.width, pictures.height, pictures.pix_fmt = 160, 48, "yuv420p"
        pictures.bit_rate = 3_000_000
        track = None if audio is None else file.add_stream(audio, rate=RATE, layout="mono")
        if track is not None:
            step = RATE // FPS
            for at in range(0, len(sound), step):
                block = sound[at : at + step]
                whole = audio == "pcm_s16le"
                samples = np.round(block * 32_767).astype(np.int16)[None] if whole else block[None]
                heard = av.AudioFrame.from_ndarray(samples, "s16" if whole else "fltp", "mono")
                heard.sample_rate, heard.time_base, heard.pts = RATE, Fraction(1, RATE), at + round(start_s * RATE)
                file.mux(track.encode(heard))
            file.mux(track.encode(None))
        for number, at in enumerate(times or range(SECONDS * FPS)):
            frame = av.VideoFrame.from_ndarray(drawn(first + number), format="rgb24")
            frame.pts, frame.time_base = at + round(start_s * FPS), Fraction(1, FPS)
            file.mux(pictures.encode(frame))
        file.mux(pictures.encode(None))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write`, once for each kind of file."""
    folder, kept = tmp_path_factory.mktemp("made"), {}

    def make(name: str, **how: Any) -> Path:
        key = f"{len(kept)}-{name}"
        found = kept.setdefault((name, str(how)), folder / key)
        return found if found.exists() else write(found, **how)

    return make


def cut(path: Path, start_s: float = 0.0, end_s: float | None = None, spec: MediaSpec | None = None) -> Clip:
    return decode_video(MediaItem("video", path=path, start_s=start_s, end_s=end_s), spec or media())


CONTAINERS = [
    pytest.param("a.mov", {}, id="mov"),
    pytest.param("a.mp4", {"video": "libx264", "audio": "aac"}, id="mp4, h264 and aac"),
    pytest.param("a.mkv", {"video": "libx264", "audio": "aac"}, id="mkv"),
    pytest.param("a.webm", {"video": "libvpx", "audio": "libopus"}, id="webm"),
    pytest.param(
        "a.webm",
        {"video": "libvpx", "audio": "libopus", "options": {"live": "1"}},
        id="a browser's: no length and no index",
    ),
    pytest.param("a.ts", {"audio": "aac", "start_s": 7.0}, id="a broadcast: its clock begins at 7 s"),
    pytest.param(
        "a.mp4", {"audio": "aac", "options": {"movflags": "frag_keyframe+empty_moov"}}, id="mp4 in fragments"
    ),
    pytest.param("a.mov", {"audio": None}, id="no sound"),
]  # fmt: skip
CUTS = [(0.0, 3.0), (0.5, 2.5), (13.0, 16.0), (17.0, None), (4.0, 19.0), (19.0, 25.0)]


@pytest.mark.parametrize(("name", "how"), CONTAINERS)
def test_frames_and_sound_of_a_cut_are_those_of_its_time(
    name: str, how: dict[str, Any], made: Callable[..., Path]
) -> None:
    """Two frames a second, from the middles of their halves; the sound is that of the whole video at that time."""
    path = made(name, **how)
    whole = cut(path)
    for start, end in CUTS:
        clip = cut(path, start, end)
        length = min(SECONDS, end or SECONDS) - start
        assert clip.duration_s == pytest.approx(length, abs=0.06)
        assert numbers(clip) == [round(FPS * (start + i / 2 + 0.25) - 0.5) for i in range(round(2 * length))]
        assert (clip.sound is None) == (whole.sound is None)
        if clip.sound is None or whole.sound is None:
            assert "audio" in how
            continue
        assert len(clip.sound.waveform) == round(clip.duration_s * RATE)
        assert apart(clip.sound.waveform, whole.sound.waveform[round(start * RATE) :]) < 0.001


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """How far a sound is from the beginning of another, at most half a millisecond earlier or later."""
    count, most = min(len(found), len(expected)), RATE // 2000
    inner = slice(most, count - most)
    return min(
        float(np.abs(found[inner] - expected[:count][inner.start + by : inner.stop + by]).max())
        for by in range(-most, most + 1, 4 if count > RATE else 1)
    )


def test_the_sound_is_cut_to_the_sample(made: Callable[..., Path]) -> None:
    """PCM in mov has an exact clock."""
    path = made("a.mov")
    samples = np.round(RISING * 32_767).astype(np.int16) / np.float32(32_768)
    for start, end in [*CUTS, (12.3456, 15.001)]:
        clip = cut(path, start, end)
        assert clip.sound is not None
        first, last = round(start * RATE), round(min(end or SECONDS, SECONDS) * RATE)
        assert np.array_equal(clip.sound.waveform, samples[first:last])


def test_a_cut_is_what_the_model_would_make_of_a_file_by_itself(made: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path / "cut.mov", times=list(range(40)), first=50, sound=RISING[5 * RATE : 9 * RATE])
    reader = MediaReader(media())
    alone = reader.prepare(MediaItem("video", path=tmp_path / "cut.mov"))
    part = reader.prepare(MediaItem("video", path=made("a.mov"), start_s=5.0, end_s=9.0))
    assert isinstance(alone, PreparedVideo) and isinstance(part, PreparedVideo)
    assert part.facts == alone.facts
    assert len(alone.sound) == len(part.sound) == 1
    assert np.array_equal(alone.sound[0].features.numpy(), part.sound[0].features.numpy())
    for ours, theirs in zip(part.frames, alone.frames, strict=True):
        assert np.abs(ours.numpy().astype(int) - theirs.numpy()).mean() < 3  # encoded twice


def test_what_is_before_a_cut_is_not_decoded(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key frame each 12 frames (mpeg4's habit), and a second to swing in."""
    count = 0
    take = containers._Eyes.take

    def counted(self: Any, frame: Any) -> None:
        nonlocal count
        count += 1
        take(self, frame)

    monkeypatch.setattr(containers._Eyes, "take", counted)
    assert numbers(cut(made("a.mov"), 18.0, 19.0)) == [182, 187]
    assert count <= 10 + 10 + 12 + 1
    count = 0
    assert numbers(cut(made("a.mov"), 0.0, 1.0)) == [2, 7]
    assert count <= 10 + 1


@pytest.mark.parametrize("way", ["refuses", "lands too late", "has no clock"])
def test_where_seeking_fails_the_file_is_decoded_from_its_beginning(
    way: str, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is played by another that behaves like that."""

    class Container:
        def __init__(self, inner: Any) -> None:
            self.inner, self.sought = inner, False

        def __enter__(self) -> Container:
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def seek(self, offset: int) -> None:
            if way == "refuses":
                raise av.error.PermissionError(1, "Operation not permitted")
            self.sought = True
            self.inner.seek(offset if way == "has no clock" else 19_000_000)

        def demux(self, streams: Any) -> Any:
            for packet in self.inner.demux(streams):
                if self.sought and way == "has no clock":
                    packet.pts = packet.dts = None
                yield packet

    real = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: Container(real(*args, **kwargs)))
    clip = cut(made("a.mov"), 13.0, 15.0)
    monkeypatch.undo()
    assert numbers(clip) == [132, 137, 142, 147]
    assert clip.sound is not None
    assert np.abs(clip.sound.waveform - RISING[13 * RATE : 15 * RATE]).max() < 1e-3


# ---------------------------------------------------------------- which frames


@pytest.mark.parametrize(
    ("start", "end", "frames"),
    [
        pytest.param(0.0, 2.0, [2, 7, 12, 17], id="under 4 s: 4"),
        pytest.param(0.0, 10.0, [10 * i + 5 for i in range(10)], id="4 to 16 s: one a second"),
        pytest.param(0.0, None, [int(12.5 * (i + 0.5)) for i in range(16)], id="longer: 16, evenly spaced"),
        pytest.param(7.0, 12.0, [10 * i + 75 for i in range(5)], id="of a cut: as of a file that is as long"),
    ],
)
def test_vitas_rule_takes_these_frames(
    start: float, end: float | None, frames: list[int], made: Callable[..., Path]
) -> None:
    found = numbers(cut(made("a.mov"), start, end, media(**VITA.model_dump(exclude={"order", "clock"}))))
    assert found == frames
    assert len(set(found)) == len(frames)


def test_where_frames_come_at_any_time_those_on_the_screen_are_taken(tmp_path: Path) -> None:
    """Now fast, now slow: found by a loop over the times at which they come."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.choice([1, 1, 2, 7], 80)).tolist()
    times = [t - times[0] for t in times]
    path = write(tmp_path / "a.mkv", video="libx264", audio=None, times=times)
    for start, end in ((0.0, None), (6.0, 15.0), (11.3, 14.3)):
        clip = cut(path, start, end, media(fps=1))
        looked = [10 * (start + clip.duration_s * (i + 0.5) / len(clip.frames)) for i in range(len(clip.frames))]
        expected = [max(n for n, t in enumerate(times) if t <= at + 0.01) for at in looked]
        assert numbers(clip) == expected
        assert len(set(expected)) == len(expected)  # none is on the screen for a second


def test_a_video_of_one_frame_is_looked_at_as_often_as_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", audio=None, times=[0])
    assert numbers(cut(path, spec=media(min_frames=3))) == [0, 0, 0]
    assert numbers(cut(path)) == [0]


# ---------------------------------------------------------------- sound that is not as long as the pictures


@pytest.mark.parametrize("seconds", [5, 25])
def test_a_track_that_is_shorter_or_longer_than_the_pictures_lies_on_their_time(seconds: int, tmp_path: Path) -> None:
    sound = np.concatenate([RISING, RISING[: 5 * RATE]])[: seconds * RATE]
    path = write(tmp_path / "a.mov", sound=sound)
    lies = np.pad(sound, (0, SECONDS * RATE))[: SECONDS * RATE]
    for start, end in ((0.0, None), (3.0, 7.0), (12.0, 16.0)):
        clip = cut(path, start, end)
        assert clip.sound is not None
        expected = lies[round(start * RATE) : round((end or SECONDS) * RATE)]
        assert len(clip.sound.waveform) == len(expected)
        assert np.abs(clip.sound.waveform - expected).max() < 1e-3


def test_where_the_track_is_over_what_is_before_the_cut_is_not_decoded_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mov", sound=RISING[: 2 * RATE])
    tries: list[Any] = []
    real = containers._way
    monkeypatch.setattr(containers, "_way", lambda *args: tries.append(args[5]) or real(*args))
    assert numbers(cut(path, 18.0, 19.0)) == [182, 187]
    assert tries == [1.0]


def test_a_silent_track_is_heard_as_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mov", sound=np.zeros(3 * RATE, np.float32), times=list(range(30)))
    prepared = MediaReader(media()).prepare(MediaItem("video", path=path))
    assert isinstance(prepared, PreparedVideo)
    assert prepared.facts.num_samples == 48_000
    assert prepared.sound and all(bool(chunk.features.isfinite().all()) for chunk in prepared.sound)


# ---------------------------------------------------------------- what is not wanted is not decoded


def test_a_model_that_only_listens_needs_neither_eyes_nor_frames(made: Callable[..., Path]) -> None:
    listens = MediaSpec(audio=AudioSpec(), video=VideoSpec(order="audio"))
    for spec in (listens, media(order="audio")):
        prepared = MediaReader(spec).prepare(MediaItem("video", path=made("a.mov"), start_s=2.0, end_s=4.0))
        assert isinstance(prepared, PreparedVideo)
        assert prepared.frames == ()
        assert prepared.facts.num_samples == 32_000
    for silent in (MediaSpec(vision=media().vision), media(order="video")):
        prepared = MediaReader(silent).prepare(MediaItem("video", path=made("a.mov"), start_s=2.0, end_s=4.0))
        assert isinstance(prepared, PreparedVideo)
        assert not prepared.sound
        assert prepared.facts.num_samples == 0
        assert len(prepared.frames) > 0


# ---------------------------------------------------------------- recordings


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 0.0),
        ("FLAC", "PCM_16", 0.0),
        ("OGG", "VORBIS", 0.0),
        ("OGG", "OPUS", 0.0),
        ("MP3", None, 1e-4),
    ],
)
def test_a_cut_of_a_recording_is_that_stretch_of_it(form: str, subtype: str, tolerance: float, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with soundfile.SoundFile(path, "w", RATE, 1, format=form, subtype=subtype) as file:
        for at in range(0, len(RISING), 4096):  # libsndfile's Vorbis writer fails on long blocks
            file.write(RISING[at : at + 4096])
    whole, _ = soundfile.read(path, dtype="float32")
    for start, end in [*CUTS, (12.3456, 15.001)]:
        found = decode_audio(MediaItem("audio", path=path, start_s=start, end_s=end), RATE).waveform
        expected = whole[round(start * RATE) : round(min(end or SECONDS, SECONDS) * RATE)]
        assert len(found) == len(expected)
        assert np.abs(found - expected).max() <= tolerance


def test_an_mp3_is_whole_between_the_blocks_in_which_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "a.mp3", RISING, RATE, format="MP3")
    whole, _ = soundfile.read(tmp_path / "a.mp3", dtype="float32")
    monkeypatch.setattr("avlm.data.decoding.decode.BLOCK", 100_000)
    found = decode_audio(MediaItem("audio", path=tmp_path / "a.mp3"), RATE).waveform
    assert np.abs(found - whole).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mov", {}),
        ("a.mp4", {"audio": "aac"}),
        ("a.ts", {"audio": "aac", "start_s": 7.0}),
        ("a.webm", {"video": "libvpx", "audio": "libopus"}),
    ],
)
def test_a_cut_of_the_sound_of_a_video_is_that_stretch_of_it(
    name: str, how: dict[str, Any], made: Callable[..., Path]
) -> None:
    path = made(name, **how)
    whole = decode_audio(MediaItem("audio", path=path), RATE).waveform
    for start, end in CUTS:
        found = decode_audio(MediaItem("audio", path=path, start_s=start, end_s=end), RATE).waveform
        expected = whole[round(start * RATE) : round((end or 99) * RATE)]
        assert len(expected) - 1024 <= len(found) <= len(expected)  # a header does not count the last frame's padding
        assert apart(found, expected) < 0.001


def test_a_waveform_is_cut_too() -> None:
    item = MediaItem("audio", decoded=Sound(RISING, RATE), start_s=1.5, end_s=2.0)
    assert np.array_equal(decode_audio(item, RATE).waveform, RISING[72_000:96_000])


# ---------------------------------------------------------------- limits and refusals


def test_limits_hold_for_the_cut_and_not_for_the_file(made: Callable[..., Path]) -> None:
    path = made("a.mov")
    tight = Limits(max_bytes=100_000, max_seconds=3.0, max_samples=3 * RATE)
    assert path.stat().st_size > tight.max_bytes
    clip = decode_video(MediaItem("video", path=path, start_s=15.0, end_s=17.0), media(), tight)
    assert clip.duration_s == 2.0
    sound = decode_audio(MediaItem("audio", path=path, start_s=15.0, end_s=17.0), 16_000, tight)
    assert len(sound.waveform) == 32_000
    with pytest.raises(MediaError) as error:
        decode_video(MediaItem("video", path=path, start_s=1.0), media(), tight)
    assert str(error.value) == f"{path}: lasts 19 s, and at most 3 s are decoded. Cut it"
    with pytest.raises(MediaError) as error:
        decode_video(MediaItem("video", path=path), media(), tight)
    assert str(error.value) == (
        f"{path}: has {path.stat().st_size} bytes, and at most 100000 are read. Cut or compress it"
    )


def test_a_start_behind_the_end_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    path, wav = made("a.mov"), tmp_path / "a.wav"
    soundfile.write(wav, RISING[:RATE], RATE)
    for decode, file, lasts in (
        (lambda: cut(path, 20.0), path, 20),
        (lambda: cut(path, 20.0, 21.0), path, 20),
        (lambda: decode_audio(MediaItem("audio", path=path, start_s=20.0), RATE), path, 20),
        (lambda: decode_audio(MediaItem("audio", path=wav, start_s=20.0), RATE), wav, 1),
    ):
        with pytest.raises(MediaError) as error:
            decode()
        assert str(error.value) == (
            f"{file}: is to begin at 20 s and lasts {lasts:.2f} s, so there is nothing left. "
            "Give a start before its end"
        )
    assert len(cut(path, 19.0).frames) == 2  # the advice holds


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"kind": "image", "start_s": 1.0},
        "a.x: is a picture with a start or an end, and pictures have no time. Remove them",
    ),
    ({"kind": "audio", "start_s": -1.0}, "a.x: begins at -1 s, which is no time in it. Give 0 or more seconds"),
    (
        {"kind": "audio", "start_s": float("nan")},
        "a.x: begins at nan s, which is no time in it. Give 0 or more seconds",
    ),
    (
        {"kind": "video", "start_s": 3.0, "end_s": 3.0},
        "a.x: ends at 3 s and begins at 3 s, so there is nothing in it. Give an end behind its start",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_a_cut_with_nothing_in_it_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        MediaItem(path=Path("a.x"), **given)
    assert str(error.value) == message


def test_frames_that_are_chosen_already_are_not_cut() -> None:
    clip = Clip((Picture(drawn(0)),), 1.0, None)
    with pytest.raises(MediaError) as error:
        decode_video(MediaItem("video", decoded=clip, end_s=0.5), media())
    assert str(error.value) == (
        "the video given as data: was given as frames with a start or an end, and its frames are chosen already. "
        "Cut them before, or give the file"
    )


def test_two_cuts_of_one_file_are_remembered_apart(made: Callable[..., Path]) -> None:
    reader = MediaReader(media(), cache_mb=64)
    items = [MediaItem("video", path=made("a.mov"), start_s=s, end_s=s + 1) for s in (2.0, 5.0)]
    first = [reader.prepare(item) for item in items]
    assert [reader.prepare(item) for item in items] == first
    assert first[0] is not first[1]
