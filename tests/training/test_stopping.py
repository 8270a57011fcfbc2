"""A first signal is a wish, a second one is not."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from avlm.training.stopping import SIGNALS, Stopped, StopWish, stop_wishes, stops_at_once


def test_the_first_is_a_wish_and_the_second_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_wishes() as wish:
        wish.grant()  # nobody asked yet
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.number == signal.SIGINT
        with pytest.raises(Stopped, match="stopped by SIGINT"):
            wish.grant()
        with pytest.raises(KeyboardInterrupt) as second:
            os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(second.value, Stopped)
    assert capfd.readouterr().err == "stopping after this step; once more stops at once\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_wishes() as wish:
            os.kill(os.getpid(), signal.SIGINT)
            assert wish.number is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    found: list[StopWish] = []

    def work() -> None:
        with stop_wishes() as wish:
            found.append(wish)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1


def test_where_a_parent_ends_the_process_a_second_one_does_nothing() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_wishes(second="nothing") as wish:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert wish.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_to_be_saved_the_first_one_ends_the_block(number: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped) as stopped, stops_at_once():
        os.kill(os.getpid(), number)
    assert stopped.value.status() == (130 if number == signal.SIGINT else 0)
    assert [signal.getsignal(number) for number in SIGNALS] == before
