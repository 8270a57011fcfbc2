"""A running batch: whoever joins, leaves or is remembered, an answer is the one it would have been alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avlm.errors import ConfigError, MediaError
from avlm.inference.engine import Engine, Request
from avlm.inference.generate import generate
from avlm.inference.pool import Pool
from avlm.inference.readers import CohortReader, SlotReader
from avlm.inference.sampling import Sampling
from avlm.models.products import fast_products
from avlm.samples import MediaItem, Sample, Text, Turn
from tests.families import CACHED

SLOTTED = {family for family in CACHED if "state" not in family and "length" not in family}
KINDS: list[tuple[str, ...]] = [("image",), (), ("audio", "image"), ("video",), ("audio",)]


def questions(make_sample: Callable[..., Sample], count: int = 5) -> list[Sample]:
    return [
        make_sample(*KINDS[i % 5], seed=i, seconds=0.2 + 0.08 * i, text="What do you hear?" + " blue" * (3 * i % 5))
        for i in range(count)
    ]


def run(engine: Engine, *requests: Request) -> list[list[int]]:
    while engine.busy:
        engine.step()
    assert all(request.finish in ("stop", "length") for request in requests)
    return [request.tokens for request in requests]


def recomputed(model: Any, processor: Any, sample: Sample, sampling: Sampling) -> list[int]:
    """The answer of which every token is found by reading all before it anew."""
    prompt = processor.encode(sample, prompt_only=True)
    return generate(model, processor, [prompt], sampling, use_cache=False)[0]


SHORT = Sampling(max_tokens=7)


@pytest.mark.parametrize("family", CACHED)
def test_whoever_joins_late_or_leaves_the_others_answers_stay(
    family: str, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model(language=CACHED[family])
    engine = Engine(model, processor, slots=3)
    assert isinstance(engine._reader, SlotReader if family in SLOTTED else CohortReader)
    samples = questions(make_sample)
    lengths = [7, 3, 6, 5, 4]
    wanted = [recomputed(model, processor, s, Sampling(max_tokens=n)) for s, n in zip(samples, lengths, strict=True)]
    first = [engine.join(s, Sampling(max_tokens=n)) for s, n in zip(samples[:2], lengths, strict=False)]
    engine.step()
    gone = engine.join(samples[4], SHORT)
    engine.step()
    engine.leave(gone)
    late = [engine.join(s, Sampling(max_tokens=n)) for s, n in zip(samples[2:], lengths[2:], strict=True)]
    assert engine.free == 0 and gone.finish == "left"
    assert run(engine, *first, *late) == wanted
    assert isinstance(engine._reader, SlotReader if family in SLOTTED else CohortReader)
    assert len({tuple(answer) for answer in wanted}) > 2  # questions are told apart


@pytest.mark.parametrize("family", CACHED)
def test_what_was_read_before_need_not_be_read_again(
    family: str, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model(language=CACHED[family])
    engine = Engine(model, processor)
    (first,) = make_sample("image", answer=None).turns
    sampling = Sampling(max_tokens=4)
    turns: tuple[Turn, ...] = (first,)
    for number in range(3):
        sample = Sample("x", turns)
        request = engine.join(sample, sampling)
        assert run(engine, request) == [recomputed(model, processor, sample, sampling)]
        assert (request.kept_tokens > 8) == (number > 0 and family in SLOTTED)
        turns = (*turns, Turn("assistant", (Text("red"),)), Turn("user", (Text(f"And number {number}?"),)))
    assert engine.prompts.encoded_media == 1


def test_another_picture_in_the_same_places_is_not_the_same_beginning(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    samples = [make_sample("image", answer=None, seed=seed, text="What is it?") for seed in (1, 2, 1)]
    assert len({tuple(processor.encode(s, prompt_only=True).ids) for s in samples}) == 1
    kept = []
    for sample in samples:
        request = engine.join(sample, SHORT)
        assert run(engine, request) == [recomputed(model, processor, sample, SHORT)]
        kept.append(request.kept_tokens)
    begins = processor.encode(samples[0], prompt_only=True).spans[0][0]
    assert kept[:2] == [0, begins if begins >= 8 else 0]
    assert kept[2] == len(processor.encode(samples[0], prompt_only=True)) - 1


def test_a_beginning_is_shared_with_those_who_are_still_answering(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    sample = make_sample("image", answer=None)
    one = engine.join(sample, Sampling(max_tokens=9))
    engine.step()
    two = engine.join(sample, Sampling(max_tokens=9))
    engine.step()
    assert two.kept_tokens == two.prompt_tokens - 1 and one.finish is None
    wanted = recomputed(model, processor, sample, Sampling(max_tokens=9))
    assert run(engine, one, two) == [wanted, wanted]


def test_those_who_ask_the_same_at_once_have_it_read_once(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avlm.inference.readers.WORTH_WAITING", 8)
    model, processor = make_model()
    engine = Engine(model, processor)
    sample, other = make_sample("image", answer=None), make_sample("audio", answer=None, text="How many?")
    ways = [Sampling(max_tokens=6, temperature=1.0, seed=seed) for seed in range(3)]
    wanted = [recomputed(model, processor, sample, way) for way in ways]
    asked = [engine.join(sample, way) for way in ways]
    different = engine.join(other, SHORT)
    first = asked[2]
    engine.step()
    assert [len(request.tokens) for request in asked] == [1, 0, 0] and len(different.tokens) == 1
    engine.leave(first)
    assert run(engine, *asked[:2]) == wanted[:2]
    assert [request.kept_tokens for request in asked] == [0, asked[0].prompt_tokens - 1, 0]
    assert different.tokens == recomputed(model, processor, other, SHORT)


def test_a_long_prompt_is_read_in_parts_while_others_go_on(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avlm.inference.readers.AT_ONCE", 4)
    model, processor = make_model(language={"model_type": "mistral", "sliding_window": 6})
    engine = Engine(model, processor)
    samples = questions(make_sample, 4)
    quick = engine.join(samples[1], Sampling(max_tokens=12))
    while quick.answer_tokens < 2:
        engine.step()
    long = [engine.join(s, SHORT) for s in (samples[2], samples[0], samples[3])]
    assert max(request.prompt_tokens for request in long) > 20
    before = quick.answer_tokens
    engine.step()
    assert quick.answer_tokens == before + 1 and not any(request.tokens for request in long)
    wanted = [recomputed(model, processor, s, SHORT) for s in (samples[2], samples[0], samples[3])]
    assert run(engine, *long) == wanted
    assert quick.tokens == recomputed(model, processor, samples[1], Sampling(max_tokens=12))


@pytest.mark.parametrize("width", [32, 256])
def test_steps_of_many_tokens_are_computed_as_in_training_where_layers_are_wide(
    width: int, make_model: Callable[..., Any], make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model(language={"hidden_size": width, "intermediate_size": 2 * width})
    asked: list[bool] = []
    monkeypatch.setattr(
        "avlm.inference.readers.fast_products", lambda wanted: asked.append(wanted) or fast_products(wanted)
    )
    engine = Engine(model, processor)
    sample = make_sample("image", answer=None)
    sampling = Sampling(max_tokens=4)
    assert run(engine, engine.join(sample, sampling)) == [recomputed(model, processor, sample, sampling)]
    assert asked[0] == (width == 256) and not any(asked[1:]) and len(asked) > 2


def test_media_are_encoded_once_whatever_form_they_come_in(
    make_model: Callable[..., Any], picture: Callable[..., Any]
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    path = picture(seed=3)
    forms = [MediaItem("image", path), MediaItem("image", data=path.read_bytes()), MediaItem("image", path)]
    prompts = [engine.prepare(Sample("x", (Turn("user", (item, Text("What?"))),))) for item in forms]
    assert all(prompt.media[0].fresh is not None for prompt in prompts)  # nothing is known yet
    run(engine, *(engine.join(prompt, SHORT) for prompt in prompts))
    assert engine.prompts.encoded_media == 1
    known = engine.prepare(Sample("x", (Turn("user", (forms[1], Text("And now?"))),)))
    assert known.media[0].fresh is None and known.media[0].embeddings is not None
    path.write_bytes(picture("other.png", seed=4).read_bytes())  # another picture under the same name
    run(engine, engine.join(Sample("x", (Turn("user", (forms[0], Text("What?"))),)), SHORT))
    assert engine.prompts.encoded_media == 2


def test_a_known_medium_is_not_decoded_again(
    make_model: Callable[..., Any], picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    sample = Sample("x", (Turn("user", (MediaItem("image", picture()), Text("What?"))),))
    first = run(engine, engine.join(sample, SHORT))
    monkeypatch.setattr(processor.reader(), "_prepare", lambda item: pytest.fail("decoded again"))
    assert run(engine, engine.join(sample, SHORT)) == first


def test_a_file_that_changes_while_it_is_read_is_not_taken_for_what_it_was(
    make_model: Callable[..., Any], picture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    path, other = picture("a.png", seed=1), picture("b.png", seed=2)
    before, after = path.read_bytes(), other.read_bytes()
    sample = Sample("x", (Turn("user", (MediaItem("image", path), Text("What?"))),))
    prepare = processor.prepare

    def replaced(asked: Sample) -> Any:
        path.write_bytes(after)
        return prepare(asked)

    with monkeypatch.context() as patch:
        patch.setattr(processor, "prepare", replaced)
        run(engine, engine.join(sample, SHORT))
    for content in (before, after):
        path.write_bytes(content)
        assert run(engine, engine.join(sample, SHORT)) == [recomputed(model, processor, sample, SHORT)]


def storage_of(pool: Pool) -> list[torch.Tensor]:
    """All tensors that what is remembered lies in."""
    return [tensor for pair in pool._layers for tensor in pair]


def test_memory_stays_below_its_cap(make_model: Callable[..., Any], make_sample: Callable[..., Sample]) -> None:
    model, processor = make_model()
    engine = Engine(model, processor, kept_bytes=60_000)
    for seed in range(12):
        run(engine, engine.join(make_sample("image", answer=None, seed=seed), Sampling(max_tokens=2)))
        assert isinstance(engine._reader, SlotReader)
        prefixes = engine._reader.prefixes
        assert 0 < engine.prompts.known.used <= 15_000
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in storage_of(prefixes._pool)}
        assert 0 < sum(held.values()) <= 45_000 == prefixes.capacity
    assert len(prefixes) > 1
    nothing = Engine(model, processor, kept_bytes=0)
    for _ in range(2):
        request = nothing.join(make_sample("image", answer=None), Sampling(max_tokens=2))
        run(nothing, request)
        assert request.kept_tokens == 0
    assert nothing.prompts.encoded_media == 2


# ---------------------------------------------------------------- what is told


def test_logprobs_are_those_of_a_full_pass(make_model: Callable[..., Any], make_sample: Callable[..., Sample]) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    sample = make_sample("image", "audio", answer=None)
    request = engine.join(sample, Sampling(max_tokens=6, logprobs=3, temperature=1.0, seed=1))
    run(engine, request)
    told = [about for piece in request.pieces for about in piece.logprobs]
    tokens = [token for piece in request.pieces for token in piece.tokens]
    assert tokens == request.tokens and len(told) == len(tokens)
    prompt = processor.encode(sample, prompt_only=True)
    inputs = processor.collate([replace(prompt, ids=prompt.ids + tokens, labels=[-100] * (len(prompt) + len(tokens)))])
    with torch.inference_mode():
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[0].float()
    expected = logits.log_softmax(-1)[len(prompt) - 1 :]
    for row, token, about in zip(expected, tokens, told, strict=False):
        assert about.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = [i for i in row.argsort(descending=True).tolist() if i not in model.placeholder_ids()][:3]
        assert [p for *_, p in about.top] == pytest.approx([float(row[i]) for i in best], abs=1e-4)


def test_a_request_tells_what_it_took(make_model: Callable[..., Any], make_sample: Callable[..., Sample]) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    sample = make_sample("image", "video", "audio", answer=None)
    request = engine.join(sample, SHORT)
    ids = processor.encode(sample, prompt_only=True).ids
    counts = {kind: ids.count(getattr(model.config, f"{kind}_token_id")) for kind in ("image", "video", "audio")}
    assert request.media_tokens == counts and request.prompt_tokens == len(ids)
    run(engine, request)
    assert request.answer_tokens == len(request.tokens) > 0
    text = "".join(piece.text for piece in request.pieces)
    assert text == processor.tokenizer.decode(request.tokens, skip_special_tokens=True)


def test_an_answer_ends_where_a_stop_string_begins(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    sample = make_sample("image", answer=None)
    whole = engine.join(sample, Sampling(max_tokens=30))
    run(engine, whole)
    text = "".join(piece.text for piece in whole.pieces)
    stop = text[len(text) // 2 :][:3]
    request = engine.join(sample, Sampling(max_tokens=30, stop=("never said", stop)))
    run(engine, request)
    assert "".join(piece.text for piece in request.pieces) == text[: text.index(stop)]
    assert request.finish == "stop" and request.answer_tokens < whole.answer_tokens
    assert engine.free == 8


# ---------------------------------------------------------------- what goes wrong


def test_a_prompt_that_cannot_be_joins_nothing(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Any
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = Sample("7", (Turn("user", (MediaItem("image", tmp_path / "broken.png"), Text("What?"))),), where="row 7")
    with pytest.raises(MediaError, match=r"row 7: .*broken\.png"):
        engine.join(bad, SHORT)
    missing = Sample("7", (Turn("user", (MediaItem("image", tmp_path / "none.png"), Text("What?"))),))
    with pytest.raises(MediaError, match=r"none\.png"):
        engine.join(missing, SHORT)
    model.config.text_config.max_position_embeddings = 4
    with pytest.raises(ConfigError, match="made for 4"):
        engine.join(make_sample(answer=None), SHORT)
    assert not engine.busy and engine.free == 8
    with pytest.raises(ConfigError, match="slots=0 leaves no place for an answer"):
        Engine(model, processor, slots=0)


def test_a_pass_that_fails_leaves_an_engine_that_answers(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model()
    engine = Engine(model, processor)
    samples = questions(make_sample, 2)
    wanted = run(engine, engine.join(samples[0], SHORT))
    lost = engine.join(samples[1], SHORT)
    engine.step()

    def dying(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(SlotReader, "_pass", dying)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert lost.finish == "left" and not engine.busy
    assert run(engine, engine.join(samples[0], SHORT)) == wanted


def test_a_family_that_does_not_do_as_it_should_with_slots_gets_its_own_cache(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model()
    sample = make_sample("image", answer=None)
    wanted = recomputed(model, processor, sample, SHORT)
    layer = model.language_model.get_decoder().layers[1].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **kw: forward(*a, **{k: v for k, v in kw.items() if k != "slots"}))
    engine = Engine(model, processor)
    assert isinstance(engine._reader, SlotReader)
    assert run(engine, engine.join(sample, SHORT)) == [wanted]
    assert isinstance(engine._reader, CohortReader) and model.model.takes_slots is False
    assert isinstance(Engine(model, processor)._reader, CohortReader)


@pytest.fixture(scope="module")
def one_model(request: pytest.FixtureRequest) -> list[Any]:
    return []


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_coming_and_going_changes_no_answer(
    data: st.DataObject, one_model: list[Any], make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    if not one_model:
        model, processor = make_model()
        samples = questions(make_sample)
        ways = [
            Sampling(max_tokens=1 + 2 * i, temperature=float(i % 2), seed=i, repetition_penalty=1.0 + i % 3)
            for i in range(5)
        ]
        wanted = [recomputed(model, processor, s, w) for s, w in zip(samples, ways, strict=True)]
        one_model += [model, processor, samples, ways, wanted]
    model, processor, samples, ways, wanted = one_model
    engine = Engine(
        model, processor, slots=data.draw(st.integers(1, 4)), kept_bytes=data.draw(st.sampled_from([0, 10**6]))
    )
    asked: list[tuple[int, Request]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["join", "step", "step", "leave"]))
        if what == "join":
            i = data.draw(st.integers(0, 4))
            asked.append((i, engine.join(samples[i], ways[i])))
        elif what == "step":
            engine.step()
        elif asked:
            engine.leave(asked[data.draw(st.integers(0, len(asked) - 1))][1])
    while engine.busy:
        engine.step()
    for i, request in asked:
        if request.finish == "left":
            assert request.tokens == wanted[i][: request.answer_tokens]
        else:
            assert request.tokens == wanted[i]
    assert engine.free == engine.slots


def test_freed_memory_is_kept_from_the_first_step_on(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that are forked between the two, to read files, give theirs back."""
    asked: list[int] = []
    monkeypatch.setattr("avlm.inference.engine.keep_freed_memory", lambda: asked.append(1))
    engine = Engine(*make_model())
    assert not asked
    run(engine, engine.join(make_sample(answer=None), SHORT))
    assert asked == [1]
