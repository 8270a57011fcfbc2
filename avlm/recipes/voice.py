"""A model that exists already learns to tell whether it was meant."""

from __future__ import annotations

from typing import Literal

from avlm.config.run import RunConfig, SampleConfig
from avlm.config.stage import Augment, Optimizer, Schedule, Stage, StateHead, TrainPart

HEAR = Augment(pitch=0.1, tempo=0.15, squeeze=0.3, tilt=0.25, noise=0.5)


def voice(model: str = "model", learns: Literal["head", "hearing", "all"] = "all") -> RunConfig:
    """A model that hears learns to tell whether it was meant, or whether people speak to each other.

    Rows are those of `avlm data voice`, or any whose answers have a `state`; rows of what the model could do before,
    blended in, keep that: ``data.train='[{path: voice/train.jsonl, weight: 1}, {path: before.jsonl, weight: 1.5}]'``.

    Args:
        model: The model directory to start from; on the command line ``model=DIR``.
        learns: The state head alone, everything else staying as it is bit by bit; the audio side with it; or the
            language model too.
    """
    hearing = {"audio": TrainPart(lr=6e-4), "audio_connector": TrainPart(lr=8e-4)}
    parts = {"head": {}, "hearing": hearing, "all": {**hearing, "language": TrainPart(lr=3e-4)}}
    return RunConfig(
        recipe="voice",
        out="runs/voice",
        model=model,
        stages=(
            Stage(
                name="state",
                train=parts[learns],
                steps=600,
                batch_samples=32,
                state_head=StateHead(lr=5e-3, weights=(1.0, 1.5, 1.0)),
                schedule=Schedule(kind="cosine", warmup=0.03),
                optimizer=Optimizer(weight_decay=0.0),
                augment=HEAR,
            ),
        ),
        samples=SampleConfig(prompts=0),
    )
