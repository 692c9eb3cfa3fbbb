"""Ports and IRQs of a modelled kernel side by side."""

from __future__ import annotations

from typing import Any

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import EVTCHNSTAT_closed
from pvirq.abi.xen import DOMID_SELF
from pvirq.linux.irq import IrqError
from pvirq.linux.kernel import Kernel
from pvirq.xen import evtchn
from pvirq.xen.evtchn_views import describe


def irq_map(kernel: Kernel[Any]) -> str:
    """Which port is which IRQ, a line each: port, vCPU, IRQ, the IRQ's handlers, and what the port is to Xen.

    A port without an IRQ ("-") is one that the kernel's event-channel device serves, or has left to nobody.
    """
    domain = kernel.domain
    irqs = {port: irq for irq in kernel.irq.descs for port in kernel.events.ports_of_irq(irq)}
    lines = ["port vcpu  irq  handlers              channel\n"]
    for channel in domain.evtchn:
        try:
            status = evtchn.status(domain, DOMID_SELF, channel.port)
        except XenError:  # Xen's own
            continue
        if status.status == EVTCHNSTAT_closed:
            continue
        irq = irqs.get(channel.port)
        names = "-" if irq is None else ", ".join(action.name for action in kernel.irq.descs[irq].actions) or "-"
        number = "-" if irq is None else str(irq)
        lines.append(f"{channel.port:4d} {status.vcpu:4d} {number:>4}  {names:<20}  {describe(status)}\n")
    return "".join(lines)


def find_irq(kernel: Kernel[Any], wanted: str | int) -> int:
    """An IRQ by number, or the first one that has a handler of that name. IrqError(EINVAL) where there is none."""
    for irq, desc in sorted(kernel.irq.descs.items()):
        if irq == wanted or any(action.name == wanted for action in desc.actions):
            return irq
    raise IrqError(Errno.EINVAL, f"no IRQ {wanted!r}")
