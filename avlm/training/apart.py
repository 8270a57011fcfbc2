"""Stages that have nothing to do with each other: what one trains, the rows of the other never reach.

The alignment of the eyes and that of the ears are such stages. Trained at the same time, each from where the first
begins, they come to the same bits as one after the other, once what each has learned is laid together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avlm.config.stage import REACHED, Stage
from avlm.convert.weights import load_model, save_model
from avlm.data.selection import SENSES, own_kinds
from avlm.samples import MediaKind
from avlm.training.stages import part_modules


def apart(stages: Sequence[Stage], video: frozenset[MediaKind]) -> tuple[tuple[Stage, ...], ...]:
    """The same stages in the same order, in groups whose members have nothing to do with each other.

    Args:
        video: What the model takes from a video.
    """
    groups: list[tuple[Stage, ...]] = []
    for stage in stages:
        if groups and all(_independent(other, stage, video) for other in groups[-1]):
            groups[-1] = (*groups[-1], stage)
        else:
            groups.append((stage,))
    return tuple(groups)


def _independent(a: Stage, b: Stage, video: frozenset[MediaKind]) -> bool:
    for stage in (a, b):
        adapted = any(how.lora is not None for how in stage.train.values())
        if stage.builds is not None or stage.state_head is not None or adapted or stage.rows not in SENSES:
            return False
    if own_kinds(a, video) & own_kinds(b, video):
        return False
    return not (set(a.train) & set(REACHED[b.rows]) or set(b.train) & set(REACHED[a.rows]))


def lay_together(before: Path, stages: Sequence[Stage], own: Path, out: Path) -> None:
    """Publish a stage's model with what the stages beside it have learned.

    Args:
        before: The model directory with what ``stages`` learned.
        stages: Those that come before it in its group.
        own: The model directory that the stage made by itself.
        out: Where the model goes.
    """
    model, processor = load_model(own)
    modules, learned = part_modules(model), part_modules(load_model(before).model)
    for part in {part for stage in stages for part in stage.train if part in modules}:
        modules[part].load_state_dict(learned[part].state_dict())
    save_model(model, processor, out)
