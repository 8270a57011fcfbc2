"""Files that are dragged into a terminal, as the terminals paste them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.request import pathname2url

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avlm.cli.dragged import dragged, path_in

NAMES = [
    "a.png",
    "two words.wav",
    "it's.mp4",
    'say "hi".jpg',
    "50% (1).png",
    "back\\slash.png",
    "äö 日本.flac",
    "-x.png",
]


def escaped(path: str) -> str:
    return "".join(c if c.isalnum() or c in "/._-" else f"\\{c}" for c in path)


WAYS = {
    "bare": str,
    "GNOME, as a shell quotes": shlex.quote,
    "macOS, escaped": escaped,
    "an address": lambda path: f"file://{pathname2url(path)}",
    "an address of this machine": lambda path: f"file://localhost{pathname2url(path)}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dragged")
    for name in NAMES:
        (found / name).touch()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_file_is_found_however_it_is_pasted(folder: Path, name: str, way: object) -> None:
    pasted = way(str(folder / name))  # type: ignore[operator]
    assert dragged(pasted) == ((folder / name,), "")
    assert dragged(f"{pasted} ") == ((folder / name,), "")
    assert path_in(pasted) == folder / name
    shell = shlex.quote(str(folder / name))
    if "'\"'" not in shell and way is not str:
        assert dragged(f"What is this? {shell}") == ((folder / name,), "What is this?")


def test_files_and_words_are_parted(folder: Path) -> None:
    a, b = folder / "a.png", folder / "two words.wav"
    assert dragged(f"{a} '{b}'") == ((a, b), "")
    assert dragged(f"{a} what's in it, and what's said? \"{b}\"") == ((a, b), "what's in it, and what's said?")
    assert dragged(f"Is {a}, or not?") == ((a,), "Is, or not?")
    assert dragged(f"What is in {a}?") == ((a,), "What is in?")
    assert dragged(f"{a}?") == ((a,), "")


def test_words_stay_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "image").touch()
    (folder / "notes.txt").touch()
    (folder / "folder.png").mkdir(exist_ok=True)
    for line in (
        "image",
        "the image",
        "notes.txt",
        "no.png",
        "folder.png",
        "it's a 'quoted' word",
        "~nobody/a.png",
        "x" * 5000,
        "'",
        "a\\",
    ):
        assert dragged(line) == ((), line), line
    assert dragged("a.png") == ((Path("a.png"),), "")
    assert dragged("  spaces   stay  between ") == ((), "spaces   stay  between")


def test_the_home_folder_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert dragged("~/a.png look") == ((folder / "a.png",), "look")
    assert path_in("~/none.png") == folder / "none.png"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield Path()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.one_of(st.text(max_size=40), st.text("'\"\\/ ~fileo:.pnga[]\0\ud800", max_size=60)))
def test_any_line_is_understood_as_something(elsewhere: Path, line: str) -> None:
    assert dragged(line) == ((), line.strip())
    path_in(line)
