"""Rows of one's own with pictures and sounds, as JSON lines.

    python examples/avlm/rows.py --out runs/avlm/data

One object a line, media paths relative to the file; see docs/data.md. There are four kinds of row here, and each stage
of `avlm.8b` takes those that it can learn from: vision alignment the ones with pictures and no sound, audio alignment
the ones with sounds and no picture, fine-tuning all of them. The pictures and sounds are drawn and played by this
script; to have yours, write lines like these.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 230)}
TONES_HZ = {"low": 220, "middle": 660, "high": 1980}
RATE_HZ = 16_000


def picture(path: Path, colour: str, rng: np.random.Generator) -> dict[str, str]:
    """A coloured square on grain, as the part of a message that it is."""
    pixels = rng.integers(90, 166, (48, 48, 3), dtype=np.uint8)
    top, left = rng.integers(0, 24, 2)
    pixels[top : top + 24, left : left + 24] = COLOURS[colour]
    Image.fromarray(pixels).save(path)
    return {"type": "image", "path": path.name}


def sound(path: Path, tone: str, rng: np.random.Generator) -> dict[str, str]:
    """Half a second of a tone, as the part of a message that it is."""
    time_s = np.arange(RATE_HZ // 2) / RATE_HZ
    wave = 0.3 * np.sin(2 * np.pi * TONES_HZ[tone] * rng.uniform(0.95, 1.05) * time_s)
    soundfile.write(path, wave, RATE_HZ)
    return {"type": "audio", "path": path.name}


def row(number: int, out: Path, rng: np.random.Generator) -> dict[str, Any]:
    """One question with its answer: about a picture, a sound, both, or neither."""
    colour, tone = str(rng.choice(list(COLOURS))), str(rng.choice(list(TONES_HZ)))
    seen, heard = out / f"{number}.png", out / f"{number}.wav"
    kind = ("look", "listen", "both", "text")[number % 4]
    if kind == "look":
        content, answer = [picture(seen, colour, rng), words("Which colour is it?")], colour
    elif kind == "listen":
        content, answer = [sound(heard, tone, rng), words("How high is it?")], tone
    elif kind == "both":
        media = [picture(seen, colour, rng), sound(heard, tone, rng)]
        content, answer = [*media, words("What are they?")], f"{colour} and {tone}"
    else:
        content, answer = [words(f"What comes after {number}?")], str(number + 1)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "task": kind, "messages": messages}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def write(out: Path, count: int = 64) -> tuple[Path, Path]:
    """Training and held-out rows, made once."""
    train, held = out / "train.jsonl", out / "eval.jsonl"
    if not held.is_file():
        out.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        lines = [json.dumps(row(number, out, rng)) + "\n" for number in range(count)]
        train.write_text("".join(lines[:-8]))
        held.write_text("".join(lines[-8:]))
    return train, held


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/avlm/data"))
    train, held = write(parser.parse_args(arguments).out)
    print("".join(train.read_text().splitlines(keepends=True)[:4]), end="")
    print(f"train with them: data.train={train} data.eval={held}")


if __name__ == "__main__":
    main()
