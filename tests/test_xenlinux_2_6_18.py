"""XenLinux 2.6.18: its numbers, bindings, affinity, CPUs, resume. (What both XenLinux kernels share is here too.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import VIRQ_CONSOLE, VIRQ_DEBUG, VIRQ_TIMER
from pvirq.linux.irq import IRQ_HANDLED, IRQF_SHARED, IrqError, IrqReturn
from pvirq.linux.irq2618 import Status2618
from pvirq.linux.personality import Ipi
from pvirq.linux.xenlinux_2_6_18 import DYNIRQ_BASE, NR_IRQS, XenLinux2618
from pvirq.linux.xenlinux_ports import IRQT_CALLER_PORT, IRQT_IPI, IRQT_LOCAL_PORT, IRQT_VIRQ
from pvirq.xen import evtchn
from xenlinuxlib import Setup, resumed, start_info, unbound


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
    it = Setup(lambda kernel: XenLinux2618(kernel, start_info=start_info(kernel.domain)))
    assert rows(it) == [(256, "timer0"), (257, "resched0"), (258, "callfunc0"), (259, "xenbus"), (260, "xencons")]
    assert [it.events.evtchn_from_irq(irq) for irq in range(256, 261)] == [3, 4, 5, 1, 2]
    assert [it.events.type_from_irq(irq) for irq in range(256, 261)] == [
        IRQT_VIRQ, IRQT_IPI, IRQT_IPI, IRQT_CALLER_PORT, IRQT_CALLER_PORT,
    ]  # fmt: skip
    assert it.events.irq_info[257] == IRQT_IPI << 24 | 0 << 16 | 4
    assert it.events.irq_info[258] == IRQT_IPI << 24 | 1 << 16 | 5
    it.close()


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


# Resume.


def test_resume_binds_virqs_and_ipis_again() -> None:
    it = Setup(lambda kernel: XenLinux2618(kernel, start_info=start_info(kernel.domain)), vcpus=2)
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
