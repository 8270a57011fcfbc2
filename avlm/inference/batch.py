"""Answers to all rows of a file, written as they come and in the order of the rows.

What is written is a line for each row, so the lines that are there already say where to go on; a row that cannot be
answered gets a line that says why, and costs nobody else anything. Media are decoded ahead in threads, while the model
answers.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from avlm.config.data import DataConfig
from avlm.data.forms.folders import folders_of
from avlm.data.readers.jsonlines import MARK, loaded
from avlm.data.readers.taking import Parser
from avlm.errors import AvlmError, ConfigError, DataError
from avlm.inference.engine import Engine, Request
from avlm.inference.prompts import Prompt
from avlm.inference.sampling import Sampling
from avlm.samples import Sample

AHEAD = 2
"""Rows that are prepared ahead, for each answer that there can be at once."""
THREADS = 2

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Answered:
    """How it went."""

    rows: int
    there: int
    """Rows whose answers were there already."""
    bad: int
    """Rows of this time that could not be answered."""


class Rows:
    """The rows of a file of JSON lines, in order; empty lines are none.

    Args:
        path: The file.
        data: Where media may lie.

    Raises:
        ConfigError: It cannot be read, or has no rows.
    """

    def __init__(self, path: Path, data: DataConfig) -> None:
        self.path = path
        self._parser = Parser(folders_of(path, data))
        try:
            with path.open("rb") as file:
                self.count = sum(bool(line.removeprefix(MARK).strip()) for line in file)
        except OSError as error:
            raise ConfigError(f"{path}: not readable ({error.strerror}). Give a file of JSON lines") from None
        if not self.count:
            raise ConfigError(f"{path}: is empty, so there is nothing to answer. Give a file with rows")

    def __iter__(self) -> Iterator[tuple[str, Sample | DataError]]:
        """Each row's id and its question, or what is wrong with it."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(MARK).strip():
                    yield self._row(line.removeprefix(MARK), f"{self.path.name} line {number}")

    def _row(self, line: bytes, where: str) -> tuple[str, Sample | DataError]:
        try:
            row = loaded(line, where, "Write one object on a line")
        except DataError as error:
            return where, error
        told = row.get("id") if isinstance(row, dict) else None
        name = str(told) if isinstance(told, (str, int)) else where
        try:
            return name, self._parser.parse(row, where)[0]
        except DataError as error:
            return name, error


def answer_rows(
    engine: Engine, rows: Rows, out: Path, sampling: Sampling, progress: Progress = lambda done, total: None
) -> Answered:
    """Answer every row that has no answer yet.

    Args:
        out: Gets a line for each row: `id`, and `answer`, `finish`, `prompt_tokens`, `answer_tokens`; or `error`.
        progress: Called with rows done and in all.

    Raises:
        ConfigError: What is written there already are no answers to these rows, or it cannot be written.
    """
    there = _there(rows, out)
    waiting = iter(rows)
    for _ in range(there):
        next(waiting)
    done, bad = there, 0
    try:
        with out.open("a", encoding="utf-8", errors="backslashreplace") as file, ThreadPoolExecutor(THREADS) as threads:
            for line in _answers(engine, waiting, sampling, threads):
                _write(file, line)
                done, bad = done + 1, bad + ("error" in line)
                progress(done, rows.count)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror or error}). Choose another place") from None
    return Answered(rows.count, there, bad)


def _there(rows: Rows, out: Path) -> int:
    """How many rows have been answered; half a line, of a program that was stopped, is cut off.

    Raises:
        ConfigError: The lines are no answers to these rows.
    """
    if not out.exists():
        return 0
    written = out.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, (line, (name, _)) in enumerate(zip(lines, rows, strict=False), 1):
        try:
            found = json.loads(line).get("id")
        except (ValueError, AttributeError):
            found = None
        if found != name:
            raise ConfigError(
                f"{out} line {number} has the answer to {found!r}, and that row of {rows.path} is {name!r}, so there "
                "is nothing to go on with. Choose another name for --out, or remove the file"
            )
    if len(lines) > rows.count:
        raise ConfigError(
            f"{out} has {len(lines)} answers, and {rows.path} has {rows.count} rows, so they are answers to others. "
            "Choose another name for --out, or remove the file"
        )
    if len(whole) < len(written):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def _answers(
    engine: Engine, rows: Iterator[tuple[str, Sample | DataError]], sampling: Sampling, threads: ThreadPoolExecutor
) -> Iterator[dict[str, Any]]:
    """A line for each row, in order."""
    coming: deque[tuple[str, Future[Prompt] | AvlmError]] = deque()
    asked: deque[tuple[str, Request | AvlmError]] = deque()
    more = True
    while more or coming or asked:
        while more and len(coming) < AHEAD * engine.slots:
            row = next(rows, None)
            more = row is not None
            if row is not None:
                name, sample = row
                ready: Future[Prompt] | AvlmError
                ready = sample if isinstance(sample, DataError) else threads.submit(engine.prepare, sample)
                coming.append((name, ready))
        while coming and engine.free and (not engine.busy or _is_done(coming[0][1])):
            name, ready = coming.popleft()
            asked.append((name, _joined(engine, ready, sampling)))
        try:
            engine.step()
        except AvlmError as error:  # nothing of one row, those are refused when they join
            asked = deque((name, _lost(one, error)) for name, one in asked)
        while asked and (isinstance(asked[0][1], AvlmError) or asked[0][1].finish is not None):
            yield _line(*asked.popleft())


def _is_done(ready: Future[Prompt] | AvlmError) -> bool:
    return isinstance(ready, AvlmError) or ready.done()


def _joined(engine: Engine, ready: Future[Prompt] | AvlmError, sampling: Sampling) -> Request | AvlmError:
    if isinstance(ready, AvlmError):
        return ready
    try:
        return engine.join(ready.result(), sampling)
    except AvlmError as error:
        return error


def _lost(one: Request | AvlmError, error: AvlmError) -> Request | AvlmError:
    return error if isinstance(one, Request) and one.finish == "left" else one


def _line(name: str, found: Request | AvlmError) -> dict[str, Any]:
    if isinstance(found, AvlmError):
        return {"id": name, "error": str(found)}
    answer = "".join(piece.text for piece in found.pieces).strip()
    counts = {"prompt_tokens": found.prompt_tokens, "answer_tokens": found.answer_tokens}
    return {"id": name, "answer": answer, "finish": found.finish, **counts}


def _write(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()
