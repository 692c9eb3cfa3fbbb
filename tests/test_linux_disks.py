"""A real Linux guest's disks: file systems on images, what they leave there, disks that come, go, break and die."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.abi.errno import Errno
from pvirq.drivers.blockstore import MemoryStore
from pvirq.drivers.filestore import FileStore
from pvirq.drivers.writecache import WriteCache
from pvirq.linux.kthread import Completion
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from pvirq.xen.timer import NS_PER_S

pytestmark = pytest.mark.boot

MIB = 1 << 20
Boot = Callable[..., Guest]


class Recording(MemoryStore):
    """Notes how much each request moves."""

    def __init__(self, sectors: int) -> None:
        super().__init__(sectors)
        self.sizes: list[int] = []

    def readv(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        self.sizes.append(sum(map(len, buffers)))
        return super().readv(sector, buffers)


class Full(MemoryStore):
    """Takes so many bytes more."""

    room = 1 << 40

    def writev(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        self.room -= sum(map(len, buffers))
        return super().writev(sector, buffers) if self.room >= 0 else Errno.ENOSPC


@pytest.fixture(scope="module")
def initrd(kernel_cloud: KernelChoice, busybox: Path) -> bytes:
    """With the block frontend to be loaded by hand, for its parameters."""
    assert kernel_cloud.modules_dir is not None
    drivers = modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront", "ext4"])
    front = {f"{name}.ko": content for name, content in drivers if name == "xen_blkfront"}
    assert front
    return default_initrd(busybox, front, [one for one in drivers if one[0] != "xen_blkfront"])


@pytest.fixture(scope="module")
def boot(kernel_cloud: KernelChoice, initrd: bytes) -> Boot:
    def boot(host: Host, parameters: str = "", **options: int) -> Guest:
        guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent", **options)
        guest.run(f"insmod /xen_blkfront.ko {parameters}")
        return guest

    return boot


def sh(guest: Guest, command: str) -> str:
    result = guest.run(command, 60)
    assert result.status == 0, result.text
    return result.text


def wait_for(guest: Guest, *vdevs: str) -> None:
    for vdev in vdevs:
        sh(guest, f"until [ -b /dev/{vdev} ]; do sleep 0.1; done")


def finish(host: Host, done: Completion[None]) -> None:
    assert host.run(lambda: done.done, 60 * NS_PER_S)
    done.result()


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def image(path: Path, size: int = 64 * MIB) -> Path:
    path.write_bytes(b"")
    os.truncate(path, size)
    return path


def check_ext(path: Path) -> None:
    """The file system is whole, as its own checker says, where there is one."""
    tool = shutil.which("e2fsck", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool:
        checked = subprocess.run([tool, "-f", "-n", str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def dom0_is_clean(host: Host) -> None:
    host.run(lambda: host.quiet)
    assert "blkif-backend" not in host.dom0.proc_interrupts()
    assert not host.backends.xenbus.gnttab.table.maptrack
    assert not host.backends.xenbus.backends.devices
    assert not host.hypervisor.zombies


# One guest and its disks.


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disks")


@pytest.fixture(scope="module")
def memory() -> Recording:
    return Recording(32 * MIB // 512)


@pytest.fixture(scope="module")
def guest(host: Host, boot: Boot, folder: Path, memory: Recording) -> Guest:
    guest = boot(host)
    (folder / "ro.img").write_bytes(noise(8 * MIB, 1))
    host.attach_disk(guest, "xvda", image(folder / "a.img"))
    host.attach_disk(guest, "xvdb", folder / "ro.img", readonly=True)
    host.attach_disk(guest, "xvdc", memory)
    wait_for(guest, "xvda", "xvdb", "xvdc")
    return guest


def test_a_file_system_keeps_its_files(guest: Guest, folder: Path) -> None:
    text = sh(
        guest,
        "mke2fs /dev/xvda >/dev/null && mkdir -p /a && mount -t ext4 /dev/xvda /a &&"
        "mkdir /a/dir && dd if=/dev/urandom of=/a/dir/noise bs=64k count=100 2>/dev/null &&"
        "seq 1 100000 > /a/numbers && md5sum /a/dir/noise /a/numbers && sync && umount /a &&"
        "echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 /dev/xvda /a && md5sum /a/dir/noise /a/numbers; umount /a",
    )
    sums = [line.split()[0] for line in text.splitlines()]
    numbers = "".join(f"{i}\n" for i in range(1, 100001)).encode()
    assert sums[:2] == sums[2:]
    assert sums[1] == hashlib.md5(numbers).hexdigest()
    # The host sees the same in the image: a clean file system, with the file's blocks in it.
    check_ext(folder / "a.img")
    content = (folder / "a.img").read_bytes()
    for at in range(0, len(numbers) - 1024, 100 * 1024):
        assert numbers[at : at + 1024] in content


def test_a_read_only_disk(guest: Guest, folder: Path) -> None:
    assert sh(guest, "cat /sys/block/xvdb/ro") == "1\n"
    before = (folder / "ro.img").read_bytes()
    assert sh(guest, "md5sum < /dev/xvdb").split()[0] == hashlib.md5(before).hexdigest()
    assert guest.run("dd if=/dev/zero of=/dev/xvdb bs=4k count=1 oflag=direct").status
    assert guest.run("mke2fs /dev/xvdb").status
    assert (folder / "ro.img").read_bytes() == before


def test_flushes_and_direct_writes(guest: Guest, memory: Recording) -> None:
    flushes = memory.flushes
    sh(guest, "seq 1 5000 > /numbers; dd if=/numbers of=/dev/xvdc bs=4k conv=sync,fsync oflag=direct 2>/dev/null")
    assert memory.flushes > flushes
    assert memory.data[:14] == b"1\n2\n3\n4\n5\n6\n7\n"
    assert sh(guest, "dd if=/dev/xvdc bs=4k count=6 iflag=direct 2>/dev/null | head -n 5000 | cmp - /numbers") == ""


def test_discards_reach_the_image(guest: Guest, folder: Path, memory: Recording) -> None:
    sh(
        guest,
        "dd if=/dev/urandom of=/dev/xvdc bs=1M count=8 oflag=direct 2>/dev/null;"
        "blkdiscard -o 1048576 -l 2097152 /dev/xvdc",
    )
    assert memory.data[MIB : 3 * MIB] == bytes(2 * MIB)
    assert memory.data[:MIB] != bytes(MIB)
    assert memory.data[3 * MIB : 4 * MIB] != bytes(MIB)
    sh(guest, "mount -t ext4 -o discard /dev/xvda /a; dd if=/dev/urandom of=/a/big bs=1M count=16 2>/dev/null; sync")
    full = (folder / "a.img").stat().st_blocks
    sh(guest, "rm /a/big; sync; fstrim /a; umount /a")
    assert (folder / "a.img").stat().st_blocks < full - 14 * MIB // 512
    check_ext(folder / "a.img")


def test_disks_come_and_go(host: Host, guest: Guest, folder: Path) -> None:
    for _ in range(2):
        host.attach_disk(guest, "xvdd", image(folder / "d.img", 8 * MIB))
        wait_for(guest, "xvdd")
        sh(guest, "echo hello | dd of=/dev/xvdd conv=sync,fsync 2>/dev/null")
        finish(host, host.detach_disk(guest, "xvdd"))
        sh(guest, "while [ -b /dev/xvdd ]; do sleep 0.1; done")
        assert (folder / "d.img").read_bytes()[:6] == b"hello\n"
        FileStore(folder / "d.img").close()  # nobody holds it any more


def test_a_mounted_disk_that_goes(host: Host, guest: Guest, folder: Path) -> None:
    """Idle, but mounted: the guest gets errors from it and goes on."""
    host.attach_disk(guest, "xvde", image(folder / "e.img", 16 * MIB))
    wait_for(guest, "xvde")
    sh(guest, "mke2fs /dev/xvde >/dev/null; mkdir -p /e; mount -t ext4 /dev/xvde /e; echo x > /e/x; sync")
    finish(host, host.detach_disk(guest, "xvde"))
    assert "xvde" not in "".join(host.backends.devices.names())
    assert guest.run("dd if=/dev/zero of=/e/y bs=1M count=1 conv=fsync").status
    sh(guest, "umount -l /e; md5sum < /dev/xvdb >/dev/null")
    assert b"x\n" in (folder / "e.img").read_bytes()


def test_a_store_without_room(host: Host, guest: Guest) -> None:
    """The guest's file system gets errors for what doesn't fit; its other disks go on."""
    store = Full(16 * MIB // 512)
    host.attach_disk(guest, "xvdf", store)
    wait_for(guest, "xvdf")
    sh(guest, "mke2fs /dev/xvdf > /dev/null; mkdir -p /f; mount -t ext4 /dev/xvdf /f; echo early > /f/early; sync")
    store.room = 2 * MIB
    assert guest.run("dd if=/dev/urandom of=/f/late bs=64k count=100 conv=fsync").status
    assert sh(guest, "echo 3 > /proc/sys/vm/drop_caches; cat /f/early") == "early\n"
    sh(guest, "echo x > /x; dd if=/x of=/dev/xvdc conv=sync,fsync 2>/dev/null; umount -l /f")
    assert sum("failed: ENOSPC" in line for line in host.dom0.log) == 1
    finish(host, host.detach_disk(guest, "xvdf"))


def test_a_module_that_is_loaded_anew(host: Host, guest: Guest, folder: Path) -> None:
    """rmmod and modprobe xen-blkback: requests wait meanwhile, and are answered when it is back."""
    finish(host, host.backends.unload("vbd"))
    sh(guest, "(dd if=/dev/xvdb bs=64k iflag=direct 2>/dev/null | md5sum > /sum &)")
    sh(guest, "sleep 1")
    assert sh(guest, "cat /sum") == ""
    finish(host, host.backends.load("vbd"))
    sh(guest, "until [ -s /sum ]; do sleep 0.1; done")
    assert sh(guest, "cat /sum").split()[0] == hashlib.md5((folder / "ro.img").read_bytes()).hexdigest()
    sh(guest, "mount -t ext4 /dev/xvda /a; md5sum /a/numbers; echo more > /a/more; umount /a")
    check_ext(folder / "a.img")


def test_a_guest_that_dies_while_it_writes(host: Host, guest: Guest, folder: Path) -> None:
    sh(guest, "(dd if=/dev/zero of=/dev/xvda bs=256k oflag=direct >/dev/null 2>&1 &)")
    inode = folder / "a.img"
    before = inode.read_bytes()
    assert host.run(lambda: inode.read_bytes()[:MIB] != before[:MIB], 60 * NS_PER_S)
    host.destroy(guest)
    dom0_is_clean(host)
    assert host.backends.devices.names() == []
    FileStore(inode).close()


# Other parameters, other guests.


@pytest.mark.parametrize(("persistent", "segments"), [(True, 32), (False, 256)])
def test_large_rings_and_requests(boot: Boot, persistent: bool, segments: int) -> None:
    """16 pages a ring, a ring for each CPU, large requests, grants that stay mapped or don't.

    With grants that stay the frontend takes pages for the most that can be under way, here 132 MiB.
    """
    store = Recording(32 * MIB // 512)
    store.data[:] = noise(32 * MIB, 2)
    expected = hashlib.md5(store.data).hexdigest()
    with Host() as host:
        parameters = f"max_ring_page_order=4 max_indirect_segments={segments} feature_persistent={persistent:d}"
        guest = boot(host, f"{parameters} max_queues=2", vcpus=2, memory=384 * MIB)
        ref = host.attach_disk(guest, "xvda", store)
        wait_for(guest, "xvda")
        read = host.store.read_text
        assert read(f"{ref.frontend}/ring-page-order") == "4"
        assert read(f"{ref.frontend}/multi-queue-num-queues") == "2"
        assert read(f"{ref.frontend}/queue-1/ring-ref15") != ""
        assert read(f"{ref.frontend}/feature-persistent") == f"{persistent:d}"
        text = sh(guest, "dd if=/dev/xvda bs=1M iflag=direct 2>/dev/null | md5sum")
        assert text.split()[0] == expected
        assert max(store.sizes) == segments * 4096
        # Several at once, from both CPUs, in place and back.
        sh(
            guest,
            "for i in 0 1 2 3 4 5 6 7; do"
            " dd if=/dev/xvda of=/t$i bs=512k skip=$((i*2)) count=2 iflag=direct 2>/dev/null &"
            " done; wait;"
            "for i in 0 1 2 3 4 5 6 7; do"
            " dd if=/t$i of=/dev/xvda bs=512k seek=$((16+i*2)) count=2 oflag=direct 2>/dev/null &"
            " done; wait",
        )
        assert store.data[8 * MIB : 16 * MIB] == store.data[: 8 * MIB]
        assert store.data[16 * MIB :] == noise(32 * MIB, 2)[16 * MIB :]
        rings = 2 * 16
        mapped = len(host.backends.xenbus.gnttab.table.maptrack)
        assert mapped > rings if persistent else mapped == rings
        host.destroy(guest)
        dom0_is_clean(host)


def test_a_crash_of_the_host_keeps_what_was_synced(boot: Boot, tmp_path: Path) -> None:
    """On a disk with a volatile cache: ext4 with its journal has what was synced, and is a whole file system."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    mkfs, fsck, debugfs = (shutil.which(name, path=path) for name in ("mkfs.ext4", "e2fsck", "debugfs"))
    if not mkfs or not fsck or not debugfs:
        pytest.skip("no e2fsprogs")
    disk = image(tmp_path / "disk.img")
    subprocess.run([mkfs, "-q", str(disk)], check=True)
    with Host() as host:
        guest = boot(host)
        ref = host.attach_disk(guest, "xvda", disk, cache="writeback")
        wait_for(guest, "xvda")
        sh(guest, "mkdir /a; mount -t ext4 /dev/xvda /a; seq 1 200000 > /a/safe; mv /a/safe /a/saved; sync")
        store = host.backends.store_of(ref)
        assert isinstance(store, WriteCache)
        sh(guest, "seq 1 300000 > /a/unsafe; dd if=/dev/zero of=/a/zero bs=1M count=4 oflag=direct 2>/dev/null")
        assert store.dirty
        store.crash()
        host.destroy(guest)
    subprocess.run([fsck, "-p", str(disk)], check=False)  # the journal
    checked = subprocess.run([fsck, "-f", "-n", str(disk)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    saved = subprocess.run([debugfs, "-R", "cat /saved", str(disk)], capture_output=True, check=True).stdout
    assert saved == "".join(f"{i}\n" for i in range(1, 200001)).encode()
