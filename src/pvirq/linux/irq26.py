"""Linux 2.6's generic interrupt layer (kernel/irq of 2.6.18 to 2.6.34): what its versions have in common.

The versions differ in how an interrupt runs (`irq2618`, `irq2632`), in the numbers of the status bits, and in what
they forgive. None knows of Xen: a personality gives lines their chips and calls `entry(cpu)`'s function for each port
that its upcall finds. Lines come into being when somebody first looks at them; a kernel has hundreds that nobody does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pvirq.abi.errno import Errno
from pvirq.linux.irq import IRQF_PERCPU, IRQF_SHARED, IRQF_TRIGGER_MASK, IrqAction, IrqError, IrqHandler
from pvirq.linux.kthread import Body

# Flags of request_irq that only these versions have (include/linux/interrupt.h).
IRQF_DISABLED: Final = 0x20
IRQF_SAMPLE_RANDOM: Final = 0x40
IRQF_PROBE_SHARED: Final = 0x100

IRQ_TYPE_PROBE: Final = 0x10
PROBE_LINES: Final = 32  # probe_irq_on tells of the first 32 lines

# A line is given up when so many of the last IRQ_STORM interrupts found no device that wanted them.
IRQ_STORM: Final = 100_000
IRQ_STORM_UNHANDLED: Final = 99_900

Op = Callable[["IrqDesc26"], None]
Entry = Callable[[int], None]
"""do_IRQ at one CPU: takes the line's number."""


class StatusBits:
    """irq_desc.status; each version has numbers of its own."""

    INPROGRESS: ClassVar[int]
    DISABLED: ClassVar[int]
    PENDING: ClassVar[int]
    REPLAY: ClassVar[int]
    AUTODETECT: ClassVar[int]
    WAITING: ClassVar[int]
    LEVEL: ClassVar[int]
    MASKED: ClassVar[int]
    PER_CPU: ClassVar[int]
    NOPROBE: ClassVar[int]
    NOREQUEST: ClassVar[int]
    NOAUTOEN: ClassVar[int]


def _nothing(desc: IrqDesc26) -> None:
    pass


def _started(desc: IrqDesc26) -> int:
    return 0


@dataclass(eq=False, slots=True)
class IrqChip26:
    """struct irq_chip (once struct hw_interrupt_type): how one kind of line is driven.

    `mask`, `unmask`, `eoi` and `end` are of different flows and may be missing, as in the kernel. `set_affinity` takes
    a mask of CPUs; `retrigger` returns whether it could; `set_type` raises IrqError(EINVAL) for what it can't.
    """

    name: str
    startup: Callable[[IrqDesc26], int] = _started
    shutdown: Op = _nothing
    enable: Op = _nothing
    disable: Op = _nothing
    ack: Op = _nothing
    mask: Op | None = None
    unmask: Op | None = None
    mask_ack: Op | None = None
    eoi: Op | None = None
    end: Op = _nothing
    set_affinity: Callable[[IrqDesc26, int], None] | None = None
    retrigger: Callable[[IrqDesc26], bool] | None = None
    set_type: Callable[[IrqDesc26, int], None] | None = None


@dataclass(eq=False, slots=True)
class IrqDesc26:
    """struct irq_desc: one interrupt line. `depth` counts nested disables, 1 from the start."""

    irq: int
    kstat: list[int]
    affinity: int
    status: int
    chip: IrqChip26
    flow: Callable[[IrqDesc26, int], None]
    name: str | None = None
    chip_data: Any = None  # the chip's own
    actions: tuple[IrqAction, ...] = ()
    depth: int = 1
    irq_count: int = 0
    irqs_unhandled: int = 0
    last_unhandled: int = 0
    move_irq: bool = False  # pending_mask waits for the line's next interrupt
    pending_mask: int = 0
    affinity_set: bool = False  # by userland (from 2.6.30 on)


class IrqLayer26(ABC):
    """All lines of one kernel.

    `cpu()` is the CPU that executes now, `jiffies()` the tick count of `hz` per second. `err_count` and `mis_count` are
    the ERR and MIS of /proc/interrupts. `ignore_unhandled(irq)`: XenLinux asks Xen whether another domain shares the
    line, whose interrupts then are nobody's fault (irq_ignore_unhandled). `init_desc` sets up a line that is made.
    """

    bits: ClassVar[type[StatusBits]]
    per_cpu_lines: ClassVar[bool]  # CONFIG_IRQ_PER_CPU
    debug_shirq: ClassVar[bool]  # does it complain of handlers that can't share?

    def __init__(
        self,
        nr_cpus: int,
        nr_irqs: int,
        *,
        cpu: Callable[[], int],
        jiffies: Callable[[], int],
        hz: int,
        printk: Callable[[str], None],
        after: Callable[[int, Callable[[], None]], object] | None = None,
    ) -> None:
        """`after(jiffies, callback)` runs a callback later; without it given-up lines are not polled."""
        self.nr_cpus = nr_cpus
        self.nr_irqs = nr_irqs
        self.cpu = cpu
        self.jiffies = jiffies
        self.hz = hz
        self.printk = printk
        self.after = after
        self.online = 0  # mask of CPUs
        self.default_affinity = (1 << nr_cpus) - 1
        self.err_count = 0
        self.mis_count = 0
        self.descs: dict[int, IrqDesc26] = {}
        self.ignore_unhandled: Callable[[int], bool] = lambda irq: False
        self.no_irq_chip = IrqChip26("none", ack=self._ack_bad)
        self.init_desc: Op = _nothing

    def _ack_bad(self, desc: IrqDesc26) -> None:
        self.printk(f"unexpected IRQ trap at vector {desc.irq:02x}")

    # Lines.

    @abstractmethod
    def irq_to_desc(self, irq: int) -> IrqDesc26 | None:
        """The line by number; None where this kernel has none."""

    def new_desc(self, irq: int) -> IrqDesc26:
        """Make line `irq`: disabled, to be handled by CPU 0, with the chip that `init_desc` gives it."""
        desc = IrqDesc26(irq, [0] * self.nr_cpus, 1, self.bits.DISABLED, self.no_irq_chip, self.handle_bad_irq)
        self.descs[irq] = desc
        self.init_desc(desc)
        return desc

    def desc(self, irq: int) -> IrqDesc26:
        """The line by number; IrqError(EINVAL) where there is none."""
        desc = self.irq_to_desc(irq)
        if desc is None:
            raise IrqError(Errno.EINVAL, f"no IRQ {irq}")
        return desc

    @abstractmethod
    def entry(self, cpu: int) -> Entry:
        """The function that an upcall at `cpu` calls with the number of the line whose interrupt has come."""

    def handle_bad_irq(self, desc: IrqDesc26, cpu: int) -> None:
        """An interrupt on a line that nobody has set up."""
        desc.kstat[cpu] += 1
        self._ack_bad(desc)

    # Actions (manage.c).

    def request_irq(self, irq: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None) -> None:
        """Add a handler; the first one starts the line up.

        IrqError: EINVAL without such a line, for one that can't be requested, and for a shared handler without
        `dev_id`; further `setup_irq`'s.
        """
        if flags & IRQF_SHARED and dev_id is None:
            raise IrqError(Errno.EINVAL, f"{name}: a shared IRQ needs dev_id")
        desc = self.desc(irq)
        if desc.status & self.bits.NOREQUEST:
            raise IrqError(Errno.EINVAL, f"IRQ {irq} can't be requested")
        self.setup_irq(desc, IrqAction(handler, flags, name, dev_id))

    def setup_irq(self, desc: IrqDesc26, new: IrqAction) -> None:
        """IrqError: ENOSYS for a line without a chip, EBUSY where old and new handlers don't agree to share."""
        if desc.chip is self.no_irq_chip:
            raise IrqError(Errno.ENOSYS, f"IRQ {desc.irq} has no chip")
        if desc.actions:
            self._check_sharing(desc, desc.actions[0], new)
            desc.actions += (new,)
            desc.irq_count = desc.irqs_unhandled = 0
            self._shared(desc)
            return
        bits = self.bits
        if new.flags & IRQF_TRIGGER_MASK:
            self._set_trigger(desc, new)
        desc.actions = (new,)  # before the line starts: a pirq looks whether it is being probed
        if self.per_cpu_lines and new.flags & IRQF_PERCPU:
            desc.status |= bits.PER_CPU
        desc.status &= ~(bits.AUTODETECT | bits.WAITING | bits.INPROGRESS)
        self._prepare(desc, new)
        if desc.status & bits.NOAUTOEN:
            desc.depth = 1
        else:
            desc.depth = 0
            desc.status &= ~bits.DISABLED
            desc.chip.startup(desc)
        self._setup_affinity(desc, new)
        desc.irq_count = desc.irqs_unhandled = 0

    def _check_sharing(self, desc: IrqDesc26, old: IrqAction, new: IrqAction) -> None:
        if (
            old.flags & new.flags & IRQF_SHARED
            and not (old.flags ^ new.flags) & IRQF_TRIGGER_MASK
            and not (self.per_cpu_lines and (old.flags ^ new.flags) & IRQF_PERCPU)
        ):
            return
        if self.debug_shirq and not new.flags & IRQF_PROBE_SHARED:
            self.printk(f"IRQ handler type mismatch for IRQ {desc.irq}")
        raise IrqError(Errno.EBUSY, f"IRQ {desc.irq} is taken by {old.name}")

    @abstractmethod
    def _set_trigger(self, desc: IrqDesc26, new: IrqAction) -> None:
        """The first handler wants a trigger type."""

    def _prepare(self, desc: IrqDesc26, new: IrqAction) -> None:  # noqa: B027 - not every version has something to do
        """A line gets its first handler: what a version still resets."""

    def _shared(self, desc: IrqDesc26) -> None:  # noqa: B027
        """A line got one handler more."""

    def _setup_affinity(self, desc: IrqDesc26, new: IrqAction) -> None:  # noqa: B027
        """A line has started: place it."""

    def free_irq(self, irq: int, dev_id: object = None) -> None:
        """Take away the handler that was requested with `dev_id`; the last one shuts the line down."""
        desc = self.irq_to_desc(irq)
        if desc is None:
            return
        action = next((action for action in desc.actions if action.dev_id == dev_id), None)
        if action is None:
            self.printk(f"Trying to free already-free IRQ {irq}")
            return
        desc.actions = tuple(other for other in desc.actions if other is not action)
        if not desc.actions:
            desc.status |= self.bits.DISABLED
            desc.chip.shutdown(desc)

    def disable_irq(self, irq: int) -> None:
        """Nested disable; nothing happens without such a line."""
        desc = self.irq_to_desc(irq)
        if desc is None:
            return
        if not desc.depth:
            desc.status |= self.bits.DISABLED
            desc.chip.disable(desc)
        desc.depth += 1

    def enable_irq(self, irq: int) -> None:
        """Undo one disable; the outermost one opens the line and replays what came meanwhile."""
        desc = self.irq_to_desc(irq)
        if desc is not None:
            self._enable(desc)

    def _enable(self, desc: IrqDesc26) -> None:
        if desc.depth == 0:
            self.printk(f"Unbalanced enable for IRQ {desc.irq}")
            return
        if desc.depth == 1:
            desc.status = desc.status & ~self.bits.DISABLED | self.bits.NOPROBE
            self._check_resend(desc)
        desc.depth -= 1

    def _check_resend(self, desc: IrqDesc26) -> None:
        """Open the line, and replay an edge that came while it was closed (check_irq_resend)."""
        bits, status = self.bits, desc.status
        desc.chip.enable(desc)
        if status & (self._not_resent | bits.PENDING | bits.REPLAY) == bits.PENDING:
            desc.status = status & ~bits.PENDING | bits.REPLAY
            if desc.chip.retrigger is not None:
                desc.chip.retrigger(desc)

    _not_resent: ClassVar[int] = 0  # status bits of lines whose interrupts come again by themselves

    # Affinity.

    @abstractmethod
    def set_affinity(self, irq: int, mask: int) -> None:
        """A write to /proc/irq/N/smp_affinity; the line moves at its next interrupt.

        IrqError: EIO where the line can't be moved, EINVAL where no CPU of the mask is online.
        """

    @abstractmethod
    def move_native_irq(self, desc: IrqDesc26) -> None:
        """A chip's ack calls this where `desc.move_irq`: now is the time to move the line."""

    # Probing (autoprobe.c).

    def _probe_lines(self) -> list[IrqDesc26]:
        lines = [self.irq_to_desc(irq) for irq in range(self.nr_irqs - 1, 0, -1)]
        return [line for line in lines if line and not line.actions and not line.status & self.bits.NOPROBE]

    def probe_irq_on(self, msleep: Callable[[int], Body[None]]) -> Body[int]:
        """Begin to look for the line of a device whose driver doesn't know it; for a thread (`yield from`).

        All unused lines are opened. Returns a mask of those of the first 32 that are quiet. Then let the device
        interrupt and call `probe_irq_off`.
        """
        bits = self.bits
        for line in self._probe_lines():
            if line.chip.set_type is not None:
                line.chip.set_type(line, IRQ_TYPE_PROBE)
            line.chip.startup(line)
        yield from msleep(20)  # an interrupt from long ago comes now
        for line in self._probe_lines():
            line.status |= bits.AUTODETECT | bits.WAITING
            if line.chip.startup(line):
                line.status |= bits.PENDING
        yield from msleep(100)
        mask = 0
        for line in self._autodetected():
            if not line.status & bits.WAITING:  # it came by itself: not the device we look for
                line.status &= ~bits.AUTODETECT
                line.chip.shutdown(line)
            elif line.irq < PROBE_LINES:
                mask |= 1 << line.irq
        return mask

    def _autodetected(self) -> list[IrqDesc26]:
        return [self.descs[irq] for irq in sorted(self.descs) if self.descs[irq].status & self.bits.AUTODETECT]

    def probe_irq_off(self) -> int:
        """End it: the line that has interrupted meanwhile; 0 without one; minus the first where several have."""
        found = []
        for line in self._autodetected():
            if not line.status & self.bits.WAITING:
                found.append(line.irq)
            line.status &= ~self.bits.AUTODETECT
            line.chip.shutdown(line)
        if len(found) > 1:
            return -found[0]
        return found[0] if found else 0

    # Lines that nobody cares for (spurious.c).

    def report_bad_irq(self, desc: IrqDesc26) -> None:
        """The stack dump that the kernel prints between is left out."""
        self.printk(f'irq {desc.irq}: nobody cared (try booting with the "irqpoll" option)')
        self.printk("handlers:")
        for action in desc.actions:
            self.printk(f"({action.name})")
        self.printk(f"Disabling IRQ #{desc.irq}")
