"""A conversation with a model: the few lines that most people need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from avlm.convert.weights import load_model
from avlm.data.given import media_item
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import unmarked
from avlm.errors import ConfigError
from avlm.inference.engine import Engine, Request
from avlm.inference.quantize import Quant, check_quant, quantize
from avlm.inference.sampling import Sampling
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import MediaItem, Sample, Text, Turn

T = TypeVar("T")


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
        self.request: Request | None = None
        """The last one that was made: what it read and wrote."""

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
        turn = Turn("user", tuple(Text(p) if isinstance(p, str) else p for p in media_first(parts)))
        request = self.engine.join(Sample("chat", (*self.turns, turn)), sampling or Sampling())
        self.request = request
        return self._answer(turn, request)

    def _answer(self, turn: Turn, request: Request) -> Iterator[str]:
        texts: list[str] = []
        try:
            while request.finish is None:
                self.engine.step()
                while request.pieces:
                    texts.append(request.pieces.popleft().text)
                    if texts[-1]:
                        yield texts[-1]
        finally:
            self.engine.leave(request)
        answer = unmarked("".join(texts), self.processor.tokenizer)
        self.turns += [turn, Turn("assistant", (Text(answer),))]

    def chat(self, *parts: str | MediaItem, sampling: Sampling | None = None) -> str:
        """Ask once, apart from any conversation, and get the whole answer."""
        kept, self.turns = self.turns, []
        try:
            return "".join(self.say(*parts, sampling=sampling)).strip()
        finally:
            self.turns = kept


def media_first(parts: Sequence[T]) -> list[T]:
    """Media before the words, as models are trained, when the caller wrote the words first and media behind."""
    words = [isinstance(part, (str, Text)) for part in parts]
    return [*parts[1:], parts[0]] if words and words[0] and not any(words[1:]) else list(parts)


def load(path: Path | str, *, device: str = "cpu", quant: Quant = "none") -> Chat:
    """Load a model directory and be ready to chat.

    Args:
        quant: How the language model's weights are kept; see `quantize`.

    Raises:
        ConfigError, WeightsError: It is not a whole model directory.
        MissingExtraError: torchao is needed and not installed.
    """
    check_quant(quant)
    model, processor = load_model(path, device=device)
    quantize(model, quant)
    return Chat(model, processor)
