"""Interrupt lines and what hangs on them: descriptors, chips, actions (kernel/irq/irqdesc.c, include/linux/irq.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Protocol

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

# How a line is triggered (IRQ_TYPE_*, the same numbers as IRQF_TRIGGER_*).
IRQ_TYPE_NONE: Final = 0
IRQ_TYPE_EDGE_RISING: Final = 1
IRQ_TYPE_EDGE_FALLING: Final = 2
IRQ_TYPE_LEVEL_HIGH: Final = 4
IRQ_TYPE_LEVEL_LOW: Final = 8
IRQ_TYPE_LEVEL_MASK: Final = IRQ_TYPE_LEVEL_HIGH | IRQ_TYPE_LEVEL_LOW
IRQ_TYPE_SENSE_MASK: Final = 0x0F
IRQ_TYPE_PROBE: Final = 0x10

# Settings of a line, desc->status_use_accessors (IRQ_*); changed by `IrqLayer.modify_status`.
IRQ_LEVEL: Final = 1 << 8
IRQ_PER_CPU: Final = 1 << 9
IRQ_NOPROBE: Final = 1 << 10
IRQ_NOREQUEST: Final = 1 << 11
IRQ_NOAUTOEN: Final = 1 << 12
IRQ_NO_BALANCING: Final = 1 << 13
IRQ_DISABLE_UNLAZY: Final = 1 << 19

# desc->istate.
IRQS_AUTODETECT: Final = 0x01
IRQS_SPURIOUS_DISABLED: Final = 0x02
IRQS_REPLAY: Final = 0x40
IRQS_WAITING: Final = 0x80
IRQS_PENDING: Final = 0x200
IRQS_SUSPENDED: Final = 0x800

MAX_IRQS: Final = 524_544 + 8196  # NR_IRQS of 8192 CPUs, and what IRQ_BITMAP_BITS has beyond it


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
    # Takes an IRQ_TYPE_*; IrqError where the line can't be triggered so.
    irq_set_type: Callable[[IrqDesc, int], None] | None = None


@dataclass(eq=False, slots=True)
class IrqAction:
    """struct irqaction: one handler on a line. `has_dir`: /proc/irq/N has a directory of its name."""

    handler: IrqHandler
    flags: int
    name: str
    dev_id: Any  # what is given back to the handler
    has_dir: bool = True


@dataclass(eq=False, slots=True)
class IrqDesc:
    """struct irq_desc with its irq_data: one interrupt line.

    `depth` counts nested disables (1 from the start: not yet enabled); `disabled`, `masked`, `started`,
    `in_progress`, `per_cpu`, `no_balancing` and `level` are the IRQD_* state, `status` the IRQ_* settings;
    `affinity` and `effective_affinity` are CPU masks, as in /proc/irq/N/smp_affinity and effective_affinity.
    `trigger` is the IRQ_TYPE_*, None while nobody has set one.
    """

    irq: int
    kstat: list[int]
    affinity: int
    chip: IrqChip | None = None
    flow: Callable[[IrqDesc, int], None] | None = None  # of the line and the CPU
    name: str | None = None
    chip_data: Any = None  # the chip's own: an IrqInfo, where it is an event channel's
    actions: tuple[IrqAction, ...] = ()
    depth: int = 1
    istate: int = 0
    status: int = 0
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
    node: int = -1  # NUMA_NO_NODE
    affinity_hint: int | None = None  # where the driver would like it
    irq_count: int = 0
    irqs_unhandled: int = 0
    last_unhandled: int = 0


class AllocDesc(Protocol):
    """`IrqDescs.do_alloc_desc`, or what stands in front of it."""

    def __call__(self, at: int | None = None) -> IrqDesc: ...


class IrqDescs:
    """All lines of one kernel, by number.

    `alloc_desc` is `do_alloc_desc`, unless something has been put in front of it (`pvirq.xen.probes.put`).
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
        """`cpu()` is the CPU that executes now, `jiffies()` the tick count of `hz` per second.

        `printk` takes the kernel's messages. `after(jiffies, callback)` runs a callback later; it drives the
        polling of lines that were given up, and without it there is none. Numbers handed out freely start at
        `dynirq_base` (arch_dynirq_lower_bound); `nr_irqs` grows. `smp` False is a kernel built without
        CONFIG_SMP: lines are never spread over CPUs.
        """
        self.alloc_desc: AllocDesc = self.do_alloc_desc
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
        self.proc_ready = True  # False early at boot, when there is no /proc/irq for a handler's directory
        self.default_affinity = (1 << nr_cpus) - 1  # irq_default_affinity
        self.descs: dict[int, IrqDesc] = {}
        self._lowest = dynirq_base  # no dynamic number below this is free

    def desc(self, irq: int) -> IrqDesc:
        """The line by number; IrqError(EINVAL) where there is none."""
        desc = self.descs.get(irq)
        if desc is None:
            raise IrqError(Errno.EINVAL, f"no IRQ {irq}")
        return desc

    def do_alloc_desc(self, at: int | None = None) -> IrqDesc:
        """Make a line with number `at`, or the lowest free one.

        IrqError(EEXIST), or ENOSPC without a free number.
        """
        if at is None:
            at = self.alloc_range(1)
        elif at in self.descs:
            raise IrqError(Errno.EEXIST, f"IRQ {at} exists")
        if not 0 <= at < MAX_IRQS:
            raise IrqError(Errno.ENOSPC, "no free IRQ number")
        self.nr_irqs = max(self.nr_irqs, at + 1)  # irq_expand_nr_irqs
        desc = self.descs[at] = IrqDesc(at, [0] * self.nr_cpus, self.default_affinity)
        return desc

    def alloc_range(self, count: int) -> int:
        """The lowest number with which `count` free ones in a row begin; nothing is taken yet."""
        while self._lowest in self.descs:
            self._lowest += 1
        first = self._lowest
        for number in range(first, MAX_IRQS + count):
            if number in self.descs:
                first = number + 1
            elif number - first + 1 == count:
                break
        return first

    def free_desc(self, irq: int) -> None:
        """Drop a line; its number may be given out again, its counts are gone."""
        if self.descs.pop(irq, None) is not None and irq >= self.dynirq_base:
            self._lowest = min(self._lowest, irq)
