"""Connectors: from an encoder's embeddings to the language model's tokens. Settings only, and how each one counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avlm.config.base import Settings
from avlm.config.media import Reduction, Windows


class ConnectorSettings(Settings):
    """What every connector has."""

    kind: str
    prompts: int = Field(0, ge=0)
    """Learned vectors put before the tokens of each item: of each picture or tile, frame, clip or chunk of sound
    (VITA-1.5 has 25)."""


class LinearConnector(ConnectorSettings):
    """One matrix from the encoder's width to the language model's."""

    kind: Literal["linear"] = "linear"
    stack: int = Field(1, ge=1)
    """Consecutive embeddings joined into one token first."""
    bias: bool = True

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, stack=self.stack)


class MlpConnector(ConnectorSettings):
    """LLaVA-1.5's two layers with a GELU between (arXiv:2310.03744)."""

    kind: Literal["mlp"] = "mlp"
    stack: int = Field(1, ge=1)
    """Consecutive embeddings joined into one token first."""
    hidden_size: int | None = Field(None, ge=1)
    """Width between the layers; default: the language model's."""
    layers: int = Field(2, ge=1)
    bias: bool = True

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, stack=self.stack)


class SwigluConnector(ConnectorSettings):
    """Ultravox's since v0.5: stacked embeddings, RMSNorm, a gated layer (SwiGLU), RMSNorm, one matrix; no bias."""

    kind: Literal["swiglu"] = "swiglu"
    stack: int = Field(8, ge=1)
    """Consecutive embeddings joined into one token first."""
    hidden_size: int = Field(2048, ge=1)
    """Width behind the gate. The first matrix makes twice as much, values and gates, which is the number that Ultravox
    itself gives (4096)."""
    scale: float = Field(0.4, gt=0)
    """What the norms' weights start from."""

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, stack=self.stack)


class PrefixConnector(ConnectorSettings):
    """One matrix from all of an item's embeddings to all of its tokens (Frozen, arXiv:2106.13884)."""

    kind: Literal["prefix"] = "prefix"
    stack: int = Field(ge=1)
    """Consecutive embeddings that go through the matrix together: for a picture as many as it has."""
    tokens: int = Field(ge=1)
    """Tokens that they become."""
    bias: bool = True

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, stack=self.stack, spread=self.tokens)


class PoolConnector(ConnectorSettings):
    """Average-pool to a fixed number of tokens, LayerNorm, one matrix."""

    kind: Literal["pool"] = "pool"
    tokens: int = Field(250, ge=1)
    norm: Literal["before", "after"] = "after"
    """LayerNorm before the pooling or after it."""
    bias: bool = False

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, pool=self.tokens)


class ConvConnector(ConnectorSettings):
    """VITA's strided convolution over the sequence, norm, ReLU, one matrix (arXiv:2408.05211).

    Zeros follow the last embedding, so that n embeddings make (n - 1) // stride + 1 tokens. VITA's own code has a batch
    norm here by default and a LayerNorm as an option; only the second keeps an item apart from its neighbours.
    """

    kind: Literal["conv"] = "conv"
    kernel: int = Field(5, ge=1)
    """Embeddings that each token is made from."""
    stride: int = Field(2, ge=1)
    """Embeddings from one token to the next."""
    hidden_size: int | None = Field(None, ge=1)
    """Channels of the convolution; default: twice the encoder's width (2048 for VITA's 1024)."""

    @model_validator(mode="after")
    def _nothing_skipped(self) -> ConvConnector:
        if self.stride > self.kernel:
            raise ValueError(
                f"stride={self.stride} is more than kernel={self.kernel}, so what lies between two tokens would reach "
                f"neither. Use at most {self.kernel} for stride"
            )
        return self

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, stack=self.stride)


class PixelShuffleConnector(ConnectorSettings):
    """Squares of a picture's embeddings joined on channels, LayerNorm, MLP (InternVL, arXiv:2404.16821).

    Odd sides are padded with zeros at the right and at the bottom, as in VILA's downsampling projector
    (arXiv:2312.07533): 27 by 27 embeddings make 14 by 14 tokens.
    """

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    side: int = Field(2, ge=1)
    """Embeddings along one side of a square."""
    norm: Literal["before", "none"] = "before"
    """LayerNorm before the MLP; VITA has none."""
    hidden_size: int | None = Field(None, ge=1)
    """Width between the layers; default: the language model's."""
    layers: int = Field(2, ge=1)
    bias: bool = True

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, side=self.side)


class _Qformer(ConnectorSettings):
    """What both Q-Formers have: learned queries that attend to each other and to the embeddings (arXiv:2301.12597)."""

    queries: int = Field(32, ge=1)
    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)
    feedforward: int = Field(3072, ge=1)
    cross_every: int = Field(2, ge=1)
    """Every how many layers, from the first on, the queries look at the embeddings."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """In training only."""
    norm: Literal["before", "none"] = "before"
    """LayerNorm on the embeddings; `none` where the encoder part has normed them already."""

    @model_validator(mode="after")
    def _heads_divide(self) -> _Qformer:
        if self.width % self.heads:
            near = max(self.width - self.width % self.heads, self.heads)
            raise ValueError(
                f"width={self.width} is not a whole number of heads={self.heads}, so the heads cannot share it. "
                f"Use {near} for width"
            )
        return self


class QformerConnector(_Qformer):
    """BLIP-2's Q-Former: a fixed number of queries reads the whole item (arXiv:2301.12597)."""

    kind: Literal["qformer"] = "qformer"

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, pool=self.queries)


class WindowQformerConnector(_Qformer):
    """SALMONN's window-level Q-Former: the queries read each window for itself (arXiv:2310.13289).

    The defaults are SALMONN's: 0.333 s of Whisper's 50 embeddings a second are 17, so 30 s make 88 windows, each read
    by one query.
    """

    kind: Literal["window_qformer"] = "window_qformer"
    queries: int = Field(1, ge=1)
    """Of each window."""
    layers: int = Field(2, ge=1)
    cross_every: int = Field(1, ge=1)
    """Every how many layers, from the first on, the queries look at the embeddings."""
    window: int = Field(17, ge=1)
    """Embeddings of a window."""
    stride: int = Field(17, ge=1)
    """Embeddings from the start of a window to the start of the next."""
    rest: Literal["joined", "dropped"] = "joined"
    """Embeddings at the end that fill no window: read with the last window, or, as in SALMONN's code, by none. Both
    make as many tokens. An item shorter than a window is always read whole."""

    @model_validator(mode="after")
    def _nothing_skipped(self) -> WindowQformerConnector:
        if self.stride > self.window:
            raise ValueError(
                f"stride={self.stride} is more than window={self.window}, so what lies between two windows would be "
                f"read by neither. Use at most {self.window} for stride"
            )
        return self

    def reduction(self) -> Reduction:
        windows = Windows(size=self.window, stride=self.stride)
        return Reduction(prompts=self.prompts, windows=windows, spread=self.queries)


class PerceiverConnector(ConnectorSettings):
    """Flamingo's resampler: learned queries attend to the embeddings and to themselves at once (arXiv:2204.14198).

    The defaults are those of Flamingo-3B.
    """

    kind: Literal["perceiver"] = "perceiver"
    queries: int = Field(64, ge=1)
    layers: int = Field(6, ge=1)
    width: int | None = Field(None, ge=1)
    """Of the queries; default: the encoder's. Embeddings of another width go through one matrix first."""
    heads: int = Field(16, ge=1)
    head_size: int = Field(128, ge=1)
    expansion: int = Field(4, ge=1)
    """Width between the two matrices of a feed-forward, in widths of the queries."""
    activation: Literal["relu2", "relu", "gelu"] = "relu2"
    """`relu2` is the square of ReLU, Flamingo's own; IDEFICS has `relu`, OpenFlamingo `gelu`."""

    def reduction(self) -> Reduction:
        return Reduction(prompts=self.prompts, pool=self.queries)


Connector = Annotated[
    LinearConnector
    | MlpConnector
    | SwigluConnector
    | PrefixConnector
    | PoolConnector
    | ConvConnector
    | PixelShuffleConnector
    | QformerConnector
    | WindowQformerConnector
    | PerceiverConnector,
    Field(discriminator="kind"),
]
