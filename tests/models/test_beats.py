"""BEATs: against loops too slow to be wrong, and the names of a released checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from avlm.config.model import AudioPart, LanguagePart, MlpConnector, ModelConfig, Source
from avlm.config.stage import Stage
from avlm.convert.compose import Composed, compose
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.errors import ConfigError, LayoutError
from avlm.layout import audio_token_count
from avlm.models.beats import BeatsConfig, BeatsEncoder, from_released
from avlm.models.encoders import build_encoder, build_on_meta, encoder_width, load_encoder, read_config
from avlm.models.hearing import audio_spec, encode_sounds
from avlm.samples import MediaItem, Sample, Sound, Text, Turn
from avlm.training.trade import SoundWords, make_head

TINY: dict[str, Any] = {
    "num_mel_bins": 8,
    "patch_size": 4,
    "patch_width": 6,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "position_kernel": 6,
    "position_groups": 2,
    "num_buckets": 16,
    "max_distance": 20,
    "max_frames": 200,
}


def beats(**settings: Any) -> BeatsEncoder:
    """A tiny one in eval mode, with weights large enough that every mistake shows."""
    torch.manual_seed(3)
    encoder = BeatsEncoder(BeatsConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return encoder


def clips(lengths: list[int], bins: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    features = torch.randn(len(lengths), bins, max(lengths), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return features * mask[:, None], mask


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- against loops


def slow_linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.stack([(row * x).sum() for row in weights[f"{name}.weight"]]) + weights[f"{name}.bias"]


def slow_norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def slow_gelu(x: Tensor) -> Tensor:
    return torch.stack([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])


def slow_sigmoid(x: Tensor) -> float:
    return 1 / (1 + math.exp(-float(x)))


def slow_bucket(distance: int, buckets: int, longest: int) -> int:
    """T5's: the sign chooses the half, near distances have their own bucket, far ones share by their logarithm."""
    half = buckets // 2
    first = half if distance > 0 else 0
    far = abs(distance)
    if far < half // 2:
        return first + far
    shared = half // 2 + int(math.log(far / (half // 2)) / math.log(longest / (half // 2)) * (half - half // 2))
    return first + min(shared, half - 1)


def slow_places(weights: dict[str, Tensor], states: list[Tensor], groups: int) -> list[Tensor]:
    """Every embedding hears those around it, by a kernel whose slices have been given their lengths."""
    direction, length = weights["encoder.pos_conv.0.weight_v"], weights["encoder.pos_conv.0.weight_g"]
    width, share, kernel = direction.shape
    slices = [length[0, 0, k] * direction[:, :, k] / math.sqrt((direction[:, :, k] ** 2).sum()) for k in range(kernel)]
    found = []
    for at in range(len(states)):
        told = weights["encoder.pos_conv.0.bias"].clone()
        for k in range(kernel):
            heard = at + k - kernel // 2
            if 0 <= heard < len(states):
                for out in range(width):
                    group = out // (width // groups)
                    told[out] += slices[k][out] @ states[heard][group * share : (group + 1) * share]
        found.append(states[at] + slow_gelu(told))
    return found


def slow_attention(weights: dict[str, Tensor], name: str, states: list[Tensor], config: BeatsConfig) -> list[Tensor]:
    q, k, v = ([slow_linear(weights, f"{name}.{x}_proj", s) for s in states] for x in "qkv")
    share = config.hidden_size // config.num_attention_heads
    table = weights["encoder.relative_attention_bias.weight"]
    found = []
    for i in range(len(states)):
        joined = []
        for head in range(config.num_attention_heads):
            part = slice(head * share, (head + 1) * share)
            doors = slow_linear(weights, f"{name}.grep_linear", q[i][part])
            update, reset = slow_sigmoid(doors[:4].sum()), slow_sigmoid(doors[4:].sum())
            gate = 2 + update * (reset * float(weights[f"{name}.grep_a"][0, head, 0, 0]) - 1)
            scores = [
                float(q[i][part] @ k[j][part]) / math.sqrt(share)
                + gate * float(table[slow_bucket(j - i, config.num_buckets, config.max_distance), head])
                for j in range(len(states))
            ]
            total = sum(math.exp(score) for score in scores)
            joined.append(sum(math.exp(score) / total * v[j][part] for j, score in enumerate(scores)))
        found.append(slow_linear(weights, f"{name}.out_proj", torch.cat(joined)))  # type: ignore[arg-type]
    return found


def slow_beats(encoder: BeatsEncoder, features: Tensor) -> list[Tensor]:
    """All hidden states of one clip (bins, frames), in float64: patch by patch, moment by moment."""
    weights = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    config, side = encoder.config, encoder.config.patch_size
    states = []
    for frame in range(0, features.shape[1] - side + 1, side):
        for bin_ in range(0, features.shape[0], side):
            patch = features[bin_ : bin_ + side, frame : frame + side].T.double()
            x = torch.stack([(kernel[0] * patch).sum() for kernel in weights["patch_embedding.weight"]])
            states.append(slow_linear(weights, "post_extract_proj", slow_norm(weights, "layer_norm", x)))
    states = slow_places(weights, states, config.position_groups)
    states = [slow_norm(weights, "encoder.layer_norm", s) for s in states]
    found = [torch.stack(states)]
    alpha = (2 * config.num_hidden_layers) ** (1 / 4)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        attended = slow_attention(weights, f"{layer}.self_attn", states, config)
        for at, (s, a) in enumerate(zip(states, attended, strict=True)):
            s = slow_norm(weights, f"{layer}.self_attn_layer_norm", alpha * s + a)
            inner = slow_linear(weights, f"{layer}.fc2", slow_gelu(slow_linear(weights, f"{layer}.fc1", s)))
            states[at] = slow_norm(weights, f"{layer}.final_layer_norm", alpha * s + inner)
        found.append(torch.stack(states))
    return found


@torch.no_grad()
def test_every_state_is_what_loops_make_of_a_clip() -> None:
    encoder = beats()
    features, _ = clips([46])  # 11 moments of 2 bands, and two frames too few for a twelfth
    output = encoder(features, output_hidden_states=True)
    slow = slow_beats(encoder, features[0])
    assert len(output.hidden_states) == len(slow) == 4
    assert len(slow[0]) == 22
    for found, expected in zip(output.hidden_states, slow, strict=True):
        close(found[0], expected)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])


@torch.no_grad()
def test_a_batch_is_each_clip_alone() -> None:
    encoder = beats()
    lengths = [4, 5, 7, 8, 15, 16, 33, 60, 80]
    features, mask = clips(lengths)
    output = encoder(features, mask, output_hidden_states=True)
    for i, length in enumerate(lengths):
        single = encoder(features[i : i + 1, :, :length], output_hidden_states=True)
        for together, apart in zip(output.hidden_states, single.hidden_states, strict=True):
            close(together[i][output.attention_mask[i]], apart[0])


@torch.no_grad()
def test_what_lies_in_the_padding_is_never_heard_and_what_lies_in_the_clip_is() -> None:
    encoder = beats()
    features, mask = clips([22, 43])
    quiet = encoder(features, mask)
    loud = encoder(features.masked_fill(~mask[:, None], 1e3), mask)
    for i in range(2):
        inside = quiet.attention_mask[i]
        assert torch.equal(quiet.last_hidden_state[i][inside], loud.last_hidden_state[i][inside])
    heard = encoder(features, torch.ones_like(mask)).last_hidden_state
    assert (heard[0, :10] - quiet.last_hidden_state[0, :10]).abs().max() > 1e-3  # the mask has a say


# ---------------------------------------------------------------- lengths


@torch.no_grad()
def test_every_length_has_whole_patches_in_the_order_of_time() -> None:
    encoder = beats(num_hidden_layers=1)
    spec = audio_spec(encoder.config, AudioPart(encoder=Source(path="x")))
    lengths = list(range(4, 100))
    features, mask = clips(lengths)
    output = encoder(features, mask)
    assert output.attention_mask.sum(1).tolist() == [frames // 4 * 2 for frames in lengths]
    heard = encode_sounds(encoder, features, mask, spec)
    assert [len(states) for states in heard] == [frames // 4 * 2 for frames in lengths]


@torch.no_grad()
def test_thirty_seconds_are_1496_embeddings() -> None:
    """187 moments of 8 bands: what VideoLLaMA2 feeds its language model with."""
    frames = (30 * 16_000 - 400) // 160 + 1
    narrow = {"patch_width": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    encoder = build_encoder(BeatsConfig(**narrow, intermediate_size=8, position_groups=4)).eval()
    assert encoder.config.max_frames == frames
    assert encoder(torch.zeros(1, 128, frames)).last_hidden_state.shape == (1, 1496, 8)
    with pytest.raises(LayoutError) as error:
        encoder(torch.zeros(1, 128, 15))
    assert str(error.value) == (
        "clips of 15 mel frames were given, and the audio encoder hears 16 to 2998 at once. "
        "Leave out what is shorter, and cut what is longer into chunks"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mel_bins": 100}, "num_mel_bins=100 cannot be shared out by 16. Use a multiple of 16"),
        ({"num_attention_heads": 7}, "hidden_size=768 cannot be shared out by 7. Use a multiple of 7"),
        (
            {"max_distance": 80},
            "max_distance=80 is reached before the 80 buckets of single distances end. Use at least 81",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        BeatsConfig(**settings)
    assert str(error.value) == message


# ---------------------------------------------------------------- weights


def released_shapes(layers: int = 12) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the `model` of a released checkpoint of the base size, fine-tuned on AudioSet."""
    c = 768
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (512, 1, 16, 16),
        "layer_norm.weight": (512,),
        "layer_norm.bias": (512,),
        "post_extract_proj.weight": (c, 512),
        "post_extract_proj.bias": (c,),
        "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (c, 48, 128),
        "encoder.pos_conv.0.bias": (c,),
        "encoder.layer_norm.weight": (c,),
        "encoder.layer_norm.bias": (c,),
        "predictor.weight": (527, c),
        "predictor.bias": (527,),
    }
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (c, c), f"{layer}.self_attn.{name}.bias": (c,)}
        shapes |= {f"{layer}.self_attn.grep_linear.weight": (8, 64), f"{layer}.self_attn.grep_linear.bias": (8,)}
        shapes |= {f"{layer}.self_attn.grep_a": (1, 12, 1, 1)}
        shapes |= {f"{layer}.self_attn.relative_attention_bias.weight": (320, 12)}
        shapes |= {f"{layer}.fc1.weight": (3072, c), f"{layer}.fc1.bias": (3072,)}
        shapes |= {f"{layer}.fc2.weight": (c, 3072), f"{layer}.fc2.bias": (c,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{name}.weight": (c,), f"{layer}.{name}.bias": (c,)}
    return shapes


def test_a_released_checkpoint_has_every_weight_and_nothing_else() -> None:
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in released_shapes().items()}
    encoder = build_on_meta(BeatsConfig())
    expected = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    assert {name: tensor.shape for name, tensor in from_released(released).items()} == expected
    assert sum(p.numel() for p in encoder.parameters()) == 90_311_792
    assert encoder_width(encoder.config) == 768


def test_the_table_of_positions_is_that_of_the_first_layer() -> None:
    names = {f"encoder.layers.{i}.self_attn.relative_attention_bias.weight": torch.tensor(float(i)) for i in range(12)}
    found = from_released({"encoder.layers.10.fc1.bias": torch.tensor(7.0), **names})
    assert {name: float(t) for name, t in found.items()} == {
        "encoder.layers.10.fc1.bias": 7.0,
        "encoder.relative_attention_bias.weight": 0.0,
    }


def test_gradients_reach_every_weight_and_checkpointing_changes_none() -> None:
    features, mask = clips([60, 33])
    grads = []
    for checkpointing in (False, True):
        encoder = beats(dropout=0.0, attention_dropout=0.0).train()
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        output = encoder(features, mask)
        output.last_hidden_state[output.attention_mask].square().mul(torch.linspace(0, 1, 8)).sum().backward()
        grads.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.abs().sum() > 0, name
        torch.testing.assert_close(grads[1][name], grad)


@torch.no_grad()
def test_two_passes_agree_in_evaluation_and_not_in_training() -> None:
    encoder = beats(dropout=0.3, activation_dropout=0.3)
    features, mask = clips([60, 33])
    first, second = (encoder(features, mask).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)
    encoder.train()
    first, second = (encoder(features, mask).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_a_fresh_kernel_of_places_has_the_lengths_of_its_slices() -> None:
    torch.manual_seed(0)
    places = BeatsEncoder(BeatsConfig(**TINY)).encoder.pos_conv[0]
    for k in range(6):
        assert float(places.weight_g[0, 0, k]) == pytest.approx(float(places.weight_v[:, :, k].norm()), rel=1e-5)


@torch.no_grad()
def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    encoder = beats()
    features, mask = clips([40, 20])
    encoder.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is BeatsConfig
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is BeatsEncoder
    assert torch.equal(loaded(features, mask).last_hidden_state, encoder(features, mask).last_hidden_state)
    again = load_encoder(str(tmp_path), read_config(str(tmp_path), "audio"))
    assert torch.equal(again(features, mask).last_hidden_state, encoder(features, mask).last_hidden_state)


@torch.no_grad()
def test_half_precision_is_near() -> None:
    encoder = beats()
    features, mask = clips([60, 44])
    expected = encoder(features, mask)
    found = encoder.to(torch.bfloat16)(features, mask)
    assert found.last_hidden_state.dtype == torch.bfloat16
    difference = (found.last_hidden_state.float() - expected.last_hidden_state)[expected.attention_mask]
    assert difference.abs().mean() < 0.05 * expected.last_hidden_state.abs().mean()


# ---------------------------------------------------------------- in a model


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def hearing_model() -> Composed:
    language = LanguagePart(random=LLAMA, chat_template=TEMPLATE, vocabulary=300)
    random = {"model_type": "avlm_beats", **TINY, "num_mel_bins": 128, "patch_size": 16}
    part = AudioPart(encoder=Source(random=random), connector=MlpConnector(stack=8))
    return compose(ModelConfig(language=language, audio=part), texts=["red green blue"] * 3)


@torch.no_grad()
def test_a_model_is_composed_with_it_saved_and_loaded(tmp_path: Path) -> None:
    made = hearing_model()
    assert type(made.model.model.audio_tower) is BeatsEncoder
    save_model(made.model, made.processor, tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    features, mask = clips([100], bins=128)
    ours, theirs = (m.model.get_audio_features(features, mask).pooler_output[0] for m in (made, loaded))
    assert torch.equal(ours, theirs)
    assert len(ours) == 6  # a token for each moment of 8 bands


@torch.no_grad()
def test_the_data_side_counts_what_the_model_gives() -> None:
    model, processor = hearing_model()
    spec = model.config.media_spec().audio
    assert spec is not None and (spec.rows, spec.max_frames) == (8, 200)
    for samples in range(3500, 24_000, 997):
        item = MediaItem("audio", decoded=Sound(np.ones(samples, np.float32), 16_000))
        row = pack([processor.encode(Sample("0", (Turn("user", (item,)), Turn("assistant", (Text("red"),)))))])
        (tokens,) = model.model.get_audio_features(row.input_features, row.input_features_mask).pooler_output
        assert len(tokens) == audio_token_count(samples, spec)


def test_its_words_are_told_moment_by_moment() -> None:
    """8 embeddings are one moment, 6.25 of them a second."""
    settings: dict[str, Any] = {"name": "s", "builds": "audio", "train": {"audio": {"lr": 1e-3}}, "rows": "audio"}
    stage = Stage.model_validate({**settings, "supervise": "words", "steps": 1})
    head = make_head(hearing_model().model, stage, 0)
    assert isinstance(head, SoundWords) and head.pool == 8


@pytest.mark.parametrize("layer", [0, 1, 3, -1, -4])
@torch.no_grad()
def test_a_layer_can_be_chosen(layer: int) -> None:
    encoder = beats()
    spec = audio_spec(encoder.config, AudioPart(encoder=Source(path="x"), layer=layer))
    features, mask = clips([40, 22, 9])
    states = encode_sounds(encoder, features, mask, spec, layer)
    output = encoder(features, mask, output_hidden_states=True)
    for i, found in enumerate(states):
        close(found, output.hidden_states[layer][i][output.attention_mask[i]])
