"""Tiny parts and media that many tests share, made from nothing and seeded."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

# Started in the background, Python ignores Ctrl-C and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tests run beside each other, and tiny tensors gain nothing from more
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that they start, too


def pytest_collection_finish() -> None:
    """Everything is imported by now: what that made stays, and no collection looks through it again."""
    gc.collect()
    gc.freeze()


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WHISPER: dict[str, Any] = {
    "model_type": "whisper",
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Write a random picture: ``picture("a.png", seed=1, size=(40, 30))``."""

    def write(name: str = "a.png", *, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def sound(tmp_path: Path) -> Callable[..., Path]:
    """Write a random recording: ``sound("a.wav", seconds=0.5, rate=16000)``."""
    import soundfile

    def write(
        name: str = "a.wav", *, seed: int = 0, seconds: float = 0.5, rate: int = 16_000, channels: int = 1
    ) -> Path:
        rng = np.random.default_rng(seed)
        wave = 0.1 * rng.standard_normal((round(seconds * rate), channels)).astype(np.float32)
        soundfile.write(tmp_path / name, wave, rate)
        return tmp_path / name

    return write


@pytest.fixture
def rows(tmp_path: Path, picture: Callable[..., Path], sound: Callable[..., Path]) -> Callable[..., Path]:
    """Write a small mixed data file: text, pictures, sounds, both; its path is returned.

    With ``alts`` each medium says what it shows or says.
    """

    def write(name: str = "rows.jsonl", count: int = 12, *, alts: bool = False) -> Path:
        found = []
        for i in range(count):
            image = {"type": "image", "path": picture(f"p{i}.png", seed=i).name}
            audio = {"type": "audio", "path": sound(f"s{i}.wav", seed=i, seconds=0.2 + 0.05 * (i % 3)).name}
            if alts:
                image["alt"], audio["alt"] = "a red picture", "green, then blue"
            media = [[image], [audio], [image, audio], []][i % 4]
            question = {"type": "text", "text": f"What is number {i}?"}
            answer = ["red", "blue", "green"][i % 3]
            messages = [
                {"role": "user", "content": [*media, question]},
                {"role": "assistant", "content": answer},
            ]
            found.append({"id": str(i), "task": ["vqa", "hear", "match", "text"][i % 4], "messages": messages})
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return path

    return write


@pytest.fixture
def small_run(rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Settings of a run of seconds: two parts built, one alignment, joint tuning with LoRA and dropout.

    ``small_run("out", ["max_steps=1"])`` gives the run in ``tmp_path / "out"`` with overrides; its data are `rows`,
    unless overrides say otherwise.
    """
    from avlm.config.io import build, override
    from avlm.config.run import RunConfig

    def make(name: str = "run", overrides: list[str] | None = None, *, count: int = 12) -> RunConfig:
        data = tmp_path / "rows.jsonl"
        if not data.exists():
            rows(count=count)
        llama = {**LLAMA, "attention_dropout": 0.1, "initializer_range": 0.1}
        steps: dict[str, Any] = {"steps": 3, "batch_samples": 4, "row_tokens": 128}
        lora = {"rank": 4, "dropout": 0.2, "targets": ["q_proj", "v_proj", "down_proj"]}
        settings = {
            "recipe": "small",
            "out": str(tmp_path / name),
            "seed": 7,
            "model": {
                "language": {"random": llama, "chat_template": TEMPLATE, "vocabulary": 300},
                "vision": {"encoder": {"random": SIGLIP}},
                "audio": {"encoder": {"random": {**WHISPER, "dropout": 0.1}}, "connector": {"kind": "mlp", "stack": 4}},
            },
            "data": {"train": str(data)},
            "stages": [
                {"name": "language", "builds": "language", "train": {"language": {"lr": 3e-3}}, "rows": "text"}
                | {"supervise": "everything", **steps},
                {"name": "vision", "builds": "vision", "rows": "vision", **steps}
                | {"train": {p: {"lr": 2e-3} for p in ("vision", "vision_connector", "language")}},
                {"name": "align", "train": {"vision_connector": {"lr": 2e-3}}, "rows": "vision", **steps},
                {
                    "name": "joint",
                    "train": {
                        "vision_connector": {"lr": 1e-3},
                        "audio": {"lr": 1e-3},
                        "audio_connector": {"lr": 1e-3},
                        "language": {"lr": 1e-3, "lora": lora},
                    },
                    **steps,
                    "steps": 4,
                    "augment": {"shift": 0.1, "pitch": 0.1, "noise": 0.5},
                },
            ],
            "save": {"every_steps": 1},
            "samples": {"prompts": 1, "max_tokens": 4},
            "threads": 1,
        }
        return override(build(RunConfig, settings), overrides or [])

    return make


@pytest.fixture
def apart(small_run: Callable[..., Any], rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Settings of a run whose three parts need nothing of each other, and of one stage with the whole model.

    ``apart("out", ["side_by_side=3"])``; its data say what each medium shows or says.
    """
    from avlm.config.io import override
    from avlm.config.run import RunConfig
    from avlm.config.stage import Stage

    def make(name: str = "run", overrides: list[str] | None = None) -> RunConfig:
        if not (tmp_path / "rows.jsonl").exists():
            rows(alts=True)
        small = small_run(name)
        steps: dict[str, Any] = {"steps": 3, "batch_samples": 4, "row_tokens": 128}
        alone = [
            {
                "name": sense,
                "builds": sense,
                "train": {sense: {"lr": 2e-3}},
                "rows": sense,
                "supervise": "words",
                **steps,
            }
            for sense in ("vision", "audio")
        ]
        joint = {"name": "joint", "train": {p: {"lr": 1e-3} for p in ("vision_connector", "audio_connector")}, **steps}
        stages = (small.stages[0], *(Stage.model_validate(stage) for stage in [*alone, joint]))
        return override(small.model_copy(update={"stages": stages}), overrides or [])

    return make


@pytest.fixture
def small_model(small_run: Callable[..., Any], tmp_path: Path) -> Any:
    """A fresh model with eyes and ears, and its processor; it has dropout in the language model and in the ears."""
    from avlm.convert.compose import compose

    return compose(small_run().model, seed=1, texts=["What is number 1 2 3 4 5 6 7 8 9 0? red green blue"] * 3)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Compose a tiny model out of nothing, in eval mode, with weights large enough that every mistake shows.

    ``make_model()`` sees and hears; ``make_model("vision")`` only sees; ``make_model(language={...})`` changes a part's
    configuration, ``seeing={...}`` and ``hearing={...}`` the other settings of its part; ``chat_template=None`` and
    other keywords go to the language part.
    """
    from avlm.config.connectors import MlpConnector
    from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
    from avlm.convert.compose import compose

    def make(
        *senses: str,
        language: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        audio: dict[str, Any] | None = None,
        seeing: dict[str, Any] | None = None,
        hearing: dict[str, Any] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Any:
        wanted = senses or ("vision", "audio")
        parts: dict[str, Any] = {}
        if "vision" in wanted:
            encoder = Source(random={**SIGLIP, **(vision or {})})
            parts["vision"] = VisionPart.model_validate({"encoder": encoder, **(seeing or {})})
        if "audio" in wanted:
            random = {**WHISPER, "max_source_positions": 60, **(audio or {})}
            settings_of = {"encoder": Source(random=random), "connector": MlpConnector(stack=4), **(hearing or {})}
            parts["audio"] = AudioPart.model_validate(settings_of)
        random = {**LLAMA, **(language or {})}
        settings = {"chat_template": TEMPLATE, "vocabulary": 400, **settings}
        texts = [f"What is number {i} and what do you hear? red blue green" for i in range(30)]
        made = compose(ModelConfig(language=LanguagePart(random=random, **settings), **parts), seed=seed, texts=texts)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.model.named_parameters():
                if parameter.ndim > 1 and "embed_positions" not in name:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        return made

    return make


@pytest.fixture
def make_sample() -> Callable[..., Any]:
    """A question with media made from nothing: ``make_sample("image", "audio", seed=3, answer=None)``."""
    from avlm.samples import Clip, MediaItem, Picture, Sample, Sound, Text, Turn

    def picture_of(rng: np.random.Generator) -> Picture:
        return Picture(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))

    def sound_of(rng: np.random.Generator, seconds: float) -> Sound:
        return Sound(0.1 * rng.standard_normal(round(16_000 * seconds)).astype(np.float32), 16_000)

    def make(
        *kinds: str,
        text: str = "What is it?",
        answer: str | None = "red",
        seed: int = 0,
        seconds: float = 0.3,
        task: str = "",
    ) -> Sample:
        rng = np.random.default_rng(seed)
        parts: list[Any] = []
        for kind in kinds:
            decoded: Any = None
            if kind == "image":
                decoded = picture_of(rng)
            elif kind == "audio":
                decoded = sound_of(rng, seconds)
            else:
                decoded = Clip(tuple(picture_of(rng) for _ in range(2)), 2.0, sound_of(rng, seconds))
            parts.append(MediaItem(kind, decoded=decoded))  # type: ignore[arg-type]
        turns = [Turn("user", (*parts, Text(text)))]
        if answer is not None:
            turns.append(Turn("assistant", (Text(answer),)))
        return Sample(str(seed), tuple(turns), task, f"row {seed}")

    return make
