"""The cpio writer and reader, against each other and against the real tools."""

import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.toolstack import cpio

part = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..", cpio.TRAILER)
)
path = st.lists(part, min_size=1, max_size=4).map("/".join)
member = st.one_of(
    st.tuples(st.just("directory"), path, st.integers(0, 0o7777)),
    st.tuples(st.just("file"), path, st.binary(max_size=40), st.integers(0, 0o7777)),
    st.tuples(st.just("symlink"), path, part),
    st.tuples(
        st.just("device"),
        path,
        st.sampled_from("cb"),
        st.integers(0, 4095),
        st.integers(0, 1 << 20),
        st.just(0o600),
    ),
)


def build(members: list[tuple[object, ...]]) -> tuple[cpio.Writer, list[tuple[object, ...]]]:
    writer = cpio.Writer()
    taken = []
    for kind, *arguments in members:
        try:
            getattr(writer, str(kind))(*arguments)
        except cpio.CpioError:
            continue  # a name twice, or below a file
        taken.append((kind, *arguments))
    return writer, taken


@given(st.lists(member, max_size=12))
def test_round_trip(members: list[tuple[object, ...]]) -> None:
    writer, taken = build(members)
    archive = writer.getvalue()
    assert len(archive) % 512 == 0
    assert archive == build(members)[0].getvalue()
    entries = {entry.name: entry for entry in cpio.read(archive)}
    for kind, name, *rest in taken:
        entry = entries[str(name)]
        assert entry.mtime == entry.uid == entry.gid == 0
        if kind == "file":
            assert (entry.data, entry.mode) == (rest[0], stat.S_IFREG | rest[1])
        elif kind == "symlink":
            assert entry.data.decode() == rest[0]
            assert stat.S_ISLNK(entry.mode)
        elif kind == "device":
            assert entry.rdev == (rest[1], rest[2])
        else:
            assert stat.S_ISDIR(entry.mode)
    seen = set()
    for entry in cpio.read(archive):  # the kernel makes no parents by itself
        parent = entry.name.rpartition("/")[0]
        assert not parent or parent in seen
        seen.add(entry.name)
    inodes = [entry.ino for entry in cpio.read(archive)]
    assert inodes == sorted(set(inodes))


@given(st.lists(member, max_size=4), st.integers(0, 2000), st.binary(max_size=8))
def test_damaged_archives_only_raise_cpio_error(members: list[tuple[object, ...]], at: int, junk: bytes) -> None:
    archive = bytearray(build(members)[0].getvalue())
    at %= len(archive)
    archive[at : at + len(junk)] = junk
    for damaged in (bytes(archive), bytes(archive[:at])):
        with contextlib.suppress(cpio.CpioError):
            list(cpio.read(damaged))


@pytest.mark.parametrize("name", ["", "/", "a//b", "..", "a/../b", "./a", "TRAILER!!!", "a\0b", "x" * 5000, "\ud800"])
def test_names_that_no_member_can_have(name: str) -> None:
    with pytest.raises(cpio.CpioError):
        cpio.Writer().file(name, b"")


def test_twice() -> None:
    writer = cpio.Writer()
    writer.directory("a")
    writer.directory("a", 0o700)
    with pytest.raises(cpio.CpioError, match="twice"):
        writer.file("a", b"")
    writer.file("f", b"")
    with pytest.raises(cpio.CpioError, match="not a directory"):
        writer.file("f/g", b"")
    with pytest.raises(cpio.CpioError, match="symlink target"):
        writer.symlink("l", "")


def test_archives_in_a_row() -> None:
    first, second = cpio.Writer(), cpio.Writer()
    first.file("one", b"1")
    second.file("two", b"22")
    both = first.getvalue() + bytes(8) + second.getvalue()
    assert [entry.name for entry in cpio.read(both)] == ["one", "two"]
    assert [entry.name for entry in cpio.read(first.getvalue() + b"\x1f\x8b compressed")] == ["one"]
    assert [entry.name for entry in cpio.read(both, both.rindex(b"070701", 0, both.index(b"two")))] == ["two"]


def sample() -> cpio.Writer:
    writer = cpio.Writer()
    writer.directory("dir", 0o750)
    writer.file("dir/empty", b"")
    writer.file("dir/data", bytes(range(256)) * 5, 0o755)
    writer.symlink("dir/link", "../elsewhere")
    return writer


@pytest.mark.parametrize("tool", ["cpio", "bsdcpio"])
def test_the_real_tool_unpacks_it(tool: str, tmp_path: Path) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    subprocess.run([tool, "-i", "-d"], input=sample().getvalue(), cwd=tmp_path, check=True, capture_output=True)
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o750
    assert (tmp_path / "dir/data").read_bytes() == bytes(range(256)) * 5
    assert (tmp_path / "dir/empty").read_bytes() == b""
    assert os.readlink(tmp_path / "dir/link") == "../elsewhere"


@pytest.mark.parametrize("tool", ["cpio", "bsdcpio"])
def test_reads_what_the_real_tool_packs(tool: str, tmp_path: Path) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_bytes(b"content\n")
    (tmp_path / "d/link").symlink_to("file")
    packed = subprocess.run(
        [tool, "-o", "-H", "newc"],
        input=b"d\nd/file\nd/link\n",
        cwd=tmp_path,
        check=True,
        capture_output=True,
    ).stdout
    entries = {entry.name: entry for entry in cpio.read(packed)}
    assert entries["d/file"].data == b"content\n"
    assert entries["d/link"].data == b"file"
    assert stat.S_ISDIR(entries["d"].mode)
    assert entries["d/file"].mtime == int((tmp_path / "d/file").stat().st_mtime)
