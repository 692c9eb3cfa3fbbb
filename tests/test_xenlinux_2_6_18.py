"""XenLinux 2.6.18: its numbers, bindings, physical lines, resume; its maps through anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.abi.xen import DOMID_SELF, VIRQ_CONSOLE, VIRQ_DEBUG, VIRQ_TIMER
from pvirq.linux.irq import IRQ_HANDLED, IRQF_SHARED, IrqError, IrqReturn
from pvirq.linux.irq2618 import Status2618
from pvirq.linux.kthread import Body, Kthread, sleep
from pvirq.linux.personality import Ipi, StartInfo
from pvirq.linux.xenlinux import XenLinux
from pvirq.linux.xenlinux_2_6_18 import DYNIRQ_BASE, NR_IRQS, XenLinux2618
from pvirq.linux.xenlinux_ports import IRQT_CALLER_PORT, IRQT_IPI, IRQT_LOCAL_PORT, IRQT_PIRQ, IRQT_VIRQ
from pvirq.linux.xenlinux_suse import XenLinuxSuse
from pvirq.xen import evtchn, physdev, pirq
from pvirq.xen.msi import PciDevice
from xenlinuxlib import Setup, unbound


def handled(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_HANDLED


def fails(errno: Errno, call: Callable[..., Any], *args: Any, **keys: Any) -> None:
    with pytest.raises((IrqError, XenError)) as error:
        call(*args, **keys)
    assert isinstance(error.value, (IrqError, XenError))
    assert error.value.errno == errno


def rows(it: Setup) -> list[tuple[int, str]]:
    return [
        (irq, ", ".join(a.name for a in desc.actions)) for irq, desc in sorted(it.irqs.descs.items()) if desc.actions
    ]


@pytest.fixture
def guest() -> Iterator[Setup]:
    it = Setup(XenLinux2618)
    yield it
    it.close()


@pytest.fixture
def smp() -> Iterator[Setup]:
    it = Setup(XenLinux2618, vcpus=3)
    yield it
    it.close()


@pytest.fixture
def dom0() -> Iterator[Setup]:
    it = Setup(XenLinux2618, vcpus=2, domid=0)
    yield it
    it.close()


# Boot.


def test_a_guests_first_irqs() -> None:
    """256 to 260, as the write-up has them; xenbus and xencons are where the builder's ports are."""
    it = Setup(lambda kernel: XenLinux2618(kernel, start_info=StartInfo(False, *start_info(kernel.domain))))
    assert rows(it) == [(256, "timer0"), (257, "resched0"), (258, "callfunc0"), (259, "xenbus"), (260, "xencons")]
    assert [it.events.evtchn_from_irq(irq) for irq in range(256, 261)] == [3, 4, 5, 1, 2]
    assert [it.events.type_from_irq(irq) for irq in range(256, 261)] == [
        IRQT_VIRQ, IRQT_IPI, IRQT_IPI, IRQT_CALLER_PORT, IRQT_CALLER_PORT,
    ]  # fmt: skip
    assert it.events.irq_info[257] == IRQT_IPI << 24 | 0 << 16 | 4
    assert it.events.irq_info[258] == IRQT_IPI << 24 | 1 << 16 | 5
    it.close()


def start_info(domain: Any) -> tuple[int, int, int, int]:
    return unbound(domain, 0), 0, unbound(domain, 0), 0


@pytest.mark.parametrize(
    ("timer_first", "second"),
    [(False, ["resched1", "callfunc1", "timer1"]), (True, ["timer1", "resched1", "callfunc1"])],
)
def test_a_second_cpus_irqs(timer_first: bool, second: list[str]) -> None:
    it = Setup(partial(XenLinux2618, timer_first=timer_first), vcpus=2)
    assert rows(it) == list(enumerate(["timer0", "resched0", "callfunc0", *second], 256))
    assert [it.events.cpu_from_evtchn(it.events.evtchn_from_irq(irq)) for irq in range(256, 262)] == [0, 0, 0, 1, 1, 1]
    it.close()


def test_domain_0s_irqs(dom0: Setup) -> None:
    assert rows(dom0)[-2:] == [(262, "xenbus"), (263, "console")]
    assert dom0.events.store_port == dom0.events.evtchn_from_irq(262)
    evtchn.send_global_virq(dom0.hypervisor, VIRQ_CONSOLE)
    dom0.run()
    assert dom0.counts(263) == [1, 0]


def test_lines_that_nobody_has_touched_do_not_exist_yet(guest: Setup) -> None:
    assert sorted(guest.irqs.descs) == [256, 257, 258]
    desc = guest.irqs.desc(300)
    assert (desc.chip.name, desc.depth, desc.status, desc.actions) == ("Dynamic-irq", 1, Status2618.DISABLED, ())
    assert guest.irqs.desc(255).chip.name == "none"
    assert guest.irqs.desc(511).chip.name == "Dynamic-irq"
    assert guest.irqs.irq_to_desc(512) is None
    assert guest.events.irq_bindcount[:256] == [1] * 256


def test_a_guest_has_no_clock_chip(guest: Setup, dom0: Setup) -> None:
    """The RTC's line is left without a chip, so that its driver fails."""
    fails(Errno.ENOSYS, guest.irqs.request_irq, 8, handled, 0, "rtc")
    guest.irqs.request_irq(7, handled, 0, "parport")  # this one has a chip, and no line
    assert guest.kernel.log[-1] == "Failed to obtain physical IRQ 7"
    fails(Errno.ENOSYS, guest.irqs.request_irq, 16, handled, 0, "pci")
    dom0.irqs.request_irq(8, handled, 0, "rtc")
    assert dom0.events.evtchn_from_irq(8)


def test_every_port_is_masked_at_boot_but_those_with_handlers(guest: Setup) -> None:
    masked = [port for port in range(4096) if guest.events.evtchn_masked(port)]
    assert sorted(set(range(4096)) - set(masked)) == [1, 2, 3]


def test_ticks_and_timers(smp: Setup) -> None:
    assert smp.kernel.jiffies_to_ns(1) == 10_000_000
    ran: list[int] = []
    for cpu in range(3):
        smp.kernel.set_timer_jiffies(2, lambda: ran.append(smp.kernel.cpu), cpu)
    smp.kernel.clock.jump_to(20_000_000)
    smp.kernel.clock.fire_due()
    smp.run()
    assert ran == [0, 1, 2]
    assert [smp.counts(smp.events.virq_to_irq[cpu][VIRQ_TIMER])[cpu] for cpu in range(3)] == [1, 1, 1]


def test_ipis(smp: Setup) -> None:
    ran: list[int] = []
    smp.kernel.smp_call_function_single(2, lambda: ran.append(smp.kernel.cpu))
    smp.run()
    smp.kernel.smp_call_function(lambda: ran.append(smp.kernel.cpu))
    smp.run()
    smp.kernel.irq_work_queue(lambda: ran.append(smp.kernel.cpu))
    smp.run()
    assert ran == [2, 1, 2, 0]
    smp.events.send_ipi(1, Ipi.RESCHEDULE)
    smp.events.send_ipi(1, Ipi.SPIN_UNLOCK)  # the first one is still pending: one interrupt
    smp.run()
    names = dict(rows(smp))
    count = {names[irq]: smp.counts(irq) for irq in names}
    assert count["callfunc1"] == [0, 1, 0]
    assert count["callfunc2"] == [0, 0, 2]
    assert count["resched1"] == [0, 1, 0]
    assert [stat.call for stat in smp.events.irq_stat] == [1, 1, 2]
    assert [stat.resched for stat in smp.events.irq_stat] == [0, 1, 0]


# Binding.


def test_the_first_unbound_irq_is_taken(guest: Setup) -> None:
    a, b, c = (guest.events.irq_from_evtchn(guest.device()) for _ in range(3))
    assert (a, b, c) == (259, 260, 261)
    guest.events.unbind(b, guest.irqs.descs[b].actions[0].dev_id)
    assert guest.events.irq_from_evtchn(guest.device()) == 260
    assert guest.events.irq_from_evtchn(guest.device()) == 262


def test_no_irq_left_warns_once(guest: Setup) -> None:
    while guest.events.irq_bindcount[NR_IRQS - 1] == 0:
        guest.device()
    used = guest.domain.evtchn.active
    for _ in range(3):
        fails(Errno.ENOSPC, guest.device)
    assert guest.domain.evtchn.active == used  # the ports that got no IRQ were closed again
    fails(Errno.ENOSPC, guest.events.bind_virq_to_irqhandler, VIRQ_DEBUG, 0, handled, 0, "debug")
    assert [line for line in guest.kernel.log if "No available" in line] == [
        "No available IRQ to bind to: increase NR_DYNIRQS."
    ]


def test_no_port_left() -> None:
    it = Setup(XenLinux2618)
    it.domain.evtchn.max_port = 5
    it.device()
    it.device()
    fails(Errno.ENOSPC, it.events.bind_listening, 0, handled, "device", 1)
    assert it.events.irq_bindcount[DYNIRQ_BASE + 5] == 0
    it.close()


def test_a_port_of_the_callers_is_not_closed(guest: Setup) -> None:
    port = unbound(guest.domain, 0)
    irq = guest.events.bind_caller_port_to_irqhandler(port, handled, 0, "mine", 1)
    assert guest.events.bind_caller_port_to_irq(port) == irq
    assert guest.events.irq_bindcount[irq] == 2
    guest.events.unbind_from_irq(irq)
    assert guest.events.evtchn_from_irq(irq) == port
    guest.events.unbind_from_irqhandler(irq, 1)
    assert guest.events.evtchn_from_irq(irq) == 0
    assert guest.domain.evtchn.port(port).usable
    for bad in (0, -1, 4096):
        fails(Errno.EINVAL, guest.events.bind_caller_port_to_irqhandler, bad, handled, 0, "bad", 1)


def test_unbind_closes_the_port_and_zeroes_the_counts(guest: Setup) -> None:
    port = guest.device()
    irq = guest.events.irq_from_evtchn(port)
    guest.run()
    guest.send(port)
    guest.run()
    assert guest.counts(irq) == [1]
    guest.events.unbind(irq, guest.irqs.descs[irq].actions[0].dev_id)
    assert guest.counts(irq) == [0]
    assert not guest.domain.evtchn.port(port).usable
    assert guest.events.irq_from_evtchn(port) == -1
    assert guest.events.irq_info[irq] == 0
    guest.events.notify_remote_via_irq(irq)  # nothing to notify
    fails(Errno.EINVAL, guest.events.unbind, irq, None)
    fails(Errno.EINVAL, guest.events.unbind, 7, None)
    assert list(guest.kernel.log)[-2:] == [
        f"Trying to free already-free IRQ {irq}",
        "Trying to free already-free IRQ 7",
    ]


def test_freeing_with_a_wrong_dev_id_keeps_the_handler(guest: Setup) -> None:
    irq = guest.events.irq_from_evtchn(guest.device())
    guest.irqs.free_irq(irq, "somebody else's")
    assert guest.kernel.log[-1] == f"Trying to free already-free IRQ {irq}"
    assert rows(guest)[-1] == (irq, "device")


def test_a_handler_that_cannot_be_requested_leaves_nothing_bound(guest: Setup) -> None:
    used = guest.domain.evtchn.active
    fails(Errno.EINVAL, guest.events.bind_listening_port_to_irqhandler, 0, handled, IRQF_SHARED, "device", None)
    assert guest.domain.evtchn.active == used
    assert guest.events.irq_bindcount[259] == 0


def test_a_virq_has_one_irq_and_is_forgotten_with_it(smp: Setup) -> None:
    irq = smp.events.bind_virq_to_irqhandler(VIRQ_CONSOLE, 0, handled, IRQF_SHARED, "one", 1)
    assert smp.events.bind_virq_to_irqhandler(VIRQ_CONSOLE, 0, handled, IRQF_SHARED, "two", 2) == irq
    smp.events.rebind_evtchn_to_cpu(smp.events.evtchn_from_irq(irq), 2)
    smp.events.unbind_from_irqhandler(irq, 1)
    assert smp.events.virq_to_irq[0][VIRQ_CONSOLE] == irq
    smp.events.unbind_from_irqhandler(irq, 2)
    assert smp.events.virq_to_irq[0][VIRQ_CONSOLE] == -1
    fails(Errno.EINVAL, smp.events.bind_virq_to_irqhandler, VIRQ_CONSOLE, 1, handled, 0, "not on CPU 1")
    fails(Errno.ESRCH, smp.events.bind_interdomain, 55, 1, handled, "nobody", 1)


def test_a_backends_end(dom0: Setup) -> None:
    front = unbound(dom0.peer, 0)
    irq = dom0.events.bind_interdomain(dom0.peer.domid, front, dom0.handler(), "blkif-backend", "back")
    assert dom0.events.type_from_irq(irq) == IRQT_LOCAL_PORT
    dom0.run()
    evtchn.send(dom0.peer, front)
    dom0.run()
    assert dom0.counts(irq) == [2, 0]
    dom0.events.notify_remote_via_irq(irq)
    assert dom0.peer.evtchn.is_pending(front)
    dom0.events.eoi(irq)
    dom0.events.unbind(irq, "back")
    assert dom0.peer.evtchn.port(front).remote_domain is None


# Affinity and CPUs.


def test_affinity_moves_the_port_at_its_next_interrupt(smp: Setup) -> None:
    port = smp.device()
    irq = smp.events.irq_from_evtchn(port)
    smp.run()
    smp.irqs.set_affinity(irq, 0b110)
    smp.send(port)
    smp.run()
    smp.send(port)
    smp.run()
    # The interrupt that finds the line to be moved is still this CPU's, and leaves nothing for the other.
    assert smp.counts(irq) == [1, 1, 0]
    assert smp.domain.evtchn.port(port).notify_vcpu == 1
    assert smp.irqs.descs[irq].affinity == 2
    smp.irqs.set_affinity(smp.events.virq_to_irq[1][VIRQ_TIMER], 1)  # it stays: Xen refuses, nobody is told
    smp.kernel.set_timer_jiffies(1, lambda: None, 1)
    smp.kernel.clock.jump_to(10_000_000)
    smp.kernel.clock.fire_due()
    smp.run()
    assert smp.counts(smp.events.virq_to_irq[1][VIRQ_TIMER]) == [0, 1, 0]


def test_an_event_that_is_pending_moves_along(smp: Setup) -> None:
    port = smp.device()
    irq = smp.events.irq_from_evtchn(port)
    smp.run()
    smp.send(port)
    smp.events.rebind_evtchn_to_cpu(port, 2)
    smp.run()
    assert smp.counts(irq) == [0, 0, 1]


def test_a_cpu_that_goes_and_comes_back(smp: Setup) -> None:
    port = smp.device()
    irq = smp.events.irq_from_evtchn(port)
    smp.events.rebind_evtchn_to_cpu(port, 1)
    smp.run()
    smp.kernel.cpu_down(1)
    assert [name for _, name in rows(smp)] == [
        "timer0", "resched0", "callfunc0", "resched2", "callfunc2", "timer2", "device",
    ]  # fmt: skip
    assert smp.domain.evtchn.port(port).notify_vcpu == 0
    before = sum(smp.counts(irq))
    smp.send(port)
    smp.run()
    assert sum(smp.counts(irq)) == before + 1
    assert "CPU1" not in smp.kernel.proc_interrupts()
    smp.kernel.cpu_up(1)
    assert [name for _, name in rows(smp)][3:6] == ["resched1", "callfunc1", "timer1"]  # the first free numbers
    ran: list[int] = []
    smp.kernel.smp_call_function_single(1, lambda: ran.append(smp.kernel.cpu))
    smp.run()
    assert ran == [1]


# Disabled and masked.


def test_a_disabled_irq_keeps_its_event(guest: Setup) -> None:
    port = guest.device()
    irq = guest.events.irq_from_evtchn(port)
    guest.run()
    guest.took()
    guest.irqs.disable_irq(irq)
    guest.send(port, port)
    guest.run()
    assert guest.took() == []
    guest.irqs.enable_irq(irq)
    guest.run()
    assert guest.took() == [port]  # two events, one interrupt


def test_retrigger(smp: Setup) -> None:
    port = smp.device()
    desc = smp.irqs.desc(smp.events.irq_from_evtchn(port))
    smp.run()
    smp.took()
    assert desc.chip.retrigger(desc)
    smp.run()
    assert smp.took() == [port]
    smp.events.mask_evtchn(port)
    assert desc.chip.retrigger(desc)
    smp.run()
    assert smp.took() == []
    smp.events.unmask_evtchn(port)
    smp.run()
    assert smp.took() == [port]
    assert smp.irqs.desc(400).chip.retrigger(smp.irqs.desc(400))  # without a port: nothing


# Physical lines. What the two kernels share is tested on both.

KERNELS = [XenLinux2618, XenLinuxSuse]


@pytest.fixture(params=KERNELS, ids=["2.6.18", "suse"])
def hardware(request: pytest.FixtureRequest) -> Iterator[Setup]:
    it = Setup(request.param, vcpus=2, domid=0)
    yield it
    it.close()


def test_a_level_line_is_shared_and_comes_once_per_service(hardware: Setup) -> None:
    line = hardware.hypervisor.ioapic.line(18)
    irq = hardware.events.register_gsi(18, level=True, active_low=True)
    assert irq == 18
    asked: list[object] = []

    def handler(irq: int, dev_id: object) -> IrqReturn:
        asked.append(dev_id)
        line.deassert(dev_id)
        return IRQ_HANDLED

    hardware.irqs.request_irq(18, handler, IRQF_SHARED, "ehci_hcd:usb1", "a")
    hardware.irqs.request_irq(18, handler, IRQF_SHARED, "ata_piix", "b")
    line.assert_("a")
    hardware.run()
    assert (asked, hardware.counts(18), line.sent) == (["a", "b"], [1, 0], 1)
    assert hardware.events.type_from_irq(18) == IRQT_PIRQ
    fails(Errno.EBUSY, hardware.irqs.request_irq, 18, handler, 0, "alone", "c")


def test_a_level_line_that_nobody_serves_storms_until_it_is_given_up(hardware: Setup) -> None:
    line = hardware.hypervisor.ioapic.line(20)
    hardware.events.register_gsi(20, level=True, active_low=True)
    calls: list[int] = []

    def handler(irq: int, dev_id: object) -> IrqReturn:
        calls.append(irq)
        if len(calls) == 1000:
            line.deassert("device")
        return IRQ_HANDLED

    hardware.irqs.request_irq(20, handler, 0, "device", None)
    line.assert_("device")
    hardware.run()
    assert hardware.counts(20) == [1000, 0]  # each EOI found it still asserted


def test_a_disabled_level_line_is_not_acknowledged_to_xen(hardware: Setup) -> None:
    line = hardware.hypervisor.ioapic.line(19)
    hardware.events.register_gsi(19, level=True, active_low=True)

    def handler(irq: int, dev_id: object) -> IrqReturn:
        line.deassert("device")
        return IRQ_HANDLED

    hardware.irqs.request_irq(19, handler, IRQF_SHARED, "device", "device")
    hardware.irqs.disable_irq(19)
    line.assert_("device")
    hardware.run()
    assert hardware.counts(19) == [1, 0]  # it came once, was masked or shut down, and waits
    assert line.asserted
    hardware.irqs.enable_irq(19)
    hardware.run()
    assert not line.asserted
    line.assert_("device")
    hardware.run()
    assert not line.asserted


def test_an_edge(hardware: Setup) -> None:
    irq = hardware.events.register_gsi(1, level=False, active_low=False)
    hardware.irqs.request_irq(irq, handled, 0, "i8042")
    line = hardware.hypervisor.ioapic.line(1)
    for _ in range(5):
        line.pulse()
        hardware.run()
    line.pulse()
    line.pulse()  # the second finds the first still pending
    hardware.run()
    assert hardware.counts(1) == [6, 0]


def test_a_line_gives_its_port_back(hardware: Setup) -> None:
    hardware.events.register_gsi(18, level=True, active_low=True)
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "usb", "a")
    port = hardware.events.evtchn_from_irq(18)
    hardware.irqs.free_irq(18, "a")
    assert hardware.events.evtchn_from_irq(18) == 0
    assert hardware.events.irq_from_evtchn(port) == -1
    assert not hardware.domain.evtchn.port(port).usable
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "usb", "a")
    assert hardware.events.evtchn_from_irq(18) == port


def test_messages_come_from_the_top(hardware: Setup) -> None:
    top = hardware.events.nr_pirqs - 1
    assert top == (255 if isinstance(hardware.events, XenLinux2618) else 24 + 8 * 2 + 16 * 24 - 1)
    devices = [PciDevice(hardware.hypervisor, 0x300 + i, vectors=2, msix=True) for i in range(2)]
    assert hardware.events.enable_msi(devices[0], 2, msix=True) == [top, top - 1]
    assert hardware.events.enable_msi(devices[1], 1, msix=True) == [top - 2]
    fails(Errno.EINVAL, hardware.events.enable_msi, devices[0], msix=True)
    hardware.irqs.request_irq(top - 1, handled, 0, "eth0-rx")
    assert devices[0].raise_msi(1)
    hardware.run()
    assert hardware.counts(top - 1) == [1, 0]
    hardware.irqs.free_irq(top - 1)
    hardware.events.disable_msi(devices[0])
    assert not devices[0].raise_msi(1)
    fails(Errno.ENOSYS, hardware.irqs.request_irq, top, handled, 0, "gone")
    single = PciDevice(hardware.hypervisor, 0x310)
    assert hardware.events.enable_msi(single) == [top]  # free again
    fails(Errno.ENOSPC, hardware.events.enable_msi, PciDevice(hardware.hypervisor, 0x311, vectors=4), 4)


def test_messages_that_cannot_be_leave_nothing_mapped(hardware: Setup) -> None:
    device = PciDevice(hardware.hypervisor, 0x300, vectors=2, msix=True)
    fails(Errno.EINVAL, hardware.events.enable_msi, device, 3, msix=True)
    assert hardware.events.enable_msi(device, 2, msix=True) == [
        hardware.events.nr_pirqs - 1,
        hardware.events.nr_pirqs - 2,
    ]
    fails(Errno.EINVAL, hardware.events.register_gsi, 5000, level=True, active_low=True)
    fails(Errno.EINVAL, hardware.events.evtchn_map_pirq, hardware.events.nr_pirqs - 1, 3)
    assert "is already mapped to 1:" in hardware.kernel.log[-1]
    fails(Errno.EINVAL, hardware.events.evtchn_map_pirq, 100, 0)


def test_lines_move_too(hardware: Setup) -> None:
    hardware.events.register_gsi(18, level=False, active_low=False)
    hardware.irqs.request_irq(18, handled, 0, "device")
    hardware.irqs.set_affinity(18, 2)
    line = hardware.hypervisor.ioapic.line(18)
    for _ in range(3):
        line.pulse()
        hardware.run()
    assert hardware.counts(18) == [1, 2]
    hardware.kernel.cpu_down(1)
    line.pulse()
    hardware.run()
    assert hardware.counts(18) == [2, 2]


def test_unhandled_interrupts_of_a_line_that_two_domains_have(hardware: Setup) -> None:
    hardware.events.register_gsi(18, level=True, active_low=True)
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "device", "dev")
    assert not hardware.events.irq_ignore_unhandled(18)
    physdev.map_pirq(hardware.domain, 7, MAP_PIRQ_TYPE_GSI, 18, 18)
    pirq.irq_permission(hardware.domain, hardware.peer, 18, True)
    evtchn.bind_pirq(hardware.peer, 18, 1)
    assert hardware.events.irq_ignore_unhandled(18)
    assert not hardware.events.irq_ignore_unhandled(hardware.events.nr_pirqs)


def test_a_pirq_that_is_taken_already(hardware: Setup) -> None:
    """Xen gives it to nobody twice: the request succeeds, the line is silent, the log tells."""
    hardware.events.register_gsi(18, level=True, active_low=True)
    evtchn.bind_pirq(hardware.domain, 18, 1)
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "late", "dev")
    assert hardware.kernel.log[-1] == "Failed to obtain physical IRQ 18"
    assert hardware.events.evtchn_from_irq(18) == 0


@pytest.mark.parametrize("personality", KERNELS, ids=["2.6.18", "suse"])
def test_a_line_that_is_passed_through_to_a_guest(personality: type[XenLinux]) -> None:
    it = Setup(personality)
    physdev.setup_gsi(it.peer, 18, 1, 1)
    physdev.map_pirq(it.peer, 0, MAP_PIRQ_TYPE_GSI, 18, 18)
    assert it.events.register_gsi(18, level=True, active_low=True) == 18
    it.irqs.request_irq(18, handled, IRQF_SHARED, "usb", "too early")
    assert it.kernel.log[-1] == "Failed to obtain physical IRQ 18"
    it.irqs.free_irq(18, "too early")
    physdev.map_pirq(it.peer, 1, MAP_PIRQ_TYPE_GSI, 18, 18)
    pirq.irq_permission(it.peer, it.domain, 18, True)
    line = it.hypervisor.ioapic.line(18)

    def handler(irq: int, dev_id: object) -> IrqReturn:
        line.deassert("device")
        return IRQ_HANDLED

    it.irqs.request_irq(18, handler, IRQF_SHARED, "usb", "dev")
    for _ in range(4):
        line.assert_("device")
        it.run()
    assert it.counts(18) == [4]
    it.irqs.free_irq(18, "dev")
    physdev.unmap_pirq(it.peer, 1, 18)
    evtchn.bind_pirq(it.peer, 18, 0)  # domain 0 has it back
    it.close()


def sleepy(it: Setup, until: Callable[[], bool]) -> None:
    """Run with time passing."""
    clock = it.kernel.clock
    it.run()
    while not until():
        deadline = clock.next_deadline()
        assert deadline is not None
        clock.jump_to(deadline)
        clock.fire_due()
        it.run()


def test_a_driver_finds_its_line_by_trying(hardware: Setup) -> None:
    """probe_irq_on opens all unused lines, unshared; the one that then interrupts is the device's."""
    kernel, irqs, line = hardware.kernel, hardware.irqs, hardware.hypervisor.ioapic.line(7)
    noisy = hardware.hypervisor.ioapic.line(10)
    hardware.events.register_gsi(12, level=False, active_low=False)
    irqs.request_irq(12, handled, 0, "i8042")

    def probe() -> Body[tuple[int, int]]:
        mask = yield from irqs.probe_irq_on(lambda ms: sleep(kernel, ms * 1_000_000))
        action = hardware.hypervisor.irqs.desc(7).guest_action
        assert action is not None
        assert not action.shareable
        line.pulse()
        yield from sleep(kernel, 1_000_000)
        return mask, irqs.probe_irq_off()

    noisy.assert_("somebody")
    thread = Kthread(kernel, "probe", probe())
    sleepy(hardware, lambda: thread.done)
    mask, found = thread.result()
    assert found == 7
    assert mask >> 7 & 1
    assert not mask >> 10 & 1  # it interrupts all the time
    assert not mask >> 12 & 1
    assert kernel.now() == 121_000_000
    assert not any(hardware.events.evtchn_from_irq(irq) for irq in range(16) if irq != 12)
    assert hardware.events.evtchn_from_irq(12)


# Resume.


def resumed(it: Setup) -> StartInfo:
    """The domain has new event channels, as after save and restore."""
    evtchn.reset(it.domain, DOMID_SELF)
    for vcpu in it.domain.vcpus:
        it.machine.mem[vcpu.info] = 0
        it.machine.u64[(vcpu.info + 8) // 8] = 0
    it.machine.mem[it.domain.shared_info + 2048 : it.domain.shared_info + 2560] = bytes(512)
    return StartInfo(False, *start_info(it.domain))


def test_resume_binds_virqs_and_ipis_again() -> None:
    it = Setup(lambda kernel: XenLinux2618(kernel, start_info=StartInfo(False, *start_info(kernel.domain))), vcpus=2)
    device = it.device()
    irq = it.events.irq_from_evtchn(device)
    names = rows(it)
    ticked: list[int] = []
    it.kernel.set_timer(5, lambda: ticked.append(it.kernel.cpu), 1)
    it.events.suspend()
    it.events.resume(resumed(it))
    it.kernel.clock.jump_to(5)
    it.kernel.clock.fire_due()
    it.run()
    assert ticked == [1]
    assert rows(it) == names
    assert it.events.evtchn_from_irq(irq) == 0  # its driver has to connect anew
    it.events.notify_remote_via_irq(irq)
    for cpu in range(2):
        before = it.events.irq_stat[cpu].resched
        it.events.send_ipi(cpu, Ipi.RESCHEDULE)
        it.run()
        assert it.events.irq_stat[cpu].resched == before + 1
    rang: list[int] = []
    it.events.on_xenbus = lambda: rang.append(1)
    evtchn.send(it.peer, evtchn.bind_interdomain(it.peer, 1, it.events.store_port))
    it.run()
    assert rang
    it.close()


def test_domain_0_is_not_suspended(hardware: Setup) -> None:
    fails(Errno.ENODEV, hardware.events.suspend)


# Anything in any order.


class Anything(RuleBasedStateMachine):
    """Bindings come and go, lines move, CPUs too, events come: the maps stay inverse, and no event is lost silently."""

    personality: Callable[[Any], XenLinux] = XenLinux2618

    @initialize(vcpus=st.integers(1, 3))
    def boot(self, vcpus: int) -> None:
        self.it = Setup(self.personality, vcpus=vcpus)
        self.expected: dict[int, int] = {}
        self.disabled: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "it"):
            self.it.close()

    @property
    def ports(self) -> list[int]:
        return sorted(self.expected)

    @rule()
    def bind(self) -> None:
        if len(self.expected) < 40:
            port = self.it.device()
            self.expected[port] = 0
            self.settle()

    def settle(self, *sent: int) -> None:
        """Each send to a port that is neither masked nor pending is one interrupt."""
        before = {port: self.count(port) for port in self.expected}
        waits = {port for port in self.expected if self.it.events.test_evtchn(port)}
        self.it.run()
        for port in self.expected:
            came = self.count(port) - before[port]
            if port in self.disabled:
                assert came == 0
            else:
                assert came == (port in waits or port in sent), port
                assert not self.it.events.test_evtchn(port)

    def count(self, port: int) -> int:
        return sum(self.it.counts(self.it.events.irq_from_evtchn(port)))

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), twice=st.booleans())
    def send(self, data: st.DataObject, twice: bool) -> None:
        ports = data.draw(st.lists(st.sampled_from(self.ports), min_size=1, max_size=5))
        for port in ports:
            self.it.send(*[port] * (1 + twice))  # the second finds it pending, and is one with the first
        assert all(self.it.events.test_evtchn(port) for port in ports)
        self.settle()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def unbind(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(self.ports))
        irq = self.it.events.irq_from_evtchn(port)
        self.it.events.unbind(irq, self.it.irqs.descs[irq].actions[0].dev_id)
        del self.expected[port]
        self.disabled.discard(port)
        assert self.it.counts(irq) == [0] * len(self.it.domain.vcpus)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), mask=st.integers(1, 7))
    def move(self, data: st.DataObject, mask: int) -> None:
        port = data.draw(st.sampled_from(self.ports))
        irq = self.it.events.irq_from_evtchn(port)
        if mask & self.it.irqs.online:
            self.it.irqs.set_affinity(irq, mask)
            self.it.send(port)
            self.settle()
            if port not in self.disabled:
                assert mask >> self.it.events.cpu_from_evtchn(port) & 1

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def toggle(self, data: st.DataObject) -> None:
        port = data.draw(st.sampled_from(self.ports))
        irq = self.it.events.irq_from_evtchn(port)
        if port in self.disabled:
            self.disabled.remove(port)
            self.it.irqs.enable_irq(irq)
        else:
            self.disabled.add(port)
            self.it.irqs.disable_irq(irq)
        self.settle()

    @rule(cpu=st.integers(1, 2), pending=st.booleans())
    def hotplug(self, cpu: int, pending: bool) -> None:
        if cpu >= len(self.it.domain.vcpus):
            return
        if not self.it.kernel.online(cpu):
            self.it.kernel.cpu_up(cpu)
        else:
            waiting = [port for port in self.ports if self.it.events.cpu_from_evtchn(port) == cpu] if pending else []
            self.it.send(*waiting)
            before = {port: self.count(port) for port in self.expected}
            self.it.kernel.cpu_down(cpu)
            self.it.run()
            for port in waiting:
                assert self.count(port) - before[port] == (port not in self.disabled)
        self.it.run()

    @rule()
    def resume(self) -> None:
        info = resumed(self.it)
        bound = {port: self.it.events.irq_from_evtchn(port) for port in self.expected}
        self.it.events.resume(info)
        for irq in bound.values():
            assert self.it.events.evtchn_from_irq(irq) == 0
            self.it.events.unbind(irq, self.it.irqs.descs[irq].actions[0].dev_id)
        self.expected.clear()
        self.disabled.clear()
        self.it.run()

    @invariant()
    def the_maps_are_inverse(self) -> None:
        if not hasattr(self, "it"):
            return
        events = self.it.events
        percpu: dict[int, list[int]] = getattr(events, "percpu_evtchn", {})
        by_info = {events.evtchn_from_irq(irq): irq for irq in range(events.nr_irqs) if irq not in percpu}
        by_info.pop(0, None)
        by_info |= {port: irq for irq, ports in percpu.items() for port in ports if port}
        assert by_info == events.evtchn_to_irq
        for port in events.evtchn_to_irq:
            channel = self.it.domain.evtchn.port(port)
            assert channel.usable
            assert channel.notify_vcpu == events.cpu_from_evtchn(port)
            bit = 1 << port % 64
            cpus = [cpu for cpu, mask in enumerate(events.cpu_evtchn_mask) if mask[port // 64] & bit]
            assert cpus == [channel.notify_vcpu]
        for irq in range(events.dynirq_base, events.nr_irqs):
            # (The type of an IRQ that lost its port at resume stays when it is unbound.)
            assert not events.irq_bindcount[irq] or events.irq_info[irq]
            assert events.irq_bindcount[irq] or irq in percpu or not events.evtchn_from_irq(irq)
        for desc in self.it.irqs.descs.values():
            slot = desc.chip_data
            assert (slot[0] if isinstance(slot, tuple) else 0) == (
                0 if desc.irq in percpu else events.evtchn_from_irq(desc.irq)
            )


class AnythingOnSuse(Anything):
    personality = XenLinuxSuse


Anything.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
AnythingOnSuse.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestAnything = Anything.TestCase
TestAnythingOnSuse = AnythingOnSuse.TestCase
