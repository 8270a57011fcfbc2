"""The harness of the benches: what it tells is arithmetic, and the tables in the repository are what it wrote."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import harness

    return harness


def test_each_side_is_told_by_its_best_round(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of ours take 2, 1 and 4 s, the peer's 6, 5 and 4 s; the first two of each do not count."""
    now = 0.0
    ours, peer = iter([9, 9, 2, 1, 4]), iter([9, 9, 6, 5, 4])

    def takes(seconds: object) -> None:
        nonlocal now
        now += next(seconds)  # type: ignore[call-overload]

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    case = harness.Case("it", lambda: takes(ours), {"peer": lambda: takes(peer)}, rounds=3, bar=4.5)
    (line,) = harness.timed(case)
    assert (line.ours, line.peer, line.ratio, line.ratios) == (1, 4, 4, [3, 5, 1])
    assert line.cells("ms") == ["it", "1000.00", "peer", "4000.00", "4.00", "1.00 3.00 5.00", "4.5 missed"]
    line.bar = 4.0
    assert line.cells("samples/s")[1:] == ["1.00", "peer", "4.00", "4.00", "1.00 3.00 5.00", "4 reached"]


def test_sides_may_tell_the_seconds_that_count(harness: ModuleType) -> None:
    ours, peer = iter([9.0, 9.0, 2.0, 1.0]), iter([9.0, 9.0, 6.0, 5.0])
    case = harness.Case("it", lambda: next(ours), {"peer": lambda: next(peer)}, rounds=2, tells=True)
    (line,) = harness.timed(case)
    assert (line.ours, line.peer, line.ratio, line.ratios) == (1, 5, 5, [3, 5])


def test_sides_that_differ_are_not_timed(harness: ModuleType) -> None:
    def differ() -> None:
        raise AssertionError("they differ")

    case = harness.Case("it", pytest.fail, {"peer": pytest.fail}, check=differ)
    with pytest.raises(AssertionError, match="they differ"):
        harness.timed(case)


@pytest.mark.parametrize("path", sorted(BENCH.glob("results/*.json")), ids=lambda path: path.stem)
def test_the_tables_are_those_that_were_measured(path: Path, harness: ModuleType, tmp_path: Path) -> None:
    about = json.loads(path.read_text())["machine"]
    harness.written(harness.read(path), tmp_path, about)
    for ending in (".json", ".md"):
        assert (tmp_path / path.name).with_suffix(ending).read_text() == path.with_suffix(ending).read_text()
    assert {"processor", "cores", "torch", "transformers"} <= about.keys()


def test_the_pages_name_every_bench() -> None:
    sys.path.insert(0, str(BENCH))
    try:
        from run import BENCHES
    finally:
        sys.path.remove(str(BENCH))
    page = (BENCH / "README.md").read_text()
    for name in (*BENCHES, "train", "gpu"):
        assert (BENCH / f"{name}.py").exists()
        assert f"`{name}`" in page


@pytest.fixture
def material(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import train_material

    return train_material


def test_training_samples_are_as_long_as_llavas(material: ModuleType) -> None:
    """As the bench's page says: 7 % without a picture, 150 text tokens in the median, a tail past a thousand."""
    given = material.talks(100, equal=False, image_id=4)
    texts = sorted(len(talk.ids) - 1 - (0 if talk.picture is None else 576) for talk in given)
    assert sum(talk.picture is None for talk in given) == 7
    assert texts[49] <= 150 <= texts[50] and texts[-1] > 1000
    assert all(talk.ids.count(4) == (0 if talk.picture is None else 576) for talk in given)
    same = material.talks(8, equal=True, image_id=4)
    assert {len(talk.ids) for talk in same} == {1 + 576 + 150}
    assert max(len(talk.ids) for talk in material.talks(32, equal=False, image_id=4)) > 1000 + 577


def test_races_are_told_by_tokens_that_are_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import train

    def steps(*seconds: float, loss: float, peak: float) -> list[dict[str, float]]:
        return [{"seconds": s, "tokens": 60, "loss": loss, "peak_mb": peak, "least_seconds": 1.5} for s in seconds]

    asked = argparse.Namespace(samples=8, threads=1, rounds=2)
    ours, theirs = steps(9, 2, 3, loss=2.0, peak=100), steps(9, 6, 6, loss=2.0001, peak=150)
    found = train.empty(asked)
    found.add(train.Case("it", "it", 3.0, "full"), {"": ours, "transformers": theirs, "ms-swift": theirs})
    lines = [line.cells("tokens/s") for line in found.speed.lines]
    assert lines[0] == ["it", "30.00", "transformers", "10.00", "3.00", "2.00 2.50 3.00", "3 reached"]
    assert lines[1][-1] == "1.3 reached"
    (memory, beside) = (line.cells("MB") for line in found.memory.lines)
    assert memory == ["it", "100.00", "transformers", "150.00", "1.50", "1.50 1.50 1.50", "2 missed"]
    assert beside[-1] == ""
    assert found.losses.rows[0] == ["it, against transformers: 5.0e-05", "1e-05 missed"]
    assert found.limits.rows[0] == ["it", "transformers", "3.00", "4.00", "0.75", ""]
    told = [verdict for table in found.tables() for _, verdict in table.verdicts()]
    assert told == ["3 reached", "1.3 reached", "2 missed", "1e-05 missed", "1e-05 missed"]


@pytest.mark.parametrize("train", ["full", "lora", "connector"])
def test_our_side_of_the_race_takes_steps(
    train: str, material: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loader that stands in for avlm's own has all that the loop of a stage asks of one."""
    import train_sides

    from avlm.models import memory

    class OverError(Exception):
        pass

    class Turns:
        left, losses = 2, []

        def wait(self) -> bool:
            self.left -= 1
            if self.left < 0:
                raise OverError
            return True

        def done(self, tokens: int, loss: float, operations: float) -> None:
            self.losses.append(loss)

    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)
    parts = {name: {**part, "num_hidden_layers": 1} for name, part in material.MODELS["tiny"].items()}
    monkeypatch.setitem(material.MODELS, "tiny", parts)
    monkeypatch.setattr(material, "CLIP", {**material.CLIP, "image_size": 28})
    monkeypatch.setattr(material, "SIDE_PX", 28)
    monkeypatch.setattr(material, "CELLS", 4)
    ours, _ = material.build_models("tiny", tmp_path)
    (tmp_path / "run").mkdir()
    spec = train_sides.Spec(str(ours), "tiny", train, 4, False, 1, str(tmp_path / "run"))
    turns = Turns()
    with pytest.raises(OverError):
        train_sides.of_avlm(spec, turns)
    assert len(turns.losses) == 2 and turns.losses[1] < turns.losses[0]


def test_operations_are_those_that_torch_counts(material: ModuleType) -> None:
    """Forward and backward of transformers' own class, whose attention looks at pairs that the mask then hides."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    parts = material.MODELS["tiny"]["language"]
    text = material.Talk(tuple(range(16, 56)), None, 1)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in material.LLAMA.items() if k != "model_type"}, **parts))
    ids = torch.tensor([text.ids])
    with FlopCounterMode(display=False) as counter:
        model.set_attn_implementation("eager")
        model(input_ids=ids, logits_to_keep=39).logits.sum().backward()
    attention = 3 * 2 * 2 * parts["num_hidden_layers"] * parts["hidden_size"]
    whole = counter.get_total_flops() - attention * 40 * 40
    ours = material.operations([text], "tiny", "full", 16) - attention * 40 * 41 // 2
    assert abs(whole - ours) < 2000  # the angles of the rotation are a product too
