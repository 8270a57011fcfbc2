"""What a model is made of: where each part comes from and how the parts are joined."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from avlm.config.base import Settings
from avlm.config.connectors import Connector, MlpConnector
from avlm.config.media import NO_GRID, PATCHES_OR_TILES, AnyresTiling, Tiling, VideoSpec, Wrap
from avlm.config.released import PRESETS, RELEASED
from avlm.errors import ConfigError


class Source(Settings):
    """Where a part comes from: released weights, or fresh ones of a given configuration."""

    EITHER: ClassVar = (("path", "random"),)

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

    def transformers_config(self, part: str) -> dict[str, Any]:
        """The part's transformers configuration as far as avlm knows it without a download.

        Raises:
            ConfigError: It is not among the released ones that avlm knows.
        """
        if self.random is not None:
            return dict(self.random)
        if self.path not in RELEASED:
            raise ConfigError(
                f"model.{part}.path={self.path}: its configuration is not known without a download, so it can be "
                f"neither counted nor made small. Set model.{part}.random to one, or use one of {', '.join(RELEASED)}"
            )
        return dict(RELEASED[self.path])


Token = Annotated[str, Field(min_length=1)]


class LanguagePart(Source):
    """The causal language model, with its tokenizer and its chat template."""

    PRESETS: ClassVar = PRESETS["language"]

    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; default: beside the language model. Another one than the language model's
    own keeps the rows of the tokens that both have."""

    add_tokens: tuple[Token, ...] = ()
    """Words that become tokens of their own."""

    add_special_tokens: tuple[Token, ...] = ()
    """The same as special tokens, which are not shown when an answer is written out: a state, say, or a role."""

    init: Literal["mean", "pieces"] = "mean"
    """What a new token's embedding begins with: the mean of all, or of the pieces that the token was written with."""

    vocabulary: int = Field(1024, ge=300)
    """Largest size of the tokenizer made from the run's own texts for a fresh language model without a `tokenizer`."""

    chat_template: str | None = None
    """A Jinja chat template; default: the tokenizer's own."""


class VisionPart(Settings):
    """A vision encoder and the connector behind it."""

    PRESETS: ClassVar = PRESETS["vision"]

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

    PRESETS: ClassVar = PRESETS["audio"]

    encoder: Source
    connector: Connector = MlpConnector()

    layer: int | None = None

    length: Literal["true", "window"] | None = None
    """`true` hears each clip at its own length; `window` pads it to the window that the encoder was released with.
    Default: the family's own way, `true` where it can."""

    chunk_s: float | None = Field(None, gt=0)
    """Longest stretch of sound that is heard at once; longer sound comes in chunks, each encoded and connected by
    itself. Default: as much as the encoder can hear, and 30 s where it knows no limit."""

    beside: Source | None = None
    """A second encoder that hears the same chunks: both outputs go through a LayerNorm, are brought to the longer one's
    length with zeros and joined on channels before the connector (SALMONN, arXiv:2310.13289)."""

    level: Literal["whisper", "clip"] = "whisper"
    """`clip` gives every clip the same mean and spread; only for an encoder that is trained from scratch."""

    wrap: Wrap | None = None
    """Start and end token around each sound; added to the tokenizer where it lacks them."""

    @model_validator(mode="after")
    def _sound_is_a_sequence(self) -> AudioPart:
        if self.connector.kind == "pixel_shuffle":
            raise ValueError(
                "connector.kind=pixel_shuffle joins squares of a picture, and sound has no rows and columns. "
                "Use a connector for sequences, such as {kind: mlp, stack: 4}"
            )
        return self


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
        if self.audio is not None and self.audio.beside is not None:
            names.insert(names.index("audio") + 1, "audio_beside")
        return (*names, "language")
