"""Stages that take packed rows: so many epochs of them, and samples that their index cannot count."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.errors import ConfigError, DataError
from avlm.training.chain import Run
from avlm.training.observe import MEASURED, read_lines

Small = Callable[..., RunConfig]
JOINT = {
    "name": "joint",
    "train": {"vision_connector": {"lr": 1e-3}, "language": {"lr": 1e-3}},
    "epochs": 2,
    "batch_rows": 1,
    "row_tokens": 128,
}


class Dead(BaseException):
    """Stands for a kill."""


def packed(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with one stage, of two epochs of packed rows."""
    return config.model_copy(update={"stages": (Stage.model_validate({**JOINT, **changes}),)})


def train(config: RunConfig, only: str | None = None, *, die_at: int | None = None) -> str:
    """Train; returns what was told."""

    def die(metrics: Any) -> None:
        if metrics.step == die_at:
            raise Dead

    console = Console(record=True, file=io.StringIO(), width=1000)
    Run(config, console=console, on_step=die).train(only)
    return console.export_text()


def lines(out: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """What was written down of each step, but for its times."""
    found = [r for r in read_lines(out / "metrics.jsonl") if stage in (None, r["stage"])]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in found]


def weights(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}


def quarantined(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "quarantine.jsonl")


# ---------------------------------------------------------------- epochs


def test_epochs_of_packed_rows_read_every_sample_so_often(small_run: Small, tmp_path: Path) -> None:
    told = train(packed(small_run()))
    steps = [row["samples"] for row in lines(tmp_path / "run")]
    assert sum(steps[:-1]) < 2 * 12 <= sum(steps)  # 12 samples twice, and what else the last step's rows hold
    assert json.loads((tmp_path / "run" / "steps.json").read_text()) == {"joint": len(steps)}
    assert f"joint: 2 epochs are {len(steps)} steps of its packed rows" in told


def test_a_run_that_goes_on_takes_as_many_steps(small_run: Small, tmp_path: Path) -> None:
    train(packed(small_run("whole")))
    for at in (2, 3):
        with pytest.raises(Dead):
            train(packed(small_run("cut")), die_at=at)
    told = train(packed(small_run("cut")))
    assert "resumed at step" in told and "epochs are" not in told
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_counts_again(small_run: Small, tmp_path: Path) -> None:
    never = ["save.every_s=1000", "save.every_steps=null"]
    with pytest.raises(Dead):
        train(packed(small_run("run", never)), die_at=2)
    with (tmp_path / "rows.jsonl").open("a") as file:  # so that a note of before would be wrong
        file.write((tmp_path / "rows.jsonl").read_text())
    (tmp_path / "run" / "data.json").unlink()
    told = train(packed(small_run("run", never)))
    steps = [row["samples"] for row in lines(tmp_path / "run")]
    assert sum(steps[:-1]) < 2 * 24 <= sum(steps) and f"2 epochs are {len(steps)} steps" in told


@pytest.mark.slow
def test_a_stage_behind_it_counts_from_its_steps(small_run: Small, tmp_path: Path) -> None:
    """Also where parts are built side by side, which waits for stages whose length is not known yet."""
    early = ["stages.language.epochs=1", "stages.language.batch_rows=2", "side_by_side=2"]
    train(small_run("run", early), "vision")
    train(small_run("run", early), "align")
    found = lines(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    language = [row["samples"] for row in found if row["stage"] == "language"]
    assert sum(language[:-1]) < 12 <= sum(language)
    noted = tmp_path / "run" / "steps.json"
    assert json.loads(noted.read_text()) == {"language": len(language)}
    kept = noted.rename(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match=r"steps\.json does not say how many steps stage language took.*Put the file"):
        train(small_run("run", early))
    kept.rename(noted)
    assert train(small_run("run", early), "align") is not None  # the advice holds


def test_max_steps_cuts_it_and_cannot_change_once_it_has_mattered(small_run: Small, tmp_path: Path) -> None:
    with pytest.raises(Dead):
        train(packed(small_run("run", ["max_steps=3"])), die_at=2)
    with pytest.raises(ConfigError, match="begun with max_steps=3, and now max_steps=2"):
        train(packed(small_run("run", ["max_steps=2"])))
    train(packed(small_run("run", ["max_steps=3"])))
    assert len(lines(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "steps.json").read_text())["joint"] > 3


# ---------------------------------------------------------------- samples that cannot be counted


def broken(tmp_path: Path) -> None:
    """Pictures whose headers are none, of lines 1 and 9."""
    for name in ("p0.png", "p8.png"):
        (tmp_path / name).write_bytes(b"no picture at all")


def test_samples_that_cannot_be_counted_are_left_out_and_listed_once(small_run: Small, tmp_path: Path) -> None:
    config = packed(small_run())
    broken(tmp_path)
    told = train(config)
    found = quarantined(tmp_path / "run")
    assert [(r["sample_id"], r["where"]) for r in found] == [("0", "rows.jsonl line 1"), ("8", "rows.jsonl line 9")]
    assert [Path(row["file"]).name for row in found] == ["p0.png", "p8.png"]
    assert all("not readable as a picture" in row["reason"] and row["step"] == 0 for row in found)
    assert "joint: 2 rows cannot be used and are left out; see quarantine.jsonl" in told
    steps = [row["samples"] for row in lines(tmp_path / "run")]
    assert sum(steps[:-1]) < 2 * 10 <= sum(steps)


def test_too_many_that_cannot_be_counted_stop_the_run_before_its_first_step(small_run: Small, tmp_path: Path) -> None:
    config = packed(small_run("run", ["data.max_bad=0.3"], count=44))
    for i in range(0, 44, 2):
        (tmp_path / f"p{i}.png").write_bytes(b"no picture at all")  # each is in a row
    with pytest.raises(DataError, match=r"22 of 44 samples were bad, more than data\.max_bad=0\.3 allows") as error:
        train(config)
    assert error.value.where.startswith("rows.jsonl line ")
    assert not lines(tmp_path / "run") and len(quarantined(tmp_path / "run")) == 22


def test_samples_longer_than_a_row_are_listed_where_they_are_dropped(small_run: Small, tmp_path: Path) -> None:
    config = packed(small_run("run", ["data.too_long=drop"]), row_tokens=60)
    row = {"messages": [{"role": "user", "content": "Say it." * 30}, {"role": "assistant", "content": "red"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text() + json.dumps({"id": "long", "task": "text", **row}) + "\n")
    train(config)
    (found,) = quarantined(tmp_path / "run")
    assert (found["sample_id"], found["where"]) == ("long", "rows.jsonl line 13")
    assert "tokens, and a row of stage joint holds 60" in found["reason"]


@pytest.mark.slow
def test_a_run_goes_on_with_what_it_planned_with(small_run: Small, tmp_path: Path) -> None:
    """A file that is whole again does not change the plan; without the plan's numbers the run says so."""
    small_run()
    kept = (tmp_path / "p0.png").read_bytes()
    broken(tmp_path)
    train(packed(small_run("whole")))
    with pytest.raises(Dead):
        train(packed(small_run("cut")), die_at=2)
    shutil.copytree(tmp_path / "cut", tmp_path / "lost")
    (tmp_path / "p0.png").write_bytes(kept)
    train(packed(small_run("cut")))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    shutil.rmtree(tmp_path / "lost" / "index")
    with pytest.raises(ConfigError, match=r"the index of rows\.jsonl has changed since step"):
        train(packed(small_run("lost")))
