"""A real Linux's own blkfront and netfront on the modelled domain 0's back ends."""

from __future__ import annotations

import hashlib
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from driverlib import row
from pvirq import Guest, Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.drivers.bridge import Interface
from pvirq.drivers.skb import Skb, checksum, finish
from pvirq.toolstack.devices import DeviceRef, Disk, Nic
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from pvirq.toolstack.modules import read_modules

pytestmark = pytest.mark.boot

MIB = 1 << 20
OUR_MAC = bytes.fromhex("00163effffff")


class Station(Interface):
    """Somebody on the bridge who answers ARP and ping, and checks what he gets."""

    def __init__(self) -> None:
        super().__init__("station", self.got)
        self.pings: list[bytes] = []

    def got(self, skb: Skb) -> None:
        (data,) = finish(skb)
        if data[12:14] == b"\x08\x06" and data[20:22] == b"\0\1":  # who has
            reply = data[6:12] + OUR_MAC + data[12:20] + b"\0\2" + OUR_MAC + data[38:42] + data[22:32]
            self.receive(Skb(reply))
        elif data[12:14] == b"\x08\x00" and data[23] == 1 and data[34] == 8:  # an echo request
            (length,) = struct.unpack_from(">H", data, 16)
            message = bytearray(data[34 : 14 + length])
            assert checksum(bytes(message)) == 0xFFFF
            self.pings.append(bytes(message))
            message[0] = 0
            struct.pack_into(">H", message, 2, 0)
            struct.pack_into(">H", message, 2, ~checksum(bytes(message)) & 0xFFFF)
            header = data[14:26] + data[30:34] + data[26:30]
            self.receive(Skb(data[6:12] + OUR_MAC + data[12:14] + header + bytes(message)))


@dataclass
class Linux:
    host: Host
    guest: Guest
    store: MemoryStore
    station: Station

    def sh(self, command: str) -> str:
        result = self.guest.run(command, 120)
        assert result.status == 0, result.text
        return result.text

    def rows(self, name: str) -> list[int]:
        """Counts of the guest's rows of that name, over its CPUs."""
        found = re.findall(rf"^ *\d+:((?: +\d+)+) .* {name}$", self.guest.proc_interrupts(), re.MULTILINE)
        return [sum(map(int, counts.split())) for counts in found]


@pytest.fixture(scope="module")
def linux(kernel_cloud: KernelChoice, busybox: Path) -> Iterator[Linux]:
    assert kernel_cloud.modules_dir is not None
    modules = read_modules(kernel_cloud.modules_dir, ["xen-blkfront", "xen-netfront"])
    initrd = default_initrd(busybox, modules=modules)
    with Host(wallclock=1_700_000_000) as host:
        store = MemoryStore(64 * MIB // 512, random.Random(1).randbytes(2 * MIB))
        backends = host.backends
        backends.devices.add("/dev/loop0", store)
        bridge = backends.network.bridges.get("xenbr0") or backends.network.add_bridge("xenbr0")
        station = Station()
        backends.network.add(station, bridge.name)
        guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent")
        backends.manager.attach_disk(guest.domain.domid, Disk("xvda", "/dev/loop0"))
        backends.manager.attach_nic(guest.domain.domid, Nic(0, "00:16:3e:00:00:01"))
        guest.await_agent()
        yield Linux(host, guest, store, station)


def test_the_disk_as_linux_sees_it(linux: Linux) -> None:
    assert re.search(r"202 +0 +65536 xvda", linux.sh("cat /proc/partitions"))
    features = "flush diskcache: enabled; persistent grants: enabled; indirect descriptors: enabled"
    assert features in linux.sh("dmesg | grep blkfront")


def test_reads(linux: Linux) -> None:
    before = sum(linux.rows("blkif")), row(linux.host.dom0, "blkif-backend")
    assert linux.sh("md5sum /dev/xvda").split()[0] == hashlib.md5(linux.store.data).hexdigest()
    front, back = sum(linux.rows("blkif")) - before[0], row(linux.host.dom0, "blkif-backend") - before[1]
    assert (front, back) >= (64, 64)


def test_a_round_trip_is_one_interrupt_on_each_side(linux: Linux) -> None:
    before = sum(linux.rows("blkif")), row(linux.host.dom0, "blkif-backend")
    linux.sh("dd if=/dev/xvda of=/dev/null bs=4k iflag=direct count=500 2>/dev/null")
    assert sum(linux.rows("blkif")) - before[0] == 500
    assert row(linux.host.dom0, "blkif-backend") - before[1] == 500


def test_writes(linux: Linux) -> None:
    flushes = linux.store.flushes
    text = linux.sh("dd if=/dev/urandom of=/tmp/x bs=1M count=4 2>/dev/null; md5sum < /tmp/x")
    linux.sh("dd if=/tmp/x of=/dev/xvda bs=1M seek=8 conv=fsync")
    assert hashlib.md5(linux.store.data[8 * MIB : 12 * MIB]).hexdigest() == text.split()[0]
    assert linux.store.flushes > flushes


def test_pings(linux: Linux) -> None:
    linux.sh("ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0 2>/dev/null; true")
    count = len(linux.station.pings)
    for size in (56, 1000, 1472):
        text = linux.sh(f"ping -c 5 -i 0.2 -s {size} 10.0.0.1")
        assert "5 packets transmitted, 5 packets received, 0% packet loss" in text
    assert len(linux.station.pings) == count + 15
    assert "errors:0" in linux.sh("ifconfig eth0")


def test_rows_as_recorded(linux: Linux) -> None:
    cpus = len(linux.guest.domain.vcpus)
    names = re.findall(r"(\S+)$", linux.guest.proc_interrupts().split("NMI:")[0], re.MULTILINE)
    wanted = ["hvc_console", *["blkif"] * cpus]
    for queue in range(cpus):
        wanted += [f"vif0-q{queue}-tx", f"vif0-q{queue}-rx"]
    assert names[-len(wanted) :] == wanted


def test_a_disk_comes_and_goes(linux: Linux) -> None:
    manager, domid = linux.host.backends.manager, linux.guest.domain.domid
    if "/dev/loop1" not in linux.host.backends.devices.names():
        linux.host.backends.devices.add("/dev/loop1", MemoryStore(2048, b"second disk"))
    for _ in range(2):
        manager.attach_disk(domid, Disk("xvdb", "/dev/loop1"))
        text = linux.sh("while ! [ -b /dev/xvdb ]; do sleep 0.1; done; head -c 11 /dev/xvdb")
        assert text == "second disk"
        gone = manager.detach(DeviceRef(domid, "vbd", 51728))
        linux.sh("while grep -q xvdb /proc/partitions; do sleep 0.1; done; sleep 1")
        assert gone.done
    assert linux.sh("head -c 100 /dev/xvda | md5sum").split()[0] == hashlib.md5(linux.store.data[:100]).hexdigest()
