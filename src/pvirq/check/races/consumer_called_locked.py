"""A function of Xen's that consumes events is called with a lock held that its owner wants, too."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.check.protocols.channels import evtchn_close, evtchn_send, notify_via_xen_event_channel
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread
from pvirq.xen.evtchn_channels import ECS_FREE, ECS_INTERDOMAIN, ECS_UNBOUND


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m, Code(calls_unlocked=not fault))
    d0, d1 = xen.domain(0, ports=2), xen.domain(1, ports=2)
    d0.bound(1, ECS_INTERDOMAIN, (1, 1))
    d1.bound(1, ECS_INTERDOMAIN, (0, 1), consumer=1)
    ved = m.lock("ved->lock")

    def monitor_notification() -> Thread:
        """vm_event_resume(), as far as its lock goes."""
        yield ved.acquire()
        yield ved.release()

    def monitor() -> Thread:
        for _ in range(2):
            rc = yield from evtchn_send(d0, 1, monitor_notification)
            assert rc in (0, -Errno.EINVAL)

    def disable() -> Thread:
        yield ved.acquire()
        rc = yield from evtchn_close(d1, 1, guest=False)
        assert rc == 0
        yield ved.release()

    def request() -> Thread:
        yield ved.acquire()
        yield ved.release()
        yield from notify_via_xen_event_channel(d1, 1)

    m.thread("d0, EVTCHNOP_send", monitor)
    m.thread("d0, XEN_VM_EVENT_DISABLE", disable)
    m.thread("d1, vm_event_put_request", request)

    def judge(end: End) -> str | None:
        if end.waiting:
            return None  # a deadlock
        if (end[d0.channels[1].state], end[d1.channels[1].state]) != (ECS_UNBOUND, ECS_FREE):
            return "d0's end doesn't wait, or d1's isn't free"
        return None if end[d1.active_evtchns] == end[d1.xen_evtchns] == 0 else "d1 counts ports, and has none"

    m.at_end(judge)
    return m


RACE = Race(
    name="consumer-called-locked",
    title="EVTCHNOP_send calls a function of Xen's with the channel locked, and waits for who closes the channel",
    where="Xen 4.6-4.14, xen/common/event_channel.c: evtchn_send(); vm_event.c: vm_event_resume(), vm_event_disable()",
    brought="de6acb78bf (4.6)",
    cured="1376ef90d3 (4.15)",
    story=(
        "An event for one of Xen's own channels, as a monitor of a domain sends it, calls a function in Xen. "
        "evtchn_send() did so with the sender's channel locked; vm_event_resume() takes the lock of the domain's "
        "ring. vm_event_disable() holds that one when it closes the channel, for which both ends' locks are needed: "
        "each waits for the other. The cure, made because nobody can see what such functions lock, is to release the "
        "channel's lock before the call."
    ),
    model=model,
)
