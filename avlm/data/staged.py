"""How a stage writes a row down: some media in words, state tokens, what is learned, the teacher's version.

The loader encodes with it and the index counts with it, so both see the same tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from avlm.config.ctc import Ctc
from avlm.config.stage import Stage
from avlm.data.encode import counted, cut, only_last_answer, shown, with_media_of
from avlm.data.planning.plan import key
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import described, strange, without_media, worded
from avlm.data.text.turns import with_state_tokens
from avlm.errors import DataError, LayoutError
from avlm.layout import AudioFacts, Facts, audio_embedding_count, segments
from avlm.samples import IGNORE, Counts, Encoded, MediaItem, MediaKind, Sample

MOST_DRAWN = 4
"""Up to so many media that may be given in words, every choice of them is counted."""


class StageWriter:
    """Writes the rows of one stage.

    Args:
        stage: What it changes.
        processor: With the stage's own template.
        kinds: Kinds of media that it takes as they are; none: all.
        seed: Of the run.
    """

    def __init__(
        self, stage: Stage, processor: AvlmProcessor, kinds: frozenset[MediaKind] = frozenset(), seed: int = 0
    ) -> None:
        self.stage = stage
        self.processor = processor
        self.kinds = kinds
        self.seed = seed

    def encode(self, sample: Sample, row: int, epoch: int) -> Encoded:
        """A row as it is read in an epoch, with everything that is drawn for it; its pictures still as bytes.

        Raises:
            DataError: It cannot be written down, or has no teacher's version.
        """
        rng = np.random.default_rng([self.seed, key(self.stage.name), epoch, row])
        sample = described(sample, self.stage.describe, rng, self.kinds)
        said = self._said(sample)
        prepared = self.processor.prepare(said)
        encoded = self.processor.encode(
            said, supervise=self.stage.supervise, augment=(self.stage.augment, rng), prepared=prepared, pixels="bytes"
        )
        facts = [item.facts for item in prepared]
        return self._heard(self._compared(self._taught(encoded, said), sample, facts), said, facts)

    def count(self, sample: Sample, measure: Callable[[MediaItem], Facts], capacity: int | None = None) -> Counts:
        """What a row takes in any epoch: exactly, or where media are drawn to be given in words, at most.

        With more than `MOST_DRAWN` such media, the choice that seems to take most is counted, beside none and all of
        them; another one may then take a few tokens more, as tokenizers join words.

        Args:
            measure: Facts of a medium; asked only for those that are not in words.
            capacity: Tokens to which a longer row is cut; None cuts nothing.

        Raises:
            DataError: It cannot be written down, or nothing that is learned would be left of it.
        """
        items = sample.media()
        known: dict[int, Facts] = {}

        def facts(number: int) -> Facts:
            if number not in known:
                known[number] = measure(items[number])
            return known[number]

        counts = [self._count(sample, chosen, facts, capacity) for chosen in self._choices(items, facts)]
        most = counts[0]
        for other in counts[1:]:
            most = most.most(other)
        return most

    def _count(
        self, sample: Sample, chosen: Sequence[bool], facts: Callable[[int], Facts], capacity: int | None
    ) -> Counts:
        left = [facts(number) for number, in_words in enumerate(chosen) if not in_words]
        sample = worded(sample, chosen)
        said = self._said(sample)
        encoded = self._taught(self.processor.lay_out(said, left, supervise=self.stage.supervise), said)
        encoded = self._heard(self._compared(encoded, sample, left), said, left)
        if capacity is not None:
            encoded = cut(encoded, capacity)
        return counted(encoded, left, self.processor.media_spec())

    def _choices(self, items: Sequence[MediaItem], facts: Callable[[int], Facts]) -> list[list[bool]]:
        """Which media may be in words together; one choice where nothing is drawn."""
        if self.stage.rows == "text":
            return [[True] * len(items)]
        share = self.stage.describe
        always = [bool(item.alt) and (share == 1 or strange(item, self.kinds)) for item in items]
        drawn = [i for i, item in enumerate(items) if item.alt and not always[i] and share]
        if not drawn:
            return [always]
        if len(drawn) <= MOST_DRAWN:
            draws: list[tuple[bool, ...]] = list(itertools.product((False, True), repeat=len(drawn)))
        else:
            longer = tuple(self._longer_in_words(items[i], facts(i)) for i in drawn)
            draws = [(False,) * len(drawn), (True,) * len(drawn), longer]
        return [[dict(zip(drawn, draw, strict=True)).get(i, always[i]) for i in range(len(items))] for draw in draws]

    def _longer_in_words(self, item: MediaItem, facts: Facts) -> bool:
        try:
            places = sum(segment.count for segment in segments(facts, self.processor.media_spec()))
        except LayoutError:
            return True
        return len(self.processor.tokens().ids(item.alt)) > places

    def _said(self, sample: Sample) -> Sample:
        """What the stage makes of a conversation beside what is drawn."""
        if self.stage.rows == "text":
            sample = without_media(sample)
        return sample if self.stage.state_tokens is None else with_state_tokens(sample, self.stage.state_tokens)

    def _taught(self, encoded: Encoded, sample: Sample) -> Encoded:
        if self.stage.loss == "distill":
            encoded.teacher = self._teacher(sample, encoded)
        return encoded

    def _compared(self, better: Encoded, sample: Sample, facts: Sequence[Facts]) -> Encoded:
        """A sample with the worse answer to the same beside it, where the stage compares the two.

        Args:
            sample: As it was before the stage's own words were added.
            facts: Of its media.

        Raises:
            DataError: It has one answer only.
        """
        if self.stage.loss != "dpo":
            return better
        if sample.rejected is None:
            raise DataError(
                f"has one answer, and stage {self.stage.name} (loss=dpo) learns from two. Give it a rejected one",
                where=sample.where,
                sample_id=sample.id,
            )
        other = replace(sample, turns=(*sample.turns[:-1], sample.rejected), rejected=None)
        worse = only_last_answer(self.processor.lay_out(self._said(other), facts))
        return replace(only_last_answer(better), rejected=with_media_of(worse, better))

    def _heard(self, encoded: Encoded, sample: Sample, facts: Sequence[Facts]) -> Encoded:
        """A sample of sounds in the units that the stage's CTC tells.

        Raises:
            DataError: A sound is too short for what it says.
        """
        if self.stage.loss != "ctc":
            return encoded
        spec, settings = self.processor.media_spec().audio, self.stage.ctc or Ctc()
        assert spec is not None
        if settings.units == "characters":
            encoded.words = [list(text.encode(errors="replace")) for text in shown(sample)]
        for item, words, fact in zip(sample.media(), encoded.words, facts, strict=True):
            assert isinstance(fact, AudioFacts)
            moments = math.ceil(audio_embedding_count(fact.num_samples, spec) / (settings.pool * spec.rows))
            needed = len(words) + sum(a == b for a, b in itertools.pairwise(words))
            if needed > moments:
                raise DataError(
                    f"{item.name()}: says {len(words)} {settings.units}, for which CTC needs {needed} moments, and the "
                    f"encoder makes {moments} of it. Lower stages.{self.stage.name}.ctc.pool, tell larger units with "
                    f"stages.{self.stage.name}.ctc.units=tokens, or leave the row out",
                    where=sample.where,
                    sample_id=sample.id,
                )
        return encoded

    def _teacher(self, sample: Sample, student: Encoded) -> Encoded:
        """What the language model reads as its own teacher: the same conversation, system turn and answers, in words.

        Raises:
            DataError: A medium's words are not known, or the answers are other tokens behind them.
        """
        for item in sample.media():
            if not item.alt:
                raise DataError(
                    f"{item.name()} has no alt, so the teacher of stage {self.stage.name} (loss=distill) has nothing "
                    "to read in its place. Give the medium an alt: what it shows or says",
                    where=sample.where,
                    sample_id=sample.id,
                )
        teacher = self.processor.lay_out(without_media(self.processor.addressed(sample)), ())
        if _targets(teacher) != _targets(student):
            raise DataError(
                "the tokenizer writes the answer in other tokens behind the words of a medium than behind the medium, "
                "so the two cannot be compared place by place. Use a chat template that begins an answer with a "
                "special token, or leave the row out",
                where=sample.where,
                sample_id=sample.id,
            )
        return teacher


def _targets(encoded: Encoded) -> list[int]:
    """The tokens that are learned, in order."""
    return [label for label in encoded.labels[1:] if label != IGNORE]
