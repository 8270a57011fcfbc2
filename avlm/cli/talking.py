"""``avlm chat``: questions about pictures, sounds and videos, one by one or as a conversation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from avlm.cli.shared import MAX_SEED, ModelDir, check_file, quiet
from avlm.errors import AvlmError, ConfigError


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
        _converse(loaded, sampling)
        return
    _say(loaded, [*media, *([text] if text else [])], sampling)


def _converse(loaded: Any, sampling: Any) -> None:
    """A conversation in the terminal; a line is a turn, a line with a slash a command."""
    from avlm.inference.chat import Audio, Image, Video

    print(
        "Ask something. /image PATH, /audio PATH, /video PATH add a medium, /clear forgets, /quit ends.",
        file=sys.stderr,
    )
    makers = {"/image": Image, "/audio": Audio, "/video": Video}
    media: list[Any] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            print("that line is not text in UTF-8. Write it again", file=sys.stderr)
            continue
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/clear":
            loaded.clear()
            media = []
        elif command in makers:
            path = Path(rest.strip().strip("'\""))
            if os.path.isfile(path):
                media.append(makers[command](path))
            else:
                print(f"{path}: there is no such file. Check the path", file=sys.stderr)
        elif command.startswith("/"):
            print(f"{command} is not a command. There are {', '.join(makers)}, /clear and /quit", file=sys.stderr)
        elif line or media:
            try:
                _say(loaded, [*media, *([line] if line else [])], sampling)
            except AvlmError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            media = []


def _say(loaded: Any, parts: list[Any], sampling: Any) -> None:
    for part in parts:
        if isinstance(part, str) and any("\ud800" <= letter <= "\udfff" for letter in part):
            raise ConfigError("the question is not text in UTF-8, so it has no tokens. Write it in UTF-8")
    begun = False
    for piece in loaded.say(*parts, sampling=sampling):
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        print(piece, end="", flush=True)
    print()
