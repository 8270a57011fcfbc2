"""What the encoders want to see and hear, in numbers alone.

One `MediaSpec` is written into a model directory twice, into `config.json` for the
model and into `processor_config.json` for the data side, and loading compares the
two. `layout.py` turns it into token counts. No torch, no transformers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from avlm.config.base import Settings

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Reduction(Settings):
    """How a connector changes the number of embeddings: joined, pooled or kept."""

    stack: int = Field(1, ge=1)
    """Consecutive embeddings joined into one group; a last one that is short is padded with zeros."""

    spread: int = Field(1, ge=1)
    """Tokens that each group becomes."""

    pool: int | None = Field(None, ge=1)
    """Average-pool to exactly this many embeddings, whatever came in."""

    @property
    def keeps_grid(self) -> bool:
        """Whether the tokens of a picture lie in rows and columns, as its embeddings do."""
        return self.stack == 1 and self.spread == 1 and self.pool is None


class InternvlTiling(Settings):
    """A picture is cut into the grid of tiles whose aspect ratio is nearest to its own (InternVL, arXiv:2404.16821)."""

    kind: Literal["internvl"] = "internvl"

    max_tiles: int = Field(12, ge=1)
    """Grids of 1 to so many tiles are compared; the thumbnail is not counted."""

    thumbnail: bool = True
    """Behind the tiles of a picture that is cut, the whole picture as one more."""


class AnyresTiling(Settings):
    """A picture is seen whole, and again in the resolution that wastes least (LLaVA-NeXT's any-resolution).

    Its tokens are those of the whole picture, then those of the tiles row by row as one grid, without the padding and
    with one learned vector behind each row.
    """

    kind: Literal["anyres"] = "anyres"

    pinpoints: tuple[tuple[Count, Count], ...] = Field(
        ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), min_length=1
    )
    """Resolutions to choose from, (height, width) in pixels; multiples of the encoder's own size."""


Tiling = Annotated[InternvlTiling | AnyresTiling, Field(discriminator="kind")]

Wrap = tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]]
"""Tokens of text that open and close each picture, sound or video."""


NO_GRID = (
    "any-resolution tiling puts the tokens of all tiles together as one grid of rows, and the tokens of this connector "
    "lie in no grid. Use a connector that keeps rows and columns (linear or mlp without stack), or tiling.kind=internvl"
)
PATCHES_OR_TILES = (
    "max_patches keeps a picture whole at its own aspect ratio, and tiling cuts it up. Set one of them, the other to "
    "null"
)


class VisionSpec(Settings):
    """How a picture becomes the pixels and tokens of one vision encoder."""

    image_size_px: int = Field(ge=1)
    """Pictures are resized to a square of this side."""

    cell_px: int = Field(ge=1)
    """Side of the square that one embedding stands for (a ViT's patch, a ConvNet's total stride)."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    """Pixels in 0..1 are normalised as (x - mean) / std, per RGB channel."""

    fit: Literal["stretch", "pad", "crop"] = "stretch"
    """How another aspect ratio becomes a square: stretched (LLaVA in transformers: crop), padded, or centre-cropped."""

    resample: Literal["bicubic", "bilinear"] = "bicubic"
    """How pixels are interpolated, antialiased either way."""

    tiling: Tiling | None = None
    """How a picture becomes several squares; None is one. A frame of a video always is one."""

    max_patches: int | None = Field(None, ge=1)
    """The encoder takes patches: a picture keeps its aspect ratio and has at most so many (NaFlex, arXiv:2502.14786).
    A frame of a video is a square of `image_size_px`."""

    wrap: Wrap | None = None
    """Tokens around each picture, and around each video as a whole."""

    reduction: Reduction = Reduction()

    @property
    def sized(self) -> bool:
        """Whether the layout of a picture depends on its height and width."""
        return self.tiling is not None or self.max_patches is not None

    @property
    def newline(self) -> bool:
        """Whether a learned vector ends each row of a picture's grid."""
        return isinstance(self.tiling, AnyresTiling)

    @model_validator(mode="after")
    def _tiles_fit(self) -> VisionSpec:
        if self.tiling is not None and self.max_patches is not None:
            raise ValueError(PATCHES_OR_TILES)
        if isinstance(self.tiling, AnyresTiling):
            side = self.image_size_px
            wrong = [p for p in self.tiling.pinpoints if p[0] % side or p[1] % side]
            if wrong:
                raise ValueError(
                    f"tiling.pinpoints: {wrong[0][0]} x {wrong[0][1]} pixels cannot be cut into tiles of {side} x "
                    f"{side}, the size that the encoder sees. Use multiples of {side}"
                )
            if not self.reduction.keeps_grid:
                raise ValueError(NO_GRID)
        return self

    @model_validator(mode="after")
    def _at_least_one_cell(self) -> VisionSpec:
        if self.image_size_px < self.cell_px:
            raise ValueError(
                f"image_size_px={self.image_size_px} is smaller than one cell of {self.cell_px} px, so a picture would "
                f"have no token. Use at least {self.cell_px}"
            )
        return self


class Convolution(Settings):
    """One convolution over time; only what its length depends on."""

    kernel: Count = 3
    stride: Count = 1
    padding: int = Field(1, ge=0)


class AudioSpec(Settings):
    """How a waveform becomes the log-mel frames and tokens of one audio encoder.

    The defaults are Whisper's (arXiv:2212.04356): 25 ms windows, 10 ms hop, and
    two convolutions that halve the frames once, so 20 ms for each embedding.
    """

    sample_rate_hz: Count = 16_000
    """Every waveform is resampled to this, mono, before anything else sees it."""

    mel_bins: Count = 80
    n_fft: Count = 400
    hop: Count = 160
    """Samples between two mel frames."""

    level: Literal["whisper", "clip"] = "whisper"
    """`whisper` keeps its normalisation; `clip` gives every clip the same mean and spread, whatever its loudness and
    its noise floor. Released encoders need `whisper`."""

    window_frames: Count | None = None
    """Mel frames the released encoder always sees (3000 for Whisper: 30 s); None hears true lengths."""

    max_frames: Count = 3000
    """The encoder's position table ends here; longer sound is refused."""

    convolutions: tuple[Convolution, ...] = (Convolution(stride=1), Convolution(stride=2))

    wrap: Wrap | None = None
    """Tokens around each sound."""

    reduction: Reduction = Reduction()


VideoOrder = Literal["interleaved", "video_audio", "audio_video", "video", "audio"]


class VideoSpec(Settings):
    """Which frames of a video are looked at, and how its sound track lies beside them."""

    fps: float = Field(1.0, gt=0)
    """Frames looked at per second of video."""

    min_frames: int = Field(1, ge=1)
    max_frames: int = Field(32, ge=1)

    order: VideoOrder = "interleaved"
    """`interleaved` puts each frame before the sound that follows it in time; the others put one whole medium first,
    or leave one out."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> VideoSpec:
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames={self.min_frames} is more than max_frames={self.max_frames}, so no video has a right "
                f"number of frames. Use at most {self.max_frames} for min_frames"
            )
        return self


class MediaSpec(Settings):
    """All of it: a model without a part cannot see, or hear."""

    vision: VisionSpec | None = None
    audio: AudioSpec | None = None
    video: VideoSpec = VideoSpec()
