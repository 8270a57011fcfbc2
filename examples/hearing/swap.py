"""Another audio encoder by one override: VITA-1.5 with an audio-tagging encoder in place of its speech encoder.

    python examples/hearing/swap.py --audio ast --out runs/hearing/ast

`model.audio=NAME` takes a known part with its encoder, connector and window (ast, whisper, hubert, wavlm, w2v_bert,
qwen2_audio); any other checkpoint is `model.audio.encoder={path: OWNER/NAME}`. VITA trains its own encoder from scratch
in a stage of its own; an encoder that comes with its weights needs none, so that stage falls away. On the command line:

    avlm train vita15.7b model.audio=ast size=twin
"""

from __future__ import annotations

import argparse
from pathlib import Path

import clips

import avlm


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", default="ast", help="name of a known audio part")
    parser.add_argument("--data", type=Path, help="rows; default: made up by clips.py")
    parser.add_argument("--out", type=Path, default=Path("runs/hearing/swap"))
    parser.add_argument("--size", choices=("twin", "full"), default="twin")
    parser.add_argument("--steps", type=int, default=4, help="of each stage, at most")
    given = parser.parse_args(arguments)
    data = given.data or clips.write(given.out.with_name("data"))
    before = avlm.recipe("vita15.7b", size=given.size)
    run = avlm.recipe(
        "vita15.7b",
        f"model.audio={given.audio}",
        f"data.train={data}",
        f"out={given.out}",
        f"max_steps={given.steps}",
        "samples.prompts=0",
        size=given.size,
    )
    for name, one in (("as it is", before), (f"model.audio={given.audio}", run)):
        encoder = one.model.audio.encoder.transformers_config("audio.encoder")["model_type"]
        stages = [stage.name for stage in one.stages if stage.name not in one.left_out()]
        print(f"{name}: hears with {encoder}; stages {', '.join(stages)}")
    print(f"trained: {avlm.train(run)}")


if __name__ == "__main__":
    main()
