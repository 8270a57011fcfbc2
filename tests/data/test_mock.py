"""Made-up data: small, quick, the same for the same seed, and enough for every kind of stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from avlm.config.data import DataConfig
from avlm.config.stage import Rows, Stage
from avlm.convert.compose import Composed
from avlm.data.loader import StepLoader
from avlm.data.mock import ROWS, make_mock
from avlm.data.sources import JsonLines

SENSES = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("sees", "hears"), SENSES)
def test_it_has_what_the_model_has_senses_for(sees: bool, hears: bool, tmp_path: Path) -> None:
    began = time.process_time()
    source = JsonLines(make_mock(tmp_path / "mock", sees=sees, hears=hears))
    assert time.process_time() - began < 3
    assert len(source) == ROWS == 64 and source.errors == []
    kinds = set().union(*(row.kinds for row in source.facts))
    assert kinds == ({"image", "video"} if sees else set()) | ({"audio"} if hears else set())
    assert any(not row.kinds for row in source.facts)
    assert all(item.alt and item.path is not None and item.path.is_file() for s in source for item in s.media())
    noise = sum(turn.state == "noise" for sample in source for turn in sample.turns)
    assert noise == (0 if not hears else 8 if sees else 16)
    assert sum(path.stat().st_size for path in (tmp_path / "mock").iterdir()) < 2**20


def test_it_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        make_mock(tmp_path / name, sees=True, hears=True, seed=seed)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    a, b, c = files("a", 1), files("b", 1), files("c", 2)
    assert a == b and a.keys() == c.keys() and a != c


def test_what_is_there_is_used_again_and_what_broke_off_is_made_anew(tmp_path: Path) -> None:
    rows = make_mock(tmp_path, sees=False, hears=False)
    rows.write_text(rows.read_text().splitlines()[0])
    assert len(JsonLines(make_mock(tmp_path, sees=False, hears=False))) == 1
    rows.rename(tmp_path / ".rows.jsonl.writing")
    assert len(JsonLines(make_mock(tmp_path, sees=False, hears=False))) == ROWS


@pytest.mark.parametrize(
    ("rows", "loss"),
    [(rows, loss) for rows in ("any", "vision", "audio") for loss in ("next_token", "distill")]
    + [("text", "next_token")],
)
def test_every_kind_of_stage_finds_rows_that_it_can_read(
    rows: Rows, loss: str, make_model: Callable[..., Composed], tmp_path: Path
) -> None:
    made = make_model()
    path = make_mock(tmp_path / "mock", sees=True, hears=True, tasks=("ocr", "asr"))
    for task in ("ocr", "asr"):
        stage = {"name": "s", "steps": 1, "batch_samples": 8, "rows": rows, "loss": loss, "tasks": (task,)}
        step = StepLoader(JsonLines(path), Stage.model_validate(stage), made.processor, DataConfig(), seed=0).step(0)
        assert step.bad == [] and step.num_samples == 8 and step.num_targets() > 8


def test_its_rows_are_in_our_own_form(tmp_path: Path) -> None:
    row = json.loads(make_mock(tmp_path, sees=True, hears=True).read_text().splitlines()[7])
    assert row["messages"][0]["content"] == [{"type": "audio", "path": "7.wav", "alt": "noise"}]
    assert row["messages"][1]["state"] == "noise"
