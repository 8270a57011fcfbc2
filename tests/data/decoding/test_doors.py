# ruff: noqa: E501 (whole messages are compared)
"""Which files of the own machine a row may name, whatever it writes and whatever lies there."""

from __future__ import annotations

import io
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from avlm.config.data import DataConfig, DataSet, Fetch
from avlm.data.decoding.doors import ANYWHERE, Doors, doors_of, roots_of
from avlm.data.decoding.files import Limits, opened, read
from avlm.data.fetching.fetch import Fetcher
from avlm.errors import MediaError
from avlm.samples import MediaItem


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of data beside one that is none of it."""
    for name in ("data/in.png", "data/sub/deep.png", "outside/secret.png", "data-not/near.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def limits(*folders: Path) -> Limits:
    return Limits(doors=Doors(roots_of(folders)))


def refusal(path: Path, allowed: Limits) -> str:
    with pytest.raises(MediaError) as error:
        read(MediaItem("image", path=path), allowed)
    return str(error.value)


def test_files_of_an_open_folder_are_read_however_they_are_reached(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "link").symlink_to(place / "data")
    (place / "data" / "again.png").symlink_to("sub/deep.png")
    (place / "outside" / "back").symlink_to(place / "data")
    monkeypatch.chdir(place)
    for folder in (place / "data", place / "link", Path("data"), place / "data" / "sub" / ".."):
        for path in (
            "data/in.png",
            "link/in.png",
            "data/sub/../in.png",
            "outside/back/in.png",
            "outside/../data/in.png",
        ):
            assert read(MediaItem("image", path=place / path), limits(folder)) == b"data/in.png"
            assert read(MediaItem("image", path=Path(path)), limits(folder)) == b"data/in.png"
        assert read(MediaItem("image", path=place / "data" / "again.png"), limits(folder)) == b"data/sub/deep.png"


def test_what_lies_elsewhere_is_refused_with_what_would_open_it(place: Path) -> None:
    allowed = limits(place / "data")
    for path in (place / "outside" / "secret.png", place / "data" / ".." / "outside" / "secret.png"):
        assert refusal(path, allowed) == (
            f"{path}: is not in the folders that media are read from ({place}/data). "
            f"If its own may be read too, add it: data.roots=[{place}/outside] (avlm eval: --root {place}/outside)"
        )
    assert read(MediaItem("image", path=place / "outside" / "secret.png"), limits(place / "data", place / "outside"))
    assert read(MediaItem("image", path=place / "outside" / "secret.png"), limits(Path("/")))


def test_a_link_out_of_the_folder_is_refused_and_named(place: Path) -> None:
    (place / "data" / "out.png").symlink_to(place / "outside" / "secret.png")
    (place / "data" / "way").symlink_to("../outside")
    for path in (place / "data" / "out.png", place / "data" / "way" / "secret.png"):
        assert refusal(path, limits(place / "data")) == (
            f"{path}: leads to {place}/outside/secret.png, outside of the folders that media are read from ({place}/data). "
            f"If its own may be read too, add it: data.roots=[{place}/outside] (avlm eval: --root {place}/outside)"
        )
        assert read(MediaItem("image", path=path), limits(place / "data", place / "outside")) == b"outside/secret.png"
        assert read(MediaItem("image", path=path), Limits(doors=ANYWHERE)) == b"outside/secret.png"


def test_names_that_begin_alike_are_other_folders(place: Path) -> None:
    assert "is not in the folders" in refusal(place / "data-not" / "near.png", limits(place / "data"))
    assert "is not in the folders" in refusal(place / "data" / "in.png", limits(place / "data" / "sub"))
    assert "is not in the folders that media are read from (none)" in refusal(place / "data" / "in.png", limits())


def test_whether_a_file_exists_elsewhere_is_not_told(place: Path) -> None:
    there, not_there = (
        refusal(place / "outside" / name, limits(place / "data")) for name in ("secret.png", "none.png")
    )
    assert there.replace("secret", "none") == not_there


def test_what_is_missing_inside_is_told_as_ever(place: Path) -> None:
    (place / "data" / "dangling.png").symlink_to("gone.png")
    (place / "data" / "loop.png").symlink_to("loop.png")
    for name in ("none.png", "dangling.png", "loop.png", "in.png/x"):
        path = place / "data" / name
        assert (
            refusal(path, limits(place / "data"))
            == f"{path}: there is no such file. Check the path; it is relative to the data file"
        )


def test_devices_and_pipes_are_never_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(place / "data" / "pipe.png")
    (place / "data" / "zero.png").symlink_to("/dev/zero")
    real = os.open

    def watched(path: Any, *args: Any, **kwargs: Any) -> int:
        assert Path(path).suffix != ".png", path
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)
    for allowed in (limits(place / "data"), Limits()):
        assert "is not a regular file. Give the path of a picture" in refusal(place / "data" / "pipe.png", allowed)
        assert "is not a regular file. Give the path of a picture" in refusal(place / "data", allowed)
    assert "leads to /dev/zero, outside of" in refusal(place / "data" / "zero.png", limits(place / "data"))
    assert "is not a regular file" in refusal(Path("/dev/zero"), Limits())


def swapped(monkeypatch: pytest.MonkeyPatch, swap: Callable[[], None]) -> None:
    """Do something just before a file is opened: after every check of its path."""
    real = os.open

    def late(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).suffix == ".png":
            swap()
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", late)


@pytest.mark.parametrize("proc", [True, False])
def test_a_link_laid_between_check_and_opening_leads_nowhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, proc: bool
) -> None:
    path = place / "data" / "in.png"

    def swap() -> None:
        path.unlink()
        path.symlink_to(place / "outside" / "secret.png")

    swapped(monkeypatch, swap)
    if not proc:
        without_proc(monkeypatch)
    assert f"{path}: leads to {place}/outside/secret.png, outside of" in refusal(path, limits(place / "data"))


def test_a_folder_swapped_between_check_and_opening_leads_nowhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "outside" / "deep.png").write_bytes(b"secret")

    def swap() -> None:
        (place / "data" / "sub").rename(place / "data" / "moved")
        (place / "data" / "sub").symlink_to(place / "outside")

    swapped(monkeypatch, swap)
    assert "outside of the folders" in refusal(place / "data" / "sub" / "deep.png", limits(place / "data"))


def test_a_pipe_laid_between_check_and_opening_is_not_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "data" / "in.png"

    def swap() -> None:
        path.unlink()
        os.mkfifo(path)

    swapped(monkeypatch, swap)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(refusal(path, limits(place / "data"))), daemon=True)
    thread.start()
    thread.join(10)
    assert found == [f"{path}: is not a regular file. Give the path of a picture"]


def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that does not say where an open file lies."""
    real = os.readlink

    def readlink(path: Any, **kwargs: Any) -> Any:
        if str(path).startswith("/proc/self/fd"):
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, **kwargs)

    monkeypatch.setattr(os, "readlink", readlink)


def test_where_the_system_does_not_say_it_the_path_is_asked_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_proc(monkeypatch)
    (place / "data" / "again.png").symlink_to("sub/deep.png")
    assert read(MediaItem("image", path=place / "data" / "again.png"), limits(place / "data")) == b"data/sub/deep.png"
    assert "is not in the folders" in refusal(place / "outside" / "secret.png", limits(place / "data"))


def test_links_that_turn_all_the_time_never_show_what_is_outside(place: Path) -> None:
    (place / "data" / "turning.png").symlink_to("in.png")
    over = threading.Event()

    def turn() -> None:
        while not over.is_set():
            for target in (place / "outside" / "secret.png", place / "data" / "in.png"):
                (place / "data" / "next").symlink_to(target)
                os.replace(place / "data" / "next", place / "data" / "turning.png")

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    seen: dict[bytes | str, int] = {}
    for _ in range(3000):
        try:
            got: bytes | str = read(MediaItem("image", path=place / "data" / "turning.png"), limits(place / "data"))
        except MediaError as error:
            got = "outside of" if "outside of" in str(error) else str(error)
        seen[got] = seen.get(got, 0) + 1
    over.set()
    thread.join()
    assert seen.keys() == {b"data/in.png", "outside of"}


@tries(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "sub", "in.png", "deep.png", "outside", "secret.png", "data", "way", "out.png", "", "/", "data-not", "near.png"]), max_size=7))  # fmt: skip
def test_no_path_leads_out(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    root = tmp_path_factory.getbasetemp() / "paths"
    if not root.exists():
        for name in ("data/in.png", "data/sub/deep.png", "outside/secret.png", "data-not/near.png"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
        (root / "data" / "way").symlink_to("../outside")
        (root / "data" / "out.png").symlink_to(root / "outside" / "secret.png")
        (root / "outside" / "way").symlink_to(root / "data")
    try:
        found = read(MediaItem("image", path=root / "data" / "/".join(parts).lstrip("/")), limits(root / "data"))
    except MediaError:
        return
    assert found.startswith(b"data/")


def test_a_part_of_a_file_is_held_to_the_same_folders(place: Path) -> None:
    with opened(MediaItem("image", path=place / "data" / "in.png", span=(5, 2)), limits(place / "data")) as file:
        assert file.read() == b"in"
    with (
        pytest.raises(MediaError, match="is not in the folders"),
        opened(MediaItem("image", path=place / "outside" / "secret.png", span=(0, 2)), limits(place / "data")),
    ):
        pass


def test_a_part_is_a_file_by_itself(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 300
    (tmp_path / "a.tar").write_bytes(whole)
    reference = io.BytesIO(whole[1000:61_000])
    with opened(MediaItem("image", path=tmp_path / "a.tar", span=(1000, 60_000)), limits(tmp_path)) as file:
        for offset, whence, count in (
            (0, 0, 10),
            (5, 1, 20),
            (-7, 2, 100),
            (59_000, 0, -1),
            (70_000, 0, 5),
            (3, 0, 60_000),
        ):
            assert file.seek(offset, whence) == reference.seek(offset, whence)
            assert file.read(count) == reference.read(count)
            assert file.tell() == reference.tell()
    with pytest.raises(MediaError) as error:
        read(MediaItem("image", path=tmp_path / "a.tar", span=(76_000, 801), title="b.png"), limits(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}/a.tar b.png: ends at byte 76801, and its file has 76800 bytes, so it is truncated. Copy it again"
    )


def test_a_file_is_handed_on_without_its_name(place: Path) -> None:
    """FFmpeg would choose its reader by the ending, and some of its readers open other files."""
    with opened(MediaItem("video", path=place / "data" / "in.png"), limits(place / "data")) as file:
        assert not isinstance(getattr(file, "name", 0), str)
        assert isinstance(file, io.BufferedReader)


# ---------------------------------------------------------------- settings


def test_the_folders_that_a_run_names_are_open_to_it(place: Path) -> None:
    data = DataConfig(
        folder=str(place / "a"),
        sets={"x": str(place / "b"), "y": DataSet(folder=str(place / "c"), sounds=str(place / "d")), "z": DataSet()},
        roots=(str(place / "e"),),
    )
    (place / "shards").mkdir()
    doors = doors_of(data, [place / "data" / "train.jsonl", place / "shards"])
    assert doors.roots == tuple(os.path.realpath(place / name) for name in ("data", "shards", "a", "e", "b", "c", "d"))
    assert doors.fetcher is None
    assert pickle.loads(pickle.dumps(doors)) == doors


def test_a_pattern_opens_the_folder_above_its_first_star(place: Path) -> None:
    for pattern in ("*.tar", "{000..100}.tar", "{a,b}/part-?.tar", "[0-9]/x.tar"):
        assert doors_of(DataConfig(), [place / pattern]).roots == (os.path.realpath(place),)
    (place / "[odd]").mkdir()
    (place / "[odd]" / "rows.jsonl").touch()
    assert doors_of(DataConfig(), [place / "[odd]" / "rows.jsonl"]).roots == (os.path.realpath(place / "[odd]"),)


def test_a_file_named_without_a_folder_lies_in_this_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "data")
    assert doors_of(DataConfig(), ["train.jsonl"]).roots == (os.path.realpath(place / "data"),)


def test_what_may_be_fetched_is_a_setting(tmp_path: Path) -> None:
    given = Fetch(hosts=("images.example.org",), folder=str(tmp_path))
    fetcher = doors_of(DataConfig(fetch=given), []).fetcher
    assert isinstance(fetcher, Fetcher)
    assert fetcher.settings == given
    assert fetcher.cache.folder == tmp_path


def test_what_is_fetched_is_kept_where_the_user_keeps_such_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Fetcher(Fetch()).cache.folder == tmp_path / "avlm" / "media"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Fetcher(Fetch()).cache.folder == tmp_path / ".cache" / "avlm" / "media"
