"""``avlm data voice``: rows made from texts by synthetic speech."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from avlm.cli.shared import MAX_SEED, check_file


def voice(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    questions: Annotated[
        Path | None,
        typer.Option(
            help="What is meant for the model: a question a line, an answer behind a tab. Default: the demo's."
        ),
    ] = None,
    others: Annotated[
        Path | None, typer.Option(help="What is not: a text a line. Default: statements, words and talk.")
    ] = None,
    ask: Annotated[str, typer.Option(help="Words beside each sound.")] = "Answer the spoken question.",
    rows: Annotated[int, typer.Option(help="Training rows.")] = 4000,
    eval_rows: Annotated[int, typer.Option(help="Held-out rows, of other voices, noises and talk.")] = 400,
    timelines: Annotated[int, typer.Option(help="Held-out timelines for `avlm live --file`.")] = 40,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
) -> None:
    """Make data from which a model learns whether it was meant: addressed, noise, overlap, interruption."""
    for name, path in (("--questions", questions), ("--others", others)):
        if path is not None:
            check_file(name, str(path))
    from avlm.data.voice.build import VoiceSettings, make_voice
    from avlm.training.console import make_console, world_progress

    settings = VoiceSettings(
        seed=seed,
        train_rows=rows,
        eval_rows=eval_rows,
        timelines=timelines,
        ask=ask,
        questions=None if questions is None else str(questions),
        others=None if others is None else str(others),
    )
    with world_progress(make_console()) as progress:
        make_voice(out, settings, partial(progress))
    print(f"{out}: {rows:,} rows to learn from, {eval_rows:,} held out, {timelines:,} timelines")
