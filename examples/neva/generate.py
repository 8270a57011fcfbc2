"""Ask a model about a picture: through avlm, token by token, and through transformers' own classes.

    python examples/neva/generate.py --model runs/neva/trained/model --image cat.png --prompt "What are these?"

All three take the likeliest token unless --temperature is above 0. On the command line:

    avlm chat runs/neva/trained/model --image cat.png "What are these?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import made
import torch
from import_llava import imported
from transformers import AutoModelForImageTextToText, AutoProcessor

import avlm


def through_transformers(model: Path, image: Path, prompt: str, max_tokens: int) -> str:
    """The same answer from `generate`, as any script for transformers would have it."""
    processor = AutoProcessor.from_pretrained(model)
    loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    with torch.inference_mode():
        output = loaded.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return str(processor.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: a tiny one is imported")
    parser.add_argument("--image", type=Path, help="default: one is drawn")
    parser.add_argument("--prompt", default="What do you see?")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args(arguments)
    model = given.model or imported(Path("runs/neva/imported"))
    image = given.image or made.pictures(Path("runs/neva/data/pictures")) / "000.png"

    chat = avlm.load(model)
    sampling = avlm.Sampling(max_tokens=given.max_tokens, temperature=given.temperature)
    print(f"whole:        {chat.chat(given.prompt, avlm.Image(image), sampling=sampling)!r}")
    pieces = list(chat.say(given.prompt, avlm.Image(image), sampling=sampling))
    print(f"piece by piece: {pieces}")
    again = list(chat.say("And what else?", sampling=sampling))
    print(f"second turn:  {''.join(again).strip()!r}")
    if given.temperature == 0:
        print(f"transformers: {through_transformers(model, image, given.prompt, given.max_tokens)!r}")


if __name__ == "__main__":
    main()
