"""Score a model on rows, by task, and check that it looks and listens.

The score alone does not tell whether a model used its eyes and ears. So each task is
asked again with the pictures, and with the sounds, of another sample: a model that
looks and listens then does no better than guessing.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from avlm.data.media.pictures import PreparedImage
from avlm.data.media.reader import Prepared, PreparedAudio, PreparedVideo
from avlm.data.processor import AvlmProcessor
from avlm.data.text.turns import without_state_token
from avlm.errors import DataError
from avlm.eval.metrics import METRICS, metrics_for, normalise
from avlm.inference.generate import generate
from avlm.inference.sampling import Sampling
from avlm.layout import VideoFacts
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded, Sample

Sense = Literal["image", "audio"]
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class TaskReport:
    """What one task came to."""

    samples: int
    accuracy: float
    """Share of exact answers (the first chosen metric, if one was chosen)."""
    guess: float
    """The same for a guesser who gives each question's most frequent answer and sees and hears nothing."""
    scores: dict[str, float] = field(default_factory=dict)
    swapped: dict[str, float] = field(default_factory=dict)
    """Accuracy with the pictures (frames), or the sounds, of other samples of the task."""


@dataclass(slots=True)
class Report:
    """All tasks, the answers, and the rows that were left out."""

    tasks: dict[str, TaskReport]
    answers: list[dict[str, Any]]
    bad: list[dict[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "answers": self.answers,
            "bad": self.bad,
        }


def evaluate(
    model: AvlmForConditionalGeneration,
    processor: AvlmProcessor,
    samples: Sequence[Sample],
    *,
    metric: Sequence[str] = (),
    batch: int = 32,
    max_tokens: int = 64,
    swap: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Score a model.

    Args:
        samples: Rows whose last turn is the right answer.
        metric: Names from `METRICS`; default by task.
        swap: Also ask with swapped pictures and sounds.
        seed: Of the swaps.
        progress: Called with answers done and in all.

    Returns:
        The report. Rows that cannot be read are listed in it and left out.

    Raises:
        DataError: Not one row can be read.
    """
    ready, bad = _prepare(processor, samples)
    if not ready:
        first = bad[0]["reason"] if bad else "there are no rows"
        raise DataError(f"none of the rows can be used ({first}). Correct the data file")
    rng = np.random.default_rng(seed)
    jobs = _jobs(ready, rng if swap else None)
    answers = _ask(model, processor, jobs, batch, max_tokens, progress)
    return _summarise(ready, jobs, answers, bad, metric)


@dataclass(slots=True)
class _Job:
    """One question to ask: a sample with its own media, or with another's."""

    sample: Sample
    prepared: list[Prepared]
    swapped: Sense | None = None


def _prepare(
    processor: AvlmProcessor, samples: Sequence[Sample]
) -> tuple[list[tuple[Sample, list[Prepared]]], list[dict[str, str]]]:
    ready, bad = [], []
    for sample in samples:
        try:
            if not sample.turns or sample.turns[-1].role != "assistant":
                raise DataError(
                    "has no answer to compare with. Add an assistant turn at the end",
                    where=sample.where,
                    sample_id=sample.id,
                )
            prepared = processor.prepare(sample)
            processor.encode(sample, prompt_only=True, prepared=prepared)
            ready.append((sample, prepared))
        except DataError as error:
            bad.append(
                {"id": error.sample_id or sample.id, "where": error.where or sample.where, "reason": error.reason}
            )
    return ready, bad


def _jobs(ready: Sequence[tuple[Sample, list[Prepared]]], rng: np.random.Generator | None) -> list[_Job]:
    jobs = [_Job(sample, prepared) for sample, prepared in ready]
    if rng is None:
        return jobs
    by_task: dict[str, list[int]] = defaultdict(list)
    for i, (sample, _) in enumerate(ready):
        by_task[sample.task].append(i)
    for members in by_task.values():
        senses: tuple[Sense, ...] = ("image", "audio")
        for sense in senses:
            able = [i for i in members if _has(ready[i][1], sense)]
            shapes: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for i in able:
                shapes[tuple(type(p).__name__ for p in ready[i][1])].append(i)
            for group in shapes.values():
                jobs += _swapped(ready, group, sense, rng)
    return jobs


def _has(prepared: Sequence[Prepared], sense: Sense) -> bool:
    if sense == "image":
        return any(isinstance(p, PreparedImage) or (isinstance(p, PreparedVideo) and p.frames) for p in prepared)
    return any(isinstance(p, PreparedAudio) or (isinstance(p, PreparedVideo) and p.sound) for p in prepared)


def _swapped(
    ready: Sequence[tuple[Sample, list[Prepared]]], group: Sequence[int], sense: Sense, rng: np.random.Generator
) -> list[_Job]:
    """Every sample of a group with the pictures, or sounds, of another, drawn at random; nobody keeps their own.

    Samples of the same medium (several questions about one picture) stand beside each other on a circle, and each
    takes from so far ahead that none of its like is reached. Where more than half share one medium, some of them find
    no other and are not asked again.
    """
    order = [group[i] for i in rng.permutation(len(group))]
    names = {i: _digest(ready[i][1], sense) for i in order}
    seats = {name: seat for seat, name in reversed(list(enumerate(names.values())))}
    order.sort(key=lambda i: seats[names[i]])
    ahead = max(Counter(names.values()).values())
    jobs = []
    for at, i in enumerate(order):
        donor = order[(at + ahead) % len(order)]
        if names[donor] == names[i]:
            continue
        sample, own = ready[i]
        jobs.append(_Job(sample, [_swap(a, b, sense) for a, b in zip(own, ready[donor][1], strict=True)], sense))
    return jobs


def _digest(prepared: Sequence[Prepared], sense: Sense) -> bytes:
    """What a sample shows, or lets hear."""
    content = hashlib.sha256()
    for item in prepared:
        tensors: tuple[Tensor | None, ...]
        if sense == "image":
            tensors = item.frames if isinstance(item, PreparedVideo) else (getattr(item, "pixels", None),)
        else:
            tensors = tuple(chunk.features for chunk in getattr(item, "sound", ()))
        for tensor in tensors:
            if tensor is not None:
                content.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return content.digest()


def _swap(own: Prepared, other: Prepared, sense: Sense) -> Prepared:
    if isinstance(own, PreparedVideo) and isinstance(other, PreparedVideo):
        frames, sound = (other, own) if sense == "image" else (own, other)
        facts = VideoFacts(frames.facts.duration_s, sound.facts.num_samples)
        return PreparedVideo(frames.frames, sound.sound, facts)
    if isinstance(own, PreparedImage):
        return other if sense == "image" else own
    return other if sense == "audio" else own


def _ask(
    model: AvlmForConditionalGeneration,
    processor: AvlmProcessor,
    jobs: Sequence[_Job],
    batch: int,
    max_tokens: int,
    progress: Progress | None,
) -> list[str]:
    """Greedy answers, prompts of similar length together."""

    def encoded(i: int) -> Encoded:  # twice for each job: what encoders take is too large to keep for all
        return processor.encode(jobs[i].sample, prompt_only=True, prepared=jobs[i].prepared)

    lengths = [len(encoded(i)) for i in range(len(jobs))]
    order = sorted(range(len(jobs)), key=lambda i: lengths[i])
    answers = [""] * len(jobs)
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        found = generate(model, processor, [encoded(i) for i in members], Sampling(max_tokens=max_tokens))
        for i, ids in zip(members, found, strict=True):
            answers[i] = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if progress is not None:
            progress(min(start + batch, len(order)), len(order))
    return answers


def _summarise(
    ready: Sequence[tuple[Sample, list[Prepared]]],
    jobs: Sequence[_Job],
    answers: Sequence[str],
    bad: list[dict[str, str]],
    metric: Sequence[str],
) -> Report:
    tasks: dict[str, TaskReport] = {}
    pairs = list(zip(jobs, answers, strict=True))
    for task in sorted({sample.task for sample, _ in ready}):
        mine = [(j, a) for j, a in pairs if j.sample.task == task]
        names = metrics_for(task, metric)

        def score(sense: Sense | None, name: str, mine: list[tuple[_Job, str]] = mine) -> float | None:
            expected = [(a, _expected(j.sample)) for j, a in mine if j.swapped == sense]
            chosen = [(without_state_token(a, e), e) for a, e in expected]
            return METRICS[name]([a for a, _ in chosen], [e for _, e in chosen]) if chosen else None

        own = [j.sample for j, _ in mine if j.swapped is None]
        scores = {name: score(None, name) or 0.0 for name in names}
        swaps = {sense: score(sense, names[0]) for sense in ("image", "audio")}  # type: ignore[arg-type]
        tasks[task] = TaskReport(
            samples=len(own),
            accuracy=scores[names[0]],
            guess=guess_score(own, names[0]),
            scores=scores,
            swapped={sense: value for sense, value in swaps.items() if value is not None},
        )
    rows = [
        {"id": j.sample.id, "task": j.sample.task, "expected": _expected(j.sample), "answer": a}
        for j, a in pairs
        if j.swapped is None
    ]
    return Report(tasks, rows, bad)


def guess_score(samples: Sequence[Sample], metric: str = "exact") -> float:
    """The score of giving each question's most frequent answer, known from these very samples: the best that a
    guesser who reads the question's text and neither sees nor hears can do."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        counts[_question(sample)][normalise(_expected(sample))] += 1
    guesses = [counts[_question(s)].most_common(1)[0][0] for s in samples]
    return METRICS[metric](guesses, [_expected(s) for s in samples])


def _expected(sample: Sample) -> str:
    return sample.turns[-1].text()


def _question(sample: Sample) -> str:
    return normalise(" ".join(turn.text() for turn in sample.turns[:-1]))
