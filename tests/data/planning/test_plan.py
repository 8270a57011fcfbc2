"""The order of the data and the packs, as functions that can be checked whole."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.stage import Stage, TrainPart
from avlm.data.planning.plan import key, pack_rows, positions
from avlm.data.rows import RowFacts
from avlm.data.selection import BOTH, left_out, stage_rows, usable, video_senses
from avlm.errors import ConfigError
from avlm.samples import MediaKind


def facts(task: str, *kinds: MediaKind, told: tuple[MediaKind, ...] = ()) -> RowFacts:
    return RowFacts(task, frozenset(kinds), frozenset(told))


def of(rows: str, tasks: tuple[str, ...] = (), **settings: Any) -> Stage:
    return Stage.model_validate({"name": "look", "steps": 1, "rows": rows, "tasks": tasks, **settings})


ROWS = [
    facts("text"),
    facts("see", "image"),
    facts("hear", "audio"),
    facts("match", "image", "audio"),
    facts("watch", "video"),
    facts("watch", "video", "image"),
    facts("watch", "video", "audio"),
]


@pytest.mark.parametrize(
    ("rows", "tasks", "expected"),
    [
        ("any", (), [0, 1, 2, 3, 4, 5, 6]),
        ("text", (), [0, 1, 2, 3, 4, 5, 6]),
        ("vision", (), [1]),  # a video has sound, so it is no row of pictures alone
        ("audio", (), [2]),
        ("any", ("watch",), [4, 5, 6]),
        ("vision", ("see", "match"), [1]),
        ("audio", ("see",), []),
    ],
)
def test_a_stage_reads_the_rows_that_it_can_learn_from(rows: str, tasks: tuple[str, ...], expected: list[int]) -> None:
    assert usable(ROWS, of(rows, tasks)) == expected


def test_what_can_be_given_in_words_keeps_no_row_from_a_stage() -> None:
    """A stage for pictures reads the row of a picture and a sound when the sound's words are known, and so on."""
    rows = [
        facts("match", "image", "audio", told=("audio",)),
        facts("match", "image", "audio", told=("image",)),
        facts("match", "image", "audio", told=("image", "audio")),
        facts("watch", "image", "video", told=("image",)),
        facts("watch", "video", told=("video",)),
        facts("hear", "audio", told=("audio",)),
    ]
    assert usable(rows, of("vision")) == [0, 2]
    assert usable(rows, of("audio")) == [1, 2, 5]
    assert usable(rows, of("any")) == list(range(6))


@pytest.mark.parametrize(
    ("hears", "order", "seen", "heard"),
    [
        (True, "interleaved", [0], [5, 6]),
        (True, "video_audio", [0], [5, 6]),
        (True, "video", [0, 1, 2, 3], [5, 6]),  # nobody listens to its sound
        (False, "interleaved", [0, 1, 2, 3], [5, 6]),
        (True, "audio", [0], [1, 3, 4, 5, 6]),  # nobody looks at its frames
    ],
)
def test_a_video_counts_as_what_the_model_takes_from_it(
    hears: bool, order: Any, seen: list[int], heard: list[int]
) -> None:
    rows = [
        facts("see", "image"),
        facts("watch", "video"),
        facts("watch", "video", "image"),
        facts("watch", "video", "audio", told=("audio",)),  # a sound that words can stand in for
        facts("watch", "video", "audio"),
        facts("hear", "audio"),
        facts("hear", "audio", "video", told=("video",)),
        facts("text"),
    ]
    video = video_senses(hears, order)
    assert usable(rows, of("vision"), video) == seen
    assert usable(rows, of("audio"), video) == heard
    assert usable(rows, of("any"), video) == usable(rows, of("text"), video) == list(range(8))
    words = of("vision", builds="vision", supervise="words", train={"vision": {"lr": 1}})
    assert usable(rows, words, video) == [0]  # its encoder tells the words of pictures alone


def test_what_a_stage_leaves_out_is_told_once_with_its_reason() -> None:
    rows = [facts("see", "image")] * 300 + [facts("hear", "audio")] * 700 + [facts("watch", "video")] * 200
    assert left_out(rows, of("vision")) == "look: 300 of 1,200 rows; 900 hold sound"
    seeing = video_senses(hears=False, order="interleaved")
    assert left_out(rows, of("vision"), seeing) == "look: 500 of 1,200 rows; 700 hold sound"
    mixed = [*rows[295:301], facts("text"), facts("match", "image", "audio", told=("image",))]
    assert left_out(mixed, of("vision")) == "look: 5 of 8 rows; 2 hold sound, 1 holds no picture"
    assert left_out(mixed, of("audio")) == "look: 2 of 8 rows; 5 hold pictures, 1 holds no sound"
    assert left_out(mixed, of("any")) is None and left_out(mixed, of("text")) is None
    assert left_out(rows, of("vision", ("see",))) is None  # what is of another task was not asked for
    assert left_out(rows[:300], of("vision"), BOTH) is None


def test_a_stage_without_rows_is_refused() -> None:
    train = {"language": TrainPart(lr=1)}
    for stage, message in (
        (
            Stage(name="look", train=train, steps=1, rows="vision"),
            "stage look learns from rows with a picture and no sound, and the data has none. "
            "Add such rows, or give the stage its own with stages.look.data",
        ),
        (
            Stage(name="hear", train=train, steps=1, rows="audio", tasks=("sea", "hear")),
            "stage hear learns from rows with a sound and no picture of the tasks sea, hear (the data has see, text), "
            "and the data has none. Add such rows, or give the stage its own with stages.hear.data",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            stage_rows(ROWS[:2] if stage.tasks else ROWS[:1], stage)
        assert str(error.value) == message
    assert stage_rows(ROWS, Stage(name="look", train=train, steps=1, rows="vision")) == [1]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 17), st.integers(0, 2**63 - 1))
def test_each_epoch_reads_every_row_once(count: int, batch: int, seed: int) -> None:
    steps = math.ceil(3 * count / batch)
    read = [p for step in range(steps) for p in positions(step, batch, count, seed=seed, stage="a")]
    assert len(read) == steps * batch
    for epoch in range(3):
        assert sorted(row for row, e in read if e == epoch) == list(range(count))
        assert {e for _, e in read[epoch * count : (epoch + 1) * count]} == {epoch}
    again = [p for step in range(steps) for p in positions(step, batch, count, seed=seed, stage="a")]
    assert again == read


def test_epochs_stages_and_seeds_each_have_their_own_order() -> None:
    def order(epoch: int = 0, seed: int = 0, stage: str = "a") -> list[int]:
        return [row for row, _ in positions(epoch, 50, 50, seed=seed, stage=stage)]

    orders = [order(), order(epoch=1), order(seed=1), order(stage="b")]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert order() != list(range(50))


def test_the_shuffle_is_fair() -> None:
    """Over many epochs every row comes first about as often: chi-squared with 9 degrees, p = 1e-4 at 33.7."""
    first = Counter(positions(epoch, 10, 10, seed=3, stage="a")[0][0] for epoch in range(2000))
    assert sum((first[i] - 200) ** 2 / 200 for i in range(10)) < 33.7


def test_the_order_is_the_same_on_every_machine() -> None:
    """Fixed by numpy's promise for PCG64 and SeedSequence, and by CRC-32's check value."""
    assert key("123456789") == 0xCBF43926
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([5, 0xE8B7BE43, 1]))).permutation(8)
    assert key("a") == 0xE8B7BE43
    assert [row for row, _ in positions(1, 8, 8, seed=5, stage="a")] == expected.tolist()


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), max_size=80), st.integers(100, 400))
def test_packs_hold_every_sample_once_and_never_too_much(lengths: list[int], capacity: int) -> None:
    rows = pack_rows(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows)
    # best fit decreasing opens at most 11/9 of the fewest possible rows and one more (Johnson, 1973)
    assert len(rows) <= math.ceil(11 / 9 * math.ceil(sum(lengths) / capacity)) + 1 + sum(
        2 * v > capacity for v in lengths
    )
    assert rows == pack_rows(lengths, capacity)


def test_packs_are_full_on_a_realistic_mix() -> None:
    """Short questions, pictures of 576 tokens, sounds of up to 188, some long answers."""
    rng = np.random.default_rng(0)
    lengths = [
        int(rng.integers(20, 90) + rng.choice([0, 576, rng.integers(10, 188), 576 + 100]) + rng.choice([0, 0, 0, 400]))
        for _ in range(64)
    ]
    rows = pack_rows(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.93
    assert len(rows) <= math.ceil(sum(lengths) / 2048) + 1


def test_a_sample_as_long_as_a_row_fits_and_a_longer_one_is_our_own_mistake() -> None:
    assert pack_rows([10, 10, 1], 10) == [[0], [1], [2]]
    with pytest.raises(AssertionError):
        pack_rows([11], 10)
