"""Write down what every recipe prints: ``python -m tests.recipes.refresh`` after a recipe was changed on purpose."""

from __future__ import annotations

from pathlib import Path

from avlm.cli.settings import what_trains
from avlm.config.io import to_yaml
from avlm.config.run import RunConfig
from avlm.recipes import RECIPES, recipe

GOLDEN = Path(__file__).parent / "golden"


def variants() -> dict[str, RunConfig]:
    """Every recipe as it stands, and those that an argument turns into another one."""
    return {**{name: recipe(name) for name in RECIPES}, "sft+lora": recipe("sft", peft="lora")}


def printed(config: RunConfig) -> str:
    """What `avlm show` prints."""
    return f"{to_yaml(config)}\n{what_trains(config)}\n"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, config in variants().items():
        (GOLDEN / f"{name}.yaml").write_text(printed(config), encoding="utf-8")
