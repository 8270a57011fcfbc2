"""Fine-tuning of a model that exists already."""

from __future__ import annotations

from typing import Literal

from avlm.config.run import RunConfig, SampleConfig
from avlm.config.stage import Lora, Optimizer, Schedule, Stage, TrainPart


def sft(model: str = "model", peft: Literal["none", "lora"] = "none") -> RunConfig:
    """Supervised fine-tuning of a model directory on rows of your own.

    Encoders stay frozen; the connectors that the model has and the language model are trained, the language model with
    adapters if ``peft`` says so.

    Args:
        model: The model directory to start from; on the command line ``model=DIR``.
        peft: ``lora`` for adapters on the language model (rank 32, as NeMo's default), ``none`` for all its weights.
    """
    language = TrainPart(lr=2e-4, lora=Lora()) if peft == "lora" else TrainPart(lr=2e-5)
    connector = TrainPart(lr=language.lr, optional=True)
    return RunConfig(
        recipe="sft",
        out="runs/sft",
        model=model,
        stages=(
            Stage(
                name="finetune",
                train={"vision_connector": connector, "audio_connector": connector, "language": language},
                steps=500,
                batch_samples=32,
                schedule=Schedule(kind="cosine", warmup=0.03),
                optimizer=Optimizer(weight_decay=0.0),
            ),
        ),
        samples=SampleConfig(prompts=2),
    )
