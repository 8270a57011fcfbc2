"""NVIDIA NeMo's AVLM: one language model, one encoder for pictures and one for sound."""

from __future__ import annotations

from typing import Literal

from avlm.config.connectors import MlpConnector
from avlm.config.data import DataConfig
from avlm.config.media import VideoSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.config.released import CLIP_L_336, LLAMA3_8B, WHISPER_V3
from avlm.config.run import RunConfig
from avlm.config.stage import Lora, Optimizer, Schedule, Stage, TrainPart

STEPS, WARMUP = 5190, 150
MEGATRON = Optimizer(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)


def avlm_8b(peft: Literal["none", "lora"] = "none", senses: Literal["both", "vision", "audio"] = "both") -> RunConfig:
    """Llama-3 8B that sees through CLIP-L and hears through Whisper-large-v3: two alignments, then both together.

    Parts, rates, batches, lengths and optimizer are those of NeMo's recipe (release 2.4), whose documentation describes
    the three stages. Better here, because the source is broken there: stages follow each other by themselves (its
    second one cannot start from its first); with LoRA the connectors go on learning (it freezes them); several clips
    keep their order (it mixes them); a video's frames are those of their times and its sound is heard (it repeats one
    frame and never decodes the sound); a model with one sense can be built.

    Args:
        peft: ``lora`` tunes adapters of rank 32 in the last stage.
        senses: Both, or a model with one of them.
    """
    rate, low = (1e-4, 2e-7) if peft == "lora" else (2e-5, 2e-7)
    lora = Lora(rank=32, alpha=32) if peft == "lora" else None
    seeing, hearing = senses != "audio", senses != "vision"
    train: dict[str, TrainPart] = {"language": TrainPart(lr=rate, lora=lora)}
    stages: list[Stage] = []
    if seeing:
        stages.append(_stage("vision-alignment", {"vision_connector": TrainPart(lr=1e-3)}, 0.02, rows="vision"))
        train["vision_connector"] = TrainPart(lr=rate)
    if hearing:
        stages.append(_stage("audio-alignment", {"audio_connector": TrainPart(lr=1e-3)}, 0.02, rows="audio"))
        train["audio_connector"] = TrainPart(lr=rate)
    stages.append(_stage("finetune", train, low / rate, rows="any"))
    return RunConfig(
        recipe="avlm.8b",
        out="runs/avlm.8b",
        model=ModelConfig(
            language=LanguagePart(path=LLAMA3_8B),
            vision=VisionPart(encoder=Source(path=CLIP_L_336), connector=MlpConnector(), layer=-2) if seeing else None,
            audio=AudioPart(encoder=Source(path=WHISPER_V3), connector=MlpConnector(), length="window")
            if hearing
            else None,
            video=VideoSpec(fps=1.0, min_frames=8, max_frames=8),
        ),
        data=DataConfig(too_long="drop"),
        stages=tuple(stages),
    )


def _stage(name: str, train: dict[str, TrainPart], floor: float, rows: Literal["vision", "audio", "any"]) -> Stage:
    return Stage.model_validate(
        {
            "name": name,
            "train": train,
            "rows": rows,
            "steps": STEPS,
            "batch_samples": 8,
            "row_tokens": 8192,
            "schedule": Schedule(kind="cosine", warmup=WARMUP / STEPS, floor=floor),
            "optimizer": MEGATRON,
        }
    )
