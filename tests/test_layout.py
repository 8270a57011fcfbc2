"""Token counts, against published ones and against real convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from avlm.config.media import (
    AnyresTiling,
    AudioSpec,
    Convolution,
    InternvlTiling,
    MediaSpec,
    Reduction,
    VideoOrder,
    VideoSpec,
    VisionSpec,
)
from avlm.config.model import MlpConnector, PoolConnector, PrefixConnector, Source, VisionPart
from avlm.errors import LayoutError
from avlm.layout import (
    Segment,
    VideoFacts,
    audio_embedding_count,
    audio_segments,
    audio_token_count,
    frame_times_s,
    image_embedding_count,
    image_grids,
    image_segments,
    image_token_count,
    mel_frame_count,
    patch_grid,
    reduced_count,
    reduced_grid,
    resampled_count,
    split_evenly,
    tile_grid,
    unpadded,
    video_segments,
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


# ---------------------------------------------------------------- pictures of other shapes

NEXT = VisionSpec(image_size_px=336, cell_px=14, tiling=AnyresTiling())
INTERN = VisionSpec(image_size_px=448, cell_px=14, tiling=InternvlTiling())
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
"""(height, width)."""


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [
        (336, 336, 1176),
        (224, 224, 1176),
        (480, 640, 2340),
        (640, 480, 2352),
        (448, 448, 2928),
        (672, 672, 2928),
        (1080, 1920, 1948),
    ],
)
def test_any_resolution_takes_as_many_tokens_as_llava_next(height: int, width: int, tokens: int) -> None:
    assert image_token_count(NEXT, (height, width)) == tokens


def slow_anyres(size: tuple[int, int], spec: VisionSpec) -> int:
    """The whole picture's cells, and of a grid of all tiles' cells what transformers leaves, one more in each row."""
    assert isinstance(spec.tiling, AnyresTiling)
    best = select_best_resolution(size, list(spec.tiling.pinpoints))
    cells = [side // spec.image_size_px * (spec.image_size_px // spec.cell_px) for side in best]
    left = unpad_image(torch.empty(1, *cells, device="meta"), size)
    return (spec.image_size_px // spec.cell_px) ** 2 + left.shape[1] * (left.shape[2] + 1)


@settings(deadline=None, max_examples=300)
@given(SIZES, st.sampled_from([(336, 14), (28, 7), (384, 14)]), st.integers(0, 3))
def test_any_resolution_counts_what_transformers_leaves_of_the_grid(
    size: tuple[int, int], eye: tuple[int, int], more: int
) -> None:
    side, cell = eye
    pinpoints = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (4, 1), (2, 3), (1, 1)][: 5 + more]
    tiling = AnyresTiling(pinpoints=tuple((side * a, side * b) for a, b in pinpoints))
    spec = VisionSpec(image_size_px=side, cell_px=cell, tiling=tiling)
    assert image_token_count(spec, size) == slow_anyres(size, spec)
    height, width = select_best_resolution(size, list(tiling.pinpoints))
    assert tile_grid(size, spec) == (height // side, width // side)
    assert image_grids(spec, size) == [(side // cell, side // cell)] * (1 + height // side * width // side)


@settings(deadline=None, max_examples=300)
@given(SIZES, st.integers(1, 12), st.booleans(), st.sampled_from([28, 448]))
def test_tiles_lie_in_the_grid_that_transformers_would_cut(
    size: tuple[int, int], most: int, thumbnail: bool, side: int
) -> None:
    tiling = InternvlTiling(max_tiles=most, thumbnail=thumbnail)
    spec = VisionSpec(image_size_px=side, cell_px=14, tiling=tiling, reduction=Reduction(stack=4))
    columns, rows = get_optimal_tiled_canvas(size, (side, side), 1, most)
    assert tile_grid(size, spec) == (rows, columns)
    tiles = rows * columns + (thumbnail and rows * columns > 1)
    assert len(image_grids(spec, size)) == tiles
    assert image_token_count(spec, size) == tiles * -(-((side // 14) ** 2) // 4)


def test_a_tie_between_grids_is_decided_by_the_pictures_area() -> None:
    """1 x 1, 2 x 2 and 3 x 3 have one aspect ratio: a square picture is cut when it has half of their pixels."""
    assert [tile_grid((side, side), INTERN) for side in (448, 634, 950, 951)] == [(1, 1), (2, 2), (2, 2), (3, 3)]
    assert len(image_grids(INTERN, (448, 448))) == 1  # no thumbnail of what is whole
    assert len(image_grids(INTERN, (951, 951))) == 10
    assert image_token_count(INTERN, (951, 951)) == 10 * 1024


@settings(deadline=None, max_examples=300)
@given(SIZES, st.sampled_from([7, 14, 16]), st.integers(1, 1024))
def test_patches_are_as_many_as_transformers_would_make(size: tuple[int, int], cell: int, most: int) -> None:
    height, width = get_image_size_for_max_num_patches(*size, cell, most)
    rows, columns = patch_grid(size, cell, most)
    assert (rows * cell, columns * cell) == (height, width)
    spec = VisionSpec(image_size_px=cell, cell_px=cell, max_patches=most)
    assert image_grids(spec, size) == [(rows, columns)]
    assert image_token_count(spec, size) == rows * columns


def test_a_frame_of_a_video_is_one_square_whatever_pictures_are() -> None:
    for spec in (NEXT, INTERN, VisionSpec(image_size_px=64, cell_px=16, max_patches=20)):
        side = spec.image_size_px // spec.cell_px
        assert image_grids(spec) == [(side, side)]
        assert image_token_count(spec) == image_embedding_count(spec) == side**2


def test_a_strip_so_thin_that_all_of_its_grid_is_padding_is_seen_whole_alone() -> None:
    assert unpadded((1, 3000), (24, 48)) == (0, 48)
    assert image_token_count(NEXT, (1, 3000)) == slow_anyres((1, 3000), NEXT) == 576


def test_tokens_in_no_grid_cannot_be_put_together_as_one() -> None:
    with pytest.raises(LayoutError, match="lie in no grid"):
        reduced_grid((4, 4), Reduction(stack=2))
    with pytest.raises(ValidationError, match=r"lie in no grid\. Use a connector that keeps rows and columns"):
        VisionSpec(image_size_px=336, cell_px=14, tiling=AnyresTiling(), reduction=Reduction(pool=4))
    for connector in (PoolConnector(), MlpConnector(stack=2), PrefixConnector(stack=1, tokens=2)):
        with pytest.raises(ValidationError, match="lie in no grid"):
            VisionPart(encoder=Source(path="x"), connector=connector, tiling=AnyresTiling())
    with pytest.raises(ValidationError, match="Set one of them, the other to null"):
        VisionPart(encoder=Source(path="x"), tiling=InternvlTiling(), max_patches=4)


# ---------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("spec", "seconds", "tokens"),
    [
        pytest.param(WINDOW, 30, 1500, id="Whisper: 30 s fills n_audio_ctx = 1500 (arXiv:2212.04356)"),
        pytest.param(WINDOW, 1, 1500, id="Whisper as released hears 30 s, however short the sound"),
        pytest.param(WHISPER, 30, 1500, id="the same at its true length"),
        pytest.param(WHISPER, 1, 50, id="Whisper: 20 ms for each embedding"),
        pytest.param(AudioSpec(reduction=Reduction(stack=8)), 30, 188, id="Ultravox: 8 joined, 1500 / 8 up"),
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


def test_any_sound_has_a_token_and_no_sound_has_none() -> None:
    assert audio_token_count(0, WHISPER) == 0
    assert audio_token_count(0, AudioSpec(reduction=Reduction(pool=250))) == 0
    assert audio_token_count(1, WHISPER) == 1
    assert reduced_count(0, Reduction(pool=9)) == 0
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
