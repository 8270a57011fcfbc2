"""Tiles and patches, against transformers' own processors for pictures without torchvision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaNextProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from avlm.config.io import override
from avlm.config.media import AnyresTiling, InternvlTiling, MediaSpec, VisionSpec
from avlm.config.stage import Augment
from avlm.data.encode import add_tensors
from avlm.data.media.pictures import PreparedImage, in_patches, in_tiles, normalise, prepare_picture
from avlm.data.media.reader import MediaReader
from avlm.data.text.vocabulary import make_tokenizer
from avlm.layout import image_grids, image_token_count
from avlm.recipes import recipe
from avlm.samples import Encoded, MediaItem, Picture, Place

SIDE, CELL = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
ANYRES = VisionSpec(
    image_size_px=SIDE, cell_px=CELL, tiling=AnyresTiling(pinpoints=tuple((a, b) for a, b in PINPOINTS))
)
INTERN = VisionSpec(image_size_px=SIDE, cell_px=CELL, tiling=InternvlTiling())
NAFLEX = VisionSpec(image_size_px=SIDE, cell_px=CELL, max_patches=20, resample="bilinear")
SIZES = [(56, 56), (57, 56), (100, 75), (75, 100), (112, 112), (200, 30), (30, 200), (20, 20), (3, 190), (333, 251)]
"""(height, width)."""
PLAIN: dict[str, Any] = {"do_rescale": False, "do_normalize": False}


def picture(size: tuple[int, int]) -> Picture:
    """Blots of all sizes, so that no shift goes unnoticed."""
    blots = Image.fromarray(np.random.default_rng(0).integers(60, 200, (9, 9, 3), dtype=np.uint8))
    return Picture(np.array(blots.resize(size[::-1], Image.Resampling.BICUBIC)))


def tiles(size: tuple[int, int], spec: VisionSpec) -> Tensor:
    prepared = prepare_picture(picture(size), spec)
    assert prepared.facts.size_px == size
    return in_tiles(prepared, spec)


def within_one_level(found: Tensor, expected: Any) -> None:
    """Grey levels of torch and of Pillow: each rounds twice, so that one value in a thousand may be two apart."""
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float32)
    assert found.shape == expected.shape
    apart = (found.float() - expected).abs()
    assert apart.max() <= 2
    assert (apart > 1).float().mean() < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_any_resolution_sees_what_llava_nexts_processor_shows(size: tuple[int, int]) -> None:
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS, **PLAIN
    )
    theirs = processor(Image.fromarray(picture(size).pixels), return_tensors="pt")
    found = tiles(size, ANYRES)
    assert theirs["image_sizes"].tolist() == [list(size)]
    within_one_level(found, theirs["pixel_values"][0])
    assert len(found) == len(image_grids(ANYRES, size))


def test_any_resolution_counts_as_llava_nexts_whole_processor() -> None:
    """The published numbers, each by its (height, width): pictures in, `<image>` tokens out."""
    tokenizer = make_tokenizer(["what is it"], 300)
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    spec = VisionSpec(image_size_px=336, cell_px=14, tiling=AnyresTiling())
    sizes = [(336, 336), (224, 224), (480, 640), (640, 480), (448, 448), (672, 672), (1080, 1920), (50, 999)]
    for size in sizes:
        ids = processor(Image.new("RGB", size[::-1]), "<image>", return_tensors="pt")["input_ids"][0].tolist()
        assert ids == [tokenizer.convert_tokens_to_ids("<image>")] * image_token_count(spec, size)


@pytest.mark.parametrize("size", SIZES)
def test_internvls_tiles_are_those_of_its_processor(size: tuple[int, int]) -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=12, **PLAIN
    )
    theirs = processor(Image.fromarray(picture(size).pixels), return_tensors="pt")
    found = tiles(size, INTERN)
    within_one_level(found, theirs["pixel_values"])
    assert len(found) == len(image_grids(INTERN, size))
    without = INTERN.model_copy(update={"tiling": InternvlTiling(thumbnail=False)})
    assert torch.equal(tiles(size, without), found[: len(image_grids(without, size))])


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_of_siglip_2s_processor(size: tuple[int, int]) -> None:
    processor = Siglip2ImageProcessorPil(patch_size=CELL, max_num_patches=20, **PLAIN)
    theirs = processor(Image.fromarray(picture(size).pixels), return_tensors="pt")
    (grid,) = image_grids(NAFLEX, size)
    assert theirs["spatial_shapes"].tolist() == [list(grid)]
    (whole,) = tiles(size, NAFLEX)
    within_one_level(in_patches(whole, CELL), theirs["pixel_values"][0, : grid[0] * grid[1]])


def test_the_reader_gives_a_pictures_size_and_remembers_its_detail(tmp_path: Path) -> None:
    reader = MediaReader(MediaSpec(vision=INTERN), cache_mb=1)
    Image.fromarray(picture((50, 101)).pixels).save(tmp_path / "wide.png")
    item = MediaItem("image", path=tmp_path / "wide.png")
    found = reader.prepare(item)
    assert isinstance(found, PreparedImage)
    assert found.facts.size_px == (50, 101)
    assert found.detail is not None and found.detail.shape == (3, SIDE, 2 * SIDE)
    assert reader.prepare(item) is found


@pytest.mark.parametrize("strength", [{"flip": True}, {"shift": 0.2}, {"jitter": 0.4}, {"erase": 0.5}, {}])
@pytest.mark.parametrize(("spec", "size", "whole"), [(INTERN, (56, 112), 2), (ANYRES, (40, 112), 0)])
def test_what_is_cut_is_changed_as_the_whole_is(
    spec: VisionSpec, size: tuple[int, int], whole: int, strength: dict[str, Any]
) -> None:
    """What two tiles show together is what the whole picture shows, in every epoch; padding stays black."""
    spec = spec.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    prepared = prepare_picture(picture(size), spec)
    frame = (SIDE - size[0]) // 2
    touched = 0
    for seed in range(12):
        out = Encoded("a", [], [], [Place("a", 0, ())])
        add_tensors(out, [prepared], MediaSpec(vision=spec), (Augment(**strength), np.random.default_rng(seed)))
        tiles = [255 * tile for tile in out.images]
        seen = tiles.pop(whole)
        together = torch.cat(tiles, 2)
        assert together[:, :frame].abs().sum() == 0
        shown = together[:, frame : frame + size[0]]
        shrunk = F.interpolate(shown[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0].clamp(0, 255)
        assert (shrunk - seen).abs().mean() < 0.5
        touched += bool((seen - prepared.pixels).abs().max() > 20)
    assert touched > 2 if strength else touched == 0


def test_the_page_on_pictures_tells_settings_that_are_and_numbers_that_hold() -> None:
    page = (Path(__file__).parents[3] / "docs" / "pictures.md").read_text()
    told = re.findall(r"`(model\.(?:vision|audio)\.\w+=[^`]+)`", page)
    assert len(told) == 5
    for assignment in told:
        key, _, value = assignment.partition("=")
        changed = override(recipe("tiny"), ["model.vision.connector=mlp", f"{key}={value.strip(chr(39))}"])
        assert getattr(changed.model.vision, key.rpartition(".")[2])
    spec = VisionSpec(image_size_px=336, cell_px=14, tiling=AnyresTiling())
    rows = re.findall(r"^\| (\d+) x (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for height, width, tokens in rows:
        assert image_token_count(spec, (int(height), int(width))) == int(tokens)


@pytest.mark.parametrize("apart", [3, 4])
def test_every_grey_level_is_normalised(apart: int) -> None:
    """Against NumPy in double precision. Colours lie in planes of their own or together."""
    spec = VisionSpec(image_size_px=16, cell_px=8, mean=(0.4814, 0.4578, 0.4082), std=(0.2686, 0.2613, 0.2757))
    levels = np.random.default_rng(0).permuted(np.arange(256 * apart, dtype=np.int64) % 256).astype(np.uint8)
    levels[:256] = np.arange(256)
    lying = levels.reshape(1, 16, 16, apart) if apart == 4 else levels.reshape(1, 3, 16, 16).transpose(0, 2, 3, 1)
    expected = (lying[..., :3] / 255 - np.array(spec.mean)) / np.array(spec.std)
    found = normalise(torch.from_numpy(lying).permute(0, 3, 1, 2)[:, :3], spec)
    assert found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)
