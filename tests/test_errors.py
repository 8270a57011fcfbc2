"""Errors keep what they say on their way between processes."""

import pickle

import pytest

from avlm import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("no. Change it"),
        errors.DataError("is wrong", where="a.jsonl line 3", sample_id="7"),
        errors.MediaError("is broken", where="a.jsonl line 4", sample_id="8"),
        errors.MissingExtraError("jiwer", "metrics", "word error rate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_in_another_process(error: errors.AvlmError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__
