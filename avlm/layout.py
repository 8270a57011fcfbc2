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
from typing import Literal

from avlm.config.media import AudioSpec, MediaSpec, Reduction, VideoSpec, VisionSpec
from avlm.errors import LayoutError

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
class VideoFacts:
    """What a video's header says: all that its layout depends on."""

    duration_s: float
    num_samples: int
    """Samples of its sound track at the model's rate; 0 without sound."""


def reduced_count(embeddings: int, reduction: Reduction) -> int:
    """Count what a connector makes of so many embeddings (0 stays 0)."""
    if embeddings == 0:
        return 0
    if reduction.pool is not None:
        return reduction.pool
    return math.ceil(embeddings / reduction.stack) * reduction.spread


def image_embedding_count(spec: VisionSpec) -> int:
    """Count the embeddings of one picture or frame, without prefix tokens.

    Source:
        One embedding for each whole cell of a square grid, as in ViT (arXiv:2010.11929): 576 for CLIP-L/14 at 336 px.
    """
    return (spec.image_size_px // spec.cell_px) ** 2


def image_token_count(spec: VisionSpec) -> int:
    """Count the language-model tokens of one picture or frame."""
    return reduced_count(image_embedding_count(spec), spec.reduction)


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


def audio_token_spans(num_samples: int, spec: AudioSpec) -> list[tuple[int, float]]:
    """Tell how many tokens a waveform's chunks become, and how many seconds those span; nothing for no sound.

    A released window spans its whole length, whatever is in it.
    """
    # First version, for one chunk; to be replaced by that of chunks.
    if num_samples == 0:
        return []
    samples = num_samples if spec.window_frames is None else spec.window_frames * spec.hop
    return [(audio_token_count(num_samples, spec), samples / spec.sample_rate_hz)]


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
        LayoutError: The model lacks the sense that it should use, the sound is too long for the encoder, or the model
            only listens to videos and this one has no sound.
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
