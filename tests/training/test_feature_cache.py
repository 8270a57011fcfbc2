"""What frozen encoders made is found again: the same bits, whatever was there before, and only where it pays."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from avlm.config.features import FeatureCache
from avlm.config.io import build, override
from avlm.config.run import RunConfig, SampleConfig
from avlm.config.stage import Stage
from avlm.data.encode import pack
from avlm.errors import ConfigError
from avlm.models.features import Medium
from avlm.samples import Row, Sample
from avlm.training.chain import Run
from avlm.training.features import (
    MEASURED,
    PROVEN,
    KeptEncoder,
    KeptFeatures,
    constant_parts,
    encoder_digest,
    medium_key,
)
from avlm.training.observe import MEASURED as TIMES
from avlm.training.observe import read_lines
from avlm.training.segments import Segments
from avlm.training.stages import prepare
from tests.training.worlds import changed, lines, train_in

BOTH = ("vision", "audio")


# ---------------------------------------------------------------- the whole model


def features(made: Any, row: Row, folder: Path, use: str = "on", said: list[str] | None = None) -> dict[str, Tensor]:
    """What the connectors make of a row, with a store that begins and ends here."""
    say = (said if said is not None else []).append
    store = KeptFeatures(made.model, BOTH, FeatureCache(use=use), folder, say)  # type: ignore[arg-type]
    made.model.eval()
    made.model.model.features = store
    inputs = {name: value for name, value in row.inputs().items() if name not in ("position_ids", "row_lengths")}
    with torch.no_grad():
        found: dict[str, Tensor] = made.model.model.embed(**inputs)[1]
    made.model.model.features = None
    store.close()
    return found


def mixed(made: Any, make_sample: Callable[..., Sample], *order: int) -> Row:
    return pack([made.processor.encode(make_sample("image", "audio", seed=i)) for i in order])


def test_an_encoder_that_learns_is_never_asked_for(make_model: Callable[..., Any], tmp_path: Path) -> None:
    made = make_model()
    store = KeptFeatures(made.model, BOTH, FeatureCache(use="on"), tmp_path, print)
    made.model.train()
    assert [part for part in BOTH if store.keeps(part)] == []
    made.model.model.vision_tower.eval()
    assert [part for part in BOTH if store.keeps(part)] == ["vision"]


def test_found_is_made_to_the_bit(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    made = make_model()
    row = mixed(made, make_sample, *range(6))
    said: list[str] = []
    cold, warm, elsewhere = (
        features(made, row, tmp_path / name, said=said) for name in ("kept", "kept", "never seen before")
    )
    for kind, tokens in cold.items():
        assert torch.equal(warm[kind], tokens) and torch.equal(elsewhere[kind], tokens)
    assert said == [
        f"features of {part}: {found} found, {made} made"
        for found, made in ((0, 6), (6 - PROVEN, PROVEN), (0, 6))
        for part in BOTH
    ]


def test_a_byte_that_changed_on_the_disk_costs_its_medium_another_encoding(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    made = make_model()
    row = mixed(made, make_sample, *range(6))
    cold = features(made, row, tmp_path)
    for path in tmp_path.rglob("*.data"):
        raw = bytearray(path.read_bytes())
        raw[5] ^= 16
        path.write_bytes(raw)
    said: list[str] = []
    warm = features(made, row, tmp_path, said=said)
    assert all(torch.equal(warm[kind], tokens) for kind, tokens in cold.items())
    made_again = PROVEN + 1
    assert said == [f"features of {p}: {6 - made_again} found, {made_again} made, 1 were damaged" for p in BOTH]
    said.clear()
    features(made, row, tmp_path, said=said)
    assert said == [f"features of {p}: {6 - PROVEN} found, {PROVEN} made" for p in BOTH]


def test_one_medium_twice_in_a_row_is_encoded_once(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    made = make_model()
    said: list[str] = []
    features(made, mixed(made, make_sample, 1, 2, 1, 1), tmp_path, said=said)
    assert said == [f"features of {part}: 0 found, 2 made" for part in BOTH]


def test_the_key_follows_from_all_that_the_embeddings_follow_from(make_model: Callable[..., Any]) -> None:
    def digests(**kwargs: Any) -> tuple[str, str]:
        model = make_model(**kwargs).model
        return encoder_digest(model, "vision"), encoder_digest(model, "audio")

    first = digests()
    assert digests() == first, "it follows from nothing else"
    assert digests(seeing={"layer": 1})[0] != first[0]
    assert digests(vision={"layer_norm_eps": 1e-5})[0] != first[0]
    assert digests(seeing={"connector": {"kind": "linear"}})[0] == first[0], "the connector comes behind what is kept"
    assert digests(hearing={"layer": 1})[1] != first[1]
    assert digests(hearing={"length": "window"})[1] != first[1]
    model = make_model().model
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).view(-1)[-1] += 1e-6
    assert encoder_digest(model, "vision") != first[0] and encoder_digest(model, "audio") == first[1]
    model.to(torch.bfloat16)
    assert encoder_digest(model, "audio") != first[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert encoder_digest(make_model().model, "audio") != first[1], "threads part a sum"
    torch.set_num_threads(threads)

    values = torch.zeros(3, 4, 4)
    keys = [medium_key("a", Medium(values)), medium_key("b", Medium(values)), medium_key("a", Medium(values, (1,)))]
    keys += [medium_key("a", Medium(values.view(3, 2, 8))), medium_key("a", Medium(values.bfloat16()))]
    changed = values.clone()
    changed[2, 3, 3] = torch.finfo(torch.float32).tiny
    keys.append(medium_key("a", Medium(changed)))
    assert len(set(keys)) == len(keys)


def test_only_what_is_frozen_and_shown_the_same_each_time_is_constant(make_model: Callable[..., Any]) -> None:
    def constant(train: list[str], **augment: Any) -> list[str]:
        settings = {"name": "s", "train": {part: {"lr": 1e-3} for part in train}, "steps": 1, "augment": augment}
        stage = build(Stage, settings)
        model = make_model().model
        prepare(model, stage)
        return list(constant_parts(model, stage))

    assert constant(["language", "vision_connector"]) == ["vision", "audio"]
    assert constant(["vision"]) == ["audio"]
    assert constant(["audio", "vision"]) == []
    assert constant(["language"], shift=0.1) == ["audio"]
    assert constant(["language"], noise=0.1) == ["vision"]


# ---------------------------------------------------------------- what is measured


def encoder(folder: Path, said: list[str], use: str = "auto") -> KeptEncoder:
    return KeptEncoder("features of ears", "digest", Segments(folder / "d", 2**26), use == "auto", said.append)


def media(count: int, size: int = 8) -> list[Medium]:
    return [Medium(torch.full((size, size), float(i))) for i in range(count)]


class Slow:
    """An encoder that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, medium: Medium) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        return medium.values * 2


def test_a_slow_encoder_is_kept_and_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    slow = Slow(0.01)
    kept = encoder(tmp_path, said)
    asked = media(2 * MEASURED)
    for _ in range(3):
        found = kept.recall(asked, slow)
        assert all(torch.equal(f, m.values * 2) for f, m in zip(found, asked, strict=True))
    assert slow.calls == 2 * MEASURED + PROVEN
    assert len(said) == 1 and said[0].startswith(f"features of ears: are kept in {tmp_path}; to encode one takes ")


def test_a_slow_disk_is_not_used_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Segments.read

    def slowly(self: Segments, key: bytes) -> Tensor | None:
        time.sleep(0.005)
        return read(self, key)

    monkeypatch.setattr(Segments, "read", slowly)
    said: list[str] = []
    fast = Slow(0.0)
    kept = encoder(tmp_path, said)
    asked = media(2 * MEASURED)
    for _ in range(3):
        found = kept.recall(asked, fast)
        assert all(torch.equal(f, m.values * 2) for f, m in zip(found, asked, strict=True))
    assert fast.calls == 3 * 2 * MEASURED
    assert len(said) == 1 and said[0].startswith("features of ears: are not kept; to encode one takes ")
    forced = encoder(tmp_path / "on", said, use="on")
    fast = Slow(0.0)
    forced.recall(asked, fast)
    forced.recall(asked, fast)
    assert fast.calls == 2 * MEASURED + PROVEN and len(said) == 1


def test_what_another_machine_made_is_not_taken_for_one_s_own(tmp_path: Path) -> None:
    said: list[str] = []
    asked = media(4)
    kept = encoder(tmp_path, said, use="on")
    for medium in asked:
        kept.kept.write(medium_key("digest", medium), medium.values * 2 + 1e-6)
    found = kept.recall(asked, Slow(0.0))
    assert all(torch.equal(f, m.values * 2) for f, m in zip(found, asked, strict=True))
    assert said == [
        f"features of ears: what {tmp_path / 'd'} holds is not what this machine makes, to the last bit, so it is not "
        "used. Name another folder with features.folder=DIR"
    ]


def test_a_full_folder_is_told_once_and_what_is_in_it_is_found(tmp_path: Path) -> None:
    said: list[str] = []
    kept = KeptEncoder("features of ears", "digest", Segments(tmp_path / "d", 16 * 512), False, said.append)
    asked, slow = media(40), Slow(0.0)
    for _ in range(2):
        found = kept.recall(asked, slow)
        assert all(torch.equal(f, m.values * 2) for f, m in zip(found, asked, strict=True))
    assert slow.calls == 80 - kept.found and kept.found >= 16
    assert said == [
        f"features of ears: {tmp_path} is full, and all in it is in use; what is not there is encoded each time. "
        "Make room on the disk, or raise features.disk_mb"
    ]


def test_a_folder_that_cannot_be_written_to_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    kept = encoder(tmp_path / "file", said)
    for _ in range(2):
        kept.recall(media(3), Slow(0.0))
    assert said == [
        f"features of ears: {tmp_path / 'file'} cannot be written to (Not a directory); what is not there is encoded "
        "each time"
    ]


# ---------------------------------------------------------------- whole runs


class Dead(BaseException):
    """Stands for a kill."""


def run(config: RunConfig, at: int | None = None) -> str:
    """Train, up to a death behind a step; what was said."""

    def die(metrics: Any) -> None:
        if metrics.step == at:
            raise Dead

    console = Console(record=True, file=io.StringIO(), width=300)
    if at is None:
        Run(config, console=console).train()
    else:
        with pytest.raises(Dead):
            Run(config, console=console, on_step=die).train()
    return console.export_text()


def facts(out: Path) -> dict[str, Any]:
    """All that two runs must have in common: every weight, every line but its times."""
    weights = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("stages/*/*.safetensors"))}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {**weights, "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in rows]}


@pytest.fixture
def frozen(small_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Two stages with frozen eyes and ears, each reading its rows about three times; nothing is built."""

    def make(name: str, *overrides: str) -> RunConfig:
        small = small_run(name)
        train = {"audio_connector": {"lr": 1e-3}, "vision_connector": {"lr": 1e-3}}
        language = {"language": {"lr": 1e-3}}
        settings: dict[str, Any] = {"steps": 9, "batch_samples": 4, "row_tokens": 128}
        stages = [{"name": "align", "train": train}, {"name": "tune", "train": {**train, **language}}]
        update = {"stages": tuple(build(Stage, {**s, **settings}) for s in stages), "samples": SampleConfig(prompts=0)}
        found = small.model_copy(update=update)
        return override(found, overrides)

    return make


@pytest.mark.slow
def test_runs_with_the_cache_end_with_the_same_bits(
    frozen: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run(frozen("whole", "features=on", f"features.folder={tmp_path / 'kept'}"))
    whole = facts(tmp_path / "whole")
    for part in BOTH:  # 6 of 12 rows have one, and 36 are read
        assert f"align: features of {part}: {18 - 6 - PROVEN} found, {6 + PROVEN} made" in said
        assert f"tune: features of {part}: {18 - PROVEN} found, {PROVEN} made" in said
    again = run(frozen("again", "features=on", f"features.folder={tmp_path / 'kept'}"))
    assert facts(tmp_path / "again") == whole
    assert again.count(f"{18 - PROVEN} found, {PROVEN} made") == 4
    run(frozen("auto"))
    assert facts(tmp_path / "auto") == whole, "what is measured decides nothing that is computed"
    monkeypatch.setattr("avlm.training.features.Times.worth_it", lambda self: False)
    assert "are not kept" in run(frozen("measured", "features=auto"))
    assert facts(tmp_path / "measured") == whole


@pytest.mark.parametrize(
    "left", ["warm", *(pytest.param(left, marks=pytest.mark.slow) for left in ("cold", "damaged"))]
)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(
    frozen: Callable[..., RunConfig], tmp_path: Path, left: str
) -> None:
    run(frozen("whole", "features=on"))
    assert not (tmp_path / "whole" / "features").exists(), "it goes when the run is done"
    for at in (4, 13):
        run(frozen("cut", "features=on"), at=at)
        kept = tmp_path / "cut" / "features"
        assert list(kept.rglob("*.data"))
        if left == "cold":
            shutil.rmtree(kept)
        if left == "damaged":
            for path in kept.rglob("*.data"):
                path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    run(frozen("cut", "features=on"))
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["data", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_share_a_folder(frozen: Callable[..., RunConfig], tmp_path: Path, mode: str) -> None:
    kept = f"features.folder={tmp_path / 'kept'}"
    config = frozen("one", "features=on", f"features.folder={tmp_path / 'alone'}")
    config = config.model_copy(update={"stages": config.stages[:1]})
    two = override(changed(config, tmp_path / "two", parallel={"mode": mode}), [kept])
    assert [how for how, _ in train_in(1, config)] == ["done"]
    assert [how for how, _ in train_in(2, two)] == ["done", "done"]
    torch.testing.assert_close(torch.tensor(lines(tmp_path / "two")), torch.tensor(lines(tmp_path / "one")), **CLOSE)
    found = [read_entries(tmp_path / name) for name in ("alone", "kept")]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 12
    assert all(torch.equal(embeddings, found[1][key]) for key, embeddings in found[0].items())


CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 0.0}


def read_entries(folder: Path) -> dict[tuple[str, bytes], Tensor]:
    """All that is kept, by encoder and medium."""
    found = {}
    for inner in folder.iterdir():
        if inner.is_dir():
            kept = Segments(inner, 1)
            kept.refresh()
            keys = kept.keys()
            for key in keys:
                embeddings = kept.read(key)
                assert embeddings is not None
                found[inner.name, key] = embeddings.clone()
    return found


@pytest.mark.slow
def test_without_the_cache_the_losses_are_the_same_but_for_rounding(
    frozen: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run(frozen("on", "features=on"))
    run(frozen("off", "features=off"))
    on, off = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("on", "off"))
    for a, b in zip(on, off, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_auto_keeps_nothing_where_no_row_comes_twice(frozen: Callable[..., RunConfig], tmp_path: Path) -> None:
    said = run(frozen("once", "stages.align.steps=3", "stages.tune.steps=3"))
    assert "features" not in said
    run(frozen("off", "stages.align.steps=3", "stages.tune.steps=3", "features=off"))
    assert facts(tmp_path / "once") == facts(tmp_path / "off"), "and so nothing is computed otherwise"


def test_the_setting_s_short_form(small_run: Callable[..., RunConfig]) -> None:
    for text, use in (("on", "on"), ("off", "off"), ("auto", "auto")):
        assert small_run(overrides=[f"features={text}"]).features == FeatureCache(use=use)  # type: ignore[arg-type]
        assert small_run(overrides=[f"features.use={text}"]).features.use == use
        both = small_run(overrides=[f"features={text}", "features.folder=x"])
        assert both.features == FeatureCache(use=use, folder="x")  # type: ignore[arg-type]
    assert build(RunConfig, {**small_run().model_dump(), "features": True}).features.use == "on"  # YAML's `on`
    assert build(RunConfig, {**small_run().model_dump(), "features": {"use": False}}).features.use == "off"
    with pytest.raises(ConfigError, match=r"features\.use"):
        small_run(overrides=["features=sometimes"])


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_choice_and_any_folder(frozen: Callable[..., RunConfig], tmp_path: Path) -> None:
    run(frozen("run", "features=on"), at=4)
    with pytest.raises(ConfigError) as error:
        Run(frozen("run", "features=off"))
    assert str(error.value) == (
        f"{tmp_path / 'run'} was begun with features.use=on, and now features.use=off. A run goes on with the settings "
        "it began with: set features.use=on, or choose another directory with out=DIR"
    )
    run(frozen("run", "features=on", f"features.folder={tmp_path / 'kept'}", "features.disk_mb=100"))
    assert list((tmp_path / "kept").rglob("*.data")), "a folder that was named is the user's"


def test_the_page_tells_of_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
    assert all(f"`features.{name}`" in page for name in FeatureCache.model_fields)
    assert all(f"`features={use}`" in page for use in FeatureCache.PRESETS)
    assert f"{FeatureCache().disk_mb:,} by default" in page
    assert f"The first {['', 'one', 'two'][PROVEN]} media that are\nfound are made as well" in page
