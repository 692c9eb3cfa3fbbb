"""Event channels as Xen's own tools print them: `lsevtchn DOMID`, and the 'e' debug key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import (
    EVTCHNSTAT_closed,
    EVTCHNSTAT_interdomain,
    EVTCHNSTAT_pirq,
    EVTCHNSTAT_unbound,
    EVTCHNSTAT_virq,
)
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen.bitmap import bitmap_list
from pvirq.xen.evtchn import Status, status
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN, ECS_PIRQ, ECS_UNBOUND, ECS_VIRQ, Channel

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor


def lsevtchn(domain: Domain) -> str:
    """What `lsevtchn` prints for a domain: one line per bound port, Xen's own left out (lsevtchn.c)."""
    lines = []
    for port in range(len(domain.evtchn.channels)):
        try:
            state = status(domain, DOMID_SELF, port)
        except XenError as error:
            if error.errno != Errno.EACCES:
                raise
            continue
        if state.status != EVTCHNSTAT_closed:
            lines.append(f"{port:4d}: VCPU {state.vcpu}: {describe(state)}\n")
    return "".join(lines)


def describe(state: Status) -> str:
    """What `lsevtchn` says of a bound port."""
    if state.status == EVTCHNSTAT_unbound:
        return f"Interdomain (Waiting connection) - Remote Domain {state.dom}"
    if state.status == EVTCHNSTAT_interdomain:
        return f"Interdomain (Connected) - Remote Domain {state.dom}, Port {state.port}"
    if state.status == EVTCHNSTAT_pirq:
        return f"Physical IRQ {state.pirq}"
    if state.status == EVTCHNSTAT_virq:
        return f"Virtual IRQ {state.virq}"
    return "IPI"


def debug_e(hypervisor: Hypervisor) -> str:
    """The console output of the 'e' debug key (dump_evtchn_info): all ports of all domains.

    [p/m/s] is pending, masked, and the ABI's own state: the word's selector bit, or (FIFO) busy and the link.
    """
    lines = ["'e' pressed -> dumping event-channel info"]
    for _, domain in sorted(hypervisor.domains.items()):
        polling = bitmap_list([vcpu.vcpu_id for vcpu in domain.vcpus if vcpu.polling])
        lines += (
            f"Event channel information for domain {domain.domid}:",
            f"Polling vCPUs: {{{polling}}}",
            "    port [p/m/s]",
        )
        lines += (_channel_line(domain, channel) for channel in domain.evtchn)
    return "".join(f"(XEN) {line}\n" for line in lines)


def _channel_line(domain: Domain, channel: Channel) -> str:
    evtchn, port, state = domain.evtchn, channel.port, channel.state
    # Xen numbers the functions that consume for it, in the order of their first use; here they are one kind.
    consumer = int(channel.consumer is not None)
    line = (
        f"    {port:4d} [{evtchn.is_pending(port):d}/{evtchn.is_masked(port):d}/{evtchn.ops.state(channel)}]:"
        f" s={state} n={channel.notify_vcpu} x={consumer}"
    )
    if state == ECS_UNBOUND:
        line += f" d={channel.remote_domid}"
    elif state == ECS_INTERDOMAIN:
        assert channel.remote_domain is not None
        line += f" d={channel.remote_domain.domid} p={channel.remote_port}"
    elif state == ECS_PIRQ:
        line += f" p={channel.pirq} i={evtchn.pirqs.irq(channel.pirq)}"
    elif state == ECS_VIRQ:
        line += f" v={channel.virq}"
    return line
