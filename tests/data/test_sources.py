# ruff: noqa: E501 (whole messages are compared)
"""JSON lines as people have them: what is wrong with a row is said with file, line and id, and reading goes on."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.data.sources import JsonLines, parse_row
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, Text

GOOD = {
    "id": "good",
    "task": "t",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


def file_of(path: Path, *lines: Any) -> JsonLines:
    """A file of rows: objects are written as JSON, bytes and texts as they are."""
    written = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(written))
    return JsonLines(path)


def said(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"id": "7", "messages": [{"role": role, "content": content}]}


FORM = 'A row is {"messages": [{"role": "user", "content": ...}, ...]}'
ID = ' (id "7")'
BAD: list[tuple[Any, str, str]] = [
    ("{", "", "is not JSON (Expecting property name enclosed in double quotes at character 3). Write one object on a line"),
    ("{} {}", "", "is not JSON (Extra data at character 4). Write one object on a line"),
    (b"\xff\xfe{}", "", "is not JSON ('utf-16-le' codec can't decode"),
    (b'{"id": "\xff"}', "", "is not JSON ('utf-8' codec can't decode byte 0xff in position 8: invalid start byte). Write one object on a line"),
    ("[" * 100_000, "", "is not JSON (maximum recursion depth exceeded"),
    ("[1]", "", f"is a list and not an object. {FORM}"),
    ("null", "", f"is null and not an object. {FORM}"),
    ("3", "", f"is a number and not an object. {FORM}"),
    ({"id": "7"}, ID, f'has no list "messages" with a message in it. {FORM}'),
    ({"id": 7, "messages": "a"}, ID, f'has no list "messages" with a message in it. {FORM}'),
    ({"id": "7", "messages": []}, ID, f'has no list "messages" with a message in it. {FORM}'),
    ({"id": ["7"], "messages": GOOD["messages"]}, "", 'has a list as "id", which is a text. Correct it, or leave it out'),
    ({"id": "7", "task": {}, "messages": GOOD["messages"]}, ID, 'has an object as "task", which is a text. Correct it, or leave it out'),
    ({"id": "7", "messages": ["a"]}, ID, 'a message is a text and not an object. Write {"role": ..., "content": ...}'),
    (said("a", "robot"), ID, 'a message has the role "robot", and roles are system, user, assistant. Correct it'),
    (said("a", None), ID, "a message has the role null, and roles are system, user, assistant. Correct it"),
    (said("a", ["user"]), ID, 'a message has the role ["user"], and roles are system, user, assistant. Correct it'),
    ({"id": "7", "messages": [{"role": "user"}]}, ID, 'a message has no "content". Give a text, or a list of typed parts'),
    (said(None), ID, 'a message has no "content". Give a text, or a list of typed parts'),
    (said({"type": "text"}), ID, 'a message has no "content". Give a text, or a list of typed parts'),
    (said(["a"]), ID, 'a part is a text and not an object. Write {"type": "text", "text": ...}'),
    (said([{"type": "smell", "path": "a"}]), ID, 'a part has the type "smell", and parts are text, image, audio or video. Correct its type'),
    (said([{"text": "a"}]), ID, "a part has the type null, and parts are text, image, audio or video. Correct its type"),
    (said([{"type": ["image"], "path": "a"}]), ID, 'a part has the type ["image"], and parts are text, image, audio or video. Correct its type'),
    (said([{"type": "text"}]), ID, 'a part of type text has no "text". Give its words'),
    (said([{"type": "text", "text": 3}]), ID, 'a part of type text has no "text". Give its words'),
    (said([{"type": "image"}]), ID, 'a part of type image has no "path". Give the path of its file, relative to the data file'),
    (said([{"type": "audio", "path": ""}]), ID, 'a part of type audio has no "path". Give the path of its file, relative to the data file'),
    (said([{"type": "video", "path": 3}]), ID, 'a part of type video has no "path". Give the path of its file, relative to the data file'),
    (said([{"type": "image", "path": "a\0b"}]), ID, "the path of a part of type image holds a zero character. Correct it"),
    (said([{"type": "image", "path": "https://x.y/a.png"}]), ID, "the path of a part of type image is a URL (https://x.y/a.png), and nothing is fetched. Download the file and give its path, relative to the data file"),
    (said([{"type": "image", "path": "data:image/png;base64," + "A" * 1000}]), ID, f"the path of a part of type image is a URL (data:image/png;base64,{'A' * 38}), and nothing is fetched. Download the file and give its path, relative to the data file"),
    (said([{"type": "image", "path": "a.png", "alt": 3}]), ID, 'a part of type image has a number as "alt", which is a text. Correct it, or leave it out'),
    (said([{"type": "audio", "path": "a.wav", "alt": ["bell"]}]), ID, 'a part of type audio has a list as "alt", which is a text. Correct it, or leave it out'),
    (said([{"type": "video", "path": "a.mp4", "alt": False}]), ID, 'a part of type video has a truth value as "alt", which is a text. Correct it, or leave it out'),
    (said([{"type": "image", "path": "a.png", "alt": "\ud83d"}]), ID, "its alt holds half of a character (\\ud83d). Write the whole one"),
    (said("x \ud83d y"), ID, "its text holds half of a character (\\ud83d). Write the whole one"),
    (said([{"type": "text", "text": "\udc00"}]), ID, "its text holds half of a character (\\udc00). Write the whole one"),
    (said([{"type": "image", "path": "\ud800"}]), ID, "its path holds half of a character (\\ud800). Write the whole one"),
    ({**GOOD, "id": "\ud83d"}, ' (id "\\ud83d")', "its id holds half of a character (\\ud83d). Write the whole one"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "id_shown", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_row_is_named_and_reading_goes_on(row: Any, id_shown: str, message: str, tmp_path: Path) -> None:
    source = file_of(tmp_path / "rows.jsonl", GOOD, row, GOOD)
    assert [facts.line for facts in source.facts] == [1, 3]
    (error,) = source.errors
    assert error.where == f"rows.jsonl line 2{id_shown}"
    assert str(error).startswith(f"{error.where}: {message}")
    if not message.startswith("is not JSON"):  # the rest of that one is Python's own
        assert str(error) == f"{error.where}: {message}"
    if id_shown == ID:
        assert error.sample_id == "7"
    assert isinstance(error.sample_id.encode(), bytes)  # half a character would raise, here and in a log


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    row = {
        "id": "ä7",
        "task": "match",
        "more": {"is": "ignored"},
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "image", "path": "img/漢 字.png"}, {"type": "text", "text": "What?"}, {"type": "audio", "path": "/abs/a.wav"}]},
            {"role": "assistant", "content": ""},
        ],
    }  # fmt: skip
    for ascii_only in (True, False):
        source = file_of(tmp_path / "rows.jsonl", json.dumps(row, ensure_ascii=ascii_only))
        sample = source[0]
        assert (sample.id, sample.task, sample.where) == ("ä7", "match", "rows.jsonl line 1")
        assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]
        assert sample.turns[1].parts == (
            MediaItem("image", path=tmp_path / "img/漢 字.png"),
            Text("What?"),
            MediaItem("audio", path=Path("/abs/a.wav")),
        )
        assert sample.turns[2].parts == (Text(""),)
        assert source.facts[0].kinds == {"image", "audio"}


def test_what_a_medium_shows_or_says_is_read_where_it_is_written(tmp_path: Path) -> None:
    alts = [{}, {"alt": None}, {"alt": ""}, {"alt": "un cercle à gauche"}]
    for kind in ("image", "audio", "video"):
        source = file_of(tmp_path / "rows.jsonl", said([{"type": kind, "path": "a", **alt} for alt in alts]))
        items = source[0].media()
        assert [item.alt for item in items] == ["", "", "", "un cercle à gauche"]
        assert all((item.kind, item.path) == (kind, tmp_path / "a") for item in items)


def test_a_sound_or_a_video_may_be_cut(tmp_path: Path) -> None:
    cuts: list[dict[str, Any]] = [
        {},
        {"start": None, "end": None},
        {"start": 1},
        {"end": 2.5},
        {"start": 0.5, "end": 2},
    ]
    for kind in ("audio", "video"):
        source = file_of(tmp_path / "rows.jsonl", said([{"type": kind, "path": "a", **cut} for cut in cuts]))
        found = [(item.start_s, item.end_s) for item in source[0].media()]
        assert found == [(0.0, None), (0.0, None), (1.0, None), (0.0, 2.5), (0.5, 2.0)]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "video", "path": "a", "start": "1:30"},
            'a part of type video has a text as "start", which is a time in seconds. Give a number, or leave it out',
        ),
        (
            {"type": "audio", "path": "a", "end": True},
            'a part of type audio has a truth value as "end", which is a time in seconds. '
            "Give a number, or leave it out",
        ),
        (
            {"type": "audio", "path": "a", "start": 3, "end": 2},
            "a: ends at 2 s and begins at 3 s, so there is nothing in it. Give an end behind its start",
        ),
        (
            {"type": "audio", "path": "a", "start": 10**400},
            "a: begins at inf s, which is no time in it. Give 0 or more seconds",
        ),
        (
            {"type": "image", "path": "a", "end": 1},
            "a: is a picture with a start or an end, and pictures have no time. Remove them",
        ),
    ],
)
def test_a_cut_that_is_none_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        parse_row(said([part]), Path(), "rows.jsonl line 1")
    assert error.value.reason == message
    assert str(error.value).startswith("rows.jsonl line 1")


def test_an_id_and_a_task_are_optional_and_null_is_none(tmp_path: Path) -> None:
    rows = [{"messages": GOOD["messages"]}, {**GOOD, "id": None, "task": None}, {**GOOD, "id": 7, "task": 3}]
    source = file_of(tmp_path / "rows.jsonl", *rows)
    assert [(s.id, s.task) for s in source] == [("rows.jsonl line 1", ""), ("rows.jsonl line 2", ""), ("7", "3")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("last", [True, False], ids=["closed", "open end"])
def test_blank_lines_marks_and_line_ends_change_nothing(end: bytes, mark: bytes, last: bool, tmp_path: Path) -> None:
    rows = [json.dumps({**GOOD, "id": str(i)}).encode() for i in range(3)]
    lines = [rows[0], b"", b"  \t", rows[1], b"", rows[2]]
    (tmp_path / "rows.jsonl").write_bytes(mark + end.join(lines) + (end if last else b""))
    source = JsonLines(tmp_path / "rows.jsonl")
    assert [sample.id for sample in source] == ["0", "1", "2"]
    assert [facts.line for facts in source.facts] == [1, 4, 6]
    assert source.errors == []
    assert source[2].id == "2"
    assert len(source) == 3


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=20).filter(any))
def test_good_rows_are_found_among_bad_ones(tmp_path_factory: pytest.TempPathFactory, good: list[bool]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    source = file_of(path, *({**GOOD, "id": str(i)} if ok else "broken {" for i, ok in enumerate(good)))
    assert [sample.id for sample in source] == [str(i) for i, ok in enumerate(good) if ok]
    assert len(source.errors) == good.count(False)
    assert [error.where for error in source.errors] == [
        f"rows.jsonl line {i + 1}" for i, ok in enumerate(good) if not ok
    ]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "task", "messages", "role", "content", "type", "text", "path", "alt", "start", "end"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(ANY)
def test_any_json_is_a_row_or_is_refused(row: Any) -> None:
    with contextlib.suppress(DataError):  # anything else that is raised would fail the test
        assert parse_row(row, Path(), "x line 1").turns


def test_a_file_that_is_no_data_is_refused(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            JsonLines(path)
        return str(error.value)

    none, empty, text = tmp_path / "none.jsonl", tmp_path / "empty.jsonl", tmp_path / "text.jsonl"
    assert refusal(none) == f"{none}: not readable (No such file or directory). Give an existing file of JSON lines"
    assert refusal(tmp_path) == f"{tmp_path}: is not a regular file. Give a file of JSON lines"
    empty.write_text("\n\n")
    assert refusal(empty) == f"{empty}: has no row that can be read, so there is nothing to learn from. It is empty."
    text.write_text("Dear diary,\n")
    assert refusal(text) == (
        f"{text}: has no row that can be read, so there is nothing to learn from. The first row: is not JSON "
        "(Expecting value at character 1). Write one object on a line"
    )
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"{tmp_path / 'pipe'}: is not a regular file. Give a file of JSON lines"


def test_a_file_that_goes_away_is_said_so(tmp_path: Path) -> None:
    source = file_of(tmp_path / "rows.jsonl", GOOD)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"rows.jsonl: not readable \(No such file or directory\)"):
        source[0]
