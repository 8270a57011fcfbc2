"""The recipe behind the demo: parts that learn their own trade first, then are aligned and tuned like big ones."""

from __future__ import annotations

from avlm.config.media import VideoSpec
from avlm.config.model import AudioPart, LanguagePart, LinearConnector, MlpConnector, ModelConfig, Source, VisionPart
from avlm.config.run import (
    Augment,
    DataConfig,
    Optimizer,
    RunConfig,
    SampleConfig,
    SaveConfig,
    Schedule,
    Stage,
    TrainPart,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _llama(width: int, layers: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,  # about 1 / sqrt(width): at 0.02 so narrow a model learns slowly
    }


def tiny(pace: float = 1.0) -> RunConfig:
    """An audio-vision language model of a few million weights, from nothing, on a laptop's two cores.

    Three stages make the parts that others download: a language model on the rows' text, a vision encoder and an audio
    encoder, each read by a throwaway language model. Then vision alignment, audio alignment and joint fine-tuning run
    as they do for a model of eight billion.

    Args:
        pace: Multiplies the steps of every stage.
    """
    see = Augment(shift=0.08, jitter=0.15)
    hear = Augment(pitch=0.1, tempo=0.25, squeeze=0.4, tilt=0.25, noise=1.0)
    both = Augment(**{**hear.model_dump(exclude_defaults=True), **see.model_dump(exclude_defaults=True)})
    fresh = Optimizer(weight_decay=0.05)
    reader = LanguagePart(random=_llama(128, 2), chat_template=TEMPLATE)

    def steps(count: int) -> int:
        return max(1, round(count * pace))

    return RunConfig(
        recipe="tiny",
        out="runs/tiny",
        model=ModelConfig(
            language=LanguagePart(random=_llama(128, 4), chat_template=TEMPLATE, vocabulary=1024),
            vision=VisionPart(
                encoder=Source(
                    random={
                        "model_type": "bit",
                        "layer_type": "preactivation",
                        "embedding_size": 32,
                        "hidden_sizes": [128, 256, 512],
                        "depths": [1, 1, 2],
                        "num_groups": 8,
                    }
                ),
                image_size_px=64,
                connector=LinearConnector(stack=4),
            ),
            audio=AudioPart(
                encoder=Source(
                    random={
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
                ),
                connector=MlpConnector(stack=4),
                level="clip",
            ),
            video=VideoSpec(fps=2.0, max_frames=16),
        ),
        data=DataConfig(too_long="drop"),
        stages=(
            Stage(
                name="language",
                builds="language",
                train={"language": TrainPart(lr=3e-3)},
                rows="text",
                supervise="everything",
                steps=steps(150),
                batch_samples=64,
                optimizer=fresh,
            ),
            Stage(
                name="vision",
                builds="vision",
                reader=reader,
                train={
                    "vision": TrainPart(lr=2e-3),
                    "vision_connector": TrainPart(lr=1e-3),
                    "language": TrainPart(lr=6e-4),
                },
                rows="vision",
                steps=steps(2200),
                batch_samples=16,
                optimizer=fresh,
                augment=see,
            ),
            Stage(
                name="audio",
                builds="audio",
                reader=reader,
                train={p: TrainPart(lr=2e-3) for p in ("audio", "audio_connector", "language")},
                rows="audio",
                steps=steps(1200),
                batch_samples=32,
                optimizer=fresh,
                augment=hear,
            ),
            Stage(
                name="vision-alignment",
                train={"vision_connector": TrainPart(lr=2e-3)},
                rows="vision",
                steps=steps(60),
                batch_samples=64,
                augment=see,
            ),
            Stage(
                name="audio-alignment",
                train={"audio_connector": TrainPart(lr=2e-3)},
                rows="audio",
                steps=steps(60),
                batch_samples=64,
                augment=hear,
            ),
            Stage(
                name="joint",
                train={
                    "vision_connector": TrainPart(lr=1e-3),
                    "audio_connector": TrainPart(lr=1e-3),
                    "language": TrainPart(lr=7e-4),
                },
                steps=steps(1500),
                batch_samples=32,
                optimizer=fresh,
                augment=both,
                schedule=Schedule(kind="wsd", decay=0.3),
            ),
        ),
        save=SaveConfig(every_s=30),
        samples=SampleConfig(prompts=2),
    )
