"""Every error avlm raises on purpose.

    AvlmError
      ConfigError        a setting is wrong; raised before anything is loaded
      DataError          one sample is wrong; carries its source and key
        MediaError       ... because an image, audio or video did not decode
      LayoutError        text and media disagree about how many places there are
      WeightsError       a checkpoint does not fit the model
      MissingExtraError  an optional library is not installed
      WorldError         another process of the run has ended

A training job survives DataError (it skips the sample and counts it) and stops
on every other one. The command line turns each of them into one message and
exit status 2; a WorldError, which is no fault of this process, into 1.
"""

from __future__ import annotations


class AvlmError(Exception):
    """Base of all errors that a user's input can cause."""


class ConfigError(AvlmError):
    """A setting, or a combination of settings, cannot work."""


class DataError(AvlmError):
    """One sample is wrong.

    Args:
        message: What is so, why that cannot work, what to do.
        where: Source and place, such as ``train.jsonl line 7``.
        sample_id: The sample's own id, if it has one.
        file: The medium that is to blame, if one is.
    """

    def __init__(self, message: str, *, where: str = "", sample_id: str = "", file: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.reason = message
        self.where = where
        self.sample_id = sample_id
        self.file = file


class MediaError(DataError):
    """An image, audio or video of a sample could not be decoded."""


class LayoutError(AvlmError, ValueError):
    """Text and media disagree about how many places there are; a ValueError, as transformers' models raise it."""


class WeightsError(AvlmError):
    """A checkpoint does not fit the model, or is damaged."""


class MissingExtraError(AvlmError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the library {library}, which is not installed. "
            f"Install it with: pip install 'avlm[{extra}]'"
        )
        self.about = library, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), self.about  # an exception is rebuilt from its arguments, here in another process


class WorldError(AvlmError):
    """Another process of the run has ended, or hangs, so that this one cannot go on."""
