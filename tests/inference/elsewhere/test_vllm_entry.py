"""vLLM's plug-in, against as much of its interface as it touches; vLLM itself is not here."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import outside_vllm
import pytest
import torch
from PIL import Image

import avlm
from avlm.inference.elsewhere import counts
from avlm.inference.elsewhere.senses import make_senses
from avlm.samples import Sample, Text, Turn

ROOT = Path(avlm.__file__).resolve().parents[1]


@pytest.fixture
def plugin(monkeypatch):
    outside_vllm.install(monkeypatch)
    return importlib.import_module("avlm.inference.elsewhere.vllm_model")


@pytest.fixture
def parts(make_model):
    model, processor = make_model()
    model.eval()
    return model, processor


def info_of(plugin, processor):
    return plugin.AvlmForVllm.parts.info(SimpleNamespace(processor=processor))


def test_the_entry_point_is_announced_and_registers_once(monkeypatch):
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = entries["vllm.general_plugins"]["avlm"].partition(":")
    outside_vllm.install(monkeypatch)
    register = getattr(importlib.import_module(module), name)
    register()
    register()
    (where,) = outside_vllm.ModelRegistry.archs.values()
    assert list(outside_vllm.ModelRegistry.archs) == ["AvlmForConditionalGeneration"]
    module, _, name = where.partition(":")
    assert getattr(importlib.import_module(module), name).__name__ == "AvlmForVllm"


@pytest.mark.slow
def test_transformers_knows_our_directories_wherever_the_entry_is_imported():
    code = (
        "import avlm.inference.elsewhere.vllm\n"
        "from transformers import AutoConfig\n"
        "assert type(AutoConfig.for_model('avlm')).__name__ == 'AvlmConfig'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_vllm_importing_the_entry_is_harmless():
    code = (
        "import sys, avlm.inference.elsewhere.vllm as v; assert callable(v.register); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_limits_and_most_tokens_are_those_of_the_model(plugin, parts):
    model, processor = parts
    info = info_of(plugin, processor)
    assert info.get_supported_mm_limits() == {"image": None, "audio": None}
    most = info.get_mm_max_tokens_per_item(4096, {})
    dummy = plugin.AvlmForVllm.parts.dummy_inputs(info)
    data = dummy.get_dummy_mm_data(4096, {"image": 1, "audio": 1}, {})
    prompt = dummy.get_dummy_text({"image": 1, "audio": 1})
    ids = processor(text=prompt, images=data["image"], audio=data["audio"])["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_id) == most["image"]
    assert ids.count(model.config.audio_token_id) == most["audio"]


def prepared(plugin, processor, images, audios):
    """What vLLM's own code does with a prompt: the processor, its fields, its replacements."""
    maker = plugin.AvlmForVllm.parts.processor(info_of(plugin, processor), None)
    prompt = "<|user|>" + "<image>" * len(images) + "<audio>" * len(audios) + "What?<|end|><|assistant|>"
    batch = maker._call_hf_processor(prompt, {"images": images, "audios": audios}, {}, {})
    fields = maker._get_mm_fields_config(batch, {})
    updates = maker._get_prompt_updates(None, {}, SimpleNamespace(get_data=lambda: batch))
    return prompt, batch, fields, updates


def media():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((30, 40), (50, 20))]
    audios = [rng.normal(0, 0.1, n).astype(np.float32) for n in (8000, 20_000, 5000)]
    return images, audios


def test_a_prompt_with_its_replacements_is_what_our_processor_writes(plugin, parts):
    _, processor = parts
    prompt, batch, _, updates = prepared(plugin, processor, *media())
    ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
    by_kind = {update.modality: update for update in updates}
    written, seen = [], {"image": 0, "audio": 0}
    for token in ids:
        kind = next((k for k, update in by_kind.items() if update.target == [token]), None)
        if kind is None:
            written.append(token)
            continue
        details = by_kind[kind].replacement(seen[kind])
        assert sum(details.embed) == int(batch[f"{kind}_places"][seen[kind]])
        written += details.full
        seen[kind] += 1
    assert seen == {"image": 2, "audio": 3}
    assert written == batch["input_ids"][0].tolist()


def test_each_medium_is_parted_from_its_neighbours(plugin, parts):
    _, processor = parts
    _, batch, fields, _ = prepared(plugin, processor, *media())
    assert fields["pixel_values"].sizes == [1, 1]
    assert sum(fields["pixel_values"].sizes) == len(batch["pixel_values"])
    assert sum(fields["input_features"].sizes) == len(batch["input_features"])
    assert all(name in fields for name in batch if name != "input_ids")


def test_text_alone_is_only_tokenized(plugin, parts):
    _, processor = parts
    maker = plugin.AvlmForVllm.parts.processor(info_of(plugin, processor), None)
    ids = maker._call_hf_processor("red green", {}, {}, {})["input_ids"][0]
    assert ids == processor.tokenizer.encode("red green", add_special_tokens=False)


def test_weights_of_a_model_directory_all_have_a_place_and_embeddings_are_the_models_own(plugin, parts):
    model, processor = parts
    model.add_state_head(3)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=model.config))
    theirs = plugin.AvlmForVllm(vllm_config=config).eval()
    loaded = theirs.load_weights(model.state_dict().items())
    assert {name for name, _ in theirs.named_parameters()} - {"language_model.lm_head.weight"} <= loaded
    _, batch, fields, _ = prepared(plugin, processor, *media())
    given = {name: batch[name] for name in fields}
    with torch.inference_mode():
        found = theirs.embed_multimodal(**given)
        split = {
            name: list(value.split(fields[name].sizes)) if fields[name].sizes else list(value)
            for name, value in given.items()
        }
        as_lists = theirs.embed_multimodal(**split)
        whole = {k: v for k, v in batch.items() if not k.endswith(("_places", "_pieces"))}
        embeds, _ = model.model.embed(**whole)
    ids = batch["input_ids"][0]
    for token, mine in ((model.config.image_token_id, found[:2]), (model.config.audio_token_id, found[2:])):
        torch.testing.assert_close(torch.cat(mine), embeds[0][ids == token])
    for a, b in zip(found, as_lists, strict=True):
        torch.testing.assert_close(a, b)


def test_places_of_media_are_never_an_answer(plugin, parts):
    model, _ = parts
    theirs = plugin.AvlmForVllm(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=model.config)))
    theirs.language_model.compute_logits = lambda hidden: torch.zeros(2, model.config.text_config.vocab_size)
    logits = theirs.compute_logits(torch.zeros(2, 4))
    assert torch.isinf(logits[:, model.config.image_token_id]).all()
    assert int(torch.isinf(logits[0]).sum()) == len(model.placeholder_ids())


def test_senses_are_the_models_without_its_language_model(parts):
    model, _ = parts
    senses = make_senses(model.config)
    own = {k: v.shape for k, v in model.model.state_dict().items() if not k.startswith("language_model.")}
    assert {k: v.shape for k, v in senses.state_dict().items()} == own


def test_counts_are_those_of_the_encoded_prompt(parts):
    model, processor = parts
    spec = processor.media_spec()
    images, audios = media()
    for kind, items in (("image", images), ("audio", audios)):
        for item in items:
            sample = Sample(
                "x", (Turn("user", (avlm.Image(item) if kind == "image" else avlm.Audio(item), Text("?"))),)
            )
            (prepared_item,) = processor.prepare(sample)
            ids = processor.encode(sample, prompt_only=True).ids
            token = getattr(model.config, f"{kind}_token_id")
            assert counts.places(prepared_item.facts, spec) == ids.count(token)
