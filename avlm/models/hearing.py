"""What an audio encoder wants to hear, and the one call for all families of them.

What is particular about a family stands in its record, in `audio_encoders`.

Shapes in this file:
    N  chunks of sound    C  encoder width    n  embeddings of one chunk
    B  bins    M  frames of features
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from avlm.config.media import AudioSpec
from avlm.config.model import AudioPart
from avlm.errors import ConfigError, LayoutError
from avlm.layout import encoded_count, heard_frame_count
from avlm.models.audio_encoders import AudioFamily, Released, audio_family
from avlm.models.records import check_layer

UNLIMITED_S = 30.0
"""Seconds heard at once where an encoder itself knows no limit."""

# ---------------------------------------------------------------- what it hears


def audio_spec(config: PreTrainedConfig, part: AudioPart, released: Released | None = None) -> AudioSpec:
    """What the encoder wants to hear.

    Args:
        config: The encoder's own configuration.
        part: The run's wishes; what it does not say is the encoder's own choice.
        released: Contents of ``preprocessor_config.json``, or nothing.

    Raises:
        ConfigError: The family cannot hear at the asked length, or has no such layer.
    """
    family = audio_family(config)
    length = part.length or family.lengths[0]
    if length not in family.lengths:
        raise ConfigError(
            f"model.audio.length={length} is not something {config.model_type} can do. "
            f"Use model.audio.length={family.lengths[0]}"
        )
    _check_layer(config, family, part.layer)
    hears = family.hears(config, released or {})
    features = hears.get("features", "whisper")
    if part.level != "whisper" and features != "whisper":
        raise ConfigError(
            f"model.audio.level={part.level} is for log-mel frames as Whisper takes them, and {config.model_type} "
            f"takes {features} features. Use model.audio.level=whisper"
        )
    numbers = {
        **hears,
        "level": part.level,
        "wrap": part.wrap,
        "reduction": part.connector.reduction(),
        "convolutions": family.convolutions(config),
        "rows": family.rows(config),
        "embeddings": None if family.embeddings is None else family.embeddings(config),
    }
    if family.longest is None:
        return AudioSpec(**numbers, max_frames=_frames_of(part.chunk_s or UNLIMITED_S, AudioSpec(**numbers)))
    longest = family.longest(config)
    windowed = length == "window" or family.masks_window
    spec = AudioSpec(
        **numbers,
        max_frames=longest,
        window_frames=longest if windowed else None,
        heard="sound" if windowed and length == "true" else "all",
    )
    return spec if part.chunk_s is None else _shorter(spec, part.chunk_s)


def _frames_of(seconds: float, spec: AudioSpec) -> int:
    return heard_frame_count(round(seconds * spec.sample_rate_hz), spec)


def _shorter(spec: AudioSpec, seconds: float) -> AudioSpec:
    """Chunks shorter than the encoder could hear."""
    if spec.window_frames is not None:
        raise ConfigError(
            f"model.audio.chunk_s={seconds:g}: this encoder always hears its whole window, so shorter chunks would be "
            "padded to it. Leave it out"
        )
    frames = _frames_of(seconds, spec)
    if frames > spec.max_frames:
        longest = spec.max_frames * spec.hop / spec.sample_rate_hz
        raise ConfigError(
            f"model.audio.chunk_s={seconds:g}: the encoder's table of positions ends at {longest:g} s. "
            f"Use at most {longest:g}, or leave it out"
        )
    return spec.model_copy(update={"max_frames": frames})


def _check_layer(config: Any, family: AudioFamily, layer: int | None) -> None:
    if layer is None:
        return
    behind = "an adapter follows its layers" if getattr(config, "add_adapter", False) else None
    if family.layers is None:
        behind = "its hidden states differ from its output in length or width"
    if behind is not None or family.layers is None:
        raise ConfigError(
            f"model.audio.layer={layer}: {behind}, so only the output of {config.model_type} fits the count of its "
            "tokens. Leave it out"
        )
    check_layer("audio", layer, getattr(config, family.layers))


# ---------------------------------------------------------------- the one call


def encode_sounds(
    encoder: PreTrainedModel, features: Tensor, mask: Tensor, spec: AudioSpec, layer: int | None = None
) -> list[Tensor]:
    """Hear chunks of sound, each as if it were alone.

    Args:
        encoder: An audio encoder with a record.
        features: (N, B, M), padded with zeros to the longest chunk.
        mask: bool (N, M), True where there is sound.
        spec: What the encoder hears.
        layer: Hidden state to read, counted as in `hidden_states`; None is the encoder's output.

    Returns:
        N tensors (n_i, C); n_i is `layout.encoded_count`. Steps of time follow each other; where the encoder keeps
        frequencies apart, those of one step stand together.

    Raises:
        LayoutError: A chunk is empty or longer than the encoder hears, or the encoder made another number of
            embeddings than its record says.
    """
    family = audio_family(encoder.config)
    features = features.float() if family.precise else features.to(encoder.dtype)
    lengths = sound_lengths(features, mask, spec)
    _keep_statistics(encoder)
    found: list[Tensor | None] = [None] * len(lengths)
    for members in _groups(lengths, family, encoder.config, spec):
        frames = spec.window_frames or lengths[members[0]]
        heard = features[members, :, :frames], mask[members, :frames]
        forward = family.forward or family_forward(family)
        states = forward(encoder, *heard, spec, layer)
        for i, state in zip(members, states, strict=True):
            found[i] = _own(state, lengths[i], lengths[members[0]], spec, family)
    return [state for state in found if state is not None]


def family_forward(family: AudioFamily) -> Callable[[Any, Tensor, Tensor, AudioSpec, int | None], Tensor]:
    """The call that a record's settings describe."""

    def forward(encoder: Any, features: Tensor, mask: Tensor, spec: AudioSpec, layer: int | None) -> Tensor:
        if spec.features == "wave":
            features = features[:, 0]
        elif family.frames_first:
            features = features.transpose(1, 2)
        inputs = {family.input_name: features}
        if family.mask_name is not None:
            inputs[family.mask_name] = ~mask if family.mask_marks == "padding" else mask.long()
        output = encoder(**inputs, **({} if layer is None else {"output_hidden_states": True}))
        states: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
        states = states[:, family.prefix_tokens :]
        return states.unflatten(1, (spec.rows, -1)).transpose(1, 2).flatten(1, 2) if family.rows_first else states

    return forward


def _own(state: Tensor, frames: int, longest: int, spec: AudioSpec, family: AudioFamily) -> Tensor:
    """The embeddings of one chunk, out of a group padded to the longest."""
    count = encoded_count(frames, spec)
    whole = spec.window_frames if spec.window_frames is not None else longest
    if len(state) != encoded_count(whole, spec):
        raise LayoutError(
            f"the audio encoder made {len(state)} embeddings of {whole} frames, and the record of {family.model_type} "
            f"counts {encoded_count(whole, spec)}. Correct the record"
        )
    return state[:count]


def sound_lengths(features: Tensor, mask: Tensor, spec: AudioSpec) -> list[int]:
    """Frames of each chunk (N, B, M) that are sound, by its mask (N, M).

    Raises:
        LayoutError: A chunk is empty or longer than the encoder hears, or its mask does not begin with its first frame.
    """
    lengths: list[int] = mask.sum(1).tolist()
    _check_lengths(lengths, features.shape[2], spec)
    _check_beginnings(mask, lengths)
    return lengths


def _check_lengths(lengths: list[int], padded: int, spec: AudioSpec) -> None:
    """Refuse chunks that the encoder cannot hear, by their number in the batch."""
    if spec.window_frames is not None and padded != spec.window_frames:
        raise LayoutError(
            f"clips of {padded} mel frames were given, and the audio encoder hears windows of {spec.window_frames}. "
            "Prepare the data with the model's own processor"
        )
    for i, length in enumerate(lengths):
        if not 0 < length <= spec.max_frames:
            raise LayoutError(
                f"clip {i} has {length} mel frames, and the audio encoder hears 1 to {spec.max_frames}. "
                "Leave it out, or cut it into shorter clips"
            )
        if spec.window_frames is not None and spec.heard == "all" and length != spec.window_frames:
            raise LayoutError(
                f"clip {i} has a mask of {length} frames, and this audio encoder hears its whole window of "
                f"{spec.window_frames} and takes no mask. Use model.audio.length=true where the family has it"
            )


def _check_beginnings(mask: Tensor, lengths: list[int]) -> None:
    """Refuse masks of clips that do not begin with the first frame, as inverted ones and those padded on the left."""
    frames = torch.arange(mask.shape[1], device=mask.device)
    wrong = (mask != (frames < mask.sum(1, keepdim=True))).any(1).tolist()
    if any(wrong):
        i = wrong.index(True)
        raise LayoutError(
            f"clip {i} has a mask of {lengths[i]} frames that are not its first ones, and each clip is heard from its "
            "first frame on. Pad clips on the right, with a mask that is True where there is sound"
        )


def _groups(lengths: list[int], family: AudioFamily, config: Any, spec: AudioSpec) -> list[list[int]]:
    """Indices of chunks that go through the encoder together, longest first in each group."""
    if spec.window_frames is not None:
        return [list(range(len(lengths)))] if lengths else []
    if family.neighbours(config) == "masked":
        return _similar(lengths)
    equal: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        equal.setdefault(length, []).append(i)
    return list(equal.values())


def _similar(lengths: list[int]) -> list[list[int]]:
    """Indices grouped so that no clip is padded by more than a third of itself, longest first in each group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] * 4 >= lengths[groups[-1][0]] * 3:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _keep_statistics(encoder: nn.Module) -> None:
    """Batch norms hear with the statistics they were released with: a batch's own would let clips hear each other."""
    if encoder.training:
        for module in encoder.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.eval()
