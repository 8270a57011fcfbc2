"""Recipes at full size, on the meta device: parameters as published, tokens as the systems themselves count."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from avlm.config.model import ModelConfig, Source
from avlm.config.released import RELEASED
from avlm.convert.compose import skeleton
from avlm.layout import VideoFacts, audio_token_count, image_segments, video_segments
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.recipes import recipe
from avlm.training.stages import part_modules

LLAMA_7B, LLAMA_13B, LLAMA3_8B, MISTRAL_7B = 6_738_415_616, 13_015_864_320, 8_030_261_248, 7_241_732_096
MIXTRAL, QWEN2_7B = 46_702_792_704, 7_615_616_512
CLIP_L_336, INTERNVIT_300M = 303_507_456, 304_010_000  # the second is published in millions: 304.01
WHISPER_V2_ENCODER, WHISPER_V3_ENCODER = 636_784_640, 636_968_960
WHALE = 357_950_464


@cache
def model(name: str, **arguments: str) -> AvlmForConditionalGeneration:
    config = recipe(name, **arguments).model
    assert isinstance(config, ModelConfig)
    return skeleton(config)


def counts(name: str, **arguments: str) -> dict[str, int]:
    modules = part_modules(model(name, **arguments))
    return {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()}


def mlp(width: int, out: int) -> int:
    return width * out + out + out * out + out


def test_llava_has_as_many_parameters_as_published() -> None:
    small = counts("neva.llava15_7b")
    assert small == {"vision": CLIP_L_336, "vision_connector": mlp(1024, 4096), "language": LLAMA_7B}
    assert sum(small.values()) == 7_062_902_784  # transformers' 7,063,427,072 less the 64 rows that it adds twice
    assert counts("neva.llava15_13b") == {
        "vision": CLIP_L_336, "vision_connector": mlp(1024, 5120), "language": LLAMA_13B,
    }  # fmt: skip


def test_the_older_neva_has_one_matrix() -> None:
    assert counts("neva.classic")["vision_connector"] == 1024 * 4096 + 4096


@pytest.mark.parametrize("senses", ["both", "vision", "audio"])
def test_avlm_has_llama_clip_and_whisper(senses: str) -> None:
    expected = {"language": LLAMA3_8B}
    if senses != "audio":
        expected |= {"vision": CLIP_L_336, "vision_connector": mlp(1024, 4096)}
    if senses != "vision":
        expected |= {"audio": WHISPER_V3_ENCODER, "audio_connector": mlp(1280, 4096)}
    assert counts("avlm.8b", senses=senses) == expected


def test_hearing_models_have_the_published_connectors() -> None:
    blog = counts("audio.mistral_7b")
    assert blog["audio_connector"] == 5_245_440
    assert blog["language"] == MISTRAL_7B + 2 * 2 * 4096  # two tokens more than Mistral's own
    assert blog["audio"] == WHISPER_V3_ENCODER
    assert counts("audio.qwen_audio")["audio"] == WHISPER_V3_ENCODER
    assert counts("audio.salmonn")["audio"] == WHISPER_V2_ENCODER
    # arXiv-less: the released projector of 8 frames, 1280 wide each, to 4096 by way of a gated 4096
    assert counts("audio.ultravox")["language"] == LLAMA3_8B


def test_vitas_connectors_are_a_shuffle_and_a_convolution() -> None:
    """Squares of four embeddings of 1024 through two layers; five of 1024 to 2048 channels, norm, one matrix."""
    for name, width, prompts in (("vita.8x7b", 4096, 0), ("vita15.7b", 3584, 25)):
        found = counts(name)
        first, second = (4 * 1024) * width + width, width * width + width
        assert found["vision_connector"] == first + second
        conv, norm, linear = 5 * 1024 * 2048 + 2048, 2 * 2048, 2048 * width + width
        assert found["audio_connector"] == conv + norm + linear + prompts * width


def test_salmonns_connector_is_a_q_former_of_two_layers_behind_two_norms() -> None:
    """BERT's layers at width 768, each looking at 1280 of Whisper's channels and 768 of BEATs' (arXiv:2310.13289)."""
    width, read, out = 768, 1280 + 768, 5120
    square, norm = width * width + width, 2 * width
    own = 4 * square + norm  # queries, keys, values, output
    cross = 2 * square + 2 * (read * width + width) + norm  # queries and output; keys and values
    feedforward = (width * 3072 + 3072) + (3072 * width + width) + norm
    queries = 1 * width + norm
    norms = 2 * 1280 + 2 * 768
    assert counts("audio.salmonn")["audio_connector"] == (
        norms + queries + 2 * (own + cross + feedforward) + width * out + out
    )


def test_ultravox_stacks_eight_frames_and_halves_at_its_gate() -> None:
    """Norm, 10,240 to 4096, half of it the gate, norm of 2048, to Llama's 4096; no bias (release 0.5)."""
    stacked = 8 * 1280
    assert counts("audio.ultravox")["audio_connector"] == stacked + stacked * 4096 + 2048 + 2048 * 4096


def test_vita_has_mixtral_and_qwen_and_its_own_encoder() -> None:
    vita, newer = counts("vita.8x7b"), counts("vita15.7b")
    assert vita["language"] == MIXTRAL
    assert newer["language"] == QWEN2_7B
    assert vita["audio"] == newer["audio"] == WHALE
    assert vita["vision"] == newer["vision"] == pytest.approx(INTERNVIT_300M, rel=2e-5)
    assert newer["audio_connector"] - vita["audio_connector"] == 25 * 3584 - (4096 - 3584) * 2049


@pytest.mark.parametrize(("name", "seconds", "tokens"), [
    ("avlm.8b", 30, 1500), ("audio.mistral_7b", 30, 250), ("audio.salmonn", 30, 88), ("audio.qwen_audio", 30, 750),
    ("audio.ultravox", 30, 188),
    *(("vita.8x7b", seconds, tokens) for seconds, tokens in ((1, 12), (2, 24), (10, 124), (30, 374), (60, 749))),
])  # fmt: skip
def test_sound_makes_as_many_tokens_as_the_systems_count(name: str, seconds: int, tokens: int) -> None:
    spec = model(name).config.media_spec().audio
    assert spec is not None
    assert audio_token_count(seconds * 16_000, spec) == tokens


def test_pictures_make_as_many_tokens_as_the_systems_count() -> None:
    for name in ("neva.llava15_7b", "neva.classic", "avlm.8b"):
        segments = image_segments(model(name).config.media_spec(), (480, 640))
        assert sum(s.count for s in segments) == 576
    vita = model("vita.8x7b").config.media_spec()
    assert sum(s.count for s in image_segments(vita, (448, 448))) == 256
    assert sum(s.count for s in image_segments(vita, (448 * 3, 448 * 4))) == 13 * 256


@pytest.mark.parametrize(("seconds", "frames"), [(2.0, 4), (4.0, 4), (9.0, 9), (16.0, 16), (120.0, 16)])
def test_vita_looks_at_four_to_sixteen_frames(seconds: float, frames: int) -> None:
    vita = model("vita.8x7b").config.media_spec()
    segments = video_segments(VideoFacts(seconds, 0), vita)
    assert sum(s.count for s in segments if s.kind == "video") == 256 * frames


def test_every_released_configuration_is_one_that_transformers_knows() -> None:
    from transformers import AutoConfig

    for name, config in RELEASED.items():
        values = dict(config)
        AutoConfig.for_model(values.pop("model_type"), **values)
        assert Source(path=name).transformers_config("x") == config
    assert torch.device("meta") == next(model("neva.llava15_7b").parameters()).device
