"""When a run writes what it would not like to lose, and how much of it is kept."""

from __future__ import annotations

from pydantic import Field

from avlm.config.base import Settings


class SaveConfig(Settings):
    """When a run writes what it would not like to lose."""

    every_s: float = Field(60.0, gt=0)
    """Seconds between checkpoints. One that falls due while the one before is still being written is put off."""

    every_steps: int | None = Field(None, ge=1)
    """Write one after every so many steps of a stage as well, whatever the clock says. Training waits for the one
    before, if that is still being written."""

    keep: int = Field(2, ge=1)
    """Whole checkpoints kept: the last ones."""

    keep_best: int = Field(0, ge=0)
    """Kept besides: so many of those with the best scores, in a stage whose steps are scored."""
