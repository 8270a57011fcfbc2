"""A file imports from floors below its own, never from its own floor's other parts, never from above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import avlm

ROOT = Path(avlm.__file__).parent
FLOORS = [
    {"errors"},
    {"config"},
    {"recipes", "layout"},
    {"samples"},
    {"data", "models"},
    {"convert"},
    {"training", "inference"},
    {"eval", "launch"},
    {"cli"},
]
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor}
DATA_FLOORS = [
    {"fetching", "workers", "text", "rownumbers", "options", "locks"},
    {"decoding", "rows"},
    {"media", "forms"},
    {"readers", "given"},
    {"planning", "encode", "writers"},
    {"sources", "selection", "processor"},
    {"staged"},
    {"indexing", "loader"},
    {"checking"},
    {"showing"},
    {"world"},
    {"mock", "voice"},
]
"""The same inside the largest part: here parts of one floor do not see each other either."""
FACE = {"__init__", "__main__"}
"""The package's face may see everything; nothing may see it."""


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """Line and part of every import of avlm in a file, function-local and type-only ones too."""
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            names = [node.module or ""] if node.module != "avlm" else [f"avlm.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "avlm":
                yield node.lineno, ([*name.split("."), "__init__"])[1]


def wrong_imports(path: Path, source: str | None = None) -> list[str]:
    mine = part_of(path)
    if mine in FACE:
        return []
    return [
        f"{path.relative_to(ROOT.parent)}:{line} {mine} imports {theirs}"
        for line, theirs in imported_parts(path, source)
        if theirs != mine and FLOOR_OF.get(theirs, len(FLOORS)) >= FLOOR_OF[mine]
    ]


def test_no_import_runs_up_or_across() -> None:
    wrong = [line for path in sorted(ROOT.rglob("*.py")) for line in wrong_imports(path)]
    assert not wrong, "\n".join(wrong)


def test_the_data_side_has_floors_of_its_own() -> None:
    data = ROOT / "data"
    floors = {part: number for number, floor in enumerate(DATA_FLOORS) for part in floor}
    wrong = []
    for path in sorted(data.rglob("*.py")):
        mine = path.relative_to(data).parts[0].removesuffix(".py")
        if mine in FACE:
            continue
        assert mine in floors, f"{mine} has no floor"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("avlm.data"):
                names = [node.module] if node.module != "avlm.data" else [f"avlm.data.{a.name}" for a in node.names]
                for theirs in ((name or "").split(".")[2] for name in names):
                    if theirs != mine and floors[theirs] >= floors[mine]:
                        wrong.append(f"{path.relative_to(ROOT.parent)}:{node.lineno} {mine} imports {theirs}")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_floor() -> None:
    parts = {part_of(path) for path in ROOT.rglob("*.py")} - FACE
    assert parts <= FLOOR_OF.keys()


def test_a_planted_upward_import_is_found() -> None:
    planted = "def f():\n    from avlm.models.fusion import place_embeddings\n"
    assert wrong_imports(ROOT / "layout.py", planted) == ["avlm/layout.py:2 layout imports models"]


def test_a_planted_import_across_is_found() -> None:
    assert wrong_imports(ROOT / "data" / "planning" / "plan.py", "import avlm.models.encoders\n") == [
        "avlm/data/planning/plan.py:1 data imports models"
    ]
