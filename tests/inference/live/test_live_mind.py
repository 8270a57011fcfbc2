"""The model's own decision: its state head's, or its state tokens'."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from voices import noise, speech

from avlm.config.stage import StateTokens
from avlm.errors import ConfigError
from avlm.inference.chat import Chat
from avlm.inference.engine import Engine
from avlm.inference.live import mind as minds
from avlm.inference.live.mind import ModelMind
from avlm.inference.live.session import Costs, Session
from avlm.inference.sampling import Sampling
from avlm.samples import Sample, Text, Turn

ASK = "What is said?"
SHORT = Sampling(max_tokens=5)


@pytest.fixture
def parts(make_model):
    model, processor = make_model()
    model.add_state_head(3)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.state_head.weight)
    return model.eval(), processor


def sample_of(mind, wave):
    return mind._sample(wave)


def test_the_probability_is_the_heads_where_the_answer_begins(parts):
    model, processor = parts
    mind = ModelMind(Engine(model, processor), ask=ASK)
    wave = speech(0.7)
    judged = mind.judge(wave)
    from avlm.data.given import media_item

    turn = Turn("user", (media_item("audio", wave, 16_000), Text(ASK)))
    prompt = processor.encode(Sample("x", (turn,)), prompt_only=True)
    inputs = {k: v for k, v in processor.collate([prompt]).items() if k != "labels"}
    with torch.inference_mode():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        question, noise_, _ = (model.state_head.weight @ hidden + model.state_head.bias).tolist()
    assert judged.probability == pytest.approx(1 / (1 + math.exp(noise_ - question)), rel=1e-4)
    assert judged.prompt_tokens == len(prompt)


def test_it_is_where_training_puts_it(parts):
    """The position that the head learns at is the one that it is asked at."""
    model, processor = parts
    mind = ModelMind(Engine(model, processor), ask=ASK)
    sample = mind._sample(speech(0.5))
    row = processor.encode(Sample("x", (*sample.turns, Turn("assistant", (Text("red"),), state="noise"))))
    assert row.states == [(len(processor.encode(sample, prompt_only=True)) - 1, 1)]


def test_answers_are_those_of_a_chat(parts):
    model, processor = parts
    mind = ModelMind(Engine(model, processor), ask=ASK, sampling=SHORT)
    wave = speech(0.5)
    answer = mind.answer(wave)
    text = ""
    while (made := answer.next()) is not None:
        text += made[0]
    from avlm.inference.chat import Audio

    assert text.strip() == Chat(model, processor).chat(Audio(wave, 16_000), ASK, sampling=SHORT)


def test_what_was_said_before_is_read_again_as_far_back_as_it_says(parts):
    model, processor = parts
    mind = ModelMind(Engine(model, processor), ask=ASK, turns=1)
    for number in range(3):
        mind.remember(f"question {number}", f" answer {number} ")
    texts = [turn.text() for turn in mind._sample("now").turns]
    assert texts == ["question 2", "answer 2", "now"]


def test_state_tokens_are_compared_by_how_likely_each_is(make_model, monkeypatch):
    model, processor = make_model()
    model.eval()
    words = StateTokens(audio="red", noise="green", text="blue")
    monkeypatch.setitem(minds.TOKENS, "digits", words)
    mind = ModelMind(Engine(model, processor), ask=ASK, decides="digits")
    wave = speech(0.6)
    sample = mind._sample(wave)
    prompt = processor.encode(sample, prompt_only=True)
    likely = []
    for word in ("red", "green", "blue"):
        ids = processor.tokenizer.encode(word, add_special_tokens=False)
        inputs = {k: v for k, v in processor.collate([prompt]).items() if k != "labels"}
        total, read = 0.0, inputs["input_ids"]
        for token in ids:
            given = {**inputs, "input_ids": read, "attention_mask": torch.ones_like(read)}
            with torch.inference_mode():
                total += float(model(**given, use_cache=False).logits[0, -1].log_softmax(-1)[token])
            read = torch.cat([read, torch.tensor([[token]])], 1)
        likely.append(math.exp(total))
    assert mind.judge(wave).probability == pytest.approx(1 - likely[1] / sum(likely), rel=1e-3)


def test_none_takes_everything_for_a_question(make_model):
    mind = ModelMind(Engine(*make_model()), ask=ASK, decides="none")
    assert mind.judge(speech(0.5)).probability == 1.0


def test_a_model_that_cannot_tell_is_refused_with_what_to_do(make_model):
    with pytest.raises(ConfigError) as error:
        ModelMind(Engine(*make_model()), ask=ASK)
    assert str(error.value) == (
        "the model has no state head, so it cannot tell whether it was meant. Train one with `avlm train voice "
        "model=DIR data.train=ROWS` (rows: `avlm data voice`), or name its state tokens with --decides digits or "
        "hands; --decides none answers everything"
    )


def test_a_whole_session_with_a_real_model_is_the_same_twice(parts):
    wave = np.concatenate([noise(1), speech(0.8), noise(1.5, seed=1), speech(0.6, pitch_hz=250), noise(1, seed=2)])

    def run():
        mind = ModelMind(Engine(*parts), ask=ASK, sampling=SHORT)
        session = Session(mind, threshold=0.0, costs=Costs())
        return session.hear(wave) + session.type("red?") + session.finish()

    first = run()
    assert json.dumps(first) == json.dumps(run())
    assert [event["event"] for event in first].count("answer_ends") >= 2
