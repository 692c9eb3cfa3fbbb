"""Disks that are attached to guests of a host: images, loop devices, stores; detaching; errors of what lies below."""

from __future__ import annotations

import doctest
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

import pvirq
from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blockstore import MemoryStore
from pvirq.drivers.filestore import FileStore
from pvirq.drivers.writecache import WriteCache
from pvirq.linux.kthread import Body, Completion, Kthread
from pvirq.modelled import ModelledGuest
from pvirq.toolstack.diskimage import SERVERS
from test_nbdstore import qcow2

SIZE = 1 << 20
BACK = "/local/domain/0/backend/vbd/1/51712"


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with pvirq.Host(machine_memory=1 << 30) as host:
        yield host


@pytest.fixture
def guest(host: pvirq.Host) -> ModelledGuest:
    return host.model("pvops")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"image".ljust(512, b"\0") + bytes(SIZE - 512))
    return path


def settle(host: pvirq.Host) -> None:
    host.run(lambda: host.quiet)


def connect(guest: ModelledGuest, vdev: str = "xvda") -> None:
    guest.host.run(lambda: guest.has_disk(vdev), 10**10)
    assert guest.has_disk(vdev)


T = TypeVar("T")


def do(guest: ModelledGuest, body: Body[T]) -> T:
    """Run a body in the guest to its end; what it raises is raised here."""
    outcome: Completion[T] = Completion()

    def run() -> Body[None]:
        try:
            outcome.complete((yield from body))
        except XenError as error:
            outcome.fail(error)

    Kthread(guest.kernel, "test", run())
    guest.host.run(lambda: outcome.done)
    return outcome.result()


def write(guest: ModelledGuest, sector: int, data: bytes, vdev: str = "xvda") -> None:
    do(guest, guest.disk(vdev).write(sector, data))


def read(guest: ModelledGuest, sector: int, count: int, vdev: str = "xvda") -> bytes:
    return do(guest, guest.disk(vdev).read(sector, count))


def log_of(host: pvirq.Host) -> list[str]:
    return [line for line in host.dom0.log if "xen-blkback" in line and "failed" in line]


def test_an_image_is_a_loop_device_while_its_disk_is_there(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    ref = host.attach_disk(guest, "xvda", image)
    connect(guest)
    nodes = {key: host.store.read_text(f"{BACK}/{key}") for key in (
        "params", "type", "mode", "node", "physical-device", "physical-device-path", "hotplug-status",
    )}  # fmt: skip
    assert nodes == {
        "params": str(image), "type": "phy", "mode": "w", "node": "/dev/loop0", "physical-device": "7:0",
        "physical-device-path": "/dev/loop0", "hotplug-status": "connected",
    }  # fmt: skip
    assert host.backends.devices.names() == ["/dev/loop0"]
    assert isinstance(host.backends.store_of(ref), FileStore)
    assert read(guest, 0, 1)[:5] == b"image"
    write(guest, 8, b"data" * 1024)
    assert image.read_bytes()[4096:8192] == b"data" * 1024
    gone = host.detach_disk(guest, "xvda")
    host.run(lambda: gone.done)
    settle(host)
    assert not host.backends.devices.names()
    assert not host.store.exists(BACK)
    FileStore(image).close()  # unlocked
    with pytest.raises(XenError) as error:
        host.detach_disk(guest, "xvda")
    assert error.value.errno is Errno.ENOENT
    # And again, while the guest runs.
    host.attach_disk(guest, "xvdb", str(image), readonly=True)
    connect(guest, "xvdb")
    assert read(guest, 8, 1, "xvdb") == b"data" * 128
    with pytest.raises(XenError):
        write(guest, 8, bytes(512), "xvdb")


def test_several_disks(host: pvirq.Host, guest: ModelledGuest, image: Path, tmp_path: Path) -> None:
    memory = MemoryStore(64, b"memory")
    second = tmp_path / "second"
    second.write_bytes(bytes(4096))
    host.attach_disk(guest, "xvda", image)
    host.attach_disk(guest, "xvdb", memory)
    host.attach_disk(guest, "xvdc", second)
    for vdev in ("xvda", "xvdb", "xvdc"):
        connect(guest, vdev)
    assert host.backends.devices.names() == ["/dev/ram0", "/dev/loop0", "/dev/loop1"]
    assert read(guest, 0, 1, "xvdb")[:6] == b"memory"
    with pytest.raises(XenError) as error:
        host.attach_disk(guest, "xvdb", memory)
    assert error.value.errno is Errno.EEXIST
    host.destroy(guest)
    settle(host)
    assert not host.backends.devices.names()
    FileStore(image).close()
    assert memory.read(0, 1)[:6] == b"memory"


def test_images_that_cannot_be_had(host: pvirq.Host, guest: ModelledGuest, image: Path, tmp_path: Path) -> None:
    host.attach_disk(guest, "xvda", image)
    for device, errno, why in (
        (tmp_path / "none", Errno.ENOENT, "failed to stat"), (tmp_path, Errno.EISDIR, "Is a directory"),
        (image, Errno.EBUSY, "in use"), ("/dev/null", Errno.EINVAL, "neither a file nor a block device"),
    ):  # fmt: skip
        with pytest.raises(XenError, match=why) as error:
            host.attach_disk(guest, "xvdb", device)
        assert error.value.errno is errno
    with pytest.raises(XenError, match="are for images"):
        host.attach_disk(guest, "xvdb", MemoryStore(8), cache="writeback")
    assert not host.store.exists("/libxl/1/device/vbd/51728")
    connect(guest)
    with pytest.raises(ValueError, match="virtual device"):
        host.attach_disk(guest, "sdx9z", image)


def test_an_image_that_is_read_only(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    image.chmod(0o444)
    with pytest.raises(XenError, match="is read-only, and so I will not mount it read-write") as error:
        host.attach_disk(guest, "xvda", image)
    assert error.value.errno is Errno.EACCES
    host.attach_disk(guest, "xvda", image, readonly=True)
    connect(guest)
    assert read(guest, 0, 1)[:5] == b"image"


def test_a_disk_that_goes_before_its_backend_has_seen_it(
    host: pvirq.Host, guest: ModelledGuest, image: Path, tmp_path: Path
) -> None:
    """Its script never runs, and not for the next disk of this name either."""
    host.attach_disk(guest, "xvda", image)
    host.detach_disk(guest, "xvda", force=True)
    FileStore(image).close()
    (tmp_path / "second").write_bytes(b"second".ljust(4096, b"\0"))
    host.attach_disk(guest, "xvda", tmp_path / "second")
    connect(guest)
    assert host.backends.devices.names() == ["/dev/loop0"]
    assert read(guest, 0, 1)[:6] == b"second"


def test_force_does_not_wait_for_the_guest(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    host.attach_disk(guest, "xvda", image)
    connect(guest)
    host.pause(guest)
    gone = host.detach_disk(guest, "xvda")
    settle(host)
    assert not gone.done
    assert host.detach_disk(guest, "xvda", force=True).done
    settle(host)
    assert not host.backends.devices.names()
    FileStore(image).close()
    assert "blkif-backend" not in host.dom0.proc_interrupts()


def test_a_crash_of_the_host_loses_what_was_not_flushed(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    ref = host.attach_disk(guest, "xvda", image, cache="writeback")
    connect(guest)
    write(guest, 1, b"a" * 512)
    do(guest, guest.disk("xvda").flush())
    write(guest, 2, b"b" * 512)
    assert read(guest, 1, 2) == b"a" * 512 + b"b" * 512
    store = host.backends.store_of(ref)
    assert isinstance(store, WriteCache)
    assert store.crash() == 1
    host.destroy(guest)
    assert image.read_bytes()[512:1536] == b"a" * 512 + bytes(512)


def test_a_guest_that_ends_leaves_its_image_whole(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    host.attach_disk(guest, "xvda", image, cache="writeback")
    connect(guest)
    write(guest, 2, b"b" * 512)
    host.destroy(guest)
    assert image.read_bytes()[1024:1536] == b"b" * 512


def test_a_qcow2_image_is_a_network_block_device(host: pvirq.Host, guest: ModelledGuest, tmp_path: Path) -> None:
    if not any(map(shutil.which, SERVERS)):
        pytest.skip("neither qemu-nbd nor qemu-storage-daemon is installed")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2(64 << 20))
    host.attach_disk(guest, "xvda", path, format="qcow2")
    connect(guest)
    assert host.store.read_text(f"{BACK}/physical-device") == "2b:0"
    assert host.store.read_text(f"{BACK}/params") == "/dev/nbd0"
    assert guest.disk("xvda").sectors == 64 << 11
    write(guest, 1000, b"q" * 512 * 300)
    do(guest, guest.disk("xvda").flush())
    do(guest, guest.disk("xvda").discard(1000, 100))
    assert read(guest, 1050, 100) == bytes(512 * 50) + b"q" * 512 * 50
    gone = host.detach_disk(guest, "xvda")
    host.run(lambda: gone.done)
    settle(host)
    assert not host.backends.devices.names()
    host.attach_disk(guest, "xvda", path, format="qcow2", readonly=True)
    connect(guest)
    assert read(guest, 1050, 100) == bytes(512 * 50) + b"q" * 512 * 50


# What lies below fails.


def test_a_full_file_system(
    host: pvirq.Host, guest: ModelledGuest, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes fail, once in the log; another guest's disk goes on, and so does this one when there is room again."""
    other = host.model("pvops")
    host.attach_disk(guest, "xvda", image)
    host.attach_disk(other, "xvda", MemoryStore(64))
    connect(guest)
    connect(other)
    full = {image.stat().st_ino}
    pwritev = os.pwritev

    def limited(fd: int, buffers: list[memoryview], at: int) -> int:
        if os.fstat(fd).st_ino in full:
            raise OSError(int(Errno.ENOSPC), "")
        return pwritev(fd, buffers, at)

    monkeypatch.setattr(os, "pwritev", limited)
    for _ in range(3):
        with pytest.raises(XenError) as error:
            write(guest, 3, bytes(512))
        assert error.value.errno is Errno.EIO
        write(other, 3, b"o" * 512)
    assert read(guest, 0, 1)[:5] == b"image"
    assert log_of(host) == [
        "xen-blkback: backend/vbd/1/51712: write of device 7:0 failed: ENOSPC; further ones are not logged"
    ]
    full.clear()
    write(guest, 3, b"room" * 128)
    assert read(guest, 3, 1) == b"room" * 128


def test_an_image_that_vanishes(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    host.attach_disk(guest, "xvda", image)
    connect(guest)
    image.unlink()
    write(guest, 3, b"u" * 512)  # somebody has it open: it is there
    assert read(guest, 3, 1) == b"u" * 512
    assert not log_of(host)


def test_an_image_that_is_truncated(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    host.attach_disk(guest, "xvda", image)
    connect(guest)
    os.truncate(image, 4096)
    for _ in range(3):
        with pytest.raises(XenError) as error:
            read(guest, 100, 8)
        assert error.value.errno is Errno.EIO
    assert read(guest, 0, 8)[:5] == b"image"
    assert log_of(host) == [
        "xen-blkback: backend/vbd/1/51712: read of device 7:0 failed: EIO; further ones are not logged"
    ]


def test_the_backends_parameter(host: pvirq.Host, guest: ModelledGuest, image: Path) -> None:
    host.backends.feature_persistent = False
    host.attach_disk(guest, "xvda", image)
    connect(guest)
    assert host.store.read_text(f"{BACK}/feature-persistent") == "0"
    write(guest, 0, b"p" * 512 * 100)
    assert read(guest, 0, 100) == b"p" * 512 * 100
    assert len(host.backends.xenbus.gnttab.table.maptrack) == 1  # the ring


def test_the_page_runs() -> None:
    """docs/disks.md."""
    page = Path(__file__).parent.parent / "docs/disks.md"
    flags = doctest.ELLIPSIS | doctest.REPORT_NDIFF
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert tried > 30
    assert not failed
