"""A crew: whatever happens to its workers, results are those of a loop, and nobody is left behind."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crew_work import countdown, square
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import descendants, open_files

from avlm.data.workers import parcels
from avlm.data.workers.crew import Crew, Lost
from avlm.data.workers.foreman import Error, note

# ---------------------------------------------------------------- parcels


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for end in pair:
        end.close()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=6),
    dtypes=st.lists(st.sampled_from([*DTYPES, torch.complex64]), min_size=6, max_size=6),
    seed=st.integers(0, 9),
)
def test_tensors_arrive_as_they_were_sent(shapes: list[list[int]], dtypes: list[torch.dtype], seed: int) -> None:
    torch.manual_seed(seed)
    sent = [(100 * torch.randn(shape)).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    sent += [t.mT for t in sent if t.ndim > 1] + [t[..., ::2] for t in sent if t.ndim]
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        parcels.wrap(7, {"text": "é" * seed, "tensors": sent}).post(one)
        found = parcels.receive(other)
    assert found is not None and found[0] == 7 and found[1]["text"] == "é" * seed
    for theirs, ours in zip(found[1]["tensors"], sent, strict=True):
        assert theirs.dtype == ours.dtype and theirs.shape == ours.shape
        assert (
            theirs.numpy(force=True).tobytes() == ours.contiguous().numpy(force=True).tobytes()
            if (ours.dtype != torch.bfloat16)
            else torch.equal(theirs, ours)
        )


def test_what_is_large_comes_in_one_piece_that_lives_as_long_as_it_is_used(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    big = torch.arange(10**6, dtype=torch.float32)
    before = open_files()
    parcels.wrap(1, [big, np.arange(10**5)]).post(ends[0])
    found = parcels.receive(ends[1])
    assert found is not None
    tensor, array = found[1]
    assert open_files() == before
    assert tensor.data_ptr() % 64 == 0 and abs(array.ctypes.data - tensor.data_ptr()) < 2 * 4 * 10**6
    del found, array
    assert torch.equal(tensor, big)
    tensor += 1  # it is ours to change
    assert tensor[-1] == 10**6


def test_where_shared_memory_is_not_to_be_had_a_file_does(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none_left(name: str) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "memfd_create", none_left)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    parcels.wrap(1, torch.ones(10**6)).post(ends[0])
    assert not list(tmp_path.iterdir()), "it has no name"
    found = parcels.receive(ends[1])
    assert found is not None and torch.equal(found[1], torch.ones(10**6))
    monkeypatch.setattr("tempfile.tempdir", "/dev/full")
    before = open_files()
    with pytest.raises(OSError, match="Not a directory"):
        parcels.wrap(1, torch.ones(10**6))
    assert open_files() == before


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_those_of_a_loop_in_order_or_as_they_come(workers: int) -> None:
    tasks = [list(range(i, i + i % 4)) for i in range(0, 40)]  # some are empty
    with Crew(square, workers, limit_s=60) as crew:
        assert list(crew.in_order(tasks, ahead=5)) == [[i * i for i in items] for items in tasks]
        found = dict(crew.as_done(tasks, ahead=5))
    assert found == {number: [i * i for i in items] for number, items in enumerate(tasks)}


def test_more_tasks_than_a_socket_holds_are_all_done() -> None:
    with Crew(square, 2, limit_s=60) as crew:
        tickets = [crew.give([i] * 200) for i in range(2000)]
        assert [crew.result(t)[199] for t in reversed(tickets)] == [i * i for i in reversed(range(2000))]


@pytest.mark.slow
def test_an_interpreter_of_its_own_does_the_same() -> None:
    with Crew(square, 2, limit_s=60, start="fresh") as crew:
        assert list(crew.in_order([[1, 2], [3]], ahead=2)) == [[1, 4], [9]]


@pytest.mark.slow
def test_an_interpreter_of_its_own_knows_modules_only(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(square, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "square", square, raising=False)
    with Crew(square, 1, limit_s=60, start="fresh") as crew, pytest.raises(OSError, match="Define the work in a mod"):
        crew.result(crew.give([1]))


def test_a_worker_has_one_thread_to_compute_with() -> None:
    with Crew(lambda _: torch.get_num_threads(), 1, limit_s=60) as crew:
        assert crew.result(crew.give([None])) == [1]


def test_a_result_that_cannot_travel_is_an_error_of_its_task() -> None:
    with Crew(lambda i: (lambda: i) if i else i, 1, limit_s=60) as crew:
        first, second = crew.give([0, 1]), crew.give([0])
        for outcome in crew.result(first):
            assert isinstance(outcome, Error) and "pickle" in str(outcome.error)
        assert crew.result(second) == [0]


# ---------------------------------------------------------------- trouble


def test_random_kills_change_no_result_and_no_order() -> None:
    """SIGKILL to any of its processes, the one that leads included, at any time."""
    drawn = random.Random(0)
    tasks = [list(range(i, i + 4)) for i in range(150)]
    with Crew(countdown, 3, limit_s=60) as crew:
        found = []
        for result in crew.in_order(tasks, ahead=12):
            found.append(result)
            if len(found) % 15 == 0:
                victim = drawn.choice(sorted(descendants()))
                os.kill(victim, signal.SIGKILL)
    assert found == tasks


def test_one_that_is_killed_while_it_hands_over_does_its_work_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with Crew(Treacherous, 1, limit_s=60) as crew:
        good, wicked, last = crew.result(crew.give([False, True, False]))
    assert isinstance(good, Treacherous) and isinstance(last, Treacherous)
    assert isinstance(wicked, Lost) and wicked.how == "crash" and wicked.detail == "SIGKILL"


class Treacherous:
    """Kills whoever pickles it."""

    def __init__(self, wicked: bool) -> None:
        self.wicked = wicked

    def __getstate__(self) -> dict[str, Any]:
        if self.wicked:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"wicked": False}


def test_an_item_that_is_given_up_says_what_it_was_about() -> None:
    def work(item: int) -> int:
        note(about=f"sample {item}", file="x" * 3000 + f"/ü{item}.png")
        if item == 2:
            time.sleep(60)
        return item

    with Crew(work, 2, limit_s=0.4) as crew:
        began = time.monotonic()
        first, lost, third = crew.result(crew.give([1, 2, 3]))
        assert time.monotonic() - began < 10
    assert (first, third) == (1, 3)
    assert isinstance(lost, Lost) and (lost.how, lost.about) == ("time", "sample 2")
    assert lost.file.endswith("x/ü2.png")


def test_time_that_the_caller_takes_is_nobodys_fault() -> None:
    """Workers that wait, for tasks or for someone to take what they have, wait as long as they like."""
    with Crew(lambda i: torch.full((3000,), i), 2, limit_s=0.3) as crew:
        tickets = [crew.give([i]) for i in range(600)]
        time.sleep(1.5)
        assert [int(crew.result(ticket)[0][0]) for ticket in tickets] == list(range(600))
        time.sleep(0.6)
        assert int(crew.result(crew.give([7]))[0][0]) == 7


def test_workers_that_cannot_even_begin_are_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: os._exit(9))
    before = descendants()
    message = r"6 worker processes ended one after the other .* \(the last by exit status 9\)"
    with Crew(square, 2, limit_s=60) as crew, pytest.raises(OSError, match=message):
        crew.result(crew.give([1]))
    assert descendants() == before


# ---------------------------------------------------------------- nobody is left behind


def test_a_crew_that_is_closed_forgotten_or_inherited_leaves_nothing() -> None:
    before, open_before = descendants(), open_files()
    for _ in range(3):
        crew = Crew(lambda i: time.sleep(60), 2, limit_s=60)
        crew.give([1])
        crew.close()
        crew.close()
        assert descendants() == before and open_files() == open_before
    crew = Crew(square, 2, limit_s=60)
    with Crew(square, 1, limit_s=60) as other:
        assert other.result(other.give([3])) == [9]
        del crew  # the other's processes hold none of its ends
        assert len(descendants() - before) == 2
    assert descendants() == before and open_files() == open_before


def use_a_crew(work: Callable[[], object]) -> int:
    """A process, forked from this one and leading its own group, whose workers all come to do the same; its number."""
    heard, tell = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        os.close(heard)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with Crew(lambda i: (os.write(tell, b"x"), work()), 2, limit_s=600) as crew:
                list(crew.in_order([[1], [2]], ahead=2))
        except BaseException:
            os._exit(1)
    os.close(tell)
    told = b""
    while len(told) < 2:
        told += os.read(heard, 1)
    os.close(heard)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    "work", [lambda: time.sleep(600), lambda: re.match("(a+)+$", "a" * 64 + "!")], ids=["sleep", "C"]
)
def test_whatever_ends_the_process_ends_its_crew(
    number: signal.Signals, work: Callable[[], object], capfd: Any
) -> None:
    """Also where workers are in C code that neither returns nor lets the interpreter go."""
    process = use_a_crew(work)
    theirs = descendants(process)
    assert len(theirs) == 3
    if number == signal.SIGKILL:
        os.kill(process, number)
    else:
        os.killpg(process, number)  # as a terminal does, or a cluster
    status = os.waitpid(process, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (1 if number == signal.SIGINT else -number)
    gone(theirs)
    assert capfd.readouterr().err == ""


def test_workers_end_with_the_one_that_leads_them_even_in_c() -> None:
    process = use_a_crew(lambda: re.match("(a+)+$", "a" * 64 + "!"))
    theirs = descendants(process)
    os.kill(process, signal.SIGSTOP)  # it cannot replace anyone
    leader = min(theirs)
    os.kill(leader, signal.SIGKILL)
    gone(theirs)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def gone(processes: set[int]) -> None:
    """Wait until processes are no more, and fail where they stay."""
    until = time.monotonic() + 5
    while left := {process for process in processes if alive(process)}:
        assert time.monotonic() < until, left
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_while_it_waits_is_the_callers(capfd: Any) -> None:
    before = descendants()
    crew = Crew(lambda i: time.sleep(600), 2, limit_s=600)
    ticket = crew.give([1])
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        crew.result(ticket)
    crew.close()
    assert descendants() == before
    assert capfd.readouterr().err == ""
