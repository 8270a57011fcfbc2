"""The page of a run: that it says what the files say, whatever state they are in, and does nothing else."""

import base64
import json
import re
import wave
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from avlm.config.stage import PARTS
from avlm.data.showing.page import POLICY
from avlm.errors import ConfigError
from avlm.eval.metrics import normalise
from avlm.training import charts, report
from avlm.training.charts import Band, line_chart
from avlm.training.report import write_report

FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl", "report.json")
VOID = {"meta", "br", "img"}
DRAWN = {"rect", "line", "path"}


class Page(HTMLParser):
    """Reads a page the way a browser does, and insists that every element is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if dict(attrs).get("role") == "region":
            self._rows = self.tables.setdefault(str(dict(attrs)["aria-label"]), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self._rows[-1][-1] += data

    def attributes(self, *names: str) -> list[str]:
        return [str(v) for _, attrs in self.elements for k, v in attrs.items() if k in names]


def step(number: int, stage: str, stage_step: int, **changes: Any) -> dict[str, Any]:
    made = {"step": number, "stage": stage, "stage_step": stage_step, "loss": 4.0 / number, "lr": 0.001 * number}
    made |= {"grad_norm": 1.5, "tokens": 1000 + number, "target_tokens": 100, "samples": 8, "rows": 1}
    return made | {"seconds": 0.5, "data_seconds": 0.125, "tokens_per_s": 2000.0} | changes


def answer(stage: str, when: str, text: str, at: int, media: list[dict[str, str]], **changes: Any) -> dict[str, Any]:
    made = {"step": at, "stage": stage, "when": when, "id": "7", "task": "match", "prompt": "What is it?"}
    return made | {"media": media, "expected": "a blue star", "answer": text} | changes


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small run of two stages, done and measured, with a picture and a sound."""
    Image.new("RGB", (16, 8), "navy").save(tmp_path / "blue.png")
    with wave.open(str(tmp_path / "star.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(1600))
    media = [
        {"type": "image", "path": str(tmp_path / "blue.png")},
        {"type": "audio", "path": str(tmp_path / "star.wav")},
    ]
    out = tmp_path / "run"
    out.mkdir()
    stages = [
        {"name": "align", "train": {"vision_connector": {"lr": 0.002, "lora": None}}, "builds": None, "steps": 900},
        {"name": "joint", "train": {"language": {"lr": 0.0005, "lora": {"rank": 16}}}, "builds": None, "steps": 2},
    ]
    model = {"vision": {"image_size_px": 64}, "audio": None}
    config = {
        "recipe": "tiny",
        "seed": 41,
        "model": model,
        "stages": stages,
        "max_steps": 3,
        "data": {"eval": "e.jsonl"},
    }
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    lines(
        out / "metrics.jsonl",
        [step(i + 1, "align", i + 1) for i in range(3)] + [step(i + 4, "joint", i + 1) for i in range(2)],
    )
    told = [("align", "before", "noise", 0), ("align", "after", "A blue star.", 3), ("joint", "during", "", 4)]
    lines(out / "samples.jsonl", [answer(stage, when, text, at, media) for stage, when, text, at in told])
    bad = {"step": 2, "stage": "align", "sample_id": "9", "where": "train.jsonl line 9", "reason": "is cut off"}
    lines(out / "quarantine.jsonl", [bad])
    scores = {
        "accuracy": {"match": 0.875},
        "guess": {"match": 0.5},
        "swapped": {"match": {"image": 0.25, "audio": 0.375}},
    }
    facts = {"recipe": "tiny", "seed": 41, "seconds": 754.4, "parameters": 3_712_345, "wer": {"asr": 0.0625}}
    (out / "report.json").write_text(json.dumps(facts | scores))
    return out


def test_the_numbers_are_those_of_the_files(run: Path) -> None:
    page = Page(write_report(run))
    assert page.tables["Scores by task"] == [
        ["Task", "Accuracy", "Guessing", "Pictures swapped", "Sounds swapped", "Word errors"],
        ["match", "87.5 %", "50.0 %", "25.0 %", "37.5 %", "\u2013"],
        ["asr", "\u2013", "\u2013", "\u2013", "\u2013", "6.2 %"],
    ]
    assert page.tables["What trained in each stage"] == [
        ["Stage", "vision", "vision connector", "language", "Steps", "Time", "Tokens", "First loss", "Last loss"],
        ["1\xa0align", "frozen\u2013", "0.002", "frozen\u2013", "3", "1.5 s", "3,006", "4", "1.333"],
        ["2\xa0joint", "frozen\u2013", "frozen\u2013", "0.0005LoRA rank 16", "2", "1.0 s", "2,009", "1", "0.8"],
        ["All", "", "", "", "5", "2.5 s", "5,015", "", ""],
    ]
    for fact in (
        "Seed41",
        "12 min 34 s",
        "3,712,345",
        "5 of 5",
        "5,015",
        "Samples40",
        "highest 0.005",
        "25.0 % of all time",
    ):
        assert fact in page.text
    assert page.tables["Samples that were left out"][1] == ["2", "align", "9", "train.jsonl line 9", "is cut off"]


def test_answers_are_marked_right_or_wrong_in_words_and_signs(run: Path) -> None:
    page = Page(write_report(run))
    assert page.tables["Answers to 7"] == [
        ["Stage", "Before", "During", "After"],
        ["align", "\u2717wrong:noise", "", "\u2713right:A blue star."],
        ["joint", "", "\u2717wrong:(nothing)", ""],
    ]
    assert page.tables["Right answers by stage"][1:] == [["align", "0 of 1", "", "1 of 1"], ["joint", "", "0 of 1", ""]]


@pytest.mark.parametrize("text", ["A  blue, star!", "\uff22lue", "snake_case", "Straße", "", "naïve - yes", "e.g. 1,5"])
def test_right_means_what_the_scores_mean(text: str) -> None:
    assert " ".join(report._words(text)) == normalise(text)


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """Killed in the middle of a letter of two bytes."""
    whole = path.read_bytes()
    opened = b': ["' if path.suffix == ".yaml" else b'{"step": 9, "reason": "'
    path.write_bytes((whole if path.suffix != ".json" else whole[:-20]) + opened + "\u00e9".encode()[:1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [missing, empty, cut])
def test_a_file_that_is_missing_empty_or_cut_off_is_told_in_its_place(
    run: Path, name: str, damage: Callable[[Path], None]
) -> None:
    whole = Page(write_report(run))
    damage(run / name)
    page = Page(write_report(run))
    if (name, damage) == ("quarantine.jsonl", empty):
        assert "No sample was left out." in page.text
    else:
        assert re.search(rf"{name}(:? 1 line is cut off| is missing\.| is empty)", page.text)
    if name.endswith(".jsonl") and damage is cut:
        assert page.tables == whole.tables


def test_a_directory_without_any_file_still_has_its_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert [page.text.count(f"{name} is missing.") for name in FILES] == [1, 1, 1, 1, 1]


def test_a_run_without_a_directory_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "none"
    with pytest.raises(ConfigError) as error:
        write_report(out)
    assert str(error.value) == f"{out}: there is no such directory, so there is no run to report on. Check the path"


def test_what_comes_from_data_is_shown_and_never_run(run: Path) -> None:
    evil = '</table><script>alert("1")</script><img src=//a.example onerror=x()>\ud800\x1b\u2028'
    media = [{"type": evil, "path": evil}, {"type": "image", "path": evil + ".png"}]
    texts = {"id": evil, "task": evil, "prompt": evil, "expected": evil}
    row = answer(evil, "after", evil, 5, media, **texts)
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    (run / "metrics.jsonl").write_text(json.dumps(step(1, evil, 1)) + "\n")
    bad = {"step": 1, "stage": evil, "sample_id": evil, "where": evil, "reason": evil}
    (run / "quarantine.jsonl").write_text(json.dumps(bad) + "\n")
    (run / "report.json").write_text(json.dumps({"accuracy": {evil: 1.0}, "parameters": {evil: 1}, "seconds": evil}))
    (run / "config.yaml").write_text(yaml.safe_dump({"recipe": evil, "seed": evil, "stages": [{"name": evil}]}))
    page = Page(write_report(run))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "link", "img"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.text.count('<script>alert("1")</script>') >= 15
    assert "\u241b" in page.text  # a control character is shown by its sign


def test_the_page_asks_nobody_for_anything(run: Path) -> None:
    page = Page(write_report(run))
    assert not re.search(r"https?:|@import|url\(|//[a-z]", page.source.replace("base64,", ""))
    assert {value.split(":")[0].split("#")[0] for value in page.attributes("src", "href")} == {"data", ""}
    assert any(attrs.get("content") == POLICY for _, attrs in page.elements)


def test_media_are_in_the_page(run: Path) -> None:
    page = Page(write_report(run))
    picture, sound = (base64.b64encode((run.parent / name).read_bytes()).decode() for name in ("blue.png", "star.wav"))
    assert page.attributes("src") == [f"data:image/png;base64,{picture}", f"data:audio/wav;base64,{sound}"]
    image = next(attrs for tag, attrs in page.elements if tag == "img")
    assert (image["width"], image["height"], image["class"]) == ("96", "48", "pixels")
    assert image["alt"] == 'image "blue.png" of prompt 7'


def test_media_that_do_not_fit_are_named_with_the_reason(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.parent
    (folder / "long.wav").write_bytes(bytes(charts.MAX_FILE + 1))
    (folder / "notes.txt").write_text("no sound")
    names = [
        ("audio", "long.wav"),
        ("audio", "gone.wav"),
        ("audio", "notes.txt"),
        ("audio", "star.wav"),
        ("image", "blue.png"),
    ]
    media = [{"type": kind, "path": str(folder / name)} for kind, name in names]
    lines(run / "samples.jsonl", [answer("align", "after", "yes", 3, media)])
    monkeypatch.setattr(charts, "MAX_EMBEDDED", 2000)  # less than the sound takes, more than the picture
    page = Page(write_report(run))
    assert [src.split(";")[0] for src in page.attributes("src")] == ["data:image/png"]
    for name, reason in [
        ("long.wav", "2.0 MB, more than the 2 MB that one file may take"),
        ("gone.wav", "the file is missing"),
        ("notes.txt", "browsers do not show such files"),
        ("star.wav", "no room is left in the page's 0.002 MB of media"),
    ]:
        assert f"{folder / name} ({reason})" in page.text
    assert "4 media files are only named" in page.text


def test_a_picture_of_any_shape_fits_its_place(run: Path) -> None:
    for name, size in (("wide.png", (400, 100)), ("line.png", (1, 500))):
        Image.new("RGB", size).save(run.parent / name)
    (run.parent / "broken.png").write_bytes(b"no picture")
    media = [{"type": "image", "path": str(run.parent / name)} for name in ("wide.png", "line.png", "broken.png")]
    lines(run / "samples.jsonl", [answer("align", "after", "yes", 3, media)])
    images = [attrs for tag, attrs in Page(write_report(run)).elements if tag == "img"]
    assert [(i["width"], i["height"]) for i in images] == [("96", "24"), ("1", "96")]
    assert not any("class" in i for i in images)
    assert f"{run.parent / 'broken.png'} (the file cannot be read)" in Page(write_report(run)).text


def test_only_the_first_fifty_of_the_quarantine_are_listed(run: Path) -> None:
    lines(run / "quarantine.jsonl", [{"step": i, "stage": "align", "reason": f"reason {i}"} for i in range(1234)])
    page = Page(write_report(run))
    assert "1,234 samples were left out" in page.text
    assert [row[0] for row in page.tables["Samples that were left out"][1:]] == [str(i) for i in range(50)]


def test_an_unfinished_run_says_where_it_stands(run: Path) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:2]))
    page = Page(write_report(run))
    assert "Not finished: this page was made at step 2, in stage align." in page.text
    assert [row[4] for row in page.tables["What trained in each stage"][1:]] == ["2 of 3", "0 of 2", "2"]


def test_a_stage_that_builds_a_part_marks_its_helpers(run: Path) -> None:
    parts = {part: {"lr": 0.002, "lora": None} for part in PARTS}
    stage = {"name": "eyes", "builds": "vision", "steps": 4, "train": {p: parts[p] for p in ("vision", "language")}}
    config = {"recipe": "tiny", "model": {"vision": {"x": 1}, "audio": {"x": 1}}, "stages": [stage]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    row = Page(write_report(run)).tables["What trained in each stage"][1]
    assert row[:6] == ["1\xa0eyesbuilds vision", "0.002", "frozen\u2013", "not there", "not there", "0.002helper"]


def test_a_loss_that_is_no_number_leaves_a_gap_and_is_counted(run: Path) -> None:
    rows = [step(i + 1, "align", i + 1, loss=float("nan") if i == 10 else 2.0) for i in range(20)]
    lines(run / "metrics.jsonl", rows)
    assert "The loss of 1 steps is not a finite number" in Page(write_report(run)).text
    chart = line_chart([r["step"] for r in rows], [r["loss"] for r in rows], [], label="", axis="auto")
    assert [len(d.split("L")) for d in re.findall(r'class="raw" d="M(.*?)M(.*?)"', chart)[0]] == [10, 9]


def test_a_long_run_makes_a_small_page_and_keeps_its_extremes(run: Path) -> None:
    lines(run / "metrics.jsonl", [step(i + 1, "align", i + 1, loss=2.0) for i in range(8000)])
    assert write_report(run).stat().st_size < 150_000
    values = [1.0] * 20_000
    values[777], values[12_345] = 0.25, 1.75
    chart = line_chart(range(1, 20_001), values, [Band(1, "a", 1, 20_000)], label="", axis="zero")
    raw = re.search(r'class="raw" d="(.*?)"', chart)
    assert raw is not None
    heights = [float(y) for y in re.findall(r" ([\d.]+)", raw[1])]
    assert (min(heights), max(heights)) == (12.5, 87.5)  # on an axis from 0 to 2


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        pytest.param([5.0, 0.2], ["0.2", "0.5", "1", "2", "5"], id="25 times: logarithmic, 1 2 5"),
        pytest.param([1e4, 0.1], ["0.1", "1", "10", "100", "1,000", "10,000"], id="five decades: powers of ten"),
        pytest.param([3.0, 1.0], ["0", "1", "2", "3"], id="3 times: from zero"),
        pytest.param([0.0], ["0", "0.5", "1"], id="nothing but zero"),
        pytest.param([float("nan")], ["0", "0.5", "1"], id="no number at all"),
        pytest.param([-1.0, 1.0], ["-1", "-0.5", "0", "0.5", "1"], id="below zero"),
    ],
)
def test_the_value_axis(values: list[float], ticks: list[str]) -> None:
    chart = line_chart(range(1, len(values) + 1), values, [], label="", axis="auto")
    assert re.findall(r'text-anchor="end">(.*?)<', chart) == ticks


def test_headings_go_down_in_order_and_every_table_names_its_heads(run: Path) -> None:
    page = Page(write_report(run))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all("scope" in attrs for tag, attrs in page.elements if tag == "th")
    assert all(
        attrs.get("aria-label") or attrs.get("aria-hidden") or "viewbox" in attrs
        for t, attrs in page.elements
        if t == "svg"
    )


def test_a_line_that_nearly_vanishes_is_drawn() -> None:
    """On a logarithmic scale, behind values next to which it is nothing."""
    values = [20.0] * 12 + [1e-18] * 12
    chart = line_chart(range(1, 25), values, [], label="", axis="auto")
    assert "nan" not in chart and 'class="smooth"' in chart
