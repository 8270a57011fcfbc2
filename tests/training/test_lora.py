"""Adapters go exactly where they were wanted, train there, and come out in PEFT's format and merged alike."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import adapters, changed, logits, snapshot, stage, train_step
from torch import Tensor

from avlm.convert.compose import Composed
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.data.sources import JsonLines
from avlm.errors import ConfigError
from avlm.samples import Row, Sample
from avlm.training.lora import merge_adapters, save_adapters
from avlm.training.stages import part_modules, prepare

LORA: dict[str, Any] = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}
DORA: dict[str, Any] = {"rank": 4, "dora": True}
GPT2 = {"model_type": "gpt2"}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4}
CLIP = {"model_type": "clip_vision_model"}
MAMBA = {"model_type": "mamba", "state_size": 4}

Make = Callable[..., Composed]


@pytest.fixture
def row(small_model: Composed, tmp_path: Path) -> Row:
    """A packed row of four samples that goes through every part."""
    source = JsonLines(tmp_path / "rows.jsonl")
    return pack([small_model.processor.encode(source[i]) for i in range(4)])


@pytest.fixture
def rows_of(make_sample: Callable[..., Sample]) -> Callable[[Composed], Row]:
    """A packed row for whatever senses a model has."""

    def make(made: Composed) -> Row:
        media = made.processor.media_spec()
        kinds = [kind for kind, spec in (("image", media.vision), ("audio", media.audio)) if spec is not None]
        return pack([made.processor.encode(make_sample(*kinds, seed=seed)) for seed in (1, 2)])

    return make


# ---------------------------------------------------------------- beside what is trained whole


CONNECTORS_FIRST = {
    "vision_connector": {"lr": 1e-2},
    "audio_connector": {"lr": 1e-2},
    "language": {"lr": 1e-2, "lora": LORA},
}
CONNECTORS_LAST = dict(reversed(CONNECTORS_FIRST.items()))


@pytest.mark.parametrize("train", [CONNECTORS_FIRST, CONNECTORS_LAST], ids=["connectors first", "connectors last"])
def test_connectors_beside_adapters_are_trained_whole_and_no_base_weight_is(
    small_model: Composed, row: Row, train: dict[str, Any]
) -> None:
    """NeMo's `avlm_8b` with LoRA freezes both connectors, whatever its flags say."""
    model = small_model.model
    before = snapshot(model)
    how = stage(train)
    train_step(model, prepare(model, how), how, row)
    assert len(adapters(model)) == 2 * 3 * 2  # A and B, three targets, two layers
    assert all(p.abs().max() > 0 for p in adapters(model).values())
    connectors = ("model.vision_connector.", "model.audio_connector.")
    assert changed(model, before) == {name for name in before if name.startswith(connectors)}


def test_fresh_adapters_follow_from_the_seed_alone(small_model: Composed) -> None:
    def drawn(seed: int, global_seed: int) -> list[Tensor]:
        model = copy.deepcopy(small_model.model)
        torch.manual_seed(global_seed)
        prepare(model, stage({"language": {"lr": 1e-3, "lora": LORA}}), seed=seed)
        return list(adapters(model, ["lora_A"]).values())

    assert all(torch.equal(a, b) for a, b in zip(drawn(1, 1), drawn(1, 2), strict=True))
    assert not torch.equal(drawn(1, 1)[0], drawn(2, 1)[0])


@pytest.mark.parametrize(
    ("language", "lora"),
    [({}, LORA), ({}, {**LORA, "dora": True}), (MIXTRAL, {"rank": 4})],
    ids=["lora", "dora", "experts"],
)
def test_adapters_on_a_half_precision_model_are_single_precision(
    make_model: Make, rows_of: Callable[[Composed], Row], language: dict[str, Any], lora: dict[str, Any]
) -> None:
    made = make_model(language=language)
    model, row = made.model.to(torch.bfloat16), rows_of(made)
    how = stage({"language": {"lr": 1e-2, "lora": lora}})
    train_step(model, prepare(model, how), how, row)
    model.eval()
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    assert all(p.abs().max() > 0 for p in adapters(model).values())
    unmerged = logits(model, row)
    merge_adapters(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model, row), unmerged, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------- every linear layer, whatever it is called


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FAMILIES = [
    pytest.param("language", {"language": {}}, 2, ATTENTION | {"gate_proj", "up_proj", "down_proj"}, id="llama"),
    pytest.param(
        "language",
        {"language": {"model_type": "qwen2"}},
        2,
        ATTENTION | {"gate_proj", "up_proj", "down_proj"},
        id="qwen2",
    ),
    pytest.param("language", {"language": MIXTRAL}, 2, ATTENTION | {"gate_up_proj", "down_proj"}, id="mixtral"),
    pytest.param("language", {"language": MAMBA}, 2, {"in_proj"}, id="mamba: no fused matrix"),
    pytest.param("language", {"language": GPT2}, 2, {"c_attn", "c_proj", "c_fc"}, id="gpt2: fused, Conv1D"),
    pytest.param(
        "vision", {"vision": {}}, 2, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, id="siglip: no head"
    ),
    pytest.param(
        "vision", {"vision": CLIP}, 1, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, id="clip: layer -2"
    ),
    pytest.param(
        "vision",
        {"vision": {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]}},
        2,
        {"q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"},
        id="internvl",
    ),
    pytest.param("audio", {}, 2, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, id="whisper"),
    pytest.param("vision_connector", {}, 0, {"0", "2"}, id="a connector"),
]


@pytest.mark.parametrize(("part", "settings", "layers", "names"), FAMILIES)
def test_the_default_goes_on_all_linear_layers_that_are_read_and_trains_them(
    make_model: Make,
    rows_of: Callable[[Composed], Row],
    part: str,
    settings: dict[str, Any],
    layers: int,
    names: set[str],
) -> None:
    made = make_model(**settings)
    model, row = made.model, rows_of(made)
    before, untouched = snapshot(model), logits(model, row)
    how = stage({part: {"lr": 1e-2, "lora": {"rank": 2}}})
    train_step(model, prepare(model, how), how, row)
    model.eval()
    config = model.peft_config["default"]
    paths = [*config.target_modules, *(config.target_parameters or [])]
    assert {path.rpartition(".")[2] for path in paths} == names
    assert len({number for path in paths for number in re.findall(r"\.(\d+)\.", path)}) == layers
    B = adapters(model, ["lora_B"])
    assert len(B) == len(paths) and all(p.abs().max() > 0 for p in B.values())
    assert not changed(model, before)
    assert (logits(model, row) - untouched).abs().max() > 1e-4


# ---------------------------------------------------------------- patterns


def hit(model: Any, part: str, **lora: Any) -> set[str]:
    model = copy.deepcopy(model)
    prepare(model, stage({part: {"lr": 1e-3, "lora": {"rank": 1, **lora}}}))
    prefix = next(name for name, m in model.named_modules() if m is part_modules(model)[part])  # type: ignore[index]
    return {path.removeprefix(f"{prefix}.") for path in model.peft_config["default"].target_modules}


def test_patterns_match_whole_components(make_model: Make) -> None:
    model = make_model("vision", language={"num_hidden_layers": 12}).model
    every = hit(model, "language")
    inside = {path for path in every if path.startswith("model.layers.1.")}
    assert len(inside) == 7
    assert hit(model, "language", targets=["layers.1.**"]) == inside
    assert hit(model, "language", targets=["model.layers.1.*.*"]) == inside
    assert hit(model, "language", targets=["**"]) == every
    assert hit(model, "language", targets=["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj" for i in range(12)}
    assert hit(model, "language", targets=["layers.1*.mlp.up_proj"]) == {
        f"model.layers.{i}.mlp.up_proj" for i in (1, 10, 11)
    }
    assert hit(model, "language", targets=["layers.11.self_attn.*_proj"], exclude=["k_proj", "o_proj"]) == {
        "model.layers.11.self_attn.q_proj",
        "model.layers.11.self_attn.v_proj",
    }
    assert hit(model, "language", exclude=["mlp.*"]) == {path for path in every if "mlp" not in path}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        pytest.param(
            {"targets": ["q_proj", "qproj"]},
            "stages.s.train.language.lora.targets: qproj is the name of no linear layer in the language part, so it "
            "says nothing. The nearest names are q_proj, v_proj, o_proj; all-linear takes every one, and "
            "NAME.** all inside a module",
            id="a name",
        ),
        pytest.param(
            {"targets": ["layers.1.self_attention.q_proj"]},
            "stages.s.train.language.lora.targets: layers.1.self_attention.q_proj is the name of no linear layer in "
            "the language part, so it says nothing. The nearest names are layers.1.self_attn.q_proj, "
            "layers.1.self_attn.v_proj, layers.1.self_attn.o_proj; all-linear takes every one, and NAME.** all inside "
            "a module",
            id="a path",
        ),
        pytest.param(
            {"exclude": ["gateproj"]},
            "stages.s.train.language.lora.exclude: gateproj is the name of no linear layer in the language part, so it "
            "says nothing. The nearest names are gate_proj, v_proj, q_proj; all-linear takes every one, and "
            "NAME.** all inside a module",
            id="left out in vain",
        ),
        pytest.param(
            {"exclude": ["**"]},
            "stages.s.train.language.lora: exclude takes away every layer that targets names, so nothing of the "
            "language part would be trained. Set stages.s.train.language.lora.exclude=[]",
            id="nothing left",
        ),
    ],
)
def test_patterns_that_name_nothing_are_refused_with_the_nearest_names(
    small_model: Composed, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(small_model.model, stage({"language": {"lr": 1e-3, "lora": lora}}))
    assert str(error.value) == message


def test_the_head_has_an_adapter_only_where_it_is_named_and_a_layer_of_its_own(make_model: Make) -> None:
    tied, untied = make_model("vision").model, make_model("vision", language={"tie_word_embeddings": False}).model
    with pytest.raises(ConfigError, match="lm_head is the name of no linear layer"):
        prepare(tied, stage({"language": {"lr": 1e-3, "lora": {"targets": ["lm_head"]}}}))
    assert "lm_head" not in hit(untied, "language")
    assert hit(untied, "language", targets=["lm_head"]) == {"lm_head"}


def test_a_part_without_linear_layers_is_refused(make_model: Make) -> None:
    model = make_model("vision").model
    model.model.vision_tower = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    with pytest.raises(ConfigError, match=r"the vision part has no linear layer .* Train it whole, without lora"):
        prepare(model, stage({"vision": {"lr": 1e-3, "lora": {}}}))


@pytest.mark.parametrize(("name", "value", "off"), [("dora", True, False), ("dropout", 0.1, 0)])
def test_experts_in_one_tensor_cannot_have_every_kind_of_adapter(
    make_model: Make, name: str, value: Any, off: Any
) -> None:
    model = make_model("vision", language=MIXTRAL).model
    with pytest.raises(ConfigError) as error:
        prepare(model, stage({"language": {"lr": 1e-3, "lora": {name: value}}}))
    assert str(error.value) == (
        f"stages.s.train.language.lora.{name}={value}: model.layers.0.mlp.experts.gate_up_proj holds all experts in "
        f"one tensor, and PEFT has no {name} for those. Set stages.s.train.language.lora.{name}={str(off).lower()}, or "
        "leave them out with stages.s.train.language.lora.exclude=[experts.*]"
    )
    assert hit(model, "language", **{name: value}, exclude=["experts.*"]) == hit(
        model, "language", exclude=["experts.*"]
    )
    assert len(hit(model, "language", exclude=["experts.*"])) == 2 * 4


# ---------------------------------------------------------------- saved and merged


MANY = {
    "vision": {"lr": 1e-2, "lora": {"rank": 2, "alpha": 8}},
    "audio": {"lr": 1e-2, "lora": {"rank": 3, "alpha": 32, "targets": ["layers.1.**"]}},
    "audio_connector": {"lr": 1e-2},
    "language": {"lr": 1e-2, "lora": {"rank": 4, "alpha": 32, "exclude": ["o_proj"]}},
}


def everywhere(**lora: Any) -> dict[str, Any]:
    return {part: {**how, **({"lora": {**how["lora"], **lora}} if "lora" in how else {})} for part, how in MANY.items()}


@pytest.mark.parametrize(
    ("train", "language"),
    [
        pytest.param(CONNECTORS_FIRST, {}, id="lora and connectors"),
        pytest.param(everywhere(), {}, id="several parts, different ranks"),
        pytest.param(everywhere(dora=True), {}, id="dora"),
        pytest.param(everywhere(rslora=True), {}, id="rslora"),
        pytest.param(everywhere(dora=True, rslora=True, dropout=0.1), {}, id="dora, rslora, dropout"),
        pytest.param({"language": {"lr": 1e-2, "lora": DORA}}, GPT2, id="gpt2"),
        pytest.param({"language": {"lr": 1e-2, "lora": {"rank": 2}}}, MIXTRAL, id="mixtral with its experts"),
        pytest.param({"language": {"lr": 1e-2, "lora": {"targets": ["experts.*"]}}}, MIXTRAL, id="its experts alone"),
        pytest.param(
            {"vision": {"lr": 1e-2}, "audio": {"lr": 1e-2}, "language": {"lr": 1e-2, "lora": {"rank": 2}}},
            {},
            id="encoders trained whole beside it",
        ),
    ],
)
def test_adapters_in_peft_alone_merged_and_unmerged_give_the_same_logits(
    make_model: Make,
    rows_of: Callable[[Composed], Row],
    tmp_path: Path,
    train: dict[str, Any],
    language: dict[str, Any],
) -> None:
    from peft import PeftModel

    made = make_model(language=language)
    row = rows_of(made)
    save_model(*made, tmp_path / "base")
    model = load_model(tmp_path / "base").model
    names = [name for name, _ in model.named_modules()]
    untouched = logits(model, row)
    how = stage(train)
    trained = prepare(model, how)
    train_step(model, trained, how, row)
    model.eval()
    unmerged = logits(model, row)
    assert (unmerged - untouched).abs().max() > 0.01  # or the comparison would say nothing

    save_adapters(model, [trained[p] for p, h in how.train.items() if h.lora is None], tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(load_model(tmp_path / "base").model, tmp_path / "adapters").eval()
    torch.testing.assert_close(logits(loaded, row), unmerged, rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    files = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]

    merge_adapters(model)
    torch.testing.assert_close(logits(model, row), unmerged, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in model.named_modules()] == names  # plain layers are left behind
    assert not hasattr(model, "peft_config") and not adapters(model)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), row), unmerged, rtol=1e-5, atol=1e-5)


def test_ranks_and_scales_are_those_of_each_part(make_model: Make, tmp_path: Path) -> None:
    for rslora, root in ((False, 1.0), (True, 0.5)):
        model = make_model().model
        prepare(model, stage(everywhere(rslora=rslora)))
        ranks = {"vision": (2, 8), "audio": (3, 32), "language": (4, 32)}
        for part, (rank, alpha) in ranks.items():
            layers = [m for m in part_modules(model)[part].modules() if hasattr(m, "lora_A")]  # type: ignore[index]
            assert layers and {layer.lora_A["default"].out_features for layer in layers} == {rank}
            assert {round(layer.scaling["default"], 9) for layer in layers} == {round(alpha / rank**root, 9)}


def test_the_saved_settings_name_every_layer_in_full(make_model: Make, tmp_path: Path) -> None:
    model = make_model().model
    prepare(model, stage(everywhere()))
    save_adapters(model, [], tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {path for path in config["target_modules"] if "audio" in path} == {
        f"model.audio_tower.layers.1.{name}"
        for name in (*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "fc1", "fc2")
    }
    assert config["r"] == 2 and sorted(config["rank_pattern"].values()) == [3, 4]


# ---------------------------------------------------------------- in a run


def test_a_run_leaves_the_adapters_of_all_parts_of_a_stage_in_one_folder(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    from avlm.training.chain import train

    lora = "{rank: 2, alpha: 64, dropout: 0.2, dora: true}"
    both = [f"stages.joint.train.{part}.lora={lora}" for part in ("audio", "language")]
    train(small_run("run", [*both, "stages.joint.train.audio.lora.rank=3", "data.workers=0"]))
    stages = tmp_path / "run" / "stages"
    base = load_model(stages / "align")
    source = JsonLines(tmp_path / "rows.jsonl")
    row = pack([base.processor.encode(source[i]) for i in range(4)])
    merged, untouched = logits(load_model(stages / "joint").model, row), logits(base.model, row)
    loaded = PeftModel.from_pretrained(base.model, tmp_path / "run" / "adapters" / "joint").eval()
    torch.testing.assert_close(logits(loaded, row), merged, rtol=1e-5, atol=1e-5)
    assert (merged - untouched).abs().max() > 1e-3
    assert [path.name for path in (tmp_path / "run" / "adapters").iterdir()] == ["joint"]


def test_a_state_head_is_among_a_stages_adapters(small_run: Callable[..., Any], tmp_path: Path) -> None:
    """In the first of two stages it is fresh, so that PEFT loads it onto a model that was given one."""
    import io

    from peft import PeftModel
    from rich.console import Console

    from avlm.training.chain import Run

    config = small_run("run", ["stages.joint.state_head={lr: 0.05}", "data.workers=0", "samples.prompts=0"])
    more = config.stages[3].model_copy(update={"name": "more"})
    console = Console(record=True, file=io.StringIO(), width=1000)
    Run(config.model_copy(update={"stages": (*config.stages[:1], *config.stages[2:], more)}), console=console).train()
    said = (
        "joint: its adapters hold a state head, and the model that the stage began with has none. Call "
        "add_state_head(3) on that model before PEFT loads them"
    )
    assert said in (text := console.export_text()) and "more: its adapters hold" not in text

    def states(model: Any) -> Tensor:
        inputs = {"input_ids": torch.arange(40, 60)[None], "state_positions": torch.tensor([3, 19])}
        with torch.no_grad():
            found: Tensor = model(**inputs).state_logits
            return found

    stages = tmp_path / "run" / "stages"
    for before, name in (("align", "joint"), ("joint", "more")):
        base = load_model(stages / before).model
        if base.state_head is None:
            base.add_state_head(3)
        untouched = states(base)
        loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapters" / name).eval()
        merged = states(load_model(stages / name).model)
        torch.testing.assert_close(states(loaded), merged, rtol=1e-5, atol=1e-5)
        assert (merged - untouched).abs().max() > 1e-2


@pytest.mark.slow
def test_beside_a_language_model_trained_whole_adapters_are_only_merged_and_that_is_said(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    import io

    from rich.console import Console

    from avlm.training.chain import Run

    told = io.StringIO()
    changes = ["stages.joint.train.language.lora=null", "stages.joint.train.audio.lora.rank=2", "data.workers=0"]
    Run(small_run("run", changes), console=Console(file=told, width=200)).train()
    assert "joint: its adapters stand merged in the stage's model only" in told.getvalue()
    assert not (tmp_path / "run" / "adapters").exists()
    before, after = (load_model(tmp_path / "run" / "stages" / name).model for name in ("align", "joint"))
    assert any("audio_tower" in name for name in changed(after, snapshot(before)))


def test_what_a_later_stage_could_not_do_is_said_before_the_first_step(small_run: Callable[..., Any]) -> None:
    from avlm.training.chain import Run

    for change, message in (
        ("stages.joint.train.language.lora.targets=[query]", "targets: query is the name of no linear layer"),
        ("stages.joint.balance=0.1", "the language model is a llama, which has no experts"),
    ):
        seen: list[Any] = []
        run = small_run(f"run{len(message)}", [change, "data.workers=0"])
        with pytest.raises(ConfigError, match=message):
            Run(run, on_step=seen.append).train()
        assert not seen
