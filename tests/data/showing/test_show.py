"""The page of samples: whatever rows say stays text, every token is on it, and it asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from avlm.config.data import DataConfig
from avlm.config.stage import Stage
from avlm.convert.compose import Composed
from avlm.data.showing.show import MOST, Wanted, numbers_of, write_page
from avlm.data.showing.style import SCRIPT
from avlm.data.sources import open_source
from avlm.errors import ConfigError
from avlm.samples import Text, Turn

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>"\' onmouseover="alert(3) \x00\u202e'


class Page(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and (not kind or kind in (a.get("class") or "").split())]


def show(tmp_path: Path, rows: Path, wanted: Wanted | None = None, *rest: Any) -> Page:
    write_page(tmp_path / "page.html", open_source(str(rows)), wanted or Wanted(), *rest)
    return Page(tmp_path / "page.html")


def test_what_rows_say_stays_text(tmp_path: Path, picture: Callable[..., Path]) -> None:
    picture("a.png")
    parts = [{"type": "image", "path": "a.png", "alt": HOSTILE}, {"type": "text", "text": HOSTILE}]
    row = {"id": HOSTILE, "task": HOSTILE, "messages": [{"role": "user", "content": parts}]}
    bad = {"id": "bad", "task": "b", "messages": [{"role": HOSTILE, "content": "x"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"task": "x"}) + "\n" + json.dumps(bad))
    for wanted in (Wanted(), Wanted(bad=True)):
        page = show(tmp_path, tmp_path / "r.jsonl", wanted)
        assert [a for tag, a in page.elements if any(name.startswith("on") for name in a)] == []
        assert len(page.all("script")) == 1 and page.all("img", "x") == []
        assert all((a["src"] or "").startswith("data:image/") for a in page.all("img"))
        assert any("alert(1)" in text for text in page.text)


def test_the_page_asks_nobody_and_runs_its_own_script_alone(tmp_path: Path, rows: Callable[..., Path]) -> None:
    page = show(tmp_path, rows(count=8))
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and policy.endswith(f"script-src 'sha256-{digest}'")
    sources = [a[name] for _, a in page.elements for name in ("src", "href") if name in a]
    assert sources and all(str(source).startswith(("data:", "#")) for source in sources)
    assert SCRIPT in "".join(page.text)


def test_media_are_there_to_be_seen_and_heard(tmp_path: Path, rows: Callable[..., Path]) -> None:
    page = show(tmp_path, rows(count=4))  # a picture, a sound, both, text
    assert len(page.all("article", "card")) == 4
    assert len(page.all("figure", "image")) == 2 and len(page.all("figure", "audio")) == 2
    assert len(page.all("audio")) == 2 and len(page.all("img", "spectrogram")) == 2
    assert [a["data-kinds"] for a in page.all("article", "card")] == ["image", "audio", "audio image", "text"]


def test_every_token_is_on_the_page(tmp_path: Path, rows: Callable[..., Path], small_model: Composed) -> None:
    path = rows(count=4)
    page = show(tmp_path, path, Wanted(), small_model.processor)
    counted = placed = learned = 0
    for attrs in page.all("span", "tok"):
        kinds = (attrs["class"] or "").split()
        many = re.fullmatch(r"\w+: (\d+) tokens", attrs["title"] or "")
        counted += int(many[1]) if many else 1
        placed += int(many[1]) if many else 0
        learned += "learned" in kinds
    encoded = [small_model.processor.encode(sample) for sample in open_source(str(path))]
    assert counted == sum(len(each) for each in encoded)
    assert placed == sum(s.count for each in encoded for place in each.places for s in place.segments)
    assert learned == sum(each.num_targets() for each in encoded)
    assert "as the encoder sees it: 1 picture of 28 \u00d7 28 px, 4 tokens" in page.text


def test_a_run_shows_how_its_first_step_is_packed(
    tmp_path: Path, rows: Callable[..., Path], small_model: Composed
) -> None:
    path = rows(count=12)
    train = {"language": {"lr": 1e-3}}
    stages = [
        Stage.model_validate({"name": "see", "rows": "vision", "train": train, "steps": 1}),
        Stage.model_validate(
            {"name": "all", "train": train, "steps": 1, "batch_samples": 5, "row_tokens": 64}
        ),
    ]  # fmt: skip
    page = show(tmp_path, path, Wanted(), small_model.processor, stages, DataConfig(workers=0))
    cards = page.all("article", "card")
    assert len(cards) == 5 and "The first step of stage all" in page.text
    links = [a["href"] for a in page.all("a") if (a.get("href") or "").startswith("#row-")]
    assert sorted(links) == sorted(f"#{a['id']}" for a in cards)
    widths = [float(str(a["style"]).removeprefix("width:").removesuffix("%")) for a in page.all("a") if "style" in a]
    lengths = [len(small_model.processor.encode(s)) for s in open_source(str(path)) if f"#row-{s.id}" in links]
    assert sum(widths) == pytest.approx(100 * sum(lengths) / 64, abs=0.01)


def test_the_worse_answer_of_a_pair_and_what_is_not_learned_are_shown(tmp_path: Path, small_model: Composed) -> None:
    asked = {"messages": [{"role": "user", "content": "Is it red?"}]}
    said = [{"role": "assistant", "content": "no", "weight": 0}, {"role": "user", "content": "Sure?"}]
    row = {"messages": [*asked["messages"], *said], "chosen": "yes", "rejected": "a blue circle"}
    path = tmp_path / "r.jsonl"
    path.write_text((json.dumps(row) + "\n") * 4)
    stage = Stage.model_validate({"name": "prefer", "train": {"language": {"lr": 1e-3}}, "steps": 1, "loss": "dpo"})
    page = show(tmp_path, path, Wanted(), small_model.processor, [stage], DataConfig(workers=0))
    assert {"assistant (not learned)", "the worse answer", "a blue circle"} <= set(page.text)
    (sample, *_) = open_source(path)
    worse = replace(sample, turns=(*sample.turns[:-1], Turn("assistant", (Text("a blue circle"),))), rejected=None)
    count = len(small_model.processor.encode(worse))
    assert page.text.count(f"{count} tokens with the worse answer") == len(page.all("article", "card")) > 0


def test_rows_are_chosen_by_line_task_id_and_fault(tmp_path: Path, rows: Callable[..., Path]) -> None:
    path = rows(count=8)
    (tmp_path / "p4.png").unlink()
    path.write_text("not a row\n" + path.read_text())

    def ids(wanted: Wanted) -> list[str | None]:
        return [a.get("id") for a in show(tmp_path, path, wanted).all("article", "card")]

    assert ids(Wanted(frozenset({2, 4}))) == ["row-0", "row-2"]  # line 1 is none
    assert ids(Wanted(task="hear")) == ["row-1", "row-5"]
    assert ids(Wanted(id="6")) == ["row-6"]
    assert ids(Wanted(bad=True)) == ["row-4", None]
    for wanted, words in (
        (Wanted(frozenset({99})), "--rows: none of these rows can be read in rows.jsonl, which has 8. Choose others"),
        (
            Wanted(task="smell"),
            "--task smell: no row of rows.jsonl is of this task. Its tasks are hear, match, text, vqa",
        ),
        (Wanted(id="x"), "--id x: no row of rows.jsonl has this id. Look it up with grep, or show rows with --rows"),
    ):
        with pytest.raises(ConfigError) as error:
            show(tmp_path, path, wanted)
        assert str(error.value) == words


def test_numbers_as_people_write_them() -> None:
    assert numbers_of("1-3, 7,40-42") == {1, 2, 3, 7, 40, 41, 42}
    assert len(numbers_of("5-999999999")) == MOST
    for text in ("0", "3-1", "x", "", "1,,2", "-4"):
        with pytest.raises(ConfigError, match="is no number of a row"):
            numbers_of(text)


def test_a_row_without_a_name_is_called_by_its_place_once(tmp_path: Path) -> None:
    rows = tmp_path / "r.jsonl"
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows.write_text(json.dumps(said) + "\n" + json.dumps({"id": "named", **said}) + "\n" + "{\n")
    shown = show(tmp_path, rows, Wanted()).text
    assert (shown.count("r.jsonl line 1"), shown.count("named"), shown.count("r.jsonl line 2")) == (1, 1, 1)
