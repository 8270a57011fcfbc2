"""A LLaVA-1.5 checkpoint in transformers' format becomes a model directory of avlm.

    python examples/neva/import_llava.py --model llava-hf/llava-1.5-7b-hf --out runs/neva/imported

`--model` is a folder or a name on the hub. Tensors go from file to file, bit for bit, and never all into memory.
Without it the script makes a tiny checkpoint of random weights. The command line does the same:

    avlm convert import llava-hf/llava-1.5-7b-hf runs/neva/imported
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import made

import avlm


def imported(out: Path, model: str | None = None) -> Path:
    """The model directory of a checkpoint; one that is there already is taken as it is."""
    if out.is_dir():
        return out
    source = model or str(made.checkpoint(out.with_name(f"{out.name}-from")))
    moved = avlm.import_model(source, out)
    print(f"{source} -> {out}: {moved.parameters:,} parameters in {moved.tensors} tensors")
    for note in moved.notes:
        print(f"note: {note}")
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a LLaVA-1.5 checkpoint; default: a tiny one is made")
    parser.add_argument("--out", type=Path, default=Path("runs/neva/imported"))
    given = parser.parse_args(arguments)
    out = imported(given.out, given.model)
    config = json.loads((out / "config.json").read_text())
    parts = {name: config[f"{name}_config"]["model_type"] for name in ("vision", "text")}
    print(f"{out} sees with {parts['vision']}, speaks with {parts['text']}, joined by {config['vision_connector']}")


if __name__ == "__main__":
    main()
