"""Decoding: cached or not, together or one by one, ours or transformers', an answer is an answer."""

from collections.abc import Callable
from typing import Any

import pytest

from avlm.errors import ConfigError
from avlm.inference.engine import end_tokens
from avlm.inference.generate import generate
from avlm.inference.sampling import Sampling
from avlm.samples import Encoded, Sample, Text, Turn
from tests.families import CACHED

KINDS: list[tuple[str, ...]] = [("image",), (), ("audio", "image"), ("video",), ("audio",)]


def prompts_of(processor: Any, make_sample: Callable[..., Sample]) -> list[Encoded]:
    samples = [
        make_sample(*k, seed=i, seconds=0.2 + 0.08 * i, text="What do you hear?" + " blue" * (3 * i % 5))
        for i, k in enumerate(KINDS)
    ]
    return [processor.encode(s, prompt_only=True) for s in samples]


@pytest.mark.parametrize("family", CACHED)
def test_with_a_cache_without_one_together_and_one_by_one_the_answers_agree(
    family: str, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model(language=CACHED[family])
    prompts = prompts_of(processor, make_sample)
    assert len({len(p) for p in prompts}) > 2
    sampling = Sampling(max_tokens=6)
    together = generate(model, processor, prompts, sampling)
    assert len({tuple(a) for a in together}) > 1  # prompts are told apart
    assert generate(model, processor, prompts, sampling, use_cache=False) == together
    for prompt, answer in zip(prompts, together, strict=True):
        assert generate(model, processor, [prompt], sampling) == [answer]
        assert generate(model, processor, [prompt], sampling, use_cache=False) == [answer]


def test_greedy_answers_are_those_of_transformers_own_generate(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    prompts = prompts_of(processor, make_sample)
    batch = processor.collate(prompts)
    del batch["labels"]
    theirs = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    ends = end_tokens(model, processor)
    cut = [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in theirs]
    assert generate(model, processor, prompts, Sampling(max_tokens=8)) == cut


def test_an_answer_ends_at_the_end_token_and_the_others_go_on(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    prompts = prompts_of(processor, make_sample)
    free = generate(model, processor, prompts, Sampling(max_tokens=6))
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, free[0][2]]
    ended = generate(model, processor, prompts, Sampling(max_tokens=6))
    stops = {processor.tokenizer.eos_token_id, free[0][2]}
    expected = [a[: next((i for i, t in enumerate(a) if t in stops), 6)] for a in free]
    assert ended == expected and len(ended[0]) <= 2 and max(len(a) for a in ended) == 6


def test_the_model_is_asked_no_further_when_all_answers_have_ended(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    prompt = processor.encode(make_sample("image"), prompt_only=True)
    first = generate(model, processor, [prompt], Sampling(max_tokens=1))[0][0]
    model.generation_config.eos_token_id = first
    passes: list[int] = []
    model.language_model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    assert generate(model, processor, [prompt], Sampling(max_tokens=50)) == [[]]
    assert len(passes) == 1


def test_no_prompts_give_no_answers(make_model: Callable[..., Any]) -> None:
    assert generate(*make_model("text"), [], Sampling()) == []


def test_no_answer_goes_beyond_what_the_language_model_was_made_for(make_model: Callable[..., Any]) -> None:
    model, processor = make_model()
    ask = Sample("0", (Turn("user", (Text("What?"),)),))
    prompt = processor.encode(ask, prompt_only=True)
    model.config.text_config.max_position_embeddings = len(prompt) + 3
    model.generation_config.eos_token_id = None
    assert len(generate(model, processor, [prompt], Sampling(max_tokens=9))[0]) <= 3
    model.config.text_config.max_position_embeddings = len(prompt)
    with pytest.raises(ConfigError, match=f"has {len(prompt)} tokens"):
        generate(model, processor, [prompt], Sampling(max_tokens=9))


def test_a_placeholder_is_never_an_answer(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model()
    original = type(model.language_model).forward

    def fond_of_images(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits[..., model.config.image_token_id] = 1e4
        return output

    monkeypatch.setattr(type(model.language_model), "forward", fond_of_images)
    prompt = processor.encode(make_sample("image"), prompt_only=True)
    for sampling in (Sampling(max_tokens=4), Sampling(max_tokens=4, temperature=1.0)):
        (answer,) = generate(model, processor, [prompt], sampling)
        assert len(answer) == 4 and model.config.image_token_id not in answer
