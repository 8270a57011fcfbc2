# ruff: noqa: E501 (whole messages are compared)
"""Pictures and sounds, from files as people have them, against Pillow, Whisper's extractor, and arithmetic."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import WhisperFeatureExtractor

from avlm.config.media import AudioSpec, MediaSpec, VideoSpec, VisionSpec
from avlm.data.decoding.decode import Limits, decode_audio, decode_image, resample
from avlm.data.media.features import levelled, log_mel
from avlm.data.media.pictures import PreparedImage, normalise, prepare_image
from avlm.data.media.reader import MediaReader, PreparedAudio
from avlm.errors import MediaError
from avlm.layout import frame_count, resampled_count
from avlm.samples import MediaItem, Picture, Sound

TRUE = AudioSpec()
WINDOW = AudioSpec(window_frames=3000)


def image(path: Path) -> np.ndarray:
    return decode_image(MediaItem("image", path=path)).pixels


def audio(path: Path, rate: int = 16_000) -> np.ndarray:
    return decode_audio(MediaItem("audio", path=path), rate).waveform


def refusal(path: Path, kind: Any, **limits: Any) -> str:
    decode: Callable[..., Any] = (
        decode_image if kind == "image" else lambda item, limit: decode_audio(item, 16_000, limit)
    )
    with pytest.raises(MediaError) as error:
        decode(MediaItem(kind, path=path), Limits(**limits))
    return str(error.value)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp", "gif", "jp2"])
def test_a_picture_in_any_format_is_what_pillow_sees(suffix: str, tmp_path: Path) -> None:
    pixels = noise((32, 32, 3))
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(
        image(tmp_path / f"a.{suffix}"), np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGB"))
    )
    if suffix != "gif":
        np.testing.assert_array_equal(image(tmp_path / f"a.{suffix}"), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = 200  # the quarter at the top left is light
    upright[:10, 15:] = 100  # and the one beside it less so
    # how a camera must have stored it, by the definition of the tag (EXIF 2.3, 4.6.4 A)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(image(tmp_path / "a.png"), upright)


def test_a_picture_with_broken_exif_is_seen_as_it_lies(tmp_path: Path) -> None:
    pixels = noise((8, 8, 3))
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    np.testing.assert_array_equal(image(tmp_path / "a.png"), pixels)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    alpha = np.array([[0, 51, 255]], np.uint8)
    colour = np.array([10, 100, 200], np.uint8)
    Image.fromarray(np.dstack([np.broadcast_to(colour, (1, 3, 3)), alpha]), "RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([np.full((1, 3), 100, np.uint8), alpha]), "LA").save(tmp_path / "la.png")
    share = alpha[0, :, None] / 255
    expected = colour * share + 255 * (1 - share)
    assert np.abs(image(tmp_path / "rgba.png")[0] - expected).max() <= 1
    assert np.abs(image(tmp_path / "la.png")[0] - (100 * share + 255 * (1 - share))).max() <= 1


def test_palettes_keep_their_colours_and_their_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "clear.png", transparency=1)
    picture.save(tmp_path / "a.gif")
    assert image(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert image(tmp_path / "a.gif").tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert image(tmp_path / "clear.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_a_picture_for_the_press_is_seen_in_its_colours(tmp_path: Path) -> None:
    for cmyk, rgb in (((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))):
        Image.new("CMYK", (16, 16), cmyk).save(tmp_path / "a.jpg", quality=100)
        assert np.abs(image(tmp_path / "a.jpg").astype(int) - np.array(rgb)).max() <= 3


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    values = np.array([[0, 257, 200, 32_896, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 0, 128, 255]  # value / 257
    Image.fromarray(values[:, :3]).save(tmp_path / "dark.png")  # dark stays dark
    assert image(tmp_path / "dark.png")[0, :, 0].tolist() == [0, 1, 0]
    Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)).save(tmp_path / "f.tiff")
    assert image(tmp_path / "f.tiff")[0, :, 0].tolist() == [0, 127, 255, 0]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
    assert image(tmp_path / "one.png")[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("name", ["a b.png", "ä漢字🎉.png", "a;rm -rf.png", "-a.png", "a.png?x=1#y"])
def test_a_path_may_have_any_name(name: str, tmp_path: Path) -> None:
    pixels = noise((4, 4, 3))
    Image.fromarray(pixels).save(tmp_path / name, format="png")
    np.testing.assert_array_equal(image(tmp_path / name), pixels)


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_a_picture_with_more_pixels_than_allowed_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(12_000, 12_000))
    assert refusal(path, "image") == (
        f"{path}: is 12000 x 12000 pixels, and at most 100000000 pixels are decoded. Make it smaller"
    )
    path.write_bytes(png(2**31 - 1, 2**31 - 1))
    assert refusal(path, "image") == f"{path}: at most 100000000 pixels are decoded, and it has more. Make it smaller"


def test_scans_behind_the_end_of_a_picture_are_not_its_own() -> None:
    """A camera's file holds further pictures behind the first; what would be too many scans is so before its end."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last, count = data[data.rindex(b"\xff\xda") : -2], data.count(b"\xff\xda")
    behind = decode_image(MediaItem("image", data=data + last * 1000 + data))
    assert np.array_equal(behind.pixels, decode_image(MediaItem("image", data=data)).pixels)
    within = data[:-2] + last * (200 - count)
    assert decode_image(MediaItem("image", data=within + data[-2:])).pixels.shape == (8, 8, 3)
    with pytest.raises(MediaError, match="has more than 200 scans, and no more are decoded"):
        decode_image(MediaItem("image", data=within + last + data[-2:]))


def test_only_pictures_are_opened_as_pictures(tmp_path: Path) -> None:
    """EPS would start Ghostscript on a stranger's program."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    assert refusal(tmp_path / "a.png", "image") == (
        f"{tmp_path / 'a.png'}: not readable as a picture (UnidentifiedImageError). "
        "Replace the file, or remove it from the sample"
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_picture_is_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise((40, 40, 3))).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refusal(path, "image")
    if (suffix == "jpg" and share > 0.1) or suffix == "png":
        end = "marker" if suffix == "jpg" else "chunk"
        assert message == f"{path}: is truncated: its end {end} is missing. Copy the picture again"
        return
    assert message.startswith(f"{path}: not readable as a picture (")
    assert message.endswith("). Replace the file, or remove it from the sample")


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["png", "jpeg", "gif", "tiff", "webp"]), st.data())
def test_damage_is_refused_or_survived_and_nothing_else(form: str, data: st.DataObject) -> None:
    file = io.BytesIO()
    Image.fromarray(noise((8, 8, 3))).save(file, form)
    damaged = bytearray(file.getvalue())
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        found = decode_image(MediaItem("image", data=bytes(damaged)), Limits(max_pixels=10_000))
    except MediaError:
        return
    assert found.pixels.dtype == np.uint8
    assert found.pixels.shape[2] == 3


def test_what_is_no_file_is_refused_by_what_it_is(tmp_path: Path) -> None:
    for kind, word in (("image", "a picture"), ("audio", "a recording")):
        path = tmp_path / "none.png"
        assert refusal(path, kind) == f"{path}: there is no such file. Check the path; it is relative to the data file"
        assert refusal(tmp_path, kind) == f"{tmp_path}: is not a regular file. Give the path of {word}"
        empty = tmp_path / "empty.png"
        empty.write_bytes(b"")
        assert refusal(empty, kind) == f"{empty}: is empty, so there is nothing to decode. Replace the file"
        text = tmp_path / "text.png"
        text.write_text("this is no picture and no sound")
        assert refusal(text, kind).startswith(f"{text}: not readable as {word} (")
        assert refusal(text, kind, max_bytes=3) == (f"{text}: has 31 bytes, and at most 3 are read. Cut or compress it")
        assert refusal(Path("x" * 5000), kind).endswith(
            "there is no such file. Check the path; it is relative to the data file"
        )
        assert "not readable as" in refusal(tmp_path / "a\0b", kind)


def test_a_pipe_without_a_writer_does_not_stop_training(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(refusal(tmp_path / "pipe.png", "image")), daemon=True)
    thread.start()
    thread.join(10)
    assert found == [f"{tmp_path / 'pipe.png'}: is not a regular file. Give the path of a picture"]


def test_bytes_are_held_to_the_same_limits_as_files() -> None:
    with pytest.raises(MediaError) as error:
        decode_image(MediaItem("image", data=b"x" * 9), Limits(max_bytes=8))
    assert str(error.value) == "the image given as data: has 9 bytes, and at most 8 are decoded. Cut it"


@pytest.mark.parametrize(("height", "width"), [(48, 64), (100, 20), (7, 9), (28, 28), (200, 333), (1, 1), (1, 50)])
@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_resizing_is_pillows_within_one_grey_level(height: int, width: int, fit: Any) -> None:
    rng = np.random.default_rng(height)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    spec = VisionSpec(image_size_px=28, cell_px=14, fit=fit, mean=(0.5, 0.25, 1.0))
    side, long = min(height, width), max(height, width)
    square = smooth
    if fit == "crop":  # as CLIP's processor: the shorter side first, then the middle at whole pixels
        wide, high = (int(28 * size / side) for size in (width, height))
        left, top = (wide - 28) // 2, (high - 28) // 2
        square = smooth.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + 28, top + 28))
    if fit == "pad":
        square = Image.new("RGB", (long, long), (128, 64, 255))
        square.paste(smooth, ((long - width) // 2, (long - height) // 2))
    expected = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC)).astype(int)
    found = prepare_image(Picture(np.array(smooth)), spec)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 28, 28)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_a_thin_strip_does_not_become_a_square_of_its_length() -> None:
    strip = np.full((2, 1_000_000, 3), 200, np.uint8)
    found = prepare_image(Picture(strip), VisionSpec(image_size_px=28, cell_px=14, fit="pad"))
    assert found.shape == (3, 28, 28)
    assert found[:, 0].eq(128).all()  # padded with the mean above and below


def test_pixels_are_normalised_by_channel() -> None:
    spec = VisionSpec(image_size_px=2, cell_px=1, mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25))
    found = normalise(torch.tensor([0, 255, 51], dtype=torch.uint8)[:, None, None].expand(3, 2, 2), spec)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([-1.0, 1.0, -0.2]))


# ---------------------------------------------------------------- sounds


def extractor(bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=bins)


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("seconds", [0.01, 0.5, 7.3, 30.0])
def test_the_spectrogram_is_whispers(bins: int, seconds: float) -> None:
    rng = np.random.default_rng(3)
    time = np.arange(round(seconds * 16_000)) / 16_000
    wave = (0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time) + 0.01 * rng.standard_normal(len(time))).astype(
        np.float32
    )
    expected = extractor(bins)(wave, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    found = log_mel(wave, AudioSpec(mel_bins=bins, window_frames=3000))
    assert found.shape == (bins, 3000)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("num_samples", [400, 401, 559, 8000, 16_000, 16_159])
def test_at_its_true_length_the_spectrogram_is_that_of_the_sound_alone(num_samples: int) -> None:
    wave = (0.1 * np.random.default_rng(1).standard_normal(num_samples)).astype(np.float32)
    expected = extractor(80)(wave, sampling_rate=16_000, padding=False, return_tensors="np")["input_features"][0]
    found = log_mel(wave, TRUE)
    assert found.shape == (80, frame_count(num_samples, TRUE))
    np.testing.assert_allclose(found.numpy(), expected[:, : found.shape[1]], atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20_000))
def test_the_spectrogram_has_the_frames_that_layout_counts(num_samples: int) -> None:
    wave = np.full(num_samples, 0.1, np.float32)
    assert log_mel(wave, TRUE).shape == (80, frame_count(num_samples, TRUE))
    assert torch.isfinite(log_mel(wave, TRUE)).all()


def test_levelled_clips_have_the_same_mean_and_spread_however_loud() -> None:
    spec = AudioSpec(level="clip")
    wave = (0.3 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)
    loud, quiet = (levelled(log_mel(share * wave, spec), spec) for share in (1.0, 0.01))
    torch.testing.assert_close(loud, quiet, atol=1e-3, rtol=0)
    heard = loud[:60]
    assert abs(float(heard.mean())) < 1e-5
    assert float(heard.std()) == pytest.approx(0.4, rel=0.05)
    assert torch.equal(levelled(loud, TRUE), loud)
    assert torch.isfinite(levelled(log_mel(np.zeros(400, np.float32), spec), spec)).all()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "PCM_U8", "FLOAT", "DOUBLE"])
def test_a_recording_has_its_samples_whatever_their_width(subtype: str, tmp_path: Path) -> None:
    wave = np.linspace(-1, 0.99, 1000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype=subtype)
    np.testing.assert_allclose(audio(tmp_path / "a.wav"), wave, atol=1 / 128 if subtype == "PCM_U8" else 1e-4)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "m4a"])
def test_channels_are_averaged_and_none_is_lost(suffix: str, tmp_path: Path) -> None:
    """Not the left one alone (VITA), and not louder by the square root of two (libswresample)."""
    rate, path = 44_100, tmp_path / f"a.{suffix}"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    right_only = np.stack([0 * tone, tone], 1).astype(np.float32)
    if suffix == "m4a":
        write_m4a(path, right_only, rate)
    else:
        soundfile.write(path, right_only, rate)
    middle = audio(path, rate)[rate // 4 : rate // 2]
    assert np.abs(middle).max() == pytest.approx(0.25, rel=0.05)
    both = np.stack([tone, tone], 1).astype(np.float32)
    if suffix != "m4a":
        soundfile.write(path, both, rate)
        assert np.abs(audio(path, rate)[rate // 4 : rate // 2]).max() == pytest.approx(0.5, rel=0.05)


def write_m4a(path: Path, wave: np.ndarray, rate: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=rate, layout="stereo" if wave.shape[1] == 2 else "mono")
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(wave.T), "fltp", "stereo" if wave.shape[1] == 2 else "mono"
        )
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_and_its_length_at_another_rate(rate: int, tmp_path: Path) -> None:
    """VITA handed 44.1 kHz samples on as 16 kHz ones."""
    seconds = 1.3
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate), rate)
    found = audio(tmp_path / "a.wav")
    assert len(found) == round(round(seconds * rate) * 16_000 / rate)
    spectrum = np.abs(np.fft.rfft(found * np.hanning(len(found))))
    assert np.argmax(spectrum) * 16_000 / len(found) == pytest.approx(440, abs=1)
    assert np.abs(found[2000:-2000]).max() == pytest.approx(0.5, rel=0.01)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000]))
def test_a_resampled_sound_has_exactly_the_samples_that_layout_counts(num_samples: int, rate: int) -> None:
    found = resample(np.ones(num_samples, np.float32), rate, 16_000)
    assert len(found) == resampled_count(num_samples, rate, 16_000)
    assert found.dtype == np.float32


def test_sounds_that_say_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    for wave, message in (
        (np.zeros(16_000), "is silent (its loudest sample is below 0.0001 of full scale), so there is nothing to hear. Replace the recording"),
        (np.full(16_000, 5e-5), "is silent (its loudest sample is below 0.0001 of full scale), so there is nothing to hear. Replace the recording"),
        (np.zeros(0), "has no samples, so there is nothing to hear. Replace the recording"),
        (np.array([0.5, np.nan, 0.5]), "has samples that are not numbers. Replace the recording"),
        (np.array([0.5, np.inf, 0.5]), "has samples that are not numbers. Replace the recording"),
    ):  # fmt: skip
        soundfile.write(path, wave.astype(np.float32), 16_000, subtype="FLOAT")
        assert refusal(path, "audio") == f"{path}: {message}"
    soundfile.write(path, np.array([0.5]), 96_000)
    assert refusal(path, "audio") == f"{path}: is shorter than one sample at 16000 Hz. Replace the recording"
    soundfile.write(path, np.array([0.5]), 16_000)
    assert len(audio(path)) == 1


def test_a_wav_that_is_shorter_than_its_header_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, noise((16_000,)).astype(np.float32) / 255, 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    assert refusal(path, "audio") == (
        f"{path}: is truncated: its header announces 1000 more bytes than the file has. Copy it again"
    )
    path.write_bytes(whole[:30])
    assert refusal(path, "audio").startswith(f"{path}: not readable as a recording (")


@pytest.mark.parametrize("announced", [0, 0xFFFFFFFF, 0x7FFFF000, 0xFFFFFFFF - 36])
def test_a_wav_from_a_program_that_did_not_know_its_length_is_read(announced: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.5 * np.ones(1000), 16_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = struct.pack("<I", announced)
    path.write_bytes(bytes(data))
    np.testing.assert_allclose(audio(path), 0.5, atol=1e-4)
    assert len(audio(path)) == 1000


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_a_compressed_sound_that_is_shorter_than_its_header_says_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.3 * np.random.default_rng(0).standard_normal(32_000), 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(path, "audio")
    assert message.startswith((f"{path}: is truncated: its header announces", f"{path}: not readable as a recording ("))


def test_a_long_recording_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros((48_000, 8)), 48_000)
    assert refusal(path, "audio", max_samples=1000) == (
        f"{path}: has 48000 samples at 48000 Hz, and at most 1000 samples and 3600 s are decoded. Cut it"
    )
    assert refusal(path, "audio", max_seconds=0.5) == (
        f"{path}: has 48000 samples at 48000 Hz, and at most 172800000 samples and 0 s are decoded. Cut it"
    )


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["WAV", "FLAC", "OGG"]), st.data())
def test_damaged_sound_is_refused_or_survived_and_nothing_else(form: str, data: st.DataObject) -> None:
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.ones(400), 16_000, format=form)
    damaged = bytearray(file.getvalue())
    for at in data.draw(st.lists(st.integers(0, min(len(damaged), 120) - 1), max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    try:
        found = decode_audio(MediaItem("audio", data=bytes(damaged)), 16_000, Limits(max_samples=10_000, max_seconds=5))
    except MediaError:
        return
    assert found.waveform.dtype == np.float32
    assert np.isfinite(found.waveform).all()


# ---------------------------------------------------------------- the reader


MEDIA = MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14), audio=TRUE, video=VideoSpec())
ONE = 3 * 28 * 28
"""Bytes of a prepared picture."""


def test_the_reader_remembers_as_much_as_it_may(picture: Callable[..., Path], tmp_path: Path) -> None:
    reader = MediaReader(MEDIA, cache_mb=1)
    reader._capacity = 3 * ONE
    paths = [picture(f"{i}.png", seed=i) for i in range(5)]
    first = [reader.prepare(MediaItem("image", path=path)) for path in paths]
    assert reader._used == 3 * ONE
    for path in paths:
        path.unlink()
    again = reader.prepare(MediaItem("image", path=paths[4]))
    assert again is first[4]  # from memory: the file is gone
    reader.prepare(MediaItem("image", path=paths[2]))
    for gone in paths[:2]:
        with pytest.raises(MediaError):
            reader.prepare(MediaItem("image", path=gone))


def test_what_was_used_last_is_kept_longest(picture: Callable[..., Path]) -> None:
    reader = MediaReader(MEDIA, cache_mb=1)
    reader._capacity = 2 * ONE
    a, b, c = (MediaItem("image", path=picture(f"{name}.png", seed=i)) for i, name in enumerate("abc"))
    reader.prepare(a), reader.prepare(b), reader.prepare(a), reader.prepare(c)
    assert [key[1] for key in reader._kept] == [a.path, c.path]


def test_what_is_larger_than_all_memory_drives_nothing_out(
    picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    reader = MediaReader(MEDIA, cache_mb=1)
    reader._capacity = ONE
    reader.prepare(MediaItem("image", path=picture()))
    reader.prepare(MediaItem("audio", path=sound(seconds=2.0)))
    assert len(reader._kept) == 1
    assert reader._used == ONE


def test_without_memory_nothing_is_remembered(picture: Callable[..., Path]) -> None:
    reader = MediaReader(MEDIA)
    item = MediaItem("image", path=picture())
    one, two = reader.prepare(item), reader.prepare(item)
    assert isinstance(one, PreparedImage)
    assert isinstance(two, PreparedImage)
    assert one is not two
    assert torch.equal(one.pixels, two.pixels)


def test_many_threads_get_what_one_gets(picture: Callable[..., Path], sound: Callable[..., Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    items = [MediaItem("image", path=picture(f"{i}.png", seed=i)) for i in range(6)]
    items += [MediaItem("audio", path=sound(f"{i}.wav", seed=i)) for i in range(3)]
    alone = [MediaReader(MEDIA).prepare(item) for item in items]
    reader = MediaReader(MEDIA, cache_mb=1)
    reader._capacity = 4 * ONE
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(reader.prepare, items * 5), alone * 5, strict=True):
            if isinstance(found, PreparedImage) and isinstance(expected, PreparedImage):
                assert torch.equal(found.pixels, expected.pixels)
            else:
                assert isinstance(found, PreparedAudio)
                assert isinstance(expected, PreparedAudio)
                assert torch.equal(found.sound[0].features, expected.sound[0].features)
    assert 0 <= reader._used <= 4 * ONE


def test_a_sound_of_thirty_seconds_is_one_chunk_and_a_longer_one_is_two() -> None:
    for spec in (TRUE, WINDOW):
        reader = MediaReader(MediaSpec(audio=spec))
        wave = np.full(480_000 + 160, 0.1, np.float32)
        found = reader.prepare(MediaItem("audio", decoded=Sound(wave[:-1], 16_000)))
        assert isinstance(found, PreparedAudio)
        assert [chunk.features.shape for chunk in found.sound] == [(80, 3000)]
        longer = reader.prepare(MediaItem("audio", decoded=Sound(wave, 16_000)))
        assert isinstance(longer, PreparedAudio)
        assert [chunk.features.shape[1] for chunk in longer.sound] == [3000, 3000 if spec is WINDOW else 2]
