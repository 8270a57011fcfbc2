"""The gate: what is speech is let through whole, what is a room is not."""

from __future__ import annotations

import numpy as np
import pytest
from voices import noise, speech

from avlm.data.voice.gate import FRAME, SAMPLE_RATE_HZ, Gate, Gated, GateSettings, passages
from avlm.errors import ConfigError


def run(wave: np.ndarray, gate: Gate | None = None) -> list[Gated]:
    gate = gate or Gate()
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    return [gated for frame in frames for gated in gate.take(frame)] + gate.finish()


def placed(parts: list[tuple[float, np.ndarray]], seconds: float, room: np.ndarray) -> np.ndarray:
    wave = np.resize(room, round(seconds * SAMPLE_RATE_HZ)).copy()
    for at_s, part in parts:
        start = round(at_s * SAMPLE_RATE_HZ)
        wave[start : start + len(part)] += part
    return wave


@pytest.mark.parametrize("loudness", [0.0, 0.0005, 0.01])
def test_each_of_three_passages_is_let_through_once_with_its_times(loudness):
    times = [(1.0, 0.6), (2.6, 1.2), (5.0, 0.3)]
    wave = placed([(at, speech(length)) for at, length in times], 7, noise(7, loudness))
    found = [gated.passage for gated in run(wave) if gated.what == "shut"]
    assert len(found) == 3
    for passage, (at_s, length_s) in zip(found, times, strict=True):
        assert passage.start / SAMPLE_RATE_HZ == pytest.approx(at_s, abs=0.05)
        assert passage.end / SAMPLE_RATE_HZ == pytest.approx(at_s + length_s, abs=0.05)


def test_what_is_handed_over_is_the_stream_itself_with_a_beginning_and_a_pause():
    wave = placed([(1.0, speech(0.8))], 3, noise(3))
    (passage,) = [gated.passage for gated in run(wave) if gated.what == "shut"]
    settings = GateSettings()
    start = passage.start - settings.before_ms * SAMPLE_RATE_HZ // 1000
    np.testing.assert_array_equal(passage.wave, wave[start : start + len(passage.wave)])
    assert len(passage.wave) == passage.end - start + settings.pause_ms * SAMPLE_RATE_HZ // 1000


def test_a_recording_as_a_whole_gives_the_passages_of_its_frames():
    wave = placed([(1.0, speech(0.6)), (2.6, speech(1.2)), (5.0, speech(0.08))], 7, noise(7))
    expected = [gated.passage for gated in run(wave) if gated.what == "shut"]
    found = passages(wave)
    assert [(passage.start, passage.end) for passage in found] == [(p.start, p.end) for p in expected]
    assert len(found) == 2  # the third is a click
    assert len(passages(wave, GateSettings(shortest_ms=40))) == 3


def test_a_pause_within_a_passage_is_told_and_does_not_end_it():
    parts = [(1.0, speech(0.5)), (1.75, speech(0.5))]  # a quarter of a second between them
    told = [gated.what for gated in run(placed(parts, 4, noise(4)))]
    assert told == ["opened", "paused", "paused", "shut"]


def test_events_come_when_they_say():
    wave = placed([(1.0, speech(0.8))], 3, noise(3))
    gate, at = Gate(), {}
    for frame in wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME):
        for gated in gate.take(frame):
            at[gated.what] = gate.now / SAMPLE_RATE_HZ
    assert at["opened"] == pytest.approx(1.06, abs=0.045)
    assert at["paused"] == pytest.approx(1.8 + 0.16, abs=0.045)
    assert at["shut"] == pytest.approx(1.8 + 0.4, abs=0.045)


@pytest.mark.parametrize("loudness", [0.001, 0.02, 0.2])
def test_steady_noise_does_not_open_it(loudness):
    assert [gated for gated in run(noise(8, loudness)) if gated.what == "shut"] == []


def test_a_fan_that_is_switched_on_becomes_the_room():
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.normal(size=12 * SAMPLE_RATE_HZ))
    fan = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** 0.8)
    fan = (0.02 * fan / fan.std()).astype(np.float32)
    fan[: 2 * SAMPLE_RATE_HZ] *= 0.01
    wave = fan.copy()
    start = 9 * SAMPLE_RATE_HZ
    said = speech(0.8)
    wave[start : start + len(said)] += said
    late = [g.passage for g in run(wave) if g.what == "shut" and g.passage.end > 6 * SAMPLE_RATE_HZ]
    assert len(late) == 1
    assert late[0].start / SAMPLE_RATE_HZ == pytest.approx(9.0, abs=0.1)


def test_a_click_is_dropped():
    wave = placed([(1.0, speech(0.08))], 2, noise(2))
    assert "shut" not in [gated.what for gated in run(wave)]


def test_who_speaks_on_and_on_is_taken_in_parts():
    wave = placed([(0.5 + 0.55 * i, speech(0.5)) for i in range(10)], 7, noise(7))  # breaths of 50 ms
    found = [g.passage for g in run(wave, Gate(GateSettings(longest_ms=2000))) if g.what == "shut"]
    assert len(found) >= 3
    assert all(len(passage.wave) <= 2 * SAMPLE_RATE_HZ for passage in found)


def test_the_end_of_the_stream_ends_a_passage():
    wave = placed([(1.0, speech(0.9))], 1.9, noise(1.9))
    assert [gated.what for gated in run(wave)] == ["opened", "shut"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pause_ms": 500}, "pause_ms=500 is no pause within end_ms=400. Use at least 20 and at most 400"),
        ({"flatness": 0}, "flatness=0 is no share of 1, and at 0 nothing is speech. Use 0.42, say"),
        (
            {"longest_ms": 100},
            "longest_ms=100 is not longer than shortest_ms=160, so nothing would pass. Use 15000, say",
        ),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError) as error:
        GateSettings(**settings)
    assert str(error.value) == message
