"""Headers of tars are read as Python's tarfile reads them, and one that is cut or damaged as far as it goes."""

from __future__ import annotations

import io
import os
import pickle
import string
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avlm.data.forms.tars import CutError, Tar, TarFolder
from avlm.data.rownumbers import SMALL_BYTES, Columns
from avlm.errors import ConfigError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tar_of(path: Path, files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def members(path: Path) -> list[tuple[str, int, int]]:
    with Tar(path) as tar:
        return [(member.name, member.offset, member.size) for member in tar.members()]


NAMES = st.text(string.ascii_letters + "éß漢. -_", min_size=1, max_size=40).filter(lambda name: name.strip("./ "))
LONG = st.builds(lambda name, times: "/".join([name] * times), NAMES, st.integers(1, 12))
BYTES = st.one_of(st.binary(max_size=50), st.integers(0, 40_000).map(bytes))


@QUICK
@given(files=st.dictionaries(LONG, BYTES, max_size=8), kind=st.sampled_from(FORMATS[1:]))
def test_members_are_those_that_tarfile_finds(tmp_path: Path, files: dict[str, bytes], kind: int) -> None:
    path = tar_of(tmp_path / "a.tar", files, kind)
    with tarfile.open(path) as tar:
        theirs = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert members(path) == theirs
    data = path.read_bytes()
    assert [data[at : at + size] for _, at, size in members(path)] == list(files.values())


@pytest.mark.parametrize("kind", FORMATS)
def test_names_longer_than_a_header_and_other_things_than_files(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "a.tar"
    long = "f" * 90 + "/" + "g" * 90 + ".json"
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("a", long, "b"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        hard = tarfile.TarInfo("hard")
        hard.type, hard.linkname, hard.size = tarfile.LNKTYPE, "a", 0
        tar.addfile(hard)
        tar.addfile(tarfile.TarInfo("empty"))
    assert [name for name, _, _ in members(path)] == ["a", long, "b", "empty"]


def test_a_size_beyond_what_octal_digits_hold_is_understood(tmp_path: Path) -> None:
    member = tarfile.TarInfo("huge")
    member.size = 10 * 2**30
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + member.size)  # nothing is written to the disk for it
    assert members(path) == [("huge", 512, 10 * 2**30)]


@QUICK
@given(files=st.dictionaries(LONG, BYTES, min_size=1, max_size=5), share=st.floats(0, 1), flip=st.booleans())
def test_a_cut_or_damaged_tar_gives_what_is_whole_and_says_so(
    tmp_path: Path, files: dict[str, bytes], share: float, flip: bool
) -> None:
    path = tar_of(tmp_path / "a.tar", files, tarfile.GNU_FORMAT)
    whole, data = members(path), path.read_bytes()
    at = int(share * (len(data) - 1))
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :] if flip else data[:at])
    found, error = [], None
    with Tar(path) as tar:
        try:
            for member in tar.members():
                found.append((member.name, member.offset, member.size))
        except CutError as raised:
            error = raised
    if flip:
        assert len(found) <= len(whole)
        return
    ends = [(offset + size) for _, offset, size in whole]
    assert found == [member for member, end in zip(whole, ends, strict=True) if end <= at]
    if at % 512 and at < whole[-1][1] + whole[-1][2]:
        assert error is not None and error.where == "a.tar" and "Copy or write the tar again" in error.reason


def test_what_is_no_tar_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 2048)
    with pytest.raises(CutError) as damaged:
        members(path)
    assert str(damaged.value) == (
        "a.tar: has no tar header at byte 0 where one belongs, so nothing from there on can be read. "
        "Copy or write the tar again"
    )
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(ConfigError, match=r"a.tar: is a compressed tar, .* Unpack it to a plain \.tar"):
        members(path)
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe.tar", "folder.tar"):
        with pytest.raises(ConfigError, match=rf"{name}: is not a regular file. Give a tar"):
            members(tmp_path / name)
    with pytest.raises(ConfigError, match=r"b.tar: not readable \(No such file or directory\)"):
        members(tmp_path / "b.tar")


def test_files_of_a_tar_are_found_by_name_here_and_in_another_process(tmp_path: Path) -> None:
    files = {f"img/{i}.png": bytes([i % 256]) * (i % 7) for i in range(5000)}
    path = tar_of(tmp_path / "a.tar", files | {"./b.png": b"b"})
    folder = TarFolder(path)
    data, sent = path.read_bytes(), pickle.dumps(folder)
    assert len(sent) < 1000 and len(folder) == 5001
    for found in (folder, pickle.loads(sent)):
        for name, expected in [*files.items(), ("b.png", b"b")]:
            span = found.span(name)
            assert span is not None and data[span[0] : sum(span)] == expected
        assert found.span("img/5000.png") is None


def test_columns_travel_as_a_file_that_goes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    few, many = Columns(a="i", b="q"), Columns(a="i", b="q")
    for i in range(SMALL_BYTES // 4):
        many.append(i, -i)
    few.append(1, 2**40)
    assert pickle.loads(pickle.dumps(few)).row(0) == (1, 2**40)
    assert list(tmp_path.iterdir()) == []
    sent = pickle.dumps(many)
    assert len(sent) < 1000 and len(list(tmp_path.iterdir())) == 1
    there = pickle.loads(sent)
    assert (
        len(there) == len(many) and there.row(77) == (77, -77) and pickle.loads(pickle.dumps(there)).row(7) == (7, -7)
    )
    assert many.kept([3, 1]).row(0) == (3, -3)
    del many, there
    assert list(tmp_path.iterdir()) == []
