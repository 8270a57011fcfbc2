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

    reduction: Reduction = Reduction()

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

    reduction: Reduction = Reduction()


VideoOrder = Literal["interleaved", "video_audio", "audio_video", "video", "audio"]


class VideoSpec(Settings):
    """Which frames of a video are looked at, and how its sound track lies beside them.

    VITA's rule (arXiv:2408.05211) is ``fps=1, min_frames=4, max_frames=16``.
    """

    fps: float = Field(1.0, gt=0)
    """Frames looked at per second of video, each from the middle of its stretch of time."""

    min_frames: int = Field(1, ge=1)
    """A short video is looked at this often all the same; with ``max_frames`` equal, so is every video."""
    max_frames: int = Field(32, ge=1)
    """A long video is looked at this often, at even distances."""

    order: VideoOrder = "interleaved"
    """`interleaved` puts each frame before the sound of its own stretch of time; the others put one whole medium
    first, or leave one out."""

    clock: bool = False
    """Write before each frame when its stretch begins, as a short text such as ``0.0s`` (VideoLLaMA 3,
    arXiv:2501.13106, has one too)."""

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
