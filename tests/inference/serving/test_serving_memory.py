"""Memory that is free goes back to the system."""

from __future__ import annotations

import threading
import time

import pytest
from served import served, until

from avlm.inference.chat import Chat
from avlm.inference.serving import service


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
