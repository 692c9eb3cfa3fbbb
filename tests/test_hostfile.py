"""A whole host is saved and restored: guests, devices, sectors of disks that are in memory alone."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest

import pvirq
from pvirq import Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.hardware.disk import BlockDriver
from pvirq.hostfile import HostFileError
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

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
