# ruff: noqa: E501 (whole messages are compared)
"""Rows written as JSON lines and as tars are read as equal samples, whatever is in them; Energon takes the tars."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avlm.config.data import DataConfig
from avlm.data.decoding.files import LIMITS, read
from avlm.data.readers.joined import JoinedSource
from avlm.data.rows import RowTable, facts_of
from avlm.data.sources import open_source
from avlm.data.writers import To, convert_rows
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, Sample, Text, Turn

WAYS = get_args(To)
FORMS = pytest.mark.parametrize("to", WAYS)


class Made:
    """Samples at hand, as a source."""

    name = kind = "made"
    roots = ()

    def __init__(self, samples: list[Sample], sets: list[str] | None = None) -> None:
        self.samples = samples
        self.errors: list[DataError] = []
        self.facts = RowTable(
            facts_of(sample, name) for sample, name in zip(samples, sets or [""] * len(samples), strict=True)
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def where(self, index: int) -> str:
        return f"made {index}"

    def fingerprint(self) -> str:
        return ""


def bare(sample: Sample) -> Sample:
    """A sample without what another place of it changes: media as their bytes, no place of its own."""

    def part(item: Text | MediaItem) -> Text | MediaItem:
        if isinstance(item, Text):
            return item
        data = None if item.url and item.path is None else read(item, LIMITS)
        return replace(item, path=None, span=None, title="", data=data)

    return replace(
        sample, where="", turns=tuple(replace(turn, parts=tuple(map(part, turn.parts))) for turn in sample.turns)
    )


def roles(sample: Sample) -> set[str]:
    return {turn.role for turn in sample.turns}


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
DATA = st.binary(min_size=1, max_size=40) | st.sampled_from([b"\x89PNG", b"RIFF0000WAVE", b"fLaC", b"GIF89a"])
CUTS = st.tuples(st.floats(0, 1e6), st.none() | st.floats(1e-3, 1e6)).map(
    lambda cut: (cut[0], None if cut[1] is None else cut[0] + cut[1])
)
IMAGES = st.builds(
    lambda data, alt, title: MediaItem("image", data=data, alt=alt, title=title),
    DATA,
    WORDS,
    st.sampled_from(["", "a.png", "b.JPG", "x/y.tar.gz"]),
)
TIMED = st.builds(
    lambda kind, data, alt, cut: MediaItem(kind, data=data, alt=alt, start_s=cut[0], end_s=cut[1]),
    st.sampled_from(["audio", "video"]),
    DATA,
    WORDS,
    CUTS,
)
ADDRESSES = st.builds(lambda name: MediaItem("image", url=f"https://x.y/{name}"), st.text("abc/", max_size=5))
PARTS = st.lists(st.builds(Text, WORDS) | IMAGES | TIMED | ADDRESSES, max_size=4).map(tuple)
TURNS = st.builds(
    lambda role, parts, verbatim, state, ended, learned: Turn(role, parts, verbatim, state if role == "assistant" else "", ended, learned or role != "assistant"),
    st.sampled_from(["system", "user", "assistant"]), PARTS, st.booleans(), st.sampled_from(["", "question", "noise"]), st.booleans(), st.booleans(),
)  # fmt: skip
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
SAMPLES = st.builds(Sample, IDS, st.lists(TURNS, min_size=1, max_size=3).map(tuple), WORDS).filter(
    lambda sample: (
        any(turn.learned for turn in sample.turns if turn.role == "assistant") or "assistant" not in roles(sample)
    )
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(SAMPLES, min_size=1, max_size=4),
    to=st.sampled_from(WAYS),
    sets=st.lists(WORDS, min_size=4, max_size=4),
)
def test_there_and_back_gives_equal_samples(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample], to: To, sets: list[str]
) -> None:
    out = tmp_path_factory.mktemp("out") / "made"
    source = Made(samples, sets[: len(samples)])
    done = convert_rows(source, out, to=to, shard_mb=0.004)
    assert done.bad == [] and done.rows == len(samples)
    back = open_source(out)
    assert [bare(sample) for sample in back] == [bare(sample) for sample in samples]
    assert list(back.facts) == list(source.facts) and back.errors == []
    again = convert_rows(back, out.with_name("again"), to="jsonl" if to != "jsonl" else "webdataset")
    assert again.bad == [] and [bare(sample) for sample in open_source(out.with_name("again"))] == [
        bare(s) for s in samples
    ]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Conversations that share pictures, in LLaVA's form."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG" + name.encode() * 3000)
    rows = [
        {"id": str(i), "image": f"{'ab'[i % 2]}.png", "conversations": [{"from": "human", "value": f"<image>\nq{i}"}, {"from": "gpt", "value": f"a{i}"}]}
        for i in range(10)
    ]  # fmt: skip
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_medium_of_several_rows_is_one_file(talks: Path, tmp_path: Path) -> None:
    done = convert_rows(open_source(talks), tmp_path / "out", to="jsonl")
    assert (done.path, done.rows, done.media) == (tmp_path / "out/rows.jsonl", 10, 2)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(files) == 3 and sum(path.suffix == ".png" for path in files) == 2
    assert [bare(s) for s in open_source(tmp_path / "out")] == [bare(s) for s in open_source(talks)]


def test_tars_are_of_a_size_and_their_keys_unique(talks: Path, tmp_path: Path) -> None:
    done = convert_rows(open_source(talks), tmp_path / "my.out", to="webdataset", shard_mb=0.0085)
    names = sorted(path.name for path in done.path.iterdir())
    assert names == [f"my_out-{i:06d}.tar" for i in range(len(names))] and len(names) == 5
    keys = []
    for name in names:
        with tarfile.open(done.path / name) as tar:
            keys += [member.name.partition(".")[0] for member in tar]
    assert sorted(set(keys)) == [f"my_out-{i:08d}" for i in range(10)]
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed: pip install 'avlm[dev]'")
    theirs = list(webdataset.WebDataset([str(done.path / name) for name in names], shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in theirs] == [str(i) for i in range(10)]
    assert all(
        sample["0.png"] == read(ours.media()[0], LIMITS)
        for sample, ours in zip(theirs, open_source(talks), strict=True)
    )


def test_energon_prepares_what_is_written_for_it(talks: Path, tmp_path: Path) -> None:
    energon = pytest.importorskip(
        "megatron.energon", reason="megatron-energon is not installed: pip install 'avlm[energon]'"
    )
    from megatron.energon.cli.main import main

    done = convert_rows(open_source(talks), tmp_path / "out", to="energon", shard_mb=0.0085)
    assert len(open_source(done.path)) == 10
    main(
        [
            "prepare",
            "--non-interactive",
            "--no-progress",
            "--num-workers",
            "1",
            "--split-ratio",
            "0.8,0.2,0",
            "--sample-type",
            "CrudeWebdataset",
            str(done.path),
        ],
        standalone_mode=False,
    )
    train, held_out = open_source(done.path), open_source(done.path, use="eval")
    assert train.kind == "Energon's CrudeWebdataset, split train" and (len(train), len(held_out)) == (8, 2)
    ours = {sample.id: bare(sample) for sample in open_source(talks)}
    assert {sample.id: bare(sample) for source in (train, held_out) for sample in source} == ours
    here = energon.WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=energon.reraise_exception)

    @energon.edataclass
    class Plain(energon.Sample):
        given: Any

    class Keep(energon.TaskEncoder):
        decoder = None
        cookers = [
            energon.Cooker(
                energon.stateless(
                    energon.cooker(lambda sample: Plain(**energon.basic_sample_keys(sample), given=sample))
                )
            )
        ]

        @energon.stateless
        def encode_sample(self, sample: Any) -> Any:
            return sample

    found = energon.get_val_dataset(
        done.path, split_part="train", worker_config=here, batch_size=None, task_encoder=Keep()
    )
    theirs = [json.loads(row.given["json"])["id"] for row in energon.get_loader(found)]
    assert theirs == [sample.id for sample in train]


@FORMS
def test_a_row_whose_medium_is_missing_is_named_and_left_out(talks: Path, tmp_path: Path, to: To) -> None:
    source = open_source(talks)
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")  # nobody writes to it, so reading it would wait for ever
    done = convert_rows(source, tmp_path / "out", to=to)
    assert done.rows == 5 and [error.sample_id for error in done.bad] == ["1", "3", "5", "7", "9"]
    assert str(done.bad[0]) == f"talks.json row 2: {tmp_path}/b.png: is not a regular file. Give the path of a picture"
    assert [sample.id for sample in open_source(tmp_path / "out")] == ["0", "2", "4", "6", "8"]


@FORMS
def test_nothing_is_there_before_it_is_whole(
    talks: Path, tmp_path: Path, to: To, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = open_source(talks), tmp_path / "out"

    def stop(index: int) -> Sample:
        if index == 5:
            raise KeyboardInterrupt
        return source[index]

    stopping = Made(list(source))
    monkeypatch.setattr(Made, "__getitem__", lambda _, index: stop(index))
    with pytest.raises(KeyboardInterrupt):
        convert_rows(stopping, out, to=to)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    monkeypatch.undo()
    convert_rows(stopping, out, to=to)
    with pytest.raises(ConfigError) as error:
        convert_rows(stopping, out, to=to)
    assert str(error.value) == f"{out}: is there already. Give a folder that is not there yet"


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    sample = Sample("7", (Turn("user", (MediaItem("image", decoded=object()),)),), where="here")
    with pytest.raises(ConfigError, match=r"out: not one row could be written, so nothing is\. The first one: here: "):
        convert_rows(Made([sample]), tmp_path / "out", to="jsonl")
    assert list(tmp_path.iterdir()) == []
    half = Sample("8", (Turn("user", (Text("\ud83d"),)),), where="there")
    done = convert_rows(Made([half, Sample("9", (Turn("user", (Text("a"),)),))]), tmp_path / "out", to="webdataset")
    assert [str(error) for error in done.bad] == [
        "there: holds half of a character, which no file of rows can. Write the whole one"
    ]


def test_progress_is_told_in_rows(talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avlm.data.readers.taking.QUIET_S", 0.0)
    monkeypatch.setattr("avlm.data.readers.taking.EVERY_S", 0.0)
    told: list[tuple[int, int]] = []
    convert_rows(
        open_source(talks), tmp_path / "out", to="jsonl", progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (10, 10)


def test_joined_sources_are_one_behind_the_other(talks: Path, tmp_path: Path) -> None:
    rows = [
        {"task": "t", "messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]}
        for i in range(3)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    one, two = open_source(talks), open_source(tmp_path / "b.jsonl")
    both = JoinedSource([one, two, one])
    assert len(both) == 23 and [s.id for s in both] == [s.id for source in (one, two, one) for s in source]
    assert both.where(11) == "b.jsonl line 2" and both[12].where == "b.jsonl line 3" and both[-1].id == "9"
    assert list(both.facts) == [*one.facts, *two.facts, *one.facts] and both.facts.tasks == ["", "t"]
    assert [str(error) for error in both.errors] == [str(error) for error in two.errors]
    assert (
        both.fingerprint() == JoinedSource([one, two, one]).fingerprint() != JoinedSource([one, one, two]).fingerprint()
    )
    with pytest.raises(IndexError):
        both[23]
    shares = DataConfig(sets={"": {"ratio": 0.5}})
    assert len(open_source(talks, shares)) == 5
