"""Settings: frozen, checked against each other, written and read without loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from avlm.config.connectors import (
    ConvConnector,
    LinearConnector,
    PerceiverConnector,
    PixelShuffleConnector,
    PrefixConnector,
    QformerConnector,
    SwigluConnector,
    WindowQformerConnector,
)
from avlm.config.io import build, override, parse_value, read_mapping, to_yaml
from avlm.config.media import AudioSpec, Convolution, MediaSpec, VideoSpec, VisionSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.config.run import RunConfig
from avlm.config.stage import Lora, Stage, TrainPart
from avlm.errors import ConfigError
from avlm.recipes import RECIPES, recipe

FRESH = {"model_type": "llama"}


def read_back(text: str, path: Path) -> RunConfig:
    path.write_text(text, encoding="utf-8")
    return build(RunConfig, read_mapping(path))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_the_same_after_yaml_and_after_json(name: str, tmp_path: Path) -> None:
    run = recipe(name)
    assert read_back(to_yaml(run), tmp_path / "run.yaml") == run
    assert read_back(json.dumps(run.model_dump(mode="json")), tmp_path / "run.json") == run
    assert recipe(str(tmp_path / "run.yaml")) == run


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], include_characters="\n\t"))


@settings(deadline=None)
@given(WORDS | st.sampled_from(["1e-4", "2024-11-21", "yes", "null", "12:30", "0x1f", "1_000", "=", "~", "- a"]))
def test_any_text_is_the_same_after_yaml(text: str) -> None:
    only = Stage(name="a", train={"language": TrainPart(lr=1)}, steps=1, tasks=(text,))
    run = RunConfig(recipe=text, out=text, model="m", stages=(only,))
    assert build(RunConfig, parse_value(to_yaml(run))) == run


def test_our_yaml_means_the_same_to_any_other_reader(tmp_path: Path) -> None:
    run = override(recipe("tiny"), ["out='1e-4'", "stages.joint.train.language.lr=1e-05"])
    assert yaml.safe_load(to_yaml(run)) == run.model_dump(mode="json")


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path: Path) -> None:
    run = recipe("sft")
    assert read_back("\ufeff" + to_yaml(run), tmp_path / "run.yaml") == run
    assert read_back("\ufeff" + json.dumps(run.model_dump(mode="json")), tmp_path / "run.json") == run


FILES = [
    ("a.yaml", "", "{path}: holds nothing, and settings are a mapping. Start it with `recipe: NAME`"),
    ("a.yaml", "- a", "{path}: holds a list, and settings are a mapping. Start it with `recipe: NAME`"),
    ("a.json", "3", "{path}: holds one value, and settings are a mapping. Start it with `recipe: NAME`"),
    (
        "a.yaml",
        "a: 1\nb: {c: 1, c: 2}",
        "{path}: not readable as YAML (the key c stands twice at line 2, column 11: b: {{c: 1, c: 2}} ^). Correct it",
    ),
    ("a.json", '{"a": 1, "a": 2}', "{path}: not readable as JSON (the key a stands twice). Correct it"),
    ("a.json", '{"a": ', "{path}: not readable as JSON (Expecting value: line 1 column 7 (char 6)). Correct it"),
    ("a.yaml", "a: !!python/object/apply:os.system [true]", None),
    ("a.yaml", "a: [1", None),
    ("a.json", "[" * 100_000, None),
]


@pytest.mark.parametrize(("name", "text", "message"), FILES)
def test_a_file_that_holds_no_settings_is_refused(name: str, text: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_mapping(path)
    if message is None:
        assert str(error.value).startswith(f"{path}: not readable as {path.suffix[1:].upper()} (")
    else:
        assert str(error.value) == message.format(path=path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_mapping(tmp_path / "none.yaml")
    assert str(error.value) == f"{tmp_path / 'none.yaml'}: there is no such file. Check the path"
    (tmp_path / "latin.yaml").write_bytes("out: Läufe".encode("latin-1"))
    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="not readable as YAML"):
            read_mapping(path)


def test_errors_of_a_file_name_the_file_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(recipe("tiny")).replace("batch_samples", "batch_sample", 1))
    with pytest.raises(ConfigError) as error:
        recipe(str(path))
    assert str(error.value) == (
        f"{path}: stages.language.batch_sample is not a setting. Did you mean stages.language.batch_samples?"
    )


def test_a_truth_value_for_a_word_is_told_to_be_quoted() -> None:
    with pytest.raises(ConfigError) as error:
        build(AudioPart, {"encoder": {"path": "x"}, "length": True})
    assert str(error.value) == 'length=true is not one of its values. Write it in quotes: "true".'
    assert build(AudioPart, {"encoder": {"path": "x"}, "length": "true"}).length == "true"


def test_an_unknown_key_is_named_before_the_key_that_it_was_meant_for() -> None:
    with pytest.raises(ConfigError) as error:
        build(RunConfig, {"recipe": "a", "outt": "b", "model": "m", "stages": []})
    assert str(error.value) == "outt is not a setting. Did you mean out?"


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_frozen(name: str) -> None:
    run = recipe(name)
    for group, key in (
        (run, "seed"),
        (run.data, "train"),
        (run.stages[0], "steps"),
        (run.stages[0].schedule, "kind"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(group, key, getattr(group, key))


# ---------------------------------------------------------------- what does not go together


def stage(name: str = "a", **given: Any) -> Stage:
    return Stage(**{"name": name, "train": {"language": TrainPart(lr=1e-4)}, "steps": 1, **given})


def seeing(**given: Any) -> ModelConfig:
    return ModelConfig(
        language=LanguagePart(random=FRESH),
        vision=VisionPart(encoder=Source(random={"model_type": "bit"})),
        **given,
    )


def hearing() -> ModelConfig:
    return ModelConfig(language=LanguagePart(random=FRESH), audio=AudioPart(encoder=Source(path="x")))


def refused(model: ModelConfig | str, *stages: Stage) -> str:
    with pytest.raises(ConfigError) as error:
        accepted(model, *stages)
    return str(error.value)


def accepted(model: ModelConfig | str, *stages: Stage) -> None:
    build(RunConfig, {"recipe": "r", "out": "o", "model": model, "stages": list(stages)})


LR = TrainPart(lr=1e-4)


def test_a_stage_that_trains_an_absent_part_is_refused() -> None:
    assert refused(seeing(), stage(train={"audio_connector": LR})) == (
        "stage a trains audio_connector, and the model has only vision, vision_connector, language. "
        "Remove stages.a.train.audio_connector, or add the part to the model."
    )
    accepted(hearing(), stage(train={"audio_connector": LR}))
    accepted(seeing(), stage(train={"audio_connector": TrainPart(lr=1, optional=True), "language": LR}))


def test_adapters_go_on_any_part_and_what_peft_has_once_is_the_same_for_all() -> None:
    accepted(seeing(), stage(train={part: TrainPart(lr=1, lora=Lora()) for part in ("vision", "vision_connector")}))
    both = {"vision": TrainPart(lr=1, lora=Lora(rank=2)), "language": TrainPart(lr=1, lora=Lora(rank=4, alpha=8))}
    accepted(seeing(), stage(train=both))
    for name, value in (("dora", True), ("rslora", True), ("dropout", 0.1)):
        mixed = {**both, "language": TrainPart(lr=1, lora=Lora(rank=4, **{name: value}))}
        ours = getattr(Lora(), name)
        assert refused(seeing(), stage(train=mixed)) == (
            f"stage a has adapters with {name}={ours} on vision and {name}={value} on language, and PEFT has one "
            f"{name} for all adapters of a stage (only rank and alpha may differ). "
            f"Set stages.a.train.language.lora.{name}={ours}."
        )


def test_adapters_on_a_part_that_is_built_from_scratch_are_refused() -> None:
    assert "builds the language part from scratch with adapters on it" in refused(
        seeing(), stage(builds="language", train={"language": TrainPart(lr=1, lora=Lora())}, rows="text")
    )


def test_experts_are_balanced_only_where_the_language_model_learns() -> None:
    accepted(seeing(), stage(train={"language": LR}, balance=0.02))
    assert refused(seeing(), stage(train={"vision_connector": LR}, balance=0.02)) == (
        "stage a has balance=0.02, which teaches the language model to use all its experts, and does not train it. "
        "Add stages.a.train.language.lr, or set stages.a.balance=0."
    )


def test_two_stages_of_one_name_are_refused() -> None:
    assert refused("m", stage("a"), stage("b"), stage("a")) == (
        "two stages are called a; a stage's name is its directory. Rename one of them."
    )
    accepted("m", stage("a"), stage("b"), stage("c"))


def test_a_stage_that_trains_nothing_is_refused_with_something_that_works() -> None:
    assert refused(seeing(), stage(train={})) == (
        "stage a trains nothing. Name a part, such as stages.a.train.language.lr=1e-4."
    )
    data = {"recipe": "r", "out": "o", "model": "m", "stages": [stage(train={})]}
    assert override(build(RunConfig, data), ["stages.a.train.language.lr=1e-4"]).stages[0].train == {"language": LR}


def test_rows_for_an_absent_sense_are_refused() -> None:
    assert refused(hearing(), stage(rows="vision")) == (
        "stage a reads rows with vision, and the model has no vision part. Remove the stage, or add model.vision."
    )
    accepted(seeing(), stage(rows="vision"))


@pytest.mark.parametrize(("rows", "part"), [("text", "vision_connector"), ("audio", "vision"), ("vision", "audio")])
def test_a_part_that_no_row_of_the_stage_reaches_is_refused(rows: Any, part: Any) -> None:
    both = ModelConfig(
        language=LanguagePart(random=FRESH),
        vision=VisionPart(encoder=Source(path="x")),
        audio=AudioPart(encoder=Source(path="x")),
    )
    assert refused(both, stage(rows=rows, train={"language": LR, part: LR})) == (
        f"stage a trains {part} on rows={rows}, which never reach it. "
        f"Remove stages.a.train.{part}, or set stages.a.rows=any."
    )
    accepted(both, stage(rows="any", train={"language": LR, part: LR}))


ALONE = {"builds": "vision", "rows": "vision", "supervise": "words", "train": {"vision": LR}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"builds": None}, "builds none"),
        ({"builds": "language", "rows": "any", "train": {"language": LR}}, "builds none"),
        ({"train": {"vision": LR, "language": LR}}, "trains other parts with it"),
        ({"train": {"vision": LR, "vision_connector": LR}}, "trains other parts with it"),
    ],
)
def test_only_an_encoder_that_is_built_and_trained_alone_learns_words(change: dict[str, Any], why: str) -> None:
    assert refused(seeing(), stage(**{**ALONE, **change})) == (
        f"stage a has supervise=words, which is how an encoder learns by itself, and {why}. "
        "Set builds: vision or audio and train that part alone, or stages.a.supervise=answers."
    )
    accepted(seeing(), stage(**ALONE))
    accepted(seeing(), stage(**{**ALONE, **change, "supervise": "answers"}))


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"rows": "any"}, "stages.a.rows=vision"),  # a text, or a video, has no picture to tell the words of
        ({"describe": 0.5}, "stages.a.describe=0"),  # nor has a picture that is given in words
    ],
)
def test_an_encoder_that_learns_words_needs_a_medium_of_its_own_in_every_row(
    change: dict[str, Any], advice: str
) -> None:
    assert advice in refused(seeing(), stage(**{**ALONE, **change}))
    accepted(seeing(), stage(**{**ALONE, **change, "supervise": "answers"}))


def test_a_part_with_weights_is_not_built_again() -> None:
    building = stage(name="b", builds="audio", rows="audio", train={"audio": LR})
    accepted(hearing(), building)
    settings = {"recipe": "r", "out": "o", "stages": [building, stage()]}
    assert build(RunConfig, {**settings, "model": hearing()}).left_out() == ("b",)
    assert build(RunConfig, {**settings, "model": "some/folder"}).left_out() == ("b",)
    fresh = hearing().model_copy(update={"audio": AudioPart(encoder=Source(random={"model_type": "whisper"}))})
    assert build(RunConfig, {**settings, "model": fresh}).left_out() == ()


def test_a_built_part_has_to_be_there_and_to_be_trained() -> None:
    assert refused(seeing(), stage(builds="audio", train={"vision": LR})) == (
        "stage a builds the audio part, and the model has none. Add model.audio, or remove the stage."
    )
    building = {"builds": "vision"}
    assert refused(seeing(), stage(**building)) == (
        "stage a builds the vision part but does not train it. Add stages.a.train.vision.lr."
    )
    accepted(seeing(), stage(**building, train={"vision": LR, "language": LR}))


def test_a_part_is_trained_where_it_is_built_with_nothing_that_is_not_there() -> None:
    model = seeing(audio=AudioPart(encoder=Source(random={"model_type": "whisper"})))
    train = {"vision": LR, "audio_connector": LR}
    assert refused(model, stage(builds="vision", train=train)) == (
        "stage a builds the vision part in a small model of its own, which has no audio_connector. "
        "Remove stages.a.train.audio_connector."
    )


def test_a_part_is_built_once_and_before_the_model_is_composed() -> None:
    first = stage("x", builds="vision", train={"vision": LR})
    assert refused(seeing(), first, stage("y", builds="vision", train={"vision": LR})) == (
        "stages x and y both build the vision part, and the second would undo the first. Remove one of them."
    )
    assert refused(seeing(), stage("y"), first) == (
        "stage x builds the vision part after stage y has trained the model that it belongs in. Put it before y."
    )
    accepted(seeing(), first, stage("y"))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (VisionSpec, {"image_size_px": 0, "cell_px": 14}),
        (VisionSpec, {"image_size_px": 13, "cell_px": 14}),
        (VisionSpec, {"image_size_px": 14, "cell_px": 14, "std": [0, 1, 1]}),
        (AudioSpec, {"hop": 0}),
        (AudioSpec, {"sample_rate_hz": -1}),
        (AudioSpec, {"window_frames": 0}),
        (Convolution, {"stride": 0}),
        (VideoSpec, {"fps": 0}),
        (VideoSpec, {"min_frames": 3, "max_frames": 2}),
        (MediaSpec, {"visoin": {}}),
        (Source, {}),
        (Source, {"path": "x", "random": {"model_type": "x"}}),
        (Source, {"random": {"hidden_size": 1}}),
        (Stage, {"name": "A B", "steps": 1}),
        (Stage, {"name": "../x", "steps": 1}),
        (Stage, {"name": "a", "steps": 0}),
        (Stage, {"name": "a", "steps": 1, "describe": 1.1}),
        (Stage, {"name": "a", "steps": 1, "describe": -0.1}),
        (Stage, {"name": "a", "steps": 1, "supervise": "alt"}),
        (PrefixConnector, {"stack": 4}),
        (PrefixConnector, {"tokens": 4}),
        (PrefixConnector, {"stack": 4, "tokens": 0}),
        (LinearConnector, {"prompts": -1}),
        (SwigluConnector, {"hidden_size": 0}),
        (SwigluConnector, {"scale": 0}),
        (ConvConnector, {"kernel": 0}),
        (PixelShuffleConnector, {"side": 0}),
        (QformerConnector, {"dropout": 1}),
        (QformerConnector, {"cross_every": 0}),
        (PerceiverConnector, {"queries": 0}),
        (TrainPart, {"lr": float("inf")}),
        (TrainPart, {"lr": float("nan")}),
        (TrainPart, {"lr": -1}),
    ],
)
def test_a_number_that_cannot_work_is_refused_when_the_settings_are_made(kind: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(kind, given)


def refusal(kind: Any, given: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        build(kind, given)
    return str(error.value)


def test_squares_of_a_sound_are_refused() -> None:
    sound = {"encoder": {"path": "x"}}
    assert refusal(AudioPart, {**sound, "connector": {"kind": "pixel_shuffle"}}) == (
        "connector.kind=pixel_shuffle joins squares of a picture, and sound has no rows and columns. "
        "Use a connector for sequences, such as {kind: mlp, stack: 4}."
    )
    build(AudioPart, {**sound, "connector": {"kind": "mlp", "stack": 4}})
    build(VisionPart, {**sound, "connector": {"kind": "pixel_shuffle"}})


@pytest.mark.parametrize("kind", [QformerConnector, WindowQformerConnector])
@pytest.mark.parametrize(("width", "heads", "near"), [(770, 12, 768), (5, 12, 12)])
def test_heads_that_do_not_divide_the_width_are_refused(kind: Any, width: int, heads: int, near: int) -> None:
    assert refusal(kind, {"width": width, "heads": heads}) == (
        f"width={width} is not a whole number of heads={heads}, so the heads cannot share it. Use {near} for width."
    )
    build(kind, {"width": near, "heads": heads})


def test_strides_that_skip_embeddings_are_refused() -> None:
    assert refusal(ConvConnector, {"stride": 6}) == (
        "stride=6 is more than kernel=5, so what lies between two tokens would reach neither. Use at most 5 for stride."
    )
    assert refusal(WindowQformerConnector, {"stride": 18}) == (
        "stride=18 is more than window=17, so what lies between two windows would be read by neither. "
        "Use at most 17 for stride."
    )
    build(ConvConnector, {"stride": 5})
    build(WindowQformerConnector, {"stride": 17})


def test_settings_recipes_and_layout_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, avlm.config.io, avlm.config.run, avlm.layout, avlm.recipes as r; "
        "[r.recipe(name) for name in r.RECIPES]; "
        "print(*sorted({'torch', 'transformers', 'numpy', 'PIL', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
