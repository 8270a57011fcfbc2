"""``avlm convert``: models of other makers in, and ours out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlm.cli.shared import ModelDir, check_absent, quiet, writing
from avlm.errors import ConfigError

if TYPE_CHECKING:
    from avlm.convert.importing import Moved


def convert_import(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder or hub name of a LLaVA, LLaVA-NeXT or Qwen2-Audio checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="Where the model directory goes.")],
    drop: Annotated[list[str] | None, typer.Option(help="Leave out tensors that have no place, by pattern.")] = None,
    pickles: Annotated[bool, typer.Option("--pickles", help="Also read pytorch_model.bin (tensors alone).")] = False,
) -> None:
    """Make a model directory of another maker's checkpoint."""
    if not os.path.isdir(source) and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ConfigError(f"{source}: there is no such folder. Give an existing one, or a hub name such as OWNER/NAME")
    check_absent(out)
    from avlm.convert.importing import import_model
    from avlm.training.console import make_console, world_progress

    quiet()
    with writing(out), world_progress(make_console()) as progress:
        moved = import_model(source, out, drop=drop or [], pickles=pickles, progress=progress)
    _tell_moved(moved)


def convert_export(
    model: ModelDir,
    out: Annotated[Path, typer.Argument(help="Where the folder goes.")],
    to: Annotated[str, typer.Option(help="llava, llava_next, qwen2_audio; or a part: language, vision, ...")],
    adapters: Annotated[str | None, typer.Option(help="Adapters in PEFT's format, merged first.")] = None,
) -> None:
    """Write a model, or one part of it, in transformers' own format."""
    check_absent(out)
    from avlm.convert.exporting import export_model
    from avlm.training.console import make_console, world_progress

    quiet()
    with writing(out), world_progress(make_console()) as progress:
        moved = export_model(model, out, to, adapters=adapters, progress=progress)
    _tell_moved(moved)


def _tell_moved(moved: Moved) -> None:
    print(f"{moved.out}: {moved.parameters:,} parameters in {moved.tensors} tensors, {moved.num_bytes:,} bytes")
    for name in moved.dropped:
        print(f"left out: {name}", file=sys.stderr)
    for note in moved.notes:
        print(f"note: {note}", file=sys.stderr)
