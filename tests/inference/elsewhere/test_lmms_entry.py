"""lmms-eval's adapter, against its public base class and its forms of requests; lmms-eval itself is not here."""

from __future__ import annotations

import importlib
import math
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import avlm
from avlm.convert.weights import save_model
from avlm.errors import ConfigError
from avlm.inference.chat import Chat
from avlm.inference.elsewhere.asking import Asker, conversation, question, sampling_of
from avlm.inference.sampling import Sampling

ROOT = Path(avlm.__file__).resolve().parents[1]


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class lmms:  # noqa: N801 - its name there
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}


@pytest.fixture
def models(monkeypatch):
    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "avlm.inference.elsewhere.lmms_models", raising=False)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = entries["lmms_eval.models"]["avlm"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "avlm"
    found = {}
    for kind in ("simple", "chat"):
        module, _, name = getattr(manifest, f"{kind}_class_path").rpartition(".")
        found[kind] = getattr(importlib.import_module(module), name)
        assert issubclass(found[kind], lmms) and found[kind].is_simple == (kind == "simple")
    return found


@pytest.fixture
def directory(make_model, tmp_path):
    save_model(*make_model(), tmp_path / "model")
    return str(tmp_path / "model")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def tone() -> dict[str, object]:
    return {"array": np.sin(np.arange(8000) / 9).astype(np.float32) * 0.3, "sampling_rate": 16_000}


def request(*args):
    return SimpleNamespace(args=args)


DOCS = {"task": {"test": [{"image": picture(0)}, {"image": picture(1)}]}}
SETTINGS = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def test_answers_are_those_of_a_chat_in_the_order_of_the_requests(models, directory):
    chat = avlm.load(directory)
    wanted = [
        chat.chat(avlm.Image(doc["image"]), "What is it?", sampling=Sampling(max_tokens=6))
        for doc in DOCS["task"]["test"]
    ]
    simple = models["simple"](pretrained=directory)
    simple.task_dict = DOCS
    asked = [request("What is it?", dict(SETTINGS), lambda doc: [doc["image"]], i, "task", "test") for i in (0, 1)]
    assert simple.generate_until(asked) == wanted
    assert simple.generate_until(asked[::-1]) == wanted[::-1]
    messages = models["chat"](pretrained=directory, batch_size="2")
    messages.task_dict = DOCS

    def as_messages(doc):
        parts = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": parts}]

    asked = [request("", as_messages, dict(SETTINGS), i, "task", "test") for i in (0, 1)]
    assert messages.generate_until(asked) == wanted


def test_a_loss_is_the_mean_over_the_answers_tokens_and_smaller_where_it_is_likelier(models, directory):
    simple = models["simple"](pretrained=directory)
    simple.task_dict = DOCS
    choices = ["red", "green blue", "a b c"]
    asked = [request("What is it?", choice, lambda doc: [doc["image"]], 0, "task", "test") for choice in choices]
    found = simple.loglikelihood(asked)
    chat = avlm.load(directory)
    for (loss, greedy), choice in zip(found, choices, strict=True):
        sample = question("What is it?", [picture(0)])
        prompt = chat.processor.encode(sample, prompt_only=True)
        answer = chat.processor.tokenizer.encode(choice, add_special_tokens=False)
        inputs = {k: v for k, v in chat.processor.collate([prompt]).items() if k != "labels"}
        total, read = 0.0, inputs["input_ids"]
        likeliest = True
        for token in answer:  # one token after the other, all of it read again each time
            with torch.inference_mode():
                given = {**inputs, "input_ids": read, "attention_mask": torch.ones_like(read)}
                logits = chat.model(**given, use_cache=False).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[token])
            likeliest &= int(logits.argmax()) == token
            read = torch.cat([read, torch.tensor([[token]])], 1)
        assert loss == pytest.approx(total / len(answer), rel=1e-4)
        assert greedy == likeliest


def test_what_the_model_says_is_the_likeliest_answer(directory):
    asker = Asker(avlm.load(directory))
    sample = question("What is it?", [picture(0)])
    (said,) = asker.answers([sample], [Sampling(max_tokens=4)])
    request = asker.engine.join(sample, Sampling(max_tokens=4))
    while asker.engine.busy:
        asker.engine.step()
    exact = request.text.shown()
    if asker.processor.tokenizer.encode(exact, add_special_tokens=False) == request.tokens and said:
        assert asker.loss(sample, exact)[1]


def test_an_answer_of_nothing_costs_nothing(directory):
    assert Asker(directory).loss(question("What?", []), "") == (0.0, True)


def test_sounds_come_as_arrays_with_their_rate_and_videos_by_path(make_model):
    sample = question("What is heard?", [tone(), "a.wav", "b.mp4"])
    assert [item.kind for item in sample.media()] == ["audio", "audio", "video"]
    assert sample.media()[0].decoded.sample_rate_hz == 16_000
    parts = [{"type": "audio", "url": tone()}, {"type": "video", "url": "c.mp4", "start_time": 1.0, "end_time": 2.0}]
    talk = conversation([{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert [turn.role for turn in talk.turns] == ["system", "user"]
    assert (talk.media()[1].start_s, talk.media()[1].end_s) == (1.0, 2.0)
    assert Asker(Chat(*make_model())).answers([question("?", [tone()])], [Sampling(max_tokens=2)])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Sampling(max_tokens=1024)),
        ({"max_new_tokens": 16, "until": "\n"}, Sampling(max_tokens=16, stop=("\n",))),
        ({"temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}, Sampling(max_tokens=1024)),
        ({"temperature": 0.7, "do_sample": False}, Sampling(max_tokens=1024)),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(max_tokens=1024, temperature=0.7, top_p=0.9)),
    ],
)
def test_settings_of_a_harness(given, wanted):
    assert sampling_of(given) == wanted


def test_arguments_that_are_not_ours_are_refused(models, directory):
    with pytest.raises(ConfigError) as error:
        models["simple"](pretrained=directory, conv_template="vicuna")
    assert str(error.value) == (
        "model_args has conv_template, and avlm takes pretrained, device, batch_size. Remove it"
    )
    assert math.isfinite(models["simple"](pretrained=directory, device=None).batch_size)
