"""Train on real digits, photographs and voices, and report on the held-out part.

    python examples/digits/run.py DATA [--out runs/digits]

Builds the rows (see build.py), then runs ``avlm train tiny`` on them with the settings below. Stopped, it goes on where
it was when it is called again. The report by task is ``report.json``, the page ``report.html``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from build import build

SETTINGS = [
    "stages.language.steps=500",
    "stages.vision.steps=3500",
    "stages.vision.batch_samples=32",
    "stages.vision.tasks=[written, photo]",  # the digits of the pairs are the same ones again
    "stages.vision.augment.flip=true",  # no question is about left and right
    "stages.audio.steps=1500",
    "stages.audio.augment.noise=1",
    "stages.joint.steps=1200",
]
"""What differs from the demo: little to read, more pictures to learn from."""


def main() -> None:
    """Build the rows and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with MNIST, CIFAR-10 and FSDD")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stranger", help="the speaker to hold out as a whole; default: the last by name")
    given, overrides = parser.parse_known_args()
    rows = given.out.with_name(f"{given.out.name}-data")
    stranger = build(given.data, rows, stranger=given.stranger)
    print(f"the speaker {stranger} is held out as a whole", flush=True)
    settings = [
        f"out={given.out}",
        f"seed={given.seed}",
        f"data.train={rows / 'train.jsonl'}",
        f"data.eval={rows / 'eval.jsonl'}",
    ]
    command = [sys.executable, "-m", "avlm", "train", "tiny", *settings, *SETTINGS, *overrides]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
