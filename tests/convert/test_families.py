# ruff: noqa: E501 (whole messages are compared)
"""Outside models in and ours out: the same numbers, the same bits, and nothing that does not fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import outside
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from avlm.convert.exporting import TEXT_OF_PARTS, export_model
from avlm.convert.families import FAMILIES, released
from avlm.convert.importing import import_model
from avlm.convert.streaming import read_files, write_files
from avlm.convert.weights import load_model, save_model
from avlm.errors import ConfigError, MediaError, WeightsError
from avlm.models.audio_encoders import AUDIO_FAMILIES
from avlm.models.encoders import load_encoder, read_config
from avlm.models.vision_encoders import CLIP_STD
from avlm.samples import Clip, MediaItem, Picture, Sample, Text, Turn

QUESTION = "What is it?"


def picture(seed: int = 0, height: int = outside.SIDE, width: int = outside.SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(given: Image.Image | None = None) -> list[dict[str, Any]]:
    medium = {"type": "image"} if given is None else {"type": "image", "image": given}
    return [{"role": "user", "content": [medium, {"type": "text", "text": QUESTION}]}]


def their_inputs(folder: Path, given: Image.Image) -> Any:
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(asked(), add_generation_prompt=True)
    return processor(text=text, images=given, return_tensors="pt", add_special_tokens=not text.startswith("<s>"))


def our_inputs(processor: Any, given: Image.Image) -> Any:
    return processor.apply_chat_template(asked(given), tokenize=True, return_dict=True, add_generation_prompt=True)


def equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A LLaVA-1.5 in transformers' format, and the model that it holds."""
    folder = tmp_path_factory.mktemp("llava") / "hf"
    return folder, outside.llava(folder)


@pytest.fixture(scope="module")
def imported(hf: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "model"
    import_model(str(hf[0]), out)
    return out


# ---------------------------------------------------------------- in


@torch.no_grad()
def test_an_imported_llava_reads_the_same_prompt_to_the_same_logits_and_the_same_answer(
    hf: tuple[Path, Any], imported: Path
) -> None:
    model, processor = load_model(imported)
    theirs, ours = their_inputs(hf[0], picture()), our_inputs(processor, picture())
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-6)
    logits = hf[1](**theirs).logits
    same = model(**{**ours, "pixel_values": theirs["pixel_values"]}).logits
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(**ours).logits, logits, rtol=0, atol=1e-4)  # of pixels that round differently
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(**ours, **settings), hf[1].generate(**theirs, **settings))


@pytest.mark.parametrize("size", [(48, 64), (90, 31), (300, 29)])
def test_its_pictures_of_other_shapes_are_resized_and_cropped_as_theirs(
    hf: tuple[Path, Any], imported: Path, size: tuple[int, int]
) -> None:
    """Pillow and torch round differently while they resize: a grey level apart here and there."""
    smooth = picture(2, 5, 5).resize(size, Image.Resampling.BICUBIC)
    theirs = their_inputs(hf[0], smooth)["pixel_values"]
    ours = our_inputs(load_model(imported).processor, smooth)["pixel_values"]
    apart = ((ours - theirs) * 255 * torch.tensor(CLIP_STD)[:, None, None]).abs()
    assert apart.max() < 1.01 and apart.mean() < 0.1


def test_a_conversation_goes_on_as_theirs_but_with_the_end_token_of_training(imported: Path) -> None:
    processor = load_model(imported).processor
    told = [*asked(picture()), {"role": "assistant", "content": "red"}, {"role": "user", "content": "Sure?"}]
    text = processor.apply_chat_template(told, add_generation_prompt=True)
    assert text == "<s>USER: <image>\nWhat is it? ASSISTANT: red</s>USER: Sure? ASSISTANT:"
    sample = processor.encode(_sample(told[:2]))
    learned = [i for i in sample.labels if i >= 0]
    assert processor.tokenizer.decode(learned) == " red</s>"


def _sample(messages: list[dict[str, Any]]) -> Any:
    from avlm.data.given import conversation_sample

    return conversation_sample(messages)


def renamed(name: str, fashion: str) -> str:
    """A released name as older and newer checkpoints have it."""
    if fashion == "released":  # as on the hub since 2023
        return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)
    name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head.") else f"model.{name}"


@pytest.mark.parametrize("fashion", ["released", "in memory"])
@pytest.mark.parametrize("files", [1, 3])
def test_names_of_every_fashion_and_checkpoints_in_pieces_give_the_same_model(
    hf: tuple[Path, Any], imported: Path, tmp_path: Path, fashion: str, files: int
) -> None:
    source = copied(hf[0], tmp_path / "source")
    tensors = {renamed(name, fashion): t for name, t in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    stored = read_files([_saved(tensors, tmp_path / "all.safetensors")])
    total = sum(t.num_bytes for t in stored.values())
    write_files(stored, source, shard_bytes=total if files == 1 else total // 3)
    assert (source / "model.safetensors.index.json").exists() == (files > 1)
    LlavaForConditionalGeneration.from_pretrained(source)  # theirs too
    moved = import_model(str(source), tmp_path / "model")
    equal_bits(load_file(tmp_path / "model/model.safetensors"), load_file(imported / "model.safetensors"))
    assert moved.tensors == len(tensors) and moved.dropped == ()


def copied(source: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def _saved(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    return path


@torch.no_grad()
def test_a_checkpoint_shaped_like_the_13b_and_in_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    """The widths of encoder and language model have no common rule in LLaVA-1.5-13B (1024 and 5120)."""
    wide = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 5, "num_key_value_heads": 5}
    theirs = outside.llava(tmp_path / "hf", dtype=torch.bfloat16, text=wide)
    import_model(str(tmp_path / "hf"), tmp_path / "model")
    model, processor = load_model(tmp_path / "model")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.vision_connector.layers[0].weight.shape == (40, 24)
    inputs = their_inputs(tmp_path / "hf", picture())
    torch.testing.assert_close(
        model(**our_inputs(processor, picture())).logits, theirs(**inputs).logits, rtol=0, atol=2e-2
    )
    export_model(str(tmp_path / "model"), tmp_path / "back", "llava")
    equal_bits(dict(LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()), theirs.state_dict())


@torch.no_grad()
def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    theirs = outside.llava(tmp_path / "hf", text={"tie_word_embeddings": True})
    import_model(str(tmp_path / "hf"), tmp_path / "model")
    model, processor = load_model(tmp_path / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ours = our_inputs(processor, picture())
    torch.testing.assert_close(
        model(**ours).logits, theirs(**their_inputs(tmp_path / "hf", picture())).logits, rtol=0, atol=1e-5
    )
    export_model(str(tmp_path / "model"), tmp_path / "back", "llava")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert back.lm_head.weight is back.get_input_embeddings().weight
    equal_bits(dict(back.state_dict()), theirs.state_dict())


def test_without_rows_to_spare_the_model_has_the_familys_own_places_and_says_so_of_others(tmp_path: Path) -> None:
    outside.llava(tmp_path / "hf", spare=0)
    import_model(str(tmp_path / "hf"), tmp_path / "model")
    model, processor = load_model(tmp_path / "model")
    assert (model.config.image_token_id, model.config.video_token_id, model.config.audio_token_id) == (3, None, None)
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    seen = np.zeros((30, 30, 3), np.uint8)
    clip = MediaItem("video", decoded=Clip((Picture(seen), Picture(seen)), 2.0, None))
    with pytest.raises(MediaError) as error:
        processor.encode(Sample("7", (Turn("user", (clip, Text(QUESTION))),), where="row 7"), prompt_only=True)
    assert str(error.value) == (
        "row 7: a video has no place in the text, because the model's tokenizer has no token that stands for it. "
        "Leave it out, or use a model that was composed for video"
    )


def test_pictures_without_a_class_token_are_read_whole(tmp_path: Path) -> None:
    """A SigLIP tower has no class token: `full` drops nothing, and so do we."""
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    theirs = outside.llava(tmp_path / "hf", vision_config=vision, vision_feature_select_strategy="full")
    import_model(str(tmp_path / "hf"), tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    ids = torch.tensor([[0, 3, 3, 3, 3, 20, 21]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        ours, logits = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, theirs))
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- out


def test_there_and_back_every_bit_is_the_same(hf: tuple[Path, Any], imported: Path, tmp_path: Path) -> None:
    export_model(str(imported), tmp_path / "back", "llava")
    names = load_file(tmp_path / "back/model.safetensors").keys()
    assert names == {renamed(n, "released") for n in load_file(hf[0] / "model.safetensors")}
    equal_bits(dict(LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()), hf[1].state_dict())
    theirs = json.loads((hf[0] / "config.json").read_text())
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert {k: back[k] for k in theirs if k != "transformers_version"} == {
        k: v for k, v in theirs.items() if k != "transformers_version"
    }


@torch.no_grad()
def test_their_processor_and_model_load_what_went_out_and_say_the_same(imported: Path, tmp_path: Path) -> None:
    export_model(str(imported), tmp_path / "back", "llava")
    ours = load_model(imported)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    inputs, mine = their_inputs(tmp_path / "back", picture(3)), our_inputs(ours.processor, picture(3))
    assert torch.equal(inputs["input_ids"], mine["input_ids"])
    torch.testing.assert_close(theirs(**inputs).logits, ours.model(**mine).logits, rtol=0, atol=1e-5)


def test_a_short_training_run_on_both_sides_has_the_same_losses(imported: Path, tmp_path: Path) -> None:
    export_model(str(imported), tmp_path / "back", "llava")
    ours, processor = load_model(imported)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    told = [[*asked(picture(i)), {"role": "assistant", "content": word}] for i, word in enumerate(("red", "blue"))]
    batch = processor.collate([processor.encode(_sample(t)) for t in told], "right")
    mine, peer = list(losses(ours, batch)), list(losses(theirs, batch))
    assert mine == pytest.approx(peer, abs=1e-5) and mine[2] < mine[0]
    save_model(ours, processor, tmp_path / "trained")
    export_model(str(tmp_path / "trained"), tmp_path / "out", "llava")
    trained = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(trained(**batch).logits, ours.eval()(**batch).logits, rtol=0, atol=1e-5)


def losses(model: Any, batch: Any) -> Iterator[float]:
    """Three steps of AdamW on one batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def test_a_composed_model_with_the_same_parts_goes_out_with_a_template_for_typed_parts(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, processor = clip_model(make_model)
    save_model(model, processor, tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "out", "llava")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs, mine = their_inputs(tmp_path / "out", picture(5)), our_inputs(processor, picture(5))
    assert torch.equal(inputs["input_ids"], mine["input_ids"])
    torch.testing.assert_close(theirs(**inputs).logits, model(**mine).logits, rtol=0, atol=1e-5)
    import_model(str(tmp_path / "out"), tmp_path / "again")
    _, reader = load_model(tmp_path / "again")
    assert torch.equal(our_inputs(reader, picture(5))["input_ids"], mine["input_ids"])


def clip_model(make_model: Callable[..., Any], **vision: Any) -> Any:
    """A composed model with LLaVA's kinds of parts."""
    clip = {k: v for k, v in outside.clip_config().to_dict().items() if k in CLIP_KEYS}
    return make_model("vision", vision={**clip, "model_type": "clip_vision_model", **vision})


CLIP_KEYS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
}  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "listed"),
    [
        ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}", "false"),
        (
            "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}",
            "true",
        ),
    ],
)
def test_a_template_of_texts_is_given_typed_parts_as_avlm_joins_them(texts: str, listed: str) -> None:
    words = outside.tokenizer("<image>", "<audio>")
    places = "{%- set places = {'image': '<image>', 'audio': '<audio>'} -%}{%- set listed = " + listed + " -%}"
    content = [
        {"type": "image"},
        {"type": "audio"},
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
        {"type": "image"},
        {"type": "text", "text": "c"},
    ]
    told = [{"role": "user", "content": content}, {"role": "assistant", "content": "d"}]
    written = words.apply_chat_template(told, chat_template=places + TEXT_OF_PARTS + texts, tokenize=False)
    assert written == "[user]<image><audio>a\nb\n<image>c[assistant]d"


def test_what_does_not_fit_is_refused_by_the_names_of_the_parts(make_model: Callable[..., Any], tmp_path: Path) -> None:
    save_model(*make_model(), tmp_path / "model")
    with pytest.raises(ConfigError) as error:
        export_model(str(tmp_path / "model"), tmp_path / "out", "llava")
    message = str(error.value)
    assert message.startswith(
        f"{tmp_path / 'model'}: does not fit LlavaForConditionalGeneration, which has no such parts: "
    )
    assert "audio_config is " in message and "audio_connector is " in message and "vision_layer is None" in message
    assert message.endswith(
        "Export the parts one by one (--to language, and the others by their names), or compose with what it has"
    )
    assert not (tmp_path / "out").exists()


def test_a_connector_that_is_not_theirs_is_named(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = clip_model(make_model)
    model.config.vision_connector = {**model.config.vision_connector, "stack": 2}
    save_model(model, processor, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"vision_connector\.stack is 2 and would be 1"):
        export_model(str(tmp_path / "model"), tmp_path / "out", "llava")


def test_a_model_without_the_sense_is_refused(make_model: Callable[..., Any], tmp_path: Path) -> None:
    save_model(*make_model("vision"), tmp_path / "model")
    with pytest.raises(ConfigError) as error:
        export_model(str(tmp_path / "model"), tmp_path / "out", "qwen2_audio")
    assert str(error.value) == (
        f"{tmp_path / 'model'}: has no audio part, and Qwen2AudioForConditionalGeneration is nothing without one. "
        "Export the language model alone with --to language"
    )


# ---------------------------------------------------------------- single parts


@pytest.fixture
def both(make_model: Callable[..., Any], tmp_path: Path) -> tuple[Path, Any]:
    """A model with all five parts."""
    made = make_model()
    save_model(*made, tmp_path / "model")
    return tmp_path / "model", made


def test_the_language_model_goes_out_as_itself(both: tuple[Path, Any], tmp_path: Path) -> None:
    folder, (model, processor) = both
    export_model(str(folder), tmp_path / "out", "language")
    alone, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    equal_bits(dict(alone.state_dict()), dict(model.language_model.state_dict()))
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("red").input_ids == processor.tokenizer("red").input_ids and words.chat_template


@pytest.mark.parametrize("sense", ["vision", "audio"])
def test_an_encoder_goes_out_as_itself(both: tuple[Path, Any], tmp_path: Path, sense: Any) -> None:
    folder, (model, _) = both
    export_model(str(folder), tmp_path / "out", sense)
    alone = AutoModel.from_pretrained(tmp_path / "out")
    alone = getattr(alone, "encoder", alone) if sense == "audio" else alone
    expected = dict(getattr(model.model, f"{sense}_tower").state_dict())
    equal_bits(dict(alone.state_dict()), expected)
    again = load_encoder(str(tmp_path / "out"), read_config(str(tmp_path / "out"), sense))  # as avlm compose does
    equal_bits(dict(again.state_dict()), expected)


def test_a_clip_encoder_goes_out_under_its_released_names(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = clip_model(make_model)
    save_model(model, processor, tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "out", "vision")
    assert all(n.startswith("vision_model.") for n in load_file(tmp_path / "out/model.safetensors"))
    alone, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    equal_bits(dict(alone.state_dict()), dict(model.model.vision_tower.state_dict()))


@pytest.mark.parametrize("sense", ["vision", "audio"])
@torch.no_grad()
def test_a_connector_goes_out_with_what_builds_it(both: tuple[Path, Any], tmp_path: Path, sense: str) -> None:
    from avlm.models.connectors import build_connector

    folder, (model, _) = both
    export_model(str(folder), tmp_path / "out", f"{sense}_connector")
    about = json.loads((tmp_path / "out/connector.json").read_text())
    again = build_connector(about["connector"], about["width"], about["out_width"])
    again.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    item = torch.randn(8, about["width"])
    assert torch.equal(again([item]), getattr(model.model, f"{sense}_connector")([item]))


def test_a_part_that_is_not_there_is_refused(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        export_model(str(imported), tmp_path / "out", "audio_connector")
    assert str(error.value) == (
        f"{imported}: has no audio part, so there is nothing to write. Its parts are language, vision, vision_connector"
    )


# ---------------------------------------------------------------- adapters


@torch.no_grad()
def test_adapters_are_merged_on_the_way_out(imported: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, processor = load_model(imported)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r"model\.language_model\.(.+\.)?(q_proj|down_proj)",
        modules_to_save=["vision_connector"],
    )
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapters")
    expected = adapted(**our_inputs(processor, picture())).logits
    export_model(str(imported), tmp_path / "out", "llava", adapters=str(tmp_path / "adapters"))
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    logits = merged(**their_inputs(tmp_path / "out", picture())).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    plain = load_model(imported).model(**our_inputs(processor, picture())).logits
    assert (plain - logits).abs().max() > 0.01


@pytest.mark.parametrize("head", [False, True], ids=["adapters", "and a state head"])
def test_the_adapters_of_a_run_go_onto_what_it_began_with(
    make_model: Callable[..., Any], rows: Callable[..., Path], tmp_path: Path, head: bool
) -> None:
    """What is exported with a run's adapters is what the run published with them merged."""
    from avlm.config.io import override
    from avlm.recipes import recipe
    from avlm.training.chain import Run

    save_model(*make_model(), tmp_path / "model")
    data, out = f"data.train={rows()}", f"out={tmp_path / 'run'}"
    settings = [data, out, f"model={tmp_path / 'model'}", "max_steps=2", "samples.prompts=0", "threads=1"]
    sft = recipe("sft", peft="lora")
    settings += [f"stages.{sft.stages[0].name}.state_head={{lr: 0.01}}"] * head
    Run(override(sft, settings)).train()
    (stage,) = (tmp_path / "run/adapters").iterdir()
    export_model(str(tmp_path / "model"), tmp_path / "merged", "language", adapters=str(stage))
    export_model(str(tmp_path / "run/model"), tmp_path / "published", "language")
    merged, published, before = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "merged", tmp_path / "published", _part(tmp_path / "model", tmp_path / "before"))
    )
    assert merged.keys() == published.keys()
    assert any(not torch.equal(before[name], merged[name]) for name in merged)
    for name in merged:
        torch.testing.assert_close(merged[name], published[name], rtol=0, atol=1e-6)


def _part(model: Path, out: Path) -> Path:
    export_model(str(model), out, "language")
    return out


def test_a_folder_without_adapters_is_refused(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        export_model(str(imported), tmp_path / "out", "llava", adapters=str(tmp_path / "empty"))
    assert str(error.value) == (
        f"--adapters {tmp_path / 'empty'}: has no adapter_config.json, so it is no folder of adapters in PEFT's format. "
        "Give one, such as adapters/STAGE of a run directory"
    )


# ---------------------------------------------------------------- LLaVA-NeXT and Qwen2-Audio


@pytest.mark.parametrize("size", [(28, 28), (50, 30), (30, 80)])
@torch.no_grad()
def test_a_llava_next_comes_in_and_goes_out(tmp_path: Path, size: tuple[int, int]) -> None:
    theirs = outside.llava_next(tmp_path / "hf")
    import_model(str(tmp_path / "hf"), tmp_path / "model")
    model, processor = load_model(tmp_path / "model")
    given = picture(1, *size)
    inputs, ours = their_inputs(tmp_path / "hf", given), our_inputs(processor, given)
    assert torch.equal(inputs["input_ids"], ours["input_ids"])
    ours["pixel_values"] = inputs["pixel_values"].flatten(0, 1)[: len(ours["pixel_values"])]
    torch.testing.assert_close(model(**ours).logits, theirs(**inputs).logits, rtol=0, atol=1e-5)
    export_model(str(tmp_path / "model"), tmp_path / "back", "llava_next")
    back = type(theirs).from_pretrained(tmp_path / "back")
    equal_bits(dict(back.state_dict()), theirs.state_dict())
    assert torch.equal(their_inputs(tmp_path / "back", given)["input_ids"], inputs["input_ids"])


def test_a_llava_next_trains_on_both_sides_to_the_same_losses(tmp_path: Path) -> None:
    theirs = outside.llava_next(tmp_path / "hf")
    import_model(str(tmp_path / "hf"), tmp_path / "model")
    ours = load_model(tmp_path / "model").model
    inputs = their_inputs(tmp_path / "hf", picture(1, 50, 30))
    answer = torch.tensor([[40, 41, 1]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["labels"] = torch.cat([torch.full_like(inputs["input_ids"][:, 3:], -100), answer], 1)
    inputs.pop("attention_mask")
    mine = {**inputs, "pixel_values": inputs["pixel_values"].flatten(0, 1)}
    own, peer = list(losses(ours, mine)), list(losses(theirs, inputs))
    assert own == pytest.approx(peer, abs=1e-5) and own[2] < own[0]


@pytest.mark.skipif(
    "qwen2_audio_encoder" not in {f.model_type for f in AUDIO_FAMILIES}, reason="its encoder has no record yet"
)
@pytest.mark.parametrize("seconds", [0.4, 2.0])
@torch.no_grad()
def test_a_qwen2_audio_comes_in_and_goes_out(tmp_path: Path, seconds: float) -> None:
    theirs = outside.qwen2_audio(tmp_path / "hf")
    wave = 0.1 * np.random.default_rng(0).standard_normal(int(16_000 * seconds)).astype(np.float32)
    import_model(str(tmp_path / "hf"), tmp_path / "model")
    model, processor = load_model(tmp_path / "model")

    def told(sound: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "audio", **sound}, {"type": "text", "text": "What?"}]}]

    def inputs_of(folder: Path) -> Any:
        reader = AutoProcessor.from_pretrained(folder)
        text = reader.apply_chat_template(told({"audio_url": "x"}), add_generation_prompt=True, tokenize=False)
        return reader(text=text, audio=[wave], sampling_rate=16_000, return_tensors="pt")

    inputs = inputs_of(tmp_path / "hf")
    ours = processor.apply_chat_template(
        told({"audio": wave, "sampling_rate": 16_000}), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert torch.equal(inputs["input_ids"], ours["input_ids"])
    torch.testing.assert_close(ours["input_features"], inputs["input_features"], rtol=0, atol=1e-4)
    ours["input_features"] = inputs["input_features"]
    torch.testing.assert_close(model(**ours).logits, theirs(**inputs).logits, rtol=0, atol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(model.generate(**ours, **settings), theirs.generate(**inputs, **settings))
    export_model(str(tmp_path / "model"), tmp_path / "back", "qwen2_audio")
    equal_bits(dict(type(theirs).from_pretrained(tmp_path / "back").state_dict()), theirs.state_dict())
    assert torch.equal(inputs_of(tmp_path / "back")["input_ids"], inputs["input_ids"])


def test_every_record_names_a_class_of_transformers_and_its_configuration() -> None:
    import transformers

    for family in FAMILIES:
        kind = getattr(transformers, family.architecture)
        assert kind.config_class.model_type == family.name


@pytest.mark.parametrize(
    ("name", "as_released"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("language_model.model.model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("model.image_newline", "image_newline"),
        ("model.audio_tower.conv1.weight", "audio_tower.conv1.weight"),
    ],
)
def test_names_in_memory_are_brought_to_the_released_ones(name: str, as_released: str) -> None:
    assert released(name) == as_released


# ---------------------------------------------------------------- refusals


def refused(kind: type[Exception], source: object, out: Path, **settings: Any) -> str:
    with pytest.raises(kind) as error:
        import_model(str(source), out, **settings)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return str(error.value)


def test_tensors_that_do_not_fit_are_all_told_by_name_and_number(hf: tuple[Path, Any], tmp_path: Path) -> None:
    source = copied(hf[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["value_head.weight"] = torch.zeros(2)
    del tensors["multi_modal_projector.linear_1.bias"], tensors["multi_modal_projector.linear_2.bias"]
    tensors["language_model.lm_head.weight"] = torch.zeros(7, 32)
    _saved(tensors, source / "model.safetensors")
    rows = hf[1].config.text_config.vocab_size
    assert refused(WeightsError, source, tmp_path / "out") == (
        f"{source}: of its tensors 2 are missing (multi_modal_projector.linear_1.bias, multi_modal_projector.linear_2.bias), "
        f"1 is without a place (value_head.weight), 1 is of another shape (language_model.lm_head.weight [7, 32], wanted [{rows}, 32]). "
        "Give the whole checkpoint that config.json belongs to"
    )


def test_a_tensor_without_a_place_is_left_out_when_the_user_says_so(
    hf: tuple[Path, Any], imported: Path, tmp_path: Path
) -> None:
    source = copied(hf[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors |= {"value_head.weight": torch.zeros(2), "vision_tower.embeddings.position_ids": torch.arange(5)[None]}
    _saved(tensors, source / "model.safetensors")
    message = refused(WeightsError, source, tmp_path / "out")
    assert message == (
        f"{source}: of its tensors 1 is without a place (value_head.weight). "
        "Leave what has no place out with --drop PATTERN, if the model is right without it"
    )
    moved = import_model(str(source), tmp_path / "out", drop=["value_head.*"])
    assert moved.dropped == ("value_head.weight",)
    equal_bits(load_file(tmp_path / "out/model.safetensors"), load_file(imported / "model.safetensors"))


def test_pickles_are_read_only_when_asked_and_never_run(hf: tuple[Path, Any], imported: Path, tmp_path: Path) -> None:
    source = copied(hf[0], tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert refused(ConfigError, source, tmp_path / "out") == (
        f"{source}: has its weights in pytorch_model.bin, a format that can hold programs, and only safetensors is read "
        "unasked. Add --pickles to read it all the same (tensors alone, nothing is run)"
    )
    import_model(str(source), tmp_path / "out", pickles=True)
    equal_bits(load_file(tmp_path / "out/model.safetensors"), load_file(imported / "model.safetensors"))
    torch.save({"x": Program()}, source / "pytorch_model.bin")
    message = refused(WeightsError, source, tmp_path / "other", pickles=True)
    assert "is not a file of tensors alone" in message and not (tmp_path / "ran").exists()


class Program:
    """What a hostile pickle is made of."""

    def __reduce__(self) -> Any:
        return os.system, ("echo ran",)


def test_a_file_that_was_cut_off_is_refused(hf: tuple[Path, Any], tmp_path: Path) -> None:
    source = copied(hf[0], tmp_path / "source")
    path = source / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert refused(WeightsError, source, tmp_path / "out") == (
        f"{path}: is not a whole safetensors file: its header tells of {len(whole)} bytes, and it has {len(whole) - 100}. "
        "Copy or download it again"
    )
    path.write_bytes(b"not at all")
    assert refused(WeightsError, source, tmp_path / "out").startswith(
        f"{path}: is not a whole safetensors file: its header of "
    )


def test_an_index_whose_files_are_missing_is_refused(hf: tuple[Path, Any], tmp_path: Path) -> None:
    source = copied(hf[0], tmp_path / "source")
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(WeightsError, source, tmp_path / "out") == (
        f"{source}: the index names 2 files that are not there (../model.safetensors, model-00001-of-00002.safetensors). "
        "Copy or download the folder again"
    )


def test_a_folder_that_is_no_such_checkpoint_is_refused(both: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(ConfigError, tmp_path / "empty", tmp_path / "out") == (
        f"{tmp_path / 'empty'}: has no config.json, so it is no checkpoint in transformers' format. "
        "Give the folder that holds config.json beside the weights, or a hub name"
    )
    assert refused(ConfigError, both[0], tmp_path / "out") == (
        f"{both[0]}: is of type avlm, and avlm has records of llava, llava_next, qwen2_audio. Give a checkpoint of one of them, "
        "or compose a model from parts: avlm compose OUT --language X --vision Y"
    )


def test_settings_without_a_counterpart_are_refused(hf: tuple[Path, Any], tmp_path: Path) -> None:
    for key, value, words in (
        ("vision_feature_layer", [-2, -3], "vision_feature_layer=[-2, -3] joins several layers, and avlm reads one"),
        ("projector_hidden_act", "silu", "projector_hidden_act=silu, and avlm has GELU"),
        ("vision_feature_select_strategy", "full", "Only a checkpoint with vision_feature_select_strategy=default"),
        ("quantization_config", {"quant_method": "awq"}, "is quantised"),
    ):
        source = copied(hf[0], tmp_path / key)
        data = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**data, key: value}))
        assert words in refused(ConfigError, source, tmp_path / "out")


def test_a_soft_cap_that_the_other_side_would_lose_is_refused(hf: tuple[Path, Any], tmp_path: Path) -> None:
    source = copied(hf[0], tmp_path / "source")
    data = json.loads((source / "config.json").read_text())
    data["text_config"]["final_logit_softcapping"] = 30.0
    (source / "config.json").write_text(json.dumps(data))
    assert "final_logit_softcapping=30.0" in refused(ConfigError, source, tmp_path / "out")


def test_what_is_there_is_not_written_over(hf: tuple[Path, Any], imported: Path, tmp_path: Path) -> None:
    for convert in (lambda: import_model(str(hf[0]), tmp_path), lambda: export_model(str(imported), tmp_path, "llava")):
        with pytest.raises(ConfigError) as error:
            convert()
        assert str(error.value) == f"{tmp_path} exists, and would be overwritten. Choose another name, or remove it"


def test_an_unknown_format_is_refused_with_those_there_are(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        export_model(str(imported), tmp_path / "out", "nemo")
    assert str(error.value) == (
        "--to nemo: is not a format that avlm writes. Use one of llava, llava_next, qwen2_audio, "
        "or a part of the model: language, vision, vision_connector, audio, audio_connector"
    )


# ---------------------------------------------------------------- memory

PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from avlm.convert.importing import import_model
from avlm.convert.exporting import export_model
source, out = sys.argv[1], Path(sys.argv[2])
def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
before = peak()
import_model(source, out / "model")
middle = peak()
export_model(str(out / "model"), out / "back", "llava")
print(before, middle, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory_is_a_small_part_of_the_largest_file(tmp_path: Path) -> None:
    """A checkpoint of 200 MB in one file goes in and out with a peak that is a fraction of it."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 7}
    outside.llava(tmp_path / "hf", dtype=torch.bfloat16, text=wide)
    megabytes = (tmp_path / "hf/model.safetensors").stat().st_size / 2**20
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "hf"), str(tmp_path), tests], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, middle, after = (int(kb) / 1024 for kb in done.stdout.split())
    print(f"{megabytes:.0f} MB: import {middle - before:.0f} MB over the start, export {after - before:.0f} MB")
    assert megabytes > 200 and after - before < 64
    equal_bits(
        load_file(tmp_path / "back/model.safetensors"),
        {renamed(n, "released"): t for n, t in load_file(tmp_path / "hf/model.safetensors").items()},
    )
