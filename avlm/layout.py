"""How many tokens each image, sound or video takes, and where they sit in the text.

The data side reserves places with these counts; the model side fills them with
embeddings. Both ask this module and neither has a formula of its own, so they
cannot disagree. Plain integers only: no torch, nothing to download, quick to test.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from avlm.config.media import (
    NO_GRID,
    AnyresTiling,
    AudioSpec,
    InternvlTiling,
    MediaSpec,
    Reduction,
    VideoSpec,
    VisionSpec,
)
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
    """Count what a connector makes of so many embeddings (0 stays 0).

    Args:
        grid: Rows and columns of them, where they are a picture's.
    """
    if embeddings == 0:
        return 0
    if reduction.pool is not None:
        return reduction.pool
    return math.ceil(embeddings / reduction.stack) * reduction.spread


def reduced_grid(grid: Size, reduction: Reduction) -> Size:
    """Rows and columns of the tokens that a connector makes of a grid of embeddings.

    Raises:
        LayoutError: Its tokens lie in no grid.
    """
    if not reduction.keeps_grid:
        raise LayoutError(NO_GRID)
    return grid


def image_embedding_count(spec: VisionSpec) -> int:
    """Count the embeddings of one square: a picture that is not cut, a tile, or a frame. Prefix tokens are not counted.

    Source:
        One embedding for each whole cell of a square grid, as in ViT (arXiv:2010.11929): 576 for CLIP-L/14 at 336 px.
    """
    rows, columns = square_grid(spec)
    return rows * columns


def square_grid(spec: VisionSpec) -> Size:
    """Rows and columns of the embeddings of one square."""
    side = spec.image_size_px // spec.cell_px
    return side, side


def image_grids(spec: VisionSpec, size_px: Size | None = None) -> list[Size]:
    """Rows and columns of the embeddings of everything that the encoder sees of one picture, in order.

    Args:
        size_px: Height and width of the picture as decoded; None is one square, as a frame of a video is.

    Returns:
        A grid for each tile: all tiles row by row, then the thumbnail (InternVL); the whole picture, then its tiles
        (any-resolution); else one grid.
    """
    if size_px is None or not spec.sized:
        return [square_grid(spec)]
    if spec.max_patches is not None:
        return [patch_grid(size_px, spec.cell_px, spec.max_patches)]
    rows, columns = tile_grid(size_px, spec)
    tiles = rows * columns
    whole = spec.newline or (isinstance(spec.tiling, InternvlTiling) and spec.tiling.thumbnail and tiles > 1)
    return [square_grid(spec)] * (tiles + whole)


def image_token_count(spec: VisionSpec, size_px: Size | None = None) -> int:
    """Count the language-model tokens of one picture, or of one frame.

    Args:
        size_px: Height and width of the picture as decoded; None is one square, as a frame of a video is.

    Source:
        The any-resolution count is that of LLaVA-NeXT in transformers: 576 for the whole picture, and each row of the
        grid without its padding one more than its embeddings.
    """
    if size_px is not None and spec.newline:
        rows, columns = unpadded(size_px, token_grid(size_px, spec))
        return reduced_count(image_embedding_count(spec), spec.reduction, square_grid(spec)) + rows * (columns + 1)
    return sum(reduced_count(r * c, spec.reduction, (r, c)) for r, c in image_grids(spec, size_px))


# ---------------------------------------------------------------- pictures of other shapes


def tile_grid(size_px: Size, spec: VisionSpec) -> Size:
    """Rows and columns of the tiles that a picture is cut into; the whole picture beside them is not counted."""
    if isinstance(spec.tiling, InternvlTiling):
        return _nearest_grid(size_px, spec.image_size_px, spec.tiling.max_tiles)
    if isinstance(spec.tiling, AnyresTiling):
        height, width = best_resolution(size_px, spec.tiling.pinpoints)
        return height // spec.image_size_px, width // spec.image_size_px
    return 1, 1


@lru_cache(maxsize=4096)
def _nearest_grid(size_px: Size, side: int, most: int) -> Size:
    """The grid whose aspect ratio is nearest to a picture's. Of equal ones the larger, as long as the picture has more
    than half of its pixels.

    Source:
        InternVL 1.5 (arXiv:2404.16821, section 3.3), in the order of transformers' processor, in floats as there: they
        decide what is equal.
    """
    height, width = size_px
    grids = [(rows, columns) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    best, nearest = (1, 1), math.inf
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        away = abs(width / height - columns / rows)
        if away < nearest or (away == nearest and 2 * height * width > side * side * rows * columns):
            best, nearest = (rows, columns), away
    return best


def best_resolution(size_px: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The resolution that keeps most of a picture's pixels, and among those the one with the least padding.

    Source:
        LLaVA-NeXT in transformers, with its floats: a picture that fits exactly may lose a line to rounding, and that
        decides between resolutions.
    """
    height, width = size_px

    def merit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def token_grid(size_px: Size, spec: VisionSpec) -> Size:
    """Rows and columns of the tokens of all tiles of a picture put together, padding included."""
    tiles, tokens = tile_grid(size_px, spec), reduced_grid(square_grid(spec), spec.reduction)
    return tiles[0] * tokens[0], tiles[1] * tokens[1]


def unpadded(size_px: Size, grid: Size) -> Size:
    """What remains of a grid when the padding that gave the picture its aspect ratio is taken off both sides.

    Source:
        LLaVA-NeXT: as much from the one side as from the other, so of an odd padding one line stays.
    """
    height, width = size_px
    rows, columns = grid
    if width * rows > height * columns:
        return rows - 2 * ((rows - height * columns // width) // 2), columns
    return rows, columns - 2 * ((columns - width * rows // height) // 2)


@lru_cache(maxsize=4096)
def patch_grid(size_px: Size, cell_px: int, max_patches: int) -> Size:
    """Rows and columns of the patches of a picture that keeps its aspect ratio: as many as fit, at least one each.

    Source:
        SigLIP 2's NaFlex (arXiv:2502.14786, section 2.4.2) by the rule of transformers' processor: the scale is halved
        into until it is known to 1e-5, and sides are rounded up to whole patches.
    """

    def at(scale: float) -> Size:
        rows, columns = (max(1, math.ceil(side * scale / cell_px)) for side in size_px)
        return rows, columns

    near = 1e-5
    fits, too_much = near / 10, 100.0
    while too_much - fits >= near:
        middle = (fits + too_much) / 2
        rows, columns = at(middle)
        if rows * columns <= max_patches:
            fits = middle
        else:
            too_much = middle
    return at(fits)


# ---------------------------------------------------------------- sound


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


def image_segments(media: MediaSpec, size_px: Size | None = None) -> list[Segment]:
    """Lay out one picture.

    Args:
        size_px: Its height and width as decoded; may be left out where its layout does not depend on them.

    Raises:
        LayoutError: The model has no vision part.
    """
    if media.vision is None:
        raise LayoutError(
            "a picture was given to a model without a vision part. Use a model that sees, or leave it out"
        )
    return [Segment("image", image_token_count(media.vision, size_px))]


def audio_segments(num_samples: int, media: MediaSpec) -> list[Segment]:
    """Lay out one sound.

    Raises:
        LayoutError: The model has no audio part, or the sound is too long for the encoder.
    """
    if media.audio is None:
        raise LayoutError("a sound was given to a model without an audio part. Use a model that hears, or leave it out")
    return [Segment("audio", audio_token_count(num_samples, media.audio))]
