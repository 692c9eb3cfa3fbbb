"""The hypervisor's interrupts: a descriptor for each line and message, vectors, do_IRQ (xen/arch/x86/irq.c).

Guests' part in them is in `irq_guest`; the lines come in through `ioapic`, the messages through `msi`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.xen.lapic import LocalApic, LocalApics
from pvirq.xen.timer import Timer

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor
    from pvirq.xen.irq_guest import GuestAction
    from pvirq.xen.msi import MsiDesc, PciDevice

# IrqDesc.status
IRQ_INPROGRESS: Final = 1 << 0
IRQ_DISABLED: Final = 1 << 1
IRQ_PENDING: Final = 1 << 2
IRQ_REPLAY: Final = 1 << 3
IRQ_GUEST: Final = 1 << 4  # `action` is a GuestAction
IRQ_MOVE_PENDING: Final = 1 << 5

NR_IRQS_GSI: Final = 24  # one I/O APIC
NR_ISA_IRQS: Final = 16

FIRST_DYNAMIC_VECTOR: Final = 0x20
IRQ_MOVE_CLEANUP_VECTOR: Final = 0x22
FIRST_LEGACY_VECTOR: Final = 0x20  # the 8259A's, on CPU 0
LAST_LEGACY_VECTOR: Final = 0x2F
LEGACY_SYSCALL_VECTOR: Final = 0x80
HYPERCALL_VECTOR: Final = 0x82
LAST_DYNAMIC_VECTOR: Final = 0xEF
NR_DYNAMIC_VECTORS: Final = LAST_DYNAMIC_VECTOR - FIRST_DYNAMIC_VECTOR + 1
IRQ0_VECTOR: Final = 0xF0
FIRST_HIPRIORITY_VECTOR: Final = 0xF1
VECTOR_UNASSIGNED: Final = -1

RATELIMIT_THRESHOLD: Final = 10_000  # interrupts of a line in 10 ms
RATELIMIT_NS: Final = 10_000_000


class IrqHandler:
    """How a kind of interrupt is driven (hw_irq_controller). `has_end`: it needs an EOI after it was handled."""

    typename = "none"
    has_end = False

    def startup(self, desc: IrqDesc) -> None: ...

    def shutdown(self, desc: IrqDesc) -> None: ...

    def enable(self, desc: IrqDesc) -> None: ...

    def disable(self, desc: IrqDesc) -> None: ...

    def ack(self, desc: IrqDesc, apic: LocalApic) -> None: ...

    def end(self, desc: IrqDesc, apic: LocalApic) -> None: ...

    def set_affinity(self, desc: IrqDesc, cpus: int) -> None: ...


NO_IRQ_TYPE: Final = IrqHandler()


class XenAction:
    """A line that the hypervisor itself uses (struct irqaction): `symbol` is its function as the 'i' key prints it."""

    __slots__ = ("handler", "name", "symbol")

    def __init__(self, name: str, symbol: str, handler: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.symbol = symbol
        self.handler = handler


class IrqDesc:
    """One interrupt (struct irq_desc). `cpu_mask`: the CPUs that its vector is reserved on, `affinity`: those it is
    meant for, both as bitmaps. `count`: how often it was handed to guests or to Xen's own handler.
    """

    __slots__ = (
        "action", "affinity", "count", "cpu_mask", "creator", "handler", "irq", "msi_desc", "pending_mask", "rl_count",
        "rl_start", "status", "used", "vector",
    )  # fmt: skip

    def __init__(self, irq: int, cpus: int) -> None:
        self.irq = irq
        self.status = IRQ_DISABLED
        self.handler: IrqHandler = NO_IRQ_TYPE
        self.action: GuestAction | XenAction | None = None
        self.msi_desc: MsiDesc | None = None
        self.vector = VECTOR_UNASSIGNED
        self.cpu_mask = 0
        self.affinity = cpus
        self.pending_mask = 0
        self.used = False
        self.creator: Domain | None = None
        self.rl_count = 0
        self.rl_start = 0
        self.count = 0

    @property
    def guest_action(self) -> GuestAction | None:
        """The guests it is bound to (guest_action)."""
        return self.action if self.status & IRQ_GUEST else None  # type: ignore[return-value]


class Irqs:
    """The descriptors of a host, and the way of an interrupt through the hypervisor. `Hypervisor.irqs`.

    `log` collects what the hypervisor's console would have said.
    """

    def __init__(self, hypervisor: Hypervisor, cpus: int) -> None:
        self.hypervisor = hypervisor
        self.clock = hypervisor.clock
        self.nr_cpus = cpus
        self.all_cpus = (1 << cpus) - 1
        self.nr_irqs = max(cpus * NR_DYNAMIC_VECTORS, 8 * NR_IRQS_GSI)
        self.descs = [IrqDesc(irq, self.all_cpus) for irq in range(NR_IRQS_GSI)]
        self.log: list[str] = []
        self.max_guests = 32  # irq-max-guests=
        self.apics = LocalApics(cpus, self._do_irq)
        self._vector_irq: list[IrqDesc | None] = [None] * 256
        self._current_vector = FIRST_DYNAMIC_VECTOR
        self._current_offset = 0
        self._limited: list[IrqDesc] = []
        self._limit_timer: Timer | None = None
        self.bus: dict[int, PciDevice] = {}  # what is there, by sbdf
        self.pci: dict[int, PciDevice] = {}  # what Xen was told of
        from pvirq.xen.ioapic import IoApic  # these need the names above
        from pvirq.xen.msi import MaskableHandler, NonmaskableHandler

        self.msi_maskable = MaskableHandler(self)
        self.msi_nonmaskable = NonmaskableHandler(self)
        self.ioapic = IoApic(hypervisor, self)

    def desc(self, irq: int) -> IrqDesc:
        """The descriptor of an irq below `nr_irqs`; those of messages come to be when first used."""
        descs = self.descs
        while irq >= len(descs):
            descs.append(IrqDesc(len(descs), self.all_cpus))
        return descs[irq]

    # -- vectors -------------------------------------------------------------------------------------------------------

    def bind_vector(self, desc: IrqDesc, vector: int, cpu_mask: int) -> None:
        """A vector that Xen chose for a line of its own (bind_irq_vector)."""
        self._clear_vector(desc)
        desc.vector = vector
        desc.cpu_mask = cpu_mask
        desc.used = True
        self._vector_irq[vector] = desc

    def assign_vector(self, desc: IrqDesc, cpus: int | None = None) -> None:
        """Give an interrupt a vector on some of `cpus`, unless its own will do (_assign_irq_vector).

        XenError(ENOSPC) where none is free. An interrupt that moves gives up its old vector at once, where Xen keeps
        it until the first one has come by the new way.
        """
        wanted = self.all_cpus if cpus is None else cpus
        if desc.vector != VECTOR_UNASSIGNED and desc.cpu_mask & wanted:
            return
        vector, offset = self._current_vector, self._current_offset
        while True:
            vector += 8
            if vector > LAST_DYNAMIC_VECTOR:
                offset = (offset + 1) % 8
                vector = FIRST_DYNAMIC_VECTOR + offset
            if vector == self._current_vector:
                raise XenError(Errno.ENOSPC, "no vector is free")
            if self._vector_irq[vector] is None and not self._is_reserved(vector):
                break
        self._current_vector, self._current_offset = vector, offset
        self.bind_vector(desc, vector, self.all_cpus)

    @staticmethod
    def _is_reserved(vector: int) -> bool:
        return vector <= LAST_LEGACY_VECTOR or vector in (LEGACY_SYSCALL_VECTOR, HYPERCALL_VECTOR)

    def _clear_vector(self, desc: IrqDesc) -> None:
        if desc.vector != VECTOR_UNASSIGNED:
            self._vector_irq[desc.vector] = None
        desc.vector = VECTOR_UNASSIGNED
        desc.cpu_mask = 0
        desc.used = False

    def set_desc_affinity(self, desc: IrqDesc, cpus: int) -> int:
        """Aim an interrupt at `cpus`; the bitmap of CPUs that it goes to then, 0 where it can't (set_desc_affinity)."""
        if not cpus & self.all_cpus:
            return 0
        try:
            self.assign_vector(desc, cpus)
        except XenError:
            return 0
        desc.affinity = cpus
        return cpus & desc.cpu_mask & self.all_cpus

    def set_affinity(self, desc: IrqDesc, cpus: int) -> None:
        """Aim an interrupt at `cpus` from the next one on (irq_set_affinity)."""
        if desc.handler is not NO_IRQ_TYPE:
            desc.pending_mask = cpus
            desc.status |= IRQ_MOVE_PENDING

    def move_native(self, desc: IrqDesc) -> None:
        """Carry out a move that is pending (move_native_irq)."""
        if not desc.status & IRQ_MOVE_PENDING or desc.status & IRQ_DISABLED:
            return
        desc.handler.disable(desc)
        desc.status &= ~IRQ_MOVE_PENDING
        if desc.pending_mask & self.all_cpus:
            desc.handler.set_affinity(desc, desc.pending_mask)
        desc.pending_mask = 0
        desc.handler.enable(desc)

    # -- interrupts of messages ----------------------------------------------------------------------------------------

    def create(self, caller: Domain) -> int:
        """A free interrupt with a vector, which `caller` may use (create_irq). XenError(ENOSPC)."""
        for irq in range(NR_IRQS_GSI, self.nr_irqs):
            desc = self.desc(irq)
            if not desc.used:
                break
        else:
            raise XenError(Errno.ENOSPC, "no irq is free")
        self.assign_vector(desc)
        desc.affinity = self.all_cpus
        desc.status = IRQ_DISABLED
        desc.creator = caller
        caller.pirqs.permit(irq)
        return irq

    def destroy(self, irq: int) -> None:
        """Give back an interrupt of `create` (destroy_irq)."""
        desc = self.desc(irq)
        if desc.creator is not None:
            desc.creator.pirqs.deny(irq)
            desc.creator = None
        desc.status &= ~IRQ_GUEST
        desc.handler.shutdown(desc)
        desc.status |= IRQ_DISABLED
        desc.action = None
        desc.msi_desc = None
        desc.affinity = self.all_cpus
        desc.handler = NO_IRQ_TYPE
        self._clear_vector(desc)

    # -- Xen's own -----------------------------------------------------------------------------------------------------

    def setup(self, irq: int, action: XenAction) -> None:
        """Take a line for the hypervisor itself (setup_irq). XenError(EBUSY) where somebody has it."""
        desc = self.desc(irq)
        if desc.action is not None:
            raise XenError(Errno.EBUSY, f"irq {irq} is in use")
        desc.action = action
        desc.status &= ~IRQ_DISABLED
        desc.handler.startup(desc)

    # -- interrupts ----------------------------------------------------------------------------------------------------

    def _do_irq(self, apic: LocalApic, vector: int) -> None:
        """A CPU takes an interrupt (do_IRQ)."""
        desc = self._vector_irq[vector]
        if desc is None:
            # Its line moved to another vector while this one was under way.
            self.apics.eoi(apic)
            self.log.append(f"CPU{apic.cpu}: No irq handler for vector {vector:02x}")
            return
        handler = desc.handler
        handler.ack(desc, apic)
        status = desc.status
        if status & IRQ_GUEST:
            count = desc.rl_count
            desc.rl_count = count + 1
            if count >= RATELIMIT_THRESHOLD and self._is_limited(desc):
                if handler.has_end:
                    handler.end(desc, apic)
                return
            action: GuestAction = desc.action  # type: ignore[assignment]
            action.do_irq(apic, vector)
            return
        desc.status |= IRQ_PENDING
        # A line that nobody has: it stays pending, and an edge masks the line when it comes again (its ack).
        if not status & IRQ_DISABLED:
            desc.status &= ~IRQ_PENDING
            desc.count += 1
            assert isinstance(desc.action, XenAction)
            desc.action.handler()
        if handler.has_end:
            handler.end(desc, apic)

    def _is_limited(self, desc: IrqDesc) -> bool:
        """A line that interrupts too often is off for 10 ms."""
        now = self.clock.now()
        if now >= desc.rl_start + RATELIMIT_NS:
            desc.rl_count = 0
            desc.rl_start = now
            return False
        desc.handler.disable(desc)
        if desc not in self._limited:
            if not self._limited:
                self._limit_timer = self.clock.at(now + RATELIMIT_NS, self._end_limit)
            self._limited.append(desc)
        return True

    def _end_limit(self) -> None:
        limited, self._limited = self._limited, []
        for desc in limited:
            desc.handler.enable(desc)
