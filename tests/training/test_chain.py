"""A whole run: its stages one after the other, its directory, and what it does with bad data."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import avlm
from avlm.config.io import build, override, read_mapping
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.convert.compose import compose
from avlm.convert.weights import save_model
from avlm.errors import ConfigError, DataError
from avlm.training.chain import Run
from avlm.training.observe import read_lines
from avlm.training.report import write_report

Small = Callable[..., RunConfig]
JOINT = {
    "name": "only",
    "train": {"vision_connector": {"lr": 1e-3}, "language": {"lr": 1e-3}},
    "steps": 6,
    "batch_samples": 4,
    "row_tokens": 128,
}


def train(config: RunConfig, only: str | None = None, **settings: Any) -> Path:
    return Run(config, console=Console(file=io.StringIO()), **settings).train(only)


def said(config: RunConfig) -> str:
    console = Console(record=True, file=io.StringIO(), width=1000)
    Run(config, console=console).train()
    return console.export_text()


def bits(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


def one_stage(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with one stage and no part built."""
    return config.model_copy(update={"stages": (Stage.model_validate({**JOINT, **changes}),)})


def add_rows(path: Path, *lines: str) -> None:
    path.write_text(path.read_text() + "".join(line + "\n" for line in lines))


def question(row_id: str, *parts: dict[str, str], answer: str = "red") -> str:
    messages = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": row_id, "task": "bad", "messages": messages})


# ---------------------------------------------------------------- stages


def test_stages_follow_one_another_and_leave_what_the_contract_says(small_run: Small, tmp_path: Path) -> None:
    model = train(small_run())
    assert model == tmp_path / "run" / "model"
    left = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    files = {"config.yaml", "data.json", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl"}
    assert left == {"parts", "stages", "adapters", "model"} | files
    assert {p.name for p in (tmp_path / "run" / "parts").iterdir()} == {"language", "vision"}
    assert {p.name for p in (tmp_path / "run" / "stages").iterdir()} == {"align", "joint"}
    assert bits(model) == bits(tmp_path / "run" / "stages" / "joint")
    assert json.loads((model / "stage.json").read_text()) == {"stage": "joint"}

    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    contract = {"step", "stage", "loss", "lr", "grad_norm", "tokens", "target_tokens", "samples", "seconds"}
    assert all(contract | {"tokens_per_s"} <= row.keys() for row in metrics)
    assert [row["step"] for row in metrics] == list(range(1, 14))
    assert [row["stage"] for row in metrics] == ["language"] * 3 + ["vision"] * 3 + ["align"] * 3 + ["joint"] * 4
    for row in metrics:
        assert row["samples"] == 4 and 0 < row["target_tokens"] < row["tokens"]
        assert row["seconds"] > row["data_seconds"] >= 0

    answers = read_lines(tmp_path / "run" / "samples.jsonl")
    assert {a["when"] for a in answers if a["stage"] == "joint"} == {"before", "during", "after"}
    assert {a["task"] for a in answers if a["stage"] == "joint"} == {"vqa", "hear", "match", "text"}
    assert {a["task"] for a in answers if a["stage"] == "vision"} == {"vqa"}  # the small model has eyes only
    assert all(isinstance(a["answer"], str) and a["expected"] for a in answers)


def test_the_rates_and_losses_written_down_are_the_true_ones(small_run: Small, tmp_path: Path) -> None:
    """Stage `align` by hand: cosine from 2e-3 with one step of warm-up, and the loss of its rows alone."""
    import torch

    from avlm.convert.weights import load_model
    from avlm.data.encode import pack
    from avlm.data.planning.plan import positions
    from avlm.data.selection import stage_rows
    from avlm.data.sources import JsonLines

    config = small_run("run", ["stages.joint.steps=1"])
    train(config, "align")
    rows = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["stage"] == "align"]
    assert [r["lr"] for r in rows] == pytest.approx([1e-3, 2e-3, 1e-3])

    train(small_run("begin2", ["stages.align.train.vision_connector.lr=1e-30"]), "align")  # as good as untrained
    model, processor = load_model(tmp_path / "begin2" / "stages" / "align")
    stage = next(s for s in config.stages if s.name == "align")
    source = JsonLines(tmp_path / "rows.jsonl")
    usable = stage_rows(source.facts, stage)
    chosen = [usable[i] for i, _ in positions(0, 4, len(usable), seed=7, stage="align")]
    row = pack([processor.encode(source[i]) for i in chosen])
    with torch.no_grad():
        loss = model(
            input_ids=row.input_ids, position_ids=row.position_ids, row_lengths=row.lengths,
            pixel_values=row.pixel_values, labels=row.labels,
        ).loss  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert rows[0]["target_tokens"] == row.num_targets() and rows[0]["tokens"] == row.input_ids.shape[1]


CONNECTORS = {"vision_connector": {"lr": 1e-3}, "audio_connector": {"lr": 1e-3}}  # nothing trained has dropout


def test_a_step_is_the_same_however_it_is_cut_into_rows(small_run: Small, tmp_path: Path) -> None:
    for capacity in (1000, 24):
        train(one_stage(small_run(str(capacity)), train=CONNECTORS, steps=3, batch_samples=12, row_tokens=capacity))
    one, many = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("1000", "24"))
    assert [row["rows"] for row in one] == [1, 1, 1] and all(row["rows"] > 4 for row in many)
    for a, b in zip(one, many, strict=True):
        for name in ("loss", "grad_norm", "tokens", "target_tokens", "samples"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_a_row_without_media_has_nothing_to_tell_a_connector(small_run: Small, tmp_path: Path) -> None:
    """Every fourth sample is text alone: nothing that is trained has a part in its loss."""
    train(one_stage(small_run(), train=CONNECTORS, steps=12, batch_samples=1))
    norms = [row["grad_norm"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert norms.count(0.0) == 3 and len(norms) == 12


def test_gradients_are_clipped_and_their_norm_before_that_is_told(small_run: Small, tmp_path: Path) -> None:
    """After one step Adam's first moment is (1 - beta1) times the gradient, so its norm is a tenth of the limit."""
    from safetensors.torch import load_file

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    told = []
    for name, clip in (("clipped", 1e-3), ("free", None)):
        config = one_stage(small_run(name), train=CONNECTORS, optimizer={"clip": clip})
        with pytest.raises(KeyboardInterrupt):
            train(config, on_step=stop)
        told.append(read_lines(tmp_path / name / "metrics.jsonl")[0]["grad_norm"])
        (state,) = (tmp_path / name / "checkpoints").glob("step-*/optimizer.safetensors")
        moments = [t.flatten().double() for key, t in load_file(state).items() if key.endswith("|exp_avg")]
        norm = float(sum(t.square().sum() for t in moments) ** 0.5)
        assert norm == pytest.approx(0.1 * min(told[-1], clip or told[-1]), rel=1e-4)
    assert told[0] == told[1] > 1e-3


def test_up_to_a_stage_then_the_rest_is_the_whole(small_run: Small, tmp_path: Path) -> None:
    whole = train(small_run("whole"))
    half = train(small_run("half"), "align")
    assert json.loads((half / "stage.json").read_text()) == {"stage": "align"}
    assert not (tmp_path / "half" / "stages" / "joint").exists()
    assert bits(train(small_run("half"))) == bits(whole)
    train(small_run("half"), "align")
    assert json.loads((half / "stage.json").read_text()) == {"stage": "joint"}  # never back to an earlier one


def test_a_stage_that_is_not_there_is_refused_with_those_that_are(small_run: Small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train(small_run(), "alignment")
    assert str(error.value) == (
        "--stage alignment: the run has no such stage. Its stages are language, vision, align, joint"
    )
    assert not (tmp_path / "run").exists()


def test_a_finished_run_trains_nothing_again(small_run: Small, tmp_path: Path) -> None:
    train(small_run())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "model").iterdir()}
    train(small_run(), on_step=lambda _: pytest.fail("a step was taken"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "model").iterdir()} == before


def test_a_model_that_vanished_is_published_again(small_run: Small, tmp_path: Path) -> None:
    import shutil

    model = train(small_run())
    before = bits(model)
    shutil.move(model, tmp_path / "run" / ".model.old")  # killed between two renames
    train(small_run())
    assert bits(model) == before
    assert not (tmp_path / "run" / ".model.old").exists()


# ---------------------------------------------------------------- same bits


def test_a_seed_gives_the_same_bits_and_another_gives_others(small_run: Small) -> None:
    a, b, c = (train(small_run(name, [f"seed={seed}"])) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert bits(a) == bits(b) != bits(c)


def test_workers_cache_answers_and_saving_change_no_bit(small_run: Small) -> None:
    reference = bits(train(small_run("a")))
    for i, changes in enumerate(
        (
            ["data.workers=0"],
            ["data.workers=3", "data.cache_mb=0"],
            ["samples.prompts=0", "save.every_steps=null", "save.every_s=1000"],
            ["samples.prompts=2", "samples.times=3", "save.keep=1", "save.keep_best=1"],
        )
    ):
        assert bits(train(small_run(f"b{i}", changes))) == reference, changes


def test_the_recorded_settings_run_again_to_the_same_bits(small_run: Small, tmp_path: Path) -> None:
    first = train(small_run("first", ["stages.joint.train.language.lr=2e-3"]))
    again = avlm.recipe(str(tmp_path / "first" / "config.yaml"))
    assert again == build(RunConfig, read_mapping(tmp_path / "first" / "config.yaml"))
    second = train(override(again, [f"out={tmp_path / 'second'}"]))
    assert bits(second) == bits(first)


def test_avlm_train_is_the_run(small_run: Small, tmp_path: Path) -> None:
    assert avlm.train(one_stage(small_run(), steps=1)) == tmp_path / "run" / "model"


# ---------------------------------------------------------------- max_steps


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_to_come_first_and_is_not_there_is_told(small_run: Small, beside: bool) -> None:
    """Also of a stage that is built by a process of its own, which itself is quiet."""
    first = {"of": ["counting"], "steps": 2}
    if beside:
        changes = ["side_by_side=2", "max_steps=1", f"stages.language.first={json.dumps(first)}"]
        text, name = said(small_run("run", changes)), "language"
    else:
        text, name = said(one_stage(small_run(), first=first, steps=1)), "only"
    assert f"{name}: no row that it reads has the task or set counting, which stages.{name}.first.of names" in text
    assert "begins with all rows. Correct the name" in text and "steps read the rows of" not in text


def test_max_steps_cuts_every_stage(small_run: Small, tmp_path: Path) -> None:
    train(small_run("run", ["max_steps=2"]))
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["stage_step"]) for r in metrics] == [(i + 1, i % 2 + 1) for i in range(8)]
    assert [r["lr"] for r in metrics[-2:]] == pytest.approx([0.5e-3, 1e-3])  # 3 % of two steps are one to warm up


def test_max_steps_cannot_change_once_it_has_mattered(small_run: Small, tmp_path: Path) -> None:
    train(small_run("run", ["max_steps=2"]), "language")
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError) as error:
        train(small_run("run"))
    assert str(error.value) == (
        f"{tmp_path / 'run'} was begun with max_steps=2, and now max_steps=null. A run goes on with the settings it "
        "began with: set max_steps=2, or choose another directory with out=DIR"
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
    train(small_run("run", ["max_steps=2"]), "vision")  # the advice holds
    with pytest.raises(ConfigError, match="begun with max_steps=2, and now max_steps=1"):
        train(small_run("run", ["max_steps=1"]))


def test_max_steps_may_change_while_it_makes_no_difference(small_run: Small, tmp_path: Path) -> None:
    train(small_run("run", ["max_steps=3"]), "align")  # all of these have three steps anyway
    train(small_run("run"))
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 13


# ---------------------------------------------------------------- a directory that is not this run's


def test_another_recipes_directory_is_refused(small_run: Small, tmp_path: Path) -> None:
    train(one_stage(small_run(), steps=1))
    with pytest.raises(ConfigError) as error:
        train(one_stage(small_run("run", ["recipe=other"]), steps=1))
    assert str(error.value) == (
        f"{tmp_path / 'run'} is a run of the recipe small, and this one is other. Choose another directory with out=DIR"
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("seed=8", "seed=7, and now seed=8"),
        ("stages.joint.train.audio.lr=5", "stages.joint.train.audio.lr=0.001, and now stages.joint.train.audio.lr=5.0"),
        (
            "model.vision.connector=linear",
            "model.vision.connector.kind=mlp, and now model.vision.connector.kind=linear",
        ),
    ],
)
def test_a_changed_setting_is_refused(small_run: Small, tmp_path: Path, change: str, what: str) -> None:
    train(small_run(), "language")
    with pytest.raises(ConfigError, match="was begun with " + what.replace(".", r"\.")):
        train(small_run("run", [change]))


def test_free_settings_may_change(small_run: Small) -> None:
    train(small_run(), "language")
    free = ["save.every_s=5", "samples.prompts=0", "data.workers=2", "data.max_bad=0.5", "data.too_long=drop"]
    free += ["speed.recompute.every=2"]
    train(small_run("run", free), "vision")


def test_changed_data_is_refused_and_moved_data_is_not(small_run: Small, tmp_path: Path) -> None:
    train(small_run(), "language")
    data = tmp_path / "rows.jsonl"
    train(small_run("run", [f"data.train={data.rename(tmp_path / 'moved.jsonl')}"]), "vision")
    text = (tmp_path / "moved.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(text.replace("green", "olive"))
    with pytest.raises(ConfigError) as error:
        train(small_run("run", [f"data.train={tmp_path / 'moved.jsonl'}"]))
    assert str(error.value) == (
        f"{tmp_path / 'run'} was begun with other training data (moved.jsonl changed since). Put the data back as it "
        "was, or choose another directory with out=DIR"
    )


def test_a_directory_with_other_files_is_refused_and_left_alone(small_run: Small, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files and no run"):
        train(small_run())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_killed_before_it_wrote_its_settings_begins_again(small_run: Small, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.yaml.writing").write_text("recipe: sm")
    train(one_stage(small_run(), steps=1))


@pytest.mark.parametrize("out", ["rows.jsonl", "rows.jsonl/run", "/proc/run", "/dev/null/run"])
def test_a_place_that_cannot_be_a_directory_is_refused(small_run: Small, tmp_path: Path, out: str) -> None:
    config = one_stage(small_run(), steps=1).model_copy(update={"out": str(tmp_path / out)})
    with pytest.raises(ConfigError, match=r"is a file, and a run needs a directory|cannot be written to"):
        train(config)


def test_two_processes_do_not_train_in_one_directory(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run(), steps=1)

    def second(_: Any) -> None:
        with pytest.raises(ConfigError, match="another process is training in"):
            train(config)

    train(config, on_step=second)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_damaged_settings_of_a_run_are_said(small_run: Small, tmp_path: Path) -> None:
    train(one_stage(small_run(), steps=1))
    (tmp_path / "run" / "config.yaml").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        train(one_stage(small_run(), steps=1))


# ---------------------------------------------------------------- data


def test_bad_samples_are_left_out_and_listed_once(small_run: Small, tmp_path: Path, sound: Callable[..., Path]) -> None:
    import soundfile

    config = one_stage(small_run("run", ["data.max_bad=0.9"]), steps=10)
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000, dtype=np.float32), 16_000)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    add_rows(
        tmp_path / "rows.jsonl",
        question("missing", image | {"path": "nowhere.png"}, text),
        question("broken", image | {"path": "broken.png"}, text),
        question("silent", {"type": "audio", "path": "silent.wav"}, text),
        '{"id": "half a row", "messages": [',
        question("marker", {"type": "text", "text": "Look at <image> there"}),
        json.dumps({"id": "no answer", "messages": [{"role": "user", "content": "Hello?"}]}),
        question("film", {"type": "film", "path": "a.mp4"}),
        question("\u2028line\x85s\x0b", image | {"path": "also nowhere.png"}, text),
    )
    train(config)
    listed = read_lines(tmp_path / "run" / "quarantine.jsonl")
    ids = [row["sample_id"] for row in listed]
    assert sorted(ids) == sorted(
        ["", "film", "missing", "broken", "silent", "marker", "no answer", "\u2028line\x85s\x0b"]
    )
    by_id = {row["sample_id"]: row for row in listed}
    for row_id, word in (
        ("missing", "nowhere.png"),
        ("broken", "broken.png"),
        ("silent", "silent"),
        ("", "is not JSON"),
        ("marker", "<image>"),
        ("no answer", "no answer to learn from"),
        ("film", "film"),
    ):
        assert word in by_id[row_id]["reason"], row_id
    assert by_id["missing"]["where"].startswith("rows.jsonl line 13")
    assert all(row["stage"] == "only" and 0 <= row["step"] <= 10 for row in listed)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    # 12 good rows of 18 that are rows at all; ten steps of four are two epochs and a bit
    assert sum(row["samples"] for row in metrics[:9]) == 24


def test_media_outside_of_the_folders_of_a_run_are_left_out_until_they_are_opened(
    small_run: Small, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere").resolve()
    closed = small_run("run", ["data.max_bad=0.9"])
    opened = small_run("opened", [f"data.roots=[{elsewhere}]"])
    shutil.copy(next(tmp_path.glob("**/*.png")), elsewhere / "a.png")
    (tmp_path / "link.png").symlink_to(elsewhere / "a.png")
    text = {"type": "text", "text": "What?"}
    add_rows(
        tmp_path / "rows.jsonl",
        question("link", {"type": "image", "path": "link.png"}, text),
        question("absolute", {"type": "image", "path": str(elsewhere / "a.png")}, text),
        question("up", {"type": "image", "path": f"../../../../../../..{elsewhere}/a.png"}, text),
    )
    train(one_stage(closed, steps=4))
    listed = {row["sample_id"]: row["reason"] for row in read_lines(tmp_path / "run" / "quarantine.jsonl")}
    assert listed.keys() == {"link", "absolute", "up"}
    assert f"link.png: leads to {elsewhere}/a.png, outside of the folders that media are read from" in listed["link"]
    assert all(f"data.roots=[{elsewhere}]" in reason for reason in listed.values())
    train(one_stage(opened, steps=4))  # the advice holds
    assert not read_lines(tmp_path / "opened" / "quarantine.jsonl")


@pytest.mark.slow
def test_bad_rows_of_one_stage_are_not_listed_again_by_the_next(small_run: Small, tmp_path: Path) -> None:
    config = small_run("run", ["data.max_bad=0.9", "stages.vision.steps=4", "stages.joint.steps=6"])
    add_rows(tmp_path / "rows.jsonl", "{", question("m", {"type": "image", "path": "nowhere.png"}))
    text = said(config)
    assert len(read_lines(tmp_path / "run" / "quarantine.jsonl")) == 2
    assert text.count("1 rows of rows.jsonl cannot be read and are left out; see quarantine.jsonl") == 1


def test_too_many_bad_samples_stop_the_run(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run(), steps=50)
    add_rows(tmp_path / "rows.jsonl", *[question(f"m{i}", {"type": "image", "path": "no.png"}) for i in range(12)])
    with pytest.raises(
        DataError, match=r"1[1-4] of \d+ samples were bad, more than data\.max_bad=0\.05 allows"
    ) as error:
        train(config)
    assert "no.png" in str(error.value) and error.value.where.startswith("rows.jsonl line ")
    assert len(read_lines(tmp_path / "run" / "quarantine.jsonl")) >= 8
    train(config.model_copy(update={"data": config.data.model_copy(update={"max_bad": 0.9})}))  # the advice holds


def test_too_many_rows_that_are_none_stop_the_run_before_it_begins(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run())
    add_rows(tmp_path / "rows.jsonl", *["{"] * 11)
    with pytest.raises(DataError, match=r"11 of 23 rows cannot be read, more than data\.max_bad=0\.05 allows"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_step_of_nothing_but_bad_samples_changes_nothing(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run("run", ["data.max_bad=1"]), steps=12, batch_samples=1)
    add_rows(tmp_path / "rows.jsonl", *[question(f"m{i}", {"type": "image", "path": "no.png"}) for i in range(9)])
    train(config)
    empty = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if row["samples"] == 0]
    assert empty and all(row["tokens"] == row["loss"] == row["grad_norm"] == 0 for row in empty)


def test_a_prompt_that_cannot_be_written_down_is_left_out(small_run: Small, tmp_path: Path) -> None:
    eval_rows = tmp_path / "eval.jsonl"
    eval_rows.write_text(question("marker", {"type": "text", "text": "an <audio> here"}) + "\n" + question("ok") + "\n")
    train(one_stage(small_run("run", [f"data.eval={eval_rows}", "samples.prompts=5"]), steps=1))
    assert {row["id"] for row in read_lines(tmp_path / "run" / "samples.jsonl")} == {"ok"}


def test_data_that_a_later_stage_cannot_learn_from_is_refused_at_once(small_run: Small, tmp_path: Path) -> None:
    config = small_run()
    rows = [line for line in (tmp_path / "rows.jsonl").read_text().splitlines() if '"image"' not in line]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(ConfigError, match="stage vision learns from rows with a picture and no sound, and the data"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_no_data_and_no_such_data_are_refused(small_run: Small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage language has no data: neither data\.train nor stages.language.data"):
        train(small_run("run", ["data.train=null"]))
    with pytest.raises(ConfigError, match=r"nothing\.jsonl"):
        train(small_run("run", ["data.train=nothing.jsonl"]))
    with pytest.raises(ConfigError, match=r"nothing\.jsonl"):
        train(small_run("run", ["data.eval=nothing.jsonl", "samples.prompts=0"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_says_once_what_its_stages_leave_out_for_its_senses(small_run: Small) -> None:
    told = [line for line in said(small_run("run", ["max_steps=1"])).splitlines() if " of 12 rows" in line]
    assert told == [f"{name}: 3 of 12 rows; 6 hold sound, 3 hold no picture" for name in ("vision", "align")]


def test_a_model_that_does_not_hear_reads_videos_as_pictures(small_run: Small, tmp_path: Path) -> None:
    """16 of the 64 made-up rows are videos, 32 hold a picture."""
    from avlm.data.mock import make_mock

    config = one_stage(small_run(), steps=1, batch_samples=48, row_tokens=512, rows="vision")
    model = config.model.model_copy(update={"audio": None})
    data = make_mock(tmp_path / "mock", sees=True, hears=False)
    config = override(config.model_copy(update={"model": model}), [f"data.train={data}", "samples.prompts=0"])
    assert "only: 48 of 64 rows; 16 hold no picture" in said(config)
    (step,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert step["samples"] == 48 and not read_lines(tmp_path / "run" / "quarantine.jsonl")
    again = small_run("again", [f"model={tmp_path / 'run' / 'model'}"])
    again = one_stage(again, steps=1, row_tokens=512, rows="vision")
    again = override(again, [f"data.train={data}", "samples.prompts=0"])
    assert "only: 48 of 64 rows; 16 hold no picture" in said(again)  # the same from its directory


def test_a_stage_may_have_data_of_its_own(small_run: Small, tmp_path: Path, rows: Callable[..., Path]) -> None:
    config = small_run()
    (tmp_path / "own").mkdir()
    own = tmp_path / "own" / "rows.jsonl"
    own.write_text((tmp_path / "rows.jsonl").read_text().replace('"path": "', '"path": "../').replace("red", "grey"))
    config = override(config, [f"stages.joint.data={own}"])
    train(config)
    assert len(json.loads((tmp_path / "run" / "data.json").read_text())) == 2
    own.write_text(own.read_text().replace("grey", "pink"))
    with pytest.raises(ConfigError, match="begun with other training data"):
        train(config)


def test_a_run_reads_several_files_as_one(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run(), steps=2)
    rows = tmp_path / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:4]), ("b", lines[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    whole = bits(train(override(config, ["samples.prompts=0"])))
    parts = f"data.train=[{tmp_path / 'a.jsonl'}, {tmp_path / 'b.jsonl'}]"
    assert bits(train(override(config, [parts, "samples.prompts=0", f"out={tmp_path / 'two'}"]))) == whole
    turned = f"data.train=[{tmp_path / 'b.jsonl'}, {tmp_path / 'a.jsonl'}]"
    with pytest.raises(
        ConfigError, match=r"begun with other training data \(blend of a.jsonl \+ b.jsonl changed since"
    ):
        train(override(config, [turned, "samples.prompts=0", f"out={tmp_path / 'two'}"]))


def test_a_sample_longer_than_a_row_is_refused_or_dropped(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run(), steps=4)
    add_rows(tmp_path / "rows.jsonl", question("long", {"type": "text", "text": "word " * 200}))
    with pytest.raises(ConfigError, match=r'\(id "long"\): has \d+ tokens, and a row of stage only holds 128'):
        train(config)
    config = override(config, ["data.too_long=drop"])  # the advice holds, in the same directory
    train(config)
    assert [row["sample_id"] for row in read_lines(tmp_path / "run" / "quarantine.jsonl")] == ["long"]


def test_a_sample_longer_than_a_row_is_cut_and_that_is_told(small_run: Small, tmp_path: Path) -> None:
    config = override(one_stage(small_run(), steps=4), ["data.too_long=cut"])
    long = [question("long", {"type": "text", "text": "Say it."}, answer="word " * 200)]
    long.append(question("lost", {"type": "text", "text": "word " * 200}))
    add_rows(tmp_path / "rows.jsonl", *long)
    train(config)
    told = {row["sample_id"]: row for row in read_lines(tmp_path / "run" / "quarantine.jsonl")}
    assert set(told) == {"long", "lost"}
    assert "nothing that is learned is within the first 128" in told["lost"]["reason"] and "cut" not in told["lost"]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["cut_tokens"] for line in lines) % told["long"]["cut"] == 0 < told["long"]["cut"]
    assert "1 sample was longer than a row and cut" in write_report(tmp_path / "run").read_text()


def test_training_that_diverges_stops_with_whole_weights(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run(), train={"language": {"lr": 1e38}}, steps=20, schedule={"kind": "constant"})
    with pytest.raises(ConfigError, match=r"stage only, step \d+: the loss is .*; training has diverged"):
        train(config)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


# ---------------------------------------------------------------- from a model directory


@pytest.fixture
def given(small_run: Small, tmp_path: Path) -> Path:
    """A model directory with eyes and no ears."""
    config = small_run().model.model_copy(update={"audio": None})
    save_model(*compose(config, texts=["What is number 1 2 3? red blue green"] * 3), tmp_path / "given")
    return tmp_path / "given"


def test_a_given_model_is_where_the_run_begins_and_is_left_alone(small_run: Small, given: Path, tmp_path: Path) -> None:
    before = bits(given)
    stage = {"rows": "vision", "train": {"vision_connector": {"lr": 1e-3}}, "steps": 2}
    config = one_stage(small_run("run"), **stage).model_copy(update={"model": str(given)})
    model = train(config)
    assert bits(given) == before
    from safetensors.torch import load_file

    old, new = load_file(given / "model.safetensors"), load_file(model / "model.safetensors")
    changed = {name for name in old if not bool((old[name] == new[name]).all())}
    assert changed == {name for name in old if name.startswith("model.vision_connector.")}


def test_a_given_model_brings_its_parts_so_none_is_built(small_run: Small, given: Path, tmp_path: Path) -> None:
    config = small_run("run", [f"model={given}"])
    joint = config.stages[-1].model_copy(update={"train": {"language": config.stages[-1].train["language"]}})
    config = config.model_copy(update={"stages": (*config.stages[:-1], joint)})
    text = said(config.model_copy(update={"data": config.data.model_copy(update={"max_bad": 0.9})}))
    assert f"left out: language, vision; the model {given} brings its parts along" in text
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(r["step"], r["stage"]) for r in metrics][:4] == [(1, "align"), (2, "align"), (3, "align"), (4, "joint")]
    assert not (tmp_path / "run" / "parts").exists()


def test_a_part_with_weights_is_not_built_in_the_run_either(small_run: Small, tmp_path: Path) -> None:
    config = small_run("run", ["max_steps=1"])
    Run(config, console=Console(file=io.StringIO())).train("vision")
    parts = f"{tmp_path / 'run' / 'parts'}"
    text = said(small_run("next", ["max_steps=1", f"model.vision.encoder={{path: {parts}/vision}}"]))
    assert "left out: vision; what would be built there comes with its weights" in text
    assert [row["stage"] for row in read_lines(tmp_path / "next" / "metrics.jsonl")] == ["language", "align", "joint"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "is not a model directory"),
        ("rows.jsonl", "is not a model directory"),
        ("given", "stage joint trains audio, and the model has only vision, vision_connector, language"),
    ],
)
def test_a_model_that_cannot_do_what_a_later_stage_wants_is_refused_at_once(
    small_run: Small, given: Path, tmp_path: Path, model: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(small_run("run", [f"model={tmp_path / model}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_sft_trains_connectors_and_language_of_whatever_model(
    small_run: Small, given: Path, tmp_path: Path, peft: Any
) -> None:
    from safetensors.torch import load_file

    rows = [line for line in (tmp_path / "rows.jsonl").read_text().splitlines() if '"audio"' not in line]
    (tmp_path / "see.jsonl").write_text("\n".join(rows) + "\n")
    config = override(
        avlm.recipe("sft", peft=peft),
        [f"model={given}", f"data.train={tmp_path / 'see.jsonl'}", f"out={tmp_path / 'sft'}", "max_steps=2"],
    )
    model = train(config)
    old, new = load_file(given / "model.safetensors"), load_file(model / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not bool((old[name] == new[name]).all())}
    assert {n for n in changed if "connector" in n} == {n for n in old if "connector" in n}
    assert not any("tower" in name for name in changed)
    language = {name for name in changed if "language_model" in name}
    projections = {name for name in old if "_proj.weight" in name and "language_model" in name}
    assert language == projections if peft == "lora" else language > projections
    assert (tmp_path / "sft" / "adapters" / "finetune" / "adapter_config.json").is_file() == (peft == "lora")


def test_too_many_bad_samples_one_after_the_other_stop_the_run(small_run: Small, tmp_path: Path) -> None:
    config = one_stage(small_run("run", ["data.max_bad=1", "data.max_bad_run=12"]), steps=50)
    for file in [*tmp_path.glob("*.png"), *tmp_path.glob("*.wav")]:  # a folder that is gone, say
        file.unlink()
    lines = [
        line for line in (tmp_path / "rows.jsonl").read_text().splitlines() if '"content": [{"type": "text"' not in line
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"12 samples one after the other were bad, and data\.max_bad_run=12"):
        train(config)
    listed = read_lines(tmp_path / "run" / "quarantine.jsonl")
    assert {row["file"] for row in listed} <= {
        str(tmp_path / f"{kind}{i}.{end}") for i in range(12) for kind, end in (("p", "png"), ("s", "wav"))
    }
    assert all({"step", "stage", "sample_id", "where", "reason", "file"} == row.keys() for row in listed)
