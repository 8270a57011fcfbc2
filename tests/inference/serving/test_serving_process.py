"""`avlm serve` as a process: what it says, that it answers as `avlm chat`, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from media_files import made
from served import audio, image, until

from avlm import cli
from avlm.convert.weights import save_model
from avlm.inference.chat import Chat


@pytest.fixture(scope="module")
def model(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    save_model(chat.model, chat.processor, folder)
    return folder


@contextmanager
def process(model: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, the line that it says, and the URL in it."""
    command = [sys.executable, "-m", "avlm", "serve", str(model), "--port", "0", *arguments]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        assert found, (line, started.communicate(timeout=20))
        yield started, line, found[0]
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()


def children(process: int) -> list[int]:
    """Processes that a process has, and theirs."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    own = [int(one) for one in found.stdout.split()]
    return own + [inner for one in own for inner in children(one)]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_it_answers_as_the_command_line_does_and_ends_when_all_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(made("rgb.png"))
    (tmp_path / "a.wav").write_bytes(made("16.wav"))
    arguments = ["--image", tmp_path / "a.png", "--audio", tmp_path / "a.wav", "--max-tokens", "12", "What is it?"]
    monkeypatch.setattr(sys, "argv", ["avlm", "chat", str(model), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    expected = capsys.readouterr().out.rstrip("\n")
    with process(model) as (started, line, url):
        assert line == f"model is served at {url}/v1\n" and url.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        content: list[Any] = [image(made("rgb.png")), audio(made("16.wav")), {"type": "text", "text": "What is it?"}]
        ask: Callable[..., Any] = client.chat.completions.create
        messages = [{"role": "user", "content": content}]
        assert ask(model="model", messages=messages, max_tokens=12).choices[0].message.content == expected

        workers = children(started.pid)
        assert len(workers) == 3  # two, and who looks after them
        stream = ask(model=str(model), messages=messages, max_tokens=150, stream=True)
        first = next(iter(stream))
        started.send_signal(signal.SIGTERM)
        until(lambda: not can_connect(url))
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and rest[-1].id == first.id
        client.close()
        assert started.wait(20) == 0
        assert started.stderr is not None and started.stderr.read() == ""
        until(lambda: not any(map(is_alive, workers)))


def can_connect(url: str) -> bool:
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_who_does_not_finish_in_time_is_cut_off(model: Path) -> None:
    with process(model, "--name", "tiny", "stop_s=0", "workers=1", AVLM_KEY="sesame-sesame") as (started, line, url):
        assert line.startswith("tiny is served at ") and "sesame" not in line
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame-sesame", max_retries=0)
        messages: Any = [{"role": "user", "content": "What is it?"}]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sesame-sesam2").models.list()
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3900, stream=True)
        next(iter(stream))
        started.send_signal(signal.SIGINT)
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(stream)
        assert started.wait(20) == 0


def test_wrong_settings_are_told_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (["--host", "0.0.0.0"], "there is no key"),
        (["--key", "a b"], "is no key"),
        (["slotss=3"], "slots"),
        (["--allow", "http://a"], "is no pattern for hosts"),
    ):
        monkeypatch.setattr(sys, "argv", ["avlm", "serve", "/nowhere", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        error = capsys.readouterr().err
        assert ended.value.code == 2 and words in error and "a b" not in error, error
