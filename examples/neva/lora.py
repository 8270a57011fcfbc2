"""Fine-tuning with LoRA on chosen layers, named by pattern.

    python examples/neva/lora.py --model runs/neva/imported --layers 0 2 --projections q_proj v_proj

A pattern is a path of whole components: `layers.1.self_attn.q_proj` is never layer 11, `*` is any part of one
component, `layers.*.self_attn.q_proj` all layers, `layers.3.**` all of one. A pattern that hits nothing is an error
that names the nearest layers. The connector goes on learning with all its weights. At the end the adapters are merged
into RUN/model; by themselves they lie in RUN/adapters, in PEFT's format.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import made
import own_data
from import_llava import imported

import avlm


def patterns(layers: Sequence[int], projections: Sequence[str]) -> list[str]:
    """One pattern for each projection of each chosen layer; of all layers where none is chosen."""
    return [f"layers.{layer}.self_attn.{name}" for layer in layers or ["*"] for name in projections]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: a tiny one is imported")
    parser.add_argument("--data", type=Path, help="rows; default: own_data.py's")
    parser.add_argument("--folder", type=Path, help="what the rows' picture paths are relative to")
    parser.add_argument("--out", type=Path, default=Path("runs/neva/lora"))
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="numbers of layers; default: all")
    parser.add_argument("--projections", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(arguments)
    model = given.model or imported(given.out.with_name("imported"))
    folder, data = given.folder, given.data
    if data is None:
        folder = made.pictures(given.out.with_name("data") / "pictures")
        data, _ = own_data.write(folder, folder.parent)
    lora = "stages.finetune.train.language.lora"
    run = avlm.recipe(
        "sft",
        f"model={model}",
        f"data.train={data}",
        f"data.folder={folder or data.parent}",
        f"out={given.out}",
        f"{lora}.targets={json.dumps(patterns(given.layers, given.projections))}",
        f"{lora}.rank={given.rank}",
        f"{lora}.alpha={2 * given.rank}",
        f"stages.finetune.steps={given.steps}",
        "stages.finetune.batch_samples=8",
        "samples.prompts=0",
        peft="lora",
    )
    trained = avlm.train(run)
    for config in sorted(given.out.glob("adapters/**/adapter_config.json")):
        print(f"adapters: {config.parent}, on")
        for name in json.loads(config.read_text())["target_modules"]:
            print(f"  {name}")
    print(f"merged: {trained}")


if __name__ == "__main__":
    main()
