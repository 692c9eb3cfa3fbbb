"""The end of a domain, as far as its ports go (xen/common/domain.c, event_channel.c)."""

from __future__ import annotations

from pvirq.check.protocols.channels import evtchn_close
from pvirq.check.protocols.ports import Domain, put_domain
from pvirq.check.protocols.virqs import GlobalVirqs, clear_global_virq_handlers
from pvirq.check.steps import Thread, fail


def domain_kill(d: Domain, handlers: GlobalVirqs | None = None) -> Thread:
    """XEN_DOMCTL_destroydomain, not preempted: from here on no port can be taken; all are closed."""
    yield d.is_dying.write(1).saying(f"d{d.domid} is dying")
    if d.code.closes_when_killed:
        yield from _evtchn_destroy(d)
        if handlers is not None:
            yield from clear_global_virq_handlers(d, handlers)
    yield from put_domain(d)


def complete_domain_destroy(d: Domain) -> Thread:
    """RCU's callback, once nobody refers to the domain."""
    yield d.refcnt.wait(lambda count: count == 0).saying(f"waits until nobody refers to d{d.domid}")
    yield d.xen.rcu_readers.wait(lambda count: count == 0).saying("waits for CPUs that may have seen it before")
    if not d.code.closes_when_killed:
        yield from _evtchn_destroy(d)
    yield d.freed.write(1).saying(f"frees d{d.domid}")


def _evtchn_destroy(d: Domain) -> Thread:
    # Who is about to take a port has done so, or sees that the domain is dying.
    yield d.event_lock.read_acquire()
    yield d.event_lock.read_release()
    valid = yield d.valid_evtchns.read()
    for port in range(valid - 1, 0, -1):
        yield from evtchn_close(d, port, guest=False)
    active = yield d.active_evtchns.read()
    if active and d.code.closes_when_killed:
        fail(f"ASSERT: {active} ports of d{d.domid} are in use after all were closed")
