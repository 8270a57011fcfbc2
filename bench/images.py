"""Pictures: a JPEG file's bytes to what a vision encoder takes, against transformers' processors.

transformers' are the processors that a user without torchvision gets, behind Pillow's decoding.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from harness import Case, Table, timed
from material import jpeg
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from avlm.config.media import AnyresTiling, InternvlTiling, VisionSpec
from avlm.data.decoding.decode import decode_image
from avlm.data.media.pictures import in_tiles, normalise, prepare_image, prepare_picture
from avlm.samples import MediaItem, Picture

SIZES = ((320, 240), (640, 480), (1280, 960), (4000, 3000))
BAR = 3.0
COLOURS = {"mean": tuple(OPENAI_CLIP_MEAN), "std": tuple(OPENAI_CLIP_STD)}
CLIP = VisionSpec(image_size_px=336, cell_px=14, **COLOURS)
CROP = VisionSpec(image_size_px=336, cell_px=14, fit="crop", **COLOURS)
SIGLIP = VisionSpec(image_size_px=384, cell_px=14, mean=(0.5,) * 3, std=(0.5,) * 3)
ANYRES = VisionSpec(image_size_px=336, cell_px=14, tiling=AnyresTiling(), **COLOURS)
INTERN = VisionSpec(
    image_size_px=448, cell_px=14, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), tiling=InternvlTiling()
)


def kinds() -> dict[str, tuple[VisionSpec, object]]:
    """What is prepared, and the processor of transformers that does the same."""
    square = {"height": 336, "width": 336}
    return {
        "CLIP-336": (CLIP, CLIPImageProcessor(size=square, do_center_crop=False)),
        "CLIP-336, centre crop": (CROP, CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=square)),
        "SigLIP-384": (SIGLIP, SiglipImageProcessor(size={"height": 384, "width": 384}, resample=3)),
        "LLaVA-NeXT tiles": (
            ANYRES, LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=square)
        ),
        "InternVL tiles": (
            INTERN,
            GotOcr2ImageProcessorPil(
                size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12,
                image_mean=INTERN.mean, image_std=INTERN.std,
            ),
        ),
    }  # fmt: skip


def ours(picture: Picture, spec: VisionSpec) -> torch.Tensor:
    return normalise(in_tiles(prepare_picture(picture, spec), spec), spec)


def sides(
    data: bytes, spec: VisionSpec, processor: Callable[..., dict[str, torch.Tensor]]
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Both from the bytes of the file on."""

    def theirs() -> torch.Tensor:
        with Image.open(io.BytesIO(data)) as image:
            return processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]

    item = MediaItem("image", data=data)
    return lambda: ours(decode_image(item), spec), theirs


def loaded(data: bytes) -> Picture:
    """What cannot be left out: libjpeg's decoding, to memory that it is quick with."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    pixels = np.empty(4 * height * width + 4, np.uint8)[4:].reshape(height, width, 4)
    return Picture(simplejpeg.decode_jpeg(data, colorspace="RGBA", buffer=pixels)[:, :, :3])


def within_one_level(found: torch.Tensor, expected: torch.Tensor, spec: VisionSpec) -> None:
    """Both sides round twice while they resize, so one value in a thousand may be two levels apart."""
    levels = (found - expected.reshape(found.shape)).abs() * torch.tensor(spec.std)[:, None, None] * 255
    assert levels.max() < 2.01, levels.max()
    assert (levels > 1.01).float().mean() < 1e-3


def apart_of(what: str, data: bytes, spec: VisionSpec, processor: Callable[..., object], rounds: int) -> list[Case]:
    """What there is to do without decoding, and what decoding and resizing leave to be won."""
    picture, image = decode_image(MediaItem("image", data=data)), Image.open(io.BytesIO(data)).convert("RGB")
    _, theirs = sides(data, spec, processor)  # type: ignore[arg-type]
    return [
        Case(
            f"{what}, from pixels on",
            lambda: ours(picture, spec),
            {"transformers": lambda: processor(image, return_tensors="pt")},
            rounds,
        ),
        Case(
            f"{what}, loading alone",
            lambda: loaded(data),
            {"transformers": theirs},
            rounds,
        ),
        Case(
            f"{what}, loading and resizing alone",
            lambda: prepare_image(loaded(data), spec),
            {"transformers": theirs},
            rounds,
        ),
    ]


def main() -> list[Table]:
    """Every size for CLIP; for the others those in the middle."""
    whole = Table(
        "images",
        "Pictures: a JPEG's bytes to normalised float32",
        "ms",
        ["Ours against transformers' processors without torchvision, to which Pillow decodes; decoding is included."],
    )
    apart = Table(
        "images_apart",
        "Pictures: what decoding has to do with it",
        "ms",
        [
            "Without decoding: from decoded pixels on. The limits: libjpeg-turbo's decoding of the same file, and "
            "torch's resizing behind it, against all that transformers' user does. No side that decodes and resizes "
            "with them can be faster than that.",
        ],
    )
    for name, (spec, processor) in kinds().items():
        for width, height in SIZES if name == "CLIP-336" else SIZES[1:3]:
            data = jpeg(width, height)
            mine, theirs = sides(data, spec, processor)
            rounds = 40 if width < 2000 else 7  # of some milliseconds, each of which anything disturbs
            what = f"{name}, {width} x {height}"
            case = Case(
                what, mine, {"transformers": theirs}, rounds, BAR,
                check=lambda mine=mine, theirs=theirs, spec=spec: within_one_level(mine(), theirs(), spec),
            )  # fmt: skip
            whole.lines += timed(case)
            if "tiles" not in name:
                apart.lines += [line for one in apart_of(what, data, spec, processor, rounds) for line in timed(one)]
    return [whole, apart]
