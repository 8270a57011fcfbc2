"""A recording of some steps by torch's profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from avlm.config.watch import ProfileSteps


class StepProfile:
    """Records steps by their number in the run.

    Args:
        config: Which; None: none.
        folder: Where recordings lie, as ``steps-FIRST-LAST.json``.
    """

    def __init__(self, config: ProfileSteps | None, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._first = 0
        self._recording: profile | None = None

    def before(self, step: int) -> None:
        """Begin to record, if this step is one of those and it has not begun."""
        if self.config is None or self._recording is not None or not self.config.first <= step <= self.config.last:
            return
        devices = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            devices.append(ProfilerActivity.CUDA)
        self._first = step
        self._recording = profile(activities=devices, record_shapes=True)
        self._recording.start()

    def after(self, step: int) -> None:
        """End the recording, if this was its last step."""
        if self.config is not None and step >= self.config.last:
            self.end(step)

    def end(self, step: int) -> None:
        """Write down what was recorded, up to and with this step.

        Raises:
            OSError: The disk is full or read-only.
        """
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        recording.stop()
        if step < self._first:
            return  # the stage ended before it: the next one begins anew
        self.folder.mkdir(exist_ok=True)
        recording.export_chrome_trace(str(self.folder / f"steps-{self._first}-{step}.json"))
