"""Slots: written in place, grown, moved, taken out and put in; attention over them is attention over each alone."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avlm.models import attention
from avlm.models.slots import Run, Slots, Step


def alone(q: Tensor, k: Tensor, v: Tensor, how: attention.How) -> Tensor:
    """The slow loop: each token (H, D) over what is before it, one by one; (count, H, D)."""
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    past = k.shape[1] - q.shape[1]
    found = []
    for i in range(q.shape[1]):
        end = past + i + 1
        start = 0 if how.window is None else max(0, end - how.window)
        scores = torch.einsum("hd,hkd->hk", q[:, i], k[:, start:end]) * how.scale
        if how.softcap is not None:
            scores = how.softcap * torch.tanh(scores / how.softcap)
        if how.sinks is not None:
            scores = torch.cat([scores, how.sinks[:, None]], 1)
        weights = scores.softmax(-1)[:, : end - start]
        found.append(torch.einsum("hk,hkd->hd", weights, v[:, start:end]))
    return torch.stack(found)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_attention_over_slots_is_that_of_each_answer_alone(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4]), "heads to a key/value head")
    kv_heads, width = data.draw(st.sampled_from([1, 2]), "key/value heads"), 4
    heads = kv_heads * groups
    pasts = data.draw(st.lists(st.integers(0, 9), max_size=4), "answers")
    runs = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=not pasts, max_size=3), "runs")
    window = data.draw(st.sampled_from([None, 1, 3, 100]), "window")
    softcap = data.draw(st.sampled_from([None, 2.0]), "soft cap")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    sinks = torch.randn(heads) if data.draw(st.booleans(), "sinks") else None
    how = attention.How(True, window, width**-0.5, 0.0, softcap, sinks)
    lengths = [(past, 1) for past in pasts] + runs
    step = Step(pasts, [Run(i + len(pasts), *run) for i, run in enumerate(runs)], torch.device("cpu"))
    keys = [torch.randn(kv_heads, past + count, width) for past, count in lengths]
    values = [torch.randn(kv_heads, past + count, width) for past, count in lengths]
    queries = [torch.randn(heads, count, width) for _, count in lengths]

    room = max(past + count for past, count in lengths) + 3
    slots = [torch.full((len(lengths), kv_heads, room, width), 1e4) for _ in range(2)]  # what is beyond is never seen
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        slots[0][i, :, : k.shape[1]], slots[1][i, :, : v.shape[1]] = k, v
    found = step.attend(torch.cat(queries, 1)[None], *slots, how)
    slow = torch.cat([alone(q, k, v, how) for q, k, v in zip(queries, keys, values, strict=True)])
    torch.testing.assert_close(found, slow[None], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_what_is_written_is_there_through_growing_moving_and_copying(data: st.DataObject) -> None:
    heads, width = 2, 3
    slots = Slots(1)
    ours: list[Tensor] = []  # what each slot was given, (heads, tokens, width)
    number = 0
    for _ in range(data.draw(st.integers(1, 6), "steps")):
        what = data.draw(st.sampled_from(["read", "move", "keep"]), "what") if ours else "read"
        if what == "move":
            source, target = (data.draw(st.integers(0, len(ours) - 1)) for _ in range(2))
            slots.copy(source, target, ours[source].shape[1])
            ours[target] = ours[source].clone()
            continue
        if what == "keep":
            source = data.draw(st.integers(0, len(ours) - 1))
            tokens = data.draw(st.integers(1, ours[source].shape[1]))
            kept = [(keys.clone(), values.clone()) for keys, values in slots.seen(source, tokens)]
            slots.reserve(len(ours) + 1, tokens)
            slots.put_in(len(ours), kept, tokens)
            ours.append(ours[source][:, :tokens].clone())
            continue
        came = data.draw(st.integers(0, 2), "new") if ours else 1
        counts = [data.draw(st.sampled_from([1, 3, 300]), "tokens") for _ in range(came)]
        singles = len(ours)
        step = Step(
            [own.shape[1] for own in ours],
            [Run(singles + i, 0, count) for i, count in enumerate(counts)],
            torch.device("cpu"),
        )
        slots.reserve(singles + came, step.needed)
        slots.step = step
        states = torch.arange(number, number + heads * step.tokens * width).view(1, heads, step.tokens, width).float()
        number += states.numel()
        keys, values = slots.update(states, -states, 0)
        parts = states[0].split([*[1] * singles, *counts], 1)
        ours = [torch.cat([own, part], 1) for own, part in zip(ours, parts, strict=False)] + list(parts[singles:])
        for i, own in enumerate(ours):
            assert torch.equal(keys[i, :, : own.shape[1]], own)
            assert torch.equal(values[i, :, : own.shape[1]], -own)
    for i, own in enumerate(ours):
        found, _ = slots.seen(i, own.shape[1])[0]
        assert torch.equal(found, own)


def test_positions_begin_anew_with_every_answer() -> None:
    step = Step([4, 0], [Run(2, 0, 3), Run(3, 7, 2)], torch.device("cpu"))
    assert step.places_T.tolist() == [4, 0, 0, 1, 2, 7, 8]
    assert step.slots_T.tolist() == [0, 1, 2, 2, 2, 3, 3]
    assert (step.tokens, step.needed, step.longest) == (7, 9, 5)


def test_memory_is_not_copied_for_every_token() -> None:
    slots = Slots(1)
    copied = set()
    for past in range(1000):
        step = Step([past], [], torch.device("cpu"))
        slots.reserve(1, step.needed)
        slots.step = step
        keys, _ = slots.update(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), 0)
        copied.add(keys.data_ptr())
    assert slots.room == 1024
    assert len(copied) <= 3  # 256, 512, 1024


@pytest.mark.parametrize("kind", ["bias", "nothing"])
def test_a_bias_on_attention_is_refused(kind: str) -> None:
    step = Step([], [Run(0, 0, 2)], torch.device("cpu"))
    q = torch.randn(1, 2, 2, 4)
    given = {"position_bias": torch.zeros(1)} if kind == "bias" else {}

    def ask() -> Any:
        return attention.packed_attention(SimpleNamespace(is_causal=True), q, q, q, None, slots=step, **given)  # type: ignore[arg-type]

    if kind == "bias":
        with pytest.raises(Exception, match="adds a bias to its attention"):
            ask()
    else:
        assert ask()[0].shape == (1, 2, 2, 4)


def test_the_cache_is_one_of_transformers_own_kind(make_model: Callable[..., Any]) -> None:
    from transformers import Cache

    slots = Slots(2)
    assert isinstance(slots, Cache) and len(slots) == 2
    assert slots.get_seq_length() == 0
