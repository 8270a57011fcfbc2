"""The pixels of a Pillow image without a copy, through the Arrow C data interface that Pillow offers.

Pillow keeps three colours in four bytes and takes as long to hand them over in three as a tenth of decoding a JPEG.
The interface is the one that is stable across versions and compilers: two C structures, whose fields are read here.

Source:
    The Arrow C data interface and its PyCapsule protocol (arrow.apache.org, format/CDataInterface).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from PIL import Image as PILImage


class _Schema(ctypes.Structure):
    """The head of ``struct ArrowSchema``."""

    _fields_ = [
        ("format", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("metadata", ctypes.c_char_p),
        ("flags", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("children", ctypes.POINTER(ctypes.c_void_p)),
    ]


class _Array(ctypes.Structure):
    """The head of ``struct ArrowArray``."""

    _fields_ = [
        ("length", ctypes.c_int64),
        ("null_count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("n_buffers", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("children", ctypes.POINTER(ctypes.c_void_p)),
    ]


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def pixels_of(image: PILImage.Image, *, owned: bool) -> np.ndarray:
    """uint8 [height, width, 3] of an RGB image.

    Args:
        owned: Nobody will change the image any more, so that its memory may be used where it lies; the pixels then are
            four bytes apart.
    """
    found = _borrowed(image) if owned else None
    return _in_bands(image) if found is None else found[:, :, :3]


def _borrowed(image: PILImage.Image) -> np.ndarray | None:
    """uint8 [height, width, 4] in the image's own memory, which lives as long; None where it is not in one piece."""
    try:
        schema, array = image.__arrow_c_array__()
    except (AttributeError, ValueError, MemoryError):  # an old Pillow, or an image of more than one block
        return None
    form = _Schema.from_address(_pointer(schema, b"arrow_schema"))
    if form.format != b"+w:4" or _Schema.from_address(form.children[0]).format != b"C":
        return None
    pixels = _Array.from_address(_pointer(array, b"arrow_array"))
    colours = _Array.from_address(pixels.children[0])
    count = 4 * image.width * image.height
    if (pixels.length, pixels.offset, colours.length, colours.offset) != (count // 4, 0, count, 0):
        return None
    memory: Any = (ctypes.c_uint8 * count).from_address(colours.buffers[1])
    memory.keeps = array  # the capsule lets go of the image's memory when it dies
    return np.frombuffer(memory, np.uint8).reshape(image.height, image.width, 4)


BAND = 2**20
"""Bytes of a picture that are copied at once."""


def _in_bands(image: PILImage.Image) -> np.ndarray:
    """A copy; of a large image in bands, because Pillow itself copies what it hands over twice."""
    rows = max(1, BAND // (3 * image.width))
    if rows >= image.height:
        return np.array(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels
