"""What a server that plans ahead has to know of media, from the layout: who else would know it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from avlm.config.media import MediaSpec
from avlm.layout import (
    Facts,
    ImageFacts,
    Size,
    audio_token_count,
    chunk_sample_count,
    image_token_count,
    segments,
)

MOST_TILES = 16
"""Sides of a picture that are tried, in squares of the encoder's."""


def kinds(media: MediaSpec) -> dict[str, None]:
    """Media that can be asked about one by one, as many as one likes. Videos are none: their sound is part of them."""
    senses = {"image": media.vision, "audio": media.audio}
    return {kind: None for kind, sense in senses.items() if sense is not None}


def largest_picture(media: MediaSpec) -> Size:
    """Height and width of a picture that takes as many tokens as any."""
    assert media.vision is not None
    side = media.vision.image_size_px
    sizes = [(side * rows, side * columns) for rows in range(1, MOST_TILES + 1) for columns in range(1, MOST_TILES + 1)]
    return max(sizes, key=lambda size: image_token_count(media.vision, size))  # type: ignore[arg-type]


def longest_sound(media: MediaSpec) -> int:
    """Samples of the longest sound that is heard in one piece. Longer ones are heard in several."""
    assert media.audio is not None
    return chunk_sample_count(media.audio)


def tone(samples: int) -> np.ndarray:
    """A sound of so many samples: float32 within -1 to 1."""
    return (0.1 * np.sin(np.arange(samples) / 8)).astype(np.float32)


def most_tokens(media: MediaSpec) -> dict[str, int]:
    """Tokens of the largest picture and of the longest sound in one piece."""
    found = {}
    if media.vision is not None:
        found["image"] = image_token_count(media.vision, largest_picture(media))
    if media.audio is not None:
        found["audio"] = audio_token_count(longest_sound(media), media.audio)
    return found


def replacement(tokens: int, kind: str, media: MediaSpec, placeholder: int, ids: Mapping[str, int]) -> list[int]:
    """What stands for one medium in a prompt: its places, and the tokens around them.

    Args:
        tokens: How many places.
        placeholder: The id that reserves one.
        ids: The tokenizer's vocabulary, for the tokens around them.
    """
    part = media.vision if kind == "image" else media.audio
    places = [placeholder] * tokens
    if part is None or part.wrap is None:
        return places
    return [ids[part.wrap[0]], *places, ids[part.wrap[1]]]


def places(facts: Facts, media: MediaSpec) -> int:
    """How many places one picture or sound takes."""
    kind = "image" if isinstance(facts, ImageFacts) else "audio"
    return sum(segment.count for segment in segments(facts, media) if segment.kind == kind)
