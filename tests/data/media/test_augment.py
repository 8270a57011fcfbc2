"""Changes to pictures and sounds: pure, of the same form, and nothing when they are off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.stage import Augment
from avlm.data.media.augment import augment_image, augment_mel

SHARE = st.sampled_from([0.0, 0.05, 0.3, 0.5])
IMAGE = st.builds(Augment, shift=SHARE, flip=st.booleans(), jitter=SHARE, erase=st.sampled_from([0.0, 0.2, 1.0]))
SOUND = st.builds(
    Augment,
    pitch=SHARE,
    tempo=SHARE,
    squeeze=st.sampled_from([0.0, 0.4, 0.99]),
    tilt=st.sampled_from([0.0, 0.2, 3.0]),
    noise=st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    mask_bins=st.sampled_from([0, 3, 500]),
    mask_frames=st.sampled_from([0.0, 0.3, 0.99]),
)
SEEDS = st.integers(0, 2**32)


def pixels(height: int, width: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def mel(bins: int, frames: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1.5, 0.8, (bins, frames)).astype(np.float32))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40), st.integers(1, 40), IMAGE, SEEDS)
def test_a_picture_stays_a_picture_of_its_size(height: int, width: int, how: Augment, seed: int) -> None:
    before = pixels(height, width, seed)
    kept = before.clone()
    found = augment_image(before, how, np.random.default_rng(seed))
    assert (found.shape, found.dtype) == (before.shape, torch.uint8)
    assert torch.equal(before, kept)  # what was given, and may be remembered, is as it was
    assert torch.equal(found, augment_image(before, how, np.random.default_rng(seed)))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([2, 3, 40, 80, 128]), st.integers(1, 5) | st.integers(1, 300), SOUND, SEEDS)
def test_a_sound_stays_a_sound_of_its_length(bins: int, frames: int, how: Augment, seed: int) -> None:
    before = mel(bins, frames, seed)
    kept = before.clone()
    found = augment_mel(before, how, np.random.default_rng(seed))
    assert (found.shape, found.dtype) == (before.shape, torch.float32)
    assert torch.isfinite(found).all()
    assert torch.equal(before, kept)
    assert torch.equal(found, augment_mel(before, how, np.random.default_rng(seed)))


@pytest.mark.parametrize("seed", range(5))
def test_off_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert torch.equal(augment_image(pixels(9, 7, seed), Augment(), rng), pixels(9, 7, seed))
    assert torch.equal(augment_mel(mel(80, 20, seed), Augment(), rng), mel(80, 20, seed))
    assert rng.bit_generator.state == np.random.default_rng(seed).bit_generator.state  # and draws nothing


def test_silence_stays_finite() -> None:
    how = Augment(pitch=0.5, tempo=0.5, squeeze=0.9, tilt=1, noise=1, mask_bins=20, mask_frames=0.5)
    for frames in (1, 2, 3, 50):
        found = augment_mel(torch.full((80, frames), -1.5), how, np.random.default_rng(0))
        assert torch.isfinite(found).all()


def several(how: Augment, given: torch.Tensor) -> list[torch.Tensor]:
    change = augment_image if given.dtype == torch.uint8 else augment_mel
    return [change(given, how, np.random.default_rng(seed)) for seed in range(40)]


def test_a_shift_moves_the_picture_and_repeats_its_edge() -> None:
    before = torch.arange(100, dtype=torch.uint8).view(1, 10, 10).expand(3, 10, 10)
    moved = set()
    for found in several(Augment(shift=0.2), before):
        candidates = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(
                found[0], before[0][torch.arange(dy, dy + 10).clamp(0, 9)][:, torch.arange(dx, dx + 10).clamp(0, 9)]
            )
        ]
        assert len(candidates) == 1
        moved.add(candidates[0])
    assert {dy for dy, _ in moved} == {dx for _, dx in moved} == {-2, -1, 0, 1, 2}


def test_a_mirror_mirrors_half_of_the_pictures() -> None:
    before = pixels(6, 8, 0)
    mirrored = [torch.equal(found, before.flip(-1)) for found in several(Augment(flip=True), before)]
    unchanged = [torch.equal(found, before) for found in several(Augment(flip=True), before)]
    assert all(m != u for m, u in zip(mirrored, unchanged, strict=True))
    assert 10 <= sum(mirrored) <= 30


def test_an_erased_square_has_one_colour_and_the_rest_is_as_it_was() -> None:
    before = pixels(20, 20, 1)
    changed = 0
    for found in several(Augment(erase=0.5), before):
        differs = (found != before).any(0)
        changed += bool(differs.any())
        if differs.any():
            ys, xs = differs.nonzero(as_tuple=True)
            inside = found[:, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            assert inside.float().std() == 0
            assert max(inside.shape[1:]) <= 10
    assert 8 <= changed <= 32


def test_masks_blank_whole_bins_and_whole_frames_with_the_mean() -> None:
    before = mel(80, 100, 0)
    for found in several(Augment(mask_bins=10, mask_frames=0.2), before):
        blank = found == float(before.numpy().mean())
        bins, frames = blank.all(1), blank.all(0)
        assert int(bins.sum()) <= 20
        assert int(frames.sum()) <= 40
        kept = ~(bins[:, None] | frames[None])
        assert torch.equal(found[kept], before[kept])


def test_noise_is_added_and_never_taken_away_and_stays_below_the_peak() -> None:
    before = mel(80, 100, 0)
    changed = [found for found in several(Augment(noise=1.0), before) if not torch.equal(found, before)]
    assert 20 <= len(changed) <= 36  # to most clips, not to all
    for found in changed:
        assert (found >= before - 1e-5).all()
        added = ((10.0 ** (4 * found.double()) - 10.0 ** (4 * before.double())).clamp(min=1e-30).log10() / 4).mean(1)
        assert float(added.max()) < float(before.max()) - 0.5 + 0.35  # 20 dB below, with its colour and its ripple


def test_bent_time_keeps_both_ends_and_changes_no_level() -> None:
    ramp = torch.linspace(-1, 0.5, 50).expand(80, 50).contiguous()
    for found in several(Augment(tempo=0.5), ramp):
        torch.testing.assert_close(found[:, [0, -1]], ramp[:, [0, -1]])
        assert (found.diff() >= -1e-6).all()  # time never runs backwards
        assert float(found.min()) >= -1 - 1e-6
        assert float(found.max()) <= 0.5 + 1e-6


def test_another_vocal_tract_moves_a_formant_by_no_more_than_asked() -> None:
    """A peak at 2 kHz (bin 42 of 80 by Slaney's scale) moves within 10 percent; high bins do not move."""
    import transformers.audio_utils as audio

    hertz = audio.mel_to_hertz(np.linspace(0, audio.hertz_to_mel(8000.0, "slaney"), 82), "slaney")[1:-1]
    at = int(np.argmin(np.abs(hertz - 2000)))
    before = torch.full((80, 4), -1.0)
    before[at] = 1.0
    moved = [int(found[:, 0].argmax()) for found in several(Augment(pitch=0.1), before)]
    assert len(set(moved)) > 2
    low, high = hertz[at] * np.exp(-0.1), hertz[at] * np.exp(0.1)
    spacing = hertz[at + 1] - hertz[at]
    assert all(low - spacing <= hertz[m] <= high + spacing for m in moved)
