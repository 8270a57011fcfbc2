"""The chat page in a real browser: what people do with it, and what it says when something is wrong."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the page is served by FastAPI: pip install avlm[serve]")
pytest.importorskip("playwright", reason="the browser is driven by playwright: pip install avlm[dev]")
from page_fake import MARKUP, Fake, fake_app, serving
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from served import KEY, served

from avlm.data.forms.folders import Folders
from avlm.data.forms.parse import parse_row
from avlm.inference.chat import Audio, Chat
from avlm.inference.chat import Image as Picture
from avlm.inference.sampling import Sampling
from avlm.samples import MediaItem

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
DESK, PHONE = (1280, 800), (390, 844)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
expect.set_options(timeout=15_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    fake = Fake()
    with serving(fake_app(fake)) as fake.url:
        yield fake


@pytest.fixture
def fake(server: Fake) -> Fake:
    server.key, server.left, server.live = "", 0, False
    server.asked.clear()
    server.told.clear()
    return server


@pytest.fixture
def opened(browser: Browser, fake: Fake) -> Iterator[Callable[..., Page]]:
    """Open the page: ``opened(PHONE, color_scheme="dark")``. In the end nothing has left its origin or failed."""
    contexts, asked, wrong = [], [], []

    def open_(size: tuple[int, int] = DESK, url: str = "", **settings: Any) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            permissions=["camera", "microphone", "clipboard-read", "clipboard-write"],
            **settings,
        )
        contexts.append(context)
        context.on("request", lambda request: asked.append((url or fake.url, request.url)))
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
        page = context.new_page()
        page.goto(url or fake.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [url for home, url in asked if not url.startswith((home, f"blob:{home}"))] == []
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []  # statuses that are meant


def ask(page: Page, words: str) -> None:
    page.get_by_label("Your question").fill(words)
    page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".turn.assistant")


def ended(page: Page, count: int) -> Locator:
    """The last of so many answers, once it is complete."""
    expect(answers(page)).to_have_count(count)
    expect(answers(page).last.locator(".below")).to_be_visible()
    return answers(page).last


def no_sideways(page: Page) -> None:
    wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window


def add(page: Page, *paths: Path) -> None:
    before = page.locator("#tray li").count()
    page.locator("#files").set_input_files(list(paths))
    expect(page.locator("#tray li")).to_have_count(before + len(paths))


# ---------------------------------------------------------------- asking


def test_a_question_with_a_picture_and_a_sound_is_answered(
    opened: Callable[..., Page], fake: Fake, picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    page = opened()
    expect(page.get_by_text("tiny-demo")).to_be_visible()
    image, audio = picture("seen.png"), sound("heard.wav", seconds=0.5)
    add(page, image, audio)
    tray = page.get_by_role("list", name="Goes with it")
    expect(tray).to_contain_text("picture, 40 × 30")
    expect(tray).to_contain_text("sound, 0.50 s")
    ask(page, "What is this?")
    answer = ended(page, 1)
    sizes = f"image/png of {image.stat().st_size} bytes and wav of {audio.stat().st_size} bytes"
    expect(answer.locator(".answer")).to_have_text(f"Turn 1: 'What is this?' with {sizes}")
    count = len(answer.locator(".answer").inner_text().split(" "))
    took = " ".join(answer.get_by_role("list", name="What it took").all_inner_texts()).replace("\n", " ")
    for figure in ("picture 196", "sound 25", "words 3", f"{count} tokens", " tokens/s", "first after 0."):
        assert figure in took
    expect(tray).to_be_hidden()
    player = page.get_by_label("sound heard.wav")
    assert player.evaluate("e => e.play().then(() => e.duration)") == pytest.approx(0.5, abs=0.01)
    page.get_by_role("button", name="Look at the picture seen.png").click()
    expect(page.get_by_role("dialog", name="Picture").get_by_role("img")).to_be_visible()
    page.keyboard.press("Escape")

    ask(page, "And now?")
    expect(ended(page, 2)).to_contain_text("remembered 12")
    assert [m["role"] for m in fake.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert fake.asked[1]["messages"][0] == fake.asked[0]["messages"][0]
    assert fake.asked[0]["stream_options"] == {"include_usage": True}
    assert (fake.asked[0]["max_tokens"], fake.asked[0]["temperature"]) == (512, 0)


@pytest.mark.slow
def test_a_video_is_sent_and_can_be_played(opened: Callable[..., Page], fake: Fake, tmp_path: Path) -> None:
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    page = opened()
    add(page, path)
    ask(page, "What happens?")
    expect(ended(page, 1)).to_contain_text("video 400")
    expect(answers(page)).to_contain_text(f"video/mp4 of {path.stat().st_size} bytes")
    assert page.get_by_label("video clip.mp4").evaluate("e => e.duration") == pytest.approx(1.0, abs=0.11)


@pytest.mark.slow
def test_answers_are_shown_as_text_whatever_they_say(opened: Callable[..., Page]) -> None:
    page = opened()
    ask(page, "markup <b>in</b> the question")
    answer = ended(page, 1).locator(".answer")
    expect(page.locator(".said")).to_have_text("markup <b>in</b> the question")
    expect(answer.locator("strong")).to_have_text("red")
    expect(answer.locator("em")).to_have_text("certain")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol li ul li")).to_have_text("so it ends")
    assert answer.locator("pre").inner_text() == 'print("<b>not bold</b>")'
    expect(answer).to_contain_text("<img src=x onerror=alert(1)> stays as it is, and so does 2 * 3 * 4.")
    assert answer.locator("img, b, a").count() == 0
    page.get_by_role("button", name="Copy the answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == MARKUP.strip()


@pytest.mark.slow
def test_an_answer_that_grew_looks_as_one_that_came_whole(opened: Callable[..., Page]) -> None:
    compare = """async (text) => {
      const { show } = await import("/page/prose.js");
      const html = (element) => new XMLSerializer().serializeToString(element);
      const whole = document.createElement("div");
      show(whole, text);
      for (const step of [1, 7]) {
        const grown = document.createElement("div");
        for (let i = 0; i <= text.length + step; i += step) show(grown, text.slice(0, i));
        if (html(grown) !== html(whole)) return html(grown);
      }
      return whole.textContent;
    }"""
    page = opened()
    for text in (
        MARKUP,
        "# Head\nwords\n\n- a\n  b\n- c\n\n~~~\n# no head\n",
        "7. seven\n8. eight\n*no* end **",
        "\n\n \nx",
    ):
        letters = re.sub(r"[\s*#`~-]|\d\.|python", "", text)
        assert re.sub(r"[\s*#`~-]|\d\.|python", "", page.evaluate(compare, text)) == letters


def test_events_are_read_wherever_the_stream_is_cut(opened: Callable[..., Page]) -> None:
    read = """async (lines) => {
      const { events } = await import("/page/events.js");
      const bytes = new TextEncoder().encode(lines);
      const all = [];
      for (let cut = 0; cut <= bytes.length; cut++) {
        const body = new ReadableStream({ start(c) {
          c.enqueue(bytes.slice(0, cut)); c.enqueue(bytes.slice(cut)); c.close(); } });
        const found = [];
        for await (const data of events(body)) found.push(data);
        all.push(JSON.stringify(found));
      }
      return [...new Set(all)];
    }"""
    page = opened()
    for end in ("\n", "\r\n"):
        stream = end.join(
            ["data: {é}", "", ": ping", "event: x", "data:two", "data: lines 😀", "", "", "data: unended"]
        )
        assert page.evaluate(read, stream) == ['["{é}","two\\nlines 😀"]']


@pytest.mark.slow
def test_a_model_answers_the_page_as_it_answers_in_a_conversation(
    opened: Callable[..., Page], chat: Chat, picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    image, audio = picture("a.png"), sound("b.wav")
    asked = [Picture(image), Audio(audio), "What is this?"]
    expected = chat.chat(*asked, sampling=Sampling(max_tokens=8))
    with served(chat, keys=(KEY,), ui=True, name="tiny") as server:
        page = opened(url=f"{server.url}/")
        page.get_by_role("button", name="Enter the key").click()
        page.get_by_label("Key", exact=True).fill(KEY)
        page.get_by_label("Longest answer").fill("8")
        page.get_by_role("button", name="Done").click()
        expect(page.locator("#model-name")).to_have_text("tiny")
        add(page, image, audio)
        ask(page, "What is this?")
        answer = ended(page, 1)
        expect(answer).to_contain_text("picture 4")
        expect(answer).to_contain_text("8 tokens")
        stored: list[Any] = []
        while len(stored) < 2 or "usage" not in stored[1]:
            stored = page.evaluate("() => import('/page/keep.js').then(({ kept }) => kept())")
        assert stored[1]["text"].strip() == expected
        usage = stored[1]["usage"]
        media = sum(usage["prompt_tokens_details"][f"{kind}_tokens"] for kind in ("image", "audio", "video"))
        expect(answer).to_contain_text(f"words {usage['prompt_tokens'] - media}")


# ---------------------------------------------------------------- stop, edit, retry


def test_an_answer_is_stopped_and_its_place_is_freed(opened: Callable[..., Page], fake: Fake) -> None:
    page = opened()
    ask(page, "a slow story")
    expect(answers(page)).to_contain_text("word3")
    assert page.get_by_role("log").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    expect(ended(page, 1)).to_contain_text("Stopped.")
    assert page.get_by_role("log").get_attribute("aria-busy") == "false"
    said = answers(page).locator(".answer").inner_text()
    assert said.startswith("word0 word1 word2") and "word399" not in said
    ask(page, "go on")
    ended(page, 2)
    assert fake.left == 1
    assert [m["content"].strip() for m in fake.asked[1]["messages"]] == ["a slow story", said, "go on"]


def test_a_question_stopped_before_a_word_was_never_said(opened: Callable[..., Page], fake: Fake) -> None:
    page = opened()
    ask(page, "late")
    expect(page.get_by_text("Looking and listening")).to_be_visible()
    page.keyboard.press("Escape")
    expect(ended(page, 1)).to_contain_text("Stopped before a word")
    ask(page, "hello")
    ended(page, 2)
    assert [m["content"] for m in fake.asked[-1]["messages"]] == ["hello"]


@pytest.mark.slow
def test_a_question_is_changed_and_what_followed_it_goes(
    opened: Callable[..., Page], fake: Fake, picture: Callable[..., Path]
) -> None:
    page = opened()
    add(page, picture("a.png"))
    ask(page, "first")
    ended(page, 1)
    ask(page, "second")
    ended(page, 2)
    page.get_by_label("Your question").fill("a draft")
    edit = page.get_by_role("button", name="Edit this question")
    edit.first.click()
    expect(page.get_by_label("Your question")).to_have_value("first")
    expect(page.locator(".turn.replaced")).to_have_count(4)
    page.keyboard.press("Escape")  # leaves everything as it was, the draft too
    expect(page.get_by_label("Your question")).to_have_value("a draft")
    expect(page.locator(".turn.replaced")).to_have_count(0)
    edit.first.click()
    page.get_by_role("button", name="Remove the picture a.png").click()
    ask(page, "first, again")
    ended(page, 1)
    assert fake.asked[-1]["messages"] == [{"role": "user", "content": "first, again"}]
    expect(page.locator(".said")).to_have_text("first, again")


def test_an_answer_is_asked_for_again(opened: Callable[..., Page], fake: Fake) -> None:
    page = opened()
    ask(page, "one")
    ended(page, 1)
    ask(page, "two")
    ended(page, 2)
    page.get_by_role("button", name="Answer again").click()  # of the last answer alone
    expect(ended(page, 2).locator(".answer")).to_have_text("Turn 3: 'two'")
    assert fake.asked[2]["messages"] == fake.asked[1]["messages"]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("words", "title", "detail"),
    [
        (
            "busy",
            "The server is busy",
            "32 requests wait already, which is what the queue holds. Try again in 3 seconds.",
        ),
        ("wrong", "The server cannot take this", "messages[0]: the picture cannot be decoded"),
        ("large", "This is too large for the server", ""),
        ("broken", "The answer broke off", "The connection ended"),
        ("spoiled", "The answer broke off", "the model was taken away. Ask again"),
    ],
)
def test_errors_are_told_in_words(opened: Callable[..., Page], fake: Fake, words: str, title: str, detail: str) -> None:
    page = opened()
    ask(page, words)
    ended(page, 1)
    alert = answers(page).get_by_role("alert")
    expect(alert).to_contain_text(title)
    expect(alert).to_contain_text(detail)
    assert "nginx" not in alert.inner_text() and "undefined" not in alert.inner_text()
    if words in ("broken", "spoiled"):
        expect(answers(page).locator(".answer")).to_have_text(re.compile(r"^Turn 1:"))
    page.get_by_role("button", name="Edit this question").click()
    ask(page, "better")
    expect(ended(page, 1).locator(".answer")).to_have_text("Turn 1: 'better'")


def test_a_server_that_is_gone_is_told_and_comes_back(opened: Callable[..., Page], fake: Fake) -> None:
    with serving(fake_app(Fake())) as url:
        page = opened(url=url)
        ask(page, "one")
        ended(page, 1)
    ask(page, "two")
    ended(page, 2)
    expect(answers(page).get_by_role("alert")).to_contain_text("The server does not answer")
    page.route("**/v1/chat/completions", lambda route: route.continue_(url=f"{fake.url}v1/chat/completions"))
    page.get_by_role("button", name="Try again").click()
    expect(ended(page, 2).locator(".answer")).to_have_text("Turn 3: 'two'")


def test_a_key_is_asked_for_and_kept_with_the_tab_alone(opened: Callable[..., Page], fake: Fake) -> None:
    fake.key = "right-key"
    page = opened()
    expect(page.locator("#notice")).to_contain_text("The server wants a key")
    page.get_by_role("button", name="Enter the key").click()
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.type("wrong-key")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("the key is not the one")
    ask(page, "hello")
    ended(page, 1)
    expect(answers(page).get_by_role("alert")).to_contain_text("The server wants a key")
    answers(page).get_by_role("button", name="Enter the key").click()
    page.get_by_label("Key", exact=True).fill("right-key")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_text("tiny-demo")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(ended(page, 1).locator(".answer")).to_have_text("Turn 1: 'hello'")
    assert "right-key" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(page.get_by_text("tiny-demo")).to_be_visible()


@pytest.mark.slow
def test_files_of_other_kinds_are_refused_by_name(opened: Callable[..., Page], tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "empty.wav").write_bytes(b"")
    page = opened()
    for name, words in (("notes.pdf", "is neither a picture nor a sound nor a video"), ("empty.wav", "is empty")):
        page.locator("#files").set_input_files(tmp_path / name)
        expect(page.get_by_role("alert").filter(has_text=name)).to_contain_text(words)
    page.get_by_role("button", name="Close", exact=True).click()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#tray li")).to_have_count(0)


# ---------------------------------------------------------------- ways in and out


@pytest.mark.slow
def test_files_are_dropped_and_pasted(opened: Callable[..., Page], picture: Callable[..., Path]) -> None:
    data = base64.b64encode(picture("a.png").read_bytes()).decode()
    carry = """([kind, data]) => {
      const carried = new DataTransfer();
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      carried.items.add(new File([bytes], `${kind}.png`, { type: "image/png" }));
      const set = { bubbles: true, cancelable: true };
      const event = kind === "paste"
        ? new ClipboardEvent(kind, { ...set, clipboardData: carried })
        : new DragEvent(kind, { ...set, dataTransfer: carried });
      document.body.dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    page = opened()
    page.evaluate(carry, ["dragenter", data])
    expect(page.get_by_text("Drop pictures, sounds and videos")).to_be_visible()
    assert page.evaluate(carry, ["drop", data])
    expect(page.get_by_text("Drop pictures, sounds and videos")).to_be_hidden()
    assert page.evaluate(carry, ["paste", data])
    expect(page.locator("#tray li")).to_have_count(2)
    expect(page.locator("#tray")).to_contain_text("drop.png")


@pytest.mark.slow
def test_the_microphone_makes_a_wav_of_16_khz(opened: Callable[..., Page], fake: Fake) -> None:
    import soundfile

    page = opened()
    page.get_by_role("button", name="Record a sound").click()
    expect(page.locator("#recorded")).to_have_text("0:01")  # the browser's own device beeps once a second
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#tray")).to_contain_text("recording.wav")
    ask(page, "What is said?")
    ended(page, 1)
    given = fake.asked[0]["messages"][0]["content"][0]["input_audio"]
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(given["data"])), dtype="float32", always_2d=True)
    assert (given["format"], rate, wave.shape[1]) == ("wav", 16_000, 1)
    assert 0.9 < len(wave) / rate < 5 and abs(wave).max() > 0.05
    page.get_by_role("button", name="Record a sound").click()
    page.get_by_role("button", name="Discard").click()
    expect(page.locator("#tray li")).to_have_count(0)


@pytest.mark.slow
def test_wav_files_are_what_they_say(opened: Callable[..., Page]) -> None:
    import soundfile

    made = opened().evaluate("""async () => {
      const { resampled, wav } = await import("/page/wav.js");
      const tone = Float32Array.from({ length: 48000 }, (_, i) => 0.5 * Math.sin((2 * Math.PI * 440 * i) / 48000));
      const plain = wav(Float32Array.from([0, 0.5, -0.5, 1, -1, 2]), 8000);
      const fine = wav(await resampled(tone, 48000, 16000), 16000);
      return Promise.all([plain, fine].map(async (blob) => [...new Uint8Array(await blob.arrayBuffer())]));
    }""")
    (plain, rate), (tone, wanted) = (soundfile.read(io.BytesIO(bytes(data)), dtype="int16") for data in made)
    assert (rate, wanted) == (8000, 16000)
    assert plain.tolist() == [0, 16384, -16383, 32767, -32767, 32767]
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    best = min(np.abs(np.roll(expected, k)[200:-200] - tone[200:-200] / 32767).max() for k in (-1, 0, 1))
    assert len(tone) == 16000 and best < 0.01


@pytest.mark.slow
def test_the_camera_takes_a_picture(opened: Callable[..., Page], fake: Fake) -> None:
    page = opened()
    page.get_by_role("button", name="Take a picture").last.click()
    preview = page.get_by_label("What the camera sees", exact=True)
    preview.evaluate("e => e.videoWidth || new Promise((seen) => e.addEventListener('loadeddata', seen))")
    page.get_by_role("button", name="Take it").click()
    expect(page.locator("#tray")).to_contain_text("snapshot.jpg")
    assert preview.evaluate("e => e.srcObject") is None  # the camera is off
    ask(page, "What is this?")
    ended(page, 1)
    url = fake.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as seen:
        assert seen.format == "JPEG" and min(seen.size) >= 240
        assert seen.convert("RGB").getpixel((5, seen.height // 2))[1] > 100  # the browser's own device is green


@pytest.mark.slow
def test_it_is_talked_to_where_the_server_listens(opened: Callable[..., Page], fake: Fake) -> None:
    fake.live, fake.key = True, "right-key"
    page = opened()
    page.get_by_role("button", name="Enter the key").click()
    page.get_by_label("Key", exact=True).fill("right-key")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Talk").click()
    talk = page.get_by_role("dialog", name="Talk")
    said = talk.get_by_role("log", name="What it says")
    expect(said).to_contain_text("You said 1.")
    expect(said.locator("em")).to_have_text("1")
    expect(said).to_contain_text("You said 2.")  # the first one was heard to its end
    talk.get_by_role("button", name="Stop this answer").click()
    expect(said).to_contain_text("Interrupted")
    expect(talk.get_by_role("status")).to_have_text("Listening")
    talk.get_by_role("button", name="End", exact=True).click()
    expect(talk).to_be_hidden()
    while "closed" not in fake.told:
        page.wait_for_timeout(20)
    assert fake.told == ["avlm-live,avlm-key.right-key", "played", "stop", "closed"]
    fake.live = False
    page.reload()
    expect(page.locator("#model-name")).to_have_text("tiny-demo")
    expect(page.get_by_role("button", name="Talk")).to_be_hidden()


@pytest.mark.slow
def test_the_conversation_stays_until_it_is_cleared(opened: Callable[..., Page], picture: Callable[..., Path]) -> None:
    page = opened()
    add(page, picture("kept.png"))
    ask(page, "remember this")
    ended(page, 1)
    ask(page, "wrong")
    ended(page, 2)
    last = "() => import('/page/keep.js').then(({ kept }) => kept()).then((turns) => turns.at(-1)?.finish ?? '')"
    while page.evaluate(last) != "failed":
        page.wait_for_timeout(20)
    page.reload()
    expect(ended(page, 2).get_by_role("alert")).to_contain_text("The server cannot take this")
    image = page.get_by_role("button", name="Look at the picture kept.png").locator("img")
    assert image.evaluate("e => e.decode().then(() => e.naturalWidth)") == 40
    page.get_by_role("button", name="New").click()
    expect(page.get_by_text("Show it something, then ask.")).to_be_visible()
    page.get_by_role("button", name="Bring the conversation back").click()
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="New").click()
    expect(page.get_by_role("status")).to_have_text("The conversation was cleared")
    while page.evaluate(last) != "":
        page.wait_for_timeout(20)
    page.reload()
    expect(page.get_by_text("Show it something, then ask.")).to_be_visible()
    expect(answers(page)).to_have_count(0)


def test_what_is_saved_is_a_row_that_can_be_learned(
    opened: Callable[..., Page], picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    page = opened()
    image, audio = picture("a.png"), sound("b.wav")
    add(page, image, audio)
    ask(page, "What is this?")
    ended(page, 1)
    ask(page, "wrong")  # was not answered, so it is no part of the row
    ended(page, 2)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save").click()
    assert re.fullmatch(r"conversation-\d{8}-\d{6}\.jsonl", saved.value.suggested_filename)
    (line,) = Path(saved.value.path()).read_text().splitlines()
    sample = parse_row(json.loads(line), Folders())
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]
    kinds = [(p.kind, p.data) if isinstance(p, MediaItem) else p.text for p in sample.turns[1].parts]
    assert kinds == [("image", image.read_bytes()), ("audio", audio.read_bytes()), "What is this?"]
    assert sample.turns[2].text().startswith("Turn 1: 'What is this?'")


@pytest.mark.slow
def test_settings_are_followed_and_kept(opened: Callable[..., Page], fake: Fake) -> None:
    page = opened(color_scheme="light")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("2")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_label("Colours").select_option("dark")
    page.get_by_role("button", name="Done").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
    ask(page, "hello")
    expect(ended(page, 1)).to_contain_text("The longest answer of the settings was reached.")
    assert (fake.asked[0]["max_tokens"], fake.asked[0]["temperature"]) == (2, 0.7)
    assert fake.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("0")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()  # the browser says what is wrong with it
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


# ---------------------------------------------------------------- for everybody


@pytest.mark.parametrize(
    "size", [pytest.param(PHONE, id="phone"), pytest.param((320, 568), id="smallest", marks=pytest.mark.slow)]
)
def test_nothing_is_wider_than_a_phone(
    opened: Callable[..., Page], size: tuple[int, int], picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    page = opened(size)
    no_sideways(page)
    add(page, picture("a_name_that_is_much_longer_than_a_phone_is_wide.png", size=(900, 200)), sound("b.wav"))
    page.get_by_label("Your question").fill("wide" * 40)
    no_sideways(page)
    page.keyboard.press("Enter")
    ended(page, 1)
    ask(page, "markup")
    ended(page, 2)
    no_sideways(page)
    image = page.locator(".medium img").bounding_box()
    assert image is not None and image["x"] >= 0 and image["x"] + image["width"] <= size[0]
    ask(page, "busy")
    ended(page, 3)
    page.get_by_role("button", name="Edit this question").first.click()
    no_sideways(page)
    page.get_by_role("button", name="Settings").click()
    no_sideways(page)
    for button in page.get_by_role("dialog").get_by_role("button").all():
        box = button.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= size[0]


@pytest.mark.slow
def test_a_whole_conversation_by_keyboard_alone(opened: Callable[..., Page], fake: Fake) -> None:
    page = opened(reduced_motion="reduce")
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page, 1)
    assert fake.asked[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.type("slow")
    page.keyboard.press("Enter")
    expect(answers(page).last).to_contain_text("word2")
    page.keyboard.press("Escape")
    expect(ended(page, 2)).to_contain_text("Stopped.")
    page.keyboard.press("ArrowUp")  # the last question, to be changed
    expect(page.get_by_label("Your question")).to_have_value("slow")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("quick")
    page.keyboard.press("Enter")
    expect(ended(page, 2).locator(".answer")).to_have_text("Turn 3: 'quick'")

    # From the top, everything is met in the order in which it is seen, and whatever has the focus shows it.
    page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges()")
    page.get_by_role("heading", name="avlm").click()
    met = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, ring = page.evaluate("""async () => {
          for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
          const it = document.activeElement;
          const style = getComputedStyle(it);
          const name = it.ariaLabel || it.labels?.[0]?.textContent || it.textContent;
          const box = getComputedStyle(it.closest("form") ?? it);
          return [name.trim(), style.outlineStyle !== "none" || box.borderColor === "rgb(27, 95, 174)"];
        }""")
        met.append(name)
        assert ring, name
        if name == "Send" or name == "Record a sound":
            break
    wanted = [
        "New",
        "Save",
        "Settings",
        *2 * ["Edit this question", "Copy this question", "Copy the answer"],
        "Answer again",
    ]
    assert [name for name in met if name in wanted][: len(wanted)] == wanted
    assert met[-4:] == ["Your question", "Add files", "Take a picture", "Record a sound"]
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your question")).to_be_focused()


def test_everything_has_a_name_that_is_read_out(
    opened: Callable[..., Page], picture: Callable[..., Path], sound: Callable[..., Path]
) -> None:
    page = opened()
    tree = page.context.new_cdp_session(page)

    def unnamed() -> list[str]:
        nodes = tree.send("Accessibility.getFullAXTree")["nodes"]
        needed = {"button", "textbox", "combobox", "spinbutton", "link", "image", "img", "dialog", "Audio", "Video"}
        return [
            node["role"]["value"]
            for node in nodes
            if not node.get("ignored")
            and node["role"]["value"] in needed
            and not node.get("name", {}).get("value", "").strip()
            and not any(p["name"] == "hidden" for p in node.get("properties", []))
        ]

    add(page, picture("a.png"), sound("b.wav"))
    assert unnamed() == []
    ask(page, "What is this?")
    ended(page, 1)
    assert unnamed() == []
    page.get_by_role("button", name="Settings").click()
    assert unnamed() == []
    page.keyboard.press("Escape")
    log = page.get_by_role("log", name="Conversation")
    assert log.get_attribute("aria-live") == "polite"
    expect(log.get_by_role("heading", name="You", exact=True)).to_have_count(1)
    expect(log.get_by_role("heading", name="Answer", exact=True)).to_have_count(1)
    assert page.evaluate("document.documentElement.lang") == "en"
    expect(page.get_by_role("group", name="Tools")).to_be_visible()


def luminance(colour: str) -> float:
    """Relative luminance of a colour (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart(opened: Callable[..., Page], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    names = [
        "paper",
        "raised",
        "soft",
        "ink",
        "quiet",
        "edge",
        "line",
        "bad",
        "bad-soft",
        "image",
        "audio",
        "video",
        "words",
    ]
    found = page.evaluate(
        """(names) => names.map((name) => {
          const probe = document.body.appendChild(document.createElement("p"));
          probe.style.color = `var(--${name})`;
          return [name, getComputedStyle(probe).color];
        })""",
        names,
    )
    light = {name: luminance(colour) for name, colour in found}

    def contrast(one: str, other: str) -> float:
        high, low = max(light[one], light[other]), min(light[one], light[other])
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "quiet", "line", "bad"):
        for ground in ("paper", "raised", "soft"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("ink", "bad-soft") >= 4.5 and contrast("line", "bad-soft") >= 4.5
    for sign in ("edge", "image", "audio", "video", "words"):
        assert contrast(sign, "paper") >= 3, sign


@pytest.mark.slow
def test_nothing_moves_where_that_is_not_wanted(opened: Callable[..., Page]) -> None:
    page = opened(reduced_motion="reduce")
    ask(page, "late")
    bar = page.locator(".waiting b").first
    assert bar.evaluate("e => getComputedStyle(e).animationIterationCount") == "1"
    page.keyboard.press("Escape")
    ended(page, 1)


@pytest.mark.slow
def test_the_browser_lets_the_page_make_no_code_of_text(browser: Browser, fake: Fake) -> None:
    page = browser.new_page()
    page.goto(fake.url)
    for attempt in ("document.body.innerHTML = '<b>x</b>'", "eval('1')", "new Function('1')()"):
        tried = f"try {{ {attempt}; told('done') }} catch (error) {{ told(error.name) }}"
        later = f"() => new Promise((told) => setTimeout(() => {{ {tried} }}))"  # the driver's own code may do anything
        assert page.evaluate(later) in ("TypeError", "EvalError"), attempt
    stranger = "() => fetch('http://127.0.0.1:9/').then(() => 'done', (error) => error.message)"
    with page.expect_console_message(lambda said: "Content Security Policy" in said.text):
        page.evaluate(stranger)
    page.close()
