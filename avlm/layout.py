"""How many tokens each image, sound or video takes, and where they sit in the text.

The data side reserves places with these counts; the model side fills them with
embeddings. Both ask this module and neither has a formula of its own, so they
cannot disagree. Plain integers only: no torch, nothing to download, quick to test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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
    Windows,
)
from avlm.errors import LayoutError

Size = tuple[int, int]
"""(height, width) in pixels, or (rows, columns) of tiles, embeddings or tokens."""

Kind = Literal["image", "audio", "video"]
"""What a place is reserved for: an image, a stretch of sound, or a frame of a video."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of places of one kind that one media item takes, or words between them."""

    kind: Kind | Literal["text"]
    count: int
    """Places; 0 for words, whose tokens are counted by whoever has the tokenizer."""
    text: str = ""
    """Words that belong to the medium: given to the model, and never learned."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """All that the layout of a picture depends on."""

    size_px: Size
    """Height and width of the picture standing upright."""


@dataclass(frozen=True, slots=True)
class AudioFacts:
    """All that the layout of a sound depends on."""

    num_samples: int
    """At the model's rate, of the part that is asked for."""


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a video's header says: all that its layout depends on."""

    duration_s: float
    num_samples: int
    """Samples of its sound track at the model's rate; 0 without sound."""


Facts = ImageFacts | AudioFacts | VideoFacts


@dataclass(frozen=True, slots=True)
class Load:
    """What the encoders have to do for one medium, or for several together."""

    tiles: int = 0
    """Pictures as the encoder takes them: squares, whole pictures in patches, and frames of videos."""
    patches: int = 0
    """Embeddings that it makes of them, prefix tokens not counted."""
    frames: int = 0
    """Frames of sound features that the first audio encoder takes, what a released window is padded with included."""
    cost: int = 0
    """Work of all encoders, as `work` has it."""

    def __add__(self, other: Load) -> Load:
        return Load(
            self.tiles + other.tiles,
            self.patches + other.patches,
            self.frames + other.frames,
            self.cost + other.cost,
        )


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
        rows, columns = _squares(checked_grid(embeddings, grid), reduction.side)
        embeddings = rows * columns
    if reduction.windows is not None:
        embeddings = window_count(embeddings, reduction.windows)
    tokens = math.ceil(embeddings / reduction.stack) * reduction.spread
    return reduction.prompts + (tokens if reduction.pool is None else reduction.pool)


def _squares(grid: Size, side: int) -> Size:
    """Rows and columns of the squares that a connector joins.

    Source:
        A last short row or column is padded, so 27 by 27 make 14 by 14 (VILA, arXiv:2312.07533).
    """
    return math.ceil(grid[0] / side), math.ceil(grid[1] / side)


def reduced_grid(grid: Size, reduction: Reduction) -> Size:
    """Rows and columns of the tokens that a connector makes of a grid of embeddings.

    Raises:
        LayoutError: Its tokens lie in no grid.
    """
    if not reduction.keeps_grid:
        raise LayoutError(NO_GRID)
    return _squares(grid, reduction.side)


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
#
# A sound is heard in chunks, each by itself: a chunk has samples, its features have frames, the encoder makes
# embeddings of them and the connector tokens.

_PADDED_TO = 128
"""Gemma's front end pads a waveform to a multiple of so many samples before it counts frames."""

_FEWEST_FRAMES = {"parakeet": 2}
"""Fewest frames that features are defined on, where it is not one: a spread needs two."""


def _frames(num_samples: int, spec: AudioSpec) -> int:
    """Frames that the features of a waveform have by themselves.

    Source:
        The feature extractors that were released with the encoders; Kaldi's snip_edges for `fbank`.
    """
    frame, hop = spec.frame or spec.n_fft, spec.hop
    if spec.features == "whisper":
        return math.ceil(num_samples / hop) if spec.heard == "sound" else num_samples // hop
    if spec.features == "fbank":
        return ((num_samples - frame) // hop + 1) // spec.stack
    if spec.features == "gemma3n":
        return (math.ceil(num_samples / _PADDED_TO) * _PADDED_TO - frame - 1) // hop + 1
    if spec.features == "gemma4":
        return (num_samples - frame // 2 - 1) // hop + 1
    if spec.features == "clap":
        return num_samples // hop + 1
    return num_samples // hop


def _samples_of(frames: int, spec: AudioSpec) -> int:
    """The fewest samples that have so many frames by themselves: `_frames` backwards."""
    frame, hop = spec.frame or spec.n_fft, spec.hop
    if spec.features == "whisper" and spec.heard == "sound":
        return (frames - 1) * hop + 1
    if spec.features == "whisper":
        return max(frames * hop, spec.n_fft)
    if spec.features == "fbank":
        return (frames * spec.stack - 1) * hop + frame
    if spec.features == "gemma3n":
        return math.ceil(((frames - 1) * hop + frame + 1) / _PADDED_TO) * _PADDED_TO - _PADDED_TO + 1
    if spec.features == "gemma4":
        return (frames - 1) * hop + frame // 2 + 1
    if spec.features == "clap":
        return max((frames - 1) * hop, 1)
    return frames * hop


def smallest_sample_count(spec: AudioSpec) -> int:
    """Count the samples that a shorter chunk is padded to, so that the encoder's convolutions make something of it."""
    length = 1
    padded = spec.window_frames is not None and spec.heard == "all"  # to more than any convolution needs
    for conv in reversed(() if padded else spec.convolutions):
        length = max((length - 1) * conv.stride + conv.kernel - 2 * conv.padding, 1)
    return _samples_of(max(length, _FEWEST_FRAMES.get(spec.features, 1)), spec)


def chunk_sample_count(spec: AudioSpec) -> int:
    """Count the samples that are heard at once: those of the window, or of ``max_frames``.

    Where two encoders hear together, those of the one that hears less.
    """
    longest = spec.window_frames or spec.max_frames
    samples = max(longest * spec.hop if spec.heard == "sound" else _samples_of(longest + 1, spec) - spec.hop, 1)
    if spec.beside is None:
        return samples
    return min(samples, chunk_sample_count(spec.beside) * spec.sample_rate_hz // spec.beside.sample_rate_hz)


def audio_chunks(num_samples: int, spec: AudioSpec) -> list[int]:
    """Cut a sound into what is heard at once.

    Args:
        num_samples: Length at ``spec.sample_rate_hz``.

    Returns:
        Samples of each chunk, in order; none for no sound. All but the last are as long as can be. A rest that is
        shorter than one hop makes no frame of its own and stays with the chunk before it.
    """
    if num_samples == 0:
        return []
    whole, hop = chunk_sample_count(spec), spec.hop
    if spec.beside is not None:
        hop = min(hop, spec.beside.hop) if spec.sample_rate_hz == spec.beside.sample_rate_hz else 1
    full = max(0, (num_samples - whole - hop) // whole + 1)
    return [*[whole] * full, num_samples - full * whole]


def heard_frame_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the frames of one chunk that make embeddings: its own, or all of the window.

    Args:
        num_samples: Length of the chunk at ``spec.sample_rate_hz``; more than 0.
    """
    if spec.window_frames is not None and spec.heard == "all":
        return spec.window_frames
    frames = _frames(max(num_samples, smallest_sample_count(spec)), spec)
    return frames if spec.window_frames is None else min(frames, spec.window_frames)


def frame_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the frames of the features of one chunk: its own, or those of the window that it is padded to."""
    return spec.window_frames or heard_frame_count(num_samples, spec)


def resampled_count(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Count the samples of a waveform after resampling: its duration at the new rate, to the nearest sample."""
    return round(num_samples * to_hz / from_hz)


def timed_count(seconds: float, rate_hz: int) -> int:
    """Count the samples of a stretch of time: of sound in a container, whatever its own rate."""
    return round(seconds * rate_hz)


def encoded_count(frames: int, spec: AudioSpec) -> int:
    """Count the embeddings that the encoder of a spec makes of so many frames.

    Source:
        Convolution arithmetic; for Whisper ``(frames - 1) // 2 + 1`` (arXiv:2212.04356, section 2.2).
    """
    if spec.embeddings is not None:
        return spec.embeddings
    for conv in spec.convolutions:
        frames = (frames + 2 * conv.padding - conv.kernel) // conv.stride + 1
    return max(frames, 0) * spec.rows


def chunk_embedding_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the embeddings of one chunk; where two encoders hear it, those of the one that makes more."""
    count = encoded_count(heard_frame_count(num_samples, spec), spec)
    if spec.beside is None:
        return count
    resampled = resampled_count(num_samples, spec.sample_rate_hz, spec.beside.sample_rate_hz)
    return max(count, chunk_embedding_count(resampled, spec.beside))


def audio_embedding_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the embeddings of one waveform, over all its chunks; 0 for no sound."""
    return sum(chunk_embedding_count(chunk, spec) for chunk in audio_chunks(num_samples, spec))


def audio_token_count(num_samples: int, spec: AudioSpec) -> int:
    """Count the language-model tokens of one waveform, over all its chunks; at least 1 for any sound, 0 for none."""
    return sum(tokens for tokens, _ in audio_token_spans(num_samples, spec))


def audio_token_spans(num_samples: int, spec: AudioSpec) -> list[tuple[int, float]]:
    """How many tokens each chunk of a waveform takes, and the seconds that they span.

    A released window spans its whole length, whatever is in it; the tokens of other chunks span the chunk.
    """
    window = chunk_sample_count(spec) if spec.window_frames is not None and spec.heard == "all" else 0
    return [
        (reduced_count(chunk_embedding_count(chunk, spec), spec.reduction), max(chunk, window) / spec.sample_rate_hz)
        for chunk in audio_chunks(num_samples, spec)
    ]


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
        frame is followed by the sound of its stretch of time, and the last one by all that is left.

    Raises:
        LayoutError: The model lacks the sense that it should use, or it only listens to videos and this one has no
            sound.
    """
    order = media.video.order
    _check_senses(facts, media)
    frames = [] if order == "audio" else _frame_segments(facts.duration_s, media)
    spans: list[tuple[int, float]] = []
    if media.audio is not None and order != "video":
        spans = audio_token_spans(facts.num_samples, media.audio)
    if order == "interleaved":
        shares = sound_shares(spans, facts.duration_s, len(frames))
        return [s for frame, share in zip(frames, shares, strict=True) for s in (*frame, *_heard(share))]
    seen = [s for frame in frames for s in frame]
    heard = _heard(sum(tokens for tokens, _ in spans))
    return heard + seen if order == "audio_video" else seen + heard


def _check_senses(facts: VideoFacts, media: MediaSpec) -> None:
    if media.video.order != "audio":
        if media.vision is None:
            raise LayoutError(
                "a video was given to a model without a vision part. Use a model that sees, or the sound alone"
            )
    elif media.audio is None:
        raise LayoutError(
            "a video was given to a model that only listens to videos (video.order=audio), and it has no audio part. "
            "Use a model that hears, or another video.order"
        )
    elif facts.num_samples == 0:
        raise LayoutError(
            "a video without sound was given to a model that only listens to videos (video.order=audio). "
            "Leave it out, or use a model that looks at videos"
        )


def _frame_segments(duration_s: float, media: MediaSpec) -> list[list[Segment]]:
    """Each frame, behind its time if there is a clock."""
    assert media.vision is not None
    frame = Segment("video", image_token_count(media.vision))
    count = len(frame_times_s(duration_s, media.video))
    if not media.video.clock:
        return [[frame]] * count
    return [[Segment("text", 0, text), frame] for text in clock_texts(duration_s, count)]


def _heard(tokens: int) -> list[Segment]:
    return [Segment("audio", tokens)] if tokens else []


def clock_texts(duration_s: float, count: int) -> list[str]:
    """Write down when each of the equal stretches of a video begins: ``0.0s``, ``0.5s``, ``1.0s`` and so on.

    Tenths of a second, or as many digits more as it takes to tell two stretches apart.
    """
    stretch = duration_s / count
    digits = max(1, math.ceil(-math.log10(stretch))) if stretch > 0 else 1
    return [f"{stretch * i:.{digits}f}s" for i in range(count)]


def sound_shares(spans: Sequence[tuple[int, float]], duration_s: float, count: int) -> list[int]:
    """Count the tokens of sound that belong to each of the equal stretches of a video.

    A token belongs to the stretch in which the time that it spans is over: what a model reads behind a frame and before
    the next one has been heard by then. So simultaneous things are neighbours whatever the encoder: tokens of a window
    that are beyond the end of the sound, and all else that ends later than the video, belong to the last stretch.

    Args:
        spans: Tokens and seconds of each chunk of the sound, one behind the other, as `audio_token_spans` has them.
        duration_s: Length of the video.
        count: Stretches, one for each frame.

    Returns:
        As many counts as there are stretches; their sum is that of all tokens.
    """
    borders = [duration_s * i / count for i in range(1, count)]
    over = [0] * len(borders)
    begin = 0.0
    for tokens, seconds in spans:
        for i, border in enumerate(borders):
            # A millionth of a token makes up for the rounding where a token ends on the border.
            over[i] += min(max(math.floor((border - begin) / seconds * tokens + 1e-6), 0), tokens)
        begin += seconds
    return [b - a for a, b in itertools.pairwise([0, *over, sum(tokens for tokens, _ in spans)])]


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
        LayoutError: The model has no audio part.
    """
    if media.audio is None:
        raise LayoutError("a sound was given to a model without an audio part. Use a model that hears, or leave it out")
    return [Segment("audio", audio_token_count(num_samples, media.audio))]


# ---------------------------------------------------------------- any medium


def segments(facts: Facts, media: MediaSpec) -> list[Segment]:
    """Lay out one medium, whatever it is.

    Raises:
        LayoutError: The model lacks the sense for it.
    """
    if isinstance(facts, ImageFacts):
        return image_segments(media, facts.size_px)
    if isinstance(facts, AudioFacts):
        return audio_segments(facts.num_samples, media)
    return video_segments(facts, media)


def load(facts: Facts, media: MediaSpec) -> Load:
    """Count what the encoders have to do for one medium that the model has the sense for."""
    if isinstance(facts, ImageFacts):
        assert media.vision is not None
        return _seen(image_grids(media.vision, facts.size_px))
    if isinstance(facts, AudioFacts):
        return _listened(facts.num_samples, media.audio)
    order, found = media.video.order, Load()
    if order != "audio":
        assert media.vision is not None
        found = _seen([square_grid(media.vision)] * len(frame_times_s(facts.duration_s, media.video)))
    return found if order == "video" else found + _listened(facts.num_samples, media.audio)


def work(positions: int) -> int:
    """What an encoder has to do for a sequence, in the work of its matrices on one position.

    Source:
        A layer of width d costs 24 d^2 operations a position and 4 d more for each that it attends to, so n positions
        are n + n^2 / 6d of the former. Widths are not known here; most encoders have about 1024.
    """
    return positions + positions * positions // (6 * _WIDTH)


_WIDTH = 1024


def _seen(grids: Sequence[Size]) -> Load:
    sizes = [rows * columns for rows, columns in grids]
    return Load(tiles=len(grids), patches=sum(sizes), cost=sum(map(work, sizes)))


def _listened(num_samples: int, spec: AudioSpec | None) -> Load:
    if spec is None:
        return Load()
    chunks = audio_chunks(num_samples, spec)
    return Load(
        frames=sum(frame_count(chunk, spec) for chunk in chunks), cost=sum(_chunk_work(chunk, spec) for chunk in chunks)
    )


def _chunk_work(num_samples: int, spec: AudioSpec) -> int:
    """Work of hearing one chunk, by two encoders where there are two."""
    own = work(encoded_count(frame_count(num_samples, spec), spec))
    if spec.beside is None:
        return own
    return own + _chunk_work(resampled_count(num_samples, spec.sample_rate_hz, spec.beside.sample_rate_hz), spec.beside)
