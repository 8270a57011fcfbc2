"""BEATs: a transformer over patches of a filterbank picture, trained on sounds of every kind.

transformers has no class for it. Names of parameters are those of the released
checkpoints wherever that is possible; `from_released` does the rest.

Shapes in this file:
    N  clips    B  mel bins    M  mel frames    P  side of a patch    S  bands, B / P
    n  embeddings, M // P * S, all bands of one moment after the other    C  width
    H  heads    D  head width, C / H

Source:
    BEATs (arXiv:2212.09058, section 4.1); gated relative positions of WavLM (arXiv:2110.13900, section 3.1); buckets of
    T5 (arXiv:1910.10683, section 2.1); residuals of DeepNet (arXiv:2203.00555).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from avlm.errors import ConfigError
from avlm.models.heard import HeardOutput, checked_mask

SHARED_TABLE = re.compile(r"^encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.")
"""A released checkpoint holds the table of positions in every layer, the same each time; here it stands once."""


def from_released(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `model` of a released BEATs checkpoint under this file's names.

    The classifier of a fine-tuned checkpoint (``predictor``) is left out: it is not of the encoder.
    """
    found = {}
    for name, tensor in weights.items():
        shared = SHARED_TABLE.match(name)
        if name.startswith("predictor.") or (shared is not None and shared[1] != "0"):
            continue
        found[SHARED_TABLE.sub("encoder.relative_attention_bias.", name)] = tensor
    return found


class BeatsConfig(PreTrainedConfig):
    """Configuration of BEATs. The defaults are the released ones'.

    Args:
        num_mel_bins: B, a whole number of patches.
        patch_size: P.
        patch_width: Channels of a patch before they become embeddings.
        hidden_size: C.
        position_kernel, position_groups: Of the convolution over embeddings that tells their places.
        num_buckets, max_distance: Of the relative positions; distances beyond share the last bucket.
        dropout, attention_dropout, activation_dropout: In training only.
        max_frames: Mel frames heard at once: 30 s. Nothing in the weights limits it; the released ones were trained on
            10 s, and SALMONN feeds them 30 s.
    """

    model_type = "avlm_beats"

    def __init__(
        self,
        num_mel_bins: int = 128,
        patch_size: int = 16,
        patch_width: int = 512,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        position_kernel: int = 128,
        position_groups: int = 16,
        num_buckets: int = 320,
        max_distance: int = 800,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        max_frames: int = 2998,
        **kwargs: Any,
    ) -> None:
        self.num_mel_bins = num_mel_bins
        self.patch_size = patch_size
        self.patch_width = patch_width
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.position_kernel = position_kernel
        self.position_groups = position_groups
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.layer_norm_eps = layer_norm_eps
        self.max_frames = max_frames
        self._check()
        super().__init__(**kwargs)

    @property
    def bands(self) -> int:
        """S, embeddings of one moment."""
        return self.num_mel_bins // self.patch_size

    def _check(self) -> None:
        for name, whole, share in (
            ("num_mel_bins", self.num_mel_bins, self.patch_size),
            ("hidden_size", self.hidden_size, self.num_attention_heads),
            ("hidden_size", self.hidden_size, self.position_groups),
            ("num_buckets", self.num_buckets, 4),
        ):
            if whole % share:
                raise ConfigError(f"{name}={whole} cannot be shared out by {share}. Use a multiple of {share}")
        if self.max_distance <= self.num_buckets // 4:
            raise ConfigError(
                f"max_distance={self.max_distance} is reached before the {self.num_buckets // 4} buckets of single "
                f"distances end. Use at least {self.num_buckets // 4 + 1}"
            )


class BeatsEncoder(PreTrainedModel):
    """BEATs' encoder, 90,311,792 parameters at its released size.

    hidden_states are the input of every layer, and last the output; layers end with their norm, so no other follows.
    """

    config_class = BeatsConfig
    config: BeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["BeatsLayer"]

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__(config)
        side = config.patch_size
        self.patch_embedding = nn.Conv2d(1, config.patch_width, side, side, bias=False)
        self.layer_norm = nn.LayerNorm(config.patch_width, config.layer_norm_eps)
        self.post_extract_proj = nn.Linear(config.patch_width, config.hidden_size)
        self.encoder = BeatsTransformer(config)
        self.post_init()

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> HeardOutput:
        """Hear clips, each as if it were alone.

        Args:
            input_features: (N, B, M) filterbank frames, normalised; what lies beyond a clip's end is never seen.
            attention_mask: bool (N, M), True where there is sound; None for all of it. A last stretch shorter than a
                patch is not heard, in a batch as alone.

        Raises:
            LayoutError: The batch is shorter than a patch or longer than the encoder hears.
        """
        side = self.config.patch_size
        mask = checked_mask(input_features, attention_mask, side, self.config.max_frames)
        # A patch is of the clip if its last frame is.
        inside = mask[:, side - 1 :: side].repeat_interleave(self.config.bands, 1)
        features = input_features.transpose(1, 2)[:, None].to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(features).flatten(2).transpose(1, 2)
        states = self.post_extract_proj(self.layer_norm(patches))
        found = self.encoder(states, inside)
        return HeardOutput(found[-1], inside, found if output_hidden_states else None)

    def _init_weights(self, module: nn.Module) -> None:
        """BERT's for most; DeepNet's smaller ones for what is added to a residual (arXiv:2203.00555, figure 2)."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, PositionConvolution):
            width, _, kernel = module.weight_v.shape
            init.normal_(module.weight_v, std=math.sqrt(4 / (kernel * width)))
            init.copy_(module.weight_g, torch.linalg.vector_norm(module.weight_v.detach(), dim=(0, 1), keepdim=True))
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, BeatsAttention):
            init.ones_(module.grep_a)
        if isinstance(module, BeatsLayer):
            small = (8 * self.config.num_hidden_layers) ** -0.25
            attention = module.self_attn
            for layer in (attention.v_proj, attention.out_proj, module.fc1, module.fc2):
                init.xavier_normal_(layer.weight, gain=small)
            for layer in (attention.q_proj, attention.k_proj):
                init.xavier_normal_(layer.weight)


class BeatsTransformer(nn.Module):
    """Places by convolution, then the layers, which share one table of relative positions."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(PositionConvolution(config), nn.GELU())
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BeatsLayer(config) for _ in range(config.num_hidden_layers))
        self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_attention_heads)
        self.max_distance = config.max_distance

    def forward(self, states: Tensor, inside: Tensor) -> tuple[Tensor, ...]:
        """(N, n, C) and which of them are of their clip, bool (N, n), to all hidden states."""
        whole = bool(inside.all())
        if not whole:
            # The convolution must see zeros beyond a clip's end, as it does alone.
            states = states.masked_fill(~inside[..., None], 0)
        states = states + self.pos_conv(states.transpose(1, 2)).transpose(1, 2)
        states = self.dropout(self.layer_norm(states))
        bias = self._bias(states.shape[1])
        found = [states]
        for layer in self.layers:
            found.append(layer(found[-1], bias, None if whole else inside[:, None, None]))
        return tuple(found)

    def _bias(self, count: int) -> Tensor:
        """What each query adds for each key because of where they are: (H, n, n)."""
        at = torch.arange(count, device=self.relative_attention_bias.weight.device)
        buckets = relative_buckets(at - at[:, None], self.relative_attention_bias.num_embeddings, self.max_distance)
        values: Tensor = self.relative_attention_bias(buckets)
        return values.permute(2, 0, 1)


class PositionConvolution(nn.Module):
    """A grouped convolution over embeddings, as many out as in; its kernel is a direction and a length for each place.

    Names and shapes are those of torch's older weight norm, which released checkpoints have.
    """

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.position_kernel
        self.groups = config.position_groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.ones(width, width // self.groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """(N, C, n) to the same shape."""
        kernel = self.weight_v.shape[2]
        weight = self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True))
        told = F.conv1d(states, weight, self.bias, padding=kernel // 2, groups=self.groups)
        return told[:, :, : states.shape[2]]  # an even kernel makes one too many


class BeatsLayer(GradientCheckpointingLayer):
    """Attention and two linear layers with GELU; each is added to a residual that is scaled up, then normed."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = BeatsAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.alpha = (2 * config.num_hidden_layers) ** 0.25

    def forward(self, states: Tensor, bias: Tensor, seen: Tensor | None) -> Tensor:
        attended = self.dropout(self.self_attn(states, bias, seen))
        states = self.self_attn_layer_norm(states * self.alpha + attended)
        inner = self.activation_dropout(F.gelu(self.fc1(states)))
        out: Tensor = self.final_layer_norm(states * self.alpha + self.dropout(self.fc2(inner)))
        return out


class BeatsAttention(nn.Module):
    """Attention whose relative positions each query lets in as far as it wants."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, states: Tensor, bias: Tensor, seen: Tensor | None) -> Tensor:
        """Attend: (N, n, C), places (H, n, n), keys that are of the clip bool (N, 1, 1, n), to (N, n, C)."""
        query, key, value = (
            projection(states).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        gated = self._gate(query) * bias
        if seen is not None:
            gated = gated.masked_fill(~seen, torch.finfo(gated.dtype).min)
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, gated, dropout)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _gate(self, query: Tensor) -> Tensor:
        """How far each query lets positions in, (N, H, n, 1): between 1 and 2 as long as `grep_a` is 1."""
        update, reset = self.grep_linear(query).unflatten(3, (2, 4)).sum(4).sigmoid().split(1, 3)
        gate: Tensor = update * (reset * self.grep_a - 1) + 2
        return gate


def relative_buckets(distance: Tensor, buckets: int, longest: int) -> Tensor:
    """The bucket of each distance from query to key, long, of any shape.

    Half of the buckets are for keys ahead. In each half the nearer distances have one each, the farther ones share
    them, ever wider, up to the longest.

    Source:
        arXiv:1910.10683, section 2.1.
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    wide = torch.log(far.clamp(min=1).float() / exact) / math.log(longest / exact) * (half - exact)
    shared = (exact + wide.long()).clamp(max=half - 1)
    return (distance > 0).long() * half + torch.where(far < exact, far, shared)
