# ruff: noqa: E501 (whole messages are compared)
"""JSON lines as people have them: what is wrong with a row is said with file, line and id, and reading goes on."""

from __future__ import annotations

import base64
import contextlib
import errno
import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.data import DataConfig, DataSet
from avlm.data.decoding.files import LIMITS, read
from avlm.data.forms.parse import Folders, parse_row
from avlm.data.sources import JsonLines, open_source
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, Text, Turn

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
    assert list(source.lines) == [1, 3]
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
        parse_row(said([part]), Folders(), "rows.jsonl line 1")
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
    assert list(source.lines) == [1, 4, 6]
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
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "task", "messages", "role", "content", "type", "text", "path", "alt", "start", "end", "url", "base64", "images", "tools", "system", "ended", "query", "response", "history"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(ANY)
def test_any_json_is_a_row_or_is_refused(row: Any) -> None:
    with contextlib.suppress(DataError):  # anything else that is raised would fail the test
        assert parse_row(row, Folders(), "x line 1").turns


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


# ---------------------------------------------------------------- other forms

VITA = {
    "set": "sharegpt4",
    "id": "000000000164",
    "conversations": [
        {"from": "human", "value": "<image>\n<audio>\n"},
        {"from": "gpt", "value": "This is a well-organized kitchen."},
    ],
    "image": "coco/train2017/000000000164.jpg",
    "audio": ["wavs/f61c.wav"],
}
"""The example of VITA's README, with a shorter answer."""


def listed(path: Path, *rows: Any, **data: Any) -> JsonLines:
    path.write_text(json.dumps(rows, indent=2))
    return JsonLines(path, DataConfig(**data))


def chat(*values: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "7", "conversations": turns, **more}


def test_vitas_own_example_is_read_as_it_is(tmp_path: Path) -> None:
    sets = {"sharegpt4": DataSet(folder="/pictures", sounds="/sounds/audio")}
    source = listed(tmp_path / "vita.json", VITA, VITA, sets=sets)
    assert len(source) == 2 and source.errors == []
    sample = source[1]
    assert (sample.id, sample.where) == ("000000000164", "vita.json row 2")
    assert sample.turns == (
        Turn(
            "user",
            (
                MediaItem("image", path=Path("/pictures/coco/train2017/000000000164.jpg")),
                Text("\n"),
                MediaItem("audio", path=Path("/sounds/audio/wavs/f61c.wav")),
                Text("\n"),
            ),
            verbatim=True,
        ),
        Turn("assistant", (Text("This is a well-organized kitchen."),), verbatim=True),
    )
    assert source.facts[0].kinds == {"image", "audio"} and source.facts[0].told == frozenset()


def test_a_set_is_looked_for_in_its_folder_and_all_else_beside_the_file(tmp_path: Path) -> None:
    def paths(**data: Any) -> list[str]:
        media = listed(tmp_path / "vita.json", VITA, **data)[0].media()
        return [str(item.path).replace(str(tmp_path), "TMP") for item in media]

    image, sound = "coco/train2017/000000000164.jpg", "wavs/f61c.wav"
    assert paths() == [f"TMP/{image}", f"TMP/{sound}"]
    assert paths(folder="/d") == [f"/d/{image}", f"/d/{sound}"]
    assert paths(sets={"sharegpt4": "/s"}) == [f"/s/{image}", f"/s/{sound}"]
    assert paths(sets={"sharegpt4": {"folder": "/s"}}, folder="/d") == [f"/s/{image}", f"/s/{sound}"]
    assert paths(sets={"sharegpt4": {"sounds": "/a"}}, folder="/d") == [f"/d/{image}", f"/a/{sound}"]
    assert paths(sets={"other": "/s"}) == [f"TMP/{image}", f"TMP/{sound}"]


def test_pictures_of_several_sets_are_found_in_order(tmp_path: Path) -> None:
    row = chat("<image><image>", "two", image=["a.png", "b\\c.png"], set=["one", "two"])
    source = listed(tmp_path / "vita.json", row, sets={"one": "/1", "two": "/2"})
    assert [str(item.path) for item in source[0].media()] == ["/1/a.png", "/2/b/c.png"]
    row = chat("<image><image>", "two", image=["a.png", "b.png"], set=["one"])
    assert [str(i.path) for i in listed(tmp_path / "vita.json", row, sets={"one": "/1"})[0].media()] == [
        "/1/a.png",
        "/1/b.png",
    ]


def test_noise_and_an_open_end_are_facts_of_their_turns(tmp_path: Path) -> None:
    row = chat("<audio>", "a", "<audio>", "b", audio=["1.wav", "2.wav"], inserted_id=1, end_tag=False)
    turns = listed(tmp_path / "vita.json", row)[0].turns
    assert [turn.state for turn in turns] == ["", "noise", "", ""]
    assert [turn.ended for turn in turns] == [True, True, True, False]


def test_a_share_of_a_set_is_the_same_rows_each_time(tmp_path: Path) -> None:
    rows = [chat("<image>", str(i), image="a.png", set="ab"[i % 2]) for i in range(200)]
    read = [listed(tmp_path / "vita.json", *rows, sets={"a": {"ratio": 0.25}}) for _ in range(2)]
    answers = [[sample.turns[1].text() for sample in source] for source in read]
    assert answers[0] == answers[1] == sorted(answers[0], key=int)
    odd, even = ([a for a in answers[0] if int(a) % 2 == rest] for rest in (1, 0))
    assert len(odd) == 100 and len(even) == 25 and even != [str(i) for i in range(0, 50, 2)]
    assert read[0].where(0) == f"vita.json row {int(answers[0][0]) + 1}"


LLAVA = chat("<image>\nWhat are the colors of the bus in the image?", "The bus is white and red.", image="coco/a.jpg")


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "list"])
def test_llavas_rows_are_read_with_marks_where_they_stand(lines: bool, tmp_path: Path) -> None:
    several = chat("Compare <image> and <image>.", "Same.", "And <image>?", "No.", image=["a.png", "b.png", "c.png"])
    rows = [LLAVA, several, chat("Only text?", "Yes.")]
    path = tmp_path / "llava.json"
    source = file_of(path, *rows) if lines else listed(path, *rows)
    assert source.errors == [] and source[0].where == f"llava.json {'line' if lines else 'row'} 1"
    assert source[0].turns[0].parts == (
        MediaItem("image", path=tmp_path / "coco/a.jpg"),
        Text("\nWhat are the colors of the bus in the image?"),
    )
    a, b, c = (MediaItem("image", path=tmp_path / f"{name}.png") for name in "abc")
    assert source[1].turns[0].parts == (Text("Compare "), a, Text(" and "), b, Text("."))
    assert source[1].turns[2].parts == (Text("And "), c, Text("?"))
    assert [facts.kinds for facts in source.facts] == [{"image"}, {"image"}, frozenset()]


def test_videos_are_read_under_either_mark(tmp_path: Path) -> None:
    rows = [chat("<video>\nWhat?", "A dog.", video="a.mp4"), chat("<image>\nWhat?", "A dog.", video=["a.mp4"])]
    source = listed(tmp_path / "video.json", *rows)
    assert [sample.media()[0].kind for sample in source] == ["video", "video"]
    assert [facts.kinds for facts in source.facts] == [{"video"}, {"video"}]


def test_sharegpts_speakers_and_plural_keys_are_known(tmp_path: Path) -> None:
    turns = [("system", "Be kind."), ("gpt", "Hello!"), ("user", "<audio>?"), ("bot", "A bell.")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns], "audios": ["a.wav"]}
    (sample,) = listed(tmp_path / "share.json", row)
    assert [turn.role for turn in sample.turns] == ["system", "assistant", "user", "assistant"]
    assert sample.media() == [MediaItem("audio", path=tmp_path / "a.wav")]
    unasked = listed(
        tmp_path / "share.json",
        chat("a", "b") | {"conversations": row["conversations"][1:2] + chat("a", "b")["conversations"]},
    )
    assert [turn.text() for turn in unasked[0].turns] == ["a", "b"]


def test_openais_parts_are_read(tmp_path: Path) -> None:
    png = b"\x89PNG"
    data = base64.b64encode(png).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "image_url", "image_url": {"url": "img/a.png", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
    ]
    sample = file_of(tmp_path / "rows.jsonl", said(parts))[0]
    assert sample.media() == [
        MediaItem("image", data=png),
        MediaItem("image", path=tmp_path / "img/a.png"),
        MediaItem("audio", data=png),
        MediaItem("video", path=tmp_path / "a.mp4"),
    ]


def test_an_answer_may_say_that_nobody_asked(tmp_path: Path) -> None:
    rows = [
        {"id": "7", "messages": [GOOD["messages"][0], {**GOOD["messages"][1], "state": s}]}
        for s in ("noise", "question", None)
    ]
    assert [sample.turns[1].state for sample in file_of(tmp_path / "rows.jsonl", *rows)] == ["noise", "question", ""]


def one(row: dict[str, Any], tmp_path: Path, **data: Any) -> list[Any]:
    """The turns of a row, media by their path beside the file, their address or their bytes."""

    def part(item: Text | MediaItem) -> Any:
        if isinstance(item, Text):
            return item.text
        return item.kind, item.data or item.url or str(item.path).removeprefix(f"{tmp_path}/")

    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (sample,) = JsonLines(tmp_path / "rows.jsonl", DataConfig(**data))
    return [(turn.role, [part(item) for item in turn.parts]) for turn in sample.turns]


ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        # ms-swift, as its page on custom datasets has them
        ({"messages": [{"role": "user", "content": "<image><image>differ?"}, ANSWER], "images": ["x.jpg", "y.jpg"]},
         [("user", [("image", "x.jpg"), ("image", "y.jpg"), "differ?"]), ("assistant", ["a"])]),
        ({"messages": [{"role": "user", "content": "say"}, ANSWER, {"role": "user", "content": "<audio>and?"}, ANSWER], "audios": ["x.wav"], "images": []},
         [("user", ["say"]), ("assistant", ["a"]), ("user", [("audio", "x.wav"), "and?"]), ("assistant", ["a"])]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}, ANSWER], "images": ["x.jpg"], "videos": ["v.mp4"]},
         [("system", ["s"]), ("user", [("image", "x.jpg"), ("video", "v.mp4"), "what?"]), ("assistant", ["a"])]),
        # TRL's, as its page on training vision language models has them, with the nulls of a table
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?\n", "index": None}, {"type": "image", "text": None, "index": 0}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "they", "index": None}]}], "images": ["x.jpg"]},
         [("user", ["Who?\n", ("image", "x.jpg")]), ("assistant", ["they"])]),
        ({"query": "<image>q", "response": "r", "history": [["q0", "r0"]], "system": "s", "images": ["x.jpg"]},
         [("system", ["s"]), ("user", ["q0"]), ("assistant", ["r0"]), ("user", [("image", "x.jpg"), "q"]), ("assistant", ["r"])]),
        ({"query": "q", "response": "good", "rejected_response": "bad"}, [("user", ["q"]), ("assistant", ["good"])]),
        ({"messages": [{"role": "user", "content": "q"}, ANSWER], "rejected_messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]},
         [("user", ["q"]), ("assistant", ["a"])]),
        # Alpaca
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [("user", ["Add.\n1, 2"]), ("assistant", ["3"])]),
        # ShareGPT and its kin
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "system": "s"},
         [("system", ["s"]), ("user", ["q"]), ("assistant", ["a"])]),
        ({"conversations": [{"from": "user", "text": "q"}, {"from": "chatgpt", "value": "a"}]}, [("user", ["q"]), ("assistant", ["a"])]),
        ({"conversation": [{"system": "s", "human": "q", "assistant": "a"}, {"human": "q2", "assistant": "a2"}]},
         [("system", ["s"]), ("user", ["q"]), ("assistant", ["a"]), ("user", ["q2"]), ("assistant", ["a2"])]),
        # typed parts as templates and servers take them
        ({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "image", "url": "https://x.y/a.png"}, {"type": "audio", "audio": "a.wav"}, {"type": "image", "base64": "iVBORw=="}, {"type": "audio_url", "audio_url": {"url": "http://x.y/a.wav"}}, {"type": "image_url", "image_url": "b.png"}]}, ANSWER]},
         [("system", ["s"]), ("user", [("image", "https://x.y/a.png"), ("audio", "a.wav"), ("image", b"\x89PNG"), ("audio", "http://x.y/a.wav"), ("image", "b.png")]), ("assistant", ["a"])]),
        (said([{"type": "image", "base64": "iVB\r\nORw==\n"}]), [("user", [("image", b"\x89PNG")])]),
        (said([{"type": "image", "path": "data:image/png;base64,iVBORw=="}, {"type": "video", "path": "s3://b/k.mp4"}, {"type": "image", "path": "file:///d/a%20b.png"}]),
         [("user", [("image", b"\x89PNG"), ("video", "s3://b/k.mp4"), ("image", "/d/a b.png")])]),
        (chat("<image>", "a", image="http://x.y/a.png"), [("user", [("image", "http://x.y/a.png")]), ("assistant", ["a"])]),
        # the better of two answers
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}},
         [("user", ["q"]), ("assistant", ["yes"])]),
    ],
)  # fmt: skip
def test_rows_of_other_people_are_read_as_they_are(row: dict[str, Any], turns: list[Any], tmp_path: Path) -> None:
    assert one(row, tmp_path) == turns


def test_a_pattern_is_all_files_of_that_name_one_behind_the_other(tmp_path: Path) -> None:
    for folder, names in (("a", "qr"), ("b", "st")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.jsonl").write_text(json.dumps(chat(name, "a", id=name)) + "\n")
    (tmp_path / "a" / "notes.txt").write_text("no rows")

    def ids(pattern: str) -> list[str]:
        return [sample.id for sample in open_source(f"{tmp_path}/{pattern}")]

    assert ids("*/*.jsonl") == ["q", "r", "s", "t"] and ids("**/[rs].jsonl") == ["r", "s"] and ids("?/t.jsonl") == ["t"]
    source = open_source(f"{tmp_path}/a/*.jsonl")
    assert (source.name, source.kind) == ("*.jsonl", "2 files, one behind the other")
    assert source.where(1) == "r.jsonl line 1"
    with pytest.raises(ConfigError) as error:
        open_source(f"{tmp_path}/*.json")
    assert str(error.value) == f"{tmp_path}/*.json: no file is called like that. Correct the pattern"
    with pytest.raises(ConfigError, match=r"2 files of JSON, and one is to be named, or all as .*/a/\*\.jsonl\. Give"):
        open_source(tmp_path / "a")
    (tmp_path / "c[1].jsonl").write_text(json.dumps(chat("c", "a", id="c")) + "\n")
    assert ids("c[1].jsonl") == ["c"]  # a file that is called so is no pattern


def test_a_folder_of_media_that_is_not_there_is_said_once_and_not_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("q", "a")) + "\n")
    missing = tmp_path / "media"
    with pytest.raises(ConfigError) as error:
        open_source(path, DataConfig(folder=str(missing)))
    told = "there is no such folder, and data.folder names it, so no medium would be found. Correct it"
    assert str(error.value) == f"{missing}: {told}"
    missing.mkdir()
    assert len(open_source(path, DataConfig(folder=str(missing)))) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {**ANSWER, "weight": 0}, {"role": "user", "content": "q"}, {**ANSWER, "weight": 1}]},
        {"messages": [{"role": "user", "content": "q", "loss": False}, {**ANSWER, "loss": False}, {"role": "user", "content": "<image>q"}, {**ANSWER, "loss": True}], "images": ["x.jpg"]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": False}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": None}]},
    ],
)  # fmt: skip
def test_answers_that_others_do_not_learn_are_said_and_not_learned(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (sample,) = open_source(path)
    assert [turn.learned for turn in sample.turns] == [True, False, True, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": '[{"name": "f"}]', **chat("q", "a")}, 'lists "tools" to be called, and models here answer in words. Leave such rows out, or remove their tools'),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]}, 'a turn is from "function_call", a tool, and models here speak with people only. Leave such rows out'),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, 'an answer calls tools ("tool_calls"), and models here answer in words. Leave such rows out'),
        ({"messages": [{"role": "user", "content": "q"}, ANSWER], "label": False}, 'has "label": false, by which ms-swift marks an answer as a bad one, and answers are learned. Leave such rows out, or call the column otherwise'),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": False}]}, "has no answer that is learned: all have a weight (or loss) of 0. Leave the row out"),
        ({"messages": [{"role": "user", "content": "q"}, {**ANSWER, "weight": 0}]}, "has no answer that is learned: all have a weight (or loss) of 0. Leave the row out"),
        ({"messages": [{"role": "user", "content": "q"}, {**ANSWER, "weight": 0.5}]}, "an answer has weight=0.5, and an answer is learned (1) or not (0). Correct it"),
        ({"messages": [{"role": "user", "content": "q"}, {**ANSWER, "loss": "no"}]}, 'an answer has loss="no", and an answer is learned (1) or not (0). Correct it'),
        ({"messages": [{"role": "user", "content": "q"}, {**ANSWER, "loss": False}], "rejected_response": "b"}, "has two answers (chosen and rejected) of which one has a weight (or loss) of 0, and pairs are learned by comparing both. Remove the weight, or leave the row out"),
        ({"messages": [{"role": "user", "content": "<image>Find <ref-object>"}, {**ANSWER, "content": "<bbox>"}], "images": ["a"], "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}}, "has ms-swift's marks for boxes (<ref-object>, <bbox>) with their objects beside, and each model writes boxes in its own way. Write each box as words where its mark stands"),
        ({"messages": [{"role": "user", "content": "<image>q"}, ANSWER], "images": ["a", "b"]}, "the text has 1 <image> mark and the row lists 2 image files. Add a mark or remove the file"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "b"}, {"type": "text", "text": "q"}]}, ANSWER], "images": ["a"]}, "the row lists its media beside the messages, and a message has a list as content. Give texts with a mark for each medium, or every medium as a part of its message"),
        ({"query": "q", "response": None}, 'has a question and no "response" (or "output"), so there is nothing to learn. Give an answer'),
        ({"query": ["q"], "response": "a"}, "its question is a list, and words are needed. Correct it"),
        ({"query": "q", "response": "a", "history": "[]"}, 'has a text as "history", which is a list of pairs of a question and its answer. Correct it'),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "q"}]}, 'has a "system" and a turn of the system that says something else. Leave one of them out'),
        ({"system": 3, **chat("q", "a")}, 'has a number as "system", which is a text. Correct it, or leave it out'),
        (said([{"type": "image", "path": "file://host/a.png"}]), "a part of type image is a file of another machine (file://host/a.png), and those are not reached. Write file:///PATH, or the path alone"),
        (said([{"type": "image", "url": "https://[x/a.png"}]), "the address of a part of type image is none (https://[x/a.png). Correct it"),
        (said([{"type": "image", "base64": "?"}]), "the data of a part of type image are not base64. Encode the file's bytes"),
        ({"messages": [{"role": "user", "content": "q", "verbatim": 1}, ANSWER]}, 'a message has a number as "verbatim", which is true or false. Correct it'),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned_as_they_are_meant_are_named(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError) as error:
        JsonLines(tmp_path / "rows.jsonl")
    assert str(error.value).endswith(f"so there is nothing to learn from. The first row: {message}")


def test_columns_by_other_names_are_said(tmp_path: Path) -> None:
    row = {"pic": ["a.png"], "ask": {"en": "<image>Why?"}, "answers": ["so", "because"], "who": "s"}
    columns = {"images": "pic", "question": "ask[de],ask[en]", "answer": "answers[1]", "system": "who"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    source = open_source(tmp_path / "rows.jsonl", DataConfig(columns=columns))
    assert [turn.text() for turn in source[0].turns] == ["s", "Why?", "because"]
    assert source[0].media() == [MediaItem("image", path=tmp_path / "a.png")]


def test_media_may_lie_in_a_tar_beside_the_rows(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name, data in (("coco/a.jpg", b"picture a"), ("./b.jpg", b"picture b")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    rows = [chat("<image>", "a", image=name) for name in ("coco/a.jpg", "b.jpg", "./coco/../b.jpg", "c.jpg")]
    source = listed(tmp_path / "llava.json", *rows, folder=str(tmp_path / "images.tar"))
    assert [read(sample.media()[0], LIMITS) for sample in source] == [b"picture a", b"picture b", b"picture b"]
    assert source[0].media()[0].name() == f"{tmp_path}/images.tar coco/a.jpg"
    (error,) = source.errors
    assert error.reason == (
        "the tar images.tar has no member c.jpg, so there is no such image. Put it there, or correct the path"
    )
    assert pickle.loads(pickle.dumps(source))[1].media() == source[1].media()
    data = (tmp_path / "images.tar").read_bytes()
    (tmp_path / "images.tar").write_bytes(data[:1000])
    cut = listed(tmp_path / "llava.json", *rows, folder=str(tmp_path / "images.tar"))
    assert (
        len(cut) == 1 and "has no member b.jpg (it ends in the middle of a block, at byte 1000" in cut.errors[0].reason
    )
    with pytest.raises(ConfigError, match=r"x.tar: there is no such tar. Correct data.folder or data.sets"):
        listed(tmp_path / "llava.json", *rows, folder=str(tmp_path / "x.tar"))


def test_a_source_travels_as_a_few_bytes(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": str(i), "task": f"t{i % 3}"} for i in range(20_000)]
    source = file_of(tmp_path / "rows.jsonl", *rows)
    sent = pickle.dumps(source)
    there = pickle.loads(sent)
    assert len(sent) < 2000 and there[19_999] == source[19_999] and list(there.facts[:5]) == list(source.facts[:5])
    assert there.facts.tasks == ["t0", "t1", "t2"] and there.where(7) == "rows.jsonl line 8"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0), "is compressed with gzip. Unpack it, and give what is in it"),
        ("rows.zip", b"PK\x03\x04rest", "is a zip archive. Unpack it, and give what is in it"),
        (
            "rows.jsonl",
            '{"id": 1}\n'.encode("utf-16"),
            "is text in UTF-16, and rows are read in UTF-8. Write it in UTF-8",
        ),
        (
            "a.png",
            b"\x89PNG\r\n\x1a\n\0\0",
            "is no text, and its name does not say what it is. Give JSON lines, .tar, .parquet or .arrow (docs/data.md)",
        ),
    ],
)
def test_what_is_no_data_is_one_message(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        open_source(path)
    assert str(error.value) == f"{path}: {message}"


def test_folders_are_opened_by_what_is_in_them(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is a folder with no rows in a form that is read\. Give a file of JSON lines"
    ):
        open_source(tmp_path)
    file_of(tmp_path / "a.jsonl", GOOD)
    assert open_source(tmp_path).kind == "JSON lines of messages"
    with pytest.raises(ConfigError, match=r"has no parts, so there is no 'val' in it\. Give the path alone"):
        open_source(f"{tmp_path}:val")
    with pytest.raises(ConfigError, match=r"a.jsonl: has no parts, so there is no 'x' in it\. Give the path alone"):
        open_source(f"{tmp_path / 'a.jsonl'}:x")
    file_of(tmp_path / "b.jsonl", GOOD)
    with pytest.raises(ConfigError, match=r"is a folder with 2 files of JSON, and one is to be named"):
        open_source(tmp_path)
    named = file_of(tmp_path / "a:b.jsonl", GOOD)
    assert len(open_source(tmp_path / "a:b.jsonl")) == len(named)


BAD_CONVERSATION: list[tuple[Any, str]] = [
    ({"id": "7"}, 'has no list "conversations" with a message in it. A row is {"conversations": [{"from": "human", "value": ...}, ...]}, as others of the file are'),
    ({"id": "7", "messages": GOOD["messages"]}, 'is a row of "messages", and the first row of the file is one of "conversations". Give rows of each form a file of their own; data.train takes several'),
    ({"id": "7", "conversations": ["a"]}, 'a turn is a text and not an object. Write {"from": "human", "value": ...}'),
    ({"id": "7", "conversations": [{"from": "robot", "value": "a"}]}, 'a turn is from "robot", and turns are from system, human, user, gpt, assistant, bot. Correct it'),
    ({"id": "7", "conversations": [{"from": ["human"], "value": "a"}]}, 'a turn is from ["human"], and turns are from system, human, user, gpt, assistant, bot. Correct it'),
    ({"id": "7", "conversations": [{"from": "human"}]}, 'a turn has no "value". Give what is said'),
    ({"id": "7", "conversations": [{"from": "gpt", "value": "a"}]}, "has answers and no question. Add a turn from human"),
    (chat("<image> <image>", "a", image="a.png"), "the text has 2 <image> marks and the row lists 1 image file. Add the file or remove a mark"),
    (chat("<audio>", "a"), "the text has 1 <audio> mark and the row lists 0 audio files. Add the file or remove a mark"),
    (chat("What?", "a", video=["a.mp4", "b.mp4"]), "the text has 0 <video> marks and the row lists 2 video files. Add a mark or remove the file"),
    (chat("<image>", "a", image=3), 'has a number as "image", which is the path of a file or a list of paths. Correct it'),
    (chat("<image>", "a", image=[""]), 'has a list as "image", which is the path of a file or a list of paths. Correct it'),
    (chat("<image><image>", "a", image=["a", "b"], set=["x", "y", "z"]), "lists 2 image files from 3 sets, so which is whose is not known. Name one set, or one for each file"),
    (chat("a", "b", set=3), 'has a number as "set", which is the name of a set or a list of names. Correct it'),
    (chat("a", "b", inserted_id=0), "has inserted_id=0, which is not the number of an answer (from 0). Correct it"),
    (chat("a", "b", inserted_id=9), "has inserted_id=9, which is not the number of an answer (from 0). Correct it"),
    (chat("a", "b", inserted_id="1"), "has inserted_id='1', which is not the number of an answer (from 0). Correct it"),
    (chat("a", "b", end_tag="no"), 'has a text as "end_tag", which is true or false. Correct it'),
    (chat("a \ud83d", "b"), "its text holds half of a character (\\ud83d). Write the whole one"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_CONVERSATION, ids=[str(i) for i in range(len(BAD_CONVERSATION))])
def test_a_bad_conversation_is_named_and_reading_goes_on(row: Any, message: str, tmp_path: Path) -> None:
    source = listed(tmp_path / "rows.json", LLAVA, row, LLAVA)
    assert len(source) == 2
    (error,) = source.errors
    assert str(error) == f'rows.json row 2 (id "7"): {message}'


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, 'a part of type image_url has no "image_url": {"url": ...}. Give what it shows or lets hear'),
        ({"type": "input_audio", "input_audio": {"url": "a"}}, 'a part of type input_audio has no "input_audio": {"data": ...}. Give what it shows or lets hear'),
        ({"type": "input_audio", "input_audio": {"data": "?"}}, "the data of a part of type input_audio are not base64. Encode the file's bytes"),
    ],
)  # fmt: skip
def test_a_bad_part_of_openais_is_named(part: Any, message: str, tmp_path: Path) -> None:
    (error,) = file_of(tmp_path / "rows.jsonl", GOOD, said([part])).errors
    assert error.reason == message


def test_a_state_that_is_none_is_named(tmp_path: Path) -> None:
    (error,) = file_of(
        tmp_path / "rows.jsonl", GOOD, {"id": "7", "messages": [{"role": "user", "content": "a", "state": "noise"}]}
    ).errors
    assert error.reason == (
        'a message of the user has the state "noise", and it is answers that have one: "question", or "noise" where the '
        "model was not meant. Correct it, or leave it out"
    )


@pytest.mark.parametrize("indent", [None, 1, "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list_is_read_from_wherever_its_rows_stand(indent: Any, mark: str, ascii_only: bool, tmp_path: Path) -> None:
    rows = [chat(f"é 漢字 🎉 {i}", "x" * i) for i in range(5)]
    path = tmp_path / "rows.json"
    path.write_text(mark + " \n" + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n\n", encoding="utf-8")
    source = JsonLines(path)
    assert [sample.turns[0].text() for sample in source] == [f"é 漢字 🎉 {i}" for i in range(5)]
    assert source[3].turns[1].text() == "xxx"
    assert list(source.lines) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ('[{"a": 1}', "Expecting ',' delimiter at character 10"),
        ('[{"a": 1} {"a": 2}]', "Expecting ',' delimiter at character 11"),
        ('[{"a": 1}]]', "Extra data at character 11"),
        ('[{"a": 1}]\n{"a": 2}', "Extra data at character 12"),
        ("[1, ", "Expecting value at character 5"),
    ],
)
def test_a_broken_list_is_refused(text: str, detail: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        JsonLines(tmp_path / "rows.json")
    assert str(error.value) == (
        f"{tmp_path}/rows.json: begins as a JSON list and is none ({detail}), so where its rows begin is not known. "
        "Correct it, or write one object on a line"
    )


def test_a_list_without_rows_or_in_another_alphabet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"so there is nothing to learn from\. It is empty"):
        JsonLines(path)
    path.write_bytes(b'["\xe9"]')
    with pytest.raises(ConfigError, match=r"rows.json: is not UTF-8 \(byte 3\), so its rows cannot be told apart"):
        JsonLines(path)


def test_a_file_in_no_form_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        listed(tmp_path / "rows.json", {"question": "a", "answer": "b"})
    assert str(error.value) == (
        f"{tmp_path}/rows.json: has no row that can be read, so there is nothing to learn from. The first row: has neither "
        f'"messages" nor "conversations" nor "query" and "response". {FORM}; '
        "or say with data.columns which of its columns are what"
    )


@settings(deadline=None, max_examples=200)
@given(ANY)
def test_any_json_is_a_conversation_or_is_refused(row: Any) -> None:
    if isinstance(row, dict):
        row = {"conversations": [{"from": "human", "value": "<image>"}], "image": row.get("id"), **row}
        row |= {"set": row.get("text"), "inserted_id": row.get("task"), "end_tag": row.get("path")}
    with contextlib.suppress(DataError):
        assert parse_row(row, Folders(), "x row 1", "conversations").turns


@pytest.mark.parametrize("name", ["rows.jsonl", "folder"])
def test_what_may_not_be_read_is_the_users_to_change(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs this may be allowed everything, so opening is made to fail as it does for others."""
    path = tmp_path / name
    path.write_text("{}\n") if path.suffix else path.mkdir()
    known = Path.open if path.suffix else Path.stat

    def refused(self: Path, *more: Any, **settings: Any) -> Any:
        if self.is_relative_to(path) and (path.suffix or self != path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return known(self, *more, **settings)

    monkeypatch.setattr(Path, known.__name__, refused)
    with pytest.raises(ConfigError) as error:
        open_source(path)
    assert str(error.value).startswith(f"{path}: not readable (Permission denied")
    assert str(error.value).endswith("Give rows that you may read")


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_row_of_another_form_is_told_as_that(first: int, tmp_path: Path) -> None:
    forms: list[tuple[str, Any]] = [
        ("messages", GOOD),
        ("conversations", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("query", {"instruction": "a", "output": "b"}),
    ]
    order = forms[first:] + forms[:first]
    source = file_of(tmp_path / "rows.jsonl", *[row for _, row in order])
    assert len(source) == 1
    assert [error.reason for error in source.errors] == [
        f'is a row of "{name}", and the first row of the file is one of "{order[0][0]}". '
        "Give rows of each form a file of their own; data.train takes several"
        for name, _ in order[1:]
    ]
    for i, (_, row) in enumerate(order):  # the advice holds
        assert len(file_of(tmp_path / f"{i}.jsonl", row)) == 1
