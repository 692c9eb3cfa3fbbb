"""Random series of what devices and two domains do, beside a small model of where each interrupt must be.

No event is invented, and every assertion ends by a named rule: as an event; merged with one that waits; lost at a pin
that is masked or that nobody has, or at a port that is just being bound; held by the pin (an EOI is due), by the local
APIC (a higher interrupt has no EOI yet) or by the device (its message is masked).
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pirqlib import bind_line, fails, host, map_line, map_message, pass_time, take
from pvirq.abi.errno import Errno
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.xen import physdev
from pvirq.xen.msi import PciDevice

# By its name: an edge's or level's GSI, a message that can be masked or can't.
VECTORS = {"edge1": 0x30, "level10": 0x68, "level11": 0x70, "edge12": 0x78, "msix": 0xA0, "msi": 0xA8}
GSIS = {"edge1": 1, "level10": 10, "level11": 11, "edge12": 12}
LEVELS = ("level10", "level11")
MESSAGES = ("msix", "msi")
OWED = ("level10", "level11", "msi")  # an EOI
FORCED_NS = 1_000_000


class Model:
    """One CPU. `bound` are the domains of each interrupt, `owes` those that must EOI it, `stack` what is in service."""

    def __init__(self) -> None:
        self.now = 0
        self.devices: dict[str, set[str]] = {name: set() for name in GSIS}
        self.pin_masked = {name: name in LEVELS for name in GSIS}
        self.irr: set[str] = set()  # pins that await an EOI
        self.waiting: set[str] = set()  # in the local APIC
        self.stack: list[list[object]] = []  # [name, ready]
        self.bound: dict[str, list[int]] = {name: [] for name in VECTORS}
        self.owes: dict[str, set[int]] = {name: set() for name in VECTORS}
        self.deadline: dict[str, int] = {}
        self.unclaimed: set[str] = set()
        self.message_held = False
        self.events: set[tuple[int, str]] = set()
        self.fate: Counter[tuple[str, str]] = Counter()
        self.binding: tuple[int, str] | None = None

    # -- the way of an interrupt

    def request(self, name: str) -> None:
        if name in self.waiting:
            self.fate[name, "merged"] += 1
        self.waiting.add(name)

    def serve(self) -> None:
        """The CPU takes what it can."""
        while self.waiting:
            name = max(self.waiting, key=VECTORS.__getitem__)
            if self.stack and VECTORS[name] >> 4 <= VECTORS[str(self.stack[-1][0])] >> 4:
                return
            self.waiting.remove(name)
            if not self.bound[name]:
                self.fate[name, "nobody"] += 1
                if name in self.unclaimed and name not in OWED:
                    self.pin_masked[name] = True
                self.unclaimed.add(name)
                if name in LEVELS:
                    self.ended(name)
                continue
            self.fate[name, "taken"] += 1
            if name in OWED:
                self.stack.append([name, False])
                self.owes[name] = set(self.bound[name])
                self.deadline[name] = self.now + FORCED_NS
            self.events |= {(domid, name) for domid in self.bound[name] if (domid, name) != self.binding}

    def ended(self, name: str) -> None:
        """The EOI of `name` has been made."""
        self.irr.discard(name)
        self.level(name)

    def level(self, name: str) -> None:
        if name in LEVELS and self.devices[name] and not self.pin_masked[name] and name not in self.irr:
            self.irr.add(name)
            self.request(name)

    def served(self, name: str) -> None:
        """No guest owes its EOI any more: it can be made when it is the highest in service."""
        self.deadline.pop(name, None)
        for entry in self.stack:
            if entry[0] == name:
                entry[1] = True
        while self.stack and self.stack[-1][1]:
            self.ended(str(self.stack.pop()[0]))
        self.serve()

    # -- what happens

    def rise(self, name: str) -> None:
        if name in LEVELS:
            self.level(name)
        elif self.pin_masked[name]:
            self.fate[name, "lost"] += 1
        else:
            self.request(name)
        self.serve()

    def message(self, name: str) -> None:
        if name == "msix" and not self.bound[name]:
            self.message_held = True
            return
        self.request(name)
        self.serve()

    def bind(self, domid: int, name: str) -> None:
        first = not self.bound[name]
        self.bound[name].append(domid)
        if first and name in GSIS:
            self.pin_masked[name] = False
            self.level(name)
        self.binding = (domid, name)  # what comes now finds no port
        self.serve()
        self.binding = None
        if name == "msix" and self.message_held:
            self.message_held = False
            self.message(name)

    def unbind(self, domid: int, name: str) -> None:
        self.bound[name].remove(domid)
        owed = domid in self.owes[name]
        self.owes[name].discard(domid)
        self.events.discard((domid, name))
        if not self.bound[name]:
            if name in LEVELS:
                self.pin_masked[name] = True
            self.served(name)
        elif owed and not self.owes[name]:
            self.served(name)

    def eoi(self, domid: int, name: str) -> None:
        if domid in self.owes[name]:
            self.owes[name].remove(domid)
            if not self.owes[name]:
                self.served(name)

    def wait(self, ns: int) -> None:
        end = self.now + ns
        while self.deadline and (due := min(self.deadline.values())) <= end:
            self.now = due
            name = next(name for name, when in self.deadline.items() if when == due)
            self.owes[name].clear()
            self.served(name)
        self.now = end


domains = st.sampled_from((0, 1))
names = st.sampled_from(tuple(VECTORS))
lines = st.sampled_from(tuple(GSIS))
devices = st.sampled_from(("one", "other"))


class Interrupts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hypervisor, dom0 = host()
        self.domains = [dom0, self.hypervisor.create_domain()]
        self.cards = {"msix": PciDevice(self.hypervisor, 8, msix=True), "msi": PciDevice(self.hypervisor, 16)}
        self.pirqs = dict(GSIS)
        for name in MESSAGES:
            physdev.pci_device_add(dom0, self.cards[name].sbdf)
            self.pirqs[name] = map_message(dom0, self.cards[name])
        for gsi in GSIS.values():
            for domid in (0, 1):
                map_line(dom0, gsi, domid)
        self.model = Model()
        self.ports: dict[tuple[int, str], int] = {}
        self.zombies: dict[str, int] = {}  # ports of the guest whose line was taken away
        self.unmapped: set[str] = set()

    @rule(name=lines, device=devices)
    def assert_line(self, name: str, device: str) -> None:
        was = self.model.devices[name]
        self.hypervisor.ioapic.line(GSIS[name]).assert_(device)
        self.model.devices[name] = was | {device}
        if not was:
            self.model.rise(name)

    @rule(name=lines, device=devices)
    def deassert_line(self, name: str, device: str) -> None:
        self.hypervisor.ioapic.line(GSIS[name]).deassert(device)
        self.model.devices[name] = self.model.devices[name] - {device}

    @rule(name=lines)
    def pulse(self, name: str) -> None:
        self.hypervisor.ioapic.line(GSIS[name]).pulse()
        if not self.model.devices[name]:
            self.model.devices[name] = {"pulse"}
            self.model.rise(name)
            self.model.devices[name] = set()

    @rule(name=st.sampled_from(MESSAGES))
    def message(self, name: str) -> None:
        held = name == "msix" and not self.model.bound[name]
        assert self.cards[name].raise_msi() != held
        self.model.message(name)

    @rule(domid=domains, name=names)
    def bind(self, domid: int, name: str) -> None:
        bind = self.domains[domid].evtchnop.bind_pirq
        if domid and name in MESSAGES:
            fails(Errno.EINVAL, bind, self.pirqs[name])  # it has fewer numbers
        elif domid and name in self.unmapped:
            fails(Errno.EPERM, bind, self.pirqs[name])
        elif (domid, name) in self.ports:
            fails(Errno.EEXIST, bind, self.pirqs[name])
        else:
            self.ports[domid, name] = bind(self.pirqs[name])
            self.model.bind(domid, name)

    @rule(domid=domains, name=names)
    def close(self, domid: int, name: str) -> None:
        if domid and name in self.zombies:
            self.domains[1].evtchnop.close(self.zombies.pop(name))
        elif (domid, name) in self.ports:
            self.domains[domid].evtchnop.close(self.ports.pop((domid, name)))
            self.model.unbind(domid, name)

    @rule(domid=domains, name=names)
    def eoi(self, domid: int, name: str) -> None:
        if self.domains[domid].pirqs.info(self.pirqs[name]) is None:
            fails(Errno.EINVAL, physdev.eoi, self.domains[domid], self.pirqs[name])
        else:
            physdev.eoi(self.domains[domid], self.pirqs[name])
            self.model.eoi(domid, name)

    @rule(name=lines)
    def take_line_from_guest(self, name: str) -> None:
        if name in self.unmapped:
            fails(Errno.EINVAL, physdev.unmap_pirq, self.domains[0], 1, GSIS[name])
            return
        physdev.unmap_pirq(self.domains[0], 1, GSIS[name])
        self.unmapped.add(name)
        if (1, name) in self.ports:
            self.zombies[name] = self.ports.pop((1, name))
            self.model.unbind(1, name)

    @rule(name=lines)
    def give_line_to_guest(self, name: str) -> None:
        if name in self.zombies:
            fails(Errno.EEXIST, map_line, self.domains[0], GSIS[name], 1)
            fails(Errno.EBUSY, physdev.map_pirq, self.domains[0], 1, MAP_PIRQ_TYPE_GSI, GSIS[name], -1)
        else:
            map_line(self.domains[0], GSIS[name], 1)
            self.unmapped.discard(name)

    @rule(ns=st.sampled_from((1_000, 400_000, 1_000_000, 3_000_000)))
    def wait(self, ns: int) -> None:
        pass_time(self.hypervisor, ns)
        self.model.wait(ns)

    @precondition(lambda self: self.model.waiting)
    @rule()
    def wait_for_all(self) -> None:
        pass_time(self.hypervisor, 10_000_000)
        self.model.wait(10_000_000)

    @invariant()
    def every_interrupt_is_where_it_must_be(self) -> None:
        model = self.model
        apic = self.hypervisor.irqs.apics.cpus[0]
        assert apic.irr == {VECTORS[name] for name in model.waiting}
        assert apic.isr == [VECTORS[str(name)] for name, _ in model.stack]
        assert [ready for _, _, ready in apic.pending_eoi] == [ready for _, ready in model.stack]
        for name, gsi in GSIS.items():
            rte, line = self.hypervisor.ioapic.rtes[gsi], self.hypervisor.ioapic.line(gsi)
            assert (bool(rte.irr), bool(rte.mask)) == (name in model.irr, model.pin_masked[name])
            if name not in LEVELS:
                assert line.lost == model.fate[name, "lost"]
                assert line.raised == line.sent + line.lost
            fates = model.fate[name, "taken"] + model.fate[name, "nobody"] + model.fate[name, "merged"]
            assert line.sent == fates + (name in model.waiting)
        for name, pirq in self.pirqs.items():
            desc = self.hypervisor.irqs.desc(self.domains[0].pirqs.irq(pirq))
            assert desc.vector == VECTORS[name]
            assert desc.count == model.fate[name, "taken"]
            for domain in self.domains:
                info = domain.pirqs.info(pirq)
                assert (info is not None and info.masked) == (domain.domid in model.owes[name])
        for (domid, name), port in self.ports.items():
            assert take(self.domains[domid], port) == ((domid, name) in model.events), (domid, name)
        for port in self.zombies.values():
            take(self.domains[1], port)  # what was pending when the line was taken away
        model.events.clear()
        # Two timers at the same time would fire in an order that means nothing.
        pass_time(self.hypervisor, 1)
        model.wait(1)


TestInterrupts = Interrupts.TestCase
TestInterrupts.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_the_model_is_asked_for_the_vectors_that_there_are() -> None:
    hypervisor, dom0 = host()
    for gsi in GSIS.values():
        bind_line(dom0, gsi)
    assert [hypervisor.irqs.desc(gsi).vector for gsi in GSIS.values()] == [VECTORS[name] for name in GSIS]
