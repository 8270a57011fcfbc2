"""What is odd about a conversation though its row can be read: nothing to learn, answers without a question ..."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from avlm.data.checking.problems import Severity
from avlm.samples import MediaItem, Sample, Text, Turn

MARKERS = ("<image>", "<audio>", "<video>")
"""What stands for media in a text, where no model says otherwise."""

Odd = tuple[Severity, str, str]
"""How bad, of which kind, and the message."""


def odd(sample: Sample, markers: Sequence[str] = MARKERS) -> Iterator[Odd]:
    """Whatever is odd about a conversation, the same kind once.

    Args:
        markers: What no text may spell, because it stands for a medium.
    """
    said = [turn for turn in sample.turns if turn.role != "system"]
    answers = [turn for turn in said if turn.role == "assistant"]
    yield from _learned(said, answers)
    yield from _order(sample.turns, said)
    yield from _parts(sample, markers)


def _learned(said: Sequence[Turn], answers: Sequence[Turn]) -> Iterator[Odd]:
    if not answers:
        yield "error", "no answer", "there is no answer to learn from. Add an assistant turn, or remove the row"
    if any(turn.learned and not any(map(_says, turn.parts)) for turn in answers):
        yield (
            "warning",
            "an empty answer",
            "an answer is empty, so what is learned is to say nothing. Give its words, or remove the row",
        )
    if answers and not any(turn.role == "user" for turn in said):
        yield (
            "warning",
            "answers without a question",
            "there are answers and no question, so what they answer is not known. Add a user turn, or remove the row",
        )
    if any(turn.role == "user" and not any(map(_says, turn.parts)) for turn in said):
        yield (
            "warning",
            "an empty question",
            "a question has neither words nor media. Give it some, or remove the turn",
        )


def _says(part: Text | MediaItem) -> bool:
    return not isinstance(part, Text) or bool(part.text.strip())


def _order(turns: Sequence[Turn], said: Sequence[Turn]) -> Iterator[Odd]:
    if any(turn.role == "system" for turn in turns[1:]):
        yield (
            "warning",
            "a system turn that is not the first",
            "a system turn stands behind other turns, where many chat templates refuse it. Put it first",
        )
    if said and said[0].role == "assistant" and any(turn.role == "user" for turn in said):
        yield (
            "warning",
            "the first to speak is the assistant",
            "the assistant speaks before anybody asked, which many chat templates refuse. Begin with a user turn",
        )
    for one, other in itertools.pairwise(said):
        if one.role == other.role:
            yield (
                "warning",
                f"two turns of the {one.role} in a row",
                f"the {one.role} speaks twice in a row, which many chat templates refuse. Join the two turns",
            )
            break
    if said and said[-1].role == "user" and any(turn.role == "assistant" for turn in said):
        yield (
            "note",
            "the last question has no answer",
            "the conversation ends with a question; what follows the last answer is not read. Answer it, or remove it",
        )


def _parts(sample: Sample, markers: Sequence[str]) -> Iterator[Odd]:
    texts = [part.text for turn in sample.turns for part in turn.parts if isinstance(part, Text)]
    if any(turn.role == "assistant" and any(not isinstance(p, Text) for p in turn.parts) for turn in sample.turns):
        yield (
            "error",
            "a medium in an answer",
            "an assistant turn holds a medium, and models answer in words. Move it to a user turn",
        )
    for marker in markers:
        if any(marker in text for text in texts):
            yield (
                "error",
                f"a text spells {marker}",
                f"a text spells {marker}, which stands for a medium, and none belongs to it there. "
                "Give the medium as a part of its own, or write the marker in another way",
            )
    if any("\ufffd" in text for text in texts):
        yield (
            "warning",
            "letters that were lost",
            "a text holds the sign for letters that could not be read (U+FFFD), so it was decoded wrongly once. "
            "Make it again from its origin",
        )
