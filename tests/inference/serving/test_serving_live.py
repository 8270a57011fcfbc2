"""A server whose model has learned who is meant can be talked to, beside everything else that it answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from served import KEY, served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from avlm.inference.chat import Chat


def hearing(make_model: Callable[..., Any]) -> Chat:
    made = make_model()
    made.model.add_state_head(2)
    return Chat(*made)


def test_typed_words_are_answered_while_others_ask(make_model: Callable[..., Any]) -> None:
    with served(hearing(make_model), keys=(KEY,)) as server:
        (model,) = server.client().models.list().data
        assert model.model_dump()["live"] is True
        address = server.url.replace("http", "ws") + "/v1/live"
        with connect(address, subprotocols=["avlm-live", f"avlm-key.{KEY}"]) as socket:
            socket.send(json.dumps({"type": "text", "text": "What is number 1?"}))
            asked = server.ask("What is number 1?").choices[0].message.content
            events = [json.loads(socket.recv(20))]
            while events[-1]["event"] != "answer_ends":
                told = socket.recv(20)
                if isinstance(told, str):
                    events.append(json.loads(told))
                else:  # the answer as it is spoken
                    socket.send(json.dumps({"type": "played"}))
        said = "".join(event["text"] for event in events if event["event"] == "piece")
        assert said.strip() == asked.strip()
        with pytest.raises((InvalidStatus, ConnectionClosed)), connect(address) as socket:
            socket.recv(20)


def test_one_that_has_not_learned_it_has_no_such_place(chat: Chat) -> None:
    with served(chat) as server:
        (model,) = server.client().models.list().data
        assert model.model_dump()["live"] is False
        with pytest.raises(InvalidStatus), connect(server.url.replace("http", "ws") + "/v1/live"):
            pass
