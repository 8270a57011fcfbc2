"""Pictures of other shapes through the whole model: LLaVA-NeXT's numbers, and each picture as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from avlm.config.media import MediaSpec, VisionSpec
from avlm.config.stage import Stage
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.data.media.pictures import in_tiles, normalise, prepare_picture
from avlm.errors import ConfigError, LayoutError
from avlm.eval.benchmarks import evaluate
from avlm.inference.generate import generate
from avlm.inference.sampling import Sampling
from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Clip, MediaItem, Picture, Sample, Text, Turn
from avlm.training.stages import part_modules
from avlm.training.trade import make_head

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
ANYRES = {"tiling": {"kind": "anyres", "pinpoints": PINPOINTS}}
INTERN = {"tiling": {"kind": "internvl", "max_tiles": 6}}
NAFLEX = {"max_patches": 12}
PATCHES = {"model_type": "siglip2_vision_model", "num_patches": 16}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "anyres": ({}, ANYRES),
    "internvl": ({}, INTERN),
    "internvl, pooled": ({}, {**INTERN, "connector": {"kind": "pool", "tokens": 3}}),
    "patches": (PATCHES, NAFLEX),
    "patches, stacked": (PATCHES, {**NAFLEX, "connector": {"kind": "mlp", "stack": 5}}),
}
FRAME = {"anyres": 4, "internvl": 4, "internvl, pooled": 3, "patches": 9, "patches, stacked": 2}
"""Tokens of one square: 2 x 2 cells, or 3 x 3 patches, the largest square of at most 12."""
SIZES = [(28, 28), (30, 70), (70, 30), (56, 56), (20, 90), (3, 140), (61, 47)]
"""(height, width)."""


def picture(size: tuple[int, int]) -> Picture:
    return Picture(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8))


def asked(*sizes: tuple[int, int], answer: str | None = "red", task: str = "") -> Sample:
    items = tuple(MediaItem("image", decoded=picture(size)) for size in sizes)
    turns = [Turn("user", (*items, Text("What is it?")))]
    if answer is not None:
        turns.append(Turn("assistant", (Text(answer),)))
    return Sample("-".join(map(str, sizes)), tuple(turns), task, "here")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


# ---------------------------------------------------------------- LLaVA-NeXT

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "initializer_factor": 3.0,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def both() -> tuple[LlavaNextForConditionalGeneration, AvlmForConditionalGeneration, VisionSpec]:
    """LLaVA-NeXT in transformers and here, with the same weights."""
    torch.manual_seed(0)
    text = {**LLAMA, "num_key_value_heads": 2}
    theirs = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            text_config=text, vision_config=CLIP, image_grid_pinpoints=PINPOINTS, image_token_index=39,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )
    ).eval()  # fmt: skip
    spec = VisionSpec.model_validate({"image_size_px": 28, "cell_px": 7, **ANYRES})
    ours = AvlmForConditionalGeneration(
        AvlmConfig(
            theirs.config.text_config, theirs.config.vision_config, vision_connector={"kind": "mlp"}, image_token_id=39,
            media=MediaSpec(vision=spec).model_dump(mode="json"),
        )
    ).eval()  # fmt: skip
    inner, other = ours.model, theirs.model
    inner.vision_tower.load_state_dict(other.vision_tower.state_dict())
    inner.language_model.model.load_state_dict(other.language_model.state_dict())
    inner.language_model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    with torch.no_grad():
        layers = inner.vision_connector.layers
        for mine, its in (
            (layers[0], other.multi_modal_projector.linear_1),
            (layers[2], other.multi_modal_projector.linear_2),
        ):
            mine.load_state_dict(its.state_dict())
        inner.vision_connector.image_newline.copy_(other.image_newline)
    return theirs, ours, spec


@torch.no_grad()
def test_any_resolution_features_and_logits_are_llava_nexts() -> None:
    theirs, ours, spec = both()
    tiles = [normalise(in_tiles(prepare_picture(picture(size), spec), spec), spec) for size in SIZES]
    sizes = torch.tensor(SIZES)
    padded = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)  # theirs: (pictures, most tiles, 3, side, side)
    expected = theirs.get_image_features(padded, sizes).pooler_output
    found = ours.get_image_features(torch.cat(tiles), sizes).pooler_output
    assert len(found) == len(expected) == len(SIZES)
    for mine, its in zip(found, expected, strict=True):
        close(mine, its)

    ids = torch.tensor([[1, 2, *[i for f in expected for i in [*[39] * len(f), 5]], 7]])
    logits = theirs(ids, pixel_values=padded, image_sizes=sizes).logits
    close(ours(ids, pixel_values=torch.cat(tiles), image_sizes=sizes).logits, logits)


# ---------------------------------------------------------------- all ways alike


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_among_others_is_as_alone(way: str, make_model: Callable[..., Any]) -> None:
    """Packed, padded and one by one: the same features, logits, loss and gradients."""
    encoder, part = WAYS[way]
    model, processor = make_model("vision", vision=encoder, seeing=part)
    alone = [processor.encode(asked(size)) for size in SIZES]
    counts = [len(model.get_image_features(**images(pack([e])))["pooler_output"][0]) for e in alone]
    assert counts == [place.count("image") for e in alone for place in e.places]
    assert len(set(counts)) > 1 or "pool" in way

    samples = [processor.encode(asked(*SIZES[:3])), alone[4], processor.encode(asked(*SIZES[5:]))]
    apart = [pack([sample]) for sample in samples]
    total = sum(row.num_targets() for row in apart)
    expected = sum(loss_of(model, row) * row.num_targets() for row in apart) / total
    theirs = torch.autograd.grad(expected, connector_of(model))

    row = pack(samples)
    loss = loss_of(model, row)
    close(loss, expected)
    for mine, its in zip(torch.autograd.grad(loss, connector_of(model)), theirs, strict=True):
        close(mine, its)
        assert its.abs().sum() > 0
    with torch.no_grad():
        close(model(**processor.collate(samples, "right")).loss, expected)


def connector_of(model: AvlmForConditionalGeneration) -> list[torch.nn.Parameter]:
    return list(part_modules(model)["vision_connector"].parameters())


def images(row: Any) -> dict[str, Any]:
    return {"pixel_values": row.pixel_values, "image_sizes": row.image_sizes}


def loss_of(model: AvlmForConditionalGeneration, row: Any) -> Tensor:
    loss: Tensor = model(
        row.input_ids,
        position_ids=row.position_ids,
        labels=row.labels,
        row_lengths=row.lengths,
        places=row.places,
        **images(row),
    ).loss
    return loss


def test_any_resolution_has_a_newline_that_is_trained_with_the_connector(make_model: Callable[..., Any]) -> None:
    model, _ = make_model("vision", seeing=ANYRES)
    names = [name for name, _ in part_modules(model)["vision_connector"].named_parameters()]
    assert "image_newline" in names
    for part in (INTERN, {}):
        model, _ = make_model("vision", seeing=part)
        assert not any("newline" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_answers_in_a_batch_are_those_alone_after_saving_too(
    way: str, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    encoder, part = WAYS[way]
    made = make_model("vision", vision=encoder, seeing=part)
    save_model(*made, tmp_path / "model")
    again = load_model(tmp_path / "model")
    prompts = [made.processor.encode(asked(size, answer=None), prompt_only=True) for size in SIZES[1:4]]
    sampling = Sampling(max_tokens=5)
    expected = [generate(*made, [prompt], sampling)[0] for prompt in prompts]
    assert generate(*made, prompts, sampling) == expected
    assert generate(*again, prompts, sampling, use_cache=False) == expected

    batch = made.processor(
        text=["What is it?"] * 3, images=[[picture(size).pixels] for size in SIZES[1:4]], padding=True
    )
    assert batch["image_sizes"].tolist() == [list(size) for size in SIZES[1:4]]
    found = again.model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for mine, its in zip(found.tolist(), expected, strict=True):
        assert mine[: len(its)] == its


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_frame_of_a_video_is_one_square(way: str, make_model: Callable[..., Any]) -> None:
    encoder, part = WAYS[way]
    model, processor = make_model("vision", vision=encoder, seeing=part)
    clip = Clip((picture((30, 70)), picture((70, 30))), 2.0, None)
    turn = Turn("user", (MediaItem("video", decoded=clip), MediaItem("image", decoded=picture((30, 70))), Text("x")))
    encoded = processor.encode(Sample("v", (turn, Turn("assistant", (Text("red"),)))))
    row = pack([encoded])
    frames = model.get_video_features(row.pixel_values_videos).pooler_output
    assert [len(f) for f in frames] == [s.count for s in encoded.places[0].segments]
    assert [len(f) for f in frames] == [FRAME[way]] * 2
    assert row.image_sizes is not None and row.image_sizes.tolist() == [[30, 70]]
    assert model(row.input_ids, pixel_values_videos=row.pixel_values_videos, **images(row)).logits.isfinite().all()


def test_a_score_with_swapped_pictures_takes_their_shapes_along(make_model: Callable[..., Any]) -> None:
    model, processor = make_model("vision", seeing=ANYRES)
    rows = [asked(size, task="look") for size in SIZES[1:5]]
    report = evaluate(model, processor, rows, max_tokens=2)
    assert report.tasks["look"].samples == 4 and "image" in report.tasks["look"].swapped
    assert not report.bad


# ---------------------------------------------------------------- refusals


@torch.no_grad()
def test_tiles_that_do_not_belong_to_the_sizes_are_refused(make_model: Callable[..., Any]) -> None:
    model, processor = make_model("vision", seeing=INTERN)
    row = pack([processor.encode(asked((30, 70)))])
    assert row.pixel_values is not None and row.image_sizes is not None
    with pytest.raises(LayoutError) as error:
        model(row.input_ids, pixel_values=row.pixel_values)
    assert str(error.value) == (
        "pixel_values were given without image_sizes, and this model's layout depends on the height and width of each "
        "picture. Prepare the data with the model's own processor"
    )
    with pytest.raises(LayoutError) as error:
        model(row.input_ids, pixel_values=row.pixel_values[1:], image_sizes=row.image_sizes)
    assert str(error.value) == (
        "pixel_values holds 2 tiles, and the 1 pictures of image_sizes have 3. Prepare the data with the model's own "
        "processor"
    )
    with pytest.raises(LayoutError, match="made 9 embeddings of tile 0, and its layout has 2 rows of 2"):
        model.get_image_features(torch.zeros(3, 3, 42, 42), row.image_sizes)


def test_words_of_pictures_in_tiles_are_not_told_place_by_place(make_model: Callable[..., Any]) -> None:
    model, _ = make_model("vision", seeing=INTERN)
    stage = Stage.model_validate(
        {
            "name": "eyes",
            "builds": "vision",
            "rows": "vision",
            "supervise": "words",
            "steps": 1,
            "train": {"vision": {"lr": 1}},
        }
    )
    with pytest.raises(ConfigError, match="stage eyes teaches the vision encoder the words of whole pictures"):
        make_head(model, stage, 0)
