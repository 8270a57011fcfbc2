"""``avlm recipes`` and ``avlm show``: what there is, and what a run will do. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avlm.cli.shared import Overrides, RecipeName, resolve

if TYPE_CHECKING:
    from avlm.config.run import RunConfig
    from avlm.config.stage import Stage


def recipes() -> None:
    """List every recipe, one line each."""
    from avlm.recipes import summaries

    found = summaries()
    width = max(len(name) for name, _ in found)
    for name, summary in found:
        print(f"{name:{width}}  {summary}")


def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print the resolved settings and what trains in each stage."""
    from avlm.config.io import to_yaml

    config = resolve(recipe, overrides)
    print(to_yaml(config))
    print(what_trains(config))


def what_trains(config: RunConfig) -> str:
    """A table of parts by stages: the learning rate where a part is trained, a dash where it is frozen or absent."""
    from avlm.config.stage import PARTS, RARE

    def cell(stage: Any, part: str) -> str:
        how = stage.train.get(part)
        if how is None:
            return "-"
        adapters = "" if how.lora is None else f" {'DoRA' if how.lora.dora else 'LoRA'} {how.lora.rank}"
        return f"{how.lr:g}{adapters}" + (" if present" if how.optional else "")

    def more(stage: Any) -> str:
        head = "" if stage.state_head is None else f"state head {stage.state_head.lr:g}"
        words = (stage.builds, "" if stage.loss == "next_token" else stage.loss, head)
        return ", ".join(word for word in words if word) or "-"

    parts = [p for p in PARTS if p not in RARE or any(p in stage.train for stage in config.stages)]
    header = ["stage", *parts, "rows", "steps", "builds"]
    lines = [
        [s.name, *(cell(s, p) for p in parts), s.rows, _length(config, s), more(s)]
        for s in config.stages
        if s.name not in config.left_out()
    ]
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    rows = [
        "  ".join(f"{value:{width}}" for value, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *lines]
    ]
    return "\n".join(["# What trains (learning rate; - is frozen)", *("# " + row for row in rows)])


def _length(config: RunConfig, stage: Stage) -> str:
    if stage.steps is not None:
        return str(config.stage_steps(stage))
    epochs = f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'}"
    return epochs if config.max_steps is None else f"{epochs}, at most {config.max_steps}"
