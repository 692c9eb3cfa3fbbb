"""SCHEDOP_poll looks at the port before others see that it polls."""

from __future__ import annotations

from pvirq.check.protocols.polling import PolledDomain, do_poll, evtchn_2l_set_pending, lost, poll_timer_fn
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread, choose


def model(fault: bool) -> Model:
    m = Model(order="tso")
    d = PolledDomain(m, vcpus=2, masked=0b110, before_2008=fault)
    v0, v1 = d.vcpus

    def timer() -> Thread:
        if (yield choose(2, "the time is up, or far away")):
            yield from poll_timer_fn(v1)

    m.thread("vCPU 0, SCHEDOP_poll", do_poll, v0, (1,), may_wait=True)
    m.thread("vCPU 1, SCHEDOP_poll", do_poll, v1, (1, 2), may_wait=True)
    m.thread("a sender to port 1", evtchn_2l_set_pending, v0, 1)
    m.thread("vCPU 1's time is up", timer)

    def judge(end: End) -> str | None:
        return lost(v0, (1,), end.values) or lost(v1, (1, 2), end.values)

    m.at_end(judge)
    return m


RACE = Race(
    name="poll-barrier",
    title="SCHEDOP_poll reads the pending bit before its flags are seen, and sleeps for ever",
    where="Xen 3.1-3.3 on x86, xen/common/schedule.c: do_poll(); event_channel.c: evtchn_set_pending()",
    brought="90bc7dea0e (3.1)",
    cured="ef4c6b079c (3.4)",
    story=(
        "A vCPU that polls sets flags that say so, and then looks at its ports. Whoever raises an event sets the "
        "port's bit, and then looks at the flags. The flags were plain stores with a wmb() behind them, which doesn't "
        "keep a later load from being done first: x86 has the stores in a buffer while the port is read. Each sees "
        "the other's old value, and nobody wakes the vCPU. The cure is a bit in d->poll_mask: set_bit is a locked "
        "instruction, elsewhere an mb() follows."
    ),
    model=model,
)
