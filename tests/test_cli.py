"""The command line: what it does, and what it says when the user is wrong: one message, status 2, no traceback."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from avlm import cli
from avlm.config.io import to_yaml
from avlm.config.run import RunConfig
from avlm.convert.compose import Composed
from avlm.convert.weights import save_model, save_part


class Said(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def avlm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Run a command in this process. Anything but an exit status comes through, and fails the test."""

    def run(*arguments: object, stdin: str | None = None) -> Said:
        monkeypatch.setattr(sys, "argv", ["avlm", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
        return Said(status, *capsys.readouterr())

    return run


def shell(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **settings)


def one_message(said: Said, *words: str) -> str:
    """The one line that a wrong input gets."""
    assert said.status == 2, said
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 and said.out == "", said
    kind, _, message = lines[0].partition(": ")
    assert kind.endswith("Error") and message
    for word in words:
        assert word in message, said
    return message


@pytest.fixture
def model(small_model: Composed, tmp_path: Path) -> Path:
    save_model(small_model.model, small_model.processor, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def config(small_run: Callable[..., RunConfig], tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(small_run("run", ["max_steps=1", "samples.prompts=0"])))
    return path


@pytest.fixture
def garbage(tmp_path: Path) -> Path:
    path = tmp_path / "garbage.yaml"
    path.write_bytes(np.random.default_rng(0).bytes(2000))
    return path


# ---------------------------------------------------------------- without torch


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["convert", "--help"],
        ["data", "--help"],
        ["recipes"],
        ["show", "tiny"],
        ["show", "nonsense"],
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    check = f"""
import sys
sys.argv = ["avlm", *{arguments!r}]
from avlm.cli import main
try:
    main()
finally:
    heavy = {{"torch", "transformers", "numpy", "tokenizers", "PIL", "av", "rich", "fastapi"}} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.stderr)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell("-c", check)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"avlm {' '.join(arguments)}: {after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.2f} s CPU"
    )
    assert done.returncode == (2 if "nonsense" in arguments else 0)
    assert done.stderr.splitlines()[-1] == "heavy: []"


def test_help_names_every_command() -> None:
    done = shell("-m", "avlm", "--help")
    assert done.returncode == 0
    for command in ("demo", "recipes", "show", "compose", "train", "chat", "serve", "eval", "data"):
        assert f"\n  {command} " in done.stdout


def test_recipes_have_a_line_each(avlm: Callable[..., Said]) -> None:
    from avlm.recipes import RECIPES

    said = avlm("recipes")
    assert [line.split()[0] for line in said.out.splitlines()] == list(RECIPES)
    assert all(len(line.split()) > 3 for line in said.out.splitlines())


def test_show_prints_settings_that_train_takes(avlm: Callable[..., Said], config: Path, tmp_path: Path) -> None:
    said = avlm("show", config, "seed=3", "stages.joint.steps=1", f"out={tmp_path / 'shown'}")
    assert said.status == 0 and said.err == ""
    assert yaml.safe_load(said.out)["seed"] == 3
    (tmp_path / "shown.yaml").write_text(said.out)
    assert avlm("train", tmp_path / "shown.yaml").status == 0
    assert yaml.safe_load((tmp_path / "shown" / "config.yaml").read_text()) == yaml.safe_load(said.out)


def test_show_says_what_trains(avlm: Callable[..., Said], config: Path, model: Path) -> None:
    table = [line for line in avlm("show", config).out.splitlines() if line.startswith("# ")]
    cells = [line[2:].split() for line in table[1:]]
    assert " ".join(cells[0]) == "stage vision vision_connector audio audio_connector language rows steps builds"
    assert cells[1] == ["language", "-", "-", "-", "-", "0.003", "text", "1", "language"]
    assert cells[3] == ["align", "-", "0.002", "-", "-", "-", "vision", "1", "-"]
    assert " ".join(cells[4]) == "joint - 0.001 0.001 0.001 0.001 LoRA 4 any 1 -"
    given = avlm("show", config, f"model={model}").out
    assert "# language" not in given and "# align" in given


def test_show_says_what_is_distilled_and_which_states_are_learned(avlm: Callable[..., Said], config: Path) -> None:
    table = avlm("show", config, "stages.align.loss=distill", "stages.align.state_head.lr=1e-3").out
    (line,) = [line for line in table.splitlines() if line.startswith("# align")]
    assert line.endswith("1      distill, state head 0.001")


def test_show_says_what_is_trained_if_present(avlm: Callable[..., Said]) -> None:
    line = avlm("show", "sft").out.splitlines()[-1]
    assert " ".join(line.split()) == "# finetune - 2e-05 if present - 2e-05 if present 2e-05 any 500 -"


# ---------------------------------------------------------------- what the user got wrong


def test_usage_errors_have_status_2(avlm: Callable[..., Said]) -> None:
    for arguments in (
        ["frob"],
        ["train"],
        ["train", "tiny", "--frob"],
        ["chat"],
        ["eval", "model"],
        ["chat", "m", "--seed", -1],
        ["chat", "m", "--seed", 2**64],
        [],
    ):
        said = avlm(*arguments)
        assert said.status == 2 and "Usage:" in said.err + said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "tinny"], ["tinny is neither a recipe nor a file of settings. Did you mean tiny?"]),
        (["show", "no.yaml"], ["no.yaml: there is no such file"]),
        (["show", "tiny", "seeed=3"], ["seeed is not a setting", "Did you mean seed?"]),
        (["show", "tiny", "seed=three"], ["seed=", "three"]),
        (["show", "tiny", "seed"], ["'seed' is not an override"]),
        (["show", "tiny", "seed=-1"], ["seed="]),
        (["show", "tiny", "stages.jiont.steps=3"], ["stages.jiont", "joint"]),
        (["show", "tiny", "max_steps=0"], ["max_steps"]),
        (["show", "tiny", "data={"], ["the value { is not readable as YAML"]),
        (["train", "tiny", "out=ROWS"], ["is a file, and a run needs a directory"]),
        (["train", "tiny", "out=/proc/nothing/run"], ["cannot be written"]),
        (["train", "sft"], ["model=model: there is no such directory"]),
        (["train", "tiny", "data.train=nowhere.jsonl"], ["data.train=nowhere.jsonl: there is no such file"]),
        (["train", "tiny", "data.train=/dev/null"], ["data.train=/dev/null: is neither a file nor a folder"]),
        (["train", "CONFIG", "data.train=HOLLOW"], ["is a folder with no rows in a form that is read"]),
        (["train", "CONFIG", "data.train=nowhere/*.jsonl"], ["nowhere/*.jsonl: no file is called like that"]),
        (["train", "CONFIG", "data.train=ROWS:part"], ["has no parts, so there is no 'part' in it"]),
        (
            ["train", "CONFIG", "data.train=nowhere.py:Rows"],
            ["nowhere.py: there is no such file. Give the path of your"],
        ),
        (["train", "tiny", "data.train=" + "x" * 5000], ["there is no such file"]),
        (["train", "sft", "data.train=ROWS"], ["model=model: there is no such directory"]),
        (["train", "sft", "data.train=ROWS", "model=/"], ["model=/: is not a model directory"]),
        (["train", "tiny", "data.train=ROWS", "data.eval=no.jsonl"], ["data.eval=no.jsonl: there is no such file"]),
        (["train", "CONFIG", "out=ROWS"], ["is a file, and a run needs a directory"]),
        (["train", "CONFIG", "out=ROWS/run"], ["cannot be written to"]),
        (["train", "CONFIG", "out=/proc/nothing/run"], ["cannot be written to"]),
        (["train", "CONFIG", "out=" + "x" * 300], ["cannot be written to"]),
        (["train", "CONFIG", "--stage", "jiont"], ["--stage jiont", "language, vision, align, joint"]),
        (["train", "GARBAGE"], ["garbage.yaml: not readable as YAML"]),
        (["train", "CONFIG", "data.train=GARBAGE"], ["garbage.yaml"]),
        (["train", "CONFIG", "data.train=EMPTY"], ["has no row", "empty"]),
        (["chat", "nowhere", "hello"], ["nowhere: is not a model directory"]),
        (["chat", "GARBAGE", "hello"], ["is not a model directory"]),
        (["chat", "MODEL", "--image", "no.png", "hello"], ["--image=no.png: there is no such file"]),
        (["chat", "MODEL", "--image", "/", "hello"], ["--image=/: is a directory"]),
        (["chat", "MODEL", "--image", "GARBAGE", "hello"], ["garbage.yaml"]),
        (["chat", "MODEL", "--audio", "SILENT", "hello"], ["silent.wav", "silent"]),
        (["chat", "MODEL", "--audio", "GARBAGE", "hello"], ["garbage.yaml"]),
        (["chat", "MODEL", "--video", "GARBAGE", "hello"], ["garbage.yaml"]),
        (["chat", "MODEL", "--max-tokens", "-3", "hello"], ["max_tokens=-3 leaves no room"]),
        (["chat", "MODEL", "--temperature", "-1", "hello"], ["temperature=-1"]),
        (["chat", "MODEL", ""], ["nothing was asked"]),
        (["chat", "MODEL", "not \udcff text"], ["not text in UTF-8"]),
        (["chat", "MODEL", "a <image> marker"], ["<image>"]),
        (["eval", "MODEL", "nowhere.jsonl"], ["nowhere.jsonl: there is no such file"]),
        (["eval", "MODEL", "HOLLOW"], ["is a folder with no rows in a form that is read"]),
        (["eval", "MODEL", "GARBAGE"], ["garbage.yaml"]),
        (["eval", "MODEL", "ROWS", "--metric", "bleurgh"], ["--metric bleurgh is not a metric", "exact, wer"]),
        (["eval", "MODEL", "ROWS", "--max-tokens", "-1"], ["max_tokens=-1 leaves no room"]),
        (["eval", "nowhere", "ROWS"], ["nowhere: is not a model directory"]),
        (["eval", "MODEL", "ROWS", "--out", "/proc/no/report.json"], ["cannot be written"]),
        (["eval", "MODEL", "ROWS", "--out", "/"], ["cannot be written"]),
        (["compose", "MODEL", "--language", "MODEL"], ["exists, and would be overwritten"]),
        (["compose", "OUT"], ["language"]),
        (["compose", "OUT", "--language", "./nowhere"], ["there is no folder ./nowhere"]),
        (["compose", "OUT", "--language", "MODEL", "--vision", "random:nothing"], ["nothing"]),
        (["compose", "OUT", "--language", "random:llama"], ["no tokenizer"]),
        (["convert", "import", "./nowhere", "OUT"], ["./nowhere: there is no such folder"]),
        (["convert", "import", "GARBAGE", "OUT"], ["garbage.yaml: there is no such folder"]),
        (["convert", "import", "MODEL", "OUT"], ["is of type avlm", "llava, llava_next, qwen2_audio"]),
        (["convert", "import", "MODEL", "MODEL"], ["exists, and would be overwritten"]),
        (["convert", "export", "MODEL", "MODEL", "--to", "llava"], ["exists, and would be overwritten"]),
        (["convert", "export", "nowhere", "OUT", "--to", "llava"], ["nowhere: is not a model directory"]),
        (["convert", "export", "MODEL", "OUT", "--to", "nemo"], ["--to nemo: is not a format", "llava, llava_next"]),
        (["convert", "export", "MODEL", "OUT", "--to", "llava"], ["does not fit", "audio_connector"]),
        (["convert", "export", "MODEL", "OUT", "--to", "language", "--adapters", "."], ["has no adapter_config.json"]),
        (["convert", "export", "MODEL", "/proc/no/out", "--to", "language"], ["cannot be written"]),
        (["demo", "--out", "."], ["has no name of its own"]),
        (["demo", "--out", "ROWS"], ["is a file, and a run needs a directory"]),
        (["demo", "--out", "NEW", "--samples", "-1"], ["train_samples=-1"]),
        (["demo", "--out", "NEW", "seeed=1"], ["Did you mean seed?"]),
        (["demo", "--out", "/proc/nothing/demo", "--samples", "1000"], ["cannot be written"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_wrong_inputs_get_one_message(
    avlm: Callable[..., Said], config: Path, garbage: Path, tmp_path: Path, arguments: list[str], words: list[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    import soundfile

    soundfile.write(tmp_path / "silent.wav", np.zeros(8000, dtype=np.float32), 16_000)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "hollow").mkdir()
    names = {
        "ROWS": "rows.jsonl",
        "EMPTY": "empty.jsonl",
        "HOLLOW": "hollow",
        "SILENT": "silent.wav",
        "OUT": "out",
        "NEW": "new",
    }
    names |= {"CONFIG": config.name, "GARBAGE": garbage.name}
    if any("MODEL" in argument for argument in arguments):
        names["MODEL"] = request.getfixturevalue("model").name
    for word, name in names.items():
        arguments = [argument.replace(word, str(tmp_path / name)) for argument in arguments]
    one_message(avlm(*arguments), *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


def test_what_is_evaluated_may_need_settings_of_data(avlm: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    (tmp_path / "apart").mkdir()
    row = {"q": "hi", "a": "yes", "pic": "p0.png"}
    (tmp_path / "apart" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    ask = ["eval", model, tmp_path / "apart" / "rows.jsonl", "--no-swap", "--max-tokens", 2]
    named = ["data.columns={question: q, answer: a, image: pic}", f"data.folder={tmp_path}"]
    said = avlm(*ask, *named)
    assert said.status == 0 and re.search(r"\(none\) +1 ", said.out)
    one_message(avlm(*ask, "seed=3"), "seed is a setting of a run, and no run is named")
    (tmp_path / "garbage.txt").write_text("not JSON\n")
    said = avlm("chat", model, "--batch", tmp_path / "garbage.txt", "--out", tmp_path / "answers.jsonl")
    assert said.status == 2 and "not one of its rows could be answered" in said.err


def test_rows_may_be_whatever_training_reads(avlm: Callable[..., Said], config: Path, tmp_path: Path) -> None:
    """A folder of tars, patterns of files, with a weight, somebody's reader; `docs/data.md` has them all."""
    rows = tmp_path / "rows.jsonl"
    assert avlm("data", "convert", rows, tmp_path / "shards", "--to", "webdataset").status == 0
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "class Rows:\n"
        f"    rows = [json.loads(line) for line in open({str(rows)!r})]\n"
        "    def __len__(self): return len(self.rows)\n"
        "    def __getitem__(self, i): return self.rows[i]\n"
    )
    for name, ask in (("shards", []), ("mine.py:Rows", [f"data.folder={tmp_path}"])):
        for command in (["data", "check", "--workers", 0], ["data", "check", "--workers", 0, "--recipe", config]):
            assert avlm(*command, tmp_path / name, *ask).status == 0
    named = [f"[{{path: {tmp_path}/rows.*, weight: 1}}]", "shards", "shards/*.tar", "rows.jso[n]l", "mine.py:Rows"]
    for number, name in enumerate(named):
        given = name if name.startswith("[") else tmp_path / name
        place = [f"data.train={given}", f"data.folder={tmp_path}", f"out={tmp_path}/run{number}"]
        said = avlm("train", config, "--stage", "language", *place)
        assert said.status == 0, said.err


def test_a_part_goes_out_and_comes_back_by_composing(avlm: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    said = avlm("convert", "export", model, tmp_path / "language", "--to", "language")
    assert (said.status, said.err) == (0, "")
    assert re.fullmatch(rf"{tmp_path}/language: [\d,]+ parameters in \d+ tensors, [\d,]+ bytes\n", said.out)
    assert avlm("compose", tmp_path / "again", "--language", tmp_path / "language").status == 0


def test_a_run_directory_of_another_recipe_is_one_message(
    avlm: Callable[..., Said], config: Path, tmp_path: Path
) -> None:
    assert avlm("train", config, "--stage", "language").status == 0
    message = one_message(avlm("train", config, "recipe=other"), "is a run of the recipe small, and this one is other")
    assert message.endswith("Choose another directory with out=DIR")
    one_message(avlm("train", config, "seed=99"), "was begun with seed=7, and now seed=99")


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda m: (m / "config.json").write_text("{"), id="config.json is cut off"),
        pytest.param(lambda m: (m / "config.json").write_text("[]"), id="config.json is a list"),
        pytest.param(lambda m: (m / "config.json").write_bytes(b"\xff\x00"), id="config.json is garbage"),
        pytest.param(lambda m: (m / "model.safetensors").unlink(), id="no weights"),
        pytest.param(lambda m: os.truncate(m / "model.safetensors", 5000), id="weights are cut off"),
        pytest.param(lambda m: (m / "model.safetensors").write_bytes(b"\x80\x02}q"), id="weights are a pickle"),
        pytest.param(lambda m: (m / "tokenizer.json").write_text("{}"), id="an empty tokenizer"),
        pytest.param(lambda m: (m / "tokenizer.json").unlink(), id="no tokenizer"),
        pytest.param(lambda m: (m / "processor_config.json").write_text("{"), id="processor is cut off"),
        pytest.param(lambda m: (m / "processor_config.json").unlink(), id="no processor"),
    ],
)
def test_a_broken_model_directory_is_one_message(
    avlm: Callable[..., Said], model: Path, harm: Callable[[Path], Any]
) -> None:
    harm(model)
    one_message(avlm("chat", model, "hello"), str(model))


def test_a_full_disk_is_one_message_and_status_1(
    avlm: Callable[..., Said], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avlm.training import chain

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chain, "save_part", full)
    said = avlm("train", config)
    assert said.status == 1
    assert said.err.splitlines()[-1] == (
        "OSError: [Errno 28] No space left on device. Look after the disk or the device, and try again"
    )


# ---------------------------------------------------------------- the way through


def test_from_parts_to_a_conversation_and_a_score(
    avlm: Callable[..., Said], small_model: Composed, tmp_path: Path
) -> None:
    inner, processor = small_model.model.model, small_model.processor
    processor.tokenizer.chat_template = processor.chat_template
    save_part(inner.language_model, tmp_path / "llm", processor.tokenizer)
    save_part(inner.vision_tower, tmp_path / "eyes")
    save_part(inner.audio_tower, tmp_path / "ears")
    parts = ["--language", tmp_path / "llm", "--vision", tmp_path / "eyes", "--audio", tmp_path / "ears"]
    said = avlm("compose", tmp_path / "new" / "model", *parts, "audio.connector.stack=4", "vision.connector=linear")
    assert said.status == 0, said
    count = sum(p.numel() for n, p in small_model.model.named_parameters() if "connector" not in n)
    count += 32 * 32 + 32  # the vision connector: one matrix of the encoder's width 32 to 32
    count += 4 * 32 * 32 + 32 + 32 * 32 + 32  # the audio connector: four embeddings of width 32 in, two layers
    model = tmp_path / "new" / "model"
    assert said.out == f"{model}: {count:,} parameters in vision, vision_connector, audio, audio_connector, language\n"

    said = avlm(
        "chat", model, "--image", tmp_path / "p0.png", "--audio", tmp_path / "s1.wav", "What?", "--max-tokens", 5
    )
    assert said.status == 0 and said.out.endswith("\n")

    said = avlm("eval", model, tmp_path / "rows.jsonl", "--out", tmp_path / "deep" / "report.json", "--max-tokens", 3)
    assert said.status == 0, said
    report = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert set(report["tasks"]) == {"vqa", "hear", "match", "text"}
    assert {row["id"] for row in report["answers"]} == {str(i) for i in range(12)}
    assert said.out.splitlines()[0].split()[:3] == ["task", "samples", "accuracy"]
    assert [line.split()[:2] for line in said.out.splitlines()[1:]] == [
        [task, "3"] for task in ("hear", "match", "text", "vqa")
    ]


def test_eval_scores_what_chat_answers(avlm: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    answer = avlm("chat", model, "--image", tmp_path / "p0.png", "What is number 0?", "--max-tokens", 4).out.strip()
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    row["messages"][1]["content"] = answer or "nothing"
    wrong = {**row, "id": "wrong", "messages": [row["messages"][0], {"role": "assistant", "content": "certainly not"}]}
    (tmp_path / "two.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(wrong) + "\n")
    said = avlm("eval", model, tmp_path / "two.jsonl", "--max-tokens", 4, "--no-swap", "--metric", "exact")
    assert said.out.splitlines()[1].split()[:3] == ["vqa", "2", "0.500"]


def test_eval_reads_media_of_folders_that_are_open_to_it(
    avlm: Callable[..., Said], model: Path, tmp_path: Path
) -> None:
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    row["messages"][0]["content"][0]["path"] = str((tmp_path / "p0.png").resolve())
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "one.jsonl").write_text(json.dumps(row) + "\n")
    ask = ("eval", model, tmp_path / "rows" / "one.jsonl", "--max-tokens", 1, "--no-swap")
    assert f"p0.png: is not in the folders that media are read from ({tmp_path.resolve()}/rows)" in avlm(*ask).err
    said = avlm(*ask, "--root", tmp_path)
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines()[1].split()[:2] == ["vqa", "1"]


def test_a_conversation(avlm: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    lines = [
        "What is this?",
        f"/image '{tmp_path / 'p0.png'}'",
        f"/audio {tmp_path / 's0.wav'}",
        "And these?",
        "",
        "/image nowhere.png",
        "/frob",
        "a <video> marker",
        f"/image {tmp_path / 'rows.jsonl'}",
        "Still there?",
        "/clear",
        "What is this?",
        "/quit",
        "never read",
    ]
    said = avlm("chat", model, "--max-tokens", 3, stdin="\n".join(lines))
    assert said.status == 0
    errors = said.err.splitlines()
    assert errors[0].startswith("Ask something. Drag files in, or write /image PATH")
    assert errors[1] == f"picture {tmp_path / 'p0.png'}: 40 x 30, 4 tokens"
    assert errors[2].startswith(f"sound {tmp_path / 's0.wav'}: 0.2 s, ")
    assert errors[3] == "nowhere.png: there is no such file. Check the path"
    assert errors[4].startswith("/frob is not a command. There are /image, /audio, /video, /clear, /save")
    assert errors[5].startswith("DataError: ") and "<video>" in errors[5]
    assert errors[6].startswith("MediaError: ") and "rows.jsonl" in errors[6]
    assert len(errors) == 7
    turns = said.out.split("> ")
    assert turns[1].strip() == turns[-2].strip()  # after /clear the first question has its first answer
    assert len(turns) == len(lines)


def test_a_conversation_ends_with_its_input(avlm: Callable[..., Said], model: Path) -> None:
    assert avlm("chat", model, stdin="").status == 0


def test_train_leaves_a_report(avlm: Callable[..., Said], config: Path, tmp_path: Path) -> None:
    said = avlm("train", config, f"data.eval={tmp_path / 'rows.jsonl'}")
    assert said.status == 0, said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["accuracy"]) == set(report["guess"]) == {"vqa", "hear", "match", "text"}
    assert report["seconds"] > 0 and report["recipe"] == "small" and report["seed"] == 7
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert report["parameters"] == sum(t.numel() for t in weights.values())
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert len(json.loads((tmp_path / "run" / "answers.json").read_text())["answers"]) == 12
    assert said.out.endswith(f"model: {tmp_path / 'run' / 'model'}\nreport: {tmp_path / 'run' / 'report.html'}\n")


def test_a_run_whose_held_out_rows_are_unusable_is_finished_and_reported(
    avlm: Callable[..., Said], config: Path, tmp_path: Path
) -> None:
    row = {"id": "x", "messages": [{"role": "user", "content": [{"type": "image", "path": "nowhere.png"}]}]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    said = avlm("train", config, f"data.eval={tmp_path / 'bad.jsonl'}")
    assert said.status == 2
    assert said.err.splitlines()[-1].startswith("DataError: none of the rows can be used")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["parameters"] > 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_without_data_a_run_learns_from_made_up_rows_and_says_so(
    avlm: Callable[..., Said], config: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mocked"
    said = avlm("train", config, "data.train=null", f"out={out}")
    assert said.status == 0, said
    notice = (
        f"mock data: data.train is not set, so this run learns from 64 made-up rows ({out}/mock/rows.jsonl). "
        "They show that it runs and teach nothing; for your own add data.train=FILE.jsonl"
    )
    assert [line for line in said.err.splitlines() if "mock" in line] == [notice]
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["train"] == f"{out}/mock/rows.jsonl"
    assert (out / "quarantine.jsonl").read_text() == ""
    before = (out / "model" / "model.safetensors").read_bytes()
    assert avlm("train", config, "data.train=null", f"out={out}").status == 0  # there is nothing left to do
    assert (out / "model" / "model.safetensors").read_bytes() == before
    one_message(avlm("train", config, f"out={out}"), "was begun with other training data")

    said = avlm("train", "sft", f"model={model}", f"out={tmp_path / 'tuned'}", "max_steps=1", "samples.prompts=0")
    assert said.status == 0 and said.err.startswith("mock data: "), said
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    one_message(avlm("train", "sft", f"model={model}", f"out={other}"), "holds other files and no run")
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_sft_of_a_model_directory(avlm: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    lora = ["stages.finetune.train.language.lora.rank=2", "stages.finetune.train.language.lr=1e-3"]
    for name, changes in (("whole", []), ("lora", lora)):
        out = tmp_path / name
        settings = [f"model={model}", f"data.train={tmp_path / 'rows.jsonl'}", f"out={out}", "max_steps=2"]
        said = avlm("train", "sft", *settings, *changes)
        assert said.status == 0, said
        assert (out / "adapters").exists() == bool(changes)
        assert avlm("chat", out / "model", "hello", "--max-tokens", 2).status == 0


def test_the_installed_command_prints_its_error_without_a_traceback(tmp_path: Path) -> None:
    done = shell("-m", "avlm", "train", "tiny", f"data.train={tmp_path / 'no.jsonl'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"ConfigError: data.train={tmp_path / 'no.jsonl'}: there is no such file. Check the path\n")


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m avlm show tiny | head -1"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "recipe: tiny\n" and "Traceback" not in done.stderr


# ---------------------------------------------------------------- data


def test_data_that_is_fine_has_status_0_and_what_is_not_has_1(
    avlm: Callable[..., Said], rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = rows(count=8)
    said = avlm("data", "check", path, "--workers", 0, "--out", tmp_path / "deep" / "check.json")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith("rows.jsonl: 8 rows, 4 pictures, 4 sounds (decoded), ")
    assert said.out.endswith("Nothing is wrong.\n")
    report = json.loads((tmp_path / "deep" / "check.json").read_text())
    assert (
        report["fine"] and report["problems"] == [] and report["tasks"] == {"hear": 2, "match": 2, "text": 2, "vqa": 2}
    )

    (tmp_path / "p4.png").unlink()
    path.write_text(path.read_text() + "{\n")
    said = avlm("data", "check", path, "--workers", 0, "--out", tmp_path / "check.json")
    assert said.status == 1 and said.out.endswith("2 errors, 0 warnings.\n")
    report = json.loads((tmp_path / "check.json").read_text())
    assert {(p["title"], p["count"], *p["places"]) for p in report["problems"]} == {
        ("there is no such file", 1, "rows.jsonl line 5"),
        ("is not JSON (Expecting property name enclosed in double quotes at character N)", 1, "rows.jsonl line 9"),
    }
    assert "     rows.jsonl line 5\n     such as: p4.png: there is no such file. Check the path" in said.out


def test_data_commands_refuse_what_is_not_there(avlm: Callable[..., Said], rows: Callable[..., Path]) -> None:
    path = rows(count=4)
    one_message(avlm("data", "check", "nowhere.jsonl"), "nowhere.jsonl: not readable")
    one_message(avlm("data", "check", path, "--against", "no.jsonl"), "no.jsonl: not readable")
    one_message(avlm("data", "check", path, "seed=3"), "seed is a setting of a run, and no run is named")
    one_message(avlm("data", "check", path, "data.folder=3", "data.max_bed=3"), "max_bed is not a setting")
    one_message(avlm("data", "check", path, "--model", path.parent), "is not a model directory")
    one_message(avlm("data", "check", path, "--recipe", "tinny"), "Did you mean tiny?")
    one_message(avlm("data", "show", path, "--rows", "x", "--out", path.parent / "p.html"), "is no number of a row")
    one_message(avlm("data", "index", path), "an index counts tokens, and whose is not said")
    one_message(avlm("data", "convert", path, path.parent), "exists, and would be overwritten")


def test_a_page_of_data_is_made(avlm: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    said = avlm("data", "show", tmp_path / "rows.jsonl", "--model", model, "--out", page, "--rows", "1-3")
    assert said == Said(0, f"{page}: 3 rows\n", "")
    text = page.read_text()
    assert text.count("<article") == 3 and 'class="tok m image' in text
    plain = avlm("data", "show", tmp_path / "rows.jsonl", "--out", page, "--task", "vqa")
    assert plain.status == 0 and page.read_text().count("<article") == 3 and 'class="tok' not in page.read_text()


def test_a_check_by_a_recipe_counts_what_each_stage_reads(
    avlm: Callable[..., Said], config: Path, tmp_path: Path
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "check.json"
    said = avlm("data", "check", rows, "--recipe", config, "--workers", 0, "--out", out, "stages.joint.row_tokens=12")
    stages = {stage["name"]: stage for stage in json.loads(out.read_text())["stages"]}
    assert {name: stage["rows"] for name, stage in stages.items()} == {
        "language": 12,
        "vision": 3,
        "align": 3,
        "joint": 12,
    }
    assert stages["joint"]["too_long"] > 0 and said.status == 1
    assert "too long for a row of stage joint" in said.out
    assert stages["language"]["too_long"] == 0 and stages["language"]["unfit"] == 0


def test_rows_are_indexed_and_known_the_second_time(avlm: Callable[..., Said], model: Path, tmp_path: Path) -> None:
    command = ["data", "index", tmp_path / "rows.jsonl", "--model", model, "--out", tmp_path / "index", "--workers", 0]
    assert avlm(*command).out.rstrip().endswith("12 counted now, 0 known, 0 cannot be used")
    assert avlm(*command).out.rstrip().endswith("0 counted now, 12 known, 0 cannot be used")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{\n")
    said = avlm(*command).out
    assert "12 known, 0 cannot be used\n1 more cannot be read at all and are in no index, the first of them: " in said
    assert "rows.jsonl line 13" in said


def test_rows_are_written_in_another_form(avlm: Callable[..., Said], rows: Callable[..., Path], tmp_path: Path) -> None:
    path = rows(count=4)
    path.write_text(path.read_text() + "{\n")
    said = avlm("data", "convert", path, tmp_path / "tars", "--to", "webdataset")
    assert said.status == 0 and said.out.endswith(": 4 rows, 4 media\n")
    assert said.err.startswith("left out: rows.jsonl line 5: is not JSON")
    assert avlm("data", "check", tmp_path / "tars", "--workers", 0).status == 0


def test_what_lies_outside_of_its_folders_is_not_carried_into_another_form(
    avlm: Callable[..., Said], rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = rows(count=4)
    (tmp_path / "outside").mkdir()
    (tmp_path / "p0.png").rename(tmp_path / "outside" / "p0.png")
    data = tmp_path / "inside" / "rows.jsonl"
    data.parent.mkdir()
    for name in ("p2.png", "s1.wav", "s2.wav"):
        (tmp_path / name).rename(data.parent / name)
    data.write_text(path.read_text().replace('"p0.png"', f'"{tmp_path}/outside/p0.png"'))
    said = avlm("data", "convert", data, tmp_path / "kept")
    assert said.out.endswith(": 3 rows, 3 media\n")
    assert "p0.png: is not in the folders that media are read from" in said.err
    opened = avlm("data", "convert", data, tmp_path / "all", f"data.roots=[{tmp_path}/outside]")  # the advice holds
    assert opened.out.endswith(": 4 rows, 4 media\n")
