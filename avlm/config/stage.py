"""A stage of a run: what it trains, on which rows, at which rates, by which loss."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from avlm.config.base import Settings
from avlm.config.ctc import Ctc
from avlm.config.data import TrainData, whole_blend
from avlm.config.patterns import ALL_LINEAR, pattern_problem
from avlm.config.preference import Dpo

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
    steps: int = Field(ge=1)
    """So many steps read their rows alone. They count towards the length of the stage."""


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

    def named(self) -> tuple[str, ...]:
        """Every task that it names, or `set`."""
        return (*self.tasks, *self.take, *(() if self.first is None else self.first.of))

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


REACHED: dict[Rows, tuple[Part, ...]] = {
    "text": ("language",),
    "vision": ("vision", "vision_connector", "language"),
    "audio": ("audio", "audio_beside", "audio_connector", "language"),
    "any": PARTS,
}
"""Parts that rows of a kind go through."""
