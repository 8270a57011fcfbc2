"""A conversation by voice in a real browser: what its microphone hears reaches a model, and its answer the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("fastapi", reason="the page is served by FastAPI: pip install avlm[serve]")
pytest.importorskip("playwright", reason="the browser is driven by playwright: pip install avlm[dev]")
from playwright.sync_api import Page, expect, sync_playwright
from served import served, until
from test_page_browser import CHROMIUM, QUIET

from avlm.data.voice.gate import SAMPLE_RATE_HZ
from avlm.inference.chat import Chat
from avlm.inference.live.mind import ModelMind
from avlm.samples import MediaItem, Picture

SPOKEN_S, ROUND_S = 0.8, 5.0
"""Length of what is said into the microphone, and how often it is said."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]


def recording(path: Path) -> Path:
    """Something like a vowel in a quiet room; a browser whose microphone it is says it again and again."""
    time_s = np.arange(round(SPOKEN_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    tones = [np.sin(2 * np.pi * k * 140 * time_s) / k for k in range(1, 15)]
    wave = np.random.default_rng(0).normal(0, 5e-4, round(ROUND_S * SAMPLE_RATE_HZ))
    start = 2 * SAMPLE_RATE_HZ
    wave[start : start + len(time_s)] += 0.15 * np.asarray(sum(tones)) * (0.7 + 0.3 * np.sin(8 * np.pi * time_s) ** 2)
    soundfile.write(path, wave.astype(np.float32), SAMPLE_RATE_HZ, subtype="PCM_16")
    return path


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """Of a browser that hears the recording."""
    heard = f"--use-file-for-fake-audio-capture={recording(tmp_path / 'said.wav')}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, heard])
        yield browser.new_context(permissions=["camera", "microphone"]).new_page()
        browser.close()


def decides(chat: Chat, meant: bool) -> None:
    """Let the model take all that it hears for a question, or none of it."""
    head = chat.model.state_head
    assert head is not None
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([3.0 if meant else -3.0, 0.0]))


def test_what_the_microphone_hears_is_answered_where_it_was_meant(
    make_model: Callable[..., Any], page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(*make_model())
    chat.model.add_state_head(2)
    decides(chat, True)
    told: list[dict[str, Any]] = []
    shown: list[MediaItem | None] = []
    show = ModelMind.show
    monkeypatch.setattr(ModelMind, "show", lambda mind, picture: (shown.append(picture), show(mind, picture))[1])
    page.on("websocket", lambda socket: socket.on("framereceived", lambda data: keep(told, data)))

    def happened(event: str) -> list[dict[str, Any]]:
        return [one for one in told if one["event"] == event]

    with served(chat, ui=True) as server:
        page.goto(f"{server.url}/")
        page.get_by_role("button", name="Talk").click()
        talk = page.get_by_role("dialog", name="Talk")
        state, said = talk.get_by_role("status"), talk.get_by_role("log", name="What it says")
        expect(state).to_have_text("Listening")
        expect(said.locator(".answer").first).not_to_have_text("", timeout=20_000)
        while not (happened("answer_ends") or happened("interrupted")):
            page.wait_for_timeout(50)
        order = [one["event"] for one in told if one["number"] == 1 and one["event"] not in ("piece", "speech")]
        assert order[:4] == ["heard", "state", "gated", "answer_begins"]
        (gated,) = [one for one in happened("gated") if one["number"] == 1]
        assert gated["end_s"] - gated["start_s"] == pytest.approx(SPOKEN_S, abs=0.35)
        assert happened("state")[0]["state"] == "question"
        text = "".join(one["text"] for one in happened("piece") if one["number"] == 1)
        letters = "".join(filter(str.isalnum, said.locator(".answer").first.inner_text()))
        assert letters == "".join(filter(str.isalnum, text)) != ""

        see = talk.get_by_role("button", name="Show it what the camera sees")
        see.click()
        until(lambda: page.wait_for_timeout(50) or shown)  # when somebody speaks the next time
        seen = shown[-1]
        assert seen is not None and isinstance(seen.decoded, Picture)
        height, width, _ = seen.decoded.pixels.shape
        assert width == 640 and seen.decoded.pixels[height // 2, 5, 1] > 100  # the browser's own device is green
        see.click()
        until(lambda: page.wait_for_timeout(50) or shown[-1] is None)
        expect(talk.get_by_label("What it is shown")).to_be_hidden()

        decides(chat, False)
        expect(state).to_have_text("That was not for it", timeout=20_000)
        page.wait_for_timeout(500)  # an answer would have begun by now
        noise = happened("state")[-1]
        assert noise["state"] == "noise"
        assert noise["number"] not in [one["number"] for one in happened("answer_begins")]
        talk.get_by_role("button", name="End", exact=True).click()
        expect(talk).to_be_hidden()
        assert not happened("error")


def keep(told: list[dict[str, Any]], data: str | bytes) -> None:
    if isinstance(data, str):
        told.append(json.loads(data))
