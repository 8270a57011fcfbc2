"""What it costs an encoder to tell words by itself: sums too slow to be wrong, and that it learns to."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.convert.compose import Composed, compose
from avlm.data.encode import pack
from avlm.samples import MediaItem, Picture, Sample, Sound, Turn
from avlm.training.chain import Run
from avlm.training.observe import StepMetrics, read_lines
from avlm.training.stages import prepare
from avlm.training.trade import PLACES, PictureWords, SoundWords, make_head, words_loss

# ---------------------------------------------------------------- sounds


def slow_ctc(states: Tensor, head: SoundWords, words: Sequence[int]) -> float:
    """Minus the logarithm of the probability of all paths that say the words: every path is tried."""
    groups = [states[at : at + 4].mean(0) for at in range(0, len(states), 4)]
    chances = [head.words(group).softmax(0).tolist() for group in groups]
    total = 0.0
    for path in itertools.product(range(head.blank + 1), repeat=len(chances)):
        told = [token for token, _ in itertools.groupby(path) if token != head.blank]
        if told == list(words):
            total += math.prod(chance[token] for chance, token in zip(chances, path, strict=True))
    return -math.log(total) if total else 0.0


def test_a_sounds_words_cost_what_all_their_paths_together_cost() -> None:
    """Words in any number, one twice in a row, none at all, and more than a short sound has room for."""
    torch.manual_seed(0)
    head = SoundWords(3, 3).double()
    told = [(16, [1, 2]), (19, [0, 0]), (13, []), (6, [2]), (2, [1]), (20, [2, 0, 2]), (8, [1, 1]), (3, [0, 1])]
    sounds = [2 * torch.randn(length, 3, dtype=torch.float64) for length, _ in told]
    slow = [slow_ctc(sound, head, words) for sound, (_, words) in zip(sounds, told, strict=True)]
    assert slow[-2:] == [0, 0] and min(slow[:-2]) > 0.1
    with torch.no_grad():
        together = head.loss(sounds, [words for _, words in told])
        alone = [float(head.loss([s], [words])) for s, (_, words) in zip(sounds, told, strict=True)]
    assert alone == pytest.approx(slow, rel=1e-5, abs=1e-6)
    assert float(together) == pytest.approx(sum(slow), rel=1e-5)


def test_a_sound_too_short_for_its_words_teaches_nothing_and_harms_nothing() -> None:
    torch.manual_seed(0)
    head = SoundWords(3, 3)
    states = torch.randn(4, 3, requires_grad=True)
    loss = head.loss([states], [[1, 2]])
    loss.backward()
    assert float(loss.detach()) == 0
    assert states.grad is not None and not states.grad.any()


def test_a_sound_is_mostly_blank_to_begin_with() -> None:
    """Blank as likely as all words together, before anything was heard."""
    head = SoundWords(8, 500)
    with torch.no_grad():
        chances = head.words(torch.zeros(8)).softmax(0)
    assert 0.35 < float(chances[head.blank]) < 0.65


# ---------------------------------------------------------------- pictures


def slow_words(states: Tensor, head: PictureWords, words: Sequence[int], smoothing: float) -> float:
    """Place by place, token by token."""
    logits = head(states[None])[0].tolist()
    total = 0.0
    for place, token in zip(logits, [*words, head.end], strict=False):
        whole = math.log(sum(math.exp(x) for x in place))
        costs = [whole - x for x in place]
        total += (1 - smoothing) * costs[token] + smoothing * sum(costs) / len(costs)
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_pictures_words_and_their_end_cost_their_cross_entropies(smoothing: float) -> None:
    """As many as there are places; what follows is left out."""
    torch.manual_seed(0)
    head = PictureWords(4, 3, 7).double()
    words = [[1, 2, 3], [], [6], [i % 7 for i in range(PLACES)], [i % 5 for i in range(PLACES + 3)]]
    states = torch.randn(len(words), 4, 3, dtype=torch.float64)
    with torch.no_grad():
        slow = sum(slow_words(s, head, w, smoothing) for s, w in zip(states, words, strict=True))
        assert float(head.loss(states, words, smoothing)) == pytest.approx(slow, rel=1e-5)


def test_a_finer_grid_is_averaged_cell_by_cell_and_a_coarse_one_is_not() -> None:
    torch.manual_seed(0)
    fine = PictureWords(64, 3, 5)
    coarse = PictureWords(16, 3, 5)
    coarse.load_state_dict(fine.state_dict())
    states = torch.randn(2, 64, 3)
    averaged = [
        states[:, [8 * (2 * r + a) + 2 * c + b for a in (0, 1) for b in (0, 1)]].mean(1)
        for r in range(4)
        for c in range(4)
    ]
    torch.testing.assert_close(fine(states), coarse(torch.stack(averaged, 1)))
    assert PictureWords(9, 3, 5)(states[:, :9]).shape == (2, PLACES, 6)


# ---------------------------------------------------------------- a model and its row


def alone(sense: str) -> Stage:
    return Stage.model_validate(
        {"name": "s", "builds": sense, "train": {sense: {"lr": 1e-3}}, "rows": sense, "supervise": "words", "steps": 1}
    )


def sample(number: int, *items: MediaItem) -> Sample:
    return Sample(str(number), (Turn("user", items),))


def pictures(count: int) -> list[MediaItem]:
    rng = np.random.default_rng(0)
    shown = [Picture(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(count)]
    texts = ("red green", "blue", "What is red?", "green green blue")
    return [MediaItem("image", decoded=p, alt=texts[i % 4]) for i, p in enumerate(shown)]


def tones(count: int) -> list[MediaItem]:
    """Tones of different height, of different length."""
    texts = ("red", "green, then blue", "blue red")
    found = []
    for i in range(count):
        time = np.arange(round(16_000 * (0.5 + 0.07 * i))) / 16_000
        wave = (0.3 * np.sin(2 * np.pi * 250 * 2**i * time)).astype(np.float32)
        found.append(MediaItem("audio", decoded=Sound(wave, 16_000), alt=texts[i % 3]))
    return found


SENSES = pytest.mark.parametrize(("sense", "items"), [("vision", pictures(4)), ("audio", tones(3))])


@SENSES
def test_media_together_cost_what_each_costs_alone(
    sense: str, items: list[MediaItem], make_model: Callable[..., Composed]
) -> None:
    model, processor = make_model()
    head = make_head(model, alone(sense), 0)
    ones = [pack([processor.encode(sample(i, item), supervise="words")]) for i, item in enumerate(items)]
    pair = processor.encode(sample(9, *items[:2]), supervise="words")
    rest = [processor.encode(sample(i, item), supervise="words") for i, item in enumerate(items[2:])]
    with torch.no_grad():
        each = [float(words_loss(model, head, row)) for row in ones]
        together = float(words_loss(model, head, pack([pair, *rest])))
    assert min(each) > 0.1
    assert together == pytest.approx(sum(each), rel=1e-4)


@SENSES
def test_the_encoder_and_the_head_learn_and_nothing_else(
    sense: str, items: list[MediaItem], make_model: Callable[..., Composed]
) -> None:
    model, processor = make_model()
    prepare(model, alone(sense), seed=0)
    head = make_head(model, alone(sense), 0)
    words_loss(model, head, pack([processor.encode(sample(0, *items), supervise="words")])).backward()
    tower = {"vision": "model.vision_tower.", "audio": "model.audio_tower."}[sense]
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached and all(name.startswith(tower) for name in reached)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def told(head: PictureWords | SoundWords, states: Any) -> list[list[int]]:
    """The likeliest token of each place up to the end, or of each moment without blanks and repetitions."""
    if isinstance(head, PictureWords):
        best = head(states).argmax(2).tolist()
        return [list(itertools.takewhile(lambda token: token != head.end, tokens)) for tokens in best]
    found = []
    for one in states:
        groups = torch.stack([one[at : at + 4].mean(0) for at in range(0, len(one), 4)])
        best = head.words(groups).argmax(1).tolist()
        found.append([token for token, _ in itertools.groupby(best) if token != head.blank])
    return found


@SENSES
def test_an_encoder_learns_to_tell_what_it_sees_or_hears(
    sense: str, items: list[MediaItem], make_model: Callable[..., Composed], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_model()
    trained = prepare(model, alone(sense), seed=0)
    assert trained
    model.train()
    head = make_head(model, alone(sense), 0)
    row = pack([processor.encode(sample(0, *items), supervise="words")])
    parameters = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(250):
        loss = words_loss(model, head, row)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen: list[Any] = []
    monkeypatch.setattr(type(head), "loss", lambda self, states, words, *_: seen.append(states) or torch.zeros(()))
    model.eval()
    with torch.no_grad():
        words_loss(model, head, row)
        assert told(head, seen[0]) == row.words
        if isinstance(head, SoundWords):
            assert head.tell(seen[0]) == row.words


def test_a_head_is_the_same_for_the_same_seed_and_draws_from_nobody(make_model: Callable[..., Composed]) -> None:
    model, _ = make_model()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for sense in ("vision", "audio"):
        a, b, c = (make_head(model, alone(sense), seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not all(torch.equal(a[name], c[name]) for name in a)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- in a run


def train(config: RunConfig, only: str | None = None) -> Path:
    return Run(config, console=Console(file=io.StringIO())).train(only)


def test_a_stage_of_words_leaves_the_encoder_that_the_model_is_made_of(
    apart: Callable[..., RunConfig], tmp_path: Path
) -> None:
    model = train(apart())
    made = load_file(model / "model.safetensors")
    for sense in ("vision", "audio"):
        (file,) = (tmp_path / "run" / "parts" / sense).glob("*.safetensors")
        part = {f"model.{sense}_tower.{name}": tensor for name, tensor in load_file(file).items()}
        assert part.keys() <= made.keys()
        assert all(torch.equal(made[name], tensor) for name, tensor in part.items())
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["stage"] for row in metrics] == [s for s in ("language", "vision", "audio", "joint") for _ in range(3)]
    assert {row["stage"] for row in read_lines(tmp_path / "run" / "samples.jsonl")} == {"joint"}


def test_the_loss_written_down_is_that_of_a_word(apart: Callable[..., RunConfig], tmp_path: Path) -> None:
    """In the first step of vision every picture's text is the same."""
    train(apart(), "vision")
    row = next(r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["stage"] == "vision")
    assert row["target_tokens"] % 4 == 0 and row["samples"] == 4
    vocabulary = 300
    assert 0.5 * math.log(vocabulary) < row["loss"] < 2.5 * math.log(vocabulary)
    assert row["tokens"] == 4 * 4  # places of four pictures, and no text


@pytest.fixture
def mute(apart: Callable[..., RunConfig], tmp_path: Path) -> Callable[[str], RunConfig]:
    """A run whose language model is a folder of a configuration and a tokenizer: its weights are not there."""
    folder = train(apart("whole"), "language").parent / "parts" / "language"
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16", "num_hidden_layers": 30}))
    for file in folder.glob("*.safetensors"):
        file.unlink()

    def make(name: str) -> RunConfig:
        config = apart(name)
        language = config.model.language.model_copy(update={"random": None, "path": str(folder)})
        model = config.model.model_copy(update={"language": language})
        return config.model_copy(update={"model": model, "stages": config.stages[1:3]})

    return make


@pytest.mark.slow
def test_an_encoder_learns_words_without_the_weights_of_a_released_language_model(
    mute: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    """Also from a checkpoint, and in that language model's own precision, as if it were there."""
    train(mute("run"), "audio")

    def stop(metrics: StepMetrics) -> None:
        if metrics.stage_step == 2:
            raise KeyError("stopped here")

    for _ in range(2):  # once in each stage
        with pytest.raises(KeyError, match="stopped here"):
            Run(mute("again"), console=Console(file=io.StringIO()), on_step=stop).train("audio")
    train(mute("again"), "audio")
    for sense in ("vision", "audio"):
        one, two = (load_file(tmp_path / run / "parts" / sense / "model.safetensors") for run in ("run", "again"))
        assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_weights_a_language_model_has_the_size_that_it_would_have(
    apart: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = apart()
    folder = str(train(config, "language").parent / "parts" / "language")
    update = {"random": None, "path": folder, "add_tokens": ("<more>", "<and more>")}
    model = config.model.model_copy(update={"language": config.model.language.model_copy(update=update)})
    whole, mute = (compose(model, language_weights=weights) for weights in (True, False))
    assert {p.device.type for p in mute.model.language_model.parameters()} == {"meta"}
    assert mute.model.config.text_config.vocab_size == whole.model.config.text_config.vocab_size
    assert mute.processor.tokenizer.get_vocab() == whole.processor.tokenizer.get_vocab()
    shapes = [{n: (p.shape, p.dtype) for n, p in made.model.named_parameters()} for made in (whole, mute)]
    assert shapes[0] == shapes[1]


def test_a_random_language_model_is_drawn_all_the_same_so_that_what_follows_it_is_too(
    apart: Callable[..., RunConfig],
) -> None:
    """Before, between and behind it the same numbers are drawn: runs keep their results bit for bit."""
    one, two = (compose(apart().model, seed=5, texts=["red"], language_weights=w).model for w in (True, False))
    theirs = dict(two.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in one.named_parameters())


@pytest.mark.slow
def test_other_words_make_another_encoder(apart: Callable[..., RunConfig]) -> None:
    def encoder(name: str) -> bytes:
        config = apart(name)
        train(config.model_copy(update={"stages": (config.stages[1], config.stages[3])}), "vision")
        (file,) = (Path(config.out) / "parts" / "vision").glob("*.safetensors")
        return file.read_bytes()

    first, again = encoder("a"), encoder("b")
    data = Path(str(apart().data.train))
    data.write_text(data.read_text().replace("a red picture", "green"))
    assert first == again != encoder("c")
