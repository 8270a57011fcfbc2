"""The pages about losses and measuring name every setting there is, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import yaml

import avlm
from avlm.config.ctc import Ctc
from avlm.config.evaluate import LESS_IS_BETTER, MORE_IS_BETTER, Evaluate
from avlm.config.preference import Dpo
from avlm.config.stage import Stage
from avlm.config.stage_fits import stage_problem

DOCS = Path(avlm.__file__).parents[1] / "docs"


def blocks(page: str) -> list[dict[str, object]]:
    return [yaml.safe_load(found) for found in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]


def test_every_setting_and_metric_of_measuring_is_told() -> None:
    page = (DOCS / "measuring.md").read_text()
    told = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(.+?)`", row)}
    assert told == {*Evaluate.model_fields, *LESS_IS_BETTER, *MORE_IS_BETTER, "tasks.NAME.accuracy"}
    assert f"for the losses ({Evaluate.model_fields['rows'].default})" in page
    (block,) = blocks(page)
    Evaluate.model_validate(block["evaluate"])


def test_every_loss_is_told_and_the_stages_shown_can_work() -> None:
    page = (DOCS / "losses.md").read_text()
    told = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)[1:]  # without the head
    assert set(told) == set(get_args(Stage.model_fields["loss"].annotation))
    for prefix, settings in (("dpo", Dpo), ("ctc", Ctc)):
        assert all(f"`{prefix}.{name}`" in page for name in settings.model_fields)
    stages = [stage for block in blocks(page) for stage in block["stages"]]  # type: ignore[attr-defined]
    assert len(stages) == 2
    for stage in stages:
        assert stage_problem(Stage.model_validate(stage), ("audio", "audio_connector", "language")) is None
