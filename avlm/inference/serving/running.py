"""The thread in which the model answers: requests join the running batch and leave it between two tokens.

The event loop asks and is told; the engine is touched by this thread alone. What a step brought goes to the loop in one
call for everybody, so that a hundred listeners cost the thread no more than one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from avlm.inference.answers import Piece
from avlm.inference.engine import Engine, Request
from avlm.inference.prompts import Prompt
from avlm.inference.sampling import Sampling
from avlm.inference.serving.refusing import RefusedError, our_fault

T = TypeVar("T")

log = logging.getLogger("avlm.serving")

HOPELESS = 3
"""Steps that failed one after the other until the server says that it is not well."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a step brought for one answer."""

    pieces: tuple[Piece, ...] = ()
    finish: str | None = None
    """Why it ended: "stop" or "length"; None while it goes on."""
    failure: RefusedError | None = None


Updates: TypeAlias = "asyncio.Queue[tuple[int, Update]]"


@dataclass(slots=True, eq=False)
class Answer:
    """One answer that somebody waits for."""

    prompt: Prompt | None
    """Until the engine has it."""
    sampling: Sampling
    updates: Updates
    """Where it is told; several answers may share one."""
    number: int = 0
    """Which of several it is."""
    request: Request | None = None
    over: bool = False

    @property
    def kept_tokens(self) -> int:
        """Of the prompt, those that the engine found remembered."""
        return 0 if self.request is None else self.request.kept_tokens

    @property
    def answer_tokens(self) -> int:
        return 0 if self.request is None else self.request.answer_tokens


class Running:
    """The engine and its thread.

    Args:
        engine: Only this thread uses it from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._news = threading.Condition()
        self._joining: deque[Answer] = deque()
        self._leaving: deque[Answer] = deque()
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._inside: dict[Request, Answer] = {}
        self._failures = 0
        self._over = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="avlm-engine", daemon=True)

    def start(self) -> None:
        """Begin; what comes is told to the event loop that this is called in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End after the step at hand."""
        with self._news:
            self._over = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------ for the event loop

    @property
    def well(self) -> bool:
        """Whether answers can be expected."""
        return self._failures < HOPELESS and (self._loop is None or self._thread.is_alive())

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return len(self._inside)

    @property
    def waiting(self) -> int:
        """Answers that wait for a place in the batch."""
        return len(self._joining)

    def ask(self, prompt: Prompt, sampling: Sampling, updates: Updates, number: int = 0) -> Answer:
        """Ask for an answer; it begins when there is a place, and is told to a queue of the caller's."""
        answer = Answer(prompt, sampling, updates, number)
        with self._news:
            self._joining.append(answer)
            self._news.notify()
        return answer

    def leave(self, answer: Answer) -> None:
        """Nobody waits for it any more: its place is free at the next token."""
        with self._news:
            if not answer.over:
                self._leaving.append(answer)
                self._news.notify()

    async def run(self, function: Callable[[], T]) -> T:
        """Have something else done with the model or the engine, in their thread and between two tokens of the others.

        It may step the engine itself: what that brings for others is told to them.
        """
        done: Future[T] = Future()
        with self._news:
            self._errands.append((function, done))
            self._news.notify()
        return await asyncio.wrap_future(done)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._over or self._engine.busy or self._joining or self._leaving or self._errands):
                    self._news.wait()
                if self._over:
                    return
                self._let_out()
                entering = self._entering()
            self._run_errands()
            told = self._let_in(entering)
            try:
                if self._engine.busy:
                    self._engine.step()
                    self._failures = 0
                told += [self._update(one) for one in list(self._inside) if one.pieces or one.finish is not None]
            except Exception:
                log.exception("a step of the model failed, and with it what was being answered")
                told += self._give_up()
            self._tell(told)

    def _let_out(self) -> None:
        while self._leaving:
            answer = self._leaving.popleft()
            answer.over = True
            if answer.request is not None:
                self._inside.pop(answer.request, None)
                self._engine.leave(answer.request)
            elif answer in self._joining:
                self._joining.remove(answer)

    def _entering(self) -> list[Answer]:
        return [self._joining.popleft() for _ in range(min(self._engine.free, len(self._joining)))]

    def _run_errands(self) -> None:
        for _ in range(len(self._errands)):
            function, done = self._errands.popleft()
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function())
                except BaseException as error:
                    done.set_exception(error)

    def _let_in(self, entering: list[Answer]) -> list[tuple[Answer, Update]]:
        """Hand prompts to the engine; what it will not take fails alone."""
        told = []
        for answer in entering:
            assert answer.prompt is not None
            try:
                answer.request = self._engine.join(answer.prompt, answer.sampling)
                self._inside[answer.request] = answer
            except Exception:
                log.exception("a prompt was not taken")
                answer.over = True
                told.append((answer, Update(failure=our_fault())))
            answer.prompt = None
        return told

    def _update(self, request: Request) -> tuple[Answer, Update]:
        answer = self._inside[request]
        pieces = tuple(request.pieces.popleft() for _ in range(len(request.pieces)))
        if request.finish is not None:
            answer.over = True
            del self._inside[request]
        if request.finish == "left":  # a step of somebody else's failed, and the engine gave up on all
            return answer, Update(failure=our_fault())
        return answer, Update(pieces, request.finish)

    def _give_up(self) -> list[tuple[Answer, Update]]:
        """On all that are in: what the engine had read of them is lost."""
        self._failures += 1
        given_up = dict(self._inside)
        self._inside.clear()
        for request, answer in given_up.items():
            answer.over = True
            self._engine.leave(request)
        return [(answer, Update(failure=our_fault())) for answer in given_up.values()]

    def _tell(self, told: list[tuple[Answer, Update]]) -> None:
        if told and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, told)


def _put(told: list[tuple[Answer, Update]]) -> None:
    for answer, update in told:
        answer.updates.put_nowait((answer.number, update))
