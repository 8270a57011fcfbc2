"""Traps that other systems fell into, with our right answer, and the page that lists them all.

Most have their test beside the part that they are about; here are those that belong to no single part.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avlm.config.connectors import LinearConnector
from avlm.config.data import DataConfig
from avlm.config.media import AudioSpec, MediaSpec, VideoSpec, VisionSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source
from avlm.config.stage import Stage
from avlm.convert.compose import compose
from avlm.data.encode import pack
from avlm.data.loader import StepLoader
from avlm.data.media.features import heard_chunks
from avlm.data.media.reader import MediaReader
from avlm.data.sources import JsonLines
from avlm.errors import LayoutError
from avlm.layout import VideoFacts, video_segments
from avlm.recipes.templates import PLAIN
from avlm.samples import IGNORE, Clip, MediaItem, Picture, Sample, Sound, Text, Turn
from avlm.training.loss import row_loss
from tests.families import AUDIO

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/traps.md"


# ---------------------------------------------------------------- sound


def tone(rate: int, hz: float = 440.0) -> Sound:
    wave = 0.5 * np.sin(2 * np.pi * hz * np.arange(rate) / rate)
    return Sound(wave.astype(np.float32), rate)


def log_mel(sound: Sound) -> torch.Tensor:
    prepared = MediaReader(MediaSpec(audio=AudioSpec())).prepare(MediaItem("audio", decoded=sound))
    return prepared.sound[0].features[:, 10:90]  # type: ignore[union-attr]  # without the edges of the resampling


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_a_tone_makes_the_same_spectrogram_whatever_rate_it_was_recorded_at(rate: int) -> None:
    expected, found = log_mel(tone(16_000)), log_mel(tone(rate))
    loud = expected > expected.max() - 1  # four decades below its peak
    assert 0 < loud.float().mean() < 0.5
    torch.testing.assert_close(found[loud], expected[loud], rtol=0, atol=0.01)
    mistaken = log_mel(Sound(tone(rate).waveform, 16_000))
    assert not torch.equal(mistaken.argmax(0), expected.argmax(0))  # what the wrong rate would give


@pytest.mark.parametrize("family", ["VITA", "Whisper", "HuBERT (group norm)"])
@torch.no_grad()
def test_from_a_tenth_of_a_second_to_a_minute_as_many_places_as_embeddings(family: str) -> None:
    """Of the whole model: what the processor writes down is what the connector gives."""
    random = {**AUDIO[family], **({"max_source_positions": 1500} if family == "Whisper" else {})}
    part = AudioPart(encoder=Source(random=random), connector=LinearConnector(stack=4))
    language = LanguagePart(random=LLAMA, chat_template=PLAIN, vocabulary=300)
    model, processor = compose(ModelConfig(language=language, audio=part), seed=0, texts=["what is it"] * 3)
    for seconds in (0.1, 0.37, 2, 29.99, 30, 30.01, 30.2, 60):
        sound = MediaItem("audio", decoded=Sound(np.full(round(16_000 * seconds), 0.1, np.float32), 16_000))
        encoded = processor.encode(Sample("1", (Turn("user", (sound,)), Turn("assistant", (Text("a"),)))))
        row = pack([encoded])
        heard = model.get_audio_features(row.input_features, row.input_features_mask).pooler_output
        assert encoded.ids.count(model.config.audio_token_id) == sum(len(tokens) for tokens in heard) > 0


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_the_features_of_evaluation_are_those_of_training_and_nothing_is_drawn() -> None:
    """Not a dither of noise, nor anything else from a generator."""
    wave = 0.1 * np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
    for features, settings in (("whisper", {}), ("fbank", {"n_fft": 512, "frame": 400})):
        spec = AudioSpec(features=features, **settings)  # type: ignore[arg-type]
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = heard_chunks(wave, spec)[0].features
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(first, heard_chunks(wave, spec)[0].features)


# ---------------------------------------------------------------- pictures and videos


def prepared_pixels(sample: Sample, processor: Any) -> torch.Tensor:
    encoded = processor.encode(sample, prompt_only=True)
    return torch.stack([*encoded.images, *encoded.frames])


def shown(*items: MediaItem) -> Sample:
    return Sample("1", (Turn("user", (*items, Text("What is it?"))), Turn("assistant", (Text("red"),))))


def test_a_frame_is_seen_as_the_same_picture_is(make_model: Callable[..., Any]) -> None:
    _, processor = make_model("vision")
    picture = Picture(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    still = prepared_pixels(shown(MediaItem("image", decoded=picture)), processor)
    moving = prepared_pixels(shown(MediaItem("video", decoded=Clip((picture,), 1.0, None))), processor)
    assert torch.equal(still, moving)
    assert still.abs().max() <= 1  # SigLIP's mean and spread of a half take 0..255 to -1..1


def test_a_nearly_black_picture_stays_nearly_black(make_model: Callable[..., Any]) -> None:
    """Its largest value is 1: to take that for pixels in 0..1 would make it white."""
    _, processor = make_model("vision")
    dark = Picture(np.ones((28, 28, 3), np.uint8))
    found = prepared_pixels(shown(MediaItem("image", decoded=dark)), processor)
    torch.testing.assert_close(found, torch.full((1, 3, 28, 28), (1 / 255 - 0.5) / 0.5))


def test_each_video_is_timed_by_its_own_length() -> None:
    """Two videos looked at twice each: one of 8 s, one of 1 s."""
    spec = MediaSpec(vision=VisionSpec(image_size_px=28, cell_px=14), video=VideoSpec(fps=1, max_frames=2, clock=True))
    spec = spec.model_copy(update={"video": spec.video.model_copy(update={"min_frames": 2})})
    clocks = [[s.text for s in video_segments(VideoFacts(t, 0), spec) if s.kind == "text"] for t in (8.0, 1.0)]
    assert clocks == [["0.0s", "4.0s"], ["0.0s", "0.5s"]]


# ---------------------------------------------------------------- the seam


def test_placeholders_are_tokens_of_the_vocabulary_and_no_two_the_same(make_model: Callable[..., Any]) -> None:
    """Not negative ids, and not one id for two senses."""
    model, processor = make_model()
    ids = [getattr(model.config, f"{kind}_token_id") for kind in ("image", "audio", "video")]
    rows = model.get_input_embeddings().num_embeddings
    assert len(set(ids)) == 3
    assert all(0 <= i < rows for i in ids)
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<audio>", "<video>"]


def test_the_first_token_behind_a_picture_is_learned(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    """A caption right behind its picture, as in LLaVA's alignment: its first token is predicted at the last place."""
    model, processor = make_model("vision", chat_template=PLAIN)
    encoded = processor.encode(make_sample("image", text="", answer="red and blue"))
    places = [i for i, token in enumerate(encoded.ids) if token == model.config.image_token_id]
    learned = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
    assert learned == list(range(places[-1] + 1, len(encoded.ids)))
    row = pack([encoded])
    logits = model(row.input_ids, pixel_values=row.pixel_values).logits[0]
    by_hand = sum(-logits[i - 1].log_softmax(-1)[encoded.ids[i]] for i in learned)
    torch.testing.assert_close(row_loss(model, row), by_hand, rtol=1e-5, atol=1e-6)


KINDS: list[list[tuple[str, ...]]] = [
    [(), ()],
    [("image",), ()],
    [("audio",), ("audio",)],
    [("image",), ("audio",), ("video",), ()],
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "|".join("+".join(k) or "text" for k in kinds))
@torch.no_grad()
def test_a_packed_row_may_lack_any_kind_of_media(
    kinds: list[tuple[str, ...]], make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    samples = [processor.encode(make_sample(*k, seed=i)) for i, k in enumerate(kinds)]
    together = row_loss(model, pack(samples))
    alone = torch.stack([row_loss(model, pack([s])) for s in samples]).sum()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_media_under_a_misspelt_name_are_not_left_out_in_silence(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model("vision")
    row = pack([processor.encode(make_sample("image"))])
    with pytest.raises(LayoutError, match="the text reserves 4 image places, but the encoders returned 0 embeddings"):
        model(row.input_ids, pixels=row.pixel_values)


def test_media_count_towards_the_length_of_a_row(small_model: Any, tmp_path: Path) -> None:
    """Short questions about pictures: their text alone would fit."""
    model, processor = small_model
    source = JsonLines(tmp_path / "rows.jsonl")
    encoded = [processor.encode(source[i]) for i in (0, 4, 8)]
    assert [e.ids.count(model.config.image_token_id) for e in encoded] == [4, 4, 4]  # 28 px in patches of 14

    def left_out(row_tokens: int) -> set[str]:
        how = {"name": "s", "train": {"vision_connector": {"lr": 1.0}}, "steps": 1, "rows": "vision"}
        stage = Stage.model_validate({**how, "batch_samples": 3, "row_tokens": row_tokens})
        step = StepLoader(source, stage, processor, DataConfig(too_long="drop"), seed=0).step(0)
        assert step.num_samples + len(step.bad) == 3
        return {bad.reason.partition(",")[0] for bad in step.bad}

    lengths = [len(e) for e in encoded]
    assert left_out(max(lengths)) == set()
    assert left_out(min(lengths) - 1) == {f"has {length} tokens" for length in lengths}


# ---------------------------------------------------------------- what is saved


def test_every_tensor_and_every_tie_comes_back(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Connectors, buffers and tied weights too; other values than fresh ones, so that none could be drawn again."""
    from avlm.convert.weights import load_model, save_model

    made = make_model(hearing={"wrap": ("<a>", "</a>")}, audio=AUDIO["VITA"])
    with torch.no_grad():
        for tensor in [*made.model.parameters(), *made.model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.01)
    expected = copy.deepcopy(made.model.state_dict())
    save_model(made.model, made.processor, tmp_path / "m")
    loaded = load_model(tmp_path / "m").model
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


# ---------------------------------------------------------------- the page


def listed() -> list[tuple[str, str]]:
    """File and name of every test that the page names."""
    return re.findall(r"`(test_\w+\.py|[\w/]+/test_\w+\.py)::(test_\w+)`", PAGE.read_text())


def functions_of(path: Path) -> set[str]:
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}


def test_every_test_that_the_page_names_is_there() -> None:
    named = listed()
    assert len(named) > 60
    there = {file: functions_of(ROOT / "tests" / file) for file in {file for file, _ in named}}
    assert [f"{file}::{name}" for file, name in named if name not in there[file]] == []


def test_every_trap_has_its_test_or_says_why_not() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| *\d+ *\|", line)]
    for line in rows:
        assert line.count("|") == 6, line
        assert "`test_" in line or "/test_" in line or "avlm has no" in line, line
    numbers = [int(line.split("|")[1]) for line in rows]
    assert numbers == list(range(1, len(rows) + 1))


def test_every_test_of_this_file_is_on_the_page() -> None:
    here = {name for name in functions_of(Path(__file__)) if name.startswith("test_")}
    there = {name for file, name in listed() if file == "test_traps.py"}
    assert {name for name in here ^ there if "page" not in name and "every_trap" not in name} == set()
