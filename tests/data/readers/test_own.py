# ruff: noqa: E501 (whole messages are compared)
"""A reader of one's own is one class, as docs/data.md shows; what it does wrong is said."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from avlm.config.data import DataConfig, DataSet
from avlm.data.sources import open_source
from avlm.errors import ConfigError
from avlm.samples import MediaItem

DOCS = (Path(__file__).parents[3] / "docs/data.md").read_text()


def own(tmp_path: Path, body: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text(body)
    return f"{path}:Mine"


def test_the_example_of_the_docs_works(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?class Birds.*?)```", DOCS, re.S)
    (tmp_path / "birds.py").write_text(code)
    (tmp_path / "birds.csv").write_text("a.wav,a blackbird\nb.wav,a robin\n")
    source = open_source(f"{tmp_path / 'birds.py'}:Birds", DataConfig(folder=str(tmp_path)))
    assert [sample.turns[1].text() for sample in source] == ["a blackbird", "a robin"]
    assert source[1].media() == [MediaItem("audio", path=tmp_path / "b.wav")] and source.facts[0].kinds == {"audio"}
    assert source.where(1) == "Birds row 2" and source.name == "Birds"
    again = pickle.loads(pickle.dumps(source))
    assert again[0] == source[0] and again.fingerprint() == source.fingerprint() and len(pickle.dumps(source)) < 5000
    (tmp_path / "birds.csv").write_text("a.wav,a blackbird\nb.wav,a wren\n")
    assert (
        open_source(f"{tmp_path / 'birds.py'}:Birds", DataConfig(folder=str(tmp_path))).fingerprint()
        != source.fingerprint()
    )


ROWS = '{"query": str(i), "response": "x", "task": "t"}'


def test_where_and_fingerprint_are_its_own_if_it_has_them(tmp_path: Path) -> None:
    body = f"""
class Mine:
    def __len__(self): return 2
    def __getitem__(self, i): return {ROWS}
    def where(self, i): return f"page {{i}}"
    def fingerprint(self): return "v1"
"""
    source = open_source(own(tmp_path, body))
    assert source.where(1) == "page 1" == source[1].where and source.fingerprint() == "v1"


def test_a_module_is_named_without_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(
        tmp_path,
        f"class Mine:\n    def __len__(self): return 1\n    def __getitem__(self, i): return {ROWS}\n",
        "some_rows.py",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(open_source("some_rows:Mine")) == 1


def test_each_reader_has_its_own_spool_and_what_it_could_not_give_is_told_again(tmp_path: Path) -> None:
    body = """
class Some:
    words = "ab"
    def __iter__(self):
        return ({"query": word, "response": word} if word != "x" else {"query": word} for word in self.words)
class Others(Some):
    words = "cxd"
"""
    own(tmp_path, body)
    data = DataConfig(spool=str(tmp_path / "spool"))
    for _ in range(2):
        some, others = (open_source(f"{tmp_path}/mine.py:{name}", data) for name in ("Some", "Others"))
        assert [sample.turns[0].text() for sample in some] == ["a", "b"] and some.errors == []
        assert [sample.turns[0].text() for sample in others] == ["c", "d"]
        assert [(error.where, error.reason[:27]) for error in others.errors] == [
            ("Others row 2", 'has neither "messages" nor ')
        ]
    assert some.fingerprint() != others.fingerprint()


def test_several_processes_write_a_spool_once(tmp_path: Path) -> None:
    body = """
import time
class Mine:
    def __iter__(self):
        for i in range(20):
            time.sleep(0.02)
            yield {"query": str(i), "response": "x"}
"""
    text = own(tmp_path, body)
    ask = (
        "from avlm.config.data import DataConfig; from avlm.data.sources import open_source; "
        f"print(len(open_source({text!r}, DataConfig(spool={str(tmp_path / 'spool')!r}))))"
    )
    started = [subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE) for _ in range(3)]
    assert [one.communicate(timeout=120)[0].strip() for one in started] == [b"20"] * 3


def test_a_share_of_a_set_is_read_as_of_a_file(tmp_path: Path) -> None:
    rows = [{"id": str(i), "set": "s", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]} for i in range(20)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = own(tmp_path, f"class Mine:\n    def __len__(self): return 20\n    def __getitem__(self, i): return {rows}[i]\n")  # fmt: skip
    data = DataConfig(sets={"s": DataSet(ratio=0.4)})
    kept = [sample.id for sample in open_source(text, data)]
    assert kept == [sample.id for sample in open_source(tmp_path / "rows.jsonl", data)] and len(kept) == 8


def test_rows_that_come_in_their_order_only_are_written_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    body = """
runs = 0
class Mine:
    def __iter__(self):
        global runs
        runs += 1
        assert runs == 1
        for i in range(5):
            yield {"query": f"<image>{i}", "response": "x", "image": "a.png", "set": "one"} if i != 3 else {"query": "<image>"}
"""
    text = own(tmp_path, body)
    with pytest.raises(ConfigError, match=r"reads rows in their order only, .* data\.spool=FOLDER"):
        open_source(text)
    data = DataConfig(spool=str(tmp_path / "spool"), folder=str(tmp_path))
    source = open_source(text, data)
    assert [sample.turns[0].text() for sample in source] == ["0", "1", "2", "4"]
    assert [error.where for error in source.errors] == ["Mine row 4"]
    assert {facts.set for facts in source.facts} == {"one"}
    (tmp_path / "a.png").unlink()
    again = open_source(text, data)  # from the folder; the reader is not asked again
    assert again[3].media()[0].span is not None and again.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class Other: ...", "{0}: has nothing named Mine. Correct the name behind the colon"),
        ("Mine = 3", "{0}:Mine: is int and no class. Name a class that reads rows"),
        ("class Mine: ...", "{0}:Mine: has neither __getitem__ and __len__ nor __iter__, so it reads nothing. Write them"),
        ("def broken(", "{0}: cannot be imported (SyntaxError: '(' was never closed (mine.py, line 1)). Correct it"),
        ("class Mine:\n    def __init__(self): 1 / 0", "{0}:Mine: cannot be made (ZeroDivisionError: division by zero). Correct it"),
        ("class Mine:\n    def __len__(self): return 1\n    def __getitem__(self, i): 1 / 0", "{0}:Mine: has no row that can be read, so there is nothing to learn from. The first one: Mine row 1: the reader raised ZeroDivisionError (division by zero). Correct it, or have it raise a DataError that says what is wrong with the row"),
        ("class Mine:\n    def __len__(self): return 1\n    def __getitem__(self, i): return 3", "{0}:Mine: has no row that can be read, so there is nothing to learn from. The first one: Mine row 1: is a number and not an object."),
        ("class Mine:\n    def __len__(self): return len(None)\n    def __getitem__(self, i): return 3", "{0}:Mine: its __len__() raised TypeError (object of type 'NoneType' has no len()). Correct it"),
        ("class Mine:\n    def where(self, i): 1 / 0\n    def __len__(self): return 1\n    def __getitem__(self, i): return 3", "{0}:Mine: its where(0) raised ZeroDivisionError (division by zero). Correct it"),
        ("class Mine:\n    def __len__(self): return 0\n    def __getitem__(self, i): return 3", "{0}:Mine: has no row that can be read, so there is nothing to learn from. It has none."),
    ],
)  # fmt: skip
def test_what_it_does_wrong_is_said(tmp_path: Path, body: str, message: str) -> None:
    text = own(tmp_path, body)
    with pytest.raises(ConfigError) as error:
        open_source(text)
    expected = message.format(tmp_path / "mine.py")
    assert str(error.value).startswith(expected)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine.py: there is no such file\. Give the path of your Python file"):
        open_source(f"{tmp_path}/mine.py:Mine")
    with pytest.raises(ConfigError, match=r"no_such_module_at_all: cannot be imported \(ModuleNotFoundError"):
        open_source("no_such_module_at_all:Mine")
