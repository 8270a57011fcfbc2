"""The README's commands run, and what it says stands in the tree is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ["max_steps=2", "--samples", "200", "--eval-samples", "10"]
"""What makes the demo a matter of seconds."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has been run, as short as it goes."""
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("readme")
    run([sys.executable, "-m", "avlm", "demo", *SMALL], folder)
    return folder


def test_the_demo_leaves_what_the_readme_promises(demo: Path) -> None:
    assert (demo / "runs/demo/report.html").is_file()
    assert (demo / "runs/demo/model/config.json").is_file()
    assert (demo / "runs/demo/report.json").is_file()


def test_the_commands_run(demo: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("avlm ")]
    assert len(commands) >= 6
    for line in commands:
        run([sys.executable, "-m", *shlex.split(line)], demo)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_the_python_runs(demo: Path) -> None:
    (code,) = blocks("python")
    run([sys.executable, "-c", code], demo)


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
