"""Whether a stage fits a model and the stages around it; what keeps it from that is told in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

from avlm.config.model import ModelConfig, Source
from avlm.config.stage import REACHED, Stage


def check_stage(stage: Stage, model: ModelConfig) -> None:
    """Refuse a stage that trains or reads what the model does not have."""
    problem = stage_problem(stage, model.parts())
    if problem is not None:
        raise ValueError(problem)
    if stage.builds is not None:
        _check_build(stage, model)


def stage_problem(stage: Stage, parts: Sequence[str]) -> str | None:
    """What keeps a stage from working on a model of these parts, in one sentence; None if nothing does."""
    there = ", ".join(parts)
    for part, how in stage.train.items():
        if part not in parts and not how.optional:
            return (
                f"stage {stage.name} trains {part}, and the model has only {there}. "
                f"Remove stages.{stage.name}.train.{part}, or add the part to the model"
            )
        if part not in REACHED[stage.rows] and not how.optional:
            return (
                f"stage {stage.name} trains {part} on rows={stage.rows}, which never reach it. "
                f"Remove stages.{stage.name}.train.{part}, or set stages.{stage.name}.rows=any"
            )
    if stage.state_head is None and not any(part in parts and part in REACHED[stage.rows] for part in stage.train):
        return f"stage {stage.name} trains nothing. Name a part, such as stages.{stage.name}.train.language.lr=1e-4"
    problem = _adapters_problem(stage) or _balance_problem(stage) or _distill_problem(stage) or _state_problem(stage)
    problem = problem or _dpo_problem(stage)
    problem = problem or _ctc_problem(stage) or _idle_problem(stage)
    if problem is None and stage.supervise == "words":
        problem = _words_problem(stage)
    if problem is not None:
        return problem
    if stage.rows in ("vision", "audio") and stage.rows not in parts:
        return (
            f"stage {stage.name} reads rows with {stage.rows}, and the model has no {stage.rows} part. "
            f"Remove the stage, or add model.{stage.rows}"
        )
    return None


def _adapters_problem(stage: Stage) -> str | None:
    """What keeps the adapters of a stage from being one folder in PEFT's format."""
    adapted = [(part, how.lora) for part, how in stage.train.items() if how.lora is not None]
    for part, lora in adapted:
        if part == stage.builds:
            return (
                f"stage {stage.name} builds the {part} part from scratch with adapters on it, and what is under them "
                f"would stay as it was drawn. Remove stages.{stage.name}.train.{part}.lora"
            )
        first_part, first = adapted[0]
        for name in ("dora", "rslora", "dropout"):
            ours, theirs = getattr(first, name), getattr(lora, name)
            if ours != theirs:
                return (
                    f"stage {stage.name} has adapters with {name}={ours} on {first_part} and {name}={theirs} on "
                    f"{part}, and PEFT has one {name} for all adapters of a stage (only rank and alpha may differ). "
                    f"Set stages.{stage.name}.train.{part}.lora.{name}={ours}"
                )
    return None


def _balance_problem(stage: Stage) -> str | None:
    """What keeps a stage from balancing experts, as far as its own settings tell."""
    if stage.balance and "language" not in stage.train:
        return (
            f"stage {stage.name} has balance={stage.balance:g}, which teaches the language model to use all its "
            f"experts, and does not train it. Add stages.{stage.name}.train.language.lr, or set "
            f"stages.{stage.name}.balance=0"
        )
    return None


def _words_problem(stage: Stage) -> str | None:
    """What keeps an encoder from learning by itself in a stage."""
    if stage.loss == "ctc":
        return None  # it says itself what it needs
    if stage.builds not in ("vision", "audio") or set(stage.train) != {stage.builds}:
        what = "trains other parts with it" if stage.builds in ("vision", "audio") else "builds none"
        return (
            f"stage {stage.name} has supervise=words, which is how an encoder learns by itself, and {what}. "
            f"Set builds: vision or audio and train that part alone, or stages.{stage.name}.supervise=answers"
        )
    if stage.rows != stage.builds:
        return (
            f"stage {stage.name} has supervise=words and rows={stage.rows}, some of which have nothing for the "
            f"{stage.builds} encoder to tell. Set stages.{stage.name}.rows={stage.builds}"
        )
    if stage.describe:
        return (
            f"stage {stage.name} has supervise=words and describe={stage.describe:g}, which would give the encoder's "
            f"own media in words. Set stages.{stage.name}.describe=0"
        )
    return None


def _distill_problem(stage: Stage) -> str | None:
    """What keeps a stage from learning of its own language model."""
    if stage.loss != "distill":
        return None
    begin, name = f"stage {stage.name} has loss=distill", f"stages.{stage.name}"
    if "language" in stage.train:
        return (
            f"{begin} and trains language, which is the teacher and has to stay as it is. "
            f"Remove {name}.train.language, or set {name}.loss=next_token"
        )
    if stage.rows == "text":
        return (
            f"{begin} and rows=text, which leaves out the media that it is to understand. "
            f"Set {name}.rows to vision, audio or any"
        )
    if stage.supervise != "answers":
        return (
            f"{begin} and supervise={stage.supervise}, and only answers are the same in words and with media. "
            f"Set {name}.supervise=answers"
        )
    if stage.label_smoothing:
        return (
            f"{begin} and label_smoothing={stage.label_smoothing:g}, and there are no labels: the teacher gives a "
            f"whole distribution. Set {name}.label_smoothing=0"
        )
    return None


def _dpo_problem(stage: Stage) -> str | None:
    """What keeps a stage from learning of pairs of answers."""
    if stage.loss != "dpo":
        return None
    begin, name = f"stage {stage.name} has loss=dpo", f"stages.{stage.name}"
    if stage.builds is not None:
        return (
            f"{begin} and builds the {stage.builds} part from scratch, and a model that knows nothing yet prefers "
            f"nothing. Set {name}.loss=next_token"
        )
    if stage.supervise != "answers":
        return (
            f"{begin} and supervise={stage.supervise}, and it is answers that are compared. "
            f"Set {name}.supervise=answers"
        )
    if stage.label_smoothing:
        return (
            f"{begin} and label_smoothing={stage.label_smoothing:g}, which spreads a token's probability, and here "
            f"whole answers are compared. Set {name}.label_smoothing=0, or {name}.dpo.label_smoothing"
        )
    if stage.state_head is not None or stage.balance:
        what, off = ("a state_head", "state_head=null") if stage.state_head is not None else ("balance", "balance=0")
        return f"{begin} and {what}, which learns from single answers. Set {name}.{off}, or train it in another stage"
    return None


def _ctc_problem(stage: Stage) -> str | None:
    """What keeps an audio encoder from learning by itself what is said."""
    if stage.loss != "ctc":
        return None
    begin, name = f"stage {stage.name} has loss=ctc", f"stages.{stage.name}"
    for key, wanted, why in (
        ("supervise", "words", "it is the words of each sound that are told"),
        ("rows", "audio", "others hold nothing to listen to, or more than that"),
        ("describe", 0, "a sound that is given in words is not heard"),
        ("label_smoothing", 0, "what is told has no place that a label could stand at"),
        ("balance", 0, "no language model is asked"),
    ):
        value = getattr(stage, key)
        if value != wanted:
            shown = f"{value:g}" if isinstance(value, float) else value
            return f"{begin} and {key}={shown}, and {why}. Set {name}.{key}={wanted}"
    if stage.state_head is not None:
        return f"{begin} and a state_head, and no answer is learned. Remove {name}.state_head"
    if set(stage.train) != {"audio"} or stage.builds not in (None, "audio"):
        trained = f"builds the {stage.builds} part" if stage.builds not in (None, "audio") else "trains other parts"
        return f"{begin}, by which the audio encoder learns alone, and {trained}. Train audio alone, and build no other"
    return None


def _idle_problem(stage: Stage) -> str | None:
    """Settings of a loss that the stage does not have."""
    for name in ("dpo", "ctc"):
        if getattr(stage, name) is not None and stage.loss != name:
            return (
                f"stage {stage.name} has settings of {name} and loss={stage.loss}, so they would do nothing. "
                f"Set stages.{stage.name}.loss={name}, or stages.{stage.name}.{name}=null"
            )
    return None


def _state_problem(stage: Stage) -> str | None:
    """What keeps a stage from learning states."""
    if stage.state_head is not None and stage.builds is not None:
        return (
            f"stage {stage.name} has a state_head and builds the {stage.builds} part in a model that is thrown away, "
            f"the head with it. Remove stages.{stage.name}.state_head, or train it in a later stage"
        )
    if stage.state_tokens is not None and stage.supervise == "words":
        return (
            f"stage {stage.name} has state_tokens and supervise=words, which learns no answers. "
            f"Remove stages.{stage.name}.state_tokens"
        )
    return None


def built_source(stage: Stage, model: ModelConfig) -> Source:
    """Where the part comes from that a stage builds."""
    if stage.builds == "language":
        return model.language
    part = model.vision if stage.builds == "vision" else model.audio
    if part is None:
        raise ValueError(
            f"stage {stage.name} builds the {stage.builds} part, and the model has none. "
            f"Add model.{stage.builds}, or remove the stage"
        )
    return part.encoder


def _check_build(stage: Stage, model: ModelConfig) -> None:
    built_source(stage, model)
    if stage.builds not in stage.train:
        raise ValueError(
            f"stage {stage.name} builds the {stage.builds} part but does not train it. "
            f"Add stages.{stage.name}.train.{stage.builds}.lr"
        )
    around = REACHED["text"] if stage.builds == "language" else REACHED[stage.builds or "any"]
    for part, how in stage.train.items():
        if part not in around and not how.optional:
            raise ValueError(
                f"stage {stage.name} builds the {stage.builds} part in a small model of its own, which has no {part}. "
                f"Remove stages.{stage.name}.train.{part}"
            )


def check_order(stages: Sequence[Stage]) -> None:
    """Parts are built once, before the model is composed of them."""
    built: dict[str, str] = {}
    composed = ""
    for stage in stages:
        if stage.builds is None:
            composed = composed or stage.name
            continue
        if composed:
            raise ValueError(
                f"stage {stage.name} builds the {stage.builds} part after stage {composed} has trained the model that "
                f"it belongs in. Put it before {composed}"
            )
        if stage.builds in built:
            raise ValueError(
                f"stages {built[stage.builds]} and {stage.name} both build the {stage.builds} part, and the second "
                "would undo the first. Remove one of them"
            )
        built[stage.builds] = stage.name
