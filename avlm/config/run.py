"""What a run does: its stages as data, the rows it learns from, where it writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from avlm.config.base import Settings
from avlm.config.data import DataConfig
from avlm.config.evaluate import Evaluate
from avlm.config.features import FeatureCache
from avlm.config.model import ModelConfig
from avlm.config.parallel import ParallelConfig
from avlm.config.save import SaveConfig
from avlm.config.speed import Speed
from avlm.config.stage import Stage
from avlm.config.stage_fits import built_source, check_order, check_stage
from avlm.config.watch import CountConfig, ProfileSteps, Tracker, WatchConfig


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
                check_stage(stage, self.model)
        check_order(self.stages)
        return self

    def left_out(self) -> tuple[str, ...]:
        """Names of stages that would build what is there already: a part with its weights, or a whole model."""
        built = [stage for stage in self.stages if stage.builds is not None]
        if isinstance(self.model, ModelConfig):
            built = [stage for stage in built if built_source(stage, self.model).path is not None]
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
