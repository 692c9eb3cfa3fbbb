"""Linux 2.6.18's interrupt layer: one flow for every line, __do_IRQ (kernel/irq/handle.c, spurious.c, migration.c).

There is an array of NR_IRQS lines, all of which exist. A line that is disabled, or whose handler still runs, remembers
that one more interrupt came (PENDING); a second one is lost.
"""

from __future__ import annotations

from typing import ClassVar, Final

from pvirq.abi.errno import Errno
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IrqAction, IrqError
from pvirq.linux.irq26 import IRQ_STORM, IRQ_STORM_UNHANDLED, Entry, IrqDesc26, IrqLayer26, StatusBits


class Status2618(StatusBits):
    """irq_desc.status (include/linux/irq.h); bits 0 to 15 are left to IRQF_*."""

    INPROGRESS: ClassVar[int] = 0x0001_0000
    DISABLED: ClassVar[int] = 0x0002_0000
    PENDING: ClassVar[int] = 0x0004_0000
    REPLAY: ClassVar[int] = 0x0008_0000
    AUTODETECT: ClassVar[int] = 0x0010_0000
    WAITING: ClassVar[int] = 0x0020_0000
    LEVEL: ClassVar[int] = 0x0040_0000
    MASKED: ClassVar[int] = 0x0080_0000
    PER_CPU: ClassVar[int] = 0x0100_0000
    NOPROBE: ClassVar[int] = 0x0200_0000
    NOREQUEST: ClassVar[int] = 0x0400_0000
    NOAUTOEN: ClassVar[int] = 0x0800_0000
    DELAYED_DISABLE: ClassVar[int] = 0x1000_0000


INPROGRESS: Final = Status2618.INPROGRESS
DISABLED: Final = Status2618.DISABLED
PENDING: Final = Status2618.PENDING
NOT_PENDING: Final = ~PENDING
NOT_IN_PROGRESS: Final = ~INPROGRESS
DISABLED_OR_IN_PROGRESS: Final = DISABLED | INPROGRESS
SEEN: Final = ~(Status2618.REPLAY | Status2618.WAITING)


class IrqLayer2618(IrqLayer26):
    """All lines of a 2.6.18 kernel for x86."""

    bits: ClassVar[type[StatusBits]] = Status2618
    per_cpu_lines = False
    debug_shirq = True

    def irq_to_desc(self, irq: int) -> IrqDesc26 | None:
        desc = self.descs.get(irq)
        if desc is None and 0 <= irq < self.nr_irqs:
            return self.new_desc(irq)
        return desc

    def entry(self, cpu: int) -> Entry:
        """do_IRQ and __do_IRQ."""
        descs = self.descs

        def do_irq(irq: int) -> None:
            desc = descs.get(irq) or self.new_desc(irq)
            desc.kstat[cpu] += 1
            chip = desc.chip
            chip.ack(desc)
            status = desc.status & SEEN
            if status & DISABLED_OR_IN_PROGRESS:
                desc.status = status | PENDING
                chip.end(desc)
                return
            desc.status = status & NOT_PENDING | INPROGRESS
            actions = desc.actions
            if not actions:  # IN PROGRESS from now on, until somebody requests it
                chip.end(desc)
                return
            while True:
                result = IRQ_NONE
                for action in actions:
                    if action.handler(irq, action.dev_id):
                        result = IRQ_HANDLED
                count = desc.irq_count = desc.irq_count + 1
                if result is IRQ_NONE or count >= IRQ_STORM:
                    self._note_interrupt(desc, result is not IRQ_NONE)
                status = desc.status
                if not status & PENDING:
                    break
                desc.status = status & NOT_PENDING
            desc.status = status & NOT_IN_PROGRESS
            chip.end(desc)

        return do_irq

    def _note_interrupt(self, desc: IrqDesc26, handled: bool) -> None:
        """Any 99,900 unhandled ones of 100,000, be it over weeks, are the end of a line."""
        if not handled and not self.ignore_unhandled(desc.irq):
            desc.irqs_unhandled += 1
        if desc.irq_count < IRQ_STORM:
            return
        desc.irq_count = 0
        if desc.irqs_unhandled > IRQ_STORM_UNHANDLED:
            self.report_bad_irq(desc)
            desc.status |= DISABLED
            desc.depth = 1
            desc.chip.disable(desc)
        desc.irqs_unhandled = 0

    def _set_trigger(self, desc: IrqDesc26, new: IrqAction) -> None:
        if desc.chip.set_type is None:
            self.printk(f"No IRQF_TRIGGER set_type function for IRQ {desc.irq} ({desc.chip.name})")

    def set_affinity(self, irq: int, mask: int) -> None:
        desc = self.desc(irq)
        if desc.chip.set_affinity is None:
            raise IrqError(Errno.EIO, f"IRQ {irq} can't be moved")
        if not mask & self.online:
            raise IrqError(Errno.EINVAL, "no CPU of the mask is online")
        desc.move_irq, desc.pending_mask = True, mask

    def move_native_irq(self, desc: IrqDesc26) -> None:
        desc.move_irq = False
        mask, desc.pending_mask = desc.pending_mask & self.online, 0
        if not mask or desc.chip.set_affinity is None:
            return
        enabled = not desc.status & DISABLED
        if enabled:
            desc.chip.disable(desc)
        desc.chip.set_affinity(desc, mask)
        if enabled:
            desc.chip.enable(desc)
