"""LLaVA's two stages on a model that exists: the connector alone on captions, then connector and language model.

    python examples/neva/train.py --model runs/neva/imported --data train.json --folder PICTURES --out runs/neva/trained

The recipe is `neva.llava15_7b`; rates, schedules, templates and what is frozen are the authors'. What differs from
theirs is said by overrides, here the length and the batch. Without `model=` the recipe would compose Vicuna and CLIP,
and with `size="twin"` a tiny model of the same families. A run that is killed goes on with the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import made
import own_data
from import_llava import imported

import avlm


def settings(model: Path, data: Path, folder: Path, out: Path, steps: int, batch: int) -> list[str]:
    """What differs from the recipe, by dotted keys as on the command line."""
    return [
        f"model={model}",
        f"data.train={data}",
        f"data.folder={folder}",
        f"out={out}",
        *(f"stages.{stage}.steps={steps}" for stage in ("pretrain", "finetune")),
        *(f"stages.{stage}.batch_samples={batch}" for stage in ("pretrain", "finetune")),
        "samples.prompts=0",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: a tiny one is imported")
    parser.add_argument("--data", type=Path, help="rows; default: own_data.py's")
    parser.add_argument("--folder", type=Path, help="what the rows' picture paths are relative to")
    parser.add_argument("--out", type=Path, default=Path("runs/neva/trained"))
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args(arguments)
    model = given.model or imported(given.out.with_name("imported"))
    folder, data = given.folder, given.data
    if data is None:
        folder = made.pictures(given.out.with_name("data") / "pictures")
        data, _ = own_data.write(folder, folder.parent)
    changes = settings(model, data, folder or data.parent, given.out, given.steps, given.batch)
    run = avlm.recipe("neva.llava15_7b", *changes)
    for stage in run.stages:
        print(f"{stage.name}: {stage.steps} steps, trains {', '.join(stage.train)}")
    print(f"trained: {avlm.train(run)}")


if __name__ == "__main__":
    main()
