"""VITA's audio encoder: against loops too slow to be wrong, and trained from nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from avlm.config.media import AudioSpec
from avlm.config.model import AudioPart, LanguagePart, MlpConnector, ModelConfig, Source
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.convert.compose import Composed, compose
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.errors import ConfigError, LayoutError
from avlm.layout import audio_embedding_count, audio_token_count
from avlm.models.encoders import build_encoder, build_on_meta, encoder_width, load_encoder, read_config
from avlm.models.hearing import audio_spec, encode_sounds
from avlm.models.whale import WhaleConfig, WhaleEncoder, from_released
from avlm.samples import MediaItem, Sample, Sound, Text, Turn
from avlm.training.chain import Run
from avlm.training.stages import prepare
from avlm.training.trade import SoundWords, make_head, words_loss

TINY: dict[str, Any] = {
    "num_mel_bins": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "feature_mean": 0.3,
    "feature_std": 1.7,
}


def whale(**settings: Any) -> WhaleEncoder:
    """A tiny one in eval mode, with no bias at zero and no norm at one."""
    torch.manual_seed(3)
    encoder = WhaleEncoder(WhaleConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
        encoder.normalisation.mean.add_(torch.rand(encoder.config.num_mel_bins))
    return encoder


def clips(lengths: list[int], bins: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random filterbanks padded with zeros to the longest, and their mask."""
    features = 2 * torch.randn(len(lengths), bins, max(lengths), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return features * mask[:, None], mask


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- against loops


def slow_linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = torch.stack([(row * x).sum() for row in weights[f"{name}.weight"]])
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def slow_norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def slow_attention(
    weights: dict[str, Tensor], name: str, states: list[Tensor], heads: int, sees: Callable[[int, int], bool]
) -> list[Tensor]:
    """Transformer-XL's four terms one by one, the position of the key being its own place in the clip."""
    width = len(states[0])
    share = width // heads
    places = [
        torch.tensor([f(i / 10_000 ** (2 * k / width)) for k in range(width // 2) for f in (math.sin, math.cos)])
        for i in range(len(states))
    ]
    q, k, v = ([slow_linear(weights, f"{name}.{x}_proj", s) for s in states] for x in "qkv")
    p = [slow_linear(weights, f"{name}.pos_proj", place.double()) for place in places]
    found = []
    for i in range(len(states)):
        joined = []
        for head in range(heads):
            part = slice(head * share, (head + 1) * share)
            u, w = weights[f"{name}.pos_bias_u"][part], weights[f"{name}.pos_bias_v"][part]
            scores = {
                j: float((q[i][part] + u) @ k[j][part] + (q[i][part] + w) @ p[j][part]) / math.sqrt(share)
                for j in range(len(states))
                if sees(i, j)
            }
            total = sum(math.exp(score) for score in scores.values())
            joined.append(sum(math.exp(score) / total * v[j][part] for j, score in scores.items()))
        found.append(slow_linear(weights, f"{name}.out_proj", torch.cat(joined)))  # type: ignore[arg-type]
    return found


def slow_whale(encoder: WhaleEncoder, features: Tensor, sees: Callable[[int, int], bool]) -> list[Tensor]:
    """All hidden states of one clip (bins, frames), in float64, window by window and key by key."""
    weights = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    config = encoder.config
    mean, istd = weights["normalisation.mean"], weights["normalisation.istd"]
    grid = ((features.double().T - mean) * istd)[None]
    for name in ("subsampling.conv1", "subsampling.conv2"):
        kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        cells = [
            [(kernel * grid[:, t : t + 3, f : f + 3]).sum((1, 2, 3)) + bias for f in range(0, grid.shape[2] - 2, 2)]
            for t in range(0, grid.shape[1] - 2, 2)
        ]
        grid = torch.stack([torch.stack(row, 1) for row in cells], 1).clamp(min=0)
    states = []
    for t in range(grid.shape[1]):
        x = slow_linear(weights, "subsampling.projection", grid[:, t].flatten())
        x = slow_norm(weights, "input_norm", slow_linear(weights, "input_projection", x)).clamp(min=0)
        states.append(x * math.sqrt(config.hidden_size))
    found = [torch.stack(states)]
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        normed = [slow_norm(weights, f"{layer}.self_attn_layer_norm", s) for s in states]
        attended = slow_attention(weights, f"{layer}.self_attn", normed, config.num_attention_heads, sees)
        states = [s + a for s, a in zip(states, attended, strict=True)]
        for at, s in enumerate(states):
            inner = slow_linear(weights, f"{layer}.fc1", slow_norm(weights, f"{layer}.final_layer_norm", s))
            states[at] = s + slow_linear(weights, f"{layer}.fc2", inner.clamp(min=0))
        found.append(torch.stack(states))
    found[-1] = torch.stack([slow_norm(weights, "layer_norm", s) for s in states])
    return found


STREAMS = [
    ({}, lambda i, j: True),
    ({"chunk_size": 3}, lambda i, j: j // 3 <= i // 3),
    ({"chunk_size": 2, "left_chunks": 1}, lambda i, j: 0 <= i // 2 - j // 2 <= 1),
    ({"chunk_size": 2, "left_chunks": 0}, lambda i, j: i // 2 == j // 2),
    ({"chunk_size": 50}, lambda i, j: True),
]


@pytest.mark.parametrize(("settings", "sees"), STREAMS)
@torch.no_grad()
def test_every_state_is_what_loops_make_of_a_clip(settings: dict[str, Any], sees: Callable[[int, int], bool]) -> None:
    encoder = whale(**settings)
    features, mask = clips([31])
    output = encoder(features, mask, output_hidden_states=True)
    slow = slow_whale(encoder, features[0], sees)
    assert len(output.hidden_states) == len(slow) == 3
    for found, expected in zip(output.hidden_states, slow, strict=True):
        close(found[0], expected)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])


@pytest.mark.parametrize("settings", [settings for settings, _ in STREAMS])
@torch.no_grad()
def test_a_batch_is_each_clip_alone(settings: dict[str, Any]) -> None:
    encoder = whale(**settings)
    lengths = [7, 8, 9, 10, 11, 23, 40, 61, 62, 63, 64]
    features, mask = clips(lengths)
    output = encoder(features, mask, output_hidden_states=True)
    for i, length in enumerate(lengths):
        alone = encoder(features[i : i + 1, :, :length], output_hidden_states=True)
        for together, single in zip(output.hidden_states, alone.hidden_states, strict=True):
            close(together[i][output.attention_mask[i]], single[0])


@torch.no_grad()
def test_what_lies_in_the_padding_is_never_heard_and_what_lies_in_the_clip_is() -> None:
    encoder = whale()
    features, mask = clips([22, 43])
    quiet = encoder(features, mask)
    loud = encoder(features.masked_fill(~mask[:, None], 1e3), mask)
    for i in range(2):
        inside = quiet.attention_mask[i]
        assert torch.equal(quiet.last_hidden_state[i][inside], loud.last_hidden_state[i][inside])
    heard = encoder(features, torch.ones_like(mask)).last_hidden_state
    assert (heard[0, :4] - quiet.last_hidden_state[0, :4]).abs().max() > 1e-3  # the mask has a say


# ---------------------------------------------------------------- lengths


@torch.no_grad()
def test_every_length_has_the_embeddings_of_two_convolutions() -> None:
    encoder = whale(num_hidden_layers=1)
    spec = audio_spec(encoder.config, AudioPart(encoder=Source(path="x")))
    lengths = list(range(7, 130))
    features, mask = clips(lengths)
    output = encoder(features, mask)
    for i, frames in enumerate(lengths):
        expected = ((frames - 1) // 2 - 1) // 2
        assert int(output.attention_mask[i].sum()) == expected
        assert encoder(features[i : i + 1, :, :frames]).last_hidden_state.shape == (1, expected, 8)
    heard = encode_sounds(encoder, features, mask, spec)
    assert [len(states) for states in heard] == output.attention_mask.sum(1).tolist()


@pytest.mark.parametrize(("seconds", "tokens"), [(1, 12), (2, 24), (10, 124), (30, 374), (60, 749)])
@torch.no_grad()
def test_vitas_own_counts(seconds: int, tokens: int) -> None:
    """With its connector behind it, which halves once more: the counts of the published formula."""
    frames = (seconds * 16_000 - 400) // 160 + 1
    encoder = whale(num_hidden_layers=1, num_mel_bins=7, hidden_size=4)
    embeddings = encoder(torch.zeros(1, 7, frames)).last_hidden_state.shape[1]
    assert (embeddings - 1) // 2 + 1 == tokens


@torch.no_grad()
def test_the_position_table_has_an_end_and_a_clip_a_least_length() -> None:
    assert WhaleConfig().max_frames == 20_006  # 5000 embeddings of 40 ms: 200 s
    encoder = whale(max_positions=10)
    assert audio_spec(encoder.config, AudioPart(encoder=Source(path="x"))).max_frames == 46
    assert encoder(torch.zeros(1, 11, 46)).last_hidden_state.shape[1] == 10
    for frames in (6, 47):
        with pytest.raises(LayoutError) as error:
            encoder(torch.zeros(1, 11, frames))
        assert str(error.value) == (
            f"clips of {frames} mel frames were given, and the audio encoder hears 7 to 46 at once. "
            "Leave out what is shorter, and cut what is longer into chunks"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_mel_bins": 6},
            "num_mel_bins=6 leaves nothing after two convolutions, which see 7 bins at once. Use at least 7",
        ),
        (
            {"hidden_size": 12, "num_attention_heads": 4},
            "hidden_size=12 is not an even share for each of 4 heads. Use a multiple of 8",
        ),
        (
            {"chunk_size": 0},
            "chunk_size=0 would leave an embedding nothing to see. Use at least 1, or null for all",
        ),
        (
            {"chunk_size": 2, "left_chunks": -1},
            "left_chunks=-1 would leave an embedding nothing to see. Use at least 0, or null for all",
        ),
        (
            {"left_chunks": 2},
            "left_chunks=2 counts chunks, and there are none without chunk_size. "
            "Set chunk_size, or leave left_chunks out",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        WhaleConfig(**settings)
    assert str(error.value) == message


def test_the_released_size_is_the_published_one() -> None:
    """The sum of the shapes of VITA's weights; "341M" is this in units of 2 to the power of 20."""
    encoder = build_on_meta(WhaleConfig())
    count = sum(p.numel() for p in encoder.parameters())
    assert count == 357_950_464
    assert f"{count / 2**20:.1f}" == "341.4"
    assert encoder.subsampling.projection.in_features == 19 * 1024
    assert encoder_width(encoder.config) == 1024


# ---------------------------------------------------------------- streaming


@torch.no_grad()
def test_a_chunk_hears_to_its_own_end_and_no_frame_further() -> None:
    """Chunks count embeddings of 4 frames: those of the first 4 hear frames 0 to 18."""
    encoder = whale(chunk_size=4)
    features, _ = clips([60])
    before = encoder(features).last_hidden_state[0]
    later, last = features.clone(), features.clone()
    later[:, :, 19:] = 5.0
    last[:, :, 18] = 5.0
    assert torch.equal(encoder(later).last_hidden_state[0, :4], before[:4])
    changed = (encoder(last).last_hidden_state[0] - before).abs().amax(1) > 1e-5
    assert changed.all()  # the first embedding of the chunk as well


@torch.no_grad()
def test_what_lies_too_many_chunks_back_is_forgotten() -> None:
    encoder = whale(chunk_size=4, left_chunks=1, num_hidden_layers=1)
    features, _ = clips([60])
    other = features.clone()
    other[:, :, :16] = 5.0  # heard by embeddings 0 to 3 alone
    before, after = (encoder(f).last_hidden_state[0] for f in (features, other))
    assert torch.equal(after[8:], before[8:])
    assert ((after[:8] - before[:8]).abs().amax(1) > 1e-5).all()


def test_chance_has_no_part_in_evaluation() -> None:
    encoder = whale(dynamic_chunks=True, chunk_size=2, dropout=0.3, attention_dropout=0.3, positional_dropout=0.3)
    features, mask = clips([60, 41])
    with torch.no_grad():
        first, second = (encoder(features, mask).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(first, whale(chunk_size=2)(features, mask).last_hidden_state)


def test_in_training_chunks_are_drawn_and_half_of_the_time_there_are_none() -> None:
    encoder = whale(dynamic_chunks=True, dropout=0.0, positional_dropout=0.0).train()
    features, mask = clips([60])
    with torch.no_grad():
        whole = whale()(features, mask).last_hidden_state
        torch.manual_seed(0)
        found = [encoder(features, mask).last_hidden_state for _ in range(60)]
    same = sum(bool(torch.equal(one, whole)) for one in found)
    assert 15 < same < 45
    assert len({round(float(one.sum()), 4) for one in found}) > 8


# ---------------------------------------------------------------- weights


def released_shapes(layers: int = 24) -> dict[str, tuple[int, ...]]:
    """Names and shapes of VITA's own audio encoder with its connector's first layer beside it."""
    c = 1024
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.global_cmvn.mean": (80,),
        "encoder.global_cmvn.istd": (80,),
        "encoder.enc.0.core.conv.0.weight": (c, 1, 3, 3),
        "encoder.enc.0.core.conv.0.bias": (c,),
        "encoder.enc.0.core.conv.2.weight": (c, c, 3, 3),
        "encoder.enc.0.core.conv.2.bias": (c,),
        "encoder.enc.0.core.out.0.weight": (c, 19 * c),
        "encoder.enc.0.core.out.0.bias": (c,),
        "encoder.enc.1.embed.0.weight": (c, c),
        "encoder.enc.1.embed.0.bias": (c,),
        "encoder.enc.1.embed.1.weight": (c,),
        "encoder.enc.1.embed.1.bias": (c,),
        "encoder.enc.1.after_norm.weight": (c,),
        "encoder.enc.1.after_norm.bias": (c,),
        "adpter.conv1d2.weight": (2 * c, c, 5),
    }
    for i in range(layers):
        layer = f"encoder.enc.1.encoders.{i}"
        for name in ("q", "k", "v", "out"):
            shapes |= {f"{layer}.self_attn.linear_{name}.weight": (c, c), f"{layer}.self_attn.linear_{name}.bias": (c,)}
        shapes |= {f"{layer}.self_attn.linear_pos.weight": (c, c)}
        shapes |= {f"{layer}.self_attn.pos_bias_u": (16, 64), f"{layer}.self_attn.pos_bias_v": (16, 64)}
        shapes |= {f"{layer}.feed_forward.w_1.weight": (4 * c, c), f"{layer}.feed_forward.w_1.bias": (4 * c,)}
        shapes |= {f"{layer}.feed_forward.w_2.weight": (c, 4 * c), f"{layer}.feed_forward.w_2.bias": (c,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{layer}.{name}.weight": (c,), f"{layer}.{name}.bias": (c,)}
    return shapes


def test_a_released_checkpoint_has_every_weight_and_nothing_else() -> None:
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in released_shapes().items()}
    expected = {name: tensor.shape for name, tensor in build_on_meta(WhaleConfig()).state_dict().items()}
    assert {name: tensor.shape for name, tensor in from_released(released).items()} == expected
    whole = {f"model.audio_encoder.{name}": tensor for name, tensor in released.items()}
    assert from_released(whole, "model.audio_encoder.encoder.").keys() == expected.keys()


def test_gradients_reach_every_weight_and_checkpointing_changes_none() -> None:
    features, mask = clips([60, 33])
    grads = []
    for checkpointing in (False, True):
        encoder = whale(dropout=0.0, positional_dropout=0.0).train()
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        output = encoder(features, mask)
        output.last_hidden_state[output.attention_mask].square().mul(torch.linspace(0, 1, 8)).sum().backward()
        grads.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.abs().sum() > 0, name
        torch.testing.assert_close(grads[1][name], grad)


@torch.no_grad()
def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    encoder = whale(chunk_size=3)
    features, mask = clips([40, 20])
    encoder.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is WhaleConfig
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is WhaleEncoder and loaded.config.chunk_size == 3
    assert torch.equal(loaded.normalisation.mean, encoder.normalisation.mean)
    assert torch.equal(loaded(features, mask).last_hidden_state, encoder(features, mask).last_hidden_state)
    again = load_encoder(str(tmp_path), read_config(str(tmp_path), "audio"))
    assert torch.equal(again(features, mask).last_hidden_state, encoder(features, mask).last_hidden_state)


@torch.no_grad()
def test_in_half_precision_the_statistics_stay_whole(tmp_path: Path) -> None:
    """Filterbanks lie around 15 with a spread of 6: two digits would be lost before the first weight."""
    encoder = whale(num_mel_bins=80, hidden_size=64, intermediate_size=128)
    encoder.normalisation.mean.fill_(15.41663)
    encoder.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.normalisation.mean, encoder.normalisation.mean)
    features, mask = clips([90, 60], bins=80)
    found, expected = half(features + 15, mask), encoder(features + 15, mask)
    assert found.last_hidden_state.dtype == torch.bfloat16
    difference = (found.last_hidden_state.float() - expected.last_hidden_state)[expected.attention_mask]
    assert difference.abs().max() < 0.1 * expected.last_hidden_state.abs().max()


@torch.no_grad()
def test_statistics_are_measured_where_there_is_sound() -> None:
    encoder = whale()
    features, mask = clips([40, 25])
    encoder.measure(features.masked_fill(~mask[:, None], 1e3), mask)
    frames = torch.cat([features[0, :, :40], features[1, :, :25]], 1).numpy()
    np.testing.assert_allclose(encoder.normalisation.mean.numpy(), frames.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(1 / encoder.normalisation.istd.numpy(), frames.std(1, ddof=1), rtol=1e-4)


def test_a_fresh_one_neither_silences_nor_shouts() -> None:
    """Sound of the usual level leaves the convolutions with a spread that the norm behind them can read."""
    for width in (8, 64):
        torch.manual_seed(0)
        encoder = build_encoder(WhaleConfig(hidden_size=width, num_attention_heads=2, num_hidden_layers=1))
        features = 15.4 + 6.5 * torch.randn(1, 80, 100)
        with torch.no_grad():
            states = encoder.subsampling(encoder.normalisation(features))
        assert 1e-2 < float(states.std()) < 10


# ---------------------------------------------------------------- in a model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SMALL = {
    "model_type": "avlm_whale",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "dropout": 0.0,
    "positional_dropout": 0.0,
}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def hearing_model(**encoder: Any) -> Composed:
    part = AudioPart(encoder=Source(random={**SMALL, **encoder}), connector=MlpConnector(stack=2))
    language = LanguagePart(random=LLAMA, chat_template=TEMPLATE, vocabulary=300)
    return compose(ModelConfig(language=language, audio=part), texts=["red green blue, then red"] * 3)


PITCH_HZ = {"red": 300, "green": 800, "blue": 2000}


def spoken(*texts: str) -> list[MediaItem]:
    """A language of tones: each word is a third of a second at its own pitch."""
    time = np.arange(5333) / 16_000
    found = []
    for text in texts:
        waves = [0.3 * np.sin(2 * np.pi * PITCH_HZ[word] * time) * np.hanning(len(time)) for word in text.split()]
        found.append(MediaItem("audio", decoded=Sound(np.concatenate(waves).astype(np.float32), 16_000), alt=text))
    return found


@torch.no_grad()
def test_a_model_is_composed_with_it_saved_and_loaded(tmp_path: Path) -> None:
    made = hearing_model()
    assert type(made.model.model.audio_tower) is WhaleEncoder
    spec = made.model.config.media_spec().audio
    assert spec is not None and audio_embedding_count(16_000, spec) > 10
    save_model(made.model, made.processor, tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    features, mask = clips([100], bins=80)
    ours, theirs = (m.model.get_audio_features(features, mask).pooler_output[0] for m in (made, loaded))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_beside_a_language_model_in_half_precision_its_statistics_stay_whole(tmp_path: Path) -> None:
    made = hearing_model()
    made.model.model.language_model.to(torch.bfloat16).save_pretrained(tmp_path / "l")
    made.processor.tokenizer.save_pretrained(tmp_path / "l")
    part = AudioPart(encoder=Source(random=SMALL))
    language = LanguagePart(path=str(tmp_path / "l"), chat_template=TEMPLATE)
    tower = compose(ModelConfig(language=language, audio=part)).model.model.audio_tower
    assert tower.dtype == torch.bfloat16
    assert tower.normalisation.mean.dtype == torch.float32


@torch.no_grad()
def test_the_data_side_counts_what_the_model_gives() -> None:
    model, processor = hearing_model()
    spec = model.config.media_spec().audio
    assert spec is not None
    for samples in range(1800, 16_000, 397):
        item = MediaItem("audio", decoded=Sound(np.ones(samples, np.float32), 16_000))
        row = pack([processor.encode(Sample("0", (Turn("user", (item,)), Turn("assistant", (Text("red"),)))))])
        (tokens,) = model.model.get_audio_features(row.input_features, row.input_features_mask).pooler_output
        assert len(tokens) == audio_token_count(samples, spec)


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
@torch.no_grad()
def test_a_layer_can_be_chosen(layer: int) -> None:
    encoder = whale()
    spec = audio_spec(encoder.config, AudioPart(encoder=Source(path="x"), layer=layer))
    features, mask = clips([40, 22, 9])
    states = encode_sounds(encoder, features, mask, spec, layer)
    output = encoder(features, mask, output_hidden_states=True)
    for i, found in enumerate(states):
        close(found, output.hidden_states[layer][i][output.attention_mask[i]])


def test_the_released_window_is_not_something_it_has() -> None:
    with pytest.raises(ConfigError, match="length=window is not something avlm_whale can do"):
        audio_spec(WhaleConfig(), AudioPart(encoder=Source(path="x"), length="window"))


def alone() -> Stage:
    settings: dict[str, Any] = {"name": "s", "builds": "audio", "train": {"audio": {"lr": 1e-3}}, "rows": "audio"}
    return Stage.model_validate({**settings, "supervise": "words", "steps": 1})


@pytest.mark.slow
def test_from_nothing_it_learns_to_tell_the_words_of_a_few_sounds() -> None:
    model, processor = hearing_model()
    sounds = spoken("red green blue", "blue red", "green", "red blue green red", "blue blue")
    stage = alone()
    prepare(model, stage, seed=0)
    row = pack([processor.encode(Sample("0", (Turn("user", tuple(sounds)),)), supervise="words")])
    tower = model.model.audio_tower
    tower.measure(row.input_features, row.input_features_mask)
    head = make_head(model, stage, 0)
    assert isinstance(head, SoundWords)
    assert head.pool == 2  # 25 embeddings a second
    model.train()
    optimizer = torch.optim.Adam([*tower.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(200):
        loss = words_loss(model, head, row)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    spec: AudioSpec | None = model.config.media_spec().audio
    assert spec is not None
    with torch.no_grad():
        states = encode_sounds(tower, row.input_features, row.input_features_mask, spec)
        assert head.tell(states) == row.words


def test_a_stage_that_builds_the_audio_part_by_words_trains_it(apart: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = apart()
    assert isinstance(config.model, ModelConfig) and config.model.audio is not None
    part = config.model.audio.model_copy(update={"encoder": Source(random=SMALL)})
    model = config.model.model_copy(update={"audio": part})
    (stage,) = (s for s in config.stages if s.builds == "audio")
    joint = config.stages[-1]
    run = config.model_copy(update={"model": model, "stages": (stage, joint)})
    made = Run(run, console=Console(file=io.StringIO())).train("audio")
    (file,) = (tmp_path / "run" / "parts" / "audio").glob("*.safetensors")
    assert "normalisation.mean" in load_file(file)
    fresh = compose(model, seed=run.seed, texts=["x y z"] * 3).model.model.audio_tower.state_dict()
    trained = load_file(file)
    assert trained.keys() == fresh.keys()
    assert not torch.equal(trained["subsampling.conv1.weight"], fresh["subsampling.conv1.weight"])
    assert made is not None
