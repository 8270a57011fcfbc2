"""What docs/serving.md says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from media_files import made
from served import served

import avlm
from avlm.config.serve import Serve
from avlm.inference.chat import Chat, Image
from avlm.inference.sampling import Sampling
from avlm.inference.serving.asking import HARMLESS, NEUTRAL, PARTS

ROOT = Path(avlm.__file__).parents[1]
TEXT = (ROOT / "docs/serving.md").read_text()


def rows(head: str) -> list[list[str]]:
    """The rows of the table that begins with these words."""
    table = TEXT[TEXT.index(head) :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_settings_and_their_defaults() -> None:
    shown = {
        "max_body": lambda value: f"{value // 2**20} MiB",
        "max_text": lambda value: f"{value:,}",
        "limits": lambda value: "...",
    }
    for names, defaults, _ in rows("| setting |"):
        for name, default in zip(re.findall(r"`(\w+)`", names), re.split(r", (?=[\d.])", defaults), strict=True):
            value = Serve.model_fields[name].default
            assert shown.get(name, lambda value: f"{value:g}")(value) == default, name
    for name in re.findall(r"`(\w+)=", TEXT) + re.findall(r" (\w+)=\d", TEXT.partition("```\n\n")[0]):
        assert name in Serve.model_fields, name


def test_the_fields() -> None:
    section = TEXT[TEXT.index("Understood are") :].partition("## ")[0]
    ignored, refused = re.findall(r"\(([^()]*`[^()]*, \.\.\.)\)", section)
    assert set(re.findall(r"`(\w+)`", ignored)) <= set(HARMLESS)
    assert set(re.findall(r"`(\w+)`", refused)) <= set(NEUTRAL)
    assert set(re.findall(r"`(\w+)`", rows("| route |")[0][1])) == set(PARTS)


def test_the_example_runs(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    (tmp_path / "a.png").write_bytes(made("rgb.png"))
    monkeypatch.chdir(tmp_path)
    with served(chat, answer_tokens=8) as server:
        found: dict[str, object] = {}
        exec(code.replace("http://127.0.0.1:8000", server.url), found)
        answer = found["answer"].choices[0].message.content  # type: ignore[attr-defined]
        found["client"].close()  # type: ignore[attr-defined]
    expected = chat.chat("What do you see?", Image(made("rgb.png")), sampling=Sampling(max_tokens=8))
    assert answer.strip() == expected
