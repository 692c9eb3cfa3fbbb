"""The interrupt layer of Linux 2.6.27 to 2.6.34: flow handlers, lines made on demand (kernel/irq, CONFIG_SPARSE_IRQ).

What is new against 2.6.18: a line exists when somebody has made it (the first 16 always do); the two flows that
XenLinux uses; unhandled interrupts count only while they come in a row; lines that were given up are polled; userland's
choice of CPUs outlives free_irq.
"""

from __future__ import annotations

from typing import ClassVar, Final

from pvirq.abi.errno import Errno
from pvirq.linux.irq import (
    IRQ_HANDLED,
    IRQ_NONE,
    IRQF_NOBALANCING,
    IRQF_SHARED,
    IRQF_TIMER_BIT,
    IRQF_TRIGGER_MASK,
    IrqAction,
    IrqError,
    IrqReturn,
)
from pvirq.linux.irq26 import IRQ_STORM, IRQ_STORM_UNHANDLED, Entry, IrqDesc26, IrqLayer26, StatusBits

NR_IRQS_LEGACY: Final = 16


class Status2632(StatusBits):
    """irq_desc.status (include/linux/irq.h); bits 0 to 7 are the trigger type."""

    INPROGRESS: ClassVar[int] = 0x0000_0100
    DISABLED: ClassVar[int] = 0x0000_0200
    PENDING: ClassVar[int] = 0x0000_0400
    REPLAY: ClassVar[int] = 0x0000_0800
    AUTODETECT: ClassVar[int] = 0x0000_1000
    WAITING: ClassVar[int] = 0x0000_2000
    LEVEL: ClassVar[int] = 0x0000_4000
    MASKED: ClassVar[int] = 0x0000_8000
    PER_CPU: ClassVar[int] = 0x0001_0000
    NOPROBE: ClassVar[int] = 0x0002_0000
    NOREQUEST: ClassVar[int] = 0x0004_0000
    NOAUTOEN: ClassVar[int] = 0x0008_0000
    WAKEUP: ClassVar[int] = 0x0010_0000
    MOVE_PENDING: ClassVar[int] = 0x0020_0000
    NO_BALANCING: ClassVar[int] = 0x0040_0000
    SPURIOUS_DISABLED: ClassVar[int] = 0x0080_0000


INPROGRESS: Final = Status2632.INPROGRESS
DISABLED: Final = Status2632.DISABLED
NOT_IN_PROGRESS: Final = ~INPROGRESS
SEEN: Final = ~(Status2632.REPLAY | Status2632.WAITING)


class IrqLayer2632(IrqLayer26):
    """All lines of a 2.6.32 kernel for x86, as SUSE builds it for Xen."""

    bits: ClassVar[type[StatusBits]] = Status2632
    per_cpu_lines = True
    debug_shirq = False  # CONFIG_DEBUG_SHIRQ
    _not_resent = Status2632.LEVEL
    _polling = False

    def irq_to_desc(self, irq: int) -> IrqDesc26 | None:
        desc = self.descs.get(irq)
        if desc is None and 0 <= irq < NR_IRQS_LEGACY:
            return self.new_desc(irq)
        return desc

    def irq_to_desc_alloc(self, irq: int) -> IrqDesc26:
        """The line by number, made where it isn't there; IrqError(EINVAL) beyond nr_irqs."""
        if not 0 <= irq < self.nr_irqs:
            raise IrqError(Errno.EINVAL, f"IRQ {irq} >= nr_irqs {self.nr_irqs}")
        return self.descs.get(irq) or self.new_desc(irq)

    # Flow handlers (chip.c).

    def entry(self, cpu: int) -> Entry:
        """handle_irq."""
        descs = self.descs

        def handle_irq(irq: int) -> None:
            desc = descs.get(irq) or self.irq_to_desc(irq)
            if desc is None:
                self.printk(f"evtchn_do_upcall({cpu}): No handler for irq {irq}")
            else:
                desc.flow(desc, cpu)

        return handle_irq

    def handle_level_irq(self, desc: IrqDesc26, cpu: int) -> None:
        """Masked and acknowledged first, unmasked at the end; what comes while the line is disabled leaves it masked.

        The chips for it have both `mask_ack` and `unmask`.
        """
        chip = desc.chip
        chip.mask_ack(desc)  # type: ignore[misc]
        status = desc.status
        if status & INPROGRESS:
            return
        desc.kstat[cpu] += 1
        status &= SEEN
        actions = desc.actions
        if not actions or status & DISABLED:
            desc.status = status
            return
        desc.status = status | INPROGRESS
        irq, result = desc.irq, IRQ_NONE
        for action in actions:
            if action.handler(irq, action.dev_id):
                result = IRQ_HANDLED
        count = desc.irq_count = desc.irq_count + 1
        if result is IRQ_NONE or count >= IRQ_STORM:
            self._note_interrupt(desc, result)
        status = desc.status = desc.status & NOT_IN_PROGRESS
        if not status & DISABLED:
            chip.unmask(desc)  # type: ignore[misc]

    def handle_percpu_irq(self, desc: IrqDesc26, cpu: int) -> None:
        """Each CPU has its own instance: nothing to keep them apart."""
        desc.kstat[cpu] += 1
        chip = desc.chip
        chip.ack(desc)
        result = IRQ_NONE
        for action in desc.actions:
            if action.handler(desc.irq, action.dev_id):
                result = IRQ_HANDLED
        count = desc.irq_count = desc.irq_count + 1
        if result is IRQ_NONE or count >= IRQ_STORM:
            self._note_interrupt(desc, result)
        if chip.eoi is not None:
            chip.eoi(desc)

    # Spurious interrupts (spurious.c).

    def _note_interrupt(self, desc: IrqDesc26, result: IrqReturn) -> None:
        if result is IRQ_NONE and not self.ignore_unhandled(desc.irq):
            now = self.jiffies()
            # One now and then is the hardware's right; only what comes in a row counts.
            in_a_row = now <= desc.last_unhandled + self.hz // 10
            desc.irqs_unhandled = desc.irqs_unhandled + 1 if in_a_row else 1
            desc.last_unhandled = now
        if desc.irq_count < IRQ_STORM:
            return
        desc.irq_count = 0
        if desc.irqs_unhandled > IRQ_STORM_UNHANDLED:
            self.report_bad_irq(desc)
            desc.status |= DISABLED | Status2632.SPURIOUS_DISABLED
            desc.depth += 1
            desc.chip.disable(desc)
            self._poll_later()
        desc.irqs_unhandled = 0

    def _poll_later(self) -> None:
        if self.after is not None and not self._polling:
            self._polling = True
            self.after(max(self.hz // 10, 1), self._poll_spurious_irqs)

    def _poll_spurious_irqs(self) -> None:
        """Ask the handlers of given-up shared lines ten times a second: their devices may live from it."""
        self._polling = False
        stuck = [desc for desc in self.descs.values() if desc.status & Status2632.SPURIOUS_DISABLED]
        for desc in stuck:
            if not desc.status & INPROGRESS:
                desc.status |= INPROGRESS
                for action in desc.actions:
                    if action.flags & IRQF_SHARED and not action.flags & IRQF_TIMER_BIT:
                        action.handler(desc.irq, action.dev_id)
                desc.status &= ~INPROGRESS
        if stuck:
            self._poll_later()

    # What request_irq adds (manage.c).

    def _set_trigger(self, desc: IrqDesc26, new: IrqAction) -> None:
        trigger = new.flags & IRQF_TRIGGER_MASK
        if desc.chip.set_type is None:
            return
        try:
            desc.chip.set_type(desc, trigger)
        except IrqError:
            self.printk(f"setting trigger mode {trigger} for irq {desc.irq} failed ({desc.chip.name})")
            raise

    def _prepare(self, desc: IrqDesc26, new: IrqAction) -> None:
        desc.status &= ~Status2632.SPURIOUS_DISABLED
        if new.flags & IRQF_NOBALANCING:
            desc.status |= Status2632.NO_BALANCING

    def _shared(self, desc: IrqDesc26) -> None:
        if desc.status & Status2632.SPURIOUS_DISABLED:  # perhaps the newcomer is the one who cares
            desc.status &= ~Status2632.SPURIOUS_DISABLED
            self._enable(desc)

    def _setup_affinity(self, desc: IrqDesc26, new: IrqAction) -> None:
        if desc.status & Status2632.PER_CPU or desc.chip.set_affinity is None:
            return
        if desc.affinity_set or desc.status & Status2632.NO_BALANCING:
            if desc.affinity & self.online:
                desc.chip.set_affinity(desc, desc.affinity)
                return
            desc.affinity_set = False
        desc.chip.set_affinity(desc, self.online & self.default_affinity)

    # Affinity.

    def set_affinity(self, irq: int, mask: int) -> None:
        desc = self.desc(irq)
        if desc.chip.set_affinity is None or desc.status & (Status2632.PER_CPU | Status2632.NO_BALANCING):
            raise IrqError(Errno.EIO, f"IRQ {irq} can't be moved")
        if not mask & self.online:
            raise IrqError(Errno.EINVAL, "no CPU of the mask is online")
        desc.status |= Status2632.MOVE_PENDING
        desc.move_irq, desc.pending_mask, desc.affinity_set = True, mask, True

    def set_default_affinity(self, mask: int) -> None:
        """A write to /proc/irq/default_smp_affinity. IrqError(EINVAL) where no CPU of the mask is online."""
        if not mask & self.online:
            raise IrqError(Errno.EINVAL, "no CPU of the mask is online")
        self.default_affinity = mask

    def move_native_irq(self, desc: IrqDesc26) -> None:
        if desc.status & DISABLED:
            return
        chip = desc.chip
        if chip.mask is not None:
            chip.mask(desc)
        desc.status &= ~Status2632.MOVE_PENDING
        desc.move_irq = False
        mask, desc.pending_mask = desc.pending_mask, 0
        if chip.set_affinity is not None and mask & self.online:
            chip.set_affinity(desc, mask)
            desc.affinity = mask  # what userland asked for, not where it went
        if chip.unmask is not None:
            chip.unmask(desc)
