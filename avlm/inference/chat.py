"""A conversation with a model: the few lines that most people need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avlm.convert.weights import load_model
from avlm.data.processor import AvlmProcessor, media_item
from avlm.data.text.templates import unmarked
from avlm.errors import ConfigError
from avlm.inference.engine import Engine, Request
from avlm.inference.sampling import Sampling
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import MediaItem, Sample, Text, Turn


def Image(value: Any) -> MediaItem:  # noqa: N802 - reads as the noun it returns
    """A picture: a path, bytes, a PIL picture, or uint8 [height, width, 3]."""
    return media_item("image", value)


def Audio(  # noqa: N802
    value: Any, sample_rate_hz: int | None = None, *, start_s: float = 0.0, end_s: float | None = None
) -> MediaItem:
    """A sound: a path, bytes, or a mono waveform with its rate (default 16,000 Hz); or the cut of it between two times.

    Raises:
        DataError: It is none of those, or there is nothing in the cut.
    """
    return media_item("audio", value, sample_rate_hz, start_s=start_s, end_s=end_s)


def Video(value: Any, *, start_s: float = 0.0, end_s: float | None = None) -> MediaItem:  # noqa: N802
    """A video with or without sound: a path or bytes; or the cut of it between two times.

    Raises:
        DataError: It is none of those, or there is nothing in the cut.
    """
    return media_item("video", value, start_s=start_s, end_s=end_s)


class Chat:
    """A model that answers. Remembers what was said until `clear`.

    Args:
        model, processor: As `load` gives them.
    """

    def __init__(self, model: AvlmForConditionalGeneration, processor: AvlmProcessor) -> None:
        self.model = model
        self.processor = processor
        self.engine = Engine(model, processor, slots=1)
        self.turns: list[Turn] = []

    def clear(self) -> None:
        """Forget the conversation."""
        self.turns = []

    def say(self, *parts: str | MediaItem, sampling: Sampling | None = None) -> Iterator[str]:
        """Add a turn and stream the answer as it is made; it is remembered when it is complete.

        Raises:
            ConfigError: Nothing was said.
            MediaError: A medium cannot be read; the conversation is as it was before.
        """
        if not parts:
            raise ConfigError("nothing was asked. Give a text, a picture, a sound or a video")
        turn = Turn("user", tuple(Text(p) if isinstance(p, str) else p for p in _media_first(parts)))
        request = self.engine.join(Sample("chat", (*self.turns, turn)), sampling or Sampling())
        return self._answer(turn, request)

    def _answer(self, turn: Turn, request: Request) -> Iterator[str]:
        try:
            while request.finish is None:
                self.engine.step()
                texts = [request.pieces.popleft().text for _ in range(len(request.pieces))]
                yield from (text for text in texts if text)
        finally:
            self.engine.leave(request)
        answer = unmarked(request.text.shown(), self.processor.tokenizer)
        self.turns += [turn, Turn("assistant", (Text(answer),))]

    def chat(self, *parts: str | MediaItem, sampling: Sampling | None = None) -> str:
        """Ask once, apart from any conversation, and get the whole answer."""
        kept, self.turns = self.turns, []
        try:
            return "".join(self.say(*parts, sampling=sampling)).strip()
        finally:
            self.turns = kept


def _media_first(parts: tuple[str | MediaItem, ...]) -> list[str | MediaItem]:
    """Media before the words, as models are trained, when the caller wrote the words first and media behind."""
    if parts and isinstance(parts[0], str) and not any(isinstance(p, str) for p in parts[1:]):
        return [*parts[1:], parts[0]]
    return list(parts)


def load(path: Path | str, *, device: str = "cpu") -> Chat:
    """Load a model directory and be ready to chat.

    Raises:
        ConfigError, WeightsError: It is not a whole model directory.
    """
    model, processor = load_model(path, device=device)
    return Chat(model, processor)
