"""A poll's time is up after its domain was killed, and poll_mask is gone."""

from __future__ import annotations

from pvirq.check.protocols.polling import PolledDomain, do_poll, poll_timer_fn
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread, atomically, fail


def model(fault: bool) -> Model:
    m = Model(order="tso")
    d = PolledDomain(m, vcpus=1, masked=0b10)
    (v,) = d.vcpus
    poll_mask = m.var("d->poll_mask is allocated", 1)
    timer = m.var("v0's poll_timer", "armed")
    references = m.var("references to the domain", 1)

    def expire() -> Thread:
        # The timer's lock decides between this and kill_timer().
        (was,) = yield atomically((timer,), lambda is_now: ("runs" if is_now == "armed" else is_now,))
        if was != "armed":
            return
        if not (yield poll_mask.read()):
            fail("poll_timer_fn() follows d->poll_mask, which is NULL")
        yield from poll_timer_fn(v)
        yield atomically((timer,), lambda _: ("has run",))

    def kill() -> Thread:
        # The domain is paused, and its ports are closed.
        if fault:
            yield poll_mask.write(0).saying("evtchn_destroy() frees d->poll_mask")
        yield references.add(-1)

    def complete_domain_destroy() -> Thread:
        yield references.wait(lambda count: count == 0)
        yield atomically(
            (timer,), lambda _: ("killed",), lambda is_now: is_now != "runs", "kill_timer(), in sched_destroy_vcpu()"
        )
        if not fault:
            yield poll_mask.write(0).saying("evtchn_destroy_final() frees d->poll_mask")

    m.thread("vCPU 0, SCHEDOP_poll", do_poll, v, (1,), may_wait=True)
    m.thread("the poll's timer", expire)
    m.thread("XEN_DOMCTL_destroydomain", kill)
    m.thread("RCU", complete_domain_destroy)
    return m


RACE = Race(
    name="poll-mask-freed",
    title="a timer ends a poll of a domain that was killed, whose poll_mask is freed",
    where="Xen 3.5-unstable, xen/common/event_channel.c: evtchn_destroy(); schedule.c: poll_timer_fn()",
    brought="fb442e2171 (June 2009)",
    cured="27062e851f (4.0)",
    story=(
        "With more vCPUs than bits in a word d->poll_mask is allocated apart. It was freed with the domain's ports, as "
        "soon as the domain was killed; but timers of its vCPUs live until nobody refers to the domain, and one that "
        "ends a poll clears the vCPU's bit there. The cure is to free it last."
    ),
    model=model,
)
