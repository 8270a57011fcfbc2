"""What a server does when there is too much of something: requests, bytes, time; and when something breaks."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from media_files import made
from served import Served, at, image, said, served, slow_steps, until

from avlm.config.serve import Serve
from avlm.errors import ConfigError
from avlm.inference.chat import Chat
from avlm.inference.engine import Engine
from avlm.inference.serving.counting import Counts
from avlm.inference.serving.listening import check_address
from avlm.inference.serving.places import Places
from avlm.inference.serving.refusing import RefusedError

LONG = 3000
"""Tokens of an answer that is still being made when a test is over."""


class Sleepy:
    """A fetcher that never comes back."""

    def open(self, item: Any) -> Any:
        time.sleep(600)


@pytest.fixture(scope="module")
def server(chat: Chat) -> Iterator[Served]:
    """One in which everything is scarce."""
    with served(
        chat, lambda fetch: Sleepy(), fetch={"hosts": ["*"]}, slots=2, waiting=1, max_choices=4, max_body=100_000,
        body_s=1.0, head_s=1.0, read_s=1.0, request_s=2.5,
    ) as found:  # fmt: skip
        yield found


@pytest.fixture(autouse=True)
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes a while, so that what is meant to be long is long on any machine."""
    slow_steps(monkeypatch)


# ---------------------------------------------------------------- places


def test_who_comes_when_all_places_are_taken_is_told_when_to_come_again(server: Served) -> None:
    streams = [server.ask(max_tokens=LONG, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(server.ask)  # waits
        until(lambda: server.service.running.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            server.ask()
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "rate_limit_exceeded"
        streams[0].close()
        assert third.result().choices[0].finish_reason == "length"  # there was room for it, between two tokens
    assert server.service.running.running == 1
    streams[1].close()
    until(server.is_empty)
    with pytest.raises(openai.RateLimitError):
        server.ask(n=4)
    assert len(server.ask(n=3).choices) == 3
    assert server.service.counts.full == 2


def test_a_client_that_waits_its_turn_and_leaves_is_forgotten(server: Served) -> None:
    streams = [server.ask(max_tokens=LONG, stream=True) for _ in range(2)]
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.5).chat.completions.create(**said())
    until(lambda: server.service.running.waiting == 0)
    for stream in streams:
        stream.close()


def test_waits_follow_from_how_long_answers_take() -> None:
    places = Places(Serve(slots=2, waiting=6, held_mb=1))
    with places.take(8):
        for _ in range(60):
            places.took(5.0)
        with pytest.raises(RefusedError) as caught, places.take():
            pass
        assert caught.value.wait_s == 10  # two are answered every 5 s: on average half of four rounds
    for _ in range(60):
        places.took(0.001)
    assert places.wait_s() == 1
    places.hold(2**20)
    with pytest.raises(RefusedError):
        places.hold(1)
    places.let_go(2**20)
    assert (places.taken, places.held) == (0, 0)


# ---------------------------------------------------------------- bytes and time


def test_bodies_that_are_too_large_are_refused_however_they_come(server: Served) -> None:
    large = json.dumps(said("a" * 200_000)).encode()
    announced = server.post(large)
    assert announced.status_code == 413 and "100000 bytes" in announced.json()["error"]["message"]
    streamed = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=(large[i : i + 5000] for i in range(0, len(large), 5000)),
        headers={"content-type": "application/json"},
    )
    assert streamed.status_code == 413


def test_a_sender_of_much_comes_to_read_why_it_was_refused(server: Served) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        server.ask("What is it?", image(b"a" * 5_000_000))
    assert caught.value.status_code == 413


@pytest.mark.parametrize("announced", [b"Content-Length: 500", b"Transfer-Encoding: chunked"])
def test_bodies_that_drip_in_are_given_up(server: Served, announced: bytes) -> None:
    with server.socket() as wire:
        wire.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + announced
        )
        wire.sendall(b"\r\n\r\n" + (b"1\r\n{\r\n" if b"chunked" in announced else b"{"))
        begun = time.monotonic()
        answer = wire.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408") and 0.5 < time.monotonic() - begun < 10
    until(server.is_empty)


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_drip_in_are_given_up(server: Served, before: bytes) -> None:
    with server.socket() as wire:
        if before:
            wire.sendall(before)
            answer = b""
            while b'"ok"' not in answer:
                answer += wire.recv(4096)
        begun = time.monotonic()
        try:
            for letter in b"GET /health HTTP/1.1\r\nHost: local" + b"l" * 200:
                wire.sendall(bytes([letter]))
                time.sleep(0.03)
            pytest.fail("it listened on")
        except OSError:
            pass
        assert 0.5 < time.monotonic() - begun < 5


def test_headers_that_are_too_long_are_refused(server: Served) -> None:
    with server.socket() as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000)
        assert wire.recv(4096).startswith(b"HTTP/1.1 4")


def test_answers_that_take_too_long_are_given_up(server: Served) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        server.client(max_retries=2).chat.completions.create(**said(max_tokens=LONG))  # and not asked for again
    assert caught.value.status_code == 504 and caught.value.code == "timeout"
    with pytest.raises(openai.APIError, match=r"took longer than 2\.5 s"):
        for _ in server.ask(max_tokens=LONG, stream=True):
            pass


def test_what_hangs_while_it_is_read_is_killed_and_the_next_is_read(server: Served) -> None:
    begun = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="took longer than 1 s to read"):
        server.ask("What is it?", at("https://slow.example.org/a.png"))
    assert time.monotonic() - begun < 10
    assert server.ask("What is it?", image(made("rgb.png"))).usage.completion_tokens == 8
    assert server.service.counts.lost["time"] == 1


def test_more_media_or_text_than_is_taken(chat: Chat) -> None:
    with served(chat, max_media=2, max_text=100) as server:
        with pytest.raises(openai.BadRequestError, match="3 media, and at most 2"):
            server.ask("What is it?", *[image(made("rgb.png"))] * 3)
        with pytest.raises(openai.BadRequestError, match="101 characters"):
            server.ask("a" * 101)
        assert server.ask("a" * 100)


# ---------------------------------------------------------------- mistakes of our own


def test_a_step_that_fails_costs_its_requests_and_says_nothing(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(chat) as server:
        step = Engine.step

        def failing(self: Engine) -> Any:
            raise RuntimeError("out of memory at /secret/place")

        for count in range(1, 4):
            monkeypatch.setattr(Engine, "step", failing)
            with pytest.raises(openai.InternalServerError) as caught:
                server.ask()
            assert "secret" not in str(caught.value) and caught.value.response.headers["x-should-retry"] == "false"
            with pytest.raises(openai.APIError):
                list(server.ask(stream=True))
            monkeypatch.setattr(Engine, "step", step)
            if count < 3:
                assert server.ask().usage.completion_tokens == 8
        monkeypatch.setattr(Engine, "step", failing)
        with pytest.raises(openai.InternalServerError):
            server.ask()
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "failing"})
        monkeypatch.setattr(Engine, "step", step)
        assert server.ask() and httpx.get(f"{server.url}/health").status_code == 200


def test_other_work_with_the_model_is_done_in_its_thread(server: Served) -> None:
    running = server.service.running
    loop = running._loop
    assert loop is not None
    stream = server.ask(max_tokens=200, stream=True)
    pieces = iter(stream)
    next(pieces)
    name = asyncio.run_coroutine_threadsafe(running.run(lambda: threading.current_thread().name), loop).result(10)
    assert name == "avlm-engine" and server.service.running.running == 1
    engine = server.service.engine
    asyncio.run_coroutine_threadsafe(running.run(lambda: [engine.step() for _ in range(5)]), loop).result(10)

    def fail() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        asyncio.run_coroutine_threadsafe(running.run(fail), loop).result(10)
    rest = list(pieces)
    assert rest[-1].choices[0].finish_reason == "length"
    text = "".join(c.choices[0].delta.content or "" for c in rest)
    assert text == server.ask(max_tokens=200).choices[0].message.content  # nothing of it was lost
    found = asyncio.run_coroutine_threadsafe(running.run(lambda: 7), loop).result(10)  # also while nobody asks
    assert found == 7


def test_counts_are_what_prometheus_reads() -> None:
    counts = Counts()
    counts.requests['/a"\\', 200] += 2
    counts.first_s.add(0.05)
    counts.first_s.add(1000)
    text = counts.text({"answers_running": 3})
    assert 'avlm_requests_total{path="/a\\"\\\\",status="200"} 2\n' in text
    assert "# TYPE avlm_first_token_seconds histogram\n" in text
    assert 'avlm_first_token_seconds_bucket{le="0.025"} 0\n' in text
    assert 'avlm_first_token_seconds_bucket{le="0.05"} 1\n' in text
    assert 'avlm_first_token_seconds_bucket{le="+Inf"} 2\n' in text
    assert "avlm_first_token_seconds_sum 1000.050000\navlm_first_token_seconds_count 2\n" in text
    assert "# TYPE avlm_answers_running gauge\navlm_answers_running 3\n" in text and text.endswith("\n")


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host": "0.0.0.0"}, "host=0.0.0.0 can be reached from other machines, and there is no key"),
        ({"host": "example.org"}, "there is no key"),
        ({"keys": ["a b c d e f g"]}, "holds what is no key"),
        ({"keys": ["short"]}, "holds what is no key"),
        ({"origins": ["example.org"]}, "is no origin"),
        ({"names": ["http://a"]}, "is no pattern for hosts"),
        ({"answer_tokens": 10, "max_tokens": 5}, "answer_tokens=10 is more than max_tokens=5"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, Any], words: str) -> None:
    from avlm.config.io import build

    with pytest.raises(ConfigError) as caught:
        build(Serve, given)
    assert words in str(caught.value)
    assert "a b c" not in str(caught.value) and "short" not in str(caught.value)


def test_settings_that_work() -> None:
    for host in ("localhost", "127.0.0.1", "127.3.4.5", "::1", "[::1]"):
        assert Serve(host=host).host == host
    assert Serve(host="0.0.0.0", anyone=True).anyone
    assert "sesame" not in repr(Serve(host="0.0.0.0", keys=("sesame-sesame",)))


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(server: Served) -> None:
    with pytest.raises(ConfigError, match=f"port={server.port} cannot be listened at"):
        check_address(Serve(port=server.port))
    check_address(Serve(port=0))
