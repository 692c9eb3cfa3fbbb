"""Whatever happens to a Linux 6.1 kernel's channels, its maps agree and no event is counted twice or goes missing.

Each send is one interrupt in a row of /proc/interrupts, or it is coalesced (the port was pending already), or it waits
(its IRQ is disabled), or it is lost (the channel ended before it was handled).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from linuxlib import counts, maps_are_inverse, renewed, run, sleep_until
from pvirq.abi.xen import DOMID_SELF, VIRQ_TIMER
from pvirq.linux.irq import IRQ_HANDLED, IRQF_SHARED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi, StartInfo
from pvirq.linux.pvops import Pvops, dom0
from pvirq.xen import evtchn
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine

CPUS = 3


@dataclass
class Row:
    """What should be in one row: `sent` = `handled` + `coalesced` + `lost` + one if `pending`."""

    irq: int
    remote: int = 0
    sent: int = 0
    handled: int = 0
    coalesced: int = 0
    lost: int = 0
    pending: bool = False
    depth: int = 0

    def send(self) -> None:
        self.sent += 1
        if self.pending:
            self.coalesced += 1
        self.pending = True

    def run(self) -> None:
        if self.pending and not self.depth:
            self.pending = False
            self.handled += 1

    def end(self) -> None:
        self.lost += self.pending
        self.pending = False


class GuestChannels(RuleBasedStateMachine):
    """A guest with frontends' channels, IPIs and timers; domain 0 at the other ends."""

    fifo = True

    @initialize()
    def boot(self) -> None:
        self.machine = Machine(1 << 26)
        hypervisor = Hypervisor(self.machine)
        self.zero = hypervisor.create_domain(0, privileged=True)
        domain = hypervisor.create_domain(1, vcpus=CPUS)
        store, console = (evtchn.alloc_unbound(domain, DOMID_SELF, 0) for _ in range(2))
        info = StartInfo(store_port=store, console_port=console)
        self.kernel = Kernel(domain, partial(Pvops, fifo=self.fifo, start_info=info))
        self.kernel.boot()
        self.channels: dict[int, Row] = {}
        self.percpu: dict[tuple[int, Ipi | None], Row] = {}
        for cpu in range(CPUS):
            self.add_percpu(cpu)

    def teardown(self) -> None:
        self.run()
        self.machine.close()

    def add_percpu(self, cpu: int) -> None:
        events = self.kernel.events
        self.percpu[cpu, None] = Row(events.bind_virq_to_irq(VIRQ_TIMER, cpu, True))
        for ipi in (Ipi.RESCHEDULE, Ipi.CALL_FUNCTION, Ipi.IRQ_WORK):
            self.percpu[cpu, ipi] = Row(events.bind_ipi_to_irq(ipi, cpu))

    def rows(self) -> list[Row]:
        return [*self.channels.values(), *self.percpu.values()]

    def pick(self, number: int) -> Row:
        rows = list(self.channels.values())
        return rows[number % len(rows)]

    def interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.kernel.events.eoi(irq)
        return IRQ_HANDLED

    @rule()
    def bind(self) -> None:
        irq = self.kernel.events.bind_listening(0, self.interrupt, "x", self)
        assert irq not in self.channels
        remote = evtchn.bind_interdomain(self.zero, 1, self.kernel.events.evtchn_from_irq(irq))
        self.channels[irq] = Row(irq, remote)

    @precondition(lambda self: self.channels)
    @rule(number=st.integers(0, 99))
    def unbind(self, number: int) -> None:
        row = self.pick(number)
        self.check_row(row)
        self.kernel.events.unbind(row.irq, self)
        evtchn.close(self.zero, row.remote)
        del self.channels[row.irq]

    @precondition(lambda self: self.channels)
    @rule(number=st.integers(0, 99), times=st.integers(1, 3))
    def send(self, number: int, times: int) -> None:
        row = self.pick(number)
        for _ in range(times):
            evtchn.send(self.zero, row.remote)
            row.send()

    @rule(cpu=st.integers(0, CPUS - 1), ipi=st.sampled_from([Ipi.RESCHEDULE, Ipi.CALL_FUNCTION, Ipi.IRQ_WORK, None]))
    def send_percpu(self, cpu: int, ipi: Ipi | None) -> None:
        if self.kernel.online(cpu):
            if ipi is None:
                evtchn.send_guest_vcpu_virq(self.kernel.domain.vcpus[cpu], VIRQ_TIMER)
            else:
                self.kernel.events.send_ipi(cpu, ipi)
            self.percpu[cpu, ipi].send()

    @precondition(lambda self: self.channels)
    @rule(number=st.integers(0, 99), mask=st.integers(1, (1 << CPUS) - 1))
    def move(self, number: int, mask: int) -> None:
        if mask & self.kernel.irq.online:
            irq = self.pick(number).irq
            self.kernel.irq.set_affinity(irq, mask)
            assert mask >> self.kernel.events.info(irq).cpu & 1

    @precondition(lambda self: self.channels)
    @rule(number=st.integers(0, 99))
    def disable(self, number: int) -> None:
        row = self.pick(number)
        self.kernel.irq.disable_irq(row.irq)
        row.depth += 1

    @precondition(lambda self: self.channels)
    @rule(number=st.integers(0, 99))
    def enable(self, number: int) -> None:
        row = self.pick(number)
        if row.depth:
            self.kernel.irq.enable_irq(row.irq)
            row.depth -= 1

    @rule(cpu=st.integers(1, CPUS - 1))
    def hotplug(self, cpu: int) -> None:
        if self.kernel.online(cpu):
            self.run()
            self.kernel.cpu_down(cpu)
            for ipi in (Ipi.RESCHEDULE, Ipi.CALL_FUNCTION, Ipi.IRQ_WORK, None):
                del self.percpu[cpu, ipi]
        else:
            self.kernel.cpu_up(cpu)
            self.add_percpu(cpu)

    @rule()
    def resume(self) -> None:
        """What was pending is lost with its channel. The frontends give their IRQs up."""
        self.kernel.events.suspend()
        self.kernel.events.resume(renewed(self.kernel))
        for row in self.rows():
            row.end()
            self.check_row(row)
        for irq in list(self.channels):
            assert self.kernel.events.evtchn_from_irq(irq) == 0
            self.kernel.events.unbind(irq, self)
            del self.channels[irq]
        for port in range(1, self.zero.evtchn.active + 8):
            if self.zero.evtchn.channels[port].usable:
                evtchn.close(self.zero, port)

    @rule()
    def run(self) -> None:
        run(self.kernel)
        for row in self.rows():
            row.run()
            self.check_row(row)

    def check_row(self, row: Row) -> None:
        assert sum(counts(self.kernel, row.irq)) == row.handled
        assert row.sent == row.handled + row.coalesced + row.lost + row.pending

    @invariant()
    def maps(self) -> None:
        if hasattr(self, "kernel"):
            maps_are_inverse(self.kernel)


class GuestChannels2l(GuestChannels):
    fifo = False


@dataclass(frozen=True, eq=False)
class Device:
    gsi: int
    name: str


EDGE, ALONE, FIRST, SECOND = (Device(12, "i8042"), Device(9, "acpi"), Device(16, "usb1"), Device(16, "sound"))
ON_LEVELS = (ALONE, FIRST, SECOND)


class Lines(RuleBasedStateMachine):
    """Domain 0's physical lines: an edge, a level and a shared one, moved, disabled, given up and taken again."""

    fifo = True

    @initialize()
    def boot(self) -> None:
        self.machine = Machine(1 << 26)
        self.kernel = dom0(Hypervisor(self.machine), CPUS, fifo=self.fifo)
        self.ioapic = self.kernel.domain.hypervisor.ioapic
        self.wants = dict.fromkeys(ON_LEVELS, 0)
        self.due = False  # an edge's event is certain to come
        self.pulses = 0  # since the edge was last handled
        self.levels = 0  # and how often a level went up meanwhile
        self.depth = {EDGE.gsi: 0, ALONE.gsi: 0, FIRST.gsi: 0}
        self.requested: set[Device] = set()
        self.storm = 0
        for device in (EDGE, *ON_LEVELS):
            self.kernel.events.register_gsi(device.gsi, level=device is not EDGE, active_low=False)
            self.take(device)

    def teardown(self) -> None:
        self.run()
        self.machine.close()

    def take(self, device: Device) -> None:
        flags = IRQF_SHARED if device.gsi == 16 else 0
        self.kernel.irq.request_irq(device.gsi, self.interrupt, flags, device.name, device)
        self.requested.add(device)

    def blocked(self) -> bool:
        return any(wants and self.depth[device.gsi] for device, wants in self.wants.items())

    def in_use(self, gsi: int) -> bool:
        return any(device.gsi == gsi for device in self.requested)

    def interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """The driver serves all that its device wants, and the device lowers the line."""
        self.storm += 1
        assert self.storm < 1000
        assert isinstance(dev_id, Device)
        if self.wants.get(dev_id):
            self.wants[dev_id] = 0
            self.ioapic.line(irq).deassert(dev_id)
        return IRQ_HANDLED

    @rule()
    def edge(self) -> None:
        self.ioapic.line(12).pulse()
        if EDGE in self.requested:
            self.pulses += 1
            self.due = True

    @rule(device=st.sampled_from(ON_LEVELS))
    def level(self, device: Device) -> None:
        if device not in self.requested:
            return  # nobody would serve it, and its line would interrupt its sharers for ever
        self.wants[device] += 1
        self.levels += 1
        self.ioapic.line(device.gsi).assert_(device)

    @rule(gsi=st.sampled_from([9, 12, 16]), mask=st.integers(1, (1 << CPUS) - 1))
    def move(self, gsi: int, mask: int) -> None:
        if mask & self.kernel.irq.online and self.in_use(gsi):
            self.kernel.irq.set_affinity(gsi, mask)

    @rule(cpu=st.integers(1, CPUS - 1))
    def hotplug(self, cpu: int) -> None:
        if self.kernel.online(cpu):
            self.run()
            self.kernel.cpu_down(cpu)
        else:
            self.kernel.cpu_up(cpu)

    @rule(gsi=st.sampled_from([9, 12, 16]), on=st.booleans())
    def disable(self, gsi: int, on: bool) -> None:
        if not self.in_use(gsi):
            return
        if on and self.depth[gsi]:
            self.kernel.irq.enable_irq(gsi)
            self.depth[gsi] -= 1
        elif not on:
            self.kernel.irq.disable_irq(gsi)
            self.depth[gsi] += 1

    @rule(device=st.sampled_from((EDGE, *ON_LEVELS)))
    def give_up_or_take(self, device: Device) -> None:
        # A line that starts anew is not disabled, and doesn't know what came before: the model would have to forget.
        if self.depth[device.gsi] or self.blocked():
            return
        self.run()
        if device in self.requested:
            self.kernel.irq.free_irq(device.gsi, device)
            self.requested.remove(device)
        else:
            self.take(device)

    @rule()
    def run(self) -> None:
        self.storm = 0
        before = sum(counts(self.kernel, EDGE.gsi))
        sleep_until(self.kernel.now() + 5_000_000, self.kernel)
        handled = sum(counts(self.kernel, EDGE.gsi)) - before
        # A level whose IRQ is disabled owes its EOI, and lines of lower priority wait for that.
        blocked = self.blocked()
        if self.depth[EDGE.gsi]:
            assert handled == 0
        else:
            # Edges are one event while it is pending. One may wait in the local APIC besides, for a level's EOI.
            assert handled <= min(self.pulses, 1 + bool(self.levels))
            assert handled or not self.due or blocked
            if handled or not blocked:
                self.due = False
            if not blocked:
                self.pulses = self.levels = 0
        for device, wants in self.wants.items():
            # Nobody is left unserved whose driver has the line open; and a line that is served is down.
            if device in self.requested and not self.depth[device.gsi]:
                assert not wants or blocked
        for gsi in (9, 16):
            unserved = any(wants for device, wants in self.wants.items() if device.gsi == gsi)
            assert self.ioapic.line(gsi).asserted == unserved

    @invariant()
    def maps(self) -> None:
        if hasattr(self, "kernel"):
            maps_are_inverse(self.kernel)


class Lines2l(Lines):
    fifo = False


_SETTINGS = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
for machine in (GuestChannels, GuestChannels2l, Lines, Lines2l):
    machine.TestCase.settings = _SETTINGS
TestGuestChannels = GuestChannels.TestCase
TestGuestChannels2l = GuestChannels2l.TestCase
TestLines = Lines.TestCase
TestLines2l = Lines2l.TestCase
