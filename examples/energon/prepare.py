"""Two small Energon datasets: tar files of samples, and what `energon prepare` writes beside them.

    python examples/energon/prepare.py --out runs/energon/data

`talks` has conversations, a JSON object each with the pictures and sounds that it names:

    train-0-0001.json    {"conversations": [{"from": "human", "value": "<image><audio>What are they?"}, ...],
                          "images": ["png"], "audios": ["wav"]}
    train-0-0001.png
    train-0-0001.wav

Energon hands those out as they are (crude samples); talks.py says what they are. `captions` has a picture and its words
each, one of the sample types that Energon has already: which file is which field stands in `.nv-meta/dataset.yaml`.
Energon splits by tar, so training and held-out samples lie in tars of their own.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from avlm.errors import MissingExtraError

try:
    from megatron.energon.cli.main import main as energon
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "megatron":
        raise
    raise SystemExit(str(MissingExtraError("megatron-energon", "energon", "Energon data"))) from None

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 230)}
TONES_HZ = {"low": 220, "middle": 660, "high": 1980}
RATE_HZ = 16_000

Files = dict[str, bytes]
"""One sample: what each of its files is called behind the sample's key, and its bytes."""


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), COLOURS[colour]).save(file, "PNG")
    return file.getvalue()


def sound(tone: str, rng: np.random.Generator) -> bytes:
    """Half a second of a tone."""
    file = io.BytesIO()
    wave = 0.3 * np.sin(2 * np.pi * TONES_HZ[tone] * rng.uniform(0.95, 1.05) * np.arange(RATE_HZ // 2) / RATE_HZ)
    soundfile.write(file, wave, RATE_HZ, format="WAV")
    return file.getvalue()


def talk(rng: np.random.Generator, number: int) -> Files:
    """Every other conversation is about a sound alone, the others are about a picture and a sound."""
    colour, tone = str(rng.choice(list(COLOURS))), str(rng.choice(list(TONES_HZ)))
    files = {"wav": sound(tone, rng)}
    question, answer = "<audio>How high is it?", tone
    if number % 2:
        files["png"] = picture(colour)
        question, answer = "<image><audio>What are they?", f"{colour} and {tone}"
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    told = {"conversations": said, "images": [name for name in files if name == "png"], "audios": ["wav"]}
    return {"json": json.dumps(told).encode(), **files}


def captioned(rng: np.random.Generator, _: int) -> Files:
    colour = str(rng.choice(list(COLOURS)))
    return {"png": picture(colour), "txt": f"a {colour} square".encode()}


def write_tar(path: Path, samples: Iterable[Files]) -> None:
    """The files of a sample stand next to each other and share what is before the first dot, its key.

    Energon refuses a dataset in which two samples have the same key, in different tars too.
    """
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for name, data in files.items():
                member = tarfile.TarInfo(f"{path.stem}-{number:04d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def index(folder: Path, *kind: str) -> None:
    """Write `.nv-meta`: how many samples each tar has, where they begin, which tars a split has, and their type."""
    quiet = ["--non-interactive", "--force-overwrite", "--no-progress", "--num-workers", "1"]
    splits = ["--split-parts", "train:train-.*", "--split-parts", "val:val-.*"]
    energon(["prepare", *quiet, *splits, "--sample-type", *kind, str(folder)], standalone_mode=False)


def write(out: Path, count: int = 24) -> list[Path]:
    """The two datasets, made once."""
    rng = np.random.default_rng(0)
    talks, captions = out / "talks", out / "captions"
    for folder, make in ((talks, talk), (captions, captioned)):
        if (folder / ".nv-meta" / "dataset.yaml").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for split, share in (("train", count), ("val", count // 4)):
            write_tar(folder / f"{split}-0.tar", (make(rng, number) for number in range(share)))
        if folder == talks:
            index(folder, "CrudeWebdataset")
        else:
            index(folder, "CaptioningSample", "--field-map", '{"image": "png", "caption": "txt"}')
    return [talks, captions]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/energon/data"))
    given = parser.parse_args(arguments)
    print(f"train with them: --data {' '.join(map(str, write(given.out)))}")


if __name__ == "__main__":
    main()
