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

from harness import Figures, Line, Table, machine, written

HERE = Path(__file__).parent
WARM_UP = 1
LOSSES = 1e-5
"""Greatest difference of the losses of the first steps, relative, between float32 sides."""
BARS = {"ms-swift": 1.3}
"""The least ratio that is wanted against a peer, where it is another one than the case's."""
MEMORY = 2.0
"""The least ratio of the sides' peaks that is wanted."""


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
    peer: dict[str, Any] = field(default_factory=dict)
    """More of the peers'."""
    samples: int | None = None
    """In a step, where that is another number than for the other cases."""
    exact: bool = True
    """Whether losses are to be equal."""


CASES = [
    Case("full", "language model and connector", 1.6, "full"),
    Case("lora", "adapters and connector", 1.8, "lora"),
    Case("connector", "connector", 1.8, "connector"),
    Case("equal", "language model and connector, samples of equal length", 1.1, "full", equal=True),
    Case("bfloat16", "language model and connector in bfloat16, against our float32", 1.3, "full", peers=("avlm",),
         ours={"precision": "bfloat16", "run": {"precision": "bfloat16"}}, exact=False),
    Case("tower", "connector, under CLIP-L's tower", None, "connector", model="tower", samples=8),
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


def race(case: Case, asked: argparse.Namespace, folder: Path) -> tuple[list[Line], list[list[str]]]:
    """Lines of the table of speed, and of the table of memory and losses."""
    from train_material import build_models

    name = asked.model or case.model
    if not (folder / f"{name}-llava").exists():
        build_models(name, folder)
    ours, theirs = folder / f"{name}-avlm", folder / f"{name}-llava"
    spec = {"train": case.train, "samples": case.samples or asked.samples, "equal": case.equal}
    spec |= {"threads": asked.threads, "shape": name}
    sides = {"": ("avlm", {**spec, "model": str(ours), **case.ours})}
    for peer in asked.peers or case.peers:
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
    return told(case, found)


def told(case: Case, found: dict[str, list[dict[str, float]]]) -> tuple[list[Line], list[list[str]]]:
    """What the steps of every side come to."""
    lines, more = [], []
    rates = {side: [step["tokens"] / step["seconds"] for step in steps[WARM_UP:]] for side, steps in found.items()}
    for side, steps in found.items():
        if not side:
            continue
        ratios = [a / b for a, b in zip(rates[""], rates[side], strict=True)]
        best, theirs = max(rates[""]), max(rates[side])
        name = "avlm, float32" if side == "avlm" else side
        bar = BARS.get(side, case.bar) if case.bar is not None else None
        lines.append(Line(case.what, best, name, theirs, best / theirs, ratios, bar))
        apart = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(found[""], steps, strict=True))
        ours, peak = found[""][-1]["peak_mb"], steps[-1]["peak_mb"]
        least = min(step["least_seconds"] for step in found[""][WARM_UP:])
        most = min(step["seconds"] for step in steps[WARM_UP:]) / least
        verdict = "" if not case.exact else "reached" if apart <= LOSSES else "missed"
        held = "" if not case.exact else "reached" if peak / ours >= MEMORY else "missed"
        more.append(
            [
                case.what,
                name,
                f"{ours:.0f}",
                f"{peak:.0f}",
                f"{peak / ours:.2f}",
                held,
                f"{apart:.1e}",
                verdict,
                f"{most:.2f}",
            ]
        )
    return lines, more


def main() -> None:
    """Race the cases that were asked for, print the tables and write them."""
    asked = _asked()
    warnings.simplefilter("ignore")
    notes = [
        f"One optimizer step of {asked.samples} samples on {asked.threads} threads, the best of {asked.rounds} after "
        f"{WARM_UP} that does not count; the peers' micro-batches are of 4. Same weights, samples, AdamW, float32.",
    ]
    speed = Table("train", "Optimizer steps", "tokens/s", notes)
    memory = Figures("train_memory", "Peak memory of the whole process, and the losses of the first steps",
                     ["what", "peer", "avlm, MB", "peer, MB", "ratio", f"bar {MEMORY:g}", "losses apart",
                      f"bar {LOSSES:g}", "highest ratio possible"])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.name in asked.cases:
                lines, rows = race(case, asked, Path(folder))
                speed.lines += lines
                memory.rows += rows
                print(*("| " + " | ".join(line.cells("tokens/s")) + " |" for line in lines), sep="\n", flush=True)
    for table in (speed, memory):
        print(table.text(), flush=True)
        if asked.out is not None:
            written(table, asked.out, machine())


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("cases", nargs="*", default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--samples", type=int, default=32, help="in one optimizer step; a multiple of 4")
    parser.add_argument("--rounds", type=int, default=3)
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
