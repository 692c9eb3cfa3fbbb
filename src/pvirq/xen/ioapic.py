"""The I/O APIC: where devices' interrupt lines come in (xen/arch/x86/io_apic.c, and the chip itself).

One of 24 pins. A pin is a GSI; ISA interrupt 0, the timer's, comes in at pin 2. An edge that comes while its pin is
masked is lost: none is remembered. A level is seen for as long as it is asserted: at unmask, and again after each EOI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.xen.irq import (
    FIRST_HIPRIORITY_VECTOR,
    IRQ0_VECTOR,
    IRQ_DISABLED,
    IRQ_GUEST,
    IRQ_PENDING,
    NO_IRQ_TYPE,
    NR_IRQS_GSI,
    NR_ISA_IRQS,
    VECTOR_UNASSIGNED,
    IrqDesc,
    IrqHandler,
    Irqs,
    XenAction,
)
from pvirq.xen.lapic import LocalApic

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor

IOAPIC_BASE: Final = 0xFEC00000
TIMER_PIN: Final = 2
SERIAL_IRQ: Final = 4
# Lines of the ISA range that the firmware says are level-triggered: the SCI and the PCI ones.
LEVEL_ISA_IRQS: Final = frozenset((5, 9, 10, 11))
VERSION: Final = 0x20

DELIVERY_LOWEST_PRIORITY: Final = 1


class Line:
    """One input. It is asserted while any device on it asserts it (wired OR), as PCI lines are.

    `raised` counts how often it went up, `sent` the interrupts that this made, `lost` the edges that found it masked.
    """

    __slots__ = ("_ioapic", "_sources", "gsi", "lost", "raised", "sent")

    def __init__(self, ioapic: IoApic, gsi: int) -> None:
        self.gsi = gsi
        self.raised = 0
        self.sent = 0
        self.lost = 0
        self._ioapic = ioapic
        self._sources: list[object] = []

    @property
    def asserted(self) -> bool:
        return bool(self._sources)

    def assert_(self, source: object) -> None:
        """`source`, a device, wants service. Again while it does already: nothing new."""
        sources = self._sources
        if not sources:
            sources.append(source)
            self._rise()
        elif not any(each is source for each in sources):
            sources.append(source)

    def deassert(self, source: object) -> None:
        """`source` has been served."""
        self._sources = [each for each in self._sources if each is not source]

    def pulse(self) -> None:
        """An edge of a device that doesn't hold its line. Nothing where another holds it."""
        if not self._sources:
            self.assert_(self)
            self.deassert(self)

    def _rise(self) -> None:
        self.raised += 1
        rte = self._ioapic.rtes[self.gsi]
        if not rte.mask:
            self._ioapic.send(rte)
        elif not rte.trigger:
            self.lost += 1


class RouteEntry:
    """A pin's redirection table entry (struct IO_APIC_route_entry): `trigger` 1 for level, `polarity` 1 for active
    low, `dest` the bitmap of CPUs, `irr` the vector by which a level was sent that awaits its EOI, else 0 (the chip has
    one bit, and takes the EOI of the vector in the entry; where Xen has changed that, it EOIs the pin itself)."""

    __slots__ = (
        "delivery_mode", "dest", "dest_mode", "irr", "line", "mask", "pin", "polarity", "reserved", "trigger", "vector",
    )  # fmt: skip

    def __init__(self, pin: int, line: Line) -> None:
        self.pin = pin
        self.line = line
        self.vector = 0
        self.delivery_mode = 0
        self.dest_mode = 0
        self.polarity = 0
        self.irr = 0
        self.trigger = 0
        self.mask = 1
        self.dest = 0
        self.reserved = 0  # bits 17 to 31, which hold what was written

    @property
    def low(self) -> int:
        """The first half as a register."""
        return (
            self.vector | self.delivery_mode << 8 | self.dest_mode << 11 | self.polarity << 13 | bool(self.irr) << 14
            | self.trigger << 15 | self.mask << 16 | self.reserved << 17
        )  # fmt: skip

    @property
    def high(self) -> int:
        return self.dest << 24


class _IoApicHandler(IrqHandler):
    """What edges and levels have in common."""

    def __init__(self, ioapic: IoApic) -> None:
        self.ioapic = ioapic
        self.irqs = ioapic.irqs

    def startup(self, desc: IrqDesc) -> None:
        self.ioapic.set_mask(desc, 0)

    def enable(self, desc: IrqDesc) -> None:
        self.ioapic.set_mask(desc, 0)

    def set_affinity(self, desc: IrqDesc, cpus: int) -> None:
        """set_ioapic_affinity_irq"""
        dest = self.irqs.set_desc_affinity(desc, cpus)
        rte = self.ioapic.rte_of(desc.irq)
        if dest and rte is not None:
            rte.dest = dest
            rte.vector = desc.vector


class EdgeHandler(_IoApicHandler):
    typename = "IO-APIC-edge"

    def ack(self, desc: IrqDesc, apic: LocalApic) -> None:
        """ack_edge_ioapic_irq: a line that nobody has is masked when it interrupts a second time."""
        self.irqs.move_native(desc)
        if desc.status & (IRQ_PENDING | IRQ_DISABLED) == IRQ_PENDING | IRQ_DISABLED:
            self.ioapic.set_mask(desc, 1)
        self.irqs.apics.eoi(apic)


class LevelHandler(_IoApicHandler):
    """The "new" ACK method: the line stays unmasked, and its EOI, without which it doesn't interrupt again, waits for
    the guests."""

    typename = "IO-APIC-level"
    has_end = True

    def shutdown(self, desc: IrqDesc) -> None:
        self.ioapic.set_mask(desc, 1)

    def disable(self, desc: IrqDesc) -> None:
        self.ioapic.set_mask(desc, 1)

    def end(self, desc: IrqDesc, apic: LocalApic) -> None:
        """end_level_ioapic_irq_new: a line that is still asserted has interrupted again, and can't move now."""
        self.irqs.apics.eoi(apic)
        rte = self.ioapic.rte_of(desc.irq)
        if rte is not None and not rte.irr:
            self.irqs.move_native(desc)


class IoApic:
    """The chip and its set-up. `Hypervisor.ioapic`; `line(gsi)` is where a device is wired to."""

    def __init__(self, hypervisor: Hypervisor, irqs: Irqs) -> None:
        self.hypervisor = hypervisor
        self.irqs = irqs
        self.lines = [Line(self, gsi) for gsi in range(NR_IRQS_GSI)]
        self.rtes = [RouteEntry(pin, self.lines[pin]) for pin in range(NR_IRQS_GSI)]
        self.edge = EdgeHandler(self)
        self.level = LevelHandler(self)
        self._awaiting: list[RouteEntry] = []  # those with `irr`
        self._pins: dict[int, int] = {}  # irq -> pin (irq_2_pin)
        self._programmed: set[int] = set()
        irqs.apics.on_eoi = self._eoi
        self._setup()

    def _setup(self) -> None:
        """As Xen leaves it when domain 0 starts (setup_IO_APIC_irqs, check_timer, and the serial console)."""
        irqs = self.irqs
        irqs.bind_vector(irqs.desc(0), IRQ0_VECTOR, 1)
        irqs.desc(0).affinity = 1
        irqs.bind_vector(irqs.desc(SERIAL_IRQ), FIRST_HIPRIORITY_VECTOR, irqs.all_cpus)
        for irq in range(NR_ISA_IRQS):
            if irq == TIMER_PIN:
                continue  # the 8259As' cascade
            desc = irqs.desc(irq)
            irqs.assign_vector(desc, 1)
            if irq != SERIAL_IRQ:
                desc.cpu_mask = 1  # no other CPU was up yet
            self._pins[irq] = TIMER_PIN if irq == 0 else irq
            trigger = int(irq in LEVEL_ISA_IRQS)
            desc.handler = self.level if trigger else self.edge
            self._write(self.rtes[self._pins[irq]], desc, trigger, polarity=0, mask=trigger)
        irqs.setup(2, XenAction("cascade", "arch/x86/i8259.c#no_action"))
        irqs.setup(0, XenAction("timer", "arch/x86/time.c#timer_interrupt"))
        irqs.setup(SERIAL_IRQ, XenAction("ns16550", "drivers/char/ns16550.c#ns16550_interrupt"))

    def line(self, gsi: int) -> Line:
        """The input of a GSI; IndexError for one that the chip has not."""
        return self.lines[gsi]

    def rte_of(self, irq: int) -> RouteEntry | None:
        pin = self._pins.get(irq)
        return None if pin is None else self.rtes[pin]

    @property
    def pins(self) -> list[tuple[int, int]]:
        """(irq, pin) of all interrupts that have a pin, by irq."""
        return sorted(self._pins.items())

    @staticmethod
    def pin_to_irq(pin: int) -> int:
        """apic_pin_2_gsi_irq"""
        return 0 if pin == TIMER_PIN else pin

    # -- the chip ------------------------------------------------------------------------------------------------------

    def send(self, rte: RouteEntry) -> None:
        """A message to a CPU for an unmasked pin; a level whose last one has not been EOI'd sends none."""
        if rte.trigger:
            if rte.irr:
                return
            rte.irr = rte.vector
            self._awaiting.append(rte)
        rte.line.sent += 1
        self.irqs.apics.request(rte.dest, rte.vector)

    def _eoi(self, vector: int) -> None:
        """A CPU has EOI'd `vector`: a level that is still asserted interrupts again at once."""
        if not self._awaiting:
            return
        for rte in [rte for rte in self._awaiting if rte.irr == vector]:
            rte.irr = 0
            self._awaiting.remove(rte)
            if not rte.mask and rte.line.asserted:
                self.send(rte)

    def set_mask(self, desc: IrqDesc, mask: int) -> None:
        rte = self.rte_of(desc.irq)
        if rte is not None:
            self._set_mask(rte, mask)

    def _set_mask(self, rte: RouteEntry, mask: int) -> None:
        was, rte.mask = rte.mask, mask
        if was and not mask and rte.trigger and rte.line.asserted:
            self.send(rte)

    def _write(
        self, rte: RouteEntry, desc: IrqDesc, trigger: int, polarity: int, mask: int, reserved: int = 0
    ) -> None:  # fmt: skip
        """A new entry for an interrupt; that of an edge forgets the remote IRR."""
        rte.vector = desc.vector
        rte.delivery_mode = DELIVERY_LOWEST_PRIORITY
        rte.dest_mode = 1
        rte.trigger = trigger
        rte.polarity = polarity
        rte.dest = desc.cpu_mask
        rte.reserved = reserved
        if not trigger and rte.irr:
            rte.irr = 0
            self._awaiting.remove(rte)
        rte.mask = 1
        self._set_mask(rte, mask)

    # -- what domain 0 may do ------------------------------------------------------------------------------------------

    def guest_read(self, base: int, register: int) -> int:
        """ioapic_guest_read. EINVAL: no I/O APIC there."""
        self._check_base(base)
        pin, half = divmod(register - 0x10, 2)
        if 0 <= pin < NR_IRQS_GSI:
            return self.rtes[pin].high if half else self.rtes[pin].low
        return VERSION | (NR_IRQS_GSI - 1) << 16 if register == 1 else 0

    def guest_write(self, caller: Domain, base: int, register: int, value: int) -> None:
        """Domain 0 sets a pin up; all it can choose is the trigger, the polarity and its pirq (ioapic_guest_write).

        Its "vector" is the pirq that the line becomes, unless the entry is masked. The mask bit itself isn't taken: an
        edge is unmasked, a level masked until it is bound. A line in use stays as it is. Raises EINVAL; what mapping
        the pirq refuses with. (Xen 4.17 reads beyond its table for a pin that the chip has not: EINVAL here.)
        """
        self._check_base(base)
        if register < 0x10 or register & 1:
            return
        pin = (register - 0x10) >> 1
        if (value >> 8 & 7) > DELIVERY_LOWEST_PRIORITY:
            self.irqs.log.append("ERROR: Attempt to write weird IOAPIC destination mode!")
            self.irqs.log.append(f"       APIC=0/{pin}, lo-reg={value:x}")
            raise XenError(Errno.EINVAL, "delivery mode")
        if pin >= NR_IRQS_GSI:
            raise XenError(Errno.EINVAL, f"no pin {pin}")
        dom0 = self.hypervisor.domains.get(0, caller)
        desc = self.irqs.desc(self.pin_to_irq(pin))
        masked = value >> 16 & 1
        pirq = value & 0xFF
        if not masked and pirq >= dom0.pirqs.nr_pirqs:
            raise XenError(Errno.EINVAL, f"no pirq {pirq}")
        if desc.action is not None:
            self._warn_in_use(pin, desc, value, -1 if masked else pirq)
            return
        if desc.vector == VECTOR_UNASSIGNED:
            self.irqs.assign_vector(desc)
            self._pins[desc.irq] = pin
            self.irqs.log.append(f"allocated vector {desc.vector:02x} for irq {desc.irq}")
        if not masked:
            dom0.pirqs.map(caller, pirq, desc.irq)
        trigger = value >> 15 & 1
        desc.handler = self.level if trigger else self.edge
        self._write(self.rtes[pin], desc, trigger, value >> 13 & 1, trigger, value >> 17)

    def _warn_in_use(self, pin: int, desc: IrqDesc, value: int, pirq: int) -> None:
        old = self.rtes[pin].low
        new = value & ~0xFFF | desc.vector & 0xFF | DELIVERY_LOWEST_PRIORITY << 8 | 1 << 11
        if new != old:
            self.irqs.log += (
                f"IO-APIC: apic=0, pin={pin}, irq={desc.irq}",
                f"IO-APIC: new_entry={new:08x}",
                f"IO-APIC: old_entry={old:08x} pirq={pirq}",
                "IO-APIC: Attempt to modify IO-APIC pin for in-use IRQ!",
            )

    def register_gsi(self, gsi: int, triggering: int, polarity: int) -> None:
        """Set a line up, once, while nobody uses it (mp_register_gsi, io_apic_set_pci_routing). EEXIST, ENOSPC.

        The line is masked until it is bound.
        """
        desc = self.irqs.desc(gsi)
        if not desc.status & IRQ_DISABLED and desc.handler is not NO_IRQ_TYPE:
            raise XenError(Errno.EEXIST, f"GSI {gsi} is in use")
        if gsi in self._programmed:
            raise XenError(Errno.EEXIST, f"GSI {gsi} was set up before")
        self._programmed.add(gsi)
        if gsi >= NR_ISA_IRQS:
            self._pins[gsi] = gsi
        self.irqs.assign_vector(desc)
        desc.handler = self.level if triggering == 1 else self.edge
        self._write(self.rtes[gsi], desc, triggering & 1, polarity & 1, mask=1)
        if not desc.status & (IRQ_DISABLED | IRQ_GUEST):
            desc.handler.startup(desc)

    @staticmethod
    def _check_base(base: int) -> None:
        if base != IOAPIC_BASE:
            raise XenError(Errno.EINVAL, f"no I/O APIC at {base:#x}")
