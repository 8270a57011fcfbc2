"""JPEG files through libjpeg-turbo itself: Pillow's pixels, and Pillow's word on whatever is in doubt."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from avlm.data.decoding import jpeg
from avlm.data.decoding.decode import Limits, decode_image
from avlm.data.decoding.jpeg import jpeg_pixels
from avlm.errors import MediaError
from avlm.samples import MediaItem

pytestmark = pytest.mark.skipif(jpeg.simplejpeg is None, reason="simplejpeg has no wheel for this system")

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
    found = jpeg_pixels(data, (height, width))
    assert found is not None and found.strides == (4 * width, 4, 1)
    np.testing.assert_array_equal(found, by_pillow(data))
    np.testing.assert_array_equal(decode_image(MediaItem("image", data=data)).pixels, by_pillow(data))


@pytest.mark.parametrize("turned", range(9))
def test_pictures_are_upright_whoever_decodes_them(turned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ways to hold a camera, and one value that means nothing."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    item = MediaItem("image", data=stored(smooth(40, 60), exif=exif))
    found = decode_image(item).pixels
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    np.testing.assert_array_equal(found, decode_image(item).pixels)
    assert found.shape == ((60, 40, 3) if turned > 4 else (40, 60, 3))


def test_four_colours_are_left_to_pillow() -> None:
    data = stored(smooth(9, 7).convert("CMYK"))
    assert jpeg_pixels(data, (9, 7)) is None
    np.testing.assert_array_equal(decode_image(MediaItem("image", data=data)).pixels, by_pillow(data))


@pytest.mark.parametrize("size", [(8, 7), (10, 7), (9, 6), (9, 8), (1, 1), (7, 9)])
def test_no_more_is_written_than_the_header_tells(size: tuple[int, int]) -> None:
    assert jpeg_pixels(stored(smooth(9, 7)), size) is None


def test_a_picture_with_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    item = MediaItem("image", data=stored(smooth(30, 20)))
    monkeypatch.setattr("avlm.data.decoding.decode.jpeg_pixels", None)
    with pytest.raises(MediaError, match="is 20 x 30 pixels, and at most 599 pixels are decoded"):
        decode_image(item, Limits(max_pixels=599))


def outcome(data: bytes) -> tuple[str, Any]:
    try:
        return "", decode_image(MediaItem("image", data=data), Limits(max_pixels=10_000)).pixels.tolist()
    except MediaError as error:
        return str(error), None


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["4:2:0", "4:4:4", "progressive", "restarts"]), st.data())
def test_damage_has_one_outcome_whoever_decodes(way: str, drawn: st.DataObject) -> None:
    """The pixels or the message that Pillow gives; where there is a warning, it is Pillow that decides."""
    damaged = bytearray(stored(smooth(24, 40), **WAYS[way]))
    for at in drawn.draw(st.lists(st.integers(2, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] = drawn.draw(st.integers(0, 255))
    found = outcome(bytes(damaged))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        assert found == outcome(bytes(damaged))
