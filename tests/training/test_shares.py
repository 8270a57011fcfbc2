"""What is spread over processes is written and read by each of them, and is whole again on any number."""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from avlm.config.save import SaveConfig
from avlm.training import checkpoint
from avlm.training.checkpoint import ALONE, Position, load, newest, save, save_share
from avlm.training.observe import Journal
from avlm.training.saver import Saver
from avlm.training.shares import Shares
from avlm.training.snapshot import held, held_share, put_back
from avlm.training.world import World
from tests.training.worlds import FORK, in_world

AT = Position("s", 3, 3, 0)


class Net(nn.Module):
    """Seven rows for four processes, of which one has fewer; three rows, of which one has none; a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Linear(6, 7)
        self.two = nn.Linear(7, 3)
        self.register_buffer("seen", torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).tanh())
        return out


def made(world: World, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed)
    if not world.alone:
        fully_shard(net, mesh=init_device_mesh("cpu", (world.size,)))
    return net, torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)


def step(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    net(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """Weights and moments as torch puts them together, as lists, so that they go from process to process."""
    tensors = held(net, optimizer)
    whole = {**tensors.weights, **tensors.moments}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().tolist() for n, t in whole.items()}


def write(world: World, folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if world.alone:
        save(folder, held(net, optimizer), AT, keep=1)
        return
    share, shares = held_share(net, optimizer, first=world.first), Shares(world, "once")
    if world.first:
        save(folder, share, AT, keep=1, shares=shares)
    else:
        save_share(folder, share, AT, shares)
    world.wait()


def train_and_write(folder: Path) -> Callable[[World], Any]:
    def work(world: World) -> Any:
        net, optimizer = made(world)
        for seed in range(3):
            step(net, optimizer, seed)
        write(world, folder, net, optimizer)
        return everything(net, optimizer)

    return work


def read_and_go_on(folder: Path) -> Callable[[World], Any]:
    def work(world: World) -> Any:
        net, optimizer = made(world, seed=7)
        found, passed = newest(folder, "s", world=world)
        assert found is not None and not passed
        put_back(load(found), net, optimizer, "there")
        there = everything(net, optimizer)
        step(net, optimizer, 3)
        return there, everything(net, optimizer)

    return work


def run(size: int, work: Callable[[World], Any]) -> list[Any]:
    if size == 1:
        return [work(ALONE)]
    found = in_world(size, work)
    assert [kind for kind, _ in found] == ["done"] * size, found
    return [value for _, value in found]


@pytest.mark.parametrize(
    ("writers", "readers"),
    [(4, 2), (1, 4), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(4, 1), (4, 4), (2, 4), (2, 2)])],
)
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    """Bit for bit; and the next step is that of a process that was never saved."""
    written = run(writers, train_and_write(tmp_path))[0]
    for there, after in run(readers, read_and_go_on(tmp_path)):
        assert there == written
        net, optimizer = made(ALONE)
        for seed in range(4):
            step(net, optimizer, seed)
        for name, value in everything(net, optimizer).items():
            torch.testing.assert_close(torch.tensor(after[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_each_process_writes_its_own_rows_and_no_others(tmp_path: Path) -> None:
    run(4, train_and_write(tmp_path))
    folder = tmp_path / "step-00000003"
    names = [f"{kind}-{rank:05d}-of-00004.safetensors" for kind in ("optimizer", "weights") for rank in range(1, 5)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "state.json"])
    rows: dict[str, list[int]] = {}
    for name in names[4:]:
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                rows.setdefault(key, []).append(file.get_slice(key).get_shape()[0])
    # torch.chunk's shares: two rows each, what is left to the last
    seven, three = [2, 2, 2, 1], [1, 1, 1]
    assert rows == {"one.weight": seven, "one.bias": seven, "two.weight": three, "two.bias": three, "seen": [2]}


def test_torchs_own_reader_takes_the_files(tmp_path: Path) -> None:
    written = run(4, train_and_write(tmp_path))[0]
    net, _ = made(ALONE, seed=7)
    into = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it reads in one process
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "step-00000003")), no_dist=True)
    assert {name: value.tolist() for name, value in into.items()} == {name: written[name] for name in into}


@pytest.mark.parametrize("writers", [1, 2])
def test_a_process_reads_no_more_than_it_holds(tmp_path: Path, writers: int) -> None:
    run(writers, train_and_write(tmp_path))

    def work(world: World) -> tuple[int, int]:
        net, optimizer = made(world)
        step(net, optimizer, 0)
        found, _ = newest(tmp_path, "s", world=world)
        assert found is not None
        tensors = held(net, optimizer)
        whole = {**tensors.weights, **tensors.moments}
        own = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in whole.values())
        return load(found).read(whole), own

    for read, own in run(4, work):
        assert read == own


def test_each_file_is_looked_at_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(2, train_and_write(tmp_path))
    looked: list[str] = []
    sha256 = checkpoint.file_sha256

    def looks(path: Path) -> str:
        looked.append(path.name)
        return sha256(path)

    monkeypatch.setattr(checkpoint, "file_sha256", looks)

    def work(world: World) -> list[str]:
        looked.clear()
        assert newest(tmp_path, "s", world=world)[0] is not None
        return looked

    one, two = run(2, work)
    assert len(one) == len(two) == 2
    assert len({*one, *two}) == 4


@pytest.mark.parametrize("number", range(4))
def test_a_flipped_bit_in_any_share_is_named_by_all(tmp_path: Path, number: int) -> None:
    run(2, train_and_write(tmp_path))
    path = sorted((tmp_path / "step-00000003").glob("*.safetensors"))[number]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    told = [f"checkpoint step-00000003 is damaged ({path.name} changed since it was written) and was passed over"]
    assert run(2, lambda world: newest(tmp_path, "s", world=world)) == [(None, told)] * 2
    path.unlink()
    told = [f"checkpoint step-00000003 lacks {path.name} and was passed over"]
    assert newest(tmp_path, "s") == (None, told)


def saver(world: World, folder: Path) -> tuple[Saver, io.StringIO]:
    folder.mkdir(exist_ok=True)
    said = io.StringIO()
    console = Console(file=said, width=500)
    return Saver(folder / "checkpoints", SaveConfig(), Journal(folder, writes=world.first), console, world=world), said


def share_of(value: float, world: World) -> Any:
    net, optimizer = made(world)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return held_share(net, optimizer, first=world.first)


def test_no_process_waits_for_anothers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one's is held up: both loops go on, nothing is to be seen, and then all of it is."""
    opened = FORK.Event()

    def held_up(tensors: Any, path: Path, **more: Any) -> None:
        assert "-00001-" in path.name or opened.wait(20)
        save_file(tensors, path, **more)

    monkeypatch.setattr(checkpoint, "save_file", held_up)

    def work(world: World) -> tuple[bool, str]:
        mine, said = saver(world, tmp_path / "run")
        mine.save(share_of(1.0, world), AT)
        world.wait()
        none = not list((tmp_path / "run").glob("checkpoints/step-*"))
        world.wait()
        opened.set()
        assert mine.finish()
        found = mine.newest("s")
        assert found is not None and found.position == AT
        return none, said.getvalue()

    assert run(2, work) == [(True, "")] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    def full(tensors: Any, path: Path, **more: Any) -> None:
        if "step-00000004" in str(path) and f"-{rank + 1:05d}-of" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **more)

    monkeypatch.setattr(checkpoint, "save_file", full)

    def work(world: World) -> tuple[list[str], list[bool], int]:
        mine, said = saver(world, tmp_path / "run")
        saved = []
        for number in (3, 4, 5):
            mine.save(share_of(float(number), world), Position("s", number, number, 0))
            saved.append(mine.finish())
            if number == 4:
                found = mine.newest("s")
                assert found is not None and found.position.step == 3
        found = mine.newest("s")
        assert found is not None
        return said.getvalue().splitlines(), saved, found.position.step

    told = (
        "the checkpoint at step 4 could not be written (No space left on device); training goes on, and the one before "
        "it is untouched. Make room on the disk"
    )
    found = run(2, work)
    assert found[0] == ([told], [True, False, True], 5)
    assert found[1][2] == 5
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_one_who_wrote_nothing_is_not_waited_for_when_a_run_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avlm.training.shares.GIVE_UP_S", 0.3)

    def work(world: World) -> str:
        mine, said = saver(world, tmp_path / "run")
        share = share_of(1.0, world)
        with pytest.raises(ValueError, match="no more"), mine:  # noqa: PT012
            if world.first:
                mine.save(share, AT)
            else:
                world.gather(None)  # as if it were ended before it could write
            raise ValueError("no more")
        return said.getvalue()

    told = run(2, work)[0]
    assert "the checkpoint at step 3 could not be written (process 1 of 2 wrote no share of it)" in told
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_who_still_writes_for_an_attempt_that_was_given_up_does_not_reach_the_next(tmp_path: Path) -> None:
    """Of a run whose first process was killed another may go on for a while, beside the run that goes on."""

    def work(world: World) -> list[str]:
        share, other = share_of(1.0, world), share_of(2.0, world)
        new, old = Shares(world, "new"), Shares(world, "old")
        if world.first:
            save(tmp_path, share, AT, keep=1, shares=new)
            world.wait()
        else:
            save_share(tmp_path, share, AT, new)
            world.wait()
            save_share(tmp_path, other, AT, old)
        world.wait()
        found, passed = newest(tmp_path, "s", world=world)
        assert found is not None and not passed
        write(world, tmp_path, *made(world))
        return sorted(path.name for path in tmp_path.iterdir())

    assert run(2, work) == [["step-00000003"]] * 2
