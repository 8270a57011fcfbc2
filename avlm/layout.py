"""How many tokens each image, sound or video takes, and where they sit in the text.

The data side reserves places with these counts; the model side fills them with
embeddings. Both ask this module and neither has a formula of its own, so they
cannot disagree. Plain integers only: no torch, nothing to download, quick to test.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from avlm.config.media import AudioSpec, MediaSpec, Reduction, VideoSpec, VisionSpec, Windows
from avlm.errors import LayoutError

Size = tuple[int, int]
"""(height, width) in pixels, or (rows, columns) of tiles, embeddings or tokens."""

Kind = Literal["image", "audio", "video"]
"""What a place is reserved for: an image, a stretch of sound, or a frame of a video."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of places of one kind that one media item takes."""

    kind: Kind
    count: int


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a video's header says: all that its layout depends on."""

    duration_s: float
    num_samples: int
    """Samples of its sound track at the model's rate; 0 without sound."""


def reduced_count(embeddings: int, reduction: Reduction, grid: Size | None = None) -> int:
    """Count the tokens that a connector makes of one item's embeddings (0 stays 0).

    Args:
        grid: Rows and columns of a picture's embeddings; None for a sequence, such as sound.

    Raises:
        LayoutError: Squares are joined, and there is no grid or one of another size.
    """
    if embeddings == 0:
        return 0
    if reduction.side > 1:
        rows, columns = reduced_grid(checked_grid(embeddings, grid), reduction)
        embeddings = rows * columns
    if reduction.windows is not None:
        embeddings = window_count(embeddings, reduction.windows)
    tokens = math.ceil(embeddings / reduction.stack) * reduction.spread
    return reduction.prompts + (tokens if reduction.pool is None else reduction.pool)


def reduced_grid(grid: Size, reduction: Reduction) -> Size:
    """Rows and columns of the squares that a connector joins.

    Source:
        A last short row or column is padded, so 27 by 27 make 14 by 14 (VILA, arXiv:2312.07533).
    """
    return math.ceil(grid[0] / reduction.side), math.ceil(grid[1] / reduction.side)


def window_count(embeddings: int, windows: Windows) -> int:
    """Count the full windows over a sequence; an item shorter than a window has one.

    Source:
        SALMONN (arXiv:2310.13289) unfolds 1500 embeddings into 88 windows of 17: the 4 that are left make none.
    """
    return max(embeddings - windows.size, 0) // windows.stride + 1


def checked_grid(embeddings: int, grid: Size | None) -> Size:
    """The grid of a picture's embeddings.

    Raises:
        LayoutError: There is none, or it has another number of cells.
    """
    if grid is None:
        raise LayoutError(
            f"an item of {embeddings} embeddings has no rows and columns, and its connector joins squares of them. "
            "Use a connector for sequences, such as kind: mlp"
        )
    if grid[0] * grid[1] != embeddings:
        raise LayoutError(
            f"a picture has {embeddings} embeddings, and a grid of {grid[0]} by {grid[1]} has {grid[0] * grid[1]}. "
            "Prepare the data with the model's own processor"
        )
    return grid


def image_embedding_count(spec: VisionSpec) -> int:
    """Count the embeddings of one picture or frame, without prefix tokens.

    Source:
        One embedding for each whole cell of a square grid, as in ViT (arXiv:2010.11929): 576 for CLIP-L/14 at 336 px.
    """
    rows, columns = square_grid(spec)
    return rows * columns


def square_grid(spec: VisionSpec) -> Size:
    """Rows and columns of the embeddings of one square."""
    side = spec.image_size_px // spec.cell_px
    return side, side


def image_token_count(spec: VisionSpec) -> int:
    """Count the language-model tokens of one picture or frame."""
    return reduced_count(image_embedding_count(spec), spec.reduction, square_grid(spec))


def mel_frame_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the mel frames of a waveform.

    Args:
        num_samples: Length at ``spec.sample_rate_hz``; more than 0.

    Returns:
        Whole hops in the sound, at least those of one analysis window; or the released window.

    Raises:
        LayoutError: The sound is longer than the encoder can hear.
    """
    frames = max(num_samples, spec.n_fft) // spec.hop
    longest = spec.window_frames or spec.max_frames
    if frames > longest:
        raise LayoutError(
            f"a sound of {num_samples / spec.sample_rate_hz:.2f} s has {frames} mel frames, and the audio encoder "
            f"hears at most {longest} ({longest * spec.hop / spec.sample_rate_hz:g} s). "
            "Cut the sound into shorter clips"
        )
    return spec.window_frames or frames


def resampled_count(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Count the samples of a waveform after resampling: its duration at the new rate, to the nearest sample."""
    return round(num_samples * to_hz / from_hz)


def audio_embedding_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the encoder's embeddings of one waveform; 0 for no sound.

    Raises:
        LayoutError: The sound is longer than the encoder can hear, or too short for its convolutions.

    Source:
        Convolution arithmetic; for Whisper ``(frames - 1) // 2 + 1`` (arXiv:2212.04356, section 2.2).
    """
    if num_samples == 0:
        return 0
    length = mel_frame_count(num_samples, spec)
    for conv in spec.convolutions:
        length = (length + 2 * conv.padding - conv.kernel) // conv.stride + 1
        if length < 1:
            raise LayoutError(
                f"a sound of {num_samples / spec.sample_rate_hz:.2f} s is too short for the audio encoder's "
                "convolutions, which make nothing of it. Use longer clips"
            )
    return length


def audio_token_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the language-model tokens of one waveform; at least 1 for any sound, 0 for none."""
    return reduced_count(audio_embedding_count(num_samples, spec), spec.reduction)


def frame_times_s(duration_s: float, spec: VideoSpec) -> list[float]:
    """Times of the frames to look at: the middles of equal shares of the video.

    Args:
        duration_s: Length of the video in seconds; 0 counts as one still frame.

    Returns:
        Ascending times in ``[0, duration_s)``; ``fps`` frames a second within the limits of the spec.
    """
    count = min(max(round(duration_s * spec.fps), spec.min_frames), spec.max_frames)
    return [duration_s * (i + 0.5) / count for i in range(count)]


def video_segments(facts: VideoFacts, media: MediaSpec) -> list[Segment]:
    """Lay out the frames and the sound of one video.

    Returns:
        Runs of places, in the order the language model reads them. In the ``interleaved`` order each
        frame is followed by the share of the sound that belongs to its stretch of time.

    Raises:
        LayoutError: The model has no vision part, the sound is too long for the encoder, or the model only listens to
            videos and this one has no sound.
    """
    if media.vision is None:
        raise LayoutError(
            "a video was given to a model without a vision part. Use a model that sees, or the sound alone"
        )
    order = media.video.order
    frames = [Segment("video", image_token_count(media.vision)) for _ in frame_times_s(facts.duration_s, media.video)]
    sound = 0
    if media.audio is not None and facts.num_samples > 0 and order != "video":
        sound = audio_token_count(facts.num_samples, media.audio)
    if order == "interleaved":
        shares = split_evenly(sound, len(frames))
        return [
            s for frame, share in zip(frames, shares, strict=True) for s in (frame, Segment("audio", share)) if s.count
        ]
    heard = [Segment("audio", sound)] if sound else []
    if order == "audio" and not heard:
        raise LayoutError(
            "a video without sound was given to a model that only listens to videos (video.order=audio). "
            "Leave it out, or use a model that looks at videos"
        )
    return {
        "video_audio": frames + heard,
        "audio_video": heard + frames,
        "video": frames,
        "audio": heard,
    }[order]


def split_evenly(total: int, shares: int) -> list[int]:
    """Cut a whole into consecutive shares that differ by at most one."""
    edges = [total * i // shares for i in range(shares + 1)]
    return [b - a for a, b in itertools.pairwise(edges)]


def image_segments(media: MediaSpec) -> list[Segment]:
    """Lay out one picture.

    Raises:
        LayoutError: The model has no vision part.
    """
    if media.vision is None:
        raise LayoutError(
            "a picture was given to a model without a vision part. Use a model that sees, or leave it out"
        )
    return [Segment("image", image_token_count(media.vision))]


def audio_segments(num_samples: int, media: MediaSpec) -> list[Segment]:
    """Lay out one sound.

    Raises:
        LayoutError: The model has no audio part, or the sound is too long for the encoder.
    """
    if media.audio is None:
        raise LayoutError("a sound was given to a model without an audio part. Use a model that hears, or leave it out")
    return [Segment("audio", audio_token_count(num_samples, media.audio))]
