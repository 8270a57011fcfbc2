"""Every way of fitting a picture, against the processor in transformers that defines it, on likenesses of photographs.

Each picture is larger or smaller than the encoder's square, of odd aspect ratios, in colour or grey, and comes as the
file that a camera, a program or a page would have written.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from media_files import photo
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from avlm.config.media import AnyresTiling, InternvlTiling, VisionSpec
from avlm.data.decoding.decode import decode_image
from avlm.data.media.pictures import in_patches, in_tiles, normalise, prepare_picture
from avlm.samples import MediaItem

SIDE, CELL = 112, 14
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]
BASE: dict[str, Any] = {"image_size_px": SIDE, "cell_px": CELL}
CLIPS: dict[str, Any] = {**BASE, "mean": CLIP_MEAN, "std": CLIP_STD}
SHORTEST = {"shortest_edge": SIDE}
KINDS: dict[str, tuple[VisionSpec, Any]] = {
    "stretch, bicubic (SigLIP)": (VisionSpec(**BASE), SiglipImageProcessorPil(size=SQUARE)),
    "stretch, bilinear (ViT)": (VisionSpec(**BASE, resample="bilinear"), ViTImageProcessorPil(size=SQUARE)),
    "crop (CLIP)": (VisionSpec(**CLIPS, fit="crop"), CLIPImageProcessorPil(size=SHORTEST, crop_size=SQUARE)),
    "pad (LLaVA-1.5)": (
        VisionSpec(**CLIPS, fit="pad"),
        LlavaImageProcessorPil(size=SHORTEST, crop_size=SQUARE, do_pad=True),
    ),
    "any resolution (LLaVA-NeXT)": (
        VisionSpec(**CLIPS, tiling=AnyresTiling(pinpoints=tuple((a, b) for a, b in PINPOINTS))),
        LlavaNextImageProcessorPil(size=SHORTEST, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS),
    ),
    "tiles (InternVL)": (
        VisionSpec(**CLIPS, tiling=InternvlTiling()),
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=12),
    ),
    "patches (SigLIP 2, NaFlex)": (
        VisionSpec(**BASE, max_patches=64, resample="bilinear"),
        Siglip2ImageProcessorPil(patch_size=CELL, max_num_patches=64),
    ),
}
SIZES = [(112, 112), (480, 640), (640, 427), (37, 61), (90, 50), (113, 111), (64, 900), (700, 45), (1080, 1920)]
"""(height, width)."""


def within_one_level(found: Tensor, expected: Tensor, std: tuple[float, ...], channels_last: bool) -> None:
    """In grey levels, after normalising, but for one value in a thousand: both round after each direction.

    Both cut off what bicubic interpolation overshoots after the first direction. For torch, torchvision and Pillow 12
    that is the horizontal one; Pillow 13 takes the vertical one first where a picture becomes lower and wider, so that
    there, beside edges, those few values are further apart.
    """
    assert found.shape == expected.shape
    scale = torch.tensor(std) * 255
    scale = scale.repeat(found.shape[-1] // 3) if channels_last else scale[:, None, None]
    apart = (found - expected).abs() * scale
    assert float(apart.max()) < 8
    assert float((apart > 1.01).float().mean()) < 1e-3


def as_read(pixels: np.ndarray, form: str) -> tuple[MediaItem, Image.Image]:
    """A file, and how the processor's own users would open it."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image.convert("L") if form == "grey" else image
    image.save(file, "JPEG" if form == "JPEG" else "PNG", **({"quality": 85} if form == "JPEG" else {}))
    return MediaItem("image", data=file.getvalue()), Image.open(file).convert("RGB")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "grey"])
def test_from_the_file_to_the_encoder_it_is_what_transformers_gives(
    name: str, size: tuple[int, int], form: str
) -> None:
    spec, processor = KINDS[name]
    item, image = as_read(photo(*size, seed=size[0]), form)
    theirs = processor(image, return_tensors="pt")["pixel_values"].float()
    picture = decode_image(item)
    np.testing.assert_array_equal(picture.pixels, np.asarray(image))
    pixels = normalise(in_tiles(prepare_picture(picture, spec), spec), spec)
    if spec.max_patches is not None:
        patches = in_patches(pixels[0], CELL)
        within_one_level(patches, theirs[0, : len(patches)], spec.std, channels_last=True)
        assert not theirs[0, len(patches) :].any()
        return
    theirs = theirs[0] if theirs.ndim == 5 else theirs
    within_one_level(pixels, theirs, spec.std, channels_last=False)
