"""What a run does: its stages as data, the rows it learns from, where it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from avlm.config.base import Settings
from avlm.config.ctc import Ctc
from avlm.config.data import DataConfig, TrainData, whole_blend
from avlm.config.evaluate import Evaluate
from avlm.config.features import FeatureCache
from avlm.config.model import ModelConfig, Source
from avlm.config.parallel import ParallelConfig
from avlm.config.patterns import ALL_LINEAR, pattern_problem
from avlm.config.preference import Dpo
from avlm.config.save import SaveConfig
from avlm.config.speed import Speed
from avlm.config.watch import CountConfig, ProfileSteps, Tracker, WatchConfig

Part = Literal["vision", "vision_connector", "audio", "audio_beside", "audio_connector", "language"]
"""Everything that can be trained or frozen, by its one name."""

PARTS: tuple[Part, ...] = ("vision", "vision_connector", "audio", "audio_beside", "audio_connector", "language")

RARE: frozenset[Part] = frozenset({"audio_beside"})
"""Parts that few models have; where no stage trains them, nothing is said of them."""


Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0)]


class Lora(Settings):
    """Low-rank adapters through PEFT (arXiv:2106.09685), merged when the stage ends."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    targets: tuple[str, ...] = Field((ALL_LINEAR,), min_length=1)
    """Which layers of the part get an adapter: patterns over their names inside it, in whole components (`q_proj`,
    `mlp.*_proj`, `layers.1.**`), or `all-linear`, every linear projection of attention and MLP."""

    exclude: tuple[str, ...] = ()
    """Patterns of layers that get none after all."""

    dora: bool = False
    """Learn magnitudes apart from directions (DoRA, arXiv:2402.09353)."""

    rslora: bool = False
    """Scale by alpha over the root of the rank, rather than over the rank (rsLoRA, arXiv:2312.03732)."""

    @field_validator("targets", "exclude")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for problem in map(pattern_problem, patterns):
            if problem is not None:
                raise ValueError(problem)
        return patterns


class TrainPart(Settings):
    """How one part is trained in a stage. A part that a stage does not name is frozen."""

    lr: float = Field(gt=0)
    """Peak learning rate."""

    lora: Lora | None = None
    """Adapters instead of the full weights."""

    optional: bool = False
    """Leave the part out where the model does not have it; otherwise that is refused."""


class Schedule(Settings):
    """How the learning rate moves between its peak and nothing."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """`wsd` is warm-up, stable, decay (arXiv:2404.06395)."""

    warmup: float = Field(0.03, ge=0, le=1)
    """Share of the stage's steps over which the rate climbs from zero."""

    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps at the end over which `wsd` falls to the floor."""

    floor: float = Field(0.0, ge=0, le=1)
    """Lowest rate, as a share of the peak."""


class Optimizer(Settings):
    """AdamW (arXiv:1711.05101)."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps the moments in 8 bits, a quarter of the memory, with much the same result (arXiv:2110.02861;
    torchao, of the extra `quant`). It goes with `parallel.mode=data`."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Applied to matrices only, never to biases, norms or embeddings."""
    clip: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class Augment(Settings):
    """Changes that a stage makes to pictures and sounds as it reads them.

    Each draw is a function of the run's seed, the stage, the position in the data and the medium, so a
    resumed run sees the same ones. None of them changes how many tokens a medium takes.
    """

    shift: float = Field(0.0, ge=0, le=0.5)
    """Pictures move by up to this share of their side, edges repeated."""
    flip: bool = False
    """Mirror every other picture. Leave off where left and right, or writing, matter."""
    jitter: float = Field(0.0, ge=0, le=1)
    """Brightness and contrast change by up to this share."""
    erase: float = Field(0.0, ge=0, le=1)
    """A square of up to this share of the side is blotted out of every other picture."""

    pitch: float = Field(0.0, ge=0, le=0.5)
    """Formants move by up to this share, like a longer or shorter vocal tract (Jaitly and Hinton, 2013)."""
    tempo: float = Field(0.0, ge=0, lt=0.6)
    """The time axis is bent by up to this share within the clip's length."""
    squeeze: float = Field(0.0, ge=0, lt=1)
    """Speech becomes quicker by up to this share, with quiet around it in the same length."""
    tilt: float = Field(0.0, ge=0)
    """A random smooth curve of about this height, in units of 40 dB, is added along frequency."""
    noise: float = Field(0.0, ge=0, le=1)
    """Steady noise is added; at 1 up to 20 dB below the clip's peak, at 0.5 up to 40 dB below."""
    mask_bins: int = Field(0, ge=0)
    """Up to this many neighbouring mel bins are blanked, twice (SpecAugment, arXiv:1904.08779)."""
    mask_frames: float = Field(0.0, ge=0, lt=1)
    """Up to this share of the frames is blanked, twice."""


class StateTokens(Settings):
    """Plain text before each answer that tells what the question was, as VITA learns it (arXiv:2408.05211).

    The defaults are VITA-1.0's; VITA-1.5 has three pointing hands (U+261E, U+261F, U+261C).
    """

    audio: str = Field("<1>", min_length=1)
    """The question was heard."""
    noise: str = Field("<2>", min_length=1)
    """What was heard was not meant for the model."""
    text: str = Field("<3>", min_length=1)
    """The question was read."""

    @model_validator(mode="after")
    def _different(self) -> StateTokens:
        tokens = (self.audio, self.noise, self.text)
        if any(a.startswith(b) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j):
            raise ValueError(
                f"the state tokens {', '.join(tokens)} begin alike, so they could not be told apart. "
                "Use three different ones"
            )
        return self


class StateHead(Settings):
    """A linear layer that tells, where an answer begins, whether the question was meant for the model.

    It is a part of the model directory. VITA-1.5 (arXiv:2501.01957) has it beside its state tokens or instead of them.
    """

    lr: float = Field(gt=0)
    """Peak learning rate."""
    weights: tuple[Weight, Weight, Weight] = (1.0, 5.0, 1.0)
    """Of a question, of noise, and of a class that no row has, in the cross-entropy; VITA-1.5's."""


class First(Settings):
    """What a stage reads before it reads everything.

    What is hard to learn among much else may be learned soon by itself, and kept:
    a curriculum (Bengio and others, ICML 2009).
    """

    of: tuple[str, ...] = Field(min_length=1)
    """Tasks, or names of a `set`."""
    samples: int = Field(ge=1)
    """So many samples of their rows come first. They count towards the length of the stage."""


Rows = Literal["text", "vision", "audio", "any"]


class Stage(Settings):
    """One training phase: what is trained, on which rows, for how long."""

    EITHER: ClassVar = (("steps", "epochs"),)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")

    train: dict[Part, TrainPart] = {}
    """What is trained. Everything else is frozen, in eval mode, and keeps its bits."""

    builds: Literal["vision", "audio", "language"] | None = None
    """A part that learns its trade here, from scratch, in a model of its own; an encoder with a copy of the language
    model behind it, which is thrown away. The run's model is composed from the parts so built. Where the part comes
    with its weights (a `path`) there is nothing to build, and the stage is left out."""

    rows: Rows = "any"
    """Which rows the stage can learn from: `vision` those with pictures and no sound, `audio` those with sound and no
    pictures, `text` every row with its media left out, `any` all of them. A video is what the model takes from it."""

    tasks: tuple[str, ...] = ()
    """Only rows of these tasks; empty: all."""

    take: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Share of the rows of a task (or of a `set`) that the stage reads, the same ones in every epoch; of others all."""

    first: First | None = None
    """Rows that the stage begins with; where the data has none of them, it begins with all."""

    template: str | None = None
    """A chat template for this stage alone (LLaVA's first stage writes nothing but the picture and its caption)."""

    data: TrainData | None = None
    """Data of the stage's own instead of `data.train`."""

    supervise: Literal["answers", "everything", "words"] = "answers"
    """`everything` also learns to say the prompts, as in language-model pre-training. `words` is for an encoder that
    the stage builds: it learns to tell what its media show or say (their `alt`, else the first answer) by itself."""

    loss: Literal["next_token", "distill", "dpo", "ctc"] = "next_token"
    """`distill` teaches a model that hears and sees to go on as its own language model does where it reads the media in
    words (their `alt`): the divergence of the two over each answer. The language model is the teacher and stays frozen
    (Ultravox). `dpo` learns from rows with two answers which of them is better. `ctc`
    (with supervise=words) teaches the audio encoder alone to tell what is said, built here or as the model has it."""
    dpo: Dpo | None = None
    ctc: Ctc | None = None
    """How `dpo` and `ctc` learn, where not by their defaults."""
    distill_temperature: float = Field(2.0, gt=0)
    """Both distributions are softened by it before they are compared; Ultravox's is 2."""

    state_tokens: StateTokens | None = None
    """Written before every answer that does not begin with one."""
    state_head: StateHead | None = None

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    """Length of the stage, in optimizer steps or in readings of all its rows: one of the two."""
    batch_samples: int = Field(32, ge=1)
    """Samples in one optimizer step, over all rows and processes."""
    batch_rows: int | None = Field(None, ge=1)
    """Rows in one optimizer step, over all processes, instead of `batch_samples` samples: rows are then packed over
    tens of thousands of samples and nearly full. Needs an index."""
    row_tokens: int = Field(4096, ge=8)
    """Samples are packed into rows of at most this many tokens; one row goes through the model at a time."""
    row_tiles: int | None = Field(None, ge=1)
    """With `batch_rows`: a row holds at most this many tiles of pictures and frames of videos."""
    row_frames: int | None = Field(None, ge=1)
    """With `batch_rows`: a row holds at most this many frames of sound."""

    describe: float = Field(0.0, ge=0, le=1)
    """Share of the media that are given in words instead, where their `alt` is known. What a language model can do with
    words it learns to do with media more quickly when some of them are still words."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target's probability that is spread over the whole vocabulary (arXiv:1512.00567)."""

    balance: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of a mixture-of-experts language model beside the tokens' loss (Switch
    Transformers, arXiv:2101.03961; VITA's is 0.02). It is added for training and reported by itself, as `balance`."""

    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    augment: Augment = Augment()

    def alone_until(self) -> int:
        """Steps in which `first` alone is read; 0 too where steps are of rows, as how many samples they hold varies."""
        return 0 if self.first is None or self.batch_rows is not None else self.first.samples // self.batch_samples

    @field_validator("data", mode="before")
    @classmethod
    def _is_blend(cls, given: Any) -> Any:
        return whole_blend(given)

    @model_validator(mode="after")
    def _rows_are_packed_by_lengths(self) -> Stage:
        for name in ("row_tiles", "row_frames"):
            if self.batch_rows is None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} limits rows that are packed ahead, and with batch_samples they are "
                    f"packed step by step. Set batch_rows, or {name} to null"
                )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.steps is None) == (self.epochs is None):
            given = "both are" if self.steps is not None else "neither is"
            raise ValueError(
                f"a stage is as long as its `steps` or its `epochs` say, and {given} given. "
                "Set one of the two, the other to null"
            )
        return self


class SampleConfig(Settings):
    """Fixed prompts answered before, during and after each stage."""

    prompts: int = Field(4, ge=0)
    """How many per task."""
    times: int = Field(1, ge=0)
    """How often during a stage, besides before and after."""
    max_tokens: int = Field(32, ge=1)


class RunConfig(Settings):
    """One whole run. `avlm show` prints it; its YAML runs again."""

    recipe: str
    out: str
    """Directory of the run. One that exists is resumed."""
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelConfig | str
    """What to compose, or the model directory to start from."""
    data: DataConfig = DataConfig()
    stages: tuple[Stage, ...] = Field(min_length=1)
    max_steps: int | None = Field(None, ge=1)
    """No stage takes more steps than this."""
    save: SaveConfig = SaveConfig()
    samples: SampleConfig = SampleConfig()
    features: FeatureCache = FeatureCache()
    evaluate: Evaluate | None = None
    """Measure on held-out rows as training goes; needs `data.eval`."""
    watch: WatchConfig = WatchConfig()
    count: CountConfig = CountConfig()
    log: tuple[Tracker, ...] = ()
    """Who is told of every step beside `metrics.jsonl`."""
    profile: ProfileSteps | None = None
    """Steps that are recorded for chrome://tracing, in the run's directory."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Numbers that the model is kept in and computes with; default: those of its weights as they are loaded. Whatever
    learns in bfloat16 has a float32 copy that learns for it."""
    side_by_side: int = Field(1, ge=1)
    """Parts that are built at the same time, each in a process of its own."""
    threads: int | None = Field(None, ge=1)
    """Processor threads for the model; default: torch's own choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes: `auto` is a GPU where there is one. Of several processes each has its own."""
    parallel: ParallelConfig = ParallelConfig()
    speed: Speed = Speed()

    @model_validator(mode="after")
    def _stages_fit_the_model(self) -> RunConfig:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called {name}; a stage's name is its directory. Rename one of them")
        if isinstance(self.model, ModelConfig):
            for stage in self.stages:
                _check_stage(stage, self.model)
        _check_order(self.stages)
        return self

    def left_out(self) -> tuple[str, ...]:
        """Names of stages that would build what is there already: a part with its weights, or a whole model."""
        built = [stage for stage in self.stages if stage.builds is not None]
        if isinstance(self.model, ModelConfig):
            built = [stage for stage in built if _built_source(stage, self.model).path is not None]
        return tuple(stage.name for stage in built)

    def stage_steps(self, stage: Stage, rows: int | None = None, planned: Callable[[float], int] | None = None) -> int:
        """Steps the stage really takes.

        Args:
            rows: How many the stage reads; needed where its length is given in epochs.
            planned: Gives the steps of so many epochs (`Plan.steps`); needed with `batch_rows` besides.
        """
        if stage.steps is not None:
            steps = stage.steps
        elif stage.batch_rows is not None:
            assert stage.epochs is not None and planned is not None, "rows are to be planned first"
            steps = planned(stage.epochs)
        else:
            assert stage.epochs is not None and rows is not None, "rows are to be counted first"
            steps = math.ceil(stage.epochs * rows / stage.batch_samples - 1e-9)
        return steps if self.max_steps is None else min(steps, self.max_steps)


REACHED: dict[Rows, tuple[Part, ...]] = {
    "text": ("language",),
    "vision": ("vision", "vision_connector", "language"),
    "audio": ("audio", "audio_beside", "audio_connector", "language"),
    "any": PARTS,
}
"""Parts that rows of a kind go through."""


def _check_stage(stage: Stage, model: ModelConfig) -> None:
    """Refuse a stage that trains or reads what the model does not have."""
    problem = stage_problem(stage, model.parts())
    if problem is not None:
        raise ValueError(problem)
    if stage.builds is not None:
        _check_build(stage, model)


def stage_problem(stage: Stage, parts: Sequence[str]) -> str | None:
    """What keeps a stage from working on a model of these parts, in one sentence; None if nothing does."""
    there = ", ".join(parts)
    for part, how in stage.train.items():
        if part not in parts and not how.optional:
            return (
                f"stage {stage.name} trains {part}, and the model has only {there}. "
                f"Remove stages.{stage.name}.train.{part}, or add the part to the model"
            )
        if part not in REACHED[stage.rows] and not how.optional:
            return (
                f"stage {stage.name} trains {part} on rows={stage.rows}, which never reach it. "
                f"Remove stages.{stage.name}.train.{part}, or set stages.{stage.name}.rows=any"
            )
    if stage.state_head is None and not any(part in parts and part in REACHED[stage.rows] for part in stage.train):
        return f"stage {stage.name} trains nothing. Name a part, such as stages.{stage.name}.train.language.lr=1e-4"
    problem = _adapters_problem(stage) or _balance_problem(stage) or _distill_problem(stage) or _state_problem(stage)
    problem = problem or _dpo_problem(stage)
    problem = problem or _ctc_problem(stage) or _idle_problem(stage)
    if problem is None and stage.supervise == "words":
        problem = _words_problem(stage)
    if problem is not None:
        return problem
    if stage.rows in ("vision", "audio") and stage.rows not in parts:
        return (
            f"stage {stage.name} reads rows with {stage.rows}, and the model has no {stage.rows} part. "
            f"Remove the stage, or add model.{stage.rows}"
        )
    return None


def _adapters_problem(stage: Stage) -> str | None:
    """What keeps the adapters of a stage from being one folder in PEFT's format."""
    adapted = [(part, how.lora) for part, how in stage.train.items() if how.lora is not None]
    for part, lora in adapted:
        if part == stage.builds:
            return (
                f"stage {stage.name} builds the {part} part from scratch with adapters on it, and what is under them "
                f"would stay as it was drawn. Remove stages.{stage.name}.train.{part}.lora"
            )
        first_part, first = adapted[0]
        for name in ("dora", "rslora", "dropout"):
            ours, theirs = getattr(first, name), getattr(lora, name)
            if ours != theirs:
                return (
                    f"stage {stage.name} has adapters with {name}={ours} on {first_part} and {name}={theirs} on "
                    f"{part}, and PEFT has one {name} for all adapters of a stage (only rank and alpha may differ). "
                    f"Set stages.{stage.name}.train.{part}.lora.{name}={ours}"
                )
    return None


def _balance_problem(stage: Stage) -> str | None:
    """What keeps a stage from balancing experts, as far as its own settings tell."""
    if stage.balance and "language" not in stage.train:
        return (
            f"stage {stage.name} has balance={stage.balance:g}, which teaches the language model to use all its "
            f"experts, and does not train it. Add stages.{stage.name}.train.language.lr, or set "
            f"stages.{stage.name}.balance=0"
        )
    return None


def _words_problem(stage: Stage) -> str | None:
    """What keeps an encoder from learning by itself in a stage."""
    if stage.loss == "ctc":
        return None  # it says itself what it needs
    if stage.builds not in ("vision", "audio") or set(stage.train) != {stage.builds}:
        what = "trains other parts with it" if stage.builds in ("vision", "audio") else "builds none"
        return (
            f"stage {stage.name} has supervise=words, which is how an encoder learns by itself, and {what}. "
            f"Set builds: vision or audio and train that part alone, or stages.{stage.name}.supervise=answers"
        )
    if stage.rows != stage.builds:
        return (
            f"stage {stage.name} has supervise=words and rows={stage.rows}, some of which have nothing for the "
            f"{stage.builds} encoder to tell. Set stages.{stage.name}.rows={stage.builds}"
        )
    if stage.describe:
        return (
            f"stage {stage.name} has supervise=words and describe={stage.describe:g}, which would give the encoder's "
            f"own media in words. Set stages.{stage.name}.describe=0"
        )
    return None


def _distill_problem(stage: Stage) -> str | None:
    """What keeps a stage from learning of its own language model."""
    if stage.loss != "distill":
        return None
    begin, name = f"stage {stage.name} has loss=distill", f"stages.{stage.name}"
    if "language" in stage.train:
        return (
            f"{begin} and trains language, which is the teacher and has to stay as it is. "
            f"Remove {name}.train.language, or set {name}.loss=next_token"
        )
    if stage.rows == "text":
        return (
            f"{begin} and rows=text, which leaves out the media that it is to understand. "
            f"Set {name}.rows to vision, audio or any"
        )
    if stage.supervise != "answers":
        return (
            f"{begin} and supervise={stage.supervise}, and only answers are the same in words and with media. "
            f"Set {name}.supervise=answers"
        )
    if stage.label_smoothing:
        return (
            f"{begin} and label_smoothing={stage.label_smoothing:g}, and there are no labels: the teacher gives a "
            f"whole distribution. Set {name}.label_smoothing=0"
        )
    return None


def _dpo_problem(stage: Stage) -> str | None:
    """What keeps a stage from learning of pairs of answers."""
    if stage.loss != "dpo":
        return None
    begin, name = f"stage {stage.name} has loss=dpo", f"stages.{stage.name}"
    if stage.builds is not None:
        return (
            f"{begin} and builds the {stage.builds} part from scratch, and a model that knows nothing yet prefers "
            f"nothing. Set {name}.loss=next_token"
        )
    if stage.supervise != "answers":
        return (
            f"{begin} and supervise={stage.supervise}, and it is answers that are compared. "
            f"Set {name}.supervise=answers"
        )
    if stage.label_smoothing:
        return (
            f"{begin} and label_smoothing={stage.label_smoothing:g}, which spreads a token's probability, and here "
            f"whole answers are compared. Set {name}.label_smoothing=0, or {name}.dpo.label_smoothing"
        )
    if stage.state_head is not None or stage.balance:
        what, off = ("a state_head", "state_head=null") if stage.state_head is not None else ("balance", "balance=0")
        return f"{begin} and {what}, which learns from single answers. Set {name}.{off}, or train it in another stage"
    return None


def _ctc_problem(stage: Stage) -> str | None:
    """What keeps an audio encoder from learning by itself what is said."""
    if stage.loss != "ctc":
        return None
    begin, name = f"stage {stage.name} has loss=ctc", f"stages.{stage.name}"
    for key, wanted, why in (
        ("supervise", "words", "it is the words of each sound that are told"),
        ("rows", "audio", "others hold nothing to listen to, or more than that"),
        ("describe", 0, "a sound that is given in words is not heard"),
        ("label_smoothing", 0, "what is told has no place that a label could stand at"),
        ("balance", 0, "no language model is asked"),
    ):
        value = getattr(stage, key)
        if value != wanted:
            shown = f"{value:g}" if isinstance(value, float) else value
            return f"{begin} and {key}={shown}, and {why}. Set {name}.{key}={wanted}"
    if stage.state_head is not None:
        return f"{begin} and a state_head, and no answer is learned. Remove {name}.state_head"
    if set(stage.train) != {"audio"} or stage.builds not in (None, "audio"):
        trained = f"builds the {stage.builds} part" if stage.builds not in (None, "audio") else "trains other parts"
        return f"{begin}, by which the audio encoder learns alone, and {trained}. Train audio alone, and build no other"
    return None


def _idle_problem(stage: Stage) -> str | None:
    """Settings of a loss that the stage does not have."""
    for name in ("dpo", "ctc"):
        if getattr(stage, name) is not None and stage.loss != name:
            return (
                f"stage {stage.name} has settings of {name} and loss={stage.loss}, so they would do nothing. "
                f"Set stages.{stage.name}.loss={name}, or stages.{stage.name}.{name}=null"
            )
    return None


def _state_problem(stage: Stage) -> str | None:
    """What keeps a stage from learning states."""
    if stage.state_head is not None and stage.builds is not None:
        return (
            f"stage {stage.name} has a state_head and builds the {stage.builds} part in a model that is thrown away, "
            f"the head with it. Remove stages.{stage.name}.state_head, or train it in a later stage"
        )
    if stage.state_tokens is not None and stage.supervise == "words":
        return (
            f"stage {stage.name} has state_tokens and supervise=words, which learns no answers. "
            f"Remove stages.{stage.name}.state_tokens"
        )
    return None


def _built_source(stage: Stage, model: ModelConfig) -> Source:
    """Where the part comes from that a stage builds."""
    if stage.builds == "language":
        return model.language
    part = model.vision if stage.builds == "vision" else model.audio
    if part is None:
        raise ValueError(
            f"stage {stage.name} builds the {stage.builds} part, and the model has none. "
            f"Add model.{stage.builds}, or remove the stage"
        )
    return part.encoder


def _check_build(stage: Stage, model: ModelConfig) -> None:
    _built_source(stage, model)
    if stage.builds not in stage.train:
        raise ValueError(
            f"stage {stage.name} builds the {stage.builds} part but does not train it. "
            f"Add stages.{stage.name}.train.{stage.builds}.lr"
        )
    around = REACHED["text"] if stage.builds == "language" else REACHED[stage.builds or "any"]
    for part, how in stage.train.items():
        if part not in around and not how.optional:
            raise ValueError(
                f"stage {stage.name} builds the {stage.builds} part in a small model of its own, which has no {part}. "
                f"Remove stages.{stage.name}.train.{part}"
            )


def _check_order(stages: Sequence[Stage]) -> None:
    """Parts are built once, before the model is composed of them."""
    built: dict[str, str] = {}
    composed = ""
    for stage in stages:
        if stage.builds is None:
            composed = composed or stage.name
            continue
        if composed:
            raise ValueError(
                f"stage {stage.name} builds the {stage.builds} part after stage {composed} has trained the model that "
                f"it belongs in. Put it before {composed}"
            )
        if stage.builds in built:
            raise ValueError(
                f"stages {built[stage.builds]} and {stage.name} both build the {stage.builds} part, and the second "
                "would undo the first. Remove one of them"
            )
        built[stage.builds] = stage.name
