"""The transformers processor: what turns conversations and media into model inputs.

`AutoProcessor.from_pretrained` gives one from a model directory. Everything goes
through `encode`, training, evaluation and chat alike, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from avlm.config.media import MediaSpec
from avlm.config.run import Augment
from avlm.data.encode import Supervise, Tokens, encode, pad
from avlm.data.media import MediaReader, Prepared
from avlm.data.sources import parse_row
from avlm.data.text import PLACEHOLDERS, chat_template, without_media
from avlm.errors import ConfigError, DataError
from avlm.samples import Clip, Encoded, MediaItem, Picture, Sample, Sound, Text, Turn


class _Tools:
    """What a processor works with and never saves; a copy of a processor shares it."""

    def __init__(self) -> None:
        self.reader: MediaReader | None = None
        self.tokens: Tokens | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tools:
        return self


class AvlmProcessor(ProcessorMixin):
    """Tokenizer, template and media settings of one model.

    Args:
        tokenizer: With the placeholder tokens <image>, <audio> and <video>.
        media: A `MediaSpec` as plain data, the same as in the model's configuration.
        chat_template: A Jinja template; default: the tokenizer's own.

    Raises:
        ConfigError: The tokenizer lacks the placeholder tokens.
    """

    tokenizer_class = "AutoTokenizer"
    model_input_names = [
        "input_ids",
        "attention_mask",
        "pixel_values",
        "pixel_values_videos",
        "input_features",
        "input_features_mask",
    ]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        media: dict[str, Any] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        missing = [t for t in PLACEHOLDERS.values() if t not in tokenizer.get_vocab()]
        if missing:
            raise ConfigError(
                f"the tokenizer has no token {', '.join(missing)}, so media have no place in the text. "
                "Add them with `avlm compose`, which also gives them embeddings"
            )
        self.media = MediaSpec.model_validate(media or {}).model_dump(mode="json")
        super().__init__(tokenizer, chat_template=chat_template)
        self._tools = _Tools()

    def media_spec(self) -> MediaSpec:
        """What the model sees and hears, typed."""
        return MediaSpec.model_validate(self.media)

    def reader(self) -> MediaReader:
        """The reader that `encode` uses; replace it with `use_reader`."""
        if self._tools.reader is None:
            self._tools.reader = MediaReader(self.media_spec())
        return self._tools.reader

    def use_reader(self, reader: MediaReader) -> None:
        """Read media through another reader, one with a cache, say."""
        self._tools.reader = reader

    def tokens(self) -> Tokens:
        """Tokenizer and template together.

        Raises:
            ConfigError: There is no chat template.
        """
        if self._tools.tokens is None:
            self._tools.tokens = Tokens(self.tokenizer, chat_template(self.tokenizer, self.chat_template))
        return self._tools.tokens

    def prepare(self, sample: Sample) -> list[Prepared]:
        """Decode and prepare a sample's media.

        Raises:
            MediaError: One of them cannot be read; the message says which.
        """
        found = []
        for item in sample.media():
            try:
                found.append(self.reader().prepare(item))
            except DataError as error:
                raise type(error)(error.reason, where=sample.where, sample_id=sample.id) from error
        return found

    def encode(
        self,
        sample: Sample,
        *,
        supervise: Supervise = "answers",
        prompt_only: bool = False,
        text_only: bool = False,
        augment: tuple[Augment, np.random.Generator] | None = None,
        prepared: Sequence[Prepared] | None = None,
    ) -> Encoded:
        """Write a sample down for the model; see `avlm.data.encode.encode`.

        Args:
            text_only: Leave the media out.
            prepared: Media already prepared, instead of the sample's own.
        """
        if text_only:
            sample, prepared = without_media(sample), []
        if prepared is None:
            prepared = self.prepare(sample)
        return encode(
            sample,
            self.tokens(),
            self.media_spec(),
            prepared,
            supervise=supervise,
            prompt_only=prompt_only,
            augment=augment,
        )

    def collate(self, samples: Sequence[Encoded], side: str = "left") -> BatchFeature:
        """A padded batch of model inputs (with labels)."""
        pad_id = self.tokenizer.pad_token_id
        return BatchFeature(pad(samples, 0 if pad_id is None else pad_id, "left" if side == "left" else "right"))

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As transformers' processors do it, for one conversation or a list of them.

        Args:
            conversation: Messages whose content is a text or a list of typed parts; media by path (``path``, ``url`` or
                the kind's own name) or as arrays.
            chat_template: Another template for this call.
            kwargs: ``tokenize=True`` with ``return_dict=True`` gives model inputs; ``add_generation_prompt``.
        """
        if chat_template is not None:
            other = AvlmProcessor(self.tokenizer, media=self.media, chat_template=chat_template)
            return other.apply_chat_template(conversation, **kwargs)
        single = bool(conversation) and isinstance(conversation[0], dict)
        samples = [conversation_sample(c) for c in ([conversation] if single else conversation)]
        if not kwargs.get("tokenize", False):
            texts = [self._rendered(s, kwargs.get("add_generation_prompt", False)) for s in samples]
            return texts[0] if single else texts
        prompt = bool(kwargs.get("add_generation_prompt", False)) or all(
            s.turns[-1].role != "assistant" for s in samples
        )
        batch = self.collate([self.encode(s, prompt_only=prompt) for s in samples])
        batch.pop("labels")
        return batch if kwargs.get("return_dict", False) else batch["input_ids"]

    def _rendered(self, sample: Sample, prompt: bool) -> str:
        """The text with one placeholder for each media item."""
        messages = []
        for turn in sample.turns:
            words = [p.text if isinstance(p, Text) else PLACEHOLDERS[p.kind] for p in turn.parts]
            messages.append({"role": turn.role, "content": "".join(words)})
        template = self.tokens().template
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
        )

    def __call__(
        self, text: Any = None, images: Any = None, audio: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Inputs for one question: a text with any media before it. For conversations use `apply_chat_template`."""
        parts: list[Text | MediaItem] = []
        for kind, given in (("image", images), ("audio", audio), ("video", videos)):
            for value in [] if given is None else given if isinstance(given, (list, tuple)) else [given]:
                parts.append(media_item(kind, value, kwargs.get("sampling_rate")))
        if text:
            parts.append(Text(text if isinstance(text, str) else " ".join(text)))
        batch = self.collate([self.encode(Sample("0", (Turn("user", tuple(parts)),)), prompt_only=True)])
        batch.pop("labels")
        return batch


def conversation_sample(messages: Sequence[dict[str, Any]]) -> Sample:
    """A conversation in the messages form, media by path or as arrays, as a sample."""
    turns = []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        found: list[Text | MediaItem] = []
        for part in parts:
            kind = part.get("type")
            given = part.get("path", part.get("url", part.get(str(kind))))
            if kind in PLACEHOLDERS and given is not None:
                found.append(media_item(kind, given, part.get("sampling_rate")))
            else:
                found += parse_row({"messages": [{"role": "user", "content": [part]}]}, Path()).turns[0].parts
        turns.append(Turn(message["role"], tuple(found)))
    return Sample("0", tuple(turns))


def media_item(kind: Any, value: Any, rate_hz: int | None = None) -> MediaItem:
    """One medium from whatever the caller has: a path, bytes, a PIL picture, an array.

    Raises:
        DataError: None of those.
    """
    if isinstance(value, MediaItem):
        return value
    if isinstance(value, (str, Path)):
        if str(value).startswith(("http://", "https://", "s3://")):
            raise DataError(f"{value}: is not fetched, because nobody allowed it. Download the file and give its path")
        return MediaItem(kind, path=Path(value))
    if isinstance(value, (bytes, bytearray)):
        return MediaItem(kind, data=bytes(value))
    if isinstance(value, (Picture, Sound, Clip)):
        return MediaItem(kind, decoded=value)
    if kind == "image":
        pixels = np.asarray(value.convert("RGB") if hasattr(value, "convert") else value)
        if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
            return MediaItem(kind, decoded=Picture(pixels))
    if kind == "audio" and np.asarray(value).ndim == 1:
        return MediaItem(kind, decoded=Sound(np.asarray(value, dtype=np.float32), rate_hz or 16_000))
    raise DataError(
        f"a {kind} was given as {type(value).__name__}, which is not understood. Give a path, bytes or an array"
    )
