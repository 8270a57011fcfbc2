"""One model and the answers that it is giving: requests join and leave between tokens.

Whoever wants answers goes through here: evaluation, a conversation, the server.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from avlm.data.processor import AvlmProcessor
from avlm.errors import ConfigError
from avlm.inference.answers import AnswerText, Decoder, Piece, TokenLogprob, told
from avlm.inference.prompts import Prompt, Prompts
from avlm.inference.readers import CohortReader, Reader, SlotReader, UnfitError, fits_slots
from avlm.inference.sampling import Choice, Sampling, choose
from avlm.models.memory import keep_freed_memory
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Sample

Finish = Literal["stop", "length", "left"]
KEPT_BYTES = 2**29


class Request:
    """One answer that was asked for.

    Args:
        decode: Makes text of its tokens, and pieces; None: nobody wants those.
        room: How many tokens may follow the prompt.
    """

    def __init__(self, prompt: Prompt, sampling: Sampling, decode: Decoder | None, room: int) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.pieces: deque[Piece] = deque()
        """What nobody has taken yet."""
        self.finish: Finish | None = None
        """None while it runs; then whether it ended by itself, at its length, or because nobody wanted more of it."""
        self.prompt_tokens = len(prompt)
        self.media_tokens = prompt.media_tokens
        """Of the prompt, by kind."""
        self.kept_tokens = 0
        """Of the prompt, those that had been read before."""
        self.tokens: list[int] = []
        """The answer, without the token that ends it."""
        self.text = None if decode is None else AnswerText(decode, sampling.stop)
        self.choice = Choice(sampling, prompt.ids)
        self._room = min(room, sampling.max_tokens)
        self._waiting: list[tuple[int, TokenLogprob | None]] = []
        """Tokens since the last piece."""

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens)

    def take(self, token: int, about: TokenLogprob | None) -> None:
        """One token further."""
        self.tokens.append(token)
        if self.text is not None:
            text = self.text.add(token)
            self._waiting.append((token, about))
            if text:
                self._hand_out(text)
        if self.text is not None and self.text.stopped:
            self.end("stop")
        elif self.answer_tokens >= self._room:
            self.end("length")

    def end(self, why: Finish) -> None:
        """No further token."""
        if why != "left" and self.text is not None:
            rest = self.text.end()
            why = "stop" if self.text.stopped else why
            if rest or self._waiting:
                self._hand_out(rest)
        self.finish = why

    def _hand_out(self, text: str) -> None:
        logprobs = tuple(about for _, about in self._waiting if about is not None)
        self.pieces.append(Piece(text, tuple(token for token, _ in self._waiting), logprobs))
        self._waiting.clear()


class Engine:
    """One model and a running batch whose requests join and leave between tokens; used by one thread.

    What it remembers is of the weights that it was made with: where those change, make another. On a processor the
    process keeps the memory that a step has freed for the next one.

    Args:
        model, processor: As `load_model` gives them.
        slots: How many answers there are at once.
        kept_bytes: For what is remembered by content: a quarter of them for embeddings of media, the others for keys
            and values of what was read.

    Raises:
        ConfigError: There is no place for an answer.
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
        self.kept_bytes = kept_bytes
        self.prompts = Prompts(model, processor, kept_bytes // 4)
        self._never = torch.tensor(model.placeholder_ids(), device=model.device, dtype=torch.long)
        self._decode = Decoder(processor.tokenizer)
        self._ends = end_tokens(model, processor)
        self._joined: deque[Request] = deque()
        self._running: list[Request] = []
        self._reader = self._made()
        self._keeps_memory = model.device.type != "cpu"

    @property
    def busy(self) -> bool:
        """Whether anybody waits for anything."""
        return bool(self._joined or self._running)

    @property
    def free(self) -> int:
        """How many more could join and be answered at once."""
        return max(0, self.slots - len(self._joined) - len(self._running))

    def prepare(self, sample: Sample) -> Prompt:
        """What `join` would make of a conversation first: its media decoded, its text in tokens.

        It may run in other threads than the engine's, several at once.

        Raises:
            MediaError: A medium cannot be read.
            DataError: There is nothing to be answered.
        """
        return self.prompts.of_sample(sample)

    def join(self, sample: Sample | Prompt, sampling: Sampling) -> Request:
        """Ask for an answer; the prompt is read at the next step for which there is a place.

        Args:
            sample: A conversation that ends with a question, or what `prepare` made of one.

        Raises:
            ConfigError: It is as long as the language model can read, or longer.
            MediaError: A medium cannot be read.
            DataError: There is nothing to be answered.
        """
        prompt = sample if isinstance(sample, Prompt) else self.prepare(sample)
        return self._join(prompt, sampling, self._decode)

    def join_for_tokens(self, prompt: Prompt, sampling: Sampling) -> Request:
        """As `join`, for an answer of which nothing but the tokens is wanted: it has no pieces.

        Raises:
            ConfigError: The prompt is as long as the language model can read, or longer.
        """
        return self._join(prompt, sampling, self._decode if sampling.stop else None)

    def _join(self, prompt: Prompt, sampling: Sampling, decode: Decoder | None) -> Request:
        request = Request(prompt, sampling, decode, room(self.model, len(prompt)))
        self._joined.append(request)
        return request

    @torch.inference_mode()
    def leave(self, request: Request) -> None:
        """Free a request's place: nobody wants more of it."""
        if request.finish is None:
            request.end("left")
        self._joined = deque(one for one in self._joined if one is not request)
        self._retire([request])

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One token for everybody who is in; where a prompt is long, a part of it is read.

        Returns:
            The requests that got a piece, or ended.
        """
        if (
            not self._keeps_memory
        ):  # not before: processes that were forked until now read files, and are to give it back
            keep_freed_memory()
            self._keeps_memory = True
        while self._joined and len(self._running) < self.slots:
            self._running.append(self._joined.popleft())
            self._reader.join(self._running[-1])
        if not self._running:
            return []
        try:
            ready, logits_BV = self._read()
        except BaseException:  # the state of those who were in is lost
            for request in self._running:
                request.end("left")
            self._running, self._reader = [], self._made()
            raise
        found = self._choose(ready, logits_BV)
        self._retire([request for request in found if request.finish is not None])
        return found

    def _made(self) -> Reader:
        if fits_slots(self.model):
            return SlotReader(self.model, self.prompts, self.kept_bytes - self.kept_bytes // 4)
        return CohortReader(self.model, self.prompts)

    def _read(self) -> tuple[list[Request], Tensor]:
        try:
            return self._reader.read()
        except UnfitError:  # seen at the very first pass, before anybody had a token
            self._reader = CohortReader(self.model, self.prompts)
            for request in self._running:
                self._reader.join(request)
            return self._reader.read()

    def _choose(self, ready: Sequence[Request], logits_BV: Tensor) -> list[Request]:
        """The next token of each; those that got a piece, or ended."""
        if not ready:
            return []
        allowed = logits_BV.index_fill(1, self._never, -math.inf) if len(self._never) else logits_BV
        tokens = choose(allowed, [request.choice for request in ready])
        found = []
        for row, (request, token) in enumerate(zip(ready, tokens, strict=True)):
            pieces = len(request.pieces)
            if token in self._ends:
                request.end("stop")
            else:
                request.take(token, self._told(logits_BV[row], token, request.sampling.logprobs))
            if request.finish is not None or len(request.pieces) > pieces:
                found.append(request)
        return found

    def _told(self, logits_V: Tensor, token: int, count: int | None) -> TokenLogprob | None:
        if count is None:
            return None
        return told(logits_V, token, count, self._never.tolist(), self.processor.tokenizer)

    def _retire(self, ended: Sequence[Request]) -> None:
        for request in ended:
            if any(one is request for one in self._running):
                self._running = [one for one in self._running if one is not request]
                self._reader.drop(request)


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
