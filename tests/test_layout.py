"""Token counts, against published ones and against real convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from avlm.config.connectors import (
    ConvConnector,
    PerceiverConnector,
    PixelShuffleConnector,
    PoolConnector,
    PrefixConnector,
    QformerConnector,
    SwigluConnector,
    WindowQformerConnector,
)
from avlm.config.media import AudioSpec, Convolution, MediaSpec, Reduction, VideoOrder, VideoSpec, VisionSpec, Windows
from avlm.errors import LayoutError
from avlm.layout import (
    Segment,
    VideoFacts,
    audio_embedding_count,
    audio_segments,
    audio_token_count,
    frame_times_s,
    image_embedding_count,
    image_segments,
    image_token_count,
    mel_frame_count,
    reduced_count,
    reduced_grid,
    resampled_count,
    split_evenly,
    video_segments,
    window_count,
)

WHISPER = AudioSpec()
WINDOW = AudioSpec(window_frames=3000)
EYES = VisionSpec(image_size_px=28, cell_px=14)


@pytest.mark.parametrize(
    ("size_px", "patch_px", "tokens"),
    [
        pytest.param(336, 14, 576, id="CLIP-L/14-336 in LLaVA-1.5 (arXiv:2310.03744)"),
        pytest.param(384, 14, 729, id="SigLIP so400m/14-384 (arXiv:2303.15343)"),
        pytest.param(224, 16, 196, id="ViT-B/16 (arXiv:2010.11929)"),
        pytest.param(448, 14, 1024, id="InternViT-300M-448 (arXiv:2404.16821), before pixel shuffle"),
    ],
)
def test_pictures_take_as_many_tokens_as_published(size_px: int, patch_px: int, tokens: int) -> None:
    assert image_token_count(VisionSpec(image_size_px=size_px, cell_px=patch_px)) == tokens


def test_a_prefix_is_as_long_as_published() -> None:
    """Frozen (arXiv:2106.13884): a picture's one vector becomes two tokens."""
    frozen = VisionSpec(image_size_px=224, cell_px=224, reduction=PrefixConnector(stack=1, tokens=2).reduction())
    assert image_token_count(frozen) == 2


@settings(deadline=None)
@given(st.integers(1, 32), st.integers(0, 100))
def test_a_picture_has_as_many_embeddings_as_a_patch_convolution_makes(cell: int, more: int) -> None:
    size = cell + more
    made = nn.Conv2d(1, 1, cell, cell, device="meta")(torch.empty(1, 1, size, size, device="meta"))
    assert image_embedding_count(VisionSpec(image_size_px=size, cell_px=cell)) == made[0, 0].numel()


@pytest.mark.parametrize(
    ("spec", "seconds", "tokens"),
    [
        pytest.param(WINDOW, 30, 1500, id="Whisper: 30 s fills n_audio_ctx = 1500 (arXiv:2212.04356)"),
        pytest.param(WINDOW, 1, 1500, id="Whisper as released hears 30 s, however short the sound"),
        pytest.param(WHISPER, 30, 1500, id="the same at its true length"),
        pytest.param(WHISPER, 1, 50, id="Whisper: 20 ms for each embedding"),
        pytest.param(AudioSpec(reduction=Reduction(stack=8)), 30, 188, id="Ultravox: 8 joined, 1500 / 8 up"),
        pytest.param(AudioSpec(reduction=SwigluConnector().reduction()), 30, 188, id="and its own connector"),
        pytest.param(AudioSpec(reduction=WindowQformerConnector().reduction()), 30, 88, id="SALMONN: 88 in 30 s"),
        pytest.param(AudioSpec(reduction=PoolConnector().reduction()), 30, 250, id="Whisper to Mistral: 250 in 30 s"),
        pytest.param(AudioSpec(reduction=QformerConnector().reduction()), 30, 32, id="BLIP-2: 32 queries"),
        pytest.param(AudioSpec(reduction=PerceiverConnector().reduction()), 30, 64, id="Flamingo: 64 queries"),
        pytest.param(AudioSpec(reduction=Reduction(pool=250)), 30, 250, id="NeMo's audio model pools to 250"),
        pytest.param(AudioSpec(reduction=Reduction(pool=250)), 1, 250, id="and makes 250 of a short sound too"),
    ],
)
def test_sounds_take_as_many_tokens_as_published(spec: AudioSpec, seconds: int, tokens: int) -> None:
    assert audio_token_count(seconds * 16_000, spec) == tokens


@given(st.integers(400, 480_000))
def test_whispers_count_is_the_formula_of_its_paper(num_samples: int) -> None:
    frames = num_samples // 160
    assert mel_frame_count(num_samples, WHISPER) == frames
    assert audio_embedding_count(num_samples, WHISPER) == (frames - 1) // 2 + 1


CONVOLUTIONS = st.builds(Convolution, kernel=st.integers(1, 7), stride=st.integers(1, 4), padding=st.integers(0, 3))


@settings(deadline=None)
@given(st.integers(1, 20_000), st.lists(CONVOLUTIONS, max_size=4), st.integers(1, 9))
def test_a_sound_has_as_many_embeddings_as_its_convolutions_make(
    num_samples: int, convolutions: list[Convolution], stack: int
) -> None:
    spec = AudioSpec(convolutions=tuple(convolutions), reduction=Reduction(stack=stack))
    length = mel_frame_count(num_samples, spec)
    try:
        signal = torch.empty(1, 1, length, device="meta")
        for conv in convolutions:
            signal = nn.Conv1d(1, 1, conv.kernel, conv.stride, conv.padding, device="meta")(signal)
    except RuntimeError:
        with pytest.raises(LayoutError, match="is too short for the audio encoder's convolutions"):
            audio_embedding_count(num_samples, spec)
        return
    assert audio_embedding_count(num_samples, spec) == signal.shape[-1]
    groups = [range(at, at + stack) for at in range(0, signal.shape[-1], stack)]  # a last short one counts
    assert audio_token_count(num_samples, spec) == len(groups)


@given(st.integers(1, 2000), st.integers(1, 40), st.integers(1, 20))
def test_each_group_becomes_as_many_tokens_as_it_is_spread_over(embeddings: int, stack: int, spread: int) -> None:
    tokens = [token for _ in range(0, embeddings, stack) for token in range(spread)]  # a last short group counts
    assert reduced_count(embeddings, Reduction(stack=stack, spread=spread)) == len(tokens)


@pytest.mark.parametrize(("seconds", "tokens"), [(1, 12), (2, 24), (10, 124), (30, 374), (60, 749)])
def test_vitas_convolution_makes_as_many_tokens_as_its_formula(seconds: int, tokens: int) -> None:
    """VITA's mel frames, its encoder's two unpadded convolutions, then its connector's."""
    frames = (seconds * 16_000 - 400) // 160 + 1
    embeddings = ((frames - 1) // 2 - 1) // 2
    assert reduced_count(embeddings, ConvConnector().reduction()) == (embeddings - 1) // 2 + 1 == tokens


@pytest.mark.parametrize(
    ("side_px", "cell_px", "tokens"),
    [
        pytest.param(448, 14, 256, id="InternViT-300M-448 in InternVL and VITA: 1024 to 256"),
        pytest.param(384, 14, 196, id="SigLIP so400m/14-384 in VILA: 27 by 27 to 14 by 14, not 729 // 4 = 182"),
        pytest.param(336, 14, 144, id="CLIP-L/14-336: 24 by 24 to 12 by 12"),
    ],
)
def test_squares_make_as_many_tokens_as_published(side_px: int, cell_px: int, tokens: int) -> None:
    spec = VisionSpec(image_size_px=side_px, cell_px=cell_px, reduction=PixelShuffleConnector().reduction())
    assert image_token_count(spec) == tokens


def test_every_length_makes_as_many_tokens_as_counted_one_by_one() -> None:
    """Every length to twice Whisper's window, against lists made element by element."""
    for length in range(1, 3101):
        for stack in (1, 2, 3, 5, 8, 17):
            groups = len(range(0, length, stack))  # a last short one counts
            assert reduced_count(length, Reduction(stack=stack)) == groups
            assert reduced_count(length, Reduction(stack=stack, spread=3, prompts=25)) == 25 + 3 * groups
            assert reduced_count(length, Reduction(pool=64, prompts=1)) == 65
        for size, stride in ((17, 17), (17, 9), (15, 15), (1, 1), (50, 25)):
            windows = len(range(0, length - size + 1, stride)) or 1  # full ones; a short item is one
            made = Reduction(windows=Windows(size=size, stride=stride), spread=2, prompts=4)
            assert reduced_count(length, made) == 4 + 2 * windows


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
def test_every_grid_makes_as_many_tokens_as_squares_cover_it(side: int) -> None:
    for rows in range(1, 31):
        for columns in range(1, 31):
            squares = {(row // side, column // side) for row in range(rows) for column in range(columns)}
            assert reduced_count(rows * columns, Reduction(side=side), (rows, columns)) == len(squares)
            assert reduced_grid((rows, columns), Reduction(side=side)) == (max(squares)[0] + 1, max(squares)[1] + 1)


@given(st.integers(1, 3100), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_an_item_as_far_as_full_ones_reach(embeddings: int, size: int, stride: int) -> None:
    windows = Windows(size=size, stride=min(stride, size))
    count = window_count(embeddings, windows)
    end = (count - 1) * windows.stride + windows.size
    assert count == 1 or end <= embeddings
    assert embeddings < end + windows.stride  # another one would not be full


def test_tokens_that_lie_in_no_grid_are_told_from_those_that_do() -> None:
    assert Reduction().keeps_grid and Reduction(side=2).keeps_grid
    others = (Reduction(stack=2), Reduction(spread=2), Reduction(pool=4), Reduction(prompts=1))
    assert not any(other.keeps_grid for other in others)
    assert not Reduction(windows=Windows(size=2, stride=2)).keeps_grid


def test_any_sound_has_a_token_and_no_sound_has_none() -> None:
    assert audio_token_count(0, WHISPER) == 0
    assert audio_token_count(0, AudioSpec(reduction=Reduction(pool=250))) == 0
    assert audio_token_count(1, WHISPER) == 1
    assert reduced_count(0, Reduction(pool=9)) == 0
    assert reduced_count(0, Reduction(prompts=25, windows=Windows(size=2, stride=1))) == 0
    assert reduced_count(0, Reduction(side=2), (0, 0)) == 0
    assert reduced_count(0, Reduction(stack=2, spread=9)) == 0
    assert reduced_count(1, Reduction(stack=9)) == 1


def test_a_sound_is_refused_from_the_first_frame_that_the_encoder_cannot_hear() -> None:
    for spec in (WHISPER, WINDOW):
        assert audio_token_count(480_000 + 159, spec) == 1500
        with pytest.raises(LayoutError) as error:
            audio_token_count(480_000 + 160, spec)
        assert str(error.value) == (
            "a sound of 30.01 s has 3001 mel frames, and the audio encoder hears at most 3000 (30 s). "
            "Cut the sound into shorter clips"
        )


@given(st.integers(0, 10**6), st.integers(1, 500))
def test_an_even_split_loses_nothing_and_is_even(total: int, shares: int) -> None:
    found = split_evenly(total, shares)
    assert len(found) == shares
    assert sum(found) == total
    assert max(found) - min(found) <= 1


@given(st.integers(1, 10**7), st.integers(1, 192_000), st.integers(1, 192_000))
def test_a_resampled_sound_lasts_as_long_within_half_a_sample(num_samples: int, from_hz: int, to_hz: int) -> None:
    count = resampled_count(num_samples, from_hz, to_hz)
    assert abs(count / to_hz - num_samples / from_hz) <= 0.5 / to_hz * (1 + 1e-9)


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("duration_s", "spec", "times"),
    [
        (4.0, VideoSpec(fps=1), [0.5, 1.5, 2.5, 3.5]),
        (2.0, VideoSpec(fps=2), [0.25, 0.75, 1.25, 1.75]),
        (100.0, VideoSpec(fps=1, max_frames=4), [12.5, 37.5, 62.5, 87.5]),
        (1.0, VideoSpec(fps=1, min_frames=2), [0.25, 0.75]),
        (0.0, VideoSpec(fps=1), [0.0]),
        (0.1, VideoSpec(fps=1), [0.05]),
    ],
)
def test_frames_are_taken_from_the_middles_of_equal_shares(
    duration_s: float, spec: VideoSpec, times: list[float]
) -> None:
    assert frame_times_s(duration_s, spec) == pytest.approx(times)


@given(st.just(0.0) | st.floats(1e-3, 4000), st.floats(0.1, 30), st.integers(1, 10), st.integers(0, 40))
def test_frame_times_ascend_within_the_video_and_within_limits(
    duration_s: float, fps: float, least: int, more: int
) -> None:
    spec = VideoSpec(fps=fps, min_frames=least, max_frames=least + more)
    times = frame_times_s(duration_s, spec)
    assert least <= len(times) <= least + more
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < duration_s or duration_s == 0


def media(order: VideoOrder, *, hears: bool = True, stack: int = 1) -> MediaSpec:
    audio = AudioSpec(reduction=Reduction(stack=stack)) if hears else None
    return MediaSpec(vision=EYES, audio=audio, video=VideoSpec(fps=1, max_frames=8, order=order))


F4 = Segment("video", 4)
"""A frame of 28 pixels in cells of 14."""
ORDERS: list[tuple[VideoOrder, list[Segment]]] = [
    ("interleaved", [F4, Segment("audio", 33), F4, Segment("audio", 33), F4, Segment("audio", 34)]),
    ("video_audio", [F4, F4, F4, Segment("audio", 100)]),
    ("audio_video", [Segment("audio", 100), F4, F4, F4]),
    ("video", [F4, F4, F4]),
    ("audio", [Segment("audio", 100)]),
]


@pytest.mark.parametrize(("order", "expected"), ORDERS)
def test_a_video_is_laid_out_in_the_order_asked_for(order: VideoOrder, expected: list[Segment]) -> None:
    assert video_segments(VideoFacts(3.0, 32_000), media(order)) == expected


@pytest.mark.parametrize("order", ["interleaved", "video_audio", "audio_video", "video"])
def test_a_video_without_sound_or_for_a_model_without_ears_is_its_frames(order: VideoOrder) -> None:
    assert video_segments(VideoFacts(3.0, 0), media(order)) == [F4, F4, F4]
    assert video_segments(VideoFacts(3.0, 32_000), media(order, hears=False)) == [F4, F4, F4]


def test_a_frame_whose_share_of_the_sound_is_nothing_stands_alone() -> None:
    assert video_segments(VideoFacts(3.0, 640), media("interleaved", stack=2)) == [F4, F4, F4, Segment("audio", 1)]


@settings(deadline=None)
@given(st.sampled_from([order for order, _ in ORDERS]), st.floats(0, 29), st.integers(1, 400_000))
def test_every_order_lays_out_all_frames_and_all_sound_that_it_uses(
    order: VideoOrder, duration_s: float, num_samples: int
) -> None:
    spec = media(order)
    segments = video_segments(VideoFacts(duration_s, num_samples), spec)
    frames, sound = len(frame_times_s(duration_s, spec.video)), audio_token_count(num_samples, WHISPER)
    assert [s.count for s in segments if s.kind == "video"] == ([4] * frames if order != "audio" else [])
    assert sum(s.count for s in segments if s.kind == "audio") == (sound if order != "video" else 0)
    assert all(s.count > 0 for s in segments)


REFUSED: list[tuple[Any, str]] = [
    (
        lambda: image_segments(MediaSpec(audio=WHISPER)),
        "a picture was given to a model without a vision part. Use a model that sees, or leave it out",
    ),
    (
        lambda: audio_segments(16_000, MediaSpec(vision=EYES)),
        "a sound was given to a model without an audio part. Use a model that hears, or leave it out",
    ),
    (
        lambda: video_segments(VideoFacts(1.0, 0), MediaSpec(audio=WHISPER)),
        "a video was given to a model without a vision part. Use a model that sees, or the sound alone",
    ),
    (
        lambda: video_segments(VideoFacts(1.0, 0), media("audio")),
        "a video without sound was given to a model that only listens to videos (video.order=audio). "
        "Leave it out, or use a model that looks at videos",
    ),
]


@pytest.mark.parametrize(("lay_out", "message"), REFUSED)
def test_a_medium_that_the_model_has_no_sense_for_is_refused(lay_out: Any, message: str) -> None:
    with pytest.raises(LayoutError) as error:
        lay_out()
    assert str(error.value) == message


def test_a_sound_that_is_not_listened_to_may_be_of_any_length() -> None:
    assert video_segments(VideoFacts(3.0, 10**9), media("video")) == [F4, F4, F4]
