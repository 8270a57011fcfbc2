"""``avlm live``: talk with a model; it listens all the time and decides itself whether it was meant."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from avlm.cli.shared import ModelDir, check_file, check_writable, quiet, writing
from avlm.errors import ConfigError

if TYPE_CHECKING:
    from avlm.inference.live.session import Event, Session


def live(
    model: ModelDir,
    file: Annotated[
        str | None,
        typer.Option(help="A recording, a timeline (JSON lines), or - for 16-bit PCM, mono, 16 kHz, on stdin."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="What the model sees.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the events there as JSON lines.")] = None,
    ask: Annotated[str, typer.Option(help="Words beside each sound, as the model was trained with.")] = (
        "Answer the spoken question."
    ),
    decides: Annotated[
        Literal["auto", "head", "digits", "hands", "none"],
        typer.Option(help="How the model tells who is meant: by its state head, or by its state tokens."),
    ] = "auto",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="From this probability on it was meant.")] = 0.5,
    turns: Annotated[int, typer.Option(min=0, help="Earlier questions that it remembers.")] = 0,
    speak: Annotated[bool, typer.Option("--speak", help="Speak the answers.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    token_ms: Annotated[float, typer.Option(help="Model time for a token, where a file is played.")] = 50.0,
) -> None:
    """Talk with a model by voice. What is not meant for it, it lets pass; a question stops it while it answers."""
    if file not in (None, "-"):
        check_file("--file", str(file))
    if image is not None:
        check_file("--image", str(image))
    if out is not None:
        check_writable(out)
    if file is None:
        _check_microphone()
    session = _session(model, image, ask, decides, threshold, turns, speak, max_tokens, file, token_ms)
    with _written(out) as lines:
        for event in _events(session, file):
            _tell(event)
            if lines is not None:
                lines.write(json.dumps({k: v for k, v in event.items() if k != "wave"}, ensure_ascii=False) + "\n")


def _session(
    model: str,
    image: Path | None,
    ask: str,
    decides: Literal["auto", "head", "digits", "hands", "none"],
    threshold: float,
    turns: int,
    speak: bool,
    max_tokens: int,
    file: str | None,
    token_ms: float,
) -> Session:
    from avlm.convert.weights import load_model
    from avlm.data.given import media_item
    from avlm.inference.engine import Engine
    from avlm.inference.live.mind import ModelMind
    from avlm.inference.live.session import Costs, Session
    from avlm.inference.live.voice import EspeakVoice
    from avlm.inference.sampling import Sampling

    sampling = Sampling(max_tokens=max_tokens)
    costs = None if file in (None, "-") else Costs(token_ms=token_ms)
    voice = EspeakVoice() if speak else None
    quiet()
    engine = Engine(*load_model(model), slots=1)
    mind = ModelMind(engine, ask=ask, decides=decides, sampling=sampling, turns=turns)
    if image is not None:
        mind.show(media_item("image", image))
    return Session(mind, threshold=threshold, costs=costs, voice=voice)


def _check_microphone() -> None:
    import importlib.util

    if importlib.util.find_spec("sounddevice") is None:
        raise ConfigError(
            "no --file is given, and a microphone is listened to with the library sounddevice, which is not installed. "
            "Install it with: pip install sounddevice; or give --file RECORDING, or --file - for PCM"
        )


def _events(session: Session, file: str | None) -> Iterator[Event]:
    from avlm.inference.live.drive import microphone, open_timeline, play, stream

    if file is None:
        print("Speak. Ctrl-C ends.", file=sys.stderr)
        try:
            yield from microphone(session)
        except KeyboardInterrupt:
            return
    elif file == "-":
        yield from stream(session, sys.stdin.buffer)
    else:
        path = Path(file)
        moments, rendered = open_timeline(path)
        yield from play(session, moments, rendered, path.parent)


def _tell(event: Event) -> None:
    """One line for people, on standard output."""
    words = {k: v for k, v in event.items() if k not in ("at_s", "event", "wave", "start_s", "end_s")}
    told = " ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in words.items())
    print(f"{event['at_s']:9.3f} s  {event['event']:13} {told}", flush=True)


@contextmanager
def _written(out: Path | None) -> Iterator[TextIO | None]:
    if out is None:
        yield None
        return
    with writing(out), out.open("w", encoding="utf-8") as lines:
        yield lines
