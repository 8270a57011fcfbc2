"""The README's commands run, and what it says stands in the tree is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ["max_steps=2", "--samples", "200", "--eval-samples", "10"]
"""What makes the demo a matter of seconds."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("told")) as commands:
        yield commands


@pytest.fixture(scope="module")
def demo(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has been run, as short as it goes."""
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("readme")
    commands.run(["demo", *SMALL], folder)
    return folder


def test_the_demo_leaves_what_the_readme_promises(demo: Path) -> None:
    assert (demo / "runs/demo/report.html").is_file()
    assert (demo / "runs/demo/model/config.json").is_file()
    assert (demo / "runs/demo/report.json").is_file()


def test_the_commands_run(commands: Commands, demo: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("avlm ")]
    assert len(lines) >= 6
    for line in lines:
        commands.run(shlex.split(line)[1:], demo)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_the_python_runs(demo: Path) -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=demo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tree_is_the_tree() -> None:
    tree = next(block for block in re.findall(r"```\n(avlm/\n.*?)```", README, re.S))
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:]}
    there = {path.name for path in (ROOT / "avlm").iterdir() if not path.name.startswith("_")}
    assert named == there


def test_the_tree_of_the_data_side_is_the_tree() -> None:
    walk = (ROOT / "docs/walk.md").read_text()
    tree = next(block for block in re.findall(r"```\n(data/\n.*?)```", walk, re.S))
    named = [line.split()[0].rstrip("/") for line in tree.splitlines()[1:]]
    there = {path.name for path in (ROOT / "avlm/data").iterdir() if not path.name.startswith("_")}
    assert len(named) == len(set(named)) and set(named) == there


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
