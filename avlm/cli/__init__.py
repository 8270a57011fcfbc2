"""The command line. Exit status: 0 done, 2 the user's input is wrong (one message), 1 anything else.

A file holds a group of commands, which are plain functions; what they are called on the
command line is said here. Whatever is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import typer

from avlm.cli import data, live, making, models, moving, scoring, serving, settings, talking, training
from avlm.errors import AvlmError, WorldError


def _group(help: str, **settings: Any) -> typer.Typer:
    return typer.Typer(help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None, **settings)


app = _group(
    "Give any language model eyes and ears: compose, align, fine-tune, evaluate, chat, serve.",
    name="avlm",
    pretty_exceptions_enable=False,
)
app.command()(settings.recipes)
app.command()(settings.show)
app.command()(models.compose)
app.command()(training.train)
app.command()(training.demo)
app.command("eval")(scoring.evaluate)
app.command()(models.check)
app.command()(talking.chat)
app.command()(serving.serve)
app.command()(live.live)

_rows = _group("What is wrong with rows, how they look, how many tokens they take; other formats in and out.")
_rows.command("check")(data.check)
_rows.command("show")(data.show)
_rows.command("index")(data.index)
_rows.command("convert")(data.convert)
_rows.command("voice")(making.voice)
app.add_typer(_rows, name="data")

_models = _group("Models of other makers in, and ours out.")
_models.command("import")(moving.convert_import)
_models.command("export")(moving.convert_export)
app.add_typer(_models, name="convert")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no such letter still gets the answer
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except AvlmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, WorldError) else 2)
    except OSError as error:  # a full disk, say: what was asked for is right, and nothing here is to be debugged
        print(f"{type(error).__name__}: {error}. Look after the disk or the device, and try again", file=sys.stderr)
        sys.exit(1)
