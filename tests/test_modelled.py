"""Modelled guests in a host: devices, pausing, destruction; the page that documents them runs as it stands."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pvirq
from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blkfront import BlkFront
from pvirq.linux import personalities
from pvirq.linux.irq import IrqError
from pvirq.linux.irq_map import find_irq, irq_map
from pvirq.linux.kthread import Body, sleep
from pvirq.modelled import ModelledGuest
from pvirq.scenario.load import loads
from pvirq.scenario.run import Run

PAGE = Path(__file__).parent.parent / "docs/model.md"
KERNELS = list(personalities.KERNELS)


def test_the_page_runs() -> None:
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.REPORT_NDIFF)
    assert tried > 10
    assert not failed


def test_the_pages_scenario_runs() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with Run(loads(text, "page.toml")) as run:
        run.start()
        assert run.run()
        assert run.times_done == 1050


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with pvirq.Host(hardware="recorded", machine_memory=1 << 30) as host:
        yield host


def with_disk(host: pvirq.Host, kernel: str = "2.6.18") -> ModelledGuest:
    guest = host.model(kernel)
    host.attach_disk(guest, "xvda", "/dev/virtio0")
    assert host.run(lambda: guest.has_disk("xvda"), 10**10)
    return guest


def run_to_end(host: pvirq.Host, guest: ModelledGuest, body: Body[object]) -> object:
    thread = guest.kernel.spawn("test", body)
    assert host.run(lambda: thread.done, 10**11)
    return thread.result()


@pytest.mark.parametrize("kernel", KERNELS)
def test_ports_and_irqs_are_each_others_inverse(host: pvirq.Host, kernel: str) -> None:
    guest = host.model(kernel, vcpus=2)
    host.run(lambda: host.quiet)
    ports = [channel.port for channel in guest.domain.evtchn]
    owned = [port for irq in guest.kernel.irq.descs for port in guest.kernel.events.ports_of_irq(irq)]
    assert sorted(owned) == ports
    listed = re.findall(r"^ *(\d+) +\d+ +(\d+)  ", irq_map(guest.kernel), re.MULTILINE)
    assert [int(port) for port, _ in listed] == ports
    for port, irq in listed:
        assert int(port) in guest.kernel.events.ports_of_irq(int(irq))


def test_irqs_by_name(host: pvirq.Host) -> None:
    guest = with_disk(host)
    assert find_irq(guest.kernel, "blkif") == find_irq(guest.kernel, 261) == 261
    with pytest.raises(IrqError) as error:
        find_irq(guest.kernel, "eth0")
    assert error.value.errno is Errno.EINVAL


def test_a_device_that_is_not_there(host: pvirq.Host) -> None:
    guest = host.model()
    for missing in (lambda: guest.disk("xvda"), lambda: guest.nic(3)):
        with pytest.raises(XenError) as error:
            missing()
        assert error.value.errno is Errno.ENXIO
    assert not guest.has_disk("xvda")
    assert not guest.has_nic(0)
    with pytest.raises(ValueError, match="no virtual device"):
        host.attach_disk(guest, "disk0", "/dev/virtio0")
    host.attach_disk(guest, "xvda", "/dev/virtio0")
    with pytest.raises(XenError) as error:
        host.attach_disk(guest, "xvda", "/dev/virtio1")
    assert error.value.errno is Errno.EEXIST


def test_a_device_of_domain_0_that_is_not_there(host: pvirq.Host) -> None:
    guest = host.model()
    with pytest.raises(XenError, match="/dev/none") as caught:
        host.attach_disk(guest, "xvda", "/dev/none")
    assert caught.value.errno == Errno.ENOENT
    with pytest.raises(XenError, match=r"xenbr7: Host\.add_bridge") as caught:
        host.attach_nic(guest, bridge="xenbr7")
    assert caught.value.errno == Errno.ENODEV
    assert (guest.config.disks, guest.config.vifs) == ([], [])
    assert not host.store.exists(f"/libxl/{guest.domain.domid}/device/vbd")


def test_attach_and_detach_while_running(host: pvirq.Host) -> None:
    guest = with_disk(host)
    ref = host.attach_disk(guest, "xvdb", "/dev/virtio1", readonly=True)
    assert host.run(lambda: guest.has_disk("xvdb"), 10**10)
    disk = guest.disk("xvdb")

    def write(disk: BlkFront) -> Body[object]:
        try:
            yield from disk.write(0, bytes(512))
        except XenError as error:
            return error.errno
        return None

    assert run_to_end(host, guest, write(disk)) is Errno.EROFS
    before = host.dom0.proc_interrupts().count("blkif-backend")
    done = host.backends.manager.detach(ref)
    assert host.run(lambda: done.done, 10**10)
    host.run(lambda: host.quiet)
    assert not guest.has_disk("xvdb")
    assert host.dom0.proc_interrupts().count("blkif-backend") == before - 1
    assert guest.has_disk("xvda")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_guests_end_leaves_domain_0_as_it_was(host: pvirq.Host, kernel: str) -> None:
    host.destroy(with_disk(host, kernel))  # the first one starts the backends
    host.run(lambda: host.quiet)

    def state() -> tuple[object, ...]:
        rows = [line.split(None, 3)[0::3] for line in host.dom0.proc_interrupts().splitlines() if "xen-" in line]
        ports = [(channel.port, channel.state) for channel in host.dom0.domain.evtchn]
        return rows, ports, sorted(host.store.dump()), list(host.hypervisor.domains)

    before = state()
    guest = with_disk(host, kernel)
    assert state() != before
    host.destroy(guest)
    host.run(lambda: host.quiet)
    assert state() == before


def test_pause_stops_a_guest_and_loses_nothing(host: pvirq.Host) -> None:
    guest = with_disk(host)
    ticks: list[int] = []

    def clock() -> Body[None]:
        for _ in range(10):
            yield from sleep(guest.kernel, 1_000_000)
            ticks.append(guest.kernel.now())

    guest.kernel.spawn("clock", clock())
    host.run(lambda: len(ticks) == 3)
    host.pause(guest)
    host.run(lambda: False, 50_000_000)
    assert len(ticks) == 3
    host.unpause(guest)
    host.run(lambda: len(ticks) == 10, 10**9)
    assert len(ticks) == 10
    assert ticks[3] - ticks[2] == 50_000_000


def test_modelled_guests_need_domain_0() -> None:
    with pvirq.Host(dom0=False, machine_memory=1 << 28) as host, pytest.raises(RuntimeError):
        host.model()


def test_unknown_kernels_and_cpus(host: pvirq.Host) -> None:
    with pytest.raises(KeyError):
        host.model("2.4")
    with pytest.raises(XenError) as error:
        host.model(vcpus=33)
    assert error.value.errno is Errno.EINVAL
    assert host.modelled == []


def test_round_trips_are_as_many_interrupts(host: pvirq.Host) -> None:
    """From guest to domain 0 and back: none lost, none invented."""
    guest = host.model("2.6.18")
    trips = 20_000
    got = [0, 0]
    events, zero = guest.kernel.events, host.dom0.events

    def pong(irq: int, dev_id: object) -> int:
        got[1] += 1
        zero.notify_remote_via_irq(irq)
        zero.eoi(irq)
        return 1

    def ping(irq: int, dev_id: object) -> int:
        got[0] += 1
        if got[0] < trips:
            events.notify_remote_via_irq(irq)
        return 1

    irq = events.bind_listening(0, ping, "ping", ping)
    back = zero.bind_interdomain(guest.domain.domid, events.evtchn_from_irq(irq), pong, "pong", pong)
    host.run(lambda: host.quiet)
    assert got == [trips, trips]
    assert sum(guest.kernel.irq.descs[irq].kstat) == trips
    assert sum(host.dom0.irq.descs[back].kstat) == trips
