"""Helpers of the data side's tests are used here too: hosts that answer badly, files that claim too much."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avlm.inference.chat import Chat

sys.path.append(str(Path(__file__).parents[2] / "data"))


@pytest.fixture(scope="session")
def chat(make_model: Callable[..., Any]) -> Chat:
    return Chat(*make_model())
