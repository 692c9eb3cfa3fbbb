"""SCHEDOP_poll and who ends it (xen/common/sched/core.c, event_channel.c), under the two-level ABI.

Bits of a bitmap are ports or vCPUs; a vCPU runs where `blocked` is 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from pvirq.check.protocols.ports import Fixed
from pvirq.check.steps import Model, Thread, Var, mb, wmb


class PolledDomain(Fixed):
    """A domain whose vCPUs poll. `before_2008`: with `is_polling` flags instead of poll_mask and poll_evtchn."""

    def __hash__(self) -> int:
        return id(self)  # it never changes, and it and its vCPUs refer to each other: a thread's state has it as such

    def __init__(
        self, model: Model, *, vcpus: int, masked: int = 0, before_2008: bool = False, checks_upcall: bool = True,
        unblocks_again: bool = True,
    ) -> None:  # fmt: skip
        """`masked`: ports that are masked, as a bitmap."""
        self.before_2008 = before_2008
        self.checks_upcall = checks_upcall  # do_poll() looks whether an upcall is due (27b186a0db)
        self.unblocks_again = unblocks_again  # vcpu_unblock() does if it took the vCPU out of poll_mask
        self.evtchn_pending = model.var("evtchn_pending", 0)
        self.evtchn_mask = model.var("evtchn_mask", masked)
        self.poll_mask = model.var("poll_mask", 0)
        self.is_polling = model.var("d->is_polling", 0)
        self.vcpus = tuple(PollingVcpu(model, self, vcpu_id) for vcpu_id in range(vcpus))


class PollingVcpu(Fixed):
    """A vCPU that may poll. `poll_evtchn`: the one port that it polls, -1 several, 0 none."""

    def __hash__(self) -> int:
        return id(self)

    def __init__(self, model: Model, domain: PolledDomain, vcpu_id: int) -> None:
        name = f"v{vcpu_id}"
        self.domain = domain
        self.vcpu_id = vcpu_id
        self.blocked = model.var(f"{name} is blocked", 0)
        self.poll_evtchn = model.var(f"{name}->poll_evtchn", 0)
        self.is_polling = model.var(f"{name}->is_polling", 0)
        self.evtchn_upcall_pending = model.var(f"{name}.evtchn_upcall_pending", 0)
        self.evtchn_upcall_mask = model.var(f"{name}.evtchn_upcall_mask", 0)
        self.evtchn_pending_sel = model.var(f"{name}.evtchn_pending_sel", 0)


def local_events_need_delivery(v: PollingVcpu) -> Thread:
    """Is an upcall due?"""
    if not (yield v.evtchn_upcall_pending.read()):
        return False
    masked = yield v.evtchn_upcall_mask.read()
    return not masked


def do_poll(v: PollingVcpu, ports: Iterable[int]) -> Thread:
    """SCHEDOP_poll without a timeout, and the sleep that follows. (set_bit is a barrier, on x86.)"""
    if v.domain.before_2008:
        yield from _do_poll_before_2008(v, ports)
        return
    d = v.domain
    polled = tuple(ports)
    yield v.blocked.set_bit(0).saying("is blocked")
    yield v.poll_evtchn.write(-1)
    yield d.poll_mask.set_bit(v.vcpu_id).saying("is in poll_mask")
    found = d.checks_upcall and (yield from local_events_need_delivery(v))
    for port in () if found else polled:
        pending = yield d.evtchn_pending.read()
        if pending >> port & 1:
            found = True
            break
    if found:
        yield v.poll_evtchn.write(0)
        yield d.poll_mask.clear_bit(v.vcpu_id)
        yield v.blocked.clear_bit(0).saying("goes on: there is something")
        return
    if len(polled) == 1:
        yield v.poll_evtchn.write(polled[0])
    yield v.blocked.wait(lambda blocked: not blocked).saying("sleeps until it is woken")


def _do_poll_before_2008(v: PollingVcpu, ports: Iterable[int]) -> Thread:
    d = v.domain
    yield v.blocked.set_bit(0).saying("is blocked")
    yield v.is_polling.write(1)
    yield d.is_polling.write(1)
    yield wmb()  # that was all
    found = d.checks_upcall and (yield from local_events_need_delivery(v))
    for port in () if found else ports:
        pending = yield d.evtchn_pending.read()
        if pending >> port & 1:
            found = True
            break
    if found:
        yield v.is_polling.write(0)
        yield v.blocked.clear_bit(0).saying("goes on: there is something")
        return
    yield v.blocked.wait(lambda blocked: not blocked).saying("sleeps until it is woken")


def evtchn_2l_set_pending(v: PollingVcpu, port: int) -> Thread:
    """Raise an event that `v` is to be notified of, and wake who polls for it."""
    d = v.domain
    if (yield d.evtchn_pending.set_bit(port).saying(f"port {port} is pending")):
        return
    masked = yield d.evtchn_mask.read()
    if not masked >> port & 1 and not (yield v.evtchn_pending_sel.set_bit(0)):
        yield from vcpu_mark_events_pending(v)
    yield from evtchn_check_pollers(d, port)


def vcpu_mark_events_pending(v: PollingVcpu) -> Thread:
    """An upcall is due: the vCPU is woken if it sleeps."""
    if not (yield v.evtchn_upcall_pending.set_bit(0).saying(f"v{v.vcpu_id} has an upcall due")):
        yield from vcpu_unblock(v)


def evtchn_check_pollers(d: PolledDomain, port: int) -> Thread:
    """Wake vCPUs that may be polling a port."""
    if d.before_2008:
        yield from _check_pollers_before_2008(d)
        return
    if (yield d.poll_mask.read()) == 0:
        return
    for v in d.vcpus:
        # The bitmap is read again for each next bit.
        mask = yield d.poll_mask.read()
        if not mask >> v.vcpu_id & 1:
            continue
        polled = yield v.poll_evtchn.read()
        if (polled <= 0 or polled == port) and (yield d.poll_mask.clear_bit(v.vcpu_id)):
            yield v.poll_evtchn.write(0)
            yield from vcpu_unblock(v)


def _check_pollers_before_2008(d: PolledDomain) -> Thread:
    if not (yield d.is_polling.read()):
        return
    yield d.is_polling.write(0)
    yield mb()
    for v in d.vcpus:
        if (yield v.is_polling.read()):
            yield v.is_polling.write(0)
            yield from vcpu_unblock(v)


def vcpu_unblock(v: PollingVcpu) -> Thread:
    """End a vCPU's sleep, and its poll: it may have begun a new one meanwhile."""
    if not (yield v.blocked.clear_bit(0).saying(f"wakes v{v.vcpu_id}")):
        return
    if v.domain.before_2008:
        return
    if (yield v.poll_evtchn.read()):
        yield v.poll_evtchn.write(0)
        if (yield v.domain.poll_mask.clear_bit(v.vcpu_id)) and v.domain.unblocks_again:
            yield v.blocked.clear_bit(0).saying(f"wakes v{v.vcpu_id}, which may have polled anew")


def poll_timer_fn(v: PollingVcpu) -> Thread:
    """The time that the vCPU wanted to wait is up."""
    if v.domain.before_2008:
        if (yield v.is_polling.read()):
            yield v.is_polling.write(0)
            yield from vcpu_unblock(v)
    elif (yield v.domain.poll_mask.clear_bit(v.vcpu_id)):
        yield from vcpu_unblock(v)


def lost(v: PollingVcpu, ports: Iterable[int], values: dict[Var, int]) -> str | None:
    """What is wrong at the end if a vCPU sleeps in a poll of `ports`."""
    d = v.domain
    if not values[v.blocked]:
        return None
    for port in ports:
        if values[d.evtchn_pending] >> port & 1:
            return f"v{v.vcpu_id} sleeps until port {port} is pending, and it is"
    if values[v.evtchn_upcall_pending] and not values[v.evtchn_upcall_mask]:
        return f"v{v.vcpu_id} sleeps, and an upcall is due"
    return None
