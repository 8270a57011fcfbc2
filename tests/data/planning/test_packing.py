"""Rows under several budgets: no sample twice, no budget overflown, nearly full."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.data.planning import packing
from avlm.data.planning.packing import pack_few, pack_rows, pack_window


def bench_plan() -> ModuleType:
    """bench/plan.py, which makes lengths like LLaVA's."""
    folder = Path(__file__).parents[3] / "bench"
    sys.path.append(str(folder))  # where its neighbours are
    spec = importlib.util.spec_from_file_location("bench_plan", folder / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_plan"] = module
    spec.loader.exec_module(module)
    return module


def loads(row_of: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.array([np.bincount(row_of, weights=column) for column in sizes])


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 3), st.integers(1, 300), st.integers(1, 20))
def test_every_sample_is_in_one_row_and_no_budget_is_overflown(
    data: st.DataObject, budgets: int, count: int, few: int
) -> None:
    """With few packed one by one, so that rounds see small numbers of samples too."""
    room = tuple(data.draw(st.lists(st.integers(1, 500), min_size=budgets, max_size=budgets)))
    seed = data.draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    largest = [rng.integers(1, r + 1) for r in room]
    sizes = np.array([rng.integers(0, n + 1, count) for n in largest])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "FEW", few)
        row_of = pack_window(sizes, room)
        assert np.array_equal(pack_window(sizes, room), row_of)
    assert row_of.shape == (count,)
    assert set(row_of.tolist()) == set(range(row_of.max() + 1))
    assert (loads(row_of, sizes) <= np.array(room)[:, None]).all()


def test_a_sample_larger_than_a_budget_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        pack_window(np.array([[5, 5], [1, 9]]), (10, 8))
    with pytest.raises(AssertionError):
        pack_few(np.array([[5, 5], [1, 9]]), (10, 8))
    assert pack_window(np.array([[5, 5], [1, 8]]), (10, 9)).tolist() == [0, 0]
    assert pack_window(np.zeros((1, 0), np.int64), (10,)).tolist() == []


def test_several_budgets_bind_at_once() -> None:
    """Four with many tiles and four with many tokens make four rows, each of one and the other."""
    sizes = np.array([[10, 90, 10, 90, 10, 90, 10, 90], [9, 1, 9, 1, 9, 1, 9, 1]])
    rows = pack_few(sizes, (100, 10))
    assert len(rows) == 4 and all(sizes[:, row].sum(1).tolist() == [100, 10] for row in rows)


@pytest.mark.parametrize(
    ("room", "least"),
    [
        ((131_072,), 0.995),
        ((8192,), 0.995),
        ((8192, 64), 0.995),
        ((8192, 11), 0.99),
        ((8192, 8), 0.99),
        ((4096,), 0.99),
        ((16_384,), 0.998),
    ],
)
def test_rows_of_a_llava_like_mix_are_full(room: tuple[int, ...], least: float) -> None:
    """Of the budget that binds: that many rows would be needed at least."""
    tokens, pictures = bench_plan().llava_mix(40_000)
    kept = tokens <= room[0]
    sizes = np.stack([tokens[kept], pictures[kept]])[: len(room)]
    row_of = pack_window(sizes, room)
    fewest = max(np.ceil(column.sum() / budget) for column, budget in zip(sizes, room, strict=True))
    assert fewest / (row_of.max() + 1) >= least


def test_the_mix_is_like_llavas() -> None:
    tokens, pictures = bench_plan().llava_mix(300_000)
    text = tokens - 576 * pictures
    assert pictures.mean() == pytest.approx(0.93, abs=0.002)
    assert np.median(text) == pytest.approx(150, abs=2)
    assert 0.01 < (text > 1000).mean() < 0.03
    few = np.array([7, 299_999])
    assert bench_plan().llava_mix(few)[0].tolist() == tokens[few].tolist()


@pytest.mark.parametrize("room", [2048, 4096, 8192])
def test_a_window_is_packed_better_than_best_fit_decreasing(room: int) -> None:
    tokens, _ = bench_plan().llava_mix(1500, seed=1)
    tokens = tokens[tokens <= room]
    assert pack_window(tokens[None], (room,)).max() + 1 < len(pack_rows(tokens.tolist(), room))


def test_rows_are_as_mixed_as_the_order() -> None:
    """The first samples of the order do not all go to the same rows, and rows differ in cost as chance has it."""
    tokens, pictures = bench_plan().llava_mix(20_000)
    row_of = pack_window(tokens[None], (8192,))
    share = np.bincount(row_of, weights=pictures) / np.bincount(row_of)
    assert share.std() < 2 * (0.07 * 0.93 / (len(row_of) / (row_of.max() + 1))) ** 0.5
