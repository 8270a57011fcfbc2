"""Counting rows for an index, against encoding them.

Rows of a picture of 640 x 480 pixels, as hard to decode as a photograph, with 150 words, and rows of a recording with
50. Both are read from JSON lines by one process, which is there already; each row has a file of its own. Runs
alternate, and the best of each is told. Counting begins with nothing: no word is known, no header read, and what it
finds is written to the disk.

Beside it stands the least that counting could take if it did nothing but read: each row and its JSON, the first bytes
of its medium, and its words by the `tokenizers` library, all rows in one call.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one thread

import numpy as np
from harness import Figures, judged
from PIL import Image

from avlm.config.media import AudioSpec, MediaSpec, Reduction, VisionSpec
from avlm.data.decoding.plain import HEAD
from avlm.data.indexing.index import build_index
from avlm.data.processor import AvlmProcessor
from avlm.data.sources import JsonLines
from avlm.data.text.vocabulary import make_tokenizer
from avlm.data.world.sounds import write_wav

ROWS, ENCODED, ROUNDS = 20_000, 200, 3
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


class Times(NamedTuple):
    """Milliseconds a row."""

    encode: float
    new: float
    """Counting from nothing."""
    other: float
    """With known headers."""
    again: float
    """With known rows."""
    least: float
    """Reading alone."""


def words(rng: np.random.Generator, count: int) -> str:
    """Made-up words, as long and as often repeated as those of a language (Zipf)."""
    numbers = rng.zipf(1.3, count) % 20_000
    return " ".join(_word(int(n)) for n in numbers)


@cache
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


def measured(path: Path, processor: AvlmProcessor) -> Times:
    """The best of some rounds."""
    times: list[Times] = []
    source = JsonLines(path)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            new, other = processor.with_template(CHATML), processor.with_template(CHATML.replace("|>\n", "|>\n\n"))
            encode = timed(lambda: [processor.encode(source[i]) for i in range(ENCODED)], ENCODED)
            counts = [timed(partial(build_index, source, of, folder)) for of in (new, other, new)]
            times.append(Times(encode, *counts, timed(partial(read, path, processor))))
    return Times(*map(min, zip(*times, strict=True)))


def read(path: Path, processor: AvlmProcessor) -> None:
    """What nobody who counts can do without."""
    texts: list[str] = []
    with path.open("rb") as file:
        for line in file:
            asked, answered = json.loads(line)["messages"]
            medium, words = asked["content"]
            with (path.parent / medium["path"]).open("rb") as header:
                header.read(HEAD)
            texts += [words["text"], answered["content"]]
    backend = processor.tokenizer.backend_tokenizer
    assert len(backend.encode_batch_fast(texts, add_special_tokens=False)) == 2 * ROWS


def main() -> list[Figures]:
    """The table."""
    head = ["rows", "encode, ms a row", "index", "ratio", "another template", "nothing new", "reading alone", "bar"]
    table = Figures("index", "Counting rows for an index, against encoding them", head)
    rng = np.random.default_rng(1)
    tokenizer = make_tokenizer((words(rng, 200) for _ in range(500)), 16_000)
    with tempfile.TemporaryDirectory() as folder:
        for kind, what in (("image", "640 x 480 JPEG, 150 words"), ("audio", "WAV of 5 to 30 s, 50 words")):
            path = rows(Path(folder), kind)
            for name, spec in SPECS.items():
                processor = AvlmProcessor(tokenizer, spec.model_dump(mode="json"), CHATML)
                ms = measured(path, processor)
                ratio = ms.encode / ms.new
                figures = [f"{ms.encode:.2f}", f"{ms.new:.3f}", f"{ratio:.1f}"]
                figures += [f"{of:.3f}" for of in (ms.other, ms.again, ms.least)]
                table.rows.append([f"{what}; {name}", *figures, judged(BAR, ratio >= BAR)])
    return [table]
