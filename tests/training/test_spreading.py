"""Encoder work spread over processes: whoever encodes what, they learn what one learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avlm.config.run import RunConfig
from avlm.training.swapping import DTYPES, swap
from avlm.training.world import World
from tests.training.test_parallel import MODES, TRAIN, assert_same, check_masks, done, plain
from tests.training.worlds import changed, in_world, train_in

__all__ = ["plain"]  # a fixture

SPREAD = {"encoders": "spread"}


def parcel(source: int, to: int) -> list[Tensor]:
    """What one process has for another: any number of tensors of any kind and shape."""
    made = torch.Generator().manual_seed(10 * source + to)
    shapes = [(3, 4, 5), (), (0, 7), (2,)][: (source + 2 * to) % 5]
    return [torch.randn(shape, generator=made).to(DTYPES[(source + i) % 3]) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("size", [2, 3])
def test_every_tensor_comes_as_it_was_sent(size: int) -> None:
    def work(world: World) -> bool:
        for _ in range(2):
            counts = [len(parcel(source, world.rank)) for source in range(size)]
            got = swap(world, [parcel(world.rank, to) for to in range(size)], counts)
            for source, tensors in enumerate(got):
                expected = parcel(source, world.rank)
                assert [t.dtype for t in tensors] == [t.dtype for t in expected]
                for ours, theirs in zip(tensors, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert swap(world, [[] for _ in range(size)], [0] * size) == [[] for _ in range(size)]
        return True

    done(in_world(size, work))


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_learn_what_one_learns(
    plain: Callable[..., RunConfig], tmp_path: Path, train: str, mode: str
) -> None:
    config = plain(TRAIN[train])
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two", parallel={"mode": mode, **SPREAD})))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("mode", MODES)
def test_any_process_may_hold_any_mixture(plain: Callable[..., RunConfig], tmp_path: Path, mode: str) -> None:
    check_masks(plain, tmp_path, 2, mode, 12, "spread")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 4])
def test_any_process_may_hold_any_mixture_for_long(
    plain: Callable[..., RunConfig], tmp_path: Path, size: int, mode: str
) -> None:
    check_masks(plain, tmp_path, size, mode, 2000, "spread")
