"""Token counts, against published ones and against real convolutions."""

from __future__ import annotations

import re
from fractions import Fraction
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

from avlm.config.connectors import (
    ConvConnector,
    MlpConnector,
    PerceiverConnector,
    PixelShuffleConnector,
    PoolConnector,
    PrefixConnector,
    QformerConnector,
    SwigluConnector,
    WindowQformerConnector,
)
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
    Windows,
)
from avlm.config.model import Source, VisionPart
from avlm.errors import LayoutError
from avlm.layout import (
    Segment,
    VideoFacts,
    audio_chunks,
    audio_embedding_count,
    audio_segments,
    audio_token_count,
    audio_token_spans,
    chunk_embedding_count,
    chunk_sample_count,
    clock_texts,
    frame_count,
    frame_times_s,
    image_embedding_count,
    image_grids,
    image_segments,
    image_token_count,
    patch_grid,
    reduced_count,
    reduced_grid,
    resampled_count,
    sound_shares,
    tile_grid,
    unpadded,
    video_segments,
    window_count,
)

WHISPER = AudioSpec()
WINDOW = AudioSpec(window_frames=3000)
TWO = Convolution(kernel=2, stride=2, padding=0)
TEN_BY_FIVE = Convolution(kernel=10, stride=5, padding=0)
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
    assert frame_count(num_samples, WHISPER) == frames
    assert audio_embedding_count(num_samples, WHISPER) == (frames - 1) // 2 + 1


CONVOLUTIONS = st.builds(Convolution, kernel=st.integers(1, 7), stride=st.integers(1, 4), padding=st.integers(0, 3))


@settings(deadline=None)
@given(st.integers(1, 20_000), st.lists(CONVOLUTIONS, max_size=4), st.integers(1, 9))
def test_a_sound_has_as_many_embeddings_as_its_convolutions_make(
    num_samples: int, convolutions: list[Convolution], stack: int
) -> None:
    """What is too short for them is padded to the shortest that is not."""
    spec = AudioSpec(convolutions=tuple(convolutions), reduction=Reduction(stack=stack))

    def made_of(length: int) -> int:
        signal = torch.empty(1, 1, length, device="meta")
        try:
            for conv in convolutions:
                signal = nn.Conv1d(1, 1, conv.kernel, conv.stride, conv.padding, device="meta")(signal)
        except RuntimeError:
            return 0
        return signal.shape[-1]

    length = frame_count(num_samples, spec)
    made = made_of(length)
    assert made > 0
    assert length == num_samples // 160 or made_of(length - 1) == 0 or length == 400 // 160
    assert audio_embedding_count(num_samples, spec) == made
    groups = [range(at, at + stack) for at in range(0, made, stack)]  # a last short one counts
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


# ---------------------------------------------------------------- sound longer than what is heard at once


@pytest.mark.parametrize(
    ("spec", "seconds", "spans"),
    [
        pytest.param(WINDOW, 45, [(1500, 30.0), (1500, 30.0)], id="a window spans its length, whatever is in it"),
        pytest.param(WHISPER, 45, [(1500, 30.0), (750, 15.0)], id="true lengths span the sound"),
        pytest.param(WHISPER, 60, [(1500, 30.0), (1500, 30.0)], id="no chunk is empty"),
        pytest.param(WHISPER, 61, [(1500, 30.0), (1500, 30.0), (50, 1.0)], id="a last one as long as it is"),
        pytest.param(AudioSpec(reduction=Reduction(pool=250)), 45, [(250, 30.0), (250, 15.0)], id="each is pooled"),
        pytest.param(AudioSpec(reduction=Reduction(stack=8)), 45, [(188, 30.0), (94, 15.0)], id="each is stacked"),
        pytest.param(
            AudioSpec(window_frames=3000, heard="sound", convolutions=(Convolution(stride=2), TWO)),
            45,
            [(750, 30.0), (375, 15.0)],
            id="Qwen2-Audio: windows of which the sound alone is heard",
        ),
        pytest.param(WHISPER, 0, [], id="no sound"),
    ],
)
def test_a_long_sound_comes_in_chunks_that_are_never_refused_and_never_cut(
    spec: AudioSpec, seconds: int, spans: list[tuple[int, float]]
) -> None:
    assert audio_token_spans(seconds * 16_000, spec) == spans
    assert audio_token_count(seconds * 16_000, spec) == sum(tokens for tokens, _ in spans)


def test_a_rest_that_makes_no_frame_stays_with_the_chunk_before_it() -> None:
    for spec in (WHISPER, WINDOW):
        assert audio_chunks(480_000 + 159, spec) == [480_159]
        assert audio_token_count(480_000 + 159, spec) == 1500
        assert audio_chunks(480_000 + 160, spec) == [480_000, 160]
        assert audio_chunks(960_000 + 1, spec) == [480_000, 480_001]


SPECS = [
    WHISPER,
    WINDOW,
    AudioSpec(window_frames=50, max_frames=50),
    AudioSpec(window_frames=50, heard="sound", max_frames=50),
    AudioSpec(features="fbank", n_fft=512, frame=400, max_frames=60),
    AudioSpec(features="fbank", n_fft=512, frame=400, stack=2, max_frames=60),
    AudioSpec(features="wave", mel_bins=1, n_fft=1, hop=1, max_frames=9000, convolutions=(TEN_BY_FIVE,)),
    AudioSpec(features="parakeet", n_fft=512, frame=400, max_frames=60),
    AudioSpec(features="gemma3n", n_fft=1024, frame=512, max_frames=60),
    AudioSpec(features="gemma4", n_fft=512, frame=320, max_frames=60),
    AudioSpec(features="clap", sample_rate_hz=48_000, n_fft=1024, hop=480, window_frames=101, embeddings=8),
    AudioSpec(beside=AudioSpec(features="wave", mel_bins=1, n_fft=1, hop=1, max_frames=9000)),
]


@given(st.sampled_from(SPECS), st.integers(1, 200_000))
def test_chunks_hold_every_sample_and_none_is_longer_than_what_is_heard(spec: AudioSpec, num_samples: int) -> None:
    chunks = audio_chunks(num_samples, spec)
    assert sum(chunks) == num_samples
    assert all(chunks)
    assert set(chunks[:-1]) <= {chunk_sample_count(spec)}
    for heard in (spec, spec.beside):
        if heard is not None:
            longest = heard.window_frames or heard.max_frames
            assert max(frame_count(chunk, heard) for chunk in chunks) <= longest
            alone = spec.model_copy(update={"beside": None})
            assert all(chunk_embedding_count(chunk, alone) >= 1 for chunk in chunks)
    assert audio_token_count(num_samples, spec) == sum(chunk_embedding_count(chunk, spec) for chunk in chunks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": "povey"}, "window=povey is set, and features=whisper does not read it. Leave it out; whisper reads "
         "level"),
        ({"features": "wave", "level": "clip"}, "level=clip is set, and features=wave does not read it. Leave it out; "
         "wave reads normalise"),
        ({"heard": "sound"}, "heard=sound speaks of a window, and there is none. Set window_frames, or leave it out"),
        ({"beside": {"beside": {}}}, "beside has a second encoder beside itself, and two hear together at most. "
         "Leave it out"),
    ],
)  # fmt: skip
def test_settings_of_sound_that_nothing_reads_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AudioSpec.model_validate(settings)


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


VITA = VideoSpec(fps=1, min_frames=4, max_frames=16)


@pytest.mark.parametrize(
    ("duration_s", "times"),
    [
        pytest.param(1, [0.125, 0.375, 0.625, 0.875], id="under 4 s: 4 frames"),
        pytest.param(3, [0.375, 1.125, 1.875, 2.625], id="under 4 s: 4 frames, evenly spaced"),
        pytest.param(4, [0.5, 1.5, 2.5, 3.5], id="4 to 16 s: one for each second"),
        pytest.param(9, [i + 0.5 for i in range(9)], id="4 to 16 s: one for each second, here 9"),
        pytest.param(16, [i + 0.5 for i in range(16)], id="4 to 16 s: one for each second, here 16"),
        pytest.param(17, [17 / 16 * (i + 0.5) for i in range(16)], id="longer: 16, evenly spaced"),
        pytest.param(3600, [225 * (i + 0.5) for i in range(16)], id="an hour: 16, evenly spaced"),
    ],
)
def test_vitas_rule_can_be_said(duration_s: int, times: list[float]) -> None:
    """arXiv:2408.05211: 4 frames of less than 4 s, one a second of 4 to 16 s, 16 at even distances of more."""
    assert frame_times_s(duration_s, VITA) == pytest.approx(times)


@given(st.floats(0, 4000), st.integers(1, 64))
def test_a_fixed_count_is_looked_at_whatever_the_length(duration_s: float, count: int) -> None:
    assert len(frame_times_s(duration_s, VideoSpec(min_frames=count, max_frames=count))) == count


def media(
    order: VideoOrder, *, sees: bool = True, audio: AudioSpec | None = WHISPER, stack: int = 1, **video: Any
) -> MediaSpec:
    if audio is not None:
        audio = audio.model_copy(update={"reduction": Reduction(stack=stack)}) if stack > 1 else audio
    spec = VideoSpec(**{"fps": 1, "max_frames": 8, "order": order, **video})
    return MediaSpec(vision=EYES if sees else None, audio=audio, video=spec)


F4 = Segment("video", 4)
"""A frame of 28 pixels in cells of 14."""
ORDERS: list[tuple[VideoOrder, list[Segment]]] = [
    ("interleaved", [F4, Segment("audio", 50), F4, Segment("audio", 50), F4, Segment("audio", 50)]),
    ("video_audio", [F4, F4, F4, Segment("audio", 150)]),
    ("audio_video", [Segment("audio", 150), F4, F4, F4]),
    ("video", [F4, F4, F4]),
    ("audio", [Segment("audio", 150)]),
]
NAMES = [order for order, _ in ORDERS]
LOOKS = [order for order in NAMES if order != "audio"]


@pytest.mark.parametrize(("order", "expected"), ORDERS)
def test_a_video_is_laid_out_in_the_order_asked_for(order: VideoOrder, expected: list[Segment]) -> None:
    assert video_segments(VideoFacts(3.0, 48_000), media(order)) == expected


@pytest.mark.parametrize("order", LOOKS)
def test_a_video_without_sound_or_for_a_model_without_ears_is_its_frames(order: VideoOrder) -> None:
    assert video_segments(VideoFacts(3.0, 0), media(order)) == [F4, F4, F4]
    assert video_segments(VideoFacts(3.0, 32_000), media(order, audio=None)) == [F4, F4, F4]


def test_a_model_without_eyes_can_listen_to_videos() -> None:
    assert video_segments(VideoFacts(3.0, 48_000), media("audio", sees=False)) == [Segment("audio", 150)]


def test_a_frame_whose_share_of_the_sound_is_nothing_stands_alone() -> None:
    assert video_segments(VideoFacts(3.0, 640), media("interleaved", stack=2)) == [F4, Segment("audio", 1), F4, F4]


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.floats(0, 29), st.integers(1, 400_000), st.booleans())
def test_every_order_lays_out_all_frames_and_all_sound_that_it_uses(
    order: VideoOrder, duration_s: float, num_samples: int, clock: bool
) -> None:
    spec = media(order, clock=clock)
    segments = video_segments(VideoFacts(duration_s, num_samples), spec)
    frames, sound = len(frame_times_s(duration_s, spec.video)), audio_token_count(num_samples, WHISPER)
    assert [s.count for s in segments if s.kind == "video"] == ([4] * frames if order != "audio" else [])
    assert sum(s.count for s in segments if s.kind == "audio") == (sound if order != "video" else 0)
    assert all(s.count > 0 for s in segments if s.kind != "text")


# ---------------------------------------------------------------- simultaneous things are neighbours


@pytest.mark.parametrize(
    ("spec", "seconds", "shares"),
    [
        pytest.param(WHISPER, 4, [50, 50, 50, 50], id="true length, 20 ms a token"),
        pytest.param(WINDOW, 4, [50, 50, 50, 1350], id="a window of 30 s: 200 tokens are the clip's, 1300 silence"),
        pytest.param(
            AudioSpec(window_frames=3000, reduction=Reduction(pool=250)),
            4,
            [8, 8, 9, 225],  # ends at 0.96, 1.92 and 3.00 s
            id="pooled to 250 of 120 ms",
        ),
        pytest.param(AudioSpec(reduction=Reduction(pool=4)), 4, [1, 1, 1, 1], id="pooled to one for each second"),
        pytest.param(
            AudioSpec(window_frames=3000, reduction=Reduction(pool=4)), 4, [0, 0, 0, 4], id="one for each 7.5 s"
        ),
        pytest.param(WHISPER, 2, [50, 50, 0, 0], id="sound for the first half alone"),
        pytest.param(WHISPER, 6, [50, 50, 50, 150], id="sound that goes on behind the pictures"),
    ],
)
def test_each_frame_is_followed_by_what_is_heard_in_its_time(spec: AudioSpec, seconds: int, shares: list[int]) -> None:
    """A video of 4 s looked at 4 times."""
    facts = VideoFacts(4.0, seconds * 16_000)
    expected = [s for share in shares for s in (F4, Segment("audio", share)) if s.count]
    assert video_segments(facts, media("interleaved", audio=spec)) == expected


@pytest.mark.parametrize(
    ("spans", "shares"),
    [
        pytest.param([(1500, 30.0), (500, 10.0)], [200] * 10, id="a last chunk of its true length"),
        pytest.param(
            [(1500, 30.0), (1500, 30.0)], [200] * 9 + [1200], id="two windows, the second three quarters full"
        ),
        pytest.param([(25, 20.0), (50, 20.0)], [5, 5, 5, 5, 5, 10, 10, 10, 10, 10], id="chunks of different rates"),
        pytest.param([], [0] * 10, id="no sound"),
    ],
)
def test_chunks_follow_each_other_in_time(spans: list[tuple[int, float]], shares: list[int]) -> None:
    """A video of 40 s looked at every 4 s."""
    assert sound_shares(spans, 40.0, 10) == shares


TICKS = st.integers(1, 2000)
"""Lengths in steps of 20 ms: whole numbers, so that nothing below depends on rounding."""


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 60), TICKS), max_size=4), TICKS, st.integers(1, 32))
def test_time_never_goes_back_between_frames_and_sound(
    chunks: list[tuple[int, int]], duration: int, count: int
) -> None:
    """Frames at the beginning of their stretches, tokens at the end of what they span, each of both exactly once."""
    ends, begin = [], Fraction(0)
    for tokens, ticks in chunks:
        ends += [begin + Fraction(ticks * (j + 1), tokens) for j in range(tokens)]
        begin += ticks
    found = sound_shares([(tokens, ticks / 50) for tokens, ticks in chunks], duration / 50, count)
    assert len(found) == count
    queue, way = list(ends), []
    for i, share in enumerate(found):
        way += [Fraction(duration * i, count), *(queue.pop(0) for _ in range(share))]
        if i < count - 1:  # what is heard behind a frame is over when the next one comes
            assert all(end <= Fraction(duration * (i + 1), count) for end in way)
    assert queue == []
    assert way == sorted(way)


@settings(deadline=None)
@given(st.integers(400, 400_000), st.integers(1, 64), st.integers(1, 9))
def test_where_the_sound_lasts_as_long_as_the_pictures_it_is_split_evenly(
    num_samples: int, count: int, stack: int
) -> None:
    """As before there were times: an encoder of true lengths, with frames at even distances."""
    spec = AudioSpec(reduction=Reduction(stack=stack))
    total = audio_token_count(num_samples, spec)
    found = sound_shares(audio_token_spans(num_samples, spec), num_samples / 16_000, count)
    assert found == [total * (i + 1) // count - total * i // count for i in range(count)]


@settings(deadline=None)
@given(st.floats(0, 29), st.integers(400, 400_000), st.booleans(), st.booleans())
def test_only_the_orders_that_put_a_medium_first_have_a_reverse(
    duration_s: float, num_samples: int, window: bool, clock: bool
) -> None:
    facts, audio = VideoFacts(duration_s, num_samples), WINDOW if window else WHISPER
    found = {order: video_segments(facts, media(order, audio=audio, clock=clock)) for order in NAMES}
    seen, heard = found["video"], found["audio"]
    assert found["video_audio"] == seen + heard
    assert found["audio_video"] == heard + seen
    assert [s for s in found["interleaved"] if s.kind != "audio"] == seen
    assert sum(s.count for s in found["interleaved"] if s.kind == "audio") == heard[0].count


@settings(deadline=None)
@given(st.sampled_from(LOOKS), st.floats(0, 29), st.integers(1, 400_000), st.booleans())
def test_sound_that_is_missing_does_not_move_the_frames(
    order: VideoOrder, duration_s: float, num_samples: int, clock: bool
) -> None:
    spec = media(order, clock=clock)
    silent = video_segments(VideoFacts(duration_s, 0), spec)
    assert [s for s in video_segments(VideoFacts(duration_s, num_samples), spec) if s.kind != "audio"] == silent


# ---------------------------------------------------------------- a clock in words


@pytest.mark.parametrize(
    ("duration_s", "count", "texts"),
    [
        (4.0, 4, ["0.0s", "1.0s", "2.0s", "3.0s"]),
        (2.0, 4, ["0.0s", "0.5s", "1.0s", "1.5s"]),
        (1.0, 3, ["0.0s", "0.3s", "0.7s"]),
        (0.2, 4, ["0.00s", "0.05s", "0.10s", "0.15s"]),
        (3600.0, 2, ["0.0s", "1800.0s"]),
        (0.0, 2, ["0.0s", "0.0s"]),
    ],
)
def test_the_clock_says_when_each_stretch_begins(duration_s: float, count: int, texts: list[str]) -> None:
    assert clock_texts(duration_s, count) == texts


@given(st.floats(1e-2, 1e4), st.integers(1, 500))
def test_no_two_stretches_have_the_same_time(duration_s: float, count: int) -> None:
    texts = clock_texts(duration_s, count)
    times = [float(text.removesuffix("s")) for text in texts]
    assert len(set(texts)) == count
    assert times == sorted(times)
    assert times == pytest.approx([duration_s * i / count for i in range(count)], abs=0.05 + 1e-9)


@pytest.mark.parametrize("order", NAMES)
def test_the_clock_goes_with_every_order_and_moves_no_place(order: VideoOrder) -> None:
    facts = VideoFacts(3.0, 48_000)
    found = video_segments(facts, media(order, clock=True))
    assert [s for s in found if s.kind != "text"] == dict(ORDERS)[order]
    at = [i for i, s in enumerate(found) if s.kind == "text"]
    assert [found[i] for i in at] == [Segment("text", 0, t) for t in ("0.0s", "1.0s", "2.0s")][: len(at)]
    assert [found[i + 1] for i in at] == [s for s in found if s.kind == "video"]


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
        lambda: video_segments(VideoFacts(1.0, 16_000), media("audio", audio=None)),
        "a video was given to a model that only listens to videos (video.order=audio), and it has no audio part. "
        "Use a model that hears, or another video.order",
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
