"""Checkpoints written while training goes on: the loop waits for one copy in memory, a thread does the rest.

The thread tells nobody anything; the loop hears of its end when it looks. Of several processes that each hold a share
of the weights, each writes its own so; the first one's thread publishes them when it has word of all.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from avlm.config.run import RunConfig
from avlm.config.save import SaveConfig
from avlm.training import checkpoint
from avlm.training.checkpoint import ALONE, NOBODY, Checkpoint, Owner, Position
from avlm.training.console import tell
from avlm.training.observe import Journal
from avlm.training.shares import Shares
from avlm.training.snapshot import Room, Tensors
from avlm.training.stopping import Stopped
from avlm.training.world import World

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
GIVE_UP_S = 5.0
"""How long a run that ends at once waits for a thread in the middle of a file."""


def kept_checkpoints(run: RunConfig) -> SaveConfig:
    """When checkpoints are written; a run that leaves its best weights keeps them until then."""
    if run.evaluate is None or run.evaluate.leave != "best":
        return run.save
    return run.save.model_copy(update={"keep_best": max(1, run.save.keep_best)})


class Saver:
    """Decides when a stage's checkpoints are written, and writes them.

    As a context it waits at the end for what is being written, also when a stage ends with an error or a wish to stop.
    What ends it at once (a second Ctrl-C) leaves no half of a checkpoint either.

    Args:
        folder: Where checkpoints lie.
        how: When, and how many are kept.
        journal: Its lines are on the disk before the checkpoint that stands behind them.
        console: Where trouble with the disk is told; it never ends the run.
        owner: Whose the checkpoints are.
        world: Who looks for checkpoints together, and writes together what is spread over them.
    """

    def __init__(
        self,
        folder: Path,
        how: SaveConfig,
        journal: Journal,
        console: Console,
        owner: Owner = NOBODY,
        world: World = ALONE,
    ) -> None:
        self.folder, self.how, self.journal, self.console = folder, how, journal, console
        self.owner, self.world = owner, world
        self._room = Room()
        self._passed_over: frozenset[str] = frozenset()
        self._thread: threading.Thread | None = None
        self._position: Position | None = None
        """Of the checkpoint that is being written, or was last."""
        self._error: BaseException | None = None
        self._wanted = True
        self._saved = True
        self._put_off = False
        self._began = time.monotonic()
        self._failed = False
        """Whether an error has ended the run."""
        self._together = False
        """Whether all processes are writing, or wrote last, a share each."""
        self._scored: tuple[int, float] | None = None

    def newest(self, stage: str) -> Checkpoint | None:
        """The checkpoint to go on from; those that were passed over are told, and go away when the next is written."""
        found, passed = checkpoint.newest(self.folder, stage, self.owner, self.world)
        for sentence in passed:
            tell(self.console, sentence)
        self._passed_over = checkpoint.newer_than(self.folder, found)
        return found

    def best(self, stage: str) -> Checkpoint | None:
        """The best of a stage's checkpoints that were scored."""
        self.finish()
        return checkpoint.best(self.folder, stage, self.owner, self.world)

    def score(self, stage_step: int, score: float) -> None:
        """Say how good the weights after a step of the stage are; higher is better. They are saved for sure."""
        self._scored = (stage_step, score)

    def due(self, stage_step: int) -> bool:
        """Whether a checkpoint is to be written after a step of the stage. Told here: how the last one went."""
        self._look()
        every = self.how.every_steps
        if (every is not None and stage_step % every == 0) or self._score_of(stage_step) is not None:
            return True
        if time.monotonic() - self._began <= self.how.every_s:
            return False
        if self._thread is None:
            return True
        if not self._put_off and self._position is not None:
            self._put_off = True
            tell(
                self.console,
                f"the checkpoint at step {self._position.stage_step} is still being written after "
                f"save.every_s={self.how.every_s:g}, so the next one waits for it",
            )
        return False

    def save(self, tensors: Tensors, position: Position) -> None:
        """Begin to write a checkpoint, when the one before is written. The tensors may change as soon as this returns.

        Args:
            tensors: Of this process: on any device, as they are now. Shares are given by all processes together.
        """
        self.finish()
        self._position, self._began, self._put_off = position, time.monotonic(), False
        lines = self._flushed() if self.world.first else []
        goes, shares = lines is not None, None
        if tensors.places is not None:
            # The first process has its say when it is done with the checkpoint before.
            mark = self.world.gather(secrets.token_hex(4) if goes else None)[0]
            goes, shares = mark is not None, Shares(self.world, str(mark), lambda: self._failed)
        if not goes:
            return
        self._together = shares is not None
        held, score = self._room.copy(tensors), self._score_of(position.stage_step)
        self._thread = threading.Thread(
            target=self._write, args=(held, position, score, lines or (), shares), name="avlm-checkpoint", daemon=True
        )
        self._thread.start()

    def _flushed(self) -> Sequence[Path] | None:
        """The journal's files, with every line so far in them; None if that cannot be."""
        try:
            return self.journal.flush()
        except OSError as error:
            self._tell(error)
            return None

    def finish(self) -> bool:
        """Wait for what is being written; returns whether the last checkpoint that was wanted is on the disk.

        Shares are waited for by all processes together, unless the run has ended with an error.
        """
        meet, self._together = self._together and not self._failed, False
        if meet and self.world.first:  # all others have written theirs, or it is heard here that one is gone
            self.world.wait()
        if self._thread is not None:
            self._thread.join()
        if meet and not self.world.first:
            self.world.wait()
        self._look()
        return self._saved

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, (Exception, Stopped)):
            self._failed = kind is not None and issubclass(kind, Exception)
            self.finish()
        else:
            self._wanted = False
            if self._thread is not None:
                self._thread.join(GIVE_UP_S)
        self._room.clear()

    def _write(
        self, tensors: Tensors, position: Position, score: float | None, lines: Sequence[Path], shares: Shares | None
    ) -> None:
        """The thread."""
        try:
            if shares is not None and not self.world.first:
                checkpoint.save_share(self.folder, tensors, position, shares, lambda: self._wanted)
                return
            for path in lines:
                _sync_lines(path)
            checkpoint.save(
                self.folder, tensors, position, keep=self.how.keep, keep_best=self.how.keep_best, score=score,
                owner=self.owner, passed_over=self._passed_over, shares=shares, wanted=lambda: self._wanted,
            )  # fmt: skip
        except BaseException as error:
            self._error = error

    def _look(self) -> None:
        """Hear of the end of what was being written."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread, error, self._error = None, self._error, None
        if error is None:
            self._saved, self._passed_over = True, frozenset()
        elif isinstance(error, OSError):
            self._tell(error)
        else:
            raise error

    def _tell(self, error: OSError) -> None:
        self._saved = False
        assert self._position is not None
        if error.errno in FULL:
            advice = "Make room on the disk"
        elif error.errno in CLOSED:
            advice = f"Make {self.folder} writable again"
        else:
            advice = "Look after the disk"
        tell(
            self.console,
            f"the checkpoint at step {self._position.stage_step} could not be written ({error.strerror or error}); "
            f"training goes on, and the one before it is untouched. {advice}",
        )

    def _score_of(self, stage_step: int) -> float | None:
        return self._scored[1] if self._scored is not None and self._scored[0] == stage_step else None


def _sync_lines(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
