"""Any family of encoders with any language model: trains, answers, is saved and loaded, and passes `avlm check`.

Every family goes through once in the ordinary tests, with language models taking turns; all pairs are slow.
``python -m tests.matrix_table`` writes the table of families in the README from what this module goes through.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from avlm.config.io import build
from avlm.config.run import RunConfig
from avlm.convert.weights import load_model
from avlm.eval.check import Checks
from avlm.inference.chat import Audio, Chat, Image
from avlm.training.chain import Run
from avlm.training.observe import read_lines
from tests.conftest import TEMPLATE
from tests.families import AUDIO, LANGUAGE, VISION, WINDOWED
from tests.matrix_table import README, with_table

Case = tuple[str, str | None, str | None]
"""Language family, vision family, audio family."""

SINGLE: list[Case] = [
    *((language, vision, None) for vision in VISION for language in LANGUAGE),
    *((language, None, audio) for audio in AUDIO for language in LANGUAGE),
]
JOINT: list[Case] = [
    (language, vision, audio)
    for language, vision, audio in itertools.islice(
        zip(itertools.cycle(LANGUAGE), itertools.cycle(VISION), itertools.cycle(list(AUDIO)[1:]), strict=False), 12
    )
]
QUICK: list[Case] = [
    *((language, vision, None) for vision, language in zip(VISION, itertools.cycle(LANGUAGE), strict=False)),
    *((language, None, audio) for audio, language in zip(AUDIO, itertools.cycle(LANGUAGE), strict=False)),
    *JOINT[:2],
]
REST = [case for case in (*SINGLE, *JOINT) if case not in QUICK]


def test_every_family_is_in_the_matrix() -> None:
    from avlm.models.audio_encoders import AUDIO_FAMILIES
    from avlm.models.vision_encoders import VISION_FAMILIES

    assert {family.model_type for family in VISION_FAMILIES} == {c["model_type"] for c in VISION.values()}
    assert {family.model_type for family in AUDIO_FAMILIES} == {c["model_type"] for c in AUDIO.values()}
    assert len(JOINT) == 12 and len(SINGLE) == 3 * (len(VISION) + len(AUDIO))


def test_the_readme_lists_what_goes_through_here() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "python -m tests.matrix_table"


def name(case: Case) -> str:
    return " + ".join(part for part in case if part is not None)


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_a_family_of_each_kind(case: Case, rows: Callable[..., Path], tmp_path: Path) -> None:
    goes_through(case, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", REST, ids=name)
def test_every_pair(case: Case, rows: Callable[..., Path], tmp_path: Path) -> None:
    goes_through(case, rows, tmp_path)


def goes_through(case: Case, rows: Callable[..., Path], tmp_path: Path) -> None:
    _, vision, audio = case
    data = rows()
    out = tmp_path / "run"
    model = Run(config(case, data, out), console=Console(file=io.StringIO())).train()
    metrics = read_lines(out / "metrics.jsonl")
    assert len(metrics) == 2 and all(0 < row["loss"] < 20 and row["grad_norm"] > 0 for row in metrics)
    loaded = load_model(model)
    media = [*([Image(tmp_path / "p0.png")] if vision else []), *([Audio(tmp_path / "s1.wav")] if audio else [])]
    assert isinstance(Chat(*loaded).chat(*media, "What is it?"), str)
    failed = [result for result in Checks(*loaded).run() if not result.ok]
    assert not failed, failed


def config(case: Case, data: Path, out: Path) -> RunConfig:
    language, vision, audio = case
    train: dict[str, Any] = {"language": {"lr": 1e-3}}
    model: dict[str, Any] = {
        "language": {"random": LANGUAGE[language], "chat_template": TEMPLATE, "vocabulary": 400},
        "video": {"fps": 2.0, "max_frames": 4},
    }
    if vision is not None:
        part: dict[str, Any] = {"encoder": {"random": VISION[vision]}}
        if VISION[vision]["model_type"] in ("bit", "convnext"):
            part["image_size_px"] = 64
        model["vision"] = part
        train |= {"vision": {"lr": 1e-3}, "vision_connector": {"lr": 1e-3}}
    if audio is not None:
        length = {"length": "window"} if audio in WINDOWED else {}
        model["audio"] = {"encoder": {"random": AUDIO[audio]}, "connector": {"kind": "mlp", "stack": 4}, **length}
        train |= {"audio": {"lr": 1e-3}, "audio_connector": {"lr": 1e-3}}
    stage = {"name": "all", "train": train, "steps": 2, "batch_samples": 6, "rows": rows_of(vision, audio)}
    return build(
        RunConfig,
        {
            "recipe": "matrix",
            "out": str(out),
            "model": model,
            "data": {"train": str(data), "workers": 0},
            "stages": [stage],
            "samples": {"prompts": 0},
        },
    )


def rows_of(vision: str | None, audio: str | None) -> str:
    return "any" if vision and audio else "vision" if vision else "audio"
