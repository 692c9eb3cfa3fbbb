"""One picture of a machine: domains, and what links an IRQ, a port, a device and the other end."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Final

from pvirq.inspect.model import (
    Channel,
    ChannelList,
    DomainInfo,
    Interrupts,
    IrqRow,
    Snapshot,
    VcpuInfo,
    XlDomain,
    XlVcpu,
)
from pvirq.inspect.source import Where
from pvirq.inspect.xendumps import cpu_list

PER_CPU_NAME: Final = re.compile(
    r"(timer|debug|resched|callfunc|callfuncsingle|call1func|irqwork|spinlock|reboot|xenpmu|qlock_kick)(\d{1,5})$"
)


class How(StrEnum):
    """How an IRQ's port is known."""

    NAME = "name"
    ORDER = "order"


@dataclass(frozen=True)
class Device:
    """A split-driver device, or one queue of it, by its frontend. `type` is xenstore's (vbd, vif), store or console."""

    frontend: int
    type: str
    id: int = 0
    queue: int | None = None
    direction: str = ""  # tx, rx, or "" where one port has both
    where: Where | None = None

    @property
    def name(self) -> str:
        """As "vif 0 queue 1 tx"."""
        if self.type in ("store", "console"):
            return {"store": "xenstore", "console": "console"}[self.type]
        queue = "" if self.queue is None else f" queue {self.queue}"
        return f"{self.type} {self.id}{queue}{' ' + self.direction if self.direction else ''}"


@dataclass(frozen=True)
class Link:
    """An IRQ and its port, as far as either is known. `peer` is the other end's domain and port."""

    domid: int
    row: IrqRow | None = None
    channel: Channel | None = None
    how: How | None = None
    device: Device | None = None
    side: str = ""  # front or back, where there is a device
    peer: tuple[int, int] | None = None

    @property
    def evidence(self) -> tuple[Where, ...]:
        """Where all that stands."""
        found = (self.row and self.row.where, self.channel and self.channel.where, self.device and self.device.where)
        return tuple(where for where in found if where)


@dataclass
class DomainView:
    """A domain in the picture. A negative `domid` is a machine of which only tables were given."""

    domid: int
    name: str = ""
    table: Interrupts | None = None
    earlier: Interrupts | None = None
    ports: ChannelList | None = None
    links: list[Link] = field(default_factory=list)
    info: DomainInfo | None = None
    xl: XlDomain | None = None
    vcpus: dict[int, XlVcpu] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As "domain 1 (u2)"."""
        if self.domid < 0:
            return "a machine" if not self.table else f"the machine of {self.table.where.file}"
        return f"domain {self.domid}{f' ({self.name})' if self.name else ''}"

    def vcpu_info(self, vcpu: int) -> VcpuInfo | None:
        """A vCPU as the 'q' key has it."""
        return next((each for each in self.info.vcpus if each.vcpu == vcpu), None) if self.info else None

    @cached_property
    def by_irq(self) -> dict[int, Link]:
        """Links by IRQ; of a line with several ports the first."""
        return {link.row.irq: link for link in reversed(self.links) if link.row and link.row.irq is not None}

    @cached_property
    def by_port(self) -> dict[int, Link]:
        return {link.channel.port: link for link in self.links if link.channel}


@dataclass
class Picture:
    """All domains. `complete`: a list of domains was read, so that there are no others."""

    snapshot: Snapshot
    domains: dict[int, DomainView]
    complete: bool
    earlier: Snapshot | None = None
    devices: dict[tuple[int, int], tuple[Device, str]] = field(default_factory=dict)  # (domain, port): device, side

    before: Picture | None = None  # the earlier snapshot's
    superseded: tuple[ChannelList, ...] = ()  # older dumps of event channels, which have no part in it
    interval: float | None = None  # between the two snapshots, where their own times don't tell

    @property
    def seconds(self) -> float | None:
        """Between the two snapshots; None where it isn't known."""
        if self.interval is not None:
            return self.interval
        then, now = self.earlier.seconds if self.earlier else None, self.snapshot.seconds
        return now - then if then is not None and now is not None and now > then else None

    def affinity(self, domid: int, irq: int) -> tuple[int, ...]:
        """The CPUs on which a line's interrupts come, or may come, as /proc/irq says; () where it doesn't."""
        return self.effective(domid, irq) or self._affinities["smp_affinity_list"].get((domid, irq), ())

    def effective(self, domid: int, irq: int) -> tuple[int, ...]:
        """The CPU (or CPUs) that a line is on now; () where that isn't known."""
        return self._affinities["effective_affinity_list"].get((domid, irq), ())

    @cached_property
    def _affinities(self) -> dict[str, dict[tuple[int, int], tuple[int, ...]]]:
        found: dict[str, dict[tuple[int, int], tuple[int, ...]]] = {
            "smp_affinity_list": {}, "effective_affinity_list": {},
        }  # fmt: skip
        for file in self.snapshot.irq_files:
            if file.name in found and (cpus := cpu_list(file.value)):
                found[file.name][_domid_of_hint(self, file.hint), file.irq] = cpus
        return found


def _domid_of_hint(picture: Picture, hint: str) -> int:
    if hint.isdecimal():
        return int(hint)
    domids = [domid for domid, view in picture.domains.items() if view.table]
    if hint == "domU":
        return next((domid for domid in domids if domid != 0), -1)
    return domids[0] if len(domids) == 1 else 0
