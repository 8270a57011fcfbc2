"""What audio encoders take, against transformers' own feature extractors and against Kaldi's definition by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    ASTFeatureExtractor,
    ClapFeatureExtractor,
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor

from avlm.config.media import AudioSpec
from avlm.config.stage import Augment
from avlm.data.media.augment import augment_features, augment_mel
from avlm.data.media.features import heard_chunks, sound_features
from avlm.errors import ConfigError
from avlm.layout import audio_chunks, chunk_sample_count, frame_count, heard_frame_count, smallest_sample_count

TOLERANCE = 1e-4
KALDI: dict[str, Any] = {"features": "fbank", "n_fft": 512, "frame": 400}
WHISPER = AudioSpec(window_frames=3000)
QWEN2 = AudioSpec(mel_bins=128, window_frames=3000, heard="sound")
AST = AudioSpec(**KALDI, mel_bins=128, window_frames=1024, max_frames=1024, mean=-4.2677393, std=2 * 4.5689974)
BEATS = AudioSpec(**KALDI, mel_bins=128, window="povey", scale=32_768.0, mean=15.41663, std=2 * 6.55582)
W2V_BERT = AudioSpec(**KALDI, window="povey", scale=32_768.0, normalise="bins", stack=2)
WAVE = AudioSpec(features="wave", mel_bins=1, n_fft=1, hop=1, normalise="clip", max_frames=480_000)
PLAIN_WAVE = AudioSpec(features="wave", mel_bins=1, n_fft=1, hop=1, max_frames=480_000)
PARAKEET = AudioSpec(features="parakeet", n_fft=512, frame=400)
GEMMA3N = AudioSpec(features="gemma3n", mel_bins=128, n_fft=1024, frame=512)
GEMMA4 = AudioSpec(features="gemma4", mel_bins=128, n_fft=512, frame=320)
CLAP: dict[str, Any] = {"sample_rate_hz": 48_000, "mel_bins": 64, "n_fft": 1024, "hop": 480, "embeddings": 64}
CLAP_FUSED = AudioSpec(**CLAP, features="clap", window_frames=1001, max_frames=1001, mel_scale="htk")
CLAP_PLAIN = AudioSpec(**CLAP, features="clap", window_frames=1001, max_frames=1001, low_hz=50, high_hz=14_000)


def noise(count: int, rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.random.default_rng(count).standard_normal(count)).astype(np.float32)


def speech(count: int, rate: int = 16_000) -> np.ndarray:
    """Something like speech: a gliding voice with overtones in syllables, breath between them, and digital silence."""
    time = np.arange(count) / rate
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate
    voice = sum(np.sin(k * pitch) / k for k in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 3 * time), 0, None)
    breath = 1e-3 * np.random.default_rng(count).standard_normal(count)
    wave = 0.2 * voice * syllables + breath
    wave[count // 2 : count // 2 + count // 10] = 0
    return wave.astype(np.float32)


def gemma4_extractor() -> Any:
    module = pytest.importorskip("transformers.models.gemma4.feature_extraction_gemma4")
    return module.Gemma4AudioFeatureExtractor()


def of_whisper(wave: np.ndarray) -> np.ndarray:
    found: np.ndarray = WhisperFeatureExtractor()(wave, sampling_rate=16_000, return_tensors="np").input_features[0]
    return found


def of_qwen2(wave: np.ndarray) -> np.ndarray:
    made = WhisperFeatureExtractor(feature_size=128)(
        wave, sampling_rate=16_000, return_tensors="np", return_attention_mask=True
    )
    assert heard_frame_count(len(wave), QWEN2) == int(made.attention_mask[0].sum())
    found: np.ndarray = made.input_features[0]
    return found


def of_ast(wave: np.ndarray) -> np.ndarray:
    return np.asarray(ASTFeatureExtractor()(wave, sampling_rate=16_000).input_values[0]).T


def of_beats(wave: np.ndarray) -> np.ndarray:
    filters = mel_filter_bank(257, 128, 20, 8000, 16_000, None, "kaldi", True)
    found = spectrogram(
        wave * 2**15,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    )
    normalised: np.ndarray = (found - 15.41663) / (2 * 6.55582)
    return normalised


def of_w2v_bert(wave: np.ndarray) -> np.ndarray:
    made = SeamlessM4TFeatureExtractor()(wave, sampling_rate=16_000, return_tensors="np")
    found: np.ndarray = made.input_features[0][made.attention_mask[0] == 1]
    return found.T


def of_wave(wave: np.ndarray) -> np.ndarray:
    return np.asarray(Wav2Vec2FeatureExtractor(do_normalize=True)(wave, sampling_rate=16_000).input_values)


def of_plain_wave(wave: np.ndarray) -> np.ndarray:
    return np.asarray(Wav2Vec2FeatureExtractor(do_normalize=False)(wave, sampling_rate=16_000).input_values)


def of_parakeet(wave: np.ndarray) -> np.ndarray:
    try:
        extractor = ParakeetFeatureExtractor()
    except ImportError:  # older versions want librosa for its filters
        return parakeet_by_hand(wave)
    made = extractor(wave, sampling_rate=16_000, return_tensors="pt")
    found: np.ndarray = made.input_features[0][made.attention_mask[0].bool()].T.numpy()
    return found


def parakeet_by_hand(wave: np.ndarray) -> np.ndarray:
    """NeMo's front end, one frame at a time."""
    emphasised = np.concatenate([wave[:1], wave[1:] - np.float32(0.97) * wave[:-1]]).astype(np.float32)
    padded = np.pad(emphasised, (256, 256))
    window = np.pad(np.hanning(400), (56, 56))
    frames = [padded[160 * t : 160 * t + 512] * window for t in range(len(wave) // 160)]
    power = np.abs(np.fft.rfft(np.stack(frames).astype(np.float64), 512)) ** 2
    filters = mel_filter_bank(257, 80, 0, 8000, 16_000, "slaney", "slaney")
    log = np.log(power @ filters + 2.0**-24)
    normalised: np.ndarray = (log - log.mean(0)) / (log.std(0, ddof=1) + 1e-5)
    return normalised.T


def of_gemma3n(wave: np.ndarray) -> np.ndarray:
    made = Gemma3nAudioFeatureExtractor()(wave, return_tensors="np")
    found: np.ndarray = made.input_features[0][made.input_features_mask[0]]
    return found.T


def of_gemma4(wave: np.ndarray) -> np.ndarray:
    made = gemma4_extractor()([wave], return_tensors="np")
    found: np.ndarray = made.input_features[0][made.input_features_mask[0]]
    return found.T


def of_clap_fused(wave: np.ndarray) -> np.ndarray:
    made = ClapFeatureExtractor(truncation="fusion")(wave, sampling_rate=48_000, return_tensors="np")
    assert made.input_features.shape[:2] == (1, 4)
    return np.asarray(made.input_features[0, 0]).T


def of_clap_plain(wave: np.ndarray) -> np.ndarray:
    extractor = ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50, frequency_max=14_000)
    return np.asarray(extractor(wave, sampling_rate=48_000, return_tensors="np").input_features[0, 0]).T


THEIRS: dict[str, tuple[AudioSpec, Callable[[np.ndarray], np.ndarray]]] = {
    "Whisper": (WHISPER, of_whisper),
    "Qwen2-Audio": (QWEN2, of_qwen2),
    "AST": (AST, of_ast),
    "BEATs": (BEATS, of_beats),
    "Wav2Vec2-BERT": (W2V_BERT, of_w2v_bert),
    "HuBERT": (WAVE, of_wave),
    "WavLM base": (PLAIN_WAVE, of_plain_wave),
    "Parakeet": (PARAKEET, of_parakeet),
    "Gemma 3n": (GEMMA3N, of_gemma3n),
    "Gemma 4": (GEMMA4, of_gemma4),
    "CLAP with fusion": (CLAP_FUSED, of_clap_fused),
    "CLAP": (CLAP_PLAIN, of_clap_plain),
}
SECONDS = [0.0, 0.001, 0.011, 0.06, 0.1234, 0.5, 0.707, 1.0, 2.345, 7.3, 9.99]


@pytest.mark.parametrize("made", [noise, speech], ids=["noise", "speech"])
@pytest.mark.parametrize("name", THEIRS)
def test_features_are_those_of_the_released_extractor(name: str, made: Callable[..., np.ndarray]) -> None:
    """From the shortest sound that the extractor takes (each of them fails below) to ten seconds."""
    spec, theirs = THEIRS[name]
    least = smallest_sample_count(spec.model_copy(update={"convolutions": ()}))
    for seconds in SECONDS:
        wave = made(max(least, round(seconds * spec.sample_rate_hz)), spec.sample_rate_hz)
        expected = theirs(wave)
        found = sound_features(wave, spec.model_copy(update={"convolutions": ()}))
        assert found.shape == expected.shape, f"{len(wave)} samples"
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=TOLERANCE, rtol=0, err_msg=f"{len(wave)} samples")


@pytest.mark.parametrize("name", THEIRS)
def test_a_whole_window_is_the_released_extractors_too(name: str) -> None:
    spec, theirs = THEIRS[name]
    whole = min(chunk_sample_count(spec), 30 * spec.sample_rate_hz)
    for count in (whole, whole - 1):
        wave = speech(count, spec.sample_rate_hz)
        np.testing.assert_allclose(sound_features(wave, spec).numpy(), theirs(wave), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", THEIRS)
def test_layout_counts_the_frames_of_every_length(name: str) -> None:
    """Every sample count over three hops, and on both sides of the window."""
    spec = THEIRS[name][0]
    whole, hop = chunk_sample_count(spec), spec.hop
    counts = [*range(1, 8), *range(whole - 2, whole + hop, max(1, hop // 3))]
    if spec.window_frames is None:
        counts += range(4000, 4000 + 3 * max(hop, 10))
    for count in counts:
        found = sound_features(np.full(count, 0.1, np.float32), spec)
        assert found.shape == (spec.mel_bins * spec.stack, frame_count(count, spec)), count
        assert torch.isfinite(found).all(), count


@pytest.mark.parametrize("name", [name for name, (spec, _) in THEIRS.items() if spec.window_frames is None])
def test_the_shortest_workable_sound_is_the_shortest_that_the_convolutions_take(name: str) -> None:
    """One sample less has a frame less, by the extractor's own count."""
    spec, theirs = THEIRS[name]
    least = smallest_sample_count(spec)
    assert frame_count(least, spec) == frame_count(1, spec)
    assert frame_count(least, spec) == theirs(noise(least)).shape[1]
    longer = spec.model_copy(update={"convolutions": (*spec.convolutions, *spec.convolutions, *spec.convolutions)})
    least = smallest_sample_count(longer)
    assert theirs(noise(least)).shape[1] == frame_count(1, longer)


def kaldi_by_hand(wave: np.ndarray, bins: int) -> np.ndarray:
    """Kaldi's filterbank by its definition, one window, one frequency and one triangle at a time."""

    def mel(hertz: float) -> float:
        return 1127.0 * math.log(1.0 + hertz / 700.0)

    frames = (len(wave) - 400) // 160 + 1
    edges = np.linspace(mel(20.0), mel(8000.0), bins + 2)
    found = np.zeros((bins, frames))
    for t in range(frames):
        window = wave[160 * t : 160 * t + 400].astype(np.float64) * 32_768
        window = window - window.mean()
        emphasised = [window[0] - 0.97 * window[0]] + [window[i] - 0.97 * window[i - 1] for i in range(1, 400)]
        shape = [(0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i in range(400)]
        shaped = np.array(emphasised) * np.array(shape)
        for b in range(bins):
            low, middle, high = edges[b : b + 3]
            energy = 0.0
            for k in range(256):
                at = mel(k * 16_000 / 512)
                if low < at < high:
                    weight = (at - low) / (middle - low) if at <= middle else (high - at) / (high - middle)
                    energy += weight * abs(np.sum(shaped * np.exp(-2j * np.pi * k * np.arange(400) / 512))) ** 2
            found[b, t] = math.log(max(energy, 1.1920928955078125e-07))
    return found


def test_the_filterbank_is_kaldis_by_its_definition() -> None:
    wave = speech(400 + 2 * 160)
    spec = AudioSpec(**KALDI, mel_bins=40, window="povey", scale=32_768.0)
    np.testing.assert_allclose(sound_features(wave, spec).numpy(), kaldi_by_hand(wave, 40), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("made", [noise, speech], ids=["noise", "speech"])
def test_parakeets_spectrogram_is_nemos_by_its_definition(made: Callable[..., np.ndarray]) -> None:
    for count in (480, 16_000, 50_001):
        wave = made(count)
        np.testing.assert_allclose(sound_features(wave, PARAKEET), parakeet_by_hand(wave), atol=TOLERANCE, rtol=0)


def test_the_same_sound_gives_the_same_features() -> None:
    """VITA's front end left its dither on."""
    for spec, _ in THEIRS.values():
        wave = speech(9000, spec.sample_rate_hz)
        assert torch.equal(sound_features(wave, spec), sound_features(wave, spec))


def test_bins_can_have_means_and_spreads_of_their_own() -> None:
    """VITA normalises with a mean and a spread for each of its 80 bins."""
    mean, std = tuple(np.linspace(-3, 9, 80)), tuple(np.linspace(1, 4, 80))
    wave = speech(8000)
    plain = sound_features(wave, AudioSpec(**KALDI, window="povey", scale=32_768.0))
    spec = AudioSpec(**KALDI, window="povey", scale=32_768.0, mean=mean, std=std)
    for b in (0, 17, 79):
        np.testing.assert_allclose(sound_features(wave, spec)[b], (plain[b] - mean[b]) / std[b], atol=1e-5)
    again = AudioSpec.model_validate_json(spec.model_dump_json())
    assert again == spec


# ---------------------------------------------------------------- chunks


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["true", "window", "fbank", "wave", "gemma4"]), st.integers(1, 40_000))
def test_each_chunk_is_what_it_would_be_alone(name: str, num_samples: int) -> None:
    spec = {
        "true": AudioSpec(max_frames=70),
        "window": AudioSpec(window_frames=70, max_frames=70),
        "fbank": AudioSpec(**KALDI, max_frames=70),
        "wave": AudioSpec(features="wave", mel_bins=1, n_fft=1, hop=1, normalise="clip", max_frames=9000),
        "gemma4": AudioSpec(features="gemma4", n_fft=512, frame=320, max_frames=70),
    }[name]
    wave = noise(num_samples)
    found = heard_chunks(wave, spec)
    start = 0
    for chunk, length in zip(found, audio_chunks(num_samples, spec), strict=True):
        alone = wave[start : start + length]
        assert torch.equal(chunk.features, sound_features(alone, spec))
        assert chunk.frames == heard_frame_count(length, spec)
        start += length
    assert start == num_samples


def test_a_second_encoder_hears_the_same_chunks_in_its_own_features_and_at_its_own_rate() -> None:
    beside = WAVE.model_copy(update={"sample_rate_hz": 8000, "max_frames": 12_000})
    spec = AudioSpec(max_frames=200, beside=beside)
    wave = noise(50_000)
    found = heard_chunks(wave, spec)
    assert [chunk.features.shape for chunk in found] == [(80, 150), (80, 150), (80, 12)]  # 1.5 s is all it hears
    assert [c.beside.features.shape for c in found if c.beside is not None] == [(1, 12_000), (1, 12_000), (1, 1000)]


# ---------------------------------------------------------------- changes while training


def test_blanks_go_into_any_features_and_voices_only_into_whispers() -> None:
    rng = np.random.default_rng
    fbank = sound_features(speech(16_000), BEATS)
    blanks = Augment(mask_bins=20, mask_frames=0.2)
    changed = augment_features(fbank, "fbank", blanks, rng(0))
    assert changed.shape == fbank.shape
    assert 0 < float((changed != fbank).float().mean()) < 0.7
    mel = sound_features(speech(16_000), AudioSpec())
    everything = Augment(pitch=0.1, tilt=0.1, noise=0.5, mask_bins=8)
    assert torch.equal(augment_features(mel, "whisper", everything, rng(1)), augment_mel(mel, everything, rng(1)))
    assert augment_features(fbank, "fbank", Augment(), rng(0)) is fbank
    with pytest.raises(ConfigError) as error:
        augment_features(fbank, "fbank", everything, rng(0))
    assert str(error.value) == (
        "augment.pitch changes log-mel frames as Whisper takes them, and this encoder takes fbank features. "
        "Set augment.pitch=0"
    )
    with pytest.raises(ConfigError, match=r"Set augment\.mask_bins=0"):
        augment_features(sound_features(speech(800), WAVE), "wave", blanks, rng(0))
