"""Media and conversations as a program has them: paths, bytes, addresses, pictures of Pillow, arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from avlm.data.decoding.decode import to_picture
from avlm.data.fetching.urls import is_data_url
from avlm.data.forms.parse import Folders, cut_of, parse_row
from avlm.data.text.templates import PLACEHOLDERS
from avlm.errors import DataError, MediaError
from avlm.samples import Clip, MediaItem, Picture, Sample, Sound

MOST_CHANNELS = 32
"""Of a sound given as an array; what has more rows is none."""


def flat(given: Any) -> list[Any]:
    """One medium, a list, or a list of lists, as a list."""
    if given is None:
        return []
    return [inner for value in given for inner in flat(value)] if isinstance(given, (list, tuple)) else [given]


def conversation_sample(
    messages: Sequence[dict[str, Any]], *, bare: bool = False, rate_hz: int | None = None
) -> Sample:
    """A conversation in the messages form, media by path or as arrays, as a sample.

    Args:
        messages: The conversation.
        bare: Whether media may be without either, for a text that only has their places.
        rate_hz: Of sounds given as arrays that do not say it themselves.

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
                    rate = part.get("sampling_rate") or rate_hz
                    given[i] = media_item(kind, values[0], rate, start_s=start, end_s=end)
                elif bare:
                    given[i] = MediaItem(kind)
        if given:
            kept = [{"type": "text", "text": ""} if i in given else part for i, part in enumerate(content or ())]
            message = {**message, "content": kept}
        elif isinstance(content, tuple):
            message = {**message, "content": list(content)}
        if isinstance(message, dict):  # what is learned of it is nobody's question here
            message = {key: value for key, value in message.items() if key not in ("weight", "loss")}
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
        wanted = {"image": " of uint8 or of 0 to 1, [height, width, 3]", "audio": " of samples"}.get(kind)
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
    pixels = _upright(np.asarray(value))
    if pixels is None or not pixels.size:
        return None
    if pixels.dtype.kind == "f":  # as torchvision's and scikit-image's are
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            return None
        pixels = np.rint(255 * pixels).astype(np.uint8)
    if pixels.dtype != np.uint8:
        return None
    if pixels.shape[2] == 3:
        return Picture(pixels)
    return to_picture(PILImage.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _upright(pixels: np.ndarray) -> np.ndarray | None:
    """[height, width, colours] of a picture whose colours come first or last, or that has one alone; None of others."""
    if pixels.ndim == 2:
        return pixels[:, :, None]
    if pixels.ndim != 3:
        return None
    if pixels.shape[2] in (1, 3, 4):
        return pixels
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)) if pixels.shape[0] in (1, 3, 4) else None


def _sound(value: Any, rate_hz: int | None) -> Sound | None:
    """One channel, or a few, one behind the other, which are averaged; whole numbers are taken for samples as WAV files
    have them. The form that `datasets` has is read, too: {"array": ..., "sampling_rate": ...}."""
    if isinstance(value, Mapping) and "array" in value:
        value, rate_hz = value["array"], value.get("sampling_rate") or rate_hz
    try:
        wave = np.asarray(value)
    except ValueError:  # a list of lists of several lengths
        return None
    rate = 16_000 if rate_hz is None else rate_hz
    if wave.ndim == 2 and 1 <= wave.shape[0] <= min(MOST_CHANNELS, wave.shape[1] - 1) and wave.dtype.kind in "fi":
        wave = wave[0] if wave.shape[0] == 1 else _scaled(wave).mean(0)
    if wave.ndim != 1 or wave.dtype.kind not in "fiu" or rate < 1:
        return None
    return Sound(_scaled(wave).astype(np.float32), int(rate))


def _scaled(wave: np.ndarray) -> np.ndarray:
    if wave.dtype.kind in "iu":
        full = 2.0 ** (8 * wave.dtype.itemsize - 1)
        wave = wave / full - (1.0 if wave.dtype.kind == "u" else 0.0)
    return wave
