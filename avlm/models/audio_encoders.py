"""Audio encoders: one record for each family, and one call for all of them.

Everything a family does its own way stands in its record: what it hears, whether at a
clip's own length or in a window, how its convolutions count. Adding a family is adding a
record to the table below.

Shapes in this file:
    N  clips    C  encoder width    n  embeddings of one clip
    B  mel bins    M  mel frames
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from avlm.config.media import AudioSpec, Convolution
from avlm.config.model import AudioPart
from avlm.errors import ConfigError, LayoutError
from avlm.models.records import check_layer, unknown_family


@dataclass(frozen=True, slots=True)
class AudioFamily:
    """What is particular about one family of audio encoders."""

    model_type: str
    inside: tuple[str, ...] = ()
    held_as: tuple[str, ...] = ()
    """Where in a composite checkpoint its weights stand."""
    lengths: tuple[Literal["true", "window"], ...] = ("true", "window")
    """Which ways of hearing it has: each clip at its own length, or padded to the released window."""
    convolutions: tuple[Convolution, ...] = (Convolution(stride=1), Convolution(stride=2))
    sample_rate_hz: int = 16_000
    n_fft: int = 400
    hop: int = 160


# A released Whisper is a whole speech-to-text model; its decoder is never built.
AUDIO_FAMILIES = (AudioFamily("whisper", held_as=("model.encoder", "encoder")),)


def audio_family(config: PreTrainedConfig) -> AudioFamily:
    """The record of an audio encoder's configuration.

    Raises:
        ConfigError: avlm has no record of this family.
    """
    for family in AUDIO_FAMILIES:
        if config.model_type == family.model_type:
            return family
    raise ConfigError(unknown_family("audio", config.model_type, [f.model_type for f in AUDIO_FAMILIES]))


def audio_spec(config: PreTrainedConfig, part: AudioPart) -> AudioSpec:
    """What the encoder wants to hear.

    Raises:
        ConfigError: The family cannot hear at the asked length, or has no such layer.
    """
    family = audio_family(config)
    if part.length not in family.lengths:
        raise ConfigError(
            f"model.audio.length={part.length} is not something {config.model_type} can do. "
            f"Use model.audio.length={family.lengths[0]}"
        )
    check_layer("audio", part.layer, config.encoder_layers)
    longest = int(config.max_source_positions) * family.convolutions[-1].stride
    return AudioSpec(
        sample_rate_hz=family.sample_rate_hz,
        mel_bins=int(config.num_mel_bins),
        n_fft=family.n_fft,
        hop=family.hop,
        level=part.level,
        window_frames=longest if part.length == "window" else None,
        max_frames=longest,
        convolutions=family.convolutions,
        wrap=part.wrap,
        reduction=part.connector.reduction(),
    )


def encode_sounds(
    encoder: PreTrainedModel, features: Tensor, mask: Tensor, spec: AudioSpec, layer: int | None = None
) -> list[Tensor]:
    """Hear clips, each as if it were alone.

    Args:
        encoder: An audio encoder with a record.
        features: (N, B, M) log-mel frames, padded with zeros to the longest clip.
        mask: bool (N, M), True where there is sound.
        spec: The window, or true lengths.
        layer: Hidden state to read, counted as in `hidden_states`; None is the encoder's output.

    Returns:
        N tensors (n_i, C).

    Raises:
        LayoutError: A clip is empty or longer than the encoder hears.
    """
    features = features.to(encoder.dtype)
    lengths: list[int] = mask.sum(1).tolist()
    _check_lengths(lengths, features.shape[2], spec)
    if spec.window_frames is not None:
        if layer is None:
            return list(encoder(features).last_hidden_state)
        return list(encoder(features, output_hidden_states=True).hidden_states[layer])
    found: list[Tensor | None] = [None] * len(lengths)
    for members in _similar(lengths):
        longest = lengths[members[0]]
        states = _whisper_true_length(encoder, features[members, :, :longest], mask[members, :longest], layer)
        for i, state in zip(members, states, strict=True):
            found[i] = state
    return [state for state in found if state is not None]


def _check_lengths(lengths: list[int], padded: int, spec: AudioSpec) -> None:
    """Refuse clips that the encoder cannot hear, by their number in the batch."""
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


def _similar(lengths: list[int]) -> list[list[int]]:
    """Indices grouped so that no clip is padded by more than a third of itself, longest first in each group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] * 4 >= lengths[groups[-1][0]] * 3:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _whisper_true_length(encoder: Any, features: Tensor, mask: Tensor, which: int | None) -> list[Tensor]:
    """Whisper's encoder on clips shorter than its window: no position beyond a clip's end is ever seen.

    transformers' own forward insists on the full window and hears the padding as silence (arXiv:2212.04356 trains on
    it); here each clip ends where it ends, as Ultravox does. At the full window both agree.
    """
    # Each convolution must see zeros beyond a clip's end, as at the end of a window.
    features = features.masked_fill(~mask[:, None], 0)
    states = F.gelu(encoder.conv1(features)).masked_fill(~mask[:, None], 0)
    states = F.gelu(encoder.conv2(states)).transpose(1, 2)
    inside = mask[:, ::2]
    positions = torch.arange(states.shape[1], device=states.device)
    states = states + encoder.embed_positions(positions)
    states = F.dropout(states, encoder.dropout, encoder.training)
    attention_mask = None
    if not bool(inside.all()):
        attention_mask = torch.zeros(inside.shape, dtype=states.dtype, device=states.device)
        attention_mask = attention_mask.masked_fill(~inside, torch.finfo(states.dtype).min)[:, None, None, :]
    last = len(encoder.layers)
    wanted = last if which is None else which % (last + 1)
    for layer in encoder.layers[:wanted]:
        states = layer(states, attention_mask)
    if wanted == last:
        states = encoder.layer_norm(states)
    return [state[:count] for state, count in zip(states, inside.sum(1).tolist(), strict=True)]
