"""The recipe behind the demo: parts that learn their own trade first, then are aligned and tuned like big ones."""

from __future__ import annotations

from avlm.config.connectors import MlpConnector, PrefixConnector
from avlm.config.data import DataConfig
from avlm.config.media import VideoSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.config.run import RunConfig, SampleConfig
from avlm.config.save import SaveConfig
from avlm.config.stage import Augment, First, Optimizer, Schedule, Stage, TrainPart

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LANGUAGE: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # about 1 / sqrt(width): at 0.02 so narrow a model learns slowly
}
VISION: dict[str, object] = {
    "model_type": "bit",
    "layer_type": "preactivation",
    "embedding_size": 32,
    "hidden_sizes": [128, 256, 512],
    "depths": [1, 1, 2],
    "num_groups": 8,
}
AUDIO: dict[str, object] = {
    "model_type": "whisper",
    "d_model": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "dropout": 0.2,
    "init_std": 0.1,
}
SEE = Augment(shift=0.08, jitter=0.15)
HEAR = Augment(pitch=0.1, tempo=0.25, squeeze=0.4, tilt=0.25, noise=0.5)
BOTH = Augment(**{**HEAR.model_dump(exclude_defaults=True), **SEE.model_dump(exclude_defaults=True)})
FRESH = Optimizer(weight_decay=0.05)


def tiny(pace: float = 1.0) -> RunConfig:
    """An audio-vision language model of a few million weights, from nothing, on a laptop's two cores.

    Three stages make the parts that others download: a language model on the rows' text, a vision encoder and an audio
    encoder, which learn to tell in words what they see and hear. Then vision alignment, audio alignment and joint
    fine-tuning run as they do for a model of eight billion.

    Args:
        pace: Multiplies the steps of every stage.
    """
    stages = tuple(_paced(stage, pace) for stage in (*_trades(), *_alignment(), _joint()))
    return RunConfig(
        recipe="tiny",
        out="runs/tiny",
        model=_model(),
        data=DataConfig(too_long="drop"),
        stages=stages,
        save=SaveConfig(every_s=30),
        samples=SampleConfig(prompts=2),
        side_by_side=3,
        threads=1,  # parts this small gain nothing from a second one
    )


def _paced(stage: Stage, pace: float) -> Stage:
    """A stage of so many times the steps, and of what it begins with."""
    update: dict[str, object] = {"steps": max(1, round((stage.steps or 1) * pace))}
    if stage.first is not None:
        steps = max(1, round(stage.first.steps * pace))
        update["first"] = stage.first.model_copy(update={"steps": steps})
    return stage.model_copy(update=update)


def _model() -> ModelConfig:
    return ModelConfig(
        language=LanguagePart(random=LANGUAGE, chat_template=TEMPLATE, vocabulary=1024),
        vision=VisionPart(
            encoder=Source(random=VISION),
            image_size_px=64,
            connector=PrefixConnector(stack=16, tokens=8),  # 16: all embeddings of a picture
        ),
        audio=AudioPart(encoder=Source(random=AUDIO), connector=MlpConnector(stack=4), level="clip"),
        video=VideoSpec(fps=2.0, max_frames=16),
    )


def _trades() -> tuple[Stage, ...]:
    """What others download, made from scratch."""
    return (
        Stage(
            name="language",
            builds="language",
            train={"language": TrainPart(lr=1e-3)},
            rows="text",
            first=First(of=("telling-apart",), steps=1000),
            steps=3600,
            batch_samples=16,
            optimizer=FRESH,
        ),
        Stage(
            name="vision",
            builds="vision",
            train={"vision": TrainPart(lr=2e-3)},
            rows="vision",
            supervise="words",
            steps=1600,
            batch_samples=16,
            optimizer=FRESH,
            augment=SEE,
        ),
        Stage(
            name="audio",
            builds="audio",
            train={"audio": TrainPart(lr=2e-3)},
            rows="audio",
            supervise="words",
            steps=850,
            batch_samples=32,
            optimizer=FRESH,
            augment=HEAR,
        ),
    )


def _alignment() -> tuple[Stage, ...]:
    """One sense after the other: its connector alone learns to speak to the language model."""
    return (
        Stage(
            name="vision-alignment",
            train={"vision_connector": TrainPart(lr=1e-3)},
            rows="vision",
            steps=350,
            batch_samples=32,
            augment=SEE,
        ),
        Stage(
            name="audio-alignment",
            train={"audio_connector": TrainPart(lr=2e-3)},
            rows="audio",
            steps=300,
            batch_samples=32,
            augment=HEAR,
        ),
    )


def _joint() -> Stage:
    """Both senses together; a share of the media in words keeps what the language model could do before."""
    return Stage(
        name="joint",
        train={
            "vision_connector": TrainPart(lr=5e-4),
            "audio_connector": TrainPart(lr=1e-3),
            "language": TrainPart(lr=4e-4),
        },
        steps=900,
        batch_samples=32,
        describe=0.2,
        optimizer=FRESH,
        augment=BOTH,
        schedule=Schedule(kind="wsd", decay=0.4),
    )
