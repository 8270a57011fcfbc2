"""Ask a model about a picture and a sound together, in words.

    python examples/avlm/generate.py --model runs/avlm/run/model --image a.png --audio b.wav --prompt "What are they?"

Any of the three may be left out, and there may be several of each. On the command line:

    avlm chat runs/avlm/run/model --image a.png --audio b.wav "What are they?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows

import avlm


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/avlm/run/model"))
    parser.add_argument("--image", type=Path, action="append", help="default, without --audio: one of rows.py's")
    parser.add_argument("--audio", type=Path, action="append", help="default, without --image: one of rows.py's")
    parser.add_argument("--prompt", default="What are they?")
    parser.add_argument("--max-tokens", type=int, default=16)
    given = parser.parse_args(arguments)
    if not given.model.is_dir():
        raise SystemExit(f"{given.model}: there is no such model directory. Run examples/avlm/train.py first")
    images, sounds = given.image or [], given.audio or []
    if not images and not sounds:
        data = rows.write(Path("runs/avlm/data"))[0].parent
        images, sounds = [data / "2.png"], [data / "2.wav"]
    chat = avlm.load(given.model)
    sampling = avlm.Sampling(max_tokens=given.max_tokens)
    media = [*map(avlm.Image, images), *map(avlm.Audio, sounds)]
    print(f"together: {chat.chat(*media, given.prompt, sampling=sampling)!r}")
    for name, one in zip([*images, *sounds], media, strict=True):
        print(f"{name} alone: {chat.chat(one, given.prompt, sampling=sampling)!r}")
    print(f"text alone: {chat.chat(given.prompt, sampling=sampling)!r}")


if __name__ == "__main__":
    main()
