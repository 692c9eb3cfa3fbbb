"""A dying domain comes to handle a global VIRQ, and stays for ever."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.abi.xen import VIRQ_CONSOLE
from pvirq.check.protocols.channels import evtchn_close
from pvirq.check.protocols.dying import complete_domain_destroy, domain_kill
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.protocols.virqs import GlobalVirqs, send_global_virq, set_global_virq_handler
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread
from pvirq.xen.evtchn_channels import ECS_VIRQ


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m, Code(checks_dying=not fault, checks_bound=not fault))
    d0, d1 = (xen.domain(domid, ports=2, virqs=VIRQ_CONSOLE + 1) for domid in (0, 1))
    handlers = GlobalVirqs(xen, VIRQ_CONSOLE + 1)
    xen.rcu_readers.initial = 1
    d0.bound(1, ECS_VIRQ, (VIRQ_CONSOLE,))
    d0.vcpus[0].virq_to_evtchn[VIRQ_CONSOLE].initial = 1

    def toolstack() -> Thread:
        # The domain was looked up while it was alive, under RCU.
        rc = yield from set_global_virq_handler(d1, handlers, VIRQ_CONSOLE)
        yield xen.rcu_readers.add(-1)
        assert rc in (0, -Errno.EINVAL, -Errno.EBUSY)

    def hardware_domain() -> Thread:
        rc = yield from evtchn_close(d0, 1)
        assert rc == 0

    def console() -> Thread:
        yield from send_global_virq(handlers, VIRQ_CONSOLE)

    m.thread("XEN_DOMCTL_set_virq_handler", toolstack)
    m.thread("XEN_DOMCTL_destroydomain", domain_kill, d1, handlers)
    m.thread("RCU", complete_domain_destroy, d1, may_wait=True)
    m.thread("d0, EVTCHNOP_close", hardware_domain)
    m.thread("VIRQ_CONSOLE", console)

    def judge(end: End) -> str | None:
        if end[d0.refcnt] != 1:
            return f"d0 has {end[d0.refcnt]} references instead of 1"
        return None if end[d1.freed] else f"d1 is dead and never freed: it has {end[d1.refcnt]} references"

    m.at_end(judge)
    return m


RACE = Race(
    name="virq-handler-dying",
    title="a domain that dies becomes the handler of a global VIRQ, and is a zombie for ever",
    where="Xen 4.2-4.19, xen/common/event_channel.c: set_global_virq_handler()",
    brought="87521589aa (4.2)",
    cured="4d8acc9c1c (4.20)",
    story=(
        "XEN_DOMCTL_set_virq_handler takes a reference to the domain that is to handle a VIRQ; a dying domain gives "
        "back those of the VIRQs that it handles. If that has been done already, the reference that is taken then is "
        "never given back, and the domain never freed. The cure is to look, with the lock of the handlers held, "
        "whether the domain is dying: if not yet, its references are still to be given back. (The model without the "
        "fault also refuses a VIRQ that its handler has bound, as 980822c5ed does since.)"
    ),
    model=model,
)
