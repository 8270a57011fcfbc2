"""What a run tells while it goes: a line a step, a bar with the time left, answers to fixed prompts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avlm.data.loader import Bad
from avlm.data.processor import AvlmProcessor
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Sample
from avlm.training.console import tell


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
    balance: float | None = None
    """How unevenly a mixture's experts are used, in a stage that balances them; in no line of another."""
    cut_tokens: int | None = None
    """Tokens that were cut off samples longer than a row, where a run cuts them; in no line of another."""
    state_loss: float | None = None
    """The state head's, where the stage trains one; ``loss`` is that of the tokens alone."""
    preferred: float | None = None
    """Share of the pairs whose better answer has gained more than the worse, where a stage compares answers."""
    margin: float | None = None
    """How much more it has gained, on the average of all pairs, times beta."""
    skipped: bool | None = None
    """Whether the update was left out because the loss or the gradient was no number; in no line of another step."""
    samples_per_s: float | None = None
    target_tokens_per_s: float | None = None
    tflops_per_s: float | None = None
    """Floating-point operations of the model, in 10^12 a second."""
    mfu: float | None = None
    """The same as a share of what the device's matrix products can do."""
    padding: float | None = None
    """Share of the places in the language model's rows that hold no token; 0 where rows are packed."""
    memory_mb: dict[str, float] | None = None
    """By what it holds, and the most that the process has taken; in some lines only, as the next two."""
    grad_norms: dict[str, float] | None = None
    """Of each part, before clipping."""
    update_ratios: dict[str, float] | None = None
    """Norm of each part's update over that of its weights."""

    @classmethod
    def read(cls, row: dict[str, Any]) -> StepMetrics:
        """A line as it was written; JSON has no word for a loss that is no number."""
        lost: dict[str, Any] = {name: math.nan for name in ("loss", "grad_norm") if row[name] is None}
        return cls(**{**row, **lost})


TIMES = ("seconds", "data_seconds", "tokens_per_s", "samples_per_s", "target_tokens_per_s", "tflops_per_s", "mfu")
MEASURED = frozenset((*TIMES, "memory_mb"))
"""Entries of a line that differ between two runs of the same bits."""


class Journal:
    """The files of a run that grow line by line, cut back to a checkpoint when a run resumes from it.

    A line that cannot be written (a full disk, say) waits for the next time, so a run outlives the trouble.

    Args:
        out: The run's directory.
        writes: Whether this process is the one that writes; of several, one is.
    """

    def __init__(self, out: Path, *, writes: bool = True) -> None:
        self.writes = writes
        self.metrics = out / "metrics.jsonl"
        self.samples = out / "samples.jsonl"
        self.quarantine = out / "quarantine.jsonl"
        self.evals = out / "evals.jsonl"
        """Only of a run that is measured as it goes."""
        self.troubles = out / "watch.jsonl"
        """What the watch found; a run without trouble has none."""
        always = (self.metrics, self.samples, self.quarantine)
        self._waiting: dict[Path, list[bytes]] = {path: [] for path in (*always, self.evals, self.troubles)}
        for path in always if writes else ():
            path.touch()
        self._listed = self._listed_bad()

    def step(self, metrics: StepMetrics) -> None:
        row = {name: _number_or_none(value) for name, value in asdict(metrics).items() if value is not None}
        self._append(self.metrics, [row])

    def trouble(self, rows: Sequence[dict[str, Any]]) -> None:
        self._append(self.troubles, rows)

    def answers(self, answers: Sequence[dict[str, Any]]) -> None:
        self._append(self.samples, answers)

    def measurement(self, line: dict[str, Any]) -> None:
        """What was measured on held-out rows."""
        self._append(self.evals, [line])

    def measured(self) -> list[dict[str, Any]]:
        """Every measurement so far."""
        return [row for row in read_lines(self.evals) if isinstance(row.get("stage"), str)]

    def bad(self, stage: str, step: int, bad: Sequence[Bad]) -> int:
        """List samples that were left out or cut, each once for each reason, however often the data comes round.

        Returns:
            How many were not listed before.
        """
        fresh = []
        for entry in bad:
            key = (entry.sample_id, entry.where, entry.reason)
            if key not in self._listed:
                self._listed.add(key)
                row = {"step": step, "stage": stage, **asdict(entry)}
                fresh.append(row if entry.cut else {name: row[name] for name in row if name != "cut"})
        self._append(self.quarantine, fresh)
        return len(fresh)

    def take_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Lines of a part that was built by itself."""
        self._append(self.metrics, rows)

    def take_evals(self, rows: Sequence[dict[str, Any]]) -> None:
        """Measurements of a part that was built by itself."""
        self._append(self.evals, rows)

    def take_bad(self, rows: Sequence[dict[str, Any]]) -> None:
        """Samples that a part which was built by itself left out or cut."""
        for row in rows:
            names = [field.name for field in fields(Bad)]
            bad = Bad(**{name: row[name] for name in names if name in row})
            self.bad(row["stage"], row["step"], [bad])

    def cut_back(self, step: int, stage: str, stage_step: int) -> None:
        """Forget what came after a checkpoint: it will come again."""
        if not self.writes:
            return
        for path in filter(Path.exists, self._waiting):
            # What a stage answers, and is measured on, before its first step and after its last comes anew.
            anew = ("before", "after") if stage_step == 0 else ("after",)
            rows = [row for row in read_lines(path) if _number(row.get("step")) <= step]
            kept = [row for row in rows if row.get("stage") != stage or row.get("when") not in anew]
            aside = path.with_suffix(".writing")
            with aside.open("wb") as file:
                file.write(b"".join(map(_line, kept)))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        self._listed = self._listed_bad()

    def sync(self) -> None:
        """Make sure that every line so far is on the disk.

        Raises:
            OSError: It is full or read-only.
        """
        for path, lines in self._waiting.items() if self.writes else ():
            if lines or path.exists():
                _write_end(path, lines, sync=True)

    def flush(self) -> list[Path]:
        """Hand every line so far to the system; returns the files, for whoever makes sure that they are on the disk.

        Raises:
            OSError: It is full or read-only.
        """
        for path, lines in self._waiting.items():
            if lines or path.exists():
                _write_end(path, lines)
        return [path for path in self._waiting if path.exists()]

    def _append(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        if not self.writes:
            return
        lines = self._waiting[path]
        lines += map(_line, rows)
        with suppress(OSError):
            _write_end(path, lines)

    def _listed_bad(self) -> set[tuple[object, object, object]]:
        return {(row.get("sample_id"), row.get("where"), row.get("reason")) for row in read_lines(self.quarantine)}


def _number_or_none(value: Any) -> Any:
    """JSON has no word for what is no number, or infinite."""
    if isinstance(value, dict):
        return {name: _number_or_none(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: object) -> float:
    return value if isinstance(value, (int, float)) else math.inf


def _line(row: dict[str, Any]) -> bytes:
    """A row as one line; half a character, from data or from a file's name, becomes JSON's escape for it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _write_end(path: Path, lines: list[bytes], *, sync: bool = False) -> None:
    """Append all lines and empty the list, or leave file and list as they were.

    Raises:
        OSError: They could not be written.
    """
    if not lines and not sync:
        return
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        left = memoryview(b"".join(lines))
        try:
            while left:
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise
    lines.clear()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSON-lines file; one that was cut off is left out."""
    found = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found.append(row)
    return found


def steps_progress(console: Console) -> Progress:
    """Where bars of steps are drawn, one below the other; nowhere without a terminal."""
    return Progress(
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


class Bar:
    """The progress bar of one stage; one plain line now and then where there is no terminal."""

    def __init__(self, name: str, total: int, done: int, console: Console, progress: Progress | None = None) -> None:
        self.name, self.total, self.console = name, total, console
        self.progress = progress or steps_progress(console)
        self.task = self.progress.add_task(name, total=total, completed=done, facts="")

    def step(self, metrics: StepMetrics) -> None:
        facts = f"loss {metrics.loss:.3f}  {metrics.tokens_per_s:,.0f} tokens/s"
        if metrics.samples_per_s is not None and metrics.target_tokens_per_s is not None:
            facts += f"  {metrics.target_tokens_per_s:,.0f} targets/s  {metrics.samples_per_s:,.1f} samples/s"
        if metrics.mfu is not None:
            facts += f"  MFU {100 * metrics.mfu:.0f} %"
        self.progress.update(self.task, completed=metrics.stage_step, facts=facts)
        every = max(1, self.total // 5)
        if not self.console.is_terminal and (metrics.stage_step % every == 0 or metrics.stage_step == self.total):
            tell(self.console, f"{self.name}: step {metrics.stage_step}/{self.total}  {facts}")


@contextmanager
def bar(name: str, total: int, done: int, console: Console) -> Iterator[Bar]:
    """A bar that is taken down again whatever happens."""
    shown = Bar(name, total, done, console)
    with shown.progress:
        yield shown


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
        inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
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
        "media": [{"type": item.kind, "path": str(item.path or item.name())} for item in sample.media()],
        "expected": expected[-1].text() if expected else "",
        "answer": text,
    }
