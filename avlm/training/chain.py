"""A whole run: its directory, the parts it builds, its stages one after the other.

Each stage begins with what the stage before it published, so a run that was killed
anywhere goes on from the last thing that was whole: a stage, or a checkpoint in one.

    config.yaml     the resolved settings
    mock/           made-up data, where the run was given none
    building/       parts that are being built side by side
    parts/          encoders and language model that learned their trade here
    stages/         the model directory that each stage left
    adapters/       of each stage that trained some, in PEFT's format
    checkpoints/    of the stage that is under way
    model/          the published model: that of the last stage that is done
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from avlm.config.io import build, read_mapping, to_yaml
from avlm.config.media import VideoSpec
from avlm.config.model import LanguagePart, ModelConfig, Source
from avlm.config.run import RunConfig, Stage
from avlm.convert.compose import Composed, compose
from avlm.convert.weights import load_model, publish_copy, save_model, save_part
from avlm.data.decoding.files import limits_of
from avlm.data.loader import StepLoader
from avlm.data.media.reader import MediaReader
from avlm.data.processor import AvlmProcessor
from avlm.data.selection import left_out, stage_rows, untaken, video_senses
from avlm.data.text.vocabulary import sample_texts
from avlm.errors import ConfigError, DataError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.precision import cast_weights
from avlm.samples import MediaKind, Sample
from avlm.training.building import build_side_by_side, by_itself, collect
from avlm.training.console import counted, make_console, tell
from avlm.training.memory import keep_freed_memory
from avlm.training.observe import StepMetrics
from avlm.training.sources import RunSources
from avlm.training.stages import check_parts, part_modules
from avlm.training.stopping import StopWish, stop_wishes
from avlm.training.trainer import Trainer

FREE = ("save", "samples", "threads", "max_steps", "out", "side_by_side", "speed")
"""Settings that may differ when a run goes on: they change no weights of the steps that were done."""
FREE_DATA = (
    "cache_mb",
    "workers",
    "worker_mb",
    "stall_s",
    "eval",
    "train",
    "folder",
    "roots",
    "fetch",
    "index",
    "max_bad",
    "max_bad_run",
    "too_long",
)
"""The same of `data`. The training file, and its media, may lie elsewhere; the file's contents are compared."""

LOCK = ".lock"
MOCK = "mock"
"""Folder of made-up data in a run's directory, for a run that was given none."""
LEFT_BY_A_START = {LOCK, ".config.yaml.writing", MOCK}
"""All that a run killed at its very start can have left in its directory."""


class Run:
    """A run in its directory.

    Args:
        config: Resolved settings.
        console: Where progress is shown; default: standard error.
        on_step: Called after each step.

    Raises:
        ConfigError: There is no training data, a stage cannot work with it or with the model, or the directory belongs
            to another run.
        DataError: Too many rows cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        console: Console | None = None,
        on_step: Callable[[StepMetrics], None] | None = None,
    ) -> None:
        self.config = config
        self.console = console or make_console()
        self.on_step = on_step
        self.out = Path(config.out)
        self.stages = _stages(config)
        self.sources = RunSources(config)
        self.video = _video_senses(config.model)
        self.given = config
        """As it was asked for, which is what is written down: lengths in epochs stay epochs."""
        self.config = self._counted(config)
        self.stages = tuple(stage for stage in self.config.stages if stage.name in {s.name for s in self.stages})
        self._fingerprint = self.sources.fingerprints()
        self._check_directory()
        self.prompts = self.sources.prompts()

    def _counted(self, config: RunConfig) -> RunConfig:
        """The same settings with lengths in steps, after a look for every stage's rows."""
        taken = {stage.name for stage in self.stages}

        def in_steps(stage: Stage) -> Stage:
            rows = len(stage_rows(self.sources.of(stage).facts, stage, self.video)) if stage.name in taken else 1
            if stage.epochs is None:
                return stage
            if stage.batch_rows is not None:
                raise ConfigError(
                    f"stage {stage.name} is {stage.epochs:g} epochs long and takes {stage.batch_rows} rows a step, and "
                    "how many steps that is follows from an index that the stage makes when it begins. Give its "
                    f"length as stages.{stage.name}.steps, or batch_samples instead of batch_rows"
                )
            steps = config.model_copy(update={"max_steps": None}).stage_steps(stage, rows)
            return stage.model_copy(update={"steps": steps, "epochs": None})

        return config.model_copy(update={"stages": tuple(in_steps(stage) for stage in config.stages)})

    def train(self, only: str | None = None) -> Path:
        """Train all stages that are not done, or all up to and with one.

        Returns:
            The published model directory, that of the last stage that is done.

        Raises:
            ConfigError: There is no such stage, or another process is training in the directory.
            Stopped: The run was asked to stop (Ctrl-C, SIGTERM). The same command goes on.
        """
        names = [stage.name for stage in self.stages]
        if only is not None and only not in names:
            raise ConfigError(f"--stage {only}: the run has no such stage. Its stages are {', '.join(names)}")
        stages = self.stages if only is None else self.stages[: names.index(only) + 1]
        keep_freed_memory()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        if len(self.stages) < len(self.config.stages):
            given = f"the model {self.config.model} brings its parts along"
            if isinstance(self.config.model, ModelConfig):
                given = "what would be built there comes with its weights"
            tell(self.console, f"left out: {', '.join(self.config.left_out())}; {given}")
        with self._claimed(), stop_wishes() as stop:
            self._tell_rows(stages)
            self._build_side_by_side(stages, stop)
            for stage in stages:
                if not self._done(stage):
                    self._train_stage(stage, stop)
                    stop.grant()
            self._publish()
        return self.out / "model"

    def _tell_rows(self, stages: Sequence[Stage]) -> None:
        """Which of the stages to come read a part of their rows only."""
        for stage in stages:
            told = None if self._done(stage) else left_out(self.sources.of(stage).facts, stage, self.video)
            if told is not None:
                tell(self.console, told)

    # ------------------------------------------------------------ the directory

    def _check_directory(self) -> None:
        """Make sure that the directory is this run's, empty, or not there."""
        check_place(self.out)
        saved = self.out / "config.yaml"
        if os.path.isfile(saved):
            self._compare(build(RunConfig, read_mapping(saved), where=str(saved)))

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The directory made, written down as this run's, and locked against a second process while the block runs."""
        with ExitStack() as stack:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.out / LOCK).open("a"))
                alone = _lock(lock.fileno())
                if alone:
                    self._check_directory()
                    _write(self.out / "config.yaml", to_yaml(self.given))
                    _write(self.out / "data.json", json.dumps(self._fingerprint, indent=1))
            except OSError as error:
                raise ConfigError(
                    f"{self.out} cannot be written to ({error.strerror}). Choose another directory with out=DIR"
                ) from None
            if not alone:
                raise ConfigError(
                    f"another process is training in {self.out}, and two would overwrite each other. "
                    "Wait for it, or choose another directory with out=DIR"
                )
            for pattern in (".*.old", ".*.writing", "*/.*.writing"):  # left by a run that was killed
                for path in self.out.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)
            yield

    def _compare(self, old: RunConfig) -> None:
        if old.recipe != self.config.recipe:
            raise ConfigError(
                f"{self.out} is a run of the recipe {old.recipe}, and this one is {self.config.recipe}. "
                "Choose another directory with out=DIR"
            )
        before, now = old.model_dump(mode="json"), self.given.model_dump(mode="json")
        for data in (before, now):
            for key in FREE:
                del data[key]
            for key in FREE_DATA:
                del data["data"][key]
        changed = _first_difference(before, now) or self._changed_steps(self._counted(old))
        if changed is not None:
            key, a, b = changed
            raise ConfigError(
                f"{self.out} was begun with {key}={_shown(a)}, and now {key}={_shown(b)}. A run goes on with the "
                f"settings it began with: set {key}={_shown(a)}, or choose another directory with out=DIR"
            )
        self._compare_data()

    def _changed_steps(self, old: RunConfig) -> tuple[str, object, object] | None:
        """A stage's rates follow from its number of steps, so that cannot change once the stage is under way."""
        under_way = {path.name for path in (self.out / "checkpoints").glob("step-*")}
        for stage in self.stages:
            done = self._done(stage)
            if (done or under_way) and old.stage_steps(stage) != self.config.stage_steps(stage):
                return "max_steps", old.max_steps, self.config.max_steps
            if not done:
                break
        return None

    def _compare_data(self) -> None:
        try:
            known = json.loads((self.out / "data.json").read_bytes())
        except (OSError, ValueError):
            return  # killed before it was written: nothing was learned yet
        if sorted(known.values()) != sorted(self._fingerprint.values()):
            changed = [name for name, digest in known.items() if digest not in self._fingerprint.values()]
            raise ConfigError(
                f"{self.out} was begun with other training data ({', '.join(changed or known)} changed since). "
                "Put the data back as it was, or choose another directory with out=DIR"
            )

    def _result(self, stage: Stage) -> Path:
        """Where a stage leaves what it made."""
        if stage.builds is not None:
            return self.out / "parts" / stage.builds
        return self.out / "stages" / stage.name

    def _done(self, stage: Stage) -> bool:
        return self._result(stage).is_dir()

    def _publish(self) -> None:
        """The model of the last stage that is done, under the run's own name for it."""
        done = [stage for stage in self.stages if stage.builds is None and self._done(stage)]
        if not done:
            return
        marker = json.dumps({"stage": done[-1].name})
        published = self.out / "model" / "stage.json"
        if not published.is_file() or published.read_text() != marker:
            publish_copy(self._result(done[-1]), self.out / "model", extra={"stage.json": marker})

    def _build_side_by_side(self, stages: Sequence[Stage], stop: StopWish) -> None:
        """Build the parts that come next and need no other, where there is more than one and that is wanted."""
        if any((self.out / "checkpoints").glob("step-*")):
            return  # the first of them is under way already
        if len(self.sources.opened) > 1:
            return  # their vocabulary is that of all files, and each of them would know its own
        waiting = list(itertools.takewhile(by_itself, (stage for stage in stages if not self._done(stage))))
        under_way = (self.out / "building").is_dir()
        if under_way or (self.config.side_by_side > 1 and len(waiting) > 1):
            at_once = max(2, self.config.side_by_side)
            for first in range(0, len(waiting), at_once):
                build_side_by_side(self.config, waiting[first : first + at_once], self.console, stop)
            collect(self.config, waiting, self._steps_before)

    # ------------------------------------------------------------ one stage

    def _train_stage(self, stage: Stage, stop: StopWish) -> None:
        self.console.rule(stage.name)
        model, processor = self._begin(stage)
        if self.config.precision is not None:
            cast_weights(model, getattr(torch, self.config.precision))
        limits = limits_of(self.config.data.limits, self.sources.doors())
        processor.use_reader(MediaReader(processor.media_spec(), self.config.data.cache_mb, limits))
        if self.config.data.system is not None:
            processor.use_system(self.config.data.system)
        writer = processor if stage.template is None else processor.with_template(stage.template)
        with counted(f"index of {stage.name}", self.console) as progress:
            measures = self.sources.measures(stage, writer, self.video, self.out / "index", progress)
        loader = StepLoader(
            self.sources.of(stage), stage, writer, self.config.data, self.config.seed, self.video, measures=measures
        )
        if untaken(self.sources.of(stage).facts, stage):
            names = ", ".join(untaken(self.sources.of(stage).facts, stage))
            tell(self.console, f"{stage.name}: no row is of {names}, of which stages.{stage.name}.take takes a share")
        trainer = Trainer(
            self.config, stage, model, processor, loader, self._prompts_for(stage, processor), self.out,
            self._steps_before(stage), self.console, self.on_step, stop,
        )  # fmt: skip
        trainer.train()
        try:
            self._save_result(stage, model, processor)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        checkpoints = self.out / "checkpoints"
        if checkpoints.is_dir():
            shutil.rmtree(checkpoints.replace(self.out / ".checkpoints.old"))

    def _save_result(self, stage: Stage, model: AvlmForConditionalGeneration, processor: AvlmProcessor) -> None:
        if stage.builds is None:
            save_model(model, processor, self._result(stage))
            return
        tokenizer = processor.tokenizer if stage.builds == "language" else None
        if tokenizer is not None:
            tokenizer.chat_template = processor.chat_template
        save_part(part_modules(model)[stage.builds], self._result(stage), tokenizer)

    def _begin(self, stage: Stage) -> Composed:
        """What a stage starts from: the stage before it, the given model, or the run's parts."""
        earlier = [s for s in self.stages[: self.stages.index(stage)] if s.builds is None]
        if earlier and stage.builds is None:
            return load_model(self._result(earlier[-1]))
        config = self.config.model
        if isinstance(config, str):
            return load_model(config)
        model = config if by_itself(stage) else self._with_built_parts(config)
        return compose(
            _stage_model(stage, model),
            seed=self.config.seed,
            texts=list(self._texts()),
            language_weights=stage.supervise != "words",  # of which only the tokens are used
        )

    def _with_built_parts(self, model: ModelConfig) -> ModelConfig:
        """The same model with parts that were built in this run in place of fresh ones."""
        update: dict[str, object] = {}
        language = self.out / "parts" / "language"
        if language.is_dir():
            update["language"] = LanguagePart(path=str(language), chat_template=model.language.chat_template)
        for sense in ("vision", "audio"):
            folder = self.out / "parts" / sense
            part = getattr(model, sense)
            if part is not None and folder.is_dir():
                update[sense] = part.model_copy(update={"encoder": Source(path=str(folder))})
        return model.model_copy(update=update)

    def _texts(self) -> list[str]:
        return [text for source in self.sources.opened.values() for text in sample_texts(source)]

    def _steps_before(self, stage: Stage) -> int:
        return sum(self.config.stage_steps(s) for s in self.stages[: self.stages.index(stage)])

    # ------------------------------------------------------------ fixed prompts

    def _prompts_for(self, stage: Stage, processor: AvlmProcessor) -> list[Sample]:
        """Prompts that the stage's model has the senses for and that can be read."""
        if stage.supervise == "words":
            return []  # the language model learns nothing in it
        media = processor.media_spec()
        can = {"image": media.vision is not None, "audio": media.audio is not None}
        can["video"] = can["audio" if media.video.order == "audio" else "image"]
        found = []
        for sample in self.prompts:
            if not all(can[kind] for kind in sample.kinds()) or (stage.builds is not None and not sample.kinds()):
                continue
            try:
                processor.encode(sample, prompt_only=True)
            except DataError:
                continue
            found.append(sample)
        return found


def check_place(out: Path) -> None:
    """Make sure that a run's directory is a run's, empty, or not there.

    Raises:
        ConfigError: It is something else.
    """
    if os.path.isdir(out):
        if not os.path.isfile(out / "config.yaml") and set(os.listdir(out)) - LEFT_BY_A_START:
            raise ConfigError(f"{out} holds other files and no run. Choose an empty or a new directory with out=DIR")
    elif os.path.lexists(out):
        raise ConfigError(
            f"{out} is a file, and a run needs a directory. Choose another name with out=DIR, or remove the file"
        )


def _stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages that a run goes through: a model that is given brings its parts, and a part its weights.

    Raises:
        ConfigError: A stage cannot work with the given model.
    """
    stages = tuple(stage for stage in config.stages if stage.name not in config.left_out())
    if isinstance(config.model, ModelConfig):
        if not stages:
            raise ConfigError(
                f"all stages of {config.recipe} build parts, and the model's come with their weights. "
                "Set the `random` configuration of one, or choose another recipe"
            )
        return stages
    if not stages:
        raise ConfigError(
            f"model={config.model} is given, and all stages of {config.recipe} build parts of a new one. "
            "Leave model= out, or choose another recipe"
        )
    parts = parts_of(Path(config.model))
    for stage in stages:
        check_parts(stage, parts)
    return stages


def parts_of(model: Path) -> list[str]:
    """The parts of a model directory, from its config.json alone.

    Raises:
        ConfigError: It is none.
    """
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"model={model}: is not a model directory (it has no config.json). "
            "Set model=DIR to one that avlm compose or avlm train wrote"
        )
    settings = read_mapping(model / "config.json")
    senses = [sense for sense in ("vision", "audio") if settings.get(f"{sense}_config")]
    beside = ["audio_beside"] if settings.get("audio_beside_config") else []
    return [*(part for sense in senses for part in (sense, f"{sense}_connector")), *beside, "language"]


def _video_senses(model: ModelConfig | str) -> frozenset[MediaKind]:
    """What a run's model takes from a video; of a model directory, as its config.json tells."""
    if isinstance(model, ModelConfig):
        return video_senses(model.audio is not None, model.video.order)
    settings = read_mapping(Path(model) / "config.json")
    order = build(VideoSpec, (settings.get("media") or {}).get("video") or {}).order
    return video_senses(bool(settings.get("audio_config")), order)


def _stage_model(stage: Stage, model: ModelConfig) -> ModelConfig:
    """The part of a model that a stage works on: all of it, or what one part learns its trade in."""
    if stage.builds is None:
        return model
    sense = {} if stage.builds == "language" else {stage.builds: getattr(model, stage.builds)}
    return ModelConfig(language=model.language, video=model.video, **sense)


def _first_difference(a: object, b: object, path: str = "") -> tuple[str, object, object] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            found = _first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            name = x.get("name", i) if isinstance(x, dict) else i
            found = _first_difference(x, y, f"{path}.{name}")
            if found:
                return found
        return None
    return None if a == b else (path, a, b)


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _lock(handle: int) -> bool:
    """Lock an open file until it is closed, however the process ends; False if another process has."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one directory are then not told apart
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def train(run: RunConfig, *, only: str | None = None) -> Path:
    """Train a run, or go on with it where it stopped.

    Args:
        run: Resolved settings.
        only: Train up to and with this stage.

    Returns:
        The published model directory.

    Raises:
        ConfigError: The settings cannot work with the data or with the run's directory, or training diverged.
        DataError: Too many samples were bad.
        Stopped: Ctrl-C or SIGTERM; all that was done is saved, and the same call goes on.
    """
    return Run(run).train(only)
