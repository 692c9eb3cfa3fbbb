"""How interrupt lines are opened, closed and handled (kernel/irq/chip.c, handle.c, resend.c, spurious.c).

Every count in /proc/interrupts is one pass through a flow handler here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pvirq.linux.irqdesc import (
    IRQ_DISABLE_UNLAZY,
    IRQ_HANDLED,
    IRQ_LEVEL,
    IRQ_NO_BALANCING,
    IRQ_NONE,
    IRQ_PER_CPU,
    IRQF_SHARED,
    IRQF_TIMER_BIT,
    IRQS_PENDING,
    IRQS_REPLAY,
    IRQS_SPURIOUS_DISABLED,
    IRQS_WAITING,
    IrqChip,
    IrqDesc,
    IrqDescs,
    IrqReturn,
)

# A line is given up when so many of the last IRQ_STORM handlings found no device that wanted it.
IRQ_STORM: Final = 100_000
IRQ_STORM_UNHANDLED: Final = 99_900

_NOT_FRESH: Final = ~(IRQS_REPLAY | IRQS_WAITING)


class IrqChips(IrqDescs):
    """Lines with chips and flow handlers."""

    _polling = False

    def set_chip_and_handler_name(
        self, desc: IrqDesc, chip: IrqChip, flow: Callable[[IrqDesc, int], None], name: str
    ) -> None:
        """Choose what the line is wired to and how its interrupts are handled."""
        desc.chip, desc.flow, desc.name = chip, flow, name

    def modify_status(self, irq: int, clear: int = 0, set: int = 0) -> None:
        """Change a line's IRQ_* settings (irq_modify_status)."""
        desc = self.desc(irq)
        status = desc.status = desc.status & ~clear | set
        desc.no_balancing = bool(status & IRQ_NO_BALANCING)
        desc.per_cpu = bool(status & IRQ_PER_CPU)
        desc.level = bool(status & IRQ_LEVEL)

    # Line states (chip.c).

    def irq_startup(self, desc: IrqDesc, *, resend: bool = True) -> None:
        """Unmask, then choose the CPU; so an event already pending comes at the CPU before.

        `resend`: replay what came while the line was closed.
        """
        desc.depth = 0
        if desc.started:
            self._irq_enable(desc)
        else:
            assert desc.chip is not None
            if desc.chip.irq_startup:
                desc.chip.irq_startup(desc)
                desc.disabled = desc.masked = False
            else:
                self._irq_enable(desc)
            desc.started = True
            self._setup_affinity(desc)
        if resend:
            self._check_resend(desc)

    def irq_shutdown(self, desc: IrqDesc) -> None:
        """The last handler has gone."""
        if not desc.started:
            return
        desc.depth = 1
        assert desc.chip is not None
        if desc.chip.irq_shutdown:
            desc.chip.irq_shutdown(desc)
            desc.disabled = desc.masked = True
        else:
            self._irq_disable(desc, lazy=False)
        desc.started = False

    def _irq_enable(self, desc: IrqDesc) -> None:
        if not desc.disabled:
            self.unmask_irq(desc)
            return
        desc.disabled = False
        assert desc.chip is not None
        if desc.chip.irq_enable:
            desc.chip.irq_enable(desc)
            desc.masked = False
        else:
            self.unmask_irq(desc)

    def _irq_disable(self, desc: IrqDesc, *, lazy: bool = True) -> None:
        """Without a function of its own the line stays open until the next interrupt finds it disabled."""
        if desc.disabled:
            if not lazy:
                self.mask_irq(desc)
            return
        desc.disabled = True
        assert desc.chip is not None
        if desc.chip.irq_disable:
            desc.chip.irq_disable(desc)
            desc.masked = True
        elif not lazy or desc.status & IRQ_DISABLE_UNLAZY:
            self.mask_irq(desc)

    def mask_irq(self, desc: IrqDesc) -> None:
        if not desc.masked:
            assert desc.chip is not None
            desc.chip.irq_mask(desc)
            desc.masked = True

    def unmask_irq(self, desc: IrqDesc) -> None:
        if desc.masked:
            assert desc.chip is not None
            desc.chip.irq_unmask(desc)
            desc.masked = False

    def _mask_ack_irq(self, desc: IrqDesc) -> None:
        assert desc.chip is not None
        if desc.chip.irq_mask_ack:
            desc.chip.irq_mask_ack(desc)
            desc.masked = True
        else:
            self.mask_irq(desc)
            desc.chip.irq_ack(desc)

    def _check_resend(self, desc: IrqDesc) -> None:
        """Replay an edge that came while the line was disabled (check_irq_resend)."""
        if desc.level:
            desc.istate &= ~IRQS_PENDING  # a level line comes again by itself
            return
        if desc.istate & IRQS_REPLAY or not desc.istate & IRQS_PENDING:
            return
        desc.istate &= ~IRQS_PENDING
        assert desc.chip is not None
        if desc.chip.irq_retrigger and desc.chip.irq_retrigger(desc):
            desc.istate |= IRQS_REPLAY

    # Where a line goes (manage.c, migration on hotplug).

    def can_set_affinity(self, desc: IrqDesc) -> bool:
        """May userland move it?"""
        return (
            self.smp
            and not desc.per_cpu
            and not desc.no_balancing
            and desc.chip is not None
            and desc.chip.irq_set_affinity is not None
        )

    def _setup_affinity(self, desc: IrqDesc) -> None:
        """Place a line that starts: where userland put it, else anywhere (irq_setup_affinity)."""
        if not self.can_set_affinity(desc):
            return
        mask = self.default_affinity
        if desc.affinity_set:
            if desc.affinity & self.online:
                mask = desc.affinity
            else:
                desc.affinity_set = False
        self._do_set_affinity(desc, mask & self.online or self.online)

    def _do_set_affinity(self, desc: IrqDesc, mask: int) -> None:
        assert desc.chip is not None
        assert desc.chip.irq_set_affinity is not None
        if desc.chip.irq_set_affinity(desc, mask & self.online or mask):
            desc.affinity = mask

    def migrate_off(self, cpu: int) -> None:
        """Move every line off a CPU that `online` has no more (irq_migrate_all_off_this_cpu)."""
        for desc in self.descs.values():
            if desc.per_cpu or not desc.started or not (desc.effective_affinity or desc.affinity) >> cpu & 1:
                continue
            if desc.chip is None or desc.chip.irq_set_affinity is None:
                continue
            mask = desc.affinity
            if not mask & self.online:
                mask = self.online
            self._do_set_affinity(desc, mask)

    # Flow handlers (chip.c, handle.c).

    def generic_handle_irq(self, irq: int) -> None:
        """An interrupt came on this line, at the CPU that executes now (do_IRQ's way in)."""
        desc = self.descs.get(irq)
        if desc is None:
            return
        if desc.flow is None:  # handle_bad_irq
            desc.kstat[self.cpu()] += 1
            self.printk(f"unexpected IRQ trap at vector {irq:02x}")
            return
        desc.flow(desc, self.cpu())

    def handle_edge_irq(self, desc: IrqDesc, cpu: int) -> None:
        """Acknowledge first, then handle, so that an edge in between is not lost."""
        chip = desc.chip
        assert chip is not None
        desc.istate &= _NOT_FRESH
        if desc.in_progress or desc.disabled or not desc.actions:
            desc.istate |= IRQS_PENDING
            self._mask_ack_irq(desc)
            return
        desc.kstat[cpu] += 1
        chip.irq_ack(desc)
        while True:
            actions = desc.actions
            if not actions:
                self.mask_irq(desc)
                return
            if desc.istate & IRQS_PENDING:
                if not desc.disabled:
                    self.unmask_irq(desc)
                desc.istate &= ~IRQS_PENDING
            # As `_handle_irq_event`, without its calls.
            desc.in_progress = True
            result = IRQ_NONE
            try:
                for action in actions:
                    if action.handler(desc.irq, action.dev_id):
                        result = IRQ_HANDLED
                if result is IRQ_NONE or desc.irqs_unhandled:
                    self._note_interrupt(desc, result)
            finally:
                desc.in_progress = False
            if not desc.istate & IRQS_PENDING or desc.disabled:
                return

    def handle_fasteoi_irq(self, desc: IrqDesc, cpu: int) -> None:
        """Level lines whose chip wants one EOI at the end."""
        assert desc.chip is not None
        assert desc.chip.irq_eoi is not None
        if desc.in_progress:
            desc.chip.irq_eoi(desc)
            return
        desc.istate &= _NOT_FRESH
        if not desc.actions or desc.disabled:
            desc.istate |= IRQS_PENDING
            self.mask_irq(desc)
            desc.chip.irq_eoi(desc)
            return
        desc.kstat[cpu] += 1
        self._handle_irq_event(desc)
        desc.chip.irq_eoi(desc)

    def handle_percpu_irq(self, desc: IrqDesc, cpu: int) -> None:
        """Lines that only ever come at one CPU: no state to keep."""
        assert desc.chip is not None
        desc.kstat[cpu] += 1
        desc.chip.irq_ack(desc)
        self._run_actions(desc)
        if desc.chip.irq_eoi:
            desc.chip.irq_eoi(desc)

    def _handle_irq_event(self, desc: IrqDesc) -> IrqReturn:
        desc.istate &= ~IRQS_PENDING
        desc.in_progress = True
        try:
            return self._run_actions(desc)
        finally:
            desc.in_progress = False

    def _run_actions(self, desc: IrqDesc) -> IrqReturn:
        result = IRQ_NONE
        for action in desc.actions:
            if action.handler(desc.irq, action.dev_id):
                result = IRQ_HANDLED
        if desc.irqs_unhandled or result is IRQ_NONE:
            self._note_interrupt(desc, result)
        return result

    # Lines that nobody cares for (spurious.c).

    def _note_interrupt(self, desc: IrqDesc, result: IrqReturn) -> None:
        if self._polling:
            return
        if result == IRQ_NONE:
            now = self.jiffies()
            # One now and then is the hardware's right; only what comes in a row counts.
            desc.irqs_unhandled = 1 if now > desc.last_unhandled + self.hz // 10 else desc.irqs_unhandled + 1
            desc.last_unhandled = now
        if not desc.irqs_unhandled:
            return
        desc.irq_count += 1
        if desc.irq_count < IRQ_STORM:
            return
        desc.irq_count = 0
        if desc.irqs_unhandled > IRQ_STORM_UNHANDLED:
            self.printk(f'irq {desc.irq}: nobody cared (try booting with the "irqpoll" option)')
            self.printk("handlers:\n" + "\n".join(action.name for action in desc.actions))
            self.printk(f"Disabling IRQ #{desc.irq}")
            desc.istate |= IRQS_SPURIOUS_DISABLED
            desc.depth += 1
            self._irq_disable(desc)
            self._poll_later()
        desc.irqs_unhandled = 0

    def _poll_later(self) -> None:
        if self.after is not None:
            self.after(max(self.hz // 10, 1), self._poll_spurious_irqs)

    def _poll_spurious_irqs(self) -> None:
        """Ask the handlers of given-up shared lines ten times a second: their devices may live from it."""
        stuck = [desc for desc in self.descs.values() if desc.istate & IRQS_SPURIOUS_DISABLED]
        for desc in stuck:
            flags = desc.actions[0].flags if desc.actions else 0
            if not flags & IRQF_SHARED or flags & IRQF_TIMER_BIT or desc.per_cpu or desc.in_progress:
                continue
            self._polling = True
            try:
                self._handle_irq_event(desc)
            finally:
                self._polling = False
        if stuck:
            self._poll_later()
