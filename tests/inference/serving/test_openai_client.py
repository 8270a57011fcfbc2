"""OpenAI's own client, unmodified: its answers are those of a conversation with the same model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch
from media_files import made
from served import KEY, Served, audio, image, said, served, slow_steps, until, video

from avlm.config.serve import Serve
from avlm.inference.chat import Audio, Chat, Image, Video
from avlm.inference.sampling import Sampling
from avlm.inference.serving.reading import Body, Question, Reading

SHORT = Sampling(max_tokens=8)
PICTURE, SOUND, FILM = "rgb.png", "16.wav", "h264.mp4"


@pytest.fixture(scope="module")
def server(chat: Chat) -> Iterator[Served]:
    with served(chat, keys=(KEY,), name="tiny") as found:
        yield found


def text_of(completion: Any) -> str:
    return str(completion.choices[0].message.content)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("parts", "items"),
    [
        ((), ()),
        ((image, PICTURE), (Image, PICTURE)),
        ((audio, SOUND), (Audio, SOUND)),
        ((video, FILM), (Video, FILM)),
        ((image, PICTURE, audio, SOUND), (Image, PICTURE, Audio, SOUND)),
    ],
    ids=["text", "picture", "sound", "video", "picture and sound"],
)
def test_answers_are_those_of_a_conversation(server: Served, chat: Chat, parts: Any, items: Any) -> None:
    media = [make(made(name)) for make, name in zip(parts[::2], parts[1::2], strict=True)]
    expected = chat.chat(
        *(make(made(name)) for make, name in zip(items[::2], items[1::2], strict=True)), "What is it?", sampling=SHORT
    )
    assert text_of(server.ask("What is it?", *media)).strip() == expected
    if media:
        assert chat.chat("What is it?", sampling=SHORT) != expected  # it was looked at


def test_words_before_media_are_read_behind_them_as_in_a_conversation(server: Served, chat: Chat) -> None:
    content = [{"type": "text", "text": "What is it?"}, image(made(PICTURE))]
    found = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8
    )
    assert text_of(found).strip() == chat.chat("What is it?", Image(made(PICTURE)), sampling=SHORT)


def test_earlier_turns_are_read(server: Served, chat: Chat) -> None:
    chat.clear()
    first = "".join(chat.say(Image(made(PICTURE)), "What is it?", sampling=SHORT))
    second = "".join(chat.say("And what do you hear?", Audio(made(SOUND)), sampling=SHORT))
    told = str(chat.turns[1].text())
    chat.clear()
    messages = [
        {"role": "user", "content": [image(made(PICTURE)), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": told},
        {"role": "user", "content": [audio(made(SOUND)), {"type": "text", "text": "And what do you hear?"}]},
    ]
    found = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert text_of(found) == second.lstrip()
    assert first == told


def test_streamed_pieces_join_to_the_whole_answer(server: Served) -> None:
    whole = server.ask("What is it?", image(made(PICTURE)))
    chunks = list(server.ask("What is it?", image(made(PICTURE)), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text_of(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert len({c.id for c in chunks}) == 1 and len(chunks) > 3
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert not any(c.usage for c in server.ask(stream=True))


def test_usage_counts_media_by_kind(server: Served, chat: Chat) -> None:
    usage = server.ask("What is it?", image(made(PICTURE)), audio(made(SOUND))).usage
    text = server.ask("What is it?").usage
    details = usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == 4  # 28 pixels in squares of 14
    assert details["audio_tokens"] > 0 and details["video_tokens"] == 0
    assert usage.prompt_tokens == text.prompt_tokens + details["image_tokens"] + details["audio_tokens"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 8


def test_length_and_stop(server: Served) -> None:
    whole = server.ask(max_tokens=12)
    text = text_of(whole)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12
    cut = text[3:5]
    stopped = server.ask(max_completion_tokens=12, max_tokens=openai.omit, stop=[cut, "never said"])
    assert text_of(stopped) == text[: text.index(cut)] and stopped.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in server.ask(max_tokens=12, stop=cut, stream=True))
    assert streamed == text_of(stopped)


def test_seeds_draw_again_what_they_drew(server: Served, chat: Chat) -> None:
    drawn = [text_of(server.ask(temperature=1.5, seed=seed)) for seed in (7, 7, 8, -7)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    sampling = Sampling(max_tokens=8, temperature=1.5, seed=7)
    assert drawn[0].strip() == chat.chat("What is it?", sampling=sampling)
    assert len({text_of(server.ask(temperature=1.5)) for _ in range(3)}) > 1  # without a seed, each time anew
    assert text_of(server.ask(temperature=1.5, top_p=0)) == text_of(server.ask())
    assert text_of(server.ask(extra_body={"top_k": 1, "temperature": 1.5})) == text_of(server.ask())


def test_several_answers_have_seeds_of_their_own(server: Served) -> None:
    found = server.ask(n=3, temperature=1.5, seed=7)
    assert [c.index for c in found.choices] == [0, 1, 2]
    alone = [text_of(server.ask(temperature=1.5, seed=7 + i)) for i in range(3)]
    assert [c.message.content for c in found.choices] == alone
    assert found.usage.completion_tokens == sum(
        server.ask(temperature=1.5, seed=7 + i).usage.completion_tokens for i in range(3)
    )
    texts = ["", "", ""]
    for chunk in server.ask(n=3, temperature=1.5, seed=7, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == alone


def test_log_probabilities_are_the_models(server: Served, chat: Chat) -> None:
    found = server.ask(logprobs=True, top_logprobs=3, max_tokens=4).choices[0]
    content = found.logprobs.content
    assert len(content) == 4
    assert b"".join(bytes(t.bytes) for t in content).decode(errors="replace").lstrip() == found.message.content
    from avlm.samples import Sample, Text, Turn

    prompt = chat.processor.encode(Sample("", (Turn("user", (Text("What is it?"),)),)), prompt_only=True)
    with torch.inference_mode():
        logits = chat.model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].float()
    top = logits.log_softmax(-1).topk(3).values.tolist()
    assert [t.logprob for t in content[0].top_logprobs] == pytest.approx(top, abs=1e-4)
    assert content[0].logprob == pytest.approx(top[0], abs=1e-4)
    chunks = list(server.ask(logprobs=True, top_logprobs=3, max_tokens=4, stream=True))
    told = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in told] == [t.token for t in content]
    assert server.ask().choices[0].logprobs is None


def test_fields_without_effect_are_ignored_and_others_refused(server: Served) -> None:
    plain = text_of(server.ask())
    assert text_of(server.ask(user="me", metadata={"a": "b"}, store=False, frequency_penalty=0, n=1)) == plain
    assert text_of(server.ask(response_format={"type": "text"}, tools=[], logit_bias={})) == plain
    for field, value in {
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 10},
        "response_format": {"type": "json_object"},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "reasoning_effort": "high",
    }.items():
        with pytest.raises(openai.BadRequestError) as caught:
            server.ask(**{field: value})
        assert caught.value.param == field and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="Did you mean temperature"):
        server.ask(extra_body={"temprature": 1})


def test_media_are_decoded_once_and_answers_stay_the_same(chat: Chat) -> None:
    body = Body("chat", json.dumps(said("What is it?", image(made(PICTURE)), audio(made(SOUND)))).encode())
    reading = Reading(chat, Serve(), None, lambda name: None)
    first, second, anew = (reading(b) for b in (body, body, replace(body, anew=True)))
    assert isinstance(first, Question) and isinstance(second, Question) and isinstance(anew, Question)
    assert [medium.fresh is None for q in (first, second, anew) for medium in q.prompt.media] == [
        False, False, True, True, False, False
    ]  # fmt: skip
    assert first.prompt.ids == second.prompt.ids and first.prompt.marks == second.prompt.marks
    asked = ("What is it?", image(made(PICTURE)), audio(made(SOUND)))
    for kept_mb in (512, 0):  # where nothing is remembered, what a worker knows again is read once more
        with served(chat, kept_mb=kept_mb) as server:
            texts = [text_of(server.ask(*asked)) for _ in range(3)]
            assert len(set(texts)) == 1
            expected = chat.chat(Image(made(PICTURE)), Audio(made(SOUND)), "What is it?", sampling=SHORT)
            assert texts[0].strip() == expected


# ---------------------------------------------------------------- other routes


def test_models_are_listed(server: Served) -> None:
    (model,) = server.client().models.list().data
    assert model.id == "tiny" and server.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        server.ask(model="gpt-4o")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_transcripts_in_every_form(server: Served, chat: Chat) -> None:
    expected = chat.chat(Audio(made(SOUND)), "Write down what is said.", sampling=SHORT)
    create = server.client().audio.transcriptions.create
    file = ("a.wav", io.BytesIO(made(SOUND)))
    found = create(model="tiny", file=file)
    assert found.text == expected and found.usage.input_token_details.audio_tokens > 0
    file = ("a.wav", made(SOUND))
    assert create(model="tiny", file=file, response_format="text").strip() == expected
    long = create(model="tiny", file=file, response_format="verbose_json", language="en", temperature=0)
    import soundfile

    assert long.text == expected and long.language == "en"
    assert long.duration == pytest.approx(soundfile.info(io.BytesIO(made(SOUND))).duration, abs=0.01)
    events = list(create(model="tiny", file=file, stream=True))
    assert "".join(e.delta for e in events[:-1]).strip() == events[-1].text == expected
    asked = chat.chat(Audio(made(SOUND)), "What is it?", sampling=SHORT)
    assert create(model="tiny", file=file, prompt="What is it?").text == asked
    for how in ({"response_format": "srt"}, {"timestamp_granularities": ["word"]}, {"extra_body": {"nonsense": "1"}}):
        with pytest.raises(openai.BadRequestError):
            create(model="tiny", file=file, **how)
    with pytest.raises(openai.BadRequestError, match="not readable"):
        create(model="tiny", file=("a.wav", b"RIFFnothing"))


def test_metrics_count_what_was_done(server: Served) -> None:
    import httpx

    def metric(name: str) -> float:
        text = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return float(lines.get(name, 0))

    ok = 'avlm_requests_total{path="/v1/chat/completions",status="200"}'
    names = (
        ok,
        'avlm_tokens_total{kind="answer"}',
        'avlm_tokens_total{kind="image"}',
        "avlm_first_token_seconds_count",
    )
    before = [metric(name) for name in names]
    server.ask("What is it?", image(made(PICTURE)), max_tokens=5)
    assert [metric(name) - b for name, b in zip(names, before, strict=True)] == [1, 5, 4, 1]
    assert metric("avlm_places_taken") == 0
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


# ---------------------------------------------------------------- errors, and clients that leave


def test_errors_have_openais_form(server: Served) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client(api_key="sesame-sesamf").models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask("What is it?", image(b"no picture at all"))
    assert caught.value.param is None and "messages[0].content[0]" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask("word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        server.ask(max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        server.client().embeddings.create(model="tiny", input="a")
    answer = server.post(said())
    assert answer.status_code == 200 and answer.headers["x-request-id"].startswith("req_")


def test_a_client_that_leaves_frees_its_place(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(monkeypatch)
    stream = server.ask(max_tokens=3000, stream=True)
    next(iter(stream))
    assert server.service.running.running == 1
    stream.close()
    until(server.is_empty)
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.5).chat.completions.create(**said(max_tokens=3000))
    until(server.is_empty)
    assert server.service.counts.requests["/v1/chat/completions", 499] >= 2


def test_many_at_once_are_answered_as_alone(server: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    questions = [f"What is number {i}?" for i in range(24)]
    alone = [text_of(server.ask(q)) for q in questions[:6]]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda q: text_of(server.ask(q)), questions))
    assert together[:6] == alone and len(set(together)) > 6


def test_asynchronous_clients_are_answered(server: Served) -> None:
    import asyncio

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            return text_of(await client.chat.completions.create(**{**said(), "max_tokens": 8}))

    assert asyncio.run(ask()) == text_of(server.ask())
