"""What a vocabulary is learned from."""

from __future__ import annotations

from avlm.data.text.vocabulary import sample_texts
from avlm.samples import Sample, Text, Turn


def test_a_word_as_long_as_a_file_does_not_keep_the_learner() -> None:
    turns = (Turn("user", (Text("i" * 1_000_000),)), Turn("assistant", (Text("A short one."),)))
    assert list(sample_texts([Sample("0", turns)])) == ["i" * 10_000, "A short one."]
