"""Another conversation template, as Jinja: what a model was trained with is what it is asked with.

    python examples/neva/template.py --model runs/neva/imported --template examples/neva/terse.jinja

A model directory carries its template in `chat_template.jinja`. Training, `avlm chat`, and transformers' processor all
take it from there, so a copy of the directory with another file is a model with another template. Each answer has to
end with a token that ends it (`eos_token` here), so that the model learns to stop. Which tokens are learned follows
from the template by itself: those of the answers.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import made
import own_data
from import_llava import imported
from transformers import AutoProcessor

import avlm

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]}


def with_template(model: Path, template: Path, out: Path) -> Path:
    """A copy of a model directory with another template."""
    if not out.is_dir():
        shutil.copytree(model, out)
    (out / "chat_template.jinja").write_text(template.read_text().rstrip("\n"))
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: a tiny one is imported")
    parser.add_argument("--template", type=Path, default=Path(__file__).with_name("terse.jinja"))
    parser.add_argument("--out", type=Path, default=Path("runs/neva/terse"))
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(arguments)
    model = given.model or imported(given.out.with_name("imported"))
    start = with_template(model, given.template, given.out.with_name(f"{given.out.name}-start"))
    processor = AutoProcessor.from_pretrained(start)
    print("a row in this template:")
    print(processor.apply_chat_template([QUESTION, ANSWER], tokenize=False))
    folder = made.pictures(given.out.with_name("data") / "pictures")
    data, _ = own_data.write(folder, folder.parent)
    run = avlm.recipe(
        "sft",
        f"model={start}",
        f"data.train={data}",
        f"data.folder={folder}",
        f"out={given.out}",
        f"stages.finetune.steps={given.steps}",
        "stages.finetune.batch_samples=8",
        "samples.prompts=0",
    )
    trained = avlm.train(run)
    picture = next(folder.glob("*.png"))
    print(f"{trained} is asked in the same one and answers: {avlm.load(trained).chat('What?', avlm.Image(picture))!r}")


if __name__ == "__main__":
    main()
