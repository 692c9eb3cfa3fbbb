"""Virtual IRQs: binding, sending, and the domain that handles a global one (xen/common/event_channel.c)."""

from __future__ import annotations

from typing import Final

from pvirq.abi.errno import Errno
from pvirq.check.protocols.ports import (
    Domain,
    Fixed,
    Xen,
    evtchn_from_port,
    evtchn_port_set_pending,
    get_domain,
    get_free_port,
    put_domain,
)
from pvirq.check.steps import Thread, fail
from pvirq.xen.evtchn_channels import ECS_VIRQ, virq_is_global


def evtchn_bind_virq(d: Domain, virq: int, vcpu: int, handlers: GlobalVirqs | None = None) -> Thread:
    """EVTCHNOP_bind_virq. With `handlers`, -EBUSY: another domain handles it (since 4.21)."""
    if virq >= len(d.vcpus[0].virq_to_evtchn) or (virq_is_global(virq) and vcpu):
        return -Errno.EINVAL
    if vcpu >= len(d.vcpus):
        return -Errno.ENOENT
    ports = d.vcpus[vcpu].virq_to_evtchn
    yield d.event_lock.acquire()
    if handlers is not None and virq_is_global(virq) and (yield from get_global_virq_handler(handlers, virq)) is not d:
        yield d.event_lock.release()
        return -Errno.EBUSY
    if (yield ports[virq].read()):
        yield d.event_lock.release()
        return -Errno.EEXIST
    port = yield from get_free_port(d)
    if port < 0:
        yield d.event_lock.release()
        return port
    channel = yield from evtchn_from_port(d, port)
    yield channel.lock.acquire()
    yield channel.state.write(ECS_VIRQ).saying(f"d{d.domid}'s port {port} is VIRQ {virq} of vCPU {vcpu}")
    yield channel.notify_vcpu_id.write(vcpu)
    yield channel.u.write((virq,))
    yield channel.lock.release()
    yield ports[virq].write(port)
    yield d.event_lock.release()
    return port


def send_guest_vcpu_virq(d: Domain, vcpu: int, virq: int) -> Thread:
    """Raise a VIRQ at the port that it is bound to. A timer's interrupt does so, and waits for nobody.

    The result: the event is new there. (Which vCPU hears of it is no part of this, and the only difference between
    this one and send_guest_domain_virq.)
    """
    sent = False
    lock = d.vcpus[vcpu].virq_lock
    if d.code.virq_lock:
        yield lock.read_acquire()
    port = yield d.vcpus[vcpu].virq_to_evtchn[virq].read()
    if port:
        channel = yield from evtchn_from_port(d, port)
        if not d.code.channel_lock:
            sent = yield from evtchn_port_set_pending(d, channel)
        # Who holds it for writing binds or closes the port: in either case the event may be lost.
        elif (yield channel.lock.read_trylock()):
            sent = yield from evtchn_port_set_pending(d, channel)
            yield channel.lock.read_release()
    if d.code.virq_lock:
        yield lock.read_release()
    return sent


NOBODY: Final = -1  # in global_virq_handlers[]: the hardware domain handles it


class GlobalVirqs(Fixed):
    """global_virq_handlers[], with its lock, for VIRQs 0 to `count` - 1."""

    def __init__(self, xen: Xen, count: int, *, hardware_domain: int = 0) -> None:
        self.xen = xen
        self.hardware_domain = hardware_domain
        self.lock = xen.model.lock("global_virq_handlers_lock")
        self.domids = xen.model.array("global_virq_handlers", count, NOBODY)


def get_global_virq_handler(handlers: GlobalVirqs, virq: int) -> Thread:
    """The domain that handles a global VIRQ."""
    domid = yield handlers.domids[virq].read()
    return handlers.xen.domains[handlers.hardware_domain if domid == NOBODY else domid]


def set_global_virq_handler(d: Domain, handlers: GlobalVirqs, virq: int) -> Thread:
    """XEN_DOMCTL_set_virq_handler. -EBUSY: the one that handles it has it bound; -EINVAL: the domain is dying."""
    if virq >= len(handlers.domids) or not virq_is_global(virq):
        return -Errno.EINVAL
    handler = handlers.domids[virq]
    if (yield handler.read()) == d.domid:
        return 0
    if not (yield from get_domain(d)):
        return -Errno.EINVAL
    yield handlers.lock.acquire()
    rc = 0
    if d.code.checks_dying and (yield d.is_dying.read()):
        old, rc = d.domid, -Errno.EINVAL
    else:
        old = yield handler.read()
        now = yield from get_global_virq_handler(handlers, virq)
        if d.code.checks_bound and now is not d:
            yield now.event_lock.read_acquire()
            if (yield now.vcpus[0].virq_to_evtchn[virq].read()):
                old, rc = d.domid, -Errno.EBUSY
            else:
                yield handler.write(d.domid).saying(f"d{d.domid} handles VIRQ {virq}")
            yield now.event_lock.read_release()
        elif not d.code.checks_bound:
            yield handler.write(d.domid).saying(f"d{d.domid} handles VIRQ {virq}")
    yield handlers.lock.release()
    if old != NOBODY:
        yield from put_domain(d.xen.domains[old])
    return rc


def clear_global_virq_handlers(d: Domain, handlers: GlobalVirqs) -> Thread:
    """A domain dies: the hardware domain handles what it handled."""
    yield handlers.lock.acquire()
    count = 0
    for virq, handler in enumerate(handlers.domids):
        if (yield handler.read()) == d.domid:
            yield handler.write(NOBODY).saying(f"d{d.domid} no longer handles VIRQ {virq}")
            count += 1
    yield handlers.lock.release()
    for _ in range(count):
        yield from put_domain(d)


def send_global_virq(handlers: GlobalVirqs, virq: int) -> Thread:
    """Raise a global VIRQ in the domain that handles it. The result: the event is new there."""
    # An interrupt's handler: RCU waits for a CPU until it is through with that.
    readers = handlers.xen.rcu_readers
    yield readers.add(1).saying("takes an interrupt")
    d = yield from get_global_virq_handler(handlers, virq)
    sent = yield from send_guest_domain_virq(d, virq)
    if (yield d.freed.read()):
        fail(f"d{d.domid} was freed meanwhile")
    yield readers.add(-1).saying("has handled the interrupt")
    return sent


def send_guest_domain_virq(d: Domain, virq: int) -> Thread:
    """Raise a VIRQ that isn't a vCPU's own."""
    return (yield from send_guest_vcpu_virq(d, 0, virq))
