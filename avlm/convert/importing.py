"""Outside models in: a checkpoint in transformers' format becomes a model directory of avlm.

Tensors are renamed and moved file to file; no model is built but on the meta device, which
tells the names and shapes that are wanted.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from avlm.config.io import read_mapping
from avlm.convert.families import COMPUTED, Family, Names, family_of, names_of, on_meta, preprocessing_notes
from avlm.convert.folder import file_of, preprocessor_of, weights_of
from avlm.convert.streaming import TORCH, Progress, Stored, write_files
from avlm.convert.weights import aside
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import PLACEHOLDERS, pieces, placeholder_ids, placeholders
from avlm.data.text.vocabulary import add_tokens
from avlm.errors import ConfigError, DataError, WeightsError
from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Sample, Text, Turn


@dataclass(frozen=True, slots=True)
class Moved:
    """What a conversion wrote."""

    out: Path
    tensors: int
    num_bytes: int
    parameters: int
    dropped: tuple[str, ...] = ()
    """Tensors that were left out because the user said so."""
    notes: tuple[str, ...] = ()
    """What is otherwise than it was, in sentences."""


def import_model(
    source: str, out: Path, *, drop: Sequence[str] = (), pickles: bool = False, progress: Progress | None = None
) -> Moved:
    """Make a model directory of an outside checkpoint.

    Args:
        source: Folder or hub name of a LLaVA-1.5, LLaVA-NeXT or Qwen2-Audio checkpoint in transformers' format.
        out: The model directory; nothing may be there.
        drop: Patterns (``*`` for anything) of tensors to leave out that have no place.
        pickles: Also read ``pytorch_model.bin``.
        progress: Called with (what, done, all).

    Raises:
        ConfigError: It is no such checkpoint, or has something that avlm does not.
        WeightsError: Tensors are missing, have no place or have another shape; or a file is damaged.
    """
    check_absent(out)
    family, theirs = _read_config(source)
    tokenizer = _tokenizer(source, family, theirs)
    preprocessor = preprocessor_of(source, family.sense)
    rows = theirs.text_config.vocab_size
    ids = {kind: i for kind, i in placeholder_ids(tokenizer).items() if i < rows}
    config = family.describe(theirs, preprocessor, source, ids)
    tensors = weights_of(source, pickles=pickles)
    fitted = _fit(config, family, tensors, drop, source)
    notes = [*fitted.notes, *preprocessing_notes(config, preprocessor)]
    template = _template(source, family, tokenizer, notes)
    config.dtype = _dtype(theirs, fitted.tensors)
    config.architectures = [AvlmForConditionalGeneration.__name__]
    with aside(out) as folder:
        write_files(fitted.tensors, folder, progress=progress)
        config.save_pretrained(folder)
        AvlmProcessor(tokenizer, media=config.media, chat_template=template).save_pretrained(folder)
        _generation_config(source, config, tokenizer, folder)
    return Moved(
        out,
        len(fitted.tensors),
        sum(t.num_bytes for t in fitted.tensors.values()),
        sum(torch.Size(t.shape).numel() for t in fitted.tensors.values()),
        tuple(fitted.dropped),
        tuple(notes),
    )


def check_absent(out: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigError: Something is.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists, and would be overwritten. Choose another name, or remove it")


def _read_config(source: str) -> tuple[Family, Any]:
    path = file_of(source, "config.json")
    if path is None:
        raise ConfigError(
            f"{source}: has no config.json, so it is no checkpoint in transformers' format. "
            "Give the folder that holds config.json beside the weights, or a hub name"
        )
    data = read_mapping(path)
    family = family_of(data.get("model_type"), source)
    if data.get("quantization_config"):
        raise ConfigError(
            f"{source}: is quantised, so its tensors are no longer the model's own. "
            "Give the checkpoint that it was made from"
        )
    try:
        return family, AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # each configuration checks its fields in its own way
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{source}: config.json is not understood ({detail}). Copy or download the folder again"
        ) from error


# ---------------------------------------------------------------- tensors


@dataclass(frozen=True, slots=True)
class _Fitted:
    tensors: dict[str, Stored]
    dropped: list[str]
    notes: list[str]


def _fit(config: AvlmConfig, family: Family, tensors: dict[str, Stored], drop: Sequence[str], source: str) -> _Fitted:
    """Give every tensor its place.

    Raises:
        WeightsError: Some have none, some places stay empty, or shapes differ: all of them by name.
    """
    model = on_meta(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    dropped, unexpected = [], []
    names = names_of(family, model)
    for name, tensor in tensors.items():
        ours = names.inward(name)
        if ours is not None and ours in wanted and ours not in found:
            found[ours], origin[ours] = tensor, name
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in drop):
            dropped.append(name)
        elif not name.endswith(COMPUTED):
            unexpected.append(name)
    notes = _tie(config, model, found)
    tied = {head_name(model)} if config.tie_word_embeddings else set()
    missing = [_outside(names, name) for name in wanted if name not in found and name not in tied]
    shapes = [
        f"{origin[name]} {list(tensor.shape)}, wanted {list(wanted[name])}"
        for name, tensor in found.items()
        if tensor.shape != wanted[name]
    ]
    check_complete(source, missing, unexpected, shapes)
    return _Fitted(found, dropped, notes)


def head_name(model: AvlmForConditionalGeneration) -> str:
    """Our name of the matrix that gives logits."""
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _tie(config: AvlmConfig, model: AvlmForConditionalGeneration, found: dict[str, Stored]) -> list[str]:
    """Leave a head out that the embeddings stand for; one that differs from them, whatever is said, stays."""
    head = head_name(model)
    table = model.get_input_embeddings()
    embeddings = next(f"{name}.weight" for name, module in model.named_modules() if module is table)
    if not config.tie_word_embeddings or head not in found or embeddings not in found:
        return []
    if found[head].same(found[embeddings]):
        del found[head]
        return []
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    return ["the head is said to be tied to the embeddings and differs from them; both were kept, untied"]


def _outside(names: Names, name: str) -> str:
    return names.outward(name) or name


def check_complete(where: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    """Refuse tensors that do not fit, all kinds of misfits in one message.

    Raises:
        WeightsError: There are some.
    """
    told = [
        f"{len(group)} {'is' if len(group) == 1 else 'are'} {what} ({listed(group)})"
        for what, group in (("missing", missing), ("without a place", unexpected), ("of another shape", shapes))
        if group
    ]
    if told:
        advice = "Give the whole checkpoint that config.json belongs to"
        if unexpected and not missing and not shapes:
            advice = "Leave what has no place out with --drop PATTERN, if the model is right without it"
        raise WeightsError(f"{where}: of its tensors {', '.join(told)}. {advice}")


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in order, the rest counted."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def _dtype(theirs: Any, tensors: dict[str, Stored]) -> torch.dtype:
    """The type that the checkpoint says, else that of most of its bytes."""
    for config in (theirs, theirs.text_config):
        if isinstance(config.dtype, torch.dtype):
            return config.dtype
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    most = max(sizes, key=lambda name: sizes[name])
    return next(dtype for dtype, name in TORCH.items() if name == most)


# ---------------------------------------------------------------- words


def _tokenizer(source: str, family: Family, theirs: Any) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, its placeholder known by kind, and further placeholders where rows are left.

    Raises:
        ConfigError: It cannot be read, or has no token of the placeholder's id.
    """
    kind = "image" if family.sense == "vision" else "audio"
    token_id = int(getattr(theirs, f"{kind}_token_index"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        token = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        if token is not None and token != PLACEHOLDERS[kind]:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **{f"{kind}_token": token})
    except Exception as error:  # transformers and tokenizers each have their own kinds
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{source}: its tokenizer cannot be read ({detail}). Copy the tokenizer's files beside config.json"
        ) from error
    if token is None or placeholder_ids(tokenizer).get(kind) != token_id:
        raise ConfigError(
            f"{source}: config.json says that token {token_id} stands for {kind}, and the tokenizer has "
            f"{token or 'no such token'} there. Copy the tokenizer's files that belong to this checkpoint"
        )
    if family.sense == "vision":
        _make_room(tokenizer, theirs.text_config.vocab_size)
    return tokenizer


def _make_room(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Placeholders that the tokenizer lacks, where the embeddings have rows to spare for them."""
    lacking = len(PLACEHOLDERS) - len(placeholders(tokenizer))
    if max(tokenizer.get_vocab().values()) + lacking < rows:
        add_tokens(tokenizer)


def _template(source: str, family: Family, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> str:
    """The checkpoint's chat template, where an answer's end can be told from it; else the family's own."""
    template = _own_template(source, tokenizer)
    if template is None:
        notes.append(f"it has no chat template; the one of {family.name} was taken")
        return family.template
    begin = _beginning(tokenizer)
    if begin and not _written(template, tokenizer, answered=False).startswith(begin):
        template = "{{ bos_token }}" + template
    try:
        _written(template, tokenizer, answered=True)
    except ConfigError as error:
        if "ASSISTANT:" not in _written(template, tokenizer, answered=False):
            notes.append(f"it can be asked, and not trained, with its own chat template: {error}")
            return template
        notes.append("its chat template closes an answer with no end token; the same one with it was taken")
        return family.template
    return template


def _own_template(source: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """From the processor's files, where multimodal checkpoints have it, else the tokenizer's."""
    jinja = file_of(source, "chat_template.jinja")
    if jinja is not None:
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        path = file_of(source, name)
        found = None if path is None else read_mapping(path).get("chat_template")
        if isinstance(found, str) and found:
            return found
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer puts before every text by itself, and a template must therefore write."""
    bare = tokenizer("x", add_special_tokens=False).input_ids
    begun = tokenizer("x").input_ids
    same = begun[1:] == bare or begun[1:-1] == bare
    return str(tokenizer.bos_token) if same and begun[0] == tokenizer.bos_token_id else ""


def _written(template: str, tokenizer: PreTrainedTokenizerBase, *, answered: bool) -> str:
    """A conversation in a template; what it says of a conversation that is none of ours is an error of it."""
    turns = [Turn("user", (Text("x"),))]
    if answered:
        turns.append(Turn("assistant", (Text("x"),)))
    try:
        written = pieces(Sample("", tuple(turns)), tokenizer, template, prompt_only=not answered)
    except DataError as error:
        raise ConfigError(error.reason) from None
    return "".join(piece.text for piece in written)


def _generation_config(source: str, config: AvlmConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The checkpoint's settings for `generate`, as they are; else those that its configuration implies."""
    path = file_of(source, "generation_config.json")
    if path is not None:
        shutil.copyfile(path, folder / "generation_config.json")
        return
    settings = GenerationConfig.from_model_config(config.text_config)
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    settings.save_pretrained(folder)
