"""Pictures as vision encoders take them: one square, several tiles, or patches at their own aspect ratio.

Resizing is torch's, on uint8: several times faster than Pillow and within one grey level of it. Whatever lies around it
is NumPy's, whose way from one call to the next is shorter: behind the decoding of a picture, which leaves nothing of
torch in the processor's near memory, each of torch's calls takes ten to thirty microseconds.

Shapes in this file:
    t  tiles of one picture    side  the encoder's square    p  side of a patch    P  patches of one picture
    c  colours: 3, or 4 where they lie four bytes apart, whose fourth is nothing; resizing takes as long
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avlm.config.media import AnyresTiling, InternvlTiling, VisionSpec
from avlm.layout import ImageFacts, Size, best_resolution, patch_grid, tile_grid
from avlm.samples import Picture


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A picture at the sizes that it is looked at, uint8."""

    pixels: Tensor
    """All of it: [3, side, side], or [3, height, width] in whole patches where the encoder keeps its aspect ratio."""
    facts: ImageFacts
    detail: Tensor | None = None
    """[3, height, width], a whole number of tiles each way; None where it is not cut."""


def prepare_picture(picture: Picture, spec: VisionSpec) -> PreparedImage:
    """Resize a picture to everything that the encoder sees of it.

    Source:
        InternVL 1.5 (arXiv:2404.16821, section 3.3), LLaVA-NeXT and SigLIP 2 (arXiv:2502.14786), each as its processor
        in transformers does it, within one grey level.
    """
    size = int(picture.pixels.shape[0]), int(picture.pixels.shape[1])
    if spec.max_patches is not None:
        rows, columns = patch_grid(size, spec.cell_px, spec.max_patches)
        return PreparedImage(
            _resized(_pixels(picture), (rows * spec.cell_px, columns * spec.cell_px), spec), ImageFacts(size)
        )
    detail = None
    if isinstance(spec.tiling, AnyresTiling):
        detail = _framed(_pixels(picture), best_resolution(size, spec.tiling.pinpoints), spec)
    elif spec.tiling is not None and (grid := tile_grid(size, spec)) != (1, 1):
        side = spec.image_size_px
        detail = _resized(_pixels(picture), (grid[0] * side, grid[1] * side), spec)
    return PreparedImage(prepare_image(picture, spec), ImageFacts(size), detail)


def prepare_image(picture: Picture, spec: VisionSpec) -> Tensor:
    """Resize a picture to the encoder's square: uint8 [3, side, side].

    Source:
        Antialiased, as Pillow's within one grey level.
    """
    return _in_square(_pixels(picture), spec)


def _in_square(pixels: np.ndarray, spec: VisionSpec) -> Tensor:
    side, square = spec.image_size_px, pixels
    if spec.fit == "crop":
        square = _centre_square(_shorter_side(pixels, spec))
    elif spec.fit == "pad":
        square = _padded_square(pixels, spec)
    return _planes(_scaled(square, (side, side), spec), pixels)


def _shorter_side(pixels: np.ndarray, spec: VisionSpec) -> np.ndarray:
    """The whole picture with its shorter side as long as the encoder's; the longer one is cut afterwards.

    Source:
        CLIP's processing (arXiv:2103.00020) in transformers' order, which LLaVA-1.5 takes over.
    """
    side = spec.image_size_px
    height, width = pixels.shape[:2]
    longest = int(side * max(height, width) / min(height, width))
    if longest > WIDEST:  # a thin strip must not become large
        return pixels
    return _scaled(pixels, (longest, side) if height > width else (side, longest), spec)


def _resized(pixels: np.ndarray, size: Size, spec: VisionSpec) -> Tensor:
    """uint8 [3, *size] of [height, width, c], a plane for each colour."""
    return _planes(_scaled(pixels, size, spec), pixels)


def _scaled(pixels: np.ndarray, size: Size, spec: VisionSpec) -> np.ndarray:
    """uint8 [*size, c] of [height, width, c]; colours lie as they lay: to part them costs as much as to resize."""
    if pixels.shape[:2] == size:
        return pixels
    one = pixels.reshape(1, *pixels.shape)  # not [None], whose stride of 0 hides from torch how the others lie
    found = F.interpolate(torch.from_numpy(one.transpose(0, 3, 1, 2)), size, mode=spec.resample, antialias=True)
    scaled: np.ndarray = found.numpy()[0].transpose(1, 2, 0)
    return scaled


def _planes(scaled: np.ndarray, pixels: np.ndarray) -> Tensor:
    """uint8 [3, h, w], a plane for each colour, of [h, w, c].

    Four colours side by side are one number, out of which each is shifted: copying them byte by byte takes thrice as
    long.

    Args:
        scaled: What the planes are made of. It is spoiled where it lies in memory of its own.
        pixels: Whose memory is somebody else's.
    """
    if scaled.shape[2] == 3:
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))
    if scaled.strides[1:] != (4, 1) or np.may_share_memory(scaled, pixels):
        scaled = scaled.copy()
    together = scaled.view(np.uint32)[:, :, 0]
    planes = np.empty((3, *together.shape), np.uint8)
    for colour, bits in SHIFTS:
        if bits:
            together >>= bits
        np.copyto(planes[colour], together, casting="unsafe")
    return torch.from_numpy(planes)


SHIFTS = ((0, 0), (1, 8), (2, 8)) if sys.byteorder == "little" else ((2, 8), (1, 8), (0, 8))
"""By how many bits more a number of four bytes is shifted until a colour is its lowest byte."""


def _pixels(picture: Picture) -> np.ndarray:
    """uint8 [height, width, c], in one piece."""
    pixels, base = picture.pixels, picture.pixels.base
    if pixels.strides != (4 * pixels.shape[1], 4, 1) or not isinstance(base, np.ndarray) or not base.flags.c_contiguous:
        return np.ascontiguousarray(pixels)
    first = _address(pixels) - _address(base)
    if first < 0 or first + 4 * pixels.shape[0] * pixels.shape[1] > base.nbytes:  # the last one has no fourth
        return np.ascontiguousarray(pixels)
    return np.ndarray((*pixels.shape[:2], 4), np.uint8, base, first)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _centre_square(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _padded_square(pixels: np.ndarray, spec: VisionSpec) -> np.ndarray:
    """Pad with the mean colour, which is zero after normalising (LLaVA-1.5)."""
    height, width = pixels.shape[:2]
    if max(height, width) > WIDEST:  # a thin strip must not become a square of its length
        share = WIDEST / max(height, width)
        size = max(1, round(height * share)), max(1, round(width * share))
        pixels = _scaled(pixels, size, spec)
        height, width = size
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [round(255 * m) for m in spec.mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels[:, :, :3]
    return square


WIDEST = 8192
"""Longest side, in pixels, that is padded to a square as it is; longer ones are made smaller first."""


def normalise(pixels: Tensor, spec: VisionSpec) -> Tensor:
    """uint8 [..., 3, h, w] to float32, (x / 255 - mean) / std for each colour, within 1e-6 where std is at least 0.1;
    contiguous, however the pixels lie."""
    found = np.empty(pixels.shape, np.float32)
    one = -1, *pixels.shape[-3:]
    for place, picture in zip(found.reshape(one), pixels.numpy().reshape(one), strict=True):
        normalise_into(place, picture, spec.mean, spec.std)
    return torch.from_numpy(found)


def normalise_into(found: np.ndarray, pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """As `normalise` one picture, [3, h, w], written to memory that is there already.

    Multiplied and added: dividing twice takes twice as long.
    """
    scales, shifts = _factors(mean, std)
    np.copyto(found, pixels)
    found *= scales
    found += shifts


@lru_cache
def _factors(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What a colour of 0 to 255 is multiplied with, and what is added then: float32 [3, 1, 1] each."""
    scales = np.array([1 / (255 * of_colour) for of_colour in std], np.float32)
    shifts = np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32)
    return scales[:, None, None], shifts[:, None, None]


def _framed(pixels: np.ndarray, canvas: Size, spec: VisionSpec) -> Tensor:
    """A picture as large as it fits into a canvas, black around it."""
    rows, columns = _inside((pixels.shape[0], pixels.shape[1]), canvas)
    framed = torch.zeros(3, *canvas, dtype=torch.uint8)
    size = rows.stop - rows.start, columns.stop - columns.start
    framed[:, rows, columns] = _resized(pixels, size, spec)
    return framed


def _inside(size: Size, canvas: Size) -> tuple[slice, slice]:
    """Rows and columns of a canvas that a picture takes which is as large as it fits, in the middle."""
    (height, width), (most_high, most_wide) = size, canvas
    by_height, by_width = most_high / height, most_wide / width  # floats as in LLaVA-NeXT: they are rounded up below
    if by_width < by_height:
        high, wide = min(math.ceil(height * by_width), most_high), most_wide
    else:
        high, wide = most_high, min(math.ceil(width * by_height), most_wide)
    top, left = (most_high - high) // 2, (most_wide - wide) // 2
    return slice(top, top + high), slice(left, left + wide)


def changed(item: PreparedImage, spec: VisionSpec, change: Callable[[Tensor], Tensor]) -> PreparedImage:
    """A picture augmented, the same at every size that it is looked at: the whole is made anew of what is cut.

    Args:
        change: uint8 [3, h, w] to the same; what it gives back as it was is left as it was.
    """
    if item.detail is None:
        return replace(item, pixels=change(item.pixels))
    rows = columns = slice(None)
    if isinstance(spec.tiling, AnyresTiling):
        rows, columns = _inside(item.facts.size_px, (item.detail.shape[1], item.detail.shape[2]))
    before = item.detail[:, rows, columns]
    after = change(before)
    if after is before:
        return item
    detail = item.detail.clone()
    detail[:, rows, columns] = after
    return replace(item, pixels=_in_square(after.numpy().transpose(1, 2, 0), spec), detail=detail)


def in_tiles(item: PreparedImage, spec: VisionSpec) -> Tensor:
    """Cut a picture into what the encoder sees, in the order of `layout.image_grids`.

    Returns:
        [t, 3, side, side], or [1, 3, height, width] where the encoder keeps the aspect ratio.
    """
    whole = item.pixels.unsqueeze(0)
    if item.detail is None:
        return whole
    side = spec.image_size_px
    tiles = item.detail.reshape(3, -1, side, item.detail.shape[2] // side, side)
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if isinstance(spec.tiling, InternvlTiling):
        return torch.cat([tiles, whole]) if spec.tiling.thumbnail else tiles
    return torch.cat([whole, tiles])


def in_patches(pixels: Tensor, cell_px: int) -> Tensor:
    """Cut a picture into patches, row by row: [3, height, width] to [P, p * p * 3], colour innermost."""
    patches = pixels.reshape(3, -1, cell_px, pixels.shape[2] // cell_px, cell_px)
    return patches.permute(1, 3, 2, 4, 0).flatten(0, 1).flatten(1)
