"""Questions in the forms that evaluation harnesses have: answered, or an answer scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage

from avlm.data.given import media_item
from avlm.errors import DataError
from avlm.inference.chat import Chat, load
from avlm.inference.engine import Engine
from avlm.inference.likelihood import answer_likelihood
from avlm.inference.sampling import Sampling
from avlm.samples import MediaItem, MediaKind, Role, Sample, Text, Turn

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".opus")


class Asker:
    """A model that answers questions of a harness, several at once.

    Args:
        pretrained: A model directory, or a model that is loaded.
        slots: How many answers there are at once.
    """

    def __init__(self, pretrained: str | Chat, *, device: str = "cpu", slots: int = 8) -> None:
        chat = pretrained if isinstance(pretrained, Chat) else load(pretrained, device=device)
        self.model, self.processor = chat.model, chat.processor
        self.engine = Engine(chat.model, chat.processor, slots=slots)

    def answers(self, samples: Sequence[Sample], samplings: Sequence[Sampling]) -> list[str]:
        """The answers in the order of the questions; they are made side by side.

        Raises:
            ConfigError, DataError: One of them cannot be asked.
        """
        requests = [self.engine.join(s, how) for s, how in zip(samples, samplings, strict=True)]
        while self.engine.busy:
            self.engine.step()
        return ["".join(piece.text for piece in request.pieces).strip() for request in requests]

    def loss(self, sample: Sample, continuation: str) -> tuple[float, bool]:
        """How unlikely an answer is.

        Returns:
            The mean cross-entropy of its tokens, without the end; and whether each is the likeliest one.
        """
        likely, greedy, _ = answer_likelihood(self.model, self.processor, sample, continuation)
        return (-float(likely.mean()) if len(likely) else 0.0), greedy


def question(text: str, media: Sequence[Any]) -> Sample:
    """One question with its media in front of it, as models are trained."""
    return Sample("question", (Turn("user", (*map(medium, media), Text(text))),))


def conversation(messages: Sequence[Mapping[str, Any]]) -> Sample:
    """A conversation of typed parts, each medium under ``url``: a path, a Pillow picture, or an array.

    Raises:
        DataError: A message is not understood.
    """
    turns = []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        role = ROLES.get(str(message.get("role")))
        if role is None or not isinstance(parts, Sequence):
            raise DataError(
                f"a message has the role {message.get('role')!r} and is not understood. Give role and content"
            )
        turns.append(Turn(role, tuple(_part(part) for part in parts)))
    return Sample("conversation", tuple(turns))


def _part(part: Mapping[str, Any]) -> Text | MediaItem:
    kind = part.get("type")
    if kind == "text":
        return Text(str(part.get("text", "")))
    if kind not in ("image", "audio", "video"):
        raise DataError(f"a part has the type {kind!r}. There are text, image, audio and video")
    times = {"start_s": part.get("start_time") or 0.0, "end_s": part.get("end_time")} if kind == "video" else {}
    return _item(kind, part.get("url"), **times)


def medium(value: Any) -> MediaItem:
    """A medium whose kind is seen from what it is: a Pillow picture, an array with its rate, or a path."""
    if isinstance(value, PILImage.Image):
        return _item("image", value)
    if isinstance(value, Mapping):
        return _item("audio", value)
    if isinstance(value, str):
        return _item("audio" if value.lower().endswith(SOUNDS) else "video", value)
    raise DataError(f"a medium was given as {type(value).__name__}. Give a Pillow picture, a sound's array, or a path")


def _item(kind: MediaKind, value: Any, **times: Any) -> MediaItem:
    """Sounds of Hugging Face datasets are an array with its rate."""
    if isinstance(value, Mapping) and "array" in value:
        return media_item(kind, value["array"], value.get("sampling_rate"))
    return media_item(kind, value, **times)


def sampling_of(given: Mapping[str, Any], max_tokens: int = 1024) -> Sampling:
    """A harness's generation settings as ours. What is not drawn at random is greedy, whatever its temperature."""
    draws = bool(given.get("do_sample", (given.get("temperature") or 0) > 0))
    until = given.get("until") or ()
    return Sampling(
        max_tokens=int(given.get("max_new_tokens") or max_tokens),
        temperature=float(given.get("temperature") or 0) if draws else 0.0,
        top_k=int(given.get("top_k") or 0) if draws else 0,
        top_p=float(given.get("top_p") or 1.0) if draws else 1.0,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )
