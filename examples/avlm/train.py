"""The three stages of `avlm.8b`: eyes are aligned, then ears, then everything is tuned together.

    python examples/avlm/train.py --data rows.jsonl --out runs/avlm/run            # a tiny twin, on a laptop
    python examples/avlm/train.py --data rows.jsonl --out runs/avlm/run --size full --steps 5190

A stage begins with what the stage before it left: nothing has to be said for that. The script shows it by stopping
after the first stage, as a killed run would have stopped, and starting the same run again. What a stage does not train
keeps its bits: after stage two the vision connector is still the one of stage one. The command line does the same:

    avlm train avlm.8b size=twin data.train=rows.jsonl out=runs/avlm/run --stage vision-alignment
    avlm train avlm.8b size=twin data.train=rows.jsonl out=runs/avlm/run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rows
import torch
from safetensors.torch import load_file

import avlm


def part(model: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one part of a model directory."""
    found: dict[str, torch.Tensor] = {}
    for path in model.glob("*.safetensors"):
        found |= {key: tensor for key, tensor in load_file(path).items() if f".{name}." in key}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows; default: rows.py's")
    parser.add_argument("--out", type=Path, default=Path("runs/avlm/run"))
    parser.add_argument("--size", choices=("twin", "full"), default="twin")
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    parser.add_argument("--lora", action="store_true", help="adapters on the language model in the last stage")
    given = parser.parse_args(arguments)
    data = given.data or rows.write(given.out.with_name("data"))[0]
    names = ("vision-alignment", "audio-alignment", "finetune")
    run = avlm.recipe(
        "avlm.8b",
        f"data.train={data}",
        f"out={given.out}",
        *(f"stages.{name}.steps={given.steps}" for name in names),
        "samples.prompts=0",
        peft="lora" if given.lora else "none",
        size=given.size,
    )
    for stage in run.stages:
        print(f"{stage.name}: {stage.steps} steps on rows with {stage.rows}, trains {', '.join(stage.train)}")

    avlm.train(run, only=names[0])
    print(f"stopped after {names[0]}: {given.out}/model can be asked about pictures already")
    model = avlm.train(run)
    first, second, last = (given.out / "stages" / name for name in names)
    carried = same(part(first, "vision_connector"), part(second, "vision_connector"))
    moved = not same(part(second, "vision_connector"), part(last, "vision_connector"))
    print(f"stage two kept the vision connector of stage one: {carried}; stage three trained it on: {moved}")
    print(f"trained: {model}")


if __name__ == "__main__":
    main()
