"""An index holds what encoding gives, is made again in part, and outlives damage, kills and bad rows."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import CHATML, LLAMA3, MEDIA, VICUNA, processor, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.stage import Stage
from avlm.data.decoding import headers
from avlm.data.decoding.files import Limits
from avlm.data.indexing import index as index_file
from avlm.data.indexing.counting import found_among
from avlm.data.indexing.index import Index, build_index, open_index
from avlm.data.indexing.known import FactsKeys, KnownFacts, identity
from avlm.data.media import reader
from avlm.data.media.reader import MediaReader
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowTable
from avlm.data.sources import JsonLines
from avlm.data.staged import StageWriter
from avlm.errors import ConfigError, DataError
from avlm.layout import AudioFacts, ImageFacts, VideoFacts
from avlm.samples import MediaItem, Sample, Text, Turn

COLUMNS = ("tokens", "targets", "tiles", "patches", "frames", "cost", "cut", "bytes", "status")


def columns(index: Index) -> dict[str, list[int]]:
    return {name: getattr(index, name).tolist() for name in COLUMNS}


def chatml() -> AvlmProcessor:
    return AvlmProcessor(tokenizer(CHATML), MEDIA.model_dump(mode="json"), CHATML.template)


def more(path: Path, count: int) -> None:
    """Rows of text behind those that are there."""
    with path.open("a") as file:
        for i in range(count):
            said = [("user", f"And {i}?"), ("assistant", "yes " * i)]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")


@pytest.mark.parametrize("workers", [0, 2])
def test_it_holds_what_encoding_gives(workers: int, rows: Callable[..., Path], tmp_path: Path) -> None:
    source, own = JsonLines(rows()), chatml()
    told: list[tuple[int, int]] = []
    index = build_index(source, own, tmp_path / "i", workers=workers, progress=lambda *now: told.append(now))
    encoded = [own.encode(sample) for sample in source]
    assert index.tokens.tolist() == [len(e) for e in encoded]
    assert index.targets.tolist() == [e.num_targets() for e in encoded]
    assert index.tiles.tolist() == [len(e.images) for e in encoded] == [1, 0, 1, 0] * 3
    assert index.frames.tolist() == [sum(chunk.features.shape[1] for chunk in e.sounds) for e in encoded]
    assert index.bytes.tolist() == [sum(m.path.stat().st_size for m in s.media() if m.path) for s in source]
    assert (index.cost > 0).tolist() == [bool(e.places) for e in encoded]
    assert not index.status.any() and not index.cut.any() and not index.bounds
    assert told[-1] == (12, 12)
    assert (index.made.counted, index.made.reused, index.made.measured, index.made.decoded) == (12, 0, 12, 0)
    assert isinstance(index.tokens, np.memmap) and len(index) == 12
    found = open_index(index.folder)
    assert found is not None and columns(found) == columns(index) and found.fingerprint == index.fingerprint


def test_what_is_known_is_not_counted_again(
    rows: Callable[..., Path], picture: Callable[..., Path], tmp_path: Path
) -> None:
    path, own, folder = rows(), chatml(), tmp_path / "i"
    first = build_index(JsonLines(path), own, folder)
    again = build_index(JsonLines(path), own, folder)
    assert (again.made.counted, again.made.reused, again.made.measured) == (0, 12, 0)
    assert again.fingerprint == first.fingerprint

    more(path, 3)
    grown = build_index(JsonLines(path), own, folder)
    assert (grown.made.counted, grown.made.reused, grown.made.measured) == (3, 12, 0)
    assert grown.tokens[:12].tolist() == first.tokens.tolist() and grown.fingerprint != first.fingerprint

    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    turned = build_index(JsonLines(path), own, folder)
    assert (turned.made.counted, turned.made.reused) == (0, 15)
    assert turned.tokens.tolist() == grown.tokens.tolist()[::-1]

    picture("p0.png", seed=99, size=(80, 33))  # another file of the same name
    changed = build_index(JsonLines(path), own, folder)
    assert (changed.made.counted, changed.made.reused, changed.made.measured) == (1, 14, 1)
    assert changed.bytes[14] != turned.bytes[14]


def test_another_template_or_tokenizer_reads_no_header_again(rows: Callable[..., Path], tmp_path: Path) -> None:
    source, folder = JsonLines(rows()), tmp_path / "i"
    build_index(source, chatml(), folder)
    other = build_index(source, chatml().with_template(CHATML.template.replace("\\n", "\\n\\n")), folder)
    assert (other.made.counted, other.made.reused, other.made.measured) == (12, 0, 0)
    third = build_index(source, processor(LLAMA3), folder)
    assert (third.made.counted, third.made.measured) == (12, 0)
    assert len({other.folder, third.folder}) == 2
    assert third.tokens.tolist() == [len(processor(LLAMA3).encode(sample)) for sample in source]


def test_bad_rows_are_listed_with_their_reason_and_do_not_stop_it(rows: Callable[..., Path], tmp_path: Path) -> None:
    source = JsonLines(rows())
    (tmp_path / "p4.png").write_bytes(b"nothing")
    (tmp_path / "s5.wav").unlink()
    index = build_index(source, chatml(), tmp_path / "i")
    assert index.status.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
    reasons = list(index.reasons())
    assert [(r.row, r.where, r.sample_id) for r in reasons] == [
        (4, "rows.jsonl line 5", "4"),
        (5, "rows.jsonl line 6", "5"),
    ]
    assert [reason.file for reason in reasons] == [str(tmp_path / "p4.png"), str(tmp_path / "s5.wav")]
    for reason, row in zip(reasons, (4, 5), strict=True):
        with pytest.raises(DataError) as error:
            chatml().encode(source[row])
        assert reason.reason == error.value.reason
    assert index.tokens[4] == index.tokens[5] == 0 and index.made.bad == 2
    rows()  # all is whole again
    again = build_index(source, chatml(), tmp_path / "i")
    assert (not again.status.any() and again.made.bad == 0 and again.made.reused == 0) or again.made.counted >= 2


def test_where_no_row_can_be_counted_the_first_reason_is_told(rows: Callable[..., Path], tmp_path: Path) -> None:
    own = AvlmProcessor(tokenizer(VICUNA), MEDIA.model_dump(mode="json"), "{{ messages }}")
    with pytest.raises(ConfigError, match=r"rows\.jsonl: not one row can be counted.*rows\.jsonl line 1: .*template"):
        build_index(JsonLines(rows()), own, tmp_path / "i")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "head", "facts"])
def test_a_damaged_one_is_noticed_and_made_again(damage: str, rows: Callable[..., Path], tmp_path: Path) -> None:
    source, own, folder = JsonLines(rows()), chatml(), tmp_path / "i"
    first = build_index(source, own, folder)
    whole = columns(first)
    file = {"head": "index.json", "facts": "../facts.sqlite"}.get(damage, "tokens.npy")
    path = first.folder / file
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        changed = bytes([before[-1] ^ 1]) if damage == "flip" else b""
        path.write_bytes(b"no" if damage == "facts" else before[:-1] + changed)
    assert (open_index(first.folder) is None) == (damage != "facts")
    again = build_index(source, own, folder)
    assert columns(again) == whole and again.fingerprint == first.fingerprint
    assert again.made.damaged == (damage != "facts")
    assert again.made.reused == (12 if damage == "facts" else 0) and again.made.measured == 0


class Killed(BaseException):
    pass


def test_what_was_counted_before_a_kill_is_not_counted_again(
    rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, own = rows(), chatml()
    alone = build_index(JsonLines(path), own, tmp_path / "alone")
    monkeypatch.setattr(index_file, "BATCH", 4)
    monkeypatch.setattr(index_file, "SAVE_S", 0.0)
    (tmp_path / "s5.wav").unlink()

    def stop(done: int, total: int) -> None:
        if done == 12:
            raise Killed

    with pytest.raises(Killed):
        build_index(JsonLines(path), own, tmp_path / "i", progress=stop)
    counted: list[int] = []
    write = StageWriter.count
    monkeypatch.setattr(StageWriter, "count", lambda *a, **k: counted.append(1) or write(*a, **k))
    told: list[tuple[int, int]] = []
    index = build_index(JsonLines(path), own, tmp_path / "i", progress=lambda *now: told.append(now))
    assert (len(counted), told) == (4, [(12, 12)])
    assert index.tokens.tolist() == [0 if i == 5 else n for i, n in enumerate(alone.tokens)]
    assert [reason.row for reason in index.reasons()] == [5]
    assert not [p.name for p in (tmp_path / "i").iterdir() if p.name.endswith(("making", "old"))]


def test_a_kill_with_other_rows_afterwards_begins_anew(
    rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, own = rows(), chatml()
    monkeypatch.setattr(index_file, "BATCH", 4)
    monkeypatch.setattr(index_file, "SAVE_S", 0.0)

    def stop(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        build_index(JsonLines(path), own, tmp_path / "i", progress=stop)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    index = build_index(JsonLines(path), own, tmp_path / "i")
    assert index.tokens.tolist() == [len(own.encode(sample)) for sample in JsonLines(path)]


def test_a_stage_counts_its_own_rows_its_own_way(rows: Callable[..., Path], tmp_path: Path) -> None:
    source, own = JsonLines(rows(alts=True)), chatml()
    index = build_index(source, own, tmp_path / "i", stage=Stage(name="a", steps=1, rows="vision"))
    assert index.status.tolist() == [0, -1, 0, -1] * 3  # sound can be given in words, rows without a picture cannot
    assert index.frames.tolist() == [0] * 12 and index.tiles.tolist() == [1, 0, 1, 0] * 3
    words = Stage(name="a", steps=1, rows="text", supervise="everything")
    text = build_index(source, own, tmp_path / "i", stage=words)
    assert text.tokens.tolist() == [len(StageWriter(words, own).encode(s, 0, 0)) for s in source]
    assert not text.tiles.any() and not text.cost.any()
    assert text.folder != index.folder
    drawn = build_index(source, own, tmp_path / "i", stage=Stage(name="a", steps=1, describe=0.5))
    assert drawn.bounds and (drawn.tokens >= build_index(source, own, tmp_path / "i").tokens).all()


def test_rows_that_are_cut_are_counted_as_they_are_read(rows: Callable[..., Path], tmp_path: Path) -> None:
    path, own = rows(), chatml()
    more(path, 30)
    stage, source = Stage(name="a", steps=1, row_tokens=40), JsonLines(path)
    whole = build_index(source, own, tmp_path / "i", stage=stage)
    index = build_index(source, own, tmp_path / "i", stage=stage, too_long="cut")
    fits, left = whole.tokens <= 40, index.status == 0
    assert index.tokens[fits].tolist() == whole.tokens[fits].tolist()
    assert not fits.all() and left.any() and (index.tokens <= 40).all()
    assert (index.tokens + index.cut)[left].tolist() == whole.tokens[left].tolist()
    assert all("nothing that is learned" in reason.reason for reason in index.reasons())


def test_a_source_that_is_wrong_after_all_is_listed(tmp_path: Path) -> None:
    index = build_index(Rows(5, wrong=3), chatml(), tmp_path / "i")
    assert index.status.tolist() == [0, 0, 0, 1, 0]
    assert [r.reason for r in index.reasons()] == ["is wrong after all"]


class Rows:
    """Made-up rows of text. One may be wrong, one may end the process that reads it, and one may keep it forever."""

    name = "made up"

    def __init__(self, count: int, wrong: int = -1, deadly: int = -1, endless: int = -1, slow_s: float = 0) -> None:
        self.count, self.wrong, self.deadly, self.endless, self.slow_s = count, wrong, deadly, endless, slow_s
        self.facts, self.errors = RowTable(), list[DataError]()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(self.count))

    def __getitem__(self, index: int) -> Sample:
        if index == self.wrong:
            raise DataError("is wrong after all")
        if index == self.deadly:
            os._exit(9)
        time.sleep(3600 if index == self.endless else self.slow_s)
        return Sample(str(index), (Turn("user", (Text("What?"),)), Turn("assistant", (Text("yes " * (index % 7)),))))

    def where(self, index: int) -> str:
        return f"row {index}"

    def fingerprint(self) -> str:
        return f"{self.count} {self.deadly}"


def test_a_row_that_ends_or_keeps_its_process_costs_itself_alone(tmp_path: Path) -> None:
    index = build_index(Rows(700, deadly=300, endless=301), chatml(), tmp_path / "i", workers=2, limit_s=0.5)
    reasons = list(index.reasons())
    assert [(reason.row, reason.where) for reason in reasons] == [(300, "row 300"), (301, "row 301")]
    assert "crashed the process that read it, twice (exit status 9)" in reasons[0].reason
    assert "takes longer than 0.5 s to read" in reasons[1].reason
    alone = build_index(Rows(700), chatml(), tmp_path / "alone")
    assert np.delete(index.tokens, [300, 301]).tolist() == np.delete(alone.tokens, [300, 301]).tolist()


def test_the_limit_is_that_of_a_row_and_not_of_a_batch(tmp_path: Path) -> None:
    index = build_index(Rows(40, slow_s=0.2), chatml(), tmp_path / "i", workers=2, limit_s=0.35)
    assert index.made.bad == 0 and index.made.counted == 40  # a batch is five rows, a second in all


def test_a_medium_at_which_a_process_dies_is_named(
    rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(item: MediaItem, *more: Any) -> Any:
        if item.name().endswith("s5.wav"):
            os.kill(os.getpid(), signal.SIGKILL)
        return headers.measure(item, *more)

    monkeypatch.setattr(reader, "measure", measure)
    (reason,) = build_index(JsonLines(rows()), chatml(), tmp_path / "i", workers=2).reasons()
    assert (reason.row, reason.where, Path(reason.file).name) == (5, "rows.jsonl line 6", "s5.wav")
    assert "s5.wav: crashed the process that read it, twice (SIGKILL)" in reason.reason


Key = tuple[int, int]
KEYS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)))


@settings(deadline=None)
@given(KEYS, KEYS)
def test_rows_are_known_by_both_halves_of_their_key(known: list[Key], wanted: list[Key]) -> None:
    known = sorted(known, key=lambda key: key[0])

    def halves(keys: list[Key]) -> tuple[np.ndarray, np.ndarray]:
        a, b = np.array(keys, np.uint64).reshape(-1, 2).T
        return a, b

    at, found = found_among(halves(known), halves(wanted))
    assert found.tolist() == [key in known for key in wanted]
    assert [known[i] for i in at[found]] == [key for key in wanted if key in known]


# ---------------------------------------------------------------- facts that are known


def test_facts_come_back_as_they_were(tmp_path: Path) -> None:
    known = KnownFacts(tmp_path / "facts.sqlite")
    facts: dict[bytes, Any] = {
        b"a" * 16: ImageFacts((480, 640)),
        b"b" * 16: AudioFacts(2**40),
        b"c" * 16: VideoFacts(0.1 + 0.2, 7),
    }
    known.add(facts)
    assert KnownFacts(tmp_path / "facts.sqlite").find([*facts, b"d" * 16]) == facts
    assert known.find([bytes([i // 256, i % 256]) for i in range(2000)]) == {}


def test_a_table_of_another_version_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "facts.sqlite"
    KnownFacts(path).add({b"a": AudioFacts(1)})
    with sqlite3.connect(path) as table:
        table.execute("pragma user_version = 99")
    assert KnownFacts(path).find([b"a"]) == {}


def test_a_medium_is_known_by_what_its_facts_follow_from(picture: Callable[..., Path], tmp_path: Path) -> None:
    path = picture()
    item, own = MediaItem("image", path=path), chatml()
    limits = own.reader().limits

    def key(item: MediaItem, media: Any = MEDIA) -> bytes:
        known_by, _ = identity(item)
        assert known_by is not None
        return FactsKeys(media, limits).key(known_by)

    before = key(item)
    assert identity(item)[1] == path.stat().st_size
    assert key(MediaItem("image", path=path, alt="x")) == before
    deaf = MEDIA.model_copy(update={"audio": None})
    assert key(item, deaf) == before
    sound = MediaItem("audio", path=path)
    other = MEDIA.model_copy(update={"audio": MEDIA.audio.model_copy(update={"sample_rate_hz": 8000})})  # type: ignore[union-attr]
    ways = [before, key(sound), key(sound, other), key(MediaItem("audio", path=path, start_s=1))]
    ways += [key(MediaItem("image", path=path, span=(0, 9))), key(MediaItem("image", data=b"x"))]
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert len({*ways, key(item)}) == 7
    assert identity(MediaItem("image", path=tmp_path / "gone.png")) == (None, 0)


@pytest.mark.parametrize("seed", range(30))
def test_damage_of_the_facts_costs_time_and_nothing_else(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "facts.sqlite"
    facts = {bytes([i]) * 16: ImageFacts((100 + i, 200 + i)) for i in range(60)}
    KnownFacts(path).add(facts)
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for at in rng.integers(0, len(data), 3 + 40 * (seed % 3)).tolist():
        data[at] ^= int(rng.integers(1, 256))
    path.write_bytes(bytes(data))
    known = KnownFacts(path)
    found = known.find(facts)
    assert found.items() <= facts.items()
    known.add(facts)
    again = KnownFacts(path)
    again.find(facts)
    again.add(facts)
    assert KnownFacts(path).find(facts) == facts


def test_facts_that_another_process_holds_are_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.sqlite"
    known = KnownFacts(path)
    known.add({b"a": AudioFacts(1)})
    monkeypatch.setattr("avlm.data.indexing.known.WAIT_S", 0.05)
    with sqlite3.connect(path) as other:
        other.execute("begin exclusive")
        known.add({b"b": AudioFacts(2)})
        assert KnownFacts(path).find([b"a"]) == {}
        other.rollback()
    assert known.find([b"a", b"b"]) == {b"a": AudioFacts(1)}


def test_other_limits_make_another_index(rows: Callable[..., Path], tmp_path: Path) -> None:
    source, own = JsonLines(rows()), chatml()
    before = build_index(source, own, tmp_path / "i")
    own.use_reader(MediaReader(MEDIA, limits=Limits(max_pixels=1)))
    after = build_index(source, own, tmp_path / "i")
    assert not before.status.any() and after.status.tolist() == build_index(source, own, tmp_path / "j").status.tolist()
    assert after.status.any()
