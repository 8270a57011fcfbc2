"""The page draws what was counted and lists what was found, where there is any of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_report import Page, lines, step

from avlm.training.counted import part_charts
from avlm.training.report import write_report


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Twelve steps; memory and parts are looked at every fifth, and step 7 is left out."""
    rows = []
    for i in range(1, 13):
        more: dict[str, Any] = {"samples_per_s": 10.0 * i, "mfu": 0.05 * i, "padding": 0.0}
        if i % 5 == 1:
            more["memory_mb"] = {"parameters": 100.0, "gradients": 50.0, "optimizer": 200.0, "peak": 1000.0 + i}
            more["grad_norms"] = {"language": 2.0, "vision_connector": 0.5 * i}
            more["update_ratios"] = {"language": 1e-3, "vision_connector": 2e-3}
        if i == 7:
            more |= {"loss": None, "grad_norm": None, "skipped": True}
        rows.append(step(i, "joint", i, **more))
    lines(tmp_path / "metrics.jsonl", rows)
    return tmp_path


def labels(page: Page) -> list[str]:
    return [str(attrs["aria-label"]) for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"]


def test_a_curve_for_everything_that_was_counted(out: Path) -> None:
    page = Page(write_report(out))
    assert labels(page)[5:] == [
        "Samples per second over all steps, median 65.0",
        "Model FLOPs utilisation over all steps, share of what the device's matrix products can do; median 32.5 %",
        "Memory in MB over all steps, the most yet; of it at last: parameters 100, gradients 50, optimizer 200",
        "Gradient norm over all steps, of language; median 2",
        "Gradient norm over all steps, of vision connector; median 3",
        "Update over weights over all steps, of language; median 0.001",
        "Update over weights over all steps, of vision connector; median 0.002",
    ]
    assert "The loss of 1 steps is not a finite number; the line has gaps there." in page.text
    assert "metrics.jsonl:" not in page.text  # no line is taken for a broken one
    assert "What the watch found" not in page.tables


def test_what_is_measured_now_and_then_stands_until_the_next_or_the_end_of_its_stage() -> None:
    rows = [{"stage": "a", "grad_norms": {"language": 2.0}}, {"stage": "a"}]
    rows += [{"stage": "b", "grad_norms": {"vision": 1.0}}, {"stage": "b"}]
    (_, _, language, _), (_, _, vision, _) = part_charts(rows)
    assert language[:2] == [2.0, 2.0] and all(map(math.isnan, language[2:]))
    assert vision[2:] == [1.0, 1.0] and all(map(math.isnan, vision[:2]))


def test_padding_is_drawn_where_there_is_some(out: Path) -> None:
    rows = [json.loads(line) | {"padding": 0.25} for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines(out / "metrics.jsonl", rows)
    label = "Padding over all steps, share of places without a token; median 25.0 %"
    assert label in labels(Page(write_report(out)))


def test_what_was_found_is_listed_with_its_samples(out: Path) -> None:
    samples = [{"id": str(i), "where": f"rows.jsonl line {i}", "files": [f"<b>{i}.wav"]} for i in range(5)]
    spike = {"step": 4, "stage": "joint", "kind": "spike", "loss": 9.0, "median": 2.0, "deviations": 31.4}
    lost = {"step": 7, "stage": "joint", "kind": "nonfinite", "then": "skip", "loss": "nan", "grad_norm": "nan"}
    found = [spike | {"samples": samples}, lost | {"found": "the sound holds NaN", "samples": samples[:1]}]
    strange = [{"step": 8, "stage": "joint", "kind": "new", "samples": [7, {"files": 3}]}, {"step": "x"}]
    lines(out / "watch.jsonl", found)
    page = Page(write_report(out))
    named = [f'"{i}" (rows.jsonl line {i}, <b>{i}.wav)' for i in range(3)]
    assert page.tables["What the watch found"][1:] == [
        ["4", "joint", "loss 9, 31 deviations above 2", "; ".join(named) + " and 2 more"],
        ["7", "joint", "loss nan, gradient nan: the sound holds NaN; the update was left out", named[0]],
    ]
    lines(out / "watch.jsonl", strange)
    Page(write_report(out))
