"""The rows of a run: its sources opened once, what they are known by, and where their media may lie."""

from __future__ import annotations

from pathlib import Path

from avlm.config.data import Weighted
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.data.decoding.doors import Doors, doors_of
from avlm.data.indexing.index import Index, Progress, build_index, standing_index
from avlm.data.loader import Bad, stall_s
from avlm.data.processor import AvlmProcessor
from avlm.data.readers.joined import JoinedSource, blended
from avlm.data.rows import RowSource
from avlm.data.sources import open_source
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaKind, Sample
from avlm.training.heldout import Examiner, HeldOut


class RunSources:
    """What a run reads, opened when it is first asked for.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.opened: dict[str, RowSource] = {}
        """By path, every one that a stage learns from."""
        self._blends: dict[tuple[Weighted, ...], JoinedSource] = {}
        self._held_out: RowSource | None = None

    def of(self, stage: Stage) -> RowSource:
        """The rows that a stage reads; shared with all stages that name the same.

        Raises:
            ConfigError: None are named, or they cannot be read.
            DataError: Too many of them cannot be read.
        """
        given = stage.data or self.config.data.train
        if given is None:
            raise ConfigError(
                f"stage {stage.name} has no data: neither data.train nor stages.{stage.name}.data is set. "
                "Add data.train=FILE.jsonl"
            )
        if isinstance(given, str):
            return self._open(given)
        if given not in self._blends:
            self._blends[given] = blended([self._open(one.path) for one in given], [one.weight for one in given])
        return self._blends[given]

    def held_out(self) -> RowSource | None:
        """The rows that are kept from training, if there are any."""
        if self._held_out is None and self.config.data.eval is not None:
            self._held_out = open_source(self.config.data.eval, self.config.data, use="eval")
        return self._held_out

    def check_held_out(self, asks: bool) -> None:
        """Make sure that a run which is measured as it goes has rows for that.

        Args:
            asks: Whether somebody is there to ask for answers.

        Raises:
            ConfigError: It has none.
        """
        settings = self.config.evaluate
        if settings is None:
            return
        if self.held_out() is None:
            raise ConfigError(
                "evaluate is set and data.eval is not, so there are no held-out rows to measure on. "
                "Add data.eval=FILE.jsonl, or set evaluate=null"
            )
        if settings.of_answers() and not asks and any(stage.builds is None for stage in self.config.stages):
            raise ConfigError(
                f"evaluate.metric={settings.metric} is a score of answers, and this run was started without anybody to "
                "ask for them. Start it with avlm train or avlm.train, or set evaluate.metric=loss"
            )

    def measured_on(
        self,
        stage: Stage,
        writer: AvlmProcessor,
        processor: AvlmProcessor,
        video: frozenset[MediaKind],
        examine: Examiner | None,
    ) -> HeldOut | None:
        """What a stage is measured on as it goes, if it is.

        Args:
            writer: The processor with the stage's own template.
            processor: With the model's.
        """
        source, settings = self.held_out(), self.config.evaluate
        if settings is None or source is None:
            return None
        texts = source if settings.text is None else open_source(settings.text, self.config.data, use="eval")
        return HeldOut(self.config, stage, source, texts, writer, processor, video, examine)

    def _open(self, path: str) -> RowSource:
        if path not in self.opened:
            source = open_source(path, self.config.data)
            bad, rows = len(source.errors), len(source.errors) + len(source)
            if bad > max(10, self.config.data.max_bad * rows):
                raise DataError(
                    f"{bad} of {rows} rows cannot be read, more than data.max_bad={self.config.data.max_bad:g} allows; "
                    f"the first one: {source.errors[0].reason}. Correct them, or raise data.max_bad",
                    where=source.errors[0].where,
                )
            self.opened[path] = source
        return self.opened[path]

    def fingerprints(self) -> dict[str, str]:
        """What each source and each blend is known by, by name."""
        names = [source.name for source in self.opened.values()]
        return {
            path if names.count(source.name) > 1 else source.name: source.fingerprint()
            for path, source in self.opened.items()
        } | {f"blend of {blend.name}": blend.fingerprint() for blend in self._blends.values()}

    def doors(self) -> Doors:
        """Where media may come from."""
        held_out = self.held_out()
        sources = [*self.opened.values(), *([] if held_out is None else [held_out])]
        roots: list[Path] = [root for source in sources for root in source.roots]
        return doors_of(self.config.data, roots)

    def index(
        self,
        stage: Stage,
        processor: AvlmProcessor,
        video: frozenset[MediaKind],
        folder: Path,
        progress: Progress,
        *,
        goes_on: bool,
    ) -> Index | None:
        """What the rows of a stage take, where its plan goes by that: an index, made or brought up to date.

        Args:
            processor: Writes rows down as the stage does.
            folder: Where indexes lie if the settings do not say.
            goes_on: Whether the stage has planned with one before, which is then as good as it was.
        """
        if stage.batch_rows is None and self.config.data.order in ("shuffled", "as_is"):
            return None
        data = self.config.data
        source, place = self.of(stage), folder if data.index is None else Path(data.index)
        if goes_on:
            found = standing_index(source, processor, place, stage=stage, video=video, too_long=data.too_long)
            if found is not None:
                return found
        return build_index(
            source,
            processor,
            place,
            stage=stage,
            video=video,
            too_long=data.too_long,
            workers=data.workers,
            limit_s=stall_s(data, processor.reader().limits),
            memory_mb=data.worker_mb,
            progress=progress,
        )

    def prompts(self) -> list[Sample]:
        """The first held-out samples of each task (training ones where nothing is held out)."""
        wanted = self.config.samples.prompts
        source = self.held_out() or next(iter(self.opened.values()))
        taken: dict[str, int] = {}
        found = []
        for i, facts in enumerate(source.facts):
            if taken.setdefault(facts.task, 0) < wanted:
                taken[facts.task] += 1
                found.append(source[i])
        return found


def uncounted(index: Index) -> dict[int, Bad]:
    """Rows that an index has no counts of, and why."""
    return {row.row: Bad(row.sample_id, row.where, row.reason, row.file) for row in index.reasons()}
