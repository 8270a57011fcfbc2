"""Rows out of real handwritten digits, photographs and human recordings.

    python examples/digits/build.py DATA OUT

DATA holds MNIST, CIFAR-10 and the Free Spoken Digit Dataset, as folders or as .tar.gz archives of them:

    mnist/train/<digit>/<id>.png    cifar10/train/<class>/<id>.jpg    fsdd/train/<digit>_<speaker>_<take>.wav

OUT gets ``train.jsonl`` and ``eval.jsonl``. A tenth of the pictures and of each speaker's takes is held out, and one
speaker as a whole. Where DATA also has ``<name>/test/...``, all of that is held out besides.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
WHERE_FROM = """These public data sets are needed, and this example downloads nothing itself:
  MNIST      handwritten digits, as PNG files      https://yann.lecun.com/exdb/mnist/
  CIFAR-10   photographs, as JPEG files            https://www.cs.toronto.edu/~kriz/cifar.html
  FSDD       spoken digits, as WAV files           https://github.com/Jakobovski/free-spoken-digit-dataset
Lay them out as DATA/mnist/train/<digit>/*.png, DATA/cifar10/train/<class>/*.jpg and
DATA/fsdd/train/<digit>_<speaker>_<take>.wav"""
PAIRS = {"train": 9000, "eval": 500}
"""Rows of each task that takes a picture and a recording."""


@dataclass
class Part:
    """What one side of the split may use: files with their labels."""

    digits: list[tuple[Path, int]] = field(default_factory=list)
    photos: list[tuple[Path, str]] = field(default_factory=list)
    spoken: list[tuple[Path, int]] = field(default_factory=list)
    """Speakers that are heard in training."""
    strangers: list[tuple[Path, int]] = field(default_factory=list)
    """Recordings of the speaker who is never heard in training."""


def unpack(data: Path, out: Path) -> Path:
    """Folder with the three data sets: DATA itself, or its archives unpacked into OUT."""
    if (data / "mnist").is_dir():
        return data
    archives = sorted(data.glob("*.tar.gz"))
    if not archives:
        raise SystemExit(f"{data} holds neither a folder mnist nor any .tar.gz archive.\n{WHERE_FROM}")
    folder = out / "media"
    if not (folder / ".complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
        (folder / ".complete").touch()
    return folder


def split(folder: Path, rng: np.random.Generator, stranger: str | None = None) -> tuple[Part, Part, str]:
    """Training and held-out files, and the name of the speaker who is kept apart."""
    train, held = Part(), Part()
    for path in _shuffled(folder.glob("mnist/train/*/*.png"), rng):
        _side(train, held, rng).digits.append((path, int(path.parent.name)))
    for path in _shuffled(folder.glob("cifar10/train/*/*.jpg"), rng):
        _side(train, held, rng).photos.append((path, path.parent.name))
    recordings = _shuffled(folder.glob("fsdd/train/*.wav"), rng)
    if not (train.digits and train.photos and recordings):
        raise SystemExit(f"{folder} lacks one of the three data sets.\n{WHERE_FROM}")
    stranger = stranger or sorted({speaker(path) for path in recordings})[-1]
    for path in recordings:
        if speaker(path) == stranger:
            held.strangers.append((path, _spoken_digit(path)))
        else:
            _side(train, held, rng).spoken.append((path, _spoken_digit(path)))
    known = {speaker(path) for path, _ in train.spoken}
    for path in sorted(folder.glob("mnist/test/*/*.png")):
        held.digits.append((path, int(path.parent.name)))
    for path in sorted(folder.glob("cifar10/test/*/*.jpg")):
        held.photos.append((path, path.parent.name))
    for path in sorted(folder.glob("fsdd/test/*.wav")):
        (held.spoken if speaker(path) in known else held.strangers).append((path, _spoken_digit(path)))
    return train, held, stranger


def speaker(path: Path) -> str:
    """Who speaks in a recording."""
    return path.stem.split("_")[1]


def _spoken_digit(path: Path) -> int:
    return int(path.stem.split("_")[0])


def _shuffled(paths: Iterator[Path], rng: np.random.Generator) -> list[Path]:
    found = sorted(paths)
    return [found[i] for i in rng.permutation(len(found))]


def _side(train: Part, held: Part, rng: np.random.Generator) -> Part:
    return held if rng.random() < 0.1 else train


def rows(part: Part, name: str, rng: np.random.Generator) -> Iterator[dict[str, object]]:
    """All tasks of one side. In training each recording is asked about more than once: there are few of them."""
    for path, digit in part.digits:
        yield row("written", name, [("image", path, WORDS[digit])], "Which digit is written?", WORDS[digit])
    for path, kind in part.photos:
        yield row("photo", name, [("image", path, kind)], "What is in the photograph?", kind)
    for _ in range(3 if name == "train" else 1):
        for path, digit in part.spoken:
            yield row("spoken", name, [("audio", path, WORDS[digit])], "Which digit is spoken?", WORDS[digit])
    for path, digit in part.strangers:
        yield row("spoken-new-voice", name, [("audio", path, WORDS[digit])], "Which digit is spoken?", WORDS[digit])
    yield from _pairs(part, name, rng)


def _pairs(part: Part, name: str, rng: np.random.Generator) -> Iterator[dict[str, object]]:
    """Questions that need the picture and the recording. Half of the matches match, and every sum of digits is as
    frequent as two fair draws make it."""
    pictures = _by_digit(part.digits)
    recordings = _by_digit(part.spoken)
    if not (all(pictures) and all(recordings)):
        raise SystemExit("a digit has no picture or no recording on one side of the split. Use more of the data sets")

    def both(written: int, spoken: int) -> list[Medium]:
        picture, recording = _pick(pictures[written], rng), _pick(recordings[spoken], rng)
        return [("image", picture, WORDS[written]), ("audio", recording, WORDS[spoken])]

    for i in range(PAIRS[name]):
        a, b = (int(d) for d in rng.integers(0, 10, 2))
        question = "What is the sum of the written and the spoken digit?"
        yield row("sum", name, both(a, b), question, WORDS[a + b])
        same = i % 2 == 0
        other = a if same else (a + int(rng.integers(1, 10))) % 10
        question = "Is the spoken digit the written one?"
        yield row("match", name, both(a, other), question, "yes" if same else "no")


def _by_digit(files: Sequence[tuple[Path, int]]) -> list[list[Path]]:
    return [[path for path, digit in files if digit == wanted] for wanted in range(10)]


def _pick(paths: Sequence[Path], rng: np.random.Generator) -> Path:
    return paths[int(rng.integers(len(paths)))]


_numbers: dict[str, int] = {}

Medium = tuple[str, Path, str]
"""Kind, file, and what it shows or says."""


def row(task: str, side: str, media: Sequence[Medium], question: str, answer: str) -> dict[str, object]:
    """One row in avlm's own form. Held-out media do not come with what they show."""
    number = _numbers[task] = _numbers.get(task, -1) + 1
    parts: list[dict[str, str]] = [
        {"type": kind, "path": str(path.resolve())} | ({"alt": alt} if side == "train" else {})
        for kind, path, alt in media
    ]
    return {
        "id": f"{task}-{side}-{number}",
        "task": task,
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ],
    }


def build(data: Path, out: Path, *, seed: int = 0, stranger: str | None = None) -> str:
    """Write ``train.jsonl`` and ``eval.jsonl``; returns the name of the speaker who is kept apart."""
    if not data.is_dir():
        raise SystemExit(f"{data}: there is no such folder.\n{WHERE_FROM}")
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    train, held, stranger = split(unpack(data, out), rng, stranger)
    for name, part in (("train", train), ("eval", held)):
        text = "".join(json.dumps(r) + "\n" for r in rows(part, name, rng))
        (out / f"{name}.jsonl").write_text(text)
    return stranger


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: python {sys.argv[0]} DATA OUT\n{WHERE_FROM}")
    kept_apart = build(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: train.jsonl and eval.jsonl; the speaker {kept_apart} is held out as a whole")
