"""Raw images as disks: what a loop device does with them, errors, locks, and what survives an end by force."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers import filestore
from pvirq.drivers.blockstore import Discards, Flushes, InPlace
from pvirq.drivers.filestore import FileStore
from storelib import SECTORS, ask, new_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return new_image(tmp_path)


def test_data_goes_in_place_and_into_the_file(image: Path) -> None:
    store = FileStore(image)
    assert isinstance(store, InPlace)
    assert isinstance(store, Flushes)
    assert isinstance(store, Discards)
    assert store.sectors == SECTORS
    memory = memoryview(bytearray(b"a" * 512 + b"b" * 512 + b"c" * 1024))
    assert store.writev(3, [memory[512:1024], memory[:512]]) is None
    assert image.read_bytes()[3 * 512 : 5 * 512] == b"b" * 512 + b"a" * 512
    assert store.readv(2, [memory[1024:], memory[:512]]) is None
    assert bytes(memory[1024:1536]) == bytes(range(256)) * 2
    assert bytes(memory[1536:]) == b"b" * 512
    assert bytes(memory[:512]) == b"a" * 512
    assert ask(store.flush) is None


def test_many_buffers(image: Path) -> None:
    """More than one call of the system's takes."""
    store = FileStore(image)
    buffers = [memoryview(bytearray(16)) for _ in range(SECTORS * 32)]
    assert store.readv(0, buffers) is None
    assert b"".join(buffers) == image.read_bytes()
    for buffer in buffers:
        buffer[:] = b"z" * 16
    assert store.writev(0, buffers) is None
    assert image.read_bytes() == b"z" * SECTORS * 512


def test_the_end_that_fills_no_sector_is_not_there(image: Path) -> None:
    with image.open("ab") as file:
        file.write(b"tail")
    store = FileStore(image)
    assert store.sectors == SECTORS
    assert store.readv(SECTORS, [memoryview(bytearray(512))]) is Errno.EIO
    assert store.writev(SECTORS, [memoryview(bytes(512))]) is Errno.EIO
    assert image.stat().st_size == SECTORS * 512 + 4


def test_read_only(image: Path) -> None:
    image.chmod(0o444)
    store = FileStore(image, readonly=True)
    before = image.read_bytes()
    assert store.writev(0, [memoryview(bytes(512))]) is Errno.EROFS
    assert ask(store.discard, 0, 1) is Errno.EROFS
    assert ask(store.flush) is None
    assert image.read_bytes() == before


def test_discards_make_holes(image: Path) -> None:
    store = FileStore(image)
    assert ask(store.flush) is None
    blocks = image.stat().st_blocks
    assert ask(store.discard, 1, SECTORS - 2) is None
    content = image.read_bytes()
    assert content[512:-512] == bytes((SECTORS - 2) * 512)
    assert content[:512] == content[-512:] == bytes(range(256)) * 2
    assert image.stat().st_blocks < blocks
    assert ask(store.discard, SECTORS, 1) is Errno.EIO


def test_discards_without_holes_are_zeros(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filestore, "_fallocate", lambda: None)
    monkeypatch.setattr(filestore, "ZEROS", bytes(1536))
    store = FileStore(image)
    assert ask(store.discard, 2, 7) is None
    content = image.read_bytes()
    assert content[2 * 512 : 9 * 512] == bytes(7 * 512)
    assert content[:1024] == bytes(range(256)) * 4
    assert content[9 * 512 :] == bytes(range(256)) * 2 * (SECTORS - 9)
    monkeypatch.setattr(filestore, "MOST_ZEROS", 4096)
    assert ask(store.discard, 0, 9) is Errno.EOPNOTSUPP


@pytest.mark.parametrize("first_ro", [False, True])
@pytest.mark.parametrize("second_ro", [False, True])
def test_locks(image: Path, first_ro: bool, second_ro: bool) -> None:
    """Readers share an image; a writer has it alone, in this process and in others."""
    store = FileStore(image, readonly=first_ro)
    code = (
        "import sys\nfrom pvirq.drivers.filestore import FileStore\nfrom pvirq import XenError\n"
        f"try: FileStore(sys.argv[1], readonly={second_ro})\nexcept XenError as error: print(error.why)"
    )
    other = subprocess.run([sys.executable, "-c", code, str(image)], check=True, capture_output=True, text=True)
    if first_ro and second_ro:
        FileStore(image, readonly=True).close()
        assert other.stdout == ""
    else:
        with pytest.raises(XenError, match="in use") as error:
            FileStore(image, readonly=second_ro)
        assert error.value.errno is Errno.EBUSY
        assert other.stdout.strip() == error.value.why
        FileStore(image, readonly=second_ro, lock=False).close()  # who knows what it does
    store.close()
    FileStore(image).close()


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, errno in (("none", Errno.ENOENT), (".", Errno.EISDIR), ("fifo", Errno.EINVAL)):
        with pytest.raises(XenError, match=re.escape(str(tmp_path / name))) as error:
            FileStore(tmp_path / name)
        assert error.value.errno is errno
        assert "\n" not in error.value.why
    with pytest.raises(XenError, match="neither a file nor a block device"):
        FileStore("/dev/null", readonly=True)


def test_a_truncated_image(image: Path) -> None:
    """What is gone reads as an error, and no buffer keeps what was in it; a write makes the file longer again."""
    store = FileStore(image)
    os.truncate(image, 10 * 512)
    memory = memoryview(bytearray(b"old" * 1024))[:2048]
    assert store.readv(8, [memory[:1024], memory[1024:]]) is Errno.EIO
    assert bytes(memory) == bytes(2048)
    assert store.readv(8, [memory[:1024]]) is None
    assert store.writev(20, [memoryview(b"n" * 512)]) is None
    assert store.read(20, 1) == b"n" * 512
    assert store.read(15, 1) == bytes(512)


def test_an_unlinked_image(image: Path) -> None:
    """It is there for as long as somebody has it open."""
    store = FileStore(image)
    image.unlink()
    assert store.writev(0, [memoryview(b"n" * 512)]) is None
    assert store.read(0, 1) == b"n" * 512
    assert ask(store.flush) is None


def test_no_room(image: Path) -> None:
    """A limit that the system sets: the part that fits is written, the request fails."""
    store = FileStore(image)
    os.truncate(image, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 512, hard))
        assert store.writev(0, [memoryview(bytes(2048)), memoryview(bytes(2048))]) is Errno.EIO  # EFBIG
        assert store.writev(0, [memoryview(b"f" * 2048)]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert store.read(0, 1) == b"f" * 512


@pytest.mark.parametrize("number", [Errno.ENOSPC, Errno.EIO, 122])  # 122: EDQUOT, which Xen doesn't know
def test_errors_of_the_system(image: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store = FileStore(image)

    def fails(*args: object) -> int:
        raise OSError(int(number), "")

    for name in ("preadv", "pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, fails)
    expected = number if isinstance(number, Errno) else Errno.EIO
    assert store.writev(0, [memoryview(bytes(512))]) is expected
    assert store.readv(0, [memoryview(bytearray(512))]) is expected
    assert ask(store.flush) is expected


def test_a_closed_store(image: Path) -> None:
    store = FileStore(image)
    store.close()
    store.close()
    assert store.readv(0, [memoryview(bytearray(512))]) is Errno.ENXIO
    assert store.writev(0, [memoryview(bytes(512))]) is Errno.ENXIO
    assert ask(store.flush) is Errno.ENXIO
    assert ask(store.discard, 0, 1) is Errno.ENXIO


# Killed at any moment: a process with a guest that writes and flushes, and says what it has flushed.

GUEST = """
import sys
from functools import partial
import pvirq
from pvirq.drivers.blkfront import BlkFront

path, cache, flushes = sys.argv[1], sys.argv[2], sys.argv[3] == "flush"
with pvirq.Host() as host:
    guest = host.model("pvops")
    host.attach_disk(guest, "xvda", path, cache=cache)
    host.run(lambda: guest.has_disk("xvda"))
    disk = guest.disk("xvda")

    def body():
        for i in range(1, 100_000):
            data = i.to_bytes(4, "little") * 128
            yield from disk.write(i % 64, data)
            if flushes:
                yield from disk.flush()
            print(i, flush=True)

    thread = guest.kernel.spawn("writer", body())
    host.run(lambda: thread.done)
"""


def kill_after(image: Path, lines: int, *args: str) -> int:
    """Run the guest until it has said so much, kill it, and return the last number that it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", GUEST, str(image), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(lines):
        assert process.stdout.readline(), process.stderr and process.stderr.read()
    process.kill()
    rest = process.communicate()[0]
    said = rest.rpartition("\n")[0].rpartition("\n")[2]
    return int(said) if said else lines


@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.parametrize("lines", [1, 50, 333])
def test_what_was_flushed_survives_a_kill(image: Path, cache: str, lines: int) -> None:
    last = kill_after(image, lines, cache, "flush")
    content = image.read_bytes()
    found = [int.from_bytes(content[i * 512 : i * 512 + 4], "little") for i in range(64)]
    for i in range(max(1, last - 63), last + 1):
        assert found[i % 64] in (i, i + 64)  # or what was under way
    FileStore(image).close()  # no lock is left


def test_a_volatile_cache_dies_with_its_process(image: Path) -> None:
    before = image.read_bytes()
    assert kill_after(image, 100, "writeback", "no") >= 100
    assert image.read_bytes() == before
