"""Rows with a better and a worse answer, in the forms that people have them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avlm.data.forms.parse import Folders, parse_row, recognise
from avlm.data.indexing.counting import row_key
from avlm.data.rows import RowTable, facts_of
from avlm.data.sources import JsonLines
from avlm.data.writers import convert_rows
from avlm.errors import DataError
from avlm.samples import MediaItem, Sample

ASKED = {"role": "user", "content": "Which?"}
SAID = {"role": "assistant", "content": "this"}
PICTURE = {"type": "image", "path": "a.png"}

FORMS = {
    "ours, two texts": {"messages": [ASKED], "chosen": "this", "rejected": "that"},
    "ours, two messages": {"messages": [ASKED], "chosen": SAID, "rejected": {"role": "assistant", "content": "that"}},
    "ours, the better one in its place": {"messages": [ASKED, SAID], "rejected": "that"},
    "ms-swift's messages": {"messages": [ASKED, SAID], "rejected_response": "that"},
    "ms-swift's query": {"query": "Which?", "response": "this", "rejected_response": "that"},
    "ms-swift's two conversations": {
        "messages": [ASKED, SAID],
        "rejected_messages": [ASKED, {"role": "assistant", "content": "that"}],
    },
    "LLaMA-Factory's sharegpt": {
        "conversations": [{"from": "human", "value": "Which?"}],
        "chosen": {"from": "gpt", "value": "this"},
        "rejected": {"from": "gpt", "value": "that"},
    },
    "LLaMA-Factory's alpaca": {"instruction": "Which?", "input": "", "chosen": "this", "rejected": "that"},
    "TRL's prompt as a text": {"prompt": "Which?", "chosen": "this", "rejected": "that"},
    "TRL's prompt as messages": {
        "prompt": [ASKED],
        "chosen": [SAID],
        "rejected": [{"role": "assistant", "content": "that"}],
    },
    "TRL's whole conversations": {
        "chosen": [ASKED, SAID],
        "rejected": [ASKED, {"role": "assistant", "content": "that"}],
    },
}


def read(row: dict[str, Any], folder: Path = Path()) -> Sample:
    return parse_row(row, Folders(folder), "line 1", recognise(row))


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in FORMS.items()])
def test_the_better_answer_is_the_turn_and_the_worse_stands_beside_it(row: dict[str, Any]) -> None:
    sample = read(row)
    assert [(turn.role, turn.text()) for turn in sample.turns] == [("user", "Which?"), ("assistant", "this")]
    assert sample.rejected is not None
    assert (sample.rejected.role, sample.rejected.text()) == ("assistant", "that")
    assert facts_of(sample).pair


def test_media_stand_in_the_question_once() -> None:
    ours = read({"messages": [{"role": "user", "content": [PICTURE]}], "chosen": "a", "rejected": "b"})
    marked = read({"query": "<image>Which?", "images": ["a.png"], "response": "a", "rejected_response": "b"})
    for sample in (ours, marked):
        assert [item.kind for item in sample.media()] == ["image"]
        assert sample.rejected is not None and not any(isinstance(p, MediaItem) for p in sample.rejected.parts)


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_a_worse_answer_of_nothing_is_none(nothing: Any) -> None:
    """Tables have every column in every row."""
    sample = read({"messages": [ASKED, SAID], "chosen": None, "rejected": nothing, "rejected_response": None})
    assert sample.rejected is None and sample.turns[-1].text() == "this"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [ASKED], "chosen": "a", "rejected": 3},
            "has a number as an answer of a pair, and that is a text",
        ),
        (
            {"chosen": [ASKED, SAID], "rejected": [{"role": "user", "content": "Else?"}, SAID]},
            "has two answers (chosen and rejected) that follow different words, and they are compared as answers to "
            "the same. Give one conversation up to its last question, and each answer to that",
        ),
        (
            {"query": "Which?", "response": "a", "rejected": ["b"]},
            'has a list as "rejected", which is an answer in words',
        ),
    ],
)
def test_pairs_that_are_none_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        read(row)
    assert message in error.value.reason


def test_pairs_are_written_again_as_they_were_read(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "".join(json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate([FORMS["ours, two texts"]]))
    )
    made = convert_rows(JsonLines(source), tmp_path / "out", to="jsonl")
    again = JsonLines(made.path)[0]
    assert again.rejected == JsonLines(source)[0].rejected is not None


def test_tables_know_which_rows_are_pairs_also_joined_and_cut_down() -> None:
    one, pair = read({"messages": [ASKED, SAID]}), read(FORMS["ours, two texts"])
    table = RowTable(map(facts_of, (one, pair, one)))
    assert table.pair.tolist() == [0, 1, 0] and table[1].pair
    assert table.kept([1, 2]).pair.tolist() == [1, 0]
    assert RowTable.joined([table, table.kept([1])]).pair.tolist() == [0, 1, 0, 1]


def test_another_worse_answer_is_another_row_for_the_index() -> None:
    texts = ("that", "neither", None)
    keys = {row_key(read({"messages": [ASKED, SAID], "rejected": text}), []) for text in texts}
    assert len(keys) == 3
