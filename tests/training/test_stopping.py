"""A first signal is a wish, a second one is not."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest
from rich.console import Console

from avlm.training.stopping import Stopped, StopWish, stop_wishes


def test_the_first_is_a_wish_and_the_second_stops_at_once() -> None:
    out = io.StringIO()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as second, stop_wishes(Console(file=out)) as wish:
        wish.grant()  # nobody asked yet
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.number == signal.SIGINT
        with pytest.raises(Stopped, match="stopped by SIGINT"):
            wish.grant()
        os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(second.value, Stopped)
    assert out.getvalue() == "stopping after this step; once more stops at once\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_wishes(Console(file=io.StringIO())) as wish:
            os.kill(os.getpid(), signal.SIGINT)
            assert wish.number is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    found: list[StopWish] = []

    def work() -> None:
        with stop_wishes(Console(file=io.StringIO())) as wish:
            found.append(wish)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1
