"""How often a session wakes up when it should not, and the reverse: events against what is true of a timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from avlm.data.voice.gate import SAMPLE_RATE_HZ
from avlm.data.voice.timeline import Moment, Rendered
from avlm.inference.live.session import Event


@dataclass(slots=True)
class Rates:
    """Counts over timelines; add them up with `+=`."""

    questions: int = 0
    missed: int = 0
    """Questions that nothing came of."""
    backgrounds: int = 0
    false: int = 0
    """Sounds that were not meant for the model and were taken for a question."""
    stops_ms: list[float] = field(default_factory=list)
    """From the last sample of each question that came into an answer to the end of that answer, in model time."""
    unstopped: int = 0
    """Questions that came into an answer and did not stop it."""
    passed: int = 0
    """Sounds that were not meant for the model, came into an answer and left it alone."""
    disturbed: int = 0
    """Such sounds that stopped it."""
    wrong: list[str] = field(default_factory=list)
    """What was missed or taken wrongly."""

    @property
    def missed_rate(self) -> float:
        return self.missed / self.questions if self.questions else 0.0

    @property
    def false_rate(self) -> float:
        return self.false / self.backgrounds if self.backgrounds else 0.0

    def __iadd__(self, other: Rates) -> Rates:
        for name in ("questions", "missed", "backgrounds", "false", "unstopped", "passed", "disturbed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.stops_ms += other.stops_ms
        self.wrong += other.wrong
        return self

    def summary(self) -> str:
        """One line for people."""
        slowest = f"{max(self.stops_ms):.0f} ms" if self.stops_ms else "none"
        return (
            f"missed {self.missed} of {self.questions} questions ({100 * self.missed_rate:.1f} %), "
            f"false {self.false} of {self.backgrounds} others ({100 * self.false_rate:.1f} %); "
            f"{len(self.stops_ms) + self.unstopped} questions came into an answer, {self.unstopped} did not stop it, "
            f"slowest stop {slowest}; {self.passed + self.disturbed} others did, {self.disturbed} stopped it"
        )


def score(moments: Sequence[Moment], rendered: Rendered, events: Sequence[Event]) -> Rates:
    """Compare a session's events with a timeline's truth.

    A passage that the session took for a question belongs to the judged sound that it overlaps longest. Taken for one
    is what stopped an answer or was answered.
    """
    judged = [i for i, moment in enumerate(moments) if moment.state]
    taken = {_owner(event, judged, rendered) for event in _taken(events)}
    rates = Rates()
    for i in judged:
        moment, woke = moments[i], i in taken
        if moment.state == "question":
            rates.questions += 1
            rates.missed += not woke
            _stop(rates, rendered.spans[i], events)
        else:
            rates.backgrounds += 1
            rates.false += woke
            _pass(rates, rendered.spans[i], events)
        if woke != (moment.state == "question"):
            rates.wrong.append(f"{moment.at_s:g} s, {moment.kind}, {moment.state}: {moment.says}")
    return rates


def _taken(events: Sequence[Event]) -> list[Event]:
    """Decisions for a question that had a consequence: an answer was stopped, or begun."""
    moved = {event["by"] for event in events if event["event"] == "interrupted"}
    moved |= {event["number"] for event in events if event["event"] == "answer_begins"}
    states = [e for e in events if e["event"] == "state" and e["state"] == "question"]
    return [event for event in states if event["number"] in moved]


def _owner(event: Event, judged: Sequence[int], rendered: Rendered) -> int | None:
    start, end = round(event["start_s"] * SAMPLE_RATE_HZ), round(event["end_s"] * SAMPLE_RATE_HZ)
    shared = {i: min(end, rendered.spans[i][1]) - max(start, rendered.spans[i][0]) for i in judged}
    best = max(shared, key=lambda i: shared[i], default=None)
    return best if best is not None and shared[best] > 0 else None


def _over(span: tuple[int, int], events: Sequence[Event]) -> Event | None:
    """How the answer ended that was being given when a sound began; None: none was."""
    start_s = span[0] / SAMPLE_RATE_HZ
    begun = {e["number"]: e["at_s"] for e in events if e["event"] == "answer_begins"}
    ended = [e for e in events if e["event"] in ("answer_ends", "interrupted")]
    return next((e for e in ended if begun[e["number"]] < start_s <= e["at_s"]), None)


def _stop(rates: Rates, span: tuple[int, int], events: Sequence[Event]) -> None:
    """How long an answer that was being given went on behind a question.

    One that ended by itself within the question, or before the model had decided, tells nothing.
    """
    over, end_s = _over(span, events), span[1] / SAMPLE_RATE_HZ
    if over is None or over["at_s"] < end_s:
        return
    decided = [e["at_s"] for e in _heard(span, events) if e["state"] == "question"]
    if over["event"] == "interrupted":
        rates.stops_ms.append(round(1000 * (over["at_s"] - end_s), 1))
    elif not decided or over["at_s"] > decided[0]:
        rates.unstopped += 1


def _pass(rates: Rates, span: tuple[int, int], events: Sequence[Event]) -> None:
    """Whether an answer that was being given went on through something that was not meant for the model."""
    over = _over(span, events)
    if over is None:
        return
    if any(e["number"] == over.get("by") for e in _heard(span, events)):
        rates.disturbed += 1
    else:
        rates.passed += 1


def _heard(span: tuple[int, int], events: Sequence[Event]) -> list[Event]:
    """What the model decided about passages that share something with a sound."""
    start_s, end_s = (at / SAMPLE_RATE_HZ for at in span)
    states = [event for event in events if event["event"] == "state" and event["state"] != "typed"]
    return [event for event in states if event["start_s"] < end_s and event["end_s"] > start_s]
