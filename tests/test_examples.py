"""The digits example builds balanced rows whose sides share no file; the walk-throughs run to their ends."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "digits"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NO_ENERGON = "megatron-energon is not installed: pip install 'avlm[energon]'"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The three data sets, made up and small."""
    rng = np.random.default_rng(0)
    for digit in range(10):
        for folder, suffix in ((f"mnist/train/{digit}", "png"), (f"cifar10/train/{CLASSES[digit]}", "jpg")):
            (tmp_path / folder).mkdir(parents=True)
            for i in range(60):
                Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(
                    tmp_path / folder / f"{i}.{suffix}"
                )
        (tmp_path / "fsdd/train").mkdir(parents=True, exist_ok=True)
        for name in ("ann", "bob", "zoe"):
            for take in range(60):
                wave = 0.1 * rng.standard_normal(2000)
                soundfile.write(tmp_path / f"fsdd/train/{digit}_{name}_{take}.wav", wave, 8000)
    return tmp_path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def media(rows: list[dict[str, Any]]) -> set[str]:
    return {p["path"] for r in rows for p in r["messages"][0]["content"] if p["type"] != "text"}


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    sys.modules.pop("build", None)
    import build as module

    return module


def test_sides_share_nothing_and_the_stranger_is_never_heard_in_training(
    build: Any, data: Path, tmp_path: Path
) -> None:
    stranger = build.build(data, tmp_path / "rows")
    train, held = read(tmp_path / "rows/train.jsonl"), read(tmp_path / "rows/eval.jsonl")
    assert stranger == "zoe"
    assert not media(train) & media(held)
    assert not any("_zoe_" in path for path in media(train))
    new = [r for r in held if r["task"] == "spoken-new-voice"]
    assert len(new) == 600
    assert all("_zoe_" in p for p in media(new))
    assert Counter(r["messages"][1]["content"] for r in held if r["task"] == "match") == {"yes": 250, "no": 250}


def test_answers_are_true(build: Any, data: Path, tmp_path: Path) -> None:
    build.build(data, tmp_path / "rows")
    for row in read(tmp_path / "rows/train.jsonl"):
        parts = {p["type"]: Path(p["path"]) for p in row["messages"][0]["content"] if p["type"] != "text"}
        alts = {p["type"]: p["alt"] for p in row["messages"][0]["content"] if p["type"] != "text"}
        answer = row["messages"][1]["content"]
        seen = parts["image"].parent.name if "image" in parts else None
        heard = parts["audio"].stem.split("_")[0] if "audio" in parts else None
        if row["task"] == "sum":
            assert answer == build.WORDS[int(seen or 0) + int(heard or 0)]
        elif row["task"] == "match":
            assert answer == ("yes" if seen == heard else "no")
        elif row["task"] == "photo":
            assert answer == seen
        else:
            assert answer == build.WORDS[int(seen or heard or 0)]
        told = {"image": seen if row["task"] == "photo" else seen and build.WORDS[int(seen)]}
        told["audio"] = heard and build.WORDS[int(heard)]
        assert alts == {kind: words for kind, words in told.items() if words}
    assert '"alt"' not in (tmp_path / "rows/eval.jsonl").read_text()


def test_without_data_it_says_where_to_get_it(build: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        build.build(tmp_path / "nowhere", tmp_path / "rows")
    assert "there is no such folder" in str(error.value)
    assert "https://yann.lecun.com/exdb/mnist/" in str(error.value)


# ---------------------------------------------------------------- walk-throughs

Walk = Callable[..., str]


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Walk]:
    """Run a script of a folder in an empty directory and get what it printed: ``walk("neva", "train", "--steps", 2)``.

    Scripts of other folders have the same names, so none of them stays imported.
    """
    from avlm.models.audio_encoders import AUDIO_FAMILIES

    families = list(AUDIO_FAMILIES)
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in EXAMPLES.glob("*/*.py")}

    def run(folder: str, script: str, *arguments: object) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
        for name in names:
            sys.modules.pop(name, None)
        capsys.readouterr()
        importlib.import_module(script).main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    yield run
    for name in names:
        sys.modules.pop(name, None)
    AUDIO_FAMILIES[:] = families


def test_neva_imports_trains_and_goes_back(walk: Walk) -> None:
    assert "joined by" in walk("neva", "import_llava")
    walk("neva", "own_data")
    assert "trained: runs/neva/trained/model" in walk("neva", "train", "--steps", 2)
    rows = read(Path("runs/neva/trained/metrics.jsonl"))
    assert [row["stage"] for row in rows] == ["pretrain"] * 2 + ["finetune"] * 2
    answers = walk("neva", "generate", "--model", "runs/neva/trained/model", "--max-tokens", 6)
    whole, _, _, outside = (line.partition(":")[2].strip() for line in answers.splitlines())
    assert whole == outside
    said = walk("neva", "export_llava", "--model", "runs/neva/trained/model")
    assert json.loads(Path("runs/neva/llava/config.json").read_text())["model_type"] == "llava"
    assert float(re.findall(r"and ours: (\S+)", said)[0]) < 1e-5


def test_neva_adapts_the_layers_that_were_chosen(walk: Walk) -> None:
    said = walk("neva", "lora", "--steps", 2, "--layers", 0, 2)
    found = set(re.findall(r"layers\.(\d+)\.self_attn\.(\w+)", said))
    assert found == {(layer, name) for layer in "02" for name in ("q_proj", "v_proj")}


def test_neva_takes_another_template(walk: Walk) -> None:
    said = walk("neva", "template", "--steps", 2)
    assert "Q: <image>What do you see?\nA: a red square</s>" in said
    assert Path("runs/neva/terse/model/chat_template.jinja").read_text().startswith("{{ bos_token }}{% for m in")


def test_neva_makes_rows_of_pictures_with_captions(walk: Walk, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(SystemExit, match="no picture with its caption"):
        walk("neva", "own_data", "--pictures", folder)
    for i in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("black all over\n")
    walk("neva", "own_data", "--pictures", folder, "--out", "rows")
    train = json.loads(Path("rows/train.json").read_text())
    assert [row.get("image") for row in train] == ["1.png", "2.png", None, None, None, None]
    assert train[0]["conversations"][1]["value"] == "black all over"


def test_avlm_goes_from_stage_to_stage_and_answers(walk: Walk) -> None:
    walk("avlm", "rows")
    said = walk("avlm", "train", "--data", "runs/avlm/data/train.jsonl", "--steps", 2)
    assert "kept the vision connector of stage one: True; stage three trained it on: True" in said
    assert "together: " in walk("avlm", "generate", "--max-tokens", 4)


@pytest.mark.slow
def test_avlm_passes_its_checks(walk: Walk) -> None:
    from avlm.cli.models import check

    walk("avlm", "train", "--steps", 2)
    check("runs/avlm/run/model")


@pytest.mark.slow
@pytest.mark.parametrize("audio", ["ast", pytest.param("whisper", marks=pytest.mark.slow)])
def test_another_encoder_hears(walk: Walk, audio: str) -> None:
    said = walk("hearing", "swap", "--audio", audio, "--steps", 1)
    stages = [row["stage"] for row in read(Path("runs/hearing/swap/metrics.jsonl"))]
    assert "speech" in said.splitlines()[0] and "speech" not in stages
    assert stages[0] == "vision-alignment" and stages[-1] == "hearing-tasks"


def test_an_encoder_of_ones_own_hears(walk: Walk) -> None:
    assert "hears 40 bins of fbank through small_listener" in walk("hearing", "own_encoder", "--steps", 2)
    config = json.loads(Path("runs/hearing/own/model/config.json").read_text())
    assert config["audio_config"]["model_type"] == "small_listener"


@pytest.mark.slow
def test_energon_data_becomes_rows_and_is_trained_on(walk: Walk) -> None:
    pytest.importorskip("megatron.energon", reason=NO_ENERGON)
    said = walk("energon", "train", "--steps", 1)
    assert "trained: runs/energon/run/model" in said
    stages = [row["stage"] for row in read(Path("runs/energon/run/metrics.jsonl"))]
    assert list(dict.fromkeys(stages)) == ["vision-alignment", "audio-alignment", "finetune"]
    for split, count in (("train", 24), ("val", 6)):
        rows = read(Path(f"runs/energon/rows/{split}/rows.jsonl"))
        assert Counter(row["task"] for row in rows) == {"talk": count, "caption": count}
        written = Counter(Path(f"runs/energon/rows/{split}", path).read_bytes() for path in all_media(rows))
        assert written == packed_media(f"runs/energon/data/*/{split}-0.tar")
    last = read(Path("runs/energon/rows/val/rows.jsonl"))[5]
    assert [part["type"] for part in last["messages"][0]["content"]] == ["image", "audio", "text"]
    assert last["messages"][0]["content"][2]["text"] == "What are they?"


def all_media(rows: list[dict[str, Any]]) -> list[str]:
    return [part["path"] for row in rows for part in row["messages"][0]["content"] if part["type"] != "text"]


def packed_media(pattern: str) -> Counter[bytes]:
    """Pictures and sounds as they lie in tar files."""
    found: Counter[bytes] = Counter()
    for path in Path().glob(pattern):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(("png", "wav")):
                    found[tar.extractfile(member).read()] += 1  # type: ignore[union-attr]
    return found


def test_an_energon_sample_that_is_wrong_is_named(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    energon = pytest.importorskip("megatron.energon", reason=NO_ENERGON)
    from avlm.errors import DataError

    bad = Path("bad")
    bad.mkdir()
    with pytest.raises(SystemExit, match=r"bad: has no \.nv-meta, so it is no Energon dataset"):
        walk("energon", "train", "--data", bad)
    monkeypatch.syspath_prepend(str(EXAMPLES / "energon"))
    prepare, talks = importlib.import_module("prepare"), importlib.import_module("talks")
    told = {"conversations": [{"from": "human", "value": "<image>What?"}]}
    prepare.write_tar(bad / "train-0.tar", [{"json": json.dumps(told).encode()}])
    prepare.index(bad, "CrudeWebdataset")
    with pytest.raises(SystemExit, match=r"^bad: \S*0000: has 1 <image> for 0 of them"):
        walk("energon", "train", "--data", bad)
    keys = {"__key__": "train-0.tar/0003", "__restore_key__": ()}
    with pytest.raises(DataError, match=r"0003: is said by nobody, and it is not known which side that is"):
        talks.to_sample(talks.Talk(**keys, said=[{"from": "nobody", "value": "What?"}], images=[], audios=[]))
    with pytest.raises(DataError, match=r"0003: names a\.png, which is not in the tar beside it"):
        talks.cook_talk(energon.CrudeSample(**keys, json=b'{"conversations": [], "images": ["a.png"]}'))
    with pytest.raises(DataError, match=r"0003: is TextSample, and no function makes a row of that"):
        talks.to_sample(energon.TextSample(**keys, text="words"))


def test_without_energon_it_says_what_to_install(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["megatron", *(name for name in sys.modules if name.startswith("megatron."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"megatron-energon, which is not installed\. .*avlm\[energon\]"):
        walk("energon", "train")


def test_ears_learn_from_the_teacher(walk: Walk) -> None:
    assert "divergence from the teacher" in walk("hearing", "distill", "--steps", 2)
