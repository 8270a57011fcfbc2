"""Who else is told of every step: TensorBoard, Weights & Biases, MLflow, each imported where it is asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from avlm.config.run import RunConfig
from avlm.errors import MissingExtraError

WORDS = ("step", "stage", "stage_step", "skipped")
"""Entries of a line that are no curve."""


class Tracker(Protocol):
    """Something that keeps curves."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the values of one step of the run."""

    def close(self) -> None:
        """Keep what was taken."""


class Trackers:
    """All that a run asks for; none is the usual case and costs nothing."""

    def __init__(self, members: Sequence[Tracker] = ()) -> None:
        self.members = members

    def step(self, row: dict[str, Any]) -> None:
        """Tell of a step.

        Args:
            row: As a line of ``metrics.jsonl``.
        """
        if self.members:
            values = curves(row)
            for member in self.members:
                member.log(values, row["step"])


def curves(row: dict[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics by name, those of a part as ``grad_norms/language``."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": float(number) for inner, number in value.items()}
        elif name not in WORDS and isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = float(value)
    return found


@contextmanager
def open_trackers(run: RunConfig, out: Path, tells: bool = True) -> Iterator[Trackers]:
    """What ``log`` names, until the block ends.

    Args:
        tells: Whether this process is the one that tells them; of several, one is.

    Raises:
        MissingExtraError: One of them is not installed.
    """
    members: list[Tracker] = []
    try:
        for name in run.log if tells else ():
            members.append(MAKERS[name](run, out))
        yield Trackers(members)
    finally:
        for member in members:
            member.close()


class _TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, run: RunConfig, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "log", "log=[tensorboard]") from None
        self.writer = SummaryWriter(str(out / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


class _Wandb:
    """A run of Weights & Biases, the same one when this run goes on; where it goes is said in wandb's environment."""

    def __init__(self, run: RunConfig, out: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtraError("wandb", "wandb", "log=[wandb]") from None
        self.run = wandb.init(
            project="avlm",
            name=out.name,
            id=_known_as(run, out),
            resume="allow",
            dir=str(out),
            config=run.model_dump(mode="json"),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    """A run of MLflow; where it goes is said in MLflow's environment."""

    def __init__(self, run: RunConfig, out: Path) -> None:
        try:
            import mlflow
        except ImportError:
            raise MissingExtraError("mlflow", "mlflow", "log=[mlflow]") from None
        self.mlflow = mlflow
        mlflow.set_experiment("avlm")
        mlflow.start_run(run_name=out.name, tags={"avlm": _known_as(run, out)})
        mlflow.log_params({"recipe": run.recipe, "seed": run.seed, "out": str(out)})

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


def _known_as(run: RunConfig, out: Path) -> str:
    """The same for the same run in the same directory."""
    return hashlib.sha256(f"{run.recipe} {run.seed} {out.resolve()}".encode()).hexdigest()[:16]


MAKERS: dict[str, Callable[[RunConfig, Path], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
