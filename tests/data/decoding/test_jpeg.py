"""JPEG files through libjpeg-turbo itself: Pillow's pixels, and Pillow's word on whatever is in doubt."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from avlm.data.decoding import jpeg
from avlm.data.decoding.decode import Limits, decode_image
from avlm.data.decoding.jpeg import check_jpeg, jpeg_pixels
from avlm.errors import MediaError
from avlm.samples import MediaItem

ITEM = MediaItem("image", data=b"")
WAYS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "not turned to luma": {"keep_rgb": True},
    "other tables": {"quality": 30, "optimize": True},
    "a profile": {"icc_profile": b"\0" * 70_000},
}


def smooth(height: int, width: int, bands: int = 3) -> Image.Image:
    rng = np.random.default_rng(height * 10_000 + width)
    cells = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    return cells if bands == 3 else cells.convert("L")


def stored(image: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 3]))
def test_pixels_are_pillows(way: str, height: int, width: int, bands: int) -> None:
    data = stored(smooth(height, width, bands), **(WAYS[way] if bands == 3 or way != "not turned to luma" else {}))
    found = jpeg_pixels(ITEM, data, (height, width), bands)
    assert found is not None and found.strides == (4 * width, 4, 1)
    np.testing.assert_array_equal(found, by_pillow(data))
    np.testing.assert_array_equal(decode_image(MediaItem("image", data=data)).pixels, by_pillow(data))


@pytest.mark.parametrize("width", [8, 9, 12, 640])
def test_rows_are_where_libjpeg_writes_them_near_the_processor(width: int) -> None:
    """Not at a multiple of 16 bytes, where the width allows: those are written past what is read next."""
    for height in range(3, 60, 7):  # memory that happens to lie in other ways
        found = jpeg_pixels(ITEM, stored(smooth(height, width)), (height, width), 3)
        assert found is not None
        rows = [found[row].ctypes.data % 16 for row in range(height)]
        assert 0 not in rows or width % 2 == 1
        assert rows.count(0) <= -(-height // 4)


@pytest.mark.parametrize("turned", range(10))
@pytest.mark.parametrize("size", [(40, 60), (200, 70), (1, 65)])
def test_pictures_are_upright_as_pillow_turns_them(size: tuple[int, int], turned: int) -> None:
    """Eight ways to hold a camera, and two values that mean nothing."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    data = stored(smooth(*size), exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = decode_image(MediaItem("image", data=data)).pixels
    np.testing.assert_array_equal(found, expected)
    assert found.strides == (4 * found.shape[1], 4, 1)


@pytest.mark.parametrize("turned", [None, 1, 6])
def test_libjpeg_is_asked_where_nothing_is_in_doubt(turned: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pillow(image: object, owned: bool) -> None:
        raise AssertionError("Pillow decoded")

    monkeypatch.setattr("avlm.data.decoding.decode.to_picture", no_pillow)
    exif = Image.Exif()
    if turned is not None:
        exif[ExifTags.Base.Orientation] = turned
    data = stored(smooth(40, 60), exif=exif)
    expected = by_pillow(data) if turned != 6 else np.rot90(by_pillow(data), -1)
    np.testing.assert_array_equal(decode_image(MediaItem("image", data=data)).pixels, expected)


def test_four_colours_are_left_to_pillow() -> None:
    data = stored(smooth(9, 7).convert("CMYK"))
    assert jpeg_pixels(ITEM, data, (9, 7), 4) is None
    np.testing.assert_array_equal(decode_image(MediaItem("image", data=data)).pixels, by_pillow(data))


def test_samplings_that_the_library_has_no_name_for_are_left_to_pillow() -> None:
    """Two rows of three for each of colour: no program writes that."""
    data = stored(smooth(64, 64), subsampling="4:4:4")
    frame = b"\x08\x00\x40\x00\x40\x03\x01"
    assert frame + b"\x11" in data
    data = data.replace(frame + b"\x11", frame + b"\x32")
    assert jpeg_pixels(ITEM, data, (64, 64), 3) is None
    np.testing.assert_array_equal(decode_image(MediaItem("image", data=data)).pixels, by_pillow(data))


def test_pixels_are_pillows_of_a_picture_turned_without_loss() -> None:
    """4:4:1, which is a 4:1:1 turned: of one unit, so that only its header is another."""
    flat = simplejpeg.encode_jpeg(np.asarray(smooth(8, 32)), colorspace="RGB", colorsubsampling="411")
    frame = b"\x08\x00\x08\x00\x20\x03\x01\x41"
    assert frame in flat
    data = flat.replace(frame, b"\x08\x00\x20\x00\x08\x03\x01\x14")
    found = jpeg_pixels(ITEM, data, (32, 8), 3)
    assert found is not None
    np.testing.assert_array_equal(found, by_pillow(data))


@pytest.mark.parametrize("sampling", ["440", "411"])
def test_pixels_are_pillows_of_samplings_that_it_does_not_write(sampling: str) -> None:
    data = simplejpeg.encode_jpeg(np.asarray(smooth(45, 70)), colorspace="RGB", colorsubsampling=sampling)
    found = jpeg_pixels(ITEM, data, (45, 70), 3)
    assert found is not None
    np.testing.assert_array_equal(found, by_pillow(data))


def test_pixels_that_are_lost_are_not_made_up() -> None:
    """Pillow reads each of these in silence."""
    data = stored(smooth(480, 640))
    cut = data[: len(data) * 2 // 3] + END
    zeros = data[: len(data) // 2] + bytes(300) + data[len(data) // 2 + 300 :]
    jumped = stored(smooth(480, 640), restart_marker_rows=1).replace(b"\xff\xd0", b"\xff\xd3", 1)
    for damaged in (cut, zeros, jumped):
        assert by_pillow(damaged).shape == (480, 640, 3)
        with pytest.raises(MediaError, match=r"the image given as data: is damaged: there is .* in it\. Copy the"):
            decode_image(MediaItem("image", data=damaged))


def test_what_other_programs_write_is_left_to_pillow() -> None:
    """Bytes too many before the end, of which libjpeg warns."""
    data = stored(smooth(40, 60))
    more = data[:-2] + bytes(5) + END
    assert jpeg_pixels(ITEM, more, (40, 60), 3) is None
    np.testing.assert_array_equal(decode_image(MediaItem("image", data=more)).pixels, by_pillow(data))


@pytest.mark.parametrize("size", [(8, 7), (10, 7), (9, 6), (9, 8), (1, 1), (7, 9)])
def test_no_more_is_written_than_the_header_tells(size: tuple[int, int]) -> None:
    assert jpeg_pixels(ITEM, stored(smooth(9, 7)), size, 3) is None


def test_a_picture_with_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    item = MediaItem("image", data=stored(smooth(30, 20)))
    monkeypatch.setattr("avlm.data.decoding.decode.jpeg_pixels", None)
    with pytest.raises(MediaError, match="is 20 x 30 pixels, and at most 599 pixels are decoded"):
        decode_image(item, Limits(max_pixels=599))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)  # twice as many are a bomb to Pillow
    with pytest.raises(MediaError, match="are decoded, and it has more"):
        decode_image(item)


END = b"\xff\xd9"


def segment(kind: int, body: bytes) -> bytes:
    return bytes([0xFF, kind]) + (2 + len(body)).to_bytes(2) + body


def frame(kind: int, colours: int) -> bytes:
    return segment(kind, b"\x08\0\x08\0\x08" + bytes([colours]) + b"\x01\x11\0" * colours)


def scan(colours: int) -> bytes:
    return segment(0xDA, bytes([colours]) + b"\x01\0" * colours + b"\0\x3f\0") + b"\x12\xff\0\x34\xff\xd0"


@pytest.mark.parametrize("hidden", ["nothing", "by a restart", "behind tables", "behind an end in a comment"])
def test_endless_scans_are_refused_however_they_are_hidden(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a comment the beginning of a sequential picture, or the end of one; restarts and ends have no length."""
    data = stored(Image.new("L", (8, 8), 9), progressive=True)
    last = data.rindex(b"\xff\xda")
    again, tables = data[last:-2] * 250, data[data.index(b"\xff\xdb") :][:69]
    comment = bytes(0xFFFF - 2 - len(tables) - 4) + frame(0xC0, 1)
    if hidden == "by a restart":
        data = data[:2] + b"\xff\xd0" + tables + segment(0xFE, comment[2:]) + data[2:]
    elif hidden == "behind tables":
        data = b"\xff\xd8\xff\xd9\xff\xd8" + tables + segment(0xFE, comment[3:]) + data[2:]
    elif hidden == "behind an end in a comment":
        again = segment(0xFE, END) + again
    item = MediaItem("image", data=data[:-2] + again + END)
    with pytest.raises(MediaError, match=r"has more than 200 scans, and no more are decoded\. Encode it again"):
        decode_image(item)
    monkeypatch.setattr(jpeg, "MOST_SCANS", 1000)
    assert decode_image(item).pixels.shape == (8, 8, 3)  # so nothing else is wrong with it


@pytest.mark.parametrize(
    ("head", "scans", "refused"),
    [
        (frame(0xC0, 3), scan(3) * 250, False),  # libjpeg reads the first
        (frame(0xC1, 1), scan(1) * 250, False),
        (frame(0xC0, 3), scan(1) * 201, True),  # a colour in each
        (frame(0xC0, 3), scan(1) * 200, False),
        (frame(0xC2, 3), scan(3) * 201, True),
        (frame(0xC2, 3), scan(3) * 9 + END + scan(3) * 250, False),  # another picture's
        (END + frame(0xC2, 3), scan(3) * 201, True),  # tables alone end as pictures do
    ],
)
def test_scans_are_counted_that_go_over_the_picture(head: bytes, scans: bytes, refused: bool) -> None:
    item = MediaItem("image", data=b"")
    told = ""
    try:
        check_jpeg(item, b"\xff\xd8" + head + scans + END)
    except MediaError as error:
        told = str(error)
    assert ("has more than 200 scans" in told) == refused
    assert bool(told) == refused


def test_endless_segments_are_refused() -> None:
    with pytest.raises(MediaError, match=r"has more than 20000 segments, and no more are read\. Encode it again"):
        check_jpeg(MediaItem("image", data=b""), b"\xff\xd8" + segment(0xE5, b"") * 20_001 + END)


def outcome(data: bytes) -> tuple[str, Any]:
    try:
        return "", decode_image(MediaItem("image", data=data), Limits(max_pixels=10_000)).pixels.tolist()
    except MediaError as error:
        return str(error), None


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["4:2:0", "4:4:4", "progressive", "restarts"]), st.data())
def test_damage_has_one_outcome_whoever_decodes(way: str, drawn: st.DataObject) -> None:
    """The pixels or the message that Pillow gives, unless it is known that pixels are lost."""
    damaged = bytearray(stored(smooth(24, 40), **WAYS[way]))
    for at in drawn.draw(st.lists(st.integers(2, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = drawn.draw(st.integers(0, 255))
    found = outcome(bytes(damaged))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        assert found == outcome(bytes(damaged)) or ": is damaged: there is " in found[0]
