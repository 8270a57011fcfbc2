"""What headers say is what decoding gives, always: over sizes, rates, channels, cuts and containers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_files import EVERY, flat, made, picture, sound, tone, track, video
from PIL import Image, PngImagePlugin

from avlm.config.media import AudioSpec, MediaSpec, VideoSpec, VisionSpec
from avlm.data.decoding.decode import decode_audio, decode_image
from avlm.data.decoding.files import Limits
from avlm.data.decoding.headers import measure
from avlm.data.decoding.recordings import TAGS
from avlm.data.media.reader import MediaReader, PreparedVideo
from avlm.errors import MediaError
from avlm.layout import AudioFacts, ImageFacts, VideoFacts
from avlm.samples import Clip, MediaItem, Picture, Sound

EYES = VisionSpec(image_size_px=28, cell_px=14)


def media(rate: int = 16_000, **video: Any) -> MediaSpec:
    return MediaSpec(vision=EYES, audio=AudioSpec(sample_rate_hz=rate), video=VideoSpec(**video))


def decoded(item: MediaItem, spec: MediaSpec) -> ImageFacts | AudioFacts | VideoFacts:
    """By decoding; sizes and lengths of what came out."""
    if item.kind == "image":
        height, width, _ = decode_image(item).pixels.shape
        return ImageFacts((height, width))
    if item.kind == "audio":
        assert spec.audio is not None
        return AudioFacts(len(decode_audio(item, spec.audio.sample_rate_hz).waveform))
    found = MediaReader(spec).prepare(item)
    assert isinstance(found, PreparedVideo)
    heard = sum(chunk.features.shape[1] for chunk in found.sound)
    assert (heard > 0) == (found.facts.num_samples > 0)
    return found.facts


UNTOLD = {"uncounted.mp3", "a.mka"}


@pytest.mark.parametrize("name", EVERY)
def test_every_format_is_measured_as_it_is_decoded(name: str, tmp_path: Path) -> None:
    kind = EVERY[name][0]
    (tmp_path / "a.bin").write_bytes(made(name))
    for item in (MediaItem(kind, path=tmp_path / "a.bin"), MediaItem(kind, data=made(name))):
        measured = measure(item, media())
        assert measured == (None if name in UNTOLD else decoded(item, media()))


# ---------------------------------------------------------------- pictures

SIDES = st.integers(1, 70)
FORMS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"]


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"]), SIDES, SIDES, st.integers(0, 9)
)
def test_pictures_of_every_size_and_orientation(form: str, height: int, width: int, orientation: int) -> None:
    """Orientations 0 and 9 are none."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    turns = {"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    item = MediaItem("image", data=flat(form, "RGB", height, width, **turns))
    expected = (width, height) if turns and orientation in (5, 6, 7, 8) else (height, width)
    assert measure(item, media()) == decoded(item, media()) == ImageFacts(expected)


def png_with(*, exif: bool = False, late: bool = False, texts: dict[str, str] | None = None) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_itxt(name, text)
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "PNG", pnginfo=info, **({"exif": turned} if exif else {}))
    data = file.getvalue()
    if not late:
        return data
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4])
    return data[:at] + data[end:-12] + data[at:end] + data[-12:]


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def test_a_pngs_orientation_is_found_wherever_it_stands_or_left_to_decoding() -> None:
    for data, told in (
        (png_with(), True),
        (png_with(exif=True), True),
        (png_with(exif=True, late=True), False),
        (png_with(texts={"Comment": "nothing"}), True),
        (png_with(texts={"XML:com.adobe.xmp": XMP}), False),
        (png_with(exif=True, texts={"XML:com.adobe.xmp": XMP}), False),
    ):
        item = MediaItem("image", data=data)
        upright = ImageFacts((20, 10) if b"eXIf" in data or b"Orientation" in data else (10, 20))
        assert decoded(item, media()) == upright
        assert measure(item, media()) == (upright if told else None)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_orientation_in_xmp_counts_as_it_does_for_decoding(form: str) -> None:
    how: dict[str, Any] = {"tiffinfo": {700: XMP.encode()}} if form == "TIFF" else {"xmp": XMP.encode()}
    item = MediaItem("image", data=flat(form, "RGB", 10, 20, **how))
    assert decoded(item, media()) == ImageFacts((20, 10))
    assert measure(item, media()) == (None if form == "TIFF" else ImageFacts((20, 10)))


def test_broken_exif_says_nothing() -> None:
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40, b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        for form in ("JPEG", "PNG", "WEBP"):
            item = MediaItem("image", data=flat(form, "RGB", 10, 20, exif=exif))
            assert measure(item, media()) == decoded(item, media()) == ImageFacts((10, 20))


# ---------------------------------------------------------------- sound

RATES = st.sampled_from([8000, 11_025, 16_000, 22_050, 44_100, 48_000])
MODEL_RATES = st.sampled_from([16_000, 24_000, 48_000, 22_050])
CUTS = st.one_of(
    st.just((0.0, None)),
    st.tuples(st.floats(0, 0.15), st.none()),
    st.tuples(st.floats(0, 0.1), st.floats(0.11, 0.5)),
)


def outcome(look: Callable[[], Any]) -> Any:
    """What comes of it: facts, or the message of a refusal."""
    try:
        return look()
    except MediaError as error:
        return str(error)


def check(item: MediaItem, spec: MediaSpec, *, told: bool = True) -> None:
    """Measured as decoded. What is too short to be heard is refused when it is decoded, at the latest."""
    expected, found = outcome(lambda: decoded(item, spec)), outcome(lambda: measure(item, spec))
    if not isinstance(expected, str) or "nothing left" in expected:
        assert found == expected if told else found in (None, expected)
    else:
        assert re.search("shorter than one sample|nothing to hear", expected), expected


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from([("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16"), ("MP3", None),
                     ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("CAF", "PCM_16")]),
    st.integers(1, 9000), RATES, st.integers(1, 3), MODEL_RATES, CUTS,
)  # fmt: skip
def test_recordings_of_every_length(
    form: tuple[str, str | None], count: int, rate: int, channels: int, model: int, cut: tuple[float, float | None]
) -> None:
    if form[0] == "MP3":
        channels = min(channels, 2)
    if form[1] == "OPUS":
        rate = {11_025: 12_000, 22_050: 24_000, 44_100: 48_000}.get(rate, rate)
    data = sound(*form, rate=rate, channels=channels, count=count)
    check(MediaItem("audio", data=data, start_s=cut[0], end_s=cut[1]), media(model))


@lru_cache(maxsize=64)
def in_container(form: str, codec: str, rate: int, channels: int, count: int, movflags: str) -> bytes:
    options = {"movflags": movflags} if movflags else {}
    return track(form, codec, rate, channels, wave=tone(1, rate, channels)[:count], **options)


KNOWN = [
    ("ipod", "aac"), ("mov", "pcm_s16le"), ("ipod", "alac"), ("mp4", "libopus"), ("mov", "aac"), ("mp4", "flac"),
]  # fmt: skip
UNKNOWN = [
    ("webm", "libopus"), ("matroska", "aac"), ("adts", "aac"), ("mpegts", "aac"), ("avi", "pcm_s16le"), ("flv", "aac"),
    ("fragments", "aac"), ("fragments", "libopus"),
]  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(KNOWN + UNKNOWN), st.integers(2000, 20_000), st.sampled_from([16_000, 24_000, 48_000]),
    st.integers(1, 2), MODEL_RATES, CUTS,
)  # fmt: skip
def test_tracks_of_every_length(
    form: tuple[str, str], count: int, rate: int, channels: int, model: int, cut: tuple[float, float | None]
) -> None:
    rate = 44_100 if form[0] == "flv" else rate
    count += 6000 if form[0] == "mpegts" else 0  # FFmpeg reads no shorter one
    if form[0] == "fragments":
        data = in_container("mp4", form[1], rate, channels, count, "frag_keyframe+empty_moov")
    else:
        data = in_container(*form, rate, channels, count, "")
    check(MediaItem("audio", data=data, start_s=cut[0], end_s=cut[1]), media(model), told=form in KNOWN)


# ---------------------------------------------------------------- video


@lru_cache(maxsize=64)
def clip(form: str, codec: str, audio: str | None, frames: int, sound_s: float, rate: int) -> bytes:
    return video(form, codec, audio, frames, (16, 16), rate, sound_s=sound_s)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([("mp4", "mpeg4", "aac"), ("mov", "mpeg4", "pcm_s16le"), ("matroska", "mpeg4", "flac"),
                     ("webm", "libvpx", "libopus"), ("avi", "mpeg4", "libmp3lame"), ("mpegts", "mpeg2video", "aac"),
                     ("mp4", "libx264", None), ("gif", "gif", None)]),
    st.integers(1, 14), st.sampled_from([0.1, 0.5, 2.0]), st.sampled_from([16_000, 48_000]), MODEL_RATES, CUTS,
    st.sampled_from(["interleaved", "video", "audio"]),
)  # fmt: skip
def test_videos_of_every_length(
    form: tuple[str, str, str | None], frames: int, sound_s: float, rate: int, model: int,
    cut: tuple[float, float | None], order: Any,
) -> None:  # fmt: skip
    data = clip(*form, frames, sound_s, rate)
    item = MediaItem("video", data=data, start_s=cut[0], end_s=cut[1])
    check(item, media(model, order=order, fps=5))


# ---------------------------------------------------------------- what is given, and what is refused


def test_what_is_decoded_already_is_measured_too() -> None:
    pixels, wave = np.zeros((5, 9, 3), np.uint8), np.ones(44_100, np.float32)
    assert measure(MediaItem("image", decoded=Picture(pixels)), media()) == ImageFacts((5, 9))
    item = MediaItem("audio", decoded=Sound(wave, 44_100), start_s=0.5)
    assert measure(item, media()) == decoded(item, media()) == AudioFacts(8000)
    for track_of in (Sound(wave, 44_100), None):
        for order in ("interleaved", "video"):
            item = MediaItem("video", decoded=Clip((Picture(pixels),), 2.0, track_of))
            assert measure(item, media(order=order)) == decoded(item, media(order=order))


@pytest.mark.parametrize(
    ("item", "limits", "message"),
    [
        (lambda: MediaItem("image", data=picture("PNG")), {"max_pixels": 99}, "is 48 x 36 pixels, and at most 99"),
        (lambda: MediaItem("audio", data=sound("WAV")), {"max_samples": 99}, "has 4800 samples at 16000 Hz"),
        (lambda: MediaItem("audio", data=made("a.m4a")), {"max_seconds": 0.1}, "lasts 0 s, and at most 0 s"),
        (lambda: MediaItem("video", data=made("h264.mp4")), {"max_seconds": 0.1}, "lasts 1 s, and at most 0 s"),
        (lambda: MediaItem("audio", data=made("16.wav")[:-9]), {}, "is truncated: its header announces 9 more bytes"),
        (lambda: MediaItem("video", data=made("h264.mkv")[:-9]), {}, "is truncated: its header announces 9 more bytes"),
        (lambda: MediaItem("audio", data=made("16.wav"), start_s=3.0), {}, "is to begin at 3 s and lasts 0.30 s"),
        (lambda: MediaItem("image", path=Path("none.png")), {}, "there is no such file"),
        (lambda: MediaItem("image", data=b"none"), {}, "not readable as a picture (UnidentifiedImageError)"),
        (lambda: MediaItem("video", data=b"none"), {}, "not readable as a video ("),
    ],
)
def test_what_a_header_shows_to_be_wrong_is_refused_in_the_words_of_decoding(
    item: Callable[[], MediaItem], limits: dict[str, Any], message: str
) -> None:
    told = []
    for look in (measure, lambda *args: MediaReader(args[1], 0, args[2]).prepare(args[0])):
        with pytest.raises(MediaError) as error:
            look(item(), media(), Limits(**limits))
        told.append(str(error.value))
    assert told[0] == told[1]
    assert message in told[0]


@pytest.mark.parametrize("name", ["rgb.png", "16.wav", "h264.mp4"])
@pytest.mark.parametrize("hears", [None, "interleaved", "audio"])
def test_what_a_model_has_no_sense_for_is_refused_as_it_is_when_it_is_decoded(name: str, hears: Any) -> None:
    spec = MediaSpec(audio=AudioSpec(), video=VideoSpec(order=hears)) if hears else MediaSpec(vision=EYES)
    item = MediaItem(EVERY[name][0], data=made(name))
    found, prepared = outcome(lambda: measure(item, spec)), outcome(lambda: MediaReader(spec).prepare(item))
    senseless = {None: ("16.wav",), "interleaved": ("rgb.png", "h264.mp4"), "audio": ("rgb.png",)}[hears]
    assert (name in senseless) == isinstance(prepared, str)
    assert found == prepared if name in senseless else not isinstance(found, str)


def test_measuring_reads_little_of_a_large_file(tmp_path: Path) -> None:
    """And decodes none of it: behind the headers there is nothing but zeros."""
    wave = tone(10, 16_000)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[44:] = bytes(len(data) - 44)
    assert measure(MediaItem("audio", data=bytes(data)), media()) == AudioFacts(160_000)
    jpeg = picture("JPEG", size=(500, 700))
    at = jpeg.index(b"\xff\xda") + 20
    assert measure(MediaItem("image", data=jpeg[:at]), media()) == ImageFacts((500, 700))
    flac = sound("FLAC", seconds=5)
    assert measure(MediaItem("audio", data=flac[:3000]), media()) == AudioFacts(80_000)


def test_recordings_put_end_to_end_are_heard_whole(tmp_path: Path) -> None:
    """Each has a header that counts its own frames. Tags behind the last one are no sound."""
    wave = np.sin(np.arange(24_000) / 5).astype(np.float32) / 2
    soundfile.write(tmp_path / "one.mp3", wave, 24_000, format="MP3")
    one = (tmp_path / "one.mp3").read_bytes()
    heard = {}
    for name, data in {"one": one, "tagged": one + b"TAG" + bytes(125), "three": one * 3}.items():
        heard[name] = len(decode_audio(MediaItem("audio", data=data), 24_000).waveform)
    assert heard["one"] == heard["tagged"] == 24_000
    assert heard["three"] == pytest.approx(3 * 24_000, abs=3 * 3 * 1152)
    soundfile.write(tmp_path / "short.mp3", wave[:2400], 24_000, format="MP3")
    short = (tmp_path / "short.mp3").read_bytes()
    assert len(short) < TAGS
    assert len(decode_audio(MediaItem("audio", data=one + short), 24_000).waveform) > 26_000


@pytest.mark.parametrize("codec", ["libmp3lame", "adpcm_ms"])
def test_wavs_that_are_not_plain_are_as_long_as_ffmpeg_hears_them(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    wave = (np.sin(np.arange(48_000) / 9) * 12_000).astype(np.int16)
    with av.open(str(path), "w") as file:
        track = file.add_stream(codec, rate=24_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], "s16", "mono")
        frame.sample_rate, frame.pts = 24_000, 0
        for one in av.AudioResampler(track.format.name, "mono", 24_000, frame_size=track.frame_size or None).resample(
            frame
        ):
            file.mux(track.encode(one))
        file.mux(track.encode(None))
    with av.open(str(path)) as file:
        expected = sum(frame.samples for frame in file.decode(audio=0))
    found = decode_audio(MediaItem("audio", path=path), 24_000).waveform
    assert len(found) == pytest.approx(expected, abs=2400) and len(found) > 47_000
