"""What a run tells while it goes: a line a step, a bar with the time left, answers to fixed prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avlm.data.loader import Bad
from avlm.data.processor import AvlmProcessor
from avlm.errors import DataError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Sample


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of ``metrics.jsonl``. ``seconds`` is the whole step's; ``step`` counts over all stages."""

    step: int
    stage: str
    stage_step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    target_tokens: int
    samples: int
    rows: int
    seconds: float
    data_seconds: float
    """Of which the loop waited for data."""
    tokens_per_s: float


class Journal:
    """The files of a run that grow line by line, cut back to a checkpoint when a run resumes from it."""

    def __init__(self, out: Path) -> None:
        self.metrics = out / "metrics.jsonl"
        self.samples = out / "samples.jsonl"
        self.quarantine = out / "quarantine.jsonl"
        for path in (self.metrics, self.samples, self.quarantine):
            path.touch()

    def step(self, metrics: StepMetrics) -> None:
        _append(self.metrics, [asdict(metrics)])

    def answers(self, answers: Sequence[dict[str, Any]]) -> None:
        _append(self.samples, answers)

    def bad(self, stage: str, step: int, bad: Sequence[Bad]) -> None:
        _append(self.quarantine, [{"step": step, "stage": stage, **asdict(b)} for b in bad])

    def unreadable(self, stage: str, step: int, errors: Sequence[DataError]) -> None:
        """Rows that are no rows at all."""
        self.bad(stage, step, [Bad(e.sample_id, e.where, e.reason) for e in errors])

    def cut_back(self, step: int, stage: str, stage_step: int) -> None:
        """Forget what came after a checkpoint: it will come again."""

        for path in (self.metrics, self.samples, self.quarantine):
            again = stage if stage_step == 0 and path == self.samples else None  # its prompts are answered anew
            rows = [row for row in read_lines(path) if row["step"] <= step and row["stage"] != again]
            aside = path.with_suffix(".writing")
            aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            aside.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSON-lines file; a last one that was cut off is left out."""
    found = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        with path.open("a") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Bar:
    """The progress bar of one stage; one plain line now and then where there is no terminal."""

    def __init__(self, name: str, total: int, done: int, console: Console) -> None:
        self.name, self.total, self.console = name, total, console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(name, total=total, completed=done, facts="")

    def step(self, metrics: StepMetrics) -> None:
        facts = f"loss {metrics.loss:.3f}  {metrics.tokens_per_s:,.0f} tokens/s"
        self.progress.update(self.task, completed=metrics.stage_step, facts=facts)
        every = max(1, self.total // 5)
        if not self.console.is_terminal and (metrics.stage_step % every == 0 or metrics.stage_step == self.total):
            self.console.print(f"{self.name}: step {metrics.stage_step}/{self.total}  {facts}", highlight=False)


@contextmanager
def bar(name: str, total: int, done: int, console: Console) -> Iterator[Bar]:
    """A bar that is taken down again whatever happens."""
    shown = Bar(name, total, done, console)
    with shown.progress:
        yield shown


def make_console() -> Console:
    """Where a run tells what it does: standard error, so that standard output stays for answers."""
    return Console(file=sys.stderr)


@torch.no_grad()
def answer_prompts(
    model: AvlmForConditionalGeneration, processor: AvlmProcessor, prompts: Sequence[Sample], max_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to fixed prompts, for ``samples.jsonl``. The model's modes are left as they were."""
    modes = {name: m.training for name, m in model.named_modules()}
    model.eval()
    found = []
    for start in range(0, len(prompts), 32):
        batch = prompts[start : start + 32]
        inputs = processor.collate([processor.encode(s, prompt_only=True) for s in batch])
        inputs.pop("labels")
        ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=_pad_id(processor))
        texts = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [_answer(s, text.strip()) for s, text in zip(batch, texts, strict=True)]
    for name, module in model.named_modules():
        module.training = modes[name]
    return found


def _pad_id(processor: AvlmProcessor) -> int:
    pad = processor.tokenizer.pad_token_id
    return int(processor.tokenizer.eos_token_id if pad is None else pad)


def _answer(sample: Sample, text: str) -> dict[str, Any]:
    asked = [t for t in sample.turns if t.role == "user"]
    expected = [t for t in sample.turns if t.role == "assistant"]
    return {
        "id": sample.id,
        "task": sample.task,
        "prompt": asked[-1].text() if asked else "",
        "media": [{"type": item.kind, "path": str(item.path)} for item in sample.media()],
        "expected": expected[-1].text() if expected else "",
        "answer": text,
    }


@contextmanager
def counted(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (done, all)."""
    with world_progress(console) as progress:
        yield lambda done, total: progress(name, done, total)


@contextmanager
def world_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Bars for work of several kinds that reports (kind, done, all); silent where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        tasks: dict[str, Any] = {}

        def update(kind: str, done: int, total: int) -> None:
            if kind not in tasks:
                tasks[kind] = shown.add_task(kind, total=total)
            shown.update(tasks[kind], completed=done, total=total)

        yield update
