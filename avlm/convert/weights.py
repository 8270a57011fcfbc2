"""Model directories: written aside and published by rename, read with everything checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from avlm.convert.compose import Composed
from avlm.convert.verifying import suspects, write_sums
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import PLACEHOLDERS, placeholder_ids, placeholders
from avlm.errors import AvlmError, ConfigError, WeightsError
from avlm.models import attention
from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmForConditionalGeneration

logger = logging.get_logger(__name__)


def save_model(model: AvlmForConditionalGeneration, processor: AvlmProcessor, out: Path) -> None:
    """Write a model directory: safetensors and their checksums, config.json, processor, tokenizer, chat_template.jinja.

    It appears under its name only when it is complete.
    """
    with aside(out) as folder:
        model.save_pretrained(folder)
        write_sums(folder)
        processor.save_pretrained(folder)


def save_part(module: PreTrainedModel, out: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write one part as a folder in Hugging Face format, as if it had been downloaded."""
    with aside(out) as folder:
        module.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


class aside:  # noqa: N801 - reads as what it does, like contextlib's own
    """A folder beside its destination that takes its place when the block ends well.

    Where there is something already, it is set aside for the moment between two renames, and put back if the second
    fails, or by the next writer if the program was killed between them.

    Args:
        out: The destination.
        mark: Where several processes write into the folder, what it is known by, and no other ever was. Whoever comes
            first makes it; one of them publishes.
    """

    def __init__(self, out: Path, mark: str = "") -> None:
        self.out = out.resolve()  # what a link points at is replaced, not the link
        self.mark = mark
        self.folder = self.out.with_name(f".{self.out.name}{mark and '.'}{mark}.writing")
        self.old = self.out.with_name(f".{self.out.name}.old")

    def __enter__(self) -> Path:
        if self.old.exists() and not self.out.exists():
            self.old.rename(self.out)
        if not self.mark:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.first = bool(self.mark) or not self.out.parent.exists()
        return self.made()

    def made(self) -> Path:
        """The folder, made if it is not there."""
        self.folder.mkdir(parents=True, exist_ok=bool(self.mark))
        return self.folder

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)  # there no more, if it was published

    def _publish(self) -> None:
        # A rename that outlives a power cut must not be that of files which do not: they, and the folder's list of
        # them, are on the disk before, and the rename itself is at the end.
        for path in self.folder.rglob("*"):
            sync(path)
        sync(self.folder)
        shutil.rmtree(self.old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(self.old)
        try:
            self.folder.rename(self.out)
        except OSError:
            if self.old.exists():
                self.old.rename(self.out)
            raise
        shutil.rmtree(self.old, ignore_errors=True)
        sync(self.out.parent)
        if self.first:  # the place it lies in is new too
            sync(self.out.parent.parent)


def sync(path: Path) -> None:
    """Make sure that what was written, a file or a folder's list of names, is on the disk."""
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
            if path.name in extra:
                continue
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copy2(path, folder / path.name)


def load_model(
    path: Path | str, *, device: str | torch.device = "cpu", lost: Literal["refuse", "keep"] = "refuse"
) -> Composed:
    """Read a model directory.

    Args:
        path: The directory.
        device: Where the weights go.
        lost: What to do with weights that are a NaN or an infinity.

    Returns:
        The model in eval mode with packed attention, and its processor.

    Raises:
        ConfigError: It is not a model directory of avlm, or its model and its processor disagree.
        WeightsError: Weights are missing, too many, or no numbers.
    """
    folder = Path(path)
    check_kind(folder)
    with _loading(folder):
        config = AvlmConfig.from_pretrained(folder)
        model, info = AvlmForConditionalGeneration.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True
        )
    processor = load_processor(folder)
    for what, names in (("lacks", info["missing_keys"]), ("has no place for", info["unexpected_keys"])):
        if names:
            raise WeightsError(
                f"{path}: the model {what} {len(names)} tensors, {sorted(names)[0]} among them. "
                "Copy the directory again"
            )
    if processor.media != config.media:
        raise ConfigError(
            f"{path}: config.json and processor_config.json disagree about the media settings, so tokens would be "
            "counted differently from what the encoders make. Copy `media` from config.json to processor_config.json"
        )
    tokens, ids = placeholders(processor.tokenizer), placeholder_ids(processor.tokenizer)
    for kind, token in PLACEHOLDERS.items():
        ours, theirs = getattr(config, f"{kind}_token_id"), ids.get(kind)
        if ours != theirs:
            raise ConfigError(
                f"{path}: config.json has {kind}_token_id={ours}, and the tokenizer's {tokens.get(kind, token)} is "
                f"{theirs}, so media would have no place in the text. Copy the directory again"
            )
    if lost == "refuse":
        _check_numbers(model, folder)
    attention.use(model.language_model)
    return Composed(model.to(device).eval(), processor)


def _check_numbers(model: AvlmForConditionalGeneration, folder: Path) -> None:
    """Refuse weights that are no numbers, and tell of those that look as if they had never been written."""
    found = suspects(model)
    if found.lost:
        raise WeightsError(
            f"{folder}: {len(found.lost)} tensors hold a NaN or an infinity, {found.lost[0]} among them, which spreads "
            "to every answer. Copy the directory again, or publish an earlier state of the model"
        )
    if found.zero:
        logger.warning(f"{folder}: {len(found.zero)} matrices are all zero, {found.zero[0]} among them.")


def load_processor(path: Path | str) -> AvlmProcessor:
    """Read the processor of a model directory, and nothing of its weights.

    Raises:
        ConfigError: It is not a model directory of avlm.
        WeightsError: The files of its tokenizer or its processor cannot be read.
    """
    folder = Path(path)
    check_kind(folder)
    with _loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        processor: AvlmProcessor = AvlmProcessor.from_pretrained(folder, tokenizer=tokenizer)
    return processor


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (AvlmError, MemoryError):
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and pydantic each have their own kinds
        detail = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{folder}: cannot be loaded ({detail}). Publish the model again, or copy the directory again"
        ) from error


def check_kind(folder: Path) -> None:
    """Refuse another model's folder before anything of it is built."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: is not a model directory (it has no config.json). "
            "Give one that avlm compose or avlm train wrote"
        )
    try:
        config = json.loads(path.read_text())
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: is not readable ({error}). Copy the directory again") from None
    if kind != AvlmConfig.model_type:
        raise ConfigError(
            f"{folder}: is a model of type {kind}, not one of avlm. Give a directory that avlm compose or avlm train "
            f"wrote, or make one with: avlm compose OUT --language {folder}"
        )
