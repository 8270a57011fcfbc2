"""The command line. Exit status: 0 done, 2 the user's input is wrong (one message), 1 anything else."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlm.errors import AvlmError, ConfigError, DataError

if TYPE_CHECKING:
    from avlm.config.data import DataConfig
    from avlm.config.run import RunConfig, Stage
    from avlm.convert.importing import Moved
    from avlm.eval.benchmarks import Report

app = typer.Typer(
    name="avlm",
    help="Give any language model eyes and ears: compose, align, fine-tune, evaluate, chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

convert = typer.Typer(
    help="Models of other makers in, and ours out.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)
app.add_typer(convert, name="convert")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, by dotted key.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file of settings.")]
MAX_SEED = 2**63 - 1
ModelDir = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")]


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no such letter still gets the answer
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except AvlmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, say: what was asked for is right, and nothing here is to be debugged
        print(f"{type(error).__name__}: {error}. Look after the disk or the device, and try again", file=sys.stderr)
        sys.exit(1)


@app.command()
def recipes() -> None:
    """List every recipe, one line each."""
    from avlm.recipes import summaries

    found = summaries()
    width = max(len(name) for name, _ in found)
    for name, summary in found:
        print(f"{name:{width}}  {summary}")


@app.command()
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print the resolved settings and what trains in each stage."""
    from avlm.config.io import to_yaml

    config = _resolve(recipe, overrides)
    print(to_yaml(config))
    print(what_trains(config))


def what_trains(config: RunConfig) -> str:
    """A table of parts by stages: the learning rate where a part is trained, a dash where it is frozen or absent."""
    from avlm.config.run import PARTS, RARE

    def cell(stage: Any, part: str) -> str:
        how = stage.train.get(part)
        if how is None:
            return "-"
        adapters = "" if how.lora is None else f" {'DoRA' if how.lora.dora else 'LoRA'} {how.lora.rank}"
        return f"{how.lr:g}{adapters}" + (" if present" if how.optional else "")

    def more(stage: Any) -> str:
        head = "" if stage.state_head is None else f"state head {stage.state_head.lr:g}"
        words = (stage.builds, "distill" if stage.loss == "distill" else "", head)
        return ", ".join(word for word in words if word) or "-"

    parts = [p for p in PARTS if p not in RARE or any(p in stage.train for stage in config.stages)]
    header = ["stage", *parts, "rows", "steps", "builds"]
    lines = [
        [s.name, *(cell(s, p) for p in parts), s.rows, _length(config, s), more(s)]
        for s in config.stages
        if s.name not in config.left_out()
    ]
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    rows = [
        "  ".join(f"{value:{width}}" for value, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *lines]
    ]
    return "\n".join(["# What trains (learning rate; - is frozen)", *("# " + row for row in rows)])


def _length(config: RunConfig, stage: Stage) -> str:
    if stage.steps is not None:
        return str(config.stage_steps(stage))
    epochs = f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'}"
    return epochs if config.max_steps is None else f"{epochs}, at most {config.max_steps}"


@app.command()
def compose(
    out: Annotated[Path, typer.Argument(help="Where the model directory goes.")],
    overrides: Overrides = None,
    language: Annotated[str | None, typer.Option(help="Hub name, folder, or random:MODEL_TYPE.")] = None,
    vision: Annotated[str | None, typer.Option(help="The same for the vision encoder.")] = None,
    audio: Annotated[str | None, typer.Option(help="The same for the audio encoder.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything that is drawn afresh.")] = 0,
) -> None:
    """Compose a model directory from a language model and any encoders."""
    from avlm.config.io import assemble
    from avlm.config.model import ModelConfig

    _check_absent(out)
    data: dict[str, Any] = {"language": _source(language) if language else {}}
    for sense, given in (("vision", vision), ("audio", audio)):
        if given:
            data[sense] = {"encoder": _source(given)}
    config = assemble(ModelConfig, data, overrides or [])

    from avlm.convert.compose import compose as compose_model
    from avlm.convert.weights import save_model

    _quiet()
    model, processor = compose_model(config, seed=seed)
    with _writing(out):
        save_model(model, processor, out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {', '.join(config.parts())}")


def _quiet() -> None:
    """transformers draws bars while it loads; where there is no terminal they would bury what there is to read."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _source(text: str) -> dict[str, Any]:
    if text.startswith("random:"):
        return {"random": {"model_type": text.removeprefix("random:")}}
    return {"path": text}


@convert.command("import")
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
    _check_absent(out)
    from avlm.convert.importing import import_model
    from avlm.training.observe import make_console, world_progress

    _quiet()
    with _writing(out), world_progress(make_console()) as progress:
        moved = import_model(source, out, drop=drop or [], pickles=pickles, progress=progress)
    _tell_moved(moved)


@convert.command("export")
def convert_export(
    model: ModelDir,
    out: Annotated[Path, typer.Argument(help="Where the folder goes.")],
    to: Annotated[str, typer.Option(help="llava, llava_next, qwen2_audio; or a part: language, vision, ...")],
    adapters: Annotated[str | None, typer.Option(help="Adapters in PEFT's format, merged first.")] = None,
) -> None:
    """Write a model, or one part of it, in transformers' own format."""
    _check_absent(out)
    from avlm.convert.exporting import export_model
    from avlm.training.observe import make_console, world_progress

    _quiet()
    with _writing(out), world_progress(make_console()) as progress:
        moved = export_model(model, out, to, adapters=adapters, progress=progress)
    _tell_moved(moved)


def _tell_moved(moved: Moved) -> None:
    print(f"{moved.out}: {moved.parameters:,} parameters in {moved.tensors} tensors, {moved.num_bytes:,} bytes")
    for name in moved.dropped:
        print(f"left out: {name}", file=sys.stderr)
    for note in moved.notes:
        print(f"note: {note}", file=sys.stderr)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Train up to and with this stage.")] = None,
) -> None:
    """Train all stages. A run directory that exists is resumed. Held-out rows are scored at the end.

    Without data.train the run learns from made-up rows, which shows that the recipe works.
    """
    config = _resolve(recipe, overrides)
    _check_files(config)
    _train_and_report(_with_data(config), stage, began=time.monotonic())


@app.command()
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

    from avlm.data.world.build import make_world
    from avlm.training.observe import make_console, world_progress

    with _writing(world), world_progress(make_console()) as progress:
        make_world(
            world, seed=config.seed, train_samples=samples, eval_samples_per_task=eval_samples, progress=progress
        )
    _train_and_report(config, None, began)
    print(f'\ntalk to it:  avlm chat {config.out}/model --image PICTURE.png "What do you see?"')
    print(f"look at it:  {config.out}/report.html")


@app.command("eval")
def evaluate(
    model: ModelDir,
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Rows with answers.")],
    out: Annotated[Path | None, typer.Option(help="Write the report there as JSON.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="exact or wer; default: by each row's task.")] = None,
    swap: Annotated[bool, typer.Option(help="Also ask with swapped pictures and sounds.")] = True,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
) -> None:
    """Score a model by task, and check that it looks and listens."""
    _check_file("DATA", str(data))
    if out is not None:
        _check_writable(out)
    report = _evaluate(model, data, metric or [], swap, max_tokens)
    print(table(report))
    if out is not None:
        _write_json(out, report.as_dict())


@app.command()
def check(model: ModelDir) -> None:
    """Prove on a model that batching, packing, caching, freezing and saving change nothing, and that media matter."""
    from avlm.convert.weights import load_model
    from avlm.eval.check import Checks

    _quiet()
    checks = Checks(*load_model(model))
    width = max(map(len, checks.all()))
    failed = 0
    for result in checks.run():
        failed += not result.ok
        print(f"{'ok' if result.ok else 'FAILED':6}  {result.name:{width}}  {result.seconds:5.1f} s  {result.found}")
    if failed:
        raise typer.Exit(1)


@app.command()
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
            _check_file(f"--{name}", str(path))
    from avlm.inference.chat import Audio, Image, Video, load
    from avlm.inference.generate import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    _quiet()
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


# ---------------------------------------------------------------- shared by commands


def _resolve(name: str, overrides: list[str] | None) -> RunConfig:
    from avlm.recipes import resolve

    return resolve(name, overrides or [])


def _check_files(config: RunConfig) -> None:
    """Refuse a missing file before anything heavy is loaded."""
    named = {"data.train": config.data.train, "data.eval": config.data.eval}
    named |= {f"stages.{s.name}.data": s.data for s in config.stages}
    for key, path in named.items():
        if path is not None:
            _check_file(key, path)
    if isinstance(config.model, str) and not os.path.isdir(config.model):
        raise ConfigError(f"model={config.model}: there is no such directory. Set model=DIR to a model directory")


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists, and would be overwritten. Choose another name, or remove it")


def _with_data(config: RunConfig) -> RunConfig:
    """The run with made-up rows, and a notice, where it was given none for a stage."""
    if config.data.train is not None or all(stage.data is not None for stage in config.stages):
        return config
    from avlm.data.mock import ROWS, make_mock
    from avlm.training.chain import MOCK, check_place, parts_of

    out = Path(config.out)
    check_place(out)
    parts = parts_of(Path(config.model)) if isinstance(config.model, str) else config.model.parts()
    tasks = tuple(dict.fromkeys(task for stage in config.stages for task in (*stage.tasks, *stage.take)))
    with _writing(out):
        rows = make_mock(out / MOCK, sees="vision" in parts, hears="audio" in parts, tasks=tasks, seed=config.seed)
    print(
        f"mock data: data.train is not set, so this run learns from {ROWS} made-up rows ({rows}). "
        "They show that it runs and teach nothing; for your own add data.train=FILE.jsonl",
        file=sys.stderr,
    )
    return config.model_copy(update={"data": config.data.model_copy(update={"train": str(rows)})})


def _check_file(key: str, path: str) -> None:
    if os.path.isdir(path):
        raise ConfigError(f"{key}={path}: is a directory, and a file is wanted. Give the path of the file itself")
    if not os.path.isfile(path):
        raise ConfigError(f"{key}={path}: there is no such file. Check the path")


def _check_writable(path: Path) -> None:
    """Refuse a place that cannot be written before the work is done, rather than after."""
    with _writing(path):
        new = not os.path.lexists(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if new:
            path.unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A place that cannot be written is the user's to change."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}). Choose another place") from None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character becomes JSON's escape for it


def _train_and_report(config: RunConfig, stage: str | None, began: float) -> None:
    """Train, measure on the held-out rows, and write the report: also of a run whose held-out rows are all unusable."""
    from avlm.training.chain import Run
    from avlm.training.report import write_report
    from avlm.training.stopping import Stopped

    _quiet()
    out = Path(config.out)
    try:
        model = Run(config).train(stage)
    except Stopped as stopped:
        print("stopped; all that was done is saved, and the same command goes on from there", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    facts: dict[str, Any] = {"recipe": config.recipe, "seed": config.seed}
    wrong: DataError | None = None
    if config.data.eval is not None and model.is_dir():
        try:
            report = _evaluate(str(model), Path(config.data.eval), [], True, 64, config.data)
        except DataError as error:
            wrong = error
        else:
            facts |= report_facts(report)
            print(table(report))
            _write_json(out / "answers.json", report.as_dict())
    if model.is_dir():
        facts["parameters"] = _parameters(model)
    facts["seconds"] = round(time.monotonic() - began, 1)
    _write_json(out / "report.json", facts)
    write_report(out)
    print(f"model: {model}\nreport: {out / 'report.html'}")
    if wrong is not None:
        raise wrong


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


def _evaluate(
    model: str, data: Path, metric: list[str], swap: bool, max_tokens: int, settings: DataConfig | None = None
) -> Report:
    from avlm.convert.weights import load_model
    from avlm.data.sources import open_source
    from avlm.eval.benchmarks import evaluate as run
    from avlm.eval.metrics import metrics_for
    from avlm.inference.generate import Sampling
    from avlm.training.observe import counted, make_console

    metrics_for("", metric)
    Sampling(max_tokens=max_tokens)  # both are refused now rather than when the model has been loaded
    _quiet()
    source = open_source(str(data), settings)
    loaded, processor = load_model(model)
    with counted("answers", make_console()) as progress:
        report = run(
            loaded, processor, list(source), metric=metric, swap=swap, max_tokens=max_tokens, progress=progress
        )  # fmt: skip
    report.bad += [{"id": e.sample_id, "where": e.where, "reason": e.reason} for e in source.errors]
    for bad in report.bad[:5]:
        print(f"left out: {bad['where']}: {bad['reason']}", file=sys.stderr)
    if len(report.bad) > 5:
        print(f"and {len(report.bad) - 5} more rows were left out", file=sys.stderr)
    return report


def table(report: Report) -> str:
    """Scores by task, as text."""
    header = ["task", "samples", "accuracy", "guessing", "pictures swapped", "sounds swapped", "wer"]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = [
        [
            name or "(none)",
            str(t.samples),
            number(t.accuracy),
            number(t.guess),
            number(t.swapped.get("image")),
            number(t.swapped.get("audio")),
            number(t.scores.get("wer")),
        ]
        for name, t in report.tasks.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{v:{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )
