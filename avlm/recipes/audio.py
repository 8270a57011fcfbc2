"""Language models that hear: Whisper and Mistral, SALMONN, Qwen-Audio, Ultravox."""

from __future__ import annotations

from avlm.config.connectors import LinearConnector, PoolConnector, SwigluConnector, WindowQformerConnector
from avlm.config.data import DataConfig
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source
from avlm.config.released import (
    LLAMA31_8B,
    MISTRAL_7B,
    QWEN2_7B,
    QWEN2_AUDIO,
    VICUNA_13B,
    WHISPER_V2,
    WHISPER_V3,
    WHISPER_V3_TURBO,
)
from avlm.config.run import RunConfig
from avlm.config.stage import Lora, Optimizer, Schedule, Stage, TrainPart
from avlm.recipes.templates import CHATML, VICUNA

BEATS: dict[str, object] = {"model_type": "avlm_beats"}
TASK_TAGS = (
    "<|startoftranscript|>",
    "<|startofanalysis|>",
    "<|unknown|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|caption|>",
    "<|question-answer|>",
    "<|timestamps|>",
    "<|notimestamps|>",
)


def mistral_7b() -> RunConfig:
    """Mistral 7B that hears through Whisper-large-v3: 250 tokens for 30 s, and only the connector learns.

    Pool to 250, LayerNorm, one matrix without bias: 5,245,440 parameters; ChatML; Adam without momentum at a constant
    1.5e-3. Better here: the first token of a caption is learned and padding never is, the answer ends with a token that
    is learned, and held-out rows are measured; the source does none of these.
    """
    model = ModelConfig(
        language=LanguagePart(path=MISTRAL_7B, chat_template=CHATML),
        audio=AudioPart(
            encoder=Source(path=WHISPER_V3), connector=PoolConnector(tokens=250, norm="after"), length="window"
        ),
    )
    stage = Stage(
        name="captions",
        train={"audio_connector": TrainPart(lr=1.5e-3)},
        rows="audio",
        epochs=10,
        batch_samples=8,
        schedule=Schedule(kind="constant", warmup=0.0),
        optimizer=Optimizer(betas=(0.0, 0.999), weight_decay=0.0),
    )
    return _run("audio.mistral_7b", model, stage)


def salmonn() -> RunConfig:
    """SALMONN 13B: Whisper-large-v2 and BEATs side by side, a window-level Q-Former, Vicuna 13B with adapters.

    arXiv:2310.13289 and its training code: one query for each third of a second (88 tokens for 30 s), LoRA of rank 8 on
    queries and values, 3e-5 to 1e-5 with 3000 steps of warm-up, batches of 8. Its three stages differ in their rows
    alone: give each its own with ``stages.NAME.data``. Better here: sound beyond 30 s is heard in chunks, stereo is
    averaged rather than cut to its left channel, gradients are clipped. Its last stage also lowers the adapters' scale,
    which is left to ``stages.activate.train.language.lora.alpha``. BEATs starts from drawn weights unless
    ``model.audio.beside.path`` names a folder with released ones.
    """
    model = ModelConfig(
        language=LanguagePart(path=VICUNA_13B, chat_template=VICUNA),
        audio=AudioPart(
            encoder=Source(path=WHISPER_V2),
            beside=Source(random=BEATS),
            connector=WindowQformerConnector(window=17, stride=17, queries=1, norm="none", rest="dropped"),
            length="window",
            wrap=("<Speech>", "</Speech>"),
        ),
    )
    lora = Lora(rank=8, alpha=32, dropout=0.1, targets=("q_proj", "v_proj"))
    train = {"audio_connector": TrainPart(lr=3e-5), "language": TrainPart(lr=3e-5, lora=lora)}

    def stage(name: str, steps: int) -> Stage:
        return Stage.model_validate(
            {
                "name": name,
                "train": train,
                "rows": "audio",
                "steps": steps,
                "batch_samples": 8,
                "schedule": Schedule(kind="cosine", warmup=min(0.5, 3000 / steps), floor=1 / 3),
                "optimizer": Optimizer(betas=(0.9, 0.999), weight_decay=0.05),
            }
        )

    return _run("audio.salmonn", model, stage("pretrain", 80_000), stage("instruct", 30_000), stage("activate", 6_000))


def qwen_audio() -> RunConfig:
    """Qwen-Audio: an encoder that learns many tasks told apart by tags, then a language model that learns to chat.

    arXiv:2311.07919: Whisper's encoder pooled to 25 embeddings a second and one matrix; first the encoder is trained
    and the language model frozen, then the other way round. The tags are tokens here and belong into the rows'
    questions. Parts are those of its successor, which transformers has: Qwen2-Audio's encoder and Qwen2 7B.
    """
    model = ModelConfig(
        language=LanguagePart(path=QWEN2_7B, chat_template=CHATML, add_tokens=TASK_TAGS, init="pieces"),
        audio=AudioPart(
            encoder=Source(path=QWEN2_AUDIO),
            connector=LinearConnector(),
            length="window",
            wrap=("<|audio_bos|>", "<|audio_eos|>"),
        ),
    )
    optimizer = Optimizer(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)
    tasks = Stage(
        name="tasks",
        train={"audio": TrainPart(lr=5e-5), "audio_connector": TrainPart(lr=5e-5)},
        rows="audio",
        epochs=1,
        batch_samples=120,
        schedule=Schedule(kind="cosine", warmup=0.02, floor=0.1),
        optimizer=optimizer,
    )
    chat = Stage(
        name="chat",
        train={"language": TrainPart(lr=1e-5)},
        epochs=1,
        batch_samples=128,
        schedule=Schedule(kind="cosine", warmup=0.03, floor=0.1),
        optimizer=optimizer,
    )
    return _run("audio.qwen_audio", model, tasks, chat)


def ultravox() -> RunConfig:
    """Ultravox 0.5 8B: eight frames of Whisper to a token, taught by the language model that reads the transcript.

    The language model stays as it is and is the teacher: it reads each sound's words (`alt`), and the connector learns
    to make it say the same (KL at temperature 2). True-length Whisper, 6.25 tokens a second. No answer needs to be
    written: rows need transcripts and what the language model says to them. Rate and batch of release 0.4 and 0.5.
    """
    model = ModelConfig(
        language=LanguagePart(path=LLAMA31_8B),
        audio=AudioPart(encoder=Source(path=WHISPER_V3_TURBO), connector=SwigluConnector(stack=8, hidden_size=2048)),
    )
    stage = Stage(
        name="distill",
        train={"audio_connector": TrainPart(lr=1e-3)},
        rows="audio",
        loss="distill",
        steps=14_400,
        batch_samples=192,
        schedule=Schedule(kind="cosine", warmup=1000 / 14_400),
        optimizer=Optimizer(betas=(0.9, 0.999), weight_decay=0.0),
    )
    return _run("audio.ultravox", model, stage)


def _run(name: str, model: ModelConfig, *stages: Stage) -> RunConfig:
    return RunConfig(recipe=name, out=f"runs/{name}", model=model, data=DataConfig(too_long="drop"), stages=stages)
