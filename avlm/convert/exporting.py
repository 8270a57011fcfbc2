"""Our models out: as transformers' own classes of other families, or one part by itself.

What is written is what `importing` reads; a model whose parts another family does not have is
refused by the names of those parts. Tensors are renamed and moved file to file, and only adapters
that are to be merged bring the model into memory, once.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from avlm.convert.families import (
    FAMILIES,
    RELEASED_INSIDE,
    RESAMPLE,
    Family,
    check_fit,
    names_of,
    on_meta,
    outside_config,
)
from avlm.convert.folder import weights_of
from avlm.convert.importing import Moved, check_absent, check_complete, head_name
from avlm.convert.streaming import Progress, Stored, stored, write_files
from avlm.convert.weights import aside, check_kind, load_model
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import chat_template, kinds_written, placeholders, takes_lists
from avlm.errors import AvlmError, ConfigError, WeightsError
from avlm.models.configuration import AvlmConfig
from avlm.models.encoders import encoder_width
from avlm.models.modeling import AvlmForConditionalGeneration

HEAD = "base_model.model.state_head.weight"
"""Name of a state head among adapters in PEFT's format."""

PARTS = ("language", "vision", "vision_connector", "audio", "audio_connector")

TEXT_OF_PARTS = (
    "{%- set told = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set written = namespace(text='', open=true) -%}"
    "{%- if message['content'] is string -%}{%- set written.text = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- set mark = part['type'] in places -%}"
    "{%- set word = places[part['type']] if mark else part.get('text', '') -%}"
    "{%- set written.text = written.text + ('' if written.open else '\\n') + word -%}"
    "{%- set written.open = mark -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set content = [{'type': 'text', 'text': written.text}] if listed else written.text -%}"
    "{%- set told.messages = told.messages + [{'role': message['role'], 'content': content}] -%}"
    "{%- endfor -%}{%- set messages = told.messages %}"
)
"""Begins a template that takes texts, alone or `listed`, so that it takes messages of typed parts as multimodal
processors give them, and writes the tokens at `places`."""


@dataclass(frozen=True, slots=True)
class _Model:
    """A model directory that is going out."""

    path: str
    config: AvlmConfig
    tensors: dict[str, Stored]
    tokenizer: PreTrainedTokenizerBase
    template: str


def export_model(
    model: str, out: Path, to: str, *, adapters: str | None = None, progress: Progress | None = None
) -> Moved:
    """Write a model, or one part of it, for others.

    Args:
        model: A model directory.
        out: A folder; nothing may be there.
        to: A family (`llava`, `llava_next`, `qwen2_audio`), or a part (`language`, `vision`, `vision_connector`,
            `audio`, `audio_connector`).
        adapters: A folder in PEFT's format, merged into the weights first.
        progress: Called with (what, done, all).

    Raises:
        ConfigError: There is no such format, the model has no such part, or parts do not fit it.
        WeightsError: Tensors are missing or damaged, or the adapters belong to another model.
    """
    families = {family.name: family for family in FAMILIES}
    if to not in families and to not in PARTS:
        raise ConfigError(
            f"--to {to}: is not a format that avlm writes. Use one of {', '.join(families)}, "
            f"or a part of the model: {', '.join(PARTS)}"
        )
    check_absent(out)
    check_kind(Path(model))
    opened = _open(model, adapters)
    with aside(out) as folder:
        if to in families:
            written = _write_family(families[to], opened, folder, progress)
        elif to == "language":
            written = _write_language(opened, folder, progress)
        elif to in ("vision", "audio"):
            written = _write_encoder(to, opened, folder, progress)
        else:
            written = _write_connector(to.removesuffix("_connector"), opened, folder, progress)
    return Moved(
        out,
        len(written),
        sum(t.num_bytes for t in written.values()),
        sum(torch.Size(t.shape).numel() for t in written.values()),
    )


def _open(path: str, adapters: str | None) -> _Model:
    try:
        config = AvlmConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        processor = AvlmProcessor.from_pretrained(path, tokenizer=tokenizer)
    except AvlmError:
        raise
    except Exception as error:  # transformers, tokenizers and pydantic each have their own kinds
        detail = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{path}: cannot be read ({detail}). Publish the model again, or copy the directory again"
        ) from error
    tensors = weights_of(path) if adapters is None else _merged(path, adapters)
    return _Model(path, config, tensors, tokenizer, chat_template(tokenizer, processor.chat_template))


def _merged(path: str, adapters: str) -> dict[str, Stored]:
    """The model's tensors with adapters added into them.

    Raises:
        ConfigError: It is no folder of adapters in safetensors.
        WeightsError: They do not belong to this model.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapters) / name).is_file():
            raise ConfigError(
                f"--adapters {adapters}: has no {name}, so it is no folder of adapters in PEFT's format. "
                "Give one, such as adapters/STAGE of a run directory"
            )
    from peft import PeftModel

    model = load_model(path).model
    try:
        fresh = _give_state_head(model, Path(adapters))
        merged = PeftModel.from_pretrained(model, adapters).merge_and_unload()
    except Exception as error:  # peft and torch each have their own kinds
        detail = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"--adapters {adapters}: do not go onto {path} ({type(error).__name__}: {detail}). "
            "Give the model that they were trained on, from before their stage"
        ) from error
    tied = head_name(merged) if merged.config.tie_word_embeddings else None
    without = ("state_head.",) if fresh else ()  # nobody else's format has a place for it
    left = {name: tensor for name, tensor in merged.state_dict().items() if not name.startswith(without)}
    return {name: stored(tensor) for name, tensor in left.items() if name != tied}


def _give_state_head(model: AvlmForConditionalGeneration, adapters: Path) -> bool:
    """Give a model the state head that its adapters hold; False if it has one, or they have none."""
    with safe_open(adapters / "adapter_model.safetensors", "pt") as file:
        if model.state_head is not None or HEAD not in file.keys():  # noqa: SIM118 - it is no mapping
            return False
        model.add_state_head(file.get_slice(HEAD).get_shape()[0])
    return True


# ---------------------------------------------------------------- a whole model


def _write_family(family: Family, model: _Model, folder: Path, progress: Progress | None) -> dict[str, Stored]:
    fields = outside_config(family, model.config, model.path)
    try:
        theirs = AutoConfig.for_model(family.name, **fields)
    except Exception as error:  # each configuration checks its fields in its own way
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{model.path}: {family.architecture} cannot be configured with these parts ({detail}). "
            "Export the parts one by one, such as --to language"
        ) from error
    check_fit(family, model.config, theirs, model.path)
    tensors = _outward(family, model)
    write_files(tensors, folder, progress=progress)
    _write_config(theirs, family.architecture, model.config, folder)
    kind = "image" if family.sense == "vision" else "audio"
    placeholder = placeholders(model.tokenizer)[kind]
    template = _for_parts(model)
    processor = family.architecture.replace("ForConditionalGeneration", "Processor")
    _write_json(folder / "preprocessor_config.json", family.preprocessing(model.config), processor)
    _write_json(folder / "processor_config.json", family.processing(model.config, placeholder), processor)
    _write_words(model, folder, template, processor)
    return tensors


def _outward(family: Family, model: _Model) -> dict[str, Stored]:
    """Every tensor under its outside name.

    Raises:
        WeightsError: One has none, or one is missing.
    """
    meta = on_meta(model.config)
    names, head = names_of(family, meta), head_name(meta)
    found: dict[str, Stored] = {}
    unexpected = []
    for name, tensor in model.tensors.items():
        theirs = names.outward(name)
        if theirs is None:
            unexpected.append(name)
        else:
            found[theirs] = tensor
    wanted = {name: names.outward(name) or name for name in meta.state_dict()}
    if model.config.tie_word_embeddings:
        table = meta.get_input_embeddings()
        embeddings = next(f"{name}.weight" for name, module in meta.named_modules() if module is table)
        found.pop(wanted[head], None)
        if family.writes_tied_head:
            found[wanted[head]] = found[wanted[embeddings]]
        else:
            wanted.pop(head)
    check_complete(model.path, [name for name in wanted.values() if name not in found], unexpected, [])
    return found


def _for_parts(model: _Model) -> str:
    """A chat template that takes messages of typed parts and writes the placeholders itself."""
    if kinds_written(model.tokenizer, model.template):
        return model.template
    listed = "true" if takes_lists(model.tokenizer, model.template) else "false"
    places = json.dumps(placeholders(model.tokenizer))
    return "{%- set places = " + places + " -%}{%- set listed = " + listed + " -%}" + TEXT_OF_PARTS + model.template


# ---------------------------------------------------------------- one part


def _write_language(model: _Model, folder: Path, progress: Progress | None) -> dict[str, Stored]:
    tensors = _under("model.language_model.", model)
    write_files(tensors, folder, progress=progress)
    architecture = type(on_meta(model.config).language_model).__name__
    _write_config(model.config.text_config, architecture, model.config, folder)
    _write_words(model, folder, model.template, None)
    return tensors


def _write_encoder(sense: str, model: _Model, folder: Path, progress: Progress | None) -> dict[str, Stored]:
    config = _part_config(sense, model)
    inside = RELEASED_INSIDE.get(config.model_type, "")
    tensors = {inside + name: tensor for name, tensor in _under(f"model.{sense}_tower.", model).items()}
    write_files(tensors, folder, progress=progress)
    tower = getattr(on_meta(model.config).model, f"{sense}_tower")
    if config.model_type == "whisper":  # the encoder is all there is: AutoModel builds no decoder's layers around it
        config = copy.deepcopy(config)
        config.decoder_layers = 0
    _write_config(config, type(tower).__name__, model.config, folder)
    spec = model.config.media_spec().vision
    if sense == "vision" and spec is not None:
        side = {"height": spec.image_size_px, "width": spec.image_size_px}
        seen: dict[str, Any] = {"do_resize": True, "size": side, "resample": RESAMPLE[spec.resample]}
        seen |= {"do_normalize": True, "image_mean": list(spec.mean), "image_std": list(spec.std)}
        _write_json(folder / "preprocessor_config.json", seen, None)
    return tensors


def _write_connector(sense: str, model: _Model, folder: Path, progress: Progress | None) -> dict[str, Stored]:
    """The tensors under the module's own names, and beside them what `build_connector` wants to know."""
    config = _part_config(sense, model)
    tensors = _under(f"model.{sense}_connector.", model)
    write_files(tensors, folder, progress=progress)
    about = {
        "connector": getattr(model.config, f"{sense}_connector"),
        "sense": sense,
        "encoder": config.model_type,
        "layer": getattr(model.config, f"{sense}_layer"),
        "width": encoder_width(config),
        "out_width": model.config.text_config.get_text_config().hidden_size,
    }
    _write_json(folder / "connector.json", about, None)
    return tensors


def _part_config(sense: str, model: _Model) -> PreTrainedConfig:
    config: PreTrainedConfig | None = getattr(model.config, f"{sense}_config")
    if config is None:
        raise ConfigError(
            f"{model.path}: has no {sense} part, so there is nothing to write. "
            f"Its parts are {', '.join(part for part in PARTS if _has(part, model.config))}"
        )
    return config


def _has(part: str, config: AvlmConfig) -> bool:
    return part == "language" or getattr(config, f"{part.removesuffix('_connector')}_config") is not None


def _under(prefix: str, model: _Model) -> dict[str, Stored]:
    return {name.removeprefix(prefix): t for name, t in model.tensors.items() if name.startswith(prefix)}


# ---------------------------------------------------------------- small files


def _write_config(config: PreTrainedConfig, architecture: str, ours: AvlmConfig, folder: Path) -> None:
    config.architectures = [architecture]
    config.dtype = ours.dtype
    config.save_pretrained(folder)


def _write_words(model: _Model, folder: Path, template: str, processor: str | None) -> None:
    """Tokenizer, chat template and settings of `generate`."""
    model.tokenizer.chat_template = template
    model.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("processor_class", None)
    if processor is not None:
        settings["processor_class"] = processor
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    settings_of_generate = Path(model.path) / "generation_config.json"
    if settings_of_generate.is_file():
        shutil.copyfile(settings_of_generate, folder / "generation_config.json")


def _write_json(path: Path, data: dict[str, Any], processor: str | None) -> None:
    data = data if processor is None else {**data, "processor_class": processor}
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
