"""Model directories: written aside and published by rename, read with everything checked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from avlm.convert.compose import Composed
from avlm.data.processor import AvlmProcessor
from avlm.errors import ConfigError, WeightsError
from avlm.models import attention
from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmForConditionalGeneration


def save_model(model: AvlmForConditionalGeneration, processor: AvlmProcessor, out: Path) -> None:
    """Write a model directory: safetensors, config.json, processor, tokenizer, chat_template.jinja.

    It appears under its name only when it is complete.
    """
    with aside(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def save_part(module: PreTrainedModel, out: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write one part as a folder in Hugging Face format, as if it had been downloaded."""
    with aside(out) as folder:
        module.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


class aside:
    """A folder beside its destination that takes its place when the block ends well."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.writing")

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.rglob("*"):
            if path.is_file():
                _sync(path)
        if self.out.exists():
            old = self.out.with_name(f".{self.out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
            self.folder.rename(self.out)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.out)
        _sync(self.out.parent)


def _sync(path: Path) -> None:
    """Make sure that what was written is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_copy(source: Path, out: Path, extra: dict[str, str]) -> None:
    """Publish a model directory under a second name, sharing the files where the file system can.

    Args:
        extra: Small text files to lay beside them, by name.
    """
    with aside(out) as folder:
        for name, text in extra.items():
            (folder / name).write_text(text)
        for path in source.iterdir():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copy2(path, folder / path.name)


def load_model(path: Path | str, *, device: str | torch.device = "cpu") -> Composed:
    """Read a model directory.

    Args:
        path: The directory.
        device: Where the weights go.

    Returns:
        The model in eval mode with packed attention, and its processor.

    Raises:
        ConfigError: It is not a model directory of avlm, or its model and its processor disagree.
        WeightsError: Weights are missing, or too many.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{path}: is not a model directory (it has no config.json). Give one that avlm compose or avlm train wrote"
        )
    attention.register()
    try:
        config = AvlmConfig.from_pretrained(folder)
        model, info = AvlmForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation={"text_config": attention.NAME},
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = AvlmProcessor.from_pretrained(folder, tokenizer=tokenizer)
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{path}: cannot be loaded ({detail}). Publish the model again, or copy the directory again"
        ) from error
    for what, names in (("lacks", info["missing_keys"]), ("has no place for", info["unexpected_keys"])):
        if names:
            raise WeightsError(
                f"{path}: the model {what} {len(names)} tensors, {sorted(names)[0]} among them. Copy the directory again"
            )
    if processor.media != config.media:
        raise ConfigError(
            f"{path}: config.json and processor_config.json disagree about the media settings, so tokens would be counted "
            "differently from what the encoders make. Copy `media` from config.json to processor_config.json"
        )
    return Composed(model.to(device).eval(), processor)
