"""Held-out rows of one stage, and what the model makes of them: losses here, answers by whom the run was given.

The same rows are measured every time, undistorted and with their media, so the figures of two moments differ by what
was learned between them and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from avlm.config.run import RunConfig
from avlm.config.stage import Augment, Stage
from avlm.data.encode import pack
from avlm.data.loader import SamplePreparer
from avlm.data.planning.packing import pack_rows
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowSource
from avlm.data.selection import own_kinds, stage_rows
from avlm.data.staged import StageWriter
from avlm.errors import ConfigError, DataError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded, MediaKind, Row, Sample
from avlm.training.loss import RowLosses, num_units, row_loss
from avlm.training.preference import preferred, tally
from avlm.training.unmoved import unmoved

AT_ONCE = 32
"""Samples that are in memory together."""

Costs = Callable[[Row], RowLosses]


class Examiner(Protocol):
    """Asks a model questions whose answers are known. It stands on a floor above, so a run is handed one."""

    def __call__(
        self,
        model: AvlmForConditionalGeneration,
        processor: AvlmProcessor,
        samples: Sequence[Sample],
        *,
        max_tokens: int,
        seed: int,
    ) -> dict[str, Any]:
        """Score the answers.

        Returns:
            What goes into the line of the measurement: `accuracy`, `guess`, `looks`, `listens`, and the same by task as
            `tasks`; nothing where no row can be asked.
        """


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean over the target tokens of some rows, or over their pairs of answers."""

    mean: float
    targets: int
    bad: int
    """Samples that could not be read."""
    pairs: dict[str, float]
    """How well pairs are told apart, where the stage compares answers."""


class HeldOutRows:
    """Some rows of a source, as a stage would read them.

    Args:
        stage: How they are written down; nothing of them is drawn at random.
        numbers: Which ones.
    """

    def __init__(
        self, source: RowSource, numbers: Sequence[int], stage: Stage, writer: AvlmProcessor, run: RunConfig,
        video: frozenset[MediaKind],
    ) -> None:  # fmt: skip
        self.numbers, self.stage = numbers, stage
        self.capacity = stage.row_tokens
        data = run.data.model_copy(update={"too_long": "cut"})
        self.prepare = SamplePreparer(source, StageWriter(stage, writer, own_kinds(stage, video), run.seed), data)

    def rows(self) -> Iterator[tuple[list[Row], int]]:
        """Packed rows of some samples at a time, and how many of those were bad."""
        for first in range(0, len(self.numbers), AT_ONCE):
            found = [self.prepare((number, 0)) for number in self.numbers[first : first + AT_ONCE]]
            good = [sample for sample in found if isinstance(sample, Encoded)]
            packs = pack_rows([sample.room() for sample in good], self.capacity)
            yield [pack([good[i] for i in members]) for members in packs], len(found) - len(good)

    def loss(self, costs: Costs) -> Loss:
        """What they cost; no number where there is nothing to learn in them."""
        total, units, targets, bad = 0.0, 0, 0, 0
        margins: list[Tensor] = []
        for rows, unread in self.rows():
            for row in rows:
                cost = costs(row)
                total += float(cost.tokens)
                margins += [] if cost.margins is None else [cost.margins]
            units += num_units(rows, self.stage)
            targets += sum(row.num_targets() for row in rows)
            bad += unread
        return Loss(total / units if units else math.nan, targets, bad, preferred(tally(margins)))


class HeldOut:
    """What one stage is measured on.

    Args:
        source: Held-out rows of the run.
        texts: The same, or rows of text that the run names.
        writer: The processor with the stage's own template.
        processor: With the model's.
        video: What the model takes from a video.
        examine: Asks for answers; None: none are asked for.
    """

    def __init__(
        self,
        run: RunConfig,
        stage: Stage,
        source: RowSource,
        texts: RowSource,
        writer: AvlmProcessor,
        processor: AvlmProcessor,
        video: frozenset[MediaKind],
        examine: Examiner | None,
    ) -> None:
        settings = run.evaluate
        assert settings is not None
        self.run, self.settings, self.processor, self.examine = run, settings, processor, examine
        plain = undisturbed(stage)
        self.plain = plain
        self.own = HeldOutRows(
            source, spread(_of_stage(source, plain, video), settings.rows), plain, writer, run, video
        )
        reading = Stage(name=stage.name, rows="text", steps=1, row_tokens=stage.row_tokens)
        silent = [i for i, kinds in enumerate(texts.facts.kinds.tolist()) if not kinds or settings.text is not None]
        whole = stage.builds is None  # a part that is being built stands in a model of its own
        self.texts = HeldOutRows(texts, spread(silent if whole else [], settings.rows), reading, processor, run, video)
        self.asked = self._askable(source) if whole and examine is not None else []

    def _askable(self, source: RowSource) -> list[Sample]:
        """Rows that can be asked: the model has the senses, and the answer is known."""
        media = self.processor.media_spec()
        can = {"image": media.vision is not None, "audio": media.audio is not None}
        can["video"] = can["audio" if media.video.order == "audio" else "image"]
        able = [i for i, facts in enumerate(source.facts) if all(can[kind] for kind in facts.kinds)]
        found = []
        for number in spread(able, self.settings.answers):
            try:
                found.append(source[number])
            except DataError:
                continue
        return found

    def measure(self, model: AvlmForConditionalGeneration, costs: Costs) -> dict[str, Any]:
        """What the model makes of the rows; its modes, and every generator, are left as they were.

        Args:
            costs: Of a row, by the stage's own loss.
        """
        line: dict[str, Any] = {}
        with unmoved(model):
            if self.own.numbers:
                loss = self.own.loss(costs)
                line |= {"loss": loss.mean, "rows": len(self.own.numbers) - loss.bad, "target_tokens": loss.targets}
                line |= {**loss.pairs, **({"bad": loss.bad} if loss.bad else {})}
            if self.texts.numbers:
                line["text_loss"] = self.texts.loss(lambda row: RowLosses(row_loss(model, row))).mean
            if self.asked and self.examine is not None:
                line |= self.examine(
                    model, self.processor, self.asked, max_tokens=self.settings.max_tokens, seed=self.run.seed
                )
        return {name: value for name, value in line.items() if not (isinstance(value, float) and math.isnan(value))}


def undisturbed(stage: Stage) -> Stage:
    """The stage without what it draws or adds for the sake of learning."""
    return stage.model_copy(
        update={"augment": Augment(), "describe": 0.0, "label_smoothing": 0.0, "balance": 0.0, "take": {}}
    )


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most so many of some rows, evenly spread over all of them."""
    count = min(count, len(numbers))
    return [numbers[i * len(numbers) // count] for i in range(count)]


def _of_stage(source: RowSource, stage: Stage, video: frozenset[MediaKind]) -> list[int]:
    """Held-out rows that the stage could learn from; there may be none."""
    try:
        return stage_rows(source.facts, stage, video)
    except ConfigError:
        return []
