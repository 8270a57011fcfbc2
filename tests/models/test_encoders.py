"""Every record of the tables: what it says is what transformers' own encoder does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BitConfig,
    BitForImageClassification,
    BitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from avlm.config.media import AudioSpec, VisionSpec
from avlm.config.model import AudioPart, PoolConnector, Source, VisionPart
from avlm.errors import ConfigError, LayoutError, WeightsError
from avlm.layout import audio_embedding_count, image_embedding_count
from avlm.models.audio_encoders import audio_spec, encode_sounds
from avlm.models.encoders import build_encoder, encoder_width, inner_config, load_encoder, read_config
from avlm.models.vision_encoders import VISION_FAMILIES, encode_images, vision_spec

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT: dict[str, Any] = {k: v for k, v in VIT.items() if k not in ("image_size", "patch_size")} | {"vocab_size": 50}
SQUARE = {"image_size": [28, 28], "patch_size": [7, 7]}
MAPS: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
BIT: dict[str, Any] = {**MAPS, "embedding_size": 16, "num_groups": 4}
WHISPER: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 40,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT, initializer_factor=3.0)),
    "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)),
    "internvl_vision": lambda: AutoModel.from_config(
        InternVLVisionConfig(**{**VIT, **SQUARE}, use_absolute_position_embeddings=True, initializer_range=0.2)
    ),
    "bit": lambda: BitModel(BitConfig(**BIT)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(**MAPS)),
}


def encoder(model_type: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return VISION[model_type]().eval()


def own_states(model: PreTrainedModel, pixels: Tensor, **kwargs: Any) -> Tensor:
    """What the papers feed their connectors with, said by transformers' own forward of each class."""
    output = model(pixels, output_hidden_states=True, **kwargs)
    kind = model.config.model_type
    if kind == "clip_vision_model":
        return output.hidden_states[-2][:, 1:]  # LLaVA-1.5: the last layer but one, without the class token
    if kind == "internvl_vision":
        return output.last_hidden_state[:, 1:]
    if kind == "siglip_vision_model":
        return model.post_layernorm(output.hidden_states[-1]) if hasattr(model, "post_layernorm") else output[0]
    maps = output.last_hidden_state
    return torch.stack([maps[:, :, y, x] for y in range(maps.shape[2]) for x in range(maps.shape[3])], 1)


def pixels(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_every_record_is_tested() -> None:
    assert {family.model_type for family in VISION_FAMILIES} == set(VISION)


# ---------------------------------------------------------------- vision


@pytest.mark.parametrize("model_type", VISION)
@torch.no_grad()
def test_pictures_are_encoded_as_transformers_encodes_them(model_type: str) -> None:
    model = encoder(model_type)
    seen = pixels(3, 28 if "patch_size" in model.config and model_type != "convnext" else 64)
    found = encode_images(model, seen, None)
    close(found, own_states(model, seen))
    assert found.shape[-1] == encoder_width(model.config)


@pytest.mark.parametrize("model_type", VISION)
@torch.no_grad()
def test_a_batch_of_pictures_is_each_alone(model_type: str) -> None:
    model = encoder(model_type)
    seen = pixels(4, 28 if model_type in ("clip_vision_model", "siglip_vision_model", "internvl_vision") else 64)
    close(encode_images(model, seen, None), torch.cat([encode_images(model, one[None], None) for one in seen]))


@pytest.mark.parametrize(
    ("model_type", "side"),
    [(m, s) for m in ("clip_vision_model", "siglip_vision_model", "internvl_vision") for s in (28, 14, 42, 33)]
    + [("bit", s) for s in (32, 64, 96)]
    + [("convnext", s) for s in (32, 64, 100)],
)
@torch.no_grad()
def test_the_layout_counts_what_the_encoder_gives(model_type: str, side: int) -> None:
    model = encoder(model_type)
    part = VisionPart(encoder=Source(path="x"), image_size_px=side)
    spec = vision_spec(model.config, part, {})
    found = encode_images(model, pixels(2, side), None)
    assert found.shape[:2] == (2, image_embedding_count(spec))


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model"])
@torch.no_grad()
def test_another_size_than_the_encoders_own_interpolates_its_positions(model_type: str) -> None:
    model = encoder(model_type)
    seen = pixels(2, 42)
    close(encode_images(model, seen, None), own_states(model, seen, interpolate_pos_encoding=True))


@pytest.mark.parametrize("layer", [0, 1, -1])
@torch.no_grad()
def test_a_layer_can_be_chosen(layer: int) -> None:
    model = encoder("siglip_vision_model")
    seen = pixels(2, 28)
    close(encode_images(model, seen, layer), model(seen, output_hidden_states=True).hidden_states[layer])


def test_the_first_layer_is_not_taken_for_no_choice() -> None:
    model = encoder("clip_vision_model")
    seen = pixels(1, 28)
    assert not torch.allclose(encode_images(model, seen, 0), encode_images(model, seen, None))


def test_gradients_reach_the_pixels_and_the_weights() -> None:
    model = encoder("siglip_vision_model")
    seen = pixels(2, 28).requires_grad_()
    encode_images(model, seen, None).square().sum().backward()
    assert seen.grad is not None and seen.grad.abs().sum() > 0
    assert all(p.grad is not None for n, p in model.named_parameters() if "encoder" in n or "embedding" in n)


def test_released_preprocessing_wins_over_the_familys() -> None:
    part = VisionPart(encoder=Source(path="x"))
    released = vision_spec(encoder("clip_vision_model").config, part, {"image_mean": [0.1, 0.2, 0.3]})
    assert released.mean == (0.1, 0.2, 0.3)
    assert released.std == (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
    assert vision_spec(encoder("siglip_vision_model").config, part, {}).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("model_type", "part", "message"),
    [
        (
            "clip_vision_model",
            {"image_size_px": 5},
            "model.vision.image_size_px=5 is smaller than one cell of the encoder (7 px). Use at least 7",
        ),
        (
            "bit",
            {"image_size_px": 72},
            "model.vision.image_size_px=72 is not a whole number of the encoder's cells (32 px). Use 64 or 96",
        ),
        (
            "clip_vision_model",
            {"layer": 4},
            "model.vision.layer=4: the encoder has 3 layers, so its hidden states are 0 to 3, or -4 to -1 from behind. "
            "Use one of them",
        ),
        (
            "convnext",
            {"layer": 2},
            "model.vision.layer=2: the layers of convnext differ in size, and only the last one fits the count of its "
            "tokens. Use -1, or leave it out",
        ),
    ],
)
def test_a_part_that_does_not_fit_its_encoder_is_refused(model_type: str, part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        vision_spec(encoder(model_type).config, VisionPart(encoder=Source(path="x"), **part), {})
    assert str(error.value) == message


def test_a_wide_bit_and_one_of_another_stride_are_counted_too() -> None:
    config = BitConfig(**BIT, layer_type="bottleneck", width_factor=2, output_stride=8)
    torch.manual_seed(0)
    model = BitModel(config).eval()
    spec = vision_spec(config, VisionPart(encoder=Source(path="x"), image_size_px=64), {})
    found = encode_images(model, pixels(1, 64), None)
    assert found.shape[1:] == (image_embedding_count(spec), encoder_width(config)) == (64, 64)


def test_families_without_a_record_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        vision_spec(AutoConfig.for_model("swin"), VisionPart(encoder=Source(path="x")), {})
    assert str(error.value) == (
        "swin is not a vision encoder that avlm has a record of, so its tokens cannot be counted. Use one of "
        "clip_vision_model, siglip_vision_model, internvl_vision, bit, convnext, or add a record to "
        "avlm/models/vision_encoders.py"
    )
    with pytest.raises(ConfigError, match="moonshine is not an audio encoder"):
        audio_spec(AutoConfig.for_model("moonshine"), AudioPart(encoder=Source(path="x")))


# ---------------------------------------------------------------- Whisper


def whisper() -> PreTrainedModel:
    torch.manual_seed(2)
    model: PreTrainedModel = WhisperModel(WhisperConfig(**WHISPER)).get_encoder().eval()
    return model


def hearing(length: str = "true", **kwargs: Any) -> AudioSpec:
    part = AudioPart(encoder=Source(path="x"), length=length, **kwargs)  # type: ignore[arg-type]
    return audio_spec(WhisperConfig(**WHISPER), part)


def mels(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random log-mels, padded with zeros to the longest, and their mask."""
    features = torch.randn(len(lengths), 16, max(lengths), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return features * mask[:, None], mask


@torch.no_grad()
def test_at_the_full_window_true_length_is_the_released_forward() -> None:
    model = whisper()
    features, mask = mels([80, 80])
    released = model(features).last_hidden_state
    for spec in (hearing("true"), hearing("window")):
        close(torch.stack(encode_sounds(model, features, mask, spec)), released)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -2, -4])
@torch.no_grad()
def test_an_audio_layer_can_be_chosen(layer: int) -> None:
    model = whisper()
    features, mask = mels([80])
    released = model(features, output_hidden_states=True).hidden_states[layer]
    for spec in (hearing("true"), hearing("window")):
        close(torch.stack(encode_sounds(model, features, mask, spec, layer)), released)


@torch.no_grad()
def test_a_batch_of_clips_is_each_alone() -> None:
    model, spec = whisper(), hearing()
    lengths = [*np.random.default_rng(0).integers(1, 81, 9).tolist(), 1, 2, 80]
    features, mask = mels(lengths)
    batch = encode_sounds(model, features, mask, spec)
    for i, length in enumerate(lengths):
        (alone,) = encode_sounds(model, features[i : i + 1, :, :length], mask[i : i + 1, :length], spec)
        close(batch[i], alone)


@torch.no_grad()
def test_what_lies_in_the_padding_is_never_heard() -> None:
    model, spec = whisper(), hearing()
    features, mask = mels([33, 50, 41, 7])
    junk = torch.where(mask[:, None], features, torch.tensor(1000.0))
    for clean, dirty in zip(
        encode_sounds(model, features, mask, spec), encode_sounds(model, junk, mask, spec), strict=True
    ):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@torch.no_grad()
def test_a_shorter_clip_is_not_a_padded_one() -> None:
    """Otherwise the tests above could not tell true length from the window."""
    model = whisper()
    features, mask = mels([30])
    (true,) = encode_sounds(model, features, mask, hearing())
    padded = torch.nn.functional.pad(features, (0, 50))
    window = model(padded).last_hidden_state[0, :15]
    assert (true - window).abs().max() > 1e-2


@torch.no_grad()
def test_the_layout_counts_the_embeddings_of_every_length() -> None:
    model, spec = whisper(), hearing()
    for frames in range(3, 81):
        features, mask = mels([frames])
        (found,) = encode_sounds(model, features, mask, spec)
        for samples in (frames * 160, frames * 160 + 159):
            assert audio_embedding_count(samples, spec) == len(found) == (frames - 1) // 2 + 1


@torch.no_grad()
def test_half_precision_hears_no_padding_either() -> None:
    model = whisper().to(torch.bfloat16)
    features, mask = mels([33, 50])
    junk = torch.where(mask[:, None], features, torch.tensor(1000.0))
    for clean, dirty in zip(
        encode_sounds(model, features, mask, hearing()), encode_sounds(model, junk, mask, hearing()), strict=True
    ):
        assert clean.dtype == torch.bfloat16 and clean.isfinite().all()
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def test_gradients_reach_every_layer_of_the_audio_encoder() -> None:
    model, spec = whisper(), hearing()
    model.embed_positions.requires_grad_(True)
    features, mask = mels([20, 31])
    torch.cat(encode_sounds(model, features, mask, spec)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "k_proj" not in n)


@pytest.mark.parametrize(
    ("lengths", "length", "message"),
    [
        ([81], "true", "clip 0 has 81 mel frames, and the audio encoder hears 1 to 80. Leave it out, or cut it into "
         "shorter clips"),
        ([5, 0], "true", "clip 1 has 0 mel frames, and the audio encoder hears 1 to 80. Leave it out, or cut it into "
         "shorter clips"),
        ([40], "window", "clips of 40 mel frames were given, and the audio encoder hears windows of 80. Prepare the "
         "data with the model's own processor"),
    ],
)  # fmt: skip
def test_clips_that_cannot_be_heard_are_refused(lengths: list[int], length: str, message: str) -> None:
    features, mask = mels(lengths)
    with pytest.raises(LayoutError) as error:
        encode_sounds(whisper(), features, mask, hearing(length))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"layer": 7}, "model.audio.layer=7: the encoder has 3 layers"),
    ],
)
def test_an_audio_part_that_does_not_fit_its_encoder_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hearing(**part)


def test_the_audio_spec_is_whispers() -> None:
    released = audio_spec(WhisperConfig(num_mel_bins=128), AudioPart(encoder=Source(path="x"), length="window"))
    assert (released.window_frames, released.mel_bins, released.hop, released.n_fft) == (3000, 128, 160, 400)
    assert audio_embedding_count(480_000, released) == 1500  # 30 s fill n_audio_ctx (arXiv:2212.04356)
    pooled = AudioPart(encoder=Source(path="x"), connector=PoolConnector(tokens=250))
    assert audio_spec(WhisperConfig(), pooled).reduction.pool == 250


# ---------------------------------------------------------------- out of checkpoints


def internvl() -> PreTrainedModel:
    vision = {"model_type": "internvl_vision", **VIT, **SQUARE}
    text = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
    return InternVLForConditionalGeneration(InternVLConfig(text_config=text, vision_config=vision, image_token_id=3))


CHECKPOINTS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[Any], torch.nn.Module]]] = {
    "CLIP": (lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VIT)), lambda m: m.vision_model),
    "CLIP vision": (lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)), lambda m: m),
    "SigLIP": (lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VIT)), lambda m: m.vision_model),
    "SigLIP vision": (lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)), lambda m: m),
    "InternVL": (internvl, lambda m: m.model.vision_tower),
    "InternVL vision": (lambda: AutoModel.from_config(InternVLVisionConfig(**{**VIT, **SQUARE})), lambda m: m),
    "BiT": (lambda: BitForImageClassification(BitConfig(**BIT)), lambda m: m.bit),
    "ConvNeXt": (lambda: ConvNextForImageClassification(ConvNextConfig(**MAPS)), lambda m: m.convnext),
    "Whisper": (
        lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),
        lambda m: m.get_encoder() if hasattr(m, "get_encoder") else m,
    ),
    "Whisper without its head": (lambda: WhisperModel(WhisperConfig(**WHISPER)), lambda m: m.get_encoder()),
}


def sense_of(name: str) -> Any:
    return "audio" if name.startswith("Whisper") else "vision"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_encoder_comes_whole_out_of_a_released_checkpoint_and_out_of_its_own(name: str, tmp_path: Path) -> None:
    make, inside = CHECKPOINTS[name]
    torch.manual_seed(4)
    released = make()
    released.save_pretrained(tmp_path / "released")
    expected = dict(inside(released).state_dict())

    found = load_encoder(str(tmp_path / "released"), read_config(str(tmp_path / "released"), sense_of(name)))
    found.save_pretrained(tmp_path / "own")
    again = load_encoder(str(tmp_path / "own"), read_config(str(tmp_path / "own"), sense_of(name)))

    for model in (found, again):
        weights = dict(model.state_dict())
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=0)


def test_no_decoder_is_ever_built() -> None:
    config = inner_config(WhisperConfig(**WHISPER), "audio")
    assert not any("decoder" in name for name, _ in build_encoder(config).named_parameters())


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)), CLIPVisionConfig(**VIT), "of the clip_vision_model"),
        (lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VIT)).text_model, CLIPVisionConfig(**VIT),
         "of the clip_vision_model"),
        (lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)), WhisperConfig(**WHISPER), "of the whisper encoder"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_the_encoders_weights_is_refused(
    make: Callable[[], PreTrainedModel], config: Any, message: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=rf"\d+ weights {message}.* missing") as error:
        load_encoder(str(tmp_path), config)
    assert "Give the folder of a whole checkpoint" in str(error.value)


def test_specs_refuse_unknown_keys() -> None:
    with pytest.raises(ValueError, match="cell"):
        VisionSpec(image_size_px=28, cell_px=14, cells=2)  # type: ignore[call-arg]
