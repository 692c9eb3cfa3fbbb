"""Xen's operations on ports: bind, close, send, reset, and the change of ABI (event_channel.c, event_fifo.c).

Results are 0 or a port, or minus an errno, as hypercalls have them.
"""

from __future__ import annotations

from collections.abc import Callable

from pvirq.abi.errno import Errno
from pvirq.check.protocols.ports import (
    FIFO,
    NULL,
    TWO_LEVEL,
    Channel,
    Domain,
    check_free_port,
    evtchn_free,
    evtchn_from_port,
    evtchn_port_is_pending,
    evtchn_port_set_pending,
    evtchn_usable,
    find_port,
    get_domain,
    get_free_port,
    port_is_valid,
    put_domain,
)
from pvirq.check.steps import Thread, Var, fail, look, rmb
from pvirq.xen.evtchn_channels import (
    ECS_FREE,
    ECS_INTERDOMAIN,
    ECS_IPI,
    ECS_RESERVED,
    ECS_UNBOUND,
    ECS_VIRQ,
    virq_is_global,
)
from pvirq.xen.evtchn_fifo import MAX_ARRAY_PAGES

# -- binding -----------------------------------------------------------------------------------------------------------


def evtchn_alloc_unbound(d: Domain, remote_domid: int) -> Thread:
    """EVTCHNOP_alloc_unbound: a port of `d` that a domain may bind to."""
    yield d.event_lock.acquire()
    port = yield from get_free_port(d)
    if port < 0:
        yield d.event_lock.release()
        return port
    channel = yield from evtchn_from_port(d, port)
    yield channel.lock.acquire()
    yield channel.state.write(ECS_UNBOUND).saying(f"d{d.domid}'s port {port} waits for d{remote_domid}")
    yield channel.u.write((remote_domid,))
    yield channel.lock.release()
    yield d.event_lock.release()
    return port


def evtchn_bind_ipi(d: Domain, vcpu: int) -> Thread:
    """EVTCHNOP_bind_ipi."""
    if vcpu >= len(d.vcpus):
        return -Errno.ENOENT
    yield d.event_lock.acquire()
    port = yield from get_free_port(d)
    if port < 0:
        yield d.event_lock.release()
        return port
    channel = yield from evtchn_from_port(d, port)
    yield channel.lock.acquire()
    yield channel.state.write(ECS_IPI).saying(f"d{d.domid}'s port {port} is an IPI of vCPU {vcpu}")
    yield channel.notify_vcpu_id.write(vcpu)
    yield channel.lock.release()
    yield d.event_lock.release()
    return port


def evtchn_bind_interdomain(ld: Domain, remote_domid: int, rport: int) -> Thread:
    """EVTCHNOP_bind_interdomain: a port of `ld`, connected to one that waits for it, and made pending."""
    rd = ld.xen.domains[remote_domid]
    # No deadlock: the domain that comes first is locked first.
    for each in dict.fromkeys((min(ld.domid, rd.domid), max(ld.domid, rd.domid))):
        yield ld.xen.domains[each].event_lock.acquire()
    lport = yield from get_free_port(ld)
    if lport < 0:
        rc = lport
    else:
        rc = yield from _bind_interdomain(ld, lport, rd, rport)
        if rc < 0:
            yield from check_free_port(ld, lport)
    yield ld.event_lock.release()
    if ld is not rd:
        yield rd.event_lock.release()
    return rc


def _bind_interdomain(ld: Domain, lport: int, rd: Domain, rport: int) -> Thread:
    lchn = yield from evtchn_from_port(ld, lport)
    rchn = yield from find_port(rd, rport)
    if rchn is None:
        return -Errno.EINVAL
    if (yield rchn.state.read()) != ECS_UNBOUND or (yield rchn.u.read()) != (ld.domid,):
        return -Errno.EINVAL
    yield from double_evtchn_lock(lchn, rchn)
    yield lchn.u.write((rd.domid, rport))
    yield lchn.state.write(ECS_INTERDOMAIN).saying(f"d{ld.domid}'s port {lport} is bound to d{rd.domid}'s {rport}")
    yield rchn.u.write((ld.domid, lport))
    yield rchn.state.write(ECS_INTERDOMAIN).saying(f"d{rd.domid}'s port {rport} is bound to d{ld.domid}'s {lport}")
    # What the other end sent while it had no peer is lost, perhaps.
    yield from evtchn_port_set_pending(ld, lchn)
    yield from double_evtchn_unlock(lchn, rchn)
    return lport


def double_evtchn_lock(lchn: Channel, rchn: Channel) -> Thread:
    """Both ends, in an order that all agree on."""
    first, second = (lchn, rchn) if lchn.key < rchn.key else (rchn, lchn)
    yield first.lock.acquire()
    yield second.lock.acquire()


def double_evtchn_unlock(lchn: Channel, rchn: Channel) -> Thread:
    yield lchn.lock.release()
    yield rchn.lock.release()


# -- channels of Xen's own ---------------------------------------------------------------------------------------------


def get_xen_consumer(slots: list[Var], function: str, *, cmpxchg: bool) -> Thread:
    """The number, from 1, under which a function is kept in xen_consumers[]."""
    for number, slot in enumerate(slots):
        if (yield slot.read()) == "":
            if cmpxchg:
                yield slot.cmpxchg("", function)
            else:
                yield slot.write(function)
        if (yield slot.read()) == function:
            return number + 1
    return fail("BUG_ON: xen_consumers[] is full")


def alloc_unbound_xen_event_channel(d: Domain, remote_domid: int, slots: list[Var], function: str) -> Thread:
    """A port of `d` whose events a function of Xen's gets."""
    yield d.event_lock.acquire()
    port = yield from get_free_port(d)
    if port < 0:
        yield d.event_lock.release()
        return port
    channel = yield from evtchn_from_port(d, port)
    yield channel.lock.acquire()
    yield channel.state.write(ECS_UNBOUND)
    consumer = yield from get_xen_consumer(slots, function, cmpxchg=d.code.consumer_cmpxchg)
    yield channel.xen_consumer.write(consumer)
    yield channel.u.write((remote_domid,))
    yield channel.lock.release()
    count = yield d.xen_evtchns.read()
    yield d.xen_evtchns.write(count + 1)
    yield d.event_lock.release()
    return port


# -- closing -----------------------------------------------------------------------------------------------------------


def evtchn_close(d1: Domain, port1: int, *, guest: bool = True) -> Thread:
    """EVTCHNOP_close; what is Xen's own only without `guest`. The other end waits again."""
    chn1 = yield from find_port(d1, port1)
    if chn1 is None:
        return -Errno.EINVAL
    d2: Domain | None = None
    rc = 0
    while True:  # again
        yield d1.event_lock.acquire()
        if guest and (yield chn1.xen_consumer.read()):
            rc = -Errno.EINVAL
            break
        state = yield chn1.state.read()
        if state in (ECS_FREE, ECS_RESERVED):
            rc = -Errno.EINVAL
            break
        if state != ECS_INTERDOMAIN:
            if state == ECS_VIRQ:
                yield from _close_virq(d1, chn1)
            yield chn1.lock.acquire()
            yield from evtchn_free(d1, chn1)
            yield chn1.lock.release()
            break
        remote = yield chn1.u.read()
        if d2 is None:
            d2 = d1.xen.domains[remote[0]]
            if not d1.code.rcu and not (yield from get_domain(d2)):
                if d1.code.closes_when_killed:
                    fail("BUG_ON: the other end's domain is gone, and didn't close its ports")
                # It is dying, and will close the channel.
                d2 = None
                break
            if d1.domid < d2.domid or (d1 is not d2 and not d1.code.orders_locks):
                yield d2.event_lock.acquire()
            elif d1 is not d2:
                # The other one has to be locked first. Until both are, all may change.
                yield d1.event_lock.release()
                yield d2.event_lock.acquire()
                continue
        elif d2.domid != remote[0] and d1.code.looks_again:
            # Closed and bound anew, to another domain, while nobody held the lock.
            rc = -Errno.EINVAL
            break
        yield from _close_interdomain(d1, chn1, d2, remote[1])
        break
    if d2 is not None:
        if d2 is not d1:
            yield d2.event_lock.release()
        if not d1.code.rcu:
            yield from put_domain(d2)
    yield d1.event_lock.release()
    return rc


def _close_interdomain(d1: Domain, chn1: Channel, d2: Domain, port2: int) -> Thread:
    chn2 = yield from find_port(d2, port2)
    if chn2 is None:
        fail("BUG_ON: the other end's port isn't valid")
    if (yield chn2.state.read()) != ECS_INTERDOMAIN:
        fail("BUG_ON: the other end isn't bound")
    if (yield chn2.u.read())[0] != d1.domid:
        fail("BUG_ON: the other end is bound to another domain")
    yield from double_evtchn_lock(chn1, chn2)
    yield from evtchn_free(d1, chn1)
    yield chn2.state.write(ECS_UNBOUND).saying(f"d{d2.domid}'s port {port2} waits again")
    yield chn2.u.write((d1.domid,))
    yield from double_evtchn_unlock(chn1, chn2)


def _close_virq(d: Domain, channel: Channel) -> Thread:
    (virq,) = yield channel.u.read()
    number = 0 if virq_is_global(virq) else (yield channel.notify_vcpu_id.read())
    vcpu = d.vcpus[number]
    if d.code.virq_lock:
        yield vcpu.virq_lock.acquire()
        yield vcpu.virq_to_evtchn[virq].write(0)
        yield vcpu.virq_lock.release()
    else:
        yield vcpu.virq_to_evtchn[virq].write(0)


# -- using -------------------------------------------------------------------------------------------------------------


def evtchn_send(ld: Domain, lport: int, consumer: Callable[[], Thread] | None = None) -> Thread:
    """EVTCHNOP_send. Only the near end's lock is needed: neither end changes without both.

    `consumer` is what Xen does if the other end is its own.
    """
    lchn = yield from find_port(ld, lport)
    if lchn is None:
        return -Errno.EINVAL
    if not ld.code.sends_locked:
        return (yield from _evtchn_send_2004(ld, lchn))
    yield lchn.lock.read_acquire()
    rc = 0
    if (yield lchn.xen_consumer.read()):
        rc = -Errno.EINVAL
    else:
        state = yield lchn.state.read()
        if state == ECS_INTERDOMAIN:
            domid, rport = yield lchn.u.read()
            rd = ld.xen.domains[domid]
            rchn = yield from evtchn_from_port(rd, rport)
            if not (yield rchn.xen_consumer.read()):
                yield from evtchn_port_set_pending(rd, rchn)
            elif consumer is not None:
                if ld.code.calls_unlocked:
                    yield lchn.lock.read_release()
                    yield from consumer()
                    return 0
                yield from consumer()
        elif state == ECS_IPI:
            yield from evtchn_port_set_pending(ld, lchn)
        elif state != ECS_UNBOUND:
            rc = -Errno.EINVAL
    yield lchn.lock.read_release()
    return rc


def notify_via_xen_event_channel(ld: Domain, lport: int) -> Thread:
    """Notify the other end of a channel of Xen's own. Where it is being bound or closed, there is nobody to notify."""
    lchn = yield from find_port(ld, lport)
    if lchn is None or not (yield lchn.lock.read_trylock()):
        return
    if (yield lchn.state.read()) == ECS_INTERDOMAIN:
        domid, rport = yield lchn.u.read()
        rd = ld.xen.domains[domid]
        rchn = yield from evtchn_from_port(rd, rport)
        yield from evtchn_port_set_pending(rd, rchn)
    yield lchn.lock.read_release()


def _evtchn_send_2004(ld: Domain, lchn: Channel) -> Thread:
    """As it was first: there are no locks of channels, and the domain's isn't held to the end."""
    yield ld.event_lock.acquire()
    if (yield lchn.state.read()) != ECS_INTERDOMAIN:
        yield ld.event_lock.release()
        return -Errno.EINVAL
    domid, rport = yield lchn.u.read()
    yield ld.event_lock.release()
    rd = ld.xen.domains[domid]
    yield rd.channels[rport].pending.set_bit(0).saying(f"d{domid}'s port {rport} is pending")
    return 0


def evtchn_unmask(d: Domain, port: int) -> Thread:
    """EVTCHNOP_unmask, as far as the port goes: whoever unmasks looks whether it is pending."""
    channel = yield from find_port(d, port)
    if channel is None:
        return -Errno.EINVAL
    if d.code.channel_lock:
        yield channel.lock.read_acquire()
        yield from evtchn_port_is_pending(d, channel)
        yield channel.lock.read_release()
    else:
        yield from evtchn_port_is_pending(d, channel)
    return 0


def evtchn_port_poll(d: Domain, port: int) -> Thread:
    """What SCHEDOP_poll asks of a port: 1 if it is pending, 0 if not, -EINVAL if it isn't the guest's."""
    channel = yield from find_port(d, port)
    if channel is None:
        return -Errno.EINVAL
    yield channel.lock.read_acquire()
    rc = -Errno.EINVAL
    if (yield from evtchn_usable(channel)):
        rc = int((yield from evtchn_port_is_pending(d, channel)))
    yield channel.lock.read_release()
    return rc


# -- reset, and the ABIs -----------------------------------------------------------------------------------------------


def has_active_evtchns(d: Domain) -> Thread:
    """Are there ports of the guest's own?"""
    xen = yield d.xen_evtchns.read()
    if d.weak:
        yield rmb()
    active = yield d.active_evtchns.read()
    return active > xen


def evtchn_reset(d: Domain) -> Thread:
    """EVTCHNOP_reset of a domain by itself, not preempted: close all ports, return to the two-level ABI."""
    counts = d.code.counts_ports
    if counts:
        yield d.event_lock.acquire()
        running = yield d.next_evtchn.read()
        if not running:
            yield d.next_evtchn.write(1)
        yield d.event_lock.release()
        if running:
            return -Errno.EBUSY
    port = 1
    while (yield from port_is_valid(d, port)):
        if counts and not (yield from has_active_evtchns(d)):
            break
        yield from evtchn_close(d, port)
        port += 1
    yield d.event_lock.acquire()
    if counts:
        yield d.next_evtchn.write(0)
        active = yield d.active_evtchns.read()
        xen = yield d.xen_evtchns.read()
        if active > xen:
            yield d.event_lock.release()
            return -Errno.EAGAIN
    yield from evtchn_fifo_destroy(d)
    yield d.event_lock.release()
    return 0


def evtchn_fifo_destroy(d: Domain) -> Thread:
    """Back to the two-level ABI, if the domain isn't there; the event lock is held."""
    fifo = yield d.evtchn_fifo.read()
    if fifo == NULL:
        return
    words = yield d.num_evtchns.read()
    mapped = yield d.mapped.read()
    yield d.mapped.write(mapped - words // d.per_page)
    yield d.fifo_live.write(NULL).saying("frees evtchn_fifo")
    yield d.evtchn_fifo.write(NULL)
    yield d.evtchn_port_ops.write(TWO_LEVEL)


def evtchn_fifo_init_control(d: Domain) -> Thread:
    """EVTCHNOP_init_control, as far as the domain goes: the first one changes to the FIFO ABI."""
    yield d.event_lock.acquire()
    if (yield d.evtchn_fifo.read()) == NULL:
        number = yield d.fifo_count.add(1)
        yield d.num_evtchns.write(0)
        yield d.fifo_live.write(number + 1)
        yield d.evtchn_fifo.write(number + 1).saying("allocates evtchn_fifo")
        yield d.evtchn_port_ops.write(FIFO)
    yield d.event_lock.release()
    return 0


def evtchn_fifo_expand_array(d: Domain) -> Thread:
    """EVTCHNOP_expand_array: one page of event words more."""
    if not d.code.checks_fifo_locked and (yield d.evtchn_fifo.read()) == NULL:
        return -Errno.EOPNOTSUPP
    yield d.event_lock.acquire()
    rc = -Errno.EOPNOTSUPP
    if not d.code.checks_fifo_locked or (yield d.evtchn_fifo.read()) != NULL:
        rc = yield from _add_page_to_event_array(d)
    yield d.event_lock.release()
    return rc


def _add_page_to_event_array(d: Domain) -> Thread:
    fifo = yield d.evtchn_fifo.read()
    if fifo == NULL:
        fail("add_page_to_event_array() follows evtchn_fifo, which is NULL")
    live, words = yield look((d.fifo_live, d.num_evtchns), text="reads evtchn_fifo->num_evtchns")
    if live != fifo:
        fail("add_page_to_event_array() uses evtchn_fifo after it was freed")
    if words // d.per_page >= MAX_ARRAY_PAGES:
        return -Errno.ENOSPC
    mapped = yield d.mapped.read()
    yield d.mapped.write(mapped + 1).saying("maps a page of event words")
    yield d.num_evtchns.write(words + d.per_page)
    return 0
