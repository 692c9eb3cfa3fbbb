"""Linux's generic interrupt layer: descriptors, actions, flow handlers (kernel/irq of Linux 6.1).

It knows nothing of Xen. A personality (`pvirq.linux.pvops`) makes descriptors with its chips, whose functions
reach the event channels, and calls `generic_handle_irq` for each port that its upcall finds. Every count in
/proc/interrupts is one pass through a flow handler here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pvirq.abi.errno import Errno

# Flags of request_irq (include/linux/interrupt.h).
IRQF_TRIGGER_MASK: Final = 0x0F
IRQF_SHARED: Final = 0x80
IRQF_TIMER: Final = 0x200 | 0x4000 | 0x10000  # __IRQF_TIMER | NO_SUSPEND | NO_THREAD
IRQF_TIMER_BIT: Final = 0x200
IRQF_PERCPU: Final = 0x400
IRQF_NOBALANCING: Final = 0x800
IRQF_ONESHOT: Final = 0x2000
IRQF_NO_SUSPEND: Final = 0x4000
IRQF_FORCE_RESUME: Final = 0x8000
IRQF_EARLY_RESUME: Final = 0x20000
IRQF_COND_SUSPEND: Final = 0x40000
IRQF_NO_AUTOEN: Final = 0x80000

# desc->istate.
IRQS_SPURIOUS_DISABLED: Final = 0x02
IRQS_REPLAY: Final = 0x40
IRQS_PENDING: Final = 0x200

MAX_IRQS: Final = 524_544 + 8196  # NR_IRQS of 8192 CPUs, and what IRQ_BITMAP_BITS has beyond it

# A line is given up when so many of the last IRQ_STORM handlings found no device that wanted it.
IRQ_STORM: Final = 100_000
IRQ_STORM_UNHANDLED: Final = 99_900


class IrqReturn(IntEnum):
    """What a handler says (irqreturn_t)."""

    IRQ_NONE = 0
    IRQ_HANDLED = 1


IRQ_NONE: Final = IrqReturn.IRQ_NONE
IRQ_HANDLED: Final = IrqReturn.IRQ_HANDLED

IrqHandler = Callable[[int, object], IrqReturn]


class IrqError(Exception):
    """An operation failed as Linux fails it; `errno` is what the caller would have got."""

    def __init__(self, errno: int, why: str = "") -> None:
        self.errno = Errno(errno)
        self.why = why
        super().__init__(self.errno.name + (f": {why}" if why else ""))


@dataclass(frozen=True)
class IrqChip:
    """struct irq_chip: how one kind of line is masked and acknowledged.

    None where the chip has no such function.
    """

    name: str
    irq_ack: Callable[[IrqDesc], None]
    irq_mask: Callable[[IrqDesc], None]
    irq_unmask: Callable[[IrqDesc], None]
    irq_mask_ack: Callable[[IrqDesc], None] | None = None
    irq_disable: Callable[[IrqDesc], None] | None = None
    irq_enable: Callable[[IrqDesc], None] | None = None
    irq_startup: Callable[[IrqDesc], None] | None = None
    irq_shutdown: Callable[[IrqDesc], None] | None = None
    irq_eoi: Callable[[IrqDesc], None] | None = None
    # Takes a mask of online CPUs and moves the line to one of them; False: it can't be moved.
    irq_set_affinity: Callable[[IrqDesc, int], bool] | None = None
    irq_retrigger: Callable[[IrqDesc], bool] | None = None


@dataclass(eq=False, slots=True)
class IrqAction:
    """struct irqaction: one handler on a line."""

    handler: IrqHandler
    flags: int
    name: str
    dev_id: object


@dataclass(eq=False, slots=True)
class IrqDesc:
    """struct irq_desc with its irq_data: one interrupt line.

    `depth` counts nested disables (1 from the start: not yet enabled); `disabled`, `masked`, `started`,
    `in_progress` and `per_cpu` are the IRQD_* state; `affinity` and `effective_affinity` are CPU masks, as in
    /proc/irq/N/smp_affinity and effective_affinity.
    """

    irq: int
    kstat: list[int]
    affinity: int
    chip: IrqChip | None = None
    flow: Callable[[IrqDesc], None] | None = None
    name: str | None = None
    chip_data: object = None
    actions: tuple[IrqAction, ...] = ()
    depth: int = 1
    istate: int = 0
    disabled: bool = True
    masked: bool = True
    started: bool = False
    in_progress: bool = False
    per_cpu: bool = False
    no_balancing: bool = False
    affinity_set: bool = False  # by userland, through /proc/irq/N/smp_affinity
    level: bool = False
    trigger: int | None = None
    effective_affinity: int = 0
    irq_count: int = 0
    irqs_unhandled: int = 0
    last_unhandled: int = 0


class IrqLayer:
    """All lines of one kernel.

    `cpu()` is the CPU that executes now, `jiffies()` the tick count of `hz` per second, `printk` takes the
    kernel's messages. `after(jiffies, callback)` runs a callback later; it drives the polling of lines that
    were given up, and without it there is none.
    """

    def __init__(
        self,
        nr_cpus: int,
        *,
        cpu: Callable[[], int],
        jiffies: Callable[[], int],
        hz: int,
        printk: Callable[[str], None],
        after: Callable[[int, Callable[[], None]], object] | None = None,
        dynirq_base: int = 0,
        nr_irqs: int = 512,
        smp: bool = True,
    ) -> None:
        """Numbers handed out freely start at `dynirq_base` (arch_dynirq_lower_bound); `nr_irqs` grows.

        `smp` False is a kernel built without CONFIG_SMP: lines are never spread over CPUs.
        """
        self.nr_cpus = nr_cpus
        self.cpu = cpu
        self.jiffies = jiffies
        self.hz = hz
        self.printk = printk
        self.after = after
        self.dynirq_base = dynirq_base
        self.nr_irqs = nr_irqs
        self.smp = smp
        self.online = 0  # mask of CPUs
        self.default_affinity = (1 << nr_cpus) - 1
        self.descs: dict[int, IrqDesc] = {}
        self._lowest = dynirq_base  # no dynamic number below this is free
        self._polling = False

    # Descriptors (irqdesc.c).

    def desc(self, irq: int) -> IrqDesc:
        """The line by number; IrqError(EINVAL) where there is none."""
        desc = self.descs.get(irq)
        if desc is None:
            raise IrqError(Errno.EINVAL, f"no IRQ {irq}")
        return desc

    def alloc_desc(self, at: int | None = None) -> IrqDesc:
        """Make a line with number `at`, or the lowest free one.

        IrqError(EEXIST), or ENOSPC without a free number.
        """
        if at is None:
            while self._lowest in self.descs:
                self._lowest += 1
            at = self._lowest
        elif at in self.descs:
            raise IrqError(Errno.EEXIST, f"IRQ {at} exists")
        if not 0 <= at < MAX_IRQS:
            raise IrqError(Errno.ENOSPC, "no free IRQ number")
        self.nr_irqs = max(self.nr_irqs, at + 1)  # irq_expand_nr_irqs
        desc = self.descs[at] = IrqDesc(at, [0] * self.nr_cpus, self.default_affinity)
        return desc

    def free_desc(self, irq: int) -> None:
        """Drop a line; its number may be given out again, its counts are gone."""
        if self.descs.pop(irq, None) is not None and irq >= self.dynirq_base:
            self._lowest = min(self._lowest, irq)

    def set_chip_and_handler_name(
        self, desc: IrqDesc, chip: IrqChip, flow: Callable[[IrqDesc], None], name: str
    ) -> None:
        """Choose what the line is wired to and how its interrupts are handled."""
        desc.chip, desc.flow, desc.name = chip, flow, name
        desc.level = flow == self.handle_fasteoi_irq

    # Actions (manage.c).

    def request_irq(self, irq: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None) -> None:
        """Add a handler; the first one starts the line up (request_irq, __setup_irq).

        IrqError: EINVAL for a number without a line, for a shared handler without `dev_id`, and for flags
        that exclude each other; ENOSYS for a line without a chip; EBUSY where the line is taken and the old
        and new flags don't allow sharing.
        """
        if flags & IRQF_SHARED and (dev_id is None or flags & IRQF_NO_AUTOEN):
            raise IrqError(Errno.EINVAL, f"{name}: a shared IRQ needs dev_id, and can't be IRQF_NO_AUTOEN")
        if flags & IRQF_COND_SUSPEND and (not flags & IRQF_SHARED or flags & IRQF_NO_SUSPEND):
            raise IrqError(Errno.EINVAL, f"{name}: IRQF_COND_SUSPEND is for shared lines that do suspend")
        desc = self.desc(irq)
        if desc.chip is None:
            raise IrqError(Errno.ENOSYS, f"IRQ {irq} has no chip")
        action = IrqAction(handler, flags, name, dev_id)
        if desc.actions:
            self._check_sharing(desc, action)
        else:
            desc.istate &= ~IRQS_SPURIOUS_DISABLED
            desc.in_progress = False
            if flags & IRQF_PERCPU:
                desc.per_cpu = True
            if flags & IRQF_NOBALANCING:
                desc.no_balancing = True
            # Started before the action is in the list: what is pending already comes when interrupts are on
            # again.
            if flags & IRQF_NO_AUTOEN:
                desc.depth = 1
            else:
                self._startup(desc)
        desc.actions += (action,)
        desc.irq_count = desc.irqs_unhandled = 0
        if len(desc.actions) > 1 and desc.istate & IRQS_SPURIOUS_DISABLED:
            # Perhaps the newcomer is the one whose interrupts nobody cared for.
            desc.istate &= ~IRQS_SPURIOUS_DISABLED
            self.enable_irq(irq)

    def _check_sharing(self, desc: IrqDesc, new: IrqAction) -> None:
        old = desc.actions[0]
        # Our chips have no trigger type to set, so it's the first to come later that fixes the line's.
        if desc.trigger is None:
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
            self._shutdown(desc)

    def disable_irq(self, irq: int) -> None:
        """Nested disable (disable_irq_nosync: with one thread of execution there is nothing to wait for)."""
        desc = self.desc(irq)
        if desc.depth == 0:
            self._irq_disable(desc)
        desc.depth += 1

    def enable_irq(self, irq: int) -> None:
        """Undo one disable; the outermost one opens the line and replays what came meanwhile."""
        desc = self.desc(irq)
        if desc.depth == 0:
            self.printk(f"Unbalanced enable for IRQ {irq}")
        elif desc.depth == 1:
            self._startup(desc)
        else:
            desc.depth -= 1

    def set_affinity(self, irq: int, mask: int) -> None:
        """Userland's write to /proc/irq/N/smp_affinity.

        IrqError: EINVAL where no CPU of the mask is online, EIO where the line can't be moved.
        """
        desc = self.desc(irq)
        if not self._can_set_affinity(desc):
            raise IrqError(Errno.EIO, f"IRQ {irq} can't be moved")
        if not mask & self.online:
            raise IrqError(Errno.EINVAL, "no CPU of the mask is online")
        self._do_set_affinity(desc, mask)
        desc.affinity_set = True

    def _can_set_affinity(self, desc: IrqDesc) -> bool:
        return (
            self.smp
            and not desc.per_cpu
            and not desc.no_balancing
            and desc.chip is not None
            and desc.chip.irq_set_affinity is not None
        )

    def _setup_affinity(self, desc: IrqDesc) -> None:
        """Place a line that starts: where userland put it, else anywhere (irq_setup_affinity)."""
        if not self._can_set_affinity(desc):
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

    # Line states (chip.c).

    def _startup(self, desc: IrqDesc) -> None:
        """irq_startup: unmask, then choose the CPU; so an event already pending comes at the CPU before."""
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
        self._check_resend(desc)

    def _shutdown(self, desc: IrqDesc) -> None:
        if not desc.started:
            return
        desc.depth = 1
        assert desc.chip is not None
        if desc.chip.irq_shutdown:
            desc.chip.irq_shutdown(desc)
            desc.disabled = desc.masked = True
        else:
            self._irq_disable(desc)
            self.mask_irq(desc)
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

    def _irq_disable(self, desc: IrqDesc) -> None:
        if desc.disabled:
            return
        desc.disabled = True
        assert desc.chip is not None
        # Without a function of its own the line stays open until the next interrupt finds it disabled.
        if desc.chip.irq_disable:
            desc.chip.irq_disable(desc)
            desc.masked = True

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
        if desc.level or desc.istate & IRQS_REPLAY or not desc.istate & IRQS_PENDING:
            return
        desc.istate &= ~IRQS_PENDING
        assert desc.chip is not None
        if desc.chip.irq_retrigger and desc.chip.irq_retrigger(desc):
            desc.istate |= IRQS_REPLAY

    # Flow handlers (chip.c, handle.c).

    def generic_handle_irq(self, irq: int) -> None:
        """An interrupt came on this line, at the CPU that executes now (do_IRQ's way in)."""
        desc = self.descs.get(irq)
        if desc is None:
            return
        if desc.flow is None:
            desc.kstat[self.cpu()] += 1
            self.printk(f"unexpected IRQ trap at vector {irq:02x}")
            return
        desc.flow(desc)

    def handle_edge_irq(self, desc: IrqDesc) -> None:
        """Acknowledge first, then handle, so that an edge in between is not lost."""
        chip = desc.chip
        assert chip is not None
        desc.istate &= ~IRQS_REPLAY
        if desc.in_progress or desc.disabled or not desc.actions:
            desc.istate |= IRQS_PENDING
            self._mask_ack_irq(desc)
            return
        desc.kstat[self.cpu()] += 1
        chip.irq_ack(desc)
        while True:
            if not desc.actions:
                self.mask_irq(desc)
                return
            if desc.istate & IRQS_PENDING and not desc.disabled:
                self.unmask_irq(desc)
            self._handle_irq_event(desc)
            if not desc.istate & IRQS_PENDING or desc.disabled:
                return

    def handle_fasteoi_irq(self, desc: IrqDesc) -> None:
        """Level lines whose chip wants one EOI at the end."""
        assert desc.chip is not None
        assert desc.chip.irq_eoi is not None
        if desc.in_progress:
            desc.chip.irq_eoi(desc)
            return
        desc.istate &= ~IRQS_REPLAY
        if not desc.actions or desc.disabled:
            desc.istate |= IRQS_PENDING
            self.mask_irq(desc)
            desc.chip.irq_eoi(desc)
            return
        desc.kstat[self.cpu()] += 1
        self._handle_irq_event(desc)
        desc.chip.irq_eoi(desc)

    def handle_percpu_irq(self, desc: IrqDesc) -> None:
        """Lines that only ever come at one CPU: no state to keep."""
        assert desc.chip is not None
        desc.kstat[self.cpu()] += 1
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
