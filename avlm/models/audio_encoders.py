"""Audio encoders: one record for each family; `hearing` has the one call for all of them.

Everything a family does its own way stands in its record: which features it hears, whether at a
clip's own length or in a window, how its convolutions count, what its neighbours in a batch do to
it. Adding a family is adding a record: to the table below, or from outside with `add_family`.

Shapes in this file:
    N  chunks of sound    C  encoder width    n  embeddings of one chunk
    B  bins    M  frames of features    T  steps of time that the encoder makes
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avlm.config.media import AudioSpec, Convolution
from avlm.errors import ConfigError
from avlm.models.records import unknown_family

Released = dict[str, Any]
"""Contents of a checkpoint's ``preprocessor_config.json``, or nothing."""


def _width(config: Any) -> int:
    return int(getattr(config, "d_model", None) or config.hidden_size)


def _no_convolutions(config: Any) -> tuple[Convolution, ...]:
    return ()


def _one_row(config: Any) -> int:
    return 1


def _masked(config: Any) -> Literal["masked", "equal"]:
    return "masked"


def _equal(config: Any) -> Literal["masked", "equal"]:
    return "equal"


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFamily:
    """What is particular about one family of audio encoders."""

    model_type: str
    """transformers' name of the encoder's configuration."""

    hears: Callable[[Any, Released], dict[str, Any]]
    """The features that it takes, as settings of `AudioSpec`, from its configuration and its released preprocessing."""

    # ---- where it is found
    inside: tuple[str, ...] = ()
    """Names of composite configurations that hold one..."""
    config_in: str = "audio_config"
    """...under this name."""
    held_as: tuple[str, ...] = ()
    """Where in a composite checkpoint its weights stand, when transformers does not find them by itself."""
    build: Callable[[Any], PreTrainedModel] | None = None
    """Its class, where `AutoModel` gives none or a larger model."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Settings of its configuration that must be these, whatever it was released with."""

    # ---- how it counts
    lengths: tuple[Literal["true", "window"], ...] = ("true",)
    """Which ways of hearing it has, its own first: each clip at its own length, or padded to the released window."""
    masks_window: bool = False
    """At true length its input is padded to the window all the same, with the padding masked and dropped behind it."""
    longest: Callable[[Any], int] | None = None
    """Frames of its window, or of its table of positions; None where it has neither."""
    convolutions: Callable[[Any], tuple[Convolution, ...]] = _no_convolutions
    """What it does to the length of its input."""
    rows: Callable[[Any], int] = _one_row
    """Embeddings side by side for each step of time: the rows of a patched spectrogram."""
    rows_first: bool = False
    """It puts out one whole row after the other; they are read step by step of time all the same."""
    embeddings: Callable[[Any], int] | None = None
    """Embeddings of a window, where no convolution says so."""
    prefix_tokens: int = 0
    """Special tokens before the sound's own; they are dropped."""
    width: Callable[[Any], int] = _width
    """C."""

    # ---- which layer
    layers: str | None = "num_hidden_layers"
    """The setting that says how many layers can be chosen from; None where only the output has the right length."""
    output_normed: bool = False
    """A final norm follows the last of the hidden states: the output has it, ``layer=-1`` has not."""

    # ---- how it is called
    input_name: str = "input_features"
    frames_first: bool = True
    """It takes (N, M, B) rather than (N, B, M)."""
    mask_name: str | None = "attention_mask"
    """What the mask of frames is called; None where it takes none."""
    mask_marks: Literal["sound", "padding"] = "sound"
    """What is True (or 1) in that mask."""
    neighbours: Callable[[Any], Literal["masked", "equal"]] = _equal
    """`masked`: padded clips under its mask are heard as if alone, so clips of similar length go together. `equal`:
    padding would change what is heard, so only clips of equal length go together."""
    precise: bool = False
    """It takes float32 whatever its own type: its features are too large for half of the bits."""
    forward: Callable[[Any, Tensor, Tensor, AudioSpec, int | None], Tensor] | None = None
    """Its own way of being called, where the settings above do not say it all: encoder, (N, B, M), mask (N, M), spec
    and layer to (N, n or more, C)."""


# ---------------------------------------------------------------- Whisper and its kin


def _whisper_convolutions(config: Any) -> tuple[Convolution, ...]:
    return (Convolution(stride=1), Convolution(stride=2))


def _qwen2_convolutions(config: Any) -> tuple[Convolution, ...]:
    return (*_whisper_convolutions(config), Convolution(kernel=2, stride=2, padding=0))


def _whisper_window(config: Any) -> int:
    return 2 * int(config.max_source_positions)


def _whisper(encoder: Any, features: Tensor, mask: Tensor, spec: AudioSpec, layer: int | None) -> Tensor:
    if spec.window_frames is None:
        return _whisper_true_length(encoder, features, mask, layer)
    if layer is None:
        states: Tensor = encoder(features).last_hidden_state
    else:
        states = encoder(features, output_hidden_states=True).hidden_states[layer]
    return states


def _whisper_true_length(encoder: Any, features: Tensor, mask: Tensor, which: int | None) -> Tensor:
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
    attention_mask = _keys_inside(inside, states)
    last = len(encoder.layers)
    wanted = last if which is None else which % (last + 1)
    for layer in encoder.layers[:wanted]:
        states = layer(states, attention_mask)
    if wanted == last:
        states = encoder.layer_norm(states)
    return states


def _keys_inside(inside: Tensor, states: Tensor) -> Tensor | None:
    """An additive attention mask that hides what is not inside (N, n); None where everything is."""
    if bool(inside.all()):
        return None
    mask = torch.zeros(inside.shape, dtype=states.dtype, device=states.device)
    return mask.masked_fill(~inside, torch.finfo(states.dtype).min)[:, None, None, :]


def _qwen2_audio(encoder: Any, features: Tensor, mask: Tensor, spec: AudioSpec, layer: int | None) -> Tensor:
    """Its convolutions hear the window's silence, its attention does not, and what it makes of silence is dropped.

    Its hidden states have twice the output's length but for the last (they are averaged in pairs behind the layers),
    so a chosen one is averaged as the output is; the final norm belongs to the last layer.
    """
    hidden = _keys_inside(mask[:, ::2], features)
    output = encoder(features, attention_mask=hidden, output_hidden_states=layer is not None)
    last = len(encoder.layers)
    wanted = last if layer is None else layer % (last + 1)
    if wanted == last:
        states: Tensor = output.last_hidden_state
        return states
    averaged: Tensor = encoder.avg_pooler(output.hidden_states[wanted].transpose(1, 2))
    return averaged.transpose(1, 2)


# ---------------------------------------------------------------- spectrogram patches


def _ast_hears(config: Any, released: Released) -> dict[str, Any]:
    numbers = {"features": "fbank", "mel_bins": config.num_mel_bins, "n_fft": 512, "frame": 400}
    if not released.get("do_normalize", True):
        return numbers
    mean, std = released.get("mean", -4.2677393), released.get("std", 4.5689974)  # of AudioSet
    return {**numbers, "mean": mean, "std": 2 * std}


def _ast_rows(config: Any) -> int:
    return (int(config.num_mel_bins) - int(config.patch_size)) // int(config.frequency_stride) + 1


def _ast_convolutions(config: Any) -> tuple[Convolution, ...]:
    return (Convolution(kernel=config.patch_size, stride=config.time_stride, padding=0),)


def _clap_hears(config: Any, released: Released) -> dict[str, Any]:
    return {
        "features": "clap",
        "sample_rate_hz": 48_000,
        "mel_bins": config.num_mel_bins,
        "n_fft": 1024,
        "hop": 480,
        "low_hz": released.get("frequency_min"),
        "high_hz": released.get("frequency_max"),
        "mel_scale": "htk" if config.enable_fusion else "slaney",
    }


def _clap_build(config: Any) -> PreTrainedModel:
    from transformers import ClapAudioModel

    return ClapAudioModel(config)


def _clap_width(config: Any) -> int:
    return int(config.patch_embeds_hidden_size) * 2 ** (len(config.depths) - 1)


def _clap_rows(config: Any) -> int:
    """Frequencies of the output: the picture that a spectrogram is folded into has 4 strips, one below the other."""
    strips = int(config.spec_size) // int(config.num_mel_bins)
    return _clap_side(config) // strips


def _clap_side(config: Any) -> int:
    stride = config.patch_stride
    stride = int(stride[0] if isinstance(stride, (list, tuple)) else stride)
    return int(config.spec_size) // stride // 2 ** (len(config.depths) - 1)


def _clap(encoder: Any, features: Tensor, mask: Tensor, spec: AudioSpec, layer: int | None) -> Tensor:
    """A map (N, C, frequencies, time), read step by step; no clip is longer than the window, so nothing is fused."""
    alike = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
    states = encoder(features.transpose(1, 2)[:, None], is_longer=alike).last_hidden_state
    return states.transpose(2, 3).flatten(2).transpose(1, 2)


# ---------------------------------------------------------------- raw waves


def _wave_hears(config: Any, released: Released) -> dict[str, Any]:
    normalise = "clip" if released.get("do_normalize", True) else "none"
    return {"features": "wave", "mel_bins": 1, "n_fft": 1, "hop": 1, "normalise": normalise}


def _wave_convolutions(config: Any) -> tuple[Convolution, ...]:
    layers = zip(config.conv_kernel, config.conv_stride, strict=True)
    return (*(Convolution(kernel=k, stride=s, padding=0) for k, s in layers), *_adapter(config, padding=1))


def _adapter(config: Any, padding: int) -> tuple[Convolution, ...]:
    """Strided convolutions behind the layers, which a few released wav2vec models have."""
    if not getattr(config, "add_adapter", False):
        return ()
    conv = Convolution(kernel=config.adapter_kernel_size, stride=config.adapter_stride, padding=padding)
    return (conv,) * int(config.num_adapter_layers)


def _adapter_width(config: Any) -> int:
    return int(config.output_hidden_size if getattr(config, "add_adapter", False) else config.hidden_size)


def _wave_neighbours(config: Any) -> Literal["masked", "equal"]:
    """A group norm runs over the whole clip, its padding included; an adapter's convolutions see the padding."""
    alone = config.feat_extract_norm == "group" or getattr(config, "add_adapter", False)
    return "equal" if alone else "masked"


NO_CHANCE = (("apply_spec_augment", False), ("layerdrop", 0.0))
"""wav2vec models blank frames and leave out layers of their own accord while they train, drawn from generators that no
checkpoint holds; a blank longer than the clip is an error, and a layer left out shifts the hidden states."""


def _wave_family(model_type: str) -> AudioFamily:
    return AudioFamily(
        model_type=model_type,
        hears=_wave_hears,
        settings=NO_CHANCE,
        convolutions=_wave_convolutions,
        width=_adapter_width,
        output_normed=True,
        input_name="input_values",
        neighbours=_wave_neighbours,
    )


# ---------------------------------------------------------------- conformers


def _w2v_bert_hears(config: Any, released: Released) -> dict[str, Any]:
    stack = int(released.get("stride", 2))
    return {
        "features": "fbank",
        "mel_bins": int(config.feature_projection_input_dim) // stack,
        "n_fft": 512,
        "frame": 400,
        "window": "povey",
        "scale": 32_768.0,
        "normalise": "bins",
        "stack": stack,
    }


def _w2v_bert_convolutions(config: Any) -> tuple[Convolution, ...]:
    return _adapter(config, padding=int(config.adapter_stride) // 2)


def _w2v_bert_neighbours(config: Any) -> Literal["masked", "equal"]:
    return "equal" if config.add_adapter else "masked"


def _parakeet_hears(config: Any, released: Released) -> dict[str, Any]:
    return {"features": "parakeet", "mel_bins": config.num_mel_bins, "n_fft": 512, "frame": 400}


def _parakeet_convolutions(config: Any) -> tuple[Convolution, ...]:
    kernel, stride = int(config.subsampling_conv_kernel_size), int(config.subsampling_conv_stride)
    conv = Convolution(kernel=kernel, stride=stride, padding=(kernel - 1) // 2)
    return (conv,) * int(math.log2(config.subsampling_factor))


def _gemma3n_hears(config: Any, released: Released) -> dict[str, Any]:
    return {"features": "gemma3n", "mel_bins": config.input_feat_size, "n_fft": 1024, "frame": 512}


def _gemma3n_convolutions(config: Any) -> tuple[Convolution, ...]:
    """Two convolutions padded behind, so that every stride begins one; then every so-manieth embedding is kept."""
    strides = [*(int(time) for time, _ in config.sscp_conv_stride_size), int(config.conf_reduction_factor)]
    return tuple(Convolution(kernel=1, stride=stride, padding=0) for stride in strides)


def _gemma4_hears(config: Any, released: Released) -> dict[str, Any]:
    # Its projection is as wide as if its bins were as many as its first channels, so that is how many it has.
    return {"features": "gemma4", "mel_bins": config.subsampling_conv_channels[0], "n_fft": 512, "frame": 320}


def _gemma4_convolutions(config: Any) -> tuple[Convolution, ...]:
    return (Convolution(stride=2), Convolution(stride=2))


def _gemma4_width(config: Any) -> int:
    return int(config.output_proj_dims)


# ---------------------------------------------------------------- avlm's own


def _kaldi(bins: int) -> dict[str, Any]:
    """Kaldi's filterbank of samples as whole numbers."""
    return {
        "features": "fbank",
        "mel_bins": bins,
        "n_fft": 512,
        "frame": 400,
        "window": "povey",
        "scale": 32_768.0,
    }


def _beats_hears(config: Any, released: Released) -> dict[str, Any]:
    return {**_kaldi(config.num_mel_bins), "mean": 15.41663, "std": 2 * 6.55582}


def _beats_convolutions(config: Any) -> tuple[Convolution, ...]:
    return (Convolution(kernel=config.patch_size, stride=config.patch_size, padding=0),)


# ---------------------------------------------------------------- the table

AUDIO_FAMILIES: list[AudioFamily] = [
    AudioFamily(
        model_type="whisper",
        hears=lambda config, released: {"mel_bins": config.num_mel_bins},
        held_as=("model.encoder", "encoder"),
        build=WhisperEncoder,  # a released Whisper is a whole speech-to-text model; its decoder is never built
        lengths=("true", "window"),
        longest=_whisper_window,
        convolutions=_whisper_convolutions,
        layers="encoder_layers",
        neighbours=_masked,
        forward=_whisper,
    ),
    AudioFamily(
        model_type="qwen2_audio_encoder",
        hears=lambda config, released: {"mel_bins": config.num_mel_bins},
        inside=("qwen2_audio",),
        held_as=("model.audio_tower", "audio_tower"),
        lengths=("true", "window"),
        masks_window=True,
        longest=_whisper_window,
        convolutions=_qwen2_convolutions,
        layers="encoder_layers",
        neighbours=_masked,
        forward=_qwen2_audio,
    ),
    AudioFamily(
        model_type="audio-spectrogram-transformer",
        hears=_ast_hears,
        lengths=("window",),
        longest=lambda config: int(config.max_length),
        convolutions=_ast_convolutions,
        rows=_ast_rows,
        rows_first=True,
        prefix_tokens=2,  # class and distillation
        output_normed=True,
        input_name="input_values",
        mask_name=None,
    ),
    _wave_family("hubert"),
    _wave_family("wavlm"),
    _wave_family("wav2vec2"),
    AudioFamily(
        model_type="wav2vec2-bert",
        hears=_w2v_bert_hears,
        settings=NO_CHANCE,
        convolutions=_w2v_bert_convolutions,
        width=_adapter_width,
        neighbours=_w2v_bert_neighbours,
    ),
    AudioFamily(
        model_type="parakeet_encoder",
        hears=_parakeet_hears,
        inside=("parakeet_ctc", "parakeet_rnnt", "parakeet_tdt"),
        config_in="encoder_config",
        held_as=("model.encoder", "encoder"),
        settings=(("layerdrop", 0.0),),
        convolutions=_parakeet_convolutions,
        neighbours=_masked,
    ),
    AudioFamily(
        model_type="gemma3n_audio",
        hears=_gemma3n_hears,
        inside=("gemma3n",),
        held_as=("model.audio_tower", "audio_tower"),
        convolutions=_gemma3n_convolutions,
        layers=None,
        input_name="audio_mel",
        mask_name="audio_mel_mask",
        mask_marks="padding",
    ),
    AudioFamily(
        model_type="gemma4_audio",
        hears=_gemma4_hears,
        inside=("gemma4",),
        held_as=("model.audio_tower", "audio_tower"),
        convolutions=_gemma4_convolutions,
        width=_gemma4_width,
        layers=None,
        neighbours=_masked,
    ),
    AudioFamily(
        model_type="clap_audio_model",
        hears=_clap_hears,
        inside=("clap",),
        held_as=("audio_model",),
        build=_clap_build,
        lengths=("window",),
        longest=lambda config: 1001,  # 10 s
        rows=_clap_rows,
        embeddings=lambda config: _clap_side(config) ** 2,
        width=_clap_width,
        layers=None,
        forward=_clap,
    ),
    AudioFamily(
        model_type="avlm_whale",
        hears=lambda config, released: _kaldi(config.num_mel_bins),
        longest=lambda config: int(config.max_frames),
        convolutions=lambda config: (Convolution(stride=2, padding=0),) * 2,
        frames_first=False,
        neighbours=_masked,
        precise=True,
    ),
    AudioFamily(
        model_type="avlm_beats",
        hears=_beats_hears,
        longest=lambda config: int(config.max_frames),
        convolutions=_beats_convolutions,
        rows=lambda config: int(config.bands),
        frames_first=False,
        neighbours=_masked,
        precise=True,
    ),
]


def add_family(family: AudioFamily) -> None:
    """Add a family from outside, or another record of one that is there.

    Call it before a model with such an encoder is composed or loaded.
    """
    known = [other.model_type for other in AUDIO_FAMILIES]
    if family.model_type in known:
        AUDIO_FAMILIES[known.index(family.model_type)] = family
    else:
        AUDIO_FAMILIES.append(family)


def audio_family(config: PreTrainedConfig) -> AudioFamily:
    """The record of an audio encoder's configuration.

    Raises:
        ConfigError: avlm has no record of this family.
    """
    for family in AUDIO_FAMILIES:
        if config.model_type == family.model_type:
            return family
    raise ConfigError(unknown_family("audio", config.model_type, [f.model_type for f in AUDIO_FAMILIES]))


def inner_audio_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The encoder's own configuration, out of a composite one where needed, with what the record insists on.

    Raises:
        ConfigError: The composite configuration has no audio encoder.
    """
    for family in AUDIO_FAMILIES:
        if config.model_type in family.inside:
            inner = getattr(config, family.config_in, None)
            if inner is None:
                raise ConfigError(
                    f"this {config.model_type} was released without ears: its {family.config_in} is empty. "
                    "Use a checkpoint that hears"
                )
            config = inner
    for family in AUDIO_FAMILIES:
        if config.model_type == family.model_type:
            for name, value in family.settings:
                setattr(config, name, value)
    return config
