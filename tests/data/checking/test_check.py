"""What is wrong with data is found, on the right lines, and nothing else is told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from avlm.data.checking.check import CheckReport, check_data
from avlm.data.checking.duplicates import band_pairs, equal_groups, first_of_each, groups_of, near_pairs
from avlm.data.checking.histogram import histogram
from avlm.data.checking.problems import KINDS, Findings, listed, title_of
from avlm.data.checking.sketch import plain, resemblance, same_picture, same_sound, shingles, text_bands
from avlm.data.sources import open_source

Row = dict[str, Any]


def row(question: str, answer: str, *media: tuple[str, str], name: str = "") -> Row:
    parts = [{"type": kind, "path": path} for kind, path in media]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages} | ({"id": name} if name else {})


def scene(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A picture with large soft shapes, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def tune(seed: int, seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    """A melody of its own, with a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    notes = np.repeat(rng.choice([220, 277, 330, 415, 494, 660, 880], 8), -(-len(t) // 8))[: len(t)]
    wave = 0.3 * np.sin(2 * np.pi * notes * t) * np.interp(t % 0.125, [0, 0.02, 0.125], [0, 1, 0.1])
    found: np.ndarray = (wave + 0.003 * rng.standard_normal(len(t))).astype(np.float32)
    return found


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write rows, or whole lines, with four pictures and four sounds beside them."""
    for i in range(4):
        scene(i, (96 + 8 * i, 72 + 6 * i)).save(tmp_path / f"p{i}.png")
        soundfile.write(tmp_path / f"s{i}.wav", tune(i, 0.8 + 0.1 * i), 16_000)

    def write(rows: list[Row | bytes], name: str = "rows.jsonl") -> Path:
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return tmp_path / name

    return write


SPIDER = "the spider that the old man on the hill by the sea found in the pocket of his coat"
GOOD = [
    row("What is in the first picture?", "a hill", ("image", "p0.png"), name="a"),
    row("What is played here?", "a tune", ("audio", "s0.wav"), name="b"),
    row(f"How many legs has {SPIDER}?", "eight", name="c"),
    row("Do they fit together?", "no", ("image", "p1.png"), ("audio", "s1.wav"), name="d"),
]


def check(path: Path, **settings: Any) -> CheckReport:
    return check_data(open_source(str(path)), **{"base": str(path.parent), **settings})


def found(report: CheckReport) -> dict[str, list[str]]:
    """Kinds of problems, and the lines that they are on."""
    return {f"{problem.severity}: {problem.title}": problem.places for problem in report.problems}


def test_good_rows_have_no_problem(written: Callable[..., Path]) -> None:
    report = check(written(GOOD))
    assert report.fine() and report.problems == []
    assert (report.rows, report.media) == (4, {"image": 2, "audio": 2})


LINE = "rows.jsonl line 5"
PLANTED = {
    "not JSON": (b"{", "error: is not JSON (Expecting property name enclosed in double quotes at character N)"),
    "not UTF-8": (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "error: is not text in UTF-8"),
    "in no form": ({"foo": 1}, 'error: has no list "messages" with a message in it'),
    "a role that is none": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        'error: a message has the role "narrator", and roles are system, user, assistant',
    ),
    "missing": (row("What?", "no", ("image", "no.png")), "error: there is no such file"),
    "broken": (
        row("What?", "no", ("image", "broken.png")),
        "error: is truncated: its end chunk is missing",
    ),
    "silent": (
        row("What?", "no", ("audio", "silent.wav")),
        "error: is silent (its loudest sample is below N of full scale), so there is nothing to hear",
    ),
    "of one colour": (row("What?", "no", ("image", "flat.png")), "warning: is a picture of one colour"),
    "spelled": (row("An <image> here", "no"), "error: a text spells <image>"),
    "no answer": ({"messages": [{"role": "user", "content": "well?"}]}, "error: no answer"),
    "empty": (row("And?", " "), "warning: an empty answer"),
    "unasked": (
        {"messages": [{"role": "assistant", "content": "by the way"}]},
        "warning: answers without a question",
    ),
    "empty question": (row(" ", "no"), "warning: an empty question"),
    "twice the user": (
        {"messages": [{"role": "user", "content": c} for c in "ab"] + [{"role": "assistant", "content": "c"}]},
        "warning: two turns of the user in a row",
    ),
    "late system": (
        {"messages": [*row("Where?", "there")["messages"], {"role": "system", "content": "Be kind."}]},
        "warning: a system turn that is not the first",
    ),
    "answer before": (
        {"messages": [{"role": "assistant", "content": "Hello"}, *row("Where?", "there")["messages"]]},
        "warning: the first to speak is the assistant",
    ),
    "unanswered": (
        {"messages": [*row("Where?", "there")["messages"], {"role": "user", "content": "And then?"}]},
        "note: the last question has no answer",
    ),
    "medium in an answer": (
        {"messages": [
            {"role": "user", "content": "Draw."},
            {"role": "assistant", "content": [{"type": "image", "path": "p3.png"}]},
        ]},
        "error: a medium in an answer",
    ),
    "lost letters": (row("caf\ufffd?", "no"), "warning: letters that were lost"),
    "same id": (row("Something new?", "no", name="b"), "warning: an id that another row has"),
    "same row": (GOOD[3] | {"id": "new"}, "warning: a row that is there twice"),
    "same file": (row("Something new?", "no", ("image", "copy.png")), "note: pictures that are the same"),
    "recompressed": (
        row("Something new?", "no", ("image", "small.jpg")),
        "note: pictures that are different files and look alike",
    ),
    "resampled": (
        row("Something new?", "no", ("audio", "other.ogg")),
        "note: sounds that are different files and sound alike",
    ),
    "nearly the same": (
        row(f"How many legs had {SPIDER}?", "eight"),
        "note: a row that is nearly there twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in PLANTED.items()])
def test_one_bad_row_is_one_finding(
    written: Callable[..., Path], case: tuple[Row | bytes, str], tmp_path: Path
) -> None:
    bad, expected = case
    (tmp_path / "broken.png").write_bytes((tmp_path / "p0.png").read_bytes()[:300])
    (tmp_path / "copy.png").write_bytes((tmp_path / "p0.png").read_bytes())
    scene(0).resize((64, 48)).save(tmp_path / "small.jpg", quality=60)
    Image.new("RGB", (40, 30), (9, 99, 9)).save(tmp_path / "flat.png")
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000, np.float32), 16_000)
    soundfile.write(tmp_path / "other.ogg", 0.3 * tune(0, 0.8), 16_000)
    report = check(written([*GOOD, bad]))
    told = found(report)
    assert list(told) == [expected]
    (place,) = told[expected]
    assert LINE in place
    assert report.fine() == expected.startswith("note")
    assert str(tmp_path) not in json.dumps(report.as_dict())


def test_one_answer_against_several_worse_ones_is_not_the_same_row(written: Callable[..., Path]) -> None:
    pairs = [GOOD[2] | {"id": str(i), "rejected": worse} for i, worse in enumerate(("six", "none at all"))]
    assert "warning: a row that is there twice" not in found(check(written(pairs)))
    again = found(check(written([*pairs, pairs[0] | {"id": "2"}])))
    assert again["warning: a row that is there twice"] == ["rows.jsonl line 3 (as rows.jsonl line 1)"]


def test_a_mark_without_its_file_is_found_in_llavas_form(written: Callable[..., Path]) -> None:
    def talk(text: str, **media: Any) -> Row:
        return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}], **media}

    path = written([talk("<image>What?", image="p0.png"), talk("<image><image>Both?", image="p1.png")])
    assert found(check(path)) == {
        "error: the text has N <image> marks and the row lists N image file": ["rows.jsonl line 2"]
    }


def test_a_medium_in_many_rows_is_told(written: Callable[..., Path]) -> None:
    rows = [row(f"Is it number {i} of {7 * i}?", f"{i * i}", ("image", "p0.png")) for i in range(30)]
    told = found(check(written([*rows, *GOOD[1:]])))
    (place,) = told["note: a medium that many rows share"]
    assert place == "p0.png: rows.jsonl line 1, 2, 3 and 27 more"


def test_held_out_rows_that_are_trained_on_are_told(written: Callable[..., Path]) -> None:
    train = written(GOOD)
    asked_again = row("What is in the first picture?", "a lake", ("image", "p0.png"), name="y")
    fresh = row("What is in the last picture?", "a lake", ("image", "p3.png"), name="z")
    held_out = open_source(str(written([GOOD[1] | {"id": "x"}, asked_again, fresh], "eval.jsonl")))
    told = found(check(train, against=held_out))
    assert told == {
        "warning: a held-out row that is also trained on": ["eval.jsonl line 1 (as rows.jsonl line 2)"],
        "warning: a held-out question that is trained on with another answer": [
            "eval.jsonl line 2 (as rows.jsonl line 1)"
        ],
        "warning: held-out pictures that are also trained on": [
            "p0.png (eval.jsonl line 2) (as p0.png (rows.jsonl line 1))"
        ],
        "warning: held-out sounds that are also trained on": [
            "s0.wav (eval.jsonl line 1) (as s0.wav (rows.jsonl line 2))"
        ],
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_finds_the_same(written: Callable[..., Path], workers: int, tmp_path: Path) -> None:
    rows = []
    for i in range(90):
        scene(100 + i).save(tmp_path / f"q{i}.png")
        rows.append(row(f"What is shown in number {i * i}?", f"thing {i % 7}", ("image", f"q{i}.png"), name=f"r{i}"))
    rows[70] = rows[3] | {"id": "again"}
    rows[80] = row("And here?", "nothing", ("image", "gone.png"), name="r80")
    report = check(written(rows), workers=workers)
    assert found(report) == {
        "error: there is no such file": ["rows.jsonl line 81"],
        "warning: a row that is there twice": ["rows.jsonl line 71 (as rows.jsonl line 4)"],
    }
    sizes = next(each for each in report.histograms if "pictures" in each.name)
    assert (sizes.count, sizes.least, sizes.most) == (88, 96, 96)


def test_progress_is_told_to_the_end(written: Callable[..., Path]) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    check(written(GOOD), progress=lambda what, done, total: told.setdefault(what, []).append((done, total)))
    assert told["rows of rows.jsonl"][-1] == (4, 4)
    assert told["media decoded"][-1] == (4, 4)


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("reason", "name", "title"),
    [
        ("a.png: has 700 bytes, and at most 512 are read. Cut it", "a.png", "has N bytes, and at most N are read"),
        ('has no list "messages" with a message in it. A row is {}', "", 'has no list "messages" with a message in it'),
        ('a message has the role "Old Joe", and so on. Correct it', "", 'a message has the role "\u2026", and so on'),
        ("the text has 2 <image> marks. Add", "", "the text has N <image> marks"),
    ],
)  # fmt: skip
def test_what_messages_have_in_common(reason: str, name: str, title: str) -> None:
    assert title_of(reason, name) == title


def test_one_and_two_marks_are_one_kind_and_kinds_are_not_without_end() -> None:
    findings = Findings()
    findings.add_message("line 1", "has 1 mark. Add one")
    findings.add_message("line 2", "has 2 marks. Add one")
    assert [(p.title, p.count) for p in findings.problems()] == [("has N mark", 2)]
    for i in range(2 * KINDS):
        findings.add_message(f"line {i}", f"kind {chr(0x4E00 + i)}")
    assert len(findings.problems()) <= KINDS + 1
    assert sum(p.count for p in findings.problems()) == 2 + 2 * KINDS


def test_places_are_named_shortly() -> None:
    places = [f"train.jsonl line {i}" for i in (3, 17, 254, 300)]
    assert listed(places, 3) == "train.jsonl line 3, 17, 254 and 1 more"
    assert listed(["a.jsonl line 3", "b.jsonl line 4"], 3) == "a.jsonl line 3, b.jsonl line 4"


def slow_resemblance(one: str, other: str) -> float:
    a, b = ({text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in (plain(one), plain(other)))
    return len(a & b) / len(a | b)


@given(st.text("ab c\u00e9", min_size=5, max_size=60), st.text("ab c\u00e9", min_size=5, max_size=60))
def test_resemblance_is_that_of_sets_of_letters(one: str, other: str) -> None:
    if min(len(plain(one)), len(plain(other))) >= 5:
        assert resemblance(one, other) == pytest.approx(slow_resemblance(one, other))


def test_near_texts_share_a_band_and_others_do_not() -> None:
    words = [*SPIDER.split(), "seven", "quick", "brown", "foxes"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.permutation(words * 3)) for _ in range(200)]
    nears = [text.replace("seven", "eleven", 1) for text in texts]
    assert min(slow_resemblance(a, b) for a, b in zip(texts, nears, strict=True)) > 0.9
    bands = np.array([text_bands(text) for text in [*texts, *nears]])
    pairs = {tuple(pair) for pair in band_pairs(bands, np.zeros(400, np.uint64)).tolist()}
    assert sum((i, i + 200) in pairs for i in range(200)) >= 198
    apart = np.arange(400, dtype=np.uint64) + np.uint64(1)
    assert len(band_pairs(bands, apart)) == 0
    assert len(shingles("")) == 1  # nothing is said in one way only


def test_near_sketches_are_those_of_a_slow_loop() -> None:
    rng = np.random.default_rng(1)
    sketches = rng.integers(0, 2**63, (300, 2), dtype=np.uint64)
    for i in range(0, 200, 2):
        sketches[i + 1] = sketches[i]
        for bit in rng.choice(128, rng.integers(0, 8), replace=False):
            sketches[i + 1, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    slow = {
        (i, j)
        for i, j in itertools.combinations(range(300), 2)
        if sum(int(a ^ b).bit_count() for a, b in zip(sketches[i].tolist(), sketches[j].tolist(), strict=True)) <= 7
    }
    assert {tuple(pair) for pair in near_pairs(sketches, 7).tolist()} == slow
    assert len(slow) >= 100


@given(st.lists(st.integers(0, 6), max_size=30))
def test_equal_groups_are_those_of_a_dictionary(values: list[int]) -> None:
    slow: dict[int, list[int]] = {}
    for i, value in enumerate(values):
        slow.setdefault(value, []).append(i)
    array = np.array(values, np.uint64)
    assert [g.tolist() for g in equal_groups(array)] == [g for v, g in slow.items() if v and len(g) > 1]
    firsts = sorted([g[0] for v, g in slow.items() if v] + slow.get(0, []))
    assert first_of_each(array).tolist() == firsts


def test_what_hangs_together_is_one_group() -> None:
    assert groups_of([(3, 5), (1, 2), (5, 9), (9, 3)]) == [[1, 2], [3, 5, 9]]


def test_pictures_are_the_same_after_compression_and_not_with_another_thing_in_them(tmp_path: Path) -> None:
    one = scene(1, (400, 300))
    one.resize((200, 150)).save(tmp_path / "small.jpg", quality=50)
    with Image.open(tmp_path / "small.jpg") as small:
        assert same_picture(np.asarray(one), np.asarray(small))
    other = one.copy()
    other.paste((255, 0, 0), (100, 80, 220, 200))
    assert not same_picture(np.asarray(one), np.asarray(other))
    assert not same_picture(np.asarray(one), np.asarray(scene(2, (400, 300))))
    assert not same_picture(np.asarray(one), np.asarray(one.crop((0, 0, 300, 300))))


def test_sounds_are_the_same_at_another_level_and_two_draws_of_noise_are_not(tmp_path: Path) -> None:
    one = tune(3, 2.0)
    soundfile.write(tmp_path / "quiet.mp3", 0.2 * one, 16_000, format="MP3")
    assert same_sound(one, soundfile.read(tmp_path / "quiet.mp3", dtype="float32")[0])
    assert not same_sound(one, tune(4, 2.0))
    noise = [np.random.default_rng(i).standard_normal(32_000).astype(np.float32) for i in range(2)]
    assert same_sound(noise[0], noise[0] * 0.5) and not same_sound(*noise)


@given(st.lists(st.one_of(st.floats(0, 1e6), st.floats(0, 1)).map(lambda x: round(x, 4)), min_size=1, max_size=50))
def test_every_value_is_in_one_bin(values: list[float]) -> None:
    made = histogram("x", "s", np.array(values))
    assert made is not None and sum(count for _, _, count in made.bins) == len(values)
    assert made.bins[0][0] <= min(values) and max(values) <= made.bins[-1][1]
    assert len(made.bins) <= 14
    for low, high, count in made.bins[:-1]:
        assert count == sum(low <= value < high for value in values)
