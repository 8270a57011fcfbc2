"""What a model's settings add to a conversation: the system prompt that fits what it holds, and state tokens.

Both follow from the data and never from the caller, so that chat, evaluation and training
begin a conversation of the same kind with the same words.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

from avlm.config.data import SystemPrompts
from avlm.config.stage import StateTokens
from avlm.samples import MediaKind, Sample, Text, Turn

QUESTION, NOISE = 0, 1
"""Classes of the state head. A third one, which no row has, is VITA-1.5's: what follows is not decided yet."""

KNOWN = (StateTokens(), StateTokens(audio="\u261e", noise="\u261f", text="\u261c"))
"""State tokens that rows may bring along: VITA-1.0's, and the pointing hands of VITA-1.5."""


def system_prompt(kinds: Collection[MediaKind], prompts: SystemPrompts) -> str | None:
    """The prompt for a conversation that holds these kinds of media; None where there is none.

    Sound does not count beside something to see. Pictures and videos together take the prompt of text, as each of the
    other two may say that there is nothing of the other kind (VITA's do).
    """
    seen = [kind for kind in ("image", "video") if kind in kinds]
    kind = "text" if len(seen) == 2 else seen[0] if seen else "audio" if "audio" in kinds else "text"
    own: str | None = getattr(prompts, kind)
    return prompts.text if own is None else own


def addressed(sample: Sample, prompts: SystemPrompts) -> Sample:
    """The conversation with a system turn in front, if it has none and there is a prompt for it."""
    if any(turn.role == "system" for turn in sample.turns):
        return sample
    prompt = system_prompt(sample.kinds(), prompts)
    return sample if prompt is None else replace(sample, turns=(Turn("system", (Text(prompt),)), *sample.turns))


def with_state_tokens(sample: Sample, tokens: StateTokens) -> Sample:
    """The conversation with a state token before every answer, but those that begin with one already.

    Source:
        As VITA's own data code writes them: noise where a row says so, else by whether the question was heard.
    """
    turns: list[Turn] = []
    heard = False
    for turn in sample.turns:
        if turn.role != "assistant":
            heard |= any(not isinstance(part, Text) and part.kind == "audio" for part in turn.parts)
        else:
            turn = _marked(turn, "audio" if heard else "text", tokens)
            heard = False
        turns.append(turn)
    return replace(sample, turns=tuple(turns))


def _marked(turn: Turn, query: Literal["audio", "text"], tokens: StateTokens) -> Turn:
    if _begins(turn, [tokens.audio, tokens.noise, tokens.text]):
        noise = _begins(turn, [tokens.noise])
        return replace(turn, state="noise" if noise else "question")
    noise = is_noise(turn)
    token = tokens.noise if noise else getattr(tokens, query)
    words, rest = token, turn.parts
    if rest and isinstance(rest[0], Text):  # one text with the token, or a line break would part the two
        words, rest = token + rest[0].text, rest[1:]
    return replace(turn, parts=(Text(words), *rest), state="noise" if noise else "question")


def without_state_token(answer: str, expected: str) -> str:
    """An answer without the state token that it begins with, where the one that is expected begins with none.

    A model that learned state tokens writes one before every answer; rows to measure it by seldom have any.
    """
    known = tuple(token for tokens in KNOWN for token in (tokens.audio, tokens.noise, tokens.text))
    if expected.lstrip().startswith(known):
        return answer
    begins = answer.lstrip()
    return next((begins.removeprefix(token).lstrip() for token in known if begins.startswith(token)), answer)


def is_noise(answer: Turn) -> bool:
    """Whether what is answered was not meant for the model: by the row's word, else by the answer's state token."""
    return answer.state == "noise" or (not answer.state and _begins(answer, [known.noise for known in KNOWN]))


def state_classes(sample: Sample) -> list[int]:
    """The state head's class of each answer, in order."""
    return [NOISE if is_noise(turn) else QUESTION for turn in sample.turns if turn.role == "assistant"]


def _begins(turn: Turn, tokens: Sequence[str]) -> bool:
    return turn.text().lstrip().startswith(tuple(tokens))
