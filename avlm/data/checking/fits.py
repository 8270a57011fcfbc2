"""What a training run makes of a data set: which rows each stage reads, how long they are, what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avlm.config.data import DataConfig
from avlm.config.stage import Stage
from avlm.data.checking.check import StageFit
from avlm.data.checking.histogram import histogram
from avlm.data.checking.problems import Findings, Severity
from avlm.data.indexing.index import build_index
from avlm.data.loader import stall_s
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowSource
from avlm.data.selection import left_out, stage_rows, video_senses
from avlm.data.workers.spread import Progress
from avlm.errors import ConfigError
from avlm.samples import MediaKind


def fit_stages(
    source: RowSource,
    stages: Sequence[Stage],
    processor: AvlmProcessor,
    data: DataConfig,
    folder: Path,
    findings: Findings,
    *,
    known: frozenset[int] = frozenset(),
    video: frozenset[MediaKind] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> list[StageFit]:
    """Count the rows of a source for each stage, by headers alone.

    Args:
        stages: Of a run; none: every row is counted as it is.
        folder: Where indexes are kept.
        findings: Takes what is wrong.
        known: Rows that have been told as bad already.
        video: What the run's model takes from a video; default: what the processor's settings say.
        progress: Told ``(what, done, all)``.
    """
    spec = processor.media_spec()
    video = video_senses(spec.audio is not None, spec.video.order) if video is None else video
    if data.system is not None:
        processor.use_system(data.system)
    fit = _Fit(source, processor, data, folder, findings, set(known), video, workers, progress)
    return [fit.stage(stage) for stage in stages] if stages else [fit.every_row()]


@dataclass(slots=True)
class _Fit:
    source: RowSource
    processor: AvlmProcessor
    data: DataConfig
    folder: Path
    findings: Findings
    told: set[int]
    """Rows that have been told as bad: not once for each stage."""
    video: frozenset[MediaKind]
    workers: int
    progress: Progress | None

    def stage(self, stage: Stage) -> StageFit:
        told = left_out(self.source.facts, stage, self.video) or ""
        found = StageFit(stage.name, row_tokens=stage.row_tokens, told=told.partition("; ")[2])
        try:
            rows = stage_rows(self.source.facts, stage, self.video)
        except ConfigError as error:
            self.findings.add("error", f"stage {stage.name} has no rows", "", str(error))
            return found
        found.rows = len(rows)
        self._count(found, stage)
        return found

    def every_row(self) -> StageFit:
        found = StageFit("all rows", rows=len(self.source))
        self._count(found, None)
        return found

    def _count(self, found: StageFit, stage: Stage | None) -> None:
        template = None if stage is None else stage.template
        writer = self.processor if template is None else self.processor.with_template(template)
        name = "tokens" if stage is None else f"tokens, {stage.name}"
        try:
            index = build_index(
                self.source,
                writer,
                self.folder,
                stage=stage,
                video=self.video,
                workers=self.workers,
                limit_s=stall_s(self.data, self.processor.reader().limits),
                memory_mb=self.data.worker_mb,
                progress=None if self.progress is None else self._counted(name),
            )
        except ConfigError as error:
            self.findings.add("error", f"{found.name}: no row can be used", "", str(error))
            found.unfit = found.rows
            return
        for reason in index.reasons():
            found.unfit += 1
            if reason.row not in self.told:
                self.told.add(reason.row)
                self.findings.add_message(reason.where, reason.reason)
        counted = np.flatnonzero(np.asarray(index.status) == 0)
        tokens = np.asarray(index.tokens)[counted]
        fits = tokens <= (np.iinfo(np.int32).max if stage is None else stage.row_tokens)
        found.too_long = int((~fits).sum())
        found.tokens, found.targets = int(tokens[fits].sum()), int(np.asarray(index.targets)[counted][fits].sum())
        found.lengths = histogram(name, "", tokens)
        if stage is not None:
            self._tell_long(stage, counted[~fits], tokens[~fits])
            self._tell_bad(stage, found)

    def _tell_long(self, stage: Stage, rows: np.ndarray, tokens: np.ndarray) -> None:
        does = {"refuse": "stops there", "drop": "leaves it out", "cut": "cuts it"}[self.data.too_long]
        for row, count in zip(rows.tolist(), tokens.tolist(), strict=True):
            message = (
                f"has {count} tokens, and a row of stage {stage.name} holds {stage.row_tokens}, so a run {does} "
                f"(data.too_long={self.data.too_long}). Raise stages.{stage.name}.row_tokens, or shorten it"
            )
            severity: Severity = "warning" if self.data.too_long == "cut" else "error"
            self.findings.add(severity, f"too long for a row of stage {stage.name}", self.source.where(row), message)

    def _tell_bad(self, stage: Stage, found: StageFit) -> None:
        bad = found.unfit + (found.too_long if self.data.too_long == "drop" else 0)
        if bad > max(10, self.data.max_bad * found.rows):
            self.findings.add(
                "error",
                f"stage {stage.name} would stop for its bad rows",
                "",
                f"{bad} of {found.rows} rows cannot be used, more than data.max_bad={self.data.max_bad:g} allows. "
                "Correct them, or raise data.max_bad",
            )

    def _counted(self, name: str) -> Callable[[int, int], None]:
        progress = self.progress
        assert progress is not None
        return lambda done, total: progress(name, done, total)
