"""A whole host is saved and restored: guests, devices, sectors of disks that are in memory alone."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

import pvirq
from pvirq import Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.hardware.disk import BlockDriver
from pvirq.hostfile import HostFileError
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from pvirq.toolstack.savefile import SaveFileError

FRONTENDS = ["xen-blkfront", "xen-netfront"]


@pytest.mark.boot
def test_two_guests_with_their_disks(kernel_cloud: KernelChoice, busybox: Path, tmp_path: Path) -> None:
    assert kernel_cloud.modules_dir is not None
    initrd = default_initrd(busybox, modules=modules.read_modules(kernel_cloud.modules_dir, FRONTENDS))
    file = tmp_path / "host.zip"
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Host(hardware="recorded", wallclock=1_700_000_000) as host:
        host.add_bridge("xenbr0")
        guests = [
            host.boot(
                kernel_cloud.path, initrd=initrd, append="console=hvc0 quiet pvirq=agent", memory=128 << 20,
                name=f"u{number}", vcpus=number,
            )
            for number in (1, 2)
        ]  # fmt: skip
        for number, guest in enumerate(guests, 1):
            host.attach_disk(guest, "xvda", MemoryStore(4096))
            host.attach_disk(guest, "xvdb", f"/dev/virtio{number - 1}")
            host.attach_nic(guest)
            guest.run("until [ -b /dev/xvda ] && [ -b /dev/xvdb ] && [ -d /sys/class/net/eth0 ]; do sleep 0.1; done")
            written = guest.run(
                f"ip addr add 10.0.0.{number}/24 dev eth0; ip link set eth0 up; n={number}; "
                "for i in a b; do echo $i$n | dd of=/dev/xvd$i conv=sync oflag=direct; done"
            )
            assert written.status == 0, written.text
        host.attach_disk(guests[0], "xvdc", image)
        pvirq.save_host(host, file, checkpoint=True)
        assert guests[0].run("head -n1 /dev/xvda; nproc").text == "a1\n1\n"
        pvirq.save_host(host, file)
        assert not host.guests
    with pvirq.restore_host(file) as host:
        assert [guest.name for guest in host.guests] == ["u1", "u2"]
        for number, guest in enumerate(host.guests, 1):
            assert guest.run("for i in a b; do dd if=/dev/xvd$i iflag=direct count=1 2>/dev/null | head -n1; done; "
                             "nproc; date +%Y").text == f"a{number}\nb{number}\n{number}\n2023\n"  # fmt: skip
        disk = host.platform.device("virtio1", BlockDriver)  # type: ignore[type-abstract]
        assert disk.medium.read(0, 1)[:3] == b"b2\n"
        first, second = host.guests
        assert first.run("echo c1 | dd of=/dev/xvdc conv=sync,fsync 2>/dev/null").status == 0
        assert image.read_bytes()[:3] == b"c1\n"
        # They are on their bridge again, and find each other.
        assert second.run("ping -c 3 -W 2 10.0.0.1 > /tmp/log || (cat /tmp/log; exit 1)", 120).status == 0


@pytest.fixture(scope="module")
def saved(kernel_cloud: KernelChoice, busybox: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file with a guest that has some megabytes in it, and their checksum."""
    path = tmp_path_factory.mktemp("saved") / "host"
    with Host() as host:
        guest = host.boot(
            kernel_cloud.path, initrd=default_initrd(busybox), append="console=hvc0 quiet pvirq=agent", memory=96 << 20
        )
        text = guest.run("dd if=/dev/urandom of=/data bs=1M count=12 2>/dev/null; md5sum /data").text
        pvirq.save_host(host, path)
    return path, text


@pytest.mark.boot
@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_is_replaced_under_its_host(saved: tuple[Path, str], tmp_path: Path, mapped: bool) -> None:
    """Its guest's memory may be in the file that it is saved to again."""
    path = tmp_path / "host"
    path.symlink_to(tmp_path / "file")
    shutil.copy(saved[0], path)
    with pvirq.restore_host(path, mapped=mapped) as host:
        (guest,) = host.guests
        assert (host.hypervisor.machine.mapped_frames() > 8192) == mapped
        guest.run("echo more > /more")
        pvirq.save_host(host, path, checkpoint=True)
        with open(tmp_path / "other", "wb") as file:
            pvirq.save_host(host, file, checkpoint=True)
        assert guest.run("md5sum /data; cat /more").text == saved[1] + "more\n"
        host.destroy(guest)
        assert host.hypervisor.machine.mapped_frames() == 0
    assert path.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "host", "other"]
    for name in ("file", "other"):
        with pvirq.restore_host(tmp_path / name) as host:
            assert host.hypervisor.machine.mapped_frames() > 8192
            os.unlink(tmp_path / name)
            assert host.guests[0].run("md5sum /data; cat /more").text == saved[1] + "more\n"


@pytest.mark.boot
def test_the_same_mapped_or_copied(saved: tuple[Path, str]) -> None:
    digests = set()
    for file in (saved[0], saved[0].open("rb"), io.BytesIO(saved[0].read_bytes())):
        for mapped in (True, False):
            with pvirq.restore_host(file, seed=3, mapped=mapped) as host:
                (guest,) = host.guests
                assert guest.run("md5sum /data").text == saved[1]
                digests.add(host.hypervisor.machine.digest(guest.domain.domid))
        if not isinstance(file, Path):
            file.close()
    assert len(digests) == 1


@pytest.mark.boot
def test_a_guest_in_it_is_a_file_of_its_own(saved: tuple[Path, str], tmp_path: Path) -> None:
    """As `xl save` writes it, with its pages at boundaries of pages, so that it can be mapped."""
    with zipfile.ZipFile(saved[0]) as archive:
        archive.extract("guests/0", tmp_path)
        assert archive.testzip() is None
    with Host() as host:
        guest = host.restore(tmp_path / "guests/0")
        assert host.hypervisor.machine.mapped_frames() == 0
        assert guest.run("md5sum /data").text == saved[1]


@pytest.mark.boot
def test_files_cut_short(saved: tuple[Path, str], tmp_path: Path) -> None:
    """At the end, or in the middle, where only the guest's own format tells."""
    data = saved[0].read_bytes()
    path = tmp_path / "host"
    for cut in (data[: len(data) // 2], data[:-30], data[:5000] + data[1 << 20 :]):
        path.write_bytes(cut)
        with pytest.raises((HostFileError, SaveFileError)) as caught:
            pvirq.restore_host(path)
        assert "\n" not in str(caught.value)
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(saved[0]) as whole:
        archive.writestr("host.json", whole.read("host.json"))
        archive.writestr("devices/0", b"")
        archive.writestr("guests/0", whole.read("guests/0")[:-5000])
    with pytest.raises(SaveFileError):
        pvirq.restore_host(path)


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and nothing else does."""
    path = tmp_path / "host"
    path.write_text("before")
    with Host() as host:
        with monkeypatch.context() as patched:
            patched.setattr(zipfile.ZipFile, "writestr", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
            with pytest.raises(OSError, match="No space"):
                pvirq.save_host(host, path)
        assert path.read_text() == "before"
        assert os.listdir(tmp_path) == ["host"]
        with pytest.raises(FileNotFoundError) as caught:
            pvirq.save_host(host, tmp_path / "no" / "file")
        assert caught.value.filename == str(tmp_path / "no" / "file")


def test_into_a_pipe(tmp_path: Path) -> None:
    """It stays one: only a file is replaced."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as other:
        received = other.submit((tmp_path / "pipe").read_bytes)
        pvirq.save_host(Host(wallclock=5e8), tmp_path / "pipe")
        file = io.BytesIO(received.result())
    assert (tmp_path / "pipe").is_fifo()
    with pvirq.restore_host(file) as host:
        assert host.wallclock() == pytest.approx(5e8, abs=10)


def test_without_guests() -> None:
    """Domain 0's machine is what it was, to its disks' sectors."""
    file = io.BytesIO()
    host = Host(hardware="recorded", dom0_vcpus=3, wallclock=5e8)
    host.platform.device("virtio0", BlockDriver).medium.write(7, b"seven")  # type: ignore[type-abstract]
    host.backends.devices.add("/dev/ram5", MemoryStore(100, b"five"))
    host.add_bridge("br9")
    pvirq.save_host(host, file)
    with pvirq.restore_host(file, prepare=lambda host: host.add_bridge("more") and None) as host:
        assert host.platform.device("virtio0", BlockDriver).medium.read(7, 1)[:5] == b"seven"  # type: ignore[type-abstract]
        devices = host.backends.devices
        store = devices.find(devices.number("/dev/ram5") or "")
        assert isinstance(store, MemoryStore)
        assert (store.sectors, store.read(0, 1)[:4]) == (100, b"five")
        assert {"br9", "more"} <= set(host.backends.network.bridges)
        assert len(host.dom0.domain.vcpus) == 3
        assert host.wallclock() == pytest.approx(5e8, abs=10)


def test_what_cannot_be_saved() -> None:
    with Host() as host:
        guest = host.model(name="m")
        with pytest.raises(HostFileError, match="m is a modelled guest"):
            pvirq.save_host(host, io.BytesIO())
        host.destroy(guest)
        pvirq.save_host(host, io.BytesIO(), checkpoint=True)
        host.run(lambda: host.quiet)
    with Host(dom0=False) as host, pytest.raises(HostFileError, match="only a host whose domain 0"):
        pvirq.save_host(host, io.BytesIO())


def changed(**changes: object) -> io.BytesIO:
    """A file with another host.json."""
    file = io.BytesIO()
    pvirq.save_host(Host(), file)
    about = json.loads(zipfile.ZipFile(file).read("host.json")) | changes
    again = io.BytesIO()
    with zipfile.ZipFile(again, "w") as archive:
        archive.writestr("host.json", json.dumps(about))
    return again


@pytest.mark.parametrize(
    "file",
    [
        io.BytesIO(b"no zip"), changed(format="pvirq host 9"), changed(guests=1), changed(dom0_kernel="minix"),
        changed(hardware="toaster"), changed(bridges=5), changed(devices=[{"name": "/dev/ram0"}]),
        changed(devices=[{"name": "/dev/ram0", "sectors": 8, "hardware": False, "written": [0]}]),
        changed(devices=[{"name": "/dev/none", "sectors": 8, "hardware": True, "written": []}]),
    ],
)  # fmt: skip
def test_damaged_files(file: io.BytesIO) -> None:
    with pytest.raises(HostFileError) as caught:
        pvirq.restore_host(file)
    assert "\n" not in str(caught.value)
