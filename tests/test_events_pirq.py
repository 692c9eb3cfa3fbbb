"""Linux 6.1's physical IRQs: what its chip asks of Xen, on real lines and messages; and resume."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from linuxlib import RecordedDom0, counts, ignore, maps_are_inverse, renewed, run, sleep_until
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import EVTCHNSTAT_pirq
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.abi.xen import (
    DOMID_SELF,
    VIRQ_TIMER,
)
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqError, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi, StartInfo
from pvirq.linux.pvops import Pvops, dom0
from pvirq.xen import evtchn, physdev
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.memory import Machine
from pvirq.xen.msi import PciDevice


@pytest.fixture
def hypervisor() -> Iterator[Hypervisor]:
    machine = Machine(1 << 28)
    yield Hypervisor(machine)
    machine.close()


@pytest.fixture(params=["fifo", "2l"])
def kernel(request: pytest.FixtureRequest, hypervisor: Hypervisor) -> Kernel[Pvops]:
    return dom0(hypervisor, fifo=request.param == "fifo")


def errno_of(call: object) -> Errno:
    with pytest.raises((IrqError, XenError)) as error:
        call()  # type: ignore[operator]
    return error.value.errno  # type: ignore[attr-defined, no-any-return]


class Device:
    """A device on a line that it holds until its driver has served it; `wants` so many services one by one."""

    def __init__(self, kernel: Kernel[Pvops], gsi: int, name: str, *, level: bool = True, shared: bool = False) -> None:
        self.kernel = kernel
        self.ioline = kernel.domain.hypervisor.ioapic.line(gsi)
        self.wants = 0
        self.calls = 0
        self.irq = kernel.events.register_gsi(gsi, level=level, active_low=level)
        kernel.irq.request_irq(self.irq, self.handler, IRQF_SHARED if shared else 0, name, self)

    def need(self, times: int = 1) -> None:
        self.wants += times
        self.ioline.assert_(self)

    def handler(self, irq: int, dev_id: object) -> IrqReturn:
        if not self.wants:
            return IRQ_NONE
        self.calls += 1
        self.wants -= 1
        if not self.wants:
            self.ioline.deassert(self)
        return IRQ_HANDLED


# Boot.


def test_boot_registers_the_isa_lines(hypervisor: Hypervisor) -> None:
    """As the real domain 0's log has it, and with the chips and names of its sysfs; none is bound yet."""
    kernel = dom0(hypervisor)
    assert [line for line in kernel.log if "-->" in line] == [
        f"xen: --> pirq={irq} -> irq={irq} (gsi={irq})" for irq in range(1, 16)
    ]
    for irq in range(1, 16):
        desc = kernel.irq.descs[irq]
        assert desc.chip is kernel.events.pirq_chip
        assert desc.name == ("ioapic-level" if irq in (5, 9, 10, 11) else "ioapic-edge")
        assert (desc.flow == kernel.irq.handle_fasteoi_irq) == (irq in (5, 9, 10, 11))
        assert kernel.events.evtchn_from_irq(irq) == 0
        assert kernel.events.xen_pirq_from_irq(irq) == kernel.events.xen_irq_from_pirq(irq) == irq
    assert kernel.irq.descs[0].chip is None
    assert kernel.events.xen_irq_from_gsi(16) == -1


@pytest.mark.parametrize(
    ("initial", "vcpus", "nr_irqs"),
    [(True, 2, 440), (False, 2, 48), (True, 1, 256)],  # the first two from real kernels' logs
)
def test_how_many_irqs(hypervisor: Hypervisor, initial: bool, vcpus: int, nr_irqs: int) -> None:
    domain = hypervisor.create_domain(0 if initial else 1, privileged=initial, vcpus=vcpus)
    assert Kernel(domain, Pvops).irq.nr_irqs == nr_irqs


def test_a_guest_has_no_lines(hypervisor: Hypervisor) -> None:
    hypervisor.create_domain(0, privileged=True)
    kernel = Kernel(hypervisor.create_domain(1), Pvops)
    kernel.boot()
    assert [name for desc in kernel.irq.descs.values() if (name := desc.chip and desc.chip.name)] == ["xen-percpu"] * 5
    assert errno_of(lambda: kernel.events.enable_msi(PciDevice(hypervisor, 8))) == Errno.ENOSYS
    assert errno_of(lambda: kernel.events.enable_msi(PciDevice(hypervisor, 8, vectors=2), 2)) == Errno.ENOSPC


# Lines.


def test_a_level_line_interrupts_until_it_is_served(kernel: Kernel[Pvops]) -> None:
    device = Device(kernel, 9, "acpi")
    device.need(5)
    run(kernel)
    # Each EOI finds the line still asserted, so it interrupts again.
    assert (device.calls, sum(counts(kernel, 9)), device.wants) == (5, 5, 0)
    info = kernel.domain.pirqs.info(9)
    assert info is not None
    assert not info.masked
    device.need()
    run(kernel)
    assert sum(counts(kernel, 9)) == 6


def test_an_edge_interrupts_once(kernel: Kernel[Pvops]) -> None:
    device = Device(kernel, 12, "i8042", level=False)
    for _ in range(3):
        device.wants = 1
        device.ioline.pulse()
        run(kernel)
    assert (device.calls, sum(counts(kernel, 12))) == (3, 3)
    # Two edges before the CPU gets its turn are one interrupt.
    device.wants = 2
    device.ioline.pulse()
    device.ioline.pulse()
    run(kernel)
    assert (device.calls, sum(counts(kernel, 12))) == (4, 4)


def test_sharers_are_all_asked(kernel: Kernel[Pvops]) -> None:
    usb, sound = (Device(kernel, 16, name, shared=True) for name in ("usb1", "sound"))
    assert usb.irq == sound.irq == 16
    sound.need()
    run(kernel)
    assert (usb.calls, sound.calls, sum(counts(kernel, 16))) == (0, 1, 1)
    usb.need()
    sound.need()
    run(kernel)
    # The line stays up until the second device lowers it too: one interrupt serves both.
    assert (usb.calls, sound.calls, sum(counts(kernel, 16))) == (1, 2, 2)
    assert kernel.proc_interrupts().count("  xen-pirq    -ioapic-level  usb1, sound\n") == 1
    kernel.irq.free_irq(16, usb)
    assert kernel.events.evtchn_from_irq(16)
    kernel.irq.free_irq(16, sound)
    assert kernel.events.evtchn_from_irq(16) == kernel.domain.pirqs.port_of(16) == 0


def test_lines_beyond_the_isa_range_get_their_number(kernel: Kernel[Pvops]) -> None:
    device = Device(kernel, 20, "ahci")
    assert device.irq == 20
    port = kernel.events.evtchn_from_irq(20)
    status = evtchn.status(kernel.domain, DOMID_SELF, port)
    assert (status.status, status.pirq) == (EVTCHNSTAT_pirq, 20)
    assert kernel.events.register_gsi(20, level=True, active_low=True) == 20
    assert "Already setup the GSI :20" in kernel.log


def test_a_line_that_is_not_there(kernel: Kernel[Pvops]) -> None:
    before = set(kernel.irq.descs)
    for gsi in (24, 0):
        assert errno_of(lambda gsi=gsi: kernel.events.register_gsi(gsi, level=True, active_low=True)) == Errno.EINVAL
    assert set(kernel.irq.descs) == before


def test_a_line_closes_and_opens(kernel: Kernel[Pvops]) -> None:
    """free_irq closes the port; another request gets a new one, and what the device wants comes then."""
    device = Device(kernel, 9, "acpi")
    port = kernel.events.evtchn_from_irq(9)
    assert kernel.events.irq_from_evtchn(port) == 9
    channels = sum(kernel.events._channels_on_cpu)
    kernel.irq.free_irq(9, device)
    assert (kernel.events.evtchn_from_irq(9), kernel.events.irq_from_evtchn(port)) == (0, -1)
    assert sum(kernel.events._channels_on_cpu) == channels - 1
    device.need()
    run(kernel)
    assert device.calls == 0
    kernel.irq.request_irq(9, device.handler, 0, "acpi", device)
    run(kernel)
    assert (device.calls, sum(counts(kernel, 9))) == (1, 1)


@pytest.mark.parametrize("level", [True, False])
def test_disabled_lines_wait(kernel: Kernel[Pvops], level: bool) -> None:
    device = Device(kernel, 9 if level else 12, "x", level=level)
    kernel.irq.disable_irq(device.irq)
    for _ in range(2):
        device.wants = 1
        if level:
            device.need(0)
        else:
            device.ioline.pulse()
        run(kernel)
    assert device.calls == sum(counts(kernel, device.irq)) == 0
    kernel.irq.enable_irq(device.irq)
    run(kernel)
    assert device.calls == sum(counts(kernel, device.irq)) == 1


def test_lines_move(kernel: Kernel[Pvops]) -> None:
    device = Device(kernel, 9, "acpi")
    for cpu in (0, 1, 0):
        kernel.irq.set_affinity(9, 1 << cpu)
        was = counts(kernel, 9)[cpu]
        device.need()
        run(kernel)
        assert counts(kernel, 9)[cpu] == was + 1
    kernel.irq.set_affinity(9, 2)
    kernel.cpu_down(1)
    device.need()
    run(kernel)
    assert sum(counts(kernel, 9)) == 4


def test_nobody_cares_for_a_stuck_line(kernel: Kernel[Pvops]) -> None:
    """A device that nobody serves makes the level line interrupt again and again, until Linux gives it up.

    Xen holds a line back for 10 ms after each 10,000 interrupts.
    """
    kernel.irq.request_irq(10, lambda irq, dev_id: IRQ_NONE, 0, "wrong", kernel)
    kernel.domain.hypervisor.ioapic.line(10).assert_(kernel)
    sleep_until(2_000_000_000, kernel)
    assert sum(counts(kernel, 10)) == 100_000
    assert kernel.log[-1] == "Disabling IRQ #10"
    assert kernel.irq.descs[10].disabled


def test_a_line_that_xen_keeps(kernel: Kernel[Pvops]) -> None:
    """Xen has the serial line: the request goes well, the IRQ is silent, the log tells."""
    kernel.irq.request_irq(4, ignore, 0, "ttyS0")
    assert kernel.log[-1] == "xen:events: Failed to obtain physical IRQ 4"
    assert kernel.events.evtchn_from_irq(4) == 0
    assert "  4:          0          0  xen-pirq    -ioapic-edge  ttyS0\n" in kernel.proc_interrupts()
    kernel.irq.disable_irq(4)
    kernel.irq.enable_irq(4)
    kernel.irq.free_irq(4)


def test_eoi_by_the_map(kernel: Kernel[Pvops]) -> None:
    """Which pirqs want an EOI Xen tells in a page; without it the kernel asks, and Xen says all do."""
    level, edge = Device(kernel, 9, "acpi"), Device(kernel, 12, "i8042", level=False)
    events = kernel.events
    infos = [events.info(device.irq) for device in (level, edge)]
    assert [events._pirq_needs_eoi(info) for info in infos] == [True, False]
    events._eoi_map = 0
    assert [events._pirq_needs_eoi(info) for info in infos] == [True, True]
    level.need()
    edge.ioline.pulse()
    run(kernel)
    assert (level.calls, sum(counts(kernel, 12))) == (1, 1)


# Messages.


def test_messages_get_numbers_from_both_ends(kernel: Kernel[Pvops], hypervisor: Hypervisor) -> None:
    """IRQs from the lowest free one up, pirqs from the highest down."""
    device = PciDevice(hypervisor, 4 << 3, vectors=3, msix=True)
    lines = set(kernel.irq.descs)
    irqs = kernel.events.enable_msi(device, 3, msix=True)
    first = max(lines) + 1
    assert irqs == [first, first + 1, first + 2]
    top = kernel.domain.pirqs.nr_pirqs - 1
    assert [kernel.events.xen_pirq_from_irq(irq) for irq in irqs] == [top, top - 1, top - 2]
    assert errno_of(lambda: kernel.events.enable_msi(device, 3, msix=True)) == Errno.EINVAL
    for i, irq in enumerate(irqs):
        assert kernel.irq.descs[irq].name == "msi-x"
        kernel.irq.request_irq(irq, ignore, 0, f"virtio0-{i}")
    assert device.raise_msi(1)
    run(kernel)
    assert [sum(counts(kernel, irq)) for irq in irqs] == [0, 1, 0]
    for irq in irqs:
        kernel.irq.free_irq(irq)
    kernel.events.disable_msi(device)
    assert set(kernel.irq.descs) == lines
    assert not device.raise_msi(1)
    assert kernel.events.enable_msi(device, 1, msix=True) == irqs[:1]
    kernel.events.disable_msi(device)
    kernel.events.disable_msi(device)


def test_a_device_with_one_msi(kernel: Kernel[Pvops], hypervisor: Hypervisor) -> None:
    device = PciDevice(hypervisor, 5 << 3, vectors=4)
    (irq,) = kernel.events.enable_msi(device)
    assert kernel.irq.descs[irq].name == "msi"
    kernel.irq.request_irq(irq, ignore, 0, "peth0")
    for _ in range(3):
        device.raise_msi()
        run(kernel)
    assert sum(counts(kernel, irq)) == 3


def test_a_group_is_unmapped_once(kernel: Kernel[Pvops]) -> None:
    """Several messages that were mapped together: their IRQs are in a row, and the first one's pirq stands for all."""
    user = kernel.evtchn_user("x")
    ports = [user.bind_unbound(DOMID_SELF) for _ in range(3)]
    user.unbind(ports[1])  # one free number below, where two don't fit
    irqs = kernel.events.xen_bind_pirq_msi_to_irq([60, 61], "msi")
    assert irqs == [max(user.irq_of(port) for port in (ports[0], ports[2])) + 1 + i for i in (0, 1)]
    kernel.events.xen_destroy_irq(irqs[1])
    assert errno_of(lambda: kernel.events.xen_destroy_irq(irqs[0])) == Errno.EINVAL
    assert kernel.log[-1] == "xen:events: unmap irq failed -22"


def test_messages_that_are_not_there(kernel: Kernel[Pvops], hypervisor: Hypervisor) -> None:
    lines = set(kernel.irq.descs)
    device = PciDevice(hypervisor, 6 << 3, vectors=2, msix=True)
    top = kernel.domain.pirqs.nr_pirqs - 1
    assert errno_of(lambda: kernel.events.enable_msi(device, 3, msix=True)) == Errno.EINVAL
    assert kernel.log[-1].startswith("xen map irq failed -22 for")
    assert kernel.domain.pirqs.irq(top) == kernel.domain.pirqs.irq(top - 1) == 0
    assert errno_of(lambda: kernel.events.enable_msi(device, 1)) == Errno.ENODEV
    several = PciDevice(hypervisor, 5 << 3, vectors=4)
    assert errno_of(lambda: kernel.events.enable_msi(several, 4)) == Errno.ENOSPC
    assert set(kernel.irq.descs) == lines
    assert len(kernel.events.enable_msi(device, 2, msix=True)) == 2


# A guest that is given a line.


def test_a_line_passed_to_a_guest_and_back(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    domain = hypervisor.create_domain(1, vcpus=2)
    guest = Kernel(domain, Pvops)
    guest.boot()
    host_irq = kernel.events.register_gsi(17, level=True, active_low=True)
    line = hypervisor.ioapic.line(17)
    domain.pirqs.permit(17)
    pirq = physdev.map_pirq(kernel.domain, 1, MAP_PIRQ_TYPE_GSI, 17, 17)
    irq = guest.events.register_gsi(pirq, level=True, active_low=True)
    assert irq == max(guest.irq.descs)
    assert guest.irq.descs[irq].name == "pcifront"
    wanted: list[object] = []

    def served(irq: int, dev_id: object) -> IrqReturn:
        wanted.pop()
        if not wanted:
            line.deassert(domain)
        return IRQ_HANDLED

    guest.irq.request_irq(irq, served, IRQF_SHARED, "eth0", guest)
    assert guest.events.xen_test_irq_shared(irq)
    wanted += [1, 2]
    line.assert_(domain)
    run(kernel, guest)
    assert (sum(counts(guest, irq)), sum(counts(kernel, host_irq))) == (2, 0)
    assert f"{irq:3}:" in guest.proc_interrupts()
    # Domain 0 shares it: both get every interrupt, and the line waits for both EOIs.
    kernel.irq.request_irq(host_irq, lambda irq, dev_id: IRQ_NONE, IRQF_SHARED, "usb1", kernel)
    assert not guest.events.xen_test_irq_shared(irq)
    wanted += [1]
    line.assert_(domain)
    run(kernel, guest)
    assert (sum(counts(guest, irq)), sum(counts(kernel, host_irq))) == (3, 1)
    guest.events.unbind_from_irqhandler(irq, guest)
    assert irq not in guest.irq.descs
    physdev.unmap_pirq(kernel.domain, 1, pirq)
    line.pulse()
    run(kernel, guest)
    assert sum(counts(kernel, host_irq)) == 2


def test_a_guests_messages_come_through_its_frontend(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    guest = Kernel(hypervisor.create_domain(1), Pvops)
    guest.boot()
    device = PciDevice(hypervisor, 7 << 3, vectors=2, msix=True)

    class Frontend:
        enabled = False

        def enable_msi(self, device: PciDevice, count: int, msix: bool) -> list[int]:
            self.enabled = True
            return [30, 31][:count]

        def disable_msi(self, device: PciDevice) -> None:
            self.enabled = False

    frontend = guest.events.pci_frontend = Frontend()
    irqs = guest.events.enable_msi(device, 2, msix=True)
    assert [guest.events.xen_pirq_from_irq(irq) for irq in irqs] == [30, 31]
    assert guest.irq.descs[irqs[0]].name == "pcifront-msi-x"
    guest.events.disable_msi(device)
    assert not frontend.enabled
    assert irqs[0] not in guest.irq.descs
    assert kernel.domain.pirqs.irq(30) == 0


# Resume.


@pytest.fixture(params=["fifo", "2l"])
def guest(request: pytest.FixtureRequest, hypervisor: Hypervisor) -> Kernel[Pvops]:
    dom0(hypervisor)
    domain = hypervisor.create_domain(1, vcpus=2)
    store, console = (evtchn.alloc_unbound(domain, DOMID_SELF, 0) for _ in range(2))
    info = StartInfo(store_port=store, console_port=console)
    kernel = Kernel(domain, partial(Pvops, fifo=request.param == "fifo", start_info=info))
    kernel.boot()
    run(kernel)
    return kernel


def dom0_of(kernel: Kernel[Pvops]) -> Domain:
    return kernel.domain.hypervisor.domains[0]


def test_a_guest_resumes(guest: Kernel[Pvops]) -> None:
    """Same IRQs, new ports, and everything works: timers, IPIs, console, xenbus; a device's IRQ has no port."""
    events, zero = guest.events, dom0_of(guest)
    blkif = events.bind_listening(0, ignore, "blkif", "blkif")
    ticks: list[int] = []
    guest.set_timer(guest.now() + 1_000_000, lambda: ticks.append(guest.cpu), 0)
    guest.set_timer(guest.now() + 1_000_000, lambda: ticks.append(guest.cpu), 1)
    rows = {irq: desc.actions[0].name for irq, desc in guest.irq.descs.items()}
    events.suspend()
    assert guest.irq.descs[blkif].disabled
    assert not guest.irq.descs[events.bind_ipi_to_irq(Ipi.RESCHEDULE, 1)].disabled
    info = renewed(guest)
    guest.clock.jump_to(guest.now() + 2_000_000)  # the timers' time passes while nobody is there to see it
    guest.clock.fire_due()
    events.resume(info)
    maps_are_inverse(guest)
    assert {irq: desc.actions[0].name for irq, desc in guest.irq.descs.items()} == rows
    assert events.evtchn_from_irq(blkif) == 0
    assert not any(desc.disabled for desc in guest.irq.descs.values() if "spinlock" not in desc.actions[0].name)

    guest.clock.fire_due()
    run(guest)
    assert ticks == [0, 1]
    console: list[int] = []
    events.on_console = lambda: console.append(1)
    store: list[int] = []
    events.on_xenbus = lambda: store.append(1)
    for port, seen in ((info.console_port, console), (info.store_port, store)):
        remote = evtchn.bind_interdomain(zero, 1, port)
        for _ in range(3):
            evtchn.send(zero, remote)
            run(guest)
        assert len(seen) == 3
    ran: list[int] = []
    guest.smp_call_function_single(1, lambda: ran.append(guest.cpu))
    guest.queue_work(lambda: ran.append(guest.cpu + 10), 1)
    run(guest)
    assert ran == [1, 11]
    events.unbind(blkif, "blkif")
    assert blkif not in guest.irq.descs
    assert events.bind_listening(0, ignore, "blkif", "blkif") == blkif
    maps_are_inverse(guest)


def test_it_resumes_again_and_with_a_cpu_offline(guest: Kernel[Pvops]) -> None:
    events = guest.events
    ticked: list[int] = []
    for _ in range(3):
        guest.cpu_down(1)
        events.suspend()
        events.resume(renewed(guest))
        maps_are_inverse(guest)
        guest.cpu_up(1)
        run(guest)
        events.suspend()
        events.resume(renewed(guest))
        maps_are_inverse(guest)
        guest.set_timer(guest.now() + 1000, partial(ticked.append, 1), 1)
        sleep_until(guest.now() + 2000, guest)
    assert ticked == [1, 1, 1]
    assert events.fifo == ("FIFO" in guest.log[0])


def test_a_guest_loses_its_lines(hypervisor: Hypervisor, guest: Kernel[Pvops]) -> None:
    """It may not map them itself, so none of them comes back. Messages are left for their driver to give up."""
    hypervisor.ioapic.line(17)
    guest.domain.pirqs.permit(17)
    physdev.map_pirq(dom0_of(guest), 1, MAP_PIRQ_TYPE_GSI, 17, 17)
    irq = guest.events.register_gsi(17, level=True, active_low=True)
    msi = guest.events.xen_bind_pirq_msi_to_irq([40], "pcifront-msi")[0]
    guest.irq.request_irq(irq, ignore, 0, "eth0")
    guest.events.suspend()
    guest.events.resume(renewed(guest))
    assert irq not in guest.irq.descs
    assert f"xen:events: xen map irq failed gsi=17 irq={irq} pirq=17 rc=-1" in guest.log
    assert msi in guest.irq.descs
    guest.events.xen_destroy_irq(msi)
    maps_are_inverse(guest)


def test_the_initial_domains_lines_come_back(hypervisor: Hypervisor) -> None:
    """It isn't suspended, but its lines show how they are restored."""
    kernel = Kernel(hypervisor.create_domain(0, privileged=True, vcpus=2), partial(RecordedDom0, virtio=False))
    kernel.boot()
    assert errno_of(kernel.events.suspend) == Errno.ENODEV
    lines = {irq: kernel.events.evtchn_from_irq(irq) for irq in (1, 8, 9, 12)}
    evtchn.reset(kernel.domain, DOMID_SELF)
    kernel.events.irq_resume()
    maps_are_inverse(kernel)
    assert all(kernel.events.evtchn_from_irq(irq) for irq in lines)
    hypervisor.ioapic.line(12).pulse()
    run(kernel)
    assert sum(counts(kernel, 12)) == 1
    assert kernel.events.bind_virq_to_irq(VIRQ_TIMER, 0, True) == 24
