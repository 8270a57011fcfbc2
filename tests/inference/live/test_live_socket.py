"""The WebSocket: events out, limits kept, another client undisturbed."""

from __future__ import annotations

import base64
import io
import json
import time

import numpy as np
import pytest
from planted import QUESTION_HZ, TALK_HZ, PlantedMind
from voices import noise, speech

from avlm.inference.live.drive import from_pcm, to_pcm
from avlm.inference.live.session import Session

pytest.importorskip("fastapi")
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from avlm.inference.live.socket import LATER, PATH, POLICY, PROTOCOL, TOO_LARGE, SocketLimits, live_router


class Beep:
    def say(self, text):
        return np.full(1600, 0.25, np.float32)


def client(limits: SocketLimits | None = None, minds: list[PlantedMind] | None = None, voice=None) -> TestClient:
    app = FastAPI()
    kept = [] if minds is None else minds

    def make() -> Session:
        kept.append(PlantedMind())
        return Session(kept[-1], voice=voice)

    app.include_router(live_router(make, limits=limits))
    return TestClient(app)


FAST = SocketLimits(ahead_s=60)


def send(socket, wave: np.ndarray, size: int = 3200) -> None:
    data = to_pcm(wave)
    for start in range(0, len(data), size):
        socket.send_bytes(data[start : start + size])


def until(socket, event: str) -> list[dict]:
    found = []
    while not found or found[-1]["event"] != event:
        found.append(socket.receive_json())
    return found


def test_a_spoken_question_is_answered_and_talk_is_not():
    with client(FAST).websocket_connect(PATH) as socket:
        send(socket, np.concatenate([noise(1), speech(0.8, pitch_hz=TALK_HZ), noise(1, seed=1)]))
        assert [e["event"] for e in until(socket, "gated")] == ["heard", "state", "gated"]
        send(socket, np.concatenate([speech(0.8, pitch_hz=QUESTION_HZ), noise(1, seed=2)]))
        events = until(socket, "answer_ends")
        assert events[-1]["text"] == "one two three"


def test_typed_text_is_answered_without_a_sound_being_sent():
    with client().websocket_connect(PATH) as socket:
        socket.send_json({"type": "text", "text": "What is it?"})
        events = until(socket, "answer_ends")
        assert [e["event"] for e in events] == ["state", "answer_begins", "piece", "piece", "piece", "answer_ends"]


def test_speech_comes_as_an_event_and_then_its_sound():
    with client(voice=Beep()).websocket_connect(PATH) as socket:
        socket.send_json({"type": "text", "text": "What is it?"})
        until(socket, "speech")
        wave = from_pcm(socket.receive_bytes())
        np.testing.assert_allclose(wave, 0.25, atol=1e-4)
        socket.send_json({"type": "played"})
        assert until(socket, "answer_ends")


def test_pictures_are_shown_and_taken_away():
    minds: list[PlantedMind] = []
    with client(minds=minds).websocket_connect(PATH) as socket:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), (250, 0, 0)).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        socket.send_json({"type": "image", "url": url})
        socket.send_json({"type": "image"})
        socket.send_json({"type": "text", "text": "What is it?"})
        until(socket, "answer_ends")
    shown, away = minds[0].shown
    assert shown.decoded.pixels.shape == (6, 8, 3)
    assert away is None


def test_the_end_answers_what_is_open_and_closes():
    with client(FAST).websocket_connect(PATH) as socket:
        send(socket, np.concatenate([noise(1), speech(0.8, pitch_hz=QUESTION_HZ)]))
        socket.send_json({"type": "end"})
        assert until(socket, "answer_ends")[-1]["text"] == "one two three"
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
    assert closed.value.code == 1000


def test_one_of_the_offered_protocols_is_chosen():
    with client().websocket_connect(PATH, subprotocols=[PROTOCOL, "avlm-key.secret"]) as socket:
        assert socket.accepted_subprotocol == PROTOCOL
    with client().websocket_connect(PATH) as socket:
        assert socket.accepted_subprotocol is None


def silence(seconds: float) -> bytes:
    return b"\0\0" * round(seconds * 16_000)


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (silence(2.1), TOO_LARGE, "a piece of sound has at most 64000 bytes. Send less at once"),
        (b"\0\0\0", POLICY, "a piece of sound has an odd number of bytes, and samples have two. Send whole ones"),
        ("{", POLICY, 'a text message is an object of JSON with a "type". Send such a one'),
        ("[" * 100_000, POLICY, 'a text message is an object of JSON with a "type". Send such a one'),
        ("[]", POLICY, 'a text message is an object of JSON with a "type". Send such a one'),
        ('{"type": 7}', POLICY, 'a text message is an object of JSON with a "type". Send such a one'),
        ('{"type": "x"}', POLICY, "a message has a type that is none. Use text, image, stop, played or end"),
        ('{"type": "text", "text": " "}', POLICY, "a typed text has 1 to 4000 characters. Send such a one"),
        ('{"type": "text", "text": ["a"]}', POLICY, "a typed text has 1 to 4000 characters. Send such a one"),
        (
            '{"type": "image", "url": "http://127.0.0.1/a.png"}',
            POLICY,
            "a picture is a data URL of a JPEG or a PNG in base64. Send such a one",
        ),
        (
            '{"type": "image", "url": "file:///etc/passwd"}',
            POLICY,
            "a picture is a data URL of a JPEG or a PNG in base64. Send such a one",
        ),
        (
            '{"type": "image", "url": "data:image/png;base64,AAAA"}',
            POLICY,
            "the picture cannot be read, or is too large. Send another",
        ),
        (
            '{"type": "image", "url": "data:image/png;base64,!!"}',
            POLICY,
            "the picture cannot be read, or is too large. Send another",
        ),
        (
            '{"type": "' + "x" * 4_000_000 + '"}',
            TOO_LARGE,
            "a message has at most 3145728 characters. Send a smaller one",
        ),
    ],
)
def test_what_goes_too_far_is_told_so_and_ends(message, code, words):
    with client().websocket_connect(PATH) as socket:
        if isinstance(message, bytes):
            socket.send_bytes(message)
        else:
            socket.send_text(message)
        assert socket.receive_json() == {"event": "error", "message": words}
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
    assert closed.value.code == code


def refused(socket) -> str:
    while True:
        event = socket.receive_json()
        if event["event"] == "error":
            return str(event["message"])


def test_sound_that_comes_faster_than_time_is_refused():
    with client(SocketLimits(ahead_s=0.5)).websocket_connect(PATH) as socket:
        for _ in range(3):
            socket.send_bytes(silence(1))
        assert refused(socket) == "sound comes faster than it can be spoken. Send it as it is heard"


def test_too_many_messages_are_refused():
    with client(SocketLimits(messages_per_s=10)).websocket_connect(PATH) as socket:
        for _ in range(40):
            socket.send_bytes(b"")
        assert refused(socket) == "more messages come than anybody can mean. Send fewer, longer ones"


def test_who_says_nothing_for_long_is_let_go():
    began = time.monotonic()
    with client(SocketLimits(idle_s=0.3)).websocket_connect(PATH) as socket:
        assert refused(socket) == "nothing came for a while. Begin another"
    assert time.monotonic() - began < 5


def test_a_conversation_ends_at_its_longest():
    with client(SocketLimits(session_s=0.3)).websocket_connect(PATH) as socket:
        assert refused(socket) == "the conversation is as long as one may be. Begin another"


def test_no_more_than_so_many_talk_at_once_and_a_place_is_free_again():
    app = client(SocketLimits(sessions=1))
    with app.websocket_connect(PATH) as one:
        with app.websocket_connect(PATH) as two:
            assert refused(two) == "as many talk here as can at once. Come again later"
            with pytest.raises(WebSocketDisconnect) as closed:
                two.receive_json()
            assert closed.value.code == LATER
        one.send_json({"type": "text", "text": "Still here?"})
        assert until(one, "answer_ends")
        one.send_json({"type": "end"})
        with pytest.raises(WebSocketDisconnect):
            one.receive_json()
    with app.websocket_connect(PATH) as three:
        three.send_json({"type": "text", "text": "And now?"})
        assert until(three, "answer_ends")


def test_a_client_that_goes_away_in_the_middle_frees_its_answer():
    minds: list[PlantedMind] = []
    app = FastAPI()

    def make() -> Session:
        minds.append(PlantedMind(tuple(f"w{i} " for i in range(10_000))))
        return Session(minds[-1])

    app.include_router(live_router(make))
    with TestClient(app) as running:
        with running.websocket_connect(PATH) as socket:
            socket.send_json({"type": "text", "text": "Tell me a story."})
            until(socket, "piece")
        deadline = time.monotonic() + 10
        while not minds[0].answers[0].closed and time.monotonic() < deadline:
            time.sleep(0.02)
    assert minds[0].answers[0].closed
    assert len(minds[0].answers[0].words) > 5000


def test_events_are_json_without_the_wave():
    with client(voice=Beep()).websocket_connect(PATH) as socket:
        socket.send_json({"type": "text", "text": "What is it?"})
        for event in until(socket, "speech"):
            assert "wave" not in event and json.dumps(event)
