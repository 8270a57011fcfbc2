"""What is read off a plain header is what Pillow and libsndfile say of the file."""

from __future__ import annotations

import io
import struct
from functools import cache

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avlm.config.media import AudioSpec, MediaSpec, VisionSpec
from avlm.data.decoding import headers
from avlm.data.decoding.decode import decode_image
from avlm.data.decoding.headers import measure
from avlm.data.decoding.plain import plain_jpeg, plain_jpeg_size, plain_wav_length
from avlm.errors import MediaError
from avlm.samples import MediaItem

MEDIA = MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14), audio=AudioSpec())


@cache
def jpeg(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert({"grey": "L", "four inks": "CMYK"}.get(kind, "RGB"))
    more = {
        "progressive": {"progressive": True},
        "comment": {"comment": b"hello"},
        "profile": {"icc_profile": bytes(range(256)) * 8},
        "long profile": {"icc_profile": bytes(range(256)) * 40},
        "turned": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    }
    file = io.BytesIO()
    image.save(file, "JPEG", **more.get(kind, {}))
    return file.getvalue()


@cache
def wav(form: str, channels: int) -> bytes:
    wave = np.random.default_rng(0).normal(0, 0.1, (50, channels))
    file = io.BytesIO()
    soundfile.write(file, wave, 11_025, format="WAV", subtype=form)
    return file.getvalue()


PLAIN_JPEGS = ["", "grey", "progressive", "comment", "profile", "long profile", "four inks"]


@pytest.mark.parametrize("kind", PLAIN_JPEGS)
def test_plain_pictures(kind: str) -> None:
    assert plain_jpeg_size(io.BytesIO(jpeg(kind))) == (20, 30)


def test_pictures_that_say_more_are_left_to_pillow() -> None:
    assert plain_jpeg_size(io.BytesIO(jpeg("turned"))) is None
    found = measure(MediaItem("image", data=jpeg("turned")), MEDIA)
    assert found is not None and found.size_px == (30, 20)  # type: ignore[union-attr]
    for data in (b"", b"\xff\xd8\xff", jpeg("")[:100], b"\x89PNG" + jpeg("")[4:]):
        assert plain_jpeg_size(io.BytesIO(data)) is None


def test_a_file_that_ends_in_the_head_of_its_scan_is_told_as_by_pillow() -> None:
    scan = jpeg("").index(b"\xff\xda")
    data = jpeg("")[:scan] + b"\xff\xda\0\2"
    found = plain_jpeg(data)
    assert found is not None and (found.size, found.colours, found.scan, found.at_once) == ((20, 30), 3, scan, False)
    whole = plain_jpeg(jpeg(""))
    assert whole is not None and whole.at_once and whole._replace(at_once=False) == found
    with pytest.raises(MediaError, match="is truncated: its end marker is missing"):
        decode_image(MediaItem("image", data=data))
    for kind, colours, at_once in (("grey", 1, True), ("four inks", 4, True), ("progressive", 3, False)):
        told = plain_jpeg(jpeg(kind))
        assert told is not None and (told.colours, told.at_once) == (colours, at_once)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("form", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "PCM_U8", "ULAW", "DOUBLE"])
def test_plain_recordings(form: str, channels: int) -> None:
    data = wav(form, channels)
    found = plain_wav_length(io.BytesIO(data), len(data))
    if form == "PCM_16" and channels < 3:
        assert found == (50, 11_025)
    assert found in (None, (50, 11_025))


def test_a_header_of_its_own_order_is_left_to_libsndfile() -> None:
    data = wav("PCM_16", 1)
    for changed in (data[:-2], data + b"\0\0", data[:4] + b"\0\0\0\0" + data[8:], data[:36] + b"LIST" + data[40:]):
        assert plain_wav_length(io.BytesIO(changed), len(changed)) is None


def told(item: MediaItem) -> str:
    """What is measured, or what is said against it."""
    try:
        return str(measure(item, MEDIA))
    except MediaError as error:
        return str(error)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, header: int) -> bytes:
    """A file with some bytes of its header changed, put in or left out."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, min(header, len(data)) - 1))
        new = draw(st.sampled_from([0, 1, 2, 3, 8, 16, 255]) | st.integers(0, 255))
        if draw(st.integers(0, 3)):
            data[at] = new
        else:
            data[at : at + draw(st.integers(0, 1))] = bytes([new])
    return bytes(data[: draw(st.integers(1, len(data)))] if draw(st.integers(0, 5)) == 0 else data)


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_damage_is_told_as_by_the_decoders(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*PLAIN_JPEGS, "turned", "PCM_16", "PCM_24", "FLOAT"]))
    if kind in (*PLAIN_JPEGS, "turned"):
        item = MediaItem("image", data=data.draw(damaged(jpeg(kind), jpeg(kind).index(b"\xff\xda") + 14)))
    else:
        item = MediaItem("audio", data=data.draw(damaged(wav(kind, data.draw(st.integers(1, 2))), 60)))
    quick = told(item)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headers, "plain_jpeg_size", lambda _: None)
        patch.setattr(headers, "plain_wav_length", lambda *_: None)
        slow = told(item)
    assert quick == slow


def test_limits_hold_for_plain_files_too() -> None:
    from avlm.data.decoding.files import Limits

    picture, sound = MediaItem("image", data=jpeg("")), MediaItem("audio", data=wav("PCM_16", 1))
    with pytest.raises(MediaError, match="is 30 x 20 pixels, and at most 599 pixels are decoded"):
        measure(picture, MEDIA, Limits(max_pixels=599))
    with pytest.raises(MediaError, match="50 samples at 11025 Hz, and at most 49 samples"):
        measure(sound, MEDIA, Limits(max_samples=49))
    fast = bytearray(sound.data or b"")
    fast[24:32] = struct.pack("<II", 2_000_000, 4_000_000)
    with pytest.raises(MediaError, match="2000000 samples a second"):
        measure(MediaItem("audio", data=bytes(fast)), MEDIA)
