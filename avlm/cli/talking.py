"""``avlm chat``: questions about pictures, sounds and videos, one by one or as a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avlm.cli.conversation import converse, say
from avlm.cli.shared import MAX_SEED, ModelDir, check_file, quiet


def chat(
    model: ModelDir,
    text: Annotated[
        str | None, typer.Argument(help="What to ask. Without it and without media: a conversation.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest answer.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the draws, when the temperature is above 0.")] = 0,
) -> None:
    """Ask a model about pictures, sounds and videos."""
    for name, paths in (("image", image), ("audio", audio), ("video", video)):
        for path in paths or []:
            check_file(f"--{name}", str(path))
    from avlm.inference.chat import Audio, Image, Video, load
    from avlm.inference.sampling import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    quiet()
    loaded = load(model)
    makers = ((Image, image), (Audio, audio), (Video, video))
    media = [make(path) for make, paths in makers for path in paths or []]
    if text is None and not media:
        converse(loaded, sampling)
        return
    say(loaded, [*media, *([text] if text else [])], sampling)
