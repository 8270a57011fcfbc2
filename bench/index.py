"""Counting rows for an index, against encoding them.

Rows of a picture of 640 x 480 pixels, as hard to decode as a photograph, with 150 words, and rows of a recording with
50. Both are read from JSON lines by one process; each row has a file of its own. Runs alternate.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one thread

import numpy as np
from harness import Figures, judged
from PIL import Image

from avlm.config.media import AudioSpec, MediaSpec, Reduction, VisionSpec
from avlm.data.indexing.index import build_index
from avlm.data.processor import AvlmProcessor
from avlm.data.sources import JsonLines
from avlm.data.text.vocabulary import make_tokenizer
from avlm.data.world.sounds import write_wav

ROWS, ENCODED, ROUNDS = 4000, 200, 3
"""Rows that are counted, those of them that are encoded, and how often both is done."""
BAR = 20.0
"""How many times faster counting is wanted to be than encoding."""
DIFFERENT = 50
"""Media that are made; the others are links to them."""
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECS = {
    "CLIP at 336 px": MediaSpec(
        vision=VisionSpec(image_size_px=336, cell_px=14), audio=AudioSpec(reduction=Reduction(stack=8))
    ),
    "InternVL's tiles": MediaSpec(
        vision=VisionSpec.model_validate({"image_size_px": 448, "cell_px": 14, "tiling": {"kind": "internvl"}}),
        audio=AudioSpec(window_frames=3000, reduction=Reduction(stack=8)),
    ),
}


def words(rng: np.random.Generator, count: int) -> str:
    """Made-up words, as long and as often repeated as those of a language (Zipf)."""
    numbers = rng.zipf(1.3, count) % 20_000
    return " ".join(_word(int(n)) for n in numbers)


def _word(number: int) -> str:
    rng = np.random.default_rng(number)
    return "".join(rng.choice(list("etaoinshrdlucmfwypvbgkqjxz"), 2 + int(rng.integers(0, 4)) + (number > 100) * 2))


def photograph(path: Path, rng: np.random.Generator) -> None:
    """Detail at every scale, as photographs have it: a spectrum that falls with the frequency."""
    pixels = np.zeros((480, 640, 3))
    for scale in (2, 4, 8, 16, 32, 64):
        grain = rng.normal(0, 4 * scale**0.7, (480 // scale + 1, 640 // scale + 1, 3)).astype(np.float32)
        layer = np.stack([np.asarray(Image.fromarray(grain[..., c]).resize((640, 480))) for c in range(3)], -1)
        pixels += layer
    Image.fromarray(np.clip(128 + pixels, 0, 255).astype(np.uint8)).save(path, quality=90)


def rows(folder: Path, kind: str) -> Path:
    """A data file of one kind of rows."""
    rng = np.random.default_rng(0)
    path = folder / f"{kind}.jsonl"
    with path.open("w") as file:
        for i in range(ROWS):
            if kind == "image":
                name = f"{i}.jpg"
                if i < DIFFERENT:
                    photograph(folder / name, rng)
            else:
                name = f"{i}.wav"
                if i < DIFFERENT:
                    write_wav(folder / name, rng.normal(0, 0.1, int(16_000 * rng.uniform(5, 30))).astype(np.float32))
            if i >= DIFFERENT:
                os.link(folder / f"{i % DIFFERENT}{name[-4:]}", folder / name)
            asked, said = words(rng, 20), words(rng, 130 if kind == "image" else 30)
            media = {"type": kind, "path": name}
            content = [media, {"type": "text", "text": asked}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")
    return path


def timed(call: Callable[[], object], rows: int = ROWS) -> float:
    """Milliseconds a row."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) / rows * 1e3


def measured(path: Path, processor: AvlmProcessor) -> tuple[float, float, float, float]:
    """Milliseconds a row: encoding, counting from nothing, with known headers, and with known rows."""
    times: list[tuple[float, float, float, float]] = []
    source, other = JsonLines(path), processor.with_template(CHATML.replace("|>\n", "|>\n\n"))
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            encode = timed(lambda: [processor.encode(source[i]) for i in range(ENCODED)], ENCODED)
            fresh, headers, again = (
                timed(partial(build_index, source, of, folder)) for of in (processor, other, processor)
            )
            times.append((encode, fresh, headers, again))
    return tuple(statistics.median(column) for column in zip(*times, strict=True))  # type: ignore[return-value]


def main() -> list[Figures]:
    """The table."""
    head = ["rows", "encode, ms a row", "index", "ratio", "another template", "nothing new", "bar"]
    table = Figures("index", "Counting rows for an index, against encoding them", head)
    rng = np.random.default_rng(1)
    tokenizer = make_tokenizer((words(rng, 200) for _ in range(500)), 16_000)
    with tempfile.TemporaryDirectory() as folder:
        for kind, what in (("image", "640 x 480 JPEG, 150 words"), ("audio", "WAV of 5 to 30 s, 50 words")):
            path = rows(Path(folder), kind)
            for name, spec in SPECS.items():
                processor = AvlmProcessor(tokenizer, spec.model_dump(mode="json"), CHATML)
                encode, fresh, headers, again = measured(path, processor)
                figures = [f"{encode:.2f}", f"{fresh:.3f}", f"{encode / fresh:.1f}", f"{headers:.3f}", f"{again:.3f}"]
                table.rows.append([f"{what}; {name}", *figures, judged(BAR, encode / fresh >= BAR)])
    return [table]
