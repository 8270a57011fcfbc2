"""A whole run: its directory, the parts it builds, its stages one after the other.

Each stage begins with what the stage before it published, so a run that was killed
anywhere goes on from the last thing that was whole: a stage, or a checkpoint in one.

    config.yaml     the resolved settings
    parts/          encoders and language model that learned their trade here
    stages/         the model directory that each stage left
    checkpoints/    of the stage that is under way
    model/          the published model: the last stage's
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from avlm.config.io import build, read_mapping, to_yaml
from avlm.config.model import LanguagePart, ModelConfig, Source
from avlm.config.run import RunConfig, Stage
from avlm.convert.compose import Composed, compose
from avlm.convert.weights import load_model, publish_copy, save_model, save_part
from avlm.data.loader import StepLoader
from avlm.data.media import MediaReader
from avlm.data.sources import JsonLines
from avlm.data.vocabulary import sample_texts
from avlm.errors import ConfigError, DataError
from avlm.samples import Sample
from avlm.training.observe import Journal, StepMetrics, make_console, read_lines
from avlm.training.stages import part_modules
from avlm.training.trainer import Trainer

FREE = ("save", "samples", "threads", "max_steps")
"""Settings that may differ when a run goes on: they change no weights of the steps that were done."""


class Run:
    """A run in its directory.

    Args:
        config: Resolved settings.
        console: Where progress is shown; default: standard error.
        on_step: Called after each step.

    Raises:
        ConfigError: There is no training data, or the directory belongs to another run.
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
        self._sources: dict[str, JsonLines] = {}
        for stage in config.stages:
            self.source(stage)
        self._open()
        self.prompts = self._prompts()

    def train(self, only: str | None = None) -> Path:
        """Train all stages that are not done, or all up to and with one.

        Returns:
            The published model directory.
        """
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        names = [stage.name for stage in self.config.stages]
        if only is not None and only not in names:
            raise ConfigError(f"--stage {only}: the run has no such stage. Its stages are {', '.join(names)}")
        stages = self.config.stages if only is None else self.config.stages[: names.index(only) + 1]
        for stage in stages:
            if not self._result(stage).is_dir():
                self._train_stage(stage)
        last = [stage for stage in stages if stage.builds is None]
        if last:
            self._publish(last[-1])
        return self.out / "model"

    def source(self, stage: Stage) -> JsonLines:
        """The rows that a stage reads, opened once for all stages that share a file.

        Raises:
            ConfigError: No file is named, or it cannot be read.
        """
        path = stage.data or self.config.data.train
        if path is None:
            raise ConfigError(
                f"stage {stage.name} has no data: neither data.train nor stages.{stage.name}.data is set. "
                "Add data.train=FILE.jsonl"
            )
        if path not in self._sources:
            self._sources[path] = JsonLines(path)
        return self._sources[path]

    # ------------------------------------------------------------ the directory

    def _open(self) -> None:
        """Make the directory, or make sure that it is this run's."""
        saved = self.out / "config.yaml"
        fingerprint = {Path(path).name: _sha256(Path(path)) for path in self._sources}
        if saved.is_file():
            self._compare(build(RunConfig, read_mapping(saved), where=str(saved)), fingerprint)
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise ConfigError(
                f"{self.out} holds other files and no run. Choose an empty or a new directory with out=DIR"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        _write(saved, to_yaml(self.config))
        _write(self.out / "data.json", json.dumps(fingerprint, indent=1))

    def _compare(self, old: RunConfig, fingerprint: dict[str, str]) -> None:
        if old.recipe != self.config.recipe:
            raise ConfigError(
                f"{self.out} is a run of the recipe {old.recipe}, and this one is {self.config.recipe}. "
                "Choose another directory with out=DIR"
            )
        before, now = old.model_dump(mode="json"), self.config.model_dump(mode="json")
        for key in (*FREE, "out"):
            before.pop(key), now.pop(key)
        for data in (before["data"], now["data"]):
            for key in ("cache_mb", "workers", "eval", "train", "max_bad"):
                data.pop(key)
        changed = _first_difference(before, now)
        if changed is not None:
            key, a, b = changed
            raise ConfigError(
                f"{self.out} was begun with {key}={a}, and now {key}={b}. A run goes on with the settings it began with: "
                f"set {key}={a}, or choose another directory with out=DIR"
            )
        known = json.loads((self.out / "data.json").read_text()) if (self.out / "data.json").is_file() else fingerprint
        if sorted(known.values()) != sorted(fingerprint.values()):
            raise ConfigError(
                f"{self.out} was begun with other training data ({', '.join(known)} changed since). Put the data back as it was, "
                "or choose another directory with out=DIR"
            )

    def _result(self, stage: Stage) -> Path:
        """Where a stage leaves what it made."""
        if stage.builds is not None:
            return self.out / "parts" / stage.builds
        return self.out / "stages" / stage.name

    def _publish(self, stage: Stage) -> None:
        marker = self.out / "model" / "stage.json"
        if marker.is_file() and json.loads(marker.read_text())["stage"] == stage.name:
            return
        publish_copy(self._result(stage), self.out / "model", extra={"stage.json": json.dumps({"stage": stage.name})})

    # ------------------------------------------------------------ one stage

    def _train_stage(self, stage: Stage) -> None:
        self.console.rule(stage.name)
        model, processor = self._begin(stage)
        processor.use_reader(MediaReader(processor.media_spec(), self.config.data.cache_mb))
        loader = StepLoader(self.source(stage), stage, processor, self.config.data, self.config.seed)
        self._report_unreadable(stage)
        trainer = Trainer(
            self.config, stage, model, processor, loader, self._prompts_for(stage, processor), self.out,
            self._steps_before(stage), self.console, self.on_step,
        )  # fmt: skip
        trainer.train()
        if stage.builds is None:
            save_model(model, processor, self._result(stage))
        else:
            tokenizer = processor.tokenizer if stage.builds == "language" else None
            if tokenizer is not None:
                tokenizer.chat_template = processor.chat_template
            save_part(part_modules(model)[stage.builds], self._result(stage), tokenizer)
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)

    def _begin(self, stage: Stage) -> Composed:
        """What a stage starts from: the stage before it, a model of its own, or the run's parts."""
        config = self.config.model
        if isinstance(config, str):
            start = Path(config)
        else:
            start = None
        if stage.builds is None:
            earlier = [s for s in self.config.stages[: self.config.stages.index(stage)] if s.builds is None]
            if earlier:
                start = self._result(earlier[-1])
        if start is not None:
            return load_model(start)
        assert isinstance(config, ModelConfig)
        wanted = config if stage.builds is None else self._trade_model(stage, config)
        return compose(self._with_built_parts(wanted, stage), seed=self.config.seed, texts=list(self._texts()))

    def _trade_model(self, stage: Stage, config: ModelConfig) -> ModelConfig:
        """The small model in which one part learns its trade."""
        if stage.builds == "language":
            return ModelConfig(language=config.language)
        assert stage.reader is not None
        sense = {str(stage.builds): getattr(config, str(stage.builds))}
        return ModelConfig(language=stage.reader, video=config.video, **sense)

    def _with_built_parts(self, model: ModelConfig, stage: Stage) -> ModelConfig:
        """The same model with parts that were built in this run in place of fresh ones."""
        if stage.builds is not None:
            return model
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
        return [text for source in self._sources.values() for text in sample_texts(source)]

    def _steps_before(self, stage: Stage) -> int:
        return sum(self.config.stage_steps(s) for s in self.config.stages[: self.config.stages.index(stage)])

    def _report_unreadable(self, stage: Stage) -> None:
        """Rows that are no rows at all are listed once, when the stage that reads the file begins."""
        source = self.source(stage)
        journal = Journal(self.out)
        known = {row["where"] for row in read_lines(journal.quarantine)}
        fresh = [e for e in source.errors if e.where not in known]
        journal.unreadable(stage.name, self._steps_before(stage), fresh)
        if fresh:
            self.console.print(
                f"{len(fresh)} rows of {source.path.name} cannot be read and are left out; they are listed in quarantine.jsonl",
                highlight=False,
            )

    # ------------------------------------------------------------ fixed prompts

    def _prompts(self) -> list[Sample]:
        """The first held-out samples of each task (training ones where nothing is held out)."""
        wanted = self.config.samples.prompts
        if not wanted:
            return []
        if self.config.data.eval is not None:
            source = JsonLines(self.config.data.eval)
        else:
            source = next(iter(self._sources.values()))
        taken: dict[str, int] = {}
        found = []
        for i, facts in enumerate(source.facts):
            if taken.setdefault(facts.task, 0) < wanted:
                taken[facts.task] += 1
                found.append(source[i])
        return found

    def _prompts_for(self, stage: Stage, processor: object) -> list[Sample]:
        """Prompts that the stage's model has the senses for and whose media can be read."""
        assert hasattr(processor, "media_spec") and hasattr(processor, "prepare")
        media = processor.media_spec()
        can = {"image": media.vision is not None, "audio": media.audio is not None, "video": media.vision is not None}
        found = []
        for sample in self.prompts:
            if not all(can[kind] for kind in sample.kinds()) or (stage.builds is not None and not sample.kinds()):
                continue
            try:
                processor.prepare(sample)
            except DataError:
                continue
            found.append(sample)
        return found


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    aside.replace(path)


def train(run: RunConfig, *, only: str | None = None) -> Path:
    """Train a run, or go on with it where it stopped.

    Args:
        run: Resolved settings.
        only: Train up to and with this stage.

    Returns:
        The published model directory.

    Raises:
        ConfigError: The settings cannot work with the data or with the run's directory.
        DataError: Too many samples were bad.
    """
    return Run(run).train(only)
