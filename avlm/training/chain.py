"""A whole run: its directory, the parts it builds, its stages one after the other.

Each stage begins with what the stage before it published, so a run that was killed
anywhere goes on from the last thing that was whole: a stage, or a checkpoint in one.

    config.yaml     the resolved settings
    steps.json      how many steps a stage takes, where that is known only when it begins
    mock/           made-up data, where the run was given none
    building/       parts that are being built side by side
    parts/          encoders and language model that learned their trade here
    stages/         the model directory that each stage left
    adapters/       of each stage that trained some, in PEFT's format
    features/       what frozen encoders made, until the run is done
    checkpoints/    of the stage that is under way
    model/          the published model: that of the last stage that is done
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from avlm.config.io import build, read_mapping, to_yaml
from avlm.config.media import VideoSpec
from avlm.config.model import LanguagePart, ModelConfig, Source
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.convert.compose import Composed, compose
from avlm.convert.verifying import check_sums
from avlm.convert.weights import load_model, publish_copy, save_model, save_part
from avlm.data.decoding.files import limits_of
from avlm.data.loader import StepLoader
from avlm.data.media.reader import MediaReader
from avlm.data.planning.led import StagePlan
from avlm.data.processor import AvlmProcessor
from avlm.data.selection import left_out, own_kinds, stage_rows, unmet, video_senses
from avlm.data.text.vocabulary import sample_texts
from avlm.errors import ConfigError, DataError
from avlm.models.memory import keep_freed_memory
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.precision import cast_weights
from avlm.samples import MediaKind, Sample
from avlm.training.apart import apart
from avlm.training.building import build_side_by_side, by_itself, clear, collect, collect_models, under_way
from avlm.training.checkpoint import remove_of, stages_of
from avlm.training.console import counted, make_console, tell
from avlm.training.counting.trackers import Trackers, open_trackers
from avlm.training.device import move_model
from avlm.training.directory import STEPS, Difference, RunDirectory, note_steps, noted_steps
from avlm.training.features import drop_features
from avlm.training.heldout import Examiner
from avlm.training.mates import mates
from avlm.training.observe import StepMetrics, read_lines
from avlm.training.sharded import shards
from avlm.training.sources import RunSources, uncounted
from avlm.training.stages import check_parts, part_modules
from avlm.training.stopping import StopWish, stop_wishes
from avlm.training.trainer import Trainer
from avlm.training.world import World, join, one_process


class Run:
    """A run in its directory.

    Args:
        config: Resolved settings.
        console: Where progress is shown; default: standard error.
        on_step: Called after each step.
        world: The processes that train together; default: this one alone.
        examine: Asks for answers where the run is measured as it goes; None: only losses are measured.

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
        world: World | None = None,
        examine: Examiner | None = None,
    ) -> None:
        self.config = config
        self.examine = examine
        self.world = world or one_process(config.device)
        self.console = (console or make_console()) if self.world.first else Console(quiet=True)
        self.on_step = on_step
        self.out = Path(config.out)
        self.stages = _stages(config)
        self.sources = RunSources(config)
        self.video = _video_senses(config.model)
        self.given = config
        """As it was asked for, which is what is written down: lengths in epochs stay epochs."""
        self._packed_steps = self._known_steps()
        """Steps of stages that are epochs of packed rows, as far as known, by name."""
        self.config = self._counted(config)
        self.stages = tuple(stage for stage in self.config.stages if stage.name in {s.name for s in self.stages})
        self.directory = RunDirectory(self.given, self.sources.fingerprints(), self._changed_steps)
        self.directory.check()
        self.prompts = self.sources.prompts()
        self.sources.check_held_out(self.examine is not None or not self.world.first)
        self.trackers = Trackers()

    def _counted(self, config: RunConfig) -> RunConfig:
        """The same settings with lengths in steps, after a look for every stage's rows.

        How many packed rows an epoch has follows from an index, and that from the model's own tokens. So where a stage
        is so many epochs of them its length is known when it begins, and noted for whoever goes on.
        """
        taken = {stage.name for stage in self.stages}

        def in_steps(stage: Stage) -> Stage:
            rows = len(stage_rows(self.sources.of(stage).facts, stage, self.video)) if stage.name in taken else 1
            if stage.epochs is None:
                return stage
            if stage.batch_rows is not None:
                known = self._packed_steps.get(stage.name)
                return stage if known is None else _of_steps(stage, known)
            return _of_steps(stage, config.model_copy(update={"max_steps": None}).stage_steps(stage, rows))

        return config.model_copy(update={"stages": tuple(in_steps(stage) for stage in config.stages)})

    def train(self, only: str | None = None, *, stop: StopWish | None = None) -> Path:
        """Train all stages that are not done, or all up to and with one.

        Args:
            stop: Tells whether the run has been asked to stop. Default: signals are caught while it trains.

        Returns:
            The published model directory, that of the last stage that is done.

        Raises:
            ConfigError: There is no such stage, or another process is training in the directory.
            Stopped: The run was asked to stop (Ctrl-C, SIGTERM, SIGUSR1). The same command goes on.
        """
        self.world.agree("settings", to_yaml(self.given))
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
        wishes = stop_wishes() if stop is None else nullcontext(stop)
        with self._claimed(), wishes as stop, open_trackers(self.config, self.out, self.world.first) as self.trackers:
            self._tell_rows(stages)
            if self.world.first:
                clear(self.config)
                remove_of(self.out / "checkpoints", {stage.name for stage in self.stages if self._done(stage)})
            self.world.wait()
            self._build_side_by_side(stages, stop)
            self.world.agree("finished stages", [stage.name for stage in stages if self._done(stage)])
            for group in apart(self.stages, self.video):
                self._train_group(group, stages, stop)
            if self.world.first:
                self._publish()
                if all(self._done(stage) for stage in self.stages):
                    drop_features(self.config.features, self.out)
        return self.out / "model"

    def train_beside(self, name: str, stop: StopWish) -> None:
        """Train one stage as one of the processes that the run's first has started for it."""
        keep_freed_memory()
        self._train_stage(next(stage for stage in self.stages if stage.name == name), stop, self.world)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The run's directory claimed by the first process, for which the others wait."""
        with self.directory.claimed() if self.world.first else nullcontext():
            self.world.wait()
            yield

    def _tell_rows(self, stages: Sequence[Stage]) -> None:
        """Which of the stages to come read a part of their rows only, and what they name that is in none."""
        for stage in stages:
            if self._done(stage):
                continue
            facts = self.sources.of(stage).facts
            told = left_out(facts, stage, self.video)
            steps = None if stage.steps is None else self.config.stage_steps(stage)
            for sentence in [*([] if told is None else [told]), *unmet(facts, stage, self.video, steps)]:
                tell(self.console, sentence)

    # ------------------------------------------------------------ what is done

    def _changed_steps(self, old: RunConfig) -> Difference | None:
        """A stage's rates follow from its number of steps, so that cannot change once the stage is under way."""
        old = self._counted(old)
        under_way = self._under_way()
        for stage in self.stages:
            done = self._done(stage)
            counted = stage.steps is not None and (done or under_way)
            if counted and old.stage_steps(stage) != self.config.stage_steps(stage):
                return "max_steps", old.max_steps, self.config.max_steps
            if not done:
                break
        return None

    def _result(self, stage: Stage) -> Path:
        """Where a stage leaves what it made."""
        if stage.builds is not None:
            return self.out / "parts" / stage.builds
        return self.out / "stages" / stage.name

    def _done(self, stage: Stage) -> bool:
        return os.path.isdir(self._result(stage))  # False, too, of what can be no path

    def _under_way(self) -> bool:
        """Whether the first stage that is not done has a checkpoint. One that is done may have left some, killed."""
        folder = self.out / "checkpoints"
        done = {stage.name for stage in self.stages if self._done(stage)}
        return os.path.isdir(folder) and not stages_of(folder) <= done

    def _known_steps(self) -> dict[str, int]:
        """What is noted of stages that are done, or that have come so far that they go on."""
        known = noted_steps(self.out)
        waiting = [stage.name for stage in self.stages if not self._done(stage)]
        for name in waiting[1:] if self._under_way() else waiting:
            known.pop(name, None)
        return known

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
        if self._under_way():
            return  # the first of them is under way already
        if len(self.sources.opened) > 1:
            return  # their vocabulary is that of all files, and each of them would know its own
        to_do = (stage for stage in stages if not self._done(stage))
        waiting = list(itertools.takewhile(lambda stage: by_itself(stage) and stage.steps is not None, to_do))
        begun = self._begun_apart(waiting)
        if begun or (self.config.side_by_side > 1 and len(waiting) > 1 and self.world.alone):
            at_once = max(2, self.config.side_by_side)
            for first in range(0, len(waiting), at_once):
                build_side_by_side(self.config, waiting[first : first + at_once], self.console, stop)
            collect(self.config, waiting, self._steps_before)
            names = {stage.name for stage in waiting}
            for row in read_lines(self.out / "metrics.jsonl") if self.config.log else ():
                if row.get("stage") in names:
                    self.trackers.step(row)

    def _train_group(self, group: Sequence[Stage], wanted: Sequence[Stage], stop: StopWish) -> None:
        """Train those stages of a group that are wanted: one by one, or side by side where that is wanted too."""
        waiting = [stage for stage in group if stage in wanted and not self._done(stage)]
        together = self.config.side_by_side > 1 and len(group) > 1 and waiting == list(group) and self.world.alone
        free = len(self.sources.opened) == 1 and not self._under_way() and all(stage.steps for stage in group)
        measured = self.config.evaluate is not None  # each stage on what those before it have left
        if self._begun_apart(waiting) or (together and free and not measured):
            start = {"model": self._start(group[0])}
            build_side_by_side(self.config.model_copy(update=start), waiting, self.console, stop)
            collect_models(self.config, [stage for stage in group if stage in wanted], self._steps_before)
            return
        for stage in waiting:
            with mates(self.world, self.given, stage) as world:
                self._train_stage(stage, stop, world)
            self.world.wait()
            gc.collect()  # a spread model is full of cycles, and the next stage needs its memory
            if self.world.most(stop.number or 0)[0]:
                stop.grant()

    def _begun_apart(self, waiting: Sequence[Stage]) -> bool:
        """Whether one of these stages is under way in a process of its own, which several cannot go on with."""
        begun = under_way(self.config, waiting)
        if begun and not self.world.alone:
            raise ConfigError(
                f"{self.out / 'building'} holds stages that one process was training side by side, and several "
                "processes train one stage after the other. Finish them with one process, or remove that directory"
            )
        return begun

    # ------------------------------------------------------------ one stage

    def _train_stage(self, stage: Stage, stop: StopWish, world: World) -> None:
        self.console.rule(stage.name)
        model, processor = self._begin(stage)
        if not shards(self.config, stage, world):  # which moves each process's share only
            move_model(model, world.device)
            if self.config.parallel.mode == "fsdp" and not world.alone:
                tell(
                    self.console,
                    f"{stage.name}: every process has the whole encoder, parallel.mode=fsdp notwithstanding, because "
                    "no language model stands behind it whose layers could be spread",
                )
        if self.config.precision is not None:
            cast_weights(model, getattr(torch, self.config.precision))
        limits = limits_of(self.config.data.limits, self.sources.doors())
        processor.use_reader(MediaReader(processor.media_spec(), self.config.data.cache_mb, limits))
        if self.config.data.system is not None:
            processor.use_system(self.config.data.system)
        writer = processor if stage.template is None else processor.with_template(stage.template)
        with world.first_alone(), counted(f"index of {stage.name}", self.console) as progress:
            index = self.sources.index(
                stage, writer, self.video, self.out / "index", progress, goes_on=self._under_way()
            )
        given = self._as_given(stage)
        loader = StepLoader(
            self.sources.of(stage), given, writer, self.config.data, self.config.seed, self.video,
            measures=None if index is None else index.measures(), uncounted=None if index is None else uncounted(index),
            rank=world.rank, ranks=world.size,
        )  # fmt: skip
        stage = self._in_steps(stage, given, loader.plan)
        trainer = Trainer(
            self.config, stage, model, processor, loader, self._prompts_for(stage, processor), self.out,
            self._steps_before(stage), self.console, self.on_step, stop, world,
            self.sources.measured_on(stage, writer, processor, self.video, self.examine), self.directory.owner(),
            self.trackers,
        )  # fmt: skip
        trainer.train()
        if not world.first:
            return
        try:
            self._save_result(stage, trainer.model, processor)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        checkpoints = self.out / "checkpoints"
        if checkpoints.is_dir():
            shutil.rmtree(checkpoints.replace(self.out / ".checkpoints.old"))

    def _as_given(self, stage: Stage) -> Stage:
        """What the plan goes by: packed rows in epochs, if they were asked for so, and everything else in steps."""
        given = next(one for one in self.given.stages if one.name == stage.name)
        return stage if given.batch_rows is None else given

    def _in_steps(self, stage: Stage, given: Stage, plan: StagePlan) -> Stage:
        """The stage with its length in steps, counted now if its rows could not be packed before."""
        if stage.steps is not None:
            return stage
        assert given.epochs is not None
        counted = _of_steps(stage, plan.steps(given.epochs))
        assert counted.steps is not None
        self._packed_steps[stage.name] = counted.steps
        if self.world.first:
            note_steps(self.out, stage.name, counted.steps)
        tell(self.console, f"{stage.name}: {given.epochs:g} epochs are {counted.steps:,} steps of its packed rows")
        self.stages = tuple(counted if one.name == stage.name else one for one in self.stages)
        every = tuple(counted if one.name == stage.name else one for one in self.config.stages)
        self.config = self.config.model_copy(update={"stages": every})
        return counted

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
        model = self._start(stage)
        if isinstance(model, str):
            if model == self.config.model:
                check_sums(Path(model))
            return load_model(model)
        return compose(
            _stage_model(stage, model),
            seed=self.config.seed,
            texts=list(self._texts()),
            language_weights=stage.builds is None or stage.supervise != "words",  # of which only the tokens are used
        )

    def _start(self, stage: Stage) -> ModelConfig | str:
        """The model directory that a stage starts from, or what is to be composed for it."""
        earlier = [s for s in self.stages[: self.stages.index(stage)] if s.builds is None]
        if earlier and stage.builds is None:
            return str(self._result(earlier[-1]))
        config = self.config.model
        return config if isinstance(config, str) or by_itself(stage) else self._with_built_parts(config)

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
        return sum(self.config.stage_steps(self._with_steps(s)) for s in self._earlier(stage))

    def _earlier(self, stage: Stage) -> list[Stage]:
        return list(itertools.takewhile(lambda one: one.name != stage.name, self.stages))

    def _with_steps(self, stage: Stage) -> Stage:
        if stage.steps is None:
            raise ConfigError(
                f"{self.out / STEPS} does not say how many steps stage {stage.name} took, which later stages count "
                "from. Put the file back, or begin in another directory with out=DIR"
            )
        return stage

    # ------------------------------------------------------------ fixed prompts

    def _prompts_for(self, stage: Stage, processor: AvlmProcessor) -> list[Sample]:
        """Prompts that the stage's model has the senses for and that can be read."""
        if stage.supervise == "words":
            return []  # the language model learns nothing in it
        media = processor.media_spec()
        can = {"image": media.vision is not None, "audio": media.audio is not None}
        can["video"] = can["audio" if media.video.order == "audio" else "image"]
        own = own_kinds(stage, self.video)
        found = []
        for sample in self.prompts:
            if own and not sample.kinds() <= own:
                continue  # the stage learns nothing for it
            if not all(can[kind] for kind in sample.kinds()) or (stage.builds is not None and not sample.kinds()):
                continue
            try:
                processor.encode(sample, prompt_only=True)
            except DataError:
                continue
            found.append(sample)
        return found


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


def _of_steps(stage: Stage, steps: int) -> Stage:
    return stage.model_copy(update={"steps": steps, "epochs": None})


def _stage_model(stage: Stage, model: ModelConfig) -> ModelConfig:
    """The part of a model that a stage works on: all of it, or what one part learns its trade in."""
    if stage.builds is None:
        return model
    sense = {} if stage.builds == "language" else {stage.builds: getattr(model, stage.builds)}
    return ModelConfig(language=model.language, video=model.video, **sense)


def train(run: RunConfig, *, only: str | None = None, examine: Examiner | None = None) -> Path:
    """Train a run, or go on with it where it stopped.

    Args:
        run: Resolved settings.
        only: Train up to and with this stage.
        examine: Asks for answers where the run is measured as it goes.

    Started by torchrun, this process becomes one of those that train together.

    Returns:
        The published model directory.

    Raises:
        ConfigError: The settings cannot work with the data or with the run's directory, or training diverged.
        DataError: Too many samples were bad.
        Stopped: Ctrl-C, SIGTERM or SIGUSR1; all that was done is saved, and the same call goes on.
        WorldError: Another process of the run ended.
    """
    world = join(run.device, run.parallel)
    with world.member():
        return Run(run, world=world, examine=examine).train(only)
