"""What the parsers give: typed, unchangeable, each with its place in the input."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pvirq.inspect.source import Where

Counts: TypeAlias = npt.NDArray[np.uint64]

XEN_CHIPS: Final = ("xen-dyn-lateeoi", "xen-dyn", "xen-pirq", "xen-percpu")


@dataclass(frozen=True, eq=False)
class IrqRow:
    """A row of /proc/interrupts.

    `irq` is None for the rows with letters (NMI, LOC, IPI0), whose `text` is their description. `counts` has a number
    for each of the table's CPUs, or fewer where the row has fewer. `chip`, `hwirq`, `trigger`, `flow` and `actions`
    are "" or () where the kernel doesn't print them.
    """

    where: Where
    label: str
    irq: int | None
    counts: Counts
    text: str
    chip: str = ""
    hwirq: str = ""
    trigger: str = ""
    flow: str = ""
    actions: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IrqRow) and self._key() == other._key() and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return (self.where, self.label, self.text, self.chip, self.hwirq, self.trigger, self.flow, self.actions)

    @cached_property
    def total(self) -> int:
        """All CPUs together."""
        return int(self.counts.sum())

    @property
    def name(self) -> str:
        """The handlers, or what the row says in their place."""
        return ", ".join(self.actions) if self.actions else self.text if self.irq is None else ""

    @property
    def per_cpu(self) -> bool:
        """A line of one CPU alone, which can't be moved."""
        return self.chip in ("xen-percpu", "Dynamic") and (self.chip != "Dynamic" or self.flow == "percpu")


@dataclass(frozen=True)
class Interrupts:
    """A /proc/interrupts. `cpus` are the numbers in its heading; `hint` what its surroundings say of whose it is.

    `hint` is a domain's number, "domU" (a guest), a name, or "".
    """

    where: Where
    cpus: tuple[int, ...]
    rows: tuple[IrqRow, ...]
    hint: str = ""

    @cached_property
    def by_irq(self) -> dict[int, IrqRow]:
        return {row.irq: row for row in self.rows if row.irq is not None}

    def count(self, row: IrqRow, cpu: int) -> int:
        """A row's count on a CPU; 0 where the row or the table has none."""
        try:
            return int(row.counts[self.cpus.index(cpu)])
        except (ValueError, IndexError):
            return 0


class Kind(StrEnum):
    """What an event channel is (EVTCHNSTAT_*, ECS_*)."""

    UNBOUND = "unbound"
    INTERDOMAIN = "interdomain"
    PIRQ = "pirq"
    VIRQ = "virq"
    IPI = "ipi"
    RESERVED = "reserved"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Channel:
    """An event channel as `lsevtchn` or the 'e' key prints it. What only the other one has is None.

    `remote` is the other domain, `remote_port` its port; `irq` Xen's number of a physical interrupt; `state` what the
    ABI says of the port ("-", a link, 0 or 1); `consumer` is not 0 for Xen's own.
    """

    where: Where
    port: int
    vcpu: int
    kind: Kind
    remote: int | None = None
    remote_port: int | None = None
    pirq: int | None = None
    virq: int | None = None
    irq: int | None = None
    pending: bool | None = None
    masked: bool | None = None
    state: str = ""
    consumer: int = 0


@dataclass(frozen=True)
class ChannelList:
    """A domain's event channels. `domid` is known of the 'e' key's; `hint` as `Interrupts`'. `polling`: vCPUs."""

    where: Where
    source: str  # lsevtchn or debug-e
    channels: tuple[Channel, ...]
    domid: int | None = None
    hint: str = ""
    polling: tuple[int, ...] = ()

    @cached_property
    def by_port(self) -> dict[int, Channel]:
        return {channel.port: channel for channel in self.channels}


@dataclass(frozen=True, slots=True)
class IrqGuest:
    """A domain on one of Xen's interrupts. `flags` as printed: P pending, M masked."""

    domid: int
    pirq: int
    flags: str

    @property
    def pending(self) -> bool:
        return "P" in self.flags

    @property
    def masked(self) -> bool:
        return "M" in self.flags


@dataclass(frozen=True, slots=True)
class XenIrq:
    """An interrupt as the 'i' key prints it. `affinity` and `effective` are lists of CPUs as text."""

    where: Where
    irq: int
    vector: int
    type: str
    status: int
    affinity: str
    effective: str
    in_flight: int | None
    guests: tuple[IrqGuest, ...]
    handler: str  # Xen's own function, "mapped, unbound", or ""


@dataclass(frozen=True, slots=True)
class IoapicPin:
    """An I/O APIC pin of the 'i' key's. `entry` is the redirection entry: (name, value) pairs."""

    where: Where
    irq: int
    vector: int
    apic: int
    pin: int
    entry: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class DirectVector:
    """A vector of Xen's own of the 'i' key's."""

    where: Where
    vector: int
    function: str


@dataclass(frozen=True, slots=True)
class VcpuInfo:
    """A vCPU as the 'q' key prints it. `poll` is the port that it polls for, 0 none, -1 several."""

    where: Where
    vcpu: int
    cpu: int
    running: bool
    poll: int
    upcall_pending: int
    upcall_masked: int
    pause_count: int | None = None
    pause_flags: int | None = None


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain as the 'q' key prints it. `other`: lines of it that say nothing of interrupts."""

    where: Where
    domid: int
    dying: int | None = None
    pause_count: int | None = None
    handle: str = ""
    vcpus: tuple[VcpuInfo, ...] = ()
    other: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class XlDomain:
    """A row of `xl list`. `memory` in MiB; `state` as printed, such as "-b----"."""

    where: Where
    name: str
    domid: int
    memory: int
    vcpus: int
    state: str
    seconds: float


@dataclass(frozen=True, slots=True)
class XlVcpu:
    """A row of `xl vcpu-list`. `cpu` None: "-", it isn't online. `affinity` as printed."""

    where: Where
    name: str
    domid: int
    vcpu: int
    cpu: int | None
    state: str
    seconds: float
    affinity: str


@dataclass(frozen=True, slots=True)
class StoreNode:
    """A node of xenstore. `value` as printed; `perms` "" where they weren't."""

    where: Where
    path: str
    value: str
    perms: str = ""


@dataclass(frozen=True, slots=True)
class IrqFile:
    """A file of /proc/irq/N. `hint` as `Interrupts`'."""

    where: Where
    irq: int
    name: str
    value: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class XenbusCounter:
    """A number of a split-driver device (sysfs, DEVICE/xenbus/NAME). `hint` as `Interrupts`'."""

    where: Where
    device: str
    name: str
    value: int
    hint: str = ""


@dataclass(frozen=True, slots=True)
class IrqLimit:
    """What a kernel's log says of its interrupt lines: how many it began with room for."""

    where: Where
    nr_irqs: int


@dataclass(frozen=True, slots=True)
class Unread:
    """Lines that no parser took: `first` to `last` of a file. `text` is as much of them as is kept, `reason` why."""

    file: str
    first: int
    last: int
    text: str
    reason: str = "not understood"

    def __str__(self) -> str:
        lines = f"{self.first}-{self.last}" if self.last > self.first else f"{self.first}"
        where = f"{self.file}:{lines}" if self.first else self.file
        return f"{where}: {self.reason}" + (f": {self.text.splitlines()[0]}" if self.text else "")


@dataclass(frozen=True)
class Snapshot:
    """All that was read of a machine at one time.

    `seconds` is when, by a clock that only differences of snapshots have a use for; None where it isn't known.
    """

    name: str = ""
    seconds: float | None = None
    interrupts: tuple[Interrupts, ...] = ()
    channels: tuple[ChannelList, ...] = ()
    xen_irqs: tuple[XenIrq, ...] = ()
    pins: tuple[IoapicPin, ...] = ()
    vectors: tuple[DirectVector, ...] = ()
    domains: tuple[DomainInfo, ...] = ()
    xl_domains: tuple[XlDomain, ...] = ()
    xl_vcpus: tuple[XlVcpu, ...] = ()
    store: tuple[StoreNode, ...] = ()
    irq_files: tuple[IrqFile, ...] = ()
    counters: tuple[XenbusCounter, ...] = ()
    irq_limits: tuple[IrqLimit, ...] = ()
    unread: tuple[Unread, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing was understood."""
        return not any((
            self.interrupts, self.channels, self.xen_irqs, self.pins, self.vectors, self.domains, self.xl_domains,
            self.xl_vcpus, self.store, self.irq_files, self.counters, self.irq_limits,
        ))  # fmt: skip

    @cached_property
    def paths(self) -> dict[str, StoreNode]:
        """The nodes of xenstore by path."""
        return {node.path: node for node in self.store}
