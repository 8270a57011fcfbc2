"""The documentation's page names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from avlm.config.run import RunConfig
from avlm.training.observe import StepMetrics

PAGE = Path(__file__).parents[3] / "docs/watching.md"
GROUPS = {"watch", "count", "profile"}


def test_every_setting_that_is_named_is_one_and_every_one_is_named() -> None:
    text = PAGE.read_text()
    for group in GROUPS:
        named = set(re.findall(rf"\b{group}\.(\w+)", text)) - {"jsonl"}
        kind = RunConfig.model_fields[group].annotation
        known = set(getattr(kind, "model_fields", {})) or {"first", "last"}
        assert named == known, group


def test_every_entry_that_is_named_is_in_a_line() -> None:
    entries = {"samples_per_s", "target_tokens_per_s", "tflops_per_s", "mfu", "padding", "memory_mb", "grad_norms"}
    entries |= {"update_ratios", "skipped"}
    text = PAGE.read_text()
    assert all(f"`{name}`" in text and name in StepMetrics.__slots__ for name in entries)
