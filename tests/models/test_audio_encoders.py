"""Every record of the table of audio encoders: what it says is what transformers' own encoder does."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    AutoConfig,
    AutoModel,
    ClapAudioConfig,
    ClapAudioModel,
    ClapConfig,
    ClapModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    ParakeetCTCConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoder,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.modeling_outputs import BaseModelOutput

from avlm.config.media import AudioSpec, Convolution
from avlm.config.model import AudioPart, Source
from avlm.data.media.features import heard_chunks
from avlm.errors import ConfigError, LayoutError
from avlm.layout import (
    audio_embedding_count,
    chunk_embedding_count,
    chunk_sample_count,
    encoded_count,
    smallest_sample_count,
)
from avlm.models.audio_encoders import AUDIO_FAMILIES, add_family, inner_audio_config
from avlm.models.encoders import build_encoder, encoder_width, load_encoder, read_config
from avlm.models.hearing import audio_spec, encode_sounds
from avlm.samples import Heard

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 40,
}
WAVES: dict[str, Any] = {
    **SIZES,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
RELEASED_CONVOLUTIONS = {
    "conv_dim": (8,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "num_feat_extract_layers": 7,
}
ADAPTER = {"add_adapter": True, "output_hidden_size": 24, "num_adapter_layers": 2}
PARAKEET: dict[str, Any] = {**SIZES, "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 5}
GEMMA3N: dict[str, Any] = {
    "model_type": "gemma3n_audio",
    "input_feat_size": 16,
    "hidden_size": 32,
    "conf_num_attention_heads": 2,
    "conf_num_hidden_layers": 2,
    "sscp_conv_channel_size": (8, 4),
}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "subsampling_conv_channels": [16, 4],
    "output_proj_dims": 24,
}
CLAP: dict[str, Any] = {
    "patch_embeds_hidden_size": 8,
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "hidden_size": 64,
}
CHUNK_S = 0.5
"""Heard at once by those that know no limit, so that twice as much is quickly tried."""


@dataclass
class Case:
    """One encoder, tiny and random, and how transformers' own class is called with a single clip (1, B, M)."""

    make: Callable[[], PreTrainedModel]
    alone: Callable[[Any, Tensor], Any]
    part: dict[str, Any] = field(default_factory=lambda: {"chunk_s": CHUNK_S})
    states: Callable[[Tensor], Tensor] = lambda state: state[0]
    """Its output (1, ...) as (n, C)."""


def clap_cells(output: Tensor) -> Tensor:
    """(1, C, frequencies, time), read as one reads a clock: all frequencies of a moment, then the next moment."""
    _, _, frequencies, time = output.shape
    return torch.stack([output[0, :, f, t] for t in range(time) for f in range(frequencies)])


def ast_patches(rows: int) -> Callable[[Tensor], Tensor]:
    def read(output: Tensor) -> Tensor:
        patches = output[0, 2:]  # behind two special tokens, row by row
        steps = len(patches) // rows
        return torch.stack([patches[row * steps + step] for step in range(steps) for row in range(rows)])

    return read


def plain(model: Any, x: Tensor, **kwargs: Any) -> Any:
    return model(x.transpose(1, 2), **kwargs)


def wave(model: Any, x: Tensor, **kwargs: Any) -> Any:
    return model(x[:, 0], **kwargs)


def random_model(config: dict[str, Any]) -> PreTrainedModel:
    config = dict(config)
    try:
        made = AutoConfig.for_model(config.pop("model_type"), **config)
    except ValueError:
        pytest.skip("this version of transformers does not have it")
    model: PreTrainedModel = AutoModel.from_config(made)
    return model


CASES: dict[str, Case] = {
    "whisper": Case(
        lambda: WhisperModel(
            WhisperConfig(**WHISPER, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8)
        ).get_encoder(),
        lambda m, x, **k: m(x, **k),
        {"length": "window"},
    ),
    "qwen2_audio_encoder": Case(
        lambda: Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**WHISPER)), lambda m, x, **k: m(x, **k), {"length": "window"}
    ),
    "audio-spectrogram-transformer": Case(
        lambda: ASTModel(ASTConfig(**SIZES, num_mel_bins=32, max_length=60, patch_size=8, frequency_stride=6,
                                   time_stride=5)),
        plain, {}, ast_patches((32 - 8) // 6 + 1),
    ),
    "hubert": Case(lambda: HubertModel(HubertConfig(**WAVES)), wave),
    "hubert, layer norm": Case(lambda: HubertModel(HubertConfig(**WAVES, **LAYER_NORM)), wave),
    "hubert, as released": Case(lambda: HubertModel(HubertConfig(**{**WAVES, **RELEASED_CONVOLUTIONS})), wave),
    "wavlm": Case(lambda: WavLMModel(WavLMConfig(**WAVES)), wave),
    "wavlm, layer norm": Case(lambda: WavLMModel(WavLMConfig(**WAVES, **LAYER_NORM)), wave),
    "wav2vec2": Case(lambda: Wav2Vec2Model(Wav2Vec2Config(**WAVES)), wave),
    "wav2vec2, layer norm": Case(lambda: Wav2Vec2Model(Wav2Vec2Config(**WAVES, **LAYER_NORM)), wave),
    "wav2vec2, adapter": Case(lambda: Wav2Vec2Model(Wav2Vec2Config(**WAVES, **LAYER_NORM, **ADAPTER)), wave),
    "wav2vec2-bert": Case(
        lambda: Wav2Vec2BertModel(Wav2Vec2BertConfig(**SIZES, feature_projection_input_dim=32)), plain
    ),
    "wav2vec2-bert, adapter": Case(
        lambda: Wav2Vec2BertModel(Wav2Vec2BertConfig(**SIZES, **ADAPTER, feature_projection_input_dim=32)), plain
    ),
    "parakeet_encoder": Case(lambda: ParakeetEncoder(ParakeetEncoderConfig(**PARAKEET)), plain),
    "gemma3n_audio": Case(
        lambda: random_model(GEMMA3N),
        lambda m, x, **k: m(x.transpose(1, 2), torch.zeros(1, x.shape[2], dtype=torch.bool), **k),
    ),
    "gemma4_audio": Case(
        lambda: random_model(GEMMA4),
        lambda m, x, **k: m(x.transpose(1, 2), torch.ones(1, x.shape[2], dtype=torch.long), **k),
    ),
    "clap_audio_model": Case(
        lambda: ClapAudioModel(ClapAudioConfig(**CLAP)),
        lambda m, x, **k: m(x.transpose(1, 2)[:, None], **k), {}, clap_cells,
    ),
    "clap_audio_model, fusion": Case(
        lambda: ClapAudioModel(ClapAudioConfig(**CLAP, enable_fusion=True, fusion_type="aff_2d")),
        lambda m, x, **k: m(x.transpose(1, 2)[:, None].repeat(1, 4, 1, 1), is_longer=torch.zeros(1, 1), **k),
        {}, clap_cells,
    ),
}  # fmt: skip
TRUE_LENGTHS = [name for name in CASES if name.partition(",")[0] not in (
    "whisper", "qwen2_audio_encoder", "audio-spectrogram-transformer", "clap_audio_model"
)]  # fmt: skip
WINDOWS = [name for name in CASES if name not in TRUE_LENGTHS]


def encoder(name: str) -> PreTrainedModel:
    """With weights large enough that every mistake shows."""
    torch.manual_seed(1)
    model = CASES[name].make().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "original" not in key and "embed_positions" not in key:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return model


def spec_of(name: str, model: PreTrainedModel, **wishes: Any) -> AudioSpec:
    part = AudioPart(encoder=Source(path="x"), **{**CASES[name].part, **wishes})
    return audio_spec(model.config, part)


def alone(name: str, model: Any, features: Tensor, layer: int | None = None) -> Tensor:
    """What transformers' class makes of one clip (B, M), as (n, C)."""
    case = CASES[name]
    if layer is None:
        return case.states(case.alone(model, features[None]).last_hidden_state)
    return case.states(case.alone(model, features[None], output_hidden_states=True).hidden_states[layer])


def sounds(spec: AudioSpec, counts: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(0.1 * rng.standard_normal(count)).astype(np.float32) for count in counts]


def batch(chunks: list[Heard]) -> tuple[Tensor, Tensor]:
    """Side by side, zero beyond each end, as the data side lays them."""
    longest = max(chunk.features.shape[1] for chunk in chunks)
    features = torch.stack([nn.functional.pad(c.features, (0, longest - c.features.shape[1])) for c in chunks])
    return features, torch.arange(longest) < torch.tensor([c.frames for c in chunks])[:, None]


def hear(model: PreTrainedModel, spec: AudioSpec, waves: list[np.ndarray], layer: int | None = None) -> list[Tensor]:
    """Embeddings of each whole sound, its chunks end to end."""
    cut = [heard_chunks(one, spec) for one in waves]
    found = iter(encode_sounds(model, *batch([chunk for chunks in cut for chunk in chunks]), spec, layer))
    return [torch.cat([next(found) for _ in chunks]) for chunks in cut]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


def test_every_record_is_tested() -> None:
    own = {"avlm_whale", "avlm_beats"}  # in test_whale.py and test_beats.py
    assert {family.model_type for family in AUDIO_FAMILIES} == {*own, *(name.partition(",")[0] for name in CASES)}


# ---------------------------------------------------------------- what is made of a sound


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_sounds_are_encoded_as_transformers_encodes_them(name: str) -> None:
    model = encoder(name)
    spec = spec_of(name, model)
    longest = chunk_sample_count(spec)
    for one in sounds(spec, [longest, longest // 2, longest // 3 + 1]):
        (chunk,) = heard_chunks(one, spec)
        (found,) = hear(model, spec, [one])
        close(found, alone(name, model, chunk.features))
        assert found.shape == (chunk_embedding_count(len(one), spec), encoder_width(model.config))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_batch_of_sounds_is_each_alone(name: str) -> None:
    """Neighbours of every length: much longer, a little longer, equal, and the shortest that there is."""
    model = encoder(name)
    spec = spec_of(name, model)
    longest = chunk_sample_count(spec)
    shares = (1.0, 0.97, 0.5, 0.49, 0.971, 0.5, 0.1, 0.0, 1.7)
    waves = sounds(spec, [max(1, round(share * longest)) for share in shares])
    together = hear(model, spec, waves)
    for one, found in zip(waves, together, strict=True):
        (expected,) = hear(model, spec, [one])
        close(found, expected)


HEARS_NEIGHBOURS = ["hubert", "hubert, as released", "wavlm", "wav2vec2", "wav2vec2, adapter", "wav2vec2-bert, adapter",
                    "gemma3n_audio"]  # fmt: skip


@pytest.mark.parametrize("name", HEARS_NEIGHBOURS)
@torch.no_grad()
def test_neighbours_would_be_heard_without_the_records_care(name: str) -> None:
    """Where a record says that only equal lengths go together, padding under a mask gives something else."""
    model = encoder(name)
    spec, family = spec_of(name, model), next(f for f in AUDIO_FAMILIES if f.model_type == model.config.model_type)
    assert family.neighbours(model.config) == "equal"
    longest = chunk_sample_count(spec)
    shorter = 35 * 160 + 513 if "gemma3n" in name else round(0.77 * longest)  # 36 frames, whose last embedding is kept
    waves = sounds(spec, [longest, shorter])
    careful = hear(model, spec, waves)
    add_family(replace(family, neighbours=lambda config: "masked"))
    try:
        careless = hear(model, spec, waves)
    finally:
        add_family(family)
    assert (careful[1] - careless[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TRUE_LENGTHS)
@torch.no_grad()
def test_the_layout_counts_what_the_encoder_makes_of_every_number_of_frames(name: str) -> None:
    """From the fewest frames to all that are heard at once; the waves' samples around every edge."""
    model = encoder(name)
    spec = spec_of(name, model)
    least = 1
    while encoded_count(least, spec) < 1:
        least += 1
    if spec.features == "wave":
        lengths = [*range(least, least + 150), *range(spec.max_frames - 60, spec.max_frames + 1)]
    else:
        lengths = list(range(least, spec.max_frames + 1))
    for frames in lengths:
        features = torch.randn(1, spec.mel_bins * spec.stack, frames)
        (found,) = encode_sounds(model, features, torch.ones(1, frames, dtype=torch.bool), spec)
        assert len(found) == encoded_count(frames, spec) > 0, frames
        assert len(found) == len(alone(name, model, features[0])), frames


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_layout_counts_what_is_made_of_every_length_of_sound(name: str) -> None:
    """From one sample to twice what is heard at once, on both sides of every edge."""
    model = encoder(name)
    spec = spec_of(name, model)
    whole, least, hop = chunk_sample_count(spec), smallest_sample_count(spec), max(spec.hop, 5)
    counts = {1, 2, least - 1, least, least + 1, 2 * least, whole // 2, 2 * whole - 1, 2 * whole, 2 * whole + hop}
    counts |= {whole + d for d in (-hop, -1, 0, 1, hop - 1, hop, hop + 1, least)}
    counts |= {least + hop * k + d for k in range(1, 4) for d in (-1, 0)}
    waves = sounds(spec, sorted(count for count in counts if count > 0))
    for one, found in zip(waves, hear(model, spec, waves), strict=True):
        assert len(found) == audio_embedding_count(len(one), spec) > 0, len(one)


def test_counts_published_elsewhere() -> None:
    """vita-audio.md section 4.2, measured with the released configurations' shapes."""
    spoken: list[tuple[PreTrainedConfig, dict[str, Any], float, int]] = [
        (HubertConfig(), {}, 1, 49),
        (HubertConfig(), {}, 10, 499),
        (WavLMConfig(), {}, 30, 1499),
        (Wav2Vec2Config(), {}, 30, 1499),
        (Wav2Vec2BertConfig(), {}, 2, 99),
        (Wav2Vec2BertConfig(add_adapter=True), {}, 2, 50),
        (ASTConfig(), {}, 10.24, 1212),  # 12 rows of 101 steps, without the two special tokens
        (ASTConfig(), {}, 1, 1212),
        (ASTConfig(max_length=512), {}, 5, 600),
        (ClapAudioConfig(), {}, 10, 64),
        (ClapAudioConfig(), {}, 25, 192),
        (ParakeetEncoderConfig(), {}, 1, 13),
        (ParakeetEncoderConfig(), {}, 30, 375),
        (Qwen2AudioEncoderConfig(), {}, 30, 750),
        (Qwen2AudioEncoderConfig(), {}, 1, 25),
        (Qwen2AudioEncoderConfig(), {"length": "window"}, 1, 750),
        (WhisperConfig(), {}, 30, 1500),
    ]
    for config, wishes, seconds, embeddings in spoken:
        spec = audio_spec(config, AudioPart(encoder=Source(path="x"), **wishes))
        counted = audio_embedding_count(round(seconds * spec.sample_rate_hz), spec)
        assert counted == embeddings, (config.model_type, seconds)
    for model_type, frames, embeddings in (("gemma3n_audio", 400, 25), ("gemma4_audio", 100, 25)):
        try:
            config = AutoConfig.for_model(model_type)
        except ValueError:
            continue
        spec = audio_spec(config, AudioPart(encoder=Source(path="x")))
        assert encoded_count(frames, spec) == embeddings
        assert 29.9 < chunk_sample_count(spec) / 16_000 <= 30


# ---------------------------------------------------------------- layers


LAYERED = [name for name in CASES if "adapter" not in name and not name.startswith(("gemma", "clap", "qwen2"))]


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -3])
@pytest.mark.parametrize("name", LAYERED)
@torch.no_grad()
def test_a_layer_can_be_chosen_and_has_the_length_of_the_output(name: str, layer: int) -> None:
    model = encoder(name)
    spec = spec_of(name, model)
    (one,) = sounds(spec, [chunk_sample_count(spec) // 2])
    (found,) = hear(model, spec, [one], layer)
    close(found, alone(name, model, heard_chunks(one, spec)[0].features, layer))
    assert len(found) == chunk_embedding_count(len(one), spec)


@pytest.mark.parametrize("name", LAYERED)
@torch.no_grad()
def test_the_record_says_whether_a_final_norm_follows_the_last_hidden_state(name: str) -> None:
    model = encoder(name)
    spec = spec_of(name, model)
    family = next(f for f in AUDIO_FAMILIES if f.model_type == model.config.model_type)
    (one,) = sounds(spec, [chunk_sample_count(spec)])
    (output,), (last,) = hear(model, spec, [one]), hear(model, spec, [one], -1)
    normed = family.output_normed and getattr(model.config, "do_stable_layer_norm", True)
    assert bool(torch.allclose(output, last, atol=1e-6)) == (not normed)


@pytest.mark.parametrize("layer", [0, 1, 2, -2])
@torch.no_grad()
def test_a_layer_of_qwen2_audio_is_averaged_in_pairs_as_its_output_is(layer: int) -> None:
    """Its list of hidden states mixes two lengths."""
    model: Any = encoder("qwen2_audio_encoder")
    spec = spec_of("qwen2_audio_encoder", model)
    (one,) = sounds(spec, [chunk_sample_count(spec)])
    features = heard_chunks(one, spec)[0].features[None]
    states = model(features, output_hidden_states=True).hidden_states
    assert [s.shape[1] for s in states] == [40, 40, 40, 20]
    (found,) = hear(model, spec, [one], layer)
    close(found, (states[layer][0, 0::2] + states[layer][0, 1::2]) / 2)
    (last,) = hear(model, spec, [one], -1)
    close(last, model(features).last_hidden_state[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma4_audio", "model.audio.layer=1: its hidden states differ from its output in length or width, so only "
         "the output of gemma4_audio fits the count of its tokens. Leave it out"),
        ("wav2vec2, adapter", "model.audio.layer=1: an adapter follows its layers, so only the output of wav2vec2 "
         "fits the count of its tokens. Leave it out"),
    ],
)  # fmt: skip
def test_a_layer_that_would_not_fit_the_count_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        spec_of(name, encoder(name), layer=1)
    assert str(error.value) == message


# ---------------------------------------------------------------- windows, masks and their meaning


@torch.no_grad()
def test_qwen2_audio_hears_a_short_sound_as_the_released_model_does() -> None:
    """Its window is filled with silence, which its convolutions see, its attention does not, and nobody reads."""
    torch.manual_seed(3)
    text = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2, "vocab_size": 40}
    whole = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder", **WHISPER}, text_config=text, audio_token_index=39
        )
    ).eval()
    model: Any = qwen2_ears(whole)
    (projector,) = (m for name, m in whole.named_modules() if name.endswith("multi_modal_projector"))
    heard: list[Tensor] = []
    hook = projector.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    spec = audio_spec(model.config, AudioPart(encoder=Source(path="x")))
    waves = sounds(spec, [12_800, 12_700, 5000, 321])
    features, mask = batch([heard_chunks(one, spec)[0] for one in waves])
    counts = [encoded_count(int(n), spec) for n in mask.sum(1)]
    ids = torch.full((4, 2 + max(counts)), 3)
    for i, count in enumerate(counts):
        ids[i, 1 : 1 + count] = whole.config.audio_token_id
    whole(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        input_features=features,
        feature_attention_mask=mask.long(),
    )
    hook.remove()
    found = encode_sounds(model, features, mask, spec)
    assert [len(one) for one in found] == counts == [20, 20, 8, 1]
    for state, theirs in zip(found, heard[0], strict=True):
        close(state, theirs[: len(state)])


@torch.no_grad()
def test_a_mask_that_would_be_ignored_is_refused() -> None:
    """Whisper's forward takes an attention mask and does nothing with it."""
    model = encoder("whisper")
    spec = spec_of("whisper", model)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[1, 50:] = False
    with pytest.raises(LayoutError) as error:
        encode_sounds(model, torch.randn(2, 16, 80), mask, spec)
    assert str(error.value) == (
        "clip 1 has a mask of 50 frames, and this audio encoder hears its whole window of 80 and takes no mask. "
        "Use model.audio.length=true where the family has it"
    )


@pytest.mark.parametrize(
    "hears",
    [[False] * 20 + [True] * 20, [True] * 10 + [False] * 5 + [True] * 25],
    ids=["inverted, or padded on the left", "with a hole"],
)
@torch.no_grad()
def test_a_mask_that_does_not_begin_with_the_first_frame_is_refused(hears: list[bool]) -> None:
    """Only the number of frames would be read off it, and other ones heard."""
    model = encoder("whisper")
    spec = audio_spec(model.config, AudioPart(encoder=Source(path="x"), length="true"))
    features, mask = torch.randn(2, 16, 40), torch.tensor([[True] * 40, hears])
    with pytest.raises(LayoutError) as error:
        encode_sounds(model, features, mask, spec)
    assert str(error.value) == (
        f"clip 1 has a mask of {sum(hears)} frames that are not its first ones, and each clip is heard from its first "
        "frame on. Pad clips on the right, with a mask that is True where there is sound"
    )
    encode_sounds(model, features, mask.sort(1, descending=True).values, spec)  # the advice holds


@torch.no_grad()
def test_gemma_3ns_mask_is_true_where_there_is_padding_and_ours_where_there_is_sound() -> None:
    model: Any = encoder("gemma3n_audio")
    spec = spec_of("gemma3n_audio", model)
    features = torch.randn(1, 16, 40)
    (found,) = encode_sounds(model, features, torch.ones(1, 40, dtype=torch.bool), spec)
    close(found, model(features.transpose(1, 2), torch.zeros(1, 40, dtype=torch.bool)).last_hidden_state[0])
    swapped = model(features.transpose(1, 2), torch.ones(1, 40, dtype=torch.bool)).last_hidden_state[0]
    assert swapped.abs().max() == 0 < found.abs().max()


@pytest.mark.parametrize("name", [n for n in TRUE_LENGTHS if "adapter" not in n and "gemma3n" not in n])
@torch.no_grad()
def test_what_lies_in_the_padding_is_never_heard(name: str) -> None:
    model = encoder(name)
    spec = spec_of(name, model)
    longest = chunk_sample_count(spec)
    features, mask = batch([heard_chunks(one, spec)[0] for one in sounds(spec, [longest, round(0.8 * longest)])])
    if spec.features == "wave":  # what is convolved before the mask must be zero for all, as the data side leaves it
        junk = features
    else:
        junk = torch.where(mask[:, None], features, torch.tensor(0.5))
    for clean, dirty in zip(
        encode_sounds(model, features, mask, spec), encode_sounds(model, junk, mask, spec), strict=True
    ):
        close(dirty, clean)


def test_gradients_reach_the_weights_of_every_encoder() -> None:
    for name in CASES:
        model = build_encoder(inner_audio_config(encoder(name).config))
        spec = spec_of(name, model)
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        waves = sounds(spec, [chunk_sample_count(spec), chunk_sample_count(spec) // 2])
        torch.cat(hear(model, spec, waves)).square().sum().backward()
        reached = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
        assert reached > 0.6 * len(list(model.parameters())), name


def test_while_it_trains_no_clip_hears_another_through_a_batch_norm() -> None:
    for name in ("parakeet_encoder", "clap_audio_model"):
        model = encoder(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for setting in ("dropout", "activation_dropout", "attention_dropout", "layerdrop", "dropout_positions"):
            for module in [model, *model.modules()]:
                if isinstance(getattr(module, setting, None), float):
                    setattr(module, setting, 0.0)
        spec = spec_of(name, model)
        model.train()
        statistics = {key: value.clone() for key, value in model.named_buffers() if "running" in key}
        assert statistics
        waves = sounds(spec, [chunk_sample_count(spec), chunk_sample_count(spec) // 2])
        together = hear(model, spec, waves)
        for one, found in zip(waves, together, strict=True):
            close(found, hear(model, spec, [one])[0])
        assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers() if key in statistics)


@pytest.mark.parametrize("name", ["hubert", "wavlm", "wav2vec2", "wav2vec2-bert"])
def test_wav2vec_models_leave_nothing_to_chance_of_their_own_while_they_train(name: str) -> None:
    """Their own blanks are drawn from numpy's global generator, and are an error for a clip shorter than one."""
    torch.manual_seed(0)
    model = build_encoder(inner_audio_config(CASES[name].make().config))
    assert model.config.layerdrop == 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    spec = spec_of(name, model)
    model.train()
    waves = sounds(spec, [smallest_sample_count(spec), 3000])
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first, again = hear(model, spec, waves, -1), hear(model, spec, waves, -1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert all(one.isfinite().all() for one in first)
    if not any(getattr(model.config, key, 0) for key in ("attention_dropout",)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---------------------------------------------------------------- specs


def test_specs_say_what_the_released_preprocessing_says() -> None:
    part = AudioPart(encoder=Source(path="x"))
    spoken = audio_spec(ASTConfig(), part, {"mean": -6.8, "std": 5.5})  # the checkpoint on speech commands
    assert (spoken.mean, spoken.std) == (-6.8, 11.0)
    assert audio_spec(ASTConfig(), part).window_frames == 1024
    assert audio_spec(ASTConfig(), part, {"do_normalize": False}).std == 1.0
    assert audio_spec(WavLMConfig(), part, {"do_normalize": False}).normalise == "none"
    assert audio_spec(WavLMConfig(), part).normalise == "clip"
    assert audio_spec(HubertConfig(), part).max_frames == 480_000
    clap = audio_spec(ClapAudioConfig(), part, {"frequency_min": 50, "frequency_max": 14_000})
    assert (clap.sample_rate_hz, clap.low_hz, clap.high_hz, clap.mel_scale) == (48_000, 50, 14_000, "slaney")
    assert audio_spec(ClapAudioConfig(enable_fusion=True, fusion_type="aff_2d"), part).mel_scale == "htk"
    bert = audio_spec(Wav2Vec2BertConfig(), part)
    assert (bert.mel_bins, bert.stack, bert.normalise, bert.window) == (80, 2, "bins", "povey")


@pytest.mark.parametrize(
    ("config", "wishes", "message"),
    [
        (ASTConfig(), {"length": "true"}, "model.audio.length=true is not something audio-spectrogram-transformer can "
         "do. Use model.audio.length=window"),
        (HubertConfig(), {"length": "window"}, "model.audio.length=window is not something hubert can do. "
         "Use model.audio.length=true"),
        (HubertConfig(), {"level": "clip"}, "model.audio.level=clip is for log-mel frames as Whisper takes them, and "
         "hubert takes wave features. Use model.audio.level=whisper"),
        (WhisperConfig(), {"chunk_s": 31}, "model.audio.chunk_s=31: the encoder's table of positions ends at 30 s. "
         "Use at most 30, or leave it out"),
        (ASTConfig(), {"chunk_s": 5}, "model.audio.chunk_s=5: this encoder always hears its whole window, so shorter "
         "chunks would be padded to it. Leave it out"),
    ],
)  # fmt: skip
def test_wishes_that_an_encoder_cannot_grant_are_refused(config: Any, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        audio_spec(config, AudioPart(encoder=Source(path="x"), **wishes))
    assert str(error.value) == message


def test_chunks_can_be_shorter_than_the_encoder_hears() -> None:
    for config, frames in ((WhisperConfig(), 1000), (HubertConfig(), 160_000), (ParakeetEncoderConfig(), 1000)):
        spec = audio_spec(config, AudioPart(encoder=Source(path="x"), chunk_s=10))
        assert spec.max_frames == frames
        assert chunk_sample_count(spec) == 160_000


# ---------------------------------------------------------------- out of checkpoints

TEXT = {**SIZES, "vocab_size": 30}


def qwen2_ears(model: nn.Module) -> nn.Module:
    """It stands deeper or less deep in one version or another."""
    (found,) = (m for m in model.modules() if isinstance(m, Qwen2AudioEncoder))
    return found


def gemma(model_type: str, audio: dict[str, Any]) -> PreTrainedModel:
    """A whole Gemma with ears, as small as it can be."""
    try:
        kinds = {
            "text_config": {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
                            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
                            "layer_types": ["full_attention"]},
            "vision_config": None,
            "audio_config": audio,
        }  # fmt: skip
        config = AutoConfig.for_model(model_type, **kinds)
    except ValueError:
        pytest.skip("this version of transformers does not have it")
    from transformers import AutoModelForImageTextToText

    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return model


CHECKPOINTS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[Any], nn.Module]]] = {
    "Qwen2-Audio": (
        lambda: Qwen2AudioForConditionalGeneration(
            Qwen2AudioConfig(
                audio_config={"model_type": "qwen2_audio_encoder", **WHISPER},
                text_config={"model_type": "qwen2", **TEXT, "num_key_value_heads": 2},
            )
        ),
        lambda m: qwen2_ears(m),
    ),
    "Qwen2-Audio encoder": (CASES["qwen2_audio_encoder"].make, lambda m: m),
    "AST": (
        lambda: ASTForAudioClassification(ASTConfig(**SIZES, num_mel_bins=32, max_length=60)),
        lambda m: m.audio_spectrogram_transformer,
    ),
    "AST encoder": (CASES["audio-spectrogram-transformer"].make, lambda m: m),
    "HuBERT with CTC": (lambda: HubertForCTC(HubertConfig(**WAVES)), lambda m: m.hubert),
    "HuBERT": (CASES["hubert"].make, lambda m: m),
    "WavLM with CTC": (lambda: WavLMForCTC(WavLMConfig(**WAVES, **LAYER_NORM)), lambda m: m.wavlm),
    "Wav2Vec2 with CTC": (lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**WAVES)), lambda m: m.wav2vec2),
    "Wav2Vec2-BERT with CTC": (
        lambda: Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**TEXT, feature_projection_input_dim=32)),
        lambda m: m.wav2vec2_bert,
    ),
    "Parakeet with CTC": (
        lambda: ParakeetForCTC(ParakeetCTCConfig(encoder_config=PARAKEET, vocab_size=12, pad_token_id=11)),
        lambda m: m.encoder,
    ),
    "Parakeet encoder": (CASES["parakeet_encoder"].make, lambda m: m),
    "CLAP": (
        lambda: ClapModel(ClapConfig(text_config={**TEXT, "max_position_embeddings": 20}, audio_config=CLAP)),
        lambda m: m.audio_model,
    ),
    "CLAP's audio half": (CASES["clap_audio_model"].make, lambda m: m),
    "Gemma 4": (lambda: gemma("gemma4", GEMMA4), lambda m: m.model.audio_tower),
    "Gemma 4 audio": (lambda: random_model(GEMMA4), lambda m: m),
    "Gemma 3n audio": (lambda: random_model(GEMMA3N), lambda m: m),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_encoder_comes_whole_out_of_a_released_checkpoint_and_out_of_its_own(name: str, tmp_path: Path) -> None:
    make, inside = CHECKPOINTS[name]
    torch.manual_seed(4)
    released = make()
    with torch.no_grad():
        for parameter in released.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    released.save_pretrained(tmp_path / "released")
    expected = dict(inside(released).state_dict())

    found = load_encoder(str(tmp_path / "released"), read_config(str(tmp_path / "released"), "audio"))
    found.save_pretrained(tmp_path / "own")
    again = load_encoder(str(tmp_path / "own"), read_config(str(tmp_path / "own"), "audio"))
    for model in (found, again):
        weights = dict(model.state_dict())
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=0)


def test_an_encoder_under_another_prefix_is_found_too(tmp_path: Path) -> None:
    """Gemma 3n and Qwen2-Audio stand deeper or less deep in checkpoints of other versions."""
    from safetensors.torch import save_file

    for name, prefix in (("gemma3n_audio", "model.audio_tower."), ("qwen2_audio_encoder", "model.audio_tower.")):
        model = encoder(name)
        folder = tmp_path / name
        folder.mkdir()
        weights = {f"{prefix}{key}": value.contiguous() for key, value in model.state_dict().items()}
        save_file({**weights, "model.language_model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
        found = load_encoder(str(folder), model.config)
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], tensor, rtol=0, atol=0)


def test_a_composite_without_ears_is_refused() -> None:
    config = AutoConfig.for_model("qwen2_audio")
    config.audio_config = None
    with pytest.raises(ConfigError) as error:
        inner_audio_config(config)
    assert str(error.value) == (
        "this qwen2_audio was released without ears: its audio_config is empty. Use a checkpoint that hears"
    )


# ---------------------------------------------------------------- families from outside


@pytest.fixture
def table() -> Iterator[None]:
    """The table as it was, afterwards."""
    kept = list(AUDIO_FAMILIES)
    yield
    AUDIO_FAMILIES[:] = kept


DOCS = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()


class ListenerConfig(PreTrainedConfig):
    """Of an encoder that nobody else has."""

    model_type = "listener"

    def __init__(self, hidden_size: int = 24, bins: int = 40, **kwargs: Any) -> None:
        self.hidden_size, self.bins = hidden_size, bins
        super().__init__(**kwargs)


class ListenerModel(PreTrainedModel):
    """One convolution."""

    config_class = ListenerConfig

    def __init__(self, config: ListenerConfig) -> None:
        super().__init__(config)
        self.conv = nn.Conv1d(config.bins, config.hidden_size, 5, stride=3)
        self.post_init()

    def forward(self, input_features: Tensor) -> Any:
        return BaseModelOutput(last_hidden_state=self.conv(input_features.transpose(1, 2)).transpose(1, 2))


@torch.no_grad()
def test_the_documents_ten_lines_add_a_family_from_ones_own_file(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="listener is not an audio encoder that avlm has a record of"):
        audio_spec(ListenerConfig(), AudioPart(encoder=Source(path="x")))
    monkeypatch.setitem(sys.modules, "listener", sys.modules[__name__])
    (lines,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    exec(lines, {})
    torch.manual_seed(0)
    model = build_encoder(AutoConfig.for_model("listener")).eval()
    assert isinstance(model, ListenerModel)
    spec = audio_spec(model.config, AudioPart(encoder=Source(path="x"), chunk_s=1))
    waves = sounds(spec, [1, 700, 8000, 16_000, 40_000])
    found = hear(model, spec, waves)
    assert [len(one) for one in found] == [audio_embedding_count(len(one), spec) for one in waves]
    assert encoder_width(model.config) == 24


def test_the_documents_table_is_the_table() -> None:
    rows = []
    for family in AUDIO_FAMILIES:
        kinds = [CASES[name].make().config for name in CASES if name.partition(",")[0] == family.model_type]
        kinds = kinds or [AutoConfig.for_model(family.model_type)]
        takes = {family.hears(config, {}).get("features", "whisper") for config in kinds}
        plain = {family.neighbours(config) for config in kinds if not getattr(config, "add_adapter", False)}
        padded = {
            ("masked",): "together, under a mask",
            ("equal",): "one length at a time",
            ("equal", "masked"): "one length at a time, or together where it has layer norms",
        }[tuple(sorted(plain))]
        if family.lengths == ("window",):
            padded = "never padded"
        layer = "any" if family.layers else "output"
        cells = [family.model_type, *takes, ", ".join(family.lengths), layer, padded]
        rows.append(f"| {' | '.join(cells)} |")
    assert "\n".join(rows) in DOCS


@torch.no_grad()
def test_a_record_that_counts_wrong_is_found_out(table: None) -> None:
    wrong = next(f for f in AUDIO_FAMILIES if f.model_type == "parakeet_encoder")
    add_family(replace(wrong, convolutions=lambda config: (Convolution(stride=2),)))
    model = encoder("parakeet_encoder")
    with pytest.raises(LayoutError) as error:
        hear(model, spec_of("parakeet_encoder", model), sounds(AudioSpec(), [4000]))
    assert str(error.value) == (
        "the audio encoder made 4 embeddings of 25 frames, and the record of parakeet_encoder counts 13. "
        "Correct the record"
    )
