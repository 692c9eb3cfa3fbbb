"""A real Linux guest on the modelled domain 0's disks and network: its own front ends, our back ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.hardware.disk import BlockDriver
from pvirq.hardware.nic import NicDriver
from pvirq.linux.kthread import Body
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

ARP = 0x0806


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host(hardware="writeup") as host:
        yield host


@pytest.fixture(scope="module")
def guest(host: Host, kernel_cloud: KernelChoice, busybox: Path) -> Guest:
    assert kernel_cloud.modules_dir is not None
    drivers = modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront", "xen-netfront"])
    initrd = default_initrd(busybox, modules=drivers)
    guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2)
    host.attach_disk(guest, "xvda", "/dev/ata1")
    host.attach_disk(guest, "xvdb", "/dev/ata2", readonly=True)
    host.attach_nic(guest)
    guest.await_agent()
    return guest


def sh(guest: Guest, command: str) -> str:
    result = guest.run(command, 120)
    assert result.status == 0, result.text
    return result.text


def row(table: str, name: str) -> int:
    counts = re.findall(rf"^ *\d+:((?: +\d+)+) .* {re.escape(name)}$", table, re.MULTILINE)
    assert counts
    return sum(int(count) for row in counts for count in row.split())


def test_the_disk_keeps_what_is_written(host: Host, guest: Guest) -> None:
    disk = host.platform.device("ata1", BlockDriver)  # type: ignore[type-abstract]
    sh(guest, "until [ -b /dev/xvda ]; do sleep 0.1; done")
    assert int(sh(guest, "cat /sys/block/xvda/size")) == disk.sectors
    before = row(host.dom0.proc_interrupts(), "ata_piix")
    sums = sh(
        guest,
        "dd if=/dev/urandom of=/tmp/x bs=64k count=8 2>/dev/null;"
        "dd if=/tmp/x of=/dev/xvda bs=64k oflag=direct 2>/dev/null;"
        "dd if=/dev/xvda of=/tmp/y bs=64k count=8 iflag=direct 2>/dev/null; md5sum /tmp/x /tmp/y",
    )
    assert len({line.split()[0] for line in sums.splitlines()}) == 1
    # And it lies on domain 0's disk, by way of its interrupts.
    text = sh(guest, "od -An -tx1 -N 64 /tmp/x")
    assert bytes.fromhex("".join(text.split())) == disk.medium.read(0, 1)[:64]
    assert row(host.dom0.proc_interrupts(), "ata_piix") > before
    assert row(host.dom0.proc_interrupts(), "blkif-backend") > 4
    assert row(guest.proc_interrupts(), "blkif") > 4


def test_a_read_only_disk_is_one(guest: Guest) -> None:
    sh(guest, "until [ -b /dev/xvdb ]; do sleep 0.1; done")
    assert sh(guest, "cat /sys/block/xvdb/ro").strip() == "1"
    assert guest.run("dd if=/dev/zero of=/dev/xvdb count=1").status != 0
    sh(guest, "dd if=/dev/xvdb of=/dev/null count=8")


def test_frames_reach_the_wire(host: Host, guest: Guest) -> None:
    nic = host.platform.device("peth0", NicDriver)
    sh(guest, "until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; ip link set eth0 up")
    sh(guest, "ip addr add 10.0.0.2/24 dev eth0; ping -c 2 -W 1 10.0.0.1; true")
    mac = bytes.fromhex(sh(guest, "cat /sys/class/net/eth0/address").strip().replace(":", ""))
    asked = [frame for frame in nic.wire.frames if frame[12:14] == ARP.to_bytes(2, "big")]
    assert asked
    assert all(frame[6:12] == mac and frame[38:42] == bytes((10, 0, 0, 1)) for frame in asked)
    # Somebody out there answers; the guest learns the address.
    station = bytes.fromhex("02000000000a")
    reply = mac + station + bytes.fromhex("0806000108000604" + "0002") + station + bytes((10, 0, 0, 1)) + mac
    reply += bytes((10, 0, 0, 2))
    sh(guest, "(ping -c 3 -W 1 10.0.0.1 >/dev/null 2>&1 &)")
    nic.wire.send(reply.ljust(60, b"\0"))
    assert "02:00:00:00:00:0a" in sh(guest, "sleep 1; cat /proc/net/arp")


def test_modelled_guests_beside_it(host: Host, guest: Guest) -> None:
    """They share domain 0, its disks and its bridge with the real one, at the same time."""
    model = host.model("2.6.18", name="model")
    host.attach_disk(model, "xvda", "/dev/ata2", readonly=True)
    host.attach_nic(model, mac="00:16:3e:00:00:77")
    seen: list[bytes] = []

    def work() -> Body[bytes]:
        disk = yield from model.wait_disk("xvda")
        nic = yield from model.wait_nic()
        nic.on_receive = lambda skb: seen.append(skb.data)
        return (yield from disk.read(8, 8))

    reading = model.kernel.spawn("reader", work())
    sh(guest, "ip link set eth0 up; for i in 1 2 3 4 5 6 7 8; do dd if=/dev/xvdb of=/dev/null bs=4k count=8 "
       "iflag=direct 2>/dev/null; ping -c 1 -W 1 10.0.0.77 > /dev/null 2>&1; done; true")  # fmt: skip
    assert host.run(lambda: reading.done, 10**10)
    assert len(reading.result()) == 8 * 512
    # The real one's questions for an address reach it over the bridge.
    mac = bytes.fromhex(sh(guest, "cat /sys/class/net/eth0/address").strip().replace(":", ""))
    assert any(data[6:12] == mac and data[12:14] == ARP.to_bytes(2, "big") for data in seen)
    assert "blkif" in model.proc_interrupts()
    host.destroy(model)
    assert guest.run("dd if=/dev/xvdb of=/dev/null bs=4k count=8 iflag=direct").status == 0


def test_domain_0_is_as_before_when_the_guest_has_ended(host: Host, guest: Guest) -> None:
    assert guest.poweroff() == "poweroff"
    host.destroy(guest)
    host.run(lambda: host.quiet)
    table = host.dom0.proc_interrupts()
    assert "blkif-backend" not in table
    assert "vif1.0" not in table
    assert host.store.ls("/local/domain") == ["0"]
