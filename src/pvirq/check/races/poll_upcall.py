"""SCHEDOP_poll sleeps although an upcall is due."""

from __future__ import annotations

from pvirq.check.protocols.polling import PolledDomain, do_poll, evtchn_2l_set_pending, lost, poll_timer_fn
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread, choose


def model(fault: bool) -> Model:
    m = Model(order="tso")
    d = PolledDomain(m, vcpus=1, masked=0b100, checks_upcall=not fault)
    (v,) = d.vcpus

    def timer() -> Thread:
        if (yield choose(2, "the time is up, or far away")):
            yield from poll_timer_fn(v)

    def perhaps() -> Thread:
        if (yield choose(2, "sends to port 2, or doesn't")):
            yield from evtchn_2l_set_pending(v, 2)

    m.thread("vCPU 0, SCHEDOP_poll", do_poll, v, (2,), may_wait=True)
    m.thread("a sender to port 1", evtchn_2l_set_pending, v, 1)
    m.thread("a sender to port 2", perhaps)
    m.thread("the poll's timer", timer)

    def judge(end: End) -> str | None:
        return lost(v, (2,), end.values)

    m.at_end(judge)
    return m


RACE = Race(
    name="poll-upcall",
    title="SCHEDOP_poll sleeps although an upcall came just before",
    where="Xen 3.0.3-3.3, xen/common/schedule.c: do_poll()",
    brought="6553807e77 (3.0.3)",
    cured="27b186a0db (3.4)",
    story=(
        "A guest may poll some ports with upcalls enabled: an event of any other port is to end the poll. If it comes "
        "after the hypercall has begun, but before the vCPU is blocked, waking does nothing, and the upcall waits as "
        "long as the vCPU sleeps. The cure is to look for an upcall that is due after blocking."
    ),
    model=model,
)
