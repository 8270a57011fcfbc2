"""The conversation in the terminal: what lines do, what is said of media, what is saved, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from avlm.cli.conversation import COMMANDS, Times, converse, say, took
from avlm.convert.compose import Composed
from avlm.convert.weights import save_model
from avlm.data.sources import JsonLines
from avlm.inference.chat import Audio, Chat, Image
from avlm.inference.sampling import Sampling


@pytest.fixture
def chat(small_model: Composed, rows: Callable[..., Path], tmp_path: Path) -> Chat:
    if not (tmp_path / "p0.png").exists():
        rows()
    return Chat(small_model.model, small_model.processor)


@pytest.fixture
def talk(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[str], list[str]]]:
    """Say lines; what was answered to each, and what was told besides."""

    def run(*lines: str, max_tokens: int = 5) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        converse(chat, Sampling(max_tokens=max_tokens))
        out, err = capsys.readouterr()
        answers = out.split("> ")
        assert answers[0] == "" and len(answers) == len(lines) + 2
        return [answer.strip() for answer in answers[1:-1]], err.splitlines()[1:]

    return run


def test_a_dragged_file_is_the_medium_that_its_name_says(talk: Callable[..., Any], chat: Chat, tmp_path: Path) -> None:
    picture, sound = tmp_path / "p0.png", tmp_path / "s0.wav"
    expected = chat.chat(Image(picture), Audio(sound), "What is this?", sampling=Sampling(max_tokens=5))
    answers, told = talk(shlex.quote(str(picture)), f"{sound} What is this?")
    assert answers == ["", expected.strip()]
    prompt = chat.processor.encode(chat_sample(chat), prompt_only=True)
    counts = [sum(segment.count for segment in place.segments) for place in prompt.places]
    assert told == [f"picture {picture}: 40 x 30, {counts[0]} tokens", f"sound {sound}: 0.2 s, {counts[1]} tokens"]
    assert chat.request is not None
    assert (chat.request.prompt_tokens, chat.request.media_tokens["image"]) == (len(prompt), counts[0])


def chat_sample(chat: Chat) -> Any:
    from avlm.samples import Sample

    return Sample("said", tuple(chat.turns[:-1]))


def test_a_file_that_is_none_is_refused_at_once(talk: Callable[..., Any], chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG not really")
    _, told = talk(str(tmp_path / "torn.png"), "/nowhere/at all.png", "/image", "hello", "/help")
    assert len(told) == 3 + len(COMMANDS) + 2
    assert told[0].startswith("MediaError: ") and "torn.png" in told[0]
    assert told[1].startswith("/nowhere/at: there is no such file")
    assert told[2] == "ConfigError: /image names no file, so there is nothing to add. Write /image PATH"
    assert [len(turn.parts) for turn in chat.turns] == [1, 1]
    assert [line.split("  ")[0] for line in told[3:-2]] == list(COMMANDS)


def test_what_is_saved_is_read_again(talk: Callable[..., Any], chat: Chat, tmp_path: Path) -> None:
    own = tmp_path / "deep" / "er"
    own.mkdir(parents=True)
    (own / "a b.png").write_bytes((tmp_path / "p0.png").read_bytes())
    lines = ["/save no.jsonl", f"'{own / 'a b.png'}' What?", f"/save {own / 'talk.jsonl'}"]
    _, told = talk(*lines, "And?", f"/save '{own / 'talk.jsonl'}'", "/save", f"/save {own}")
    assert told[0].startswith("ConfigError: nothing has been said yet")
    assert told[2].startswith("2 turns were added to ") and told[3].startswith("4 turns were added to ")
    assert told[4].startswith("ConfigError: /save names no file")
    assert re.search(r"cannot be written \(Is a directory\)", told[5])
    first, second = (json.loads(line) for line in (own / "talk.jsonl").read_text().splitlines())
    assert first["messages"] == second["messages"][:2] and first["id"] != second["id"]
    assert first["messages"][0]["content"][0] == {"type": "image", "path": "a b.png"}
    source = JsonLines(own / "talk.jsonl")
    assert source[1].turns == tuple(chat.turns)
    _, told = talk(f"/save {tmp_path / 'deep' / 'other' / 'talk.jsonl'}")
    assert "cannot be written" in told[0]


class Stopped:
    """A chat that is interrupted in the middle of its answer."""

    turns: tuple[()] = ()
    request = None

    def __init__(self, presses: int) -> None:
        self.presses, self.closed = presses, False

    def say(self, *parts: Any, sampling: Any) -> Iterator[str]:
        try:
            for i in range(9):
                if i == 3:
                    for _ in range(self.presses):
                        signal.raise_signal(signal.SIGINT)
                yield f" {i}"
        finally:
            self.closed = True


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    chat = Stopped(1)
    times = say(chat, ["hello"], Sampling(), stoppable=True)  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "0 1 2 3\n" and "stopped" in err and chat.closed
    assert 0 < times.first_s <= times.last_s
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):  # a second one, for a step that takes too long
        say(Stopped(2), ["hello"], Sampling(), stoppable=True)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        say(Stopped(1), ["hello"], Sampling())  # type: ignore[arg-type]


def test_ctrl_c_takes_back_a_line_and_twice_in_a_row_ends(
    chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[str | None] = [None, "hello", None, "/help", None, None, "never typed"]

    def line(prompt: str) -> str:
        words = typed.pop(0)
        if words is None:
            raise KeyboardInterrupt
        return words

    monkeypatch.setattr("builtins.input", line)
    converse(chat, Sampling(max_tokens=5))
    assert typed == ["never typed"]
    assert [part.text for turn in chat.turns[::2] for part in turn.parts] == ["hello"]  # type: ignore[union-attr]
    assert capsys.readouterr().err.count("Ctrl-C again, or /quit, ends") == 3


def test_an_answer_that_was_stopped_was_never_given(chat: Chat) -> None:
    wanted = chat.chat("hello", sampling=Sampling(max_tokens=20))
    pieces = chat.say("hello", sampling=Sampling(max_tokens=20))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.turns == [] and chat.engine.free == 1
    assert chat.chat("hello", sampling=Sampling(max_tokens=20)) == wanted


def test_figures_are_counted_behind_the_first_token() -> None:
    class Asked:
        prompt_tokens, media_tokens, kept_tokens, answer_tokens = 30, {"image": 4, "audio": 0}, 7, 11

    assert took(Asked(), Times(0.5, 2.5)) == (  # type: ignore[arg-type]
        "read 30 tokens (picture 4, remembered 7), wrote 11, 5.0 tokens/s, the first after 0.50 s"
    )
    assert took(Asked(), Times()) == "read 30 tokens (picture 4, remembered 7), wrote 11"  # type: ignore[arg-type]


# ---------------------------------------------------------------- a real terminal


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.own, other = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, start_new_session=True, preexec_fn=self._lead
        )
        os.close(other)
        self.seen = ""

    @staticmethod
    def _lead() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt; in the instant before Python waits for keys, it would be seen with the next one."""
        time.sleep(0.3)
        self.type("\x03")

    def until(self, pattern: str, seconds: float = 90) -> str:
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, self.seen
            if select.select([self.own], [], [], 0.1)[0]:
                self.seen += os.read(self.own, 65536).decode(errors="replace")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before


@pytest.mark.slow
def test_in_a_terminal(small_model: Composed, rows: Callable[..., Path], tmp_path: Path) -> None:
    if not (tmp_path / "p0.png").exists():
        rows()
    save_model(small_model.model, small_model.processor, tmp_path / "model")
    terminal = Terminal(sys.executable, "-m", "avlm", "chat", str(tmp_path / "model"), "--max-tokens", "4000")
    terminal.until("> ")
    terminal.type(f"{tmp_path / 'p0.png'} \r")
    terminal.until("picture .*p0.png: 40 x 30, 4 tokens.*> ")
    terminal.type("What is this?\r")
    terminal.until(r"this\?\s+\S")  # the answer has begun
    terminal.type("\x03")
    terminal.until("stopped; the model will not remember this question")
    terminal.until(r"read \d+ tokens \(picture 4\), wrote \d+.*, the first after .* s.*> ")
    terminal.type("\x1b[A")  # the line before comes back
    terminal.until("What is this")
    terminal.type("\x15/quit\r")  # the line is taken back
    assert terminal.process.wait(20) == 0


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_of_a_terminal(small_model: Composed, tmp_path: Path) -> None:
    save_model(small_model.model, small_model.processor, tmp_path / "model")
    terminal = Terminal(sys.executable, "-m", "avlm", "chat", str(tmp_path / "model"))
    terminal.until("> ")
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt()
    terminal.until("Ctrl-C again, or /quit, ends.*> ")
    terminal.type("/clear\r")  # something else in between: it takes two again
    terminal.until("/clear.*> ")
    terminal.interrupt()
    terminal.until("Ctrl-C again, or /quit, ends.*> ")
    terminal.interrupt()
    assert terminal.process.wait(20) == 0
