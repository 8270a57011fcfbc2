"""One model and the answers that it is giving: requests join and leave between tokens.

Whoever wants answers goes through here: evaluation, a conversation, the server.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Literal

import torch
from torch import Tensor

from avlm.data.processor import AvlmProcessor
from avlm.errors import ConfigError
from avlm.inference.answers import AnswerText, Piece, TokenLogprob, told
from avlm.inference.sampling import Choice, Sampling, choose
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded, Sample

Finish = Literal["stop", "length", "left"]
KEPT_BYTES = 2**29


class Request:
    """One answer that was asked for."""

    def __init__(self, prompt: Encoded, sampling: Sampling, processor: AvlmProcessor, room: int) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.pieces: deque[Piece] = deque()
        """What nobody has taken yet."""
        self.finish: Finish | None = None
        """None while it runs; then whether it ended by itself, at its length, or because nobody wanted more of it."""
        self.prompt_tokens = len(prompt)
        self.media_tokens = media_tokens(prompt)
        """Of the prompt, by kind."""
        self.kept_tokens = 0
        """Of the prompt, those that were found remembered."""
        self.text = AnswerText(processor.tokenizer, sampling.stop)
        self.choice = Choice(sampling, prompt.ids)
        self.room = min(room, sampling.max_tokens)
        self._waiting: list[tuple[int, TokenLogprob | None]] = []
        """Tokens since the last piece."""

    @property
    def tokens(self) -> list[int]:
        """The answer, without the token that ends it."""
        return self.text.ids

    @property
    def answer_tokens(self) -> int:
        return len(self.text.ids)

    def take(self, token: int, about: TokenLogprob | None) -> None:
        """One token further."""
        text = self.text.add(token)
        self._waiting.append((token, about))
        if text:
            self._hand_out(text)
        if self.text.stopped:
            self.end("stop")
        elif self.answer_tokens >= self.room:
            self.end("length")

    def end(self, why: Finish) -> None:
        """No further token."""
        if why == "left":
            self._waiting.clear()
        else:
            rest = self.text.end()
            if self.text.stopped:
                why = "stop"
            if rest or self._waiting:
                self._hand_out(rest)
        self.finish = why

    def _hand_out(self, text: str) -> None:
        logprobs = tuple(about for _, about in self._waiting if about is not None)
        self.pieces.append(Piece(text, tuple(token for token, _ in self._waiting), logprobs))
        self._waiting.clear()


class Engine:
    """One model and a running batch whose requests join and leave between tokens; used by one thread.

    Args:
        model, processor: As `load_model` gives them.
        slots: How many answers there are at once.
        kept_bytes: For what is remembered by content: embeddings of media, keys and values of what was read.
    """

    def __init__(
        self,
        model: AvlmForConditionalGeneration,
        processor: AvlmProcessor,
        *,
        slots: int = 8,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"slots={slots} leaves no place for an answer. Use at least 1")
        self.model, self.processor, self.slots = model, processor, slots
        self.never = model.placeholder_ids()
        self.ends = end_tokens(model, processor)
        self._joined: deque[Request] = deque()
        self._running: list[tuple[Request, object]] = []

    @property
    def busy(self) -> bool:
        """Whether anybody waits for anything."""
        return bool(self._joined or self._running)

    @property
    def free(self) -> int:
        """How many more could join and be answered at once."""
        return self.slots - len(self._joined) - len(self._running)

    def join(self, sample: Sample, sampling: Sampling) -> Request:
        """Ask for an answer; the prompt is read at the next step for which there is a place.

        Raises:
            ConfigError: It is as long as the language model can read, or longer.
            MediaError: A medium cannot be read.
            DataError: There is nothing to be answered.
        """
        return self.join_encoded(self.processor.encode(sample, prompt_only=True), sampling)

    def join_encoded(self, prompt: Encoded, sampling: Sampling) -> Request:
        """As `join`, for a prompt that is encoded already."""
        request = Request(prompt, sampling, self.processor, room(self.model, len(prompt)))
        self._joined.append(request)
        return request

    def leave(self, request: Request) -> None:
        """Free a request's place: nobody wants more of it."""
        if request.finish is None:
            request.end("left")
        self._joined = deque(one for one in self._joined if one.finish is None)
        self._running = [(one, state) for one, state in self._running if one.finish is None]

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One token for everybody who is in.

        Returns:
            The requests that got a piece, or ended.
        """
        while self._joined and len(self._running) < self.slots:
            self._running.append((self._joined.popleft(), None))
        found, still = [], []
        for request, cache in self._running:
            logits, cache = self._read(request, cache)
            pieces = len(request.pieces)
            self._take(request, logits)
            if request.finish is not None or len(request.pieces) > pieces:
                found.append(request)
            if request.finish is None:
                still.append((request, cache))
        self._running = still
        return found

    def _read(self, request: Request, cache: object) -> tuple[Tensor, object]:
        if cache is None:
            inputs = {k: v.to(self.model.device) for k, v in self.processor.collate([request.prompt]).items()}
            del inputs["labels"]
        else:
            inputs = {"input_ids": torch.tensor([request.tokens[-1:]], device=self.model.device)}
        output = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].float(), output.past_key_values

    def _take(self, request: Request, logits_1V: Tensor) -> None:
        never = torch.tensor(self.never, device=logits_1V.device, dtype=torch.long)
        (token,) = choose(logits_1V.index_fill(1, never, -math.inf), [request.choice])
        if token in self.ends:
            request.end("stop")
            return
        count = request.sampling.logprobs
        about = None if count is None else told(logits_1V[0], token, count, self.never, self.processor.tokenizer)
        request.take(token, about)


def media_tokens(prompt: Encoded) -> dict[str, int]:
    """Places of a prompt's media, by kind."""
    found: Counter[str] = Counter()
    for segment in (segment for place in prompt.places for segment in place.segments):
        if segment.kind != "text":
            found[segment.kind] += segment.count
    return dict(found)


def end_tokens(model: AvlmForConditionalGeneration, processor: AvlmProcessor) -> set[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation settings."""
    ends = {processor.tokenizer.eos_token_id}
    settings = model.generation_config
    configured = settings.eos_token_id if settings is not None else None
    ends |= set(configured) if isinstance(configured, list) else {configured}
    return {int(end) for end in ends if end is not None}


def room(model: AvlmForConditionalGeneration, prompt: int) -> int:
    """How many tokens may follow a prompt of so many.

    Raises:
        ConfigError: None.
    """
    longest = getattr(model.config.text_config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return 2**31
    if prompt >= longest:
        raise ConfigError(
            f"the conversation has {prompt} tokens, media included, and the language model was made for {longest}, "
            "the answer among them. Ask with less: fewer turns, fewer or shorter media"
        )
    return int(longest) - prompt
