# ruff: noqa: E501 (whole messages are compared)
"""Parquet and Arrow files as Hugging Face's `datasets` writes them: rows in any order, media as bytes, none read to scan."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from avlm.config.data import DataConfig
from avlm.data.decoding.files import LIMITS, read
from avlm.data.readers.tables import Tables
from avlm.data.sources import open_source
from avlm.errors import ConfigError, DataError, MissingExtraError
from avlm.samples import Sample, Text

WHY = "datasets is not installed: pip install 'avlm[datasets]'"
datasets = pytest.importorskip("datasets", reason=WHY)
pa = pytest.importorskip("pyarrow", reason=WHY)
parquet = pytest.importorskip("pyarrow.parquet", reason=WHY)

WAV = b"RIFF....WAVE sound"


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def told(sample: Sample) -> list[Any]:
    """A conversation with the bytes of its media."""
    return [
        (turn.role, [part.text if isinstance(part, Text) else (part.kind, read(part, LIMITS)) for part in turn.parts])
        for turn in sample.turns
    ]


def talks(count: int = 5) -> Any:
    """A dataset of conversations about pictures, one, two or none of them."""
    rows = [
        {
            "id": str(i),
            "images": [{"bytes": png(10 * i + k), "path": None} for k in range(i % 3)],
            "messages": [{"role": "user", "content": "<image>" * (i % 3) + f"How many in {i}?"}, {"role": "assistant", "content": str(i % 3)}],
        }
        for i in range(count)
    ]  # fmt: skip
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "messages": datasets.List(turn),
    }
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


EXPECTED = [
    [("user", [*(("image", png(10 * i + k)) for k in range(i % 3)), f"How many in {i}?"]), ("assistant", [str(i % 3)])]
    for i in range(5)
]


def saved(tmp_path: Path, way: str) -> Path:
    """The conversations on the disk, as one writes them with `datasets`."""
    made, path = talks(), tmp_path / f"talks.{way}"
    if way == "parquet":
        made.to_parquet(path, batch_size=2)
    elif way == "folder":
        path.mkdir()
        for i in range(2):
            made.shard(2, i, contiguous=True).to_parquet(path / f"data-{i}.parquet")
    elif way == "saved":
        made.save_to_disk(path, num_shards=2)
    elif way == "dict":
        datasets.DatasetDict({"train": made, "validation": made.select([4, 3])}).save_to_disk(path)
    elif way == "arrow":
        made.save_to_disk(tmp_path / "aside")
        (tmp_path / "aside" / "data-00000-of-00001.arrow").rename(path)
    else:  # the hub's names
        (path / "data").mkdir(parents=True)
        made.to_parquet(path / "data" / "train-00000-of-00001.parquet")
        made.select([4, 3]).to_parquet(path / "data" / "test-00000-of-00001.parquet")
    return path


@pytest.mark.parametrize("way", ["parquet", "folder", "saved", "dict", "arrow", "hub"])
def test_a_dataset_on_the_disk_is_read_however_it_was_saved(tmp_path: Path, way: str) -> None:
    source = open_source(saved(tmp_path, way))
    assert source.errors == [] and "messages" in source.kind
    assert [told(source[i]) for i in (4, 0, 2, 1, 3)] == [EXPECTED[i] for i in (4, 0, 2, 1, 3)]
    assert [facts.kinds for facts in source.facts] == [{"image"} if i % 3 else frozenset() for i in range(5)]
    again = pickle.loads(pickle.dumps(source))
    assert told(again[4]) == EXPECTED[4] and len(pickle.dumps(source)) < 10_000
    assert source[0].id == "0" and " row 1" in source.where(0) and source[0].where == source.where(0)


@pytest.mark.parametrize("way", ["dict", "hub"])
def test_splits_are_told_apart(tmp_path: Path, way: str) -> None:
    path = saved(tmp_path, way)
    held_out = {"dict": "validation", "hub": "test"}[way]
    for source in (open_source(path, use="eval"), open_source(f"{path}:{held_out}")):
        assert [told(sample) for sample in source] == [EXPECTED[4], EXPECTED[3]]
    with pytest.raises(ConfigError) as error:
        open_source(f"{path}:dev")
    assert f"has no split dev (it has {'train, validation' if way == 'dict' else 'test, train'})" in str(error.value)


def test_columns_of_media_by_other_names_and_plain_bytes(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "jpg": datasets.Image(),
            "q": datasets.Value("string"),
            "a": datasets.List(datasets.Value("string")),
            "sound": datasets.Value("binary"),
        }
    )
    rows = [
        {"jpg": {"bytes": png(i), "path": f"{i}.png"}, "q": f"q{i}", "a": ["x", f"a{i}"], "sound": WAV}
        for i in range(3)
    ]
    path = tmp_path / "t.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    columns: dict[Any, str] = {"image": "jpg", "audio": "sound", "question": "q", "answer": "a[1]"}
    source = open_source(path, DataConfig(columns=columns))
    assert source.errors == [] and [facts.kinds for facts in source.facts] == [{"image", "audio"}] * 3
    assert told(source[1]) == [("user", [("image", png(1)), ("audio", WAV), "q1"]), ("assistant", ["a1"])]
    assert source[1].media()[0].name() == "1.png"


def test_a_column_of_media_that_nobody_names_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = [{"image": png(i), "q": "q", "a": "a"} for i in range(2)]
    datasets.Dataset.from_list(rows).to_parquet(path)
    columns: dict[Any, str] = {"question": "q", "answer": "a"}
    told = (
        r"t\.parquet: has image, and data\.columns names other columns alone, so image is not read\. Add image: image"
    )
    with pytest.warns(UserWarning, match=told):
        assert open_source(path, DataConfig(columns=columns))[0].media() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_source(path, DataConfig(columns={**columns, "image": "image"}))[0].media()) == 1


def test_audio_is_read_as_bytes_or_by_its_path_without_torchcodec(tmp_path: Path) -> None:
    """`datasets` needs torchcodec to encode Audio, and not to store what is encoded: so its files are like this one."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    (tmp_path / "b.wav").write_bytes(b"file")
    audio = pa.array([{"bytes": WAV, "path": "a.wav"}, {"bytes": None, "path": "b.wav"}, None], kind)
    table = pa.table({"speech": audio, "query": ["What?", "And?", "Why?"], "response": ["a bell", "none", "so"]})
    info = datasets.Features(
        {
            "speech": datasets.Audio(sampling_rate=16_000),
            "query": datasets.Value("string"),
            "response": datasets.Value("string"),
        }
    )
    for name, write in (("t.parquet", parquet.write_table), ("t.arrow", _write_stream)):
        write(table.replace_schema_metadata(info.arrow_schema.metadata), tmp_path / name)
        source = open_source(tmp_path / name)
        assert [told(sample) for sample in source] == [
            [("user", [("audio", WAV), "What?"]), ("assistant", ["a bell"])],
            [("user", [("audio", b"file"), "And?"]), ("assistant", ["none"])],
            [("user", ["Why?"]), ("assistant", ["so"])],
        ]
        assert [facts.kinds for facts in source.facts] == [{"audio"}, {"audio"}, frozenset()]


def _write_stream(table: Any, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("way", ["parquet", "arrow"])
def test_media_are_not_read_to_look_through_rows(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, way)
    seen: list[str] = []
    if way == "parquet":
        whole = parquet.ParquetFile.read_row_group

        def reading(self: Any, number: int, columns: list[str] | None = None) -> Any:
            seen.extend(columns or ["all"])
            return whole(self, number, columns=columns)

        monkeypatch.setattr(parquet.ParquetFile, "read_row_group", reading)
        Tables([path])
        assert seen and not any(name.endswith("bytes") or name == "all" for name in seen)
    else:
        data = path.read_bytes()
        at = data.index(png(10))  # damage in a medium is not seen, as it is not looked at
        path.write_bytes(data[:at] + b"?" * 10 + data[at + 10 :])
        assert Tables([path]).errors == []


def test_groups_of_rows_are_kept_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(
        pa.table({"query": [f"{i}" for i in range(40)], "response": ["a"] * 40}), path, row_group_size=4
    )
    source = Tables([path])
    order = np.random.default_rng(0).permutation(40)
    assert [source[int(i)].turns[0].text() for i in order] == [str(i) for i in order]
    assert len(source._open) == 2
    assert source.where(39) == "t.parquet row 40"


def test_a_bad_row_is_named_and_reading_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"query": ["a", "b", "c"], "response": ["x", None, "z"], "id": ["1", "2", "3"]}), path)
    source = open_source(path)
    assert [sample.id for sample in source] == ["1", "3"]
    (error,) = source.errors
    assert (
        str(error)
        == 't.parquet row 2 (id "2"): has a question and no "response" (or "output"), so there is nothing to learn. Give an answer'
    )


def test_the_fingerprint_is_that_of_the_words(tmp_path: Path) -> None:
    prints = set()
    for name, answer in (("a", "x"), ("b", "x"), ("c", "y")):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.table({"query": ["a"], "response": [answer]}), path)
        prints.add(open_source(path).fingerprint())
    assert len(prints) == 2


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for ending in ("parquet", "arrow"):
        path = tmp_path / f"t.{ending}"
        path.write_bytes(b"PAR1 nothing")
        with pytest.raises(
            ConfigError, match=rf"t\.{ending}: not readable as {ending} \(Arrow\w+\)\. Copy or write the file again"
        ):
            open_source(path)
        path.unlink()
        with pytest.raises(ConfigError, match=rf"t\.{ending}: not readable as {ending} \(No such file or directory\)"):
            open_source(path)
    path = tmp_path / "e.parquet"
    parquet.write_table(pa.table({"query": pa.array([], pa.string())}), path)
    with pytest.raises(
        ConfigError, match=r"e.parquet: has no row that can be read, so there is nothing to learn from. It is empty"
    ):
        open_source(path)


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        MissingExtraError, match=r"Reading t.parquet needs the library pyarrow, .* pip install 'avlm\[datasets\]'"
    ):
        open_source(tmp_path / "t.parquet")


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4) | st.binary(max_size=4), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["bytes", "path", "role", "content", "from", "value"]), inner, max_size=3), max_leaves=6)  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(
        st.sampled_from(
            [
                "image",
                "images",
                "audio",
                "query",
                "response",
                "messages",
                "conversations",
                "id",
                "history",
                "system",
                "jpg",
            ]
        ),
        VALUES,
        max_size=5,
    )
)
def test_any_table_is_rows_or_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "t.parquet"
    try:
        parquet.write_table(pa.Table.from_pylist([row, row]), path)
    except (pa.ArrowException, TypeError, ValueError):
        return  # no table holds this
    for config in (DataConfig(), DataConfig(columns={"image": "jpg", "question": "query", "answer": "response"})):
        with contextlib.suppress(ConfigError, DataError):
            list(Tables([path], config))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.list_(pa.binary())])
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_column_of_bytes_may_hold_nothing_in_some_rows(tmp_path: Path, kind: Any, ending: str) -> None:
    held = [png(1), None, png(2)]
    pictures = [[one] if one else None for one in held] if pa.types.is_list(kind) else held
    asked = ["<image>a", "b", "<image>c"]
    table = pa.table({"image": pa.array(pictures, kind), "query": asked, "response": ["1", "2", "3"]})
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    source = open_source(path)
    assert source.errors == []
    assert [[item.data for item in sample.media()] for sample in source] == [[png(1)], [], [png(2)]]


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    table = pa.table({"jpg": [png(1), png(2)], "q": ["a", "b"], "a": ["1", "2"], "heard": pa.nulls(2, pa.binary())})
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path)
    columns: dict[Any, str] = {"image": "jgp", "audio": "heard", "question": "q", "answer": "a"}
    with pytest.raises(ConfigError) as error:
        open_source(path, DataConfig(columns=columns))
    assert str(error.value) == (
        "t.parquet: no row has jgp, which data.columns.image names, so its rows would be read without. "
        "Correct the name, or leave it out"
    )
    several = DataConfig(columns=columns, train=[str(path), "other.parquet"])  # which may have it
    assert len(open_source(path, several)) == 2
    assert len(open_source(path, DataConfig(columns={**columns, "image": "jgp,jpg"}))) == 2
