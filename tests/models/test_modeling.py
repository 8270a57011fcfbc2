"""The whole model: the same numbers packed, padded, alone, saved, adapted and trained by other people's tools."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from avlm.data.encode import pack
from avlm.errors import ConfigError, LayoutError
from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmForConditionalGeneration, AvlmModel
from avlm.samples import IGNORE, Encoded, Place, Row, Sample

KINDS: list[tuple[str, ...]] = [(), ("image",), ("audio",), ("image", "audio", "image"), ("video",), ("audio", "audio")]


def mixed(make_sample: Callable[..., Sample], kinds: list[tuple[str, ...]] = KINDS) -> list[Sample]:
    return [
        make_sample(*k, seed=i, seconds=0.2 + 0.07 * i, text="What is it?" + " red" * i, answer="blue" * (i % 3 + 1))
        for i, k in enumerate(kinds)
    ]


def inputs_of(row: Row) -> dict[str, Any]:
    media = ("pixel_values", "pixel_values_videos", "input_features", "input_features_mask")
    return {name: getattr(row, name) for name in media if getattr(row, name) is not None}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    atol = tolerance * float(expected.detach().abs().max()) + 1e-7  # some gradients are nothing but rounding
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


def slow_logits(model: AvlmForConditionalGeneration, sample: Encoded) -> Tensor:
    """One sample, one medium at a time, through the parts by hand and transformers' eager attention."""
    inner = model.model
    waiting: dict[int, list[Tensor]] = {model.config.image_token_id: [], model.config.audio_token_id: []}
    waiting[model.config.video_token_id] = []
    for pixels, token in [(p, model.config.image_token_id) for p in sample.images] + [
        (p, model.config.video_token_id) for p in sample.frames
    ]:
        waiting[token] += list(inner.vision_connector([inner.vision_tower(pixels[None]).last_hidden_state[0]]))
    for mel in (chunk.features for chunk in sample.sounds):
        tower = inner.audio_tower
        states = F.gelu(tower.conv2(F.gelu(tower.conv1(mel[None])))).transpose(1, 2)
        states = states + tower.embed_positions.weight[: states.shape[1]]
        for layer in tower.layers:
            states = layer(states, None)
        waiting[model.config.audio_token_id] += list(inner.audio_connector([tower.layer_norm(states)[0]]))
    table = model.get_input_embeddings()
    rows = [waiting[i].pop(0) if waiting.get(i) else table(torch.tensor(i)) for i in sample.ids]
    assert not any(waiting.values())
    language = model.language_model
    kept = language.config._attn_implementation
    language.set_attn_implementation("eager")
    logits: Tensor = language(inputs_embeds=torch.stack(rows)[None], use_cache=False).logits[0]
    language.set_attn_implementation(kept)
    return logits


def slow_loss(model: AvlmForConditionalGeneration, samples: list[Encoded]) -> Tensor:
    """Mean over target tokens of -log p(next token), summed one by one."""
    total, count = torch.zeros(()), 0
    for sample in samples:
        logs = slow_logits(model, sample).log_softmax(-1)
        for t in range(len(sample) - 1):
            if sample.labels[t + 1] != IGNORE:
                total, count = total - logs[t, sample.labels[t + 1]], count + 1
    return total / count


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(named, found, strict=True))


# ---------------------------------------------------------------- packed, padded, alone


@pytest.mark.parametrize("way", ["avlm", "sdpa", "eager"])
def test_packed_loss_and_gradients_are_those_of_each_sample_alone(
    way: str, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    samples = [processor.encode(s) for s in mixed(make_sample)]
    expected = slow_loss(model, samples)
    theirs = gradients(model, expected)
    assert all(theirs[n].abs().sum() > 0 for n in theirs if "connector" in n or "embed_tokens" in n)

    model.language_model.set_attn_implementation(way)
    row = pack(samples)
    output = model(
        row.input_ids,
        position_ids=row.position_ids,
        labels=row.labels,
        row_lengths=row.lengths,
        places=row.places,
        **inputs_of(row),
    )
    close(output.loss, expected)
    for name, gradient in gradients(model, output.loss).items():
        close(gradient, theirs[name], 1e-4 if "tower" in name else 1e-5)
    close(output.logits[0], torch.cat([slow_logits(model, s) for s in samples]))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_is_each_sample_alone(
    side: str, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    samples = [processor.encode(s) for s in mixed(make_sample)]
    batch = processor.collate(samples, side)
    output = model(**batch)
    close(output.loss, slow_loss(model, samples))
    for logits, mask, sample in zip(output.logits, batch["attention_mask"], samples, strict=True):
        close(logits[mask.bool()], slow_logits(model, sample))


@torch.no_grad()
def test_positions_and_labels_at_borders_follow_from_the_lengths_alone(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    samples = [processor.encode(s, supervise="everything") for s in mixed(make_sample)]
    row = pack(samples)
    everything = torch.tensor([[i for s in samples for i in s.labels]])
    assert (everything != row.labels).any()  # the first token of each sample stands in these labels
    output = model(row.input_ids, labels=everything, row_lengths=row.lengths, **inputs_of(row))
    close(output.loss, slow_loss(model, samples))


@torch.no_grad()
def test_logits_are_computed_where_they_are_wanted(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    row = pack([processor.encode(s) for s in mixed(make_sample)])
    whole = model(row.input_ids, row_lengths=row.lengths, **inputs_of(row)).logits
    at = torch.tensor([3, 10, 11])
    for keep, expected in ((at, whole[:, at]), (4, whole[:, -4:])):
        close(model(row.input_ids, row_lengths=row.lengths, logits_to_keep=keep, **inputs_of(row)).logits, expected)


class HeadstrongConfig(LlamaConfig):
    model_type = "headstrong"


class Headstrong(LlamaForCausalLM):
    """A language model that always computes every logit."""

    config_class = HeadstrongConfig

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


@torch.no_grad()
def test_a_language_model_that_knows_no_logits_to_keep(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    AutoConfig.register("headstrong", HeadstrongConfig, exist_ok=True)
    AutoModelForCausalLM.register(HeadstrongConfig, Headstrong, exist_ok=True)
    model, processor = make_model(language={"model_type": "headstrong"})
    assert type(model.language_model) is Headstrong
    samples = [processor.encode(s) for s in mixed(make_sample)]
    row = pack(samples)
    at = torch.tensor([2, 9])
    found = model(row.input_ids, row_lengths=row.lengths, logits_to_keep=at, **inputs_of(row)).logits
    close(found[0], torch.cat([slow_logits(model, s) for s in samples])[at])
    prompt = processor.collate([processor.encode(make_sample("image"), prompt_only=True)])
    prompt.pop("labels")
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("senses", [("text",), ("vision",), ("audio",)])
def test_any_subset_of_senses_is_a_model(
    senses: tuple[str, ...], make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    model, processor = make_model(*senses)
    kinds: list[tuple[str, ...]] = {"text": [()], "vision": [(), ("image",)], "audio": [(), ("audio",)]}[senses[0]]
    samples = [processor.encode(s) for s in mixed(make_sample, kinds)]
    row = pack(samples)
    output = model(row.input_ids, labels=row.labels, row_lengths=row.lengths, places=row.places, **inputs_of(row))
    close(output.loss, slow_loss(model, samples))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (again.model.vision_tower is None) == (senses != ("vision",))
    assert (again.model.audio_tower is None) == (senses != ("audio",))


@pytest.mark.parametrize(
    ("senses", "given", "message"),
    [
        ("audio", {"pixel_values": torch.zeros(1, 3, 28, 28)}, "pixels were given to a model without a vision part"),
        ("vision", {"input_features": torch.zeros(1, 80, 40)}, "sound was given to a model without an audio part"),
    ],
)
def test_a_medium_that_the_model_has_no_sense_for_is_refused(
    senses: str, given: dict[str, Tensor], message: str, make_model: Callable[..., Any]
) -> None:
    model, _ = make_model(senses)
    with pytest.raises(LayoutError, match=message):
        model(torch.tensor([[3, 4]]), **given)


def test_places_and_media_that_disagree_are_refused_by_name(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    row = pack([processor.encode(make_sample("image", "audio", seed=4))])
    wrong = [Place(p.sample_id, p.item, tuple(type(s)(s.kind, s.count + 1) for s in p.segments)) for p in row.places]
    with pytest.raises(LayoutError) as error:
        model(row.input_ids, row_lengths=row.lengths, places=wrong, **inputs_of(row))
    assert str(error.value).startswith('sample "4", item 0 (image): 5 places are reserved and the encoder made 4')
    media = inputs_of(row)
    del media["pixel_values"]
    with pytest.raises(LayoutError, match="the text reserves 4 image places, but the encoders returned 0 embeddings"):
        model(row.input_ids, row_lengths=row.lengths, **media)


def test_media_without_a_placeholder_in_the_configuration_are_not_dropped(make_model: Callable[..., Any]) -> None:
    model, _ = make_model()
    model.config.image_token_id = None
    with pytest.raises(LayoutError, match="has no image_token_id that reserves places"):
        model(torch.tensor([[3, 4]]), pixel_values=torch.zeros(1, 3, 28, 28))


def test_both_and_neither_of_tokens_and_embeddings_are_refused(make_model: Callable[..., Any]) -> None:
    model, _ = make_model("text")
    for each in (model, model.model):
        with pytest.raises(ConfigError, match="neither input_ids nor inputs_embeds is given"):
            each()
        with pytest.raises(ConfigError, match="input_ids and inputs_embeds are both given"):
            each(input_ids=torch.tensor([[3]]), inputs_embeds=torch.zeros(1, 1, 32))


# ---------------------------------------------------------------- as transformers models are used


@torch.no_grad()
def test_saved_and_loaded_by_every_auto_class_it_is_the_same_model(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed(make_sample)])
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is AvlmForConditionalGeneration
        close(again(**batch).logits, expected)
    del batch["labels"]
    inner, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(inner) is AvlmModel and not info["missing_keys"] and not info["unexpected_keys"]
    states = inner(**batch).last_hidden_state
    close(model.get_output_embeddings()(states), expected)

    assert {**AutoConfig.from_pretrained(tmp_path).to_dict(), "_name_or_path": ""} == model.config.to_dict()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.media == processor.media
    sample = make_sample("image", "audio")
    assert loaded.encode(sample).ids == processor.encode(sample).ids


@torch.no_grad()
@pytest.mark.parametrize("way", ["avlm", "sdpa", "eager", {"text_config": "eager", "vision_config": "sdpa"}])
def test_every_way_of_attending_gives_the_same_and_half_precision_nearly(
    way: Any, make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed(make_sample)])
    expected = model(**batch).logits[batch["attention_mask"].bool()]
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=way)
    assert again.language_model.config._attn_implementation == (way if isinstance(way, str) else "eager")
    output = again(**batch, output_hidden_states=True)
    close(output.logits[batch["attention_mask"].bool()], expected)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (*batch["input_ids"].shape, 32)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=way, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    found = half(**batch).logits[batch["attention_mask"].bool()].float()
    assert (found - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_the_inner_model_saves_and_loads_too_and_walls_samples_off(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    model, processor = make_model()
    model.model.save_pretrained(tmp_path)
    inner = AutoModel.from_pretrained(tmp_path)
    row = pack([processor.encode(s) for s in mixed(make_sample)])
    packed = inner(row.input_ids, row_lengths=row.lengths, places=row.places, **inputs_of(row)).last_hidden_state
    logits = model(row.input_ids, row_lengths=row.lengths, **inputs_of(row)).logits
    close(model.get_output_embeddings()(packed), logits)


@pytest.mark.parametrize("tied", [True, False])
def test_loading_and_saving_again_changes_no_name_and_no_tensor(
    tied: bool, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model, _ = make_model(language={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path / "0")
    for i in range(2):
        AutoModelForImageTextToText.from_pretrained(tmp_path / str(i)).save_pretrained(tmp_path / str(i + 1))
    first, last = (load_file(tmp_path / i / "model.safetensors") for i in ("0", "2"))
    assert first.keys() == last.keys() and all(torch.equal(first[k], last[k]) for k in first)
    assert set(first) <= set(model.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_others_apart(tied: bool, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, _ = make_model(language={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert (each.get_output_embeddings().weight is each.get_input_embeddings().weight) == tied


@torch.no_grad()
def test_embeddings_are_resized_with_everything_that_hangs_on_them(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed(make_sample)])
    size = model.get_input_embeddings().num_embeddings
    before = model(**batch).logits
    model.resize_token_embeddings(size + 7)
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == size + 7
    close(model(**batch).logits[..., :size], before)
    assert model(**batch).logits.shape[-1] == size + 7
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    close(again(**batch).logits, model(**batch).logits)


def test_gradient_checkpointing_changes_no_gradient(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    row = pack([processor.encode(s) for s in mixed(make_sample)])
    named = {"row_lengths": row.lengths, "labels": row.labels, "places": row.places, **inputs_of(row)}
    model.train()
    expected = gradients(model, model(row.input_ids, **named).loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 will call it activation checkpointing
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
    for name, gradient in gradients(model, model(row.input_ids, **named).loss).items():
        close(gradient, expected[name])


def test_a_tuple_is_returned_where_one_is_asked_for(make_model: Callable[..., Any]) -> None:
    model, _ = make_model("text")
    ids = torch.tensor([[13, 14, 15]])
    output = model(ids, labels=ids, return_dict=False)
    assert isinstance(output, tuple)
    close(output[0], model(ids, labels=ids).loss)
    close(output[1], model(ids).logits)
    assert isinstance(model.model(ids, return_dict=False), tuple)


@torch.no_grad()
def test_features_and_placeholders_are_given_as_transformers_gives_them(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    sample = processor.encode(make_sample("image", "audio", "image", "video", seed=5))
    batch = processor.collate([sample])
    output = model(**batch)
    images = model.get_image_features(batch["pixel_values"]).pooler_output
    frames = model.get_video_features(batch["pixel_values_videos"]).pooler_output
    told = model.get_image_features(batch["pixel_values"], return_dict=False)
    assert isinstance(told, tuple) and all(torch.equal(a, b) for a, b in zip(told[1], images, strict=True))
    sounds = model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output
    assert [len(i) for i in images] == [4, 4] and [len(f) for f in frames] == [4, 4] and len(sounds) == 2
    close(torch.cat(list(images)), output.image_hidden_states)
    close(torch.cat(list(frames)), output.video_hidden_states)
    close(torch.cat(list(sounds)), output.audio_hidden_states)
    masks = model.get_placeholder_mask(batch["input_ids"], None, images[0].new_zeros(8, 32))
    for mask, token in zip(masks, ("image", "video", "audio"), strict=True):
        assert torch.equal(mask[..., 0], batch["input_ids"] == getattr(model.config, f"{token}_token_id"))
    with pytest.raises(LayoutError, match="the text reserves 8 image places, and there are 3 embeddings"):
        model.get_placeholder_mask(batch["input_ids"], None, torch.zeros(3, 32))
    assert model.get_encoder("image") is model.model.vision_tower
    assert model.get_encoder("audio") is model.model.audio_tower


@torch.no_grad()
def test_embeddings_instead_of_tokens_have_their_places_filled(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed(make_sample)])
    expected = model(**batch).logits
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    close(model(**batch).logits, expected)


def test_peft_trains_saves_and_reloads_adapters(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model, processor = make_model()
    base = copy.deepcopy(model)
    batch = processor.collate([processor.encode(s) for s in mixed(make_sample)])
    names = r".*language_model.*\.(q_proj|v_proj)"
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    before = adapted(**batch).loss
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted(**batch)
    assert after.loss < before
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 50_000
    kept = copy.deepcopy(base)
    again = PeftModel.from_pretrained(base, tmp_path)
    close(again(**batch).logits, after.logits)
    kept.load_adapter(str(tmp_path))  # by transformers itself
    close(kept(**batch).logits, after.logits)
    kept.save_pretrained(tmp_path / "by transformers")
    kept.delete_adapter("default")
    kept.load_adapter(str(tmp_path / "by transformers"))
    close(kept(**batch).logits, after.logits)
    prompt = processor.collate([processor.encode(make_sample("image", "image"), prompt_only=True)])
    del prompt["labels"]
    assert torch.equal(
        again.generate(**prompt, max_new_tokens=3, do_sample=False),
        adapted.generate(**prompt, max_new_tokens=3, do_sample=False),
    )


def test_the_trainer_of_transformers_takes_steps_with_a_padded_collator(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    model, processor = make_model()
    samples = mixed(make_sample)[:4]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def collate(items: list[Sample]) -> dict[str, Any]:
        return dict(processor.collate([processor.encode(s) for s in items], "right"))

    trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=collate)  # type: ignore[arg-type]
    expected = float(slow_loss(model, [processor.encode(s) for s in samples]).detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.5)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(expected, rel=1e-4)  # the mean over the target tokens of all four, not of batches
    assert len(losses) == 2 and losses[1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    batch = collate(samples)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    close(again(**batch).logits, model.eval()(**batch).logits)


# ---------------------------------------------------------------- generate


def greedy_by_hand(model: AvlmForConditionalGeneration, inputs: dict[str, Tensor], steps: int) -> list[int]:
    """Read everything again for every token; no cache, no padding."""
    ids, found = inputs["input_ids"], []
    media = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "labels")}
    for _ in range(steps):
        logits = model(ids, **media).logits[0, -1]
        logits[model.placeholder_ids()] = -torch.inf
        found.append(int(logits.argmax()))
        if found[-1] == model.generation_config.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], 1)
    return found


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_generate_is_greedy_by_hand_for_every_prompt_of_a_batch(
    cache: bool, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    prompts = [processor.encode(s, prompt_only=True) for s in mixed(make_sample)]
    batch = processor.collate(prompts)
    del batch["labels"]
    found = model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cache)
    start = batch["input_ids"].shape[1]
    assert torch.equal(found[:, :start], batch["input_ids"])
    for row, prompt in zip(found, prompts, strict=True):
        by_hand = greedy_by_hand(model, processor.collate([prompt]), 5)
        assert row[start : start + len(by_hand)].tolist() == by_hand


@torch.no_grad()
def test_beams_keep_every_prompt_with_its_own_media(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    samples = [make_sample("image", "image", seed=1), make_sample("image", "audio", seed=2, seconds=0.5)]
    prompts = [processor.encode(s, prompt_only=True) for s in samples]
    settings: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    batch = processor.collate(prompts)
    del batch["labels"]
    together = model.generate(**batch, **settings)
    for i, prompt in enumerate(prompts):
        single = processor.collate([prompt])
        del single["labels"]
        alone = model.generate(**single, **settings)
        close(together.sequences_scores[2 * i : 2 * i + 2], alone.sequences_scores, 1e-4)
        # The score of a beam is what the model itself gives to its tokens, over their number.
        best = alone.sequences[0]
        tokens = best[len(prompt) :].tolist()
        media = {k: v for k, v in single.items() if k not in ("input_ids", "attention_mask")}
        logits = model(best[None], **media).logits[0, len(prompt) - 1 : -1]
        logs = logits.log_softmax(-1)
        score = sum(float(logs[t, token]) for t, token in enumerate(tokens)) / len(tokens)
        assert float(alone.sequences_scores[0]) == pytest.approx(score, rel=1e-4)


@torch.no_grad()
def test_sampling_many_answers_gives_each_its_own_prompts_media(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    batch = processor.collate(
        [processor.encode(make_sample("image", "image", seed=s), prompt_only=True) for s in (1, 2)]
    )
    del batch["labels"]
    settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    found = model.generate(**batch, **settings)[:, -1].tolist()
    greedy = model.generate(**batch, max_new_tokens=1, do_sample=False)[:, -1].tolist()
    assert found == [greedy[0]] * 3 + [greedy[1]] * 3


@torch.no_grad()
def test_generate_from_embeddings_fills_their_places(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    batch = processor.collate([processor.encode(make_sample("image", "audio"), prompt_only=True)])
    del batch["labels"]
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    found = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(found[:, -expected.shape[1] :], expected)


@torch.no_grad()
def test_a_placeholder_is_never_an_answer(make_model: Callable[..., Any], make_sample: Callable[..., Sample]) -> None:
    model, processor = make_model(language={"tie_word_embeddings": False})
    batch = processor.collate([processor.encode(make_sample("image"), prompt_only=True)])
    del batch["labels"]
    original = type(model.language_model).forward

    def eager_for_images(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits[..., model.config.image_token_id] = 1e4
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.language_model), "forward", eager_for_images)
        found = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert model.config.image_token_id not in found[0, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_tokens_that_the_caller_suppresses_are_no_answer_either(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    batch = processor.collate([processor.encode(make_sample("image", "audio"), prompt_only=True)])
    del batch["labels"]
    count = batch["input_ids"].shape[1]
    first = int(model.generate(**batch, max_new_tokens=1, do_sample=False)[0, count])
    second = int(model.generate(**batch, max_new_tokens=1, do_sample=False, suppress_tokens=[first])[0, count])
    logits = model(**batch).logits[0, -1]
    logits[[first, *model.placeholder_ids()]] = -torch.inf
    assert second == int(logits.argmax()) != first


@torch.no_grad()
@pytest.mark.parametrize("kinds", [(), ("image", "audio", "video")])
def test_a_model_whose_weights_lie_elsewhere_answers_the_same(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], kinds: tuple[str, ...]
) -> None:
    from accelerate import cpu_offload

    model, processor = make_model(vision={"vision_use_head": False})  # whose attention accelerate cannot move
    batch = processor.collate([processor.encode(make_sample(*kinds), prompt_only=True)])
    del batch["labels"]
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    away = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert away.device.type == "meta"
    assert torch.equal(away.generate(**batch, max_new_tokens=4, do_sample=False), expected)


@torch.no_grad()
def test_what_transformers_losses_take_reaches_them(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    batch = processor.collate([processor.encode(s) for s in mixed(make_sample)])
    labels = batch.pop("labels")
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].contiguous()
    logits = model(**batch).logits.float()

    def by_hand(targets: Tensor, ignored: int = IGNORE) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignored)

    close(model(**batch, labels=labels).loss, by_hand(shifted))
    close(model(**batch, shift_labels=shifted).loss, by_hand(shifted))
    other = torch.where(shifted == IGNORE, shifted, (shifted + 7) % 50)
    close(model(**batch, labels=labels, shift_labels=other).loss, by_hand(other))
    some = int(shifted[shifted != IGNORE][0])
    whole = labels.clamp_min(some)
    expected = by_hand(F.pad(whole, (0, 1), value=some)[:, 1:].contiguous(), some)
    close(model(**batch, labels=whole, ignore_index=some).loss, expected)
    assert model(**batch).loss is None


# ---------------------------------------------------------------- the configuration


def test_predictions_of_a_trainer_are_of_one_kind(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    """What differs with the media of a batch is no prediction: a Trainer would lay it end to end."""
    model, processor = make_model()
    for kinds in ((), ("image",), ("audio",), ("video",)):
        output = model(**processor.collate([processor.encode(make_sample(*kinds))]))
        assert [name for name in output if name not in model.config.keys_to_ignore_at_inference] == ["loss", "logits"]


def test_what_a_checkpoint_lacks_is_drawn_as_its_encoder_draws_it(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Whisper's positions are sinusoids, and no noise; what is there keeps its bits."""
    both = make_model()[0]
    seeing = {name: t for name, t in both.state_dict().items() if "audio" not in name}
    both.save_pretrained(tmp_path, state_dict=dict(seeing))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AvlmForConditionalGeneration.from_pretrained(tmp_path)
    positions = loaded.model.audio_tower.embed_positions.weight
    torch.testing.assert_close(positions, sinusoids(*positions.shape))
    for name, tensor in loaded.state_dict().items():
        assert "audio" in name or torch.equal(tensor, seeing[name]), name


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper (arXiv:2212.04356) has those of the first transformer, its sines first."""
    rates = torch.exp(-torch.arange(width // 2) * torch.log(torch.tensor(10_000.0)) / (width // 2 - 1))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def test_a_configuration_is_made_of_defaults_and_survives_the_way_through_json(make_model: Callable[..., Any]) -> None:
    assert AvlmConfig().text_config.model_type == "llama"
    config = make_model()[0].config
    again = AvlmConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.get_text_config() is again.text_config
    assert again.media_spec().vision is not None and again.tie_word_embeddings is True
    assert AvlmConfig(AutoConfig.for_model("gpt2")).to_dict()["text_config"]["model_type"] == "gpt2"


def test_an_unknown_media_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="sight"):
        AvlmConfig(media={"sight": {}})


def test_a_model_built_from_its_configuration_alone_has_values_everywhere(make_model: Callable[..., Any]) -> None:
    config = make_model()[0].config
    model = AvlmForConditionalGeneration(config)
    assert all(p.isfinite().all() and not p.is_meta for p in model.parameters())
