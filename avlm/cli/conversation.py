"""The conversation of ``avlm chat``: a line is a turn, a path in it a medium, a word with a slash a command."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from avlm.cli.dragged import dragged, path_in
from avlm.errors import AvlmError, ConfigError

if TYPE_CHECKING:
    from avlm.inference.chat import Chat
    from avlm.inference.engine import Request
    from avlm.inference.sampling import Sampling
    from avlm.samples import MediaItem

NOUNS = {"image": "picture", "audio": "sound", "video": "video"}
COMMANDS = {
    "/image PATH": "adds a picture to the next question",
    "/audio PATH": "adds a sound",
    "/video PATH": "adds a video",
    "/clear": "forgets the conversation",
    "/save FILE": "adds the conversation to a file of rows (JSON lines), media by their paths",
    "/help": "says this",
    "/quit": "ends",
}
BEGIN = "Ask something. Drag files in, or write /image PATH, /audio PATH, /video PATH. /help says more, /quit ends."
HELP = "\n".join(
    [
        *(f"{name:<14}{what}" for name, what in COMMANDS.items()),
        "A path in a line, as it is when a file is dragged into the terminal, is a medium of its kind.",
        "Ctrl-C stops an answer; at the prompt, twice, it ends. So does Ctrl-D.",
    ]
)


def converse(chat: Chat, sampling: Sampling) -> None:
    """Talk with a model until the input ends."""
    _edit_lines()
    _tell(BEGIN)
    conversation = Conversation(chat, sampling)
    for line in _lines():
        try:
            if not conversation.take(line):
                return
        except AvlmError as error:
            _tell(f"{type(error).__name__}: {error}")


class Conversation:
    """What has been added to the next question, and what lines do."""

    def __init__(self, chat: Chat, sampling: Sampling) -> None:
        self.chat, self.sampling = chat, sampling
        self.media: list[MediaItem] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": lambda rest: self._add("image", rest),
            "/audio": lambda rest: self._add("audio", rest),
            "/video": lambda rest: self._add("video", rest),
            "/clear": lambda rest: self.clear(),
            "/save": self.save,
            "/help": lambda rest: _tell(HELP),
        }

    def take(self, line: str) -> bool:
        """Do what a line says.

        Returns:
            Whether the conversation goes on.

        Raises:
            AvlmError: It cannot be done; everything is as it was, but for media, which are let go.
        """
        found = dragged(line)
        command, _, rest = line.strip().partition(" ")
        if found.paths:
            for path in found.paths:
                self.add(path)
            if found.words:
                self.ask(found.words)
        elif command == "/quit":
            return False
        elif command in self._commands:
            self._commands[command](rest)
        elif command.startswith("/"):
            _tell(_unknown(command))
        elif found.words or self.media:
            self.ask(found.words)
        return True

    def add(self, path: Path, kind: str | None = None) -> None:
        """Add a file to the next question, and say what it was understood as.

        Raises:
            MediaError: It is not what its name says, or the model cannot see or hear it.
        """
        from avlm.data.given import media_item
        from avlm.data.readers.endings import kind_by

        item = media_item(kind or kind_by(path.name), path)
        _tell(understood(self.chat, item))
        self.media.append(item)

    def ask(self, words: str) -> None:
        """Ask with what was added, and show the answer as it comes.

        Raises:
            AvlmError: It cannot be asked.
        """
        parts, self.media = [*self.media, *([words] if words else [])], []
        times = say(self.chat, parts, self.sampling, stoppable=True)
        if self.chat.request is not None and sys.stderr.isatty():
            _tell(took(self.chat.request, times))

    def clear(self) -> None:
        """Forget what was said and added."""
        self.chat.clear()
        self.media = []

    def save(self, rest: str) -> None:
        """Add the conversation to a file of rows.

        Raises:
            ConfigError: No file is named, nothing was said, or the file cannot be written.
        """
        from avlm.cli.shared import writing
        from avlm.data.writers import as_row
        from avlm.samples import Sample

        if not rest.strip():
            raise ConfigError("/save names no file, so there is nowhere to write. Write /save FILE.jsonl")
        if not self.chat.turns:
            raise ConfigError("nothing has been said yet, so there is nothing to save. Ask something first")
        path = path_in(rest)
        sample = Sample(f"chat-{datetime.now():%Y%m%d-%H%M%S-%f}", tuple(self.chat.turns))
        row = as_row(sample, "", lambda item: _beside(item, path))
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        _tell(f"{len(self.chat.turns)} turns were added to {path} as a row")

    def _add(self, kind: str, rest: str) -> None:
        if not rest.strip():
            raise ConfigError(f"/{kind} names no file, so there is nothing to add. Write /{kind} PATH")
        path = path_in(rest)
        if path.is_file():
            self.add(path, kind)
        else:
            _tell(f"{path}: there is no such file. Check the path")


class Times(NamedTuple):
    """When an answer came, in seconds since it was asked for; both 0 where none did."""

    first_s: float = 0.0
    last_s: float = 0.0


def say(chat: Chat, parts: list[Any], sampling: Sampling, *, stoppable: bool = False) -> Times:
    """Ask, and print the answer as it comes.

    Args:
        stoppable: Whether Ctrl-C ends the answer and not the program.

    Returns:
        When its first and its last words came.

    Raises:
        AvlmError: It cannot be asked.
    """
    for part in parts:
        if isinstance(part, str) and any("\ud800" <= letter <= "\udfff" for letter in part):
            raise ConfigError("the question is not text in UTF-8, so it has no tokens. Write it in UTF-8")
    begin = time.perf_counter()
    times = Times()
    pieces = chat.say(*parts, sampling=sampling)
    with _stopping() if stoppable else _never() as stopped:
        begun = False
        for piece in pieces:
            now = time.perf_counter() - begin
            times = Times(times.first_s or now, now)
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            print(piece, end="", flush=True)
            if stopped():
                pieces.close()  # type: ignore[attr-defined]  # it is a generator, which gives its place back
                break
    print()
    if stopped():
        _tell("stopped; the model will not remember this question")
    return times


def understood(chat: Chat, item: MediaItem) -> str:
    """What a medium is to the model: its kind, size or length, and tokens; from its header, nothing is decoded.

    Raises:
        MediaError: It is not what its name says, or the model cannot see or hear it.
    """
    from avlm.layout import AudioFacts, ImageFacts
    from avlm.samples import Sample, Turn

    sample = Sample("added", (Turn("user", (item,)),))
    (facts,) = chat.processor.measure(sample)
    laid = chat.processor.lay_out(sample, [facts], prompt_only=True)
    tokens = sum(segment.count for place in laid.places for segment in place.segments)
    if isinstance(facts, ImageFacts):
        size = f"{facts.size_px[1]} x {facts.size_px[0]}"
    elif isinstance(facts, AudioFacts):
        spec = chat.processor.media_spec().audio
        size = f"{facts.num_samples / spec.sample_rate_hz:.1f} s" if spec else ""
    else:
        size = f"{facts.duration_s:.1f} s" + (", with sound" if facts.num_samples else "")
    return f"{NOUNS[item.kind]} {item.name()}: {size}, {tokens} tokens"


def took(request: Request, times: Times) -> str:
    """What an answer took: tokens read, by medium, and written, and how fast behind the first one."""
    media = [f"{NOUNS[kind]} {count}" for kind, count in request.media_tokens.items() if count]
    kept = [f"remembered {request.kept_tokens}"] if request.kept_tokens else []
    read = f"read {request.prompt_tokens} tokens" + (f" ({', '.join([*media, *kept])})" if media or kept else "")
    behind, seconds = request.answer_tokens - 1, times.last_s - times.first_s
    pace = f", {behind / seconds:.1f} tokens/s" if behind > 0 and seconds > 0 else ""
    first = f", the first after {times.first_s:.2f} s" if times.first_s else ""
    return f"{read}, wrote {request.answer_tokens}{pace}{first}"


def _unknown(command: str) -> str:
    if "/" in command[1:]:
        return f"{command}: there is no such file whose name says that it is a picture, a sound or a video. Check it"
    names = [name.split()[0] for name in COMMANDS]
    return f"{command} is not a command. There are {', '.join(names[:-1])} and {names[-1]}"


def _beside(item: MediaItem, path: Path) -> str:
    """The path of a medium in a row: relative to the row's file where it lies below it, as rows have them."""
    assert item.path is not None, "media of a terminal are files"
    own, folder = item.path.resolve(), path.resolve().parent
    return str(own.relative_to(folder)) if own.is_relative_to(folder) else str(own)


# ---------------------------------------------------------------- the terminal


def _lines() -> Iterator[str]:
    """What is typed. Ctrl-C takes back a line, and twice in a row ends; so does the end of the input."""
    interrupted = False
    while True:
        try:
            yield input("> ")
            interrupted = False
        except EOFError:
            return
        except UnicodeDecodeError:
            _tell("that line is not text in UTF-8. Write it again")
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            interrupted = True
            _tell("Ctrl-C again, or /quit, ends")


def _edit_lines() -> None:
    """Arrow keys change the line and bring back earlier ones, where the terminal can do it."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            import readline  # noqa: F401  # by being there it takes over what `input` reads
        except ImportError:
            return


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is remembered and not raised, so that a step of the model is never left half done; a second one is."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def press(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _never() -> Iterator[Callable[[], bool]]:
    yield lambda: False


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
