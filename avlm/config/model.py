"""What a model is made of: where each part comes from and how the parts are joined."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from avlm.config.base import Settings
from avlm.config.media import NO_GRID, PATCHES_OR_TILES, AnyresTiling, Reduction, Tiling, VideoSpec, Wrap


class Source(Settings):
    """Where a part comes from: released weights, or fresh ones of a given configuration."""

    path: str | None = None
    """Name on the Hugging Face hub, or a local folder in its format."""

    random: dict[str, Any] | None = None
    """A transformers configuration (with its `model_type`); the weights are drawn afresh."""

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        if (self.path is None) == (self.random is None):
            given = "both are" if self.path is not None else "neither is"
            raise ValueError(
                f"a part comes from `path` or from `random`, and {given} given. Set one of the two, the other to null"
            )
        if self.random is not None and "model_type" not in self.random:
            raise ValueError(
                "`random` is a transformers configuration and this one has no `model_type`. "
                "Add it, such as model_type: siglip_vision_model"
            )
        return self


class LanguagePart(Source):
    """The causal language model, with its tokenizer and its chat template."""

    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default: beside the language model."""

    vocabulary: int = Field(1024, ge=300)
    """Largest size of the tokenizer made from the run's own texts for a fresh language model without a `tokenizer`."""

    chat_template: str | None = None
    """A Jinja chat template; default: the tokenizer's own."""


class LinearConnector(Settings):
    """One matrix from the encoder's width to the language model's."""

    kind: Literal["linear"] = "linear"
    stack: int = Field(1, ge=1)
    """Consecutive embeddings joined into one token first."""
    bias: bool = True

    def reduction(self) -> Reduction:
        return Reduction(stack=self.stack)


class MlpConnector(Settings):
    """LLaVA-1.5's two layers with a GELU between (arXiv:2310.03744)."""

    kind: Literal["mlp"] = "mlp"
    stack: int = Field(1, ge=1)
    """Consecutive embeddings joined into one token first."""
    hidden_size: int | None = Field(None, ge=1)
    """Width between the layers; default: the language model's."""
    layers: int = Field(2, ge=1)
    bias: bool = True

    def reduction(self) -> Reduction:
        return Reduction(stack=self.stack)


class PrefixConnector(Settings):
    """One matrix from all of an item's embeddings to all of its tokens (Frozen, arXiv:2106.13884)."""

    kind: Literal["prefix"] = "prefix"
    stack: int = Field(ge=1)
    """Consecutive embeddings that go through the matrix together: for a picture as many as it has."""
    tokens: int = Field(ge=1)
    """Tokens that they become."""
    bias: bool = True

    def reduction(self) -> Reduction:
        return Reduction(stack=self.stack, spread=self.tokens)


class PoolConnector(Settings):
    """Average-pool to a fixed number of tokens, LayerNorm, one matrix."""

    kind: Literal["pool"] = "pool"
    tokens: int = Field(250, ge=1)
    norm: Literal["before", "after"] = "after"
    """LayerNorm before the pooling or after it."""
    bias: bool = False

    def reduction(self) -> Reduction:
        return Reduction(pool=self.tokens)


Connector = Annotated[LinearConnector | MlpConnector | PrefixConnector | PoolConnector, Field(discriminator="kind")]


class VisionPart(Settings):
    """A vision encoder and the connector behind it."""

    encoder: Source
    connector: Connector = MlpConnector()

    layer: int | None = None
    """Which hidden state feeds the connector, counted as in `hidden_states`; default: the family's own choice."""

    image_size_px: int | None = Field(None, ge=1)
    """Default: the encoder's own."""

    fit: Literal["stretch", "pad", "crop"] = "stretch"

    tiling: Tiling | None = None
    """How pictures of other shapes become several squares: `internvl` or `anyres`; default: each is one square."""

    max_patches: int | None = Field(None, ge=1)
    """For an encoder that keeps a picture's aspect ratio (NaFlex): most patches of a picture; default: its own."""

    wrap: Wrap | None = None
    """Start and end token around each picture, and around each video; added to the tokenizer where it lacks them."""

    @model_validator(mode="after")
    def _tiles_fit(self) -> VisionPart:
        if self.tiling is not None and self.max_patches is not None:
            raise ValueError(PATCHES_OR_TILES)
        if isinstance(self.tiling, AnyresTiling) and not self.connector.reduction().keeps_grid:
            raise ValueError(NO_GRID)
        return self


class AudioPart(Settings):
    """An audio encoder and the connector behind it."""

    encoder: Source
    connector: Connector = MlpConnector()

    layer: int | None = None

    length: Literal["true", "window"] = "true"
    """`true` hears each clip at its own length; `window` pads it to the window that the encoder was released with."""

    level: Literal["whisper", "clip"] = "whisper"
    """`clip` gives every clip the same mean and spread; only for an encoder that is trained from scratch."""

    wrap: Wrap | None = None
    """Start and end token around each sound; added to the tokenizer where it lacks them."""


class ModelConfig(Settings):
    """An audio-vision language model, or one with fewer senses."""

    language: LanguagePart
    vision: VisionPart | None = None
    audio: AudioPart | None = None
    video: VideoSpec = VideoSpec()

    def parts(self) -> tuple[str, ...]:
        """Names of everything that can be trained or frozen, in the order of the data's way through."""
        names: list[str] = []
        for sense in ("vision", "audio"):
            if getattr(self, sense) is not None:
                names += [sense, f"{sense}_connector"]
        return (*names, "language")
