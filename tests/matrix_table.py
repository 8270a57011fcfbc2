"""The README's table of families, out of what `tests/test_matrix.py` goes through: ``python -m tests.matrix_table``."""

from __future__ import annotations

from pathlib import Path

from tests.families import AUDIO, LANGUAGE, VISION

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"


def table() -> str:
    """Every family of encoders, and the language models that each was trained, saved and checked with."""
    languages = ", ".join(LANGUAGE)
    lines = ["| family | model_type | sense | with |", "|---|---|---|---|"]
    for sense, families in (("vision", VISION), ("audio", AUDIO)):
        for name, config in families.items():
            lines.append(f"| {name} | `{config['model_type']}` | {sense} | {languages} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A text with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
