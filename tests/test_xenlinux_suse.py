"""SUSE's XenLinux: its numbers, per-CPU IRQs, EOI map, resume. (What it shares with 2.6.18 is tested there.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, VIRQ_CONSOLE, VIRQ_DEBUG, VIRQ_MCA, VIRQ_TIMER, VIRQ_XENOPROF
from pvirq.linux import proc_irq
from pvirq.linux.irq import IRQ_HANDLED, IRQF_SHARED, IrqAction, IrqError, IrqReturn
from pvirq.linux.irq2632 import Status2632
from pvirq.linux.personality import Ipi, StartInfo
from pvirq.linux.xenlinux_ports import IRQT_IPI, IRQT_VIRQ
from pvirq.linux.xenlinux_suse import CALL_FUNC_SINGLE_VECTOR, REBOOT_VECTOR, RESCHEDULE_VECTOR, XenLinuxSuse, nr_pirqs
from pvirq.xen import evtchn
from xenlinuxlib import Setup, unbound


def handled(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_HANDLED


def fails(errno: Errno, call: Callable[..., Any], *args: Any, **keys: Any) -> None:
    with pytest.raises((IrqError, XenError)) as error:
        call(*args, **keys)
    assert isinstance(error.value, (IrqError, XenError))
    assert error.value.errno == errno


def rows(it: Setup) -> list[tuple[int, str, str]]:
    return [
        (irq, f"{desc.chip.name}-{desc.name}", desc.actions[0].name)
        for irq, desc in sorted(it.irqs.descs.items())
        if desc.actions
    ]


@pytest.fixture
def dom0() -> Iterator[Setup]:
    it = Setup(XenLinuxSuse, vcpus=4, domid=0)
    yield it
    it.close()


@pytest.fixture
def guest() -> Iterator[Setup]:
    it = Setup(XenLinuxSuse, vcpus=3)
    yield it
    it.close()


# Numbers.


def test_how_many_physical_numbers() -> None:
    assert nr_pirqs(24, 4) == 440  # the write-up's domain 0
    assert nr_pirqs(16, 1) == 280
    assert nr_pirqs(16, 2) == 288
    assert nr_pirqs(240, 64) == 4352


def test_domain_0s_irqs_as_the_writeup_has_them(dom0: Setup) -> None:
    assert rows(dom0) == [
        (440, "Dynamic-percpu", "timer"),
        (441, "Dynamic-percpu", "resched"),
        (442, "Dynamic-percpu", "callfunc"),
        (443, "Dynamic-percpu", "call1func"),
        (444, "Dynamic-percpu", "reboot"),
        (445, "Dynamic-percpu", "spinlock"),
        (446, "Dynamic-level", "mce"),
        (447, "Dynamic-level", "console"),
        (448, "Dynamic-level", "xenbus"),
    ]
    # One port a CPU: CPU 0's timer and IPIs first, then each further CPU's IPIs and timer.
    assert [dom0.events.evtchn_from_per_cpu_irq(440, cpu) for cpu in range(4)] == [1, 12, 18, 24]
    assert [dom0.events.evtchn_from_per_cpu_irq(441, cpu) for cpu in range(4)] == [2, 7, 13, 19]
    assert dom0.events.ports_of_irq(445) == [6, 11, 17, 23]
    assert dom0.events.ports_of_irq(446) == [25]
    assert dom0.events.evtchn_from_irq(441) == 2
    assert dom0.irqs.nr_irqs == 696
    for virq, irq in ((VIRQ_MCA, 446), (VIRQ_CONSOLE, 447)):
        evtchn.send_global_virq(dom0.hypervisor, virq)
        dom0.run()
        assert dom0.counts(irq) == [1, 0, 0, 0]


def test_a_guests_irqs() -> None:
    def kernel(kernel: Any) -> XenLinuxSuse:
        return XenLinuxSuse(kernel, start_info=info(kernel.domain))

    it = Setup(kernel)
    assert [(irq, name) for irq, _, name in rows(it)] == list(
        enumerate(["timer", "resched", "callfunc", "call1func", "reboot", "spinlock", "xenbus", "xencons"], 280)
    )
    it.close()


def info(domain: Any) -> StartInfo:
    return StartInfo(False, unbound(domain, 0), 0, unbound(domain, 0), 0)


def test_packed_bindings(guest: Setup) -> None:
    """Four bits of type, sixteen of index, twelve of port."""
    port = guest.device()
    irq = guest.events.irq_from_evtchn(port)
    assert guest.events.irq_info[irq] == 4 << 28 | port
    timer = guest.events.virq_to_irq[0][VIRQ_TIMER]
    assert guest.events.irq_info[timer] == IRQT_VIRQ << 28
    assert guest.events.irq_info[timer + 4] == IRQT_IPI << 28 | REBOOT_VECTOR << 12
    assert guest.events.mk_irq_info(1, 0xFFFF, 4095) == 0x1FFF_FFFF
    fails(Errno.EINVAL, guest.events.mk_irq_info, 1, 0x10000, 0)


def test_lines_exist_where_they_were_made(guest: Setup) -> None:
    assert guest.irqs.irq_to_desc(16) is None
    assert guest.irqs.desc(15).chip.name == "Phys"
    assert guest.irqs.desc(8).chip.name == "none"  # the RTC's
    fails(Errno.EINVAL, guest.irqs.request_irq, 100, handled, 0, "nothing there")
    fails(Errno.ENOSYS, guest.irqs.request_irq, 8, handled, 0, "rtc")


# Per-CPU IRQs.


def test_each_cpu_counts_in_its_own_column(guest: Setup) -> None:
    for cpu in (1, 1, 2, 0):
        guest.events.send_ipi(cpu, Ipi.RESCHEDULE)
        guest.run()
    guest.kernel.smp_call_function(lambda: None)
    guest.run()
    guest.kernel.smp_call_function_single(2, lambda: None)
    guest.run()
    guest.kernel.irq_work_queue(lambda: None)
    guest.run()
    timer = guest.events.virq_to_irq[0][VIRQ_TIMER]
    assert guest.counts(timer + 1) == [1, 2, 1]
    assert guest.counts(timer + 2) == [0, 1, 1]
    assert guest.counts(timer + 3) == [1, 0, 1]
    assert [stat.resched for stat in guest.events.irq_stat] == guest.counts(timer + 1)
    assert [stat.call for stat in guest.events.irq_stat] == [1, 1, 2]  # the two call rows' sum
    guest.events.notify_remote_via_ipi(REBOOT_VECTOR, 1)
    guest.run()
    assert guest.counts(timer + 4) == [0, 1, 0]


def test_timers_come_at_their_cpu(guest: Setup) -> None:
    ran: list[int] = []
    assert guest.kernel.jiffies_to_ns(1) == 4_000_000
    for cpu in (2, 1):
        guest.kernel.set_timer_jiffies(3, lambda: ran.append(guest.kernel.cpu), cpu)
    guest.kernel.clock.jump_to(12_000_000)
    guest.kernel.clock.fire_due()
    guest.run()
    assert sorted(ran) == [1, 2]
    assert guest.counts(guest.events.virq_to_irq[0][VIRQ_TIMER]) == [0, 1, 1]


def test_the_spinlock_ipi_is_polled_for(guest: Setup) -> None:
    irq = guest.events.ipi_to_irq[4]
    assert guest.irqs.desc(irq).depth == 1
    guest.events.send_ipi(1, Ipi.SPIN_UNLOCK)
    guest.run()
    assert guest.counts(irq) == [0, 0, 0]
    assert guest.events.poll_spinlock(1)
    assert not guest.events.poll_spinlock(1)
    assert not guest.events.poll_spinlock(0)
    assert guest.counts(irq) == [0, 1, 0]


def test_an_ipi_is_bound_once_a_cpu(guest: Setup) -> None:
    action = IrqAction(handled, 0, "again", None)
    fails(Errno.EBUSY, guest.events.bind_ipi_to_irqaction, RESCHEDULE_VECTOR, 1, action)
    irq = guest.events.ipi_to_irq[RESCHEDULE_VECTOR]
    fails(Errno.EINVAL, guest.events.unbind_from_irq, irq)
    guest.events.notify_remote_via_irq(irq)  # it has no other end
    guest.run()
    assert guest.counts(irq) == [0, 0, 0]
    fails(Errno.EIO, guest.irqs.set_affinity, irq, 1)
    assert guest.irqs.desc(irq).affinity == 7


def test_several_actions_on_a_per_cpu_virq(guest: Setup) -> None:
    """Each is bound CPU by CPU; a CPU's port stays as long as one of them wants it."""
    came: list[tuple[str, int]] = []

    def action(name: str) -> IrqAction:
        def handle(irq: int, dev_id: object) -> IrqReturn:
            came.append((name, guest.kernel.cpu))
            return IRQ_HANDLED

        return IrqAction(handle, IRQF_SHARED, name, None)

    one, two = action("one"), action("two")
    events = guest.events
    irq = events.bind_virq_to_irqaction(VIRQ_XENOPROF, 0, one)
    assert events.bind_virq_to_irqaction(VIRQ_XENOPROF, 1, one) == irq
    assert events.bind_virq_to_irqaction(VIRQ_XENOPROF, 1, two) == irq
    assert guest.domain.vcpus[2].virq_to_evtchn[VIRQ_XENOPROF] == 0
    assert events.irq_bindcount[irq] == 4  # three bindings, and one that keeps it
    for cpu in (0, 1):
        evtchn.send_guest_vcpu_virq(guest.domain.vcpus[cpu], VIRQ_XENOPROF)
        guest.run()
    # The IRQ's actions are all run wherever it comes.
    assert came == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert guest.counts(irq) == [1, 1, 0]
    events.unbind_from_per_cpu_irq(irq, 1, one)
    assert guest.domain.vcpus[1].virq_to_evtchn[VIRQ_XENOPROF]
    events.unbind_from_per_cpu_irq(irq, 1, two)
    assert not guest.domain.vcpus[1].virq_to_evtchn[VIRQ_XENOPROF]
    assert [a.name for a in guest.irqs.desc(irq).actions] == ["one"]
    events.unbind_from_per_cpu_irq(irq, 0, one)
    events.unbind_from_per_cpu_irq(irq, 0, one)  # nothing is left to do
    assert guest.irqs.desc(irq).actions == ()
    assert events.irq_bindcount[irq] == 1
    assert events.ports_of_irq(irq) == []


def test_what_a_per_cpu_virq_refuses(guest: Setup) -> None:
    events = guest.events
    fails(Errno.EINVAL, events.bind_virq_to_irqaction, VIRQ_CONSOLE, 0, IrqAction(handled, 0, "global", None))
    fails(Errno.EINVAL, events.bind_virq_to_irqaction, VIRQ_DEBUG, 0, IrqAction(handled, 0, "dev_id", 1))
    fails(Errno.EBUSY, events.bind_virq_to_irqaction, VIRQ_TIMER, 0, IrqAction(handled, IRQF_SHARED, "mine", None))
    timer = events.virq_to_irq[0][VIRQ_TIMER]
    assert [action.name for action in guest.irqs.desc(timer).actions] == ["timer"]
    assert events.evtchn_from_per_cpu_irq(timer, 0)  # the timer's own port stayed
    guest.kernel.set_timer_jiffies(1, lambda: None)
    guest.kernel.clock.jump_to(4_000_000)
    guest.kernel.clock.fire_due()
    guest.run()
    assert guest.counts(timer)[0] == 1


def test_a_cpu_that_goes_and_comes_back(guest: Setup) -> None:
    timer = guest.events.virq_to_irq[0][VIRQ_TIMER]
    guest.events.send_ipi(2, Ipi.RESCHEDULE)
    guest.run()
    numbers = [irq for irq, _, _ in rows(guest)]
    guest.kernel.cpu_down(2)
    assert [irq for irq, _, _ in rows(guest)] == numbers
    assert len(guest.events.ports_of_irq(timer)) == 2
    assert guest.irqs.desc(timer).affinity == 3
    assert guest.kernel.proc_interrupts().splitlines()[0].split() == ["CPU0", "CPU1"]
    guest.kernel.cpu_up(2)
    assert guest.counts(timer + 1) == [0, 0, 1]  # its count was only hidden
    ran: list[int] = []
    guest.kernel.smp_call_function_single(2, lambda: ran.append(guest.kernel.cpu))
    guest.run()
    assert ran == [2]
    assert guest.irqs.desc(guest.events.ipi_to_irq[CALL_FUNC_SINGLE_VECTOR]).affinity == 7


def test_lines_leave_a_cpu_that_goes(guest: Setup) -> None:
    port, off = guest.device(), guest.device()
    irq, off_irq = guest.events.irq_from_evtchn(port), guest.events.irq_from_evtchn(off)
    for each in (port, off):
        guest.events.rebind_evtchn_to_cpu(each, 2)
    guest.irqs.disable_irq(off_irq)
    guest.send(off)
    guest.kernel.cpu_down(2)
    assert guest.domain.evtchn.port(port).notify_vcpu == 0
    guest.send(port)
    guest.run()
    assert guest.counts(irq) == [1, 0, 0]
    assert guest.counts(off_irq) == [0, 0, 0]
    guest.irqs.enable_irq(off_irq)
    guest.run()
    assert guest.counts(off_irq) == [1, 0, 0]  # kept through the move


def test_a_line_is_never_sent_to_a_cpu_that_is_offline(guest: Setup) -> None:
    port = guest.device()
    irq = guest.events.irq_from_evtchn(port)
    guest.kernel.cpu_down(1)
    guest.irqs.set_affinity(irq, 0b110)
    guest.send(port)
    guest.run()
    assert guest.domain.evtchn.port(port).notify_vcpu == 2
    assert guest.irqs.desc(irq).affinity == 0b110  # what userland asked for
    guest.send(port)
    guest.run()
    assert guest.counts(irq) == [1, 0, 1]


def test_no_irq_left(guest: Setup) -> None:
    while guest.events.irq_bindcount[guest.events.nr_irqs - 1] == 0:
        guest.device()
    used = guest.domain.evtchn.active
    fails(Errno.ENOSPC, guest.device)
    fails(Errno.ENOSPC, guest.events.bind_virq_to_irqaction, VIRQ_DEBUG, 0, IrqAction(handled, 0, "debug", None))
    assert guest.domain.evtchn.active == used
    assert list(guest.kernel.log).count("No available IRQ to bind to: increase NR_DYNIRQS.") == 1
    assert guest.events.virq_actions.get(VIRQ_DEBUG) == []


def test_proc_irq(guest: Setup) -> None:
    port = guest.device()
    irq = guest.events.irq_from_evtchn(port)
    assert proc_irq.listdir(guest.kernel, f"/proc/irq/{irq}") == ["device", "smp_affinity", "spurious"]
    assert "8" not in proc_irq.listdir(guest.kernel, "/proc/irq")  # the RTC's, without a chip
    proc_irq.write(guest.kernel, f"/proc/irq/{irq}/smp_affinity", "4\n")
    guest.send(port)
    guest.run()
    assert proc_irq.read(guest.kernel, f"/proc/irq/{irq}/smp_affinity") == "4\n"
    assert proc_irq.read(guest.kernel, f"/proc/irq/{irq}/spurious").startswith("count 1\nunhandled 0\n")
    fails(Errno.EINVAL, proc_irq.write, guest.kernel, "/proc/irq/default_smp_affinity", "0")
    proc_irq.write(guest.kernel, "/proc/irq/default_smp_affinity", "6")
    other = guest.events.irq_from_evtchn(guest.device())
    assert proc_irq.read(guest.kernel, f"/proc/irq/{other}/smp_affinity") == "2\n"
    assert guest.domain.evtchn.port(guest.events.evtchn_from_irq(other)).notify_vcpu == 1


# EOIs.


def test_an_eoi_unmasks_the_port_too(dom0: Setup) -> None:
    """PHYSDEVOP_pirq_eoi_gmfn, version 1: Xen keeps a bit for each pirq that wants an EOI."""
    assert dom0.events.pirq_eoi_does_unmask
    assert dom0.domain.pirqs.auto_unmask
    line = dom0.hypervisor.ioapic.line(18)
    dom0.events.register_gsi(18, level=True, active_low=True)

    def handler(irq: int, dev_id: object) -> IrqReturn:
        line.deassert(dev_id)
        return IRQ_HANDLED

    dom0.irqs.request_irq(18, handler, IRQF_SHARED, "usb", "dev")
    port = dom0.events.evtchn_from_irq(18)
    assert dom0.machine.mem[dom0.domain.pirqs.eoi_map + 18 // 8] >> 18 % 8 & 1
    assert dom0.events.pirq_needs_eoi == set()
    for _ in range(3):
        line.assert_("dev")
        dom0.run()
        assert not dom0.events.evtchn_masked(port)
    assert dom0.counts(18) == [3, 0, 0, 0]


def test_without_the_map_it_asks_xen(monkeypatch: pytest.MonkeyPatch) -> None:
    from pvirq.xen import physdev

    def refuse(domain: Any, gmfn: int, version: int) -> None:
        raise XenError(Errno.ENOSYS, "an old hypervisor")

    monkeypatch.setattr(physdev, "pirq_eoi_gmfn", refuse)
    it = Setup(XenLinuxSuse, vcpus=2, domid=0)
    assert not it.events.pirq_eoi_does_unmask
    line = it.hypervisor.ioapic.line(18)
    it.events.register_gsi(18, level=True, active_low=True)

    def handler(irq: int, dev_id: object) -> IrqReturn:
        line.deassert(dev_id)
        return IRQ_HANDLED

    it.irqs.request_irq(18, handler, IRQF_SHARED, "usb", "dev")
    assert it.events.pirq_needs_eoi == {18}
    for _ in range(3):
        line.assert_("dev")
        it.run()
    assert it.counts(18) == [3, 0]
    it.close()


def test_probing_is_not_sharing(dom0: Setup) -> None:
    dom0.events.register_gsi(18, level=True, active_low=True)
    desc = dom0.irqs.desc(18)
    desc.chip.set_type(desc, 0x10)
    assert dom0.events._probing(desc)
    desc.chip.startup(desc)
    assert not dom0.events._probing(desc)
    action = dom0.hypervisor.irqs.desc(18).guest_action
    assert action is not None
    assert not action.shareable
    desc.chip.shutdown(desc)
    desc.status |= Status2632.AUTODETECT
    assert dom0.events._probing(desc)
    fails(Errno.EINVAL, dom0.irqs.request_irq, 18, handled, 8, "with a trigger")


# Resume.


def test_a_cancelled_suspend_changes_nothing(guest: Setup) -> None:
    port = guest.device()
    guest.events.resume(guest.events.start_info)
    guest.send(port)
    guest.run()
    assert guest.took() == [port]


def test_resume_binds_what_was_bound(guest: Setup) -> None:
    guest.kernel.cpu_down(2)
    names = rows(guest)
    one = IrqAction(handled, 0, "debug", None)
    debug = guest.events.bind_virq_to_irqaction(VIRQ_DEBUG, 1, one)
    console = guest.events.bind_virq_to_irqhandler(VIRQ_CONSOLE, 0, handled, 0, "tool")
    evtchn.reset(guest.domain, DOMID_SELF)
    guest.machine.mem[guest.domain.shared_info + 2048 : guest.domain.shared_info + 2560] = bytes(512)
    guest.events.resume(StartInfo(False))
    assert [row for row in rows(guest) if row[2] not in ("debug", "tool")] == names
    timer = guest.events.virq_to_irq[0][VIRQ_TIMER]
    assert len(guest.events.ports_of_irq(timer)) == 2
    assert guest.domain.vcpus[2].virq_to_evtchn[VIRQ_TIMER] == 0
    assert guest.domain.vcpus[1].virq_to_evtchn[VIRQ_DEBUG] == guest.events.evtchn_from_per_cpu_irq(debug, 1)
    assert guest.domain.vcpus[0].virq_to_evtchn[VIRQ_CONSOLE] == guest.events.evtchn_from_irq(console)
    spinlock = guest.events.ipi_to_irq[4]
    assert all(guest.events.evtchn_masked(port) for port in guest.events.ports_of_irq(spinlock))
    assert not any(guest.events.evtchn_masked(port) for port in guest.events.ports_of_irq(timer))
    ran: list[int] = []
    guest.kernel.smp_call_function_single(1, lambda: ran.append(guest.kernel.cpu))
    guest.run()
    assert ran == [1]
