"""Encoder work spread over processes: whoever encodes what, they learn what one learns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avlm.config.run import RunConfig
from avlm.convert.compose import compose
from avlm.data.encode import pack
from avlm.data.loader import StepData, StepLoader
from avlm.data.processor import AvlmProcessor
from avlm.samples import MediaItem, Picture, Row, Sample, Sound, Text, Turn
from avlm.training.spreading import Spread
from avlm.training.swapping import DTYPES, swap
from avlm.training.world import World
from tests.training.test_parallel import LR, MODES, STAGE, TRAIN, assert_same, check_masks, done, everything, plain
from tests.training.test_preference import pairs
from tests.training.worlds import changed, in_world, lines, train_in

__all__ = ["pairs", "plain"]  # fixtures

SPREAD = {"encoders": "spread"}


def parcel(source: int, to: int) -> list[Tensor]:
    """What one process has for another: any number of tensors of any kind and shape."""
    made = torch.Generator().manual_seed(10 * source + to)
    shapes = [(3, 4, 5), (), (0, 7), (2,)][: (source + 2 * to) % 5]
    return [torch.randn(shape, generator=made).to(DTYPES[(source + i) % 3]) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("size", [2, 3])
def test_every_tensor_comes_as_it_was_sent(size: int) -> None:
    def work(world: World) -> bool:
        for _ in range(2):
            counts = [len(parcel(source, world.rank)) for source in range(size)]
            got = swap(world, [parcel(world.rank, to) for to in range(size)], counts)
            for source, tensors in enumerate(got):
                expected = parcel(source, world.rank)
                assert [t.dtype for t in tensors] == [t.dtype for t in expected]
                for ours, theirs in zip(tensors, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert swap(world, [[] for _ in range(size)], [0] * size) == [[] for _ in range(size)]
        return True

    done(in_world(size, work))


@pytest.mark.parametrize(
    ("mode", "train"),
    [
        ("data", "whole"),
        ("fsdp", "lora"),
        *(pytest.param("data", train, marks=pytest.mark.slow) for train in ("connectors", "lora")),
        *(pytest.param("fsdp", train, marks=pytest.mark.slow) for train in ("whole", "connectors")),
    ],
)
def test_two_processes_learn_what_one_learns(
    plain: Callable[..., RunConfig], tmp_path: Path, train: str, mode: str
) -> None:
    config = plain(TRAIN[train])
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two", parallel={"mode": mode, **SPREAD})))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("mode", MODES)
def test_any_process_may_hold_any_mixture(plain: Callable[..., RunConfig], tmp_path: Path, mode: str) -> None:
    check_masks(plain, tmp_path, 2, mode, 12, "spread")


def rows_of_the_first(processor: AvlmProcessor, world: World, kind: str, counts: list[int]) -> list[Row]:
    """Rows of so many pictures or equally long sounds each, all of them with the first process."""
    rng = np.random.default_rng(0)
    rows = []
    for count in counts if world.first else []:
        pictures = [Picture(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(count)]
        sounds = [Sound(rng.normal(0, 0.1, 6000).astype(np.float32), 16_000) for _ in range(count)]
        items = pictures if kind == "image" else sounds
        media = [MediaItem("image" if kind == "image" else "audio", decoded=one) for one in items]
        turns = (Turn("user", (*media, Text("what?"))), Turn("assistant", (Text("red"),)))
        rows.append(pack([processor.encode(Sample(str(count), turns))]))
    return rows


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_each_process_encodes_its_share_and_rows_get_what_they_would_have_had(
    plain: Callable[..., RunConfig], kind: str
) -> None:
    config = plain({"vision_connector": {"lr": LR}})

    def work(world: World) -> int:
        model, processor = compose(config.model, seed=0, texts=["a b c"])
        model.requires_grad_(False).eval()
        rows = rows_of_the_first(processor, world, kind, [3, 0, 5])
        encoded = [0]
        first = model.model.vision_tower if kind == "image" else model.model.audio_tower.layers[0]
        first.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
        found = []
        with torch.no_grad(), Spread(world, model).step(rows) as of_row:
            made = sum(encoded)
            for number, row in enumerate(rows):
                with of_row(number):
                    found.append(model(**row.inputs()).logits)
        assert sum(encoded) == made  # nothing was encoded again
        assert model.model.features is None
        for ours, row in zip(found, rows, strict=True):
            torch.testing.assert_close(ours, model(**row.inputs()).logits, rtol=0, atol=1e-5)
        return made

    assert in_world(2, work) == [("done", 4)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            {"train": {"audio_connector": {"lr": LR}}, "loss": "distill", "rows": "audio"},
            id="distill",
            marks=pytest.mark.slow,
        ),
        pytest.param({"train": TRAIN["lora"], "loss": "dpo", "batch_samples": 4, "row_tokens": 160}, id="dpo"),
        pytest.param({"train": everything(), "batch_rows": 3, "row_tiles": 4}, id="planned rows"),
    ],
)
def test_what_stages_learn_is_the_same(
    plain: Callable[..., RunConfig], pairs: Path, tmp_path: Path, stage: dict[str, Any]
) -> None:
    config = plain(**stage)
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two", parallel=SPREAD)))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("mode", [pytest.param("data", marks=pytest.mark.slow), "fsdp"])
def test_what_frozen_encoders_made_is_found_again_by_whoever_is_to_make_it(
    plain: Callable[..., RunConfig], tmp_path: Path, mode: str
) -> None:
    config = plain(TRAIN["connectors"], steps=6)
    done(train_in(1, config))
    kept = {"use": "on", "folder": str(tmp_path / "kept")}
    two = changed(config, tmp_path / "two", parallel={"mode": mode, **SPREAD}, features=kept)
    found = train_in(2, two)
    done(found)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert re.search(r"features of vision: [1-9]\d* found, \d+ made", found[0][1]), found[0][1]


@pytest.mark.slow
def test_an_encoder_that_learns_words_by_itself_keeps_its_own_and_that_is_told(
    plain: Callable[..., RunConfig], rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows(alts=True)
    config = plain({"audio": {"lr": LR}}, supervise="words", rows="audio", builds="audio")
    then = {**STAGE, "name": "then", "train": TRAIN["connectors"], "steps": 1}
    stages = [config.stages[0].model_dump(mode="json"), then]
    config = changed(config, tmp_path / "one", stages=stages)
    done(train_in(1, config))
    found = train_in(2, changed(config, tmp_path / "two", parallel={"mode": "fsdp", **SPREAD}))
    done(found)
    assert_same(tmp_path / "one", tmp_path / "two")
    for setting in ("parallel.mode=fsdp", "parallel.encoders=spread"):
        assert f"{setting} notwithstanding" in found[0][1]


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_value_is_found_in_the_sample_that_brought_it(
    plain: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The step is looked at once more with every process encoding what it reads, so that it can be told."""
    steps = StepLoader.steps

    def spoiled(loader: StepLoader, first: int, last: int) -> Iterator[StepData]:
        for data in steps(loader, first, last):
            for row in data.rows:
                sounds = [place.sample_id for place in row.places if place.count("audio")]
                if "6" in sounds and row.input_features is not None:
                    row.input_features[sounds.index("6"), 5, 7] = float("nan")
            yield data

    monkeypatch.setattr(StepLoader, "steps", spoiled)
    config = changed(plain(TRAIN["connectors"]), tmp_path / "two", parallel={"mode": mode, **SPREAD})
    found = train_in(2, config)
    named = [message for kind, message in found if kind == "DataError"]
    told = f'the sound holds NaN before the model has seen it: {tmp_path / "s6.wav"}, of sample "6"'
    assert named and told in named[0], found


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_embeddings_in_half_precision_travel_as_they_are(
    plain: Callable[..., RunConfig], tmp_path: Path, mode: str
) -> None:
    config = plain(everything(), precision="bfloat16")
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two", parallel={"mode": mode, **SPREAD})))
    np.testing.assert_allclose(lines(tmp_path / "two"), lines(tmp_path / "one"), rtol=2**-6)  # bfloat16 has 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_four_processes_hold_any_mixture_for_long(plain: Callable[..., RunConfig], tmp_path: Path, mode: str) -> None:
    check_masks(plain, tmp_path, 4, mode, 2000, "spread")
