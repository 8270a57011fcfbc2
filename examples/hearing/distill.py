"""Ears by distillation, as Ultravox has it: nobody writes answers for sounds.

    python examples/hearing/distill.py --data rows.jsonl --out runs/hearing/distill

Each sound in the rows says in words what it is (`alt`: a transcript, say). The language model reads those words and is
the teacher; hearing the sound instead, the same model is to go on in the same way. Encoder and language model stay as
they are, and the connector learns. `--size full` is Llama 3.1 8B with Whisper large v3 turbo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import clips

import avlm


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows whose sounds have an `alt`; default: made up by clips.py")
    parser.add_argument("--out", type=Path, default=Path("runs/hearing/distill"))
    parser.add_argument("--size", choices=("twin", "full"), default="twin")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args(arguments)
    data = given.data or clips.write(given.out.with_name("data"), pictures=False)
    run = avlm.recipe(
        "audio.ultravox",
        f"data.train={data}",
        f"out={given.out}",
        f"stages.distill.steps={given.steps}",
        "samples.prompts=0",
        size=given.size,
    )
    (stage,) = run.stages
    print(f"{stage.name}: trains {', '.join(stage.train)} at temperature {stage.distill_temperature:g}")
    model = avlm.train(run)
    told = [json.loads(line) for line in (given.out / "metrics.jsonl").read_text().splitlines()]
    print(
        f"divergence from the teacher: {told[0]['loss']:.4f} at first, {told[-1]['loss']:.4f} after {len(told)} steps"
    )
    print(f"trained: {model}")


if __name__ == "__main__":
    main()
