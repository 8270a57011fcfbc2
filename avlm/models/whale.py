"""VITA's audio encoder: two convolutions and a transformer, to be trained from scratch or loaded.

The published code has weights for it and no way to train it; here it is an encoder like
any other. Convolutions have no padding, so no embedding ever sees beyond its clip's end,
and a batch is each clip alone.

Shapes in this file:
    N  clips    B  mel bins    M  mel frames    n  embeddings, ((M - 1) // 2 - 1) // 2
    C  width    H  heads    D  head width, C / H

Source:
    VITA (arXiv:2408.05211), whose encoder follows WeNet's U2 (arXiv:2012.05481) with the position scores of
    Transformer-XL (arXiv:1901.02860, section 3.3).
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

SIGHT = 7
"""Mel frames that one embedding sees: two convolutions of kernel 3 and stride 2."""
STEP = 4
"""Mel frames from one embedding to the next."""
DYNAMIC_CHUNK = 25
"""Longest chunk that is drawn in training, in embeddings: a second (arXiv:2012.05481, section 3.3)."""

_LAYER = r"^enc\.1\.encoders\.(\d+)\."
RELEASED = {
    r"^global_cmvn\.": "normalisation.",
    r"^enc\.0\.core\.conv\.0\.": "subsampling.conv1.",
    r"^enc\.0\.core\.conv\.2\.": "subsampling.conv2.",
    r"^enc\.0\.core\.out\.0\.": "subsampling.projection.",
    r"^enc\.1\.embed\.0\.": "input_projection.",
    r"^enc\.1\.embed\.1\.": "input_norm.",
    r"^enc\.1\.after_norm\.": "layer_norm.",
    _LAYER + r"self_attn\.linear_(q|k|v|out|pos)\.": r"layers.\1.self_attn.\2_proj.",
    _LAYER + r"self_attn\.pos_bias_(u|v)$": r"layers.\1.self_attn.pos_bias_\2",
    _LAYER + r"feed_forward\.w_(1|2)\.": r"layers.\1.fc\2.",
    _LAYER + r"norm1\.": r"layers.\1.self_attn_layer_norm.",
    _LAYER + r"norm2\.": r"layers.\1.final_layer_norm.",
}
"""VITA's names, and the names here."""


def from_released(weights: Mapping[str, Tensor], prefix: str = "encoder.") -> dict[str, Tensor]:
    """The weights of VITA's audio encoder under this file's names.

    Args:
        weights: VITA's own state: of the audio encoder by itself, or of the whole model.
        prefix: Where in it the encoder stands: ``model.audio_encoder.encoder.`` in the whole model. What stands
            elsewhere (the connector, say) is left out.
    """
    found = {}
    for whole_name, tensor in weights.items():
        name = whole_name.removeprefix(prefix)
        if not whole_name.startswith(prefix):
            continue
        for theirs, ours in RELEASED.items():
            name = re.sub(theirs, ours, name)
        found[name] = tensor.flatten() if "pos_bias" in name else tensor
    return found


class WhaleConfig(PreTrainedConfig):
    """Configuration of VITA's audio encoder. The defaults are the released one's.

    Args:
        num_mel_bins: B, at least 7.
        hidden_size: C, also the channels of the convolutions.
        max_positions: Embeddings in the position table; 5000 are 200 s.
        chunk_size: Streaming: an embedding sees up to the end of its chunk of so many embeddings (40 ms each). None
            sees the whole clip.
        left_chunks: Streaming: whole chunks seen before its own; None sees all of them.
        dynamic_chunks: Draw chunk size and chunks before for each batch in training (half of the batches see
            everything), so that one encoder serves every latency. Evaluation never draws: it uses the two above.
        dropout, attention_dropout, positional_dropout: In training only.
        feature_mean, feature_std: What the normalisation of a fresh encoder begins with, the same for every bin.
            AudioSet's, of Kaldi filterbanks on 16-bit samples (arXiv:2212.09058), until `measure` is called.
    """

    model_type = "avlm_whale"

    def __init__(
        self,
        num_mel_bins: int = 80,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        max_positions: int = 5000,
        chunk_size: int | None = None,
        left_chunks: int | None = None,
        dynamic_chunks: bool = False,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        positional_dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        feature_mean: float = 15.41663,
        feature_std: float = 6.55582,
        **kwargs: Any,
    ) -> None:
        self.num_mel_bins = num_mel_bins
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_positions = max_positions
        self.chunk_size = chunk_size
        self.left_chunks = left_chunks
        self.dynamic_chunks = dynamic_chunks
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.positional_dropout = positional_dropout
        self.layer_norm_eps = layer_norm_eps
        self.feature_mean = feature_mean
        self.feature_std = feature_std
        self._check()
        super().__init__(**kwargs)

    @property
    def max_frames(self) -> int:
        """Mel frames of the longest clip that the position table has room for."""
        return STEP * self.max_positions + SIGHT - 1

    def _check(self) -> None:
        if self.num_mel_bins < SIGHT:
            raise ConfigError(
                f"num_mel_bins={self.num_mel_bins} leaves nothing after two convolutions, which see {SIGHT} bins at "
                f"once. Use at least {SIGHT}"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not an even share for each of {self.num_attention_heads} heads. "
                f"Use a multiple of {2 * self.num_attention_heads}"
            )
        for name, least in (("chunk_size", 1), ("left_chunks", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"{name}={value} would leave an embedding nothing to see. Use at least {least}, or null for all"
                )
        if self.left_chunks is not None and self.chunk_size is None:
            raise ConfigError(
                f"left_chunks={self.left_chunks} counts chunks, and there are none without chunk_size. "
                "Set chunk_size, or leave left_chunks out"
            )


class WhaleEncoder(PreTrainedModel):
    """VITA's audio encoder, 357,950,464 parameters at its released size (341.4 Mi, published as "341M").

    That figure comes from: biases on both convolutions and on every linear layer but the one for positions; LayerNorm
    with scale and shift after the input layer, twice in each layer and at the end; two learned vectors (the u and v of
    Transformer-XL) in each layer. Mean and spread of the features are buffers beside it, saved with the weights.

    What the released one does and Transformer-XL does not: positions are not shifted to be relative. The score of
    query i and key j is ``(q_i + u) k_j + (q_i + v) W p_j``, with ``p_j`` the sinusoid of the key's own place in the
    clip.

    hidden_states are the input of every layer, and last the output behind the final norm.
    """

    config_class = WhaleConfig
    config: WhaleConfig
    base_model_prefix = "encoder"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["WhaleLayer"]
    _keep_in_fp32_modules_strict = ["normalisation"]

    def __init__(self, config: WhaleConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.normalisation = Normalisation(config)
        self.subsampling = Subsampling(config.num_mel_bins, width)
        self.input_projection = nn.Linear(width, width)
        self.input_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(WhaleLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.post_init()

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> HeardOutput:
        """Hear clips, each as if it were alone.

        Args:
            input_features: (N, B, M) filterbank frames, in float32 whatever the encoder's own type; what lies beyond a
                clip's end is never seen.
            attention_mask: bool (N, M), True where there is sound; None for all of it.

        Raises:
            LayoutError: The batch is shorter than one embedding or longer than the position table.
        """
        mask = checked_mask(input_features, attention_mask, SIGHT, self.config.max_frames)
        # An embedding is of the clip if the last frame that it sees is.
        inside = mask[:, SIGHT - 1 :: STEP]
        features = self.normalisation(input_features).to(self.input_projection.weight.dtype)
        states, positions = self._embed(self.subsampling(features))
        seen = self._seen(inside)
        found = [states]
        for layer in self.layers:
            states = layer(states, positions, seen)
            found.append(states)
        found[-1] = self.layer_norm(states)
        return HeardOutput(found[-1], inside, tuple(found) if output_hidden_states else None)

    @torch.no_grad()
    def measure(self, input_features: Tensor, attention_mask: Tensor) -> None:
        """Take mean and spread of each bin from clips, before an encoder is trained from scratch.

        Args:
            input_features, attention_mask: As in `forward`, of any length; a few hundred clips are enough.
        """
        frames = input_features.transpose(1, 2)[attention_mask.bool()].double()
        self.normalisation.mean.copy_(frames.mean(0))
        self.normalisation.istd.copy_(1 / frames.std(0).clamp(min=1e-5))

    def _embed(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the layers: (N, n, C), and the sinusoids of the places, (1, n, C)."""
        config, training = self.config, self.training
        states = F.relu(F.dropout(self.input_norm(self.input_projection(states)), config.dropout, training))
        positions = sinusoids(states.shape[1], config.hidden_size, states.device).to(states.dtype)
        # As in the original Transformer, so that embeddings outweigh positions.
        states = states * math.sqrt(config.hidden_size)
        return (
            F.dropout(states, config.positional_dropout, training),
            F.dropout(positions, config.positional_dropout, training)[None],
        )

    def _seen(self, inside: Tensor) -> Tensor | None:
        """Which keys each query sees, bool (N or 1, 1, n or 1, n); None for all of them."""
        count = inside.shape[1]
        chunk, left = self._chunk(count)
        padded = None if bool(inside.all()) else inside[:, None, None]
        if chunk is None or chunk >= count:
            return padded
        walls = chunk_mask(count, chunk, left, inside.device)[None, None]
        return walls if padded is None else walls & padded

    def _chunk(self, count: int) -> tuple[int | None, int | None]:
        """Chunk size and chunks before it. Chance has a part in training only, never in evaluation."""
        if not (self.training and self.config.dynamic_chunks):
            return self.config.chunk_size, self.config.left_chunks
        whole, size, before = torch.rand(3).tolist()
        if whole < 0.5:
            return None, None
        chunk = 1 + int(size * min(DYNAMIC_CHUNK, count))
        return chunk, int(before * math.ceil(count / chunk))

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own scale, which suits every width: transformers' fixed 0.02 silences a narrow convolution."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, WhaleAttention):
            bound = math.sqrt(6 / (module.heads + module.pos_bias_u.shape[0] // module.heads))
            init.uniform_(module.pos_bias_u, -bound, bound)
            init.uniform_(module.pos_bias_v, -bound, bound)
        elif isinstance(module, Normalisation):
            init.constant_(module.mean, self.config.feature_mean)
            init.constant_(module.istd, 1 / self.config.feature_std)
        else:
            super()._init_weights(module)


class Normalisation(nn.Module):
    """Global mean and spread of each mel bin, kept and used in float32: filterbanks are large beside their spread."""

    mean: Tensor
    istd: Tensor

    def __init__(self, config: WhaleConfig) -> None:
        super().__init__()
        bins = config.num_mel_bins
        self.register_buffer("mean", torch.full((bins,), config.feature_mean, dtype=torch.float32))
        self.register_buffer("istd", torch.full((bins,), 1 / config.feature_std, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """(N, B, M) to the same in float32."""
        return (features.float() - self.mean.float()[:, None]) * self.istd.float()[:, None]


class Subsampling(nn.Module):
    """Two convolutions over time and frequency, then one linear layer: a quarter of the frames."""

    def __init__(self, bins: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 2)
        self.conv2 = nn.Conv2d(width, width, 3, 2)
        left = ((bins - 1) // 2 - 1) // 2
        self.projection = nn.Linear(left * width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(N, B, M) to (N, n, C); channels first, then the bins that are left, go into the linear layer."""
        states = F.relu(self.conv1(features.transpose(1, 2)[:, None]))
        states = F.relu(self.conv2(states))
        projected: Tensor = self.projection(states.transpose(1, 2).flatten(2))
        return projected


class WhaleLayer(GradientCheckpointingLayer):
    """Attention and two linear layers with ReLU, each behind a norm and beside a residual."""

    def __init__(self, config: WhaleConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.self_attn = WhaleAttention(config)
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        attended = self.self_attn(self.self_attn_layer_norm(states), positions, seen)
        states = states + self.dropout(attended)
        inner = self.dropout(F.relu(self.fc1(self.final_layer_norm(states))))
        return states + self.dropout(self.fc2(inner))


class WhaleAttention(nn.Module):
    """Attention with Transformer-XL's learned vectors and without its shift.

    Without the shift ``(q + u) k + (q + v) p`` is ``q (k + p) + u k + v p``: keys that carry their place, and a bias
    of each key alone. So no table of n x n is ever made.
    """

    def __init__(self, config: WhaleConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.pos_proj = nn.Linear(width, width, bias=False)
        # Heads end to end; as plain vectors they are biases to the optimizer, which does not decay them.
        self.pos_bias_u = nn.Parameter(torch.zeros(width))
        self.pos_bias_v = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        """Attend: (N, n, C), places (1, n, C) and who sees whom (see `WhaleEncoder`) to (N, n, C)."""
        key, place = self.k_proj(states), self.pos_proj(positions)
        alone = self._split(key * self.pos_bias_u + place * self.pos_bias_v).sum(3)
        scale = (states.shape[2] // self.heads) ** -0.5
        bias = (alone * scale)[:, :, None]
        if seen is not None:
            # The least finite number rather than minus infinity: a row that sees nothing (padding) stays finite.
            bias = bias.masked_fill(~seen, torch.finfo(bias.dtype).min)
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj(states)),
            self._split(key + place),
            self._split(self.v_proj(states)),
            bias,
            self.attention_dropout if self.training else 0.0,
            scale=scale,
        )
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _split(self, states: Tensor) -> Tensor:
        """(N, n, C) to (N, H, n, D)."""
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)


def sinusoids(count: int, width: int, device: torch.device) -> Tensor:
    """Places 0, 1, ... as sines and cosines in turn, float32 (count, width).

    Source:
        arXiv:1706.03762, section 3.5.
    """
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000) / width))
    angles = torch.arange(count, device=device)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)


def chunk_mask(count: int, chunk: int, left: int | None, device: torch.device) -> Tensor:
    """Who sees whom in streaming: bool (count, count), rows are queries.

    Args:
        count: Embeddings.
        chunk: Embeddings in a chunk; each sees its own chunk to the end, and what came before.
        left: Whole chunks before its own that it sees; None for all.

    Source:
        arXiv:2012.05481, section 3.3.
    """
    number = torch.arange(count, device=device) // chunk
    behind = number[:, None] - number
    seen = behind >= 0
    return seen if left is None else seen & (behind <= left)
