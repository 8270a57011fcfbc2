"""The transformers processor: what turns conversations and media into model inputs.

`AutoProcessor.from_pretrained` gives one from a model directory. Everything goes
through `encode`, training, evaluation and chat alike, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from avlm.config.data import SystemPrompts
from avlm.config.io import build
from avlm.config.media import MediaSpec
from avlm.config.stage import Augment
from avlm.data.encode import (
    Pixels,
    Supervise,
    add_tensors,
    counted,
    encode,
    lay_out,
    lay_out_pieces,
    pad,
    up_to_last_word,
)
from avlm.data.given import conversation_sample, flat, media_item
from avlm.data.media.reader import MediaReader, Prepared
from avlm.data.options import OTHERS, Options, options_of, tell_unknown, with_variables
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
from avlm.errors import ConfigError, DataError
from avlm.layout import Facts
from avlm.samples import IGNORE, Counts, Encoded, MediaItem, Sample, Text, Turn

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


TEMPLATE_OPTIONS = (
    "add_generation_prompt", "tokenize", "return_dict", "continue_final_message", "return_assistant_tokens_mask",
)  # fmt: skip


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

    def collate(
        self, samples: Sequence[Encoded], side: str = "left", *, width: int = 0, multiple: int = 1
    ) -> BatchFeature:
        """A padded batch of model inputs (with labels).

        Args:
            side: Where the padding goes: ``left`` to generate, ``right`` to train.
            width: Tokens to pad to at least.
            multiple: Of which the width is a multiple.
        """
        if side not in ("left", "right"):
            raise ConfigError(f"side={side!r} is neither end of a batch. Pad on the left or on the right")
        if not samples:
            raise ConfigError("there is nothing to make a batch of. Give at least one sample")
        pad_id = self.tokenizer.pad_token_id
        width = -(-max(width, *map(len, samples)) // multiple) * multiple
        return BatchFeature(pad(samples, 0 if pad_id is None else pad_id, "left" if side == "left" else "right", width))

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As transformers' processors do it, for one conversation or a list of them.

        Args:
            conversation: Messages whose content is a text or a list of typed parts; media by path (``path``, ``url`` or
                the kind's own name) or as arrays.
            chat_template: Another template for this call, or the name of one of the tokenizer's.
            kwargs: ``tokenize=True`` with ``return_dict=True`` gives model inputs, padded on the left or on
                ``padding_side``; what ends with a question is written up to where the model is to speak. Ids are lists
                where conversations differ in length and neither ``padding`` nor ``return_tensors`` asks for a tensor.
                ``add_generation_prompt`` asks for that wherever it ends, and ``continue_final_message`` leaves the last
                answer open; ``return_assistant_tokens_mask`` tells which tokens are of answers, with any template, as
                ``assistant_masks``. Without ``tokenize`` it is a text, with one
                placeholder for each media item; those need not say where they are then (``{"type": "image"}``).
                Options are those of a call of the processor; all else is for the template (``enable_thinking``).

        Raises:
            ConfigError: An option is asked for that avlm does not have, such as to cut off at a length.
            DataError: A message is not understood.
        """
        for name in ("tools", "documents"):
            if kwargs.pop(name, None):
                raise ConfigError(f"{name} is not something that avlm's templates can do. Leave it out")
        options = self._options(kwargs)
        asked, tokenize, whole, goes_on, masked = (bool(options.rest.pop(name, None)) for name in TEMPLATE_OPTIONS)
        tell_unknown({name: options.rest.pop(name) for name in OTHERS if name in options.rest})
        processor = self._written_by(chat_template, options.rest)
        single = bool(conversation) and isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        samples = [
            self.addressed(conversation_sample(c, bare=not tokenize, rate_hz=options.rate_hz)) for c in conversations
        ]
        if goes_on:
            samples = [_going_on(sample, asked) for sample in samples]
        if not tokenize:
            texts = [written(s, self.tokenizer, processor.tokens().template, prompt=asked) for s in samples]
            texts = [_begun(text, s) for text, s in zip(texts, samples, strict=True)] if goes_on else texts
            return texts[0] if single else texts
        encoded = [processor.encode(s, prompt_only=asked or s.turns[-1].role != "assistant") for s in samples]
        encoded = [up_to_last_word(one) for one in encoded] if goes_on else encoded
        masks = [processor.answered(s)[: len(e)] for s, e in zip(samples, encoded, strict=True)] if masked else None
        batch = self._batch(encoded, options, masks)
        return batch if whole else batch["input_ids"]

    def answered(self, sample: Sample) -> list[int]:
        """1 for each token that is of an answer, up to the last answer of a conversation."""
        last = max((i for i, turn in enumerate(sample.turns) if turn.role == "assistant"), default=None)
        if last is None:
            return []
        return [int(label != IGNORE) for label in self.encode(replace(sample, turns=sample.turns[: last + 1])).labels]

    def _options(self, given: dict[str, Any]) -> Options:
        return options_of(given, self.tokenizer.model_max_length)

    def _written_by(self, template: str | None, variables: dict[str, Any]) -> AvlmProcessor:
        """This processor, or one with another template: by its name or its text, or with what its author left open."""
        known = self.tokenizer.chat_template
        if template is not None and isinstance(known, dict) and template in known:
            template = known[template]
        if template is None and not variables:
            return self
        template = chat_template(self.tokenizer, template or self.chat_template)
        return self.with_template(with_variables(template, variables))

    def _batch(
        self, encoded: Sequence[Encoded], options: Options, masks: Sequence[list[int]] | None = None
    ) -> BatchFeature:
        """Model inputs as a caller wants them: one tensor, or lists of ids where texts differ in length and neither
        padding nor tensors were asked for.

        Args:
            masks: Of answers; what they lack at their ends is none.
        """
        options.check_length(encoded)
        batch = self.collate(encoded, options.side, width=options.width, multiple=options.multiple)
        batch.pop("labels")
        if not options.even(encoded):
            batch["input_ids"] = [list(one.ids) for one in encoded]
            batch["attention_mask"] = [[1] * len(one) for one in encoded]
        if masks is not None:
            rows = [mask + [0] * (len(one) - len(mask)) for mask, one in zip(masks, encoded, strict=True)]
            batch["assistant_masks"] = rows
            if options.even(encoded):
                batch["assistant_masks"] = torch.zeros_like(batch["input_ids"])
                batch["assistant_masks"][batch["attention_mask"].bool()] = torch.tensor(list(chain(*rows)))
        if options.tensors == "np":
            return BatchFeature({name: value.numpy() for name, value in batch.items()})
        return batch

    def __call__(
        self, text: Any = None, images: Any = None, audio: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Model inputs for a text, or for a list of texts as a batch.

        Args:
            text: What `apply_chat_template` wrote, or any other text: it is taken as it is, and each placeholder in it
                stands for the next medium of its kind. Media with a question that has no placeholder at all are put in
                front of it, and the template is applied to both, unless ``add_special_tokens=False``.
            images, audio, videos: One medium or a list; for a batch of plain questions a list for each.
            kwargs: As transformers' processors take them, here or in ``text_kwargs`` and its kin: ``sampling_rate`` of
                sounds given as arrays, ``return_tensors`` ("pt" or "np"), ``padding``, ``padding_side``,
                ``pad_to_multiple_of``, ``max_length`` and ``truncation``. What is none of these is told and left out.

        Raises:
            ConfigError: Texts and media do not go together, or are to be cut off at a length.
        """
        options = self._options(kwargs)
        tell_unknown(options.rest, also=("return_dict",))
        texts = list(text) if isinstance(text, (list, tuple)) else [text or ""]
        media = {"image": images, "audio": audio, "video": videos}
        if self._is_written(texts, media, options):
            begun = [self._begun(text) if options.special else text for text in texts]
            encoded = self._encode_written(begun, media, options.rate_hz)
        else:
            encoded = self._encode_questions(texts, media, options.rate_hz)
        return self._batch(encoded, options)

    def _is_written(self, texts: Sequence[str], media: dict[str, Any], options: Options) -> bool:
        """Whether texts are to be taken as they are, and not as questions about media that have no place in them."""
        alone = any(texts) and not any(flat(given) for given in media.values())
        return alone or not options.special or any(mark in text for text in texts for mark in self._marks())

    def _marks(self) -> tuple[str, ...]:
        """What no question has in its words: placeholders, and what builds a conversation."""
        return (*placeholders(self.tokenizer).values(), *control_tokens(self.tokenizer, self.tokens().template))

    def _begun(self, text: str) -> str:
        """A text with the token that the tokenizer begins texts with, if it is no part of a conversation."""
        begins = self.tokenizer.bos_token or ""
        plain = not any(mark in text for mark in self._marks())
        return begins + text if plain and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id] else text

    def _encode_written(self, texts: Sequence[str], media: dict[str, Any], rate_hz: int | None) -> list[Encoded]:
        """Texts with placeholders, each of which takes the next medium of its kind."""
        queues = {kind: [media_item(kind, v, rate_hz) for v in flat(given)] for kind, given in media.items()}
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
                parts += [media_item(kind, value, rate_hz) for value in flat(given)]
            if text:
                parts.append(Text(text))
            if not parts:
                raise ConfigError("neither a text nor a medium was given. Give at least one of them")
            found.append(self.encode(Sample(str(number), (Turn("user", tuple(parts)),)), prompt_only=True))
        return found


def _going_on(sample: Sample, asked: bool) -> Sample:
    """A conversation whose last answer is to be continued.

    Raises:
        ConfigError: It ends with no answer, or another one is asked for.
    """
    last = sample.turns[-1]
    why = ""
    if last.role != "assistant" or not last.text().strip():
        why = "there are none. Give some"
    elif asked:
        why = "add_generation_prompt asks for a new one. Leave one of them out"
    if why:
        raise ConfigError(f"continue_final_message goes on with the words of the last answer, and {why}")
    return replace(sample, turns=(*sample.turns[:-1], replace(last, ended=False)))


def _begun(text: str, sample: Sample) -> str:
    """A rendered conversation up to the last word of its last answer."""
    words = sample.turns[-1].text().strip()
    return text[: text.rindex(words) + len(words)]
