"""A session in model time: what is asked is answered, what is not is let pass, an interruption stops an answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planted import QUESTION_HZ, TALK_HZ, PlantedMind
from voices import noise, speech

from avlm.data.voice.gate import SAMPLE_RATE_HZ
from avlm.data.voice.timeline import Moment, render
from avlm.errors import ConfigError, DataError
from avlm.inference.live.drive import Mouth, play
from avlm.inference.live.mind import Judgement
from avlm.inference.live.score import score
from avlm.inference.live.session import Costs, Session
from avlm.inference.live.voice import Clauses

COSTS = Costs(prompt_token_ms=1.0, token_ms=100.0)
LONG = tuple(f"word{i} " for i in range(40))


def question(seconds: float = 0.8) -> np.ndarray:
    return speech(seconds, pitch_hz=QUESTION_HZ)


def talk(seconds: float = 0.8) -> np.ndarray:
    return speech(seconds, pitch_hz=TALK_HZ)


def happened(mind, things, costs=COSTS, voice=None, tail_s=3.0):
    """Events of a session that hears sounds (arrays) and reads texts at their times."""
    moments = [
        Moment(at, text=what) if isinstance(what, str) else Moment(at, sound="x", state="noise") for at, what in things
    ]
    sounds = [None if isinstance(what, str) else what for _, what in things]
    rendered = render(moments, sounds, tail_s)
    rendered.wave[:] += noise(len(rendered.wave) / SAMPLE_RATE_HZ + 1)[: len(rendered.wave)]
    return list(play(Session(mind, costs=costs, voice=voice), moments, rendered, None))


def names(events):
    return [event["event"] for event in events]


def only(events, name):
    return [event for event in events if event["event"] == name]


def test_a_question_is_answered():
    mind = PlantedMind()
    events = happened(mind, [(1.0, question())])
    assert names(events) == ["heard", "state", "gated", "answer_begins", "piece", "piece", "piece", "answer_ends"]
    assert only(events, "state")[0]["probability"] == 0.9
    assert only(events, "answer_ends")[0]["text"] == "one two three"
    assert mind.remembered == [("sound", "one two three")]


def test_times_are_the_gates_and_the_costs():
    events = happened(PlantedMind(prompt_tokens=40), [(1.0, question(0.8))])
    at = {event["event"]: event["at_s"] for event in events if event["event"] != "piece"}
    assert at["state"] == pytest.approx(1.8 + 0.16 + 0.04, abs=0.04)  # the pause, and 40 tokens of 1 ms
    assert at["answer_begins"] == pytest.approx(1.8 + 0.4, abs=0.04)
    pieces = [event["at_s"] for event in only(events, "piece")]
    assert pieces[0] == pytest.approx(at["answer_begins"] + 0.04 + 0.1, abs=1e-3)
    assert np.diff(pieces) == pytest.approx([0.1, 0.1], abs=1e-3)


def test_what_is_not_meant_for_the_model_is_let_pass():
    mind = PlantedMind()
    events = happened(mind, [(1.0, talk()), (3.0, talk(1.5))])
    assert names(events) == ["heard", "state", "gated"] * 2
    assert [event["state"] for event in only(events, "state")] == ["noise", "noise"]
    assert mind.answers == []


def test_nobody_is_asked_about_a_click():
    mind = PlantedMind()
    events = happened(mind, [(1.0, question(0.1))])
    assert mind.judged == []
    assert [event["kept"] for event in only(events, "gated")] in ([], [False])


def test_typed_text_is_always_meant():
    mind = PlantedMind()
    events = happened(mind, [(1.0, "What is this?")])
    assert names(events)[:2] == ["state", "answer_begins"]
    assert only(events, "state")[0] == {
        "at_s": 1.0, "event": "state", "number": 1, "state": "typed", "probability": 1.0, "text": "What is this?"
    }  # fmt: skip
    assert mind.remembered == [("What is this?", "one two three")]


def test_a_question_stops_an_answer_within_300_ms_of_its_last_sample():
    mind = PlantedMind(LONG)
    events = happened(mind, [(1.0, "Tell me a story."), (2.0, question(0.8))], tail_s=8)
    (stopped,) = only(events, "interrupted")
    assert (stopped["number"], stopped["by"]) == (1, 2)
    assert 2.8 < stopped["at_s"] <= 3.1
    assert mind.answers[0].closed
    told = "".join(event["text"] for event in only(events, "piece") if event["number"] == 1)
    assert stopped["text"] == told
    assert not [e for e in only(events, "piece") if e["number"] == 1 and e["at_s"] > stopped["at_s"]]
    assert only(events, "answer_ends")[-1]["number"] == 2  # and then it is answered itself


def test_talk_does_not_stop_an_answer():
    mind = PlantedMind(LONG)
    events = happened(mind, [(1.0, "Tell me a story."), (2.0, talk(0.8))], tail_s=8)
    assert only(events, "interrupted") == []
    assert only(events, "answer_ends")[0]["text"] == "".join(LONG)


def test_typing_stops_an_answer_at_once():
    events = happened(PlantedMind(LONG), [(1.0, "Tell me a story."), (2.0, "Stop, something else.")], tail_s=8)
    (stopped,) = only(events, "interrupted")
    assert stopped["at_s"] == pytest.approx(2.0, abs=0.02)


def test_nothing_is_asked_twice_where_nothing_was_said_since_the_pause():
    mind = PlantedMind()
    happened(mind, [(1.0, question()), (4.0, talk())])
    assert len(mind.judged) == 2


def test_a_question_in_two_breaths_is_decided_and_answered_as_a_whole():
    mind = PlantedMind()
    events = happened(mind, [(1.0, question(0.5)), (1.75, question(0.5))])
    assert len(only(events, "state")) == 2
    assert len(mind.answers) == 1
    assert len(only(events, "gated")) == 1


@pytest.mark.parametrize("chunk", [1, 7, 333, 16_000])
def test_the_same_events_however_the_sound_arrives(chunk):
    wave = np.concatenate([noise(1), question(), noise(2, seed=1), talk(), noise(1.5, seed=2)])
    wave = wave[: len(wave) // 50] if chunk == 1 else wave

    def run(size):
        session = Session(PlantedMind(), costs=COSTS)
        pieces = [wave[i : i + size] for i in range(0, len(wave), size)]
        return [event for piece in pieces for event in session.hear(piece)] + session.finish()

    assert run(chunk) == run(len(wave))


def test_in_real_time_a_call_makes_one_token_and_nothing_is_lost():
    mind = PlantedMind(LONG)
    session = Session(mind)
    events = session.type("Tell me a story.")
    events += session.hear(np.zeros(16_000, np.float32))
    assert len(only(events, "piece")) == 1
    events += session.finish()
    assert only(events, "answer_ends")[0]["text"] == "".join(LONG)


def test_the_button_stops_an_answer():
    mind = PlantedMind(LONG)
    session = Session(mind)
    session.type("Tell me a story.")
    session.hear(np.zeros(3200, np.float32))
    (stopped,) = session.stop()
    assert stopped["event"] == "interrupted" and stopped["by"] is None
    assert session.stop() == []
    assert not session.busy


def test_a_spoken_answer_lasts_as_long_as_its_sound_and_can_be_interrupted_meanwhile():
    class Slow:
        def say(self, text):
            return np.zeros(2 * SAMPLE_RATE_HZ, np.float32)

    mind = PlantedMind(("Yes, ", "it ", "is."))
    events = happened(mind, [(1.0, "Is it?")], voice=Slow(), tail_s=6)
    (spoken,) = only(events, "speech")
    assert spoken["text"] == "Yes, it is."
    assert only(events, "answer_ends")[0]["at_s"] == pytest.approx(spoken["start_s"] + 2.0, abs=0.02)
    events = happened(PlantedMind(("Yes, ", "it ", "is.")), [(1.0, "Is it?"), (1.8, question(0.5))], voice=Slow())
    assert only(events, "interrupted")[0]["at_s"] < spoken["end_s"]


def test_a_sound_that_the_model_cannot_take_is_an_event_and_not_the_end():
    class Deaf(PlantedMind):
        def judge(self, wave: np.ndarray) -> Judgement:
            raise DataError("too loud. Speak lower")

    events = happened(Deaf(), [(1.0, question()), (3.0, "And typed?")])
    assert only(events, "error")[0]["message"] == "too loud. Speak lower"
    assert only(events, "answer_ends")[0]["text"] == "one two three"


def test_rates_count_what_had_a_consequence():
    things = [
        (1.0, question(), "question"),
        (3.0, talk(), "question"),
        (5.0, question(), "noise"),
        (7.0, talk(), "noise"),
    ]
    moments = [Moment(at, sound="x", state=state, kind="addressed") for at, _, state in things]
    rendered = render(moments, [what for _, what, _ in things])
    session = Session(PlantedMind(), costs=COSTS)
    rates = score(moments, rendered, list(play(session, moments, rendered, None)))
    assert (rates.questions, rates.missed, rates.backgrounds, rates.false) == (2, 1, 2, 1)
    assert rates.missed_rate == rates.false_rate == 0.5


def test_rates_measure_the_stop_from_the_questions_last_sample():
    moments = [Moment(1.0, text="Go on."), Moment(2.0, sound="x", state="question", kind="interruption")]
    rendered = render(moments, [None, question(0.8)], 8)
    events = list(play(Session(PlantedMind(LONG), costs=COSTS), moments, rendered, None))
    rates = score(moments, rendered, events)
    (stopped,) = only(events, "interrupted")
    assert rates.stops_ms == [pytest.approx(1000 * (stopped["at_s"] - 2.8), abs=0.1)]
    assert 0 < rates.stops_ms[0] <= 300


@pytest.mark.parametrize(
    ("words", "sound", "unstopped"),
    [(10, question(0.8), 0), (40, talk(0.8), 1)],
    ids=["ends by itself before anybody could tell", "goes on"],
)
def test_an_answer_that_was_not_stopped_counts_if_the_model_could_have_told(words, sound, unstopped):
    moments = [Moment(1.0, text="Go on."), Moment(1.2, sound="x", state="question")]
    rendered = render(moments, [None, sound], 8)
    events = list(play(Session(PlantedMind(LONG[:words]), costs=COSTS), moments, rendered, None))
    rates = score(moments, rendered, events)
    ended, (_, decided) = only(events, "answer_ends")[0]["at_s"], [e["at_s"] for e in only(events, "state")]
    assert ended > 2.0 and (ended < decided) == (unstopped == 0)
    assert (rates.stops_ms, rates.unstopped) == ([], unstopped)


def test_rates_count_what_an_answer_went_on_through():
    things = [(1.0, "Go on.", ""), (2.0, talk(), "noise"), (9.0, "Go on.", ""), (10.0, question(), "noise")]
    moments = [
        Moment(at, text=what) if isinstance(what, str) else Moment(at, sound="x", state=state)
        for at, what, state in things
    ]
    rendered = render(moments, [None if isinstance(what, str) else what for _, what, _ in things], 8)
    events = list(play(Session(PlantedMind(LONG), costs=COSTS), moments, rendered, None))
    rates = score(moments, rendered, events)
    assert (rates.passed, rates.disturbed, rates.false, rates.stops_ms) == (1, 1, 1, [])


def test_an_answer_that_was_stopped_by_something_later_went_on_through_what_was_before():
    moments = [Moment(1.0, text="Go on."), Moment(2.0, sound="x", state="noise"), Moment(4.0, text="Stop.")]
    rendered = render(moments, [None, talk(), None], 8)
    rates = score(moments, rendered, list(play(Session(PlantedMind(LONG), costs=COSTS), moments, rendered, None)))
    assert (rates.passed, rates.disturbed, rates.false) == (1, 0, 0)


def test_events_are_json():
    for event in happened(PlantedMind(), [(1.0, question()), (3.0, "And?")]):
        assert json.loads(json.dumps(event)) == event


def test_costs_and_thresholds_that_cannot_be():
    with pytest.raises(ConfigError, match=r"^token_ms=-1 is no time that a token takes. Use 0 to 60000 milliseconds$"):
        Costs(token_ms=-1)
    with pytest.raises(ConfigError, match=r"^threshold=2 is no probability. Use 0 to 1$"):
        Session(PlantedMind(), threshold=2)


def test_a_mouth_says_one_piece_behind_the_other_and_hushes():
    mouth = Mouth()
    mouth.say(np.full(5, 1.0, np.float32))
    mouth.say(np.full(5, 2.0, np.float32))
    assert mouth.next(7).tolist() == [1, 1, 1, 1, 1, 2, 2]
    assert mouth.next(5).tolist() == [2, 2, 2, 0, 0]
    mouth.say(np.full(5, 3.0, np.float32))
    mouth.hush()
    assert mouth.next(2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("pieces", "clauses"),
    [
        (["Yes, it ", "is. And", " more"], ["Yes, it is.", "And more"]),
        (["It is 3", ".5 high."], ["It is 3.5 high."]),
        (["One two, ", "three four! Five"], ["One two,", "three four!", "Five"]),
        (["...", " !"], []),
        (
            ["\u4f60\u597d\u4e16\u754c\u4f60\u597d\u3002 ", "\u518d\u89c1"],
            ["\u4f60\u597d\u4e16\u754c\u4f60\u597d\u3002", "\u518d\u89c1"],
        ),
    ],
)
def test_clauses_are_cut_where_a_speaker_draws_breath(pieces, clauses):
    cutter = Clauses()
    assert [clause for piece in pieces for clause in cutter.add(piece)] + cutter.end() == clauses
