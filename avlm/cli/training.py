"""``avlm train`` and ``avlm demo``: a run from its data to its report."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from avlm.cli.scoring import evaluate_rows, table
from avlm.cli.shared import Overrides, RecipeName, check_files, quiet, resolve, write_json, writing
from avlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from avlm.config.run import RunConfig
    from avlm.eval.benchmarks import Report
    from avlm.training.stopping import Stopped
    from avlm.training.world import World


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Train up to and with this stage.")] = None,
) -> None:
    """Train all stages. A run directory that exists is resumed. Held-out rows are scored at the end.

    Without data.train the run learns from made-up rows, which shows that the recipe works.
    """
    began = time.monotonic()
    config = resolve(recipe, overrides)
    check_files(config)
    _warm(config)
    from avlm.training.world import join

    world = join(config.device, config.parallel)
    with world.member():
        with world.first_alone():
            config = _with_data(config, world)
        _train_and_report(config, stage, began, world)


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/demo"),
    samples: Annotated[int, typer.Option(help="Training rows to make.")] = 12_000,
    eval_samples: Annotated[int, typer.Option(help="Held-out rows of each task.")] = 100,
) -> None:
    """Make a little world, train a model on it from scratch, measure it: the whole way on two cores."""
    began = time.monotonic()
    from avlm.config.io import override
    from avlm.recipes import recipe

    if not out.name:
        raise ConfigError(
            f"--out {out} has no name of its own to call the data after. Give a new name, such as runs/demo"
        )
    world = out.with_name(f"{out.name}-world")
    config = recipe("tiny")
    data = config.data.model_copy(update={"train": str(world / "train.jsonl"), "eval": str(world / "eval.jsonl")})
    config = override(config.model_copy(update={"out": str(out), "data": data}), overrides or [])
    if os.path.lexists(config.out) and not os.path.isdir(config.out):
        raise ConfigError(f"{config.out} is a file, and a run needs a directory. Choose another name with --out")

    _warm(config)
    from avlm.data.world.build import make_world
    from avlm.training.console import make_console, world_progress
    from avlm.training.world import one_process

    with _stoppable(), writing(world), world_progress(make_console()) as progress:
        make_world(
            world, seed=config.seed, train_samples=samples, eval_samples_per_task=eval_samples, progress=progress
        )
    _train_and_report(config, None, began, one_process(config.device))
    print(f'\ntalk to it:  avlm chat {config.out}/model --image PICTURE.png "What do you see?"')
    print(f"look at it:  {config.out}/report.html")


def _warm(config: RunConfig) -> None:
    """Where the run will start processes, let them be imported for while this one imports what it needs itself."""
    if "RANK" not in os.environ and max(config.side_by_side, config.parallel.processes) > 1:
        from avlm.training.nursery import warm

        warm()


def _with_data(config: RunConfig, world: World) -> RunConfig:
    """The run with made-up rows, and a notice, where it was given none for a stage."""
    if config.data.train is not None or all(stage.data is not None for stage in config.stages):
        return config
    from avlm.data.mock import ROWS, make_mock
    from avlm.training.chain import parts_of
    from avlm.training.directory import MOCK, check_place

    out = Path(config.out)
    check_place(out)
    parts = parts_of(Path(config.model)) if isinstance(config.model, str) else config.model.parts()
    tasks = tuple(dict.fromkeys(task for stage in config.stages for task in stage.named()))
    with writing(out):
        rows = make_mock(out / MOCK, sees="vision" in parts, hears="audio" in parts, tasks=tasks, seed=config.seed)
    if world.first:
        print(
            f"mock data: data.train is not set, so this run learns from {ROWS} made-up rows ({rows}). "
            "They show that it runs and teach nothing; for your own add data.train=FILE.jsonl",
            file=sys.stderr,
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"train": str(rows)})})


def _train_and_report(config: RunConfig, stage: str | None, began: float, world: World) -> None:
    """Train, measure on the held-out rows, and write the report: also of a run whose held-out rows are all unusable.

    Of several processes the first one measures and reports.
    """
    from avlm.eval.examining import look_and_listen
    from avlm.training.chain import Run
    from avlm.training.stopping import Stopped

    quiet()
    gc.freeze()  # what the imports made stays, and no collection between two stages looks through it
    with _stoppable():
        run = Run(config, world=world, examine=look_and_listen)
    try:
        model = run.train(stage)
    except Stopped as stopped:
        _leave(stopped, tells=world.first)
    if world.first:
        with _stoppable():
            _report(config, model, began)


def _report(config: RunConfig, model: Path, began: float) -> None:
    from avlm.training.report import write_report

    out = Path(config.out)
    facts: dict[str, Any] = {"recipe": config.recipe, "seed": config.seed}
    wrong: DataError | None = None
    if config.data.eval is not None and model.is_dir():
        try:
            report = evaluate_rows(str(model), config.data.eval, [], True, 64, config.data)
        except DataError as error:
            wrong = error
        else:
            facts |= report_facts(report)
            print(table(report))
            write_json(out / "answers.json", report.as_dict())
    if model.is_dir():
        facts["parameters"] = _parameters(model)
    facts["seconds"] = round(time.monotonic() - began, 1)
    write_json(out / "report.json", facts)
    write_report(out)
    print(f"model: {model}\nreport: {out / 'report.html'}")
    if wrong is not None:
        raise wrong


@contextmanager
def _stoppable() -> Iterator[None]:
    """Work that loses nothing when it is stopped anywhere: it is done again."""
    from avlm.training.stopping import Stopped, stops_at_once

    try:
        with stops_at_once():
            yield
    except Stopped as stopped:
        _leave(stopped)


def _leave(stopped: Stopped, *, tells: bool = True) -> NoReturn:
    if tells:
        print(stopped.told(), file=sys.stderr)
    raise typer.Exit(stopped.status()) from None


def report_facts(report: Report) -> dict[str, Any]:
    """What `report.json` says of an evaluation."""
    tasks = report.tasks.items()
    return {
        "accuracy": {name: t.accuracy for name, t in tasks},
        "guess": {name: t.guess for name, t in tasks},
        "swapped": {name: t.swapped for name, t in tasks if t.swapped},
        "wer": {name: t.scores["wer"] for name, t in tasks if "wer" in t.scores},
        "samples": {name: t.samples for name, t in tasks},
        "bad": len(report.bad),
    }


def _parameters(model: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open is no dict)
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                total += size
    return total
