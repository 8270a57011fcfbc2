"""Steps of data: the same whoever asks, with bad samples left out and counted."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_families import CHATML, MEDIA, processor, tokenizer
from processes import descendants, open_files

from avlm.config.data import DataConfig
from avlm.config.stage import Augment, Stage, TrainPart
from avlm.data.loader import AHEAD, Bad, SamplePreparer, StepData, StepLoader, Wanted
from avlm.data.media.reader import MediaReader
from avlm.data.planning.plan import Measures
from avlm.data.processor import AvlmProcessor
from avlm.data.sources import JsonLines
from avlm.data.staged import StageWriter
from avlm.errors import AvlmError, ConfigError, LayoutError, MissingExtraError
from avlm.samples import Encoded, Sample


def loader(
    path: Path,
    *,
    cache_mb: int = 0,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    **settings: Any,
) -> StepLoader:
    data = {name: settings.pop(name) for name in list(settings) if name in DataConfig.model_fields}
    made = AvlmProcessor(tokenizer(CHATML), media=MEDIA.model_dump(mode="json"), chat_template=CHATML.template)
    made.use_reader(MediaReader(MEDIA, cache_mb))
    how = {
        "name": "a",
        "train": {"language": TrainPart(lr=1)},
        "steps": 9,
        "batch_samples": 5,
        "row_tokens": 120,
        **settings,
    }
    config = DataConfig(**{"workers": 0, "cache_mb": cache_mb, **data})
    return StepLoader(JsonLines(path), Stage(**how), made, config, seed, rank=rank, ranks=ranks)


def content(step: StepData) -> list[Any]:
    """All of a step that can be compared."""
    found: list[Any] = [step.step, step.num_samples, [(b.sample_id, b.where, b.reason) for b in step.bad]]
    for row in step.rows:
        found += [row.ids, row.words, row.lengths, [(p.sample_id, p.item, p.segments) for p in row.places]]
        tensors = (
            row.input_ids,
            row.labels,
            row.position_ids,
            row.pixel_values,
            row.input_features,
            row.input_features_mask,
        )
        found += [None if t is None else t.tolist() for t in tensors]
    return found


CHANGES = Augment(shift=0.2, jitter=0.3, erase=0.3, tempo=0.3, noise=0.5, mask_bins=5)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 4])
def test_steps_are_the_same_with_any_workers_and_from_the_middle(
    workers: int, first: int, rows: Callable[..., Path]
) -> None:
    path = rows()
    alone = [content(step) for step in loader(path, augment=CHANGES).steps(0, 7)]  # more than two epochs
    found = [content(step) for step in loader(path, workers=workers, augment=CHANGES, cache_mb=1).steps(first, 7)]
    assert found == alone[first:]
    assert [step[0] for step in found] == list(range(first, 7))


def test_another_seed_and_another_epoch_read_and_change_otherwise(rows: Callable[..., Path]) -> None:
    path = rows(count=4)
    steps = list(loader(path, batch_samples=4, augment=CHANGES, tasks=("vqa",)).steps(0, 2))
    other = loader(path, batch_samples=4, augment=CHANGES, tasks=("vqa",), seed=1).step(0)
    pictures = [row.pixel_values for step in [*steps, other] for row in step.rows]
    assert all(p is not None for p in pictures)
    first, second, third = (p[0] for p in pictures if p is not None)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    plain = [loader(path, batch_samples=4, tasks=("vqa",)).step(k).rows[0].pixel_values for k in (0, 1)]
    assert plain[0] is not None
    assert plain[1] is not None
    assert torch.equal(plain[0], plain[1])  # without changes an epoch is like the other


def test_a_cache_that_is_read_twice_gives_what_was_put_in(rows: Callable[..., Path]) -> None:
    path = rows()
    cached = loader(path, cache_mb=64, augment=CHANGES)
    assert [content(cached.step(k)) for k in (0, 1, 0, 1)] == [
        content(loader(path, augment=CHANGES).step(k)) for k in (0, 1, 0, 1)
    ]


def test_a_stage_reads_its_rows_and_writes_them_its_way(rows: Callable[..., Path]) -> None:
    path = rows()
    seen = loader(path, rows="vision", batch_samples=3).step(0)
    assert sorted(i for row in seen.rows for i in row.ids) == ["0", "4", "8"]
    text = loader(path, rows="text", batch_samples=12).step(0)
    assert sorted(int(i) for row in text.rows for i in row.ids) == list(range(12))
    assert all(row.pixel_values is None and row.input_features is None and not row.places for row in text.rows)
    answers = loader(path, batch_samples=12, row_tokens=4096).step(0)
    all_of_it = loader(path, batch_samples=12, row_tokens=4096, supervise="everything").step(0)
    assert answers.num_targets() < all_of_it.num_targets()
    assert answers.num_tokens() == all_of_it.num_tokens()


def test_rows_are_packed_within_their_length_and_hold_all_samples(rows: Callable[..., Path]) -> None:
    step = loader(rows(), batch_samples=12, row_tokens=100).step(0)
    assert all(sum(row.lengths) <= 100 for row in step.rows)
    assert sorted(int(i) for row in step.rows for i in row.ids) == list(range(12))
    assert step.num_samples == 12
    assert step.num_tokens() == sum(row.input_ids.shape[1] for row in step.rows)


def test_bad_samples_are_left_out_and_named_and_the_good_ones_kept(rows: Callable[..., Path], tmp_path: Path) -> None:
    path = rows()
    (tmp_path / "p0.png").unlink()
    (tmp_path / "s1.wav").write_bytes(b"RIFF")
    step = loader(path, batch_samples=12).step(0)
    assert sorted(int(i) for row in step.rows for i in row.ids) == list(range(2, 12))
    assert step.num_samples == 10
    found = {b.sample_id: (b.where, b.reason) for b in step.bad}
    assert found["0"] == (
        "rows.jsonl line 1",
        f"{tmp_path / 'p0.png'}: there is no such file. Check the path; it is relative to the data file",
    )
    assert found["1"][0] == "rows.jsonl line 2"
    assert found["1"][1].startswith(f"{tmp_path / 's1.wav'}: not readable as a recording (")
    assert len(step.bad) == 2


def test_a_step_of_bad_samples_alone_is_empty(rows: Callable[..., Path], tmp_path: Path) -> None:
    path = rows()
    for file in tmp_path.glob("*.png"):
        file.unlink()
    step = loader(path, batch_samples=3, rows="vision").step(0)
    assert (step.rows, step.num_samples, len(step.bad), step.num_tokens(), step.num_targets()) == ([], 0, 3, 0, 0)


def test_a_row_that_changed_on_the_disk_is_a_bad_sample(rows: Callable[..., Path]) -> None:
    path = rows()
    made = loader(path, batch_samples=12)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"id"', b'"i"', 1).replace(b"{", b"!", 1))
    step = made.step(0)
    assert len(step.bad) >= 1
    assert all("is not JSON" in bad.reason or bad.reason for bad in step.bad)


def long_and_short(path: Path) -> Path:
    said = {0: "x " * 400, 1: "hello", 2: "good"}
    lines = [
        {"id": str(i), "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}
        for i, text in said.items()
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_a_sample_longer_than_a_row_stops_the_run_or_is_left_out_as_asked(tmp_path: Path) -> None:
    path = long_and_short(tmp_path / "long.jsonl")
    length = len(processor(CHATML).encode(JsonLines(path)[0]))
    message = (
        f"has {length} tokens, and a row of stage a holds 120. "
        "Raise stages.a.row_tokens, leave such samples out with data.too_long=drop, or cut them with data.too_long=cut"
    )
    with pytest.raises(ConfigError) as error:
        loader(path, batch_samples=3).step(0)
    assert str(error.value) == f'long.jsonl line 1 (id "0"): {message}'
    dropped = loader(path, batch_samples=3, too_long="drop").step(0)
    assert [(b.sample_id, b.where, b.reason) for b in dropped.bad] == [("0", "long.jsonl line 1", message)]
    assert sorted(i for row in dropped.rows for i in row.ids) == ["1", "2"]
    raised = loader(path, batch_samples=3, row_tokens=length).step(0)
    assert raised.bad == []
    assert raised.num_samples == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_the_settings_reaches_the_caller(workers: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Raise stages\.a\.row_tokens"):
        list(loader(long_and_short(tmp_path / "long.jsonl"), workers=workers, batch_samples=3).steps(0, 5))


@pytest.mark.parametrize(
    "error",
    [
        LayoutError("2 places for \u2028 3 embeddings"),
        ConfigError(""),
        MissingExtraError("energon", "energon", "reading shards"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_ours_comes_out_of_a_worker_as_itself(
    error: AvlmError, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SamplePreparer, wanted: Wanted) -> Encoded:
        raise error

    monkeypatch.setattr(SamplePreparer, "__call__", broken)
    with pytest.raises(AvlmError) as caught:
        next(loader(rows(), workers=1).steps(0, 5))
    assert type(caught.value) is type(error) and str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


@pytest.mark.parametrize("error", [RuntimeError("sizes 2 and 3"), ValueError("sizes 2 and 3")], ids=lambda e: repr(e))
def test_a_mistake_of_our_own_in_a_worker_is_shown_whole(
    error: Exception, rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SamplePreparer, wanted: Wanted) -> Encoded:
        raise error

    monkeypatch.setattr(SamplePreparer, "__call__", broken)
    with pytest.raises(type(error), match="sizes 2 and 3") as caught:
        next(loader(rows(), workers=1).steps(0, 5))
    assert "in broken" in caught.value.__notes__[0]


def test_a_mistake_comes_with_its_own_step_and_not_before(
    rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine, marked = SamplePreparer.__call__, loader(rows(), batch_samples=3, workers=2)
    (row, _) = marked.assigned(2)[0][1]

    def broken(self: SamplePreparer, wanted: Wanted) -> Encoded | Bad:
        if wanted[0] == row:
            raise ConfigError("at last")
        return fine(self, wanted)

    monkeypatch.setattr(SamplePreparer, "__call__", broken)
    steps = marked.steps(0, 4)
    assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(ConfigError, match="at last"):
        next(steps)


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_a_step_and_read_together_what_one_would(ranks: int, rows: Callable[..., Path]) -> None:
    path = rows()
    (path.parent / "p0.png").unlink()
    alone = loader(path, augment=CHANGES)
    parts = [loader(path, augment=CHANGES, rank=rank, ranks=ranks, workers=rank % 2) for rank in range(ranks)]
    for whole, *shares in zip(alone.steps(2, 5), *(part.steps(2, 5) for part in parts), strict=True):
        assert sum(share.num_samples for share in shares) == whole.num_samples
        assert sum(share.num_targets() for share in shares) == whole.num_targets()
        together = sorted(i for share in shares for row in share.rows for i in row.ids)
        assert together == sorted(i for row in whole.rows for i in row.ids)
        assert sorted(b.reason for share in shares for b in share.bad) == sorted(b.reason for b in whole.bad)


# ---------------------------------------------------------------- workers that die


def disturb(monkeypatch: pytest.MonkeyPatch, row: int, what: Callable[[], object], times: Path | None = None) -> None:
    """Have something happen in the worker that prepares a row: always, or so often as there are files in a folder."""
    fine = StageWriter.encode

    def disturbed(self: StageWriter, sample: Sample, number: int, epoch: int) -> Encoded:
        if number == row:
            found = fine(self, sample, number, epoch)  # its media are named by then
            left = [] if times is None else sorted(times.iterdir())
            if times is None or left:
                for file in left[:1]:
                    file.unlink()
                what()
            return found
        return fine(self, sample, number, epoch)

    monkeypatch.setattr(StageWriter, "encode", disturbed)


def hang() -> None:
    while True:  # never gives the interpreter to another thread for long
        sum(range(100))


def hang_in_c() -> None:
    """A decoder that never comes back and never lets go of the interpreter."""
    re.match("(a+)+$", "a" * 64 + "!")


def get_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def abort() -> None:
    faulthandler.disable()  # pytest's, which would tell all about it
    os.abort()


def fault() -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def bomb() -> None:
    torch.ones(2**29)  # two gigabytes


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_that_is_killed_once_changes_nothing(
    workers: int, rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows()
    alone = [content(step) for step in loader(path, augment=CHANGES).steps(0, 6)]
    (tmp_path / "times").mkdir()
    (tmp_path / "times" / "1").touch()
    disturb(monkeypatch, 3, get_killed, tmp_path / "times")
    found = [content(step) for step in loader(path, workers=workers, augment=CHANGES).steps(0, 6)]
    assert found == alone
    assert not list((tmp_path / "times").iterdir()), "it was killed"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (hang, "takes longer than 0.5 s, so the process that read it was ended. Replace it, or raise data.stall_s"),
        (
            hang_in_c,
            "takes longer than 0.5 s, so the process that read it was ended. Replace it, or raise data.stall_s",
        ),
        (abort, "crashed the process that read it, twice (SIGABRT). Replace it, or remove the sample"),
        (fault, "crashed the process that read it, twice (SIGSEGV). Replace it, or remove the sample"),
        (
            lambda: os._exit(7),
            "crashed the process that read it, twice (exit status 7). Replace it, or remove the sample",
        ),
        (
            bomb,
            "takes more memory than data.worker_mb=512 leaves to a process. Make it smaller, or raise data.worker_mb",
        ),
    ],
    ids=["hang", "hang in C", "abort", "fault", "exit", "bomb"],
)
def test_what_hangs_or_crashes_a_decoder_costs_that_sample_only(
    what: Callable[[], object], reason: str, rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows()
    how: dict[str, Any] = {"batch_samples": 6, "stall_s": 0.5, "worker_mb": 512}
    alone = [content(step) for step in loader(path, **how).steps(0, 2)]
    disturb(monkeypatch, 4, what)
    steps = list(loader(path, workers=2, **how).steps(0, 2))
    (bad,) = [bad for step in steps for bad in step.bad]
    file = str(tmp_path / "p4.png")
    assert bad == Bad("4", "rows.jsonl line 5", f"{file}: {reason}", file)
    assert sorted(int(i) for step in steps for row in step.rows for i in row.ids) == [*range(4), *range(5, 12)]
    whole = next(i for i, step in enumerate(steps) if not step.bad)
    assert content(steps[whole]) == alone[whole]


def test_all_that_workers_hold_is_gone_when_the_caller_stops(rows: Callable[..., Path]) -> None:
    before, open_before = descendants(), open_files()
    steps = loader(rows(), workers=2).steps(0, 1000)
    next(steps)
    deadline = time.monotonic() + 60
    while len(descendants() - before) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)  # a step may be there before the second of those who work is
    assert len(descendants() - before) == 3  # one that leads, and two that work
    steps.close()
    assert descendants() == before and open_files() == open_before


def test_an_error_where_steps_are_used_leaves_no_process(rows: Callable[..., Path]) -> None:
    before = descendants()
    with suppress(KeyError), closing(loader(rows(), workers=2).steps(0, 1000)) as steps:
        next(steps)
        raise KeyError
    assert descendants() == before


def test_what_is_prepared_ahead_is_bounded(
    rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, prepare = tmp_path / "asked", SamplePreparer.__call__

    def noted(self: SamplePreparer, wanted: Wanted) -> Encoded | Bad:
        with asked.open("a") as file:
            file.write("x")
        return prepare(self, wanted)

    monkeypatch.setattr(SamplePreparer, "__call__", noted)
    steps = loader(rows(), workers=2, batch_samples=5).steps(0, 100)
    for _ in range(3):
        next(steps)
    ahead = (3 + AHEAD - 1) * 5
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and asked.stat().st_size < ahead:
        time.sleep(0.02)
    time.sleep(0.2)  # a worker that went on would be far ahead by now
    steps.close()
    assert asked.stat().st_size == ahead


def test_no_more_workers_are_started_than_there_are_samples(rows: Callable[..., Path]) -> None:
    before, made = descendants(), loader(rows(), workers=3, batch_samples=1)
    assert list(made.steps(4, 4)) == [] and descendants() == before
    steps = made.steps(0, 2)
    assert next(steps).step == 0
    assert len(descendants() - before) <= 1 + 2
    assert [step.step for step in steps] == [1]


def test_the_first_step_comes_at_once_wherever_it_is(rows: Callable[..., Path]) -> None:
    """Nothing is read or counted on the way there: the thousandth million of steps is as near as the first."""
    made = loader(rows())
    assert [step.step for step in made.steps(10**9, 10**9 + 2)] == [10**9, 10**9 + 1]


# ---------------------------------------------------------------- media in words


def test_a_share_of_the_media_is_described_the_same_for_whoever_asks(rows: Callable[..., Path]) -> None:
    path = rows(alts=True)
    how = {"batch_samples": 12, "describe": 0.5, "rows": "vision", "row_tokens": 1000}
    alone = [step.rows[0] for step in loader(path, **how).steps(0, 40)]
    seen = [0 if row.pixel_values is None else len(row.pixel_values) for row in alone]
    assert 200 <= sum(seen) <= 280 and len(set(seen)) > 3  # 240 of 480 expected; four standard deviations are 44
    assert [content(step) for step in loader(path, workers=2, **how).steps(30, 40)] == [
        content(step) for step in loader(path, **how).steps(30, 40)
    ]
    decode = tokenizer(CHATML).decode
    for row, pictures in zip(alone, seen, strict=True):
        assert decode(row.input_ids[0]).count("a red picture\n") == 12 - pictures
    whole = loader(path, **{**how, "describe": 1}).step(0).rows[0]
    assert whole.pixel_values is None and not whole.places


def test_a_stage_of_words_reads_media_and_what_they_say(rows: Callable[..., Path]) -> None:
    for alts, said in ((True, ["a red picture"] * 3), (False, ["green", "blue", "red"])):
        step = loader(rows(alts=alts), rows="vision", supervise="words", batch_samples=3).step(0)
        (row,) = step.rows
        assert sorted(tokenizer(CHATML).decode(words) for words in row.words) == sorted(said)
        assert row.pixel_values is not None and len(row.pixel_values) == 3
        assert step.num_targets() == sum(len(words) for words in row.words)
        assert step.num_tokens() == sum(place.segments[0].count for place in row.places)


def test_a_sample_longer_than_a_row_is_cut_if_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    said = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "x " * 400}]
    path.write_text(long_and_short(path).read_text() + "\n" + json.dumps({"id": "long", "messages": said}))
    length = len(processor(CHATML).encode(JsonLines(path)[3]))
    step = loader(path, batch_samples=4, too_long="cut").step(0)
    assert [bad.sample_id for bad in step.bad] == ["0"]  # its answer is behind what fits
    assert {i: n for row in step.rows for i, n in zip(row.ids, row.lengths, strict=True)}["long"] == 120
    assert [(b.sample_id, b.where, b.cut) for b in step.cut] == [("long", "long.jsonl line 4", length - 120)]
    assert loader(path, batch_samples=4, row_tokens=length, too_long="cut").step(0).cut == []


@pytest.mark.parametrize("workers", [0, 2])
def test_what_outgrew_its_count_is_left_out_where_its_row_would_be_too_long(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "yes " * 9}]
    path.write_text("".join(json.dumps({"id": str(i), "messages": said}) + "\n" for i in range(8)))
    source, own = JsonLines(path), processor(CHATML)
    true = np.array([len(own.encode(sample)) for sample in source])
    counted = np.where(np.arange(8) == 3, 1, true)  # of one of them, before it grew
    how = Stage(name="a", train={"language": TrainPart(lr=1)}, steps=1, batch_rows=2, row_tokens=int(4 * true[0]) + 1)
    data = DataConfig(workers=workers, cache_mb=0)
    made = StepLoader(source, how, own, data, 0, measures=Measures(counted.astype(np.int32)))
    with closing(made.steps(0, 1)) as steps:
        step = next(steps)
    assert max(sum(row.lengths) for row in step.rows) <= how.row_tokens
    (bad,) = step.bad
    assert (bad.sample_id, bad.where) == ("3", "rows.jsonl line 4")
    assert bad.reason.startswith(
        f"takes {true[0]} tokens, and 1 were counted, so it has changed since. Touch its files"
    )
    assert step.num_samples == 7
