"""Whether what frozen encoders make is kept on disk, where, and how much of it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from avlm.config.base import Settings


class FeatureCache(Settings):
    """Outputs of frozen encoders, computed once. ``features=on`` is short for ``features.use=on``."""

    PRESETS: ClassVar = {use: {"use": use} for use in ("auto", "on", "off")}

    use: Literal["auto", "on", "off"] = "auto"
    """`auto` keeps them in stages that read their rows more than once, where reading is measured to be faster than
    encoding; `on` in every stage, whatever it costs; `off` never. Where they are kept, media are encoded one at a time,
    whose last bits are not those of a batch: so this stays as it is when a run goes on."""

    folder: str | None = None
    """Where they are kept; default: `features` in the run's directory, which goes when the run is done. Several runs
    and processes can share one folder."""

    disk_mb: int = Field(51_200, ge=1)
    """Most that the folder holds, and never more than half of the room that is left on the disk."""

    @model_validator(mode="before")
    @classmethod
    def _is_use(cls, given: Any) -> Any:
        """The short form; YAML reads `on` and `off` as true and false."""
        if isinstance(given, bool):
            given = "on" if given else "off"
        if isinstance(given, str):
            return {"use": given}
        if isinstance(given, dict) and isinstance(given.get("use"), bool):
            return {**given, "use": "on" if given["use"] else "off"}
        return given
