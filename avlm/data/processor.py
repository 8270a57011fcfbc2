"""The transformers processor: what turns conversations and media into model inputs.

`AutoProcessor.from_pretrained` gives one from a model directory. Everything goes
through `encode`, training, evaluation and chat alike, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image as PILImage
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from avlm.config.data import SystemPrompts
from avlm.config.io import build
from avlm.config.media import MediaSpec
from avlm.config.stage import Augment
from avlm.data.decoding.decode import to_picture
from avlm.data.encode import Pixels, Supervise, add_tensors, counted, encode, lay_out, lay_out_pieces, pad
from avlm.data.fetching.urls import is_data_url
from avlm.data.forms.parse import Folders, cut_of, parse_row
from avlm.data.media.reader import MediaReader, Prepared
from avlm.data.text.templates import (
    PLACEHOLDERS,
    chat_template,
    control_tokens,
    placeholders,
    read_back,
    wrap_tokens,
    written,
)
from avlm.data.text.tokens import Tokens
from avlm.data.text.turns import addressed
from avlm.errors import ConfigError, DataError, MediaError
from avlm.layout import Facts
from avlm.samples import Clip, Counts, Encoded, MediaItem, Picture, Sample, Sound, Text, Turn

_T = TypeVar("_T")


class _Tools:
    """What a processor works with and never saves; a copy of a processor shares it."""

    def __init__(self) -> None:
        self.reader: MediaReader | None = None
        self.tokens: Tokens | None = None
        self.spec: tuple[dict[str, Any], MediaSpec] | None = None
        """Media settings as they are saved, and typed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tools:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.reader, "tokens": None, "spec": None}  # made again where they are needed


class AvlmProcessor(ProcessorMixin):
    """Tokenizer, template and media settings of one model.

    Args:
        tokenizer: With placeholder tokens for what the model sees and hears: <image>, <audio> and <video>, or what it
            names as its own `image_token`, `audio_token`, `video_token`.
        media: A `MediaSpec` as plain data, the same as in the model's configuration.
        chat_template: A Jinja template; default: the tokenizer's own.
        system: `SystemPrompts` as plain data: what a conversation without a system turn begins with.

    Raises:
        ConfigError: The tokenizer lacks the placeholder tokens, or the media settings are wrong.
    """

    tokenizer_class = "AutoTokenizer"
    model_input_names = [
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_sizes",
        "pixel_values_videos",
        "input_features",
        "input_features_mask",
        "input_features_beside",
        "input_features_beside_mask",
    ]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        media: dict[str, Any] | None = None,
        chat_template: str | None = None,
        system: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        spec = build(MediaSpec, media or {}, where="the processor's media")
        known, vocabulary = placeholders(tokenizer), tokenizer.get_vocab()
        needed = [kind for kind, sense in (("image", spec.vision), ("audio", spec.audio)) if sense is not None]
        missing = [PLACEHOLDERS[kind] for kind in needed if kind not in known]
        missing += [token for token in wrap_tokens(spec) if token not in vocabulary]
        if missing:
            raise ConfigError(
                f"the tokenizer has no token {', '.join(missing)}, so media have no place in the text. "
                "Add them with `avlm compose`, which also gives them embeddings"
            )
        self.media = spec.model_dump(mode="json")
        prompts = build(SystemPrompts, system or {}, where="the processor's system prompts")
        self.system = prompts.model_dump(mode="json", exclude_none=True)
        super().__init__(tokenizer, chat_template=chat_template)
        self._tools = _Tools()

    def media_spec(self) -> MediaSpec:
        """What the model sees and hears, typed."""
        known = self._tools.spec
        if known is None or known[0] is not self.media:
            known = self._tools.spec = self.media, MediaSpec.model_validate(self.media)
        return known[1]

    def use_system(self, prompts: SystemPrompts) -> None:
        """Begin conversations with other system prompts; they are saved with the processor."""
        self.system = prompts.model_dump(mode="json", exclude_none=True)

    def addressed(self, sample: Sample) -> Sample:
        """The conversation with the system turn that fits what it holds, if it has none and there is one."""
        return addressed(sample, SystemPrompts.model_validate(self.system)) if self.system else sample

    def reader(self) -> MediaReader:
        """The reader that `encode` uses; replace it with `use_reader`."""
        if self._tools.reader is None:
            self._tools.reader = MediaReader(self.media_spec())
        return self._tools.reader

    def use_reader(self, reader: MediaReader) -> None:
        """Read media through another reader, one with a cache, say."""
        self._tools.reader = reader

    def with_template(self, template: str) -> AvlmProcessor:
        """The same processor with another chat template, and the same reader."""
        other = AvlmProcessor(self.tokenizer, self.media, template, self.system)
        other.use_reader(self.reader())
        return other

    def tokens(self) -> Tokens:
        """Tokenizer and template together.

        Raises:
            ConfigError: There is no chat template.
        """
        template = chat_template(self.tokenizer, self.chat_template)
        known = self._tools.tokens
        if known is None or known.template != template or known.size != len(self.tokenizer):
            known = self._tools.tokens = Tokens(self.tokenizer, template)
        return known

    def prepare(self, sample: Sample) -> list[Prepared]:
        """Decode and prepare a sample's media.

        Raises:
            MediaError: One of them cannot be read; the message says which.
        """
        return self._of_media(sample, self.reader().prepare)

    def _of_media(self, sample: Sample, read: Callable[[MediaItem], _T]) -> list[_T]:
        found = []
        for item in sample.media():
            try:
                found.append(read(item))
            except DataError as error:
                raise type(error)(error.reason, where=sample.where, sample_id=sample.id, file=error.file) from error
        return found

    def encode(
        self,
        sample: Sample,
        *,
        supervise: Supervise = "answers",
        prompt_only: bool = False,
        augment: tuple[Augment, np.random.Generator] | None = None,
        prepared: Sequence[Prepared] | None = None,
        pixels: Pixels = "normalised",
    ) -> Encoded:
        """Write a sample down for the model; see `avlm.data.encode.encode`.

        Args:
            prepared: Media already prepared, instead of the sample's own.
            pixels: How its pictures and frames are left.
        """
        sample = self.addressed(sample)
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
            pixels=pixels,
        )

    def lay_out(
        self, sample: Sample, facts: Sequence[Facts], *, supervise: Supervise = "answers", prompt_only: bool = False
    ) -> Encoded:
        """Write a sample down but for the tensors; see `avlm.data.encode.lay_out`.

        Args:
            facts: Of its media, in reading order.
        """
        sample = self.addressed(sample)
        return lay_out(sample, self.tokens(), self.media_spec(), facts, supervise=supervise, prompt_only=prompt_only)

    def measure(self, sample: Sample) -> list[Facts]:
        """What the headers of a sample's media say.

        Raises:
            MediaError: One of them cannot be read; the message says which.
        """
        return self._of_media(sample, self.reader().measure)

    def count(
        self,
        sample: Sample,
        *,
        facts: Sequence[Facts] | None = None,
        supervise: Supervise = "answers",
        prompt_only: bool = False,
    ) -> Counts:
        """What `encode` would make of a sample, in numbers: tokens, targets, tiles, frames. Nothing is decoded.

        Args:
            facts: Of its media, in reading order; default: what their headers say.
        """
        facts = self.measure(sample) if facts is None else facts
        encoded = self.lay_out(sample, facts, supervise=supervise, prompt_only=prompt_only)
        return counted(encoded, facts, self.media_spec())

    def collate(self, samples: Sequence[Encoded], side: str = "left") -> BatchFeature:
        """A padded batch of model inputs (with labels).

        Args:
            side: Where the padding goes: ``left`` to generate, ``right`` to train.
        """
        if side not in ("left", "right"):
            raise ConfigError(f"side={side!r} is neither end of a batch. Pad on the left or on the right")
        if not samples:
            raise ConfigError("there is nothing to make a batch of. Give at least one sample")
        pad_id = self.tokenizer.pad_token_id
        return BatchFeature(pad(samples, 0 if pad_id is None else pad_id, "left" if side == "left" else "right"))

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As transformers' processors do it, for one conversation or a list of them.

        Args:
            conversation: Messages whose content is a text or a list of typed parts; media by path (``path``, ``url`` or
                the kind's own name) or as arrays.
            chat_template: Another template for this call.
            kwargs: ``tokenize=True`` with ``return_dict=True`` gives model inputs, padded on the left or on
                ``padding_side``; what ends with a question is written up to where the model is to speak.
                ``add_generation_prompt`` asks for that wherever it ends. Without ``tokenize`` it is a text, with one
                placeholder for each media item; those need not say where they are then (``{"type": "image"}``).

        Raises:
            ConfigError: An option is asked for that avlm does not have, such as to cut off at a length.
            DataError: A message is not understood.
        """
        for name in ("tools", "documents", "continue_final_message", "return_assistant_tokens_mask"):
            if kwargs.get(name):
                raise ConfigError(f"{name} is not something that avlm's templates can do. Leave it out")
        _refuse_cutting(kwargs)
        if chat_template is not None:
            return self.with_template(chat_template).apply_chat_template(conversation, **kwargs)
        single = bool(conversation) and isinstance(conversation[0], dict)
        conversations, tokenize = [conversation] if single else conversation, bool(kwargs.get("tokenize", False))
        samples = [self.addressed(conversation_sample(c, bare=not tokenize)) for c in conversations]
        asked = bool(kwargs.get("add_generation_prompt", False))
        if not tokenize:
            texts = [written(s, self.tokenizer, self.tokens().template, prompt=asked) for s in samples]
            return texts[0] if single else texts
        encoded = [self.encode(s, prompt_only=asked or s.turns[-1].role != "assistant") for s in samples]
        batch = self.collate(encoded, kwargs.get("padding_side") or "left")
        batch.pop("labels")
        return batch if kwargs.get("return_dict", False) else batch["input_ids"]

    def __call__(
        self, text: Any = None, images: Any = None, audio: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Model inputs for a text, or for a list of texts as a batch.

        Args:
            text: What `apply_chat_template` wrote: it is taken as it is, and each placeholder in it stands for the next
                medium of its kind. Or a question in plain words, which the template is applied to, with the media in
                front of it.
            images, audio, videos: One medium or a list; for a batch of plain questions a list for each.
            kwargs: ``sampling_rate`` of sounds given as arrays; ``padding_side``.

        Raises:
            ConfigError: Texts and media do not go together, or are to be cut off at a length.
        """
        _refuse_cutting(kwargs)
        texts = list(text) if isinstance(text, (list, tuple)) else [text or ""]
        media = {"image": images, "audio": audio, "video": videos}
        marks = (*placeholders(self.tokenizer).values(), *control_tokens(self.tokenizer, self.tokens().template))
        if any(mark in t for t in texts for mark in marks):
            encoded = self._encode_written(texts, media, kwargs.get("sampling_rate"))
        else:
            encoded = self._encode_questions(texts, media, kwargs.get("sampling_rate"))
        batch = self.collate(encoded, kwargs.get("padding_side") or "left")
        batch.pop("labels")
        return batch

    def _encode_written(self, texts: Sequence[str], media: dict[str, Any], rate_hz: int | None) -> list[Encoded]:
        """Texts with placeholders, each of which takes the next medium of its kind."""
        queues = {kind: [media_item(kind, v, rate_hz) for v in _flat(given)] for kind, given in media.items()}
        found = []
        for number, text in enumerate(texts):
            written_pieces, kinds = read_back(text, self.tokenizer)
            if any(kinds.count(kind) > len(queue) for kind, queue in queues.items()):
                raise ConfigError(
                    f"text {number} has the placeholders {kinds}, and not so many media are left. Add media"
                )
            items = tuple(queues[kind].pop(0) for kind in kinds)
            sample = Sample(str(number), (Turn("user", items),))
            prepared, spec = self.prepare(sample), self.media_spec()
            facts = [item.facts for item in prepared]
            encoded = lay_out_pieces(sample, written_pieces, self.tokens(), spec, facts, supervise="nothing")
            add_tensors(encoded, prepared, spec)
            found.append(encoded)
        left = {kind: len(queue) for kind, queue in queues.items() if queue}
        if left:
            raise ConfigError(f"media have no placeholder in the text: {left}. Write one for each, such as <image>")
        return found

    def _encode_questions(self, texts: Sequence[str], media: dict[str, Any], rate_hz: int | None) -> list[Encoded]:
        """Questions in plain words, media before them."""
        found = []
        for number, text in enumerate(texts):
            parts: list[Text | MediaItem] = []
            for kind, given in media.items():
                if len(texts) > 1 and given is not None:
                    if len(given) != len(texts) or not all(isinstance(of_one, (list, tuple)) for of_one in given):
                        raise ConfigError(
                            f"{len(texts)} texts were given, and not a list of {kind} media for each. "
                            f"Give {len(texts)} lists, some of them empty"
                        )
                    given = given[number]
                parts += [media_item(kind, value, rate_hz) for value in _flat(given)]
            if text:
                parts.append(Text(text))
            if not parts:
                raise ConfigError("neither a text nor a medium was given. Give at least one of them")
            found.append(self.encode(Sample(str(number), (Turn("user", tuple(parts)),)), prompt_only=True))
        return found


def _refuse_cutting(kwargs: dict[str, Any]) -> None:
    """Nothing is cut off at a length: media would lose their places, and what they show with them."""
    inner = [v for v in (kwargs.get("text_kwargs"), kwargs.get("processor_kwargs")) if isinstance(v, dict)]
    for given in (kwargs, *inner):
        for name in ("truncation", "max_length"):
            if given.get(name):
                raise ConfigError(
                    f"{name}={given[name]} would cut off media and what follows them, and avlm cuts nothing off. "
                    "Leave it out, and leave out samples that are too long"
                )


def _flat(given: Any) -> list[Any]:
    """One medium, a list, or a list of lists, as a list."""
    if given is None:
        return []
    return [inner for value in given for inner in _flat(value)] if isinstance(given, (list, tuple)) else [given]


def conversation_sample(messages: Sequence[dict[str, Any]], *, bare: bool = False) -> Sample:
    """A conversation in the messages form, media by path or as arrays, as a sample.

    Args:
        messages: The conversation.
        bare: Whether media may be without either, for a text that only has their places.

    Raises:
        DataError: A message is not understood.
    """
    turns = []
    for message in messages:
        given: dict[int, MediaItem] = {}
        content = message.get("content") if isinstance(message, dict) else None
        for i, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in PLACEHOLDERS:
                values = [v for v in map(part.get, ("path", "url", kind)) if v is not None]
                if values:
                    start, end = cut_of(part)
                    given[i] = media_item(kind, values[0], part.get("sampling_rate"), start_s=start, end_s=end)
                elif bare:
                    given[i] = MediaItem(kind)
        if given:
            kept = [{"type": "text", "text": ""} if i in given else part for i, part in enumerate(content or ())]
            message = {**message, "content": kept}
        elif isinstance(content, tuple):
            message = {**message, "content": list(content)}
        turn = parse_row({"messages": [message]}, Folders()).turns[0]
        turns.append(replace(turn, parts=tuple(given.get(i, part) for i, part in enumerate(turn.parts))))
    if not turns:
        raise DataError("a conversation has no message. Give at least one")
    return Sample("0", tuple(turns))


def media_item(
    kind: Any, value: Any, rate_hz: int | None = None, *, start_s: float = 0.0, end_s: float | None = None
) -> MediaItem:
    """One medium from whatever the caller has: a path, a URL, bytes, a PIL picture, an array.

    A data URL is read; any other is fetched only by a reader that may (`Limits.doors`).

    Args:
        rate_hz: Of a sound given as an array; default 16,000.
        start_s, end_s: The cut of a sound or a video that is meant; of an item, instead of its own.

    Raises:
        DataError: None of those, or there is nothing in the cut.
    """
    if isinstance(value, MediaItem):
        return value if not start_s and end_s is None else replace(value, start_s=start_s, end_s=end_s)
    if isinstance(value, (str, Path)):
        if isinstance(value, str) and ("://" in value or is_data_url(value)):
            return MediaItem(kind, url=value, start_s=start_s, end_s=end_s)
        return MediaItem(kind, path=Path(value), start_s=start_s, end_s=end_s)
    if isinstance(value, (bytes, bytearray)):
        return MediaItem(kind, data=bytes(value), start_s=start_s, end_s=end_s)
    return MediaItem(kind, decoded=_decoded(kind, value, rate_hz), start_s=start_s, end_s=end_s)


def _decoded(kind: Any, value: Any, rate_hz: int | None) -> Picture | Sound | Clip:
    """What the caller has decoded already.

    Raises:
        DataError: It is nothing that could be seen or heard.
    """
    if isinstance(value, (Picture, Sound, Clip)):
        return value
    if kind == "image":
        decoded: Picture | Sound | None = _picture(value)
    else:
        decoded = _sound(value, rate_hz) if kind == "audio" else None
    if decoded is None:
        shape = getattr(value, "shape", None)
        described = type(value).__name__ + ("" if shape is None else f" of {tuple(shape)} {value.dtype}")
        wanted = {"image": " of uint8 [height, width, 3]", "audio": " of one channel"}.get(kind)
        raise DataError(
            f"a{'n' if kind in ('image', 'audio') else ''} {kind} was given as {described}, which is not understood. "
            f"Give a path, bytes{', or an array' + wanted if wanted else ''}"
        )
    return decoded


def _picture(value: Any) -> Picture | None:
    if isinstance(value, PILImage.Image):
        try:
            return to_picture(value)
        except OSError as error:
            raise MediaError(f"a Pillow picture does not load ({type(error).__name__}). Give another") from error
    pixels = np.asarray(value)
    right = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8 and pixels.size > 0
    return Picture(pixels) if right else None


def _sound(value: Any, rate_hz: int | None) -> Sound | None:
    """One channel; whole numbers are taken for samples as WAV files have them."""
    wave = np.asarray(value)
    rate = 16_000 if rate_hz is None else rate_hz
    if wave.ndim != 1 or wave.dtype.kind not in "fiu" or rate < 1:
        return None
    if wave.dtype.kind in "iu":
        full = 2.0 ** (8 * wave.dtype.itemsize - 1)
        wave = wave / full - (1.0 if wave.dtype.kind == "u" else 0.0)
    return Sound(wave.astype(np.float32), int(rate))
