"""Event channel operations: every EVTCHNOP_*, virtual IRQs, Xen's own channels (xen/common/event_channel.c).

Each operation checks in Xen's order, because a guest sees which of two errors it gets, and because a failed
one may have left its mark (a port array that has grown).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, TypeVar

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import (
    BIND_PIRQ__WILL_SHARE,
    EVTCHN_FIFO_LINK_BITS,
    EVTCHNSTAT_closed,
    EVTCHNSTAT_interdomain,
    EVTCHNSTAT_ipi,
    EVTCHNSTAT_pirq,
    EVTCHNSTAT_unbound,
    EVTCHNSTAT_virq,
)
from pvirq.abi.xen import DOMID_SELF, NR_VIRQS
from pvirq.xen.evtchn_channels import (
    ECS_FREE,
    ECS_INTERDOMAIN,
    ECS_IPI,
    ECS_PIRQ,
    ECS_RESERVED,
    ECS_UNBOUND,
    ECS_VIRQ,
    Channel,
    EventChannels,
    Pirqs,
    XenConsumer,
    virq_is_global,
)
from pvirq.xen.evtchn_fifo import Fifo

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor, Vcpu

__all__ = [
    "Channel",
    "EventChannels",
    "Pirqs",
    "Status",
    "XenConsumer",
    "alloc_unbound",
    "alloc_unbound_xen_event_channel",
    "bind_interdomain",
    "bind_ipi",
    "bind_pirq",
    "bind_vcpu",
    "bind_virq",
    "close",
    "expand_array",
    "free_xen_event_channel",
    "init_control",
    "notify_via_xen_event_channel",
    "reset",
    "send",
    "send_global_virq",
    "send_guest_domain_virq",
    "send_guest_vcpu_virq",
    "set_global_virq_handler",
    "set_priority",
    "status",
    "unmask",
    "virq_enabled",
    "virq_is_global",
]

P = ParamSpec("P")
R = TypeVar("R")

_STATUS: Final = {
    ECS_FREE: EVTCHNSTAT_closed,
    ECS_RESERVED: EVTCHNSTAT_closed,
    ECS_UNBOUND: EVTCHNSTAT_unbound,
    ECS_INTERDOMAIN: EVTCHNSTAT_interdomain,
    ECS_PIRQ: EVTCHNSTAT_pirq,
    ECS_VIRQ: EVTCHNSTAT_virq,
    ECS_IPI: EVTCHNSTAT_ipi,
}


@dataclass(frozen=True, slots=True)
class Status:
    """What EVTCHNOP_status tells: `status` is an EVTCHNSTAT_*; fields that it doesn't use are 0."""

    status: int
    vcpu: int
    dom: int = 0
    port: int = 0
    pirq: int = 0
    virq: int = 0


def _operation(function: Callable[Concatenate[Domain, P], R]) -> Callable[Concatenate[Domain, P], R]:
    """An EVTCHNOP_*, which the caller's `EventChannels.check` may refuse. (`send` and `unmask` ask it themselves.)"""
    name = function.__name__

    @wraps(function)
    def operation(caller: Domain, /, *args: P.args, **kwargs: P.kwargs) -> R:
        check = caller.evtchn.check
        if check is not None:
            check(name)
        return function(caller, *args, **kwargs)

    return operation


def _check_target(caller: Domain, target: Domain) -> None:
    """The default policy for acting on a domain's channels (xsm/dummy.h, XSM_TARGET)."""
    if caller is not target and not caller.privileged:
        raise XenError(Errno.EPERM, f"{caller} may not act on {target}")


@_operation
def alloc_unbound(caller: Domain, dom: int, remote_dom: int, port: int = 0) -> int:
    """EVTCHNOP_alloc_unbound: a port in `dom` that `remote_dom` may bind to; DOMID_SELF is the caller.

    Raises ESRCH, ENOSPC, EINVAL (dying), EPERM; with a `port` asked for (0: the lowest free one) EBUSY.
    """
    domain = caller.hypervisor.find_domain(dom, caller)
    evtchn = domain.evtchn
    channel = evtchn.allocate(port)
    try:
        _check_target(caller, domain)
    except XenError:
        evtchn.check_free(channel)
        raise
    channel.state = ECS_UNBOUND
    channel.remote_domid = caller.domid if remote_dom == DOMID_SELF else remote_dom
    evtchn.ops.init(channel)
    return channel.port


@_operation
def bind_interdomain(caller: Domain, remote_dom: int, remote_port: int) -> int:
    """EVTCHNOP_bind_interdomain: connect a new local port to an unbound one that waits for the caller.

    The local port is made pending: the remote end may have notified in vain before. Raises ESRCH, ENOSPC,
    EINVAL.
    """
    remote_domain = caller.hypervisor.find_domain(remote_dom, caller)
    evtchn = caller.evtchn
    local = evtchn.allocate()
    try:
        remote = remote_domain.evtchn.port(remote_port)
        if remote.state != ECS_UNBOUND or remote.remote_domid != caller.domid:
            raise XenError(Errno.EINVAL, f"port {remote_port} of {remote_domain} does not wait for {caller}")
    except XenError:
        evtchn.check_free(local)
        raise
    local.remote_domain = remote_domain
    local.remote_port = remote_port
    local.state = ECS_INTERDOMAIN
    evtchn.ops.init(local)
    remote.remote_domain = caller
    remote.remote_port = local.port
    remote.state = ECS_INTERDOMAIN
    evtchn.set_pending(local, local.notify_vcpu)
    return local.port


@_operation
def bind_virq(caller: Domain, virq: int, vcpu: int) -> int:
    """EVTCHNOP_bind_virq. Raises EINVAL (number; a global VIRQ off vCPU 0), ENOENT (vCPU), EEXIST, ENOSPC."""
    if not 0 <= virq < NR_VIRQS or (virq_is_global(virq) and vcpu != 0):
        raise XenError(Errno.EINVAL, f"VIRQ {virq} on vCPU {vcpu}")
    ports = caller.vcpu(vcpu).virq_to_evtchn
    if ports[virq]:
        raise XenError(Errno.EEXIST, f"VIRQ {virq} is bound to port {ports[virq]}")
    evtchn = caller.evtchn
    channel = evtchn.allocate()
    channel.state = ECS_VIRQ
    channel.notify_vcpu = vcpu
    channel.virq = virq
    evtchn.ops.init(channel)
    ports[virq] = channel.port
    return channel.port


@_operation
def bind_ipi(caller: Domain, vcpu: int) -> int:
    """EVTCHNOP_bind_ipi: a port whose notifications go to a vCPU of the caller. Raises ENOENT, ENOSPC."""
    caller.vcpu(vcpu)
    evtchn = caller.evtchn
    channel = evtchn.allocate()
    channel.state = ECS_IPI
    channel.notify_vcpu = vcpu
    evtchn.ops.init(channel)
    return channel.port


@_operation
def bind_pirq(caller: Domain, pirq: int, flags: int) -> int:
    """EVTCHNOP_bind_pirq, on vCPU 0. Raises EINVAL, EPERM, EEXIST, ENOSPC, and what the line refuses with."""
    evtchn, pirqs = caller.evtchn, caller.evtchn.pirqs
    if not 0 <= pirq < pirqs.nr_pirqs:
        raise XenError(Errno.EINVAL, f"no pirq {pirq}")
    if not pirqs.access_permitted(pirq):
        raise XenError(Errno.EPERM, f"{caller} may not use pirq {pirq}")
    if pirqs.port_of(pirq):
        raise XenError(Errno.EEXIST, f"pirq {pirq} is bound to port {pirqs.port_of(pirq)}")
    channel = evtchn.allocate()
    try:
        pirqs.bind(pirq, channel.port, caller.vcpus[0], bool(flags & BIND_PIRQ__WILL_SHARE))
    except XenError:
        evtchn.check_free(channel)
        raise
    channel.state = ECS_PIRQ
    channel.pirq = pirq
    evtchn.ops.init(channel)
    pirqs.bound(pirq)
    return channel.port


@_operation
def close(caller: Domain, port: int) -> None:
    """EVTCHNOP_close. Raises EINVAL."""
    caller.evtchn.close(port)


def send(caller: Domain, port: int) -> None:
    """EVTCHNOP_send: notify the other end; lost while none is bound. Raises EINVAL for any other kind."""
    evtchn = caller.evtchn
    if evtchn.check is not None:
        evtchn.check("send")
    channels = evtchn.channels
    if not 0 <= port < len(channels):
        raise XenError(Errno.EINVAL, f"no port {port}")
    channel = channels[port]
    state = channel.state
    if channel.consumer is not None:
        raise XenError(Errno.EINVAL, f"port {port} is Xen's")
    if state == ECS_INTERDOMAIN:
        domain = channel.remote_domain
        assert domain is not None
        remote_evtchn = domain.evtchn
        remote = remote_evtchn.channels[channel.remote_port]
        vcpu = domain.vcpus[remote.notify_vcpu]
        if remote.consumer is not None:
            remote.consumer(vcpu, remote.port)
        else:
            remote_evtchn.ops.set_pending(vcpu, remote)
    elif state == ECS_IPI:
        evtchn.ops.set_pending(caller.vcpus[channel.notify_vcpu], channel)
    elif state != ECS_UNBOUND:
        raise XenError(Errno.EINVAL, f"port {port} has no other end")


@_operation
def status(caller: Domain, dom: int, port: int) -> Status:
    """EVTCHNOP_status. Raises ESRCH, EINVAL (no such port), EACCES (Xen's own), EPERM."""
    domain = caller.hypervisor.find_domain(dom, caller)
    channel = domain.evtchn.port(port)
    if channel.consumer is not None:
        raise XenError(Errno.EACCES, f"port {port} is Xen's")
    _check_target(caller, domain)
    state = channel.state
    kind, vcpu = _STATUS[state], channel.notify_vcpu
    if state == ECS_UNBOUND:
        return Status(kind, vcpu, dom=channel.remote_domid)
    if state == ECS_INTERDOMAIN:
        assert channel.remote_domain is not None
        return Status(kind, vcpu, dom=channel.remote_domain.domid, port=channel.remote_port)
    if state == ECS_PIRQ:
        return Status(kind, vcpu, pirq=channel.pirq)
    if state == ECS_VIRQ:
        return Status(kind, vcpu, virq=channel.virq)
    return Status(kind, vcpu)


@_operation
def bind_vcpu(caller: Domain, port: int, vcpu: int) -> None:
    """EVTCHNOP_bind_vcpu: notify that vCPU from now on; an event already pending stays where it is.

    Raises ENOENT (vCPU), EINVAL for a port that isn't bound or can't move (IPI, per-vCPU VIRQ, Xen's).
    """
    target = caller.vcpu(vcpu)
    channel = caller.evtchn.port(port)
    state = channel.state
    movable = state in (ECS_UNBOUND, ECS_INTERDOMAIN, ECS_PIRQ) or (state == ECS_VIRQ and virq_is_global(channel.virq))
    if channel.consumer is not None or not movable:
        raise XenError(Errno.EINVAL, f"port {port} can't move")
    if state == ECS_PIRQ and channel.notify_vcpu != vcpu:
        caller.evtchn.pirqs.set_affinity(channel.pirq, target)
    channel.notify_vcpu = vcpu
    if (told := caller.hypervisor.probes.on_bound) is not None:
        told(("bound", caller, channel))


def unmask(caller: Domain, port: int) -> None:
    """EVTCHNOP_unmask: clear the mask bit, deliver what is pending. Raises EINVAL for no port at all."""
    evtchn = caller.evtchn
    if evtchn.check is not None:
        evtchn.check("unmask")
    channel = evtchn.port(port)
    if channel.consumer is None and channel.state > ECS_RESERVED:
        evtchn.ops.unmask(channel)


@_operation
def reset(caller: Domain, dom: int, resuming: bool = False) -> None:
    """EVTCHNOP_reset: close all ports of a domain and return it to the two-level ABI.

    Raises ESRCH, EPERM, and EINVAL for another domain that is not paused. `resuming` is EVTCHNOP_reset_cont;
    as no reset is ever preempted here, there is none to go on with: EBUSY.
    """
    domain = caller.hypervisor.find_domain(dom, caller)
    _check_target(caller, domain)
    if domain is not caller and not domain.paused:
        raise XenError(Errno.EINVAL, f"{domain} is not paused")
    if resuming:
        raise XenError(Errno.EBUSY, "no reset is under way")
    domain.evtchn.reset()


@_operation
def init_control(caller: Domain, gfn: int, offset: int, vcpu: int) -> int:
    """EVTCHNOP_init_control: give a vCPU its control block; the first switches the domain to the FIFO ABI.

    `gfn` is the frame (an mfn for a PV guest), `offset` of the block in it a multiple of 8. Returns the
    number of link bits. Raises ENOENT (vCPU), EINVAL (offset, frame, or the vCPU has one already).
    """
    target = caller.vcpu(vcpu)
    evtchn = caller.evtchn
    Fifo.check_offset(offset)
    if isinstance(evtchn.ops, Fifo):
        evtchn.ops.map_control_block(target, gfn, offset)
    else:
        two_level = evtchn.ops
        fifo = Fifo(caller, evtchn.channels)
        fifo.map_control_block(target, gfn, offset)
        evtchn.use(fifo)
        for channel in evtchn.channels[1 : two_level.max_channels]:
            if two_level.is_raw_pending(channel.port):
                channel.pending = True
            fifo.set_priority_default(channel)
    return EVTCHN_FIFO_LINK_BITS


@_operation
def expand_array(caller: Domain, gfn: int) -> None:
    """EVTCHNOP_expand_array: one page more of event words. Raises EOPNOTSUPP (no FIFO), ENOSPC, EINVAL."""
    ops = caller.evtchn.ops
    if not isinstance(ops, Fifo):
        raise XenError(Errno.EOPNOTSUPP, "not under the FIFO ABI")
    ops.add_page(gfn)


@_operation
def set_priority(caller: Domain, port: int, priority: int) -> None:
    """EVTCHNOP_set_priority, 0 (highest) to 15. Raises EINVAL, ENOSYS (two-level), EACCES (not in use)."""
    evtchn = caller.evtchn
    channel = evtchn.port(port)
    if evtchn.ops.fifo and not channel.usable:
        raise XenError(Errno.EACCES, f"port {port} is not in use")
    evtchn.ops.set_priority(channel, priority)


def send_guest_vcpu_virq(vcpu: Vcpu, virq: int) -> None:
    """Raise a per-vCPU VIRQ; nothing happens where it isn't bound."""
    port = vcpu.virq_to_evtchn[virq]
    if port:
        evtchn = vcpu.domain.evtchn
        evtchn.ops.set_pending(vcpu, evtchn.channels[port])


def send_guest_domain_virq(domain: Domain, virq: int) -> None:
    """Raise a global VIRQ in one domain (send_guest_global_virq)."""
    port = domain.vcpus[0].virq_to_evtchn[virq]
    if port:
        channel = domain.evtchn.channels[port]
        domain.evtchn.ops.set_pending(domain.vcpus[channel.notify_vcpu], channel)


def send_global_virq(hypervisor: Hypervisor, virq: int) -> None:
    """Raise a global VIRQ in the domain that handles it: domain 0 unless another was set."""
    domain = hypervisor.global_virq_handlers.get(virq) or hypervisor.domains.get(0)
    if domain is not None:
        send_guest_domain_virq(domain, virq)


def set_global_virq_handler(domain: Domain, virq: int) -> None:
    """Make `domain` the handler of a global VIRQ (XEN_DOMCTL_set_virq_handler). Raises EINVAL."""
    if not 0 <= virq < NR_VIRQS or not virq_is_global(virq) or domain.dying:
        raise XenError(Errno.EINVAL, f"VIRQ {virq} has no handler domain")
    domain.hypervisor.global_virq_handlers[virq] = domain


def virq_enabled(vcpu: Vcpu, virq: int) -> bool:
    """Is the VIRQ bound (evtchn_virq_enabled)?"""
    return bool((vcpu.domain.vcpus[0] if virq_is_global(virq) else vcpu).virq_to_evtchn[virq])


def alloc_unbound_xen_event_channel(domain: Domain, vcpu: int, remote_dom: int, consumer: XenConsumer) -> int:
    """A port in `domain` whose notifications Xen consumes: `consumer` is called instead of the guest.

    To the guest the port is closed to everything (EINVAL; EACCES for its status). Raises EINVAL (dying),
    ENOSPC.
    """
    evtchn = domain.evtchn
    channel = evtchn.allocate()
    channel.state = ECS_UNBOUND
    channel.consumer = consumer
    channel.notify_vcpu = vcpu
    channel.remote_domid = remote_dom
    evtchn.xen_active += 1
    return channel.port


def free_xen_event_channel(domain: Domain, port: int) -> None:
    """Close such a port. Raises EINVAL."""
    domain.evtchn.close(port, guest=False)


def notify_via_xen_event_channel(domain: Domain, port: int) -> None:
    """Notify the other end of such a port; nothing happens while none is bound."""
    channels = domain.evtchn.channels
    if 0 <= port < len(channels) and channels[port].state == ECS_INTERDOMAIN:
        channel = channels[port]
        assert channel.remote_domain is not None
        remote_evtchn = channel.remote_domain.evtchn
        remote = remote_evtchn.channels[channel.remote_port]
        remote_evtchn.set_pending(remote, remote.notify_vcpu)
