"""Optimizer steps, side by side: avlm's loop against the loops that people use, on the same weights and samples.

    python bench/train.py [CASE ...] [--samples 32] [--rounds 3] [--threads 2] [--model llava] [--out FOLDER]

Every side is a process of its own, so that memory is told apart, and the sides take turns: one optimizer step each,
round by round. What is told is tokens that are no padding, a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Figures, Line, Table, judged, machine, read, summary, written

HERE = Path(__file__).parent
WARM_UP = 1
LOSSES = 1e-5
"""Greatest difference of the losses of the first steps, relative, between float32 sides."""
BARS = {"ms-swift": 1.3}
"""The least ratio that is wanted against a peer, where it is another one than the case's."""
MEMORY = 2.0
"""The least ratio of the sides' peaks that is wanted."""

FEW = 16
"""Samples of a step where all are of one length, or both sides are avlm."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained, and on what."""

    name: str
    what: str
    bar: float | None
    """The least ratio that is wanted against the peers."""
    train: str
    model: str = "llava"
    equal: bool = False
    ours: dict[str, Any] = field(default_factory=dict)
    """More of our side's specification."""
    peers: tuple[str, ...] = ("transformers",)
    others: bool = True
    """Whether it is raced against the peers that are asked for instead."""
    peer: dict[str, Any] = field(default_factory=dict)
    """More of the peers'."""
    samples: int | None = None
    """In a step, at most; else as many as asked for."""
    exact: bool = True
    """Whether losses are to be equal."""


CASES = [
    Case("full", "language model and connector", 1.6, "full"),
    Case("lora", "adapters and connector", 1.8, "lora"),
    Case("connector", "connector", 1.8, "connector"),
    Case("equal", "language model and connector, samples of equal length", 1.1, "full", equal=True, samples=FEW,
         others=False),
    Case("bfloat16", "language model and connector in bfloat16, against our float32", 1.3, "full", peers=("avlm",),
         ours={"precision": "bfloat16", "run": {"precision": "bfloat16"}}, samples=FEW, exact=False,
         others=False),
    Case("compiled", "language model and connector in bfloat16 and compiled, against our float32", 1.3, "full",
         peers=("avlm",), ours={"precision": "bfloat16", "run": {"precision": "bfloat16", "speed": {"compile": True}}},
         samples=FEW, exact=False, others=False),
    Case("tower", "connector, under CLIP-L's tower", None, "connector", model="tower", samples=8, others=False),
]  # fmt: skip


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, name: str, spec: dict[str, Any], folder: Path, python: str = sys.executable) -> None:
        folder.mkdir(parents=True)
        path = folder / "spec.json"
        path.write_text(json.dumps({**spec, "folder": str(folder / "run")}))
        threads = {key: str(spec["threads"]) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        paths = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [python, str(HERE / "train_sides.py"), name, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
            env={**os.environ, **threads, "PYTHONPATH": paths},
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"a side ended: {' '.join(map(str, self.process.args))}\n{self.log.read_text()[-3000:]}")
        return line

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        assert self.process.stdin is not None
        print("step", file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._answer())
        assert self._answer() == "ready"
        return found

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def race(case: Case, asked: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """The steps of every side; ours has no name."""
    from train_material import build_models

    name = asked.model or case.model
    if not (folder / f"{name}-llava").exists():
        build_models(name, folder)
    ours, theirs = folder / f"{name}-avlm", folder / f"{name}-llava"
    spec = {"train": case.train, "samples": min(asked.samples, case.samples or asked.samples), "equal": case.equal}
    spec |= {"threads": asked.threads, "shape": name}
    sides = {"": ("avlm", {**spec, "model": str(ours), **case.ours})}
    for peer in asked.peers if asked.peers and case.others else case.peers:
        sides[peer] = (peer, {**spec, "model": str(ours if peer == "avlm" else theirs), **case.peer})
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with ExitStack() as stack:
        running = {}
        for side, (kind, given) in sides.items():
            python = asked.python.get(kind, sys.executable)
            running[side] = Side(kind, given, Path(tempfile.mkdtemp(dir=folder)) / kind, python)
            stack.callback(running[side].end)
        for turn in range(WARM_UP + asked.rounds):
            order = list(running)
            for side in order[turn % len(order) :] + order[: turn % len(order)]:
                found[side].append(running[side].step())
    return found


@dataclass(slots=True)
class Found:
    """What the races came to, table by table."""

    speed: Table
    memory: Table
    losses: Figures
    limits: Figures

    def tables(self) -> tuple[Table | Figures, ...]:
        return self.speed, self.memory, self.losses, self.limits

    def in_order(self) -> None:
        """Cases stand as in their table, whichever run they are of."""
        order = [case.name for case in CASES]
        for table in (self.speed, self.memory):
            table.lines.sort(key=lambda line: order.index(_case(line.what)))
        for figures in (self.losses, self.limits):
            figures.rows.sort(key=lambda row: order.index(_case(row[0])))

    def add(self, case: Case, steps: dict[str, list[dict[str, float]]]) -> None:
        """Take in the steps of every side of a case."""
        ours = steps[""]
        for side, theirs in steps.items():
            if side:
                self._add_peer(case, ours, "avlm, float32" if side == "avlm" else side, theirs)

    def _add_peer(self, case: Case, ours: list[dict[str, float]], name: str, theirs: list[dict[str, float]]) -> None:
        rates = [[step["tokens"] / step["seconds"] for step in steps[WARM_UP:]] for steps in (ours, theirs)]
        ratios = [a / b for a, b in zip(*rates, strict=True)]
        best, peer = map(max, rates)
        bar = None if case.bar is None else BARS.get(name, case.bar)
        self.speed.lines.append(Line(case.what, best, name, peer, best / peer, ratios, bar))
        peaks = ours[-1]["peak_mb"], theirs[-1]["peak_mb"]
        held = peaks[1] / peaks[0]
        barred = case.exact and name == "transformers" and case.bar is not None
        self.memory.lines.append(Line(case.what, peaks[0], name, peaks[1], held, [held], MEMORY if barred else None))
        if case.exact:
            apart = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True))
            told = f"{case.what}, against {name}: {apart:.1e}"
            self.losses.rows.append([told, judged(f"{LOSSES:g}", apart <= LOSSES)])
        least = min(step["least_seconds"] for step in ours[WARM_UP:])
        most = min(step["seconds"] for step in theirs[WARM_UP:]) / least
        self.limits.rows.append([case.what, name, f"{best / peer:.2f}", f"{most:.2f}", f"{best / peer / most:.2f}", ""])


def begun(asked: argparse.Namespace) -> Found:
    """The tables, with the lines of other cases that an earlier run on this machine wrote into the same folder."""
    found = empty(asked)
    for table in found.tables():
        path = None if asked.out is None else asked.out / f"{table.name}.json"
        if path is None or not path.exists() or json.loads(path.read_text())["machine"] != machine():
            continue
        earlier = read(path)
        if isinstance(table, Table) and isinstance(earlier, Table) and earlier.notes == table.notes:
            table.lines = [line for line in earlier.lines if _case(line.what) not in asked.cases]
        elif isinstance(table, Figures) and isinstance(earlier, Figures):
            table.rows = [row for row in earlier.rows if _case(row[0]) not in asked.cases]
    return found


def _case(told: str) -> str:
    """The case that a line is about, by its first words."""
    names = {case.what: case.name for case in CASES}
    return names.get(told) or names[told.rpartition(", against ")[0]]


def empty(asked: argparse.Namespace) -> Found:
    """Tables without lines."""
    first = (
        f"One optimizer step of {asked.samples} samples ({FEW} where neither their lengths nor a peer need more) on "
        f"{asked.threads} threads, the best of {asked.rounds} after {WARM_UP} that does not count; the peers' "
        "micro-batches are of 4. Same weights, samples, AdamW, float32. Tokens are those that are no padding."
    )
    limit = "The peer's time over that of the operations that a step cannot do without, at the speed of avlm's products"
    return Found(
        Table("train", "Optimizer steps", "tokens/s", [first]),
        Table("train_memory", "Peak memory of the whole process that takes the steps", "MB"),
        Figures("train_losses", "Losses of the first steps, the greatest relative difference", ["what", "bar"]),
        Figures("train_limits", limit, ["what", "peer", "ratio", "highest possible", "share of it", "bar"]),
    )


def main() -> None:
    """Race the cases that were asked for, print the tables and write them."""
    asked = _asked()
    warnings.simplefilter("ignore")
    found = begun(asked)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.name in asked.cases:
                found.add(case, race(case, asked, Path(folder)))
                found.in_order()
                for table in found.tables():  # after each: a run of many minutes may be cut off
                    if asked.out is not None:
                        written(table, asked.out, machine())
                for table in found.tables()[:2]:
                    print(table.text(), flush=True)
    for table in found.tables():
        print(table.text(), flush=True)
    if asked.out is not None:
        (asked.out / "bars.md").write_text(summary(asked.out))
    verdicts = [[table.title, *verdict] for table in found.tables() for verdict in table.verdicts()]
    print(Figures("", "What was wanted, and what was reached", ["table", "ratio", "bar"], verdicts).text(), flush=True)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("cases", nargs="*", default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--samples", type=int, default=32, help="in one optimizer step; a multiple of 4")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="another model for all cases: llava, tower or tiny")
    parser.add_argument("--peers", nargs="+", help="others than a case has: transformers, ms-swift")
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=PATH", help="interpreter of a peer of its own")
    parser.add_argument("--out", type=Path, help="folder for the tables; default: they are only printed")
    asked = parser.parse_args()
    asked.python = dict(pair.split("=", 1) for pair in asked.python)
    return asked


if __name__ == "__main__":
    main()
