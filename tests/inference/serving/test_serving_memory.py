"""Memory that is free goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time

import pytest
from served import served, until

from avlm.inference.chat import Chat
from avlm.inference.serving import memory, service
from avlm.inference.serving.memory import give_memory_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no such call")
def test_what_is_free_in_the_middle_of_memory_goes_back() -> None:
    """In a process of its own, whose memory nobody else moves."""
    script = """
import os
from pathlib import Path
from avlm.inference.serving.memory import give_memory_back
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
before = held()
blocks = [bytes(20_000) for _ in range(5_000)]
last = bytes(20_000)
del blocks
free = held() - before
give_memory_back()
print(free, held() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    free, left = map(int, done.stdout.split())
    assert free > 80 and left < 20


def test_nothing_happens_where_the_system_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._trim.cache_clear()
    monkeypatch.setattr(sys, "platform", "plan9")
    assert memory._trim() is None
    give_memory_back()
    memory._trim.cache_clear()


def test_a_server_gives_memory_back_when_it_has_answered_and_leaves_it_then(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(service, "TIDY_S", 0.05)
    monkeypatch.setattr(service, "give_memory_back", lambda: given.append(threading.current_thread().name))
    with served(chat) as server:
        time.sleep(0.3)
        assert not given
        server.ask()
        until(lambda: given)
        time.sleep(0.3)
        assert given == ["avlm-engine"]
        server.ask()
        until(lambda: len(given) == 2)
