"""Linux's generic interrupt layer: what drivers and userland ask of lines (kernel/irq/manage.c of Linux 6.1).

It knows nothing of Xen. A personality (`pvirq.linux.pvops`) makes descriptors with its chips, whose functions
reach the event channels, and calls `generic_handle_irq` for each port that its upcall finds. Lines themselves are
in `irqdesc`, how they are opened and handled in `irq_chip`; who needs the layer imports it from here.
"""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.linux.irq_chip import IRQ_STORM, IRQ_STORM_UNHANDLED, IrqChips
from pvirq.linux.irqdesc import (
    IRQ_DISABLE_UNLAZY,
    IRQ_HANDLED,
    IRQ_LEVEL,
    IRQ_NO_BALANCING,
    IRQ_NOAUTOEN,
    IRQ_NONE,
    IRQ_NOPROBE,
    IRQ_NOREQUEST,
    IRQ_PER_CPU,
    IRQ_TYPE_LEVEL_MASK,
    IRQ_TYPE_NONE,
    IRQ_TYPE_SENSE_MASK,
    IRQF_COND_SUSPEND,
    IRQF_EARLY_RESUME,
    IRQF_FORCE_RESUME,
    IRQF_NO_AUTOEN,
    IRQF_NO_SUSPEND,
    IRQF_NOBALANCING,
    IRQF_ONESHOT,
    IRQF_PERCPU,
    IRQF_SHARED,
    IRQF_TIMER,
    IRQF_TIMER_BIT,
    IRQF_TRIGGER_MASK,
    IRQS_AUTODETECT,
    IRQS_PENDING,
    IRQS_REPLAY,
    IRQS_SPURIOUS_DISABLED,
    IRQS_SUSPENDED,
    IRQS_WAITING,
    MAX_IRQS,
    IrqAction,
    IrqChip,
    IrqDesc,
    IrqError,
    IrqHandler,
    IrqReturn,
)

__all__ = [
    "IRQF_COND_SUSPEND",
    "IRQF_EARLY_RESUME",
    "IRQF_FORCE_RESUME",
    "IRQF_NOBALANCING",
    "IRQF_NO_AUTOEN",
    "IRQF_NO_SUSPEND",
    "IRQF_ONESHOT",
    "IRQF_PERCPU",
    "IRQF_SHARED",
    "IRQF_TIMER",
    "IRQF_TIMER_BIT",
    "IRQF_TRIGGER_MASK",
    "IRQS_PENDING",
    "IRQS_REPLAY",
    "IRQS_SPURIOUS_DISABLED",
    "IRQ_HANDLED",
    "IRQ_NONE",
    "IRQ_STORM",
    "IRQ_STORM_UNHANDLED",
    "MAX_IRQS",
    "IrqAction",
    "IrqChip",
    "IrqDesc",
    "IrqError",
    "IrqHandler",
    "IrqLayer",
    "IrqReturn",
]


class IrqLayer(IrqChips):
    """All lines of one kernel, and what may be asked of them."""

    # Handlers.

    def request_irq(self, irq: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None) -> None:
        """Add a handler; the first one starts the line up (request_irq, __setup_irq).

        IrqError: EINVAL for a number without a line or one with IRQ_NOREQUEST, for a shared handler without
        `dev_id`, and for flags that exclude each other; ENOSYS for a line without a chip; EBUSY where the line is
        taken and the old and new flags don't allow sharing; what the chip refuses a trigger type with.
        """
        if flags & IRQF_SHARED and (dev_id is None or flags & IRQF_NO_AUTOEN):
            raise IrqError(Errno.EINVAL, f"{name}: a shared IRQ needs dev_id, and can't be IRQF_NO_AUTOEN")
        if flags & IRQF_COND_SUSPEND and (not flags & IRQF_SHARED or flags & IRQF_NO_SUSPEND):
            raise IrqError(Errno.EINVAL, f"{name}: IRQF_COND_SUSPEND is for shared lines that do suspend")
        desc = self.desc(irq)
        if desc.status & IRQ_NOREQUEST:
            raise IrqError(Errno.EINVAL, f"IRQ {irq} can't be requested")
        if desc.chip is None:
            raise IrqError(Errno.ENOSYS, f"IRQ {irq} has no chip")
        if not flags & IRQF_TRIGGER_MASK:
            flags |= desc.trigger or 0
        action = IrqAction(handler, flags, name, dev_id, self.proc_ready)
        if desc.actions:
            self._check_sharing(desc, action)
        else:
            if flags & IRQF_TRIGGER_MASK:
                self._set_trigger(desc, flags & IRQF_TRIGGER_MASK)
            desc.istate &= ~(IRQS_AUTODETECT | IRQS_SPURIOUS_DISABLED | IRQS_WAITING)
            desc.in_progress = False
            if flags & IRQF_PERCPU:
                desc.per_cpu = True
                desc.status |= IRQ_PER_CPU
            if flags & IRQF_NOBALANCING:
                desc.no_balancing = True
                desc.status |= IRQ_NO_BALANCING
            # Started before the action is in the list: what is pending already comes when interrupts are on
            # again.
            if flags & IRQF_NO_AUTOEN or desc.status & IRQ_NOAUTOEN:
                desc.depth = 1
            else:
                self.irq_startup(desc)
        desc.actions += (action,)
        desc.irq_count = desc.irqs_unhandled = 0
        if len(desc.actions) > 1 and desc.istate & IRQS_SPURIOUS_DISABLED:
            # Perhaps the newcomer is the one whose interrupts nobody cared for.
            desc.istate &= ~IRQS_SPURIOUS_DISABLED
            self.enable_irq(irq)

    def _check_sharing(self, desc: IrqDesc, new: IrqAction) -> None:
        old = desc.actions[0]
        if desc.trigger is None:  # the first to come later fixes what nobody has set
            desc.trigger = new.flags & IRQF_TRIGGER_MASK
        if (
            not old.flags & new.flags & IRQF_SHARED
            or desc.trigger != new.flags & IRQF_TRIGGER_MASK
            or (old.flags ^ new.flags) & (IRQF_ONESHOT | IRQF_PERCPU)
        ):
            self.printk(
                f"genirq: Flags mismatch irq {desc.irq}. {new.flags:08x} ({new.name}) vs. {old.flags:08x} ({old.name})"
            )
            raise IrqError(Errno.EBUSY, f"IRQ {desc.irq} is taken by {old.name}")

    def free_irq(self, irq: int, dev_id: object = None) -> None:
        """Take away the handler that was requested with `dev_id`; the last one shuts the line down."""
        desc = self.descs.get(irq)
        if desc is None:
            return
        action = next((action for action in desc.actions if action.dev_id == dev_id), None)
        if action is None:
            self.printk(f"Trying to free already-free IRQ {irq}")
            return
        desc.actions = tuple(other for other in desc.actions if other is not action)
        if not desc.actions:
            desc.status &= ~IRQ_DISABLE_UNLAZY
            self.irq_shutdown(desc)
        desc.affinity_hint = None

    # Open and closed.

    def disable_irq(self, irq: int) -> None:
        """Nested disable (disable_irq_nosync: with one thread of execution there is nothing to wait for)."""
        desc = self.desc(irq)
        if desc.depth == 0:
            self._irq_disable(desc)
        desc.depth += 1

    def enable_irq(self, irq: int) -> None:
        """Undo one disable; the outermost one opens the line and replays what came meanwhile.

        IrqError(EINVAL) for a number without a line, or one without a chip.
        """
        desc = self.desc(irq)
        if desc.chip is None:
            raise IrqError(Errno.EINVAL, f"IRQ {irq} has no chip")
        if desc.depth == 0 or (desc.depth == 1 and desc.istate & IRQS_SUSPENDED):
            self.printk(f"Unbalanced enable for IRQ {irq}")
        elif desc.depth == 1:
            desc.status |= IRQ_NOPROBE
            self.irq_startup(desc)
        else:
            desc.depth -= 1

    def set_irq_type(self, irq: int, kind: int) -> None:
        """Choose how a line is triggered, an IRQ_TYPE_* (irq_set_irq_type).

        Nothing happens on a chip that has no such choice, as Xen's. IrqError: EINVAL for a number without a line,
        and what the chip refuses with.
        """
        self._set_trigger(self.desc(irq), kind & IRQ_TYPE_SENSE_MASK)

    def _set_trigger(self, desc: IrqDesc, kind: int) -> None:
        if desc.chip is None or desc.chip.irq_set_type is None:
            return
        try:
            desc.chip.irq_set_type(desc, kind)
        except IrqError:
            self.printk(f"genirq: Setting trigger mode {kind} for irq {desc.irq} failed ({desc.chip.name})")
            raise
        desc.trigger = kind if kind != IRQ_TYPE_NONE else None
        desc.level = bool(kind & IRQ_TYPE_LEVEL_MASK)
        desc.status = desc.status & ~IRQ_LEVEL | (IRQ_LEVEL if desc.level else 0)

    # Where a line goes.

    def set_affinity(self, irq: int, mask: int) -> None:
        """Userland's write to /proc/irq/N/smp_affinity.

        IrqError: EINVAL where no CPU of the mask is online, EIO where the line can't be moved.
        """
        desc = self.desc(irq)
        if not self.can_set_affinity(desc):
            raise IrqError(Errno.EIO, f"IRQ {irq} can't be moved")
        if not mask & self.online:
            raise IrqError(Errno.EINVAL, "no CPU of the mask is online")
        self._do_set_affinity(desc, mask)
        desc.affinity_set = True

    def set_default_affinity(self, mask: int) -> None:
        """Userland's write to /proc/irq/default_smp_affinity: where lines go that start from now on.

        IrqError(EINVAL) where no CPU of the mask is online.
        """
        if not mask & self.online:
            raise IrqError(Errno.EINVAL, "no CPU of the mask is online")
        self.default_affinity = mask

    def set_affinity_hint(self, irq: int, mask: int | None) -> None:
        """A driver says where it would like its line, and moves it there if it can (irq_set_affinity_hint).

        IrqError(EINVAL) for a number without a line. A mask that can't be had only remains the hint.
        """
        desc = self.desc(irq)
        desc.affinity_hint = mask
        if mask is not None and desc.chip is not None and desc.chip.irq_set_affinity is not None:
            self._do_set_affinity(desc, mask)
            desc.affinity_set = True
