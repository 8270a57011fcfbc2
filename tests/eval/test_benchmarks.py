"""Scoring by task, with guesses and swaps counted by hand, and a model that is known through and through."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from avlm.errors import ConfigError, DataError
from avlm.eval.benchmarks import evaluate, guess_score
from avlm.inference.generate import generate
from avlm.inference.sampling import Sampling
from avlm.samples import Clip, Encoded, MediaItem, Picture, Sample, Sound, Text, Turn

COLOURS = ["red", "green", "blue", "red"]


def picture(number: int) -> Picture:
    return Picture(np.full((28, 28, 3), 10 + 40 * number, dtype=np.uint8))


def sound(number: int) -> Sound:
    time = np.arange(4000) / 16_000
    return Sound(np.sin(2 * np.pi * 200 * (number + 1) * time).astype(np.float32), 16_000)


def row(
    number: int, *media: tuple[str, int], task: str = "vqa", question: str = "Which colour?", answer: str = "red"
) -> Sample:
    parts: list[Any] = []
    for kind, which in media:
        decoded: Any = {"image": picture, "audio": sound}.get(kind, lambda n: None)(which)
        if kind == "video":
            decoded = Clip((picture(which), picture(which + 1)), 2.0, sound(which))
        parts.append(MediaItem(kind, decoded=decoded))  # type: ignore[arg-type]
    turns = (Turn("user", (*parts, Text(question))), Turn("assistant", (Text(answer),)))
    return Sample(str(number), turns, task, f"line {number + 1}")


class Oracle:
    """Answers in place of a model, from what each prompt really holds, and remembers what it was asked."""

    def __init__(self, processor: Any, answer: Callable[[Encoded], str]) -> None:
        self.processor, self.answer = processor, answer
        self.asked: list[Encoded] = []
        self.batches: list[int] = []

    def __call__(self, model: Any, processor: Any, prompts: Sequence[Encoded], sampling: Sampling) -> list[list[int]]:
        self.asked += prompts
        self.batches.append(len(prompts))
        return [list(self.processor.tokenizer(self.answer(p), add_special_tokens=False).input_ids) for p in prompts]


@pytest.fixture
def oracle(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any, Oracle]]:
    def make(answer: Callable[[Encoded], str]) -> tuple[Any, Any, Oracle]:
        model, processor = make_model()
        asked = Oracle(processor, answer)
        monkeypatch.setattr("avlm.eval.benchmarks.generate", asked)
        return model, processor, asked

    return make


def shown(prompt: Encoded) -> int:
    """Number of the first picture in a prompt, told from its grey."""
    grey = float(torch.cat([p.flatten() for p in (prompt.images + prompt.frames)[:1]]).mean()) * 127.5 + 127.5
    return round((grey - 10) / 40)


# ---------------------------------------------------------------- scores


def test_a_model_that_looks_is_right_and_wrong_when_pictures_are_swapped(oracle: Callable[..., Any]) -> None:
    model, processor, _ = oracle(lambda prompt: COLOURS[shown(prompt) % 4])
    rows = [row(i, ("image", i % 4), ("audio", i), answer=COLOURS[i % 4]) for i in range(4)]
    report = evaluate(model, processor, rows)
    task = report.tasks["vqa"]
    assert (task.samples, task.accuracy, task.scores) == (4, 1.0, {"exact": 1.0})
    assert task.guess == 0.5  # "red" is right twice in four
    assert task.swapped["image"] <= 0.5  # at most the two red ones had each other's picture
    assert task.swapped["audio"] == 1.0  # it never listened


def test_a_model_that_looks_at_nothing_is_found_out(oracle: Callable[..., Any]) -> None:
    model, processor, _ = oracle(lambda prompt: "red")
    rows = [row(i, ("image", i), answer=COLOURS[i]) for i in range(4)]
    task = evaluate(model, processor, rows).tasks["vqa"]
    assert task.accuracy == task.guess == task.swapped["image"] == 0.5
    assert "audio" not in task.swapped


def test_tasks_are_scored_apart(oracle: Callable[..., Any]) -> None:
    model, processor, asked = oracle(lambda prompt: "red light" if prompt.sounds else "blue")
    rows = [
        row(0, ("image", 0), task="vqa", answer="Blue!"),
        row(1, ("image", 1), task="vqa", answer="red"),
        row(2, ("audio", 0), task="transcribe", answer="red lights"),
        row(3, ("audio", 1), task="transcribe", answer="red light here now"),
        row(4, task="", answer="blue"),
    ]
    report = evaluate(model, processor, rows, swap=False)
    assert list(report.tasks) == ["", "transcribe", "vqa"]
    assert (report.tasks["vqa"].accuracy, report.tasks[""].accuracy) == (0.5, 1.0)
    heard = report.tasks["transcribe"]
    assert heard.accuracy == 0.0
    assert heard.scores["wer"] == pytest.approx(3 / 6)  # one wrong and two missing of six words
    assert all(not task.swapped for task in report.tasks.values())
    assert len(asked.asked) == 5
    assert report.answers[0] == {"id": "0", "task": "vqa", "expected": "Blue!", "answer": "blue"}
    assert [a["id"] for a in report.answers] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("<1>Red", "red", True),
        (" <3> red", "red", True),
        ("\u261ered", "red", True),  # VITA-1.5's
        ("red", "red", True),
        ("<1>red", "<1>red", True),
        ("red", "<1>red", False),  # where rows have them they are to be told
        ("<2>red", "<1>red", False),
        ("<1><2>red", "red", False),  # one token, not any number
        ("<4>red", "red", False),
        ("red <1>", "red", False),
    ],
)
def test_a_state_token_before_an_answer_is_no_mistake_where_rows_have_none(
    oracle: Callable[..., Any], answer: str, expected: str, right: bool
) -> None:
    model, processor, _ = oracle(lambda prompt: answer)
    processor.tokenizer.add_tokens(["<1>", "<2>", "<3>", "<4>", "\u261e"])
    report = evaluate(model, processor, [row(0, answer=expected)], metric=["exact", "wer"])
    assert report.tasks["vqa"].accuracy == right
    assert (report.tasks["vqa"].scores["wer"] == 0) == right
    assert report.answers[0]["answer"] == answer.strip()  # what was said stays as it was said


def test_the_chosen_metric_is_the_score(oracle: Callable[..., Any]) -> None:
    model, processor, _ = oracle(lambda prompt: "red lamp")
    report = evaluate(model, processor, [row(0, answer="red light")], metric=["wer", "exact"])
    assert report.tasks["vqa"].scores == {"wer": 0.5, "exact": 0.0}
    assert report.tasks["vqa"].accuracy == 0.5
    with pytest.raises(ConfigError, match="--metric bleu is not a metric"):
        evaluate(model, processor, [row(0)], metric=["bleu"])


def test_the_guesser_knows_questions_and_answers_but_neither_sees_nor_hears() -> None:
    rows = [
        row(0, question="Which colour?", answer="red"),
        row(1, question="which colour", answer="Red."),
        row(2, question="Which colour?", answer="blue"),
        row(3, question="How many?", answer="two"),
        row(4, question="How many?", answer="three"),
    ]
    assert guess_score(rows) == (2 + 1) / 5
    assert guess_score(rows, "wer") == 2 / 5


# ---------------------------------------------------------------- swaps


def swapped_of(asked: Oracle, processor: Any, rows: Sequence[Sample]) -> dict[str, list[tuple[Encoded, Encoded]]]:
    """For each sense the pairs (what was asked with swapped media, the sample's own)."""
    own = {sample.id: processor.encode(sample, prompt_only=True) for sample in rows}
    found: dict[str, list[tuple[Encoded, Encoded]]] = {"image": [], "audio": []}

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))

    plain = 0
    for prompt in asked.asked:
        mine = own[prompt.id]
        seen = same(prompt.images + prompt.frames, mine.images + mine.frames)
        heard = same([c.features for c in prompt.sounds], [c.features for c in mine.sounds])
        if seen and heard:
            plain += 1
            continue
        assert seen != heard, "only one sense is swapped at a time"
        found["audio" if seen else "image"].append((prompt, mine))
    assert plain == len(rows), "nobody is asked twice with their own"
    return found


@pytest.mark.parametrize("seed", range(5))
def test_nobody_keeps_their_own_medium_and_the_rest_stays(seed: int, oracle: Callable[..., Any]) -> None:
    model, processor, asked = oracle(lambda prompt: "red")
    rows = [row(i, ("image", i % 6), ("audio", i), answer=COLOURS[i % 4]) for i in range(6)]
    rows += [row(6 + i, ("video", i), answer="blue") for i in range(3)]
    rows += [row(9 + i, ("audio", 9 + i), ("audio", 12 + i), task="hear") for i in range(3)]
    evaluate(model, processor, rows, seed=seed)
    found = swapped_of(asked, processor, rows)
    assert sorted(p.id for p, _ in found["image"]) == [str(i) for i in range(9)]
    assert sorted(int(p.id) for p, _ in found["audio"]) == list(range(12))
    for prompt, mine in found["image"]:
        assert [p.count("audio") for p in prompt.places] == [p.count("audio") for p in mine.places]


@pytest.mark.parametrize("seed", range(5))
def test_questions_about_one_picture_do_not_trade_it(seed: int, oracle: Callable[..., Any]) -> None:
    model, processor, asked = oracle(lambda prompt: "red")
    rows = [row(i, ("image", [0, 0, 0, 1, 1, 2, 3][i]), question=f"Question {i}?") for i in range(7)]
    evaluate(model, processor, rows, seed=seed)
    assert len(swapped_of(asked, processor, rows)["image"]) == 7


def test_where_nearly_all_share_a_picture_the_rest_is_left_out(oracle: Callable[..., Any]) -> None:
    model, processor, asked = oracle(lambda prompt: "red")
    rows = [row(i, ("image", int(i == 4)), question=f"Question {i}?") for i in range(5)]
    evaluate(model, processor, rows)
    pairs = swapped_of(asked, processor, rows)["image"]  # it fails where somebody was asked with their own
    assert 1 <= len(pairs) < 5 and "4" in {p.id for p, _ in pairs}


def test_one_of_its_kind_has_nothing_to_be_swapped_with(oracle: Callable[..., Any]) -> None:
    model, processor, asked = oracle(lambda prompt: "red")
    rows = [row(0, ("image", 0)), row(1, ("image", 1), ("image", 2)), row(2, ("image", 3), task="other")]
    report = evaluate(model, processor, rows)
    assert len(asked.asked) == 3
    assert all(not task.swapped for task in report.tasks.values())


def test_swaps_follow_from_the_seed(oracle: Callable[..., Any]) -> None:
    orders = []
    for seed in (1, 1, 2):
        model, processor, asked = oracle(lambda prompt: "red")
        rows = [row(i, ("image", i)) for i in range(6)]
        evaluate(model, processor, rows, seed=seed)
        orders.append([(p.id, shown(p)) for p in asked.asked])
    assert orders[0] == orders[1] != orders[2]


# ---------------------------------------------------------------- rows that cannot be used


def test_bad_rows_are_left_out_and_listed(oracle: Callable[..., Any]) -> None:
    model, processor, _ = oracle(lambda prompt: "red")
    silent = Sample("quiet", (Turn("user", (MediaItem("audio", decoded=Sound(np.zeros(800, np.float32), 16_000)),)),
                              Turn("assistant", (Text("red"),))), "vqa", "line 8")  # fmt: skip
    open_end = Sample("open", (Turn("user", (Text("Which colour?"),)),), "vqa", "line 9")
    marked = row(7, question="What is <image>?")
    report = evaluate(model, processor, [row(0), silent, open_end, marked, row(1)])
    assert report.tasks["vqa"].samples == 2
    assert [bad["id"] for bad in report.bad] == ["quiet", "open", "7"]
    assert [bad["where"] for bad in report.bad] == ["line 8", "line 9", "line 8"]
    assert "silent" in report.bad[0]["reason"]
    assert report.bad[1]["reason"] == "has no answer to compare with. Add an assistant turn at the end"
    assert "<image>" in report.bad[2]["reason"]


def test_no_usable_row_at_all_is_refused(oracle: Callable[..., Any]) -> None:
    model, processor, _ = oracle(lambda prompt: "red")
    with pytest.raises(DataError) as error:
        evaluate(model, processor, [])
    assert str(error.value) == "none of the rows can be used (there are no rows). Correct the data file"
    with pytest.raises(DataError, match=r"none of the rows can be used \(has no answer"):
        evaluate(model, processor, [Sample("open", (Turn("user", (Text("Which?"),)),), "vqa", "line 1")])


# ---------------------------------------------------------------- end to end


def test_a_whole_evaluation_of_a_tiny_model(make_model: Callable[..., Any]) -> None:
    model, processor = make_model()
    rows = [row(i, ("image", i), ("audio", i), task="match", answer=["yes", "no"][i % 2]) for i in range(4)]
    rows += [row(4 + i, task="text", answer="red") for i in range(3)]
    progress: list[tuple[int, int]] = []
    report = evaluate(
        model, processor, rows, batch=3, max_tokens=4, progress=lambda done, of: progress.append((done, of))
    )
    assert {name: task.samples for name, task in report.tasks.items()} == {"match": 4, "text": 3}
    assert set(report.tasks["match"].swapped) == {"image", "audio"}
    assert progress[-1] == (15, 15) and [p[0] for p in progress] == [3, 6, 9, 12, 15]
    for sample, answer in zip(rows, report.answers, strict=True):
        prompt = processor.encode(sample, prompt_only=True)
        (ids,) = generate(model, processor, [prompt], Sampling(max_tokens=4))
        assert answer["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert json.loads(json.dumps(report.as_dict()))["tasks"]["match"]["samples"] == 4
