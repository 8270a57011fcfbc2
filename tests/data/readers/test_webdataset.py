# ruff: noqa: E501 (whole messages are compared)
"""Tars as the webdataset library writes them: each sample is read, in any order, and its media are parts of the tar."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avlm.config.data import DataConfig
from avlm.data.decoding.files import LIMITS, read
from avlm.data.readers.webdataset import WebDataset, expanded, tars_in
from avlm.data.sources import open_source
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, Sample, Text

PNG, WAV = b"\x89PNG picture", b"RIFF....WAVE sound"


def written(path: Path, *samples: dict[str, Any]) -> Path:
    """A tar that the webdataset library wrote; samples without a key are numbered."""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed: pip install 'avlm[dev]'")
    with webdataset.TarWriter(str(path)) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{number:04d}", **sample})
    return path


def plain(path: Path, *files: tuple[str, bytes]) -> Path:
    """A tar of files in their order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def told(sample: Sample) -> list[Any]:
    """A conversation with the bytes of its media."""
    return [
        (turn.role, [part.text if isinstance(part, Text) else (part.kind, read(part, LIMITS)) for part in turn.parts])
        for turn in sample.turns
    ]


def test_samples_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    conversation = [{"from": "human", "value": "<audio>Is it <image>?"}, {"from": "gpt", "value": "yes"}]
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "?"}, {"type": "image", "path": "b.png"}]
    path = written(
        tmp_path / "a.tar",
        {"jpg": PNG, "txt": "a red square\n"},
        {"wav": WAV, "cls": 7},
        {"png": PNG, "json": {"caption": "words", "id": "own", "task": "t"}},
        {"0.png": PNG, "1.wav": WAV, "json": {"conversations": conversation, "task": "match"}},
        {"png": PNG, "wav": WAV, "json": {"conversations": conversation, "images": ["png"], "audios": ["0004.wav"]}},
        {"a.png": PNG, "b.png": b"b" + PNG, "json": {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]}},
        {"mp4": b"film", "json": {"query": "What is it?", "response": "a film"}},
        {"txt": "words alone"},
    )  # fmt: skip
    source = open_source(path)
    assert source.errors == [] and source.kind == "1 tar of samples (WebDataset)"
    asked = [("user", [("audio", WAV), "Is it ", ("image", PNG), "?"]), ("assistant", ["yes"])]
    assert [told(sample) for sample in source] == [
        [("user", [("image", PNG)]), ("assistant", ["a red square"])],
        [("user", [("audio", WAV)]), ("assistant", ["7"])],
        [("user", [("image", PNG)]), ("assistant", ["words"])],
        asked,
        asked,
        [("user", [("image", PNG), "?", ("image", b"b" + PNG)]), ("assistant", ["no"])],
        [("user", [("video", b"film"), "What is it?"]), ("assistant", ["a film"])],
        [("user", []), ("assistant", ["words alone"])],
    ]
    assert [sample.id for sample in source] == ["0000", "0001", "own", "0003", "0004", "0005", "0006", "0007"]
    assert [facts.task for facts in source.facts][2:4] == ["t", "match"]
    item = source[3].media()[0]
    assert item.name() == f"{path} 0003.1.wav" and item.span is not None and source.where(3) == "a.tar 0003"
    webdataset = pytest.importorskip("webdataset")
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [source.where(i).removeprefix("a.tar ") for i in range(len(source))] == theirs


def test_columns_say_what_members_are(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", {"pic.jpg": PNG, "json": {"q": "Why?", "a": ["first", "second"]}}, {"txt": "x"})
    data = DataConfig(columns={"image": "pic.jpg,jpg", "question": "json[q]", "answer": "json[a][1]"})
    source = open_source(path, data)
    assert told(source[0]) == [("user", [("image", PNG), "Why?"]), ("assistant", ["second"])]
    (error,) = source.errors
    assert error.where == "a.tar 0001"
    wrong = DataConfig(columns={"image": "jpg[", "answer": "txt"})
    with pytest.raises(ConfigError, match=r"data\.columns\.image is 'jpg\[', and that names no column"):
        open_source(path, wrong)


def test_shards_of_a_folder_or_a_pattern_are_one_source(tmp_path: Path) -> None:
    for number in range(12):
        written(tmp_path / f"s-{number:03d}.tar", *({"txt": f"{number} {i}"} for i in range(number % 3 + 1)))
    expected = [f"{number} {i}" for number in range(12) for i in range(number % 3 + 1)]
    whole, some = (
        open_source(tmp_path),
        open_source(f"{tmp_path}/s-{{001..003}}.tar"),
    )
    assert [sample.turns[1].text() for sample in whole] == expected
    assert [sample.turns[1].text() for sample in some] == [text for text in expected if text.split()[0] in "123"]
    assert whole[len(whole) - 1].where == "s-011.tar 0002" and whole.kind == "12 tars of samples (WebDataset)"
    again = pickle.loads(pickle.dumps(whole))
    assert [sample.id for sample in again] == [sample.id for sample in whole]
    assert again.fingerprint() == open_source(tmp_path).fingerprint()
    written(tmp_path / "s-003.tar", {"txt": "other"})
    assert open_source(tmp_path).fingerprint() != whole.fingerprint()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{a,b}.tar", ["a.tar", "b.tar"]),
        ("s{08..11}{x,}.tar", [f"s{n}{x}.tar" for n in ("08", "09", "10", "11") for x in ("x", "")]),
        ("{0..2}", ["0", "1", "2"]),
    ],
)
def test_patterns_stand_for_names_as_in_a_shell(pattern: str, names: list[str]) -> None:
    assert expanded(pattern) == names
    braceexpand = pytest.importorskip("braceexpand", reason="comes with webdataset")
    assert list(braceexpand.braceexpand(pattern)) == names


def test_a_pattern_that_is_none_is_refused() -> None:
    for pattern in ("{a..z}.tar", "{0..99999999}.tar", "{0..999999}{0..9}.tar"):
        with pytest.raises(ConfigError, match=r"is no range of numbers|stands for more than"):
            tars_in(pattern)


BAD: list[tuple[list[tuple[str, bytes]], str]] = [
    ([("k.png", PNG)], "bad.tar k: has png and no words to learn. Add a json with messages or a txt, or say with data.columns what its members are"),
    ([("k.json", b"{")], "bad.tar k.json: is not JSON (Expecting property name enclosed in double quotes at character 2). Write one JSON value"),
    ([("k.json", b"[1]")], "bad.tar k: has json and no words to learn. Add a json with messages or a txt, or say with data.columns what its members are"),
    ([("k.txt", b"\xff")], "bad.tar k.txt: is not UTF-8 (byte 1). Write it in UTF-8"),
    ([("k.txt", b"a"), ("k.txt", b"b")], "bad.tar k: has 2 members and only 1 different ones, so which is meant is not known. Give each sample a key of its own"),
    ([("k.png", PNG), ("k.json", b'{"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]}')], "bad.tar k: the text has 2 <image> marks and the row lists 1 image file. Add the file or remove a mark"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_sample_is_named_and_reading_goes_on(tmp_path: Path, files: Any, message: str) -> None:
    source = WebDataset([plain(tmp_path / "bad.tar", ("a.txt", b"1"), *files, ("z.txt", b"2"))])
    assert [sample.id for sample in source] == ["a", "z"]
    assert [str(error) for error in source.errors] == [message]


def test_other_members_and_folders_do_not_disturb(tmp_path: Path) -> None:
    files = [("__meta__/x.json", b"{}"), ("d/b.c/k.txt", b"1"), ("README", b"?"), (".hidden", b"?"), ("./k.TXT", b"2")]
    source = WebDataset([plain(tmp_path / "a.tar", *files)])
    assert [(sample.id, sample.turns[1].text()) for sample in source] == [("d/b.c/k", "1"), ("./k", "2")]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_of_a_cut_tar_whole_samples_are_read_and_the_cut_is_named(tmp_path: Path, share: float) -> None:
    path = plain(
        tmp_path / "a.tar",
        *[(f"{i}.{end}", data) for i in range(4) for end, data in (("png", PNG * 99), ("txt", b"words"))],
    )
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith("txt")]
    at = int(share * ends[-1])
    path.write_bytes(data[:at])
    whole = [str(i) for i, end in enumerate(ends) if end <= at]
    try:
        source = WebDataset([path])
    except ConfigError:
        assert not whole
        return
    assert [sample.id for sample in source] == whole
    copy = pickle.loads(pickle.dumps(source))  # as it goes to workers
    assert [str(error) for error in copy.errors] == [str(error) for error in source.errors]
    if len(whole) < 4 and at % 512:  # a cut between two headers cannot be seen
        assert any(error.where in ("a.tar", f"a.tar {len(whole)}") for error in source.errors)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "task", "messages", "conversations", "role", "content", "from", "value", "caption", "images", "query", "response", "history", "system", "tools", "set"]), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(JSON, min_size=1, max_size=3),
    ending=st.sampled_from(["png", "wav", "txt", "cls", "mp4", "bin"]),
    data=st.binary(max_size=20),
)
def test_any_json_and_any_bytes_are_samples_or_are_refused(
    tmp_path: Path, rows: list[Any], ending: str, data: bytes
) -> None:
    files = [
        (f"{i}.{end}", body)
        for i, row in enumerate(rows)
        for end, body in (("json", json.dumps(row).encode()), (ending, data))
    ]
    path = plain(tmp_path / "a.tar", *files)
    columns: dict[Any, str] = {"question": "json[query]", "answer": "json[response],txt", "images": "png,json[images]"}
    for config in (DataConfig(), DataConfig(columns=columns)):
        with contextlib.suppress(ConfigError, DataError):
            for sample in WebDataset([path], config):
                assert all(isinstance(part, (Text, MediaItem)) for turn in sample.turns for part in turn.parts)


def test_a_tar_that_goes_away_or_changes_is_said_so(tmp_path: Path) -> None:
    source = WebDataset([plain(tmp_path / "a.tar", ("a.txt", b"1"), ("b.txt", b"2"))])
    plain(tmp_path / "a.tar", ("README", b"?" * 1024))
    with pytest.raises(DataError):
        source[1]
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ConfigError, match=r"a.tar: not readable"):
        source[0]
    assert source.where(0) == "a.tar at byte 0"


def test_progress_is_told_after_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain(tmp_path / "a.tar", *((f"{i}.txt", b"1") for i in range(300)))
    told: list[tuple[int, int]] = []
    WebDataset([path], progress=lambda done, total: told.append((done, total)))
    assert told == []
    monkeypatch.setattr("avlm.data.readers.taking.QUIET_S", 0.0)
    monkeypatch.setattr("avlm.data.readers.taking.EVERY_S", 0.0)
    WebDataset([path], progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and len(told) > 2 and told[-1] == (path.stat().st_size,) * 2


def test_numbered_members_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """The webdataset library writes a sample's members by name."""
    marks = {"conversations": [{"from": "human", "value": "<image>" * 12 + "?"}, {"from": "gpt", "value": "yes"}]}
    path = written(tmp_path / "a.tar", {**{f"{i}.png": bytes([i]) + PNG for i in range(12)}, "json": marks})
    with tarfile.open(path) as tar:
        assert tar.getnames()[:3] == ["0000.0.png", "0000.1.png", "0000.10.png"]
    (sample,) = open_source(path)
    assert [read(item, LIMITS)[0] for item in sample.media()] == list(range(12))
