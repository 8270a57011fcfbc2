# ruff: noqa: E501 (whole messages are compared)
"""Dotted overrides: what they change, and what they say when they cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.connectors import LinearConnector, MlpConnector, PoolConnector
from avlm.config.data import DataConfig
from avlm.config.io import assemble, override, parse_value
from avlm.config.media import VideoSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.config.run import RunConfig
from avlm.config.stage import Lora, Stage, TrainPart
from avlm.errors import ConfigError


def run_config() -> RunConfig:
    return RunConfig(
        recipe="mine",
        out="runs/mine",
        model=ModelConfig(
            language=LanguagePart(random={"model_type": "llama", "hidden_size": 32}),
            vision=VisionPart(
                encoder=Source(random={"model_type": "siglip_vision_model"}), connector=MlpConnector(hidden_size=8)
            ),
            audio=AudioPart(encoder=Source(random={"model_type": "whisper"})),
        ),
        data=DataConfig(train="a.jsonl"),
        stages=(
            Stage(name="align", train={"vision_connector": TrainPart(lr=1e-3)}, rows="vision", steps=10),
            Stage(name="joint", train={"language": TrainPart(lr=1e-4)}, steps=20),
        ),
    )


def refusal(*assignments: str) -> str:
    with pytest.raises(ConfigError) as error:
        override(run_config(), assignments)
    return str(error.value)


CHANGES: list[tuple[str, Callable[[Any], object], object]] = [
    ("seed=7", lambda r: r.seed, 7),
    (" seed = 7 ", lambda r: r.seed, 7),
    ("max_steps=null", lambda r: r.max_steps, None),
    ("max_steps=5", lambda r: r.max_steps, 5),
    ("data.too_long=drop", lambda r: r.data.too_long, "drop"),
    ("data.train=a=b.jsonl", lambda r: r.data.train, "a=b.jsonl"),
    ("data.train=*/train.parquet", lambda r: r.data.train, "*/train.parquet"),
    ("data.train={a,b}/s-{0..9}.tar", lambda r: r.data.train, "{a,b}/s-{0..9}.tar"),
    ("data.train=[ab].jsonl", lambda r: r.data.train, "[ab].jsonl"),
    ("data.train=[a, '*.jsonl']", lambda r: [one.path for one in r.data.train], ["a", "*.jsonl"]),
    ("data={train: x.jsonl, workers: 0}", lambda r: (r.data.train, r.data.workers), ("x.jsonl", 0)),
    ("stages.joint.steps=3", lambda r: r.stages[1].steps, 3),
    ("stages.1.steps=3", lambda r: r.stages[1].steps, 3),
    ("stages.joint.train.language.lr=1e-4", lambda r: r.stages[1].train["language"].lr, 0.0001),
    ("stages.joint.train.audio.lr=2E-5", lambda r: r.stages[1].train["audio"].lr, 0.00002),
    ("stages.joint.train.language.lora.rank=8", lambda r: r.stages[1].train["language"].lora, Lora(rank=8)),
    ("stages.joint.tasks=[vqa, match]", lambda r: r.stages[1].tasks, ("vqa", "match")),
    ("stages.joint.optimizer.betas.1=0.95", lambda r: r.stages[1].optimizer.betas, (0.9, 0.95)),
    ("stages.joint.augment.flip=true", lambda r: r.stages[1].augment.flip, True),
    ("stages.joint.augment.flip=no", lambda r: r.stages[1].augment.flip, False),
    ("stages.joint.optimizer.clip=null", lambda r: r.stages[1].optimizer.clip, None),
    ("model.vision.connector=linear", lambda r: r.model.vision.connector, LinearConnector()),
    ("model.vision.connector=pool", lambda r: r.model.vision.connector, PoolConnector()),
    ("model.vision.connector.kind=linear", lambda r: r.model.vision.connector, LinearConnector()),
    ("model.vision.connector.kind=mlp", lambda r: r.model.vision.connector, MlpConnector(hidden_size=8)),
    ("model.vision.connector.stack=4", lambda r: r.model.vision.connector, MlpConnector(hidden_size=8, stack=4)),
    ("model.vision.connector={kind: pool, tokens: 9}", lambda r: r.model.vision.connector, PoolConnector(tokens=9)),
    ("model.audio.length=true", lambda r: r.model.audio.length, "true"),
    ("model.audio.length=window", lambda r: r.model.audio.length, "window"),
    ("model.audio=null", lambda r: r.model.audio, None),
    ("model.video={fps: 2}", lambda r: r.model.video, VideoSpec(fps=2.0)),
    ("model.language.random.hidden_size=64", lambda r: r.model.language.random["hidden_size"], 64),
    ("model.language.random.rope.theta=1e6", lambda r: r.model.language.random["rope"], {"theta": 1e6}),
    ("model=some/folder", lambda r: r.model, "some/folder"),
    ("out=2024", lambda r: r.out, "2024"),
    ("out=2024-11-21", lambda r: r.out, "2024-11-21"),
    ("out=1e5", lambda r: r.out, "1e5"),
    ("out=yes", lambda r: r.out, "yes"),
    ("out='a: b'", lambda r: r.out, "a: b"),
    ("out=Läufe/1", lambda r: r.out, "Läufe/1"),
]


@pytest.mark.parametrize(("assignment", "read", "value"), CHANGES, ids=[c[0] for c in CHANGES])
def test_an_override_changes_that_setting(assignment: str, read: Callable[[Any], object], value: object) -> None:
    changed = override(run_config(), [assignment])
    assert read(changed) == value
    assert type(read(changed)) is type(value)


def test_an_override_changes_nothing_else_and_not_the_settings_it_began_with() -> None:
    before = run_config()
    changed = override(before, ["stages.joint.train.language.lr=0.5", "model.language.random.hidden_size=64"])
    assert before == run_config()
    back = override(changed, ["stages.joint.train.language.lr=1e-4", "model.language.random.hidden_size=32"])
    assert back == before


def test_later_overrides_win_and_see_the_earlier_ones() -> None:
    changed = override(
        run_config(), ["model.vision.connector=linear", "model.vision.connector.stack=2", "seed=1", "seed=2"]
    )
    assert isinstance(changed.model, ModelConfig)
    assert changed.model.vision is not None
    assert changed.model.vision.connector == LinearConnector(stack=2)
    assert changed.seed == 2


def test_a_length_takes_the_place_of_the_other_one() -> None:
    changed = override(run_config(), ["stages.joint.epochs=2"])
    assert (changed.stages[1].steps, changed.stages[1].epochs) == (None, 2)
    changed = override(changed, ["stages.joint.steps=5"])
    assert (changed.stages[1].steps, changed.stages[1].epochs) == (5, None)
    with pytest.raises(ConfigError, match="and both are given"):
        override(changed, ["stages.joint.steps=5", "stages.joint.epochs=2"])


def test_a_group_that_is_absent_is_made_with_its_defaults() -> None:
    without = override(run_config(), ["model.audio=null"])
    changed = override(without, ["model.audio.encoder.path=x", "model.audio.connector.stack=2"])
    assert isinstance(changed.model, ModelConfig)
    assert changed.model.audio == AudioPart(encoder=Source(path="x"), connector=MlpConnector(stack=2))


def test_assemble_leaves_the_plain_data_alone() -> None:
    data: dict[str, Any] = {"language": {"path": "x"}}
    assert assemble(ModelConfig, data, ["video.fps=3"]).video.fps == 3
    assert data == {"language": {"path": "x"}}


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none())
def test_a_number_is_read_as_python_writes_it(value: object) -> None:
    text = (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )
    assert parse_value(text) == value


@settings(deadline=None)
@given(st.text())
def test_any_value_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):  # anything else that is raised would fail the test
        parse_value(text)


REFUSALS = [
    ("seed", "'seed' is not an override: an override is key=value. Write it like seed=1"),
    ("=1", "'=1' is not an override: an override is key=value. Write it like seed=1"),
    (" =1", "' =1' is not an override: an override is key=value. Write it like seed=1"),
    ("sead=1", "sead is not a setting. Did you mean seed?"),
    ("data.trian=x", "data.trian is not a setting. Did you mean data.train?"),
    ("stages.jont.steps=1", "stages.jont: there is no such member. Did you mean stages.joint?"),
    ("stages.2.steps=1", "stages.2: there is no such member. Known here: align, joint."),
    ("stages.².steps=1", "stages.²: there is no such member. Known here: align, joint."),
    ("stages.-1.steps=1", "stages.-1: there is no such member. Known here: align, joint."),
    ("stages.joint.stps=1", "stages.joint.stps is not a setting. Did you mean stages.joint.steps?"),
    ("stages.joint.train.langage.lr=1", "stages.joint.train.langage is not a setting. Did you mean stages.joint.train.language?"),
    ("stages.joint.train.language.lrr=1", "stages.joint.train.language.lrr is not a setting. Did you mean stages.joint.train.language.lr?"),
    ("stages.joint.schedule.warmpu=1", "stages.joint.schedule.warmpu is not a setting. Did you mean stages.joint.schedule.warmup?"),
    ("model.vison=null", "model.vison is not a setting. Did you mean model.vision?"),
    ("model.vision.connector.stak=2", "model.vision.connector.stak is not a setting. Did you mean model.vision.connector.stack?"),
    ("model.vision.connector={kind: pool, tokns: 2}", "model.vision.connector.tokns is not a setting. Did you mean model.vision.connector.tokens?"),
    ("model.vision.connector.tokens=2", "model.vision.connector.tokens is not a setting. Known here: kind, prompts, stack, hidden_size, layers, bias."),
    ("model.vision.connector=liner", "model.vision.connector='liner' is none of its kinds. Did you mean linear?"),
    ("model.vision.connector={kind: pol}", "model.vision.connector.kind='pol' is none of its kinds. Did you mean pool?"),
    ("model.vision.connector={stack: 2}", "model.vision.connector.kind is missing, and nothing can be assumed for it. Set it to one of linear, mlp, swiglu, prefix, pool, conv, pixel_shuffle, qformer, window_qformer, perceiver."),
    ("stages.joint.schedule.kind=cosin", "stages.joint.schedule.kind='cosin' is not one of its values. Did you mean cosine?"),
    ("stages.joint.rows=pictures", "stages.joint.rows='pictures' is not one of its values. Known here: text, vision, audio, any."),
    ("seed.x=1", "seed.x: seed=0 has no settings inside it. Set seed itself, or correct the key"),
    ("max_steps.x=1", "max_steps.x: max_steps=null has no settings inside it. Set max_steps itself, or correct the key"),
    ("seed=-1", "seed=-1: input should be greater than or equal to 0. Correct seed."),
    ("side_by_side=0", "side_by_side=0: input should be greater than or equal to 1. Correct side_by_side."),
    ("seed=abc", "seed='abc': input should be a valid integer, unable to parse string as an integer. Correct seed."),
    ("stages.joint.steps=1.5", "stages.joint.steps=1.5: input should be a valid integer, got a number with a fractional part. Correct stages.joint.steps."),
    ("stages.joint.train.language.lr=.inf", "stages.joint.train.language.lr=inf: input should be a finite number. Correct stages.joint.train.language.lr."),
    ("stages.joint.train.language.lr=.nan", "stages.joint.train.language.lr=nan: input should be a finite number. Correct stages.joint.train.language.lr."),
    ("stages.joint.train.language.lr=0", "stages.joint.train.language.lr=0: input should be greater than 0. Correct stages.joint.train.language.lr."),
    ("stages.joint.train.audio.lora.rank=1", "stages.joint.train.audio.lr is missing, and nothing can be assumed for it. Set stages.joint.train.audio.lr=..."),
    ("stages.joint.optimizer.betas.0=1", "stages.joint.optimizer.betas.0=1: input should be less than 1. Correct stages.joint.optimizer.betas.0."),
    ("stages.joint.tasks=vqa", "stages.joint.tasks='vqa': input should be a valid tuple. Write a list, such as [vqa]."),
    ("stages.joint.tasks=[7]", "stages.joint.tasks.0=7: input should be a valid string. Write it in quotes: \"7\"."),
    ("stages.joint.train.language=1e-4", "stages.joint.train.language=0.0001: there are settings inside it, and this is one value. Correct stages.joint.train.language."),
    ("seed=[1", "the value [1 is not readable as YAML. To have it as text, quote it: '[1'"),
    ("seed={a: 1, a: 2}", "the value {a: 1, a: 2} is not readable as YAML. To have it as text, quote it: '{a: 1, a: 2}'"),
    ("model.language={path: x, random: {model_type: llama}}", "model.language: a part comes from `path` or from `random`, and both are given. Set one of the two, the other to null."),
    ("model.video.min_frames=99", "model.video: min_frames=99 is more than max_frames=32, so no video has a right number of frames. Use at most 32 for min_frames."),
]  # fmt: skip


@pytest.mark.parametrize(("assignment", "message"), REFUSALS, ids=[r[0] for r in REFUSALS])
def test_a_refusal_says_what_is_wrong_and_what_to_do(assignment: str, message: str) -> None:
    assert refusal(assignment) == message


def test_the_settings_of_a_model_directory_cannot_be_overridden() -> None:
    assert refusal("model=folder", "model.video.fps=2") == (
        "model.video.fps: model='folder' has no settings inside it. Set model itself, or correct the key"
    )


@pytest.mark.parametrize(
    "advice",
    [
        ["stages.joint.train.audio.lora=null", "stages.joint.train.audio.lr=1e-4"],
        ["stages.joint.tasks=[vqa]"],
        ['stages.joint.tasks=["7"]'],
        ["model.language.path=x"],
        ["model.video.max_frames=99", "model.video.min_frames=99"],
        ["out='[1'"],
        ["stages.joint.schedule.kind=cosine"],
    ],
)
def test_the_advice_of_a_refusal_works(advice: list[str]) -> None:
    override(run_config(), advice)
