"""Made-up rows for a run that was given none: pictures, tones and short videos with words for them.

They show that a recipe runs from end to end; what a model learns from them is of no use.
Everything is drawn from a seed, and each medium has its `alt`, so that every kind of stage
(alignment, distillation, encoders that learn words) finds rows to learn from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from avlm.data.world.pictures import RGB
from avlm.data.world.sounds import SAMPLE_RATE_HZ, write_wav
from avlm.data.world.video import FRAMES_PER_S, write_clip

SIDE_PX = 48
SOUND_S = 0.5
TONES_HZ = {"low": 220.0, "middle": 660.0, "high": 1980.0}
ROWS = 64

_KINDS: dict[tuple[bool, bool], tuple[str, ...]] = {
    (True, True): ("image", "audio", "text", "image audio", "image", "audio", "video", "noise"),
    (True, False): ("image", "image", "video", "text"),
    (False, True): ("audio", "audio", "noise", "text"),
    (False, False): ("text",),
}
"""What the rows hold, in turn, by whether the model sees and whether it hears."""


def make_mock(folder: Path, *, sees: bool, hears: bool, tasks: Sequence[str] = (), seed: int = 0) -> Path:
    """Write a data set of made-up rows, or find the one that was written before.

    Args:
        folder: Where it goes.
        sees, hears: Senses of the model: whether there are pictures and videos, whether there are sounds.
        tasks: Names of tasks that stages ask for; every kind of row comes with each of them.
        seed: Of all that is drawn.

    Returns:
        The file of rows. It appears when everything else is written.

    Raises:
        OSError: The folder cannot be written to.
    """
    out = folder / "rows.jsonl"
    if out.is_file():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0x6D6F636B])
    kinds = _KINDS[sees, hears]
    named = tasks or ("",)
    rows = []
    for i in range(ROWS):
        turns = _row(kinds[i % len(kinds)], folder, str(i), rng)
        rows.append({"id": str(i), "task": named[i // len(kinds) % len(named)], "messages": turns})
    aside = folder / ".rows.jsonl.writing"
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return aside.replace(out)


def _row(kind: str, folder: Path, name: str, rng: Generator) -> list[dict[str, Any]]:
    """One question and its answer."""
    state: dict[str, str] = {}
    media: list[dict[str, str]] = []
    if kind == "text":
        a, b = (int(n) for n in rng.integers(1, 5, 2))
        question, answer = f"What is {a} plus {b}?", str(a + b)
    elif kind == "video":
        colours = [str(c) for c in rng.choice(list(RGB), 2, replace=False)]
        answer = " then ".join(colours)
        media, question = [_video(folder, name, colours, rng)], "Which colours does it show?"
    elif kind == "noise":
        media, question, answer = [_sound(folder, name, None, rng)], "", "Nothing was asked."
        state = {"state": "noise"}
    else:
        colour, tone = str(rng.choice(list(RGB))), str(rng.choice(list(TONES_HZ)))
        said = {"image": colour, "audio": tone, "image audio": f"{colour} and {tone}"}
        if "image" in kind:
            media.append(_picture(folder, name, colour, rng))
        if "audio" in kind:
            media.append(_sound(folder, name, tone, rng))
        asked = {"image": "Which colour is it?", "audio": "How high is it?"}
        question, answer = asked.get(kind, "What are they?"), said[kind]
    content = [*media, {"type": "text", "text": question}] if question else media
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer, **state}]


def _pixels(colour: str, rng: Generator) -> np.ndarray:
    """A coloured square somewhere on grain: uint8 [SIDE_PX, SIDE_PX, 3]."""
    pixels = rng.integers(90, 166, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    top, left = rng.integers(0, SIDE_PX // 2, 2)
    pixels[top : top + SIDE_PX // 2, left : left + SIDE_PX // 2] = RGB[colour]  # type: ignore[index]
    return pixels


def _wave(tone: str | None, seconds: float, rng: Generator) -> np.ndarray:
    """A tone, or noise where there is none: float32 at 16 kHz."""
    time = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = (0.1 if tone is None else 0.02) * rng.standard_normal(len(time))
    if tone is not None:
        wave += 0.3 * np.sin(2 * np.pi * TONES_HZ[tone] * rng.uniform(0.95, 1.05) * time)
    return wave.astype(np.float32)


def _picture(folder: Path, name: str, colour: str, rng: Generator) -> dict[str, str]:
    from PIL import Image

    Image.fromarray(_pixels(colour, rng)).save(folder / f"{name}.png")
    return {"type": "image", "path": f"{name}.png", "alt": f"a {colour} square"}


def _sound(folder: Path, name: str, tone: str | None, rng: Generator) -> dict[str, str]:
    write_wav(folder / f"{name}.wav", _wave(tone, SOUND_S, rng))
    return {"type": "audio", "path": f"{name}.wav", "alt": "noise" if tone is None else f"a {tone} tone"}


def _video(folder: Path, name: str, colours: Sequence[str], rng: Generator) -> dict[str, str]:
    """A second of two colours, one after the other, with a tone all the time."""
    frames = np.stack([_pixels(colour, rng) for colour in colours for _ in range(FRAMES_PER_S // 2)])
    write_clip(folder / f"{name}.mp4", frames, _wave("middle", len(frames) / FRAMES_PER_S, rng))
    return {"type": "video", "path": f"{name}.mp4", "alt": f"{' then '.join(colours)}, with a middle tone"}
