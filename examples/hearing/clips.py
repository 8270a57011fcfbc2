"""Made-up rows for these examples: tones and coloured squares, each with what it is in words (`alt`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

TONES_HZ = {"low": 220, "middle": 660, "high": 1980}
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 230)}
RATE_HZ = 16_000


def write(out: Path, count: int = 32, *, pictures: bool = True) -> Path:
    """Rows about a sound each, and about a picture each where they are wanted; made once."""
    rows = out / ("rows.jsonl" if pictures else "sounds.jsonl")
    if rows.is_file():
        return rows
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        tone, colour = str(rng.choice(list(TONES_HZ))), str(rng.choice(list(COLOURS)))
        if pictures and number % 2:
            path, kind, alt, asked, answer = out / f"{number}.png", "image", f"a {colour} square", "colour", colour
            Image.new("RGB", (48, 48), COLOURS[colour]).save(path)
        else:
            path, kind, alt, asked, answer = out / f"{number}.wav", "audio", f"a {tone} tone", "height", tone
            time_s = np.arange(round(RATE_HZ * rng.uniform(0.3, 1.0))) / RATE_HZ
            soundfile.write(path, 0.3 * np.sin(2 * np.pi * TONES_HZ[tone] * time_s), RATE_HZ)
        medium = {"type": kind, "path": path.name, "alt": alt}
        question = {"type": "text", "text": f"Which {asked} is it?"}
        messages = [{"role": "user", "content": [medium, question]}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": str(number), "messages": messages}) + "\n")
    rows.write_text("".join(lines))
    return rows
