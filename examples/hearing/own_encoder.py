"""A model that hears with an encoder of one's own (listener.py), trained from scratch with a small language model.

    python examples/hearing/own_encoder.py --data rows.jsonl --out runs/hearing/own

The recipe is Ultravox's twin with other ears and another task: encoder and connector both learn from the answers. Any
recipe takes the encoder the same way. To use the model later, import listener.py before `avlm.load`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import clips
import listener

import avlm


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows with sounds; default: made up by clips.py")
    parser.add_argument("--audio", type=Path, help="a sound to ask about at the end; default: one of clips.py's")
    parser.add_argument("--out", type=Path, default=Path("runs/hearing/own"))
    parser.add_argument("--width", type=int, default=32, help="of the encoder")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(arguments)
    data = given.data or clips.write(given.out.with_name("data"), pictures=False)
    encoder = listener.ListenerConfig(hidden_size=given.width)
    run = avlm.recipe(
        "audio.ultravox",
        f"model.audio.encoder={{random: {{model_type: {encoder.model_type}, hidden_size: {given.width}}}}}",
        "stages.distill.loss=next_token",
        "stages.distill.train.audio.lr=1e-3",
        "stages.distill.train.language.lr=1e-3",
        f"stages.distill.steps={given.steps}",
        f"data.train={data}",
        f"out={given.out}",
        "samples.prompts=0",
        size="twin",
    )
    model = avlm.train(run)
    chat = avlm.load(model)
    heard = chat.processor.media_spec().audio
    print(f"{model} hears {heard.mel_bins} bins of {heard.features} through {encoder.model_type}")
    sound = given.audio or next(iter(sorted(clips.write(given.out.with_name("data")).parent.glob("*.wav"))))
    answer = chat.chat(avlm.Audio(sound), "Which height is it?", sampling=avlm.Sampling(max_tokens=8))
    print(f"{sound}: {answer!r}")


if __name__ == "__main__":
    main()
