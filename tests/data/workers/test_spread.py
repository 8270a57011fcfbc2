"""Work that is spread over processes gives what a loop gives, and something else for what cannot be done."""

from __future__ import annotations

import os
import time

import pytest

from avlm.data.workers.spread import spread


def square(item: int) -> int | str:
    if item == 3:
        os._exit(5)
    if item == 4:
        time.sleep(3600)
    return item * item


@pytest.mark.parametrize("part", [1, 4, 100])
def test_even_few_things_are_done_where_they_can_be_ended(part: int) -> None:
    told: list[tuple[str, int, int]] = []
    found = spread(
        square,
        range(7),
        lost=lambda item, why: f"{item} {why}",
        workers=2,
        part=part,
        name="squares",
        progress=lambda *now: told.append(now),
        limit_s=0.5,
    )
    crashed = "3 crashed the process that read it, twice (exit status 5). Replace it, or remove the sample"
    endless = "4 takes longer than 0.5 s to read, so that was given up. Replace it, or remove the sample"
    assert list(found) == [0, 1, 4, crashed, endless, 25, 36]
    assert told[-1] == ("squares", 7, 7)
    assert list(spread(square, [], lost=lambda *_: "", workers=2)) == []
