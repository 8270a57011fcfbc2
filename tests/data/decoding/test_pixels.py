"""Pixels in Pillow's own memory: the same as a copy's, for as long as they are needed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from avlm.config.media import InternvlTiling, VisionSpec
from avlm.data.decoding import pixels
from avlm.data.decoding.decode import decode_image, to_picture
from avlm.data.decoding.pixels import pixels_of
from avlm.data.media.pictures import in_tiles, prepare_picture
from avlm.samples import MediaItem, Picture

SIDE = 28


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 70), st.integers(1, 70))
def test_the_pixels_are_those_of_the_image_and_outlive_it(height: int, width: int) -> None:
    expected = noise(height, width)
    image = Image.fromarray(expected)
    found = pixels_of(image, owned=True)
    assert found.strides == (4 * width, 4, 1)  # nothing was copied
    del image
    others = [Image.new("RGB", (width, height), (i, i, i)) for i in range(8)]  # would take the memory if it were free
    np.testing.assert_array_equal(found, expected)
    assert len(others) == 8


@pytest.mark.parametrize("size", [(2200, 2000), (3, 600_000), (600_000, 3)])
def test_an_image_of_several_blocks_is_copied(size: tuple[int, int]) -> None:
    expected = noise(*size)
    for owned in (True, False):
        np.testing.assert_array_equal(pixels_of(Image.fromarray(expected), owned=owned), expected)


def test_what_is_somebody_elses_is_copied() -> None:
    image = Image.fromarray(noise(5, 7))
    found = to_picture(image).pixels
    image.paste((0, 0, 0), (0, 0, 7, 5))
    np.testing.assert_array_equal(found, noise(5, 7))


def test_somebody_elses_image_is_not_turned() -> None:
    image = Image.fromarray(noise(5, 7))
    image.getexif()[ExifTags.Base.Orientation] = 6
    np.testing.assert_array_equal(to_picture(image).pixels, np.rot90(noise(5, 7), -1))
    np.testing.assert_array_equal(np.asarray(image), noise(5, 7))


@pytest.mark.parametrize("form", ["+w:3", "u"])
def test_memory_of_another_form_is_not_read(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Schema:
        @staticmethod
        def from_address(address: int) -> Any:
            return type("Head", (), {"format": form.encode(), "children": [0]})

    monkeypatch.setattr(pixels, "_Schema", Schema)
    found = pixels_of(Image.fromarray(noise(5, 7)), owned=True)
    assert found.strides == (21, 3, 1)
    np.testing.assert_array_equal(found, noise(5, 7))


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (40, 30), (28, 90), (20, 20), (3, 300), (9000, 1)])
def test_pictures_are_prepared_alike_from_either_memory(size: tuple[int, int], fit: Any) -> None:
    spec = VisionSpec(image_size_px=SIDE, cell_px=14, fit=fit)
    tiled = VisionSpec(image_size_px=SIDE, cell_px=14, tiling=InternvlTiling())
    file = io.BytesIO()
    Image.fromarray(noise(*size)).save(file, "PNG")
    found = decode_image(MediaItem("image", data=file.getvalue()))
    assert found.pixels.strides[1] == 4
    for each in (spec, tiled):
        alike = in_tiles(prepare_picture(Picture(noise(*size)), each), each)
        assert torch.equal(in_tiles(prepare_picture(found, each), each), alike)


@pytest.mark.parametrize(
    "window", [np.s_[:, :, :3], np.s_[:, :, 1:], np.s_[5:9, :, 1:], np.s_[5:, :, :3], np.s_[::-1, :, :3]]
)
def test_pictures_are_prepared_alike_as_parts_of_other_memory(window: Any) -> None:
    """Whose fourth colour is another's, or behind its end."""
    part = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)[window]
    for size in (SIDE, 14):
        spec = VisionSpec(image_size_px=size, cell_px=14)
        whole = in_tiles(prepare_picture(Picture(np.array(part)), spec), spec)
        assert torch.equal(in_tiles(prepare_picture(Picture(part), spec), spec), whole)
