"""The harness of the benches: what it tells is arithmetic, and the tables in the repository are what it wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    return harness


def test_each_side_is_told_by_its_best_round(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of ours take 2, 1 and 4 s, the peer's 6, 5 and 4 s; the first two of each do not count."""
    now = 0.0
    ours, peer = iter([9, 9, 2, 1, 4]), iter([9, 9, 6, 5, 4])

    def takes(seconds: object) -> None:
        nonlocal now
        now += next(seconds)  # type: ignore[call-overload]

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    case = harness.Case("it", lambda: takes(ours), {"peer": lambda: takes(peer)}, rounds=3, bar=4.5)
    (line,) = harness.timed(case)
    assert (line.ours, line.peer, line.ratio, line.ratios) == (1, 4, 4, [3, 5, 1])
    assert line.cells("ms") == ["it", "1000.00", "peer", "4000.00", "4.00", "1.00 3.00 5.00", "4.5 missed"]
    line.bar = 4.0
    assert line.cells("samples/s")[1:] == ["1.00", "peer", "4.00", "4.00", "1.00 3.00 5.00", "4 reached"]


def test_sides_that_differ_are_not_timed(harness: ModuleType) -> None:
    def differ() -> None:
        raise AssertionError("they differ")

    case = harness.Case("it", pytest.fail, {"peer": pytest.fail}, check=differ)
    with pytest.raises(AssertionError, match="they differ"):
        harness.timed(case)


@pytest.mark.parametrize("path", sorted(BENCH.glob("results/*.json")), ids=lambda path: path.stem)
def test_the_tables_are_those_that_were_measured(path: Path, harness: ModuleType, tmp_path: Path) -> None:
    about = json.loads(path.read_text())["machine"]
    harness.written(harness.read(path), tmp_path, about)
    for ending in (".json", ".md"):
        assert (tmp_path / path.name).with_suffix(ending).read_text() == path.with_suffix(ending).read_text()
    assert {"processor", "cores", "torch", "transformers"} <= about.keys()


def test_the_pages_name_every_bench() -> None:
    sys.path.insert(0, str(BENCH))
    try:
        from run import BENCHES
    finally:
        sys.path.remove(str(BENCH))
    page = (BENCH / "README.md").read_text()
    for name in BENCHES:
        assert (BENCH / f"{name}.py").exists()
        assert f"`{name}`" in page
