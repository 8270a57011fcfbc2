"""Tokens are chosen as transformers' own processors would have them, and a draw follows from its seed alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from avlm.errors import ConfigError
from avlm.inference.generate import generate
from avlm.inference.sampling import FIRST, Choice, Sampling, choose
from avlm.samples import Sample


def prompts_of(processor: Any, make_sample: Callable[..., Sample]) -> list[Any]:
    kinds: list[tuple[str, ...]] = [("image",), (), ("audio", "image")]
    return [processor.encode(make_sample(*k, seed=i), prompt_only=True) for i, k in enumerate(kinds)]


def test_sampling_follows_from_the_seed_in_a_batch_as_alone(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    prompts = prompts_of(processor, make_sample)
    sampling = Sampling(max_tokens=6, temperature=1.5, top_k=50, top_p=0.95, seed=4)
    torch.manual_seed(1)
    together = generate(model, processor, prompts, sampling)
    torch.manual_seed(2)
    assert generate(model, processor, prompts, sampling) == together
    assert [generate(model, processor, [p], sampling)[0] for p in prompts] == together
    other = Sampling(max_tokens=6, temperature=1.5, top_k=50, top_p=0.95, seed=5)
    assert generate(model, processor, prompts, other) != together


def warped(logits: torch.Tensor, sampling: dict[str, Any]) -> torch.Tensor:
    """Probabilities by transformers' own warpers, in the order in which its `generate` has them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.get("temperature", 1.0))])
    if sampling.get("top_k"):
        warpers.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(sampling["top_p"]))
    if sampling.get("min_p"):
        warpers.append(MinPLogitsWarper(sampling["min_p"]))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)[0]


def drawn(logits: torch.Tensor, sampling: dict[str, Any], count: int) -> torch.Tensor:
    choices = [Choice(Sampling(**sampling, seed=seed)) for seed in range(count)]
    return torch.tensor(choose(logits.expand(count, -1), choices))


WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.6},
    {"temperature": 0.9, "top_k": 5, "top_p": 0.8},
    {"temperature": 1.1, "min_p": 0.2},
    {"temperature": 1.1, "top_k": 8, "top_p": 0.95, "min_p": 0.15},
]


@pytest.mark.parametrize("sampling", WAYS)
@pytest.mark.parametrize("tokens", [12, 2 * FIRST])
def test_tokens_are_drawn_as_often_as_transformers_warpers_say(sampling: dict[str, Any], tokens: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, tokens)
    expected = warped(logits, sampling)
    count = 4000
    shares = drawn(logits, sampling, count).bincount(minlength=tokens) / count
    assert set(shares.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() <= 5 * deviation + 1e-3).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3 * FIRST), st.floats(0.05, 5), st.integers(0, 700), st.floats(0.01, 1), st.floats(0, 1),
    st.integers(0, 2**31),
)  # fmt: skip
def test_nothing_is_drawn_that_transformers_warpers_leave_out(
    tokens: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = 4 * torch.randn(1, tokens, generator=torch.Generator().manual_seed(seed))
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    # Where a border falls on the last bits of a sum either side of it is right.
    near = warped(logits, {**sampling, "top_p": min(1.0, top_p + 1e-5), "min_p": max(0.0, min_p - 1e-5)})
    for token in drawn(logits, sampling, 4).tolist():
        assert near[token] > 0


@given(st.floats(0.1, 5), st.lists(st.integers(0, 39), min_size=1, max_size=30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_a_repetition_penalty_is_that_of_transformers(penalty: float, read: list[int], seed: int) -> None:
    logits = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([read]), logits.clone())
    assert choose(logits, [Choice(Sampling(repetition_penalty=penalty), read)]) == [int(theirs.argmax())]


def test_what_was_said_is_penalised_as_what_was_read() -> None:
    choice = Choice(Sampling(repetition_penalty=2.0), [0])
    logits = torch.tensor([[8.0, 5.0, 3.0]])
    assert [choose(logits, [choice])[0] for _ in range(3)] == [1, 0, 0]  # 4 5 3, then 4 2.5 3
    assert Choice(Sampling(repetition_penalty=2.0)).next(logits[0]) == 0


def test_answers_of_a_batch_are_chosen_each_by_its_own_settings() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 40)
    ways = [Sampling(), Sampling(temperature=2.0, seed=3), Sampling(repetition_penalty=3.0)]
    together = choose(logits, [Choice(s, [1, 2]) for s in ways])
    assert together == [choose(row[None], [Choice(s, [1, 2])])[0] for row, s in zip(logits, ways, strict=True)]


def test_the_smallest_temperature_is_greedy_and_a_narrow_choice_too() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 40) * 30
    for sampling in (
        Sampling(temperature=1e-300),
        Sampling(temperature=1e-30),
        Sampling(temperature=2.0, top_k=1),
        Sampling(temperature=2.0, top_p=1e-9),
        Sampling(temperature=2.0, min_p=1.0),
    ):
        assert choose(logits, [Choice(sampling) for _ in range(3)]) == logits.argmax(-1).tolist()


def test_more_candidates_than_tokens_are_all_of_them() -> None:
    logits = torch.zeros(1, 4)
    assert set(drawn(logits, {"temperature": 1.0, "top_k": 99}, 200).tolist()) == {0, 1, 2, 3}


def test_what_may_never_be_said_is_not_drawn() -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, [3, 299]] = 0.0
    for sampling in ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.99}, {"temperature": 1.0, "top_k": 9}):
        assert set(drawn(logits, sampling, 50).tolist()) == {3, 299}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 leaves no room for an answer. Use at least 1"),
        ({"temperature": -1}, "temperature=-1 is not a number that logits can be divided by. Use 0 for the likeliest "
         "token, or more"),
        ({"temperature": float("nan")}, "temperature=nan is not a number that logits can be divided by. Use 0 for the "
         "likeliest token, or more"),
        ({"top_k": -1}, "top_k=-1 is not a number of tokens to choose among. Use 0 for all of them, or more"),
        ({"top_p": 0}, "top_p=0 is not a probability to choose within. Use more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 is not a probability to choose within. Use more than 0 and at most 1"),
        ({"min_p": -0.1}, "min_p=-0.1 is not a share of a probability. Use at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is not a number that logits can be divided by. Use 1 for "
         "none, or more"),
        ({"stop": ("a", "")}, "stop=('a', '') is not a tuple of texts, each of at least one character, so an answer "
         "would end nowhere or at once. Give texts to end it at"),
        ({"stop": "end"}, "stop='end' is not a tuple of texts, each of at least one character, so an answer would end "
         "nowhere or at once. Give texts to end it at"),
        ({"seed": -1}, f"seed=-1 is not a seed that a generator takes. Use a whole number from 0 to {2**63 - 1}"),
        ({"logprobs": -1}, "logprobs=-1 is not a number of alternatives. Use 0 for the token's own alone, or more"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**settings)
    assert str(error.value) == message
