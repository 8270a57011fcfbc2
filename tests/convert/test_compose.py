"""A model from parts: what was released stays as it was, and what does not fit is said before it costs anything."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from avlm.config.connectors import MlpConnector, PoolConnector
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.convert.compose import Composed, compose
from avlm.convert.weights import load_model, save_model
from avlm.data.text.vocabulary import make_tokenizer
from avlm.errors import ConfigError, WeightsError
from avlm.samples import Sample

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = ["What do you see and hear? red green blue"] * 5
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP: dict[str, Any] = {
    "text_config": {**TEXT, "vocab_size": 50},
    "vision_config": {**TEXT, "image_size": 28, "patch_size": 14},
}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 50,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def plain_tokenizer(template: str | None = TEMPLATE, *, placeholders: bool = False) -> Any:
    """A released tokenizer: it knows nothing of media, unless asked to."""
    tokenizer = make_tokenizer(TEXTS, 320)
    if not placeholders:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("<image>", "<audio>", "<video>"):
            at = state["model"]["vocab"].pop(name)
            state["model"]["vocab"][f"<unused{at}>"] = at
            state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != name]
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)),
            pad_token="<|pad|>",
            eos_token="<|end|>",
            additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        )
        assert "<image>" not in tokenizer.get_vocab()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., Path]:
    """Write a part as if it had been downloaded; its weights are drawn afresh."""

    def write(kind: str, *, tokenizer: Any = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        torch.manual_seed(len(kind))
        model: PreTrainedModel
        if kind == "clip":
            model = CLIPModel(CLIPConfig(**CLIP))
        elif kind == "whisper":
            model = WhisperForConditionalGeneration(WhisperConfig(**WHISPER))
        else:
            tokenizer = tokenizer or plain_tokenizer()
            config: dict[str, Any] = {**TEXT, "vocab_size": len(tokenizer), "bos_token_id": None, **changes}
            config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            if kind == "mixtral":
                model = MixtralForCausalLM(MixtralConfig(**config, num_key_value_heads=2, num_local_experts=2))
            elif kind == "mamba":
                del config["num_attention_heads"], config["intermediate_size"]
                model = MambaForCausalLM(MambaConfig(**config, state_size=4))
            else:
                model = LlamaForCausalLM(LlamaConfig(**config, num_key_value_heads=2))
            tokenizer.save_pretrained(tmp_path / kind)
        model.to(dtype).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return write


def parts(language: Path, vision: Path | None = None, audio: Path | None = None, **settings: Any) -> ModelConfig:
    return ModelConfig(
        language=LanguagePart(path=str(language), **settings),
        vision=None if vision is None else VisionPart(encoder=Source(path=str(vision))),
        audio=None if audio is None else AudioPart(encoder=Source(path=str(audio)), connector=MlpConnector(stack=2)),
    )


def by_suffix(weights: dict[str, Tensor], inside: str) -> dict[str, Tensor]:
    return {name.split(inside, 1)[1]: tensor for name, tensor in weights.items() if inside in name}


# ---------------------------------------------------------------- what was released stays


def test_every_released_weight_is_kept_bit_for_bit(release: Callable[..., Path], tmp_path: Path) -> None:
    llama, clip, whisper = release("llama"), release("clip"), release("whisper")
    model, processor = compose(parts(llama, clip, whisper))
    save_model(model, processor, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")

    for made in (model, again):
        ours = dict(made.model.language_model.state_dict())
        for name, tensor in load_file(llama / "model.safetensors").items():
            grown = ours[name][: len(tensor)] if name in ("model.embed_tokens.weight", "lm_head.weight") else ours[name]
            assert torch.equal(grown, tensor), name
        vision = dict(made.model.vision_tower.state_dict())
        released = by_suffix(load_file(clip / "model.safetensors"), "vision_model.")
        assert released and vision.keys() == released.keys()
        assert all(torch.equal(vision[n], released[n]) for n in released)
        audio = dict(made.model.audio_tower.state_dict())
        released = by_suffix(load_file(whisper / "model.safetensors"), "model.encoder.")
        assert released and audio.keys() == released.keys()
        assert all(torch.equal(audio[n], released[n]) for n in released)


@torch.no_grad()
def test_text_alone_gives_the_released_models_logits(release: Callable[..., Path]) -> None:
    llama = release("llama")
    released = AutoModelForCausalLM.from_pretrained(llama).eval()
    model, _ = compose(parts(llama, release("clip")))
    ids = torch.tensor([[10, 40, 7, 99]])
    ours, theirs = model(ids).logits[..., : released.config.vocab_size], released(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_other_kinds_of_language_models_are_parts_too(
    kind: str, release: Callable[..., Path], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    folder = release(kind)
    released = AutoModelForCausalLM.from_pretrained(folder).eval()
    made = compose(parts(folder, release("clip")))
    save_model(*made, tmp_path / "out")
    ids = torch.tensor([[10, 40, 7, 99]])
    for model, processor in (made, load_model(tmp_path / "out")):
        ours = model(ids).logits[..., : released.config.vocab_size]
        torch.testing.assert_close(ours, released(ids).logits, rtol=1e-5, atol=1e-5)
        sample = processor.encode(make_sample("image"))
        output = model(
            torch.tensor([sample.ids + sample.ids]),
            labels=torch.tensor([sample.labels + sample.labels]),
            row_lengths=[len(sample)] * 2,
            pixel_values=torch.stack(sample.images * 2),
        )
        alone = model(
            torch.tensor([sample.ids]), labels=torch.tensor([sample.labels]), pixel_values=torch.stack(sample.images)
        )
        torch.testing.assert_close(output.loss, alone.loss, rtol=1e-5, atol=1e-6)


def test_the_vocabulary_grows_for_placeholders_and_only_then(release: Callable[..., Path]) -> None:
    bare, ready = plain_tokenizer(), plain_tokenizer(placeholders=True)
    grown, processor = compose(parts(release("llama", tokenizer=bare)))
    size = len(ready)  # the bare one had unused tokens in the place of placeholders
    assert grown.get_input_embeddings().num_embeddings == grown.get_output_embeddings().weight.shape[0] == size + 3
    assert grown.config.text_config.vocab_size == size + 3 == len(processor.tokenizer)
    ids = [grown.config.image_token_id, grown.config.audio_token_id, grown.config.video_token_id]
    assert ids == [size, size + 1, size + 2]

    same, _ = compose(parts(release("llama", tokenizer=ready)))
    assert same.get_input_embeddings().num_embeddings == size
    assert same.config.image_token_id == ready.convert_tokens_to_ids("<image>")

    roomy, _ = compose(parts(release("llama", tokenizer=bare, vocab_size=512)))
    assert roomy.get_input_embeddings().num_embeddings == 512


def test_half_precision_is_kept_and_computed_tables_are_not_rounded(
    release: Callable[..., Path], tmp_path: Path
) -> None:
    llama = release("llama", dtype=torch.bfloat16)
    model, processor = compose(parts(llama, release("clip"), release("whisper")))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    released = AutoModelForCausalLM.from_pretrained(llama)
    tables = {n: b for n, b in released.named_buffers() if "inv_freq" in n}
    ours = dict(model.language_model.named_buffers())
    assert tables and all(ours[n].dtype == torch.float32 and torch.equal(ours[n], tables[n]) for n in tables)
    save_model(model, processor, tmp_path / "out")
    again, _ = load_model(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_generation_settings_come_along_and_end_where_the_template_ends(
    release: Callable[..., Path], tmp_path: Path
) -> None:
    llama = release("llama")
    GenerationConfig(eos_token_id=[70, 71], temperature=0.6, do_sample=True, top_p=0.9).save_pretrained(llama)
    model, processor = compose(parts(llama))
    save_model(model, processor, tmp_path / "out")
    for settings in (model.generation_config, load_model(tmp_path / "out").model.generation_config):
        assert settings.eos_token_id == [70, 71, processor.tokenizer.eos_token_id]
        assert (settings.temperature, settings.top_p, settings.do_sample) == (0.6, 0.9, True)


def test_the_chat_template_is_the_runs_or_else_the_tokenizers(
    release: Callable[..., Path], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    llama = release("llama")
    own = TEMPLATE.replace("<|user|>", "<|system|>").replace("'role'", "'role'") + " "
    for given, expected in ((None, TEMPLATE), (own, own)):
        model, processor = compose(parts(llama, chat_template=given))
        save_model(model, processor, tmp_path / "out")
        for each in (processor, load_model(tmp_path / "out").processor):
            assert each.tokens().template == expected


def test_a_tokenizer_without_a_pad_token_is_no_obstacle(
    release: Callable[..., Path], make_sample: Callable[..., Sample]
) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.pad_token = None
    model, processor = compose(parts(release("llama", tokenizer=tokenizer), release("clip")))
    assert processor.tokenizer.pad_token_id is None
    samples = [processor.encode(make_sample(*k, seed=i), prompt_only=True) for i, k in enumerate([("image",), ()])]
    batch = processor.collate(samples)
    del batch["labels"]
    together = model.generate(**batch, max_new_tokens=3, do_sample=False)
    for i, sample in enumerate(samples):
        single = processor.collate([sample])
        del single["labels"]
        alone = model.generate(**single, max_new_tokens=3, do_sample=False)
        start = batch["input_ids"].shape[1]
        length = alone.shape[1] - len(sample)
        assert together[i, start : start + length].tolist() == alone[0, len(sample) :].tolist()


def test_the_released_preprocessing_is_read_where_it_lies(release: Callable[..., Path]) -> None:
    llama, clip = release("llama"), release("clip")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    for name, content in (
        ("processor_config.json", {"image_processor": settings}),  # as transformers 5 writes a whole processor
        ("preprocessor_config.json", {**settings, "image_mean": [0.7, 0.2, 0.3]}),
    ):
        (clip / name).write_text(json.dumps(content))
        spec = compose(parts(llama, clip)).model.config.media_spec().vision
        assert spec is not None and spec.std == (0.4, 0.5, 0.6)
        assert spec.mean[0] == (0.1 if name == "processor_config.json" else 0.7)


# ---------------------------------------------------------------- what is drawn afresh


def fresh(seed: int = 0, **language: Any) -> Composed:
    config = ModelConfig(
        language=LanguagePart(
            random={"model_type": "llama", **TEXT, **language}, chat_template=TEMPLATE, vocabulary=320
        ),
        vision=VisionPart(encoder=Source(random={"model_type": "clip_vision_model", **CLIP["vision_config"]})),
        audio=AudioPart(encoder=Source(random={"model_type": "whisper", **WHISPER}), connector=PoolConnector(tokens=5)),
    )
    return compose(config, seed=seed, texts=TEXTS)


def test_fresh_weights_follow_from_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = fresh(seed=1).model.state_dict()
    assert torch.equal(torch.rand(3), expected)
    torch.rand(11)
    second, other = fresh(seed=1).model.state_dict(), fresh(seed=2).model.state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)
    drawn = [n for n in first if ("connector" in n and n.endswith("linear.weight")) or "q_proj.weight" in n]
    assert drawn and all(not torch.equal(first[n], other[n]) for n in drawn)


def test_connectors_between_released_parts_follow_from_the_seed_too(release: Callable[..., Path]) -> None:
    config = parts(release("llama"), release("clip"))
    one, same, other = (compose(config, seed=s).model.state_dict() for s in (3, 3, 4))
    assert all(torch.equal(one[n], same[n]) for n in one)
    names = {n for n in one if not torch.equal(one[n], other[n])}
    assert names == {n for n in one if "connector" in n}


def test_whispers_sinusoids_are_those_of_transformers() -> None:
    ours = fresh().model.model.audio_tower.embed_positions.weight
    theirs = WhisperForConditionalGeneration(WhisperConfig(**WHISPER)).get_encoder().embed_positions.weight
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ---------------------------------------------------------------- refusals


def message_of(kind: type[Exception], config: ModelConfig, **kwargs: Any) -> str:
    with pytest.raises(kind) as error:
        compose(config, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("part", ["language", "vision", "audio"])
def test_a_folder_that_is_not_there_is_refused(part: str, release: Callable[..., Path], tmp_path: Path) -> None:
    folders = {"language": release("llama"), "vision": None, "audio": None, part: tmp_path / "nowhere"}
    name = part if part == "language" else f"{part}.encoder"
    assert message_of(ConfigError, parts(**folders)) == (
        f"model.{name}: there is no folder {tmp_path}/nowhere. "
        "Give an existing folder in Hugging Face format, or a hub name"
    )


def test_a_tokenizer_without_a_chat_template_is_refused_before_weights_are_read(
    release: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = release("llama", tokenizer=plain_tokenizer(None))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    message = message_of(ConfigError, parts(llama))
    assert message.startswith(f"the tokenizer {llama} has no chat template")
    assert message.endswith("Set model.language.chat_template to a Jinja template")


def test_an_encoder_family_without_a_record_is_refused(release: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "swin").mkdir()
    (tmp_path / "swin" / "config.json").write_text('{"model_type": "swin"}')
    message = message_of(ConfigError, parts(release("llama"), tmp_path / "swin"))
    assert message.startswith("swin is not a vision encoder that avlm has a record of")


def test_pickled_weights_are_refused(release: Callable[..., Path]) -> None:
    for kind in ("llama", "clip", "whisper"):
        folder = release(kind)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        pair = {"clip": "vision", "whisper": "audio"}.get(kind)
        config = parts(folder) if pair is None else parts(release("llama"), **{pair: folder})
        message = message_of(WeightsError, config)
        assert "cannot be loaded" in message and ".safetensors weights" in message


BOMB = "open({0!r}, 'w').write('boom')\nclass Bomb: pass\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_folder_is_never_run(
    file: str, known: bool, release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("somebody was asked whether to trust the code"))
    llama, marker = release("llama"), tmp_path / "ran"
    (llama / "bomb.py").write_text(BOMB.format(str(marker)))
    settings = json.loads((llama / file).read_text())
    settings["auto_map"] = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "bomb.Bomb"
    ) | {"AutoTokenizer": ["bomb.Bomb", "bomb.Bomb"]}  # fmt: skip
    if not known:
        settings |= {"model_type": "bomb", "tokenizer_class": "Bomb"}
    (llama / file).write_text(json.dumps(settings))
    try:
        compose(parts(llama))
    except WeightsError as error:
        assert not known and "cannot be loaded" in str(error)  # noqa: PT017 - either way is right, running it is not
    assert not marker.exists()


def test_a_language_model_with_a_weight_missing_is_refused(release: Callable[..., Path]) -> None:
    from safetensors.torch import save_file

    llama = release("llama")
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    assert message_of(WeightsError, parts(llama)) == (
        f"model.language: {llama} lacks 1 weights of a llama, model.layers.1.mlp.up_proj.weight among them. "
        "Give the folder of a whole checkpoint"
    )


def test_a_truncated_file_of_weights_is_refused(release: Callable[..., Path]) -> None:
    for kind, pair in (("llama", None), ("clip", "vision")):
        folder = release(kind)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        config = parts(folder) if pair is None else parts(release("llama"), **{pair: folder})
        assert "cannot be loaded" in message_of(WeightsError, config)


def test_weights_of_another_size_than_the_configuration_says_are_refused(release: Callable[..., Path]) -> None:
    llama = release("llama")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "cannot be loaded" in message_of(WeightsError, parts(llama))


def test_a_checkpoint_without_the_encoder_is_refused(release: Callable[..., Path], tmp_path: Path) -> None:
    llama, clip = release("llama"), release("clip")
    shutil.copy(llama / "model.safetensors", clip / "model.safetensors")
    message = message_of(WeightsError, parts(llama, clip))
    assert "weights of the clip_vision_model encoder are missing" in message


@pytest.mark.parametrize(
    ("random", "message"),
    [
        ({"model_type": "lama"}, "model.language.random is not a configuration that transformers knows"),
        ({"model_type": "llama", "hidden_size": "wide"}, "model.language.random is not a configuration"),
        ({"model_type": "llama", "vocab_size": 200}, "model.language.random.vocab_size=200 is less than the 2"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(random: dict[str, Any], message: str) -> None:
    config = ModelConfig(language=LanguagePart(random=random, chat_template=TEMPLATE, vocabulary=320))
    assert message_of(ConfigError, config, texts=TEXTS).startswith(message)


def test_random_weights_without_a_tokenizer_and_texts_are_refused() -> None:
    config = ModelConfig(language=LanguagePart(random={"model_type": "llama"}))
    assert message_of(ConfigError, config).startswith("model.language has random weights and no tokenizer")
