"""Answers to the rows of a file: as one by one, gone on with where it stopped, and a bad row costs nobody else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avlm.cli import main
from avlm.config.data import DataConfig
from avlm.convert.weights import save_model
from avlm.data.readers.jsonlines import JsonLines
from avlm.errors import ConfigError
from avlm.inference import quantize
from avlm.inference.batch import Rows, answer_rows
from avlm.inference.chat import Chat
from avlm.inference.engine import Engine
from avlm.inference.sampling import Sampling

SHORT = Sampling(max_tokens=5)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def mixed(rows: Callable[..., Path], tmp_path: Path) -> Path:
    """Eight good rows; among them a broken line, a missing picture, one that is none, no messages, an empty line."""
    path = rows(count=8)
    lines = path.read_text().splitlines()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    missing = {"id": "missing", "messages": [{"role": "user", "content": [{"type": "image", "path": "none.png"}]}]}
    broken = {"id": "broken", "messages": [{"role": "user", "content": [{"type": "image", "path": "bad.png"}]}]}
    lines[2:2] = ["{no json", json.dumps(missing), "", json.dumps(broken), json.dumps({"id": "other"})]
    path.write_text("\n".join(lines) + "\n")
    return path


BAD = ["rows.jsonl line 3", "missing", "broken", "other"]


def test_every_row_gets_a_line_in_order_and_answers_are_those_of_a_chat(
    mixed: Path, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, processor = make_model()
    out = tmp_path / "out.jsonl"
    told: list[tuple[int, int]] = []
    engine = Engine(model, processor, slots=3)
    done = answer_rows(engine, Rows(mixed, DataConfig()), out, SHORT, lambda *now: told.append(now))
    found = lines_of(out)
    assert [line["id"] for line in found] == ["0", "1", *BAD, *map(str, range(2, 8))]
    assert (done.rows, done.there, done.bad) == (12, 0, 4)
    assert told == [(n, 12) for n in range(1, 13)]
    assert [line["id"] for line in found if "error" in line] == BAD
    assert "is not JSON" in found[2]["error"] and "none.png" in found[3]["error"] and "bad.png" in found[4]["error"]
    source = JsonLines(mixed)
    answers = {line["id"]: line for line in found if "error" not in line}
    for i in range(len(source)):
        sample = source[i]
        if sample.id not in answers:
            continue
        wanted = "".join(Chat(model, processor).say(*sample.turns[0].parts, sampling=SHORT)).strip()  # type: ignore[arg-type]
        assert answers[sample.id]["answer"] == wanted
        assert answers[sample.id]["prompt_tokens"] == len(processor.encode(sample, prompt_only=True))
        assert answers[sample.id]["finish"] in ("stop", "length") and answers[sample.id]["answer_tokens"] <= 5
    assert len(answers) == 8


@pytest.mark.parametrize("kept", [0, 1, 40, 10**6])
def test_what_was_stopped_is_gone_on_with(
    kept: int, mixed: Path, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model()
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer_rows(Engine(model, processor), Rows(mixed, DataConfig()), whole, SHORT)
    out.write_bytes(whole.read_bytes()[:kept] if kept < 1000 else whole.read_bytes()[:-9])  # half a line at its end
    engine = Engine(model, processor)
    asked: list[Any] = []
    join = engine.join
    monkeypatch.setattr(engine, "join", lambda *a: asked.append(a) or join(*a))
    done = answer_rows(engine, Rows(mixed, DataConfig()), out, SHORT)
    assert out.read_text() == whole.read_text()
    assert len(asked) == (1 if kept > 1000 else 8) and done.there == (11 if kept > 1000 else 0)
    assert answer_rows(Engine(model, processor), Rows(mixed, DataConfig()), out, SHORT).there == 12
    assert out.read_text() == whole.read_text()


def test_answers_to_other_rows_are_left_alone(mixed: Path, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, processor = make_model()
    out = tmp_path / "out.jsonl"
    for text, message in (
        ('{"id": "0"}\n{"id": "7"}\n', f"{out} line 2 has the answer to '7', and that row of {mixed} is '1'"),
        ("no json\n", f"{out} line 1 has the answer to None"),
    ):
        out.write_text(text)
        with pytest.raises(ConfigError) as error:
            answer_rows(Engine(model, processor), Rows(mixed, DataConfig()), out, SHORT)
        assert str(error.value).startswith(message) and "Choose another name for --out" in str(error.value)
        assert out.read_text() == text
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="is empty, so there is nothing to answer"):
        Rows(tmp_path / "empty.jsonl", DataConfig())


def test_the_command_answers_rows_and_refuses_half_a_wish(
    mixed: Path,
    make_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(*make_model(), tmp_path / "model")
    out = tmp_path / "out.jsonl"
    asked = ["chat", str(tmp_path / "model"), "--batch", str(mixed), "--max-tokens", "5"]

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["avlm", *arguments])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    code, told = run(*asked, "--out", str(out))
    assert code == 0, told
    assert len(lines_of(out)) == 12
    assert "12 rows, 4 that could not be answered" in told
    code, told = run(*asked, "--out", str(out))
    assert code == 0 and "12 rows, 12 of them answered before, 0 that" in told
    for wrong, message in (
        (asked, "--batch is given without --out, and rows are read from the one and answered in the other. Give both"),
        ([*asked, "--out", str(out), "What?"], "--batch answers the rows of a file, and a question is given as well."),
        (["chat", "m", "--out", str(out)], "--out is given without --batch"),
    ):
        code, told = run(*wrong)
        assert code == 2 and message in " ".join(told.split())


# ---------------------------------------------------------------- eight bits


def test_eight_bits_without_their_library_are_refused(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    model, _ = make_model("text")
    with pytest.raises(Exception, match=r"quant=int8 needs the library torchao, .* pip install 'avlm\[quant\]'"):
        quantize.quantize(model, "int8")
    quantize.quantize(model, "none")
    with pytest.raises(ConfigError, match=r"quant=int3 is no way to keep weights .* one of none, int8"):
        quantize.check_quant("int3")


def test_eight_bits_answer_nearly_alike(make_model: Callable[..., Any]) -> None:
    pytest.importorskip("torchao")
    import torch

    model, processor = make_model(language={"hidden_size": 64, "intermediate_size": 128})
    ids = torch.randint(20, 200, (1, 30))
    before = model(input_ids=ids).logits
    weights = sum(p.numel() * p.element_size() for p in model.language_model.get_decoder().layers.parameters())
    quantize.quantize(model, "int8")
    after = model(input_ids=ids).logits
    assert float((after - before).abs().max()) < 0.1 * float(before.abs().max())
    assert not torch.equal(before, after)
    assert weights > 0 and model.written_out() is None
    chat = Chat(model, processor)
    assert chat.chat("What is it?", sampling=SHORT) == chat.chat("What is it?", sampling=SHORT)
