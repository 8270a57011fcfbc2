"""What the units of an H.264 stream say, in streams that x264 wrote and in none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avlm.data.decoding.h264 import LONGEST, MOST_SETTINGS, brings_fields, has_fields, is_idr, is_spare


def written(path: Path, **options: Any) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=5, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height, stream.pix_fmt = 96, 64, options.pop("pix_fmt", "yuv420p")
        for i in range(4):
            pixels = np.full((64, 96, 3), 40 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return path


WAYS: dict[str, dict[str, Any]] = {
    "high": {},
    "baseline": {"profile": "baseline"},
    "main": {"profile": "main"},
    "4:4:4": {"pix_fmt": "yuv444p"},
    "ten bits": {"pix_fmt": "yuv420p10le"},
    "order told otherwise": {"bf": 0, "x264-params": "bframes=0"},
    "read over and over": {"g": 1},
}


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fields", [False, True])
def test_a_file_says_whether_its_pictures_may_be_fields(fields: bool, way: str, ending: str, tmp_path: Path) -> None:
    if fields and way == "baseline":
        pytest.skip("the profile has none")
    path = written(tmp_path / f"a.{ending}", **WAYS[way], **({"flags": "+ilme+ildct"} if fields else {}))
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        told = bytes(stream.codec_context.extradata)
        packet = bytes(next(file.demux(stream)))
    assert has_fields(told) is fields
    length = int.from_bytes(told[6:8])
    unit = told[8 : 8 + length]
    assert brings_fields(len(unit).to_bytes(4) + unit + packet, 4) is fields
    assert brings_fields(b"\0\0\1" + unit, None) is fields
    assert not brings_fields(packet, 4)
    assert is_idr(packet, 4)


def test_what_is_cut_off_or_more_than_can_be_may_be_anything(tmp_path: Path) -> None:
    with av.open(str(written(tmp_path / "a.mp4"))) as file:
        told = bytes(file.streams.video[0].codec_context.extradata)
    assert not has_fields(told)
    assert all(has_fields(told[:count]) for count in range(12))
    unit = told[8 : 8 + int.from_bytes(told[6:8])]
    assert not brings_fields((b"\0\0\1" + unit) * MOST_SETTINGS, None)
    assert brings_fields((b"\0\0\1" + unit) * (MOST_SETTINGS + 1), None)
    assert brings_fields(b"\0\0\1\x67" + b"\x55" * 3 + bytes(10 * LONGEST), None)


@given(st.binary(max_size=400), st.sampled_from([None, 1, 2, 4]))
def test_no_bytes_are_too_strange(data: bytes, length_bytes: int | None) -> None:
    for found in (
        is_idr(data, length_bytes),
        is_spare(data, length_bytes),
        brings_fields(data, length_bytes),
        has_fields(b"\1" + data),
    ):
        assert isinstance(found, bool)


def test_an_idr_picture_is_told_from_others_in_either_form() -> None:
    idr, other, words = b"\x65\x88\x84", b"\x41\x9a\x00", b"\x06\x05\x01"
    for count in (1, 2, 4):
        parted = [len(unit).to_bytes(count) + unit for unit in (words, other, idr)]
        assert is_idr(b"".join(parted), count)
        assert not is_idr(b"".join(parted[:2]), count)
    assert is_idr(b"\0\0\0\1" + words + b"\0\0\1" + idr, None)
    assert not is_idr(b"\0\0\0\1" + words + b"\0\0\1" + other, None)
    assert not is_idr(b"", 4)


def test_a_picture_that_no_other_is_made_from_is_told_from_others() -> None:
    alone, referred, settings, words = b"\x01\x9a\x00", b"\x41\x9a\x00", b"\x68\x9a", b"\x06\x05\x01"
    for units, expected in (
        ([alone], True),
        ([words, alone, alone], True),
        ([b"\x09\xf0", alone], True),
        ([alone, referred], False),  # two fields
        ([settings, alone], False),  # others need them too
        ([referred], False),
        ([b"\x65\x88"], False),
        ([], False),
    ):
        assert is_spare(b"".join(len(unit).to_bytes(4) + unit for unit in units), 4) == expected
        assert is_spare(b"".join(b"\0\0\1" + unit for unit in units), None) == expected
