"""What xl writes for devices against the recorded tree; devices that come and go while their domain runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from driverlib import Guest, Host, disk_of, nic_of, row
from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blockstore import MemoryStore
from pvirq.drivers.netfront import NetFront
from pvirq.drivers.skb import Skb
from pvirq.linux.personalities import find
from pvirq.toolstack.devices import DeviceRef, Disk, Nic, vdev_number
from pvirq.xen import evtchn_views

RECORDED = Path(__file__).parent / "data" / "linux-2vcpu" / "2-drivers.xenstore"
# Nodes whose values depend on the machine, or on the order in which its drivers took references.
VARIES = re.compile(r"(ring-ref|mac|/sectors|frontend-id|backend-id) = ")


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    host.devices.add("/dev/loop0", MemoryStore(131072))
    host.devices.add("/dev/loop1", MemoryStore(64))
    host.start_backends()
    yield host
    host.close()


DISK = Disk("xvda", "/dev/loop0")
NIC = Nic(0, "00:16:3e:00:00:01")


def with_devices(host: Host, vcpus: int = 2) -> Guest:
    guest = host.guest(vcpus)
    domid = guest.domain.domid
    host.manager.attach_disk(domid, DISK)
    host.manager.attach_nic(domid, NIC)
    host.run()
    host.start_frontends(guest)
    return guest


def under(lines: list[str], *prefixes: str) -> list[str]:
    found = [line for line in lines if line.startswith(prefixes)]
    return [VARIES.sub(r"\1 ~ ", line) for line in found]


def test_the_tree_is_the_recorded_one(host: Host) -> None:
    with_devices(host)
    recorded = RECORDED.read_text().splitlines()
    ours = list(host.store.dump("/"))
    strip = re.compile(r' ~ ".*"')
    for prefix in (
        "/local/domain/0/backend/vbd", "/local/domain/0/backend/vif", "/local/domain/1/device/vbd",
        "/local/domain/1/device/vif", "/libxl/1/device/vbd", "/libxl/1/device/vif",
    ):  # fmt: skip
        expected = [strip.sub("", line) for line in under(recorded, prefix)]
        assert [strip.sub("", line) for line in under(ours, prefix)] == expected


def test_permissions(host: Host) -> None:
    """The frontend's nodes are the guest's but for the MTU, the backend's are for it to read."""
    with_devices(host)
    for path, perms in (
        ("/local/domain/1/device/vbd/51712", ["n1", "r0"]),
        ("/local/domain/1/device/vbd/51712/virtual-device", ["n1", "r0"]),
        ("/local/domain/1/device/vif/0/mac", ["n1", "r0"]),
        ("/local/domain/1/device/vif/0/mtu", ["n0", "r1"]),
        ("/local/domain/1/device/vif/0/queue-0/tx-ring-ref", ["n1", "r0"]),
        ("/local/domain/0/backend/vif/1/0", ["n0", "r1"]),
        ("/local/domain/0/backend/vbd/1/51712/physical-device", ["n0", "r1"]),
        ("/libxl/1/device/vif/0/mac", ["n0"]),
    ):
        assert [str(perm) for perm in host.store.get_perms(path)] == perms, path


def test_rows_and_ports_as_recorded(host: Host) -> None:
    guest = with_devices(host)
    names = [desc.actions[0].name for desc in guest.kernel.irq.descs.values() if desc.actions]
    assert names[12:] == [
        "xenbus", "hvc_console", "blkif", "blkif", "vif0-q0-tx", "vif0-q0-rx", "vif0-q1-tx", "vif0-q1-rx",
    ]  # fmt: skip
    names = [desc.actions[0].name for desc in host.dom0.irq.descs.values() if desc.actions]
    assert names[-6:] == [
        "blkif-backend", "blkif-backend", "vif1.0-q0-tx", "vif1.0-q0-rx", "vif1.0-q1-tx", "vif1.0-q1-rx",
    ]  # fmt: skip


def test_ports_of_the_guest_as_recorded(host: Host) -> None:
    """The guest's ports, their kinds and CPUs; which ports domain 0 has at the other end depends on its hardware."""
    guest = with_devices(host)
    recorded = (RECORDED.parent / "2-drivers.lsevtchn-domU").read_text()
    assert re.sub(r"Port \d+", "", evtchn_views.lsevtchn(guest.domain)) == re.sub(r"Port \d+", "", recorded)


@pytest.mark.parametrize(
    ("vdev", "number"),
    [
        ("xvda", 51712), ("xvdb", 51728), ("xvda1", 51713), ("xvdp15", 51967), ("xvdq", 268439552),
        ("hda", 768), ("hdb", 832), ("hdc", 5632), ("sda", 2048), ("sdb3", 2067), ("xvda16", 268435472),
    ],
)  # fmt: skip
def test_vdev_numbers(vdev: str, number: int) -> None:
    assert vdev_number(vdev) == number


@pytest.mark.parametrize("vdev", ["", "xvd", "vda", "xvdA", "xvda1b", "hd1", "xvdaaaaaa"])
def test_no_vdev(vdev: str) -> None:
    with pytest.raises(ValueError, match=r"is no virtual device|beyond"):
        vdev_number(vdev)


def test_attach_while_running(host: Host) -> None:
    guest = host.guest()
    host.start_frontends(guest)
    attached = host.manager.attach_disk(1, DISK)
    host.run()
    assert attached.result() == DeviceRef(1, "vbd", 51712)
    data = host.do(guest.kernel, disk_of(guest).read(0, 8))
    assert data == bytes(4096)
    host.manager.attach_nic(1, NIC)
    host.run()
    assert nic_of(guest).ready.done
    assert [port.name for port in host.network.bridges["xenbr0"].ports] == ["vif1.0"]


def test_detach_while_running_leaves_nothing(host: Host) -> None:
    host.guest().destroy()
    before = list(host.store.dump("/"))
    guest = host.guest()
    host.start_frontends(guest)
    bare = list(host.store.dump("/"))
    rows = guest.kernel.proc_interrupts().count("\n"), host.dom0.proc_interrupts().count("\n")
    domid = guest.domain.domid
    for _ in range(3):
        for attached in (host.manager.attach_disk(domid, DISK), host.manager.attach_nic(domid, NIC)):
            host.run()
            ref = attached.result()
            gone = host.manager.detach(ref)
            host.run()
            assert gone.done
    strip = re.compile(r"/local/domain/0/(backend|error)")
    assert [line for line in host.store.dump("/") if not strip.match(line)] == [
        line for line in bare if not strip.match(line)
    ]
    assert rows == (guest.kernel.proc_interrupts().count("\n"), host.dom0.proc_interrupts().count("\n"))
    assert not guest.xenbus.frontends.devices
    assert not [ref for ref in guest.xenbus.gnttab.table.active if ref >= 8]
    assert not host.xenbus.gnttab.table.maptrack
    assert not host.network.interfaces
    guest.destroy()
    host.run()
    assert [line for line in host.store.dump("/") if not strip.match(line)] == [
        line for line in before if not strip.match(line)
    ]


def test_a_guest_without_drivers_is_forced(host: Host) -> None:
    host.guest()
    host.manager.attach_disk(1, DISK)
    host.run()
    ref = DeviceRef(1, "vbd", 51712)
    gone = host.manager.detach(ref)
    host.run()
    assert not gone.done
    host.manager.detach(ref, force=True)
    host.run()
    assert not host.store.exists(ref.libxl)
    assert not host.store.exists(ref.backend)
    assert "backend/vbd/1/51712" not in host.xenbus.backends.devices
    assert gone.done


def test_what_does_not_work(host: Host) -> None:
    host.guest()
    host.manager.attach_disk(1, DISK)
    with pytest.raises(XenError) as error:
        host.manager.attach_disk(1, Disk("xvda", "/dev/loop1"))
    assert error.value.errno is Errno.EEXIST
    with pytest.raises(XenError) as error:
        host.manager.detach(DeviceRef(1, "vif", 3))
    assert error.value.errno is Errno.ENOENT
    no_disk = host.manager.attach_disk(1, Disk("xvdb", "/dev/none"))
    no_bridge = host.manager.attach_nic(1, Nic(0, "00:16:3e:00:00:01", "nobr"))
    host.run()
    for done, errno, path in (
        (no_disk, Errno.ENOENT, "vbd/1/51728"),
        (no_bridge, Errno.ENODEV, "vif/1/0"),
    ):
        with pytest.raises(XenError) as error:
            done.result()
        assert error.value.errno is errno
        assert host.store.read_text(f"/local/domain/0/backend/{path}/hotplug-status") == "error"


def test_the_script_is_late(host: Host) -> None:
    """A network backend isn't connected before its interface is on the bridge."""
    guest = host.guest()
    bridge = host.network.bridges.pop("xenbr0")
    host.manager.attach_nic(1, NIC)
    host.run()
    host.finish(guest.xenbus.start_frontends({"vif": NetFront}))
    host.run()
    assert not nic_of(guest).ready.done
    assert host.store.read_text("/local/domain/0/backend/vif/1/0/state") == "2"
    host.network.bridges["xenbr0"] = bridge
    host.network.attach("vif1.0", "xenbr0")
    host.store.write("/local/domain/0/backend/vif/1/0/hotplug-status", "connected")
    host.run()
    assert nic_of(guest).ready.done
    assert host.store.read_text("/local/domain/0/backend/vif/1/0/state") == "4"


def test_frontends_restart(host: Host) -> None:
    guest = with_devices(host)
    bus = guest.xenbus.frontends
    for kind, factory in (("vbd", type(disk_of(guest))), ("vif", NetFront)):
        host.do(guest.kernel, bus.unregister_driver(kind))
        host.run()
        assert not bus.devices[f"device/{kind}/{51712 if kind == 'vbd' else 0}"].driver
        host.do(guest.kernel, bus.register_driver(kind, factory))
        host.run()
    assert host.do(guest.kernel, disk_of(guest).read(0, 8)) == bytes(4096)
    assert nic_of(guest).ready.done


def test_every_kernel_with_every_other() -> None:
    """Fronts and backs of all kernels: data arrives, and a round trip is one interrupt on each side."""
    for back, front in itertools.product(("pvops", "2.6.18", "suse"), repeat=2):
        host = Host(dom0=find(back))
        store = MemoryStore(4096)
        host.devices.add("/dev/loop0", store)
        host.start_backends()
        guests = [host.guest(2, find(front)), host.guest(1, find(front))]
        for i, guest in enumerate(guests, 1):
            host.manager.attach_disk(i, DISK)
            host.manager.attach_nic(i, Nic(0, f"00:16:3e:00:00:0{i}"))
            host.run()
            host.start_frontends(guest)
        first, second = guests
        disk = disk_of(first)
        got: list[Skb] = []
        host.do(first.kernel, disk.write(3, b"z" * 512 * 50))
        assert store.data[3 * 512 : 53 * 512] == b"z" * 512 * 50
        counts = row(first.kernel, "blkif"), row(host.dom0, "blkif-backend")
        for i in range(20):
            assert host.do(first.kernel, disk.read(3 + i, 8)) == b"z" * 4096
        assert (row(first.kernel, "blkif"), row(host.dom0, "blkif-backend")) == (counts[0] + 20, counts[1] + 20)
        nic_of(second).on_receive = got.append
        frame = bytes.fromhex("00163e00000200163e000001") + b"\x88\xb5" + bytes(range(100))
        nic_of(first).transmit(frame)
        first.xencons.write(b"hello\n")
        host.run()
        assert ([skb.data for skb in got], first.console.text()) == ([frame], "hello\n")
        host.close()


def test_rows_of_the_older_kernels() -> None:
    """XenLinux names its rows blkif and eth0 in a guest, blkif-backend and vif1.0 in domain 0."""
    host = Host(dom0=find("suse"))
    host.devices.add("/dev/loop0", MemoryStore(64))
    host.start_backends()
    guest = host.guest(1, find("2.6.18"))
    host.manager.attach_disk(1, DISK)
    host.manager.attach_nic(1, NIC)
    host.run()
    host.start_frontends(guest)
    for kernel, rows in ((guest.kernel, ["blkif", "eth0"]), (host.dom0, ["blkif-backend", "vif1.0"])):
        names = re.findall(r"^ *\d+: .*?(\S+)$", kernel.proc_interrupts(), re.MULTILINE)
        assert names[-2:] == rows
    host.close()


def test_many_guests_come_and_go(host: Host) -> None:
    rows = host.dom0.proc_interrupts().count("\n")
    for _ in range(3):
        guests = [with_devices(host, 1) for _ in range(4)]
        for guest in guests:
            assert host.do(guest.kernel, disk_of(guest).read(0, 8)) == bytes(4096)
        for guest in guests:
            guest.destroy()
            host.run()
    assert host.dom0.proc_interrupts().count("\n") == rows
    assert not host.hypervisor.zombies
    assert host.xenstored.store.check() == []
