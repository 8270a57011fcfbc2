"""What a session asks of a model: was that for me, and what is the answer.

The decision is the model's own. It reads the sound as a question is read, and where the
answer would begin its state head says whether somebody meant it; a model that was trained
to write state tokens instead is asked how likely each of them is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from avlm.config.stage import StateTokens
from avlm.data.given import media_item
from avlm.data.text.turns import KNOWN, NOISE, QUESTION
from avlm.data.voice.gate import SAMPLE_RATE_HZ
from avlm.errors import ConfigError
from avlm.inference.engine import Engine, Request
from avlm.inference.likelihood import answer_likelihood
from avlm.inference.sampling import Sampling
from avlm.samples import Encoded, MediaItem, Sample, Text, Turn

Decides = Literal["auto", "head", "digits", "hands", "none"]
TOKENS: dict[str, StateTokens] = {"digits": KNOWN[0], "hands": KNOWN[1]}
"""State tokens by what they are: VITA 1.0's `<1> <2> <3>`, and the hands of VITA 1.5."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a sound was meant for the model."""

    probability: float
    """That it was."""
    prompt_tokens: int
    """What was read to tell."""


class Answer(Protocol):
    """An answer on its way."""

    prompt_tokens: int

    def next(self) -> tuple[str, int] | None:
        """One token further.

        Returns:
            What can be shown of it by now, maybe nothing, and tokens that were made; None: it has ended.
        """

    def close(self) -> None:
        """Nobody wants the rest; what it held is free at once."""


class Mind(Protocol):
    """A model as a session sees it. One thread at a time."""

    def judge(self, wave: np.ndarray) -> Judgement:
        """Tell whether a sound (float32, mono, 16 kHz) was meant for the model."""

    def answer(self, said: np.ndarray | str) -> Answer:
        """Answer a sound or a typed text."""

    def show(self, picture: MediaItem | None) -> None:
        """What the camera shows from now on; None: nothing."""

    def remember(self, said: np.ndarray | str, answer: str) -> None:
        """An answer was given, or as much of it as was let out."""


class EngineAnswer:
    """One request of an engine."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.prompt_tokens = request.prompt_tokens
        self._told = 0

    def next(self) -> tuple[str, int] | None:
        request = self.request
        if request.finish is not None and not request.pieces:
            return None
        if not request.pieces:
            self.engine.step()
        text = "".join(request.pieces.popleft().text for _ in range(len(request.pieces)))
        made, self._told = request.answer_tokens - self._told, request.answer_tokens
        return text, made

    def close(self) -> None:
        self.engine.leave(self.request)


class ModelMind:
    """A model directory that was loaded. It may share its engine with others, as long as one thread uses it.

    Args:
        engine: The model, its processor and its running answers.
        ask: Words beside a sound, the ones that the model was trained with.
        decides: How the model tells who was meant; `auto` is its state head. `none`: everything is a question.
        turns: So many earlier questions and answers are read again with each new one.

    Raises:
        ConfigError: The model hears nothing, or has no state head and nothing else is said.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        ask: str,
        decides: Decides = "auto",
        sampling: Sampling | None = None,
        turns: int = 0,
    ) -> None:
        self.engine, self.model, self.processor = engine, engine.model, engine.processor
        self.ask, self.sampling, self.turns = ask, sampling or Sampling(), turns
        self.decides = way_to_decide(engine, decides)
        self._picture: MediaItem | None = None
        self._past: list[Turn] = []

    def judge(self, wave: np.ndarray) -> Judgement:
        sample = self._sample(wave)
        if self.decides == "none":
            return Judgement(1.0, 0)
        if self.decides == "head":
            return self._by_head(self.processor.encode(sample, prompt_only=True))
        return self._by_tokens(sample, TOKENS[self.decides])

    def answer(self, said: np.ndarray | str) -> EngineAnswer:
        return EngineAnswer(self.engine, self.engine.join(self._sample(said), self.sampling))

    def show(self, picture: MediaItem | None) -> None:
        self._picture = picture

    def remember(self, said: np.ndarray | str, answer: str) -> None:
        if self.turns:
            spoken = self._turn(said)
            self._past = [*self._past, spoken, Turn("assistant", (Text(answer.strip()),))][-2 * self.turns :]

    def _sample(self, said: np.ndarray | str) -> Sample:
        return Sample("live", (*self._past, self._turn(said)))

    def _turn(self, said: np.ndarray | str) -> Turn:
        words = said if isinstance(said, str) else self.ask
        sound = [] if isinstance(said, str) else [media_item("audio", said, SAMPLE_RATE_HZ)]
        seen = [] if self._picture is None else [self._picture]
        return Turn("user", (*seen, *sound, *([Text(words)] if words else [])))

    @torch.inference_mode()
    def _by_head(self, prompt: Encoded) -> Judgement:
        last = torch.tensor([len(prompt) - 1])
        output = self.model(**self._inputs(prompt), state_positions=last, logits_to_keep=1, use_cache=False)
        states = output.state_logits[0, 0].float()[[QUESTION, NOISE]].softmax(-1)
        return Judgement(float(states[0]), len(prompt))

    def _by_tokens(self, sample: Sample, tokens: StateTokens) -> Judgement:
        """How likely each state token is where the answer begins, against the others."""
        read, likely = 0, []
        for token in (tokens.audio, tokens.noise, tokens.text):
            each, _, length = answer_likelihood(self.model, self.processor, sample, token)
            likely.append(each.sum())
            read += length
        return Judgement(1.0 - float(torch.stack(likely).softmax(-1)[1]), read)

    def _inputs(self, prompt: Encoded) -> dict[str, Any]:
        collated = self.processor.collate([prompt])
        return {name: value.to(self.model.device) for name, value in collated.items() if name != "labels"}


def way_to_decide(engine: Engine, asked: Decides) -> Decides:
    """How the model tells who was meant.

    Raises:
        ConfigError: It cannot.
    """
    if engine.processor.media_spec().audio is None:
        raise ConfigError("the model has no audio part, so it hears nothing. Use one that has, or `avlm chat`")
    if asked in ("auto", "head") and engine.model.state_head is None:
        raise ConfigError(
            "the model has no state head, so it cannot tell whether it was meant. Train one with `avlm train voice "
            "model=DIR data.train=ROWS` (rows: `avlm data voice`), or name its state tokens with --decides digits or "
            "hands; --decides none answers everything"
        )
    return "head" if asked == "auto" else asked
