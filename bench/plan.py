"""The plan of the data at a million samples and at a hundred.

fill     tokens by the tokens that the rows could hold
spread   over 8 ranks: what the slowest rank of each step has to do, summed over the steps, by what ranks have on
         average. For Σ length² (attention) and for the encoders. That is how much longer steps take than they had to,
         if they took as long as this cost.
memory   the most that numpy and Python held at once in a process that plans, by tracemalloc
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tracemalloc

import numpy as np
from harness import Figures, judged
from numpy.typing import NDArray

from avlm.config.stage import Stage
from avlm.data.planning.plan import Measures, Plan

Ints = NDArray[np.int64]

ROW_TOKENS = 8192
PICTURE_TOKENS = 576
RANKS = 8
MOST_S, FILL, SPREAD, FLAT = 1.5, 0.995, 1.05, 1.1
"""Wanted of the plan: seconds, fill, spread over the ranks, and memory that does not grow with the samples."""


def llava_mix(rows: Ints | int, seed: int = 0) -> tuple[Ints, Ints]:
    """Tokens and pictures of samples as LLaVA-1.5's 665 thousand have them, about.

    7 % are text alone; text is 150 tokens at the median, and beyond 1,000 in one or two of a hundred; a picture is 576.

    Args:
        rows: Numbers of rows, or how many. A row is the same whichever are asked for.
    """
    at = np.arange(rows) if isinstance(rows, int) else rows
    normal = (sum(_uniform(at, seed, draw) for draw in range(4)) - 2) * np.sqrt(3)  # nearly: four uniform ones
    pictures = (_uniform(at, seed, 9) >= 0.07).astype(np.int64)
    text = np.exp(np.log(150) + 0.95 * normal).astype(np.int64)
    return np.clip(text, 8, ROW_TOKENS - PICTURE_TOKENS) + PICTURE_TOKENS * pictures, pictures


def _uniform(at: Ints, seed: int, draw: int) -> NDArray[np.float64]:
    """A number from 0 to 1 for each row, by hashing (the finaliser of MurmurHash3)."""
    mixed = at.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 1000 + draw + 1)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


class Lazy:
    """A column of any length that takes no memory."""

    def __init__(self, column: int) -> None:
        self.column = column

    def __getitem__(self, rows: Ints) -> Ints:
        return llava_mix(rows)[self.column]


def stage(batch_rows: int) -> Stage:
    """A stage that reads so many rows of 8k tokens in a step."""
    return Stage(name="bench", epochs=1, batch_rows=batch_rows, row_tokens=ROW_TOKENS)


def measured(count: int) -> Measures:
    """The mix as an index would have it."""
    tokens, pictures = llava_mix(count)
    return Measures(tokens.astype(np.int32), pictures.astype(np.int32))


def whole_plan(measures: Measures, count: int, batch_rows: int) -> tuple[float, float, list[float]]:
    """Seconds, fill and spreads of the first epoch: shuffle, packs and ranks of every step."""
    began = time.perf_counter()
    plan = Plan([count], measures, seed=0, stage=stage(batch_rows))
    slowest, mean, k = np.zeros(2), np.zeros(2), 0
    while len(plan.packs) <= len(plan.cuts) - 1:  # until a row of the second epoch is asked for
        step = plan.step(k)
        loads = np.zeros((RANKS, 2))
        np.add.at(loads, step.ranks(RANKS), step.costs)
        slowest, mean, k = slowest + loads.max(0), mean + loads.mean(0), k + 1
    seconds = time.perf_counter() - began
    rows = sum(plan.packs[: len(plan.cuts) - 1])
    fill = int(np.asarray(measures.tokens[np.arange(count)]).sum()) / (rows * ROW_TOKENS)
    return seconds, fill, (slowest / mean).tolist()


def peak(count: int, windows: int) -> int:
    """Bytes at the peak while the first windows of so many samples are planned, and the last ones are read."""
    tracemalloc.start()
    plan = Plan([count], Measures(Lazy(0), Lazy(1)), seed=0, stage=stage(64))
    k = 0
    while len(plan.packs) < windows:
        plan.step(k).ranks(RANKS)
        k += 1
    plan.order.read(count - 65_536, count)
    return tracemalloc.get_traced_memory()[1]


def peak_apart(count: int, windows: int) -> int:
    """`peak` in a process of its own."""
    said = subprocess.run(
        [sys.executable, __file__, "--peak", str(count), "--windows", str(windows)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(json.loads(said.stdout))


def main() -> list[Figures]:
    """The table."""
    head = ["what", "seconds", "fill", "spread of Σ length²", "of encoders", "MB", "bar"]
    table = Figures("plan", f"Plan: 1,000,000 samples, rows of {ROW_TOKENS} tokens", head)
    measures = measured(1_000_000)
    for batch_rows in (8, 64, 512):
        runs = [whole_plan(measures, 1_000_000, batch_rows) for _ in range(3)]
        seconds, (_, fill, spreads) = min(run[0] for run in runs), runs[0]
        found = [f"{seconds:.2f}", f"{fill:.4f}", *(f"{spread:.3f}" for spread in spreads), ""]
        reached = seconds <= MOST_S and fill >= FILL and max(spreads) <= SPREAD
        bar = judged(f"{MOST_S:g} s, {FILL:g}, {SPREAD:g}", reached)
        table.rows.append([f"{batch_rows} rows a step", *found, bar])
    least = 0
    for count in (1_000_000, 10_000_000, 100_000_000):
        most = peak_apart(count, 8)
        least = least or most
        bar = judged(f"within {FLAT:g} times the first", most <= FLAT * least)
        table.rows.append([f"{count:,} samples", "", "", "", "", f"{most / 2**20:.1f}", bar])
    return [table]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", type=int)
    parser.add_argument("--windows", type=int, default=8)
    asked = parser.parse_args()
    if asked.peak is None:
        print(main()[0].text())
    else:
        print(peak(asked.peak, asked.windows))
