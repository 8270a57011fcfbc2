"""``avlm data``: what is wrong with rows, how they look, how many tokens they take; other formats in and out."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from avlm.cli.shared import Overrides, check_absent, check_writable, data_settings, quiet, resolve, write_json, writing
from avlm.errors import ConfigError

if TYPE_CHECKING:
    from avlm.config.data import DataConfig
    from avlm.config.run import RunConfig
    from avlm.config.stage import Stage
    from avlm.data.checking.check import CheckReport
    from avlm.data.processor import AvlmProcessor
    from avlm.data.rows import RowSource

Data = Annotated[str, typer.Argument(metavar="DATA", help="Rows: a file, or whatever else training reads.")]
Model = Annotated[str | None, typer.Option(help="A model directory: count tokens as it does.")]
Recipe = Annotated[str | None, typer.Option(help="A recipe: see what its stages would read and refuse.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; default: one for each core. 0: none but this.")]


class Reader(NamedTuple):
    """Who is to read the rows: the settings of a run's data, its stages, and the model's processor."""

    data: DataConfig
    stages: tuple[Stage, ...]
    processor: AvlmProcessor | None


def check(
    data: Data,
    overrides: Overrides = None,
    model: Model = None,
    recipe: Recipe = None,
    against: Annotated[str | None, typer.Option(help="Held-out rows: what both have is told.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Read headers of media; do not decode.")] = False,
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option(help="Write the report there as JSON.")] = None,
) -> None:
    """Find what is wrong with data: how bad, how often, on which lines, one example each.

    Exit status: 0 nothing, 1 something is wrong, 2 there is no such data or setting.
    """
    if out is not None:
        check_writable(out)
    report = _checked(data, overrides or [], model, recipe, against, fast, _workers(workers))
    from avlm.cli.told import tell_report

    print(tell_report(report))
    if out is not None:
        write_json(out, report.as_dict())
    if not report.fine():
        raise typer.Exit(1)


def _checked(
    data: str,
    overrides: list[str],
    model: str | None,
    recipe: str | None,
    against: str | None,
    fast: bool,
    workers: int,
) -> CheckReport:
    from avlm.data.checking.check import check_data
    from avlm.data.checking.conversations import MARKERS
    from avlm.data.checking.look import ANYTHING
    from avlm.data.decoding.doors import doors_of
    from avlm.data.decoding.files import limits_of
    from avlm.data.media.reader import MediaReader
    from avlm.data.text.templates import placeholders

    config = _run_of(recipe, model, overrides, data)
    settings = _data_of(config, overrides)
    source = _open(data, settings)
    held_out = None if against is None else _open(against, settings, "eval")
    reader = _reader(config, model, settings, source)
    files = [root for each in (source, held_out) if each is not None for root in each.roots]
    limits = limits_of(settings.limits, doors_of(settings, files))
    spec = ANYTHING if reader.processor is None else reader.processor.media_spec()
    markers = MARKERS if reader.processor is None else tuple(placeholders(reader.processor.tokenizer).values())
    with _bars() as progress:
        report = check_data(
            source,
            against=held_out,
            decode=not fast,
            media=spec if spec.vision and spec.audio else ANYTHING,
            markers=markers,
            limits=limits,
            base=settings.folder or os.path.dirname(data),
            workers=workers,
            progress=progress,
        )
        if reader.processor is not None:
            reader.processor.use_reader(MediaReader(spec, limits=limits))
            _fit(report, source, reader, workers, progress)
    return report


def _fit(report: CheckReport, source: RowSource, reader: Reader, workers: int, progress: Any) -> None:
    """What a run would make of the rows, put into the report."""
    from avlm.data.checking.fits import fit_stages

    assert reader.processor is not None
    with tempfile.TemporaryDirectory(prefix="avlm-index-") as aside:
        folder = Path(reader.data.index or aside)
        report.stages = fit_stages(
            source,
            [stage for stage in reader.stages if stage.data is None],
            reader.processor,
            reader.data,
            folder,
            report.findings,
            known=frozenset(report.bad),
            workers=workers,
            progress=progress,
        )
    report.histograms += [stage.lengths for stage in report.stages if stage.lengths is not None]


def show(
    data: Data,
    overrides: Overrides = None,
    model: Model = None,
    recipe: Recipe = None,
    rows: Annotated[
        str | None, typer.Option(help="Lines: 1-20, or 3,7,40-42. Default: the first step's with a recipe, else 1-20.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Rows of this task alone.")] = None,
    row_id: Annotated[str | None, typer.Option("--id", help="The row with this id.")] = None,
    bad: Annotated[bool, typer.Option("--bad", help="Rows that cannot be used alone.")] = False,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("data.html"),
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Make a page that shows and plays samples, with their tokens if there is a model."""
    from avlm.data.showing.show import Wanted, numbers_of, write_page

    check_writable(out)
    config = _run_of(recipe, model, overrides or [], data)
    settings = _data_of(config, overrides or [])
    wanted = Wanted(None if rows is None else numbers_of(rows), task=task, id=row_id, bad=bad)
    source = _open(data, settings)
    reader = _reader(config, model, settings, source)
    with _bars() as progress, writing(out):
        shown = write_page(out, source, wanted, reader.processor, reader.stages, reader.data, progress=progress)
    print(f"{out}: {shown} row{'' if shown == 1 else 's'}")
    if open_it:
        import webbrowser

        webbrowser.open(out.absolute().as_uri())


def index(
    data: Data,
    overrides: Overrides = None,
    model: Model = None,
    recipe: Recipe = None,
    out: Annotated[Path | None, typer.Option(help="Folder of indexes; default: data.index, or DATA.index.")] = None,
    workers: Workers = None,
) -> None:
    """Count what every row takes of a row and of the encoders, by text and headers alone. Again: what is new."""
    if model is None and recipe is None:
        raise ConfigError(
            "an index counts tokens, and whose is not said. Add --model DIR, or --recipe NAME for its stages"
        )
    from avlm.data.decoding.doors import doors_of
    from avlm.data.decoding.files import limits_of
    from avlm.data.indexing.index import build_index
    from avlm.data.loader import stall_s
    from avlm.data.media.reader import MediaReader

    config = _run_of(recipe, model, overrides or [], data)
    settings = _data_of(config, overrides or [])
    source = _open(data, settings)
    reader = _reader(config, model, settings, source)
    limits = limits_of(settings.limits, doors_of(settings, source.roots))
    folder = out or Path(settings.index or f"{data.rstrip('/')}.index")
    assert reader.processor is not None
    reader.processor.use_reader(MediaReader(reader.processor.media_spec(), limits=limits))
    if settings.system is not None:
        reader.processor.use_system(settings.system)
    stages: list[Stage | None] = [*reader.stages] or [None]
    for stage in stages:
        writer = reader.processor
        if stage is not None and stage.template is not None:
            writer = writer.with_template(stage.template)
        name = "rows" if stage is None else stage.name
        with _bars() as progress, writing(folder):
            made = build_index(
                source,
                writer,
                folder,
                stage=stage,
                too_long=settings.too_long,
                workers=_workers(workers),
                limit_s=stall_s(settings, limits),
                memory_mb=settings.worker_mb,
                progress=partial(progress, name),
            )
        print(
            f"{made.folder}: {made.made.rows:,} rows, {int(made.tokens.sum()):,} tokens; "
            f"{made.made.counted:,} counted now, {made.made.reused:,} known, {made.made.bad:,} cannot be used"
        )
    if source.errors:
        print(
            f"{len(source.errors):,} more cannot be read at all and are in no index, the first of them: "
            f"{source.errors[0]}. avlm data check names them"
        )


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Rows in any form that training reads.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    overrides: Overrides = None,
    to: Annotated[Literal["jsonl", "webdataset", "energon"], typer.Option(help="The form.")] = "jsonl",
) -> None:
    """Write rows and their media in another form. Rows that cannot be read are named and left out."""
    check_absent(out)
    from avlm.data.decoding.doors import doors_of
    from avlm.data.decoding.files import limits_of
    from avlm.data.writers import convert_rows

    settings = _data_of(None, overrides or [])
    opened = _open(source, settings)
    limits = limits_of(settings.limits, doors_of(settings, opened.roots))
    with _bars() as progress, writing(out):
        made = convert_rows(opened, out, to=to, limits=limits, progress=partial(progress, "rows"))
    print(f"{made.path}: {made.rows:,} rows, {made.media:,} media")
    for error in [*opened.errors, *made.bad][:5]:
        print(f"left out: {error}", file=sys.stderr)
    more = len(opened.errors) + len(made.bad) - 5
    if more > 0:
        print(f"and {more:,} more rows were left out; `avlm data check` lists them", file=sys.stderr)


# ---------------------------------------------------------------- shared by these commands


@contextmanager
def _bars() -> Iterator[Any]:
    from avlm.training.console import make_console, world_progress

    with world_progress(make_console()) as progress:
        yield progress


def _workers(given: int | None) -> int:
    from avlm.data.workers.spread import num_cores

    return num_cores() if given is None else given


def _run_of(recipe: str | None, model: str | None, overrides: list[str], data: str) -> RunConfig | None:
    """The run that would read the data; None where no recipe is named."""
    if recipe is None:
        return None
    quoted = "'" + data.replace("'", "''") + "'"  # a pattern may begin as no YAML does
    given = [f"data.train={quoted}", *([] if model is None else [f"model={model}"])]
    return resolve(recipe, [*overrides, *given])


def _data_of(config: RunConfig | None, overrides: list[str]) -> DataConfig:
    """Where media lie and so on: of the run, or as overrides of ``data`` say."""
    return data_settings(overrides, "Add --recipe NAME") if config is None else config.data


def _open(path: str, settings: DataConfig, use: Literal["train", "eval"] = "train") -> RowSource:
    from avlm.data.sources import open_source

    with _bars() as progress:
        return open_source(path, settings, use=use, progress=partial(progress, f"looking through {path}"))


def _reader(config: RunConfig | None, model: str | None, data: DataConfig, source: RowSource) -> Reader:
    """The processor of the model that is named, or that the recipe would compose."""
    directory = model if config is None else config.model
    if directory is None:
        return Reader(data, (), None)
    quiet()
    stages = () if config is None else tuple(s for s in config.stages if s.name not in config.left_out())
    if isinstance(directory, str):
        from avlm.convert.weights import load_processor

        return Reader(data, stages, load_processor(directory))
    from avlm.convert.compose import make_processor
    from avlm.data.text.vocabulary import sample_texts

    fresh = directory.language.path is None and directory.language.tokenizer is None
    return Reader(data, stages, make_processor(directory, texts=list(sample_texts(source)) if fresh else None))
