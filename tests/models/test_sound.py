"""Sound in the whole model: chunks end to end, each clip at its own places, two encoders side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avlm.config.connectors import LinearConnector, MlpConnector, PoolConnector
from avlm.config.media import MediaSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source
from avlm.config.stage import Augment, Stage, TrainPart
from avlm.convert.compose import compose
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.data.media.features import heard_chunks
from avlm.errors import ConfigError, LayoutError
from avlm.layout import audio_token_count
from avlm.models.hearing import encode_sounds
from avlm.samples import MediaItem, Sample, Sound, Text, Turn
from avlm.training.loss import row_loss
from avlm.training.stages import part_modules, prepare
from avlm.training.trade import make_head, words_loss

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "model_type": "whisper", "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "num_mel_bins": 80, "init_std": 0.2,
}  # fmt: skip
HUBERT: dict[str, Any] = {
    "model_type": "hubert", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "initializer_range": 0.2,
}  # fmt: skip


def composed(audio: AudioPart, seed: int = 0) -> Any:
    language = LanguagePart(random=LLAMA, chat_template=TEMPLATE, vocabulary=400)
    texts = [f"What is said at number {i}? red green blue one two" for i in range(30)]
    made = compose(ModelConfig(language=language, audio=audio), seed=seed, texts=texts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.model.model.audio_connector.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(16_000 * seconds))).astype(np.float32)


def asked(*waves: np.ndarray, answer: str = "red") -> Sample:
    items = tuple(MediaItem("audio", decoded=Sound(wave, 16_000), alt=answer) for wave in waves)
    turns = (Turn("user", (*items, Text("What is said?"))), Turn("assistant", (Text(answer),)))
    return Sample("1", turns)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    ("length", "connector", "tokens"),
    [
        ("true", MlpConnector(), [1500, 750]),
        ("window", MlpConnector(), [1500, 1500]),
        ("true", MlpConnector(stack=8), [188, 94]),
        ("true", PoolConnector(tokens=250), [250, 250]),
    ],
)
@torch.no_grad()
def test_forty_five_seconds_are_two_chunks_each_heard_and_connected_by_itself(
    length: Any, connector: Any, tokens: list[int]
) -> None:
    model, processor = composed(AudioPart(encoder=Source(random=WHISPER), connector=connector, length=length))
    wave = noise(45)
    encoded = processor.encode(asked(wave))
    assert encoded.ids.count(model.config.audio_token_id) == sum(tokens)
    row = pack([encoded])
    assert row.input_features.shape[:2] == (2, 80)
    assert row.chunks == [2]
    found = model.get_audio_features(row.input_features, row.input_features_mask)
    assert [len(chunk) for chunk in found.pooler_output] == tokens
    for chunk, part in zip(found.pooler_output, (wave[:480_000], wave[480_000:]), strict=True):
        alone = pack([processor.encode(asked(part))])
        close(chunk, model.get_audio_features(alone.input_features, alone.input_features_mask).pooler_output[0])
    embeds, _ = model.model.embed(
        row.input_ids,
        input_features=row.input_features,
        input_features_mask=row.input_features_mask,
        places=row.places,
    )
    at = row.input_ids[0] == model.config.audio_token_id
    close(embeds[0, at], torch.cat(list(found.pooler_output)))


def test_a_missing_chunk_is_told_by_sample_and_item() -> None:
    model, processor = composed(AudioPart(encoder=Source(random=WHISPER), connector=MlpConnector(stack=8)))
    row = pack([processor.encode(asked(noise(2, 1), noise(40, 2)))])
    assert row.chunks == [1, 2]
    with pytest.raises(LayoutError) as error:
        model.model.embed(
            row.input_ids,
            input_features=row.input_features[:-1],
            input_features_mask=row.input_features_mask[:-1],
            places=row.places,
        )
    assert str(error.value).startswith(
        'sample "1", item 1 (audio): 251 places are reserved and the encoder made 188 embeddings.'
    )


@torch.no_grad()
def test_a_rest_too_short_for_the_encoder_is_heard_too() -> None:
    """HuBERT makes nothing of less than 400 samples."""
    part = AudioPart(encoder=Source(random=HUBERT), connector=LinearConnector(), chunk_s=1)
    model, processor = composed(part)
    for extra, tokens in ((0, 49), (1, 50), (399, 50), (400, 50), (16_000, 98), (16_001, 99)):
        encoded = processor.encode(asked(noise(1 + extra / 16_000, extra)))
        assert encoded.ids.count(model.config.audio_token_id) == tokens
        model(**processor.collate([encoded]))


# ---------------------------------------------------------------- whose is whose


@torch.no_grad()
def test_each_clips_tokens_stand_at_that_clips_places() -> None:
    """NeMo's AVLM mixes clips where a batch has two: features in the order of time, places in that of clips."""
    model, processor = composed(AudioPart(encoder=Source(random=WHISPER), connector=MlpConnector(stack=4)))
    waves = [noise(seconds, i) for i, seconds in enumerate((0.6, 1.3, 0.25, 31.0, 0.6))]
    samples = [processor.encode(asked(waves[0], waves[1])), processor.encode(asked(*waves[2:]))]
    row = pack(samples)
    embeds, _ = model.model.embed(
        row.input_ids,
        input_features=row.input_features,
        input_features_mask=row.input_features_mask,
        places=row.places,
    )
    at = (row.input_ids[0] == model.config.audio_token_id).nonzero().flatten().tolist()
    for wave in waves:
        alone = pack([processor.encode(asked(wave))])
        expected = torch.cat(
            list(model.get_audio_features(alone.input_features, alone.input_features_mask).pooler_output)
        )
        mine, at = at[: len(expected)], at[len(expected) :]
        for row_of_it, token in zip(mine, expected, strict=True):
            close(embeds[0, row_of_it], token)
    assert not at
    assert not torch.allclose(embeds[0, 2], embeds[0, 3])  # otherwise any order would do


@torch.no_grad()
def test_a_padded_batch_answers_as_each_alone_does() -> None:
    model, processor = composed(AudioPart(encoder=Source(random=HUBERT), connector=MlpConnector(stack=4), chunk_s=1))
    samples = [processor.encode(asked(noise(seconds, i)), prompt_only=True) for i, seconds in enumerate((0.3, 2.2, 1))]
    together = model(**without_labels(processor.collate(samples))).logits
    for i, sample in enumerate(samples):
        close(together[i, -1], model(**without_labels(processor.collate([sample]))).logits[0, -1])


def without_labels(batch: Any) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


# ---------------------------------------------------------------- two encoders


def salmonn(connector: Any = None, length: Any = "true", **kwargs: Any) -> Any:
    connector = connector or LinearConnector(stack=17)
    part = AudioPart(
        encoder=Source(random=WHISPER), beside=Source(random=HUBERT), connector=connector, length=length, **kwargs
    )
    return composed(part)


@pytest.mark.parametrize("length", ["true", "window"])
@torch.no_grad()
def test_two_encoders_hear_every_chunk_and_are_joined_on_channels(length: Any) -> None:
    model, processor = salmonn(LinearConnector(), length)
    wave = noise(33.3)
    row = pack([processor.encode(asked(wave))])
    inner, spec = model.model, model.config.media_spec().audio
    expected = []
    for part in (wave[:480_000], wave[480_000:]):
        (chunk,) = heard_chunks(part, spec)
        (first,) = encode_sounds(inner.audio_tower, *alone(chunk), spec)
        (second,) = encode_sounds(inner.audio_beside_tower, *alone(chunk.beside), spec.beside)
        longest = max(len(first), len(second))
        assert len(first) != len(second)
        joined = torch.zeros(longest, 16 + 24)
        joined[: len(first), :16] = nn.functional.layer_norm(first, (16,))
        joined[: len(second), 16:] = nn.functional.layer_norm(second, (24,))
        expected.append(joined @ inner.audio_connector.connector.layers[0].weight.T)
        expected[-1] += inner.audio_connector.connector.layers[0].bias
    found = model.get_audio_features(
        row.input_features, row.input_features_mask, row.input_features_beside, row.input_features_beside_mask
    ).pooler_output
    for theirs, ours in zip(expected, found, strict=True):
        close(ours, theirs)
    assert sum(map(len, found)) == audio_token_count(len(wave), spec)


def alone(chunk: Any) -> tuple[Tensor, Tensor]:
    return chunk.features[None], (torch.arange(chunk.features.shape[1]) < chunk.frames)[None]


def test_salmonns_rate() -> None:
    """One query for each 17 of Whisper's 1500 frames: 88 or 89 tokens for 30 s (arXiv:2310.13289)."""
    _, processor = salmonn()
    assert audio_token_count(480_000, processor.media_spec().audio) == 89


@torch.no_grad()
def test_a_batch_of_two_encoders_is_each_alone() -> None:
    model, processor = salmonn(chunk_s=1)
    samples = [processor.encode(asked(noise(seconds, i)), prompt_only=True) for i, seconds in enumerate((0.3, 2.2, 1))]
    together = model(**without_labels(processor.collate(samples))).logits
    for i, sample in enumerate(samples):
        close(together[i, -1], model(**without_labels(processor.collate([sample]))).logits[0, -1])
    batch = without_labels(processor.collate(samples))
    model.generation_config.eos_token_id = None
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert answers.shape == (3, batch["input_ids"].shape[1] + 4)


def test_both_encoders_are_parts_that_freeze_and_train_by_themselves() -> None:
    config = ModelConfig(
        language=LanguagePart(random=LLAMA, chat_template=TEMPLATE),
        audio=AudioPart(encoder=Source(random=WHISPER), beside=Source(random=HUBERT)),
    )
    assert config.parts() == ("audio", "audio_beside", "audio_connector", "language")
    model, processor = salmonn(LinearConnector(stack=4))
    assert tuple(part_modules(model)) == config.parts()
    row = pack([processor.encode(asked(noise(0.5)))])
    for part in ("audio", "audio_beside", "audio_connector"):
        trained = prepare(model, Stage(name="a", rows="audio", train={part: TrainPart(lr=1e-3)}, steps=1))
        assert tuple(trained) == (part,)
        model.zero_grad()
        row_loss(model, row).backward()
        reached = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {{"audio": "audio_tower", "audio_beside": "audio_beside_tower"}.get(part, part)}
        if part == "audio_connector":
            norms = [p.grad for name, p in model.named_parameters() if "norm" in name and "connector" in name]
            assert len(norms) == 4
            assert all(g is not None and g.abs().sum() > 0 for g in norms)


@torch.no_grad()
def test_a_model_of_two_encoders_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    model, processor = salmonn()
    save_model(model, processor, tmp_path / "m")
    again = load_model(tmp_path / "m")
    batch = without_labels(processor.collate([processor.encode(asked(noise(0.7)), prompt_only=True)]))
    assert set(batch) >= {"input_features_beside", "input_features_beside_mask"}
    torch.testing.assert_close(again.model(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert again.processor.media_spec() == processor.media_spec()
    assert MediaSpec.model_validate(model.config.media) == processor.media_spec()


def test_a_sound_that_the_second_encoder_did_not_get_is_refused() -> None:
    model, processor = salmonn()
    row = pack([processor.encode(asked(noise(0.7)))])
    with pytest.raises(LayoutError) as error:
        model.get_audio_features(row.input_features, row.input_features_mask)
    assert str(error.value) == (
        "1 chunks of sound were given for the first audio encoder and 0 for the second, and both hear the same. "
        "Prepare the data with the model's own processor"
    )


def test_a_missing_folder_of_the_second_encoder_is_told_by_its_name() -> None:
    part = AudioPart(encoder=Source(random=WHISPER), beside=Source(path="./nowhere"))
    with pytest.raises(ConfigError, match=r"^model\.audio\.beside: there is no folder \./nowhere"):
        composed(part)


# ---------------------------------------------------------------- while it learns


def test_an_encoder_that_learns_words_gets_them_for_each_sound_not_for_each_chunk() -> None:
    model, processor = composed(AudioPart(encoder=Source(random=WHISPER), connector=LinearConnector(), chunk_s=1))
    stage = Stage(name="ears", builds="audio", rows="audio", supervise="words", train={"audio": TrainPart(lr=1e-3)},
                  steps=1)  # fmt: skip
    head = make_head(model, stage, 0)
    sample = asked(noise(2.5, 1), noise(0.4, 2))
    row = pack([processor.encode(sample, supervise="words")])
    assert (row.chunks, len(row.words)) == ([3, 1], 2)
    with torch.no_grad():
        whole = words_loss(model, head, row)
        each = [
            words_loss(model, head, pack([processor.encode(asked(w), supervise="words")])) for w in waves_of(sample)
        ]
    close(whole, torch.stack(each).sum())


def waves_of(sample: Sample) -> list[np.ndarray]:
    return [item.decoded.waveform for item in sample.media()]


def test_changes_reach_every_chunk_and_both_encoders() -> None:
    _, processor = composed(AudioPart(encoder=Source(random=WHISPER), beside=Source(random=WHISPER), chunk_s=1))
    plain = processor.encode(asked(noise(2.5)))
    changed = processor.encode(asked(noise(2.5)), augment=(Augment(mask_bins=20), np.random.default_rng(0)))
    assert len(changed.sounds) == len(plain.sounds) == 3
    for ours, theirs in zip(changed.sounds, plain.sounds, strict=True):
        assert not torch.equal(ours.features, theirs.features)
        assert not torch.equal(ours.beside.features, theirs.beside.features)


@pytest.mark.parametrize(
    "audio",
    [
        {"model_type": "audio-spectrogram-transformer", "hidden_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 32, "num_mel_bins": 32, "max_length": 60},
        {"model_type": "wav2vec2-bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32},
        {"model_type": "parakeet_encoder", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "subsampling_conv_channels": 4},
        {"model_type": "clap_audio_model", "patch_embeds_hidden_size": 8, "depths": [1, 1, 1, 1],
         "num_attention_heads": [1, 1, 1, 1], "hidden_size": 64},
        {"model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
         "encoder_ffn_dim": 32, "max_source_positions": 100, "num_mel_bins": 16},
    ],
    ids=lambda audio: audio["model_type"],
)  # fmt: skip
def test_a_model_with_any_encoder_learns_and_answers(audio: dict[str, Any], make_sample: Callable[..., Any]) -> None:
    model, processor = composed(AudioPart(encoder=Source(random=audio), connector=LinearConnector(stack=4)))
    samples = [processor.encode(make_sample("audio", "audio", seed=i, seconds=0.4 + 0.9 * i)) for i in range(2)]
    row = pack(samples)
    model.train()
    before = row_loss(model, row).item()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        row_loss(model, row).backward()
        optimizer.step()
    assert row_loss(model, row).item() < before
    batch = without_labels(processor.collate([processor.encode(make_sample("audio"), prompt_only=True)]))
    assert model.eval().generate(**batch, max_new_tokens=3).shape[0] == 1
