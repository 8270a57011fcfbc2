"""LLaVA-1.5, as NVIDIA's NeVA has it and as its authors trained it."""

from __future__ import annotations

from typing import Literal

from avlm.config.connectors import LinearConnector, MlpConnector
from avlm.config.data import DataConfig
from avlm.config.model import LanguagePart, ModelConfig, Source, VisionPart
from avlm.config.released import CLIP_L_336, LLAMA2_7B, VICUNA_7B, VICUNA_13B
from avlm.config.run import RunConfig
from avlm.config.stage import Lora, Optimizer, Schedule, Stage, TrainPart
from avlm.recipes.templates import LLAMA2, NVGPT, PLAIN, VICUNA

ADAM = Optimizer(betas=(0.9, 0.999), weight_decay=0.0)
COSINE = Schedule(kind="cosine", warmup=0.03)
FULL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llava15_7b(peft: Literal["none", "lora"] = "none") -> RunConfig:
    """LLaVA-1.5 7B: Vicuna 7B, CLIP-L at 336 px, two layers between them; alignment, then fine-tuning.

    Rates, batches and lengths are the authors' (arXiv:2310.03744 and their scripts): 558K captions at 1e-3 in batches
    of 256, then 665K instructions at 2e-5 in batches of 128, an epoch each. NeMo's recipe of this name has other ones
    (weight decay 0.1, betas 0.9 and 0.95, rank 32) and is no reproduction; it also never learns the first token behind
    a picture, which is learned here.

    Args:
        peft: ``lora`` fine-tunes adapters of rank 128 at 2e-4, the connector at 2e-5.
    """
    return _llava("neva.llava15_7b", VICUNA_7B, peft)


def llava15_13b(peft: Literal["none", "lora"] = "none") -> RunConfig:
    """LLaVA-1.5 13B: as the 7B, with Vicuna 13B.

    Args:
        peft: ``lora`` fine-tunes adapters of rank 128 at 2e-4, the connector at 2e-5.
    """
    return _llava("neva.llava15_13b", VICUNA_13B, peft)


def _llava(name: str, language: str, peft: str) -> RunConfig:
    model = ModelConfig(
        language=LanguagePart(path=language, chat_template=VICUNA),
        vision=VisionPart(encoder=Source(path=CLIP_L_336), connector=MlpConnector(), layer=-2, fit="pad"),
    )
    lora = Lora(rank=128, alpha=256, dropout=0.05, targets=FULL)
    tuned = TrainPart(lr=2e-4, lora=lora) if peft == "lora" else TrainPart(lr=2e-5)
    return RunConfig(
        recipe=name,
        out=f"runs/{name}",
        model=model,
        data=DataConfig(too_long="drop"),
        stages=(
            alignment(batch=256),
            Stage(
                name="finetune",
                train={"vision_connector": TrainPart(lr=2e-5), "language": tuned},
                epochs=1,
                batch_samples=128,
                row_tokens=2048,
                schedule=COSINE,
                optimizer=ADAM,
            ),
        ),
    )


def alignment(batch: int) -> Stage:
    """LLaVA's first stage: the connector alone learns from captions."""
    return Stage(
        name="pretrain",
        train={"vision_connector": TrainPart(lr=1e-3)},
        rows="vision",
        template=PLAIN,
        epochs=1,
        batch_samples=batch,
        row_tokens=2048,
        schedule=COSINE,
        optimizer=ADAM,
    )


def classic(
    language: Literal["vicuna", "llama2", "nvgpt"] = "vicuna",
    projection: Literal["linear", "mlp2x_gelu"] = "linear",
    vision_select_layer: int = -2,
    use_im_start_end: bool = False,
) -> RunConfig:
    """The older NeVA: a frozen encoder, a linear or two-layer projection, the templates of its time.

    Its settings by their old names. The class token is dropped, as its ``class_token_length: 1`` does. Its batches were
    256, then 128. Start and end tokens around a picture get the mean of the old embeddings rather than noise.

    Args:
        language: Vicuna 7B; Llama 2 with its own template; or NVIDIA's GPT template on a Llama of the same size, for
            which ``model.language`` is to be set to a checkpoint of that family.
        projection: The connector.
        vision_select_layer: Hidden state of the encoder that feeds it.
        use_im_start_end: Put ``<im_start>`` and ``<im_end>`` around each picture.
    """
    template = {"vicuna": VICUNA, "llama2": LLAMA2, "nvgpt": NVGPT}[language]
    turns = ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>") if language == "nvgpt" else ()
    path = VICUNA_7B if language == "vicuna" else LLAMA2_7B
    model = ModelConfig(
        language=LanguagePart(path=path, chat_template=template, add_special_tokens=turns),
        vision=VisionPart(
            encoder=Source(path=CLIP_L_336),
            connector=LinearConnector() if projection == "linear" else MlpConnector(),
            layer=vision_select_layer,
            fit="pad",
            wrap=("<im_start>", "<im_end>") if use_im_start_end else None,
        ),
    )
    train = {"vision_connector": TrainPart(lr=2e-5), "language": TrainPart(lr=2e-5)}
    tuning = Stage(
        name="finetune",
        train=train,
        epochs=1,
        batch_samples=128,
        row_tokens=4096,
        schedule=COSINE,
        optimizer=ADAM,
    )
    stages = (alignment(batch=256), tuning)
    return RunConfig(
        recipe="neva.classic", out="runs/neva.classic", model=model, data=DataConfig(too_long="drop"), stages=stages
    )
