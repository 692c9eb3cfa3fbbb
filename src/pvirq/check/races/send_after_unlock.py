"""evtchn_send() lets go of its lock before it sets the other end pending."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.check.protocols.channels import evtchn_alloc_unbound, evtchn_bind_interdomain, evtchn_close, evtchn_send
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m, Code(sends_locked=not fault))
    d1, d2, d3 = (xen.domain(domid, ports=2) for domid in (1, 2, 3))
    d1.bound(1, ECS_INTERDOMAIN, (2, 1))
    d2.bound(1, ECS_INTERDOMAIN, (1, 1))

    def sender() -> Thread:
        for _ in range(2):
            rc = yield from evtchn_send(d1, 1)
            assert rc in (0, -Errno.EINVAL if fault else 0)  # nothing is sent while d1's end waits again

    def other_end() -> Thread:
        rc = yield from evtchn_close(d2, 1)
        assert rc == 0
        port = yield from evtchn_alloc_unbound(d2, 3)
        assert port == 1

    def third() -> Thread:
        port = yield from evtchn_bind_interdomain(d3, 2, 1)
        assert port in (1, -Errno.EINVAL)

    m.thread("d1, EVTCHNOP_send", sender)
    m.thread("d2, EVTCHNOP_close and alloc_unbound", other_end)
    m.thread("d3, EVTCHNOP_bind_interdomain", third)
    m.at_end(
        lambda end: "d2's port 1 is d3's to send to, and has an event of d1's" if end[d2.channels[1].pending] else None
    )
    if not fault:
        m.at_end(lambda end: _counted(xen, end))
    return m


def _counted(xen: Xen, end: End) -> str | None:
    for d in xen.domains.values():
        used = sum(end[channel.state] > 1 for channel in d.channels)
        if used != end[d.active_evtchns]:
            return f"{used} ports of d{d.domid} are in use, {end[d.active_evtchns]} are counted"
    return None


RACE = Race(
    name="send-after-unlock",
    title="an event arrives at a port that belongs to somebody else by now",
    where="Xen 1.3-devel, xen/common/event_channel.c: evtchn_send()",
    brought="5b9331a6f5 (November 2003)",
    cured="60b6be9ccd (June 2004)",
    story=(
        "EVTCHNOP_send looked up the remote domain and port under its own domain's lock, and released it before it "
        "set that port pending. Meanwhile the other end may be closed and the port taken for another domain, whose "
        "first event is then one that it never sent. The cure keeps the lock: closing needs the locks of both ends. "
        "(That a port loses its event when it is closed came later, with 120785c177; both models have that.)"
    ),
    model=model,
)
