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
from avlm.errors import ConfigError, DataError
from avlm.training.chain import Run
from avlm.training.observe import read_lines

Small = Callable[..., RunConfig]
EPOCHS = ["stages.joint.epochs=2", "stages.joint.batch_rows=1"]
TIMES = ("seconds", "data_seconds", "tokens_per_s")


class Dead(BaseException):
    """Stands for a kill."""


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
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def weights(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}


def quarantined(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "quarantine.jsonl")


# ---------------------------------------------------------------- epochs


def test_epochs_of_packed_rows_read_every_sample_so_often(small_run: Small, tmp_path: Path) -> None:
    told = train(small_run("run", EPOCHS))
    steps = [row["samples"] for row in lines(tmp_path / "run", "joint")]
    assert sum(steps[:-1]) < 2 * 12 <= sum(steps)  # 12 samples twice, and what else the last step's rows hold
    assert json.loads((tmp_path / "run" / "steps.json").read_text()) == {"joint": len(steps)}
    assert f"joint: 2 epochs are {len(steps)} steps of its packed rows" in told


@pytest.mark.parametrize("at", [10, 11, 12], ids=["first step", "second", "third"])
def test_a_run_that_goes_on_takes_as_many_steps(small_run: Small, tmp_path: Path, at: int) -> None:
    train(small_run("whole", EPOCHS))
    with pytest.raises(Dead):
        train(small_run("cut", EPOCHS), die_at=at)
    assert "resumed at step" in train(small_run("cut", EPOCHS))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_stage_behind_it_counts_from_its_steps(small_run: Small, tmp_path: Path) -> None:
    """Also where parts are built side by side, which waits for stages whose length is not known yet."""
    early = ["stages.language.epochs=1", "stages.language.batch_rows=2", "side_by_side=2"]
    train(small_run("run", early), "vision")
    train(small_run("run", early))
    found = lines(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    language = [row["samples"] for row in found if row["stage"] == "language"]
    assert sum(language[:-1]) < 12 <= sum(language)
    noted = tmp_path / "run" / "steps.json"
    assert json.loads(noted.read_text()) == {"language": len(language)}


def test_a_length_that_is_lost_is_told_where_it_is_needed(small_run: Small, tmp_path: Path) -> None:
    early = ["stages.language.epochs=1", "stages.language.batch_rows=2"]
    train(small_run("run", early), "language")
    kept = (tmp_path / "run" / "steps.json").rename(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match=r"steps\.json does not say how many steps stage language took.*Put the file"):
        train(small_run("run", early), "vision")
    kept.rename(tmp_path / "run" / "steps.json")  # the advice holds
    train(small_run("run", early), "vision")


def test_max_steps_cuts_it_and_cannot_change_once_it_has_mattered(small_run: Small, tmp_path: Path) -> None:
    with pytest.raises(Dead):
        train(small_run("run", [*EPOCHS, "max_steps=3"]), die_at=11)
    with pytest.raises(ConfigError, match="begun with max_steps=3, and now max_steps=2"):
        train(small_run("run", [*EPOCHS, "max_steps=2"]))
    train(small_run("run", [*EPOCHS, "max_steps=3"]))
    assert len(lines(tmp_path / "run", "joint")) == 3
    assert json.loads((tmp_path / "run" / "steps.json").read_text())["joint"] > 3


# ---------------------------------------------------------------- samples that cannot be counted


def broken(tmp_path: Path) -> None:
    """A picture's header that is none, in row 1 of line 1 and of line 9."""
    for name in ("p0.png", "p8.png"):
        (tmp_path / name).write_bytes(b"no picture at all")


def test_samples_that_cannot_be_counted_are_left_out_and_listed_once(small_run: Small, tmp_path: Path) -> None:
    config = small_run("run", EPOCHS)
    broken(tmp_path)
    told = train(config)
    found = [row for row in quarantined(tmp_path / "run") if row["stage"] == "joint"]
    assert [(r["sample_id"], r["where"]) for r in found] == [("0", "rows.jsonl line 1"), ("8", "rows.jsonl line 9")]
    assert [Path(row["file"]).name for row in found] == ["p0.png", "p8.png"]
    assert all("not readable as an image" in row["reason"] for row in found)
    assert "joint: 2 rows cannot be used and are left out; see quarantine.jsonl" in told
    steps = [row["samples"] for row in lines(tmp_path / "run", "joint")]
    assert sum(steps[:-1]) < 2 * 10 <= sum(steps)


def test_too_many_that_cannot_be_counted_stop_the_run_before_its_first_step(small_run: Small, tmp_path: Path) -> None:
    config = small_run("run", [*EPOCHS, "stages.align.steps=1", "data.max_bad=0.3"], count=44)
    train(config, "align")
    for i in range(0, 44, 2):
        (tmp_path / f"p{i}.png").write_bytes(b"no picture at all")
    with pytest.raises(DataError, match=r"22 of 44 samples were bad, more than data\.max_bad=0\.3 allows") as error:
        train(config)
    assert error.value.where.startswith("rows.jsonl line ")
    assert not lines(tmp_path / "run", "joint")
    assert len([row for row in quarantined(tmp_path / "run") if row["stage"] == "joint"]) == 22


def test_samples_longer_than_a_row_are_listed_where_they_are_dropped(small_run: Small, tmp_path: Path) -> None:
    config = small_run("run", [*EPOCHS, "data.too_long=drop", "stages.joint.row_tokens=60"])
    row = {"messages": [{"role": "user", "content": "Say it." * 30}, {"role": "assistant", "content": "red"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text() + json.dumps({"id": "long", "task": "text", **row}) + "\n")
    train(config)
    found = {row["sample_id"]: row for row in quarantined(tmp_path / "run") if row["stage"] == "joint"}
    assert found["long"]["where"] == "rows.jsonl line 13"
    assert "tokens, and a row of stage joint holds 60" in found["long"]["reason"]


def test_a_run_goes_on_with_what_it_planned_with(small_run: Small, tmp_path: Path) -> None:
    """A file that is whole again does not change the plan; without the plan's numbers the run says so."""
    for name in ("whole", "cut", "lost"):
        config = small_run(name, EPOCHS)
        shutil.copy(tmp_path / "p1.png", tmp_path / "p0.png")
        train(config, "align")
        broken(tmp_path)
        if name == "whole":
            train(config)
            continue
        with pytest.raises(Dead):
            train(config, die_at=11)
    shutil.copy(tmp_path / "p1.png", tmp_path / "p0.png")
    train(small_run("cut", EPOCHS))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    shutil.rmtree(tmp_path / "lost" / "index")
    with pytest.raises(ConfigError, match=r"the index of rows\.jsonl has changed since step"):
        train(small_run("lost", EPOCHS))
