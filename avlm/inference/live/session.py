"""The course of a conversation by voice: frames of sound and typed texts in, events out.

A session listens all the time, also while it answers. Where the gate notices a pause it
asks the model whether what was said so far was meant for it; a question stops an answer
that is being given, anything else leaves it alone. When the pause lasts, the question is
answered. Typed text is always meant for the model.

Time is counted in samples of input. With `Costs` a session is deterministic: what the
model reads and writes takes the time that the costs say, whatever the machine; without,
everything is there as soon as it is computed, and a call makes one token at most.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from avlm.data.voice.gate import FRAME, SAMPLE_RATE_HZ, Gate, Gated, GateSettings, Passage
from avlm.errors import AvlmError, ConfigError
from avlm.inference.live.mind import Answer, Judgement, Mind
from avlm.inference.live.voice import Clauses, Voice
from avlm.samples import MediaItem

Event = dict[str, Any]
"""`at_s`, `event`, and what belongs to it; see docs/live.md. Plain JSON but for the `wave` of a `speech`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What the model's work takes in model time."""

    prompt_token_ms: float = 0.5
    """To read one token of a prompt."""
    token_ms: float = 50.0
    """To make one token of an answer."""

    def __post_init__(self) -> None:
        for name in ("prompt_token_ms", "token_ms"):
            if not 0 <= getattr(self, name) <= 60_000:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is no time that a token takes. Use 0 to 60000 milliseconds"
                )

    def reading(self, tokens: int) -> int:
        """Samples that pass while a prompt is read."""
        return round(self.prompt_token_ms * tokens * SAMPLE_RATE_HZ / 1000)

    def writing(self, tokens: int) -> int:
        """Samples that pass while tokens are made."""
        return round(self.token_ms * tokens * SAMPLE_RATE_HZ / 1000)


@dataclass(slots=True)
class _Heard:
    """A passage that the model has been asked about."""

    number: int
    passage: Passage
    judgement: Judgement
    due: int
    """When the model has told."""
    told: bool = False
    shut: bool = False
    """Whether whoever spoke has finished."""


@dataclass(slots=True)
class _Answering:
    """The answer that is being given."""

    number: int
    said: np.ndarray | str
    answer: Answer
    due: int
    """When its next token is there."""
    clauses: Clauses
    text: str = ""
    tokens: int = 0
    written: bool = False
    """Whether there is nothing more to be made."""
    speaks_until: int = 0


@dataclass(slots=True)
class Session:
    """One conversation. Feed it with `hear` and `type`; one thread at a time.

    Args:
        mind: The model.
        gate: When somebody speaks; default: a gate with its own settings.
        threshold: From this probability on a sound was meant for the model.
        costs: Model time; None: real time.
        voice: Speaks the answers; None: they are text alone.
    """

    mind: Mind
    gate: Gate = field(default_factory=lambda: Gate(GateSettings()))
    threshold: float = 0.5
    costs: Costs | None = None
    voice: Voice | None = None
    _rest: np.ndarray = field(init=False, default_factory=lambda: np.zeros(0, np.float32))
    _events: list[Event] = field(init=False, default_factory=list)
    _number: int = field(init=False, default=0)
    _heard: _Heard | None = field(init=False, default=None)
    _waiting: deque[_Heard] = field(init=False, default_factory=deque)
    _answering: _Answering | None = field(init=False, default=None)
    _skew: int = field(init=False, default=0)
    """Samples of time that went by without sound, at the end of the input."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} is no probability. Use 0 to 1")

    @property
    def now(self) -> int:
        """Samples heard."""
        return self.gate.now

    @property
    def busy(self) -> bool:
        """Whether an answer is being given, or something was heard that is not decided."""
        return self._answering is not None or bool(self._waiting) or self._heard is not None or self.gate.open

    @property
    def working(self) -> bool:
        """In real time: whether another call would bring something further, even without a sound."""
        running = self._answering
        return bool(self._waiting) or (running is not None and not running.written)

    def hear(self, samples: np.ndarray) -> list[Event]:
        """What a microphone took up.

        Args:
            samples: float32, mono, 16 kHz; any number of them.

        Returns:
            What happened meanwhile, in order.
        """
        whole = np.concatenate([self._rest, samples.astype(np.float32, copy=False)])
        frames = len(whole) // FRAME
        for i in range(frames):
            for gated in self.gate.take(whole[i * FRAME : (i + 1) * FRAME]):
                self._gated(gated)
            if self.costs is not None:
                self._work()
        self._rest = whole[frames * FRAME :]
        if self.costs is None:
            self._work()
        return self._take_events()

    def type(self, text: str) -> list[Event]:
        """Somebody typed: it is meant for the model, and stops an answer that is being given."""
        self._number += 1
        self._tell("state", number=self._number, state="typed", probability=1.0, text=text)
        self._interrupt(self._number)
        self._begin(self._number, text)
        return self._take_events()

    def show(self, picture: MediaItem | None) -> None:
        """What the camera shows from now on."""
        self.mind.show(picture)

    def played(self) -> list[Event]:
        """Whoever plays the spoken answers has come to their end, earlier or later than their length says."""
        if self._answering is not None:
            self._answering.speaks_until = min(self._answering.speaks_until, self._clock())
            self._answer_on()
        return self._take_events()

    def stop(self) -> list[Event]:
        """Somebody pressed the button: no more of this answer."""
        self._interrupt(None)
        return self._take_events()

    def finish(self) -> list[Event]:
        """The input has ended: what was said is taken as said, and an answer is given to its end."""
        for gated in self.gate.finish():
            self._gated(gated)
        while self._waiting or self._answering is not None:
            dues = [heard.due for heard in self._waiting]
            if self._answering is not None:
                running = self._answering
                dues.append(running.speaks_until if running.written else running.due)
            self._skew = max(self._skew, min(dues) - self.gate.now)  # time goes on without sound
            self._work()
        return self._take_events()

    # ---------------------------------------------------------------- time and events

    def _clock(self) -> int:
        return self.gate.now + self._skew

    def _tell(self, event: str, at: int | None = None, **more: Any) -> None:
        at_s = round((self._clock() if at is None else at) / SAMPLE_RATE_HZ, 4)
        self._events.append({"at_s": at_s, "event": event, **more})

    def _take_events(self) -> list[Event]:
        found, self._events = self._events, []
        return found

    # ---------------------------------------------------------------- listening

    def _gated(self, gated: Gated) -> None:
        passage = gated.passage
        if gated.what == "opened":
            self._number += 1
            self._tell("heard", number=self._number, start_s=passage.start / SAMPLE_RATE_HZ)
        elif gated.what == "paused":
            self._ask(passage)
        else:
            kept = gated.what == "shut"
            where: Event = {"start_s": passage.start / SAMPLE_RATE_HZ, "end_s": passage.end / SAMPLE_RATE_HZ}
            self._tell("gated", number=self._number, kept=kept, **where)
            if kept:
                self._shut(passage)
            self._heard = None

    def _ask(self, passage: Passage) -> None:
        """Ask the model about what was said so far."""
        try:
            judgement = self.mind.judge(passage.wave)
        except AvlmError as error:
            self._tell("error", number=self._number, message=str(error))
            judgement = Judgement(0.0, 0)
        cost = 0 if self.costs is None else self.costs.reading(judgement.prompt_tokens)
        self._heard = _Heard(self._number, passage, judgement, self._clock() + cost)
        self._waiting.append(self._heard)

    def _shut(self, passage: Passage) -> None:
        """Whoever spoke has finished. Nothing is asked again if nothing was said since the pause."""
        if self._heard is None or self._heard.passage.end != passage.end:
            self._ask(passage)
        assert self._heard is not None
        self._heard.shut = True
        if self._heard.told:
            self._decided(self._heard)

    def _work(self) -> None:
        """What is due by now."""
        while self._waiting and self._waiting[0].due <= self._clock():
            self._judged(self._waiting.popleft())
        self._answer_on()

    def _judged(self, heard: _Heard) -> None:
        """The model has told."""
        heard.told = True
        meant = heard.judgement.probability >= self.threshold
        self._tell(
            "state",
            at=heard.due,
            number=heard.number,
            state="question" if meant else "noise",
            probability=round(heard.judgement.probability, 4),
            start_s=heard.passage.start / SAMPLE_RATE_HZ,
            end_s=heard.passage.end / SAMPLE_RATE_HZ,
        )
        if meant:
            self._interrupt(heard.number, at=heard.due)
        if heard.shut:
            self._decided(heard)

    def _decided(self, heard: _Heard) -> None:
        if heard.judgement.probability >= self.threshold:
            self._begin(heard.number, heard.passage.wave)

    # ---------------------------------------------------------------- answering

    def _interrupt(self, by: int | None, at: int | None = None) -> None:
        """Stop the answer that is being given, if there is one and `by` is not what it answers."""
        running = self._answering
        if running is None or running.number == by:
            return
        running.answer.close()
        self._answering = None
        self._tell("interrupted", at=at, number=running.number, by=by, text=running.text)
        self.mind.remember(running.said, running.text)

    def _begin(self, number: int, said: np.ndarray | str) -> None:
        """Answer; what was begun for the same question before more of it was heard begins anew."""
        if self._answering is not None:
            self._answering.answer.close()
            self._answering = None
        try:
            answer = self.mind.answer(said)
        except AvlmError as error:
            self._tell("error", number=number, message=str(error))
            return
        due = self._clock()
        if self.costs is not None:
            due += self.costs.reading(answer.prompt_tokens) + self.costs.writing(1)
        self._answering = _Answering(number, said, answer, due, Clauses())
        self._tell("answer_begins", number=number)

    def _answer_on(self) -> None:
        """Tokens that are due; in real time one."""
        while (running := self._answering) is not None and not running.written and running.due <= self._clock():
            at = running.due
            made = running.answer.next()
            if made is None:
                running.written = True
                self._speak(running, running.clauses.end(), at)
            else:
                text, tokens = made
                running.tokens += tokens
                if text:
                    running.text += text
                    self._tell("piece", at=at, number=running.number, text=text)
                    self._speak(running, running.clauses.add(text), at)
            if self.costs is None:
                break
            running.due += 0 if made is None else self.costs.writing(max(1, made[1]))
        if running is not None and running.written and max(running.due, running.speaks_until) <= self._clock():
            self._answering = None
            at = max(running.due, running.speaks_until)
            self._tell("answer_ends", at=at, number=running.number, text=running.text, tokens=running.tokens)
            self.mind.remember(running.said, running.text)

    def _speak(self, running: _Answering, clauses: list[str], at: int) -> None:
        """Say clauses, each behind the one before."""
        if self.voice is None:
            return
        for clause in clauses:
            wave = self.voice.say(clause)
            begins = max(at, running.speaks_until)
            running.speaks_until = begins + len(wave)
            more: Event = {"start_s": begins / SAMPLE_RATE_HZ, "end_s": running.speaks_until / SAMPLE_RATE_HZ}
            self._tell("speech", at=at, number=running.number, text=clause, **more, wave=wave)
