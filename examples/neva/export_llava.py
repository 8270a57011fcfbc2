"""A model goes out as a LLaVA-1.5 of transformers, so whatever serves those serves it.

    python examples/neva/export_llava.py --model runs/neva/trained/model --out runs/neva/llava

The folder is loaded with transformers' own class, and asked the same question as the model directory. On the command
line, with parts by themselves (`--to language`, `vision`, `vision_connector`) and adapters merged:

    avlm convert export runs/neva/trained/model runs/neva/llava --to llava [--adapters DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import made
import torch
from import_llava import imported
from transformers import AutoModelForImageTextToText, AutoProcessor

import avlm

PROMPT = "What do you see?"


def logits_of(folder: Path, image: Path) -> torch.Tensor:
    """What the model of a folder expects next, after a question about a picture."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": PROMPT}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        return model(**inputs).logits[0, -1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: a tiny one is imported")
    parser.add_argument("--image", type=Path, help="default: one is drawn")
    parser.add_argument("--adapters", help="adapters in PEFT's format, merged first")
    parser.add_argument("--out", type=Path, default=Path("runs/neva/llava"))
    given = parser.parse_args(arguments)
    model = given.model or imported(given.out.with_name("imported"))
    image = given.image or made.pictures(given.out.with_name("data") / "pictures") / "000.png"
    moved = avlm.export_model(str(model), given.out, "llava", adapters=given.adapters)
    print(f"{model} -> {given.out}: {moved.parameters:,} parameters in {moved.tensors} tensors")
    for note in moved.notes:
        print(f"note: {note}")

    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    processor = AutoProcessor.from_pretrained(given.out)
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    print(f"transformers' {type(processor).__name__} asks: {text!r}")
    if given.adapters is None:
        ours, theirs = (logits_of(folder, image) for folder in (model, given.out))
        print(f"largest difference between its logits and ours: {float((ours - theirs).abs().max()):.1e}")


if __name__ == "__main__":
    main()
