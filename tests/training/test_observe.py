"""What a run tells: lines that are never lost, never twice, and survive a full disk."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from avlm.config.run import RunConfig
from avlm.convert.compose import Composed
from avlm.data.loader import Bad
from avlm.data.sources import JsonLines
from avlm.training.console import tell
from avlm.training.observe import Journal, StepMetrics, answer_prompts, bar, read_lines


def metrics(step: int, stage: str = "s", stage_step: int | None = None) -> StepMetrics:
    return StepMetrics(
        step, stage, stage_step or step, loss=1.5, lr=0.1, grad_norm=2.0, tokens=9, target_tokens=3,
        samples=2, rows=1, seconds=0.5, data_seconds=0.1, tokens_per_s=18.0,
    )  # fmt: skip


def steps(path: Path) -> list[Any]:
    return [row["step"] for row in read_lines(path)]


def test_a_line_a_step_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.step(metrics(step))
        assert steps(journal.metrics) == list(range(1, step + 1))
    line = json.loads(journal.metrics.read_text().splitlines()[1])
    assert line == {name: value for name, value in asdict(metrics(2)).items() if value is not None}
    journal.step(replace(metrics(3), state_loss=2.5, balance=1.5))
    later = json.loads(journal.metrics.read_text().splitlines()[2])
    assert "state_loss" not in line and later["state_loss"] == 2.5
    assert "balance" not in line and later["balance"] == 1.5


def test_cutting_back_forgets_what_will_come_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(1, 7):
        journal.step(metrics(step, "a" if step <= 3 else "b"))
    for stage, step, when in (("a", 3, "after"), ("b", 3, "before"), ("b", 5, "during")):
        journal.answers([{"step": step, "stage": stage, "when": when}])
    journal.bad("a", 2, [Bad("x", "f line 1", "broken")])
    journal.bad("b", 6, [Bad("y", "f line 2", "broken")])

    journal.cut_back(5, "b", 2)
    assert steps(journal.metrics) == [1, 2, 3, 4, 5]
    assert [r["when"] for r in read_lines(journal.samples)] == ["after", "before", "during"]
    assert [r["sample_id"] for r in read_lines(journal.quarantine)] == ["x"]
    journal.bad("b", 6, [Bad("y", "f line 2", "broken")])  # it comes again, and is listed again
    assert [r["sample_id"] for r in read_lines(journal.quarantine)] == ["x", "y"]

    journal.cut_back(3, "b", 0)
    assert steps(journal.metrics) == [1, 2, 3]
    assert [(r["stage"], r["when"]) for r in read_lines(journal.samples)] == [("a", "after")]


def test_lines_cut_off_in_the_middle_of_a_letter_go_away(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.answers([{"step": 1, "stage": "s", "answer": "déjà vu"}])
    whole = journal.samples.read_bytes()
    journal.samples.write_bytes(whole + b'{"step": 2, "stage": "s", "answer": "d' + "é".encode()[:1])
    assert steps(journal.samples) == [1]
    journal.cut_back(9, "s", 1)
    assert journal.samples.read_bytes() == whole


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0b\x1cb\rc", "half \ud83d", "null \x00", 'quo"te\n'])
def test_any_text_stays_one_line(tmp_path: Path, text: str) -> None:
    journal = Journal(tmp_path)
    journal.answers([{"step": 1, "stage": "s", "answer": text}])
    journal.cut_back(1, "s", 1)
    assert read_lines(journal.samples) == [{"step": 1, "stage": "s", "answer": text}]
    assert journal.samples.read_bytes().count(b"\n") == 1


def test_strange_lines_do_no_harm(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics.write_text(
        '7\n[]\nnull\n{"stage": "s"}\n{"step": "one", "stage": "s"}\n\n{"step": 1, "stage": "s"}\n'
    )
    journal.cut_back(5, "s", 5)
    assert read_lines(journal.metrics) == [{"step": 1, "stage": "s"}]


def test_each_bad_sample_once_for_each_reason(tmp_path: Path) -> None:
    a, b = Bad("1", "f line 1", "broken"), Bad("1", "f line 1", "too long")
    assert Journal(tmp_path).bad("s", 1, [a, a, b]) == 2
    assert Journal(tmp_path).bad("t", 2, [a, b]) == 0  # another stage, another process
    assert len(read_lines(tmp_path / "quarantine.jsonl")) == 2


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.step(metrics(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: AlmostFull(path))
        journal.step(metrics(2))
        journal.step(metrics(3))
        with pytest.raises(OSError, match="No space left"):
            journal.sync()
    assert steps(journal.metrics) == [1]
    assert journal.metrics.read_bytes().endswith(b"}\n")  # nothing half written stays
    journal.step(metrics(4))
    journal.sync()
    assert steps(journal.metrics) == [1, 2, 3, 4]


class AlmostFull(io.RawIOBase):
    """A file on a disk that takes ten more bytes."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.room = 10

    def fileno(self) -> int:
        return self.handle

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = os.write(self.handle, bytes(data[: self.room]))
        self.room -= written
        return written

    def close(self) -> None:
        if not self.closed:
            os.close(self.handle)
        super().close()


# ---------------------------------------------------------------- answers, the bar, sentences


def test_answers_equal_generating_one_by_one_and_leave_the_modes_alone(small_model: Composed, tmp_path: Path) -> None:
    model, processor = small_model
    source = JsonLines(tmp_path / "rows.jsonl")
    samples = [source[i] for i in range(4)]
    model.train()
    model.model.vision_tower.eval()
    modes = [m.training for m in model.modules()]
    answers = answer_prompts(model, processor, samples, max_tokens=5)
    assert [m.training for m in model.modules()] == modes
    model.eval()
    for sample, answer in zip(samples, answers, strict=True):
        batch = processor.collate([processor.encode(sample, prompt_only=True)])
        batch.pop("labels")
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=5, do_sample=False)
        text = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["answer"] == text.strip()
        assert answer["expected"] == sample.turns[-1].text() and answer["prompt"] == sample.turns[0].text()
        assert [m["type"] for m in answer["media"]] == [item.kind for item in sample.media()]


def test_without_a_terminal_the_bar_is_a_few_lines() -> None:
    out = io.StringIO()
    with bar("align", 100, 0, Console(file=out, width=80)) as shown:
        for step in range(1, 101):
            shown.step(metrics(step))
    assert out.getvalue().splitlines() == [
        f"align: step {step}/100  loss 1.500  18 tokens/s" for step in (20, 40, 60, 80, 100)
    ]


def test_a_sentence_is_printed_as_it_is() -> None:
    out = io.StringIO()
    sentence = "rows of [/bold] a[b].jsonl " + "long " * 40 + "end"
    tell(Console(file=out, width=40), sentence)
    assert out.getvalue() == sentence + "\n"


@pytest.mark.slow
def test_time_that_answering_and_saving_take_is_not_the_datas(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from avlm.training import trainer
    from avlm.training.chain import Run

    def slow(*_: Any) -> list[dict[str, Any]]:
        time.sleep(2.0)
        return []

    monkeypatch.setattr(trainer, "answer_prompts", slow)
    config = small_run("run", ["samples.prompts=1", "samples.times=2", "stages.vision.steps=6"])
    Run(config, console=Console(file=io.StringIO())).train("vision")
    rows = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "vision"]
    assert max(row["seconds"] for row in rows) < 2.0
