"""Every record of the tables: what it says is what transformers' own encoder does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
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
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.modeling_outputs import BaseModelOutput

from avlm.config.connectors import PoolConnector
from avlm.config.media import AnyresTiling, AudioSpec, InternvlTiling, VisionSpec
from avlm.config.model import AudioPart, Source, VisionPart
from avlm.convert.weights import load_model, save_model
from avlm.data.media.pictures import in_patches
from avlm.errors import ConfigError, LayoutError, WeightsError
from avlm.layout import audio_embedding_count, image_embedding_count, image_grids
from avlm.models.encoders import build_encoder, encoder_width, inner_config, load_encoder, read_config
from avlm.models.hearing import audio_spec, encode_sounds
from avlm.models.vision_encoders import VISION_FAMILIES, VisionFamily, add_family, encode_images, vision_spec

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
NAFLEX: dict[str, Any] = {k: v for k, v in VIT.items() if k != "image_size"} | {"num_patches": 16}
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
    "siglip2_vision_model": lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT, initializer_range=0.2)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**VIT, num_register_tokens=4, initializer_range=0.2)
    ),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=4, initializer_range=0.2)),
    "aimv2_vision_model": lambda: Aimv2VisionModel(Aimv2VisionConfig(**VIT, initializer_range=0.2)),
    "bit": lambda: BitModel(BitConfig(**BIT)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(**MAPS)),
}


def encoder(model_type: str) -> PreTrainedModel:
    torch.manual_seed(1)
    return VISION[model_type]().eval()


FINAL_NORM = {
    "siglip_vision_model": ("post_layernorm", 0),
    "siglip2_vision_model": ("post_layernorm", 0),
    "dinov2": ("layernorm", 1),
    "dinov2_with_registers": ("layernorm", 5),
    "dinov3_vit": ("norm", 5),
    "aimv2_vision_model": ("rms_norm", 0),
}
"""Families that are read behind their last layer and final norm: its name, and the tokens before the picture's own."""


def own_states(model: PreTrainedModel, pixels: Tensor, **kwargs: Any) -> Tensor:
    """What the papers feed their connectors with, said by transformers' own forward of each class."""
    kind = model.config.model_type
    if kind == "siglip2_vision_model":
        cells = pixels.shape[-1] // 7, pixels.shape[-2] // 7
        shapes = torch.tensor([cells] * len(pixels))
        kwargs = {"pixel_attention_mask": torch.ones(len(pixels), cells[0] * cells[1]), "spatial_shapes": shapes}
        pixels = torch.stack([patches_slowly(picture) for picture in pixels])
    output = model(pixels, output_hidden_states=True, **kwargs)
    if kind in FINAL_NORM:
        name, prefix = FINAL_NORM[kind]
        norm = [module for path, module in model.named_modules() if path.rpartition(".")[2] == name][-1]
        return norm(output.hidden_states[-1])[:, prefix:]
    if kind == "clip_vision_model":
        return output.hidden_states[-2][:, 1:]  # LLaVA-1.5: the last layer but one, without the class token
    if kind == "internvl_vision":
        return output.last_hidden_state[:, 1:]
    maps = output.last_hidden_state
    return torch.stack([maps[:, :, y, x] for y in range(maps.shape[2]) for x in range(maps.shape[3])], 1)


def patches_slowly(picture: Tensor) -> Tensor:
    """Patches of 7 x 7 pixels, one by one, row by row."""
    _, height, width = picture.shape
    found = []
    for y in range(0, height - 6, 7):
        for x in range(0, width - 6, 7):
            found.append(picture[:, y : y + 7, x : x + 7].permute(1, 2, 0).flatten())
    return torch.stack(found)


def look(model: PreTrainedModel, pixels: Tensor, layer: int | None = None) -> Tensor:
    """Pictures of one size, as the encoder wants them given."""
    grids = None
    if model.config.model_type == "siglip2_vision_model":
        rows, columns = pixels.shape[-2] // 7, pixels.shape[-1] // 7
        grids = [(rows, columns)] * len(pixels)
        pixels = torch.stack([in_patches(picture[:, : rows * 7, : columns * 7], 7) for picture in pixels])
    return torch.stack(encode_images(model, pixels, layer, grids))


def native(model: PreTrainedModel) -> int:
    """A side in pixels that the encoder sees without further ado."""
    return 64 if model.config.model_type in ("bit", "convnext") else 28


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
    seen = pixels(3, native(model))
    found = look(model, seen)
    close(found, own_states(model, seen))
    assert found.shape[-1] == encoder_width(model.config)


@pytest.mark.parametrize("model_type", VISION)
@torch.no_grad()
def test_a_batch_of_pictures_is_each_alone(model_type: str) -> None:
    model = encoder(model_type)
    seen = pixels(4, native(model))
    close(look(model, seen), torch.cat([look(model, one[None]) for one in seen]))


def sides(model_type: str) -> list[int]:
    """Every side up to twice the native one; where cells are large, those around each of their edges."""
    if model_type == "bit":
        return list(range(32, 449, 32))  # other sides are refused
    if model_type == "convnext":
        return [side + d for side in range(32, 449, 64) for d in (-1, 0, 1) if side + d >= 32]
    if model_type == "aimv2_vision_model":
        return list(range(28, 35))  # as many cells as it has places for
    return list(range(7, 57))


@pytest.mark.parametrize("model_type", [name for name in VISION if name != "siglip2_vision_model"])
@torch.no_grad()
def test_the_layout_counts_what_the_encoder_gives(model_type: str) -> None:
    model = encoder(model_type)
    for side in sides(model_type):
        spec = vision_spec(model.config, VisionPart(encoder=Source(path="x"), image_size_px=side), {})
        (found,) = encode_images(model, pixels(1, side), None)
        assert (len(found),) == (image_embedding_count(spec),) == (np.prod(image_grids(spec)[0]),)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model"])
@torch.no_grad()
def test_another_size_than_the_encoders_own_interpolates_its_positions(model_type: str) -> None:
    model = encoder(model_type)
    seen = pixels(2, 42)
    close(look(model, seen), own_states(model, seen, interpolate_pos_encoding=True))


@torch.no_grad()
def test_an_encoder_that_computes_its_positions_sees_any_size() -> None:
    torch.manual_seed(1)
    config = Aimv2VisionConfig(**VIT, initializer_range=0.2, is_native=True)
    model = Aimv2VisionModel(config).eval()
    for side in range(7, 57):
        spec = vision_spec(config, VisionPart(encoder=Source(path="x"), image_size_px=side), {})
        assert look(model, pixels(1, side)).shape[1] == image_embedding_count(spec)


@torch.no_grad()
def test_patches_of_pictures_of_many_shapes_are_counted_and_each_is_as_alone() -> None:
    """SigLIP 2's NaFlex, with transformers' own patches, mask and shapes on the other side."""
    model = encoder("siglip2_vision_model")
    spec = vision_spec(model.config, VisionPart(encoder=Source(path="x"), max_patches=20), {})
    assert (spec.max_patches, spec.image_size_px, spec.resample) == (20, 28, "bilinear")
    sizes = [(30, 40), (40, 30), (7, 500), (500, 7), (1, 1), (64, 64), (21, 14)]
    grids = [image_grids(spec, size)[0] for size in sizes]
    assert len(set(grids)) > 4 and all(r * c <= 20 for r, c in grids)
    pictures = [torch.randn(3, r * 7, c * 7, generator=torch.Generator().manual_seed(r)) for r, c in grids]
    padded = torch.nn.utils.rnn.pad_sequence([in_patches(p, 7) for p in pictures], batch_first=True)
    batch = encode_images(model, padded, None, grids)
    for found, picture, (rows, columns) in zip(batch, pictures, grids, strict=True):
        alone = model(
            patches_slowly(picture)[None],
            pixel_attention_mask=torch.ones(1, rows * columns),
            spatial_shapes=torch.tensor([[rows, columns]]),
        ).last_hidden_state[0]
        close(found, alone)


@pytest.mark.parametrize("layer", [0, 1, -1])
@torch.no_grad()
def test_a_layer_can_be_chosen(layer: int) -> None:
    model = encoder("siglip_vision_model")
    seen = pixels(2, 28)
    close(look(model, seen, layer), model(seen, output_hidden_states=True).hidden_states[layer])


def test_the_first_layer_is_not_taken_for_no_choice() -> None:
    model = encoder("clip_vision_model")
    seen = pixels(1, 28)
    assert not torch.allclose(look(model, seen, 0), look(model, seen))


def test_gradients_reach_the_pixels_and_the_weights() -> None:
    model = encoder("siglip_vision_model")
    seen = pixels(2, 28).requires_grad_()
    look(model, seen).square().sum().backward()
    assert seen.grad is not None and seen.grad.abs().sum() > 0
    assert all(p.grad is not None for n, p in model.named_parameters() if "encoder" in n or "embedding" in n)


def test_released_preprocessing_wins_over_the_familys() -> None:
    part = VisionPart(encoder=Source(path="x"))
    released = vision_spec(encoder("clip_vision_model").config, part, {"image_mean": [0.1, 0.2, 0.3]})
    assert released.mean == (0.1, 0.2, 0.3)
    assert released.std == (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP
    assert vision_spec(encoder("siglip_vision_model").config, part, {}).mean == (0.5, 0.5, 0.5)
    assert [vision_spec(encoder("dinov2").config, part, {"resample": r}).resample for r in (2, 3)] == [
        "bilinear",
        "bicubic",
    ]  # Pillow's numbers
    naflex = encoder("siglip2_vision_model").config
    assert vision_spec(naflex, part, {}).max_patches == 16
    assert vision_spec(naflex, part, {"max_num_patches": 9}).max_patches == 9


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
        (
            "aimv2_vision_model",
            {"image_size_px": 42},
            "model.vision.image_size_px=42 makes 6 x 6 cells, and aimv2_vision_model knows the places of 4 x 4 only. "
            "Use 28, or leave it out",
        ),
        (
            "clip_vision_model",
            {"max_patches": 9},
            "model.vision.max_patches=9: clip_vision_model sees squares of one size, not patches. Leave it out, or use "
            "an encoder that keeps a picture's aspect ratio (siglip2_vision_model)",
        ),
        (
            "siglip2_vision_model",
            {"image_size_px": 28},
            "model.vision.image_size_px=28: siglip2_vision_model keeps a picture's aspect ratio, so its size is "
            "bounded by the number of patches. Use model.vision.max_patches instead",
        ),
        (
            "siglip2_vision_model",
            {"tiling": InternvlTiling()},
            "model.vision.tiling: siglip2_vision_model keeps a picture's aspect ratio and sees it whole, so there is "
            "nothing to cut. Use model.vision.max_patches for more detail",
        ),
        (
            "clip_vision_model",
            {"tiling": AnyresTiling(pinpoints=((28, 56), (28, 40)))},
            "model.vision: tiling.pinpoints: 28 x 40 pixels cannot be cut into tiles of 28 x 28, the size that the "
            "encoder sees. Use multiples of 28.",
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
    found = look(model, pixels(1, 64))
    assert found.shape[1:] == (image_embedding_count(spec), encoder_width(config)) == (64, 64)


def test_families_without_a_record_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        vision_spec(AutoConfig.for_model("swin"), VisionPart(encoder=Source(path="x")), {})
    assert str(error.value) == (
        "swin is not a vision encoder that avlm has a record of, so its tokens cannot be counted. Use one of "
        "clip_vision_model, siglip_vision_model, siglip2_vision_model, internvl_vision, dinov2, dinov2_with_registers, "
        "dinov3_vit, aimv2_vision_model, bit, convnext, or give avlm a record of it with "
        "avlm.models.vision_encoders.add_family"
    )
    with pytest.raises(ConfigError, match="moonshine is not an audio encoder"):
        audio_spec(AutoConfig.for_model("moonshine"), AudioPart(encoder=Source(path="x")))


def test_an_encoder_of_patches_is_refused_squares() -> None:
    with pytest.raises(LayoutError, match=r"takes patches .* with theirs\. Prepare the data with the model's own"):
        encode_images(encoder("siglip2_vision_model"), pixels(1, 28), None, [(4, 4)])


class EyesConfig(PreTrainedConfig):
    """Somebody's own encoder, as it might stand in a file of theirs."""

    model_type = "my_eyes"
    hidden_size: int = 8
    image_size: int = 12
    patch_size: int = 4


class Eyes(PreTrainedModel):
    config_class = EyesConfig

    def __init__(self, config: EyesConfig) -> None:
        super().__init__(config)
        self.cells = torch.nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        cells = self.cells(pixel_values).flatten(2).transpose(1, 2)
        return BaseModelOutput(torch.cat([cells.mean(1, keepdim=True), cells], 1))


def test_somebodys_own_encoder_needs_a_record_and_nothing_else(
    make_model: Callable[..., Any], make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    AutoConfig.register("my_eyes", EyesConfig, exist_ok=True)
    AutoModel.register(EyesConfig, Eyes, exist_ok=True)
    known = list(VISION_FAMILIES)
    try:
        add_family(VisionFamily("my_eyes"))
        add_family(VisionFamily("my_eyes", prefix_tokens=1))
        assert [*known, VisionFamily("my_eyes", prefix_tokens=1)] == VISION_FAMILIES
        Eyes(EyesConfig()).save_pretrained(tmp_path)
        config = read_config(str(tmp_path), "vision")
        found = look(load_encoder(str(tmp_path), config), pixels(2, 12))
        spec = vision_spec(config, VisionPart(encoder=Source(path="x")), {})
        assert found.shape == (2, image_embedding_count(spec), encoder_width(config)) == (2, 9, 8)

        made = make_model("vision", vision={"model_type": "my_eyes", "image_size": 12, "patch_size": 4})
        save_model(*made, tmp_path / "whole")
        batch = made.processor.collate([made.processor.encode(make_sample("image"))])
        assert int((batch["input_ids"] == made.model.config.image_token_id).sum()) == 9
        with torch.no_grad():
            close(load_model(tmp_path / "whole").model(**batch).logits, made.model(**batch).logits)
    finally:
        VISION_FAMILIES[:] = known


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


def llava(kind: Any, holder: Any, vision: dict[str, Any], language: str = "llama") -> PreTrainedModel:
    text = {"model_type": language, **TEXT, "num_key_value_heads": 2, "head_dim": 16}
    model: PreTrainedModel = holder(kind(text_config=text, vision_config=vision, image_token_index=3))
    return model


CHECKPOINTS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[Any], torch.nn.Module]]] = {
    "CLIP": (lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VIT)), lambda m: m.vision_model),
    "CLIP vision": (lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)), lambda m: m),
    "SigLIP": (lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VIT)), lambda m: m.vision_model),
    "SigLIP vision": (lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)), lambda m: m),
    "InternVL": (internvl, lambda m: m.model.vision_tower),
    "InternVL vision": (lambda: AutoModel.from_config(InternVLVisionConfig(**{**VIT, **SQUARE})), lambda m: m),
    "SigLIP 2": (
        lambda: Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=NAFLEX)),
        lambda m: m.vision_model,
    ),
    "SigLIP 2 vision": (lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)), lambda m: m),
    "DINOv2": (lambda: Dinov2ForImageClassification(Dinov2Config(**VIT)), lambda m: m.dinov2),
    "DINOv2 alone": (lambda: Dinov2Model(Dinov2Config(**VIT)), lambda m: m),
    "DINOv2 with registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT)), lambda m: m),
    "DINOv3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=4)), lambda m: m),
    "AIMv2": (lambda: Aimv2Model(Aimv2Config(text_config=TEXT, vision_config=VIT)), lambda m: m.vision_model),
    "AIMv2 vision": (lambda: Aimv2VisionModel(Aimv2VisionConfig(**VIT)), lambda m: m),
    "CLIP in LLaVA": (
        lambda: llava(LlavaConfig, LlavaForConditionalGeneration, {"model_type": "clip_vision_model", **VIT}),
        lambda m: m.model.vision_tower,
    ),
    "SigLIP in LLaVA-NeXT": (
        lambda: llava(LlavaNextConfig, LlavaNextForConditionalGeneration, {"model_type": "siglip_vision_model", **VIT}),
        lambda m: m.model.vision_tower,
    ),
    "SigLIP in PaliGemma": (
        lambda: llava(
            PaliGemmaConfig, PaliGemmaForConditionalGeneration, {"model_type": "siglip_vision_model", **VIT}, "gemma"
        ),
        lambda m: m.model.vision_tower,
    ),
    "SigLIP in Gemma 3": (
        lambda: llava(
            Gemma3Config,
            Gemma3ForConditionalGeneration,
            {"model_type": "siglip_vision_model", **VIT},
            "gemma3_text",
        ),
        lambda m: m.model.vision_tower,
    ),
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


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.", "vision_tower."])
def test_llavas_encoder_is_found_under_its_released_names_and_under_todays(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    released = llava(LlavaConfig, LlavaForConditionalGeneration, {"model_type": "clip_vision_model", **VIT})
    released.config.save_pretrained(tmp_path)
    expected = {key.removeprefix("vision_model."): t for key, t in released.model.vision_tower.state_dict().items()}
    save_file({prefix + key: tensor.contiguous() for key, tensor in expected.items()}, tmp_path / "model.safetensors")
    found = load_encoder(str(tmp_path), read_config(str(tmp_path), "vision"))
    for key, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[key.removeprefix("vision_model.")], rtol=0, atol=0)


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
