"""The audio encoder of a whole model learns by CTC: the loss is the forward algorithm's, sound by sound."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from avlm.config.data import DataConfig
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.config.stage_fits import stage_problem
from avlm.convert.compose import Composed, compose
from avlm.convert.weights import save_model
from avlm.data.loader import Bad, StepLoader
from avlm.data.sources import JsonLines
from avlm.models.hearing import encode_sounds
from avlm.samples import Encoded
from avlm.training.building import by_itself
from avlm.training.chain import Run
from avlm.training.observe import read_lines
from avlm.training.stages import prepare
from avlm.training.trade import BYTES, SoundWords, make_head, words_loss

PARTS = ("vision", "vision_connector", "audio", "audio_connector", "language")


def stage_of(**settings: Any) -> Stage:
    how = {
        "name": "hear", "train": {"audio": {"lr": 3e-3}}, "rows": "audio", "supervise": "words", "loss": "ctc",
        "steps": 4, "batch_samples": 3, "row_tokens": 1000,
    }  # fmt: skip
    return Stage.model_validate({**how, **settings})


@pytest.fixture
def made(make_model: Callable[..., Composed]) -> Composed:
    made: Composed = make_model(audio={"max_source_positions": 200})
    return made


@pytest.fixture
def loader(made: Composed, rows: Callable[..., Path]) -> Callable[..., StepLoader]:
    def load(**settings: Any) -> StepLoader:
        return StepLoader(JsonLines(rows()), stage_of(**settings), made.processor, DataConfig(), seed=0)

    return load


def forward_algorithm(logps: Sequence[Sequence[float]], words: Sequence[int], blank: int) -> float:
    """Minus the logarithm of the words' probability: Graves et al., ICML 2006, equations 5 to 8, as they stand."""
    path = [blank]
    for word in words:
        path += [word, blank]
    chances = [[math.exp(x) for x in moment] for moment in logps]
    alpha = [0.0] * len(path)
    alpha[0] = chances[0][blank]
    if len(path) > 1:
        alpha[1] = chances[0][path[1]]
    for moment in chances[1:]:
        now = []
        for s, unit in enumerate(path):
            before = alpha[s] + (alpha[s - 1] if s else 0.0)
            if s > 1 and unit not in (blank, path[s - 2]):
                before += alpha[s - 2]
            now.append(before * moment[unit])
        alpha = now
    return -math.log(alpha[-1] + (alpha[-2] if len(path) > 1 else 0.0))


@pytest.mark.parametrize(("units", "pool"), [("tokens", 1), ("tokens", 3), ("characters", 1), ("characters", 2)])
def test_a_row_of_sounds_costs_what_the_forward_algorithm_finds(
    made: Composed, loader: Callable[..., StepLoader], units: str, pool: int
) -> None:
    """Every sound by itself through the encoder at its own length, its embeddings averaged by hand."""
    model = made.model
    steps = loader(ctc={"units": units, "pool": pool})
    samples = [steps.prepare((number, 0)) for number in steps.rows]
    (row,) = steps.step(0).rows
    head = make_head(model, steps.stage, seed=3)
    assert isinstance(head, SoundWords)
    assert head.blank == (model.config.text_config.vocab_size if units == "tokens" else BYTES)
    spec = made.processor.media_spec().audio
    assert spec is not None and model.model.audio_tower is not None
    slow = 0.0
    lengths = []
    for sample in samples:
        assert isinstance(sample, Encoded)
        (chunk,), (words,) = sample.sounds, sample.words
        features = chunk.features[None, :, : chunk.frames]
        mask = torch.ones(1, chunk.frames, dtype=torch.bool)
        with torch.no_grad():
            (states,) = encode_sounds(model.model.audio_tower, features, mask, spec, model.config.audio_layer)
            groups = [states[at : at + pool].mean(0) for at in range(0, len(states), pool)]
            logps = head.words(torch.stack(groups)).double().log_softmax(1).tolist()
        lengths.append(len(logps))
        text = ["red", "blue", "green"][int(sample.id) % 3]
        expected = list(text.encode()) if units == "characters" else made.processor.tokens().ids(text)
        assert words == list(expected)
        slow += forward_algorithm(logps, words, head.blank)
    assert len(set(lengths)) > 1  # true lengths, none of them padded
    with torch.no_grad():
        ours = words_loss(model, head, row)
    assert float(ours) == pytest.approx(slow, rel=1e-4)


def test_a_text_longer_than_its_sound_leaves_the_row_out_by_name(loader: Callable[..., StepLoader]) -> None:
    """0.25 s are 13 moments of Whisper's, pooled by five 3; `blue` is 4 letters, and `green` 5 and its double e."""
    steps = loader(ctc={"units": "characters", "pool": 5})
    found = [steps.prepare((number, 0)) for number in steps.rows]
    bad = [sample for sample in found if isinstance(sample, Bad)]
    (blue,) = [b for b in bad if b.sample_id == "1"]
    assert blue.reason.endswith(
        "s1.wav: says 4 characters, for which CTC needs 4 moments, and the encoder makes 3 of it. Lower "
        "stages.hear.ctc.pool, tell larger units with stages.hear.ctc.units=tokens, or leave the row out"
    )
    (green,) = [b for b in bad if b.sample_id == "5"]
    assert "says 5 characters, for which CTC needs 6 moments" in green.reason


def test_counting_ahead_finds_what_encoding_does(loader: Callable[..., StepLoader]) -> None:
    steps = loader(ctc={"units": "characters"})
    for number in steps.rows:
        encoded = steps.prepare((number, 0))
        assert isinstance(encoded, Encoded)
        counts = steps.prepare.writer.count(steps.source[number], steps.processor.reader().measure)
        assert (counts.tokens, counts.targets) == (encoded.room(), encoded.num_targets())


def test_gradients_reach_the_encoder_and_nothing_else(made: Composed, loader: Callable[..., StepLoader]) -> None:
    steps = loader()
    prepare(made.model, steps.stage)
    head = make_head(made.model, steps.stage, seed=3)
    words_loss(made.model, head, steps.step(0).rows[0]).backward()
    touched = {name.split(".")[1] for name, p in made.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"audio_tower"}


# ---------------------------------------------------------------- a run


def train(config: RunConfig, **more: Any) -> Path:
    return Run(config, console=Console(file=io.StringIO()), **more).train()


@pytest.fixture
def given_model(small_run: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run of one stage on a model that is there, every part of it."""

    def make(name: str, **settings: Any) -> RunConfig:
        config = small_run(name)
        if not (tmp_path / "base").exists():
            texts = ["What is number 1 2 3 4 5 6 7 8 9 0? red green blue"] * 3
            made = compose(config.model, seed=1, texts=texts)
            save_model(made.model, made.processor, tmp_path / "base")
        return config.model_copy(update={"model": str(tmp_path / "base"), "stages": (stage_of(**settings),)})

    return make


def test_the_encoder_of_a_whole_model_learns_what_is_said_and_the_rest_keeps_its_bits(
    given_model: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = given_model("run", steps=30, ctc={"units": "characters"})
    assert not by_itself(config.stages[0])
    train(config)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[0]["target_tokens"] == sum(len(w) for w in ("blue", "green", "red"))
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("audio_tower" in name for name in changed)


def test_a_resumed_run_ends_with_the_same_bits(given_model: Callable[..., RunConfig], tmp_path: Path) -> None:
    whole, killed = given_model("whole"), given_model("killed")
    train(whole)

    class KilledError(Exception):
        pass

    def kill(metrics: Any) -> None:
        if metrics.stage_step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(killed, on_step=kill)
    train(killed)
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()


def test_an_encoder_built_from_scratch_can_learn_so_too(apart: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = apart("run")
    stages = [stage.model_copy(update={"loss": "ctc"}) if stage.builds == "audio" else stage for stage in config.stages]
    train(config.model_copy(update={"stages": tuple(stages)}))
    assert (tmp_path / "run" / "parts" / "audio" / "config.json").is_file()


# ---------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"supervise": "answers"},
            "stage hear has loss=ctc and supervise=answers, and it is the words of each sound that are told. "
            "Set stages.hear.supervise=words",
        ),
        ({"rows": "any"}, "has loss=ctc and rows=any, and others hold nothing to listen to, or more than that"),
        ({"describe": 0.5}, "Set stages.hear.describe=0"),
        ({"label_smoothing": 0.1}, "Set stages.hear.label_smoothing=0"),
        ({"balance": 0.1, "train": {"language": {"lr": 1}}}, "Set stages.hear.balance=0"),
        ({"state_head": {"lr": 1e-3}}, "Remove stages.hear.state_head"),
        (
            {"train": {"audio": {"lr": 1e-3}, "language": {"lr": 1e-3}}},
            "stage hear has loss=ctc, by which the audio encoder learns alone, and trains other parts. "
            "Train audio alone, and build no other",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    problem = stage_problem(stage_of(**settings), PARTS)
    assert problem is not None and message in problem


def test_settings_that_can_work_are_not() -> None:
    assert stage_problem(stage_of(), PARTS) is None
    assert stage_problem(stage_of(builds="audio"), PARTS) is None
