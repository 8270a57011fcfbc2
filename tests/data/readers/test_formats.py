"""Every format that people have, written by other libraries or by hand: what is in the file is what comes out."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from bombs import png
from media_files import EVERY, made, photo, picture, sound, tone, track
from PIL import Image, ImageCms

from avlm.config.data import DataConfig
from avlm.data.decoding.decode import decode_audio, decode_image
from avlm.data.decoding.doors import ANYWHERE
from avlm.data.decoding.files import Limits, limits_of, opened
from avlm.data.media.reader import MediaReader
from avlm.errors import MediaError
from avlm.layout import resampled_count
from avlm.samples import MediaItem


def seen(data: bytes) -> np.ndarray:
    """Pixels as int [height, width, 3]."""
    return decode_image(MediaItem("image", data=data)).pixels.astype(int)


def heard(data: bytes, rate: int = 48_000, **cut: Any) -> np.ndarray:
    return decode_audio(MediaItem("audio", data=data, **cut), rate).waveform


def by_ffmpeg(codec: str, layout: str, pixels: np.ndarray) -> bytes:
    """A picture written by FFmpeg."""
    file = io.BytesIO()
    height, width = pixels.shape[:2]
    with av.open(file, "w", format="image2pipe") as out:
        stream = out.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(format=layout, threads=1)  # several write over each other's lines of odd widths
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    return file.getvalue()


def grey_of(pixels: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, as int [height, width, 1]."""
    return np.rint(pixels @ np.array([0.299, 0.587, 0.114]))[..., None].astype(int)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("codec", "layout", "apart"),
    [
        ("png", "rgb24", 0), ("png", "rgba", 0), ("png", "rgb48be", 1), ("png", "rgba64be", 1),
        ("tiff", "rgb24", 0), ("tiff", "rgb48le", 1), ("tiff", "rgba", 0), ("tiff", "rgba64le", 1),
        ("bmp", "bgr24", 0), ("bmp", "bgra", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(36, 48), (1, 1), (7, 3), (33, 101)])
def test_a_picture_by_ffmpeg_is_what_went_in(codec: str, layout: str, apart: int, size: tuple[int, int]) -> None:
    pixels = photo(*size)
    assert np.abs(seen(by_ffmpeg(codec, layout, pixels)) - pixels).max() <= apart


@pytest.mark.parametrize("layout", ["rgb565le", "rgb555le"])
def test_a_bmp_of_sixteen_bits_a_pixel_is_near_what_went_in(layout: str) -> None:
    """Five or six bits for each colour, dithered by FFmpeg."""
    pixels = photo(36, 48)
    assert np.abs(seen(by_ffmpeg("bmp", layout, pixels)) - pixels).mean() < 5


@pytest.mark.parametrize(
    ("codec", "layout"),
    [("png", "gray"), ("png", "ya8"), ("png", "gray16be"), ("png", "ya16be"), ("tiff", "gray"), ("tiff", "gray16le"),
     ("tiff", "ya8"), ("bmp", "gray")],
)  # fmt: skip
def test_grey_by_ffmpeg_is_grey_at_every_depth(codec: str, layout: str) -> None:
    pixels = photo(35, 49)
    found = seen(by_ffmpeg(codec, layout, pixels))
    assert (found == found[..., :1]).all()
    assert np.abs(found - grey_of(pixels)).max() <= 2  # FFmpeg's grey is of limited range on the way


@pytest.mark.parametrize("codec", ["png", "tiff", "bmp"])
def test_one_bit_is_black_and_white(codec: str) -> None:
    pixels = np.where(np.arange(40)[:, None, None] % 3 > 0, 255, 0) * np.ones((1, 50, 3))
    np.testing.assert_array_equal(seen(by_ffmpeg(codec, "monob", pixels.astype(np.uint8))), pixels)


@pytest.mark.parametrize("sampling", ["yuvj420p", "yuvj422p", "yuvj444p"])
def test_a_jpeg_of_any_sampling_is_what_went_in(sampling: str) -> None:
    smooth = np.array(Image.fromarray(photo(6, 8)).resize((97, 65), Image.Resampling.BICUBIC))
    assert np.abs(seen(by_ffmpeg("mjpeg", sampling, smooth)) - smooth).mean() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (15, 9), (16, 16), (65, 31)])
def test_a_progressive_jpeg_is_the_baseline_one(size: tuple[int, int]) -> None:
    whole = picture("JPEG", size=size, quality=95)
    np.testing.assert_array_equal(seen(picture("JPEG", size=size, quality=95, progressive=True)), seen(whole))


def rows_of(values: np.ndarray, bits: int) -> bytes:
    """Rows of a PNG: a filter byte (none), then the samples, the first one in the highest bits."""
    rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    return b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8) for row in rows)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_of_few_bits_written_by_hand(bits: int) -> None:
    """W3C PNG, sections 7.2 and 11.2.3; the second colour is half clear (11.3.2), and lies over white."""
    colours = np.random.default_rng(bits).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    values = np.random.default_rng(0).integers(0, 2**bits, (8, 16))
    palette = [(b"PLTE", colours.tobytes()), (b"tRNS", bytes([255, 128]))]
    expected = colours.astype(float)
    expected[1] = expected[1] * 128 / 255 + 255 * 127 / 255
    data = png(16, 8, rows_of(values, bits), bits, 3, palette)
    assert np.abs(seen(data) - expected[values]).max() <= 1


def test_sixteen_bits_written_by_hand_are_their_upper_half() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (5, 9, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.abs(seen(png(9, 5, rows, bits=16, colour=2)) - values / 257).max() <= 1
    grey = b"".join(b"\0" + row[:, 0].astype(">u2").tobytes() for row in values)
    assert np.abs(seen(png(9, 5, grey, bits=16)) - values[..., :1] / 257).max() <= 1


def test_a_jpeg_for_the_press_is_seen_in_its_colours_whatever_program_wrote_it() -> None:
    """Photoshop inverts, and says so with Adobe's marker; others leave the marker out and mean the same."""
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:, :8], cmyk[:, 8:] = (255, 0, 0, 0), (0, 128, 255, 64)
    file = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(file, "JPEG", quality=100)
    data = file.getvalue()
    at = data.index(b"\xff\xeeAdobe"[:2])
    without = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    share = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:]) / 255
    for version in (data, without):
        assert np.abs(seen(version) - share).max() <= 4


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_what_moves_the_first_frame_is_seen(form: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 10, 10), (10, 250, 10), (10, 10, 250))]
    file = io.BytesIO()
    frames[0].save(
        file, form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert Image.open(file).n_frames == 3
    assert np.abs(seen(file.getvalue()) - (250, 10, 10)).max() <= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_with_exif_stands_upright(form: str, orientation: int) -> None:
    """By a corner that is light in the file, and where the tag says that it belongs (EXIF 2.3, 4.6.4 A)."""
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:12, :20] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(stored).save(file, form, exif=exif, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    found = seen(file.getvalue())
    assert found.shape[:2] == ((40, 24) if orientation >= 5 else (24, 40))
    light = [q.mean() > 200 for half in np.array_split(found, 2, 0) for q in np.array_split(half, 2, 1)]
    corner = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]  # row by row
    assert light == [i == corner for i in range(4)]


def test_a_colour_profile_is_not_applied() -> None:
    """Released encoders were trained on pictures that were read so."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(seen(picture("PNG", icc_profile=profile)), seen(picture("PNG")))


def test_a_picture_whose_download_broke_off_is_refused_and_not_seen_half_grey() -> None:
    for form, end in (("JPEG", "marker"), ("PNG", "chunk")):
        data = picture(form, size=(64, 64))
        for share in (0.5, 0.99):
            broken = data[: int(share * len(data))] + bytes(len(data) - int(share * len(data)))
            with pytest.raises(MediaError) as error:
                seen(broken)
            if form == "JPEG":
                assert str(error.value).endswith(f"is truncated: its end {end} is missing. Copy the picture again")
    thumbnail = picture("JPEG", size=(8, 8))  # which has an end marker of its own
    with_one = data = picture("JPEG", size=(64, 64))
    with_one = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(thumbnail)) + b"Exif\0\0" + thumbnail + data[2:]
    np.testing.assert_array_equal(seen(with_one), seen(data))
    with pytest.raises(MediaError, match="its end marker is missing"):
        seen(with_one[:-200] + bytes(200))
    np.testing.assert_array_equal(seen(data + b"behind the end \xff\xda"), seen(data))  # a telephone's video, say


def test_a_png_whose_pixels_changed_on_the_way_is_refused() -> None:
    data = bytearray(picture("PNG"))
    at = data.index(b"IDAT") - 4
    data[at + 60] ^= 1
    with pytest.raises(MediaError) as error:
        seen(bytes(data))
    assert str(error.value) == (
        f"the image given as data: is damaged: its chunk at byte {at} does not have the checksum that it was written "
        "with. Copy the picture again"
    )


# ---------------------------------------------------------------- recordings


def g711(code: int, law: str) -> float:
    """One sample by ITU-T G.711, tables 1 and 2, full scale 1."""
    code ^= 0xFF if law == "ULAW" else 0x55
    sign, exponent, mantissa = code & 0x80, code >> 4 & 7, code & 15
    if law == "ULAW":
        value = ((2 * mantissa + 33) << exponent) - 33
        return (-value if sign else value) * 4 / 32_768
    value = 2 * mantissa + 1 if exponent == 0 else (2 * mantissa + 33) << (exponent - 1)
    return (value if sign else -value) * 8 / 32_768


@pytest.mark.parametrize(("law", "number"), [("ALAW", 6), ("ULAW", 7)])
def test_telephone_codes_are_decoded_by_their_tables(law: str, number: int) -> None:
    codes = bytes(range(256)) * 2
    form = struct.pack("<HHIIHHH", number, 1, 8000, 8000, 1, 8, 0)
    body = b"WAVEfmt " + struct.pack("<I", 18) + form + b"data" + struct.pack("<I", len(codes)) + codes
    found = heard(b"RIFF" + struct.pack("<I", len(body)) + body, 8000)
    np.testing.assert_allclose(found, [g711(code, law) for code in codes], atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("extensible", [False, True])
def test_whole_numbers_of_every_width_written_by_hand(bits: int, extensible: bool) -> None:
    rng = np.random.default_rng(bits)
    top = 2 ** (bits - 1)
    values = rng.integers(-top, top, (50, 3))
    raw = b"".join(int(v + 128 if bits == 8 else v).to_bytes(bits // 8, "little", signed=bits > 8) for v in values.flat)
    block = 3 * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else 1, 3, 16_000, 16_000 * block, block, bits)
    if extensible:  # Microsoft's WAVEFORMATEXTENSIBLE, with the identifier of PCM
        form += struct.pack("<HHI", 22, bits, 7) + b"\1\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    raw += b"\0" * (len(raw) % 2)
    body = (
        b"WAVEfmt "
        + struct.pack("<I", len(form))
        + form
        + b"LIST\4\0\0\0INFO"
        + b"data"
        + struct.pack("<I", 50 * block)
        + raw
    )
    found = heard(b"RIFF" + struct.pack("<I", len(body)) + body, 16_000)
    np.testing.assert_allclose(found, values.mean(1) / top, atol=1e-6)


COMPRESSED = [
    pytest.param(lambda wave, rate: by_libsndfile(wave, rate, "FLAC"), id="FLAC"),
    pytest.param(lambda wave, rate: by_libsndfile(wave, rate, "MP3"), id="MP3"),
    pytest.param(lambda wave, rate: by_libsndfile(wave, rate, "OGG", "VORBIS"), id="Vorbis"),
    pytest.param(lambda wave, rate: by_libsndfile(wave, rate, "OGG", "OPUS"), id="Opus"),
    pytest.param(lambda wave, rate: track("mp3", "libmp3lame", rate, wave.shape[1], wave=wave), id="MP3 by LAME"),
    pytest.param(lambda wave, rate: track("flac", "flac", rate, wave.shape[1], wave=wave), id="FLAC by FFmpeg"),
    pytest.param(lambda wave, rate: track("ogg", "libopus", rate, wave.shape[1], wave=wave), id="Opus by FFmpeg"),
    pytest.param(lambda wave, rate: track("ipod", "aac", rate, wave.shape[1], wave=wave), id="M4A, AAC"),
    pytest.param(lambda wave, rate: track("ipod", "alac", rate, wave.shape[1], wave=wave), id="M4A, ALAC"),
    pytest.param(lambda wave, rate: track("mp4", "libopus", rate, wave.shape[1], wave=wave), id="MP4, Opus"),
    pytest.param(lambda wave, rate: track("webm", "libopus", rate, wave.shape[1], wave=wave), id="WebM, Opus"),
    pytest.param(lambda wave, rate: track("matroska", "aac", rate, wave.shape[1], wave=wave), id="Matroska, AAC"),
]


def by_libsndfile(wave: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, wave.shape[1], format=form, subtype=subtype) as out:
        for at in range(0, len(wave), 4096):
            out.write(wave[at : at + 4096])
    return file.getvalue()


@pytest.mark.parametrize("write", COMPRESSED)
def test_a_sound_begins_where_it_began_and_ends_where_it_ended(write: Any) -> None:
    """What encoders put before and behind it (up to 2,000 samples) is left out, by LAME's tag, Opus' pre-skip and the
    edit list of MP4; a container whose clock counts milliseconds may be one off."""
    rate, count, click = 48_000, 60_000, 20_000
    wave = 0.01 * np.random.default_rng(0).standard_normal((count, 1)).astype(np.float32)
    wave[click : click + 20] += 0.8
    found = heard(write(wave, rate), rate)
    first = int(np.argmax(np.abs(found) > 0.4))
    assert abs(first - click) <= 3
    assert -rate // 1000 <= len(found) - count <= 1024 + rate // 1000  # a last frame that is not cut short, in Matroska


@pytest.mark.parametrize("write", COMPRESSED)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_channels_of_every_format_are_averaged(write: Any, channels: int) -> None:
    """Not summed, and not louder by the square root of two; a low-frequency channel counts as any other."""
    rate = 48_000
    wave = np.repeat(tone(0.6, rate), channels, 1)
    wave[:, 1:] *= 0.5
    try:
        data = write(wave, rate)
    except (av.FFmpegError, soundfile.LibsndfileError):
        pytest.skip("not a format of six channels")
    middle = slice(rate // 10, rate // 2)
    found, expected = heard(data, rate)[middle], wave.mean(1)[middle]
    share = float((found * expected).sum() / (expected * expected).sum())
    assert share == pytest.approx(1, abs=0.12)  # what compression leaves of it


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_every_rate_keeps_its_pitch_and_its_length(form: str, rate: int) -> None:
    time = np.arange(rate) / rate
    found = heard(by_libsndfile(0.5 * np.sin(2 * np.pi * 440 * time)[:, None], rate, form), 16_000)
    assert len(found) == resampled_count(rate, rate, 16_000) == 16_000
    assert (
        np.abs(found[2000:-2000] - 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)[2000:-2000]).max() < 0.01
    )


@pytest.mark.parametrize("kbps", [24, 64])
def test_an_mp3_that_does_not_count_its_frames_is_heard_to_its_end(kbps: int) -> None:
    """libsndfile guesses their number from the size of the file: more than there are, or fewer."""
    wave = tone(5.0, 24_000)
    loud = np.concatenate([0.001 * wave, wave])
    for options in ({}, {"id3v2_version": "0"}):
        data = track("mp3", "libmp3lame", 24_000, wave=loud, write_xing="0", **options)
        found = heard(data, 24_000)
        assert len(loud) <= len(found) <= len(loud) + 3 * 1152
        assert np.abs(found[-24_000:-3000]).max() > 0.2
        part = heard(data, 24_000, start_s=8.0, end_s=9.5)
        assert len(part) == 36_000
        late = found[8 * 24_000 :][:36_000]
        assert np.abs(part - late)[:-100].max() < 1e-3


def test_a_flac_of_unknown_length_is_heard_to_its_end() -> None:
    data = bytearray(sound("FLAC", seconds=0.7, channels=2))
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)  # STREAMINFO's count of samples (RFC 9639, section 8.2)
    np.testing.assert_array_equal(heard(bytes(data), 16_000), heard(sound("FLAC", seconds=0.7, channels=2), 16_000))


def test_sound_in_fragments_is_as_long_as_what_is_in_them() -> None:
    """Their header says nothing, and FFmpeg guesses."""
    wave = tone(3.0, 48_000)
    found = heard(track("mp4", "aac", 48_000, wave=wave, movflags="frag_every_frame+empty_moov"))
    assert len(wave) <= len(found) <= len(wave) + 2 * 1024


def test_what_is_louder_than_anything_is_no_sound() -> None:
    wave = tone(0.1)
    loud = by_libsndfile(32_768 * wave, 16_000, "WAV", "FLOAT")  # a program that did not scale
    np.testing.assert_allclose(heard(loud, 16_000), 32_768 * wave[:, 0], rtol=1e-5)
    with pytest.raises(MediaError) as error:
        heard(by_libsndfile(1e20 * wave, 16_000, "WAV", "FLOAT"))
    assert "where full scale is 1, so it is no sound. Replace the recording" in str(error.value)


# ---------------------------------------------------------------- files that are no media, or not whole


@pytest.mark.parametrize(
    "name", ["a.opus", "a.ogg", "a.m4a", "h264.mp4", "vp9.webm", "h264.mkv", "mpeg4.avi", "16.wav"]
)
@pytest.mark.parametrize("lost", [1, 100, 0.5])
def test_a_file_that_is_shorter_than_it_says_is_refused_by_its_own_lengths(
    name: str, lost: float, tmp_path: Path
) -> None:
    data = made(name)
    path = tmp_path / name
    path.write_bytes(data[: -lost if isinstance(lost, int) else len(data) // 2])
    kind = EVERY[name][0]
    with pytest.raises(MediaError) as error:
        MediaReader(media()).prepare(MediaItem(kind, path=path))
    message = str(error.value)
    assert message.startswith(f"{path}: is truncated: its header announces ")
    assert message.endswith(" more bytes than the file has. Copy it again")


def media() -> Any:
    from avlm.config.media import AudioSpec, MediaSpec, VisionSpec

    return MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14), audio=AudioSpec())


def test_bytes_behind_a_video_are_nobodys_business() -> None:
    for name in ("h264.mp4", "h264.mkv", "a.m4a"):
        kind = EVERY[name][0]
        for tail in (b"\0" * 50, b"TAG" + b" " * 125):
            MediaReader(media()).prepare(MediaItem(kind, data=made(name) + tail))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {name}\n",
    ],
)
@pytest.mark.parametrize("kind", ["audio", "video"])
def test_a_list_of_other_files_does_not_open_them(text: str, kind: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.ts"
    secret.write_bytes(made("h264.ts"))
    listed = tmp_path / "list.mp4"
    listed.write_text(text.format(path=secret, name=secret.name))
    with pytest.raises(MediaError) as error:
        MediaReader(media()).prepare(MediaItem(kind, path=listed))
    assert "not readable as" in str(error.value)
    MediaReader(media()).prepare(MediaItem(kind, path=secret))  # it could have been


def test_a_member_of_an_archive_is_read_like_a_file(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    parts = {name: made(name) for name in ("baseline.jpg", "16.wav", "a.m4a", "h264.mp4", "a.mp3")}
    archive.write_bytes(b"x" * 512 + b"".join(parts.values()))
    at = 512
    reader = MediaReader(media())
    for name, data in parts.items():
        kind = EVERY[name][0]
        item = MediaItem(kind, path=archive, span=(at, len(data)), title=name)
        with opened(item, Limits()) as file:
            assert file.read() == data
            assert file.seek(-10, io.SEEK_END) == len(data) - 10
            assert file.read(100) == data[-10:]
        alone = reader.prepare(MediaItem(kind, data=data))
        assert type(reader.prepare(item)) is type(alone)
        at += len(data)
    with pytest.raises(MediaError) as error:
        reader.prepare(MediaItem("audio", path=archive, span=(at - 5, 10), title="late.wav"))
    assert str(error.value) == (
        f"{archive} late.wav: ends at byte {at + 5}, and its file has {at} bytes, so it is truncated. Copy it again"
    )


def test_limits_are_settings_of_the_data() -> None:
    assert limits_of(DataConfig().limits, ANYWHERE) == Limits()
    data = DataConfig.model_validate({"limits": {"max_pixels": 100}})
    with pytest.raises(MediaError, match="at most 100 pixels are decoded"):
        decode_image(MediaItem("image", data=made("rgb.png")), limits_of(data.limits, ANYWHERE))
    with pytest.raises(ValueError, match="max_pixels"):
        Limits(max_pixels=10**9)  # Pillow has a limit of its own


def test_a_sound_track_that_decodes_to_nothing_is_refused_and_not_silent() -> None:
    """So short that all of it is what Opus leaves out to begin."""
    data = track("mp4", "libopus", 48_000, wave=tone(0.002, 48_000))
    with pytest.raises(MediaError) as error:
        heard(data)
    assert str(error.value) == "the audio given as data: holds no sound that can be decoded. Replace the file"
