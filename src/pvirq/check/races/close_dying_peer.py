"""A channel is closed whose other end belongs to a domain that dies."""

from __future__ import annotations

from pvirq.check.protocols.channels import evtchn_close
from pvirq.check.protocols.dying import complete_domain_destroy, domain_kill
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread
from pvirq.xen.evtchn_channels import ECS_FREE, ECS_INTERDOMAIN


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m, Code(rcu=False, closes_when_killed=not fault))
    d0, d1, d2 = (xen.domain(domid, ports=ports) for domid, ports in ((0, 2), (1, 3), (2, 2)))
    d0.bound(1, ECS_INTERDOMAIN, (1, 1))
    d1.bound(1, ECS_INTERDOMAIN, (0, 1))
    d1.bound(2, ECS_INTERDOMAIN, (2, 1))
    d2.bound(1, ECS_INTERDOMAIN, (1, 2))

    def backend() -> Thread:
        rc = yield from evtchn_close(d0, 1)
        assert rc == 0

    m.thread("d0, EVTCHNOP_close", backend)
    for d in (d1, d2):
        m.thread(f"XEN_DOMCTL_destroydomain of d{d.domid}", domain_kill, d)
        m.thread(f"RCU, d{d.domid}", complete_domain_destroy, d)

    def judge(end: End) -> str | None:
        if end[d0.channels[1].state] != ECS_FREE:
            return "d0's port 1 is in use, and d0 has closed it"
        for d in (d0, d1, d2):
            if end[d.active_evtchns]:
                return f"d{d.domid} counts {end[d.active_evtchns]} ports in use, and has none"
        return None

    m.at_end(judge)
    return m


RACE = Race(
    name="close-dying-peer",
    title="a channel is closed while the other end's domain is destroyed",
    where="Xen 2.0-3.1, xen/common/event_channel.c: __evtchn_close(), evtchn_destroy()",
    brought="77dcac7bd0 (June 2004)",
    cured="f8a7ef4fec (3.2)",
    story=(
        "Ports of a dead domain were closed once nobody referred to it any more, just before it was freed. "
        "EVTCHNOP_close of the other end then could get no reference, left the work to the dying domain, and returned "
        "success; but that one only makes the port wait for a peer again: it is never free. And of two dead domains "
        "with a channel between them the first to be freed skips it for the same reason, so that the second follows "
        "a pointer to a domain that is gone. The cure is to close all ports while the domain is being killed."
    ),
    model=model,
)
