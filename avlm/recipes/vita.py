"""VITA 1.0 and 1.5: pictures in tiles, sound through an encoder of its own, state tokens that tell who is meant."""

from __future__ import annotations

from avlm.config.connectors import ConvConnector, PixelShuffleConnector
from avlm.config.data import DataConfig
from avlm.config.media import InternvlTiling, VideoSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.config.released import INTERNVIT_300M, MIXTRAL_8X7B, QWEN25_7B
from avlm.config.run import RunConfig
from avlm.config.stage import Optimizer, Schedule, Stage, TrainPart
from avlm.recipes.templates import CHATML, VITA

WHALE: dict[str, object] = {"model_type": "avlm_whale"}
"""VITA's audio encoder at its released size, from scratch: its weights are of a format of their own."""
PERSONA = "You are an AI robot and your name is Vita. You answer in detail, politely, in the language of the question."
SEEN = "What you say about {what} must rest on what is seen in it."
SYSTEM = {
    "text": PERSONA,
    "audio": PERSONA,
    "image": f"{PERSONA} {SEEN.format(what='the image')} The input is an image and not a video.",
    "video": f"{PERSONA} {SEEN.format(what='the video')} The input is a video and not an image.",
}
"""System turns by what a row holds: text and sound share theirs. Persona and rules are VITA's, the words ours."""
HANDS = {"audio": "\u261e", "noise": "\u261f", "text": "\u261c"}
"""VITA 1.5's state tokens: three hands."""
DATA = DataConfig(too_long="drop", system=SYSTEM)
ADAM = Optimizer(betas=(0.9, 0.999), weight_decay=0.0)


def vita_8x7b() -> RunConfig:
    """VITA 1.0: Mixtral 8x7B with a larger vocabulary, InternViT-300M in tiles, an audio encoder trained from scratch.

    arXiv:2408.05211 and its scripts: rates 5e-4 for connectors, 2e-5 for the rest, cosine, an epoch each, 6,200 tokens
    (9,100 in the last stage); 256 tokens a tile and up to 12 tiles and a thumbnail, a frame a second between 4 and 16,
    12.5 tokens for a second of sound; the halving of visual features in its code is left to the connector, which can
    learn it. Better here: the code for the audio encoder (CTC), its connector and the text
    stage, none of which was released, is there; samples of a row do not see each other; the system turn follows from
    what a row holds; `balance` adds the experts' load balance that its training left out. State tokens (``<1>`` asked
    by voice, ``<2>`` not meant for the model, ``<3>`` typed) are words at the start of an answer.

    A tokenizer with more Chinese, as VITA's (51,747), is given as ``model.language.tokenizer``: rows of tokens that
    both have are kept, new ones begin as the mean of their pieces.
    """
    language = LanguagePart(path=MIXTRAL_8X7B, chat_template=VITA)
    both = {"vision_connector": TrainPart(lr=2e-5), "audio_connector": TrainPart(lr=2e-5)}
    tuned = {**both, "language": TrainPart(lr=2e-5)}
    asked = {part: how for part, how in tuned.items() if part != "audio_connector"}
    return RunConfig(
        recipe="vita.8x7b",
        out="runs/vita.8x7b",
        model=_model(language, prompts=0),
        data=DATA,
        stages=(
            _speech(),
            _stage("text", {"language": TrainPart(lr=2e-5)}, rows="text", supervise="everything", balance=0.02),
            _stage("vision-alignment", {"vision_connector": TrainPart(lr=5e-4)}, rows="vision", batch_samples=384),
            _stage("audio-alignment", {"audio_connector": TrainPart(lr=5e-4)}, rows="audio", batch_samples=384),
            _stage("finetune", tuned, balance=0.02),
            _stage("state-tokens", asked, row_tokens=9100, balance=0.02, state_tokens={}),
        ),
    )


def vita15_7b() -> RunConfig:
    """VITA 1.5: Qwen2.5 7B; vision in three stages, then hearing in two.

    arXiv:2501.01957: a fifth of the captions; all captions with the vision encoder trained; all questions and a fifth
    of the captions; CTC and the audio connector; 4 percent of captions and a fifth of the questions, half of them
    spoken, at 1e-5. Rows of the tasks ``caption`` and ``qa`` are taken in those shares. 25 learned vectors stand before
    a sound.
    The optional state head weighs its three classes 1, 5 and 1 (``stages.hearing-tasks.state_head``). Speaking is not
    part of it. VITA's own freeze flags disagree with its paper; the paper is followed.
    """
    language = LanguagePart(path=QWEN25_7B, chat_template=CHATML)
    seeing = {"vision_connector": TrainPart(lr=2e-5), "language": TrainPart(lr=2e-5)}
    hearing = {part: TrainPart(lr=1e-5) for part in ("vision_connector", "audio_connector", "language")}
    return RunConfig(
        recipe="vita15.7b",
        out="runs/vita15.7b",
        model=_model(language, prompts=25),
        data=DATA,
        stages=(
            _speech(),
            _stage("vision-alignment", {"vision_connector": TrainPart(lr=5e-4)}, rows="vision", take={"caption": 0.2}),
            _stage("vision-understanding", {**seeing, "vision": TrainPart(lr=2e-5)}, rows="vision"),
            _stage("vision-tasks", seeing, rows="vision", take={"caption": 0.2}),
            _stage("audio-alignment", {"audio_connector": TrainPart(lr=5e-4)}, rows="audio"),
            _stage("hearing-tasks", hearing, take={"caption": 0.04, "qa": 0.2}, state_tokens=HANDS),
        ),
    )


def _model(language: LanguagePart, prompts: int) -> ModelConfig:
    return ModelConfig(
        language=language,
        vision=VisionPart(
            encoder=Source(path=INTERNVIT_300M),
            connector=PixelShuffleConnector(side=2, norm="none"),
            tiling=InternvlTiling(max_tiles=12, thumbnail=True),
        ),
        audio=AudioPart(
            encoder=Source(random=WHALE),
            connector=ConvConnector(kernel=5, stride=2, hidden_size=2048, prompts=prompts),
        ),
        video=VideoSpec(fps=1.0, min_frames=4, max_frames=16),
    )


def _speech() -> Stage:
    """The audio encoder learns to write down what is said (CTC), by itself. Neither rate nor length was published."""
    return Stage(
        name="speech",
        builds="audio",
        train={"audio": TrainPart(lr=5e-4)},
        rows="audio",
        supervise="words",
        epochs=10,
        batch_samples=256,
        schedule=Schedule(kind="cosine", warmup=0.1),
        optimizer=Optimizer(betas=(0.9, 0.98), weight_decay=0.01),
    )


def _stage(name: str, train: dict[str, TrainPart], **settings: object) -> Stage:
    """As all of VITA's are: one epoch, cosine, 3 percent of warm-up, no decay."""
    common = {
        "epochs": 1,
        "batch_samples": 128,
        "row_tokens": 6200,
        "schedule": Schedule(kind="cosine", warmup=0.03),
        "optimizer": ADAM,
    }
    return Stage.model_validate({"name": name, "train": train, **common, **settings})
