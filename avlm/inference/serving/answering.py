"""Answers as OpenAI writes them: objects, and the events of a stream.

Source:
    OpenAI's API reference, "The chat completion object", "The chat completion chunk object", "Create transcription".
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avlm.inference.answers import Piece, TokenLogprob
from avlm.inference.serving.refusing import encoded

DONE = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + encoded(value) + b"\n\n"


@dataclass(slots=True)
class Usage:
    """What a request took, in tokens."""

    prompt: int = 0
    answer: int = 0
    """Of all answers."""
    kept: int = 0
    """Of the prompt, those that were remembered."""
    media: Mapping[str, int] = field(default_factory=dict)
    """Of the prompt, by kind."""

    def written(self) -> dict[str, Any]:
        media = {f"{kind}_tokens": self.media.get(kind, 0) for kind in ("image", "audio", "video")}
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.kept, **media},
        }

    def heard(self) -> dict[str, Any]:
        """As a transcript has it."""
        audio = self.media.get("audio", 0)
        return {
            "type": "tokens",
            "input_tokens": self.prompt,
            "input_token_details": {"text_tokens": self.prompt - audio, "audio_tokens": audio},
            "output_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
        }


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None

    def add(self, pieces: Sequence[Piece]) -> tuple[str, list[TokenLogprob]]:
        """Take what came; returns what of it is new to the reader. The space that many tokenizers begin with is not."""
        text = "".join(piece.text for piece in pieces)
        text = text if self.text else text.lstrip()
        about = [logprob for piece in pieces for logprob in piece.logprobs]
        self.text += text
        self.logprobs += about
        self.tokens += sum(len(piece.tokens) for piece in pieces)
        return text, about


class Completion:
    """What all objects of one chat completion have in common.

    Args:
        model: Its name.
        logprobs: Whether they were asked for.
    """

    def __init__(self, model: str, logprobs: bool, usage: bool) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._logprobs, self._usage = logprobs, usage

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """All answers at once."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._told(choice.logprobs),
                    "finish_reason": choice.finish,
                }
                for number, choice in enumerate(choices)
            ],
            "usage": usage.written(),
        }

    def begin(self, number: int) -> dict[str, Any]:
        """The first event of an answer."""
        return self._chunk(number, {"role": "assistant", "content": "", "refusal": None}, [], None)

    def more(self, number: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Some of an answer."""
        return self._chunk(number, {"content": text}, logprobs, None)

    def end(self, number: int, finish: str | None) -> dict[str, Any]:
        """The last event of an answer."""
        return self._chunk(number, {}, [], finish)

    def used(self, usage: Usage) -> dict[str, Any]:
        """The last event of all."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.written()}

    def _chunk(
        self, number: int, delta: dict[str, Any], logprobs: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        told = self._told(logprobs) if logprobs else None
        choice = {"index": number, "delta": delta, "logprobs": told, "finish_reason": finish}
        none = {"usage": None} if self._usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **none}

    def _told(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [_token(one) for one in logprobs], "refusal": None}


def _token(one: TokenLogprob) -> dict[str, Any]:
    top = [{"token": text, "bytes": list(data), "logprob": value} for text, data, value in one.top]
    return {"token": one.token, "bytes": list(one.bytes), "logprob": one.logprob, "top_logprobs": top}


def transcript(text: str, form: str, language: str | None, seconds: float, usage: Usage) -> dict[str, Any]:
    """A transcript; the longer form of it without times, which the model does not tell.

    Args:
        language: As the sender said; "und" is ISO 639's word for one that was not.
        seconds: Length of the recording.
    """
    if form == "verbose_json":
        about = {"task": "transcribe", "language": language or "und", "duration": round(seconds, 3)}
        return {**about, "text": text, "segments": None, "words": None, "usage": usage.heard()}
    return {"text": text, "usage": usage.heard()}
