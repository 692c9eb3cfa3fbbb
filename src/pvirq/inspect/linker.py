"""Pairs a table's IRQs with a domain's ports.

No kernel says which port an IRQ has. But a timer, a VIRQ, a physical line and a queue of a network device say so by
what they are (`How.NAME`), xenstore names the ports of every device, and what is left are IRQs and ports that were
taken lowest first from two pools at the same times: their order tells (`How.ORDER`), where there are as many of one as
of the other.
"""

from __future__ import annotations

import re
from typing import Final

from pvirq.abi.xen import (
    VIRQ_CON_RING,
    VIRQ_CONSOLE,
    VIRQ_DEBUG,
    VIRQ_DOM_EXC,
    VIRQ_MCA,
    VIRQ_PCPU_STATE,
    VIRQ_TIMER,
    VIRQ_XENOPROF,
    VIRQ_XENPMU,
)
from pvirq.inspect.model import (
    Channel,
    IrqRow,
    Kind,
)
from pvirq.inspect.picture import PER_CPU_NAME, Device, DomainView, How, Link, Picture

# Handlers of VIRQs by name, in pvops and XenLinux kernels.
VIRQ_NAMES: Final = {
    "xen-pcpu": VIRQ_PCPU_STATE, "mce": VIRQ_MCA, "hvc_console": VIRQ_CONSOLE, "xencons": VIRQ_CONSOLE,
    "console": VIRQ_CONSOLE, "xenpmu": VIRQ_XENPMU, "debug": VIRQ_DEBUG, "xenoprof": VIRQ_XENOPROF,
    "con_ring": VIRQ_CON_RING,
}  # fmt: skip
VIF_FRONT: Final = re.compile(r"(?:vif|eth)(\d{1,6})(?:-q(\d{1,4})-(tx|rx)|-q(\d{1,4}))?$")
VIF_BACK: Final = re.compile(r"vif(\d{1,5})\.(\d{1,6})(?:-q(\d{1,4})(?:-(tx|rx))?|-(tx|rx))?$")


class Linker:
    """Pairs the rows of one domain's table with its ports."""

    def __init__(self, picture: Picture, view: DomainView) -> None:
        self._picture = picture
        self._view = view
        self._devices = picture.devices
        self._rows = [row for row in view.table.rows if row.irq is not None] if view.table else []
        self._free = {c.port: c for c in view.ports.channels if not c.consumer} if view.ports else {}
        self._pairs: dict[int, tuple[Channel, How]] = {}
        self._more: dict[int, list[tuple[Channel, How]]] = {}  # a line's further ports, where it has one on each vCPU

    def links(self) -> list[Link]:
        """Rows with their ports by IRQ, then ports without a row."""
        if self._free and self._rows:
            self._by_what_they_are()
            self._per_cpu_lines()
            self._by_device()
            self._by_order()
        links = []
        for row in self._rows:
            channel, how = self._pairs.get(row.irq or 0, (None, None))
            links.append(self._link(row, channel, how))
            links += [self._link(row, channel, how) for channel, how in self._more.get(row.irq or 0, [])]
        ports = self._view.ports.channels if self._view.ports else ()
        paired = {channel.port for channel, _ in self._pairs.values()}
        paired |= {channel.port for more in self._more.values() for channel, _ in more}
        links += [self._link(None, channel, None) for channel in ports if channel.port not in paired]
        return links

    def _link(self, row: IrqRow | None, channel: Channel | None, how: How | None) -> Link:
        domid = self._view.domid
        device, side = None, ""
        if channel is not None:
            device, side = self._devices.get((domid, channel.port), (None, ""))
        if device is None and row is not None:
            device, side = device_by_name(row, domid)
        peer = None
        if channel is not None and channel.kind is Kind.INTERDOMAIN and channel.remote is not None:
            peer = (channel.remote, channel.remote_port or 0)
        return Link(domid, row, channel, how, device, side, peer)

    def _pair(self, row: IrqRow, channel: Channel, how: How) -> None:
        if row.irq is not None and row.irq not in self._pairs and channel.port in self._free:
            self._pairs[row.irq] = (self._free.pop(channel.port), how)

    def _left(self) -> list[IrqRow]:
        return [row for row in self._rows if row.irq not in self._pairs and row.actions]

    def _by_what_they_are(self) -> None:
        """Timers and other VIRQs, and lines of the I/O APIC, whose pirq is their IRQ."""
        virqs = {(c.virq, c.vcpu): c for c in self._free.values() if c.kind is Kind.VIRQ}
        single = {c.virq: c for c in self._free.values() if c.kind is Kind.VIRQ}
        pirqs = {c.pirq: c for c in self._free.values() if c.kind is Kind.PIRQ}
        for row in self._rows:
            name = row.actions[0] if row.actions else ""
            match = PER_CPU_NAME.match(name)
            channel = None
            if match and match[1] in ("timer", "debug", "xenpmu") and row.flow != "ipi":
                number = {"timer": VIRQ_TIMER, "debug": VIRQ_DEBUG, "xenpmu": VIRQ_XENPMU}[match[1]]
                channel = virqs.get((number, int(match[2])))
            elif name in VIRQ_NAMES and (row.flow == "virq" or row.chip.startswith("Dynamic")):
                channel = single.get(VIRQ_NAMES[name])
            elif row.flow.startswith("ioapic") or row.chip.startswith("Phys"):
                channel = pirqs.get(row.irq)
            if channel is not None:
                self._pair(row, channel, How.NAME)

    def _per_cpu_lines(self) -> None:
        """Lines of SUSE's XenLinux that have a port on each vCPU: the timer, and IPIs in the order of the lines."""
        rows = [row for row in self._left() if row.chip == "Dynamic" and row.flow == "percpu"]
        ipis = [row for row in rows if row.name != "timer"]
        for vcpu in sorted({channel.vcpu for channel in self._free.values()}):
            mine = [channel for channel in self._ports() if channel.vcpu == vcpu]
            timers = [channel for channel in mine if channel.kind is Kind.VIRQ and channel.virq == VIRQ_TIMER]
            ports = [channel for channel in mine if channel.kind is Kind.IPI]
            for row in rows if timers else ():
                if row.name == "timer":
                    self._add(row, timers[0], How.NAME)
            if len(ports) == len(ipis):
                for row, channel in zip(ipis, ports, strict=True):
                    self._add(row, channel, How.ORDER)

    def _add(self, row: IrqRow, channel: Channel, how: How) -> None:
        """One more port of a line."""
        if row.irq not in self._pairs:
            self._pair(row, channel, how)
        elif row.irq is not None and channel.port in self._free:
            self._more.setdefault(row.irq, []).append((self._free.pop(channel.port), how))

    def _by_device(self) -> None:
        """Rows that name a queue of a device whose ports xenstore names."""
        domid = self._view.domid
        mine = {port: each for (owner, port), each in self._devices.items() if owner == domid and port in self._free}
        by_device = {
            (each.type, each.frontend, each.id, each.queue, each.direction): self._free[port]
            for port, (each, _) in mine.items()
        }
        for row in self._left():
            device, _ = device_by_name(row, domid)
            if device is None:
                continue
            for queue in (device.queue, None if device.queue == 0 else -1):  # one queue has no directory of its own
                for direction in (device.direction, ""):
                    channel = by_device.get((device.type, device.frontend, device.id, queue, direction))
                    if channel is not None:
                        self._pair(row, channel, How.NAME)
        names = {"xenbus": "store", "hvc_console": "console", "xencons": "console"}
        for row in self._left():
            kind = names.get(row.actions[0])
            fits = [
                port
                for port, (each, side) in mine.items()
                if kind == each.type and side == "front" and port in self._free
            ]
            if len(fits) == 1 and row.flow != "virq":
                self._pair(row, self._free[fits[0]], How.NAME)
        for name, kind, side in (("blkif", "vbd", "front"), ("blkif-backend", "vbd", "back")):
            rows = [row for row in self._left() if row.actions == (name,)]
            ports = sorted(
                port for port, (each, s) in mine.items() if each.type == kind and s == side and port in self._free
            )
            self._zip(rows, [self._free[port] for port in ports])

    def _by_order(self) -> None:
        """What is left, in the order in which it was made: IPIs of each vCPU, messages, then events."""
        left = self._left()
        ipis: dict[int, list[IrqRow]] = {}
        for row in left:
            match = PER_CPU_NAME.match(row.actions[0])
            if match and (row.flow == "ipi" or row.chip == "Dynamic-irq"):
                ipis.setdefault(int(match[2]), []).append(row)
        for vcpu, rows in ipis.items():
            self._zip(rows, [c for c in self._ports() if c.kind is Kind.IPI and c.vcpu == vcpu])
        rows = [row for row in self._left() if row.chip == "xen-pirq" or row.chip.startswith("Phys")]
        self._zip(rows, [c for c in self._ports() if c.kind is Kind.PIRQ])
        rows = [row for row in self._left() if self._is_event(row)]
        ports = [c for c in self._ports() if c.kind not in (Kind.IPI, Kind.PIRQ, Kind.RESERVED)]
        xenlinux = any(row.chip.startswith("Dynamic") for row in self._rows)
        self._zip(rows, [channel for channel in ports if not (xenlinux and self._is_users(channel))])

    def _is_users(self, channel: Channel) -> bool:
        """A port of a program's, which has no IRQ in a XenLinux: xenstored's and xenconsoled's of each guest.

        Of xenstored's channel to its own domain's kernel the end that was made first is the kernel's.
        """
        device, side = self._devices.get((self._view.domid, channel.port), (None, ""))
        if device is not None and side == "back" and device.type in ("store", "console"):
            return True
        own = channel.remote == self._view.domid and (channel.remote_port or 0) < channel.port
        return own or (channel.kind is Kind.VIRQ and channel.virq == VIRQ_DOM_EXC)

    def _is_event(self, row: IrqRow) -> bool:
        return row.flow == "event" or (
            row.chip in ("Dynamic", "Dynamic-irq") and not PER_CPU_NAME.match(row.actions[0])
        )

    def _ports(self) -> list[Channel]:
        return [self._free[port] for port in sorted(self._free)]

    def _zip(self, rows: list[IrqRow], channels: list[Channel]) -> None:
        """Pair them in their order, if there are as many, and no line is on another CPU than its port."""
        fits = all(self._fits(row, channel) for row, channel in zip(rows, channels, strict=False))
        if len(rows) == len(channels) and fits:
            for row, channel in zip(rows, channels, strict=True):
                self._pair(row, channel, How.ORDER)

    def _fits(self, row: IrqRow, channel: Channel) -> bool:
        """A port's vCPU is the one on which Linux has the line, as far as /proc/irq says."""
        cpus = self._picture.effective(self._view.domid, row.irq or 0)
        return not cpus or channel.vcpu in cpus


def device_by_name(row: IrqRow, domid: int) -> tuple[Device | None, str]:
    """The device that a handler's name says."""
    name = row.actions[0] if row.actions else ""
    if match := VIF_BACK.match(name):
        queue = None if match[3] is None else int(match[3])
        return Device(int(match[1]), "vif", int(match[2]), queue, match[4] or match[5] or "", row.where), "back"
    if (match := VIF_FRONT.match(name)) and (row.chip.startswith("xen-dyn") or row.chip.startswith("Dynamic")):
        queue = next((int(each) for each in (match[2], match[4]) if each is not None), None)
        return Device(domid, "vif", int(match[1]), queue, match[3] or "", row.where), "front"
    return None, ""
