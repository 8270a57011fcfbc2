"""Several sources as one, and the settings that name them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from avlm.config.data import DataConfig, paths_of
from avlm.config.io import override
from avlm.config.run import RunConfig
from avlm.config.stage import First, Stage
from avlm.data.planning.plan import Measures
from avlm.data.planning.planned import plan_of
from avlm.data.readers.joined import blended
from avlm.data.rows import RowSource
from avlm.data.selection import stage_rows, unmet
from avlm.data.sources import open_source
from avlm.errors import ConfigError


def written(path: Path, count: int, task: str, broken: bool = False) -> str:
    rows = [
        {"id": f"{task}{i}", "task": task, "messages": [
            {"role": "user", "content": f"{task} {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + ("{\n" if broken else ""))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> list[RowSource]:
    paths = [written(tmp_path / "a.jsonl", 5, "a"), written(tmp_path / "b.jsonl", 30, "b", broken=True)]
    return [open_source(path, DataConfig(train=path)) for path in paths]


def test_a_blend_is_its_members_end_to_end(sources: list[RowSource]) -> None:
    blend = blended(sources, [None, None])
    ids = [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(30)]
    assert len(blend) == 35
    assert [blend[i].id for i in range(35)] == [sample.id for sample in blend] == ids
    assert [row.task for row in blend.facts] == ["a"] * 5 + ["b"] * 30
    assert (blend.where(4), blend.where(5)) == (sources[0].where(4), sources[1].where(0))
    assert blend.errors == sources[1].errors and len(blend.errors) == 1
    assert [sample.id for sample in pickle.loads(pickle.dumps(blend))] == ids
    for outside in (-36, 35):
        with pytest.raises(IndexError):
            blend[outside]


def test_its_fingerprint_follows_from_its_members(sources: list[RowSource], tmp_path: Path) -> None:
    blend = blended(sources, [None, None])
    assert list(blend.fingerprints().values()) == [source.fingerprint() for source in sources]
    other = open_source(written(tmp_path / "c.jsonl", 6, "a"), DataConfig())
    assert len({blend.fingerprint(), blended([other, sources[1]], [None, None]).fingerprint()}) == 2
    twice = blended([sources[0], sources[0]], [1, 2]).fingerprints()
    assert len(twice) == 2


def test_a_stage_reads_a_blend_by_its_weights(sources: list[RowSource]) -> None:
    """The rows that a stage can learn from are counted for each source; a source without any has no turn."""
    blend = blended(sources, [3, 1])
    stage = Stage(name="s", steps=10, batch_samples=8)
    plan = plan_of(blend, stage_rows(blend.facts, stage), stage, DataConfig(), 0)
    read = [row for k in range(10) for row, _ in plan.samples(k)]
    assert sum(row < 5 for row in read) == 60
    only = stage.model_copy(update={"tasks": ("b",)})
    rows = stage_rows(blend.facts, only)
    plan = plan_of(blend, rows, only, DataConfig(), 0)
    assert {blend[rows[row]].task for k in range(10) for row, _ in plan.samples(k)} == {"b"}
    whole = plan_of(blended(sources, [None, None]), range(35), stage, DataConfig(), 0)
    assert sorted(row for k in range(5) for row, epoch in whole.samples(k) if epoch == 0) == list(range(35))


def test_where_no_row_is_to_come_first_all_do(sources: list[RowSource]) -> None:
    stage = Stage(name="s", steps=10, batch_samples=8, first=First(of=("no task",), steps=5))
    plan = plan_of(sources[1], range(30), stage, DataConfig(), 0)
    whole = plan_of(sources[1], range(30), stage.model_copy(update={"first": None}), DataConfig(), 0)
    assert [plan.samples(k) for k in range(10)] == [whole.samples(k) for k in range(10)]


def test_names_that_no_row_answers_to_are_told(sources: list[RowSource]) -> None:
    """Of what a stage begins with, its own rows count: others of that name do not help."""
    facts = blended(sources, [None, None]).facts
    stage = Stage(name="s", steps=10, batch_samples=8, take={"a": 0.5, "c": 0.5}, first=First(of=("a", "b"), steps=4))
    taken, *rest = unmet(facts, stage)
    assert "no row has the task or set c, of which stages.s.take names a share. Correct the name" in taken
    assert not rest
    (told,) = unmet(facts, stage.model_copy(update={"take": {}, "tasks": ("b",)}), steps=10)
    assert "no row that it reads has the task or set a" in told and "it begins with the others. Correct" in told
    (told,) = unmet(facts, stage.model_copy(update={"take": {}, "first": First(of=("c",), steps=40)}), steps=10)
    assert "it begins with all rows. Correct the name, or leave it out" in told
    (told,) = unmet(facts, stage.model_copy(update={"take": {}}), steps=4)
    assert told.startswith("s: all its 4 steps read the rows of stages.s.first alone, which lasts 4. Give the stage")


def test_the_state_names_the_member_that_changed(sources: list[RowSource], tmp_path: Path) -> None:
    stage = Stage(name="s", steps=10, batch_samples=8)
    plan = plan_of(blended(sources, [3, 1]), range(35), stage, DataConfig(), 0)
    path = tmp_path / "b.jsonl"
    path.write_text(path.read_text().replace("yes", "no", 1))
    changed = blended([sources[0], open_source(str(path), DataConfig())], [3, 1])
    with pytest.raises(ConfigError, match=r"^b\.jsonl has changed since step 4 was saved"):
        plan_of(changed, range(35), stage, DataConfig(), 0).resume(plan.state(4))


def test_measures_are_those_of_the_stages_rows(sources: list[RowSource]) -> None:
    measures = Measures(np.arange(35) + 10, np.arange(35) * 2)
    stage = Stage(name="s", epochs=1, batch_rows=2, row_tokens=100)
    plan = plan_of(blended(sources, [None, None]), np.arange(5, 35), stage, DataConfig(), 0, measures)
    for k in range(plan.steps(1)):
        step = plan.step(k)
        for row, (squares, encoders) in zip(step.rows, step.costs, strict=True):
            assert squares == sum((number + 15) ** 2 for number, _ in row)
            assert encoders == sum(2 * (number + 5) for number, _ in row)


@pytest.mark.parametrize(
    ("how", "span"),
    [
        ({"epochs": 2}, 70),
        ({"epochs": 0.5}, 18),
        ({"steps": 9, "batch_samples": 8}, 70),  # 72 samples are what two epochs take
        ({"steps": 5, "batch_samples": 8}, 35),
        ({"steps": 7, "batch_samples": 8}, 56),
        ({"steps": 3, "batch_rows": 2, "row_tokens": 40}, 24),  # samples of 10 tokens
        ({"steps": 4, "batch_rows": 2, "row_tokens": 40}, 35),
    ],
)
def test_a_curriculum_climbs_over_all_that_the_stage_reads(
    sources: list[RowSource], how: dict[str, float], span: int
) -> None:
    stage = Stage.model_validate({"name": "s", **how})
    measures = Measures(np.full(35, 10))
    assert plan_of(sources[0], range(35), stage, DataConfig(order="curriculum"), 0, measures).lap == span


def run(*changes: str) -> RunConfig:
    config = RunConfig.model_validate(
        {"recipe": "r", "out": "o", "model": "m", "stages": [{"name": "s", "steps": 1, "train": {}}]}
    )
    return override(config, list(changes))


@pytest.mark.parametrize(
    ("change", "paths", "weights"),
    [
        ("data.train=a.jsonl", ["a.jsonl"], None),
        ("data.train=[a.jsonl, b.json]", ["a.jsonl", "b.json"], [None, None]),
        ("data.train=[{path: a, weight: 2}, {path: b, weight: 0.5}]", ["a", "b"], [2, 0.5]),
    ],
)
def test_sources_are_named_alone_or_in_a_list(change: str, paths: list[str], weights: list[float] | None) -> None:
    for data in (run(change).data.train, run(change.replace("data.train", "stages.s.data")).stages[0].data):
        assert paths_of(data) == paths
        assert (None if data is None or isinstance(data, str) else [one.weight for one in data]) == weights
    assert RunConfig.model_validate(run(change).model_dump(mode="json")) == run(change)
    assert paths_of(None) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train=[]", "data.train: the list of sources is empty. Name at least one."),
        ("data.train=[a, a]", "data.train: a is named twice. Give it once, with twice the weight."),
        (
            "data.train=[{path: a, weight: 1}, b]",
            "data.train: b has no weight and others have one, so its share is not known. Give all of them a weight, or "
            "none, for shares by size.",
        ),
        (
            "stages.s.row_tiles=5",
            "stages.s: row_tiles=5 limits rows that are packed ahead, and with batch_samples they are packed step by "
            "step. Set batch_rows, or row_tiles to null.",
        ),
    ],
)
def test_what_is_no_blend_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(change)
    assert str(error.value) == message


def test_a_wrong_key_of_a_source_is_named() -> None:
    with pytest.raises(ConfigError, match="wieght"):
        run("data.train=[{path: a, wieght: 1}]")
    with pytest.raises(ConfigError, match="weight"):
        run("data.train=[{path: a, weight: -1}]")
