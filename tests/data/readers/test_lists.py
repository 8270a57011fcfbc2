# ruff: noqa: E501 (whole messages are compared)
"""LLaMA-Factory's dataset_info.json, as its documentation describes it."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avlm.config.data import DataConfig
from avlm.data.sources import open_source
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, Text

OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
INFO: dict[str, Any] = {
    "alpaca": {"file_name": "alpaca.json"},
    "named": {"file_name": "named.jsonl", "columns": {"prompt": "ask", "query": "more", "response": "say", "system": "who", "history": "past", "images": "pics", "audios": "sounds"}},
    "share": {"file_name": "share.json", "formatting": "sharegpt", "columns": {"messages": "conversations", "system": "who", "videos": "films"}},
    "openai": {"file_name": "openai.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": OPENAI_TAGS},
    "pairs": {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True, "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
    "ranked": {"file_name": "ranked.json", "ranking": True, "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}},
    "kto": {"file_name": "kto.json", "columns": {"kto_tag": "good"}},
    "hub": {"hf_hub_url": "some/where"},
}  # fmt: skip
FILES: dict[str, list[dict[str, Any]]] = {
    "alpaca.json": [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Hello"}],
    "named.jsonl": [{"ask": "<image>What?", "more": "", "say": "a cat", "who": "Be kind.", "past": [["hi", "hello"]], "pics": ["a.png"], "sounds": None}],
    "share.json": [{"conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "a dog"}], "who": "Be brief.", "films": ["a.mp4"]}],
    "openai.json": [{"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "they"}], "images": ["b.png"]}],
    "pairs.json": [{"conversations": [{"from": "human", "value": "Good?"}], "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}],
    "ranked.json": [{"instruction": "Good?", "input": "", "chosen": "yes", "rejected": "no"}],
    "kto.json": [{"instruction": "a", "output": "good one", "good": True}, {"instruction": "a", "output": "bad one", "good": False}],
}  # fmt: skip


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(INFO))
    for name, rows in FILES.items():
        lines = name.endswith("l")
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def said(info: Path, name: str) -> list[list[tuple[str, Any]]]:
    folder = info.parent
    return [
        [(turn.role, [part.text if isinstance(part, Text) else (part.kind, str(part.path).removeprefix(f"{folder}/")) for part in turn.parts]) for turn in sample.turns]
        for sample in open_source(f"{info}:{name}")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("alpaca", [[("user", ["Add.\n1 and 2"]), ("assistant", ["3"])], [("user", ["Hi"]), ("assistant", ["Hello"])]]),
        ("named", [[("system", ["Be kind."]), ("user", ["hi"]), ("assistant", ["hello"]), ("user", [("image", "a.png"), "What?"]), ("assistant", ["a cat"])]]),
        ("share", [[("system", ["Be brief."]), ("user", [("video", "a.mp4"), "What?"]), ("assistant", ["a dog"])]]),
        ("openai", [[("user", [("image", "b.png"), "Who?"]), ("assistant", ["they"])]]),
        ("pairs", [[("user", ["Good?"]), ("assistant", ["yes"])]]),
        ("ranked", [[("user", ["Good?"]), ("assistant", ["yes"])]]),
        ("kto", [[("user", ["a"]), ("assistant", ["good one"])]]),
    ],
)  # fmt: skip
def test_a_set_is_read_by_its_name(info: Path, name: str, samples: Any) -> None:
    assert said(info, name) == samples


def test_the_source_is_called_by_the_sets_name_and_travels(info: Path) -> None:
    source = open_source(f"{info}:named")
    assert source.name == "named" and source.kind == "a data set of LLaMA-Factory (alpaca): JSON lines of query"
    assert pickle.loads(pickle.dumps(source))[0].media() == [MediaItem("image", path=info.parent / "a.png")]
    assert open_source(f"{info.parent}:alpaca")[0].turns[1].text() == "3"  # the folder alone will do


def test_an_answer_marked_as_bad_is_left_out_and_named(info: Path) -> None:
    (error,) = open_source(f"{info}:kto").errors
    assert (
        str(error) == "kto.json row 2: its answer is marked as a bad one, and answers are learned. Leave such rows out"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "",
            "{0}: lists data sets, and none is named (it has alpaca, named, share, openai, pairs, ranked, kto, hub). Write {0}:NAME with one of those",
        ),
        (
            ":nothing",
            "{0}: has no data set 'nothing' (it has alpaca, named, share, openai, pairs, ranked, kto, hub). Write {0}:NAME with one of those",
        ),
        (":hub", "{0}: hub lies on a hub, and nothing is fetched from there. Download it and give its file_name"),
    ],
)
def test_what_cannot_be_read_is_refused(info: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_source(f"{info}{path}")
    assert str(error.value) == message.format(info)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"file_name": "no.json"}, "{1}/no.json: there is no such file, and dataset_info.json names it. Correct file_name"),
        ({"file_name": "kto.json", "formatting": "other"}, "{0}: x has formatting 'other'. Write alpaca, sharegpt or openai"),
        ({"file_name": "kto.json", "columns": {"pictures": "a"}}, "{0}: x has columns.pictures, and columns are prompt, query, response, history, messages, system, tools, images, videos, audios, chosen, rejected, kto_tag. Correct it"),
        ({"file_name": "kto.json", "columns": ["a"]}, "{0}: x.columns is no table of names. Correct it"),
    ],
)  # fmt: skip
def test_what_is_described_wrongly_is_refused(info: Path, described: Any, message: str) -> None:
    info.write_text(json.dumps({"x": described}))
    with pytest.raises(ConfigError) as error:
        open_source(f"{info}:x")
    assert str(error.value) == message.format(info, info.parent)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "role", "content"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(
        st.sampled_from(["instruction", "input", "output", "conversations", "chosen", "pics", "past"]), ANY
    ),
    sharegpt=st.booleans(),
)
def test_any_row_is_read_or_refused(tmp_path: Path, row: dict[str, Any], sharegpt: bool) -> None:
    columns = {"images": "pics", "chosen": "chosen"} | ({} if sharegpt else {"history": "past"})
    described = {"file_name": "rows.jsonl", "formatting": "sharegpt" if sharegpt else "alpaca", "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": described}))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with contextlib.suppress(ConfigError, DataError):
        list(open_source(f"{tmp_path / 'dataset_info.json'}:x"))


def test_media_lie_where_the_list_lies(tmp_path: Path) -> None:
    """Its own default for `media_dir`, wherever the rows are."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.json").write_text(json.dumps(FILES["openai.json"]))
    described = {**INFO["openai"], "file_name": "sub/rows.json"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": described}))
    (sample,) = open_source(f"{tmp_path / 'dataset_info.json'}:x")
    assert [item.path for item in sample.media()] == [tmp_path / "b.png"]
    (other,) = open_source(f"{tmp_path / 'dataset_info.json'}:x", DataConfig(folder=str(tmp_path / "sub")))
    assert [item.path for item in other.media()] == [tmp_path / "sub" / "b.png"]
