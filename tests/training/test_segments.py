"""Tensors in a folder that others write, remove, damage and are killed in."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avlm.training.segments import DTYPES, Segments

MB = 2**20
ROOM = 64 * MB


def key(i: int) -> bytes:
    return i.to_bytes(16, "big")


def tensor(i: int, rows: int = 7, columns: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    """Follows from its number, so that whoever reads it knows what it has to be."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(i)).to(dtype)


def filled(folder: Path, count: int = 5, most: int = ROOM) -> Segments:
    kept = Segments(folder / "a", most)
    assert all(kept.write(key(i), tensor(i)) for i in range(count))
    return kept


def reader(folder: Path) -> Segments:
    kept = Segments(folder / "a", ROOM)
    kept.refresh()
    return kept


def whole(kept: Segments, count: int) -> list[int]:
    """Numbers of the tensors that are found; each must be what was written."""
    found = []
    for i in range(count):
        read = kept.read(key(i))
        if read is not None:
            assert torch.equal(read, tensor(i)), f"tensor {i} is not what was written"
            found.append(i)
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.data"))


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES)), min_size=1, max_size=8)
)
def test_what_is_written_is_read_to_the_bit(
    shapes: list[tuple[int, int, torch.dtype]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    kept = Segments(folder / "a", ROOM)
    for i, (rows, columns, dtype) in enumerate(shapes):
        assert kept.write(key(i), tensor(i, rows, columns, dtype))
    other = reader(folder)
    for i, (rows, columns, dtype) in enumerate(shapes):
        for read in (kept.read(key(i)), other.read(key(i))):
            assert read is not None and read.dtype == dtype
            assert torch.equal(read, tensor(i, rows, columns, dtype))
            assert read.data_ptr() % 64 == 0
    assert other.read(key(len(shapes))) is None
    assert not kept.write(key(99), torch.empty(0, 4))
    assert not kept.write(key(99), torch.ones(2, 2, dtype=torch.int64))


def test_what_one_writes_the_other_sees_at_its_next_look(tmp_path: Path) -> None:
    kept, other = filled(tmp_path, 2), reader(tmp_path)
    assert whole(other, 3) == [0, 1]
    kept.write(key(2), tensor(2))
    assert whole(other, 3) == [0, 1]
    other.refresh()
    assert whole(other, 3) == [0, 1, 2]
    assert other.write(key(3), tensor(3))
    kept.refresh()
    assert whole(kept, 4) == [0, 1, 2, 3]


def test_a_reader_may_change_its_tensor_and_nobody_sees_it(tmp_path: Path) -> None:
    kept, other = filled(tmp_path), reader(tmp_path)
    mine = other.read(key(0))
    assert mine is not None
    mine.zero_()
    assert whole(kept, 5) == whole(reader(tmp_path), 5) == [0, 1, 2, 3, 4]


def test_any_flipped_byte_costs_the_tensors_that_it_touches_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path).close()
    rng = random.Random(0)
    (data,), (index,) = tmp_path.rglob("*.data"), tmp_path.rglob("*.index")
    for path in (data, index):
        good = path.read_bytes()
        for at in rng.sample(range(len(good)), 60):
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            kept = reader(tmp_path)
            found = whole(kept, 5)
            if path == data:
                touched = [i for i in range(5) if i * 384 <= at < i * 384 + 336]  # 336 bytes of a tensor, on borders
                assert found == [i for i in range(5) if i not in touched] and kept.damaged == len(touched)
            else:
                assert found == list(range(at * 5 // len(good)))
        path.write_bytes(good)
    kept = reader(tmp_path)
    raw = bytearray(data.read_bytes())
    raw[384] ^= 1
    data.write_bytes(raw)
    kept = reader(tmp_path)
    assert kept.read(key(1)) is None
    assert kept.write(key(1), tensor(1))
    assert whole(kept, 5) == whole(reader(tmp_path), 5) == [0, 1, 2, 3, 4]


def test_a_writer_that_ended_at_any_byte_leaves_only_whole_tensors(tmp_path: Path) -> None:
    """As a kill does: everything up to some byte of the order in which it is written."""
    filled(tmp_path, 3).close()
    (data,), (index,) = tmp_path.rglob("*.data"), tmp_path.rglob("*.index")
    tensors, entries = data.read_bytes(), index.read_bytes()
    size = len(entries) // 3
    for done in range(3):
        for cut in (0, 1, 100, 335):
            data.write_bytes(tensors[: done * 384 + cut])
            index.write_bytes(entries[: done * size])
            assert whole(reader(tmp_path), 3) == list(range(done))
        data.write_bytes(tensors)
        for cut in range(size):
            index.write_bytes(entries[: done * size + cut])
            assert whole(reader(tmp_path), 3) == list(range(done))
    index.write_bytes(entries)  # and where the index was on the disk and the data was not
    for end in range(0, len(tensors), 37):
        data.write_bytes(tensors[:end])
        whole(reader(tmp_path), 3)


PER_SEGMENT = 10
"""Tensors of 336 bytes, on borders of 64, in 4,096 bytes."""


def aged(folder: Path) -> None:
    """As if nobody had used what is there for a while."""
    for path in folder.glob("*.data"):
        os.utime(path, (time.time() - 1000,) * 2)


def test_the_folder_never_holds_more_than_it_may_and_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    most = 16 * 4096
    a, b = Segments(tmp_path / "a", most), Segments(tmp_path / "b", most)
    for i in range(400):
        (a if i % 2 else b).write(key(i), tensor(i))
        assert size_of(tmp_path) <= most
    assert a.full and b.full, "what is in use is not removed for what comes"
    kept = len(whole(a, 400)) + len(whole(b, 400))
    assert kept >= 14 * PER_SEGMENT
    a.close()
    b.close()
    aged(tmp_path / "a")
    left, gone = len(list((tmp_path / "b").glob("*.data"))), len(list((tmp_path / "a").glob("*.data")))
    c = Segments(tmp_path / "c", most)
    for i in range((gone - 1) * PER_SEGMENT):
        assert c.write(key(i), tensor(i))
        assert size_of(tmp_path) <= most
    assert len(list((tmp_path / "b").glob("*.data"))) == left
    assert len(list((tmp_path / "a").glob("*.data"))) <= 1
    assert len(whole(c, 400)) == (gone - 1) * PER_SEGMENT


def test_a_segment_that_is_read_is_in_use(tmp_path: Path) -> None:
    most = 16 * 4096
    filled(tmp_path, 14 * PER_SEGMENT, most).close()
    aged(tmp_path / "a")
    other = Segments(tmp_path / "b", most)
    time.sleep(0.05)  # a file's times are no finer than the kernel's clock
    assert reader(tmp_path).read(key(0)) is not None
    for i in range(20 * PER_SEGMENT):
        other.write(key(i), tensor(i))
    assert whole(reader(tmp_path), 14 * PER_SEGMENT) == list(range(PER_SEGMENT))


def test_what_another_process_removes_is_read_on_or_is_not_there(tmp_path: Path) -> None:
    filled(tmp_path).close()
    mapped, fresh = reader(tmp_path), reader(tmp_path)
    held = mapped.read(key(0))
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    assert whole(mapped, 5) == [0, 1, 2, 3, 4]
    assert whole(fresh, 5) == []
    mapped.refresh()
    assert whole(mapped, 5) == []
    assert held is not None and torch.equal(held, tensor(0))
    assert mapped.write(key(7), tensor(7)) and whole(reader(tmp_path), 8) == [7]


def test_a_segment_whose_name_is_gone_is_not_written_to_any_more(tmp_path: Path) -> None:
    kept = filled(tmp_path, 2)
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    assert kept.write(key(2), tensor(2))
    assert whole(reader(tmp_path), 3) == [2]


def test_a_disk_that_takes_nothing_is_remembered_and_what_is_there_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = Segments(tmp_path / "file" / "a", ROOM)
    (tmp_path / "file").write_text("no folder")
    assert not blocked.write(key(0), tensor(0))
    assert isinstance(blocked.trouble, OSError)

    kept = filled(tmp_path / "disk", 3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("avlm.training.segments._unparse", full)
    assert not kept.write(key(3), tensor(3))
    monkeypatch.undo()
    assert kept.trouble is not None and kept.trouble.errno == 28
    assert not kept.write(key(4), tensor(4)), "it is not asked again"
    assert whole(kept, 5) == whole(reader(tmp_path / "disk"), 5) == [0, 1, 2]


def test_half_of_a_disk_s_room_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        free = 2500

    monkeypatch.setattr("shutil.disk_usage", lambda _: Disk)
    kept = Segments(tmp_path / "a", 16 * 1024)
    assert [kept.write(key(i), tensor(i)) for i in range(4)] == [True, True, False, False]  # one segment of 1,024 bytes
    assert kept.full


WRITER = """
import sys
from pathlib import Path
from tests.training.test_segments import Segments, key, tensor
kept = Segments(Path(sys.argv[1]) / "a", int(sys.argv[3]))
print("ready", flush=True)
i = int(sys.argv[2])
while True:
    kept.refresh()
    found = kept.read(key(i % 500))
    if found is None:
        kept.write(key(i % 500), tensor(i % 500, 50, 40))
    elif not (found == tensor(i % 500, 50, 40)).all():
        print("wrong", i % 500, flush=True)
    i += 1
"""


@pytest.mark.slow
def test_processes_that_are_killed_at_any_moment_leave_only_whole_tensors(tmp_path: Path) -> None:
    """Two writers at once in a folder that is too small for them, each killed and begun again."""
    rng = random.Random(0)
    most = 1 * MB
    found = 0
    for life in range(2):
        both = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path), str(250 * who), str(most)],
                stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for who in range(2)
        ]  # fmt: skip
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.2, 0.6))
        for process in both:
            process.send_signal(signal.SIGKILL)
            assert process.communicate()[0] == "", "what a process reads is what was written"
        assert size_of(tmp_path) <= most
        kept = reader(tmp_path)
        for i in range(500):
            read = kept.read(key(i))
            if read is not None:
                assert torch.equal(read, tensor(i, 50, 40)), f"life {life}"
                found += 1
        assert kept.damaged == 0
    assert found > 50
