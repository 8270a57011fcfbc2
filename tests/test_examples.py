"""The digits example builds balanced rows whose sides share no file."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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
