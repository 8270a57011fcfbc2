"""Rows of your own in LLaVA's form: a JSON list with `image` and `conversations`.

    python examples/neva/own_data.py --pictures FOLDER --out runs/neva/data

FOLDER holds pictures, each with its caption in a text file of the same name (cat.jpg, cat.txt). Every picture becomes
one row: the first question asks for the caption, the second one goes on in the same conversation. A tenth is held out.
avlm reads such files as they are; `<image>` stands where the picture is, and a row without one is text alone.
Without --pictures the script draws some.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import made

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def row(picture: Path, caption: str, folder: Path) -> dict[str, Any]:
    """One conversation about one picture."""
    return {
        "id": picture.stem,
        "image": str(picture.relative_to(folder)),
        "conversations": [
            {"from": "human", "value": "<image>\nWhat do you see?"},
            {"from": "gpt", "value": caption},
            {"from": "human", "value": "How many words did you need?"},
            {"from": "gpt", "value": str(len(caption.split()))},
        ],
    }


def text_row(number: int) -> dict[str, Any]:
    """A row without a picture: such rows may stand anywhere among the others."""
    said = [{"from": "human", "value": f"What comes after {number}?"}, {"from": "gpt", "value": str(number + 1)}]
    return {"id": f"text-{number}", "conversations": said}


def write(folder: Path, out: Path) -> tuple[Path, Path]:
    """Training and held-out rows of a folder of pictures."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    told = [path for path in found if path.with_suffix(".txt").is_file()]
    if not told:
        raise SystemExit(f"{folder} has no picture with its caption beside it (cat.jpg and cat.txt).")
    rows = [row(path, path.with_suffix(".txt").read_text().strip(), folder) for path in told]
    held = rows[::10]
    train = [one for one in rows if one not in held] + [text_row(n) for n in range(4)]
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("eval", held)):
        (out / f"{name}.json").write_text(json.dumps(part, indent=1))
    return out / "train.json", out / "eval.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of pictures with captions; default: some are drawn")
    parser.add_argument("--out", type=Path, default=Path("runs/neva/data"))
    given = parser.parse_args(arguments)
    folder = given.pictures or made.pictures(given.out / "pictures")
    train, held = write(folder, given.out)
    print(json.dumps(json.loads(train.read_text())[0], indent=1))
    print(f"{train}: {len(json.loads(train.read_text()))} rows; {held}: {len(json.loads(held.read_text()))} held out")
    print(f"train with them: data.train={train} data.eval={held} data.folder={folder}")


if __name__ == "__main__":
    main()
